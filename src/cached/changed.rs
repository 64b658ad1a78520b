//! Waiting for a value in tasks.

use std::future::Future;
use std::pin::Pin;
use std::ptr;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};

use super::period::{Period, Report};
use super::{Cached, Entry};
use crate::error::Error;
use crate::os::clock::coarse_now;
use crate::synchronizer::{GenerationSynchronizer, Ticket};
use crate::wait::SLICE;
use crate::wait::notifier::{Registration, Target};

impl<T: ?Sized> Cached<T> {
    /// A future that is ready when the value that was in place at the call is expired, because of its key, a key that it
    /// [depends on](crate::CachedBuilder::depends_on) or its [age](crate::CachedBuilder::max_age); or when another thread has
    /// replaced the value. If there is no value, it is ready at once. It does not load, as loaders may block: call
    /// [`get`](Self::get) then, where blocking is allowed.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use gensync::{Cached, GenerationSynchronizer, Table};
    /// # fn load_routes() -> Result<Vec<String>, std::io::Error> { Ok(Vec::new()) }
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # tokio::runtime::Builder::new_current_thread().build()?.block_on(async {
    /// # let table = Table::options().anonymous()?;
    /// let routes = Arc::new(Cached::new(GenerationSynchronizer::new(&table, "routes")?, load_routes));
    /// loop {
    ///     routes.changed().await?;
    ///     let routes = Arc::clone(&routes);
    ///     match tokio::task::spawn_blocking(move || routes.get()).await? {
    ///         Ok(routes) => println!("{} routes", routes.len()),
    ///         Err(error) => eprintln!("will be tried again: {error}"), // after the retry_pause
    ///     }
    /// #   break;
    /// }
    /// # Ok(()) })}
    /// ```
    ///
    /// After a load that failed, it is not ready before the [`retry_pause`](crate::CachedBuilder::retry_pause) has passed. An
    /// expired value that was reported and is not loaded is reported again after 10 milliseconds, and after twice as long each
    /// further time, up to a second. These pauses are shared by all tasks.
    ///
    /// An age is noticed to within the clock's tick, some milliseconds; a load by another thread during a pause, within half a
    /// second; and an [`invalidate`](Self::invalidate) at once.
    ///
    /// # Cancel safety
    ///
    /// Cancel-safe: no update is lost if the future is dropped before it is ready, as the next future is ready at once if the
    /// value in place is expired.
    ///
    /// # Errors
    ///
    /// No thread can be started.
    ///
    /// # Progress
    ///
    /// As [`GenerationSynchronizer::changed`](crate::GenerationSynchronizer::changed), for each key. A `poll` neither loads the
    /// value nor waits for a load.
    pub fn changed(&self) -> CachedChanged<'_, T> {
        let known = self.current.load_full().as_ref().map_or_else(Weak::new, Arc::downgrade);
        CachedChanged { cached: self, known, registrations: Vec::new() }
    }

    /// The pause that must pass before the value in place may be reported to tasks: after a load that failed, or after a report
    /// of this value.
    fn pause_of_reports(&self, entry: Option<&Arc<Entry<T>>>) -> Option<Period> {
        let now = coarse_now();
        let failed = self.single_flight.get().last_failure().map(|ended| Period::new(ended, self.policy.retry_pause));
        let reported =
            self.reported.load_full().filter(|report| report.is_of(address(entry))).map(|report| report.pause());
        failed.filter(|pause| !pause.is_over(now)).or(reported.filter(|pause| !pause.is_over(now)))
    }
}

fn address<T: ?Sized>(entry: Option<&Arc<Entry<T>>>) -> usize {
    entry.map_or(0, |entry| Arc::as_ptr(entry).addr())
}

/// The future of [`Cached::changed`].
#[must_use = "futures do nothing unless they are polled"]
pub struct CachedChanged<'a, T: ?Sized> {
    cached: &'a Cached<T>,
    /// The entry that was in place at the call. It is weak, as a future that waits must not keep an old value alive.
    known: Weak<Entry<T>>,
    /// One for each key; empty until the first `poll` that waits.
    registrations: Vec<Registration>,
}

impl<T: ?Sized> Future for CachedChanged<'_, T> {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let (cached, sync) = (this.cached, &this.cached.sync);
        let entry = cached.current.load_full();
        let is_replaced = entry.as_ref().is_some_and(|entry| !ptr::eq(Arc::as_ptr(entry), this.known.as_ptr()));
        let is_expired = || entry.as_ref().is_none_or(|entry| !cached.is_fresh(entry));
        let pause = cached.pause_of_reports(entry.as_ref()).filter(|_| !is_replaced);
        let report = || {
            if sync.pace().yields(false) {
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            sync.pace().continue_row();
            if !is_replaced {
                let earlier = cached.reported.load_full();
                cached.reported.store(Some(Arc::new(Report::after(earlier.as_deref(), address(entry.as_ref())))));
            }
            Poll::Ready(Ok(()))
        };
        if is_replaced || pause.is_none() && is_expired() {
            return report();
        }
        // In a pause, what has happened so far was reported already: only a further update wakes the task.
        let awaited: Vec<(&GenerationSynchronizer, Ticket)> = match &entry {
            Some(entry) if pause.is_none() => cached.tickets(entry).collect(),
            _ => cached.keys().map(|sync| (sync, sync.ticket())).collect(),
        };
        if this.registrations.iter().any(Registration::is_inherited) {
            this.registrations.clear();
        }
        if this.registrations.is_empty() {
            for (sync, ticket) in &awaited {
                match Registration::new(sync, *ticket, Target::Task(None)) {
                    Ok(registration) => this.registrations.push(registration),
                    Err(error) => {
                        this.registrations.clear();
                        return sync.fail(context, error);
                    }
                }
            }
        }
        let now = coarse_now();
        let soon = now + SLICE.as_millis() as u64;
        let due = match (&entry, pause) {
            // Another thread may load the value, which no key reports, so the task checks at least once a slice.
            (_, Some(pause)) => Some(pause.due().min(soon)),
            (Some(entry), None) => cached.policy.max_age.map(|_| entry.age.due()),
            (None, None) => None,
        };
        for ((_, ticket), registration) in awaited.into_iter().zip(&this.registrations) {
            registration.set_waker(context.waker().clone(), ticket, due);
        }
        // An update just before the registration wakes no one, so it must be found here.
        if pause.is_none() && is_expired() {
            return report();
        }
        // So must an invalidation or a load, which puts another entry in place.
        if address(cached.current.load_full().as_ref()) != address(entry.as_ref()) {
            context.waker().wake_by_ref();
        }
        sync.pace().end_row();
        Poll::Pending
    }
}

impl<T: ?Sized> std::fmt::Debug for CachedChanged<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CachedChanged").field("cached", self.cached).finish_non_exhaustive()
    }
}

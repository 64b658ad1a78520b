//! Waiting for a value in tasks.

use std::future::Future;
use std::pin::Pin;
use std::ptr;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};

use super::base::Base;
use super::period::{Period, Report};
use super::{Cached, Entry, cell};
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
        CachedChanged::new(&self.base)
    }
}

impl<T: ?Sized> Base<T> {
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

/// The registrations of one task for the keys of a value. Empty until they are set for the first time.
#[derive(Default)]
pub(super) struct Registrations(Vec<Registration>);

impl Registrations {
    /// Registers `waker`, to be called when one of the keys has another generation than its ticket, and at `due`. The caller must
    /// check afterwards for what happened before this call. The keys must be the same ones each time.
    pub(super) fn set(
        &mut self,
        awaited: Vec<(&GenerationSynchronizer, Ticket)>,
        waker: &Waker,
        due: Option<u64>,
    ) -> Result<(), Error> {
        if self.0.iter().any(Registration::is_inherited) {
            self.0.clear();
        }
        if self.0.is_empty() {
            let register = |(sync, ticket): &(&GenerationSynchronizer, Ticket)| {
                Registration::new(sync, *ticket, Target::Task(None))
            };
            self.0 = awaited.iter().map(register).collect::<Result<_, _>>()?;
        }
        for ((_, ticket), registration) in awaited.into_iter().zip(&self.0) {
            registration.set_waker(waker.clone(), ticket, due);
        }
        Ok(())
    }
}

fn address<T: ?Sized>(entry: Option<&Arc<Entry<T>>>) -> usize {
    entry.map_or(0, |entry| Arc::as_ptr(entry).addr())
}

/// The future of [`Cached::changed`].
#[must_use = "futures do nothing unless they are polled"]
pub struct CachedChanged<'a, T: ?Sized> {
    base: &'a Base<T>,
    /// The entry that was in place at the call. It is weak, as a future that waits must not keep an old value alive.
    known: Weak<Entry<T>>,
    registrations: Registrations,
}

impl<'a, T: ?Sized> CachedChanged<'a, T> {
    pub(super) fn new(base: &'a Base<T>) -> Self {
        let known = base.current.load_full().as_ref().map_or_else(Weak::new, Arc::downgrade);
        Self { base, known, registrations: Registrations::default() }
    }
}

impl<T: ?Sized> Future for CachedChanged<'_, T> {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let (base, sync) = (this.base, &this.base.sync);
        let entry = base.current.load_full();
        let is_replaced = entry.as_ref().is_some_and(|entry| !ptr::eq(Arc::as_ptr(entry), this.known.as_ptr()));
        let is_expired = || entry.as_ref().is_none_or(|entry| !base.is_fresh(entry));
        let pause = base.pause_of_reports(entry.as_ref()).filter(|_| !is_replaced);
        let report = || {
            if sync.pace().yields(false) {
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            sync.pace().continue_row();
            if !is_replaced {
                let earlier = base.reported.load_full();
                base.reported.store(Some(Arc::new(Report::after(earlier.as_deref(), address(entry.as_ref())))));
            }
            Poll::Ready(Ok(()))
        };
        if is_replaced || pause.is_none() && is_expired() {
            return report();
        }
        // In a pause, what has happened so far was reported already: only a further update wakes the task.
        let awaited: Vec<(&GenerationSynchronizer, Ticket)> = match &entry {
            Some(entry) if pause.is_none() => entry.freshness.tickets(sync).collect(),
            Some(entry) => entry.freshness.tickets(sync).map(|(sync, _)| (sync, sync.ticket())).collect(),
            None => cell::keys(base).map(|sync| (sync, sync.ticket())).collect(),
        };
        let now = coarse_now();
        let soon = now + SLICE.as_millis() as u64;
        let due = match (&entry, pause) {
            // Another thread may load the value, which no key reports, so the task checks at least once a slice.
            (_, Some(pause)) => Some(pause.due().min(soon)),
            (Some(entry), None) => Some(entry.freshness.age()).filter(|age| !age.is_endless()).map(Period::due),
            (None, None) => None,
        };
        if let Err(error) = this.registrations.set(awaited, context.waker(), due) {
            return sync.fail(context, error);
        }
        // An update just before the registration wakes no one, so it must be found here.
        if pause.is_none() && is_expired() {
            return report();
        }
        // So must an invalidation or a load, which puts another entry in place.
        if address(base.current.load_full().as_ref()) != address(entry.as_ref()) {
            context.waker().wake_by_ref();
        }
        sync.pace().end_row();
        Poll::Pending
    }
}

impl<T: ?Sized> std::fmt::Debug for CachedChanged<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CachedChanged").field("sync", &self.base.sync).finish_non_exhaustive()
    }
}

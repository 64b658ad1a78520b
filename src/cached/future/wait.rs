//! Waiting for the next value in a task.

use std::future::{Future, poll_fn};
use std::sync::Arc;
use std::task::{Context, Poll};

use super::Cached;
use crate::cached::base::Base;
use crate::cached::changed::Registrations;
use crate::cached::drive::{self, Limit};
use crate::cached::load::{Call, GetOptions};
use crate::cached::period::Period;
use crate::cached::single_flight::Waiter;
use crate::cached::value::Entry;
use crate::cached::wait::{Known, SHORTEST_PAUSE, Waitable, is_known};
use crate::error::Error;
use crate::os::clock::coarse_now;
use crate::table::Table;

impl<T: ?Sized> Cached<T> {
    /// Waits until the value that is in place is expired, and returns the fresh one; if none is in place yet, loads it.
    ///
    /// ```
    /// # use gensync::{GenerationSynchronizer, Table, future::Cached};
    /// # async fn load_routes() -> Result<Vec<String>, std::io::Error> { Ok(Vec::new()) }
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), gensync::Error> {
    /// # let table = Table::options().anonymous()?;
    /// let routes = Cached::new(GenerationSynchronizer::new(&table, "routes")?, load_routes);
    /// loop {
    ///     match routes.wait().await {
    ///         Ok(routes) => println!("{} routes", routes.len()),
    ///         Err(error) => eprintln!("will be tried again: {error}"), // after the retry_pause
    ///     }
    /// #   break;
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// This ends at once if the value is expired already, and several updates may be reported as one. It also ends when the value
    /// is too old, or when a key that it depends on is updated. Any task may replace the value in place: a task that must act on
    /// each new value while other tasks may load calls [`wait_past`](Self::wait_past) with the value that it has. For a limit of
    /// time, use that of your runtime.
    ///
    /// # Cancel safety
    ///
    /// Cancel-safe: if the future is dropped before it is ready, the next wait ends at once if the value in place is expired. A
    /// load that this call runs is dropped with it, see [the module](crate::future#a-call-that-is-dropped).
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get), even if this `Cached` was built to serve old values after errors. The next wait does not try again
    /// before the [`retry_pause`](super::CachedBuilder::retry_pause) has passed, and at least 10 milliseconds, so that a loop
    /// does not flood a broken source with loads. Also if no thread can be started.
    ///
    /// # Progress
    ///
    /// As [`GenerationSynchronizer::changed`](crate::GenerationSynchronizer::changed), for each key; then as [`get`](Self::get).
    /// A wait yields once, so that a loop of waits does not keep other tasks from running.
    pub async fn wait(&self) -> Result<Arc<T>, Error> {
        self.wait_for_other(None).await
    }

    /// Waits until there is a fresh value other than `known`, which this `Cached` has returned before, and returns it. Values of
    /// a loader that [shares](Self::new_shared) them are different only if they are different `Arc`s.
    ///
    /// # Cancel safety
    ///
    /// Cancel-safe, as [`wait`](Self::wait).
    ///
    /// # Errors
    ///
    /// As [`wait`](Self::wait).
    ///
    /// # Progress
    ///
    /// As [`wait`](Self::wait).
    pub async fn wait_past(&self, known: &Arc<T>) -> Result<Arc<T>, Error> {
        self.wait_for_other(Some(known)).await
    }

    /// Waits until there is a fresh value other than `known`, or other than the value in place if `known` is `None`.
    async fn wait_for_other(&self, known: Option<&Arc<T>>) -> Result<Arc<T>, Error> {
        wait(&self.base, known, || drive::run(Call::new(&self.base, GetOptions::FRESH), &self.loader)).await
    }
}

/// What the wait of a task asks of a value besides what that of a thread asks.
pub(in crate::cached) trait TaskWaitable: Waitable {
    /// What wakes a task when the value is replaced or invalidated in this process; `None` if the task is woken by the
    /// registrations for its key.
    fn waiter(&self) -> Option<Waiter>;
    fn table(&self) -> &Table;
    /// Fails, but not so often that a loop keeps the processor busy.
    fn fail(&self, context: &Context<'_>, error: Error) -> Poll<Result<(), Error>>;
}

impl<T: ?Sized> TaskWaitable for Base<T> {
    fn waiter(&self) -> Option<Waiter> {
        Some(Waiter::new(self.single_flight.get()))
    }

    fn table(&self) -> &Table {
        self.sync.table()
    }

    fn fail(&self, context: &Context<'_>, error: Error) -> Poll<Result<(), Error>> {
        self.sync.fail(context, error)
    }
}

/// Waits until there is a fresh value other than `known`, or other than the value in place if `known` is `None`; `load` returns the
/// fresh entry.
pub(in crate::cached) async fn wait<W, F>(
    place: &W,
    known: Option<&Arc<W::Value>>,
    load: impl Fn() -> F,
) -> Result<Arc<W::Value>, Error>
where
    W: TaskWaitable,
    F: Future<Output = Result<Arc<Entry<W::Value>>, Error>>,
{
    let is_known = is_known(place, known);
    yield_once().await;
    let mut awaited = place.present().filter(&is_known);
    loop {
        if let Some(entry) = awaited.take() {
            outlive(place, entry).await?;
        }
        rest(place).await?;
        let entry = load().await?;
        if !is_known(&entry) {
            return Ok(entry.value());
        }
        awaited = Some(entry);
    }
}

/// Lets other tasks run.
async fn yield_once() {
    let mut has_yielded = false;
    poll_fn(|context| match std::mem::replace(&mut has_yielded, true) {
        true => Poll::Ready(()),
        false => {
            context.waker().wake_by_ref();
            Poll::Pending
        }
    })
    .await;
}

/// Waits until `entry` is expired or no longer in place.
async fn outlive<W: TaskWaitable>(place: &W, entry: Arc<Entry<W::Value>>) -> Result<(), Error> {
    // What decides is kept, but not the value.
    let (freshness, known, sync) = (entry.freshness.clone(), Known::of(&entry), place.sync()?);
    drop(entry);
    let age = Some(freshness.age()).filter(|age| !age.is_endless());
    let is_over = || place.is_replaced(&known) || !freshness.is_fresh(&sync);
    let mut registrations = Registrations::default();
    let mut waiter = place.waiter();
    poll_fn(|context| {
        if is_over() {
            return Poll::Ready(Ok(()));
        }
        if waiter.as_ref().is_some_and(Waiter::is_inherited) {
            waiter = place.waiter();
        }
        // Another task may load or invalidate the value, which no key reports.
        if let Some(waiter) = &waiter {
            waiter.register(context.waker());
        }
        if let Err(error) = registrations.set(freshness.tickets(&sync).collect(), context.waker(), age.map(Period::due))
        {
            return place.fail(context, error);
        }
        // What happened just before wakes no one, so it must be found here.
        if is_over() { Poll::Ready(Ok(())) } else { Poll::Pending }
    })
    .await
}

/// Waits until the value may be loaded again after a failure, or another task has loaded successfully.
async fn rest<W: TaskWaitable>(place: &W) -> Result<(), Error> {
    if let Some(pause) = place.pause() {
        await_end(place, pause, None).await?;
    }
    let single_flight = place.single_flight()?;
    // Only the pause of this failure counts: tasks that do not wait may fail again and again, and each failure would prolong it.
    let Some(ended) = single_flight.last_failure() else { return Ok(()) };
    let pause = Period::new(ended, place.retry_pause().max(SHORTEST_PAUSE));
    await_end(place, pause, Some(Waiter::new(single_flight))).await
}

/// Waits until the end of `pause`, or until the load that failed is followed by one that succeeds, of which `waiter` learns.
async fn await_end<W: TaskWaitable>(place: &W, pause: Period, waiter: Option<Waiter>) -> Result<(), Error> {
    if pause.is_over(coarse_now()) {
        return Ok(());
    }
    let mut limit = Limit::of(pause, place.table());
    poll_fn(|context| {
        if limit.is_over() || waiter.as_ref().is_some_and(|waiter| !waiter.rests(context.waker())) {
            return Poll::Ready(Ok(()));
        }
        match limit.set(context.waker()) {
            Ok(()) => Poll::Pending,
            Err(error) => {
                let error = match place.sync() {
                    Ok(sync) => sync.explain(error),
                    Err(_) => place.table().explain(error),
                };
                place.fail(context, error)
            }
        }
    })
    .await
}

//! Running a call to its end in a task: what `load::run` and `load::verify` do in a thread.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::slice;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::cached::cell::Cell;
use crate::cached::load::{Attempt, Call, Step};
use crate::cached::period::Period;
use crate::cached::scope::Scope;
use crate::cached::single_flight::Waiter;
use crate::cached::value::Entry;
use crate::cached::waits::Waiting;
use crate::error::{Error, ErrorKind, Source};
use crate::os::clock::coarse_now;
use crate::table::Table;
use crate::wait::notifier::Timer;

/// Runs `call` to its end in this task.
///
/// If the future is dropped while it loads, the load ends without an outcome, and the calls that waited for it go on: one of them
/// loads.
pub(super) async fn run<C: Cell + ?Sized, F>(
    mut call: Call<'_, C>,
    loader: impl FnOnce() -> F,
) -> Result<Arc<Entry<C::Value>>, Error>
where
    F: Future<Output = Result<Arc<C::Value>, Source>>,
{
    loop {
        let end = match call.next() {
            Step::Return(result) => return result,
            Step::Load(attempt) => {
                let outcome = in_scope(attempt.scope(), loader).await;
                return call.finish(attempt, outcome);
            }
            Step::Wait { end } => end,
        };
        await_load(&call, end).await?;
        call.end_wait();
    }
}

/// Loads the value in this task to verify `entry`. Returns the entry that was loaded, if any.
pub(super) async fn verify<C: Cell + ?Sized, F>(
    cell: &C,
    entry: &Arc<Entry<C::Value>>,
    loader: impl FnOnce() -> F,
) -> Option<Arc<Entry<C::Value>>>
where
    F: Future<Output = Result<Arc<C::Value>, Source>>,
{
    let attempt = Attempt::verify(cell, entry)?;
    let outcome = in_scope(attempt.scope(), loader).await;
    attempt.end(outcome).ok()
}

async fn in_scope<F: Future>(scope: &Arc<Scope>, loader: impl FnOnce() -> F) -> F::Output {
    in_scopes(slice::from_ref(scope), loader).await
}

/// Runs `loader`, and the future that it returns, in `scopes`: the task is in them during each poll, and while the future is
/// dropped.
pub(super) async fn in_scopes<F: Future>(scopes: &[Arc<Scope>], loader: impl FnOnce() -> F) -> F::Output {
    let future = {
        let _entered = Scope::enter_all(scopes);
        loader()
    };
    let future = pin!(Some(future));
    let mut scoped = InScopes { scopes, future };
    poll_fn(|context| scoped.poll(context)).await
}

struct InScopes<'a, F> {
    scopes: &'a [Arc<Scope>],
    future: Pin<&'a mut Option<F>>,
}

impl<F: Future> InScopes<'_, F> {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<F::Output> {
        let _entered = Scope::enter_all(self.scopes);
        self.future.as_mut().as_pin_mut().expect("a future until it is dropped").poll(context)
    }
}

impl<F> Drop for InScopes<'_, F> {
    fn drop(&mut self) {
        let _entered = Scope::enter_all(self.scopes);
        self.future.set(None);
    }
}

/// Waits until the load has ended that `call` waits for, or until `end`. The call must note the [end](Call::end_wait) of the wait.
pub(super) async fn await_load<C: Cell + ?Sized>(call: &Call<'_, C>, end: Option<Instant>) -> Result<(), Error> {
    let (single_flight, seen) = call.awaited();
    let sync = call.sync();
    let waiter = Waiter::new(Arc::clone(single_flight));
    let mut limit = end.map(|end| Limit::at(end, sync.table()));
    let mut record: Option<Waiting> = None;
    poll_fn(|context| {
        if limit.as_ref().is_some_and(Limit::is_over) || !waiter.awaits(seen, context.waker()) {
            return Poll::Ready(Ok(()));
        }
        if !Waiting::is_of(record.as_ref()) {
            record = None;
            let awaited = Arc::clone(single_flight);
            match Waiting::new(move || awaited.awaited(seen), sync.cache_key().as_str()) {
                Ok(new) => record = new,
                Err(circle) => {
                    return Poll::Ready(Err(sync.explain(Error::from(ErrorKind::Recursion).caused_by(circle))));
                }
            }
        }
        match limit.as_mut().map_or(Ok(()), |limit| limit.set(context.waker())) {
            Ok(()) => Poll::Pending,
            Err(error) => Poll::Ready(Err(sync.explain(error))),
        }
    })
    .await
}

/// Until when a task waits.
pub(super) struct Limit {
    period: Period,
    timer: Timer,
}

impl Limit {
    fn at(end: Instant, table: &Table) -> Self {
        // Rounded up: a wait that ends too soon is repeated.
        let left = end.saturating_duration_since(Instant::now()) + Duration::from_nanos(999_999);
        Self::of(Period::new(coarse_now(), left), table)
    }

    pub(super) fn of(period: Period, table: &Table) -> Self {
        Self { period, timer: Timer::new(table) }
    }

    pub(super) fn is_over(&self) -> bool {
        self.period.is_over(coarse_now())
    }

    /// Lets `waker` be called at the end.
    pub(super) fn set(&mut self, waker: &Waker) -> Result<(), Error> {
        self.timer.set(waker, self.period.due())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cached::base::Base;
    use crate::cached::dependencies::depend_on;
    use crate::cached::policy::Policy;
    use crate::{GenerationSynchronizer, Table};

    #[test]
    fn a_call_may_own_its_cell_and_move_between_threads_and_a_loader_may_be_in_several_scopes() {
        let table = Table::options().anonymous().unwrap();
        let [sync, tag] = ["key", "tag"].map(|key| GenerationSynchronizer::new(&table, key).unwrap());
        let task = async move {
            let cell = Base::<u64>::new(sync, Policy::new());
            let outer = Scope::new();
            let entry = run(cell.call(), || async {
                let inner = Scope::new();
                let scopes = [Arc::clone(&outer), Arc::clone(&inner)];
                in_scopes(&scopes, || async {
                    assert!(outer.number().is_entered() && inner.number().is_entered());
                    depend_on(&tag);
                    Ok(1)
                })
                .await
                .map(Arc::new)
            })
            .await
            .unwrap();
            assert!(Scope::all().is_empty());
            *entry.value
        };
        fn assert_send<T: Send>(task: T) -> T {
            task
        }
        assert_eq!(smol::future::block_on(assert_send(task)), 1);
    }
}

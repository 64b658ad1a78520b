//! The loads of one value in one process: who may load, who waits for it, and how the last load ended.
//!
//! No code of the user's runs under the mutex: an error is neither shown nor dropped there, and values never come here.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::ThreadId;
use std::time::Instant;

use super::period::Period;
use super::waits::{Circle, Waiting};
use crate::error::Source;
use crate::os::clock::coarse_now;
use crate::os::fork::{OfOneProcess, token};
use crate::protocol::atomic::AtomicU32;
use crate::protocol::futex::{sleep_on, wake_all};
use crate::wait::SLICE;
use crate::wait::notifier::Registration;

pub(super) struct SingleFlight {
    process: u64,
    state: Mutex<State>,
    /// Goes on with each change. Threads sleep on it for a length of time: a condition variable would have them sleep until a
    /// point in time, which a clock that is set back puts off.
    changes: AtomicU32,
}

#[derive(Default)]
struct State {
    /// Who is loading, or running the callbacks after it.
    leader: Option<ThreadId>,
    /// When the pilot took off, in milliseconds of the coarse clock.
    began: u64,
    /// The number of the last load that lasted longer than it may.
    overdue: u64,
    /// How often the value was invalidated.
    invalidations: u64,
    /// Descriptors that are told of the value's age.
    alarms: Vec<Weak<Registration>>,
    log: Log,
    /// The loads in a row, up to the last one, that were overtaken by updates.
    overtaken: u64,
    /// If the last load failed.
    failure: Option<Failure>,
}

/// The numbers of the last loads; the first one is 1.
#[derive(Clone, Copy, Default)]
pub(super) struct Log {
    begun: u64,
    /// Ended, well or not.
    completed: u64,
    succeeded: u64,
}

impl Log {
    /// Whether a load that began after `earlier` has succeeded.
    pub(super) fn has_succeeded_since(self, earlier: Self) -> bool {
        self.succeeded > earlier.begun
    }

    fn is_in_flight(self) -> bool {
        self.completed < self.begun
    }
}

#[derive(Clone)]
pub(super) struct Failure {
    pub(super) error: Source,
    /// When the first of the loads that failed in a row began, in milliseconds of the coarse clock.
    pub(super) since: u64,
    /// When this one ended.
    pub(super) ended: u64,
    /// What passes before it may be tried again.
    pub(super) retry: Period,
    /// The number of the load.
    pub(super) load: u64,
}

/// What is left to do for a call that found no fresh value.
pub(super) enum Next<'a> {
    /// To look again: a load has landed meanwhile.
    Look,
    Load(Load<'a>),
    Fail(Failure),
    /// To wait: another thread is the pilot. When it took off, and since when the source has not been read, in milliseconds
    /// of the coarse clock.
    Wait {
        began: u64,
        unread_since: u64,
    },
    /// To do with what is in place: the call comes from a callback.
    Rest,
    /// To fail: the call comes from the loader.
    Recurse,
}

impl OfOneProcess for SingleFlight {
    fn new() -> Self {
        Self { process: token(), state: Mutex::default(), changes: AtomicU32::new(0) }
    }

    fn is_inherited(&self) -> bool {
        self.process != token()
    }
}

impl SingleFlight {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When the last load ended, if it failed; in milliseconds of the coarse clock.
    pub(super) fn last_failure(&self) -> Option<u64> {
        self.lock().failure.as_ref().map(|failure| failure.ended)
    }

    pub(super) fn log(&self) -> Log {
        self.lock().log
    }

    /// For a call that began at `before`, and found no fresh value after `seen`.
    pub(super) fn next(&self, before: Log, seen: Log) -> Next<'_> {
        let mut state = self.lock();
        if state.log.completed != seen.completed {
            return Next::Look;
        }
        let is_in_flight = state.log.is_in_flight();
        let is_own = state.leader == Some(std::thread::current().id());
        if let Some(failure) = &state.failure {
            let has_waited_for_it = failure.load > before.completed;
            if has_waited_for_it || !is_in_flight && (is_own || !failure.retry.is_over(coarse_now())) {
                return Next::Fail(failure.clone());
            }
        }
        match state.leader {
            None => Next::Load(self.start(&mut state)),
            Some(_) if !is_own => {
                let began = state.began;
                Next::Wait { began, unread_since: state.failure.as_ref().map_or(began, |failure| failure.since) }
            }
            Some(_) if is_in_flight => Next::Recurse,
            Some(_) => Next::Rest,
        }
    }

    /// Makes this thread the pilot, if there is none.
    pub(super) fn try_start(&self) -> Option<Load<'_>> {
        let mut state = self.lock();
        state.leader.is_none().then(|| self.start(&mut state))
    }

    fn start(&self, state: &mut State) -> Load<'_> {
        state.leader = Some(std::thread::current().id());
        state.began = coarse_now();
        state.log.begun += 1;
        Load { single_flight: self, number: state.log.begun, invalidations: state.invalidations, past: None }
    }

    /// The thread that a wait which ends when the state has gone on from `seen` still waits for.
    pub(super) fn awaited(&self, seen: Log) -> Option<ThreadId> {
        self.lock().awaited(seen)
    }

    /// Waits until a load has landed that had not in `seen`, or nobody is the pilot, or for that matter until the deadline, or
    /// less long than that.
    /// Fails if the load waits for this thread.
    pub(super) fn wait(self: &Arc<Self>, seen: Log, deadline: Option<Instant>, key: &str) -> Result<(), Circle> {
        let this = Arc::clone(self);
        let _waiting = Waiting::new(move || this.awaited(seen), key)?;
        self.sleep(deadline, |state| state.awaited(seen).is_some());
        Ok(())
    }

    /// Sleeps until no load has succeeded since the one that failed last, which was to be tried again later, or until the
    /// deadline, or less long than that.
    pub(super) fn rest(&self, deadline: Option<Instant>) {
        self.sleep(deadline, |state| state.failure.is_some());
    }

    /// Sleeps as long as `is_early`; if there is a deadline, it may return before, and does twice a second.
    fn sleep(&self, deadline: Option<Instant>, is_early: impl Fn(&State) -> bool) {
        loop {
            // ORDERING: acquire pairs with the release in `announce`; a change that comes after this is one that the futex sees.
            let changes = self.changes.load(Ordering::Acquire);
            if !is_early(&self.lock()) {
                return;
            }
            let left = deadline.map_or(SLICE, |deadline| deadline.saturating_duration_since(Instant::now()));
            sleep_on(&self.changes, changes, left.min(SLICE));
            if deadline.is_some() {
                return;
            }
        }
    }

    fn announce(&self) {
        // ORDERING: release pairs with the acquire in `sleep`. The state was changed under its lock before.
        self.changes.fetch_add(1, Ordering::Release);
        wake_all(&self.changes);
    }

    pub(super) fn add_alarm(&self, registration: &Arc<Registration>) {
        let mut state = self.lock();
        state.alarms.retain(|alarm| alarm.strong_count() > 0);
        state.alarms.push(Arc::downgrade(registration));
    }

    pub(super) fn alarms(&self) -> Vec<Arc<Registration>> {
        self.lock().alarms.iter().filter_map(Weak::upgrade).collect()
    }

    /// The load that is in flight after `seen` has lasted longer than it may. Returns whether that was not known.
    pub(super) fn is_first_to_find_overdue(&self, seen: Log) -> bool {
        std::mem::replace(&mut self.lock().overdue, seen.begun) != seen.begun
    }

    /// Runs `change`, which makes the value in place void. A load that is in flight loads a void one as well.
    pub(super) fn invalidate<R>(&self, change: impl FnOnce() -> R) -> R {
        let mut state = self.lock();
        state.invalidations += 1;
        let past = state.failure.take();
        let result = change();
        drop(state);
        self.announce();
        drop(past);
        result
    }
}

impl State {
    fn awaited(&self, seen: Log) -> Option<ThreadId> {
        self.leader.filter(|_| self.log.completed == seen.completed)
    }
}

/// A load under way, and the callbacks after it. Dropped, as when one of them panics, it lets the next one begin.
pub(super) struct Load<'a> {
    single_flight: &'a SingleFlight,
    number: u64,
    invalidations: u64,
    /// The failure that this flight has put an end to. As a field, it is dropped when the next flight may begin.
    past: Option<Failure>,
}

impl Load<'_> {
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// Whether the load has lasted longer than it may, which was counted then.
    pub(super) fn is_overdue(&self) -> bool {
        !self.single_flight.is_inherited() && self.single_flight.lock().overdue == self.number
    }

    /// Runs `place`, which puts the value in place; and tells it whether the value was invalidated since the load began.
    pub(super) fn place<R>(&self, place: impl FnOnce(bool) -> R) -> R {
        // As in `record`.
        if self.single_flight.is_inherited() {
            return place(false);
        }
        let state = self.single_flight.lock();
        place(state.invalidations != self.invalidations)
    }

    /// The load succeeded, and the value is in place. Returns how many in a row have been overtaken; `None` in a child that
    /// the loader forked.
    pub(super) fn succeed(&mut self, is_overtaken: bool) -> Option<u64> {
        let (overtaken, past) = self.record(|state| {
            state.log.succeeded = state.log.begun;
            state.overtaken = if is_overtaken { state.overtaken + 1 } else { 0 };
            (state.overtaken, state.failure.take())
        })?;
        self.past = past;
        Some(overtaken)
    }

    /// The load failed, perhaps not as the first one.
    pub(super) fn fail(&mut self, failure: &mut Failure) {
        let past = self.record(|state| {
            failure.since = state.failure.as_ref().map_or(failure.since, |earlier| earlier.since);
            state.failure.replace(failure.clone())
        });
        self.past = past.flatten();
    }

    /// The load ended, and nobody need know how.
    pub(super) fn complete(&self) {
        self.record(|_| ());
    }

    fn record<R>(&self, record: impl FnOnce(&mut State) -> R) -> Option<R> {
        // In a child that the loader forked, there is nobody to tell, and the mutex may be anyone's.
        if self.single_flight.is_inherited() {
            return None;
        }
        let mut state = self.single_flight.lock();
        state.log.completed = state.log.begun;
        let result = record(&mut state);
        drop(state);
        self.single_flight.announce();
        Some(result)
    }
}

impl Drop for Load<'_> {
    fn drop(&mut self) {
        self.record(|state| state.leader = None);
    }
}

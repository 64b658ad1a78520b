//! The loads of one value in one process: which call loads, which calls wait for its load, and how the last load ended.
//!
//! The call that loads is the *leader*, and is known by the scope of its load. It stays the leader while it runs the callbacks
//! after the load.
//!
//! Threads that wait sleep on a count of the changes of the state, and tasks leave their wakers. Both are woken at each change,
//! all of them: one of them may have given up meanwhile, so that waking one would not be enough.
//!
//! No code of the user runs under the mutex, as it may ask for the value and would deadlock: errors are neither formatted nor
//! dropped there, wakers are neither called nor dropped there, and values are not kept here.

#[cfg(feature = "future")]
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
#[cfg(feature = "future")]
use std::task::Waker;
use std::time::Instant;

use super::period::Period;
use super::scope::{Scope, ScopeNumber};
use super::waits::{Circle, Waiting};
use crate::error::Source;
use crate::os::clock::coarse_now;
use crate::os::fork::{OfOneProcess, token};
use crate::protocol::atomic::AtomicU32;
use crate::protocol::futex::{sleep_on, wake_all};
use crate::wait::SLICE;
use crate::wait::notifier::Registration;
#[cfg(feature = "future")]
use crate::wait::notifier::wake;

pub(super) struct SingleFlight {
    process: u64,
    state: Mutex<State>,
    /// Counts the changes of the state. Threads sleep on it for a length of time. A condition variable would make them sleep
    /// until a point in time, and so for too long if the clock is set back meanwhile.
    changes: AtomicU32,
}

#[derive(Default)]
struct State {
    /// The scope of the load that is under way, or whose callbacks are running.
    leader: Option<ScopeNumber>,
    /// When the last load began, in milliseconds of the coarse clock.
    began: u64,
    /// When the first of the loads began that were needed and after which none has succeeded: they may have failed, or ended
    /// without an outcome.
    unread_since: Option<u64>,
    /// The number of the last load that lasted longer than allowed.
    overdue: u64,
    /// How often the value was invalidated.
    invalidations: u64,
    /// The registrations of descriptors that become readable when the value reaches its age.
    alarms: Vec<Weak<Registration>>,
    log: Log,
    /// How many loads in a row, up to the last one, were overtaken by updates.
    overtaken: u64,
    /// The failure of the last load, if it failed.
    failure: Option<Failure>,
    /// The tasks that wait for the state to change, by the numbers of their [`Waiter`]s.
    #[cfg(feature = "future")]
    wakers: BTreeMap<u64, Waker>,
    #[cfg(feature = "future")]
    last_waiter: u64,
}

/// The numbers of the last loads that have begun, ended and succeeded. The first load is number 1.
#[derive(Clone, Copy, Default)]
pub(super) struct Log {
    begun: u64,
    /// The last load that has ended, successfully or not.
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
    /// When this load ended.
    pub(super) ended: u64,
    /// The pause before the next load.
    pub(super) retry: Period,
    /// The number of this load.
    pub(super) load: u64,
}

/// What a call must do that found no fresh value.
pub(super) enum Next {
    /// Check the value again: a load has ended meanwhile.
    Recheck,
    /// Load the value: this call is the leader now.
    Load(Load),
    /// Fail as the last load did.
    Fail(Failure),
    /// Wait for another call, which is the leader. `began` is when its load began, and `unread_since` since when the source has
    /// not been read, both in milliseconds of the coarse clock.
    Wait { began: u64, unread_since: u64 },
    /// Take the value in place: the call comes from a callback.
    Rest,
    /// Fail: the call comes from the loader.
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

    /// Since when the source could not be read, in milliseconds of the coarse clock, and the pause before the next load; `None`
    /// if the last load that was needed has succeeded.
    #[cfg(feature = "map")]
    pub(super) fn trouble(&self) -> Option<(u64, Option<Period>)> {
        let state = self.lock();
        Some((state.unread_since?, state.failure.as_ref().map(|failure| failure.retry)))
    }

    /// Whether no load is under way, and nothing of the last one is to be remembered.
    #[cfg(feature = "map")]
    pub(super) fn is_settled(&self) -> bool {
        let state = self.lock();
        state.leader.is_none() && state.unread_since.is_none() && state.failure.is_none() && state.overtaken == 0
    }

    pub(super) fn log(&self) -> Log {
        self.lock().log
    }

    /// What a call must do that began at `before`, and found no fresh value after it had read the log as `seen`.
    pub(super) fn next(self: &Arc<Self>, before: Log, seen: Log) -> Next {
        let mut state = self.lock();
        if state.log.completed != seen.completed {
            return Next::Recheck;
        }
        let is_in_flight = state.log.is_in_flight();
        let is_own = state.leader.is_some_and(ScopeNumber::is_entered);
        if let Some(failure) = &state.failure {
            // A call that waited for the load that failed fails with it. Otherwise each of many waiting calls would load in turn,
            // and fail in turn.
            let has_waited_for_it = failure.load > before.completed;
            if has_waited_for_it || !is_in_flight && (is_own || !failure.retry.is_over(coarse_now())) {
                return Next::Fail(failure.clone());
            }
        }
        match state.leader {
            None => Next::Load(self.start(&mut state, true)),
            Some(_) if !is_own => {
                let began = state.began;
                Next::Wait { began, unread_since: state.unread_since.unwrap_or(began) }
            }
            Some(_) if is_in_flight => Next::Recurse,
            Some(_) => Next::Rest,
        }
    }

    /// Makes the caller the leader, if there is none. `is_needed` says that there is no fresh value.
    pub(super) fn try_start(self: &Arc<Self>, is_needed: bool) -> Option<Load> {
        let mut state = self.lock();
        state.leader.is_none().then(|| self.start(&mut state, is_needed))
    }

    fn start(self: &Arc<Self>, state: &mut State, is_needed: bool) -> Load {
        let scope = Scope::new();
        state.leader = Some(scope.number());
        state.began = coarse_now();
        if is_needed {
            state.unread_since.get_or_insert(state.began);
        }
        state.log.begun += 1;
        let (number, invalidations) = (state.log.begun, state.invalidations);
        Load { single_flight: Arc::clone(self), scope, number, invalidations, past: None }
    }

    /// The load that a wait for the first load to end after `seen` still waits for; `None` if the wait is over.
    pub(super) fn awaited(&self, seen: Log) -> Option<ScopeNumber> {
        self.lock().awaited(seen)
    }

    /// Sleeps until a load has ended that had not ended in `seen`, or there is no leader. With a deadline, it returns at the
    /// deadline at the latest, and may return sooner. Fails without sleeping if the load itself waits for this thread.
    pub(super) fn wait(self: &Arc<Self>, seen: Log, deadline: Option<Instant>, key: &str) -> Result<(), Circle> {
        let this = Arc::clone(self);
        let _waiting = Waiting::new(move || this.awaited(seen), key)?;
        self.sleep(deadline, |state| state.awaited(seen).is_some());
        Ok(())
    }

    /// Sleeps until the last failure is cleared, as a load that succeeds or an invalidation does. With a deadline, it returns at
    /// the deadline at the latest, and may return sooner.
    pub(super) fn rest(&self, deadline: Option<Instant>) {
        self.sleep(deadline, |state| state.failure.is_some());
    }

    /// Sleeps while `is_early`. With a deadline, it returns after one sleep, which lasts half a second at most.
    fn sleep(&self, deadline: Option<Instant>, is_early: impl Fn(&State) -> bool) {
        loop {
            // ORDERING: acquire pairs with the release of the addition in `announce`. If this reads a count that `announce`
            // wrote, the state as it was changed before is what `is_early` sees. If the state is changed after `is_early` has
            // read it, `announce` comes later still, so the count differs from `changes`, and the futex does not sleep or is
            // woken. Both hold through the mutex as well, which `is_early` takes after this load.
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
        // ORDERING: release pairs with the acquire load of the count in `sleep`: a sleeper that reads the new count sees the
        // state, which was changed under its lock before this.
        self.changes.fetch_add(1, Ordering::Release);
        wake_all(&self.changes);
        #[cfg(feature = "future")]
        {
            let wakers = std::mem::take(&mut self.lock().wakers);
            wakers.into_values().for_each(wake);
        }
    }

    pub(super) fn add_alarm(&self, registration: &Arc<Registration>) {
        let mut state = self.lock();
        state.alarms.retain(|alarm| alarm.strong_count() > 0);
        state.alarms.push(Arc::downgrade(registration));
    }

    /// Makes all descriptors readable at `due`, in milliseconds of the coarse clock.
    pub(super) fn set_alarms(&self, due: u64) {
        let alarms: Vec<Arc<Registration>> = self.lock().alarms.iter().filter_map(Weak::upgrade).collect();
        let due = (due < u64::MAX).then_some(due);
        alarms.iter().for_each(|registration| registration.set_due(due));
    }

    /// Notes that the load which is in flight in `seen` has lasted longer than allowed. Returns whether this call is the first to
    /// note that, so that each such load is counted once.
    pub(super) fn is_first_to_find_overdue(&self, seen: Log) -> bool {
        std::mem::replace(&mut self.lock().overdue, seen.begun) != seen.begun
    }

    /// Runs `change`, which makes the value in place void. The value of a load that is in flight will be void as well.
    pub(super) fn invalidate<R>(&self, change: impl FnOnce() -> R) -> R {
        let mut state = self.lock();
        state.invalidations += 1;
        state.unread_since = state.log.is_in_flight().then_some(state.began);
        let past = state.failure.take();
        let result = change();
        drop(state);
        self.announce();
        drop(past);
        result
    }
}

impl State {
    fn awaited(&self, seen: Log) -> Option<ScopeNumber> {
        self.leader.filter(|_| self.log.completed == seen.completed)
    }
}

/// A task that waits for the state to change. Dropping it ends the wait.
#[cfg(feature = "future")]
pub(super) struct Waiter {
    single_flight: Arc<SingleFlight>,
    number: u64,
}

#[cfg(feature = "future")]
impl Waiter {
    pub(super) fn new(single_flight: Arc<SingleFlight>) -> Self {
        let number = if single_flight.is_inherited() {
            0
        } else {
            let mut state = single_flight.lock();
            state.last_waiter += 1;
            state.last_waiter
        };
        Self { single_flight, number }
    }

    /// Whether the load is still awaited for which [`SingleFlight::awaited`] was asked. If so, `waker` is called at the next
    /// change.
    pub(super) fn awaits(&self, seen: Log, waker: &Waker) -> bool {
        self.wait_while(waker, |state| state.awaited(seen).is_some())
    }

    /// Whether the last load failed. If so, `waker` is called at the next change.
    pub(super) fn rests(&self, waker: &Waker) -> bool {
        self.wait_while(waker, |state| state.failure.is_some())
    }

    /// Registers `waker`, to be called at the next change. The caller must check afterwards for what happened before this call.
    pub(super) fn register(&self, waker: &Waker) {
        self.wait_while(waker, |_| true);
    }

    pub(super) fn is_inherited(&self) -> bool {
        self.single_flight.is_inherited()
    }

    /// Registers `waker` if `is_early`, and returns that. Both happen under the lock, so that no change comes in between. In a
    /// forked child, where nothing here changes any more, it is not early.
    fn wait_while(&self, waker: &Waker, is_early: impl FnOnce(&State) -> bool) -> bool {
        if self.is_inherited() {
            return false;
        }
        let waker = waker.clone();
        let mut state = self.single_flight.lock();
        let is_early = is_early(&state);
        let unused = if is_early { state.wakers.insert(self.number, waker) } else { Some(waker) };
        drop(state);
        drop(unused);
        is_early
    }
}

#[cfg(feature = "future")]
impl Drop for Waiter {
    fn drop(&mut self) {
        // In a forked child, the mutex may be held by a thread that does not exist there.
        if !self.is_inherited() {
            let waker = self.single_flight.lock().wakers.remove(&self.number);
            drop(waker);
        }
    }
}

/// A load that is under way, with the callbacks after it. Dropping it lets the next load begin, also when the loader or a
/// callback panics.
pub(super) struct Load {
    single_flight: Arc<SingleFlight>,
    scope: Arc<Scope>,
    number: u64,
    invalidations: u64,
    /// The failure that this load has replaced. It is a field so that it is dropped last, when the next load may already begin:
    /// dropping the user's error may take time, or ask for the value.
    past: Option<Failure>,
}

impl Load {
    pub(super) fn scope(&self) -> &Arc<Scope> {
        &self.scope
    }

    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// Whether the load has lasted longer than allowed. If so, it has been counted as failed already.
    pub(super) fn is_overdue(&self) -> bool {
        !self.single_flight.is_inherited() && self.single_flight.lock().overdue == self.number
    }

    /// Runs `place`, which puts the value in place, with whether the value was invalidated since the load began. Both happen
    /// under the lock, so that no invalidation comes in between.
    pub(super) fn place<R>(&self, place: impl FnOnce(bool) -> R) -> R {
        // In a child that the loader forked, the mutex may be held by a thread that does not exist there.
        if self.single_flight.is_inherited() {
            return place(false);
        }
        let state = self.single_flight.lock();
        place(state.invalidations != self.invalidations)
    }

    /// Notes that the load succeeded and the value is in place. Returns how many loads in a row have been overtaken; `None` in a
    /// child that the loader forked.
    pub(super) fn succeed(&mut self, is_overtaken: bool) -> Option<u64> {
        let (overtaken, past) = self.record(|state| {
            state.log.succeeded = state.log.begun;
            state.unread_since = None;
            state.overtaken = if is_overtaken { state.overtaken + 1 } else { 0 };
            (state.overtaken, state.failure.take())
        })?;
        self.past = past;
        Some(overtaken)
    }

    /// Notes that the load failed. If the load before it failed as well, the failure dates from the first one in the row.
    pub(super) fn fail(&mut self, failure: &mut Failure) {
        let past = self.record(|state| {
            failure.since = state.failure.as_ref().map_or(failure.since, |earlier| earlier.since);
            state.failure.replace(failure.clone())
        });
        self.past = past.flatten();
    }

    /// Notes that the load ended, without recording its outcome.
    pub(super) fn complete(&self) {
        self.record(|_| ());
    }

    fn record<R>(&self, record: impl FnOnce(&mut State) -> R) -> Option<R> {
        // In a child that the loader forked, no thread waits for this load, and the mutex may be held by a thread that does not
        // exist there.
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

impl Drop for Load {
    fn drop(&mut self) {
        self.record(|state| state.leader = None);
    }
}

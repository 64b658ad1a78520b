//! The loads of one value in one process: who may load, who waits for it, and how the last load ended.
//!
//! No code of the user's runs under the mutex: an error is neither shown nor dropped there, and values never come here.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::Instant;

use crate::error::Source;
use crate::fork::{OfOneProcess, token};
use crate::handle::coarse_now;

pub(super) struct Flights {
    process: u64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Who is loading, or running the callbacks after it.
    pilot: Option<ThreadId>,
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
    landed: u64,
    succeeded: u64,
}

impl Log {
    /// Whether a load that began after `earlier` has succeeded.
    pub(super) fn has_succeeded_since(self, earlier: Self) -> bool {
        self.succeeded > earlier.begun
    }

    fn is_in_flight(self) -> bool {
        self.landed < self.begun
    }
}

#[derive(Clone)]
pub(super) struct Failure {
    pub(super) error: Source,
    /// When the first of the loads that failed in a row began, in milliseconds of the coarse clock.
    pub(super) since: u64,
    /// When this one ended.
    pub(super) ended: u64,
    /// When it may be tried again.
    pub(super) retry: u64,
    /// The number of the load.
    pub(super) load: u64,
}

/// What is left to do for a call that found no fresh value.
pub(super) enum Next<'a> {
    /// To look again: a load has landed meanwhile.
    Look,
    Load(Flight<'a>),
    Fail(Failure),
    /// To wait: another thread is the pilot.
    Wait,
    /// To do with what is in place: the call comes from a callback.
    Rest,
    /// To fail: the call comes from the loader.
    Recurse,
}

impl OfOneProcess for Flights {
    fn new() -> Self {
        Self { process: token(), state: Mutex::default(), changed: Condvar::new() }
    }

    fn is_inherited(&self) -> bool {
        self.process != token()
    }
}

impl Flights {
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
        if state.log.landed != seen.landed {
            return Next::Look;
        }
        let is_in_flight = state.log.is_in_flight();
        let is_own = state.pilot == Some(std::thread::current().id());
        if let Some(failure) = &state.failure {
            let has_waited_for_it = failure.load > before.landed;
            if has_waited_for_it || !is_in_flight && (is_own || coarse_now() < failure.retry) {
                return Next::Fail(failure.clone());
            }
        }
        match state.pilot {
            None => Next::Load(self.take_off(&mut state)),
            Some(_) if !is_own => Next::Wait,
            Some(_) if is_in_flight => Next::Recurse,
            Some(_) => Next::Rest,
        }
    }

    /// Makes this thread the pilot, if there is none.
    pub(super) fn try_take_off(&self) -> Option<Flight<'_>> {
        let mut state = self.lock();
        state.pilot.is_none().then(|| self.take_off(&mut state))
    }

    fn take_off(&self, state: &mut State) -> Flight<'_> {
        state.pilot = Some(std::thread::current().id());
        state.log.begun += 1;
        Flight { flights: self, number: state.log.begun, past: None }
    }

    /// Waits until a load has landed that had not in `seen`, or nobody is the pilot; `false` at the deadline.
    pub(super) fn wait(&self, seen: Log, deadline: Option<Instant>) -> bool {
        let is_early = |state: &mut State| state.log.landed == seen.landed && state.pilot.is_some();
        let state = self.lock();
        let Some(deadline) = deadline else {
            drop(self.changed.wait_while(state, is_early).unwrap_or_else(PoisonError::into_inner));
            return true;
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = self.changed.wait_timeout_while(state, left, is_early);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

/// A load under way, and the callbacks after it. Dropped, as when one of them panics, it lets the next one begin.
pub(super) struct Flight<'a> {
    flights: &'a Flights,
    number: u64,
    /// The failure that this flight has put an end to. As a field, it is dropped when the next flight may begin.
    past: Option<Failure>,
}

impl Flight<'_> {
    pub(super) fn number(&self) -> u64 {
        self.number
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
    pub(super) fn land(&self) {
        self.record(|_| ());
    }

    fn record<R>(&self, record: impl FnOnce(&mut State) -> R) -> Option<R> {
        // In a child that the loader forked, there is nobody to tell, and the mutex may be anyone's.
        if self.flights.is_inherited() {
            return None;
        }
        let mut state = self.flights.lock();
        state.log.landed = state.log.begun;
        let result = record(&mut state);
        drop(state);
        self.flights.changed.notify_all();
        Some(result)
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        self.record(|state| state.pilot = None);
    }
}

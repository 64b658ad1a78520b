//! What a call does that finds no fresh value: load, wait for a load, or serve an old value.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::period::Period;
use super::single_flight::{Failure, Load, Log, Next, SingleFlight};
use super::{Cached, Entry};
use crate::error::{Error, ErrorKind, Source};
use crate::os::clock::{Deadline, coarse_now};
use crate::synchronizer::{GenerationSynchronizer, Ticket};

/// How many loads in a row must be overtaken by updates before an error is reported.
const OVERTAKEN: u64 = 8;

/// The tickets that were taken before a load.
struct Tickets {
    own: Ticket,
    dependencies: Box<[Ticket]>,
}

/// What a call accepts: old values, and until when it waits.
#[derive(Clone, Copy)]
pub(super) struct GetOptions {
    pub(super) stale_while_reloading: bool,
    pub(super) stale_after_failure: bool,
    pub(super) deadline: Option<Deadline>,
}

impl GetOptions {
    pub(super) const FRESH: Self = Self { stale_while_reloading: false, stale_after_failure: false, deadline: None };
}

impl<T: ?Sized> Cached<T> {
    #[cold]
    pub(super) fn get_slow(&self, options: GetOptions) -> Result<Arc<Entry<T>>, Error> {
        let single_flight = self.single_flight.get();
        let before = single_flight.log();
        let mut log = before;
        loop {
            let current = self.current.load_full();
            if let Some(entry) = &current
                && (log.has_succeeded_since(before) || self.is_fresh(entry))
            {
                self.hits.add_one();
                return Ok(Arc::clone(entry));
            }
            match single_flight.next(before, log) {
                Next::Recheck => {}
                Next::Load(load) => {
                    return self.load(load, None).or_else(|failure| self.after_failure(&failure, current, options));
                }
                Next::Fail(failure) => return self.after_failure(&failure, current, options),
                Next::Recurse => return Err(self.sync.error(ErrorKind::Recursion)),
                Next::Rest => {
                    return current.map(|entry| self.stale(entry)).ok_or_else(|| self.sync.error(ErrorKind::Recursion));
                }
                Next::Wait { began, unread_since } => {
                    let allowed = self.allowed_staleness(&current, options);
                    let is_over = |since| Period::new(since, allowed).is_over(coarse_now());
                    if let Some(entry) = &current
                        && options.stale_while_reloading
                        && !is_over(unread_since)
                    {
                        return Ok(self.stale(Arc::clone(entry)));
                    }
                    if is_over(began) {
                        return Err(self.overdue(&single_flight, log, began, allowed));
                    }
                    // A call that waits must not keep an old value alive.
                    drop(current);
                    self.await_load(&single_flight, log, Period::new(began, allowed), options.deadline)?;
                }
            }
            log = single_flight.log();
        }
    }

    /// Sleeps until the load of another thread ends, `overdue` is over, or the deadline is reached; may return sooner.
    fn await_load(
        &self,
        single_flight: &Arc<SingleFlight>,
        log: Log,
        overdue: Period,
        deadline: Option<Deadline>,
    ) -> Result<(), Error> {
        if deadline.is_some_and(Deadline::is_reached) {
            return Err(self.sync.error(ErrorKind::Deadline));
        }
        let end = deadline.map(|deadline| deadline.at).into_iter().chain(overdue.end(coarse_now())).min();
        let circle = single_flight.wait(log, end, self.sync.cache_key().as_str());
        circle.map_err(|circle| self.sync.explain(Error::from(ErrorKind::Recursion).caused_by(circle)))
    }

    pub(super) fn stale(&self, entry: Arc<Entry<T>>) -> Arc<Entry<T>> {
        self.metrics.stale.add_one();
        entry
    }

    /// How long a load may last before it counts as failed for a call that waits for it. There is no limit if no old value may be
    /// served, or if the call has a limit of its own.
    fn allowed_staleness(&self, current: &Option<Arc<Entry<T>>>, options: GetOptions) -> Duration {
        let allowed = self.policy.max_staleness.filter(|allowed| !allowed.is_zero() && current.is_some());
        allowed.filter(|_| options.stale_after_failure).unwrap_or(Duration::MAX)
    }

    #[cold]
    fn overdue(&self, single_flight: &SingleFlight, log: Log, began: u64, allowed: Duration) -> Error {
        if single_flight.is_first_to_find_overdue(log) {
            self.metrics.errors.add_one();
        }
        let lasted = Duration::from_millis(coarse_now().saturating_sub(began));
        self.sync.error(ErrorKind::Overdue { lasted, allowed })
    }

    /// What a call returns when its load failed, or the load that it waited for.
    fn after_failure(
        &self,
        failure: &Failure,
        old: Option<Arc<Entry<T>>>,
        options: GetOptions,
    ) -> Result<Arc<Entry<T>>, Error> {
        let is_allowed = |staleness| !Period::new(failure.since, staleness).is_over(coarse_now());
        match (old, self.policy.max_staleness) {
            (Some(entry), Some(staleness)) if options.stale_after_failure && is_allowed(staleness) => {
                Ok(self.stale(entry))
            }
            _ => Err(self.load_error(failure)),
        }
    }

    fn load_error(&self, failure: &Failure) -> Error {
        self.sync.explain(Error::load(&failure.error))
    }

    /// Loads the value. If this verifies an entry that is fresh, `verified` is that entry, and is compared with the value that
    /// was loaded.
    pub(super) fn load(&self, load: Load<'_>, verified: Option<&Entry<T>>) -> Result<Arc<Entry<T>>, Failure> {
        let (tickets, outage) = self.take_tickets();
        let (start, since) = (Instant::now(), coarse_now());
        let outcome = (self.policy.loader)();
        self.metrics.longest.raise_to(start.elapsed().as_micros() as u64);
        match outcome {
            Ok(value) => Ok(self.finish_load(load, value, tickets, outage, verified)),
            Err(error) => Err(self.fail_load(load, error, since, verified.is_some())),
        }
    }

    /// The tickets to load with, and the reason if freshness cannot be known.
    fn take_tickets(&self) -> (Tickets, Option<Error>) {
        let mut outage = None;
        let mut take = |sync: &GenerationSynchronizer| {
            let (ticket, reason) = sync.ticket_with_reason();
            outage = outage.take().or(reason);
            ticket
        };
        let dependencies = self.policy.dependencies.iter().map(&mut take).collect();
        (Tickets { own: take(&self.sync), dependencies }, outage)
    }

    /// Puts `value` in place, counts the load, runs the callbacks, and lets the next load begin.
    fn finish_load(
        &self,
        mut load: Load<'_>,
        value: Arc<T>,
        tickets: Tickets,
        outage: Option<Error>,
        verified: Option<&Entry<T>>,
    ) -> Arc<Entry<T>> {
        let (entry, old) = self.place(&load, value, tickets);
        self.metrics.reloads.add_one();
        let is_overtaken = self.is_overtaken(&entry);
        if is_overtaken {
            self.metrics.overtaken.add_one();
        }
        let overtaken = load.succeed(is_overtaken);
        if self.policy.max_age.is_some() {
            self.set_alarms(entry.age.due());
        }
        if let (Some(on_reload), Some(old)) = (&self.policy.on_reload, &old) {
            on_reload(&old.value, &entry.value);
        }
        if let Some(loads) = overtaken.filter(|loads| is_overtaken && loads.is_multiple_of(OVERTAKEN)) {
            self.report(|| self.sync.error(ErrorKind::Overtaken { loads }));
        }
        self.note_outage(outage);
        if let Some(verified) = verified {
            self.compare(verified, &entry);
        }
        // The load ends before the old value is dropped, as dropping that may take time, or ask for the new value.
        drop(load);
        entry
    }

    /// Puts the new value in place. Returns its entry, and the entry that it replaced.
    fn place(&self, load: &Load<'_>, value: Arc<T>, tickets: Tickets) -> (Arc<Entry<T>>, Option<Arc<Entry<T>>>) {
        let age = Period::new(coarse_now(), self.policy.next_age());
        let placed = load.place(|is_invalidated| {
            let ticket = if is_invalidated { Ticket::VOID } else { tickets.own };
            let entry = Arc::new(Entry { value, ticket, dependencies: tickets.dependencies, age });
            let old = self.current.swap(Some(Arc::clone(&entry)));
            (entry, old)
        });
        self.sync.adopt(placed.0.ticket);
        placed
    }

    /// Counts and reports a load that failed, and lets the next one begin.
    fn fail_load(&self, mut load: Load<'_>, error: Source, since: u64, is_verification: bool) -> Failure {
        if !load.is_overdue() {
            self.metrics.errors.add_one();
        }
        let ended = coarse_now();
        let retry = Period::new(ended, self.policy.pause_of_calls());
        let mut failure = Failure { error, since, ended, retry, load: load.number() };
        match is_verification {
            false => load.fail(&mut failure),
            // The value in place is fresh. A failure that was recorded would keep it from being loaded when it expires.
            true => load.complete(),
        }
        self.report(|| self.load_error(&failure));
        drop(load);
        failure
    }

    /// Counts a load that was made during an outage of the table, and reports the first one of each outage.
    fn note_outage(&self, outage: Option<Error>) {
        let Some(reason) = outage else { return self.metrics.outage.clear() };
        self.metrics.unconfirmed.add_one();
        if self.metrics.outage.add_one() == 1 {
            self.report(|| reason);
        }
    }

    pub(super) fn report(&self, error: impl FnOnce() -> Error) {
        if let Some(on_error) = &self.policy.on_error {
            on_error(&error());
        }
    }

    /// Loads the value although `entry` is fresh by its generation, to check that it is. Returns the entry that was loaded, if
    /// any.
    #[cold]
    pub(super) fn verify(&self, entry: &Entry<T>) -> Option<Arc<Entry<T>>> {
        let single_flight = self.single_flight.get();
        self.load(single_flight.try_start()?, Some(entry)).ok()
    }

    /// Reports two values if they differ although no key was updated between their loads, and no update is in flight.
    fn compare(&self, cached: &Entry<T>, loaded: &Entry<T>) {
        if let Some(verification) = &self.policy.verification
            && (cached.ticket, &cached.dependencies) == (loaded.ticket, &loaded.dependencies)
            && self.tickets(loaded).all(|(sync, ticket)| sync.is_unchanged(ticket))
        {
            (verification.compare)(&cached.value, &loaded.value);
        }
    }
}

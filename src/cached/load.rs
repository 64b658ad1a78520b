//! What a call does that finds no fresh value: load, wait for a load, or serve an old value.
//!
//! A [`Call`] decides, and an [`Attempt`] loads. Neither runs a loader or sleeps: that is up to the faces, of which the one blocks
//! (here, in [`run`]) and the other awaits (in `drive.rs`).

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cell::{Cell, Replaced};
use super::collected::too_many;
use super::dependency::Dependency;
use super::period::Period;
use super::policy::Policy;
use super::scope::Scope;
use super::single_flight::{Failure, Load, Log, Next, SingleFlight};
use super::value::{Conditions, Entry, Freshness};
use crate::error::{Error, ErrorKind, Source};
use crate::os::clock::{Deadline, coarse_now};
use crate::os::fork::OfOneProcess as _;
use crate::synchronizer::{GenerationSynchronizer, Ticket};

/// How many loads in a row must be overtaken by updates before an error is reported.
const OVERTAKEN: u64 = 8;

/// What a call accepts: old values, and until when it waits.
#[derive(Clone, Copy)]
pub(super) struct GetOptions {
    pub(super) stale_while_reloading: bool,
    pub(super) stale_after_failure: bool,
    pub(super) deadline: Option<Deadline>,
}

impl GetOptions {
    pub(super) const FRESH: Self = Self { stale_while_reloading: false, stale_after_failure: false, deadline: None };

    pub(super) fn of<T: ?Sized, K: ?Sized>(policy: &Policy<T, K>) -> Self {
        Self { stale_while_reloading: policy.stale_while_reloading, stale_after_failure: true, deadline: None }
    }
}

/// A call that found no fresh value.
pub(super) struct Call<'c, C: Cell + ?Sized> {
    cell: &'c C,
    options: GetOptions,
    single_flight: Arc<SingleFlight>,
    /// The log as it was when the call began, and as it is now.
    before: Log,
    log: Log,
}

/// What a call must do next.
pub(super) enum Step<'c, C: Cell + ?Sized> {
    Return(Result<Arc<Entry<C::Value>>, Error>),
    /// Run the loader, and return what [`Call::finish`] returns.
    Load(Attempt<'c, C>),
    /// Wait for the load of another thread to end, but not past `end`; then ask for the next step.
    Wait {
        end: Option<Instant>,
    },
}

impl<'c, C: Cell + ?Sized> Call<'c, C> {
    pub(super) fn new(cell: &'c C, options: GetOptions) -> Self {
        let single_flight = cell.single_flight();
        let before = single_flight.log();
        Self { cell, options, single_flight, before, log: before }
    }

    /// The loads of the value, and those of them that this call knows of: for a wait.
    pub(super) fn awaited(&self) -> (&Arc<SingleFlight>, Log) {
        (&self.single_flight, self.log)
    }

    #[cfg(feature = "future")]
    pub(super) fn sync(&self) -> &'c GenerationSynchronizer {
        self.cell.sync()
    }

    /// To be called until it returns something else than a wait.
    pub(super) fn next(&mut self) -> Step<'c, C> {
        let cell = self.cell;
        if self.single_flight.is_inherited() {
            // A task was forked in the middle of a wait: the load that it waited for is not under way in the child.
            *self = Self::new(cell, self.options);
        }
        loop {
            let current = cell.current().filter(|entry| cell.may_stay(entry));
            if let Some(entry) = &current
                && (self.log.has_succeeded_since(self.before) || entry.freshness.is_fresh(cell.sync()))
            {
                cell.count_hit();
                return Step::Return(Ok(Arc::clone(entry)));
            }
            let next = self.single_flight.next(self.before, self.log);
            let sync = cell.sync();
            return match next {
                Next::Recheck => {
                    self.log = self.single_flight.log();
                    continue;
                }
                Next::Load(load) => Step::Load(Attempt::begin(cell, load, current, None)),
                Next::Fail(failure) => Step::Return(self.after_failure(&failure, current)),
                Next::Recurse => Step::Return(Err(sync.error(ErrorKind::Recursion))),
                Next::Rest => Step::Return(
                    current.map(|entry| stale(cell, entry)).ok_or_else(|| sync.error(ErrorKind::Recursion)),
                ),
                Next::Wait { began, unread_since } => self.wait(current, began, unread_since),
            };
        }
    }

    /// What a call does while another thread loads.
    fn wait(&self, current: Option<Arc<Entry<C::Value>>>, began: u64, unread_since: u64) -> Step<'c, C> {
        let Self { cell, options, .. } = self;
        let allowed = self.allowed_staleness(&current);
        let is_over = |since| Period::new(since, allowed).is_over(coarse_now());
        match current {
            Some(entry) if options.stale_while_reloading && !is_over(unread_since) => {
                return Step::Return(Ok(stale(*cell, entry)));
            }
            // A call that waits must not keep an old value alive.
            _ => {}
        }
        if is_over(began) {
            return Step::Return(Err(self.overdue(began, allowed)));
        }
        if options.deadline.is_some_and(Deadline::is_reached) {
            return Step::Return(Err(cell.sync().error(ErrorKind::Deadline)));
        }
        let overdue = Period::new(began, allowed).end(coarse_now());
        Step::Wait { end: options.deadline.map(|deadline| deadline.at).into_iter().chain(overdue).min() }
    }

    /// To be called after a wait.
    pub(super) fn end_wait(&mut self) {
        if !self.single_flight.is_inherited() {
            self.log = self.single_flight.log();
        }
    }

    /// What the call returns that ran the loader.
    pub(super) fn finish(
        &self,
        attempt: Attempt<'c, C>,
        outcome: Result<Arc<C::Value>, Source>,
    ) -> Result<Arc<Entry<C::Value>>, Error> {
        self.finish_keeping(attempt, outcome, &mut Vec::new())
    }

    /// As [`finish`](Self::finish), but adds the values that are no longer in place to `kept`, for a thread that runs several loads
    /// at once: dropping a value may ask for the key of another one.
    pub(super) fn finish_keeping(
        &self,
        attempt: Attempt<'c, C>,
        outcome: Result<Arc<C::Value>, Source>,
        kept: &mut Vec<Arc<C::Value>>,
    ) -> Result<Arc<Entry<C::Value>>, Error> {
        let current = attempt.current.clone();
        kept.extend(current.as_ref().map(|entry| entry.value()));
        attempt.end_keeping(outcome, kept).or_else(|failure| {
            // The load may have lasted longer than the value may stay.
            let current = current.filter(|entry| self.cell.may_stay(entry));
            self.after_failure(&failure, current)
        })
    }

    /// How long a load may last before it counts as failed for a call that waits for it. There is no limit if no old value may be
    /// served, or if the call has a limit of its own.
    fn allowed_staleness(&self, current: &Option<Arc<Entry<C::Value>>>) -> Duration {
        let allowed = self.cell.policy().max_staleness.filter(|allowed| !allowed.is_zero() && current.is_some());
        allowed.filter(|_| self.options.stale_after_failure).unwrap_or(Duration::MAX)
    }

    #[cold]
    fn overdue(&self, began: u64, allowed: Duration) -> Error {
        if self.single_flight.is_first_to_find_overdue(self.log) {
            self.cell.metrics().errors.add_one();
        }
        let lasted = Duration::from_millis(coarse_now().saturating_sub(began));
        self.cell.sync().error(ErrorKind::Overdue { lasted, allowed })
    }

    /// What a call returns when its load failed, or the load that it waited for.
    fn after_failure(
        &self,
        failure: &Failure,
        old: Option<Arc<Entry<C::Value>>>,
    ) -> Result<Arc<Entry<C::Value>>, Error> {
        let is_allowed = |staleness| !Period::new(failure.since, staleness).is_over(coarse_now());
        match (old, self.cell.policy().max_staleness) {
            (Some(entry), Some(staleness)) if self.options.stale_after_failure && is_allowed(staleness) => {
                Ok(stale(self.cell, entry))
            }
            _ => Err(load_error(self.cell.sync(), failure)),
        }
    }
}

fn stale<C: Cell + ?Sized>(cell: &C, entry: Arc<Entry<C::Value>>) -> Arc<Entry<C::Value>> {
    cell.metrics().stale.add_one();
    entry
}

fn load_error(sync: &GenerationSynchronizer, failure: &Failure) -> Error {
    sync.explain(Error::load(&failure.error))
}

fn report<C: Cell + ?Sized>(cell: &C, error: impl FnOnce() -> Error) {
    if let Some(on_error) = &cell.policy().on_error {
        on_error(&error());
    }
}

/// A load that is about to run the loader. Dropping it, as a panic does, lets the next load begin.
pub(super) struct Attempt<'c, C: Cell + ?Sized> {
    cell: &'c C,
    load: Load,
    /// The value that was in place before.
    current: Option<Arc<Entry<C::Value>>>,
    /// The value that this verifies, which is fresh: it is compared with the value that is loaded.
    verified: Option<Arc<Entry<C::Value>>>,
    /// Taken before the load.
    ticket: Ticket,
    dependencies: Vec<Dependency>,
    /// The reason if freshness cannot be known.
    outage: Option<Error>,
    start: Instant,
    since: u64,
}

impl<'c, C: Cell + ?Sized> Attempt<'c, C> {
    /// Takes the tickets.
    fn begin(
        cell: &'c C,
        load: Load,
        current: Option<Arc<Entry<C::Value>>>,
        verified: Option<Arc<Entry<C::Value>>>,
    ) -> Self {
        let mut outage = None;
        let mut take = |sync: &GenerationSynchronizer| {
            let (ticket, reason) = sync.ticket_with_reason();
            outage = outage.take().or(reason);
            ticket
        };
        let dependencies = cell.policy().dependencies.iter();
        let dependencies = dependencies.map(|sync| Dependency::new(Arc::clone(sync), take(sync))).collect();
        let ticket = take(cell.sync());
        let (start, since) = (Instant::now(), coarse_now());
        Self { cell, load, current, verified, ticket, dependencies, outage, start, since }
    }

    /// A load of the value although `entry` is fresh by its generation, to check that it is; `None` if another load is under way.
    pub(super) fn verify(cell: &'c C, entry: &Arc<Entry<C::Value>>) -> Option<Self> {
        Some(Self::begin(cell, cell.single_flight().try_start(false)?, None, Some(Arc::clone(entry))))
    }

    /// The scope to run the loader in.
    pub(super) fn scope(&self) -> &Arc<Scope> {
        self.load.scope()
    }

    /// Ends the load with what the loader returned.
    pub(super) fn end(self, outcome: Result<Arc<C::Value>, Source>) -> Result<Arc<Entry<C::Value>>, Failure> {
        self.end_keeping(outcome, &mut Vec::new())
    }

    fn end_keeping(
        self,
        outcome: Result<Arc<C::Value>, Source>,
        kept: &mut Vec<Arc<C::Value>>,
    ) -> Result<Arc<Entry<C::Value>>, Failure> {
        self.cell.metrics().longest.raise_to(self.start.elapsed().as_micros() as u64);
        match (self.scope().collect(|collected| collected.take()), outcome) {
            (Some(found), Ok(value)) => Ok(self.succeed(value, found, kept)),
            (None, Ok(value)) => {
                // It is dropped when the load has ended, as that may run code of the user, which may ask for the key.
                kept.push(value);
                Err(self.fail(Arc::new(too_many())))
            }
            (_, Err(error)) => Err(self.fail(error)),
        }
    }

    /// Puts `value` in place, counts the load, runs the callbacks, and lets the next load begin.
    fn succeed(
        mut self,
        value: Arc<C::Value>,
        found: (Vec<Dependency>, Option<Period>),
        kept: &mut Vec<Arc<C::Value>>,
    ) -> Arc<Entry<C::Value>> {
        let cell = self.cell;
        // Not only for the callbacks: a weigher may ask for the key as well.
        let entered = self.scope().enter();
        let (entry, Replaced { old, evicted }) = self.place(value, found);
        // The load ends before an old value is dropped, as dropping that may take time, or ask for the new value.
        kept.extend(evicted);
        kept.extend(old.as_ref().map(|entry| entry.value()));
        let (sync, policy, metrics) = (cell.sync(), cell.policy(), cell.metrics());
        metrics.reloads.add_one();
        let is_overtaken = entry.freshness.is_overtaken(sync);
        if is_overtaken {
            metrics.overtaken.add_one();
        }
        let overtaken = self.load.succeed(is_overtaken);
        if !entry.freshness.age().is_endless() {
            cell.single_flight().set_alarms(entry.freshness.age().due());
        }
        if let (Some(on_reload), Some(old)) = (&policy.on_reload, &old) {
            on_reload(cell.key(), &old.value, &entry.value);
        }
        if let Some(loads) = overtaken.filter(|loads| is_overtaken && loads.is_multiple_of(OVERTAKEN)) {
            report(cell, || sync.error(ErrorKind::Overtaken { loads }));
        }
        self.note_outage();
        if let Some(verified) = &self.verified {
            self.compare(verified, &entry);
        }
        drop(entered);
        entry
    }

    /// Puts the new value in place. Returns its entry, and what had to make room for it.
    fn place(
        &mut self,
        value: Arc<C::Value>,
        (found, age): (Vec<Dependency>, Option<Period>),
    ) -> (Arc<Entry<C::Value>>, Replaced<C::Value>) {
        let (cell, policy, mut dependencies) = (self.cell, self.cell.policy(), std::mem::take(&mut self.dependencies));
        let own = Period::new(coarse_now(), policy.next_age());
        let age = Period::first_to_end(Some(own), age).unwrap_or(Period::ENDLESS);
        dependencies.extend(found);
        dependencies.iter_mut().for_each(|dependency| dependency.belongs_to(cell.sync().table()));
        let is_plain = policy.is_plain() && dependencies.is_empty() && age.is_endless();
        #[cfg(feature = "map")]
        let residence = cell.residence(&value);
        #[cfg(feature = "map")]
        let is_plain = is_plain && residence.is_none();
        let conditions = (!is_plain).then(|| {
            Arc::new(Conditions {
                dependencies: dependencies.into_boxed_slice(),
                age,
                #[cfg(feature = "map")]
                residence,
            })
        });
        self.load.place(|is_invalidated| {
            let ticket = if is_invalidated { Ticket::VOID } else { self.ticket };
            let entry = Arc::new(Entry { freshness: Freshness { ticket, conditions }, value });
            let replaced = cell.replace(Arc::clone(&entry));
            // Here, so that no invalidation comes in between, whose ticket this would replace.
            cell.sync().adopt(ticket);
            (entry, replaced)
        })
    }

    /// Counts and reports a load that failed, and lets the next one begin.
    fn fail(mut self, error: Source) -> Failure {
        let (cell, load) = (self.cell, &mut self.load);
        if !load.is_overdue() {
            cell.metrics().errors.add_one();
        }
        let ended = coarse_now();
        let retry = Period::new(ended, cell.policy().pause_of_calls());
        let mut failure = Failure { error, since: self.since, ended, retry, load: load.number() };
        match self.verified {
            None => load.fail(&mut failure),
            // The value in place is fresh. A failure that was recorded would keep it from being loaded when it expires.
            Some(_) => load.complete(),
        }
        let entered = self.scope().enter();
        report(cell, || load_error(cell.sync(), &failure));
        drop(entered);
        failure
    }

    /// Counts a load that was made during an outage of the table, and reports the first one of each outage.
    fn note_outage(&mut self) {
        let metrics = self.cell.metrics();
        let Some(reason) = self.outage.take() else { return metrics.outage.clear() };
        metrics.unconfirmed.add_one();
        if metrics.outage.add_one() == 1 {
            report(self.cell, || reason);
        }
    }

    /// Reports two values if they differ although no key was updated between their loads, and no update is in flight.
    fn compare(&self, cached: &Entry<C::Value>, loaded: &Entry<C::Value>) {
        let sync = self.cell.sync();
        let of =
            |entry: &'_ Entry<C::Value>| entry.freshness.tickets(sync).map(|(_, ticket)| ticket).collect::<Vec<_>>();
        if let Some(verification) = &self.cell.policy().verification
            && of(cached) == of(loaded)
            && loaded.freshness.tickets(sync).all(|(sync, ticket)| sync.is_unchanged(ticket))
        {
            (verification.compare)(self.cell.key(), &cached.value, &loaded.value);
        }
    }
}

/// Runs `call` to its end in this thread.
pub(super) fn run<C: Cell + ?Sized>(
    mut call: Call<'_, C>,
    loader: impl FnOnce() -> Result<Arc<C::Value>, Source>,
) -> Result<Arc<Entry<C::Value>>, Error> {
    loop {
        match call.next() {
            Step::Return(result) => return result,
            Step::Load(attempt) => {
                let outcome = in_scope(attempt.scope(), loader);
                return call.finish(attempt, outcome);
            }
            Step::Wait { end } => {
                let (single_flight, log) = call.awaited();
                let sync = call.cell.sync();
                let circle = single_flight.wait(log, end, sync.cache_key().as_str());
                circle.map_err(|circle| sync.explain(Error::from(ErrorKind::Recursion).caused_by(circle)))?;
                call.end_wait();
            }
        }
    }
}

/// Loads the value in this thread to verify `entry`. Returns the entry that was loaded, if any.
#[cold]
pub(super) fn verify<C: Cell + ?Sized>(
    cell: &C,
    entry: &Arc<Entry<C::Value>>,
    loader: impl FnOnce() -> Result<Arc<C::Value>, Source>,
) -> Option<Arc<Entry<C::Value>>> {
    let attempt = Attempt::verify(cell, entry)?;
    let outcome = in_scope(attempt.scope(), loader);
    attempt.end(outcome).ok()
}

fn in_scope<R>(scope: &Arc<Scope>, loader: impl FnOnce() -> R) -> R {
    let _entered = scope.enter();
    loader()
}

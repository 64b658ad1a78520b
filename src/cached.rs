//! `Cached`: a value with the generation it was loaded at.

#![forbid(unsafe_code)]

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};

use crate::builder::{CachedBuilder, Policy, Verification};
use crate::error::{Error, ErrorKind, Source};
use crate::generation::Generation;
use crate::handle::coarse_now;
use crate::slot::{CHECKS_PER_LOOK, Count};
use crate::synchronizer::{GenerationSynchronizer, Ticket};
use crate::update::UpdateError;

/// How many loads in a row must have been overtaken by updates before that is reported.
const OVERTAKEN: u64 = 8;

/// A value that is loaded from a shared source, and loaded again when any process has updated the source.
///
/// Each process has its own; the threads of a process share it. It may be made before a fork and used after it: the child
/// has the value that the parent had, and from there on goes its own way.
///
/// ```
/// use std::sync::Arc;
///
/// use gensync::{Cached, GenerationSynchronizer, Table};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = tempfile::tempdir()?;
/// let path = folder.path().join("greeting.txt");
/// # std::fs::write(&path, "hello")?;
/// let table = Table::options().anonymous()?;
/// let sync = GenerationSynchronizer::new(&table, "greeting")?;
/// let greeting = Cached::new(sync, {
///     let path = path.clone();
///     move || std::fs::read_to_string(&path)
/// });
///
/// let now: Arc<String> = greeting.get()?; // at each use
/// assert_eq!(*now, "hello");
///
/// greeting.update(|| std::fs::write(&path, "good morning"))?; // in any process
/// assert_eq!(*greeting.get()?, "good morning");
/// # Ok(()) }
/// ```
///
/// # How it works
///
/// The generation is taken before the load and kept with the value, in one piece that is replaced as a whole. So an update
/// that is made during the load leaves the value expired, and no thread can find a value with another one's generation.
///
/// One thread of a process loads at a time. The others wait for it, unless they take the old value meanwhile
/// ([`stale_while_reloading`](CachedBuilder::stale_while_reloading), [`get_stale_ok`](Self::get_stale_ok)). A load that
/// began after a call to `get` is good enough for that call, even if an update has overtaken it: every update that was
/// complete before the call is in it. So a call to `get` waits for two loads at most, and runs one at most.
pub struct Cached<T> {
    current: ArcSwapOption<Entry<T>>,
    sync: GenerationSynchronizer,
    hits: Count,
    policy: Policy<T>,
    flights: ArcSwap<Flights>,
    tally: Tally,
}

/// A value and what it was loaded at, never changed.
pub(crate) struct Entry<T> {
    value: Arc<T>,
    ticket: Ticket,
    /// As many as the policy has dependencies.
    dependencies: Box<[Ticket]>,
    /// When it will be too old, in milliseconds of the coarse clock.
    expires: u64,
}

/// A value, and the generation that it was loaded at. From [`Cached::snapshot`].
#[derive(Debug)]
#[non_exhaustive]
pub struct Snapshot<T> {
    /// The value.
    pub value: Arc<T>,
    /// The generation of the key when the load of the value began; `None` if no table could be attached to.
    pub generation: Option<Generation>,
}

impl<T> Entry<T> {
    fn snapshot(&self) -> Snapshot<T> {
        Snapshot { value: Arc::clone(&self.value), generation: self.ticket.generation() }
    }
}

/// The loads of one process. A forked child makes its own, as another thread may have held the mutex at the fork.
struct Flights {
    process: u32,
    state: Mutex<State>,
    landed: Condvar,
}

#[derive(Default)]
struct State {
    /// Who is loading.
    pilot: Option<ThreadId>,
    /// How many loads have begun; also the number of the last one.
    begun: u64,
    /// The number of the last one that succeeded.
    succeeded: u64,
    /// The loads in a row, up to the last one, that were overtaken by updates.
    overtaken: u64,
    /// If the last load failed.
    failure: Option<Failure>,
}

impl State {
    /// Makes this thread the pilot, if there is none.
    fn take_off(&mut self) -> bool {
        let is_free = self.pilot.is_none();
        if is_free {
            self.pilot = Some(std::thread::current().id());
            self.begun += 1;
        }
        is_free
    }
}

#[derive(Clone)]
struct Failure {
    error: Source,
    /// When the first of the loads that failed in a row began, in milliseconds of the coarse clock.
    since: u64,
    /// When it may be tried again.
    retry: u64,
}

impl Flights {
    fn new() -> Arc<Self> {
        Arc::new(Self { process: std::process::id(), state: Mutex::default(), landed: Condvar::new() })
    }

    fn is_inherited(&self) -> bool {
        self.process != std::process::id()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code of the user's runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, deadline: Option<Instant>) -> Option<MutexGuard<'a, State>> {
        let Some(deadline) = deadline else {
            return Some(self.landed.wait(state).unwrap_or_else(PoisonError::into_inner));
        };
        let left = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
        Some(self.landed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0)
    }
}

/// A load under way. Dropped, as when the loader panics, it lets the next one begin.
struct Flight<'a>(&'a Flights);

impl Flight<'_> {
    /// Records how it ended, before anybody else may load.
    fn land<R>(&self, record: impl FnOnce(&mut State) -> R) -> Option<R> {
        // In a child that the loader forked, there is nobody to tell, and the mutex may be anyone's.
        (!self.0.is_inherited()).then(|| record(&mut self.0.lock()))
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        if self.land(|state| state.pilot = None).is_some() {
            self.0.landed.notify_all();
        }
    }
}

#[derive(Default)]
struct Tally {
    reloads: Count,
    errors: Count,
    stale: Count,
    longest: Count,
}

/// What a [`Cached`] has done in this process; a forked child goes on from its parent's figures.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Counters {
    /// Calls that were answered with a fresh value, and did not load it themselves. Threads that call at the same moment
    /// may count as one, as an exact count would make a call a fifth slower.
    pub hits: u64,
    /// Loads that succeeded, the first one included.
    pub reloads: u64,
    /// Loads that failed.
    pub errors: u64,
    /// Calls that were answered with an expired value: during a load, or because loading failed.
    pub stale_answers: u64,
    /// How long the longest load took, failed ones included; in microseconds' resolution.
    pub longest_load: Duration,
}

/// What a caller puts up with.
#[derive(Clone, Copy)]
struct Terms {
    stale_while_reloading: bool,
    stale_after_failure: bool,
    deadline: Option<Instant>,
}

impl<T> Cached<T> {
    /// A value of the source behind `sync`'s key, loaded by `loader` at its first use.
    ///
    /// The loader must read the source itself, and must not mark its own key updated. For more choice, see
    /// [`builder`](Self::builder).
    pub fn new<E>(sync: GenerationSynchronizer, loader: impl Fn() -> Result<T, E> + Send + Sync + 'static) -> Self
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        Self::assemble(sync, Policy::new(loader))
    }

    /// A builder, for a value that is handled otherwise than [`new`](Self::new) does.
    pub fn builder<E>(
        sync: GenerationSynchronizer,
        loader: impl Fn() -> Result<T, E> + Send + Sync + 'static,
    ) -> CachedBuilder<T>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        CachedBuilder::new(sync, loader)
    }

    pub(crate) fn assemble(sync: GenerationSynchronizer, policy: Policy<T>) -> Self {
        let flights = ArcSwap::new(Flights::new());
        let (current, hits, tally) = (ArcSwapOption::empty(), Count::default(), Tally::default());
        Self { current, sync, hits, policy, flights, tally }
    }

    /// The value, fresh: no update that was complete before the call is missing in it, unless the value was built to allow
    /// that.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Load`] with the loader's error as source, also to those who waited for that load; the value stays
    /// expired, and the next call tries again. [`ErrorKind::Recursion`] if the loader itself calls this.
    ///
    /// # Panics
    ///
    /// If the loader does; then another thread loads.
    ///
    /// # Progress
    ///
    /// Lock-free while the value is fresh: no allocation, no system call but those of
    /// [`is_expired`](GenerationSynchronizer::is_expired). Blocking while it is loaded.
    #[inline]
    pub fn get(&self) -> Result<Arc<T>, Error> {
        match self.get_if_fresh() {
            Some(value) => Ok(value),
            None => self.get_slow(self.default_terms()).map(|entry| Arc::clone(&entry.value)),
        }
    }

    /// The value, or an expired one while another thread loads it: as [`get`](Self::get) of a `Cached` that was built with
    /// [`stale_while_reloading`](CachedBuilder::stale_while_reloading).
    ///
    /// If nobody is loading an expired value, this call does.
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get).
    ///
    /// # Progress
    ///
    /// As [`get`](Self::get); waits for another thread's load only if there is no value yet.
    pub fn get_stale_ok(&self) -> Result<Arc<T>, Error> {
        match self.get_if_fresh() {
            Some(value) => Ok(value),
            None => {
                let terms = Terms { stale_while_reloading: true, ..self.default_terms() };
                self.get_slow(terms).map(|entry| Arc::clone(&entry.value))
            }
        }
    }

    /// The value, fresh, however it was built; waits for another thread's load no longer than until `deadline`.
    ///
    /// A load that this call has to run itself is not interrupted at the deadline.
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get), and [`ErrorKind::Deadline`].
    ///
    /// # Progress
    ///
    /// As [`get`](Self::get).
    pub fn get_fresh(&self, deadline: Instant) -> Result<Arc<T>, Error> {
        match self.get_if_fresh() {
            Some(value) => Ok(value),
            None => {
                let deadline = Some(deadline);
                let terms = Terms { stale_while_reloading: false, stale_after_failure: false, deadline };
                self.get_slow(terms).map(|entry| Arc::clone(&entry.value))
            }
        }
    }

    /// The value if it is fresh, without loading it otherwise: for an event loop, which lets another thread call
    /// [`get`](Self::get) then.
    ///
    /// # Progress
    ///
    /// As [`get`](Self::get) while the value is fresh.
    #[inline]
    #[must_use]
    pub fn get_if_fresh(&self) -> Option<Arc<T>> {
        self.fresh(|entry| Arc::clone(&entry.value))
    }

    /// As [`get`](Self::get), with the generation that the value was loaded at.
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get).
    ///
    /// # Progress
    ///
    /// As [`get`](Self::get).
    pub fn snapshot(&self) -> Result<Snapshot<T>, Error> {
        match self.fresh(Entry::snapshot) {
            Some(snapshot) => Ok(snapshot),
            None => self.get_slow(self.default_terms()).map(|entry| entry.snapshot()),
        }
    }

    /// Changes the source by `commit`, and announces it to all processes, this one too, whatever happens in between: see
    /// [`GenerationSynchronizer::update`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn update<R, E>(&self, commit: impl FnOnce() -> Result<R, E>) -> Result<R, UpdateError<E>> {
        self.sync.update(commit)
    }

    /// The synchronizer of the value's key, for other ways to announce an update. What it has
    /// [seen](GenerationSynchronizer::sync_gen) is none of the value's concern.
    #[must_use]
    pub fn synchronizer(&self) -> &GenerationSynchronizer {
        &self.sync
    }

    /// What this `Cached` has done so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let Tally { reloads, errors, stale, longest } = &self.tally;
        Counters {
            hits: self.hits.get(),
            reloads: reloads.get(),
            errors: errors.get(),
            stale_answers: stale.get(),
            longest_load: Duration::from_micros(longest.get()),
        }
    }

    fn default_terms(&self) -> Terms {
        Terms { stale_while_reloading: self.policy.stale_while_reloading, stale_after_failure: true, deadline: None }
    }

    /// Something of the present value, if that is fresh.
    #[inline]
    fn fresh<R>(&self, pick: impl Fn(&Entry<T>) -> R) -> Option<R> {
        let current = self.current.load();
        let entry = current.as_ref()?;
        if !self.policy.is_plain || !self.sync.is_unchanged(entry.ticket) {
            return self.fresh_slow(entry, pick);
        }
        // Counts for the looks at the table's file, too.
        if !self.hits.add_one_or_so().is_multiple_of(CHECKS_PER_LOOK) || self.is_fresh_at_look(entry) {
            return Some(pick(entry));
        }
        self.hits.take_one();
        None
    }

    #[cold]
    fn is_fresh_at_look(&self, entry: &Entry<T>) -> bool {
        self.sync.look();
        self.is_fresh(entry)
    }

    #[cold]
    fn fresh_slow<R>(&self, entry: &Entry<T>, pick: impl Fn(&Entry<T>) -> R) -> Option<R> {
        if !self.is_fresh(entry) {
            return None;
        }
        let hits = self.hits.add_one();
        let verification = self.policy.verification.as_ref().filter(|due| hits.is_multiple_of(due.every));
        let loaded = verification.and_then(|verification| self.verify(entry, verification));
        Some(pick(loaded.as_deref().unwrap_or(entry)))
    }

    fn is_fresh(&self, entry: &Entry<T>) -> bool {
        !self.sync.is_expired_since(entry.ticket) && (self.policy.is_plain || self.is_fresh_otherwise(entry))
    }

    fn is_fresh_otherwise(&self, entry: &Entry<T>) -> bool {
        let mut dependencies = self.policy.dependencies.iter().zip(&entry.dependencies);
        dependencies.all(|(sync, ticket)| !sync.is_expired_since(*ticket))
            && (self.policy.max_age.is_none() || coarse_now() < entry.expires)
    }

    #[cold]
    fn get_slow(&self, terms: Terms) -> Result<Arc<Entry<T>>, Error> {
        let flights = self.flights();
        let mut state = flights.lock();
        let begun_before = state.begun;
        let mut has_waited = false;
        loop {
            let current = self.current.load_full();
            let fresh = current.as_ref().filter(|entry| state.succeeded > begun_before || self.is_fresh(entry));
            if let Some(entry) = fresh {
                self.hits.add_one();
                return Ok(Arc::clone(entry));
            }
            if let Some(failure) = &state.failure
                && (has_waited || (state.pilot.is_none() && coarse_now() < failure.retry))
            {
                return self.after_failure(&failure.clone(), current, terms);
            }
            match state.pilot {
                None => {
                    state.take_off();
                    drop(state);
                    return self.load(&flights).or_else(|failure| self.after_failure(&failure, current, terms));
                }
                Some(pilot) if pilot == std::thread::current().id() => {
                    return Err(self.sync.error(ErrorKind::Recursion));
                }
                Some(_) => {
                    if terms.stale_while_reloading
                        && let Some(entry) = current
                    {
                        self.tally.stale.add_one();
                        return Ok(entry);
                    }
                    state = flights.wait(state, terms.deadline).ok_or_else(|| self.sync.error(ErrorKind::Deadline))?;
                    has_waited = true;
                }
            }
        }
    }

    /// What a caller gets whose load failed, or who waited for one that did.
    fn after_failure(
        &self,
        failure: &Failure,
        old: Option<Arc<Entry<T>>>,
        terms: Terms,
    ) -> Result<Arc<Entry<T>>, Error> {
        let age = Duration::from_millis(coarse_now().saturating_sub(failure.since));
        match (old, self.policy.max_staleness) {
            (Some(entry), Some(max_staleness)) if terms.stale_after_failure && age <= max_staleness => {
                self.tally.stale.add_one();
                Ok(entry)
            }
            _ => Err(self.load_error(failure)),
        }
    }

    fn load_error(&self, failure: &Failure) -> Error {
        self.sync.place(Error::load(&failure.error))
    }

    /// The loads of this process.
    fn flights(&self) -> Arc<Flights> {
        loop {
            let flights = self.flights.load_full();
            if !flights.is_inherited() {
                return flights;
            }
            self.flights.compare_and_swap(&flights, Flights::new());
        }
    }

    /// Loads the value; the caller has made itself the pilot.
    fn load(&self, flights: &Flights) -> Result<Arc<Entry<T>>, Failure> {
        let flight = Flight(flights);
        let dependencies = self.policy.dependencies.iter().map(GenerationSynchronizer::ticket).collect();
        let ticket = self.sync.ticket();
        let (start, since) = (Instant::now(), coarse_now());
        let outcome = (self.policy.loader)();
        self.tally.longest.raise_to(start.elapsed().as_micros() as u64);
        match outcome {
            Ok(value) => {
                let expires = self.policy.expiry(coarse_now());
                let entry = Arc::new(Entry { value: Arc::new(value), ticket, dependencies, expires });
                let old = self.current.swap(Some(Arc::clone(&entry)));
                self.tally.reloads.add_one();
                let is_overtaken = ticket.generation().is_some() && self.sync.is_expired_since(ticket);
                let overtaken = flight.land(|state| {
                    state.succeeded = state.begun;
                    state.failure = None;
                    state.overtaken = if is_overtaken { state.overtaken + 1 } else { 0 };
                    state.overtaken
                });
                drop(flight);
                if let (Some(on_reload), Some(old)) = (&self.policy.on_reload, old) {
                    on_reload(&old.value, &entry.value);
                }
                let loads = overtaken.unwrap_or(0);
                if is_overtaken && loads.is_multiple_of(OVERTAKEN) {
                    self.report(|| self.sync.error(ErrorKind::Overtaken { loads }));
                }
                Ok(entry)
            }
            Err(error) => {
                self.tally.errors.add_one();
                let retry = self.policy.retry(coarse_now());
                let mut failure = Failure { error, since, retry };
                flight.land(|state| {
                    failure.since = state.failure.as_ref().map_or(since, |earlier| earlier.since);
                    state.failure = Some(failure.clone());
                });
                drop(flight);
                self.report(|| self.load_error(&failure));
                Err(failure)
            }
        }
    }

    fn report(&self, error: impl FnOnce() -> Error) {
        if let Some(on_error) = &self.policy.on_error {
            on_error(&error());
        }
    }

    /// Loads the value although `entry` is fresh by its generation, to see whether it is. Gives what was loaded, if
    /// anything.
    #[cold]
    fn verify(&self, entry: &Entry<T>, verification: &Verification<T>) -> Option<Arc<Entry<T>>> {
        let flights = self.flights();
        if !flights.lock().take_off() {
            return None;
        }
        let loaded = self.load(&flights).ok()?;
        let is_unchanged = loaded.ticket == entry.ticket && self.sync.is_unchanged(loaded.ticket);
        if is_unchanged && loaded.dependencies == entry.dependencies {
            (verification.compare)(&entry.value, &loaded.value);
        }
        Some(loaded)
    }
}

impl<T> fmt::Debug for Cached<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cached").field("sync", &self.sync).field("counters", &self.counters()).finish_non_exhaustive()
    }
}

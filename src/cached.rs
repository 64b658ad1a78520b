//! `Cached`: a value with the generation it was loaded at.

#![forbid(unsafe_code)]

mod builder;
#[cfg(feature = "async")]
mod changed;
mod period;
mod pollable;
mod projection;
mod reader;
mod single_flight;
mod wait;
mod waits;

use std::fmt;
use std::iter;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;

pub use self::builder::CachedBuilder;
use self::builder::{Policy, Verification};
use crate::count::Count;
use crate::error::{Error, ErrorKind};
use crate::generation::Generation;
use crate::os::clock::Deadline;
use crate::os::clock::coarse_now;
use crate::os::fork::ForkLocal;
use crate::synchronizer::update::{Update, UpdateError};
use crate::synchronizer::{GenerationSynchronizer, Ticket};
#[cfg(feature = "async")]
pub use changed::CachedChanged;
use period::Period;
pub use projection::{CachedProjection, Part};
pub use reader::CachedReader;
use single_flight::{Failure, Load, Log, Next, SingleFlight};

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
pub struct Cached<T: ?Sized> {
    current: ArcSwapOption<Entry<T>>,
    sync: GenerationSynchronizer,
    hits: Count,
    policy: Policy<T>,
    single_flight: ForkLocal<SingleFlight>,
    metrics: Metrics,
    /// What tasks were told last.
    #[cfg(feature = "async")]
    reported: ArcSwapOption<period::Report>,
}

/// A value and what it was loaded at, never changed.
pub(crate) struct Entry<T: ?Sized> {
    value: Arc<T>,
    ticket: Ticket,
    /// As many as the policy has dependencies.
    dependencies: Box<[Ticket]>,
    /// For how long it is not too old.
    age: Period,
}

/// A value, and the generation that it was loaded at. From [`Cached::snapshot`].
///
/// Every announced update of the key makes the generation another one. It does not name the value, as an `ETag` must, if
/// other things expire the value too: [`depends_on`](CachedBuilder::depends_on), [`max_age`](CachedBuilder::max_age) and
/// [`verify`](CachedBuilder::verify) give several values of one generation.
#[derive(Debug)]
#[non_exhaustive]
pub struct Snapshot<T: ?Sized> {
    /// The value.
    pub value: Arc<T>,
    /// The generation of the key when the load of the value began; `None` if no table could be attached to, or the value was
    /// [invalidated](Cached::invalidate).
    pub generation: Option<Generation>,
}

impl<T: ?Sized> Clone for Snapshot<T> {
    /// The same value, which is not cloned itself.
    fn clone(&self) -> Self {
        Self { value: Arc::clone(&self.value), generation: self.generation }
    }
}

/// What is in place in a [`Cached`], from [`Cached::peek`].
#[derive(Debug)]
#[non_exhaustive]
pub enum Peek<T: ?Sized> {
    /// No value: none was loaded yet.
    Nothing,
    /// A value that the next [`get`](Cached::get) loads again.
    Expired(Snapshot<T>),
    /// A value that `get` would give as it is.
    Fresh(Snapshot<T>),
}

impl<T: ?Sized> Peek<T> {
    /// The value, fresh or not.
    #[must_use]
    pub fn value(&self) -> Option<&Arc<T>> {
        self.snapshot().map(|snapshot| &snapshot.value)
    }

    /// The value with its generation, fresh or not.
    #[must_use]
    pub fn snapshot(&self) -> Option<&Snapshot<T>> {
        match self {
            Self::Nothing => None,
            Self::Expired(snapshot) | Self::Fresh(snapshot) => Some(snapshot),
        }
    }

    /// Whether there is a value that is fresh.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        matches!(self, Self::Fresh(_))
    }
}

impl<T: ?Sized> Clone for Peek<T> {
    fn clone(&self) -> Self {
        match self {
            Self::Nothing => Self::Nothing,
            Self::Expired(snapshot) => Self::Expired(snapshot.clone()),
            Self::Fresh(snapshot) => Self::Fresh(snapshot.clone()),
        }
    }
}

// A loader or a callback that panics leaves the value that was in place, whole, and lets the next thread load; see
// `Flight`. What a closure of the user's keeps for itself is not seen through a `Cached`.
impl<T: RefUnwindSafe + ?Sized> UnwindSafe for Cached<T> {}
impl<T: RefUnwindSafe + ?Sized> RefUnwindSafe for Cached<T> {}

impl<T: ?Sized> Entry<T> {
    fn value(&self) -> Arc<T> {
        Arc::clone(&self.value)
    }

    fn snapshot(&self) -> Snapshot<T> {
        Snapshot { value: self.value(), generation: self.ticket.generation() }
    }
}

#[derive(Default)]
struct Metrics {
    reloads: Count,
    errors: Count,
    stale: Count,
    overtaken: Count,
    unconfirmed: Count,
    /// Those in a row up to the last load.
    outage: Count,
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
    /// Loads that failed, or lasted longer than [`fail_safe`](CachedBuilder::fail_safe) allows; each once.
    pub errors: u64,
    /// Calls that were answered with an expired value: during a load, in a callback, or because loading failed.
    pub stale_answers: u64,
    /// Loads that were overtaken by an update before they ended, so that what they loaded was expired from the start. If
    /// nearly all are, the loader may be making that update itself.
    pub overtaken: u64,
    /// Loads whose freshness cannot be known, as the table could not be attached to or confirmed when they began: each serves
    /// for the [`outage_ttl`](crate::TableOptions::outage_ttl).
    pub unconfirmed: u64,
    /// How long the longest load took, failed ones included; in microseconds' resolution.
    pub longest_load: Duration,
}

/// What a caller puts up with.
#[derive(Clone, Copy)]
struct GetOptions {
    stale_while_reloading: bool,
    stale_after_failure: bool,
    deadline: Option<Deadline>,
}

impl GetOptions {
    const FRESH: Self = Self { stale_while_reloading: false, stale_after_failure: false, deadline: None };
}

impl<T> Cached<T> {
    /// A value of the source behind `sync`'s key, loaded by `loader` at its first use.
    ///
    /// The loader should read the source itself; if it asks for other values, theirs must not ask for this one. It must not mark its own key updated, nor one that the value depends on. For
    /// more choice, see [`builder`](Self::builder).
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
        CachedBuilder::new(sync, Policy::new(loader))
    }
}

impl<T: ?Sized> Cached<T> {
    /// As [`new`](Self::new), with a loader that gives an `Arc` or what becomes one: for values that have no size of their own,
    /// such as `str`, slices and trait objects, and for loaders that share what they give.
    ///
    /// ```
    /// use std::sync::Arc;
    ///
    /// use gensync::{Cached, GenerationSynchronizer, Table};
    ///
    /// # fn main() -> Result<(), gensync::Error> {
    /// let table = Table::options().anonymous()?;
    /// let load = || Ok::<String, std::io::Error>("hello".to_owned());
    /// let greeting = Cached::<str>::new_shared(GenerationSynchronizer::new(&table, "greeting")?, load);
    /// let now: Arc<str> = greeting.get()?;
    /// assert_eq!(&*now, "hello");
    /// # Ok(()) }
    /// ```
    pub fn new_shared<A: Into<Arc<T>>, E>(
        sync: GenerationSynchronizer,
        loader: impl Fn() -> Result<A, E> + Send + Sync + 'static,
    ) -> Self
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        Self::assemble(sync, Policy::shared(loader))
    }

    /// As [`builder`](Self::builder), with a loader as of [`new_shared`](Self::new_shared).
    pub fn builder_shared<A: Into<Arc<T>>, E>(
        sync: GenerationSynchronizer,
        loader: impl Fn() -> Result<A, E> + Send + Sync + 'static,
    ) -> CachedBuilder<T>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        CachedBuilder::new(sync, Policy::shared(loader))
    }

    pub(crate) fn assemble(sync: GenerationSynchronizer, policy: Policy<T>) -> Self {
        let single_flight = ForkLocal::new();
        let sync = sync.without_following();
        let (current, hits, metrics) = (ArcSwapOption::empty(), Count::default(), Metrics::default());
        Self {
            current,
            sync,
            hits,
            policy,
            single_flight,
            metrics,
            #[cfg(feature = "async")]
            reported: ArcSwapOption::empty(),
        }
    }

    /// The value, fresh: no update that was complete before the call is missing in it, unless the value was built to allow
    /// that.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Load`] with the loader's error as source, also to those who waited for that load; the value stays
    /// expired, and the next call tries again, at once: a loop that calls this until it succeeds must pause by itself, or
    /// [`wait`](Self::wait), or be built with [`fail_safe`](CachedBuilder::fail_safe).
    ///
    /// [`ErrorKind::Overdue`] if an old value may be served, and another thread's load lasts for longer than that.
    ///
    /// [`ErrorKind::Recursion`] if the loader itself calls this, or if the load that this call would wait for waits for this
    /// thread, by way of other values: else all of these threads would wait for ever. Only threads in calls of this kind are
    /// seen. If a loader waits by other means for a thread or a task which asks for the value that it is to load, that is
    /// not, and only [`get_fresh`](Self::get_fresh) ends.
    ///
    /// # Panics
    ///
    /// If the loader or a callback does; then the next thread may load.
    ///
    /// # Progress
    ///
    /// Lock-free while the value is fresh: no allocation after each thread's first call, no system call but those of
    /// [`is_expired`](GenerationSynchronizer::is_expired). Blocking while it is loaded.
    #[inline]
    pub fn get(&self) -> Result<Arc<T>, Error> {
        match self.fresh(true, |entry| entry.value()) {
            Some(value) => Ok(value),
            None => self.get_slow(self.default_terms()).map(|entry| entry.value()),
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
        match self.fresh(true, |entry| entry.value()) {
            Some(value) => Ok(value),
            None => {
                let options = GetOptions { stale_while_reloading: true, ..self.default_terms() };
                self.get_slow(options).map(|entry| entry.value())
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
        match self.fresh(true, |entry| entry.value()) {
            Some(value) => Ok(value),
            None => {
                let options = GetOptions { deadline: Some(Deadline::at(deadline)), ..GetOptions::FRESH };
                self.get_slow(options).map(|entry| entry.value())
            }
        }
    }

    /// The value if it is fresh, without loading it otherwise, nor to [verify](CachedBuilder::verify) it: for an event loop,
    /// which lets another thread call [`get`](Self::get) then.
    ///
    /// # Progress
    ///
    /// As [`get`](Self::get) while the value is fresh.
    #[inline]
    #[must_use]
    pub fn get_if_fresh(&self) -> Option<Arc<T>> {
        self.fresh(false, |entry| entry.value())
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
        match self.fresh(true, |entry| entry.snapshot()) {
            Some(snapshot) => Ok(snapshot),
            None => self.get_slow(self.default_terms()).map(|entry| entry.snapshot()),
        }
    }

    /// What is in place, and whether it is fresh, without loading it, waiting for it or counting as a use: for a health check
    /// or a debug page, and for loaders and callbacks as well.
    ///
    /// ```
    /// use gensync::{Cached, GenerationSynchronizer, Peek, Table};
    ///
    /// # fn main() -> Result<(), gensync::Error> {
    /// let table = Table::options().anonymous()?;
    /// let routes = Cached::new(GenerationSynchronizer::new(&table, "routes")?, || Ok::<_, std::io::Error>(vec!["/"]));
    /// assert!(matches!(routes.peek(), Peek::Nothing));
    /// routes.get()?;
    /// assert!(routes.peek().is_fresh());
    /// routes.mark_updated()?;
    /// let old = routes.peek();
    /// assert!(!old.is_fresh());
    /// assert_eq!(**old.value().unwrap(), ["/"]);
    /// # Ok(()) }
    /// ```
    ///
    /// # Progress
    ///
    /// As [`get`](Self::get) while the value is fresh.
    #[must_use]
    pub fn peek(&self) -> Peek<T> {
        match &*self.current.load() {
            None => Peek::Nothing,
            Some(entry) if self.is_fresh(entry) => Peek::Fresh(entry.snapshot()),
            Some(entry) => Peek::Expired(entry.snapshot()),
        }
    }

    /// A view of a part of the value, which `project` finds in it. See [`CachedProjection`].
    pub fn map<U: ?Sized, F: Fn(&T) -> &U + Clone>(&self, project: F) -> CachedProjection<T, U, &Self, F> {
        CachedProjection::new(self, project)
    }

    fn entry(&self) -> Result<Arc<Entry<T>>, Error> {
        match self.fresh(true, Arc::clone) {
            Some(entry) => Ok(entry),
            None => self.get_slow(self.default_terms()),
        }
    }

    /// Changes the source by `commit`, and announces it to all processes, this one too, whatever happens in between: see
    /// [`GenerationSynchronizer::update`].
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Progress
    ///
    /// As there.
    pub fn update<R, E>(&self, commit: impl FnOnce() -> Result<R, E>) -> Result<R, UpdateError<E>> {
        self.sync.update(commit)
    }

    /// Begins a crash-safe update, to be finished when the source was changed: see
    /// [`GenerationSynchronizer::begin_update`]. The value is expired when it has ended, in this process as in all others.
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Progress
    ///
    /// As there.
    pub fn begin_update(&self) -> Result<Update<'_>, Error> {
        self.sync.begin_update()
    }

    /// Announces that the source was updated, and returns the new generation: the value is expired in all processes, in this
    /// one too, which has not loaded it either. See [`update`](Self::update) for a commit whose announcement cannot be lost.
    ///
    /// # Errors
    ///
    /// As [`GenerationSynchronizer::mark_updated`].
    ///
    /// # Progress
    ///
    /// As there, and a look at a clock each time.
    pub fn mark_updated(&self) -> Result<Generation, Error> {
        self.sync.mark_updated()
    }

    /// Has all processes load the value again, though nothing was changed. For this process only, see
    /// [`invalidate`](Self::invalidate).
    ///
    /// # Errors
    ///
    /// As [`GenerationSynchronizer::clear`].
    ///
    /// # Progress
    ///
    /// As [`mark_updated`](Self::mark_updated).
    pub fn clear(&self) -> Result<(), Error> {
        self.sync.clear()
    }

    /// Expires the value in this process only: the next call loads it, also if a load that is in flight ends first, and also
    /// in the [pause](CachedBuilder::retry_pause) after one that failed. Other processes do not notice, nor does a value in
    /// which this one is a [dependency](CachedBuilder::depends_on).
    ///
    /// The old value is kept, and served where this `Cached` was built to serve it. A [`CachedReader`] notices within 64 of its
    /// uses, and a [wait](Self::wait) that is under way within half a second; descriptors and tasks are told at once.
    ///
    /// # Progress
    ///
    /// Takes a lock of the value's, which is never held for long.
    pub fn invalidate(&self) {
        let old = self.single_flight.get().invalidate(|| {
            let entry = self.current.load_full()?;
            let (value, dependencies, age) = (entry.value(), entry.dependencies.clone(), entry.age);
            self.sync.adopt(Ticket::VOID);
            self.current.swap(Some(Arc::new(Entry { value, ticket: Ticket::VOID, dependencies, age })))
        });
        // Not under the lock.
        drop(old);
        self.ring_alarms();
    }

    /// The synchronizer of the value's key. What it has [seen](GenerationSynchronizer::sync_gen) is the generation of the value
    /// in place: an update that is announced by it is not adopted, as the value is not loaded yet, in this process either.
    ///
    /// Whether the value is fresh does not depend on what this synchronizer has seen, so nothing that is done with it can make
    /// an old value count as fresh. It knows neither of [`depends_on`](CachedBuilder::depends_on) nor of
    /// [`max_age`](CachedBuilder::max_age): wait by the methods of the `Cached`.
    #[must_use]
    pub fn synchronizer(&self) -> &GenerationSynchronizer {
        &self.sync
    }

    /// What this `Cached` has done so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let Metrics { reloads, errors, stale, overtaken, unconfirmed, outage: _, longest } = &self.metrics;
        Counters {
            hits: self.hits.get(),
            reloads: reloads.get(),
            errors: errors.get(),
            stale_answers: stale.get(),
            overtaken: overtaken.get(),
            unconfirmed: unconfirmed.get(),
            longest_load: Duration::from_micros(longest.get()),
        }
    }

    fn default_terms(&self) -> GetOptions {
        GetOptions {
            stale_while_reloading: self.policy.stale_while_reloading,
            stale_after_failure: true,
            deadline: None,
        }
    }

    /// Something of the present value, if that is fresh. It may only be verified if the call `may_load`.
    #[inline]
    fn fresh<R>(&self, may_load: bool, pick: impl Fn(&Arc<Entry<T>>) -> R) -> Option<R> {
        let current = self.current.load();
        let entry = current.as_ref()?;
        if !self.policy.is_plain || !self.sync.is_unchanged(entry.ticket) {
            return self.fresh_slow(entry, may_load, pick);
        }
        if !self.sync.spend() && !self.is_confirmed(entry) {
            return None;
        }
        self.hits.add_one_or_so();
        Some(pick(entry))
    }

    #[cold]
    fn is_confirmed(&self, entry: &Entry<T>) -> bool {
        self.sync.revalidate();
        self.sync.confirms(entry.ticket)
    }

    #[cold]
    fn fresh_slow<R>(&self, entry: &Arc<Entry<T>>, may_load: bool, pick: impl Fn(&Arc<Entry<T>>) -> R) -> Option<R> {
        if !self.is_fresh(entry) {
            return None;
        }
        self.hits.add_one();
        let is_due = may_load && self.policy.verification.as_ref().is_some_and(Verification::is_due);
        let loaded = if is_due { self.verify(entry) } else { None };
        Some(pick(loaded.as_ref().unwrap_or(entry)))
    }

    /// The keys that values are made of.
    fn keys(&self) -> impl Iterator<Item = &GenerationSynchronizer> {
        iter::once(&self.sync).chain(&self.policy.dependencies)
    }

    /// The keys that `entry` is made of, each with its ticket.
    fn tickets(&self, entry: &Entry<T>) -> impl Iterator<Item = (&GenerationSynchronizer, Ticket)> {
        self.keys().zip(iter::once(entry.ticket).chain(entry.dependencies.iter().copied()))
    }

    fn is_fresh(&self, entry: &Entry<T>) -> bool {
        self.tickets(entry).all(|(sync, ticket)| !sync.is_expired_since(ticket))
            && (self.policy.max_age.is_none() || !entry.age.is_over(coarse_now()))
    }

    /// Whether an update has come between the beginning of the load and now.
    fn is_overtaken(&self, entry: &Entry<T>) -> bool {
        let mut tickets = self.tickets(entry);
        tickets.any(|(sync, ticket)| ticket.generation().is_some() && sync.is_expired_since(ticket))
    }

    #[cold]
    fn get_slow(&self, options: GetOptions) -> Result<Arc<Entry<T>>, Error> {
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
                Next::Look => {}
                Next::Load(load) => {
                    return self.load(load, None).or_else(|failure| self.after_failure(&failure, current, options));
                }
                Next::Fail(failure) => return self.after_failure(&failure, current, options),
                Next::Recurse => return Err(self.sync.error(ErrorKind::Recursion)),
                Next::Rest => {
                    return current.map(|entry| self.stale(entry)).ok_or_else(|| self.sync.error(ErrorKind::Recursion));
                }
                Next::Wait { began, unread_since } => {
                    let now = coarse_now();
                    let allowed = self.allowed_staleness(&current, options);
                    let period = |since| Period::new(since, allowed);
                    match current {
                        Some(entry) if options.stale_while_reloading && !period(unread_since).is_over(now) => {
                            return Ok(self.stale(entry));
                        }
                        _ if period(began).is_over(now) => {
                            return Err(self.overdue(&single_flight, log, began, allowed));
                        }
                        _ => {}
                    }
                    // Nobody need keep an old value for this call's sake.
                    drop(current);
                    if options.deadline.is_some_and(Deadline::is_reached) {
                        return Err(self.sync.error(ErrorKind::Deadline));
                    }
                    let end =
                        options.deadline.map(|deadline| deadline.at).into_iter().chain(period(began).end(now)).min();
                    let key = self.sync.cache_key().as_str();
                    single_flight
                        .wait(log, end, key)
                        .map_err(|circle| self.sync.explain(Error::from(ErrorKind::Recursion).caused_by(circle)))?;
                }
            }
            log = single_flight.log();
        }
    }

    fn stale(&self, entry: Arc<Entry<T>>) -> Arc<Entry<T>> {
        self.metrics.stale.add_one();
        entry
    }

    /// How long a load may last before it counts as failed for a call that waits for it; as for ever, if there is nothing that
    /// could be too old, or the call has a limit of its own.
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

    /// What a caller gets whose load failed, or who waited for one that did.
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

    /// Loads the value, or only sees whether `verified` still is what would be loaded.
    fn load(&self, mut load: Load<'_>, verified: Option<&Entry<T>>) -> Result<Arc<Entry<T>>, Failure> {
        let mut outage = None;
        let mut take = |sync: &GenerationSynchronizer| {
            let (ticket, reason) = sync.ticket_with_reason();
            outage = outage.take().or(reason);
            ticket
        };
        let dependencies = self.policy.dependencies.iter().map(&mut take).collect();
        let ticket = take(&self.sync);
        let (start, since) = (Instant::now(), coarse_now());
        let outcome = (self.policy.loader)();
        self.metrics.longest.raise_to(start.elapsed().as_micros() as u64);
        match outcome {
            Ok(value) => {
                let age = Period::new(coarse_now(), self.policy.next_age());
                let (entry, old) = load.place(|is_invalidated| {
                    let ticket = if is_invalidated { Ticket::VOID } else { ticket };
                    let entry = Arc::new(Entry { value, ticket, dependencies, age });
                    let old = self.current.swap(Some(Arc::clone(&entry)));
                    (entry, old)
                });
                self.sync.adopt(entry.ticket);
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
                // Before the old value: dropping that may take its time, and need this one.
                drop(load);
                Ok(entry)
            }
            Err(error) => {
                if !load.is_overdue() {
                    self.metrics.errors.add_one();
                }
                let ended = coarse_now();
                let retry = Period::new(ended, self.policy.pause_of_calls());
                let mut failure = Failure { error, since, ended, retry, load: load.number() };
                match verified {
                    None => load.fail(&mut failure),
                    // There is a fresh value, and no reason not to load when it expires.
                    Some(_) => load.complete(),
                }
                self.report(|| self.load_error(&failure));
                drop(load);
                Err(failure)
            }
        }
    }

    /// Counts a load that came in an outage of the table, and reports the first one of each.
    fn note_outage(&self, outage: Option<Error>) {
        let Some(reason) = outage else { return self.metrics.outage.clear() };
        self.metrics.unconfirmed.add_one();
        if self.metrics.outage.add_one() == 1 {
            self.report(|| reason);
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
    fn verify(&self, entry: &Entry<T>) -> Option<Arc<Entry<T>>> {
        let single_flight = self.single_flight.get();
        self.load(single_flight.try_start()?, Some(entry)).ok()
    }

    /// Reports two values if they differ and should not: no update has come between their loads, and none is in flight.
    fn compare(&self, cached: &Entry<T>, loaded: &Entry<T>) {
        if let Some(verification) = &self.policy.verification
            && (cached.ticket, &cached.dependencies) == (loaded.ticket, &loaded.dependencies)
            && self.tickets(loaded).all(|(sync, ticket)| sync.is_unchanged(ticket))
        {
            (verification.compare)(&cached.value, &loaded.value);
        }
    }
}

impl<T: ?Sized> fmt::Debug for Cached<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cached").field("sync", &self.sync).field("counters", &self.counters()).finish_non_exhaustive()
    }
}

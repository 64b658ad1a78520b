//! `Cached`: a value with the generation it was loaded at.

#![forbid(unsafe_code)]

mod builder;
#[cfg(feature = "async")]
mod changed;
mod counters;
mod load;
mod period;
mod pollable;
mod projection;
mod reader;
mod single_flight;
mod value;
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
pub use self::counters::Counters;
use self::counters::Metrics;
use self::load::GetOptions;
pub(crate) use self::value::Entry;
pub use self::value::{Peek, Snapshot};
use crate::count::Count;
use crate::error::Error;
use crate::generation::Generation;
use crate::os::clock::Deadline;
use crate::os::clock::coarse_now;
use crate::os::fork::ForkLocal;
use crate::synchronizer::update::{Update, UpdateError};
use crate::synchronizer::{GenerationSynchronizer, Ticket};
#[cfg(feature = "async")]
pub use changed::CachedChanged;
pub use projection::{CachedProjection, Part};
pub use reader::CachedReader;
use single_flight::SingleFlight;

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

impl<T: RefUnwindSafe + ?Sized> UnwindSafe for Cached<T> {}
impl<T: RefUnwindSafe + ?Sized> RefUnwindSafe for Cached<T> {}

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
    /// [`ErrorKind::Load`](crate::ErrorKind::Load) with the loader's error as source, also to those who waited for that load; the value stays
    /// expired, and the next call tries again, at once: a loop that calls this until it succeeds must pause by itself, or
    /// [`wait`](Self::wait), or be built with [`fail_safe`](CachedBuilder::fail_safe).
    ///
    /// [`ErrorKind::Overdue`](crate::ErrorKind::Overdue) if an old value may be served, and another thread's load lasts for longer than that.
    ///
    /// [`ErrorKind::Recursion`](crate::ErrorKind::Recursion) if the loader itself calls this, or if the load that this call would wait for waits for this
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
    /// As [`get`](Self::get), and [`ErrorKind::Deadline`](crate::ErrorKind::Deadline).
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
}

impl<T: ?Sized> fmt::Debug for Cached<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cached").field("sync", &self.sync).field("counters", &self.counters()).finish_non_exhaustive()
    }
}

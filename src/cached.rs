//! `Cached`: a value, and the generation that it was loaded at.

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
use crate::os::clock::{Deadline, coarse_now};
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
/// Each process has its own; the threads of a process share it. It may be made before a fork and used after it: the child starts
/// with the value that the parent had, and loads for itself from there on.
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
/// The generation is read before the load and kept with the value, in one piece that is replaced as a whole. So an update
/// that is made during the load leaves the value expired, and no thread can find a value with the generation of another one.
///
/// One thread of a process loads at a time. The others wait for its load, unless they take the old value meanwhile
/// ([`stale_while_reloading`](CachedBuilder::stale_while_reloading), [`get_stale_ok`](Self::get_stale_ok)). A load that
/// began after a call to `get` satisfies that call, even if the value was updated again during the load: it contains every update
/// that was complete before the call. So a call to `get` waits for two loads at most, and runs one at most.
// What a use of a fresh value reads and writes here stands first, in one cache line.
#[repr(C, align(64))]
pub struct Cached<T: ?Sized> {
    sync: GenerationSynchronizer,
    current: ArcSwapOption<Entry<T>>,
    hits: Count,
    /// Whether the generation of the key alone decides whether a value is fresh, and nothing else happens at a hit.
    is_plain: bool,
    // The fields from here on are used when a value is not fresh.
    policy: Policy<T>,
    single_flight: ForkLocal<SingleFlight>,
    metrics: Metrics,
    /// The last report to tasks.
    #[cfg(feature = "async")]
    reported: ArcSwapOption<period::Report>,
}

const _: () = assert!(std::mem::offset_of!(Cached<()>, is_plain) < 64);

// A loader or a callback that panics leaves the value in place whole, and lets the next thread load (see `Load`). The state that
// a closure of the user captures cannot be seen through a `Cached`.
impl<T: RefUnwindSafe + ?Sized> UnwindSafe for Cached<T> {}
impl<T: RefUnwindSafe + ?Sized> RefUnwindSafe for Cached<T> {}

impl<T> Cached<T> {
    /// A value of the source behind `sync`'s key, loaded by `loader` at its first use.
    ///
    /// The loader should read the source itself; if it asks for other values, their loaders must not ask for this one. It must
    /// not mark the value's own key updated, nor a key that the value depends on. For more options, see
    /// [`builder`](Self::builder).
    pub fn new<E>(sync: GenerationSynchronizer, loader: impl Fn() -> Result<T, E> + Send + Sync + 'static) -> Self
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        Self::assemble(sync, Policy::new(loader))
    }

    /// A builder, for a value with other options than those of [`new`](Self::new).
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
    /// As [`new`](Self::new), with a loader that returns an `Arc` or a value that can become one: for unsized values such as
    /// `str`, slices and trait objects, and for loaders that share what they return.
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

    /// As [`builder`](Self::builder), with a loader as for [`new_shared`](Self::new_shared).
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
            sync,
            current,
            hits,
            is_plain: policy.is_plain(),
            policy,
            single_flight,
            metrics,
            #[cfg(feature = "async")]
            reported: ArcSwapOption::empty(),
        }
    }

    /// The fresh value: it contains every update that was complete before the call, unless this `Cached` was built to serve old
    /// values.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Load`](crate::ErrorKind::Load) with the loader's error as source; every call that waited for that load gets
    /// it. The value stays expired, and the next call tries again at once: a loop that calls this until it succeeds must pause by
    /// itself, call [`wait`](Self::wait) instead, or use a value that was built with [`fail_safe`](CachedBuilder::fail_safe).
    ///
    /// [`ErrorKind::Overdue`](crate::ErrorKind::Overdue) if an old value may be served for some time, and another thread's load
    /// lasts longer than that.
    ///
    /// [`ErrorKind::Recursion`](crate::ErrorKind::Recursion) if the loader itself calls this, or if the load that this call would
    /// wait for waits for this thread, possibly through other values: otherwise all of these threads would wait for ever. Only
    /// waits in calls of this kind are detected. If a loader waits by other means for a thread or a task that asks for the value
    /// which is being loaded, the circle is not detected, and only [`get_fresh`](Self::get_fresh) returns, at its deadline.
    ///
    /// # Panics
    ///
    /// If the loader or a callback panics; then the next call may load.
    ///
    /// # Progress
    ///
    /// Lock-free while the value is fresh: no allocation after the first call of each thread, and no system calls except those of
    /// [`is_expired`](GenerationSynchronizer::is_expired). Blocking while the value is loaded.
    #[inline]
    pub fn get(&self) -> Result<Arc<T>, Error> {
        match self.fresh(true, |entry| entry.value()) {
            Some(value) => Ok(value),
            None => self.get_slow(self.default_options()).map(|entry| entry.value()),
        }
    }

    /// The value, or an expired one while another thread loads it: as [`get`](Self::get) of a `Cached` that was built with
    /// [`stale_while_reloading`](CachedBuilder::stale_while_reloading).
    ///
    /// If the value is expired and no thread is loading it, this call does.
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
                let options = GetOptions { stale_while_reloading: true, ..self.default_options() };
                self.get_slow(options).map(|entry| entry.value())
            }
        }
    }

    /// The fresh value, even if this `Cached` was built to serve old ones. Waits for another thread's load until `deadline` at
    /// most.
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

    /// The value if it is fresh. Never runs the loader, not even to [verify](CachedBuilder::verify) the value: for an event loop,
    /// which has another thread call [`get`](Self::get) if this returns `None`.
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
            None => self.get_slow(self.default_options()).map(|entry| entry.snapshot()),
        }
    }

    /// The value in place, and whether it is fresh. Neither loads nor waits, and does not count as a use: for health checks and
    /// debug pages. Loaders and callbacks may call it as well.
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

    /// A view of the part of the value that `project` returns. See [`CachedProjection`].
    pub fn map<U: ?Sized, F: Fn(&T) -> &U + Clone>(&self, project: F) -> CachedProjection<T, U, &Self, F> {
        CachedProjection::new(self, project)
    }

    fn entry(&self) -> Result<Arc<Entry<T>>, Error> {
        match self.fresh(true, Arc::clone) {
            Some(entry) => Ok(entry),
            None => self.get_slow(self.default_options()),
        }
    }

    /// Changes the source by `commit` and announces the update to all processes, including this one, whatever happens in between:
    /// see [`GenerationSynchronizer::update`].
    ///
    /// # Errors
    ///
    /// As [`GenerationSynchronizer::update`].
    ///
    /// # Progress
    ///
    /// As [`GenerationSynchronizer::update`].
    pub fn update<R, E>(&self, commit: impl FnOnce() -> Result<R, E>) -> Result<R, UpdateError<E>> {
        self.sync.update(commit)
    }

    /// Begins a crash-safe update, to be finished when the source has been changed: see
    /// [`GenerationSynchronizer::begin_update`]. When the update has ended, the value is expired in all processes, including this
    /// one.
    ///
    /// # Errors
    ///
    /// As [`GenerationSynchronizer::begin_update`].
    ///
    /// # Progress
    ///
    /// As [`GenerationSynchronizer::begin_update`].
    pub fn begin_update(&self) -> Result<Update<'_>, Error> {
        self.sync.begin_update()
    }

    /// Announces that the source was updated, and returns the new generation: the value is expired in all processes, including
    /// this one, which has not loaded the new value yet. If the announcement must not be lost, see [`update`](Self::update).
    ///
    /// # Errors
    ///
    /// As [`GenerationSynchronizer::mark_updated`].
    ///
    /// # Progress
    ///
    /// As [`GenerationSynchronizer::mark_updated`], and reads a clock each time.
    pub fn mark_updated(&self) -> Result<Generation, Error> {
        self.sync.mark_updated()
    }

    /// Makes all processes load the value again although the source was not changed. For this process only, see
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

    /// Expires the value in this process only: the next call loads it, even if a load that is in flight ends first, and even
    /// in the [pause](CachedBuilder::retry_pause) after a load that failed. Other processes do not notice, nor do values that
    /// [depend](CachedBuilder::depends_on) on this value's key.
    ///
    /// The old value is kept, and is served if this `Cached` was built to serve old values. A [`CachedReader`] notices within 64
    /// of its uses, and a [wait](Self::wait) that is under way within half a second; descriptors and tasks are notified at once.
    ///
    /// # Progress
    ///
    /// Takes a lock of this `Cached`, which is never held for long.
    pub fn invalidate(&self) {
        let old = self.single_flight.get().invalidate(|| {
            let entry = self.current.load_full()?;
            let (value, dependencies, age) = (entry.value(), entry.dependencies.clone(), entry.age);
            self.sync.adopt(Ticket::VOID);
            self.current.swap(Some(Arc::new(Entry { value, ticket: Ticket::VOID, dependencies, age })))
        });
        // Not under the lock, as dropping an entry may run code of the user.
        drop(old);
        self.ring_alarms();
    }

    /// The synchronizer of the value's key. The generation that it has [seen](GenerationSynchronizer::sync_gen) is that of the
    /// value in place. It does not adopt updates that are announced through it, as this process has not loaded the new value yet
    /// either.
    ///
    /// Whether the value is fresh does not depend on what this synchronizer has seen, so nothing that is done with it can make
    /// an old value count as fresh. It does not take [`depends_on`](CachedBuilder::depends_on) and
    /// [`max_age`](CachedBuilder::max_age) into account: to wait for the value, use the methods of the `Cached`.
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

    fn default_options(&self) -> GetOptions {
        GetOptions {
            stale_while_reloading: self.policy.stale_while_reloading,
            stale_after_failure: true,
            deadline: None,
        }
    }

    /// What `pick` returns for the entry in place, if the entry is fresh. The value is verified only if the call `may_load`.
    #[inline]
    fn fresh<R>(&self, may_load: bool, pick: impl Fn(&Arc<Entry<T>>) -> R) -> Option<R> {
        let current = self.current.load();
        let entry = current.as_ref()?;
        if !self.is_plain || !self.sync.is_unchanged(entry.ticket) {
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

    /// The keys that expire the value: its own, and those that it depends on.
    fn keys(&self) -> impl Iterator<Item = &GenerationSynchronizer> {
        iter::once(&self.sync).chain(&self.policy.dependencies)
    }

    /// The keys that expire `entry`, each with the ticket that `entry` was loaded with.
    fn tickets(&self, entry: &Entry<T>) -> impl Iterator<Item = (&GenerationSynchronizer, Ticket)> {
        self.keys().zip(iter::once(entry.ticket).chain(entry.dependencies.iter().copied()))
    }

    fn is_fresh(&self, entry: &Entry<T>) -> bool {
        self.tickets(entry).all(|(sync, ticket)| !sync.is_expired_since(ticket))
            && (self.policy.max_age.is_none() || !entry.age.is_over(coarse_now()))
    }

    /// Whether one of the keys was updated since the load of `entry` began.
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

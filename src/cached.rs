//! `Cached`: a value, and the generation that it was loaded at.

#![forbid(unsafe_code)]

mod base;
mod builder;
mod cell;
#[cfg(feature = "async")]
mod changed;
mod collected;
mod counters;
mod dependencies;
mod dependency;
#[cfg(feature = "future")]
mod drive;
#[cfg(feature = "future")]
pub mod future;
mod load;
#[cfg(feature = "map")]
mod map;
mod period;
mod policy;
mod pollable;
mod projection;
mod reader;
mod scope;
mod single_flight;
mod value;
mod wait;
mod waits;

use std::fmt;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::sync::Arc;
use std::time::Instant;

use self::base::Base;
pub use self::builder::CachedBuilder;
pub use self::counters::Counters;
pub use self::dependencies::{Tracked, depend_on};
use self::load::{Call, GetOptions};
#[cfg(feature = "map")]
pub use self::map::{CachedMap, CachedMapBuilder};
use self::policy::Policy;
use self::value::Entry;
pub use self::value::{Peek, Snapshot};
use crate::error::{Error, ErrorKind, Source};
use crate::generation::Generation;
use crate::os::clock::Deadline;
use crate::synchronizer::GenerationSynchronizer;
use crate::synchronizer::update::{Update, UpdateError};
#[cfg(feature = "async")]
pub use changed::CachedChanged;
pub use projection::{CachedProjection, Part};
pub use reader::CachedReader;

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
#[repr(C, align(64))]
pub struct Cached<T: ?Sized> {
    base: Base<T>,
    loader: Loader<T>,
}

type Loader<T> = Box<dyn Fn() -> Result<Arc<T>, Source> + Send + Sync>;

/// Why a load fails of a value that has no loader.
fn no_loader() -> Source {
    let (what, found) = ("the loader", "none".to_owned());
    let expected = "one that was given when the cache was built, or a call to get_with, which is given one";
    Arc::new(Error::from(ErrorKind::InvalidInput { what, found, expected }))
}

/// Calls `loader` as a `Loader` is called.
fn call<T: ?Sized, A: Into<Arc<T>>, E>(loader: impl FnOnce() -> Result<A, E>) -> Result<Arc<T>, Source>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    loader().map(Into::into).map_err(source)
}

fn source(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Source {
    Source::from(error.into())
}

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
        Self::assemble(sync, Box::new(move || call(|| loader().map(Arc::new))), Policy::new())
    }

    /// A value without a loader of its own: each use gives one to [`get_with`](Self::get_with), which may borrow what it needs.
    ///
    /// Calls that would load by themselves, such as [`get`](Self::get) and [`wait`](Self::wait), fail if the value is not fresh.
    #[must_use]
    pub fn without_loader(sync: GenerationSynchronizer) -> Self {
        Self::assemble(sync, Box::new(|| Err(no_loader())), Policy::new())
    }

    /// As [`without_loader`](Self::without_loader), with other options.
    pub fn builder_without_loader(sync: GenerationSynchronizer) -> CachedBuilder<T> {
        CachedBuilder::new(sync, Box::new(|| Err(no_loader())))
    }

    /// As [`get`](Self::get), but if this call loads, it loads with `loader`, which may borrow.
    ///
    /// Calls that wait for that load take its value, whichever loader they bring themselves: all loaders of one value must read the
    /// same source.
    ///
    /// ```
    /// use gensync::{Cached, GenerationSynchronizer, Table};
    ///
    /// # struct Database;
    /// # impl Database { fn routes(&self) -> Result<Vec<String>, std::io::Error> { Ok(Vec::new()) } }
    /// fn route_count(database: &Database, routes: &Cached<Vec<String>>) -> Result<usize, gensync::Error> {
    ///     Ok(routes.get_with(|| database.routes())?.len())
    /// }
    ///
    /// # fn main() -> Result<(), gensync::Error> {
    /// let table = Table::options().anonymous()?;
    /// let routes = Cached::without_loader(GenerationSynchronizer::new(&table, "routes")?);
    /// assert_eq!(route_count(&Database, &routes)?, 0);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get).
    ///
    /// # Panics
    ///
    /// As [`get`](Self::get).
    ///
    /// # Progress
    ///
    /// As [`get`](Self::get).
    #[inline]
    pub fn get_with<E>(&self, loader: impl FnOnce() -> Result<T, E>) -> Result<Arc<T>, Error>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        // The loader is used once: by the load of an expired value, or to verify a fresh one.
        let loader = std::cell::Cell::new(Some(loader));
        let load = || match loader.take() {
            Some(loader) => call(|| loader().map(Arc::new)),
            None => unreachable!("a call loads once"),
        };
        let verify = |entry: &Arc<Entry<T>>| load::verify(&self.base, entry, &load);
        match self.base.fresh(Some(verify), |entry| entry.value()) {
            Some(value) => Ok(value),
            None => load::run(self.base.call(), load).map(|entry| entry.value()),
        }
    }

    /// A builder, for a value with other options than those of [`new`](Self::new).
    pub fn builder<E>(
        sync: GenerationSynchronizer,
        loader: impl Fn() -> Result<T, E> + Send + Sync + 'static,
    ) -> CachedBuilder<T>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        CachedBuilder::new(sync, Box::new(move || call(|| loader().map(Arc::new))))
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
        Self::assemble(sync, Box::new(move || call(&loader)), Policy::new())
    }

    /// As [`builder`](Self::builder), with a loader as for [`new_shared`](Self::new_shared).
    pub fn builder_shared<A: Into<Arc<T>>, E>(
        sync: GenerationSynchronizer,
        loader: impl Fn() -> Result<A, E> + Send + Sync + 'static,
    ) -> CachedBuilder<T>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        CachedBuilder::new(sync, Box::new(move || call(&loader)))
    }

    fn assemble(sync: GenerationSynchronizer, loader: Loader<T>, policy: Policy<T>) -> Self {
        Self { base: Base::new(sync, policy), loader }
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
        match self.fresh(|entry| entry.value()) {
            Some(value) => Ok(value),
            None => self.get_slow(self.base.options()).map(|entry| entry.value()),
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
        match self.fresh(|entry| entry.value()) {
            Some(value) => Ok(value),
            None => {
                let options = GetOptions { stale_while_reloading: true, ..self.base.options() };
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
        match self.fresh(|entry| entry.value()) {
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
        self.base.get_if_fresh()
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
        match self.fresh(|entry| entry.snapshot()) {
            Some(snapshot) => Ok(snapshot),
            None => self.get_slow(self.base.options()).map(|entry| entry.snapshot()),
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
        self.base.peek()
    }

    /// This value, to be read by the loader of another one, which then depends on it: on this value's key, and on all that this
    /// value depends on itself, its age included. See [`depend_on`].
    ///
    /// ```
    /// use std::sync::Arc;
    ///
    /// use gensync::{Cached, GenerationSynchronizer, Table};
    ///
    /// # fn main() -> Result<(), gensync::Error> {
    /// # fn load_prices() -> std::io::Result<Vec<u32>> { Ok(vec![1, 2]) }
    /// let table = Table::options().anonymous()?;
    /// let prices = Arc::new(Cached::new(GenerationSynchronizer::new(&table, "prices")?, load_prices));
    /// let total = Cached::new(GenerationSynchronizer::new(&table, "total")?, {
    ///     let prices = Arc::clone(&prices);
    ///     move || Ok::<_, gensync::Error>(prices.tracked().get()?.iter().sum::<u32>())
    /// });
    /// assert_eq!(*total.get()?, 3);
    /// prices.mark_updated()?; // in any process
    /// assert!(total.get_if_fresh().is_none());
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn tracked(&self) -> Tracked<'_, Self> {
        Tracked(self)
    }

    /// A view of the part of the value that `project` returns. See [`CachedProjection`].
    pub fn map<U: ?Sized, F: Fn(&T) -> &U + Clone>(&self, project: F) -> CachedProjection<T, U, &Self, F> {
        CachedProjection::new(self, project)
    }

    fn entry(&self) -> Result<Arc<Entry<T>>, Error> {
        match self.fresh(Arc::clone) {
            Some(entry) => Ok(entry),
            None => self.get_slow(self.base.options()),
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
        self.base.sync.update(commit)
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
        self.base.sync.begin_update()
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
        self.base.sync.mark_updated()
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
        self.base.sync.clear()
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
        self.base.invalidate();
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
        &self.base.sync
    }

    /// What this `Cached` has done so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.base.counters()
    }

    /// What a call returns that found no fresh value.
    #[cold]
    fn get_slow(&self, options: GetOptions) -> Result<Arc<Entry<T>>, Error> {
        load::run(Call::new(&self.base, options), &self.loader)
    }

    /// What `pick` returns for the entry in place, if the entry is fresh.
    #[inline]
    fn fresh<R>(&self, pick: impl Fn(&Arc<Entry<T>>) -> R) -> Option<R> {
        self.base.fresh(Some(|entry: &_| load::verify(&self.base, entry, &self.loader)), pick)
    }
}

impl<T: ?Sized> fmt::Debug for Cached<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cached")
            .field("sync", &self.base.sync)
            .field("counters", &self.counters())
            .finish_non_exhaustive()
    }
}

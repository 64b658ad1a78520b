//! Cached values for tasks: loaders are asynchronous, and calls await where those of [`gensync::Cached`](crate::Cached) block.
//!
//! This module needs the feature `future`, and its `CachedMap` the feature `map` as well.
//!
//! ```
//! use std::sync::Arc;
//!
//! use gensync::{GenerationSynchronizer, Table, future::Cached};
//!
//! # #[derive(Clone)]
//! # struct Database;
//! # impl Database {
//! #     async fn load(&self) -> std::io::Result<String> { Ok("hello".to_owned()) }
//! #     async fn save(&self, text: &str) -> std::io::Result<()> { Ok(()) }
//! # }
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let database = Database;
//! let table = Table::options().anonymous()?;
//! let greeting = Cached::new(GenerationSynchronizer::new(&table, "greeting")?, {
//!     let database = database.clone();
//!     move || {
//!         let database = database.clone();
//!         async move { database.load().await }
//!     }
//! });
//!
//! let now: Arc<String> = greeting.get().await?; // at each use
//! greeting.update(async || database.save("good morning").await).await?; // in any process
//! # drop(now);
//! # Ok(()) }
//! ```
//!
//! All is as in the blocking face, with the same core: one load at a time in each process, the same policies, callbacks, counters
//! and errors. A value of one key may be cached by this face and by the other one, in one process or in several; each cache loads
//! for itself.
//!
//! # Runtimes
//!
//! The futures work in any runtime, and in several at a time. They can be sent between threads if the value and the loader's
//! future can. Nothing here needs a reactor or a timer of a runtime.
//!
//! A call that waits for the load of another task starts no thread: it is woken by that task. The thread that tasks and descriptors
//! of a table share in each process (see [`GenerationSynchronizer::changed`](crate::GenerationSynchronizer::changed)) exists
//! only while tasks
//!
//! - wait for an update, in [`Cached::wait`], that of a `CachedMap`, and [`Cached::changed`];
//! - wait for a time: for another task's load, if there is a limit, by [`fail_safe`](CachedBuilder::fail_safe) or of
//!   [`Cached::get_fresh`]; or for the end of the pause after an error, in a wait;
//! - wait for a process that keeps an [`update`](Cached::update) from beginning.
//!
//! # What blocks
//!
//! A `poll` never waits for a load, for a change, for a time or for an update of another process. It takes locks of this process
//! only, which are never held for long, and runs the callbacks. A check of the generation may make system calls after an update,
//! while one is pending, or if the table was replaced: see [`is_expired`](crate::GenerationSynchronizer::is_expired), which may
//! then open files. To begin and to finish an update takes some ten system calls on the table's file.
//!
//! # A call that is dropped
//!
//! A call that is dropped, as by a timeout or a `select!`, leaves all as if it had not been made. If it was running the load, the
//! loader's future is dropped with it, and the load ends without an outcome: the other calls that wait for it go on at once, and
//! one of them loads. So a load that takes longer than all callers are willing to wait is never completed: give each load a task
//! of its own where callers have short timeouts, as `spawn` of your runtime does.
//!
//! A call that runs a load must be polled until it is ready, or dropped: while it is kept without being polled, the load does not
//! go on, and others wait for it. A task that keeps such a call, and meanwhile awaits the same value by another call, waits for
//! itself; [`get_fresh`](Cached::get_fresh) ends that at its deadline.
//!
//! # Loaders
//!
//! A stored loader is called once for each load, and returns a future that borrows nothing from it. So a loader that needs a client
//! gives each future a clone, and the future takes it with `move`; the loader of a map takes the key as well (`move |id| { ... }`):
//!
//! ```
//! # use gensync::{GenerationSynchronizer, Table, future::Cached};
//! # #[derive(Clone)]
//! # struct Client;
//! # impl Client { async fn load(&self) -> std::io::Result<String> { Ok(String::new()) } }
//! # fn cached(client: Client, sync: GenerationSynchronizer) -> Cached<String> {
//! # Cached::new(sync,
//! move || {
//!     let client = client.clone();
//!     async move { client.load().await }
//! }
//! # ) }
//! # drop(cached(Client, GenerationSynchronizer::new(&Table::options().anonymous().unwrap(), "a").unwrap()));
//! ```
//!
//! This is the cure where the compiler says one of these:
//!
//! | error | of the loader |
//! |---|---|
//! | async closure does not implement `Fn` because it captures state from its environment | `async move \|\| client.load().await` |
//! | lifetime may not live long enough: returning this value requires that `'1` must outlive `'2` | `move \|\| async { client.load().await }` |
//! | E0507: cannot move out of `client`, a captured variable in an `Fn` closure | `move \|\| async move { client.load().await }` |
//!
//! An async closure or an `async fn` is a stored loader only if it captures nothing. At the call, for [`Cached::get_with`] and
//! [`Cached::update`], it may capture and borrow what it likes, and need not be `'static`.
//!
//! "Cannot infer type of the type parameter `E`" means that nothing says which error the loader may return: write
//! `Ok::<_, std::io::Error>(value)`. The error is anything that becomes a `Box<dyn Error + Send + Sync>`: each error that is `Send`
//! and `Sync`, `anyhow::Error`, and `&str` and `String`. A `Box<dyn Error>` is none of these, as it may not be sent.
//!
//! A loader's future belongs to its load in whichever thread it is polled: [`depend_on`](crate::depend_on) and
//! [`tracked`](Cached::tracked) reads in it add to what the value depends on, and values that wait for each other are detected.
//! That does not hold for tasks that the loader spawns.

mod builder;
pub(super) mod wait;

use std::fmt;
use std::future::Future;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

pub use self::builder::CachedBuilder;
use super::base::Base;
use super::changed::CachedChanged;
use super::counters::Counters;
use super::dependencies::{Tracked, depend_on_value};
use super::load::{Call, GetOptions};
#[cfg(feature = "map")]
pub use super::map::future::{CachedMap, CachedMapBuilder};
use super::policy::Policy;
use super::value::{Entry, Peek, Snapshot};
use super::{drive, no_loader, source};
use crate::error::{Error, Source};
use crate::generation::Generation;
use crate::os::clock::Deadline;
use crate::synchronizer::GenerationSynchronizer;
use crate::synchronizer::update::{Update, UpdateError};

/// A value that is loaded from a shared source by an asynchronous loader, and loaded again when any process has updated the
/// source.
///
/// Needs the feature `future`. See [the module](self) for an overview, and [`gensync::Cached`](crate::Cached) for how values are
/// kept fresh and loads are shared. To share one between tasks, put it into an [`Arc`], or into a `static` by way of a
/// [`LazyLock`](std::sync::LazyLock).
// As in the blocking face, what a use of a fresh value reads and writes here stands in one cache line.
#[repr(C, align(64))]
pub struct Cached<T: ?Sized> {
    base: Base<T>,
    loader: Loader<T>,
}

type Loading<T> = Pin<Box<dyn Future<Output = Result<Arc<T>, Source>> + Send>>;
type Loader<T> = Box<dyn Fn() -> Loading<T> + Send + Sync>;

fn stored<T: ?Sized + 'static, A: Into<Arc<T>> + 'static, E, F>(
    loader: impl Fn() -> F + Send + Sync + 'static,
) -> Loader<T>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
    F: Future<Output = Result<A, E>> + Send + 'static,
{
    Box::new(move || {
        let loading = loader();
        Box::pin(async move { loading.await.map(Into::into).map_err(source) })
    })
}

fn without_loader<T: ?Sized>() -> Loader<T> {
    Box::new(|| Box::pin(async { Err(no_loader()) }))
}

impl<T: RefUnwindSafe + ?Sized> UnwindSafe for Cached<T> {}
impl<T: RefUnwindSafe + ?Sized> RefUnwindSafe for Cached<T> {}

impl<T: 'static> Cached<T> {
    /// A value of the source behind `sync`'s key, loaded by the future that `loader` returns at its first use.
    ///
    /// The loader should read the source itself; if it asks for other values, their loaders must not ask for this one. It must
    /// not mark the value's own key updated, nor a key that the value depends on. For more options, see
    /// [`builder`](Self::builder).
    ///
    /// The future may not borrow from the loader, so a loader that needs a client clones it for each load:
    /// `move || { let client = client.clone(); async move { client.load().await } }`.
    pub fn new<E, F>(sync: GenerationSynchronizer, loader: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
        F: Future<Output = Result<T, E>> + Send + 'static,
    {
        Self::assemble(sync, stored(loader), Policy::new())
    }

    /// A builder, for a value with other options than those of [`new`](Self::new).
    pub fn builder<E, F>(
        sync: GenerationSynchronizer,
        loader: impl Fn() -> F + Send + Sync + 'static,
    ) -> CachedBuilder<T>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
        F: Future<Output = Result<T, E>> + Send + 'static,
    {
        CachedBuilder::new(sync, stored(loader))
    }
}

impl<T> Cached<T> {
    /// A value without a loader of its own: each use gives one to [`get_with`](Self::get_with), which may borrow what it needs.
    ///
    /// Calls that would load by themselves, such as [`get`](Self::get) and [`wait`](Self::wait), fail if the value is not fresh.
    #[must_use]
    pub fn without_loader(sync: GenerationSynchronizer) -> Self {
        Self::assemble(sync, without_loader(), Policy::new())
    }

    /// As [`without_loader`](Self::without_loader), with other options.
    pub fn builder_without_loader(sync: GenerationSynchronizer) -> CachedBuilder<T> {
        CachedBuilder::new(sync, without_loader())
    }

    /// As [`get`](Self::get), but if this call loads, it loads with `loader`, which may borrow.
    ///
    /// Calls that wait for that load take its value, whichever loader they bring themselves: all loaders of one value must read the
    /// same source.
    ///
    /// ```
    /// use gensync::{GenerationSynchronizer, Table, future::Cached};
    ///
    /// # struct Database;
    /// # impl Database { async fn routes(&self) -> Result<Vec<String>, std::io::Error> { Ok(Vec::new()) } }
    /// async fn route_count(database: &Database, routes: &Cached<Vec<String>>) -> Result<usize, gensync::Error> {
    ///     Ok(routes.get_with(async || database.routes().await).await?.len())
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), gensync::Error> {
    /// let table = Table::options().anonymous()?;
    /// let routes = Cached::without_loader(GenerationSynchronizer::new(&table, "routes")?);
    /// assert_eq!(route_count(&Database, &routes).await?, 0);
    /// # Ok(()) }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// As [`get`](Self::get).
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
    pub async fn get_with<E>(&self, loader: impl AsyncFnOnce() -> Result<T, E>) -> Result<Arc<T>, Error>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let load = || async { loader().await.map(Arc::new).map_err(source) };
        self.find(Base::options, load, Entry::value).await
    }
}

impl<T: ?Sized + 'static> Cached<T> {
    /// As [`new`](Self::new), with a loader whose future returns an `Arc` or a value that can become one: for unsized values such
    /// as `str`, slices and trait objects, and for loaders that share what they return.
    pub fn new_shared<A, E, F>(sync: GenerationSynchronizer, loader: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        A: Into<Arc<T>> + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
        F: Future<Output = Result<A, E>> + Send + 'static,
    {
        Self::assemble(sync, stored(loader), Policy::new())
    }

    /// As [`builder`](Self::builder), with a loader as for [`new_shared`](Self::new_shared).
    pub fn builder_shared<A, E, F>(
        sync: GenerationSynchronizer,
        loader: impl Fn() -> F + Send + Sync + 'static,
    ) -> CachedBuilder<T>
    where
        A: Into<Arc<T>> + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
        F: Future<Output = Result<A, E>> + Send + 'static,
    {
        CachedBuilder::new(sync, stored(loader))
    }
}

impl<T: ?Sized> Cached<T> {
    fn assemble(sync: GenerationSynchronizer, loader: Loader<T>, policy: Policy<T>) -> Self {
        Self { base: Base::new(sync, policy), loader }
    }

    /// The fresh value: it contains every update that was complete before the first `poll`, unless this `Cached` was built to serve
    /// old values.
    ///
    /// # Cancel safety
    ///
    /// Cancel-safe: see [the module](self#a-call-that-is-dropped).
    ///
    /// # Errors
    ///
    /// As [`gensync::Cached::get`](crate::Cached::get): [`ErrorKind::Load`](crate::ErrorKind::Load),
    /// [`ErrorKind::Overdue`](crate::ErrorKind::Overdue), and [`ErrorKind::Recursion`](crate::ErrorKind::Recursion) if the loader
    /// itself awaits this, or if the load that this call would wait for waits for this task's load, possibly through other values
    /// and tasks. Only waits in calls of this kind are detected, not those for tasks that a loader has spawned.
    ///
    /// # Panics
    ///
    /// If the loader or a callback panics; then the next call may load.
    ///
    /// # Progress
    ///
    /// As [`gensync::Cached::get`](crate::Cached::get) while the value is fresh: then the first `poll` is ready. Otherwise it
    /// awaits the load; see [the module](self#what-blocks).
    pub async fn get(&self) -> Result<Arc<T>, Error> {
        self.find(Base::options, &self.loader, Entry::value).await
    }

    /// The value, or an expired one while another task loads it: as [`get`](Self::get) of a `Cached` that was built with
    /// [`stale_while_reloading`](CachedBuilder::stale_while_reloading).
    ///
    /// If the value is expired and no task is loading it, this call does.
    ///
    /// # Cancel safety
    ///
    /// As [`get`](Self::get).
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get).
    ///
    /// # Progress
    ///
    /// As [`get`](Self::get); waits for another task's load only if there is no value yet.
    pub async fn get_stale_ok(&self) -> Result<Arc<T>, Error> {
        let options = |base: &Base<T>| GetOptions { stale_while_reloading: true, ..base.options() };
        self.find(options, &self.loader, Entry::value).await
    }

    /// The fresh value, even if this `Cached` was built to serve old ones. Waits for another task's load until `deadline` at most.
    ///
    /// A load that this call has to run itself is not dropped at the deadline: for that, use a timeout of your runtime.
    ///
    /// # Cancel safety
    ///
    /// As [`get`](Self::get).
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get), [`ErrorKind::Deadline`](crate::ErrorKind::Deadline), and if it has to wait and no thread can be
    /// started.
    ///
    /// # Progress
    ///
    /// As [`get`](Self::get).
    pub async fn get_fresh(&self, deadline: Instant) -> Result<Arc<T>, Error> {
        let options = |_: &_| GetOptions { deadline: Some(Deadline::at(deadline)), ..GetOptions::FRESH };
        self.find(options, &self.loader, Entry::value).await
    }

    /// The value if it is fresh, without awaiting anything.
    ///
    /// # Progress
    ///
    /// As [`gensync::Cached::get_if_fresh`](crate::Cached::get_if_fresh).
    #[inline]
    #[must_use]
    pub fn get_if_fresh(&self) -> Option<Arc<T>> {
        self.base.get_if_fresh()
    }

    /// As [`get`](Self::get), with the generation that the value was loaded at.
    ///
    /// # Cancel safety
    ///
    /// As [`get`](Self::get).
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get).
    ///
    /// # Progress
    ///
    /// As [`get`](Self::get).
    pub async fn snapshot(&self) -> Result<Snapshot<T>, Error> {
        self.find(Base::options, &self.loader, Entry::snapshot).await
    }

    /// The value in place, and whether it is fresh. Neither loads nor waits: see [`gensync::Cached::peek`](crate::Cached::peek).
    ///
    /// # Progress
    ///
    /// As [`get_if_fresh`](Self::get_if_fresh).
    #[must_use]
    pub fn peek(&self) -> Peek<T> {
        self.base.peek()
    }

    /// This value, to be read by the loader of another one, which then depends on it: see
    /// [`gensync::Cached::tracked`](crate::Cached::tracked).
    ///
    /// ```
    /// use std::sync::Arc;
    ///
    /// use gensync::{GenerationSynchronizer, Table, future::Cached};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), gensync::Error> {
    /// # async fn load_prices() -> std::io::Result<Vec<u32>> { Ok(vec![1, 2]) }
    /// let table = Table::options().anonymous()?;
    /// let prices = Arc::new(Cached::new(GenerationSynchronizer::new(&table, "prices")?, load_prices));
    /// let total = Cached::new(GenerationSynchronizer::new(&table, "total")?, {
    ///     let prices = Arc::clone(&prices);
    ///     move || {
    ///         let prices = Arc::clone(&prices);
    ///         async move { Ok::<_, gensync::Error>(prices.tracked().get().await?.iter().sum::<u32>()) }
    ///     }
    /// });
    /// assert_eq!(*total.get().await?, 3);
    /// prices.mark_updated()?; // in any process
    /// assert!(total.get_if_fresh().is_none());
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn tracked(&self) -> Tracked<'_, Self> {
        Tracked(self)
    }

    /// Changes the source by the future that `commit` returns, and announces the update to all processes, including this one,
    /// whatever happens in between: see [`GenerationSynchronizer::update_async`].
    ///
    /// # Errors
    ///
    /// As [`GenerationSynchronizer::update_async`].
    ///
    /// # Progress
    ///
    /// As [`GenerationSynchronizer::update_async`].
    pub async fn update<R, E>(&self, commit: impl AsyncFnOnce() -> Result<R, E>) -> Result<R, UpdateError<E>> {
        self.base.sync.update_async(commit).await
    }

    /// As [`update`](Self::update), but gives up at the `deadline` if the update could not begin by then. The time that the commit
    /// takes is not limited.
    ///
    /// # Errors
    ///
    /// As [`update`](Self::update); [`ErrorKind::Locked`](crate::ErrorKind::Locked) in an [`UpdateError::Begin`] at the
    /// deadline.
    ///
    /// # Progress
    ///
    /// As [`update`](Self::update).
    pub async fn update_deadline<R, E>(
        &self,
        deadline: Instant,
        commit: impl AsyncFnOnce() -> Result<R, E>,
    ) -> Result<R, UpdateError<E>> {
        self.base.sync.update_async_deadline(deadline, commit).await
    }

    /// Begins a crash-safe update, to be finished when the source has been changed: see
    /// [`GenerationSynchronizer::begin_update_async`]. When the update has ended, the value is expired in all processes, including
    /// this one.
    ///
    /// # Cancel safety
    ///
    /// As [`GenerationSynchronizer::begin_update_async`].
    ///
    /// # Errors
    ///
    /// As [`GenerationSynchronizer::begin_update_async`].
    ///
    /// # Progress
    ///
    /// As [`GenerationSynchronizer::begin_update_async`].
    pub async fn begin_update(&self) -> Result<Update<'_>, Error> {
        self.base.sync.begin_update_async().await
    }

    /// Announces that the source was updated, and returns the new generation: see
    /// [`gensync::Cached::mark_updated`](crate::Cached::mark_updated).
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

    /// Expires the value in this process only: see [`gensync::Cached::invalidate`](crate::Cached::invalidate). Tasks that
    /// [wait](Self::wait) for the value are woken at once.
    ///
    /// # Progress
    ///
    /// Takes a lock of this `Cached`, which is never held for long.
    pub fn invalidate(&self) {
        self.base.invalidate();
    }

    /// A future that is ready when the value in place is expired or was replaced. It does not load: see
    /// [`gensync::Cached::changed`](crate::Cached::changed). To wait for the next value, see [`wait`](Self::wait).
    ///
    /// # Cancel safety
    ///
    /// As [`gensync::Cached::changed`](crate::Cached::changed).
    ///
    /// # Errors
    ///
    /// As [`gensync::Cached::changed`](crate::Cached::changed).
    ///
    /// # Progress
    ///
    /// As [`gensync::Cached::changed`](crate::Cached::changed).
    pub fn changed(&self) -> CachedChanged<'_, T> {
        CachedChanged::new(&self.base)
    }

    /// The synchronizer of the value's key: see [`gensync::Cached::synchronizer`](crate::Cached::synchronizer).
    #[must_use]
    pub fn synchronizer(&self) -> &GenerationSynchronizer {
        &self.base.sync
    }

    /// What this `Cached` has done so far. A load whose call was dropped is not counted.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.base.counters()
    }

    /// What `pick` returns for the fresh entry, or for an older one as `options` say. Loads with `loader`, at most once.
    async fn find<R, F>(
        &self,
        options: impl FnOnce(&Base<T>) -> GetOptions,
        loader: impl FnOnce() -> F,
        pick: impl Fn(&Entry<T>) -> R,
    ) -> Result<R, Error>
    where
        F: Future<Output = Result<Arc<T>, Source>>,
    {
        // An entry that is to be verified.
        let mut unverified = None;
        let verify = |entry: &Arc<Entry<T>>| {
            unverified = Some(Arc::clone(entry));
            None
        };
        // What awaits is boxed, as it is some ten times as large as what a call of a fresh value needs, which callers would move.
        match (self.base.fresh(Some(verify), |entry| pick(entry)), unverified) {
            (None, _) => {
                let call = Call::new(&self.base, options(&self.base));
                Box::pin(drive::run(call, loader)).await.map(|entry| pick(&entry))
            }
            (Some(found), None) => Ok(found),
            (Some(found), Some(entry)) => {
                let loaded = Box::pin(drive::verify(&self.base, &entry, loader)).await;
                Ok(loaded.map_or(found, |loaded| pick(&loaded)))
            }
        }
    }
}

impl<T: ?Sized> Tracked<'_, Cached<T>> {
    /// As [`Cached::get`]; the value that is being loaded depends on the value that this returns. Outside of loaders, this is
    /// `get` alone.
    ///
    /// If an expired value is served, the value that is being loaded is expired from the start, as it was made from old data.
    ///
    /// # Cancel safety
    ///
    /// As [`Cached::get`].
    ///
    /// # Errors
    ///
    /// As [`Cached::get`]; [`ErrorKind::Recursion`](crate::ErrorKind::Recursion) if this value's own load waits for the one that
    /// is under way here.
    ///
    /// # Panics
    ///
    /// As [`Cached::get`].
    ///
    /// # Progress
    ///
    /// As [`Cached::get`], and allocates.
    pub async fn get(&self) -> Result<Arc<T>, Error> {
        let Cached { base, loader } = self.0;
        let pick = |entry: &Entry<T>| (entry.value(), entry.freshness.clone());
        let (value, freshness) = self.0.find(Base::options, loader, pick).await?;
        depend_on_value(|| Arc::new(base.sync.clone()), &freshness);
        Ok(value)
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

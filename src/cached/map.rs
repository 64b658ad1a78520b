//! `CachedMap`: the values of many keys, each with the generation that it was loaded at.

mod attended;
mod builder;
mod core;
mod face;
#[cfg(feature = "future")]
pub(super) mod future;
mod many;
mod store;
mod usage;
mod wait;
mod waits;

use std::borrow::Borrow;
use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::slice;
use std::sync::Arc;
use std::time::Instant;

pub use self::builder::CachedMapBuilder;
use self::core::{Core, Found, Options};
use self::face::map_methods;
use self::many::{Absent, Entries, Plan};
use super::load::{self, Call, GetOptions};
use super::scope::Scope;
use super::value::Entry;
use super::{Snapshot, Tracked, call, no_loader};
use crate::error::{Error, Source};
use crate::key::CacheKey;
use crate::os::clock::Deadline;
use crate::synchronizer::UpdateError;
use crate::table::Table;

/// A bounded cache of the values of many keys, each of which is loaded again when any process has updated its key. Needs the
/// feature `map`.
///
/// ```
/// use std::sync::Arc;
///
/// use gensync::{CachedMap, Table};
///
/// # #[derive(Debug)] struct User { name: String }
/// # struct Database;
/// # impl Database {
/// #     fn user(&self, id: u64) -> Result<User, std::io::Error> { Ok(User { name: format!("user {id}") }) }
/// #     fn save(&self, user: &User) -> Result<(), std::io::Error> { Ok(()) }
/// # }
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let database = Arc::new(Database);
/// let table = Table::options().anonymous()?;
/// let users: CachedMap<u64, User> = CachedMap::builder(&table, |id: &u64| ["user", &id.to_string()].into(), {
///     let database = Arc::clone(&database);
///     move |id| database.user(*id)
/// })
/// .max_entries(10_000)
/// .build();
///
/// let user: Arc<User> = users.get(&42)?; // from memory, unless a process has changed it
/// users.update(&42, || database.save(&user))?; // crash-safe, for all processes
/// users.clear_matching("user:*")?; // whole families
/// # Ok(()) }
/// ```
///
/// Each value behaves like that of a [`Cached`](crate::Cached): the ticket is taken before the load, one thread of a process
/// loads a key at a time, and the same options decide what is served meanwhile. Threads share the map by reference, or in an
/// `Arc`.
///
/// The key of a value in the table is made from its key in the map by a function, and is a [`CacheKey`](crate::CacheKey). Values
/// whose keys are the same in the table are kept apart, and expire together.
///
/// A value is looked up by a `&K`, or by what a `K` borrows and can be made from: a `String` by a `&str`.
///
/// # What is kept, and where
///
/// The map belongs to its process, and has [room](CachedMapBuilder::max_entries) for so many entries; which entries are evicted
/// is decided by [quick_cache](https://docs.rs/quick_cache), by how often and how recently they were used. Evicting an entry
/// changes nothing in the table, where each key that was ever loaded keeps its generation. For keys without bound, such as URLs
/// or sessions, let them [share generations](CachedMapBuilder::generations).
///
/// That the table's file was deleted or replaced is noticed as by [`is_expired`](crate::GenerationSynchronizer::is_expired). Up
/// to 16 threads count their uses apart, so that if the rate of uses suddenly falls, each of them may make up to 64 more before
/// that.
///
/// It may be made before a fork and used after it. If the process had one thread at the fork, the child starts with the entries
/// that the parent had. Otherwise it starts with none, as another thread may have been changing them at that moment.
///
/// Loaders, callbacks and the destructors of values may use the map. What `K` does to be hashed, compared, cloned and dropped runs
/// under locks of the map, and must not.
///
/// # Values that depend on what was read
///
/// A loader may find out which other keys its value depends on, by [`depend_on`](crate::depend_on), or by reading other cached
/// values through [`tracked`](Self::tracked).
///
/// ```
/// # use std::sync::Arc;
/// # use gensync::{CachedMap, Table};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let table = Table::options().anonymous()?;
/// let articles = Arc::new(CachedMap::builder(&table, |id: &u32| ["article", &id.to_string()].into(), load_article).build());
/// let pages = CachedMap::builder(&table, |page: &String| ["page", page].into(), {
///     let articles = Arc::clone(&articles);
///     move |_: &String| (1..=12).map(|id| Ok(articles.tracked().get(&id)?.to_string())).collect::<Result<Vec<_>, gensync::Error>>()
/// })
/// .build();
/// pages.get("news")?;
/// articles.mark_updated(&7)?; // in any process
/// assert!(pages.get_if_fresh("news").is_none());
/// # fn load_article(id: &u32) -> std::io::Result<String> { Ok(format!("article {id}")) }
/// # Ok(()) }
/// ```
pub struct CachedMap<K, V>
where
    K: Clone + Eq + Hash,
{
    core: Core<K, V>,
    loader: Loader<K, V>,
    /// Loads several values at once.
    bulk_loader: Option<BulkLoader<K, V>>,
    absent: Option<Absent<K, V>>,
}

type Loader<K, V> = Box<dyn Fn(&K) -> Result<Arc<V>, Source> + Send + Sync>;
type BulkLoader<K, V> = Box<dyn Fn(&[K]) -> Result<HashMap<K, Arc<V>>, Source> + Send + Sync>;

// As for `Cached`: what panics leaves the map whole.
impl<K: Clone + Eq + Hash + RefUnwindSafe, V: RefUnwindSafe> UnwindSafe for CachedMap<K, V> {}
impl<K: Clone + Eq + Hash + RefUnwindSafe, V: RefUnwindSafe> RefUnwindSafe for CachedMap<K, V> {}

impl<K, V> CachedMap<K, V>
where
    K: Clone + Eq + Hash + 'static,
    V: 'static,
{
    /// A builder of a map of the values behind keys of `table`. `key` makes the key of a value in the table, and `loader` loads
    /// it.
    ///
    /// The loader should read the source itself. If it asks for other values, their loaders must not ask for this one. A value that
    /// may be absent is cached as such if it is an `Option`, and the loader returns `Ok(None)`.
    pub fn builder<E>(
        table: &Table,
        key: impl Fn(&K) -> CacheKey + Send + Sync + 'static,
        loader: impl Fn(&K) -> Result<V, E> + Send + Sync + 'static,
    ) -> CachedMapBuilder<K, V>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        CachedMapBuilder::new(Options::new(table, key), Box::new(move |key| call(|| loader(key).map(Arc::new))))
    }

    /// A builder of a map without a loader of its own: each use gives one to [`get_with`](Self::get_with), which may borrow what it
    /// needs.
    pub fn builder_without_loader(
        table: &Table,
        key: impl Fn(&K) -> CacheKey + Send + Sync + 'static,
    ) -> CachedMapBuilder<K, V> {
        CachedMapBuilder::new(Options::new(table, key), Box::new(|_| Err(no_loader())))
    }
}

impl<K: Clone + Eq + Hash, V> CachedMap<K, V> {
    /// The fresh value of `key`: it contains every update that was complete before the call, unless the map was built to serve old
    /// values.
    ///
    /// # Errors
    ///
    /// As [`Cached::get`](crate::Cached::get). [`ErrorKind::EmptyKey`](crate::ErrorKind::EmptyKey);
    /// [`ErrorKind::TableFull`](crate::ErrorKind::TableFull) if the key is new in the table, and needs room that cannot be had.
    ///
    /// # Panics
    ///
    /// If the loader, a callback, or the function that makes the key panics; then the next call may load.
    ///
    /// # Progress
    ///
    /// While the value is fresh: a lock of the cache, which many keys share and other threads hold for nanoseconds; no allocation
    /// after the first call of each thread, and no system calls except those of
    /// [`is_expired`](crate::GenerationSynchronizer::is_expired). Blocking while the value is loaded.
    #[inline]
    pub fn get<Q>(&self, key: &Q) -> Result<Arc<V>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        self.value(key, self.core.default_options(), &self.loader)
    }

    /// As [`get`](Self::get), but if this call loads, it loads with `loader`, which may borrow.
    ///
    /// Calls that wait for that load take its value, whichever loader they bring themselves: all loaders of one key must read the
    /// same source.
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
    pub fn get_with<Q, E>(&self, key: &Q, loader: impl FnOnce() -> Result<V, E>) -> Result<Arc<V>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let load = |_: &K| call(|| loader().map(Arc::new));
        self.value(key, self.core.default_options(), load)
    }

    /// The value of `key`, or an expired one while another thread loads it: as
    /// [`Cached::get_stale_ok`](crate::Cached::get_stale_ok).
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get).
    ///
    /// # Progress
    ///
    /// As [`get`](Self::get); waits for another thread's load only if there is no value yet.
    pub fn get_stale_ok<Q>(&self, key: &Q) -> Result<Arc<V>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        let options = GetOptions { stale_while_reloading: true, ..self.core.default_options() };
        self.value(key, options, &self.loader)
    }

    /// The fresh value of `key`, even if the map was built to serve old ones. Waits for another thread's load until `deadline` at
    /// most: as [`Cached::get_fresh`](crate::Cached::get_fresh).
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get), and [`ErrorKind::Deadline`](crate::ErrorKind::Deadline).
    ///
    /// # Progress
    ///
    /// As [`get`](Self::get).
    pub fn get_fresh<Q>(&self, key: &Q, deadline: Instant) -> Result<Arc<V>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        let options = GetOptions { deadline: Some(Deadline::at(deadline)), ..GetOptions::FRESH };
        self.value(key, options, &self.loader)
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
    pub fn snapshot<Q>(&self, key: &Q) -> Result<Snapshot<V>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        self.entry(key, self.core.find(key), self.core.default_options(), &self.loader).map(|entry| entry.snapshot())
    }

    /// The fresh values of several keys, in their order: [`get`](Self::get) for each, but what is missing or expired is loaded at
    /// once by the [bulk loader](CachedMapBuilder::bulk_loader), if the map has one. A key that another thread is loading is waited
    /// for.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use gensync::{CachedMap, Table};
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let table = Table::options().anonymous()?;
    /// # fn load_user(id: &u64) -> std::io::Result<String> { Ok(format!("user {id}")) }
    /// # fn load_users(ids: &[u64]) -> std::io::Result<Vec<(u64, String)>> { ids.iter().map(|id| Ok((*id, load_user(id)?))).collect() }
    /// let users = CachedMap::builder(&table, |id: &u64| ["user", &id.to_string()].into(), load_user)
    ///     .bulk_loader(load_users) // such as `SELECT ... WHERE id IN (...)`
    ///     .build();
    /// let team: Vec<Arc<String>> = users.get_many(&[1, 2, 3])?;
    /// assert_eq!(*team[2], "user 3");
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// The first error of a key, as of [`get`](Self::get). The values of the other keys that were loaded are in the map. If the
    /// bulk loader fails, all keys that it was called for have failed.
    ///
    /// # Panics
    ///
    /// As [`get`](Self::get).
    ///
    /// # Progress
    ///
    /// As [`get`](Self::get), and allocates.
    pub fn get_many<'k>(&self, keys: impl IntoIterator<Item = &'k K>) -> Result<Vec<Arc<V>>, Error>
    where
        K: 'k,
    {
        let keys: Vec<&K> = keys.into_iter().collect();
        Ok(many::in_order(&keys, &self.entries(&keys)?))
    }

    /// The entries that a call returns for `keys`.
    fn entries<'k>(&self, keys: &[&'k K]) -> Result<Entries<'k, K, V>, Error> {
        let options = self.core.default_options();
        let Some(bulk_loader) = &self.bulk_loader else {
            let entry = |key: &'k K| Ok((key, self.entry(key, self.core.find(key), options, &self.loader)?));
            return keys.iter().copied().map(entry).collect();
        };
        let mut entries = Entries::with_capacity(keys.len());
        let cells = many::take_fresh(&self.core, keys, &mut entries)?;
        let Plan { loads, waits } = Plan::new(&cells, options, &mut entries)?;
        let to_load = loads.keys();
        if !to_load.is_empty() {
            let entered = Scope::enter_all(&loads.scopes());
            let outcome = bulk_loader(&to_load);
            drop(entered);
            loads.finish(outcome, self.absent.as_ref(), &mut entries)?;
        }
        for (key, call) in waits {
            let load = || many::take(&mut bulk_loader(slice::from_ref(key))?, key, self.absent.as_ref());
            entries.insert(key, Entry::clone(&*load::run(call, load)?));
        }
        Ok(entries)
    }

    /// The value that a call returns for `key`.
    #[inline]
    fn value<Q>(
        &self,
        key: &Q,
        options: GetOptions,
        loader: impl FnOnce(&K) -> Result<Arc<V>, Source>,
    ) -> Result<Arc<V>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        match self.core.hit(key) {
            Ok(value) => Ok(value),
            Err(found) => self.entry(key, found, options, loader).map(|entry| entry.value),
        }
    }

    /// The entry that a call returns for `key`, of which it has found `found`.
    #[inline(never)]
    fn entry<Q>(
        &self,
        key: &Q,
        found: Option<Entry<V>>,
        options: GetOptions,
        loader: impl FnOnce(&K) -> Result<Arc<V>, Source>,
    ) -> Result<Entry<V>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        let key = key.to_owned();
        let fresh = match self.core.check(&key, found) {
            Found::Fresh(entry) => Some(entry),
            // A call that waits must not keep an old value alive.
            Found::Expired(_) | Found::Nothing => None,
        };
        let entry = match fresh {
            Some(entry) if !self.core.is_verification_due() => return Ok(entry),
            Some(entry) => {
                let (cell, entry) = (self.core.attend(key)?, Arc::new(entry));
                load::verify(&cell, &entry, || loader(&cell.key)).unwrap_or(entry)
            }
            None => {
                let cell = self.core.attend(key)?;
                load::run(Call::new(&cell, options), || loader(&cell.key))?
            }
        };
        Ok(Entry::clone(&entry))
    }

    /// Changes the source of `key` by `commit` and announces the update to all processes, including this one, whatever happens in
    /// between: see [`GenerationSynchronizer::update`](crate::GenerationSynchronizer::update).
    ///
    /// # Errors
    ///
    /// As [`GenerationSynchronizer::update`](crate::GenerationSynchronizer::update), and an [`UpdateError::Begin`] if the key
    /// cannot be attached to.
    ///
    /// # Progress
    ///
    /// As [`GenerationSynchronizer::new`](crate::GenerationSynchronizer::new) and
    /// [`GenerationSynchronizer::update`](crate::GenerationSynchronizer::update).
    pub fn update<Q, R, E>(&self, key: &Q, commit: impl FnOnce() -> Result<R, E>) -> Result<R, UpdateError<E>>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        self.synchronizer(key).map_err(UpdateError::Begin)?.update(commit)
    }

    map_methods!();
}

/// The methods of the map of the same names; the value that is being loaded depends on the values that they return. Outside of
/// loaders, they are these methods alone.
///
/// If an expired value is served, the value that is being loaded is expired from the start, as it was made from old data.
///
/// A call fails with [`ErrorKind::Recursion`](crate::ErrorKind::Recursion) if the load of its key waits for the one that is under
/// way here. In other respects, errors, panics and progress are those of the map's methods; each call also allocates.
impl<K: Clone + Eq + Hash, V> Tracked<'_, CachedMap<K, V>> {
    /// As [`CachedMap::get`].
    ///
    /// # Errors
    ///
    /// As [`CachedMap::get`].
    pub fn get<Q>(&self, key: &Q) -> Result<Arc<V>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        self.read(key, &self.0.loader)
    }

    /// As [`CachedMap::get_with`].
    ///
    /// # Errors
    ///
    /// As [`CachedMap::get_with`].
    pub fn get_with<Q, E>(&self, key: &Q, loader: impl FnOnce() -> Result<V, E>) -> Result<Arc<V>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        self.read(key, |_: &K| call(|| loader().map(Arc::new)))
    }

    /// As [`CachedMap::get_many`].
    ///
    /// # Errors
    ///
    /// As [`CachedMap::get_many`].
    pub fn get_many<'k>(&self, keys: impl IntoIterator<Item = &'k K>) -> Result<Vec<Arc<V>>, Error>
    where
        K: 'k,
    {
        let keys: Vec<&K> = keys.into_iter().collect();
        let entries = self.0.entries(&keys)?;
        entries.iter().try_for_each(|(key, entry)| self.0.core.depend_on(key, &entry.freshness))?;
        Ok(many::in_order(&keys, &entries))
    }

    fn read<Q>(&self, key: &Q, loader: impl FnOnce(&K) -> Result<Arc<V>, Source>) -> Result<Arc<V>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        let core = &self.0.core;
        let entry = self.0.entry(key, core.find(key), core.default_options(), loader)?;
        core.depend_on(&key.to_owned(), &entry.freshness)?;
        Ok(entry.value)
    }
}

impl<K: Clone + Eq + Hash, V> fmt::Debug for CachedMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CachedMap")
            .field("path", &self.table().path())
            .field("len", &self.len())
            .field("counters", &self.counters())
            .finish_non_exhaustive()
    }
}

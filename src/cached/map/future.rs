//! `CachedMap` for tasks: loaders are asynchronous, and calls await where those of the blocking map block.

mod builder;
mod wait;

use std::borrow::Borrow;
use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::hash::Hash;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

pub use self::builder::CachedMapBuilder;
use super::core::{Core, Found, Options};
use super::face::map_methods;
use super::many::{self, Absent, Entries, Plan};

use crate::cached::load::{Call, GetOptions};
use crate::cached::value::Entry;
use crate::cached::{Snapshot, Tracked, drive, no_loader, source};
use crate::error::{Error, Source};
use crate::key::CacheKey;
use crate::os::clock::Deadline;
use crate::synchronizer::UpdateError;
use crate::table::Table;

/// A bounded cache of the values of many keys, loaded by an asynchronous loader, each of which is loaded again when any process has
/// updated its key.
///
/// ```
/// use std::sync::Arc;
///
/// use gensync::Table;
/// use gensync::future::CachedMap;
///
/// # #[derive(Debug)] struct User { name: String }
/// # #[derive(Clone)] struct Database;
/// # impl Database {
/// #     async fn user(&self, id: u64) -> Result<User, std::io::Error> { Ok(User { name: format!("user {id}") }) }
/// #     async fn save(&self, user: &User) -> Result<(), std::io::Error> { Ok(()) }
/// # }
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let database = Database;
/// let table = Table::options().anonymous()?;
/// let users: CachedMap<u64, User> = CachedMap::builder(&table, |id: &u64| ["user", &id.to_string()].into(), {
///     let database = database.clone();
///     move |id| {
///         let database = database.clone();
///         async move { database.user(id).await }
///     }
/// })
/// .max_entries(10_000)
/// .build();
///
/// let user: Arc<User> = users.get(&42).await?; // from memory, unless a process has changed it
/// users.update(&42, async || database.save(&user).await).await?; // crash-safe, for all processes
/// users.clear_matching("user:*")?; // whole families
/// # Ok(()) }
/// ```
///
/// Needs the features `future` and `map`. See [`gensync::CachedMap`](crate::CachedMap) for what is kept and where, and
/// [`gensync::future`](crate::future) for what awaits, what blocks, and what becomes of a call that is dropped.
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

type Loading<T> = Pin<Box<dyn Future<Output = Result<T, Source>> + Send>>;
type Loader<K, V> = Box<dyn Fn(K) -> Loading<Arc<V>> + Send + Sync>;
type BulkLoader<K, V> = Box<dyn Fn(Vec<K>) -> Loading<HashMap<K, Arc<V>>> + Send + Sync>;

// As for `Cached`: what panics leaves the map whole.
impl<K: Clone + Eq + Hash + RefUnwindSafe, V: RefUnwindSafe> UnwindSafe for CachedMap<K, V> {}
impl<K: Clone + Eq + Hash + RefUnwindSafe, V: RefUnwindSafe> RefUnwindSafe for CachedMap<K, V> {}

impl<K, V> CachedMap<K, V>
where
    K: Clone + Eq + Hash + 'static,
    V: 'static,
{
    /// A builder of a map of the values behind keys of `table`: as [`gensync::CachedMap::builder`](crate::CachedMap::builder),
    /// with a loader that takes a clone of the key and returns a future.
    ///
    /// The future may not borrow from the loader, so a loader that needs a client clones it for each load, as above.
    pub fn builder<E, F>(
        table: &Table,
        key: impl Fn(&K) -> CacheKey + Send + Sync + 'static,
        loader: impl Fn(K) -> F + Send + Sync + 'static,
    ) -> CachedMapBuilder<K, V>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
        F: Future<Output = Result<V, E>> + Send + 'static,
    {
        let loader: Loader<K, V> = Box::new(move |key| {
            let loading = loader(key);
            Box::pin(async move { loading.await.map(Arc::new).map_err(source) })
        });
        CachedMapBuilder::new(Options::new(table, key), loader)
    }

    /// A builder of a map without a loader of its own: each use gives one to [`get_with`](Self::get_with), which may borrow what it
    /// needs.
    pub fn builder_without_loader(
        table: &Table,
        key: impl Fn(&K) -> CacheKey + Send + Sync + 'static,
    ) -> CachedMapBuilder<K, V> {
        CachedMapBuilder::new(Options::new(table, key), Box::new(|_| Box::pin(async { Err(no_loader()) })))
    }
}

impl<K: Clone + Eq + Hash, V> CachedMap<K, V> {
    /// The fresh value of `key`: it contains every update that was complete before the first `poll`, unless the map was built to
    /// serve old values.
    ///
    /// # Cancel safety
    ///
    /// Cancel-safe: see [the module](crate::future#a-call-that-is-dropped).
    ///
    /// # Errors
    ///
    /// As [`future::Cached::get`](crate::future::Cached::get). [`ErrorKind::EmptyKey`](crate::ErrorKind::EmptyKey);
    /// [`ErrorKind::TableFull`](crate::ErrorKind::TableFull) if the key is new in the table, and needs room that cannot be had.
    ///
    /// # Panics
    ///
    /// If the loader, a callback, or the function that makes the key panics; then the next call may load.
    ///
    /// # Progress
    ///
    /// As [`gensync::CachedMap::get`](crate::CachedMap::get) while the value is fresh: then the first `poll` is ready. Otherwise it
    /// awaits the load; see [the module](crate::future#what-blocks).
    pub async fn get<Q>(&self, key: &Q) -> Result<Arc<V>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        self.value(key, self.core.default_options(), &self.loader).await
    }

    /// As [`get`](Self::get), but if this call loads, it loads with `loader`, which may borrow.
    ///
    /// Calls that wait for that load take its value, whichever loader they bring themselves: all loaders of one key must read the
    /// same source.
    ///
    /// ```
    /// use gensync::Table;
    /// use gensync::future::CachedMap;
    ///
    /// # struct Database;
    /// # impl Database { async fn name(&self, id: u64) -> Result<String, std::io::Error> { Ok(format!("user {id}")) } }
    /// async fn greeting(database: &Database, names: &CachedMap<u64, String>, id: u64) -> Result<String, gensync::Error> {
    ///     Ok(format!("hello {}", names.get_with(&id, async || database.name(id).await).await?))
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), gensync::Error> {
    /// let table = Table::options().anonymous()?;
    /// let names = CachedMap::builder_without_loader(&table, |id: &u64| ["name", &id.to_string()].into()).build();
    /// assert_eq!(greeting(&Database, &names, 42).await?, "hello user 42");
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
    pub async fn get_with<Q, E>(&self, key: &Q, loader: impl AsyncFnOnce() -> Result<V, E>) -> Result<Arc<V>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let load = |_: K| async { loader().await.map(Arc::new).map_err(source) };
        self.value(key, self.core.default_options(), load).await
    }

    /// The value of `key`, or an expired one while another task loads it: as
    /// [`gensync::CachedMap::get_stale_ok`](crate::CachedMap::get_stale_ok).
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
    pub async fn get_stale_ok<Q>(&self, key: &Q) -> Result<Arc<V>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        let options = GetOptions { stale_while_reloading: true, ..self.core.default_options() };
        self.value(key, options, &self.loader).await
    }

    /// The fresh value of `key`, even if the map was built to serve old ones. Waits for another task's load until `deadline` at
    /// most: as [`future::Cached::get_fresh`](crate::future::Cached::get_fresh).
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
    pub async fn get_fresh<Q>(&self, key: &Q, deadline: Instant) -> Result<Arc<V>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        let options = GetOptions { deadline: Some(Deadline::at(deadline)), ..GetOptions::FRESH };
        self.value(key, options, &self.loader).await
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
    pub async fn snapshot<Q>(&self, key: &Q) -> Result<Snapshot<V>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        let found = self.core.find(key);
        let entry = self.entry(key, found, self.core.default_options(), &self.loader).await?;
        Ok(entry.snapshot())
    }

    /// The fresh values of several keys, in their order: what is missing or expired is loaded at once by the
    /// [bulk loader](CachedMapBuilder::bulk_loader), if the map has one. Otherwise, the keys are loaded one after the other.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use gensync::Table;
    /// # use gensync::future::CachedMap;
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let table = Table::options().anonymous()?;
    /// # async fn load_user(id: u64) -> std::io::Result<String> { Ok(format!("user {id}")) }
    /// # async fn load_users(ids: Vec<u64>) -> std::io::Result<Vec<(u64, String)>> {
    /// #     Ok(ids.into_iter().map(|id| (id, format!("user {id}"))).collect())
    /// # }
    /// let users = CachedMap::builder(&table, |id: &u64| ["user", &id.to_string()].into(), load_user)
    ///     .bulk_loader(load_users) // such as `SELECT ... WHERE id IN (...)`
    ///     .build();
    /// let team: Vec<Arc<String>> = users.get_many(&[1, 2, 3]).await?;
    /// assert_eq!(*team[2], "user 3");
    /// # Ok(()) }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// As [`get`](Self::get). The values that were loaded already are in the map.
    ///
    /// # Errors
    ///
    /// As [`gensync::CachedMap::get_many`](crate::CachedMap::get_many).
    ///
    /// # Panics
    ///
    /// As [`get`](Self::get).
    ///
    /// # Progress
    ///
    /// As [`get`](Self::get), and allocates.
    pub async fn get_many<'k>(&self, keys: impl IntoIterator<Item = &'k K>) -> Result<Vec<Arc<V>>, Error>
    where
        K: 'k,
    {
        let keys: Vec<&K> = keys.into_iter().collect();
        Ok(many::in_order(&keys, &self.entries(&keys).await?))
    }

    /// The entries that a call returns for `keys`.
    async fn entries<'k>(&self, keys: &[&'k K]) -> Result<Entries<'k, K, V>, Error> {
        let options = self.core.default_options();
        let Some(bulk_loader) = &self.bulk_loader else {
            let mut entries = Entries::with_capacity(keys.len());
            for &key in keys {
                entries.insert(key, self.entry(key, self.core.find(key), options, &self.loader).await?);
            }
            return Ok(entries);
        };
        let mut entries = Entries::with_capacity(keys.len());
        let cells = many::take_fresh(&self.core, keys, &mut entries)?;
        let Plan { loads, waits } = Plan::new(&cells, options, &mut entries)?;
        let to_load = loads.keys();
        if !to_load.is_empty() {
            let outcome = drive::in_scopes(&loads.scopes(), || bulk_loader(to_load)).await;
            loads.finish(outcome, self.absent.as_ref(), &mut entries)?;
        }
        for (key, call) in waits {
            let load = || async {
                let mut loaded = bulk_loader(vec![key.clone()]).await?;
                many::take(&mut loaded, key, self.absent.as_ref())
            };
            entries.insert(key, Entry::clone(&*drive::run(call, load).await?));
        }
        Ok(entries)
    }

    /// The value that a call returns for `key`.
    async fn value<Q, F>(&self, key: &Q, options: GetOptions, loader: impl FnOnce(K) -> F) -> Result<Arc<V>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
        F: Future<Output = Result<Arc<V>, Source>>,
    {
        match self.core.hit(key) {
            Ok(value) => Ok(value),
            // Boxed, as it is some ten times as large as what a call of a fresh value needs, which callers would move.
            Err(found) => Box::pin(self.entry(key, found, options, loader)).await.map(|entry| entry.value),
        }
    }

    /// The entry that a call returns for `key`, of which it has found `found`.
    async fn entry<Q, F>(
        &self,
        key: &Q,
        found: Option<Entry<V>>,
        options: GetOptions,
        loader: impl FnOnce(K) -> F,
    ) -> Result<Entry<V>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
        F: Future<Output = Result<Arc<V>, Source>>,
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
                drive::verify(&cell, &entry, || loader(cell.key.clone())).await.unwrap_or(entry)
            }
            None => {
                let cell = self.core.attend(key)?;
                drive::run(Call::new(&cell, options), || loader(cell.key.clone())).await?
            }
        };
        Ok(Entry::clone(&entry))
    }

    /// Changes the source of `key` by the future that `commit` returns, and announces the update to all processes, including this
    /// one, whatever happens in between: see
    /// [`GenerationSynchronizer::update_async`](crate::GenerationSynchronizer::update_async).
    ///
    /// # Errors
    ///
    /// As [`GenerationSynchronizer::update_async`](crate::GenerationSynchronizer::update_async), and an [`UpdateError::Begin`] if
    /// the key cannot be attached to.
    ///
    /// # Progress
    ///
    /// As [`GenerationSynchronizer::new`](crate::GenerationSynchronizer::new) and
    /// [`GenerationSynchronizer::update_async`](crate::GenerationSynchronizer::update_async).
    pub async fn update<Q, R, E>(
        &self,
        key: &Q,
        commit: impl AsyncFnOnce() -> Result<R, E>,
    ) -> Result<R, UpdateError<E>>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        let sync = self.synchronizer(key).map_err(UpdateError::Begin)?;
        sync.update_async(commit).await
    }

    map_methods!();
}

/// The methods of the map of the same names; the value that is being loaded depends on the values that they return. Outside of
/// loaders, they are these methods alone.
///
/// If an expired value is served, the value that is being loaded is expired from the start, as it was made from old data.
///
/// A call fails with [`ErrorKind::Recursion`](crate::ErrorKind::Recursion) if the load of its key waits for the one that is under
/// way here. In other respects, cancel safety, errors, panics and progress are those of the map's methods; each call also
/// allocates.
impl<K: Clone + Eq + Hash, V> Tracked<'_, CachedMap<K, V>> {
    /// As [`CachedMap::get`].
    ///
    /// # Errors
    ///
    /// As [`CachedMap::get`].
    pub async fn get<Q>(&self, key: &Q) -> Result<Arc<V>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        self.read(key, &self.0.loader).await
    }

    /// As [`CachedMap::get_with`].
    ///
    /// # Errors
    ///
    /// As [`CachedMap::get_with`].
    pub async fn get_with<Q, E>(&self, key: &Q, loader: impl AsyncFnOnce() -> Result<V, E>) -> Result<Arc<V>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        self.read(key, |_: K| async { loader().await.map(Arc::new).map_err(source) }).await
    }

    /// As [`CachedMap::get_many`].
    ///
    /// # Errors
    ///
    /// As [`CachedMap::get_many`].
    pub async fn get_many<'k>(&self, keys: impl IntoIterator<Item = &'k K>) -> Result<Vec<Arc<V>>, Error>
    where
        K: 'k,
    {
        let keys: Vec<&K> = keys.into_iter().collect();
        let entries = self.0.entries(&keys).await?;
        entries.iter().try_for_each(|(key, entry)| self.0.core.depend_on(key, &entry.freshness))?;
        Ok(many::in_order(&keys, &entries))
    }

    async fn read<Q, F>(&self, key: &Q, loader: impl FnOnce(K) -> F) -> Result<Arc<V>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
        F: Future<Output = Result<Arc<V>, Source>>,
    {
        let core = &self.0.core;
        let entry = self.0.entry(key, core.find(key), core.default_options(), loader).await?;
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

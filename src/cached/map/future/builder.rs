//! Building a `CachedMap` for tasks: its options and its callbacks.

use std::fmt;
use std::future::Future;
use std::hash::Hash;

use super::{BulkLoader, CachedMap, Loader};
use crate::cached::map::builder::map_options;
use crate::cached::map::core::Options;
use crate::cached::map::many::{self, Absent};
use crate::cached::policy::policy_methods;
use crate::cached::source;

/// Builds a [`CachedMap`]; made by [`CachedMap::builder`].
///
/// ```
/// use std::time::Duration;
///
/// use gensync::Table;
/// use gensync::future::CachedMap;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), gensync::Error> {
/// # async fn load_user(id: u64) -> std::io::Result<String> { Ok(id.to_string()) }
/// let table = Table::options().anonymous()?;
/// let users = CachedMap::builder(&table, |id: &u64| ["user", &id.to_string()].into(), load_user)
///     .max_entries(100_000)
///     .stale_while_reloading()
///     .fail_safe(Duration::from_secs(300))
///     .on_error(|error| eprintln!("{error}")) // which names the key
///     .build();
/// users.get(&1).await?;
/// # Ok(()) }
/// ```
///
/// # Callbacks
///
/// They are called as those of the blocking map: see [there](crate::CachedMapBuilder#callbacks). They run within a `poll` of the
/// call that loaded, and must not block.
#[must_use = "a builder does nothing until `build` is called"]
pub struct CachedMapBuilder<K, V> {
    options: Options<K, V>,
    loader: Loader<K, V>,
    bulk_loader: Option<BulkLoader<K, V>>,
    absent: Option<Absent<K, V>>,
}

impl<K: Clone + Eq + Hash, V> CachedMapBuilder<K, V> {
    map_options!();

    policy_methods!(options.policy);

    /// Sets a loader of several values at once, for [`get_many`](CachedMap::get_many): as
    /// [`gensync::CachedMapBuilder::bulk_loader`](crate::CachedMapBuilder::bulk_loader), with a loader that returns a future.
    pub fn bulk_loader<I, E, F>(mut self, loader: impl Fn(Vec<K>) -> F + Send + Sync + 'static) -> Self
    where
        I: IntoIterator<Item = (K, V)>,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
        F: Future<Output = Result<I, E>> + Send + 'static,
    {
        self.bulk_loader = Some(Box::new(move |keys| {
            let loading = loader(keys);
            Box::pin(async move { loading.await.map(many::collect).map_err(source) })
        }));
        self
    }
}

impl<K, V> fmt::Debug for CachedMapBuilder<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CachedMapBuilder").field("table", &self.options.table).finish_non_exhaustive()
    }
}

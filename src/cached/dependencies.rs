//! How a loader says what its value depends on: by naming keys, and by reading other cached values.

use std::sync::Arc;

use super::Cached;
use super::scope::Scope;
use super::value::Freshness;
use crate::error::Error;
use crate::synchronizer::GenerationSynchronizer;

/// To be called in a loader, before it reads what is behind the key of `sync`: the value that is being loaded depends on that
/// key as well, and is expired when the key is updated.
///
/// Where a value depends on different keys each time it is loaded, this takes the place of
/// [`depends_on`](crate::CachedBuilder::depends_on): a page depends on the objects that were looked up for it, and on the tags
/// that the page has. A tag is a key like any other: marking it updated expires all values that depend on it. A loader that
/// reads another cached value calls [`tracked`](crate::Cached::tracked) instead.
///
/// ```
/// use gensync::{Cached, GenerationSynchronizer, Table, depend_on};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # fn render() -> std::io::Result<String> { Ok(String::new()) }
/// let table = Table::options().anonymous()?;
/// let prices = GenerationSynchronizer::new(&table, "tag:prices")?;
/// let page = Cached::new(GenerationSynchronizer::new(&table, "page:1")?, {
///     let prices = prices.clone();
///     move || {
///         depend_on(&prices);
///         render()
///     }
/// });
/// page.get()?;
/// prices.mark_updated()?; // in any process
/// assert!(page.get_if_fresh().is_none());
/// # Ok(()) }
/// ```
///
/// Where the tags are known only in the loader, it makes their synchronizers itself. Tags without bound
/// [share generations](crate::CacheKey::in_generations), as a table keeps each key that was ever attached to:
///
/// ```
/// use std::num::NonZeroU32;
///
/// use gensync::{CacheKey, Cached, GenerationSynchronizer, Table, depend_on};
///
/// const GENERATIONS: NonZeroU32 = NonZeroU32::new(4096).unwrap();
///
/// fn tag(table: &Table, name: &str) -> Result<GenerationSynchronizer, gensync::Error> {
///     GenerationSynchronizer::new(table, CacheKey::from(["tag", name]).in_generations(GENERATIONS))
/// }
///
/// # fn main() -> Result<(), gensync::Error> {
/// # fn tags_of_page() -> Vec<String> { vec!["prices".to_owned()] }
/// # fn render() -> String { String::new() }
/// let table = Table::options().anonymous()?;
/// let page = Cached::new(GenerationSynchronizer::new(&table, "page:1")?, {
///     let table = table.clone();
///     move || {
///         for name in tags_of_page() {
///             depend_on(&tag(&table, &name)?);
///         }
///         Ok::<_, gensync::Error>(render())
///     }
/// });
/// page.get()?;
/// tag(&table, "prices")?.mark_updated()?; // in any process
/// assert!(page.get_if_fresh().is_none());
/// # Ok(()) }
/// ```
///
/// It counts for the load whose loader calls it, and for that load alone: in the thread that runs the loader, or, if the loader
/// is asynchronous, in the task that awaits it. Elsewhere, as in a thread that the loader has started, it does nothing, so that
/// functions which call this can also be used outside of loaders.
///
/// Each use of a fresh value checks each of its keys, and the value keeps a clone of each synchronizer. A value may depend on
/// 16,384 keys; if a loader finds more, the load fails with [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) as source.
/// For a value that depends on thousands of keys, a tag that is marked whenever one of them is costs less.
///
/// # Progress
///
/// Allocates, and otherwise as [`GenerationSynchronizer::ticket`].
pub fn depend_on(sync: &GenerationSynchronizer) {
    if let Some(scope) = Scope::innermost() {
        let ticket = sync.ticket();
        scope.collect(|collected| collected.add(|| Arc::new(sync.clone()), ticket));
    }
}

/// Lets the value that is being loaded depend on what another value depends on, which its loader has read.
pub(super) fn depend_on_value(sync: impl FnOnce() -> Arc<GenerationSynchronizer>, freshness: &Freshness) {
    if let Some(scope) = Scope::innermost() {
        scope.collect(|collected| collected.add_value(sync, freshness));
    }
}

/// A cached value, or a map of them, to be read by a loader: the value that is being loaded depends on what it reads here.
///
/// Returned by [`Cached::tracked`](crate::Cached::tracked) and the methods of that name of the other kinds of caches.
#[derive(Clone, Copy, Debug)]
pub struct Tracked<'a, C>(pub(super) &'a C);

impl<T: ?Sized> Tracked<'_, Cached<T>> {
    /// As [`Cached::get`]; the value that is being loaded depends on the value that this returns. Outside of loaders, this is
    /// `get` alone.
    ///
    /// If an expired value is served, the value that is being loaded is expired from the start, as it was made from old data.
    ///
    /// # Errors
    ///
    /// As [`Cached::get`]; [`ErrorKind::Recursion`](crate::ErrorKind::Recursion) if this value's own load waits for the one that is
    /// under way here.
    ///
    /// # Panics
    ///
    /// As [`Cached::get`].
    ///
    /// # Progress
    ///
    /// As [`Cached::get`], and allocates.
    pub fn get(&self) -> Result<Arc<T>, Error> {
        let entry = self.0.entry()?;
        depend_on_value(|| Arc::new(self.0.synchronizer().clone()), &entry.freshness);
        Ok(entry.value())
    }
}

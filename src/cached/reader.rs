//! What one thread keeps of a `Cached`.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use super::Cached;
use crate::error::Error;
use crate::os::clock::coarse_now;
use crate::synchronizer::{CheckBudget, Ticket};

/// One thread's hold on a [`Cached`], for values that are used many times between updates: a check of the generation is all
/// that a use costs, while [`Cached::get`] also takes part in the count of the value's users.
///
/// Several readers of one `Cached` share its loads. Each keeps the value that it gave last, until it is asked again or dropped;
/// so an old value may live on with a reader that nobody uses.
///
/// ```
/// use gensync::{Cached, CachedReader, GenerationSynchronizer, Table};
///
/// # fn load_routes() -> Result<Vec<String>, std::io::Error> { Ok(vec!["/".to_owned()]) }
/// # fn main() -> Result<(), gensync::Error> {
/// let table = Table::options().anonymous()?;
/// let routes = Cached::new(GenerationSynchronizer::new(&table, "routes")?, load_routes);
/// std::thread::scope(|scope| {
///     for _ in 0..2 {
///         scope.spawn(|| {
///             let mut routes = CachedReader::new(&routes);
///             for _ in 0..1000 {
///                 let routes: &Vec<String> = routes.get()?;
///                 assert_eq!(routes.len(), 1);
///             }
///             Ok::<_, gensync::Error>(())
///         });
///     }
/// });
/// # Ok(()) }
/// ```
pub struct CachedReader<T: ?Sized, C: Deref<Target = Cached<T>>> {
    cached: C,
    value: Option<Arc<T>>,
    /// What tells that the value is fresh; void if that takes more than a ticket.
    ticket: Ticket,
    budget: CheckBudget,
    /// Uses that are not among the hits of the `Cached` yet, which other threads count, too.
    uncounted: u64,
    /// When they were last counted, in milliseconds.
    counted: u64,
}

/// So many milliseconds pass between two times at which a reader writes to what other threads use.
const PAUSE: u64 = 100;

impl<T: ?Sized, C: Deref<Target = Cached<T>>> CachedReader<T, C> {
    /// Of a reference to a `Cached`, or an `Arc` of one. Nothing is loaded yet.
    pub fn new(cached: C) -> Self {
        Self { cached, value: None, ticket: Ticket::VOID, budget: CheckBudget::new(), uncounted: 0, counted: 0 }
    }

    /// The value, loaded if it is not fresh: what [`Cached::get`] would give.
    ///
    /// # Errors
    ///
    /// As [`Cached::get`]. The next call tries again.
    ///
    /// # Panics
    ///
    /// As [`Cached::get`].
    ///
    /// # Progress
    ///
    /// Wait-free while the value is fresh, if it was built without
    /// [`depends_on`](crate::CachedBuilder::depends_on), [`max_age`](crate::CachedBuilder::max_age) and
    /// [`verify`](crate::CachedBuilder::verify); otherwise as [`Cached::get`].
    #[inline]
    pub fn get(&mut self) -> Result<&T, Error> {
        if !(self.cached.sync.is_unchanged(self.ticket) && self.budget.spend()) {
            self.renew()?;
        }
        Ok(self.value.as_deref().expect("a value that is fresh or was just loaded"))
    }

    /// The `Cached` that this reads.
    #[must_use]
    pub fn cached(&self) -> &Cached<T> {
        &self.cached
    }

    #[cold]
    fn renew(&mut self) -> Result<(), Error> {
        let sync = &self.cached.sync;
        let is_unchanged = sync.is_unchanged(self.ticket);
        self.uncounted += u64::from(self.budget.spent());
        let now = coarse_now();
        self.budget.renew(now);
        sync.table().revalidate_if_due(now);
        if now.wrapping_sub(self.counted) >= PAUSE {
            self.counted = now;
            self.count();
        }
        if is_unchanged && self.cached.sync.confirms(self.ticket) && self.has_value_in_place() {
            self.uncounted += 1;
            return Ok(());
        }
        // Counts this use.
        let entry = self.cached.entry()?;
        self.value = Some(entry.value());
        if self.cached.policy.is_plain {
            self.ticket = entry.ticket;
        }
        Ok(())
    }

    /// Another thread may have invalidated it.
    fn has_value_in_place(&self) -> bool {
        let current = self.cached.current.load();
        let present = current.as_ref().map(|entry| &entry.value);
        present.zip(self.value.as_ref()).is_some_and(|(present, value)| Arc::ptr_eq(present, value))
    }

    fn count(&mut self) {
        self.cached.hits.add(std::mem::take(&mut self.uncounted));
    }
}

impl<T: ?Sized, C: Deref<Target = Cached<T>>> Drop for CachedReader<T, C> {
    fn drop(&mut self) {
        self.uncounted += u64::from(self.budget.spent());
        self.count();
    }
}

impl<T: fmt::Debug + ?Sized, C: Deref<Target = Cached<T>>> fmt::Debug for CachedReader<T, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CachedReader")
            .field("cached", &*self.cached)
            .field("value", &self.value)
            .finish_non_exhaustive()
    }
}

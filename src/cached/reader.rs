//! A reader of a `Cached` for one thread.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use super::Cached;
use crate::error::Error;
use crate::os::clock::coarse_now;
use crate::synchronizer::{CheckBudget, HeldTicket, LastGrant, Ticket};

/// A reader of a [`Cached`] for one thread, for values that are used many times between updates: a use costs only a check of the
/// generation, while [`Cached::get`] also changes the reference count that all users of the value share.
///
/// Several readers of one `Cached` share its loads. Each keeps the value that it returned last until it is used again or dropped;
/// so a reader that is not used may keep an old value alive.
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
// A use of a fresh value touches the first fields, which stand in one cache line, the generation word, and the value: nothing of
// the `Cached`, to which other threads write.
#[repr(C, align(64))]
pub struct CachedReader<T: ?Sized, C: Deref<Target = Cached<T>>> {
    value: Option<Arc<T>>,
    /// The ticket that the value was loaded with; void if a ticket alone cannot show that the value is fresh.
    ticket: HeldTicket,
    budget: CheckBudget,
    // The fields from here on are used when the budget is spent, or the value is not fresh.
    /// When uses were last added to the hits: the low half of a time in milliseconds.
    counted: u32,
    grant: LastGrant,
    /// Uses that have not been added to the hits of the `Cached` yet, as that writes to memory which other threads use.
    uncounted: u64,
    cached: C,
}

const _: () = assert!(size_of::<CachedReader<u64, &Cached<u64>>>() == 64);
// A value without a size of its own has a longer pointer; even so, what each use touches is in the first line.
const _: () = assert!(std::mem::offset_of!(CachedReader<str, &Cached<str>>, counted) < 64);

/// The least time between two writes of a reader to the shared count of hits, in milliseconds.
const PAUSE: u32 = 100;

impl<T: ?Sized, C: Deref<Target = Cached<T>>> CachedReader<T, C> {
    /// A reader of a `Cached`, given as a reference or as an `Arc`. Nothing is loaded yet.
    pub fn new(cached: C) -> Self {
        let ticket = HeldTicket::void(cached.base.sync.place());
        let (budget, grant) = (CheckBudget::new(), LastGrant::new());
        Self { value: None, ticket, budget, counted: 0, grant, uncounted: 0, cached }
    }

    /// The value, loaded if it is not fresh: what [`Cached::get`] would return.
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
    /// Wait-free while the value is fresh, if the `Cached` was built without
    /// [`depends_on`](crate::CachedBuilder::depends_on), [`max_age`](crate::CachedBuilder::max_age) and
    /// [`verify`](crate::CachedBuilder::verify); otherwise as [`Cached::get`].
    #[inline]
    pub fn get(&mut self) -> Result<&T, Error> {
        if !(self.ticket.is_unchanged() && self.budget.spend()) {
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
        let sync = &self.cached.base.sync;
        let is_unchanged = self.ticket.is_unchanged();
        self.uncounted += u64::from(self.grant.spent(&self.budget));
        let now = coarse_now();
        self.grant.renew(&self.budget, now);
        sync.table().revalidate_if_due(now);
        if (now as u32).wrapping_sub(self.counted) >= PAUSE {
            self.counted = now as u32;
            self.count();
        }
        if is_unchanged && self.cached.base.sync.confirms(self.ticket.ticket()) && self.has_value_in_place() {
            self.uncounted += 1;
            return Ok(());
        }
        // This counts the use.
        let entry = self.cached.entry()?;
        self.value = Some(entry.value());
        // The key's generation may be that of the last value, whose ticket must not stay: if that value had no conditions, the
        // ticket would do for this one.
        let is_plain = entry.freshness.conditions.is_none();
        self.ticket.set(if is_plain { entry.freshness.ticket } else { Ticket::VOID }, self.cached.base.sync.place());
        Ok(())
    }

    /// Whether the value of this reader is still in place: another thread may have replaced it, or invalidated it, which leaves the
    /// value and takes its ticket away.
    fn has_value_in_place(&self) -> bool {
        let (current, ticket) = (self.cached.base.current.load(), self.ticket.ticket());
        let present = current.as_ref().filter(|entry| entry.freshness.ticket == ticket).map(|entry| &entry.value);
        present.zip(self.value.as_ref()).is_some_and(|(present, value)| Arc::ptr_eq(present, value))
    }

    fn count(&mut self) {
        self.cached.base.hits.add(std::mem::take(&mut self.uncounted));
    }
}

impl<T: ?Sized, C: Deref<Target = Cached<T>>> Drop for CachedReader<T, C> {
    fn drop(&mut self) {
        self.uncounted += u64::from(self.grant.spent(&self.budget));
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

//! What a value is loaded into: one core for values that stand alone and for the values of a map.

use std::iter;
use std::sync::Arc;

use super::counters::Metrics;
use super::policy::Policy;
use super::single_flight::SingleFlight;
use super::value::Entry;
#[cfg(feature = "map")]
use super::value::Residence;
use crate::synchronizer::{GenerationSynchronizer, Ticket};

/// The place of one value in this process, with what its loads need: a `Cached`, or one key of a `CachedMap`.
pub(super) trait Cell {
    type Value: ?Sized;
    /// What the callbacks are called with besides values.
    type Key: ?Sized;

    fn key(&self) -> &Self::Key;
    /// The synchronizer of the value's key, which does not adopt its own updates.
    fn sync(&self) -> &GenerationSynchronizer;
    fn policy(&self) -> &Policy<Self::Value, Self::Key>;
    fn metrics(&self) -> &Metrics;
    fn single_flight(&self) -> Arc<SingleFlight>;
    /// The value in place, expired or not, and also if it may not stay. Drops no value, as it is called under a lock.
    fn current(&self) -> Option<Arc<Entry<Self::Value>>>;
    /// Puts `entry` in place. Drops no value, as it is called under a lock.
    fn replace(&self, entry: Arc<Entry<Self::Value>>) -> Replaced<Self::Value>;
    fn count_hit(&self);

    /// Whether `entry`, which is or was in place, may still be served.
    fn may_stay(&self, _entry: &Entry<Self::Value>) -> bool {
        true
    }

    /// What decides how long `value` stays where it is put; `None` if it stays until it is replaced.
    #[cfg(feature = "map")]
    fn residence(&self, _value: &Self::Value) -> Option<Residence> {
        None
    }
}

/// What had to make room for an entry. To be dropped when no lock is held, as dropping a value may run code of the user.
pub(super) struct Replaced<T: ?Sized> {
    pub(super) old: Option<Arc<Entry<T>>>,
    /// Values that others than the new one replaces.
    pub(super) evicted: Vec<Arc<T>>,
}

/// The keys that expire a value which is yet to be loaded: its own, and those of its policy.
pub(super) fn keys<C: Cell + ?Sized>(cell: &C) -> impl Iterator<Item = &GenerationSynchronizer> {
    iter::once(cell.sync()).chain(cell.policy().dependencies.iter().map(|sync| &**sync))
}

/// Expires the value in place, in this process only.
pub(super) fn invalidate<C: Cell + ?Sized>(cell: &C) {
    let old = cell.single_flight().invalidate(|| {
        let entry = cell.current()?;
        let replaced = cell.may_stay(&entry).then(|| {
            cell.sync().adopt(Ticket::VOID);
            cell.replace(Arc::new(Entry { freshness: entry.freshness.voided(), value: entry.value() }))
        });
        Some((entry, replaced))
    });
    // Not under the lock, as dropping an entry may run code of the user.
    drop(old);
}

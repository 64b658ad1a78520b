//! Counts for people to read.

use crate::protocol::atomic::{AtomicU64, Ordering};

/// A figure for people.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

// ORDERING: relaxed throughout. The operations here pair with one another only, and by the value alone: no other memory is read
// because of a count.
impl Count {
    /// Returns the new count.
    #[inline]
    pub(crate) fn add_one(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// As `add_one`, at half its cost: a load and a store, so threads that overlap may lose a count. No number is left out: each
    /// is returned by at least one call.
    #[inline]
    pub(crate) fn add_one_or_so(&self) -> u64 {
        let count = self.0.load(Ordering::Relaxed) + 1;
        self.0.store(count, Ordering::Relaxed);
        count
    }

    pub(crate) fn add(&self, figure: u64) {
        self.0.fetch_add(figure, Ordering::Relaxed);
    }

    /// Does not go below zero: the count that is taken back may be one that was lost.
    pub(crate) fn take_one(&self) {
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| count.checked_sub(1));
    }

    pub(crate) fn clear(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    pub(crate) fn raise_to(&self, figure: u64) {
        self.0.fetch_max(figure, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::Count;

    #[test]
    fn a_count_does_not_go_below_zero() {
        let count = Count::default();
        count.take_one();
        assert_eq!((count.get(), count.add_one_or_so(), count.add_one()), (0, 1, 2));
    }
}

//! What a holder has seen of a key, to be compared with what there is.

use crate::generation::{GENERATION, Generation, LOWEST};
use crate::protocol::atomic::{AtomicU64, Ordering};
use crate::protocol::word::{RETIRED_BIT, WAITING_BIT, Word};

/// What a holder has seen of a generation word: its generation, or nothing.
///
/// Pending updates are no part of it: they are not finished. But where some were lost and nobody could clear them, the
/// number of that loss is, so that who loaded the state after the loss is known by it. Such a sight equals no live word.
///
/// Where freshness cannot be known, a sight holds the time at which it was taken instead, so that state which was loaded
/// then serves for a while. And where a live table has no such key, which only a holder that may not create it meets, a sight
/// holds the number of that table's incarnation: nobody has updated the key there as long as it is missing. Both have the
/// waiting bit, which is taken from a word before the two are compared: no word equals them, whatever somebody writes there.
///
/// | sight | 63..56 | 55 | 54 | 53..32 | 31..0 |
/// |---|---|---|---|---|---|
/// | a generation | 0 | 0 | 0 | generation | generation |
/// | after a loss | number of the loss | 0 | 1 | generation | generation |
/// | unconfirmed | time | 1 | 0 | time | generation |
/// | nothing, or an outage | 1s | 1 | 1 | time | time |
/// | a missing key | 0 | 1 | 1 | incarnation | incarnation |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Observed(pub(super) u64);

impl Observed {
    /// Of which no state is fresh: an outage at time 0, which is before any other.
    pub(crate) const NOTHING: Self = Self(!GENERATION);

    /// Taken at `now`, in milliseconds, while there was no table to attach to.
    #[cfg(not(loom))]
    pub(crate) fn outage(now: u64) -> Self {
        Self(!GENERATION | now & GENERATION)
    }

    /// Taken while the live table of this incarnation had no such key.
    #[cfg(not(loom))]
    pub(crate) fn missing(incarnation: u64) -> Self {
        Self(WAITING_BIT | RETIRED_BIT | incarnation & GENERATION)
    }

    /// Taken of `word` at `now`, in milliseconds, in a table that may not be the one at its path any more.
    #[cfg(not(loom))]
    pub(crate) fn unconfirmed(word: Word, now: u64) -> Self {
        // A time comes back after twelve days.
        let time = (now & 0x3f_ffff) << 32 | (now >> 22 & 0xff) << 56;
        Self(time | WAITING_BIT | word.0 & u64::from(u32::MAX))
    }

    /// Whether it was taken in an outage, less than `limit` milliseconds ago. A time that is still to come, as the clock was
    /// set back, is long ago.
    #[cfg(not(loom))]
    pub(crate) fn outlives_outage(self, now: u64, limit: u64) -> bool {
        self.is_outage() && (now.wrapping_sub(self.0) & GENERATION) < limit
    }

    /// Whether `word` has the generation that was seen, unconfirmed, less than `limit` milliseconds ago.
    #[cfg(not(loom))]
    pub(crate) fn outlives_doubt(self, word: Word, now: u64, limit: u64) -> bool {
        let time = self.0 >> 32 & 0x3f_ffff | (self.0 >> 56) << 22;
        let age = now.wrapping_sub(time) & 0x3fff_ffff;
        self.is_unconfirmed() && (self.0 ^ word.0) & u64::from(u32::MAX) == 0 && age < limit
    }

    /// Whether it names no generation, as it was taken of no slot.
    #[cfg(not(loom))]
    pub(crate) fn is_of_no_slot(self) -> bool {
        self.0 & (WAITING_BIT | RETIRED_BIT) == WAITING_BIT | RETIRED_BIT
    }

    #[cfg(not(loom))]
    fn is_outage(self) -> bool {
        self.0 & !GENERATION == Self::NOTHING.0 && self != Self::NOTHING
    }

    #[cfg(not(loom))]
    fn is_unconfirmed(self) -> bool {
        self.0 & (WAITING_BIT | RETIRED_BIT) == WAITING_BIT
    }

    /// Whether what is loaded with it may have been updated without anybody's knowing.
    #[cfg(not(loom))]
    pub(crate) fn is_in_doubt(self) -> bool {
        self.is_unconfirmed() || self.0 & !GENERATION == Self::NOTHING.0
    }

    /// All of it, to be compared.
    #[cfg(not(loom))]
    pub(crate) fn bits(self) -> u64 {
        self.0
    }

    /// Of a word whose slot's generation can be relied on, and of which no update is in flight.
    #[inline]
    pub(crate) fn settled(word: Word) -> Option<Self> {
        // What is pending makes it greater than any generation, as the retired bit does.
        let word = word.0 & !WAITING_BIT;
        (LOWEST..GENERATION).contains(&word).then_some(Self(word))
    }

    pub(crate) fn of(word: Word) -> Self {
        match word.0 & GENERATION {
            0 => Self::NOTHING,
            generation => Self(generation),
        }
    }

    pub(crate) fn after_loss(word: Word, number: u8) -> Self {
        Self(word.0 & GENERATION | RETIRED_BIT | u64::from(number) << 56)
    }

    #[inline]
    pub(crate) fn generation(self) -> Option<Generation> {
        if self.0 & WAITING_BIT == 0 { Generation::new(self.0 & GENERATION) } else { None }
    }

    /// Whether `word` is exactly what was seen: not retired, nothing pending, whoever waits.
    #[inline]
    pub(crate) fn is(self, word: Word) -> bool {
        word.0 & !WAITING_BIT == self.0
    }

    /// Whether `word` is what was seen, as far as a sleeper is concerned: a new generation would wake him.
    pub(crate) fn may_sleep_on(self, word: Word) -> bool {
        self.is(word) || self.is_before_updates_of(word)
    }

    /// Whether `word` is what was seen, but for updates that are pending. The word of a retired slot never is: it may have
    /// been seen by somebody who attached just before, and nothing moves it on.
    pub(crate) fn is_before_updates_of(self, word: Word) -> bool {
        word.pending() > 0 && word.0 & (RETIRED_BIT | GENERATION) == self.0 & GENERATION && self.0 & WAITING_BIT == 0
    }
}

/// What one holder has seen.
#[derive(Debug)]
pub(crate) struct LastObserved(AtomicU64);

impl LastObserved {
    pub(crate) fn new(observed: Observed) -> Self {
        Self(AtomicU64::new(observed.0))
    }

    #[inline]
    pub(crate) fn get(&self) -> Observed {
        // ORDERING: acquire pairs with `adopt`: a thread that finds the state fresh sees the state.
        Observed(self.0.load(Ordering::Acquire))
    }

    #[inline]
    pub(crate) fn adopt(&self, observed: Observed) {
        // ORDERING: release pairs with `get`.
        self.0.store(observed.0, Ordering::Release);
    }

    /// Follows an update from `before` by the holder itself, if `before` is what it had seen.
    #[inline]
    pub(crate) fn follow(&self, before: Word) {
        // A load and a store, not a compare-exchange, which would double the cost of an update. Two threads that
        // change the state behind one synchronizer at once need a lock for the state itself, and it orders this too.
        let seen = self.0.load(Ordering::Relaxed);
        if before.0 & GENERATION == seen {
            // ORDERING: as in `adopt`.
            self.0.store(seen + 1, Ordering::Release);
        }
    }
}

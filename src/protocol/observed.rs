//! What a holder has seen of a key, to be compared with what is there now.

use crate::generation::{GENERATION, Generation, LOWEST};
use crate::protocol::atomic::{AtomicU64, Ordering};
use crate::protocol::word::{RETIRED_BIT, WAITING_BIT, Word};

/// What a holder has seen of a generation word: its generation, or nothing.
///
/// Pending updates are no part of it: they are not finished. But if some were lost and no process could clear them, the
/// number of that loss is part of it, and distinguishes state that was loaded after the loss. Such a value equals no live word.
///
/// If freshness cannot be known, the value holds the time at which it was taken instead, so that state which was loaded then
/// serves for a while. If a live table has no such key, which only a holder that may not create it meets, the value holds the
/// number of that table's incarnation: no process has updated the key there as long as it is missing. Both have the waiting
/// bit, which is removed from a word before the two are compared. So no word equals them, whatever is written there.
///
/// | observed | 63..56 | 55 | 54 | 53..32 | 31..0 |
/// |---|---|---|---|---|---|
/// | a generation | 0 | 0 | 0 | generation | generation |
/// | after a loss | number of the loss | 0 | 1 | generation | generation |
/// | unconfirmed | time | 1 | 0 | time | generation |
/// | nothing, or an outage | 1s | 1 | 1 | time | time |
/// | a missing key | 0 | 1 | 1 | incarnation | incarnation |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Observed(pub(super) u64);

impl Observed {
    /// Nothing, so that no state is fresh: an outage at time 0, which is before any other.
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

    /// Taken of `word` at `now`, in milliseconds, in a table that may no longer be the one at its path.
    #[cfg(not(loom))]
    pub(crate) fn unconfirmed(word: Word, now: u64) -> Self {
        // A time comes back after twelve days.
        let time = (now & 0x3f_ffff) << 32 | (now >> 22 & 0xff) << 56;
        Self(time | WAITING_BIT | word.0 & u64::from(u32::MAX))
    }

    /// Whether it was taken in an outage, less than `limit` milliseconds ago. A time in the future counts as long ago: the clock
    /// was set back.
    #[cfg(not(loom))]
    pub(crate) fn outlives_outage(self, now: u64, limit: u64) -> bool {
        self.is_outage() && (now.wrapping_sub(self.0) & GENERATION) < limit
    }

    /// Whether this is unconfirmed, was taken less than `limit` milliseconds ago, and of the generation that `word` has.
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

    /// Whether state that was loaded with it may have been updated unnoticed.
    #[cfg(not(loom))]
    pub(crate) fn is_in_doubt(self) -> bool {
        self.is_unconfirmed() || self.0 & !GENERATION == Self::NOTHING.0
    }

    /// All its bits, to be compared.
    #[cfg(not(loom))]
    pub(crate) fn bits(self) -> u64 {
        self.0
    }

    /// Taken of `word` if its generation can be relied on and no update is pending.
    #[inline]
    pub(crate) fn settled(word: Word) -> Option<Self> {
        // Pending updates make it greater than any generation, and so does the retired bit. One comparison serves for all.
        let word = word.0 & !WAITING_BIT;
        (LOWEST..GENERATION).contains(&word).then_some(Self(word))
    }

    /// Taken of `word`, without its pending updates.
    pub(crate) fn of(word: Word) -> Self {
        match word.0 & GENERATION {
            0 => Self::NOTHING,
            generation => Self(generation),
        }
    }

    /// Taken of `word` after the loss of that `number`.
    pub(crate) fn after_loss(word: Word, number: u8) -> Self {
        Self(word.0 & GENERATION | RETIRED_BIT | u64::from(number) << 56)
    }

    #[inline]
    pub(crate) fn generation(self) -> Option<Generation> {
        if self.0 & WAITING_BIT == 0 { Generation::new(self.0 & GENERATION) } else { None }
    }

    /// Whether `word` is exactly what was seen, not retired and with nothing pending; the waiting bit does not matter.
    #[inline]
    pub(crate) fn is(self, word: Word) -> bool {
        word.0 & !WAITING_BIT == self.0
    }

    /// Whether `word` has nothing new for a waiter, which may sleep then: a new generation would wake it.
    pub(crate) fn may_sleep_on(self, word: Word) -> bool {
        self.is(word) || self.is_before_updates_of(word)
    }

    /// Whether `word` is what was seen, with pending updates that were not. The word of a retired slot never is: a process that
    /// attached just before may have seen its generation, and nothing moves it on.
    pub(crate) fn is_before_updates_of(self, word: Word) -> bool {
        word.pending() > 0 && word.0 & (RETIRED_BIT | GENERATION) == self.0 & GENERATION && self.0 & WAITING_BIT == 0
    }
}

/// What one holder has seen last. Its threads share it; other processes do not.
#[derive(Debug)]
pub(crate) struct LastObserved(AtomicU64);

impl LastObserved {
    pub(crate) fn new(observed: Observed) -> Self {
        Self(AtomicU64::new(observed.0))
    }

    #[inline]
    pub(crate) fn get(&self) -> Observed {
        // ORDERING: acquire pairs with the releases in `adopt` and `follow`: a thread that finds the state fresh by this value
        // sees the state that another thread loaded, or changed, before it stored the value.
        Observed(self.0.load(Ordering::Acquire))
    }

    #[inline]
    pub(crate) fn adopt(&self, observed: Observed) {
        // ORDERING: release pairs with the acquire in `get`: the state was loaded before this, and is visible to each thread that
        // finds it fresh.
        self.0.store(observed.0, Ordering::Release);
    }

    /// Follows the holder's own update, which found the word `before`, if that is what the holder had seen.
    #[inline]
    pub(crate) fn follow(&self, before: Word) {
        // A load and a store, not a compare-exchange, which would double the cost of an update. Two threads that
        // change the state behind one synchronizer at once need a lock for the state itself, and it orders this too.
        // ORDERING: relaxed. Reads what `adopt` and this store, and compares it; no other memory is read because of it.
        let seen = self.0.load(Ordering::Relaxed);
        if before.0 & GENERATION == seen {
            // ORDERING: release pairs with the acquire in `get`: this thread changed the state before the update, and the changed
            // state is visible to each thread that finds it fresh.
            self.0.store(seen + 1, Ordering::Release);
        }
    }
}

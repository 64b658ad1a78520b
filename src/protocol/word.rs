//! The generation word of a slot, as a value.

use crate::generation::{GENERATION, Generation, LOWEST};
use crate::protocol::layout::HIGHEST_FLOOR;

pub(crate) const RETIRED_BIT: u64 = 1 << 54;
pub(crate) const WAITING_BIT: u64 = 1 << 55;
pub(crate) const ONE_PENDING: u64 = 1 << 56;
pub(crate) const PENDING: u64 = u64::MAX << 56;

/// A value of a generation word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Word(pub(super) u64);

impl Word {
    /// All its bits, for people.
    pub(crate) fn bits(self) -> u64 {
        self.0
    }

    #[inline]
    pub(crate) fn generation(self) -> Option<Generation> {
        Generation::new(self.0 & GENERATION)
    }

    /// Whether the slot's generation can be relied on: the table has no successor, and the slot has begun. In a detached
    /// mapping (see `Mapping::detach`), a word counts up from zero, and so counts as retired; so does the greatest generation,
    /// which has no next one.
    #[inline]
    pub(crate) fn is_live(self) -> bool {
        // The retired bit makes it greater than any generation.
        (LOWEST..GENERATION).contains(&(self.0 & (RETIRED_BIT | GENERATION)))
    }

    /// Whether gensync may have written its generation, retired or not. The highest that a key begins with is the highest
    /// floor; it is never updated so often that it gets near the end.
    pub(crate) fn is_plausible(self) -> bool {
        (LOWEST..=HIGHEST_FLOOR + (1 << 52)).contains(&(self.0 & GENERATION))
    }

    /// How many crash-safe updates are pending. 255 stands for that many or more.
    #[inline]
    pub(crate) fn pending(self) -> u8 {
        (self.0 >> 56) as u8
    }

    /// Whether this is `other`, apart from the waiting bit.
    pub(crate) fn is_same(self, other: Self) -> bool {
        (self.0 ^ other.0) & !WAITING_BIT == 0
    }

    /// The same word with the waiting bit.
    #[cfg(not(loom))]
    pub(crate) fn awaited(self) -> Self {
        Self(self.0 | WAITING_BIT)
    }

    /// Whether a waiter may sleep until the generation moves on.
    #[inline]
    pub(crate) fn is_awaited(self) -> bool {
        self.0 & WAITING_BIT != 0
    }

    /// The generation after an update that found this word; `None` if the update must be made in a successor.
    #[inline]
    pub(crate) fn updated(self) -> Option<Generation> {
        if self.is_live() { Generation::new((self.0 & GENERATION) + 1) } else { None }
    }

    /// As [`updated`](Self::updated), but `None` also if there may be a waiter to wake.
    #[inline]
    pub(crate) fn updated_unawaited(self) -> Option<Generation> {
        // One comparison for all, as an update is little more than that: without the pending ones, either bit makes the
        // word greater than any generation.
        let is_plain = (LOWEST << 8..GENERATION << 8).contains(&(self.0 << 8));
        if is_plain { Generation::new((self.0 & GENERATION) + 1) } else { None }
    }
}

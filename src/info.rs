//! What a table tells of itself.

use crate::generation::Generation;
use crate::layout::Slot;

/// One key of a table, as [`Table::slots`](crate::Table::slots) finds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotInfo {
    label: Vec<u8>,
    key_length: usize,
    digest: [u64; 2],
    generation: Generation,
    updates: u64,
    pending: u8,
    is_awaited: bool,
}

impl SlotInfo {
    /// What `slot` says; `None` while it is being claimed.
    pub(crate) fn of(slot: &Slot) -> Option<Self> {
        let ((label, key_length), word) = (slot.label(), slot.word());
        let (digest, generation) = (slot.digest()?.words(), word.generation()?);
        let (updates, pending, is_awaited) = (slot.updates(), word.pending(), word.is_awaited());
        Some(Self { label, key_length, digest, generation, updates, pending, is_awaited })
    }

    /// The key's first bytes, at most 88. For people: nothing is looked up by it. Empty while the process that creates
    /// the key has not come to writing it.
    #[must_use]
    pub fn label(&self) -> std::borrow::Cow<'_, str> {
        String::from_utf8_lossy(&self.label)
    }

    /// The label's bytes, which may end within a character.
    #[must_use]
    pub fn label_bytes(&self) -> &[u8] {
        &self.label
    }

    /// Whether the key is longer than its label.
    #[must_use]
    pub fn is_truncated(&self) -> bool {
        self.key_length > self.label.len()
    }

    /// The 128 bits by which the key is found: the head of a SHA-256 of the table's salt and the key.
    #[must_use]
    pub fn digest(&self) -> u128 {
        u128::from(self.digest[0]) << 64 | u128::from(self.digest[1])
    }

    /// The present generation.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// How many updates there were since the key was created in this incarnation of the table.
    #[must_use]
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// How many [updates](crate::GenerationSynchronizer::update) are in flight, or were when their process was killed; 255
    /// stands for that many or more.
    #[must_use]
    pub fn pending(&self) -> u8 {
        self.pending
    }

    /// Whether somebody waits for the key, or for any key of the table, or did until it was killed or its time was up. Each
    /// update ends it, until those who are woken wait again.
    #[must_use]
    pub fn is_awaited(&self) -> bool {
        self.is_awaited
    }
}

/// Figures of a table, from [`Table::stats`](crate::Table::stats).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// How many keys there are.
    pub keys: u64,
    /// How many slots there are, in all segments.
    pub capacity: u64,
    /// How many segments there are.
    pub segments: u32,
    /// The size of the table: header and segments.
    pub bytes: u64,
    /// How many slots of its segment a search looks at, at most, to find a key.
    pub longest_probe: u64,
}

//! What a table tells of itself.

use std::time::{Duration, SystemTime};

use crate::generation::Generation;
use crate::os::boot::boot_id;
use crate::os::lock::Held;
use crate::os::mapping::Mapping;
use crate::protocol::layout::{FixedHeader, Header, Slot};

/// More updates than a key can have: a million a second for 35 years. What clocks do to a generation is no update.
const MOST_UPDATES: u64 = 1 << 50;

/// One key of a table, as [`Table::slots`](crate::Table::slots) finds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotInfo {
    // As small as can be: tools sort millions of them.
    label: Box<[u8]>,
    key_length: usize,
    offset: u64,
    digest: [u64; 2],
    generation: Generation,
    updates: u64,
    pending: u8,
    is_awaited: bool,
    is_abandoned: bool,
    is_damaged: bool,
}

impl SlotInfo {
    /// What `slot` says, which is in `mapping`; `None` while it is being claimed.
    pub(crate) fn of(slot: &Slot, mapping: &Mapping) -> Option<Self> {
        let ((label, key_length), word) = (slot.label(), slot.word());
        let (digest, generation) = (slot.digest()?.words(), word.generation()?);
        let (updates, pending, is_awaited) = (slot.updates(), word.pending(), word.is_awaited());
        // Whoever finishes an update lets go of the lock after he has counted it out.
        let has_no_maker = || matches!(mapping.held(slot), None | Some(Held::Foreign));
        let is_abandoned = pending > 0 && has_no_maker() && slot.word().is_same(word);
        let is_damaged = !word.is_plausible() || updates > MOST_UPDATES;
        let (label, offset) = (label.into_boxed_slice(), mapping.offset_of(slot));
        Some(Self {
            label,
            key_length,
            offset,
            digest,
            generation,
            updates,
            pending,
            is_awaited,
            is_abandoned,
            is_damaged,
        })
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

    /// How long the whole key is, in bytes. 0 while the process that creates the key has not come to writing its label.
    #[must_use]
    pub fn key_length(&self) -> usize {
        self.key_length
    }

    /// The 128 bits by which the key is found: the head of a SHA-256 of the table's salt and the key.
    #[must_use]
    pub fn digest(&self) -> u128 {
        number(self.digest)
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
    /// stands for that many or more, and is cleared, by one announcement, when all of them have ended.
    #[must_use]
    pub fn pending(&self) -> u8 {
        self.pending
    }

    /// Whether updates are pending of which no maker lives: the next check of the key by a process that may write announces
    /// them. For a moment it may seem so of an update that was given up and is followed by another; so who is to act on it
    /// looks twice.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        self.is_abandoned
    }

    /// Whether the generation, or the number of updates, is what no gensync wrote: somebody wrote into the file who should
    /// not. Such a key may still be updated now, and fail with [`ErrorKind::DamagedKey`](crate::ErrorKind::DamagedKey) at the
    /// next update. [`Table::reset`](crate::Table::reset) cures it.
    ///
    /// Not every change by others is found: a number that might be true counts as true.
    #[must_use]
    pub fn is_damaged(&self) -> bool {
        self.is_damaged
    }

    /// Where in the table's file the slot is, in bytes from the beginning. No two slots of one incarnation share it, and a
    /// key keeps it until the table is reset.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether somebody waits for the key, or for any key of the table; or did until it was killed, until its time was up within
    /// half a second, or, a task, until its future was dropped. Each update ends it, until those who are woken wait again; so
    /// does a longer wait whose time is up, a [`Watch`](crate::Watch) that is dropped, and the last descriptor of a process.
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
    /// How full each segment is.
    pub occupancy: Vec<Occupancy>,
}

/// How full a segment of a table is, from [`Stats::occupancy`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Occupancy {
    /// How many slots it has.
    pub slots: u64,
    /// How many of them belong to a key.
    pub keys: u64,
}

/// What a table's header says, from [`Table::info`](crate::Table::info).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TableInfo {
    /// The version of the file format.
    pub layout_version: u32,
    /// How far the table is from its end.
    pub state: TableState,
    /// A random number that no other table has: each [`reset`](crate::Table::reset) brings another.
    pub incarnation: u128,
    /// When this incarnation was created.
    pub created: SystemTime,
    /// The least generation that a key of this incarnation may begin with; 0 unless it has replaced another.
    pub floor: u64,
    /// The kernel's id of the boot in which the table was last opened for writing for the first time; 0 where the kernel did
    /// not tell.
    pub boot: u128,
    /// Whether that is another boot than this one, or a container's with an id of its own: a process that opens the table for
    /// writing while nobody else has it open moves all of its keys on.
    pub is_of_earlier_boot: bool,
    /// How many slots the first segment has.
    pub capacity: u64,
}

/// The state of a table's incarnation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TableState {
    /// In use.
    Live,
    /// A process has begun to retire it; whoever uses it next goes on with that.
    Retiring,
    /// It has a successor, or none is wanted.
    Retired,
}

impl TableInfo {
    pub(crate) fn of(fixed: &FixedHeader, header: &Header) -> Self {
        let [boot, this_boot] = [header.boot(), boot_id().unwrap_or_default()].map(number);
        let state = match (header.is_live(), header.is_retired()) {
            (true, _) => TableState::Live,
            (false, false) => TableState::Retiring,
            (false, true) => TableState::Retired,
        };
        Self {
            layout_version: fixed.version,
            state,
            incarnation: u128::from_be_bytes(fixed.incarnation),
            // A time from a file: one that the clock cannot show counts as its beginning.
            created: SystemTime::UNIX_EPOCH
                .checked_add(Duration::from_micros(fixed.created))
                .unwrap_or(SystemTime::UNIX_EPOCH),
            floor: fixed.floor,
            boot,
            is_of_earlier_boot: boot != this_boot && this_boot != 0,
            capacity: fixed.capacity,
        }
    }
}

fn number([high, low]: [u64; 2]) -> u128 {
    u128::from(high) << 64 | u128::from(low)
}

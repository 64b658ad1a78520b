//! What a table says about itself.

use std::time::{Duration, SystemTime};

use crate::generation::Generation;
use crate::os::boot::boot_id;
use crate::os::lock::Held;
use crate::os::mapping::Mapping;
use crate::protocol::fixed_header::FixedHeader;
use crate::protocol::layout::Header;
use crate::protocol::record::Reference;
use crate::protocol::segment::Slot;
use crate::protocol::slots::Slots;

/// More updates than a key can have: a million a second for 35 years. That a clock moves a generation on does not count as an
/// update.
const MOST_UPDATES: u64 = 1 << 50;

/// One key of a table, as [`Table::slots`](crate::Table::slots) finds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotInfo {
    // As small as possible, as tools sort millions of these.
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
    /// What `slot`, which is one of `slots`, says; `None` while it is being claimed.
    pub(crate) fn of(slot: Slot<'_>, slots: &Slots<Mapping>) -> Option<Self> {
        let (mapping, word) = (slots.memory(), slot.generation.word());
        let (digest, generation) = (slot.digest.digest()?.words(), word.generation()?);
        let (pending, is_awaited) = (word.pending(), word.is_awaited());
        // A key that has a generation has a record, unless other code wrote into the file.
        let (reference, record) = (slot.record?.get(), slots.record_of(slot));
        let updates = record.map_or(0, |record| record.updates(generation));
        let label = record.map_or(Vec::new(), |record| record.text());
        let key_length = record.and(reference).map_or(0, Reference::key_length);
        let has_no_text = label.is_empty() && !reference.is_some_and(|reference| slots.is_out_of_reach(reference));
        // An update is counted out before its lock is released. So if the word is the same as before, no update that was
        // pending has ended since, and one without a lock has no process left.
        let has_no_maker = || matches!(mapping.held(slot.generation), None | Some(Held::Foreign));
        let is_abandoned = pending > 0 && has_no_maker() && slot.generation.word().is_same(word);
        let is_damaged = !word.is_plausible() || updates > MOST_UPDATES || has_no_text;
        // What was read of a mapping that another thread has detached meanwhile may be zeros.
        if mapping.is_detached() {
            return None;
        }
        let (label, offset) = (label.into_boxed_slice(), mapping.offset_of(slot.generation));
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

    /// The key, or its first 65,536 bytes if it is longer. It is for people and for globs: keys are found by their digests. Bytes
    /// that are not UTF-8, which only a cut or damage leaves, are replaced.
    ///
    /// A key that is created has its text before it has a generation. So an empty label means damage, or that this process cannot
    /// map the part of the table where the text is, for lack of address space.
    #[must_use]
    pub fn label(&self) -> std::borrow::Cow<'_, str> {
        String::from_utf8_lossy(&self.label)
    }

    /// The label's bytes. Those of a key that [is cut](Self::is_truncated) may end within a character.
    #[must_use]
    pub fn label_bytes(&self) -> &[u8] {
        &self.label
    }

    /// Whether the key is longer than its label: it has more than 65,536 bytes, and the table keeps no more of it.
    #[must_use]
    pub fn is_truncated(&self) -> bool {
        self.key_length > self.label.len()
    }

    /// How long the whole key is, in bytes; 1,073,741,823 stands for that many or more. 0 only if its text is
    /// [damaged](Self::is_damaged).
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

    /// How many updates there have been since the key was created in this incarnation of the table.
    #[must_use]
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// How many [updates](crate::GenerationSynchronizer::update) are in flight, or were in flight when their process was
    /// killed; 255 stands for that many or more, and is cleared, with one announcement, when all of them have ended.
    #[must_use]
    pub fn pending(&self) -> u8 {
        self.pending
    }

    /// Whether updates are pending whose processes are all dead: the next check of the key by a process that may write
    /// announces them. For a moment this may also be `true` if an update was given up and another one follows it; so ask twice
    /// before you act on it.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        self.is_abandoned
    }

    /// Whether the generation, or the number of updates, is one that no gensync has written, or the key has no text: other code
    /// wrote into the file, which it should not. Such a key may still be updated now, and fail with
    /// [`ErrorKind::DamagedKey`](crate::ErrorKind::DamagedKey) at the next update. [`Table::reset`](crate::Table::reset) cures
    /// it.
    ///
    /// Not every change by other code is found: a number that is plausible counts as undamaged, and so does a text that is not
    /// the key's.
    #[must_use]
    pub fn is_damaged(&self) -> bool {
        self.is_damaged
    }

    /// Where in the table's file the slot's generation word is, in bytes from the beginning. No two slots of one incarnation
    /// share an offset, and a key keeps its offset until the table is reset.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether there is a waiter for the key, or for any key of the table. A waiter that is gone still counts if it was killed,
    /// if its time was up within half a second, or if it was a task whose future was dropped. Each update ends this, until the
    /// waiters that it wakes wait again; so does a longer wait whose time is up, a [`Watch`](crate::Watch) that is dropped, and
    /// the last descriptor of a process that is dropped.
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
    /// How many segments of slots there are.
    pub segments: u32,
    /// The size of the table: header, and segments of slots and of texts.
    pub bytes: u64,
    /// How many bytes of texts are taken, of keys and of records that are lost.
    pub text_bytes: u64,
    /// How many of these belong to no key: processes that were killed while they created a key, or created one at the same time
    /// as others, left them. A record that is being written counts for a moment. A [`reset`](crate::Table::reset) frees them.
    pub lost_bytes: u64,
    /// How many groups of 16 slots of its segment a search looks at, at most, to find a key.
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
    /// Whether the table is in use, retiring or retired.
    pub state: TableState,
    /// A random number that no other table has: each [`reset`](crate::Table::reset) that replaces the file brings another.
    pub incarnation: u128,
    /// When this incarnation was created.
    pub created: SystemTime,
    /// The least generation that a key of this incarnation may begin with; 0 unless it has replaced another.
    pub floor: u64,
    /// The kernel's id of the last boot in which the table was opened for writing; it was written when a process first did so
    /// in that boot. 0 if the kernel did not provide an id.
    pub boot: u128,
    /// Whether [`boot`](Self::boot) is another boot than this one, or the id of a container that has its own: a process that
    /// opens the table for writing while no other process has it open then moves all of its keys to new generations.
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
    /// A process has begun to retire it; the next process that uses it continues.
    Retiring,
    /// It is retired completely: it has a successor, or is not to have one.
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
            // A time from a file may be one that `SystemTime` cannot represent: it counts as the epoch.
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

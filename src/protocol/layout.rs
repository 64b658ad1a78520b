//! The file format, version 1.
//!
//! ```text
//! offset 0       header: one page of 4096 bytes
//! offset 4096    segment 0: C slots            (C = capacity, a power of two)
//!                segment 1: 2 C slots
//!                segment k: C * 2^k slots, appended when a key finds no room in segments 0..k-1
//! ```
//!
//! The file ends where its last segment ends (an anonymous table is sparse to its greatest size instead). Numbers of the
//! fixed part of the header are little-endian; the words that change are in the byte order of the machine that made
//! the file, which the byte-order mark names.
//!
//! | header offset | bytes | fixed at creation |
//! |---|---|---|
//! | 0 | 8 | magic, `gensync` and a zero byte |
//! | 8 | 4 | layout version: 1 |
//! | 12 | 4 | byte-order mark: 1 little-endian, 2 big-endian |
//! | 16 | 4 | slot size: 128 |
//! | 20 | 4 | header size: 4096 |
//! | 24 | 8 | capacity of segment 0, in slots |
//! | 32 | 16 | salt of the digests, random |
//! | 48 | 16 | incarnation, random |
//! | 64 | 8 | creation time, microseconds since the epoch |
//! | 72 | 8 | floor: no key of this table starts at a lower generation; at most 2^53, from where on keys start at random, below 2^53 + 2^52 |
//! | 80 | 8 | checksum: first 8 bytes of the SHA-256 of bytes 0..80 |
//!
//! | header offset | bytes | changes |
//! |---|---|---|
//! | 128 | 16 | boot id: two words, the boot in which the table was last opened for the first time |
//! | 144 | 4 | state: 1 live, 2 retiring, 3 retired |
//! | 148 | 4 | number of segments |
//! | 256 | 4 | wake word of the table, alone in its cache lines: for waiters for several keys, or for any |
//!
//! Bytes that belong to no field, in the header and behind the tags of a small segment, are zero when the table is made, and
//! are neither read nor changed later.
//!
//! | slot offset | bytes | |
//! |---|---|---|
//! | 0 | 8 | generation word, see below |
//! | 8 | 16 | digest: words A and B, the first 16 bytes of SHA-256(salt, key), little-endian; a zero word is replaced by 1 |
//! | 24 | 4 | wake word: for waiters for this key |
//! | 28 | 4 | length of the key in bytes; 0 while the label is not written |
//! | 32 | 8 | first generation of the slot |
//! | 40 | 88 | label: the key's first 88 bytes, zero-filled |
//!
//! The generation word: in bits 63..56, the number of pending updates (255: that many or more, and it stays so until all have
//! ended); bit 55, the waiting bit, says that a waiter may sleep; bit 54, the retired bit, that the table has a successor; bits
//! 53..0 are the generation, which is never below 2^40.
//!
//! A wake word is a count that processes sleep on, as on a futex that is shared between processes. Its lowest bit says that a
//! process sleeps, or is about to. A process that wakes the sleepers first adds 1. A process that updates a key and finds bit 55
//! clears it, and then wakes both the key's sleepers and the table's. The table's are also woken by a new key, when its label
//! is written, and by the end of the table.
//!
//! Locks on the file, of open file descriptions:
//!
//! | bytes | kind | held by |
//! |---|---|---|
//! | a slot's 128 | shared | each process that has an update of the key pending |
//! | a slot's 128 | exclusive | a process that clears the pending updates of dead ones |
//! | 4096 to the end (length 0) | exclusive | a process that begins to retire the table |
//! | 144 to 147, the state | exclusive | a process that waits for the lock above: updates that are about to begin let it go first, for some milliseconds |
//! | 0 to 127, the fixed header | exclusive | a process that replaces the file, or renews it after a reboot |
//! | 128 to 143, the boot id | shared | each process that has the table open, until the description through which it has mapped the file is closed |
//! | 128 to 143, the boot id | exclusive | a process that renews the table after a reboot, as no other has it open |
//!
//! A boot id alone does not show that there was a reboot: ids differ between containers of one boot, and may be hidden. But no
//! process has a table open across a reboot. So a table of another boot is renewed by a process that has exclusive locks on the
//! boot id and on all slots.
//!
//! A process that may only read the file cannot have any of the exclusive locks, but its shared locks can keep other processes
//! from having them. So a shared lock means nothing unless it looks like an update's: of an open file description, on the
//! bytes of exactly one slot. Beside foreign locks, pending updates are cleared by one compare-exchange: of the generation word
//! that was read before `/proc/locks` was found to have no update's lock. A table is retired when nothing has been pending for a
//! tenth of a second, and a file is replaced without the lock.
//!
//! A tag that is not zero says that the slot of the same index belongs for ever to a key with this first byte in word B (the
//! most significant byte; a zero is replaced by 1). A tag may be missing. Tags save loads of slots: in a full segment, two or
//! three cache lines of tags say what sixteen of slots would.
//!
//! In every version, the magic, the layout version and the checksum stand where they are here. Each version knows where the
//! earlier ones have the state, the generation words and the locks, which is what it takes to retire such a table.
//!
//! The slots where a key with the words A and B may stand in segment k of n slots are, in this order,
//! `(A + k * B + i * (i + 1) / 2) mod n` (wrapping arithmetic) for i = 0, 1, ... below [`probe_limit`].
//! Triangular steps visit distinct slots in a table of a power of two, and their first few share a page.

use sha2::{Digest as _, Sha256};

use crate::error::ErrorKind;
use crate::protocol::atomic::{AtomicU8, AtomicU32, AtomicU64};
use crate::protocol::wake::WakeWord;

pub(crate) const MAGIC: [u8; 8] = *b"gensync\0";
const VERSION: u32 = 1;
pub(crate) const HEADER_SIZE: usize = 4096;
pub(crate) const SLOT_SIZE: usize = 128;
pub(crate) const LABEL_SIZE: usize = 88;

/// The greatest size of a table.
pub(crate) const MAX_SIZE: u64 = 8 << 30;
/// The greatest capacity of segment 0: half of what fits, so that one more segment never overflows the arithmetic.
pub(crate) const MAX_CAPACITY: u64 = MAX_SIZE / (2 * SLOT_SIZE as u64);

/// The year 2255, in microseconds since the epoch. No floor is higher, whatever is written in the slots of its predecessor:
/// above it, there are as many generations again.
pub(crate) const HIGHEST_FLOOR: u64 = 1 << 53;

/// September 2005, in microseconds since the epoch: a clock that says less was not set since the machine was started.
const UNSET_CLOCK: u64 = 1 << 50;

/// Where keys start at the earliest.
const FIRST_START: u64 = 1 << 40;

pub(crate) const LIVE: u32 = 1;
pub(crate) const RETIRING: u32 = 2;
pub(crate) const RETIRED: u32 = 3;

const BYTE_ORDER: u32 = if cfg!(target_endian = "little") { 1 } else { 2 };
const CHECKED: usize = 80;
const BOOT_OFFSET: usize = 128;
pub(crate) const STATE_OFFSET: usize = 144;
const SEGMENTS_OFFSET: usize = 148;

/// How many slots of segment `k` a key may stand in.
///
/// Measured: with 64, none of 20,000 tables of 1024 slots ran out of room below 800 keys (the earliest at 843); with
/// 16 in the later segments, a table that grows stays below 370 bytes a key.
pub(crate) const fn probe_limit(segment: u32) -> u64 {
    if segment == 0 { 64 } else { 16 }
}

/// The words of the header that change while the table is in use.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct Header {
    pub(crate) boot: [AtomicU64; 2],
    pub(crate) state: AtomicU32,
    pub(crate) segments: AtomicU32,
    pub(crate) wake: WakeLine,
}

/// The table's wake word in cache lines of its own: every update that has waiters to wake reads it, and it is written only if
/// a process sleeps on it.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct WakeLine {
    pub(crate) word: WakeWord,
}

/// One byte of a digest, beside its slot.
#[derive(Debug)]
#[repr(transparent)]
pub(crate) struct Tag(pub(crate) AtomicU8);

/// One slot: two cache lines, the first of which holds all that a check or an update touches.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct Slot {
    pub(crate) generation: AtomicU64,
    pub(crate) digest_a: AtomicU64,
    pub(crate) digest_b: AtomicU64,
    pub(crate) wake: WakeWord,
    pub(crate) key_length: AtomicU32,
    pub(crate) first: AtomicU64,
    pub(crate) label: [AtomicU64; LABEL_SIZE / 8],
}

#[cfg(not(loom))]
const _: () = {
    use std::mem::{align_of, offset_of, size_of};
    assert!(size_of::<Slot>() == SLOT_SIZE && align_of::<Slot>() == SLOT_SIZE);
    assert!(offset_of!(Slot, generation) == 0);
    assert!(offset_of!(Slot, digest_a) == 8);
    assert!(offset_of!(Slot, digest_b) == 16);
    assert!(offset_of!(Slot, wake) == 24);
    assert!(offset_of!(Slot, key_length) == 28);
    assert!(offset_of!(Slot, first) == 32);
    assert!(offset_of!(Slot, label) == 40);
    assert!(offset_of!(Header, boot) == 0);
    assert!(BOOT_OFFSET + offset_of!(Header, state) == STATE_OFFSET);
    assert!(BOOT_OFFSET + offset_of!(Header, segments) == SEGMENTS_OFFSET);
    assert!(BOOT_OFFSET + offset_of!(Header, wake) == 256);
    assert!(BOOT_OFFSET + size_of::<Header>() <= HEADER_SIZE);
    assert!(BOOT_OFFSET.is_multiple_of(align_of::<Header>()));
    assert!(HEADER_SIZE.is_multiple_of(align_of::<Slot>()));
};

/// The version that this process writes, and reads.
#[cfg(not(all(test, not(loom))))]
pub(crate) fn version() -> u32 {
    VERSION
}

#[cfg(all(test, not(loom)))]
pub(crate) use next::version;

/// The next version, for tests of upgrades: it differs in its number only.
#[cfg(all(test, not(loom)))]
pub(crate) mod next {
    use std::sync::OnceLock;

    static IS_NEXT: OnceLock<()> = OnceLock::new();

    /// From now on this process is of the next version.
    pub(crate) fn begin() {
        IS_NEXT.get_or_init(|| ());
    }

    pub(crate) fn version() -> u32 {
        if IS_NEXT.get().is_some() { super::VERSION + 1 } else { super::VERSION }
    }
}

/// Where the changing words of the header begin.
pub(crate) const HEADER_WORDS_OFFSET: usize = BOOT_OFFSET;

/// The number of slots in `segment`.
pub(crate) const fn segment_slots(capacity: u64, segment: u32) -> u64 {
    capacity << segment
}

/// The first byte of `segment`; the end of a table that has `segment` segments.
pub(crate) const fn segment_offset(capacity: u64, segment: u32) -> u64 {
    let slots = capacity * ((1 << segment) - 1);
    // A line of tags for 128 slots; as many for each of the segments that are smaller.
    let line = SLOT_SIZE as u64;
    let small = if capacity < line { line.ilog2() - capacity.ilog2() } else { 0 };
    let tags =
        if segment <= small { segment as u64 } else { small as u64 + (slots - capacity * ((1 << small) - 1)) / line };
    HEADER_SIZE as u64 + (slots + tags) * line
}

/// How many segments fit into `size` bytes, counted from a segment 0 of `capacity` slots.
pub(crate) const fn segments_within(capacity: u64, size: u64) -> u32 {
    let mut segments = 0;
    while segment_offset(capacity, segments + 1) <= size {
        segments += 1;
    }
    segments
}

/// The oldest version with tables that this one can [replace](crate::TableOptions::replace_older): it can read their
/// header, keep updates from beginning, and retire their slots. So far these are the same for all versions.
pub(crate) const OLDEST: u32 = 1;

/// What is fixed when a table is created. Read once, checked, and kept outside the mapping: nothing that is written
/// into the file later can change it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FixedHeader {
    pub(crate) version: u32,
    pub(crate) capacity: u64,
    pub(crate) salt: [u8; 16],
    pub(crate) incarnation: [u8; 16],
    pub(crate) created: u64,
    pub(crate) floor: u64,
}

impl FixedHeader {
    /// Where a key that is new at `now`, in microseconds since the epoch, starts.
    ///
    /// At that time or at the floor, as the later of the two is later than all that was there before. If the clock was never set,
    /// or no floor can be higher, this cannot be known. Then it starts at a random generation, and the next table at another one.
    pub(crate) fn start(&self, now: u64) -> u64 {
        let random = u64_at(&self.incarnation, 0);
        let start = if now < UNSET_CLOCK { FIRST_START + random % (UNSET_CLOCK / 2) } else { now };
        match start.max(self.floor) {
            // Whatever the random number is, at least 2^52 generations are left above it.
            HIGHEST_FLOOR.. => HIGHEST_FLOOR + random % (HIGHEST_FLOOR / 2),
            start => start,
        }
    }

    /// The header page of a new, live table with one segment.
    pub(crate) fn encode(&self, boot: [u64; 2]) -> [u8; HEADER_SIZE] {
        let mut page = [0; HEADER_SIZE];
        let mut put = |offset: usize, bytes: &[u8]| page[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC);
        put(8, &self.version.to_le_bytes());
        put(12, &BYTE_ORDER.to_le_bytes());
        put(16, &(SLOT_SIZE as u32).to_le_bytes());
        put(20, &(HEADER_SIZE as u32).to_le_bytes());
        put(24, &self.capacity.to_le_bytes());
        put(32, &self.salt);
        put(48, &self.incarnation);
        put(64, &self.created.to_le_bytes());
        put(72, &self.floor.to_le_bytes());
        put(BOOT_OFFSET, &native64(boot[0]));
        put(BOOT_OFFSET + 8, &native64(boot[1]));
        put(STATE_OFFSET, &native32(LIVE));
        put(SEGMENTS_OFFSET, &native32(1));
        let sum = checksum(&page);
        page[CHECKED..CHECKED + 8].copy_from_slice(&sum);
        page
    }

    /// Reads and checks the header page of a file of `size` bytes. Also returns the number of segments.
    ///
    /// # Errors
    ///
    /// Names the first thing that is wrong, or a version that is older than `oldest`.
    pub(crate) fn decode(page: &[u8], size: u64, oldest: u32) -> Result<(Self, u32), ErrorKind> {
        let start = &page[..page.len().min(MAGIC.len())];
        if start != MAGIC {
            return Err(ErrorKind::NotATable { found: start.to_vec() });
        }
        if page.len() < HEADER_SIZE {
            return Err(ErrorKind::Truncated { found: size, expected: HEADER_SIZE as u64 });
        }
        let found = u32_at(page, 8);
        if !(oldest..=version()).contains(&found) {
            return Err(ErrorKind::LayoutVersion { found, expected: version() });
        }
        let order = u32_at(page, 12);
        if order != BYTE_ORDER {
            return Err(match order {
                1 | 2 => ErrorKind::ByteOrder { found: order, expected: BYTE_ORDER },
                _ => damaged("byte-order mark", u64::from(order), "1 or 2"),
            });
        }
        if page[CHECKED..CHECKED + 8] != checksum(page) {
            return Err(damaged("checksum of the header", u64_at(page, CHECKED), "the one that its fields give"));
        }
        let slot_size = u32_at(page, 16);
        if slot_size as usize != SLOT_SIZE {
            return Err(damaged("slot size", u64::from(slot_size), "128"));
        }
        let header_size = u32_at(page, 20);
        if header_size as usize != HEADER_SIZE {
            return Err(damaged("header size", u64::from(header_size), "4096"));
        }
        let capacity = u64_at(page, 24);
        if !capacity.is_power_of_two() || capacity > MAX_CAPACITY {
            return Err(damaged("capacity", capacity, "a power of two, at most 33554432"));
        }
        let floor = u64_at(page, 72);
        if floor > HIGHEST_FLOOR {
            return Err(damaged("floor", floor, "at most 9007199254740992"));
        }
        let state = changing_u32(page, STATE_OFFSET);
        if !(LIVE..=RETIRED).contains(&state) {
            return Err(damaged("state", u64::from(state), "1, 2 or 3"));
        }
        let segments = changing_u32(page, SEGMENTS_OFFSET);
        if segments == 0 || segments > segments_within(capacity, MAX_SIZE) {
            return Err(damaged("number of segments", u64::from(segments), "at least 1, of at most 8 GiB together"));
        }
        let expected = segment_offset(capacity, segments);
        if size < expected {
            return Err(ErrorKind::Truncated { found: size, expected });
        }
        let fixed = Self {
            version: found,
            capacity,
            salt: array_at(page, 32),
            incarnation: array_at(page, 48),
            created: u64_at(page, 64),
            floor,
        };
        Ok((fixed, segments))
    }
}

fn damaged(field: &'static str, found: u64, expected: &'static str) -> ErrorKind {
    ErrorKind::Damaged { field, found, expected }
}

fn checksum(page: &[u8]) -> [u8; 8] {
    array_at(&Sha256::digest(&page[..CHECKED]), 0)
}

fn array_at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[offset + i])
}

fn u32_at(page: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(array_at(page, offset))
}

fn u64_at(page: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(array_at(page, offset))
}

// The changing words are accessed as atomics, so they stand in the machine's own byte order, which the mark names.

#[expect(clippy::host_endian_bytes, reason = "the changing words are in the machine's byte order")]
fn changing_u32(page: &[u8], offset: usize) -> u32 {
    u32::from_ne_bytes(array_at(page, offset))
}

#[expect(clippy::host_endian_bytes, reason = "the changing words are in the machine's byte order")]
fn native32(value: u32) -> [u8; 4] {
    value.to_ne_bytes()
}

#[expect(clippy::host_endian_bytes, reason = "the changing words are in the machine's byte order")]
fn native64(value: u64) -> [u8; 8] {
    value.to_ne_bytes()
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn fixed(incarnation: u64, floor: u64) -> FixedHeader {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&incarnation.to_le_bytes());
        FixedHeader { version: 1, capacity: 1, salt: [0; 16], incarnation: bytes, created: 0, floor }
    }

    #[test]
    fn a_table_starts_at_the_time_or_its_floor_and_elsewhere_each_time_where_these_say_nothing() {
        const NOW: u64 = 1_800_000_000_000_000;
        let numbers = [0, 1, 0x9e37_79b9_7f4a_7c15, u64::MAX];
        let starts = |now, floor| numbers.map(|number| fixed(number, floor).start(now));
        assert_eq!(starts(NOW, 0), [NOW; 4]);
        assert_eq!(starts(NOW, NOW + 7), [NOW + 7; 4]);
        assert_eq!(starts(1, NOW), [NOW; 4], "the floor counts, whatever the clock says");
        for (now, floor) in [(1, 0), (UNSET_CLOCK - 1, 0), (NOW, HIGHEST_FLOOR), (u64::MAX, 0), (1, HIGHEST_FLOOR)] {
            let starts = starts(now, floor);
            assert!(starts.iter().all(|start| *start >= floor.max(FIRST_START)), "{starts:?}");
            assert!(starts.iter().all(|start| *start < HIGHEST_FLOOR + HIGHEST_FLOOR / 2), "{starts:?}");
            assert!(starts.windows(2).all(|pair| pair[0] != pair[1]), "{starts:?}");
            assert!(now >= UNSET_CLOCK || floor > 0 || starts.iter().all(|start| *start < UNSET_CLOCK), "{starts:?}");
        }
    }

    #[test]
    fn segments_follow_one_another() {
        for capacity in (0..=12).map(|power| 1 << power) {
            let mut end = HEADER_SIZE as u64;
            for segment in 0..14 {
                assert_eq!(segment_offset(capacity, segment), end, "segment {segment} behind {capacity} slots");
                let slots = segment_slots(capacity, segment);
                end += slots * SLOT_SIZE as u64 + slots.next_multiple_of(SLOT_SIZE as u64);
            }
        }
    }
}

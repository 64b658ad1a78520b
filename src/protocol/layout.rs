//! The file format, version 2.
//!
//! This text is the specification: a reader in another language can be written from it alone, and `tests/read_table.py` was.
//!
//! ```text
//! offset 0       header: one page of 4096 bytes
//! offset 4096    64 wake words of 4 bytes, each at the beginning of 64 bytes that it has for itself
//! offset 8192    segments, one behind the other, each of whole pages of 4096 bytes
//! ```
//!
//! The file ends where its last segment ends, or later (an anonymous table is sparse to its greatest size instead), and is
//! never greater than 8 GiB. It gets its name when it is complete, and is never made shorter. Numbers of the fixed part of the
//! header are little-endian; all other words are in the byte order of the machine that made the file, which the byte-order mark
//! names. A word has 8 bytes unless its size is given, and is aligned to its size. Every offset that is stored is counted from
//! the beginning of the file.
//!
//! Other processes write to the file at any time. So a word is loaded once, as a whole, and before what it leads to, which is
//! there if that load is an acquire.
//!
//! | header offset | bytes | fixed at creation |
//! |---|---|---|
//! | 0 | 8 | magic, `gensync` and a zero byte |
//! | 8 | 4 | layout version: 2 |
//! | 12 | 4 | byte-order mark: 1 little-endian, 2 big-endian |
//! | 16 | 4 | bytes of a slot, in all lanes together: 33 |
//! | 20 | 4 | where the segments begin: 8192 |
//! | 24 | 8 | capacity C, the number of slots of the first segment of slots: a power of two, at least 16 and at most 2^25 |
//! | 32 | 16 | salt of the digests, random |
//! | 48 | 16 | incarnation, random |
//! | 64 | 8 | creation time, microseconds since the epoch |
//! | 72 | 8 | floor: no key of this table starts at a lower generation; at most 2^53, from where on keys start at random, below 2^53 + 2^52 |
//! | 80 | 8 | checksum: the first 8 bytes of the SHA-256 of the 80 bytes before it |
//!
//! | header offset | bytes | changes |
//! |---|---|---|
//! | 128 | 16 | boot id: the boot in which the table was last opened for the first time, a number of 128 bits in two words, the high one first; zeros if the kernel has told none |
//! | 144 | 4 | state: 1 live, 2 retiring, 3 retired |
//! | 192 | 16 | lease: two words, owner and end in milliseconds of CLOCK_BOOTTIME; zeros, and reserved |
//! | 256 | 4 | wake word of the table, alone in 128 bytes: for waiters for several keys, or for any |
//! | 1024 | 2048 | directory: 256 words, see below |
//!
//! Bytes that belong to no field are zero when the table is made, and are neither read nor changed later.
//!
//! # Segments
//!
//! Word i of the directory describes segment i: bits 7..0 are its kind (1 slots, 2 texts, 3 participants), bits 63..8 are its
//! pages, of which there is one at least. The first word that is zero ends the directory; another kind, or a segment that ends
//! beyond the end of the file, is damage. Segment 0 begins at 8192, and each other one where the one before it ends. A word is
//! written once, when the file has been made as long as it says. A new table has C slots in segment 0, and room for texts in
//! segment 1.
//!
//! **Slots.** The first segment of this kind has C slots, and number k > 0 has C * 2^(k-1), so each doubles the table. A slot is
//! spread over four lanes, so that what a check reads is dense. In a segment of n slots that begins at offset o, slot i has
//!
//! | offset | bytes | |
//! |---|---|---|
//! | o + 8 i | 8 | generation word |
//! | o + 8 n + 16 i | 16 | digest: words A and B, see below |
//! | o + 24 n + 8 i | 8 | record word: bits 33..0 are the offset of the key's record, bits 63..34 the length of the key in bytes (2^30 - 1: that or more). 0: there is no record yet |
//! | o + 32 n + i | 1 | tag: the most significant byte of word B; 1 if that is zero. 0: none yet |
//!
//! The lanes take 33 n bytes, filled up to whole pages.
//!
//! The digest of a key is that of the salt's 16 bytes and the key's bytes, one behind the other, by SHA-256. Its first 8 bytes,
//! read as a little-endian number, are A, and the next 8 are B; a number that is zero is replaced by 1. Both are stored as all
//! words are. Where a digest is printed, A comes first, each in 16 hexadecimal digits.
//!
//! The generation word: in bits 63..56, the number of pending updates (255: that many or more, and it stays so until all have
//! ended); bit 55, the waiting bit, says that a waiter may sleep; bit 54, the retired bit, that the table has a successor; bits
//! 53..0 are the generation, which is never below 2^40. The number of updates of a key is its generation minus its first one,
//! modulo 2^54.
//!
//! A slot whose word A is zero is free. A key is there when its generation word has a generation; then it has its digest and its
//! record, which are to be loaded after that. Until then, its claim is under way, or was given up: word B, the tag and the
//! record may be missing. If a table is retired, a slot whose key has not begun has the retired bit, and no generation. A key that
//! is claimed behind the sweep of a retiring table may have a generation without the bit: the state in the header decides.
//!
//! A tag that is not zero says that its slot belongs for ever to a key with this byte. A tag may be missing. A search so compares
//! the tags of 16 slots at once, and loads the digests only of those that may be its key's.
//!
//! In segment number k (of slots) of n slots, the key with the words A and B may stand in one *line* only, that is 64 slots (n, if
//! that is less) whose tags share a cache line: with m lines, and `place` for A + k * B modulo 2^64, in line `place mod m`, which
//! begins with slot 64 * (place mod m). The slots of a line form groups of 16. With g groups in a line, they are searched in this
//! order for i = 0 to g - 1: group `(place / 2^60 + i) mod g` of the line (`place / 2^60` is rounded down). Within a group, slots
//! are taken in ascending order. A key stands in the first segment, and there in the first slot, that was free for it. No slot
//! becomes free again, so a search in this order ends at the first free slot.
//!
//! **Texts.** The first word of the segment is the number of bytes that are taken, counted from 64 bytes behind the segment's
//! beginning; from there on, records follow one another. A record is the key's first generation, one word, and the key's text: its first
//! 65,536 bytes, or all of them if it is shorter, in their own order on any machine, and filled up to whole words with zeros. A key
//! has one byte at least, is UTF-8, and its text may end within a character where the key is longer. A record is written before a
//! record word leads to it, and not changed later, except when the table is renewed after a reboot: then the first generation is
//! moved as far as the generation, right after it. Records that nothing leads to are left by processes that were killed, or lost
//! a race.
//!
//! **Participants.** Reserved: this version makes no such segment, and passes over it. Records of 32 bytes: process id, start
//! time, slot, and generation adopted, one word each.
//!
//! # Waiting
//!
//! A wake word is a count that processes sleep on, as on a futex that is shared between processes. Its lowest bit says that a
//! process sleeps, or is about to. A process that wakes the sleepers finds that bit and adds 1, or leaves the word alone. A
//! process that updates a key and finds bit 55 clears it, and then wakes both the key's sleepers and the table's. The table's
//! are also woken by a new key, when it has begun, and by the end of the table. The sleepers for a key use wake word number
//! (offset of its generation word / 8) mod 64, at offset 4096 + 64 * number; so keys may share one, and a waiter that is woken
//! looks for itself.
//!
//! # Locks
//!
//! Locks on the file, of open file descriptions. Most are on offsets beyond any file, where each kind has a range of its own:
//! locks need no bytes there, and do not meet those of other kinds.
//!
//! | bytes | kind | held by |
//! |---|---|---|
//! | 2^40 + the offset of a generation word, 8 bytes | shared | each process that has an update of the key pending |
//! | the same | exclusive | a process that clears the pending updates of dead ones |
//! | 2^40 to 2^41 | exclusive | a process that begins to retire the table |
//! | 2^41 + the offset of a digest, 16 bytes | | reserved for loaders of shared values |
//! | 3 * 2^40 + the offset of a record, 32 bytes | | reserved for participants |
//! | 144 to 147, the state | exclusive | a process that waits for the lock on all updates: updates that are about to begin let it go first, for some milliseconds |
//! | 0 to 127, the fixed header | exclusive | a process that replaces the file, or renews it after a reboot |
//! | 128 to 143, the boot id | shared | each process that has the table open, until the description through which it has mapped the file is closed |
//! | 128 to 143, the boot id | exclusive | a process that renews the table after a reboot, as no other has it open |
//!
//! A boot id alone does not show that there was a reboot: ids differ between containers of one boot, and may be hidden. But no
//! process has a table open across a reboot. So a table of another boot is renewed by a process that has exclusive locks on the
//! boot id and on all updates.
//!
//! A process that may only read the file cannot have any of the exclusive locks, but its shared locks can keep other processes
//! from having them. So a shared lock means nothing unless it looks like an update's: of an open file description, on exactly
//! the 8 bytes of one key. Beside foreign locks, pending updates are cleared by one compare-exchange: of the generation word
//! that was read before `/proc/locks` was found to have no update's lock. A table is retired when nothing has been pending for a
//! tenth of a second, and a file is replaced without the lock.
//!
//! # Versions
//!
//! In every version, the magic, the layout version and the checksum stand where they are here. Each version knows where the
//! earlier ones have the state, the generation words and the locks, which is what it takes to retire such a table; see
//! [`version_1`].

use crate::protocol::atomic::{AtomicU32, AtomicU64};
use crate::protocol::wake::WakeWord;

pub(crate) const MAGIC: [u8; 8] = *b"gensync\0";
/// The version that this process writes, and the newest that it reads.
pub(crate) const VERSION: u32 = 2;
pub(crate) const HEADER_SIZE: usize = 4096;
/// The unit of segments, whatever the machine's pages are.
pub(crate) const PAGE: u64 = 4096;
pub(crate) const WAKE_WORDS: usize = 64;
pub(crate) const WAKE_WORDS_OFFSET: usize = HEADER_SIZE;
/// Where the segments begin.
pub(crate) const SEGMENTS_OFFSET: u64 = 8192;
/// What a slot takes, in all lanes together.
pub(crate) const SLOT_BYTES: u64 = 33;

/// The greatest size of a table.
pub(crate) const MAX_SIZE: u64 = 8 << 30;
pub(crate) const LEAST_CAPACITY: u64 = GROUP as u64;
/// The greatest capacity. The table may double twice more before it reaches its greatest size.
pub(crate) const MAX_CAPACITY: u64 = 1 << 25;

/// How many slots a search looks at one after another, before it goes on to others of the line.
pub(crate) const GROUP: usize = 16;
/// How many slots have their tags in one cache line. A key may stand in one line of each segment.
///
/// Simulated: tables that grow from 1024 slots to 16 million grow when 0.76 to 0.92 of all their slots are in use; small ones
/// scatter more, and the first segment of 1024 slots may be left at 719 keys. With two lines in each segment it would be 0.83 to
/// 0.94, and with four 0.89 to 0.99. But a search for a new key reads each of these lines in each segment that is full, and a
/// million keys would take some four times as long to create.
pub(crate) const LINE: usize = 64;

/// How many bytes of a key are kept.
pub(crate) const MAX_TEXT: usize = 65_536;

/// Where the locks of updates are, for each the offset of a generation word further on.
pub(crate) const UPDATE_LOCKS: u64 = 1 << 40;
pub(crate) const UPDATE_LOCK_SIZE: u64 = size_of::<u64>() as u64;

/// The year 2255, in microseconds since the epoch. No floor is higher, whatever is written in the slots of its predecessor:
/// above it, there are as many generations again.
pub(crate) const HIGHEST_FLOOR: u64 = 1 << 53;

pub(crate) const LIVE: u32 = 1;
pub(crate) const RETIRING: u32 = 2;
pub(crate) const RETIRED: u32 = 3;

/// Where the changing words of the header begin, with the boot id.
pub(crate) const HEADER_WORDS_OFFSET: usize = 128;
pub(crate) const STATE_OFFSET: usize = 144;
pub(crate) const DIRECTORY_OFFSET: usize = 1024;
/// In version 1, where the number of segments is.
pub(crate) const VERSION_1_SEGMENTS_OFFSET: usize = 148;

/// The words of the header that change while the table is in use, up to the directory. The same in versions 1 and 2.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct Header {
    pub(crate) boot: [AtomicU64; 2],
    pub(crate) state: AtomicU32,
    /// In version 1, the number of segments.
    pub(crate) segments_of_version_1: AtomicU32,
    pub(crate) wake: TableWakeWord,
}

/// The table's wake word in cache lines of its own: every update that has waiters to wake reads it, and it is written only if
/// a process sleeps on it.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct TableWakeWord {
    pub(crate) word: WakeWord,
}

/// A wake word in a cache line of its own.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct WakeLine {
    pub(crate) word: WakeWord,
}

#[cfg(not(loom))]
const _: () = {
    use std::mem::{align_of, offset_of, size_of};
    assert!(offset_of!(Header, boot) == 0);
    assert!(HEADER_WORDS_OFFSET + offset_of!(Header, state) == STATE_OFFSET);
    assert!(HEADER_WORDS_OFFSET + offset_of!(Header, segments_of_version_1) == VERSION_1_SEGMENTS_OFFSET);
    assert!(HEADER_WORDS_OFFSET + offset_of!(Header, wake) == 256);
    assert!(HEADER_WORDS_OFFSET + size_of::<Header>() <= DIRECTORY_OFFSET);
    assert!(HEADER_WORDS_OFFSET.is_multiple_of(align_of::<Header>()));
    assert!(WAKE_WORDS_OFFSET + WAKE_WORDS * size_of::<WakeLine>() == SEGMENTS_OFFSET as usize);
};

/// The oldest version with tables that this one can [replace](crate::TableOptions::replace_older): it can read their
/// header, keep updates from beginning, and retire their slots.
pub(crate) const OLDEST: u32 = 1;

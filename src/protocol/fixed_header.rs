//! The header of a table's file as bytes: what is fixed when the table is created, and where its segments are.

use sha2::{Digest as _, Sha256};

use crate::error::{ErrorKind, damaged};
use crate::protocol::directory::{self, Extent, Outline};
use crate::protocol::layout::{
    DIRECTORY_OFFSET, HEADER_SIZE, HEADER_WORDS_OFFSET, HIGHEST_FLOOR, LEAST_CAPACITY, LIVE, MAGIC, MAX_CAPACITY,
    RETIRED, SEGMENTS_OFFSET, SLOT_BYTES, STATE_OFFSET, VERSION, VERSION_1_SEGMENTS_OFFSET,
};
use crate::protocol::version_1;

/// September 2005, in microseconds since the epoch: a clock that says less was not set since the machine was started.
const UNSET_CLOCK: u64 = 1 << 50;

/// Where keys start at the earliest.
const FIRST_START: u64 = 1 << 40;

const BYTE_ORDER: u32 = if cfg!(target_endian = "little") { 1 } else { 2 };
const CHECKED: usize = 80;

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

    /// The header page of a new, live table with its first two segments.
    pub(crate) fn encode(&self, boot: [u64; 2]) -> [u8; HEADER_SIZE] {
        let mut page = [0; HEADER_SIZE];
        let mut put = |offset: usize, bytes: &[u8]| page[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC);
        put(8, &self.version.to_le_bytes());
        put(12, &BYTE_ORDER.to_le_bytes());
        put(16, &(SLOT_BYTES as u32).to_le_bytes());
        put(20, &(SEGMENTS_OFFSET as u32).to_le_bytes());
        put(24, &self.capacity.to_le_bytes());
        put(32, &self.salt);
        put(48, &self.incarnation);
        put(64, &self.created.to_le_bytes());
        put(72, &self.floor.to_le_bytes());
        put(HEADER_WORDS_OFFSET, &native64(boot[0]));
        put(HEADER_WORDS_OFFSET + 8, &native64(boot[1]));
        put(STATE_OFFSET, &native32(LIVE));
        for (index, word) in directory::of_new_table(self.capacity).into_iter().enumerate() {
            put(DIRECTORY_OFFSET + 8 * index, &native64(word));
        }
        let sum = checksum(&page);
        page[CHECKED..CHECKED + 8].copy_from_slice(&sum);
        page
    }

    /// Reads and checks the header page of a file of `size` bytes. Also returns where its segments are.
    ///
    /// # Errors
    ///
    /// Names the first thing that is wrong, or a version that is older than `oldest`.
    pub(crate) fn decode(page: &[u8], size: u64, oldest: u32) -> Result<(Self, Vec<Extent>), ErrorKind> {
        let start = &page[..page.len().min(MAGIC.len())];
        if start != MAGIC {
            return Err(ErrorKind::NotATable { found: start.to_vec() });
        }
        if page.len() < HEADER_SIZE {
            return Err(ErrorKind::Truncated { found: size, expected: HEADER_SIZE as u64 });
        }
        let found = u32_at(page, 8);
        if !(oldest..=VERSION).contains(&found) {
            return Err(ErrorKind::LayoutVersion { found, expected: VERSION });
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
        let is_of_version_1 = found == version_1::VERSION;
        let (slot_bytes, segments_offset) = (u32_at(page, 16), u32_at(page, 20));
        match is_of_version_1 {
            true if slot_bytes as usize != version_1::SLOT_SIZE => {
                return Err(damaged("slot size", slot_bytes.into(), "128"));
            }
            true if segments_offset as usize != HEADER_SIZE => {
                return Err(damaged("header size", segments_offset.into(), "4096"));
            }
            false if u64::from(slot_bytes) != SLOT_BYTES => {
                return Err(damaged("slot size", slot_bytes.into(), "33"));
            }
            false if u64::from(segments_offset) != SEGMENTS_OFFSET => {
                return Err(damaged("beginning of the segments", segments_offset.into(), "8192"));
            }
            _ => {}
        }
        let capacity = u64_at(page, 24);
        let least = if is_of_version_1 { 1 } else { LEAST_CAPACITY };
        if !capacity.is_power_of_two() || !(least..=MAX_CAPACITY).contains(&capacity) {
            let expected = match is_of_version_1 {
                true => "a power of two, at most 33554432",
                false => "a power of two, at least 16 and at most 33554432",
            };
            return Err(damaged("capacity", capacity, expected));
        }
        let floor = u64_at(page, 72);
        if floor > HIGHEST_FLOOR {
            return Err(damaged("floor", floor, "at most 9007199254740992"));
        }
        let state = changing_u32(page, STATE_OFFSET);
        if !(LIVE..=RETIRED).contains(&state) {
            return Err(damaged("state", u64::from(state), "1, 2 or 3"));
        }
        let extents = match is_of_version_1 {
            true => version_1::extents(capacity, changing_u32(page, VERSION_1_SEGMENTS_OFFSET))?,
            false => directory::extents(capacity, |index| changing_u64(page, DIRECTORY_OFFSET + 8 * index))?,
        };
        let expected = extents.last().map_or(SEGMENTS_OFFSET, Extent::end);
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
        Ok((fixed, extents))
    }

    pub(crate) fn is_of_version_1(&self) -> bool {
        self.version == version_1::VERSION
    }

    /// A table of this kind before its first segment.
    pub(crate) fn outline(&self) -> Outline {
        Outline::new(if self.is_of_version_1() { HEADER_SIZE as u64 } else { SEGMENTS_OFFSET })
    }
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
fn changing_u64(page: &[u8], offset: usize) -> u64 {
    u64::from_ne_bytes(array_at(page, offset))
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
        FixedHeader { version: VERSION, capacity: 16, salt: [0; 16], incarnation: bytes, created: 0, floor }
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
}

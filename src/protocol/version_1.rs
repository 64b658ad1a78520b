//! File format version 1, as far as it takes to retire such a table.
//!
//! The header is that of version 2 up to offset 1023, with these differences: the slot size (offset 16) is 128, the header size
//! (offset 20) is 4096, the capacity is 1 or more, and offset 148 has the number of segments, 4 bytes, which only grows. There
//! is no directory. Segments begin at 4096: segment k has C * 2^k slots of 128 bytes and then a byte for each of them, filled up
//! to 128.
//!
//! | slot offset | bytes | |
//! |---|---|---|
//! | 0 | 8 | generation word, as in version 2 |
//! | 8 | 16 | digest, as in version 2 |
//! | 24 | 4 | wake word: for waiters for this key |
//! | 28 | 100 | for people: the first generation, and the key's beginning |
//!
//! An update shares a lock on its slot's 128 bytes; a process that retires the table locks all bytes from 4096 on. The other
//! locks, and the protocol of the generation word, the state and the wake words, are those of version 2.

use crate::error::{ErrorKind, damaged};
use crate::protocol::directory::{Extent, Kind};
use crate::protocol::generation_word::GenerationWord;
use crate::protocol::layout::{HEADER_SIZE, MAX_SIZE};
use crate::protocol::slot_digest::SlotDigest;
use crate::protocol::wake::WakeWord;

pub(crate) const VERSION: u32 = 1;
pub(crate) const SLOT_SIZE: usize = 128;

/// A slot of version 1.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct Slot {
    pub(crate) generation: GenerationWord,
    pub(crate) digest: SlotDigest,
    pub(crate) wake: WakeWord,
}

#[cfg(not(loom))]
const _: () = {
    use std::mem::{offset_of, size_of};
    assert!(size_of::<Slot>() == SLOT_SIZE);
    assert!(offset_of!(Slot, generation) == 0);
    assert!(offset_of!(Slot, digest) == 8);
    assert!(offset_of!(Slot, wake) == 24);
};

/// Segment number `segment`.
pub(crate) fn extent(capacity: u64, segment: u32) -> Option<Extent> {
    // Checked arithmetic: how many segments there are is read from the file.
    let slots = |segment: u32| capacity.checked_mul(1_u64.checked_shl(segment)?);
    let bytes = |segment: u32| {
        let slots = slots(segment)?;
        slots.checked_mul(SLOT_SIZE as u64)?.checked_add(slots.checked_next_multiple_of(SLOT_SIZE as u64)?)
    };
    let mut offset = HEADER_SIZE as u64;
    for before in 0..segment {
        offset = offset.checked_add(bytes(before)?).filter(|offset| *offset <= MAX_SIZE)?;
    }
    let extent =
        Extent { kind: Kind::SlotsOfVersion1, number: segment, offset, bytes: bytes(segment)?, slots: slots(segment)? };
    (extent.end() <= MAX_SIZE).then_some(extent)
}

/// All segments of a table that says that it has `segments`.
pub(crate) fn extents(capacity: u64, segments: u32) -> Result<Vec<Extent>, ErrorKind> {
    let extents: Option<Vec<_>> = (0..segments.min(64)).map(|segment| extent(capacity, segment)).collect();
    match extents {
        Some(extents) if segments > 0 => Ok(extents),
        _ => Err(damaged("number of segments", u64::from(segments), "at least 1, of at most 8 GiB together")),
    }
}

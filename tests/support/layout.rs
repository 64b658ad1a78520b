//! Where things stand in a file of version 2, found as the specification in `src/protocol/layout.rs` says, and not by its code.

#![allow(dead_code, reason = "each test file, and the fuzzer, uses a part of it")]

use sha2::{Digest as _, Sha256};

pub(crate) const DIRECTORY: usize = 1024;
pub(crate) const SEGMENTS: usize = 8192;
pub(crate) const PAGE: usize = 4096;

/// A segment: its kind (1 slots, 2 texts, 3 participants), its first byte, and how many bytes and slots it has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    pub(crate) kind: u64,
    pub(crate) start: usize,
    pub(crate) bytes: usize,
    pub(crate) slots: usize,
}

/// Where the words of a slot stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) generation: usize,
    pub(crate) digest: usize,
    pub(crate) record: usize,
    pub(crate) tag: usize,
}

pub(crate) fn word(file: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(file[offset..offset + 8].try_into().unwrap())
}

pub(crate) fn put(file: &mut [u8], offset: usize, word: u64) {
    file[offset..offset + 8].copy_from_slice(&word.to_le_bytes());
}

pub(crate) fn directory_word(kind: u64, pages: u64) -> u64 {
    pages << 8 | kind
}

/// How many slots the segment of slots with this number has.
pub(crate) fn slots_of(capacity: usize, number: u32) -> usize {
    capacity << number.saturating_sub(1)
}

/// How many pages a segment of so many slots takes.
pub(crate) fn pages_of_slots(slots: usize) -> u64 {
    (33 * slots).div_ceil(PAGE) as u64
}

/// The segments of a good file.
pub(crate) fn segments(file: &[u8]) -> Vec<Segment> {
    let (mut start, mut number, capacity) = (SEGMENTS, 0, word(file, 24) as usize);
    let words = (0..256).map(|index| word(file, DIRECTORY + 8 * index)).take_while(|word| *word != 0);
    let segment = |word: u64| {
        let (kind, bytes) = (word & 0xff, (word >> 8) as usize * PAGE);
        let slots = if kind == 1 { slots_of(capacity, number) } else { 0 };
        number += u32::from(kind == 1);
        let segment = Segment { kind, start, bytes, slots };
        start += bytes;
        segment
    };
    words.map(segment).collect()
}

pub(crate) fn of_kind(file: &[u8], kind: u64) -> Vec<Segment> {
    segments(file).into_iter().filter(|segment| segment.kind == kind).collect()
}

/// All slots, free ones included.
pub(crate) fn places(file: &[u8]) -> Vec<Place> {
    let place = |segment: &Segment, i: usize| {
        let (o, n) = (segment.start, segment.slots);
        Place { generation: o + 8 * i, digest: o + 8 * n + 16 * i, record: o + 24 * n + 8 * i, tag: o + 32 * n + i }
    };
    of_kind(file, 1)
        .iter()
        .flat_map(|segment| (0..segment.slots).map(|i| place(segment, i)).collect::<Vec<_>>())
        .collect()
}

/// The slots that are claimed or half claimed.
pub(crate) fn claimed(file: &[u8]) -> Vec<Place> {
    places(file).into_iter().filter(|place| word(file, place.digest) != 0).collect()
}

/// The slot of a key that is there.
pub(crate) fn place_of(file: &[u8], key: &str) -> Option<Place> {
    let digest = digest(file, key);
    claimed(file).into_iter().find(|place| [word(file, place.digest), word(file, place.digest + 8)] == digest)
}

/// The words A and B of a key in this file.
pub(crate) fn digest(file: &[u8], key: &str) -> [u64; 2] {
    let digest = Sha256::new().chain_update(&file[32..48]).chain_update(key).finalize();
    [word(&digest, 0).max(1), word(&digest, 8).max(1)]
}

/// Corrects the checksum of a header.
pub(crate) fn seal(content: &mut [u8]) {
    let sum = Sha256::digest(&content[..80]);
    content[80..88].copy_from_slice(&sum[..8]);
}

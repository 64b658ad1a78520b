//! A list by numbers, in which nothing ever moves.

#![expect(unsafe_code, reason = "keeps pieces of memory behind pointers; each block states the fact relied on")]

use std::ptr::{null_mut, slice_from_raw_parts_mut};

use super::chain::Published;
use crate::protocol::directory::SEGMENTS;

/// Pointers by the numbers of segments, each null until it is set.
///
/// Room for them is made in pieces when it is needed, each as long as all before it: a process keeps what it has mapped of a
/// table that was replaced, and most tables have few segments.
#[derive(Debug)]
pub(super) struct List<T>([Published<Published<T>>; PIECES]);

/// How many entries the first piece has.
const FIRST: usize = 4;
const PIECES: usize = 7;
#[cfg(not(loom))]
const _: () = assert!(FIRST << (PIECES - 1) == SEGMENTS);

/// The piece that entry `index` is in, and its place there.
fn place(index: u32) -> (usize, usize) {
    let index = index as usize;
    let piece = (index / FIRST).checked_ilog2().map_or(0, |power| power as usize + 1);
    (piece, if piece == 0 { index } else { index - length(piece) })
}

fn length(piece: usize) -> usize {
    FIRST << piece.saturating_sub(1)
}

impl<T> List<T> {
    pub(super) fn new() -> Self {
        Self(std::array::from_fn(|_| Published::new(null_mut())))
    }

    /// What entry `index` is set to; null if it is not set.
    pub(super) fn get(&self, index: u32) -> *mut T {
        let (piece, within) = place(index);
        let entries = self.0[piece].get();
        // SAFETY: null, or a piece that was complete before it was published, and that only `drop` frees; `place` gives no
        // more than its length.
        if entries.is_null() { null_mut() } else { unsafe { &*entries.add(within) }.get() }
    }

    /// Entry `index`.
    pub(super) fn entry(&self, index: u32) -> &Published<T> {
        let (piece, within) = place(index);
        if self.0[piece].get().is_null() {
            let entries: Box<[Published<T>]> = (0..length(piece)).map(|_| Published::new(null_mut())).collect();
            let entries = Box::into_raw(entries);
            if !self.0[piece].replace(null_mut(), entries.cast()) {
                // SAFETY: it was made just now; another thread published its own first.
                drop(unsafe { Box::from_raw(entries) });
            }
        }
        // SAFETY: as in `get`, and the piece was published by now.
        unsafe { &*self.0[piece].get().add(within) }
    }
}

impl<T> Drop for List<T> {
    fn drop(&mut self) {
        for (piece, entries) in self.0.iter().map(Published::get).enumerate().filter(|(_, entries)| !entries.is_null())
        {
            // SAFETY: it came from a Box of that length, and nothing borrows from a list that is being dropped.
            drop(unsafe { Box::from_raw(slice_from_raw_parts_mut(entries, length(piece))) });
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn each_entry_has_a_place_of_its_own() {
        let list = List::<u32>::new();
        let mut values: Vec<u32> = (0..SEGMENTS as u32).collect();
        assert!((0..SEGMENTS as u32).all(|index| list.get(index).is_null()));
        for index in [255, 0, 3, 4, 7, 8, 127, 128].into_iter().chain(0..SEGMENTS as u32) {
            list.entry(index).set(&raw mut values[index as usize]);
        }
        // SAFETY: each leads to a value of the vector.
        assert!((0..SEGMENTS as u32).all(|index| unsafe { *list.get(index) } == index));
    }
}

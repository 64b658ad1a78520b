//! Where a table's segments are: a list that only grows.

use crate::error::{ErrorKind, damaged};
use crate::protocol::atomic::{AtomicU64, Ordering, fence};
use crate::protocol::layout::{MAX_SIZE, PAGE, SEGMENTS_OFFSET, SLOT_BYTES};

/// How many segments there may be. A table that doubles its slots, and adds an eighth to its texts, reaches its greatest size
/// with 135 of them at most.
#[cfg(not(loom))]
pub(crate) const SEGMENTS: usize = 256;
/// A model checker keeps track of each.
#[cfg(loom)]
pub(crate) const SEGMENTS: usize = 8;

/// How many bytes of texts a new table has room for, for each slot: the record of a key of 20 bytes.
const TEXT_BYTES_OF_SLOT: u64 = 32;

/// The words of the directory.
#[derive(Debug)]
#[repr(transparent)]
pub(crate) struct Directory {
    pub(crate) words: [AtomicU64; SEGMENTS],
}

impl Directory {
    /// The word of segment `index`; zero if there is no such segment.
    pub(crate) fn get(&self, index: u32) -> u64 {
        let Some(word) = self.words.get(index as usize) else { return 0 };
        // ORDERING: acquire pairs with the release in `append`: a process that sees the word sees the room that was made behind
        // it. A relaxed load and a fence, since memory that is mapped read-only allows no other loads.
        let word = word.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        word
    }

    /// Publishes segment `index`, for which there is room. `false` if another process has published one there: a word that was
    /// published never changes.
    pub(crate) fn append(&self, index: u32, word: u64) -> bool {
        // ORDERING: release pairs with the fence in `get`: the room was made before. Relaxed on failure: the caller reads the
        // word by `get`, which acquires, before it uses the segment.
        self.words[index as usize].compare_exchange(0, word, Ordering::Release, Ordering::Relaxed).is_ok()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Slots,
    Texts,
    Participants,
    SlotsOfVersion1,
}

/// Where a segment is in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) kind: Kind,
    /// How many segments of its kind come before it.
    pub(crate) number: u32,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    /// How many slots it has.
    pub(crate) slots: u64,
}

impl Extent {
    pub(crate) fn end(&self) -> u64 {
        self.offset + self.bytes
    }
}

/// The segments of a table up to one of them, counted by kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outline {
    pub(crate) segments: u32,
    /// How many of them have slots.
    pub(crate) slots: u32,
    /// How many of them have texts.
    pub(crate) texts: u32,
    text_pages: u64,
    /// Where the next segment begins.
    pub(crate) end: u64,
}

impl Outline {
    /// No segments: the first one begins at `start`.
    pub(crate) fn new(start: u64) -> Self {
        Self { segments: 0, slots: 0, texts: 0, text_pages: 0, end: start }
    }

    /// The segment that `word` in the directory of a table of this `capacity` describes, if it is the next one.
    ///
    /// # Errors
    ///
    /// There is no such segment, or it would end beyond the greatest size of a table.
    pub(crate) fn next(&self, capacity: u64, word: u64) -> Result<Extent, ErrorKind> {
        let refuse = |expected| Err(damaged("directory", word, expected));
        let pages = pages_of(word);
        let (kind, number) = match word & 0xff {
            SLOTS => (Kind::Slots, self.slots),
            TEXTS => (Kind::Texts, self.texts),
            PARTICIPANTS => (Kind::Participants, 0),
            _ => return refuse("a segment of slots, texts or participants: 1, 2 or 3 in its lowest byte"),
        };
        if pages == 0 || pages > (MAX_SIZE - self.end) / PAGE {
            return refuse("segments of at least one page, that end within 8 GiB");
        }
        let slots = if kind == Kind::Slots { slots_of(capacity, number) } else { 0 };
        if kind == Kind::Slots && pages != pages_of_slots(slots) {
            return refuse("twice as many slots with each segment of slots, and as many pages as they take");
        }
        Ok(Extent { kind, number, offset: self.end, bytes: pages * PAGE, slots })
    }

    /// With `extent`, the next one.
    pub(crate) fn with(mut self, extent: &Extent) -> Self {
        self.segments += 1;
        self.end = extent.end();
        match extent.kind {
            Kind::Slots | Kind::SlotsOfVersion1 => self.slots += 1,
            Kind::Texts => {
                self.texts += 1;
                self.text_pages += extent.bytes / PAGE;
            }
            Kind::Participants => {}
        }
        self
    }

    /// The word of a further segment of slots.
    pub(crate) fn more_slots(&self, capacity: u64) -> u64 {
        word(SLOTS, pages_of_slots(slots_of(capacity, self.slots)))
    }

    /// The word of a further segment of texts, with room for `bytes` at least.
    pub(crate) fn more_texts(&self, bytes: u64) -> u64 {
        // In small steps, as the texts are a great part of a table; each step is a mapping in every process.
        word(TEXTS, (self.text_pages / 8).max(bytes.div_ceil(PAGE)).max(1))
    }
}

/// How many slots the segment of that `number` among those with slots has.
fn slots_of(capacity: u64, number: u32) -> u64 {
    capacity << number.saturating_sub(1).min(31)
}

fn pages_of_slots(slots: u64) -> u64 {
    (slots * SLOT_BYTES).div_ceil(PAGE)
}

// The kinds of segments, in the lowest byte of a word.
const SLOTS: u64 = 1;
const TEXTS: u64 = 2;
const PARTICIPANTS: u64 = 3;

fn word(kind: u64, pages: u64) -> u64 {
    pages << 8 | kind
}

fn pages_of(word: u64) -> u64 {
    word >> 8
}

/// The directory of a new table.
pub(crate) fn of_new_table(capacity: u64) -> [u64; 2] {
    let outline = Outline::new(SEGMENTS_OFFSET);
    [outline.more_slots(capacity), outline.more_texts(capacity * TEXT_BYTES_OF_SLOT)]
}

/// Where the last segment of a new table ends.
pub(crate) fn end_of_new_table(capacity: u64) -> u64 {
    SEGMENTS_OFFSET + of_new_table(capacity).map(pages_of).iter().sum::<u64>() * PAGE
}

/// Where the segments are that the words of a directory describe.
///
/// # Errors
///
/// A word describes a segment that cannot be, or there is none of slots.
pub(crate) fn extents(capacity: u64, word: impl Fn(usize) -> u64) -> Result<Vec<Extent>, ErrorKind> {
    let (mut extents, mut outline) = (Vec::new(), Outline::new(SEGMENTS_OFFSET));
    for word in (0..SEGMENTS).map(word).take_while(|word| *word != 0) {
        let extent = outline.next(capacity, word)?;
        outline = outline.with(&extent);
        extents.push(extent);
    }
    if outline.slots == 0 { Err(damaged("directory", 0, "at least one segment of slots")) } else { Ok(extents) }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::protocol::layout::{LEAST_CAPACITY, MAX_CAPACITY};

    #[test]
    fn segments_follow_one_another_and_fill_the_greatest_table_before_the_directory_is_full() {
        for power in 0..22 {
            let capacity = LEAST_CAPACITY << power;
            assert!(capacity <= MAX_CAPACITY);
            let (mut outline, mut slots) = (Outline::new(SEGMENTS_OFFSET), 0);
            let mut words = Vec::from(of_new_table(capacity)).into_iter();
            // Then as many texts as keys of 20 bytes need that fill nine tenths of the slots.
            let more = |outline: Outline, slots| match outline.text_pages * PAGE / TEXT_BYTES_OF_SLOT < slots * 9 / 10 {
                true => outline.more_texts(1),
                false => outline.more_slots(capacity),
            };
            while let Ok(extent) = outline.next(capacity, words.next().unwrap_or_else(|| more(outline, slots))) {
                assert_eq!((extent.offset, extent.offset % PAGE), (outline.end, 0));
                assert!(extent.kind != Kind::Slots || extent.slots * SLOT_BYTES <= extent.bytes);
                slots += extent.slots;
                outline = outline.with(&extent);
            }
            assert!((outline.segments as usize) < SEGMENTS * 2 / 3, "{} segments", outline.segments);
            assert!(outline.end > MAX_SIZE / 3);
        }
    }

    #[test]
    fn a_word_that_describes_no_possible_segment_is_refused() {
        let outline = Outline::new(SEGMENTS_OFFSET);
        let most = (MAX_SIZE - SEGMENTS_OFFSET) / PAGE;
        for right in [word(1, 1), word(2, 1), word(2, most), word(3, 7)] {
            assert!(outline.next(16, right).is_ok(), "{right:x}");
        }
        for wrong in [0, 4, word(0, 1), word(4, 1), word(1, 0), word(1, 2), word(2, 0), word(2, most + 1), u64::MAX] {
            assert!(outline.next(16, wrong).is_err(), "{wrong:x}");
        }
    }
}

//! Records: the text of a key, and the generation that it began with.

use crate::generation::{GENERATION, Generation};
use crate::protocol::atomic::{AtomicU64, Ordering, fence};
use crate::protocol::layout::MAX_TEXT;

/// Where a key's record is, and how long the key is. A process that was killed before it wrote a record leaves zero.
#[derive(Debug)]
#[cfg_attr(not(loom), repr(transparent))]
pub(crate) struct RecordWord(AtomicU64);

const OFFSET_BITS: u32 = 34;
const MAX_LENGTH: u64 = u64::MAX >> OFFSET_BITS;

/// A value of a record word that is not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reference(u64);

impl Reference {
    fn new(offset: u64, length: usize) -> Self {
        Self(offset | (length as u64).min(MAX_LENGTH) << OFFSET_BITS)
    }

    /// Where in the file the record is.
    pub(crate) fn offset(self) -> u64 {
        self.0 & !(u64::MAX << OFFSET_BITS)
    }

    /// The word itself.
    pub(crate) fn bits(self) -> u64 {
        self.0
    }

    /// How long the whole key is, in bytes; `MAX_LENGTH` stands for that or more.
    pub(crate) fn key_length(self) -> usize {
        (self.0 >> OFFSET_BITS) as usize
    }

    fn text_length(self) -> usize {
        self.key_length().min(MAX_TEXT)
    }

    /// How many words the record takes.
    fn words(self) -> usize {
        1 + self.text_length().div_ceil(8)
    }

    /// How many bytes the record takes.
    pub(crate) fn bytes(self) -> u64 {
        8 * self.words() as u64
    }
}

impl RecordWord {
    #[cfg(test)]
    pub(crate) fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    pub(crate) fn get(&self) -> Option<Reference> {
        // ORDERING: acquire pairs with the release in `publish`: a process that sees the reference sees the whole record. A
        // relaxed load and a fence, since memory that is mapped read-only allows no other loads.
        let word = self.0.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        (word != 0).then_some(Reference(word))
    }

    /// Makes `mine`, a record that is complete, the key's, unless it has one. Returns the one that it has then.
    pub(crate) fn publish(&self, mine: Reference) -> Reference {
        // ORDERING: release pairs with the fence in `get`, and with the acquire of a loser here: the record was written before
        // this. Acquire on failure, as the loser reads the winner's record next. On success there is nothing to acquire: no
        // process stored the zero.
        match self.0.compare_exchange(0, mine.0, Ordering::Release, Ordering::Acquire) {
            Ok(_) => mine,
            Err(winner) => Reference(winner),
        }
    }
}

/// A segment of texts: how many bytes of it are taken, and records, one behind the other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TextSegment<'a> {
    /// Where it begins in the file.
    offset: u64,
    words: &'a [AtomicU64],
}

/// Where the first record is, in words. The count before it has a cache line of its own.
pub(crate) const RECORDS: usize = 8;

impl<'a> TextSegment<'a> {
    /// The segment that begins at `offset` in the file. `words` is a whole page at least.
    pub(crate) fn new(offset: u64, words: &'a [AtomicU64]) -> Self {
        Self { offset, words }
    }

    /// How much room a segment must have for the record of a key of this `length`, in bytes.
    pub(crate) fn bytes_for(length: usize) -> u64 {
        8 * RECORDS as u64 + Reference::new(0, length).bytes()
    }

    /// How many bytes of records there are, in use or lost.
    pub(crate) fn taken(&self) -> u64 {
        // ORDERING: relaxed. Read for people.
        self.words[0].load(Ordering::Relaxed).min(self.room())
    }

    fn room(&self) -> u64 {
        8 * (self.words.len() - RECORDS) as u64
    }

    /// How many bytes are taken with the record of a key of this `length` behind the `taken` ones, if there is room for it.
    fn taken_with(&self, taken: u64, length: usize) -> Option<u64> {
        let end = taken.checked_add(Reference::new(0, length).bytes())?;
        (end <= self.room() && taken.is_multiple_of(8)).then_some(end)
    }

    /// Whether there is room for the record of a key of this `length`.
    pub(crate) fn has_room(&self, length: usize) -> bool {
        // ORDERING: relaxed. What it finds may change right after this; `write` decides by an exchange of its own.
        self.taken_with(self.words[0].load(Ordering::Relaxed), length).is_some()
    }

    /// Writes the record of a key that begins at `first`; `None` if there is no room left. Nothing leads to it until it is
    /// [published](RecordWord::publish).
    pub(crate) fn write(&self, first: u64, key: &[u8]) -> Option<Reference> {
        let text = &key[..key.len().min(MAX_TEXT)];
        let taken = |taken: u64| self.taken_with(taken, key.len());
        // ORDERING: acquire pairs with the release in `give_back`: the stores below come after those of a process that wrote in
        // the same place and gave it back. Relaxed on failure and for the load: the number is confirmed by the exchange, or
        // nothing is written.
        let start = self.words[0].fetch_update(Ordering::Acquire, Ordering::Relaxed, taken).ok()?;
        let index = RECORDS + (start / 8) as usize;
        let reference = Reference::new(self.offset + 8 * index as u64, key.len());
        // ORDERING: relaxed for all words of the record: `publish` publishes them.
        let mut words = self.words[index..].iter();
        words.next()?.store(first, Ordering::Relaxed);
        for (word, bytes) in words.zip(text.chunks(8)) {
            let mut padded = [0; 8];
            padded[..bytes.len()].copy_from_slice(bytes);
            word.store(text_word(padded), Ordering::Relaxed);
        }
        Some(reference)
    }

    /// Makes the room of a record free again that was never published, if it is still the last one.
    pub(crate) fn give_back(&self, record: Reference) {
        let start = record.offset() - self.offset - 8 * RECORDS as u64;
        // ORDERING: release pairs with the acquire in `write`: the next record in this place is written after this one. Relaxed
        // on failure: another record was written behind this one, and its room is lost.
        let _ = self.words[0].compare_exchange(start + record.bytes(), start, Ordering::Release, Ordering::Relaxed);
    }

    /// Whether a record that `reference` leads to would be in this segment, or in one behind it.
    pub(crate) fn begins_before(&self, reference: Reference) -> bool {
        self.offset < reference.offset()
    }

    /// The record that `reference` leads to, if it is in this segment.
    pub(crate) fn record(&self, reference: Reference) -> Option<Record<'a>> {
        let start = reference.offset().checked_sub(self.offset)?;
        let index = usize::try_from(start / 8).ok().filter(|index| *index >= RECORDS && start.is_multiple_of(8))?;
        let [first, text @ ..] = self.words.get(index..index.checked_add(reference.words())?)? else { return None };
        Some(Record { first, text, length: reference.text_length() })
    }
}

/// The record of a key.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Record<'a> {
    first: &'a AtomicU64,
    text: &'a [AtomicU64],
    length: usize,
}

impl Record<'_> {
    /// The generation that the key began with.
    pub(crate) fn first(&self) -> u64 {
        // ORDERING: relaxed. It was written before the record was published, by which the caller has found it. `set_first` changes
        // it under an exclusive lock on the boot id; a reader that takes no lock sees a wrong number of updates for a moment.
        self.first.load(Ordering::Relaxed)
    }

    /// How often the key was updated since it was created here, if it has this `generation` now.
    pub(crate) fn updates(&self, generation: Generation) -> u64 {
        generation.get().wrapping_sub(self.first()) & GENERATION
    }

    /// Moves the first generation, so that a key which is renewed keeps its number of updates.
    pub(crate) fn set_first(&self, first: u64) {
        // ORDERING: relaxed. Read by `first`, for the number of updates, by which no other memory is read. Other openers do not
        // come here at the same time: the caller has an exclusive lock on the boot id.
        self.first.store(first, Ordering::Relaxed);
    }

    /// The key's text: all of it, unless it is longer than what is kept.
    pub(crate) fn text(&self) -> Vec<u8> {
        // ORDERING: relaxed. The words were written before the record was published, by which the caller has found them.
        let bytes = self.text.iter().flat_map(|word| text_bytes(word.load(Ordering::Relaxed)));
        let mut text = Vec::with_capacity(self.length);
        text.extend(bytes.take(self.length));
        text
    }
}

// A text stands in the file in the order of its bytes, on any machine.

#[expect(clippy::host_endian_bytes, reason = "a text's bytes stand in the file in their own order")]
fn text_word(bytes: [u8; 8]) -> u64 {
    u64::from_ne_bytes(bytes)
}

#[expect(clippy::host_endian_bytes, reason = "a text's bytes stand in the file in their own order")]
fn text_bytes(word: u64) -> [u8; 8] {
    word.to_ne_bytes()
}

//! Segments of slots, and where in them a key may stand.

use crate::protocol::generation_word::GenerationWord;
use crate::protocol::layout::{GROUP, LINE};
use crate::protocol::record::RecordWord;
use crate::protocol::slot_digest::{Digest, Occupant, SlotDigest, TAGS, Tags};
use crate::protocol::version_1;

/// A slot: the words of one key.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot<'a> {
    pub(crate) generation: &'a GenerationWord,
    pub(crate) digest: &'a SlotDigest,
    /// `None` in a table of version 1.
    pub(crate) record: Option<&'a RecordWord>,
}

/// A segment of slots, as its version lays it out.
#[derive(Clone, Copy, Debug)]
pub(crate) enum SlotSegment<'a> {
    Lanes(Lanes<'a>),
    Version1(&'a [version_1::Slot]),
}

/// Four lanes, of which the first three have one word, or pair of words, for each slot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lanes<'a> {
    pub(crate) generations: &'a [GenerationWord],
    pub(crate) digests: &'a [SlotDigest],
    pub(crate) records: &'a [RecordWord],
    pub(crate) tags: &'a [Tags],
}

impl<'a> SlotSegment<'a> {
    /// The slots that are claimed or half claimed, each with its index.
    pub(crate) fn claimed(self) -> impl Iterator<Item = (usize, Slot<'a>)> {
        let slots = match self {
            Self::Lanes(lanes) => lanes.digests.len(),
            Self::Version1(slots) => slots.len(),
        };
        (0..slots).map(move |index| (index, self.slot(index))).filter(|(_, slot)| slot.digest.is_claimed())
    }

    fn slot(self, index: usize) -> Slot<'a> {
        match self {
            Self::Lanes(lanes) => lanes.slot(index),
            Self::Version1(slots) => {
                let slot = &slots[index];
                Slot { generation: &slot.generation, digest: &slot.digest, record: None }
            }
        }
    }
}

impl<'a> Lanes<'a> {
    #[inline]
    pub(crate) fn slot(self, index: usize) -> Slot<'a> {
        let (generation, digest) = (&self.generations[index], &self.digests[index]);
        Slot { generation, digest, record: Some(&self.records[index]) }
    }

    /// The indices at which `digest` may stand in this segment, which is number `number`, in the order of probing and without
    /// those that by their tags belong to other keys.
    pub(crate) fn probe(self, number: u32, digest: Digest) -> impl Iterator<Item = usize> {
        let line = Line::of(self.digests.len(), number, digest);
        let candidates = move |word: usize| self.tags[word].compare(digest).all().map(move |slot| word * TAGS + slot);
        // Only in a model's segment of fewer slots than a word has tags is there a tag without a slot.
        line.words().flat_map(candidates).filter(move |index| *index < self.digests.len())
    }

    /// The index at which `digest` stands in this segment, which is number `number`, by its tag. Otherwise, whether there are slots
    /// where it may stand or be claimed all the same: if there are none, the key is not here, and never will be.
    #[inline]
    pub(crate) fn find_tagged(self, number: u32, digest: Digest) -> Result<usize, bool> {
        for word in Line::of(self.digests.len(), number, digest).words() {
            let compared = self.tags[word].compare(digest);
            for index in compared.same.map(|slot| word * TAGS + slot) {
                match self.digests[index].occupant(digest) {
                    Occupant::This => return Ok(index),
                    Occupant::Other => {}
                    // The tag was seen before the digest: this may be the key's slot.
                    Occupant::None | Occupant::Half => return Err(true),
                }
            }
            // The key may stand behind a slot without a tag, if that was claimed by a process that has not set it, or died.
            if !compared.missing.is_empty() {
                return Err(true);
            }
        }
        Err(false)
    }

    /// Sets the tag of the slot at `index`, which is claimed for `digest`.
    pub(crate) fn set_tag(self, index: usize, digest: Digest) {
        self.tags[index / TAGS].set(index % TAGS, digest);
    }
}

/// The slots of a segment where a key may stand: those whose tags share a cache line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Line {
    /// Its first slot.
    first: usize,
    size: usize,
    /// With which of its slots a search begins, counted from the first: the first one of a group.
    start: usize,
}

impl Line {
    /// The line of `digest` in segment `number`, which has so many `slots`.
    #[inline]
    fn of(slots: usize, number: u32, digest: Digest) -> Self {
        let size = slots.min(LINE);
        let place = digest.place(number);
        // The number of slots is a power of two, and so is that of the lines.
        let first = (place as usize & (slots / size - 1)) * size;
        Self { first, size, start: ((place >> 60) as usize * GROUP) & (size - 1) }
    }

    /// The words with its tags, in the order of probing.
    #[inline]
    fn words(self) -> impl Iterator<Item = usize> {
        let words = self.size.div_ceil(TAGS);
        (0..words).map(move |passed| self.first / TAGS + ((self.start / TAGS + passed) & (words - 1)))
    }
}

/// How many groups of a segment of so many `slots` a search looks at to reach the slot at `index`, that one's included; `None` if
/// `digest` does not belong there.
pub(crate) fn probe_length(slots: usize, number: u32, index: usize, digest: Digest) -> Option<u64> {
    let Line { first, size, start } = Line::of(slots, number, digest);
    let passed = index.checked_sub(first).filter(|index| *index < size)?.wrapping_sub(start) & (size - 1);
    Some((passed / GROUP) as u64 + 1)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_search_visits_each_slot_of_its_line_once_and_group_by_group() {
        for slots in [16, 32, 64, 128, 1024, 1 << 16] {
            let tags: Vec<Tags> = (0..slots / TAGS).map(|_| Tags::new()).collect();
            let digests: Vec<_> = (0..slots).map(|_| SlotDigest::new()).collect();
            for number in 0..3 {
                let mut random = 0x9e37_79b9_7f4a_7c15_u64;
                for _ in 0..100 {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let digest = Digest::new(random, random.rotate_left(17));
                    let lanes = Lanes { generations: &[], digests: &digests, records: &[], tags: &tags };
                    let visited: Vec<_> = lanes.probe(number, digest).collect();
                    let groups = visited.chunks(GROUP).enumerate();
                    for (position, group) in groups {
                        assert!(group[0].is_multiple_of(GROUP) && group.iter().copied().eq(group[0]..group[0] + GROUP));
                        let length = |index: &usize| probe_length(slots, number, *index, digest);
                        assert!(group.iter().all(|index| length(index) == Some(position as u64 + 1)));
                    }
                    let mut sorted = visited.clone();
                    sorted.sort_unstable();
                    let first = sorted[0];
                    assert!(
                        first.is_multiple_of(LINE.min(slots)) && sorted.into_iter().eq(first..first + LINE.min(slots))
                    );
                    let outside = (first + LINE) % slots;
                    assert!(slots <= LINE || probe_length(slots, number, outside, digest).is_none());
                }
            }
        }
    }
}

//! Which key a slot belongs to: the digest that names the key, how a slot is claimed for it, and the tags of the claimed.

use crate::protocol::atomic::{AtomicU64, Ordering, fence};

/// The 128 bits of a key's salted hash that name it in one table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Digest {
    a: u64,
    b: u64,
}

impl Digest {
    /// Zero means "not claimed", so a zero word is replaced by 1.
    pub(crate) fn new(a: u64, b: u64) -> Self {
        Self { a: a.max(1), b: b.max(1) }
    }

    pub(crate) fn words(self) -> [u64; 2] {
        [self.a, self.b]
    }

    fn tag(self) -> u8 {
        ((self.b >> 56) as u8).max(1)
    }

    /// Where the search for this digest begins in `segment`, before it is taken modulo the segment's size.
    pub(crate) fn place(self, segment: u32) -> u64 {
        self.a.wrapping_add(self.b.wrapping_mul(u64::from(segment)))
    }
}

/// Which key a slot belongs to, as seen by a search for one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Occupant {
    None,
    This,
    /// This digest's first word without a second: a claim under way, or one that its claimer died in.
    Half,
    Other,
}

/// The digest of the key that a slot belongs to. Zeros until the slot is claimed, and then the same for ever.
#[derive(Debug)]
#[cfg_attr(not(loom), repr(C))]
pub(crate) struct SlotDigest {
    a: AtomicU64,
    b: AtomicU64,
}

impl SlotDigest {
    #[cfg(test)]
    pub(crate) fn new() -> Self {
        Self { a: AtomicU64::new(0), b: AtomicU64::new(0) }
    }

    /// Which key holds the slot, without changing it.
    pub(crate) fn occupant(&self, digest: Digest) -> Occupant {
        // ORDERING: acquire, by relaxed loads and a fence, since only relaxed loads are defined on memory that is mapped
        // read-only. Pairs with the release half of the compare-exchange in `take`: a search that finds the key comes after
        // all that its claimer saw and did before. The two loads need no order between them: each word changes once, from
        // zero to what it is for ever, so nonzero values of A and B belong together, whenever they are read. A stale zero
        // makes the slot look free or half claimed, as it was, even if the slot's tag was seen before: the search misses a claim
        // that is made at the same time. So a process that attaches goes on to `claim` in the first segment where it has seen
        // such a slot, and there a compare-exchange finds the latest value.
        let a = self.a.load(Ordering::Relaxed);
        let b = self.b.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        match (a, b) {
            (0, _) => Occupant::None,
            (a, b) if a == digest.a && b == digest.b => Occupant::This,
            (a, 0) if a == digest.a => Occupant::Half,
            _ => Occupant::Other,
        }
    }

    /// Claims the slot for `digest`, or finishes another process's claim; `false` if the slot is another key's.
    pub(crate) fn claim(&self, digest: Digest) -> bool {
        Self::take(&self.a, digest.a) && Self::take(&self.b, digest.b)
    }

    /// The first step of `claim`, for a claimer that stops there.
    #[cfg(test)]
    pub(crate) fn claim_word_a(&self, digest: Digest) -> bool {
        Self::take(&self.a, digest.a)
    }

    /// Sets `word`, which is zero until it is claimed, to `mine`; `false` if it has another value.
    fn take(word: &AtomicU64, mine: u64) -> bool {
        // A load first: most slots on the way are other keys', and a compare-exchange takes the cache line away from all
        // processes that read it, even if it fails.
        // ORDERING: acquire pairs with the release half of the compare-exchange below, in the process that set the word: what
        // that process saw taken, is taken for this one too. A stale zero does no harm, as the compare-exchange comes next.
        let present = word.load(Ordering::Acquire);
        if present != 0 {
            return present == mine;
        }
        // ORDERING: release on success, for the load above, this exchange's failure in other processes, and the fences in
        // `occupant` and `digest`. A claimer comes here only when it has seen all earlier slots of its probe sequence taken, by
        // their words or their tags, and comes to word B only when A is set. So a process that sees this word cannot find one of
        // those slots free any more, and that is what lets a search end at the first free slot. Acquire on failure, as the
        // loser goes on from the winner's word as if it had loaded it above. On success the acquire half has nothing to pair
        // with: no process stored the zero.
        match word.compare_exchange(0, mine, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => true,
            Err(winner) => winner == mine,
        }
    }

    /// The digest of the key that holds this slot, once the claim is complete.
    pub(crate) fn digest(&self) -> Option<Digest> {
        // ORDERING: acquire, by relaxed loads and a fence, since memory that is mapped read-only allows no other loads. Pairs
        // with the release half of the compare-exchange in `take`. Each word changes once, from zero, so two words that are not
        // zero are those of one complete claim; a stale zero passes for a claim that is not complete yet.
        let a = self.a.load(Ordering::Relaxed);
        let b = self.b.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        (a != 0 && b != 0).then_some(Digest { a, b })
    }

    /// Whether a claim of the slot has begun.
    pub(crate) fn is_claimed(&self) -> bool {
        // ORDERING: relaxed. In a sweep, this load comes after the fence in `Header::begin_retiring`, which pairs with the one
        // in `Header::is_live_after_claim`: it sees every claim after which the table was found live. Elsewhere, a claim
        // that is made at the same time may be seen or not.
        self.a.load(Ordering::Relaxed) != 0
    }
}

/// The tags of eight slots: tag `i` is the byte at offset `i`.
#[derive(Debug)]
#[cfg_attr(not(loom), repr(transparent))]
pub(crate) struct Tags(AtomicU64);

/// How many tags are in one word.
pub(crate) const TAGS: usize = 8;

impl Tags {
    #[cfg(test)]
    pub(crate) fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Which of the eight slots have the tag of `digest`, and which have none yet: sets of their numbers.
    #[inline]
    pub(crate) fn compare(&self, digest: Digest) -> Compared {
        // ORDERING: relaxed. Reads what `set` stores, and needs nothing that was written before it. A tag is set once the
        // claim is complete, and says of the slot what is true for ever; so a slot that is passed over is another key's,
        // even if that claim is not visible here yet. A stale zero costs a look at the slot, which has orderings of its own. So
        // does a tag that is seen: the digest beside it may still be read as zero, and then the slot counts as free.
        let tags = self.0.load(Ordering::Relaxed).to_le();
        let same = Candidates(zero_bytes(tags ^ (u64::from(digest.tag()) * ONES)));
        Compared { same, missing: Candidates(zero_bytes(tags)) }
    }

    /// Sets tag `index`. To be called when the slot is claimed for `digest`, by every process that attaches: the claimer may have
    /// died before.
    pub(crate) fn set(&self, index: usize, digest: Digest) {
        let shift = 8 * index;
        // ORDERING: relaxed. The load in `compare` reads it and relies on the value alone. All processes that set the tag of
        // a slot set the same bits, and those of the other seven stay, as this is a read-modify-write. The load only saves a
        // write: the cache line is shared by 64 slots, and searches in all processes read it.
        if (self.0.load(Ordering::Relaxed).to_le() >> shift) & 0xff == 0 {
            self.0.fetch_or((u64::from(digest.tag()) << shift).to_le(), Ordering::Relaxed);
        }
    }
}

const ONES: u64 = 0x0101_0101_0101_0101;
const HIGH_BITS: u64 = 0x8080_8080_8080_8080;

/// The high bit of each byte of `word` that is zero. Exact: no carry goes from one byte to the next.
fn zero_bytes(word: u64) -> u64 {
    !((word & !HIGH_BITS).wrapping_add(!HIGH_BITS) | word) & HIGH_BITS
}

/// What [`Tags::compare`] finds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Compared {
    pub(crate) same: Candidates,
    pub(crate) missing: Candidates,
}

impl Compared {
    /// The slots that may be the digest's.
    pub(crate) fn all(self) -> Candidates {
        Candidates(self.same.0 | self.missing.0)
    }
}

/// Numbers of slots, in ascending order: the high bit of each byte of a word.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidates(u64);

impl Candidates {
    pub(crate) fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl Iterator for Candidates {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        let next = (self.0 != 0).then(|| self.0.trailing_zeros() as usize / 8)?;
        self.0 &= self.0 - 1;
        Some(next)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn candidates_are_the_slots_whose_tags_are_the_digests_or_missing() {
        let tags = Tags::new();
        for (index, b) in [0_u64, 7, 0x80, 0xff, 1, 0, 7, 8].into_iter().enumerate() {
            if b > 0 {
                tags.set(index, Digest::new(1, b << 56));
                tags.set(index, Digest::new(1, 0xff << 56));
            }
        }
        let candidates = |tag: u64| tags.compare(Digest::new(1, tag << 56)).all().collect::<Vec<_>>();
        assert_eq!(candidates(7), [0, 1, 5, 6]);
        assert_eq!(candidates(0x80), [0, 2, 5]);
        assert_eq!(candidates(0xff), [0, 3, 5]);
        assert_eq!(candidates(6), [0, 5]);
        assert_eq!(candidates(0), [0, 4, 5], "a tag is never zero");
    }

    #[test]
    fn a_byte_is_found_to_be_zero_whatever_is_beside_it() {
        let bytes = [0_u8, 1, 0x7f, 0x80, 0x81, 0xff];
        for a in bytes {
            for b in bytes {
                let word = u64::from_le_bytes([a, b, a, a, b, b, a, b]);
                let expected = word.to_le_bytes().map(|byte| if byte == 0 { 0x80 } else { 0 });
                assert_eq!(zero_bytes(word).to_le_bytes(), expected, "{word:x}");
            }
        }
    }
}

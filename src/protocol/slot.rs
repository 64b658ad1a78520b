//! One slot: how it is claimed, and how its generation moves on.
//!
//! The promise that all of it serves: what a process wrote before its update is visible to whoever sees that update.
//! An update is a release, a check an acquire, of the same generation word.

use crate::generation::{GENERATION, Generation, LOWEST};
use crate::protocol::atomic::{AtomicU64, Ordering, fence};
use crate::protocol::layout::{LABEL_SIZE, Slot, Tag};
use crate::protocol::word::{ONE_PENDING, PENDING, RETIRED_BIT, WAITING_BIT, Word};

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

impl Tag {
    /// Whether the slot beside it may be, or become, `digest`'s.
    #[inline]
    pub(crate) fn admits(&self, digest: Digest) -> bool {
        // ORDERING: relaxed: a tag says what is true for ever, and who is admitted asks the slot itself.
        let tag = self.0.load(Ordering::Relaxed);
        tag == 0 || tag == digest.tag()
    }

    /// To be called when the slot is claimed for `digest`.
    pub(crate) fn set(&self, digest: Digest) {
        if self.0.load(Ordering::Relaxed) == 0 {
            self.0.store(digest.tag(), Ordering::Relaxed);
        }
    }
}

/// What a look at a slot finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holder {
    Nobody,
    This,
    /// This digest's first word without a second: a claim under way, or one whose claimer died.
    Unfinished,
    Other,
}

impl Slot {
    /// The generation word: all that a check reads of shared memory.
    #[inline]
    pub(crate) fn word(&self) -> Word {
        // ORDERING: pairs with the release half of whatever changes the word. A relaxed load and a fence, not an
        // acquire load, since only relaxed loads are defined on memory that is mapped read-only.
        let word = self.generation.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        Word(word)
    }

    /// One update. Returns the word before it, which tells all that an updater must know.
    #[inline]
    pub(crate) fn bump(&self) -> Word {
        // ORDERING: release, for the check that sees this update (`word`); acquire, so that an updater who finds the
        // retired bit sees what the retiring process wrote before it set the bit (`retire`).
        Word(self.generation.fetch_add(1, Ordering::AcqRel))
    }

    /// Counts a crash-safe update in, unless the table has a successor. Returns the word before it.
    ///
    /// The count stops at its greatest value: who finds that one neither raises nor lowers it, and it is cleared as
    /// what a killed updater leaves is (`recover`).
    pub(crate) fn begin_update(&self) -> Word {
        self.change(|word| Word(word).is_live().then(|| if word < PENDING { word + ONE_PENDING } else { word }))
    }

    /// Counts a crash-safe update out, and is the update, in one step. Returns the word before it.
    pub(crate) fn finish_update(&self) -> Word {
        self.change(|word| Some(counted_out(word).wrapping_add(1)))
    }

    /// Counts an update out that changed nothing.
    pub(crate) fn abandon_update(&self) {
        self.change(|word| Some(counted_out(word)));
    }

    /// One update in the place of all that are pending. For who knows that none of them will be finished. Returns the word
    /// before it.
    pub(crate) fn recover(&self) -> Word {
        self.change(|word| (word & PENDING != 0).then_some((word & !PENDING).wrapping_add(1)))
    }

    /// As `recover`, for who cannot keep updates from beginning meanwhile: only if nothing was counted in or out since the
    /// slot was `found`, which was before none of the makers was found alive. Returns the word before it, if it did.
    pub(crate) fn recover_from(&self, found: Word) -> Option<Word> {
        // What the dead have left stays, so a count that is the same again has nobody else in it. But one that does not go up
        // any more may.
        let is_exact = (ONE_PENDING..PENDING).contains(&found.0);
        let before =
            self.change(|word| (is_exact && Word(word).is_same(found)).then_some((word & !PENDING).wrapping_add(1)));
        (is_exact && before.is_same(found)).then_some(before)
    }

    /// Says that somebody is about to sleep until the generation moves on: whoever moves it on wakes him. Returns the word
    /// that this finds. To be called when the wake word is armed.
    pub(crate) fn await_update(&self) -> Word {
        // ORDERING: relaxed, in spite of a bit that somebody else has set: `WakeWord::arm` orders it.
        let word = self.generation.load(Ordering::Relaxed);
        if word & WAITING_BIT != 0 || word & GENERATION == 0 {
            return Word(word);
        }
        // ORDERING: as in `bump`.
        Word(self.generation.fetch_or(WAITING_BIT, Ordering::AcqRel))
    }

    /// To be called before those who wait are woken: each of them who has still to wait says so again.
    pub(crate) fn end_waiting(&self) {
        // ORDERING: as in `bump`.
        self.generation.fetch_and(!WAITING_BIT, Ordering::AcqRel);
    }

    /// Moves on to `candidate` if the slot has no generation yet. All who attach may do it; the first one counts.
    pub(crate) fn begin(&self, candidate: u64) {
        let candidate = candidate.clamp(LOWEST, GENERATION - 1);
        // ORDERING: relaxed, as only the value of `first` matters, and every process that gets here uses the winner's.
        let first = match self.first.compare_exchange(0, candidate, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => candidate,
            Err(winner) => winner,
        };
        // ORDERING: release, so that who reads the generation finds `first` (`word`, then `updates`). A failure means
        // that the slot has begun, or that a sweep retired it first, which the caller reads from the word.
        let _ = self.generation.compare_exchange(0, first, Ordering::Release, Ordering::Relaxed);
    }

    /// One update that nobody adopts; a slot that has not begun is left alone. Returns the word before it.
    pub(crate) fn expire(&self) -> Word {
        self.change(|word| (word & GENERATION != 0).then_some(word.wrapping_add(1)))
    }

    /// The last update of this table: bumps, sets the retired bit. Does nothing the second time. Returns the word before
    /// this call.
    pub(crate) fn retire(&self) -> Word {
        self.change(|word| (word & RETIRED_BIT == 0).then_some(word.wrapping_add(1) | RETIRED_BIT))
    }

    /// Moves past `floor` and the present generation, and clears what processes of an earlier boot left.
    pub(crate) fn renew(&self, floor: u64) {
        let updates = self.updates();
        self.change(|word| {
            let generation = (word & GENERATION).wrapping_add(1).max(floor & GENERATION) & GENERATION;
            (word & GENERATION != 0).then_some(generation | (word & RETIRED_BIT))
        });
        if let Some(generation) = self.word().generation() {
            // ORDERING: relaxed; the number of updates is for people, and other openers wait for this one's lock.
            self.first.store(generation.get().wrapping_sub(updates), Ordering::Relaxed);
        }
    }

    /// Replaces the word by what `step` makes of it, if anything. Returns the word that `step` was last asked about.
    fn change(&self, step: impl Fn(u64) -> Option<u64>) -> Word {
        // ORDERING: as in `bump`.
        let mut word = self.generation.load(Ordering::Relaxed);
        while let Some(next) = step(word) {
            match self.generation.compare_exchange_weak(word, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => break,
                Err(present) => word = present,
            }
        }
        Word(word)
    }

    /// Who holds the slot, without changing it.
    pub(crate) fn holder(&self, digest: Digest) -> Holder {
        // ORDERING: relaxed loads and a fence, as in `word`; pairs with the claims in `claim`. Word A never changes
        // once set and B is set after A, so A and then B tell one story whatever happens between the loads.
        let a = self.digest_a.load(Ordering::Relaxed);
        let b = self.digest_b.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        match (a, b) {
            (0, _) => Holder::Nobody,
            (a, b) if a == digest.a && b == digest.b => Holder::This,
            (a, 0) if a == digest.a => Holder::Unfinished,
            _ => Holder::Other,
        }
    }

    /// Claims the slot for `digest`, or finishes another process's claim of it; `false` if it is another key's.
    pub(crate) fn claim(&self, digest: Digest) -> bool {
        Self::take(&self.digest_a, digest.a) && Self::take(&self.digest_b, digest.b)
    }

    /// The first step of `claim`, for a claimer that stops there.
    #[cfg(test)]
    pub(crate) fn claim_word_a(&self, digest: Digest) -> bool {
        Self::take(&self.digest_a, digest.a)
    }

    fn take(word: &AtomicU64, mine: u64) -> bool {
        // A plain look first: most slots on the way are other keys', and a failed compare-exchange writes.
        // ORDERING: acquire on either outcome pairs with the release of whoever set the word.
        let present = word.load(Ordering::Acquire);
        if present != 0 {
            return present == mine;
        }
        match word.compare_exchange(0, mine, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => true,
            Err(winner) => winner == mine,
        }
    }

    /// The digest of the key that holds this slot, once the claim is complete.
    pub(crate) fn digest(&self) -> Option<Digest> {
        // ORDERING: as in `holder`.
        let a = self.digest_a.load(Ordering::Relaxed);
        let b = self.digest_b.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        (a != 0 && b != 0).then_some(Digest { a, b })
    }

    /// Whether somebody has begun to claim the slot.
    pub(crate) fn is_claimed(&self) -> bool {
        // ORDERING: the sweeper's half of `Header::is_live_after_claim`: its fence stands in `begin_retiring`.
        self.digest_a.load(Ordering::Relaxed) != 0
    }

    /// How often the key was updated since it was created here.
    pub(crate) fn updates(&self) -> u64 {
        let generation = self.word().generation().map_or(0, Generation::get);
        // ORDERING: relaxed; `word` acquired what `begin` released.
        generation.wrapping_sub(self.first.load(Ordering::Relaxed)) & GENERATION
    }

    pub(crate) fn has_label(&self) -> bool {
        // ORDERING: relaxed; writing a label twice does no harm.
        self.key_length.load(Ordering::Relaxed) != 0
    }

    /// Writes the key's text. Every writer writes the same, so they may overlap.
    pub(crate) fn write_label(&self, key: &[u8]) {
        for (word, bytes) in self.label.iter().zip(key.chunks(8)) {
            let mut padded = [0; 8];
            padded[..bytes.len()].copy_from_slice(bytes);
            word.store(label_word(padded), Ordering::Relaxed);
        }
        let length = u32::try_from(key.len()).unwrap_or(u32::MAX);
        // ORDERING: release, so that who sees the length sees the text (`label`).
        self.key_length.store(length, Ordering::Release);
    }

    /// The key's first bytes, and how long the whole key is.
    pub(crate) fn label(&self) -> (Vec<u8>, usize) {
        // ORDERING: pairs with `write_label`; relaxed load and fence as in `word`.
        let length = self.key_length.load(Ordering::Relaxed) as usize;
        fence(Ordering::Acquire);
        let text = self.label.iter().flat_map(|word| label_bytes(word.load(Ordering::Relaxed)));
        (text.take(length.min(LABEL_SIZE)).collect(), length)
    }
}

/// The label is text in the order of its bytes, on any machine.
#[expect(clippy::host_endian_bytes, reason = "a label's bytes stand in the file in their own order")]
fn label_word(bytes: [u8; 8]) -> u64 {
    u64::from_ne_bytes(bytes)
}

#[expect(clippy::host_endian_bytes, reason = "a label's bytes stand in the file in their own order")]
fn label_bytes(word: u64) -> [u8; 8] {
    word.to_ne_bytes()
}

/// `word` with one pending update less, if the count is one that goes down.
fn counted_out(word: u64) -> u64 {
    if (ONE_PENDING..PENDING).contains(&word) { word - ONE_PENDING } else { word }
}

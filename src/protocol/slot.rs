//! One slot: how it is claimed, and how its generation moves on.
//!
//! The promise that all of it serves: what a process wrote before its update is visible to every process that sees that
//! update. An update is a release, and a check is an acquire, of the same generation word.

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
    /// Whether the slot of the same index belongs to `digest`, or still may.
    #[inline]
    pub(crate) fn admits(&self, digest: Digest) -> bool {
        // ORDERING: relaxed. Reads what `set` stores, and needs nothing that was written before it. A tag is set once the
        // claim is complete, and says of the slot what is true for ever; so a slot that is passed over is another key's,
        // even if that claim is not visible here yet. A stale zero costs a look at the slot, which has orderings of its own.
        let tag = self.0.load(Ordering::Relaxed);
        tag == 0 || tag == digest.tag()
    }

    /// To be called when the slot is claimed for `digest`, by every process that attaches: the claimer may have died before.
    pub(crate) fn set(&self, digest: Digest) {
        // ORDERING: relaxed. The load in `admits` reads it and relies on the value alone. Stores may overlap, as all
        // of them store the first byte of the same word B. The load here only saves a write: the cache line is shared
        // by 128 slots, and searches in all processes read it.
        if self.0.load(Ordering::Relaxed) == 0 {
            self.0.store(digest.tag(), Ordering::Relaxed);
        }
    }
}

/// Which key a slot belongs to, as seen by a search for one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holder {
    Nobody,
    This,
    /// This digest's first word without a second: a claim under way, or one that its claimer died in.
    Unfinished,
    Other,
}

impl Slot {
    /// The generation word: all that a check reads of shared memory.
    #[inline]
    pub(crate) fn word(&self) -> Word {
        // ORDERING: acquire. Pairs with the release half of every change of the word (`bump`, `change`, `begin`,
        // `await_update`, `end_waiting`): a check that sees an update sees what the updater wrote before it. All changes
        // are read-modify-writes, so a later one does not hide an earlier one: it continues its release sequence. A relaxed
        // load and a fence, not an acquire load, since only relaxed loads are defined on memory that is mapped read-only.
        let word = self.generation.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        Word(word)
    }

    /// Makes one update. Returns the word before it, which has all that an updater must know: whether the table has a
    /// successor, whether a waiter must be woken, and which generation the update is.
    #[inline]
    pub(crate) fn bump(&self) -> Word {
        // ORDERING: release pairs with the fence in `word`: a check that sees this update sees what was written before it.
        // The acquire half pairs with the release half of `change` in `retire`: an updater that finds the retired bit sees
        // what the retiring process wrote before it set the bit. In the other direction, a sweep that comes after this
        // update acquires it there, so that the successor's first load has the updated source.
        Word(self.generation.fetch_add(1, Ordering::AcqRel))
    }

    /// Counts a crash-safe update in, unless the table has a successor. Returns the word before it.
    ///
    /// The count stops at its greatest value: from then on no updater raises or lowers it, as none could know how many there
    /// are. It is cleared like the count that killed updaters leave (`recover`).
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

    /// Makes one update in the place of all that are pending. The caller knows that none of them will be finished. Returns
    /// the word before it.
    pub(crate) fn recover(&self) -> Word {
        self.change(|word| (word & PENDING != 0).then_some((word & !PENDING).wrapping_add(1)))
    }

    /// As `recover`, for a process that cannot keep updates from beginning meanwhile: does nothing unless the word is as it was
    /// `found`, apart from the waiting bit. The caller read that word first, and only then found that no updater is alive.
    /// Returns the word before it, if it made the update.
    pub(crate) fn recover_from(&self, found: Word) -> Option<Word> {
        // Dead updaters never count themselves out. So if the count and the generation are what they were, an update that
        // began since then has been abandoned, and the count is that of the dead alone. This does not hold for a count at its
        // greatest value, which a living updater may have found and left as it is.
        let is_exact = (ONE_PENDING..PENDING).contains(&found.0);
        let before =
            self.change(|word| (is_exact && Word(word).is_same(found)).then_some((word & !PENDING).wrapping_add(1)));
        (is_exact && before.is_same(found)).then_some(before)
    }

    /// Sets the waiting bit: a waiter is about to sleep, and the process that moves the generation on must wake it. Returns the
    /// word that this finds, which the waiter compares with what it has seen. To be called when the wake word is armed.
    pub(crate) fn await_update(&self) -> Word {
        // ORDERING: relaxed. The load comes after the fence in `WakeWord::arm`, which pairs with the one in `WakeWord::wake`.
        // If it finds the bit, another waiter has set it, and whatever clears the bit afterwards calls `wake`. Suppose this
        // load is stale, and misses that clearing: then the fence of `arm` comes before that of `wake` in the total
        // order of fences, so `wake` sees the armed word, and the waiter does not sleep, or is woken. No other memory is read
        // because of this load: a waiter that finds another generation reads it by `word`, which acquires, before it loads.
        let word = self.generation.load(Ordering::Relaxed);
        if word & WAITING_BIT != 0 || word & GENERATION == 0 {
            return Word(word);
        }
        // ORDERING: a read-modify-write, so it finds the latest word: an update before it is in what it returns, and an update
        // after it finds the bit. The acquire half pairs with the release half of `bump` and `change`, so that a waiter which
        // finds an update here sees what the updater wrote. The release half pairs with the fence in `word`: a check may find
        // this value instead of that of the update before it, and must see what the updater wrote all the same.
        Word(self.generation.fetch_or(WAITING_BIT, Ordering::AcqRel))
    }

    /// Clears the waiting bit. To be called before the waiters are woken: each that has to wait on sets it again.
    pub(crate) fn end_waiting(&self) {
        // ORDERING: pairs with `await_update`. A waiter that sets the bit later than this, in the order of the word's changes,
        // keeps it for the next updater. A waiter that set or found the bit earlier is woken by the caller: `WakeWord::wake`
        // begins with a fence, which comes after this change, and pairs with the one in `WakeWord::arm`, which comes before
        // the waiter's. Acquire and release pair with `bump` and `change` before this and the fence in `word` after it: a check
        // may find this value instead of that of the update before it, and must see what the updater wrote all the same.
        self.generation.fetch_and(!WAITING_BIT, Ordering::AcqRel);
    }

    /// Moves on to `candidate` if the slot has no generation yet. Every process that attaches may do it; the first one counts.
    pub(crate) fn begin(&self, candidate: u64) {
        let candidate = candidate.clamp(LOWEST, GENERATION - 1);
        // ORDERING: relaxed. Pairs with the same compare-exchange in other processes, and only its value matters: it changes
        // once, so a process either writes it or reads the one that was written. The next compare-exchange publishes it.
        let first = match self.first.compare_exchange(0, candidate, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => candidate,
            Err(winner) => winner,
        };
        // ORDERING: release pairs with the fence in `word`, so that a process that reads the generation finds `first`
        // (`updates`). That holds even if `first` is another process's: this one has read it before this release, and by
        // coherence a load that comes after cannot read an older value. Relaxed on failure, as its value is not used: the slot
        // has begun, or a sweep retired it first, and the caller reads the word for either.
        let _ = self.generation.compare_exchange(0, first, Ordering::Release, Ordering::Relaxed);
    }

    /// Makes one update that no holder adopts, so that all of them load again. A slot that has not begun is left alone.
    /// Returns the word before it.
    pub(crate) fn expire(&self) -> Word {
        self.change(|word| (word & GENERATION != 0).then_some(word.wrapping_add(1)))
    }

    /// Makes the key's last update in this table, and sets the retired bit. Does nothing the second time. Returns the word before
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
            // ORDERING: relaxed. Read by `updates`, for people; no other memory is read because of it. Other openers
            // do not come here at the same time: they wait for the lock that this one has on the file.
            self.first.store(generation.get().wrapping_sub(updates), Ordering::Relaxed);
        }
    }

    /// Replaces the word by what `step` makes of it, if anything. Returns the word that `step` was last called with.
    fn change(&self, step: impl Fn(u64) -> Option<u64>) -> Word {
        // ORDERING: the release half of the exchange pairs with the fence in `word`: a check that sees this change sees what was
        // written before it. Its acquire half pairs with the release half of `bump` and of this exchange in other processes:
        // a sweep sees what every updater before it wrote, and so does the successor, and an updater that comes after the sweep
        // sees what the sweeper wrote. The load and the failure are relaxed: their value goes to `step`, and is
        // confirmed by the next exchange, unless `step` makes nothing of it. Then it is returned, and callers decide by it
        // alone. An updater that so finds its table retired gets to the successor by the path, through the kernel.
        let mut word = self.generation.load(Ordering::Relaxed);
        while let Some(next) = step(word) {
            match self.generation.compare_exchange_weak(word, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => break,
                Err(present) => word = present,
            }
        }
        Word(word)
    }

    /// Which key holds the slot, without changing it.
    pub(crate) fn holder(&self, digest: Digest) -> Holder {
        // ORDERING: acquire, by relaxed loads and a fence, since only relaxed loads are defined on memory that is mapped
        // read-only. Pairs with the release half of the compare-exchange in `take`: a search that finds the key comes after
        // all that its claimer saw and did before. The two loads need no order between them: each word changes once, from
        // zero to what it is for ever, so nonzero values of A and B belong together, whenever they are read. A stale zero
        // makes the slot look free or half claimed, as it was: the search misses a claim that is made at the same time, and a
        // process that attaches then goes on to `claim`, where a compare-exchange finds the latest value.
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

    /// Claims the slot for `digest`, or finishes another process's claim; `false` if the slot is another key's.
    pub(crate) fn claim(&self, digest: Digest) -> bool {
        Self::take(&self.digest_a, digest.a) && Self::take(&self.digest_b, digest.b)
    }

    /// The first step of `claim`, for a claimer that stops there.
    #[cfg(test)]
    pub(crate) fn claim_word_a(&self, digest: Digest) -> bool {
        Self::take(&self.digest_a, digest.a)
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
        // `holder` and `digest`. A claimer comes here only when it has seen all earlier slots of its probe sequence taken, by
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
        let a = self.digest_a.load(Ordering::Relaxed);
        let b = self.digest_b.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        (a != 0 && b != 0).then_some(Digest { a, b })
    }

    /// Whether a claim of the slot has begun.
    pub(crate) fn is_claimed(&self) -> bool {
        // ORDERING: relaxed. In a sweep, this load comes after the fence in `Header::begin_retiring`, which pairs with the one
        // in `Header::is_live_after_claim`: it sees every claim after which the table was found live. Elsewhere, a claim
        // that is made at the same time may be seen or not.
        self.digest_a.load(Ordering::Relaxed) != 0
    }

    /// How often the key was updated since it was created here.
    pub(crate) fn updates(&self) -> u64 {
        let generation = self.word().generation().map_or(0, Generation::get);
        // ORDERING: relaxed. The fence in `word` pairs with the release in `begin`, which comes after `first` is decided; so
        // this load cannot find it undecided beside a generation.
        generation.wrapping_sub(self.first.load(Ordering::Relaxed)) & GENERATION
    }

    pub(crate) fn has_label(&self) -> bool {
        // ORDERING: relaxed. Reads what `write_label` stores, and needs no more than whether it has: a stale zero leads to
        // the same label being written again, which does no harm.
        self.key_length.load(Ordering::Relaxed) != 0
    }

    /// Writes the key's text. Every writer writes the same, so they may overlap.
    pub(crate) fn write_label(&self, key: &[u8]) {
        // ORDERING: relaxed for the text: the store of the length, below, publishes it.
        for (word, bytes) in self.label.iter().zip(key.chunks(8)) {
            let mut padded = [0; 8];
            padded[..bytes.len()].copy_from_slice(bytes);
            word.store(label_word(padded), Ordering::Relaxed);
        }
        let length = u32::try_from(key.len()).unwrap_or(u32::MAX);
        // ORDERING: release pairs with the fence in `label`: a process that sees the length sees the text.
        self.key_length.store(length, Ordering::Release);
    }

    /// The key's first bytes, and how long the whole key is.
    pub(crate) fn label(&self) -> (Vec<u8>, usize) {
        // ORDERING: acquire pairs with the release of the length in `write_label`: the loads of the text, which come after the
        // fence, find all of it. Relaxed loads and a fence, since memory that is mapped read-only allows no other loads.
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

/// `word` with one pending update less, unless the count is zero, or at its greatest value.
fn counted_out(word: u64) -> u64 {
    if (ONE_PENDING..PENDING).contains(&word) { word - ONE_PENDING } else { word }
}

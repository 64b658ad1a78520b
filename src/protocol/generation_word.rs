//! The generation word of a key: how its generation moves on.
//!
//! The promise that all of it serves: what a process wrote before its update is visible to every process that sees that
//! update. An update is a release, and a check is an acquire, of the same word.

use crate::generation::{GENERATION, LOWEST};
use crate::protocol::atomic::{AtomicU64, Ordering, fence};
use crate::protocol::word::{ONE_PENDING, PENDING, RETIRED_BIT, WAITING_BIT, Word};

/// The generation word of a slot: all that a check, or an update, touches of shared memory.
#[derive(Debug)]
#[cfg_attr(not(loom), repr(transparent))]
pub(crate) struct GenerationWord(AtomicU64);

impl GenerationWord {
    #[cfg(test)]
    pub(crate) fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// The word of a slot that was never used in a table that has a successor.
    #[cfg(all(feature = "map", not(loom)))]
    pub(crate) const fn retired() -> Self {
        Self(AtomicU64::new(RETIRED_BIT))
    }

    /// The generation word: all that a check reads of shared memory.
    #[inline]
    pub(crate) fn word(&self) -> Word {
        // ORDERING: acquire. Pairs with the release half of every change of the word (`bump`, `change`, `begin`,
        // `await_update`, `end_waiting`): a check that sees an update sees what the updater wrote before it. All changes
        // are read-modify-writes, so a later one does not hide an earlier one: it continues its release sequence. A relaxed
        // load and a fence, not an acquire load, since only relaxed loads are defined on memory that is mapped read-only.
        let word = self.0.load(Ordering::Relaxed);
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
        Word(self.0.fetch_add(1, Ordering::AcqRel))
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
        let word = self.0.load(Ordering::Relaxed);
        if word & WAITING_BIT != 0 || word & GENERATION == 0 {
            return Word(word);
        }
        // ORDERING: a read-modify-write, so it finds the latest word: an update before it is in what it returns, and an update
        // after it finds the bit. The acquire half pairs with the release half of `bump` and `change`, so that a waiter which
        // finds an update here sees what the updater wrote. The release half pairs with the fence in `word`: a check may find
        // this value instead of that of the update before it, and must see what the updater wrote all the same.
        Word(self.0.fetch_or(WAITING_BIT, Ordering::AcqRel))
    }

    /// Clears the waiting bit. To be called before the waiters are woken: each that has to wait on sets it again.
    pub(crate) fn end_waiting(&self) {
        // ORDERING: pairs with `await_update`. A waiter that sets the bit later than this, in the order of the word's changes,
        // keeps it for the next updater. A waiter that set or found the bit earlier is woken by the caller: `WakeWord::wake`
        // begins with a fence, which comes after this change, and pairs with the one in `WakeWord::arm`, which comes before
        // the waiter's. Acquire and release pair with `bump` and `change` before this and the fence in `word` after it: a check
        // may find this value instead of that of the update before it, and must see what the updater wrote all the same.
        self.0.fetch_and(!WAITING_BIT, Ordering::AcqRel);
    }

    /// Begins at `first`, the first generation in the key's record, unless the key has a generation. Every process that attaches
    /// may do it, and all of them with the same number, as they read it from the same record.
    pub(crate) fn begin(&self, first: u64) {
        // ORDERING: release pairs with the fence in `word`, so that a process that reads the generation finds the record word, and
        // the record. That holds even if another process wrote them: this one acquired the record word (`RecordWord::get`, or
        // the failure in `publish`) before this release. Relaxed on failure, as its value is not used: the key has begun, or a
        // sweep retired it first, and the caller reads the word for either.
        let _ = self.0.compare_exchange(0, first.clamp(LOWEST, GENERATION - 1), Ordering::Release, Ordering::Relaxed);
    }

    /// Makes one update that no holder adopts, so that all of them load again. A slot that has not begun is left alone.
    /// Returns the word before it.
    pub(crate) fn expire(&self) -> Word {
        self.change(|word| (word & GENERATION != 0).then_some(word.wrapping_add(1)))
    }

    /// Makes the key's last update in this table, and sets the retired bit; of a key that has not begun, only the bit, which
    /// keeps it from beginning. Does nothing the second time. Returns the word before this call.
    pub(crate) fn retire(&self) -> Word {
        self.change(|word| {
            let last = if word & GENERATION == 0 { word } else { word.wrapping_add(1) };
            (word & RETIRED_BIT == 0).then_some(last | RETIRED_BIT)
        })
    }

    /// Moves past `floor` and the present generation, and clears what processes of an earlier boot left.
    pub(crate) fn renew(&self, floor: u64) {
        self.change(|word| {
            let generation = (word & GENERATION).wrapping_add(1).max(floor & GENERATION) & GENERATION;
            (word & GENERATION != 0).then_some(generation | (word & RETIRED_BIT))
        });
    }

    /// Replaces the word by what `step` makes of it, if anything. Returns the word that `step` was last called with.
    fn change(&self, step: impl Fn(u64) -> Option<u64>) -> Word {
        // ORDERING: the release half of the exchange pairs with the fence in `word`: a check that sees this change sees what was
        // written before it. Its acquire half pairs with the release half of `bump` and of this exchange in other processes:
        // a sweep sees what every updater before it wrote, and so does the successor, and an updater that comes after the sweep
        // sees what the sweeper wrote. The load and the failure are relaxed: their value goes to `step`, and is
        // confirmed by the next exchange, unless `step` makes nothing of it. Then it is returned, and callers decide by it
        // alone. An updater that so finds its table retired gets to the successor by the path, through the kernel.
        let mut word = self.0.load(Ordering::Relaxed);
        while let Some(next) = step(word) {
            match self.0.compare_exchange_weak(word, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => break,
                Err(present) => word = present,
            }
        }
        Word(word)
    }
}

/// `word` with one pending update less, unless the count is zero, or at its greatest value.
fn counted_out(word: u64) -> u64 {
    if (ONE_PENDING..PENDING).contains(&word) { word - ONE_PENDING } else { word }
}

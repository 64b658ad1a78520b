//! Updates that are pending, as a holder follows them.

use crate::generation::GENERATION;
use crate::os::pause::Throttle;
use crate::protocol::atomic::{AtomicU64, Ordering};
use crate::protocol::observed::Observed;
use crate::protocol::word::{WAITING_BIT, Word};

/// What a holder and its clones know of updates that are pending. Times are microseconds.
///
/// Threads that overlap may take one update's time for another's, which costs a load of the state.
#[derive(Debug)]
pub(crate) struct PendingMonitor {
    /// When the next look for their makers may be had.
    look: Throttle,
    /// The generation at which they were found pending, and when that was.
    generation: AtomicU64,
    since: AtomicU64,
    /// A word whose updates nobody will finish, and which could not be recovered; zero if there is none.
    lost: AtomicU64,
    /// How many such losses were found.
    losses: AtomicU64,
}

// ORDERING: relaxed throughout: what is known orders nothing.
impl PendingMonitor {
    /// A reader asks the kernel no more often than this.
    const PAUSE: u64 = 1000;

    pub(crate) fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Self { look: Throttle::every(Self::PAUSE), generation: zero(), since: zero(), lost: zero(), losses: zero() }
    }

    /// Whether it is time to look for the makers of what is pending.
    pub(crate) fn is_due(&self, now: u64) -> bool {
        self.look.take(now)
    }

    /// How long the updates of `word` have been pending, or have been known to be lost, as far as this holder has seen.
    pub(crate) fn age(&self, word: Word, now: u64) -> u64 {
        let is_other = self.generation.swap(word.bits() & GENERATION, Ordering::Relaxed) != word.bits() & GENERATION;
        // If the clock was set back since, the time begins anew.
        if is_other || self.since.load(Ordering::Relaxed) > now {
            self.since.store(now, Ordering::Relaxed);
        }
        now.saturating_sub(self.since.load(Ordering::Relaxed))
    }

    /// Nothing is pending: what is next is another update, though the generation may be the same.
    pub(crate) fn end(&self) {
        self.generation.store(0, Ordering::Relaxed);
        self.lost.store(0, Ordering::Relaxed);
    }

    /// The updates of `word` are lost, and whoever has not loaded the state since is expired.
    pub(crate) fn lose(&self, word: Word, now: u64) {
        self.losses.fetch_add(1, Ordering::Relaxed);
        self.generation.store(word.bits() & GENERATION, Ordering::Relaxed);
        self.since.store(now, Ordering::Relaxed);
        self.lost.store(word.bits() & !WAITING_BIT, Ordering::Relaxed);
    }

    pub(crate) fn has_lost(&self, word: Word) -> bool {
        self.lost.load(Ordering::Relaxed) == word.bits() & !WAITING_BIT
    }

    /// What a ticket for the present `word` is to say.
    pub(crate) fn observed(&self, word: Word) -> Observed {
        match self.has_lost(word) {
            true => Observed::after_loss(word, self.losses.load(Ordering::Relaxed) as u8),
            false => Observed::of(word),
        }
    }
}

//! What a holder knows of updates that are pending: since when, and whether their makers are dead.

use crate::generation::GENERATION;
use crate::os::pause::Throttle;
use crate::protocol::atomic::{AtomicU64, Ordering};
use crate::protocol::observed::Observed;
use crate::protocol::word::{WAITING_BIT, Word};

/// What a holder and its clones know of pending updates. Times are microseconds of the precise clock.
///
/// Its fields are not read and written in one atomic step. Threads that overlap may therefore take the age of one update for that
/// of another, or miss a loss; then the state is loaded once more than necessary, or a loss is found again.
#[derive(Debug)]
pub(crate) struct PendingMonitor {
    /// Limits how often the kernel is asked for the locks of their makers.
    throttle: Throttle,
    /// The generation at which updates were found pending, and when they were first found.
    generation: AtomicU64,
    since: AtomicU64,
    /// The word of updates that no process will finish and that could not be recovered; zero if there is none. They are
    /// called *lost*.
    lost: AtomicU64,
    /// How many losses were found. The number distinguishes state that was loaded before a loss from state that was loaded
    /// after it.
    losses: AtomicU64,
}

// ORDERING: relaxed throughout: no memory is published through these fields. The state itself is ordered by the load of the
// generation word (`GenerationWord::word`) and by `LastObserved`, and each decision that is made here is checked against that word.
impl PendingMonitor {
    /// The least time between two questions to the kernel.
    const PAUSE: u64 = 1000;

    pub(crate) fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Self { throttle: Throttle::every(Self::PAUSE), generation: zero(), since: zero(), lost: zero(), losses: zero() }
    }

    /// Whether it is time to ask for the locks of the makers again. If so, the next time comes a pause later.
    pub(crate) fn is_due(&self, now: u64) -> bool {
        self.throttle.take(now)
    }

    /// How long this holder has known that the updates of `word` are pending, or that they are lost.
    pub(crate) fn age(&self, word: Word, now: u64) -> u64 {
        let is_other = self.generation.swap(word.bits() & GENERATION, Ordering::Relaxed) != word.bits() & GENERATION;
        // If the clock was set back, the age starts again at zero.
        if is_other || self.since.load(Ordering::Relaxed) > now {
            self.since.store(now, Ordering::Relaxed);
        }
        now.saturating_sub(self.since.load(Ordering::Relaxed))
    }

    /// No update is pending: the next one is another one, even at the same generation, as an abandoned update leaves it.
    pub(crate) fn end(&self) {
        self.generation.store(0, Ordering::Relaxed);
        self.lost.store(0, Ordering::Relaxed);
    }

    /// Notes that the updates of `word` are lost: state that was loaded before is expired from here on.
    pub(crate) fn lose(&self, word: Word, now: u64) {
        self.losses.fetch_add(1, Ordering::Relaxed);
        self.generation.store(word.bits() & GENERATION, Ordering::Relaxed);
        self.since.store(now, Ordering::Relaxed);
        self.lost.store(word.bits() & !WAITING_BIT, Ordering::Relaxed);
    }

    pub(crate) fn has_lost(&self, word: Word) -> bool {
        self.lost.load(Ordering::Relaxed) == word.bits() & !WAITING_BIT
    }

    /// What a ticket holds that is taken at the present `word`.
    pub(crate) fn observed(&self, word: Word) -> Observed {
        match self.has_lost(word) {
            true => Observed::after_loss(word, self.losses.load(Ordering::Relaxed) as u8),
            false => Observed::of(word),
        }
    }
}

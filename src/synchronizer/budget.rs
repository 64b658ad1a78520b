//! How many uses may pass between two checks of the table's path.

use crate::protocol::atomic::{AtomicU32, AtomicU64, Ordering};

/// How many uses of a key may pass before its holder reads the clock to see whether it is time to check the table's path.
///
/// Reading the clock costs more than a check of the generation, so a holder that checks often must read it seldom. The budget
/// follows the rate of use: as long as the rate stays the same, it is spent within [`TARGET`](Self::TARGET), and it is never
/// larger than [`MOST`](Self::MOST). So a slow holder reads the clock at each use, and if the rate suddenly falls, the check of
/// the path is late by `MOST` uses at most.
#[derive(Debug)]
pub(crate) struct CheckBudget {
    left: AtomicU32,
    granted: AtomicU32,
    /// When the budget was granted, in milliseconds.
    since: AtomicU64,
}

// ORDERING: relaxed throughout: the counts publish nothing. A load and the store after it are not one atomic step, as a
// read-modify-write would cost more than the check itself: threads that overlap may lose a count, which delays the next check of
// the path by one use.
impl CheckBudget {
    pub(crate) const MOST: u32 = 64;
    /// How many milliseconds a budget is meant to last. The largest one may be spent sooner.
    const TARGET: u64 = 250;

    /// A budget that is spent, so that the first use reads the clock.
    pub(crate) fn new() -> Self {
        Self { left: AtomicU32::new(0), granted: AtomicU32::new(0), since: AtomicU64::new(0) }
    }

    /// Spends one use; `false` if none was left, and [`renew`](Self::renew) is to be called.
    #[inline]
    pub(crate) fn spend(&self) -> bool {
        let left = self.left.load(Ordering::Relaxed).wrapping_sub(1);
        self.left.store(left, Ordering::Relaxed);
        // The sign is compared, not zero: the subtraction sets the sign flag anyway, and threads that overlap may have gone on
        // below zero.
        left.cast_signed() >= 0
    }

    /// How many uses were spent since the last renewal, except the one that found nothing left.
    pub(crate) fn spent(&self) -> u32 {
        self.granted.load(Ordering::Relaxed).saturating_sub(self.left())
    }

    fn left(&self) -> u32 {
        let left = self.left.load(Ordering::Relaxed).cast_signed().max(0).cast_unsigned();
        left.min(self.granted.load(Ordering::Relaxed))
    }

    /// Grants the next budget, at `now` in milliseconds.
    pub(crate) fn renew(&self, now: u64) {
        let spent = u64::from(self.spent()) + 1;
        let since = self.since.swap(now, Ordering::Relaxed);
        // If the clock was set back, the rate is unknown.
        let within_target = match now.checked_sub(since) {
            Some(elapsed) => spent * Self::TARGET / elapsed.max(1),
            None => 1,
        };
        // At most doubled, so that a few uses in a row do not count as a high rate.
        let grant = within_target.min(2 * spent).min(Self::MOST.into()) as u32;
        // The use that found nothing left is the first one of the new budget.
        let grant = grant.saturating_sub(1);
        self.granted.store(grant, Ordering::Relaxed);
        self.left.store(grant, Ordering::Relaxed);
    }
}

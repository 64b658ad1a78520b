//! How many uses may pass between two checks of the table's path.

use crate::protocol::atomic::{AtomicU32, Ordering};

/// How many uses of a key may pass before its holder reads the clock to see whether it is time to check the table's path.
///
/// Reading the clock costs more than a check of the generation, so a holder that checks often must read it seldom. Each use
/// reads and writes this count alone; how much is granted anew when it is spent is decided by the [`LastGrant`], which need not
/// stand in the same cache line.
#[derive(Debug)]
pub(crate) struct CheckBudget(AtomicU32);

// ORDERING: relaxed throughout: the count publishes nothing. A load and the store after it are not one atomic step, as a
// read-modify-write would cost more than the check itself: threads that overlap may lose a count, which delays the next check of
// the path by one use.
impl CheckBudget {
    /// A budget that is spent, so that the first use reads the clock.
    pub(crate) fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// Spends one use; `false` if none was left, and the budget is to be [renewed](LastGrant::renew).
    #[inline]
    pub(crate) fn spend(&self) -> bool {
        let left = self.0.load(Ordering::Relaxed).wrapping_sub(1);
        self.0.store(left, Ordering::Relaxed);
        // The sign is compared, not zero: the subtraction sets the sign flag anyway, and threads that overlap may have gone on
        // below zero.
        left.cast_signed() >= 0
    }

    fn left(&self) -> u32 {
        self.0.load(Ordering::Relaxed).cast_signed().max(0).cast_unsigned()
    }
}

/// The last grant of a [`CheckBudget`], by which the next one follows the rate of use: as long as the rate stays the same, a
/// budget is spent within [`TARGET`](Self::TARGET), and it is never larger than [`MOST`](Self::MOST). So a slow holder reads the
/// clock at each use, and if the rate suddenly falls, the check of the path is late by `MOST` uses at most.
#[derive(Debug)]
pub(crate) struct LastGrant {
    uses: AtomicU32,
    /// When it was granted: the low half of a time in milliseconds.
    time: AtomicU32,
}

// ORDERING: relaxed throughout: the figures publish nothing. Threads that overlap may mix up two grants, which makes the next
// one larger or smaller, within `MOST`.
impl LastGrant {
    pub(crate) const MOST: u32 = 64;
    /// How many milliseconds a budget is meant to last. The largest one may be spent sooner.
    const TARGET: u64 = 250;

    /// The grant of a new budget, which is spent.
    pub(crate) fn new() -> Self {
        Self { uses: AtomicU32::new(0), time: AtomicU32::new(0) }
    }

    /// How many uses were spent of `budget` since it was granted, except the one that found nothing left.
    pub(crate) fn spent(&self, budget: &CheckBudget) -> u32 {
        self.uses.load(Ordering::Relaxed).saturating_sub(budget.left())
    }

    /// Grants `budget` anew, at `now` in milliseconds.
    pub(crate) fn renew(&self, budget: &CheckBudget, now: u64) {
        let spent = u64::from(self.spent(budget)) + 1;
        let now = now as u32;
        // Not a swap, which would take longer than the rest.
        let since = self.time.load(Ordering::Relaxed);
        self.time.store(now, Ordering::Relaxed);
        // If the clock was set back, the rate is unknown; so it is each time the low half begins anew, once in 49 days. A holder
        // that was idle for just so long seems to be faster than it is, by a factor of two at most, as the grant no more than
        // doubles.
        let most = u64::from(Self::MOST);
        let within_target = match now.checked_sub(since).map(u64::from) {
            // Without the division, which would take longer than all the rest: a holder with a high rate comes here often.
            Some(elapsed) if elapsed * most <= spent * Self::TARGET => most,
            Some(elapsed) => spent * Self::TARGET / elapsed,
            None => 1,
        };
        // At most doubled, so that a few uses in a row do not count as a high rate.
        let grant = within_target.min(2 * spent).min(most) as u32;
        // The use that found nothing left is the first one of the new budget.
        let grant = grant.saturating_sub(1);
        self.uses.store(grant, Ordering::Relaxed);
        budget.0.store(grant, Ordering::Relaxed);
    }
}

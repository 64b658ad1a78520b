//! How soon a change that is not adopted is reported again.

use crate::protocol::atomic::{AtomicU32, AtomicU64, Ordering};
use crate::protocol::observed::Observed;

/// What one holder was last told, so that a loop that does not adopt it, as its loads fail, goes slowly.
///
/// Threads that overlap may take one report for another, which costs or saves a pause.
#[derive(Debug)]
pub(crate) struct Pace {
    /// What the holder had seen at the last report, what was there instead, and when that was, in milliseconds.
    seen: AtomicU64,
    present: AtomicU64,
    last: AtomicU64,
    /// How often that was reported.
    reports: AtomicU32,
    /// How many reports tasks were given in a row without a pause.
    #[cfg(feature = "async")]
    row: AtomicU32,
}

// ORDERING: relaxed throughout: it orders nothing.
impl Pace {
    /// Before the second report of a change, in milliseconds; each further one is twice as late, up to `LONGEST`.
    const SHORTEST: u64 = 10;
    const LONGEST: u64 = 1000;

    pub(crate) fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            seen: zero(),
            present: zero(),
            last: zero(),
            reports: AtomicU32::new(0),
            #[cfg(feature = "async")]
            row: AtomicU32::new(0),
        }
    }

    fn is_same(&self, seen: Observed, present: Observed) -> bool {
        self.seen.load(Ordering::Relaxed) == seen.bits() && self.present.load(Ordering::Relaxed) == present.bits()
    }

    /// For how long a change from `seen` to `present` is not to be reported again; `None` if it was not reported yet.
    pub(crate) fn pause(&self, seen: Observed, present: Observed, now: u64) -> Option<u64> {
        let reports = self.reports.load(Ordering::Relaxed);
        if reports == 0 || !self.is_same(seen, present) {
            return None;
        }
        let pause = (Self::SHORTEST << (reports - 1).min(10)).min(Self::LONGEST);
        // A clock that was set back ends the pause.
        let elapsed = now.checked_sub(self.last.load(Ordering::Relaxed)).unwrap_or(pause);
        Some(pause.saturating_sub(elapsed))
    }

    /// The change from `seen` to `present` is reported.
    pub(crate) fn report(&self, seen: Observed, present: Observed, now: u64) {
        let before = if self.is_same(seen, present) { self.reports.load(Ordering::Relaxed) } else { 0 };
        self.seen.store(seen.bits(), Ordering::Relaxed);
        self.present.store(present.bits(), Ordering::Relaxed);
        self.last.store(now, Ordering::Relaxed);
        self.reports.store(before.saturating_add(1), Ordering::Relaxed);
    }
}

// ORDERING: as above.
#[cfg(feature = "async")]
impl Pace {
    /// A task that is given so many reports in a row lets others run.
    const MOST_IN_A_ROW: u32 = 128;

    /// Whether a task lets others run before it is given a report, which `is_repeated` if it was given it before. If so,
    /// it need not do so again for this one.
    pub(crate) fn yields(&self, is_repeated: bool) -> bool {
        let row = self.row.load(Ordering::Relaxed);
        let yields = row >= if is_repeated { 1 } else { Self::MOST_IN_A_ROW };
        if yields {
            self.end_row();
        }
        yields
    }

    /// A task is given a report. Returns whether it was given one just before.
    pub(crate) fn continue_row(&self) -> bool {
        self.row.fetch_add(1, Ordering::Relaxed) > 0
    }

    /// A task has nothing to do.
    pub(crate) fn end_row(&self) {
        self.row.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_while_the_same_change_is_reported_and_end_with_a_new_one() {
        let (seen, present, next) = (Observed::missing(1), Observed::missing(2), Observed::missing(3));
        let pace = Pace::new();
        assert_eq!(pace.pause(seen, present, 0), None);
        let mut now = 1_000_000;
        for pause in [10, 20, 40, 80, 160, 320, 640, 1000, 1000] {
            pace.report(seen, present, now);
            assert_eq!(pace.pause(seen, present, now), Some(pause));
            assert_eq!(pace.pause(seen, present, now + pause - 1), Some(1));
            assert_eq!(pace.pause(seen, present, 0), Some(0), "the clock was set back");
            assert_eq!((pace.pause(seen, next, now), pace.pause(present, next, now)), (None, None));
            now += pause;
            assert_eq!(pace.pause(seen, present, now), Some(0));
        }
        pace.report(seen, next, now);
        assert_eq!(pace.pause(seen, next, now), Some(10), "a new change begins anew");
    }
}

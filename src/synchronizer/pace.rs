//! How soon a change that is not adopted is reported again.

use crate::protocol::atomic::{AtomicU32, AtomicU64, Ordering};
use crate::protocol::observed::Observed;

/// The last report of a change to one holder. A loop that does not adopt the change, because its loads fail, is slowed down by
/// reporting the same change again only after a pause.
///
/// Threads that overlap may mix up two reports, which adds or saves one pause.
#[derive(Debug)]
pub(crate) struct Pace {
    /// What the holder had seen at the last report, what the key had by then, and the time of the report in milliseconds.
    seen: AtomicU64,
    present: AtomicU64,
    last: AtomicU64,
    /// How often this change was reported.
    reports: AtomicU32,
    /// How many reports tasks got in a row without a pause.
    #[cfg(feature = "async")]
    row: AtomicU32,
}

// ORDERING: relaxed throughout: the fields only decide how soon a report is repeated. The state that a report is about is ordered
// by the generation word, which the waiter reads itself (`GenerationWord::word`).
impl Pace {
    /// The pause before the second report of a change, in milliseconds. Each further pause is twice as long, up to `LONGEST`.
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

    /// How many milliseconds must pass before a change from `seen` to `present` may be reported again; `None` if it has not been
    /// reported yet.
    pub(crate) fn pause(&self, seen: Observed, present: Observed, now: u64) -> Option<u64> {
        let reports = self.reports.load(Ordering::Relaxed);
        if reports == 0 || !self.is_same(seen, present) {
            return None;
        }
        let pause = (Self::SHORTEST << (reports - 1).min(10)).min(Self::LONGEST);
        // If the clock was set back, the pause is over: it must not last until the clock has caught up.
        let elapsed = now.checked_sub(self.last.load(Ordering::Relaxed)).unwrap_or(pause);
        Some(pause.saturating_sub(elapsed))
    }

    /// Notes that the change from `seen` to `present` is reported at `now`.
    pub(crate) fn report(&self, seen: Observed, present: Observed, now: u64) {
        let before = if self.is_same(seen, present) { self.reports.load(Ordering::Relaxed) } else { 0 };
        self.seen.store(seen.bits(), Ordering::Relaxed);
        self.present.store(present.bits(), Ordering::Relaxed);
        self.last.store(now, Ordering::Relaxed);
        self.reports.store(before.saturating_add(1), Ordering::Relaxed);
    }
}

// ORDERING: relaxed throughout: `row` only decides when a task yields, and publishes nothing.
#[cfg(feature = "async")]
impl Pace {
    /// After this many reports in a row, a task yields to others.
    const MOST_IN_A_ROW: u32 = 128;

    /// Whether a task must yield to others before it gets its next report; `is_repeated` says that it got the same report before.
    /// A `true` ends the row, so that the task yields once only for this report.
    pub(crate) fn yields(&self, is_repeated: bool) -> bool {
        let row = self.row.load(Ordering::Relaxed);
        let yields = row >= if is_repeated { 1 } else { Self::MOST_IN_A_ROW };
        if yields {
            self.end_row();
        }
        yields
    }

    /// Counts a report to a task. Returns whether another report came before it in this row.
    pub(crate) fn continue_row(&self) -> bool {
        self.row.fetch_add(1, Ordering::Relaxed) > 0
    }

    /// Ends the row: a task has nothing to do, or yields.
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

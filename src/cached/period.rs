//! Lengths of time on the coarse clock.

use std::time::{Duration, Instant};

/// What is not due before it is over. Times are milliseconds of the coarse clock, which all that waits for a due time reads as
/// well: a finer one would be ahead of it, by up to a tick.
#[derive(Clone, Copy, Debug)]
pub(super) struct Period {
    start: u64,
    length: u64,
}

impl Period {
    pub(super) fn new(start: u64, length: Duration) -> Self {
        Self { start, length: milliseconds(length) }
    }

    /// One that starts later than `now` is over: the clock was set back, and nothing may stand still until it has caught up.
    pub(super) fn is_over(self, now: u64) -> bool {
        now.wrapping_sub(self.start) >= self.length
    }

    /// When it will be over, as far as can be said at `now`; `None` if never.
    pub(super) fn end(self, now: u64) -> Option<Instant> {
        let left = if self.is_over(now) { 0 } else { self.length - now.wrapping_sub(self.start) };
        Instant::now().checked_add(Duration::from_millis(left))
    }
}

/// A fraction is cut off. The longest durations are as good as for ever.
fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_ends_in_time_or_when_the_clock_is_set_back() {
        let period = Period::new(10_000, Duration::from_millis(50));
        assert!([10_000, 10_049].iter().all(|now| !period.is_over(*now)));
        assert!([10_050, 10_051, u64::MAX].iter().all(|now| period.is_over(*now)));
        // A restored checkpoint, or another time namespace.
        assert!([9_999, 5_000, 0].iter().all(|now| period.is_over(*now)), "stands still");
        let for_ever = Period::new(10_000, Duration::MAX);
        assert!([10_000, u64::MAX / 2, 0].iter().all(|now| !for_ever.is_over(*now)));
        assert!(for_ever.end(10_000).is_none());
        assert!(Period::new(10_000, Duration::ZERO).is_over(10_000));
    }
}

//! Periods of time on the coarse clock.

use std::time::{Duration, Instant};

/// A period of time. Times are milliseconds of the coarse clock. Everything that waits for the end of a period must read the same
/// clock, as a finer clock is ahead of it by up to a tick.
#[derive(Clone, Copy, Debug)]
pub(super) struct Period {
    start: u64,
    length: u64,
}

impl Period {
    pub(super) fn new(start: u64, length: Duration) -> Self {
        Self { start, length: milliseconds(length) }
    }

    /// Whether the period is over at `now`. A period that starts later than `now` is over as well: the clock was set back, and
    /// nothing may stand still until it has caught up.
    pub(super) fn is_over(self, now: u64) -> bool {
        !self.is_endless() && now.wrapping_sub(self.start) >= self.length
    }

    /// A period that does not end.
    pub(super) const ENDLESS: Self = Self { start: 0, length: u64::MAX };

    pub(super) fn is_endless(self) -> bool {
        self.length == u64::MAX
    }

    /// The one of the two that ends first; `None` counts as endless.
    pub(super) fn first_to_end(one: Option<Self>, other: Option<Self>) -> Option<Self> {
        one.into_iter().chain(other).filter(|period| !period.is_endless()).min_by_key(|period| period.due())
    }

    /// When the period will be over, estimated at `now`; `None` if it does not end, or too far ahead for an `Instant`.
    pub(super) fn end(self, now: u64) -> Option<Instant> {
        if self.is_endless() {
            return None;
        }
        let left = if self.is_over(now) { 0 } else { self.length - now.wrapping_sub(self.start) };
        Instant::now().checked_add(Duration::from_millis(left))
    }

    /// When the period will be over, unless the clock is set back.
    pub(super) fn due(self) -> u64 {
        self.start.saturating_add(self.length)
    }
}

/// A report to tasks that the value in place is expired. It begins a pause, so that a loop that does not load the value is slowed
/// down.
#[cfg(feature = "async")]
#[derive(Debug)]
pub(super) struct Report {
    /// The address of the entry in place; zero if there is none.
    address: usize,
    pause: Period,
}

#[cfg(feature = "async")]
impl Report {
    /// The pause before the second report of a value, in milliseconds. Each further pause is twice as long, up to `LONGEST`.
    const SHORTEST: u64 = 10;
    const LONGEST: u64 = 1000;

    pub(super) fn after(earlier: Option<&Self>, address: usize) -> Self {
        let before = earlier.filter(|earlier| earlier.is_of(address)).map(|earlier| earlier.pause.length);
        let length = before.map_or(Self::SHORTEST, |before| (2 * before).min(Self::LONGEST));
        Self { address, pause: Period { start: crate::os::clock::coarse_now(), length } }
    }

    pub(super) fn is_of(&self, address: usize) -> bool {
        self.address == address
    }

    pub(super) fn pause(&self) -> Period {
        self.pause
    }
}

/// The whole milliseconds of `duration`. Durations that do not fit last for ever in practice.
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
        assert!([10_000, 9_999, u64::MAX / 2, u64::MAX, 0].iter().all(|now| !for_ever.is_over(*now)));
        assert!(for_ever.end(10_000).is_none(), "a wait would be cut short");
        assert!(Period::new(10_000, Duration::ZERO).is_over(10_000));
    }
}

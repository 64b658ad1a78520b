//! The clocks, and waiting until a deadline.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};

/// Milliseconds of a clock that only goes forward, precise to a few milliseconds; the cheapest clock.
#[inline]
pub(crate) fn coarse_now() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE)
        .map_or(0, |time| time.tv_sec() as u64 * 1000 + time.tv_nsec() as u64 / 1_000_000)
}

/// Microseconds of a clock that only goes forward.
pub(crate) fn precise_now() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |time| time.tv_sec() as u64 * 1_000_000 + time.tv_nsec() as u64 / 1000)
}

/// Microseconds since the epoch, by the wall clock.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_micros() as u64)
}

/// The latest time at which a wait ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Deadline {
    pub(crate) at: Instant,
    /// How far ahead that was at first. A deadline that lies further ahead counts as reached: the clock was set back, and no
    /// wait may last until the clock has caught up.
    length: Duration,
}

impl Deadline {
    pub(crate) fn at(at: Instant) -> Self {
        Self { at, length: at.saturating_duration_since(Instant::now()) }
    }

    /// `None` if it lies beyond what the clock can represent: then there is no deadline.
    pub(crate) fn after(length: Duration) -> Option<Self> {
        Instant::now().checked_add(length).map(|at| Self { at, length })
    }

    pub(crate) fn is_reached(self) -> bool {
        self.left().is_zero()
    }

    pub(crate) fn left(self) -> Duration {
        let left = self.at.saturating_duration_since(Instant::now());
        if left > self.length { Duration::ZERO } else { left }
    }
}

/// Repeats `attempt` until it returns something, for as long as `patience` lasts.
pub(crate) fn with_patience<R, E>(
    patience: Duration,
    attempt: impl Fn() -> Result<Option<R>, E>,
) -> Result<Option<R>, E> {
    let end = Deadline::after(patience);
    loop {
        match attempt()? {
            None if !end.is_some_and(Deadline::is_reached) => {
                std::thread::sleep(Duration::from_millis(1).min(patience))
            }
            result => return Ok(result),
        }
    }
}

//! Pauses, as threads of one process keep them together.

use crate::protocol::atomic::{AtomicU64, Ordering};

/// Runs from the first time that it is asked.
#[derive(Debug)]
pub(crate) struct FirstSeen(AtomicU64);

impl FirstSeen {
    pub(crate) fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    pub(crate) fn elapsed(&self, now: u64) -> u64 {
        // ORDERING: relaxed: it orders nothing.
        match self.0.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed) {
            Err(start) if start <= now => now - start,
            // The clock was set back since: it starts anew.
            Err(_) => {
                self.0.store(now, Ordering::Relaxed);
                0
            }
            Ok(_) => 0,
        }
    }
}

/// A point in time that threads take turns at. One that lies further ahead than its own pause is due: the clock was set back,
/// as by a restored checkpoint.
#[derive(Debug)]
pub(crate) struct Throttle {
    due: AtomicU64,
    pause: u64,
}

// ORDERING: relaxed throughout: it guards nothing but the cost of two threads doing the same.
impl Throttle {
    /// Due at once, and `pause` after each turn that is taken; both in the unit of the clock that is asked about.
    pub(crate) fn every(pause: u64) -> Self {
        Self { due: AtomicU64::new(0), pause }
    }

    /// Due now.
    #[cfg(test)]
    pub(crate) fn expedite(&self) {
        self.due.store(0, Ordering::Relaxed);
    }

    /// Whether it is due at `now`; if so, the caller has the turn, and the next one is a pause later.
    pub(crate) fn take(&self, now: u64) -> bool {
        let due = self.due.load(Ordering::Relaxed);
        let has_come = now >= due || due - now > self.pause;
        let next = now + self.pause;
        has_come && self.due.compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

/// When to try again what has failed: soon at first, and less often the longer it goes on. Times are milliseconds; one that is
/// still to come, as the clock was set back, is long ago.
#[derive(Debug)]
pub(crate) struct Backoff {
    failed: AtomicU64,
    /// Zero until it fails.
    pause: AtomicU64,
    longest: u64,
}

// ORDERING: relaxed throughout: it guards nothing but the cost of an attempt more.
impl Backoff {
    const SHORTEST: u64 = 4;

    pub(crate) fn up_to(longest: u64) -> Self {
        Self { failed: AtomicU64::new(0), pause: AtomicU64::new(0), longest }
    }

    pub(crate) fn is_due(&self, now: u64) -> bool {
        now.wrapping_sub(self.failed.load(Ordering::Relaxed)) >= self.pause.load(Ordering::Relaxed)
    }

    /// Whether the longest pause has passed since it failed.
    pub(crate) fn is_long_ago(&self, now: u64) -> bool {
        self.pause.load(Ordering::Relaxed) == 0 || now.wrapping_sub(self.failed.load(Ordering::Relaxed)) >= self.longest
    }

    /// It has failed at `now`.
    pub(crate) fn fail(&self, now: u64) {
        let pause = (2 * self.pause.load(Ordering::Relaxed)).clamp(Self::SHORTEST, self.longest);
        self.pause.store(pause, Ordering::Relaxed);
        self.failed.store(now, Ordering::Relaxed);
    }

    /// It has not failed: the next failure is the first one again.
    pub(crate) fn end(&self) {
        self.pause.store(0, Ordering::Relaxed);
    }
}

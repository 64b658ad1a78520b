//! Pauses that the threads of one process share.

use crate::protocol::atomic::{AtomicU64, Ordering};

/// The time since it was first asked for.
#[derive(Debug)]
pub(crate) struct FirstSeen(AtomicU64);

impl FirstSeen {
    pub(crate) fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    pub(crate) fn elapsed(&self, now: u64) -> u64 {
        // ORDERING: relaxed, and so is the store below: the word holds a time and guards no other memory. Only one exchange
        // finds zero, so all threads agree on one start; if several find that the clock was set back, each starts the time anew
        // at nearly the same moment.
        match self.0.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed) {
            Err(start) if start <= now => now - start,
            // The clock was set back since: the time starts anew.
            Err(_) => {
                self.0.store(now, Ordering::Relaxed);
                0
            }
            Ok(_) => 0,
        }
    }
}

/// Lets one thread through per pause. A due time that lies further ahead than one pause counts as reached: the clock was set
/// back, as by a restored checkpoint.
#[derive(Debug)]
pub(crate) struct Throttle {
    due: AtomicU64,
    pause: u64,
}

// ORDERING: relaxed throughout: the word guards no other memory. The exchange in `take` gives each due time to one thread, by
// atomicity alone; a thread that reads an older time fails in that exchange. `expedite` is for tests of one thread.
impl Throttle {
    /// Due at once, and then `pause` after each time it was taken, in the unit of the clock whose times are passed in.
    pub(crate) fn every(pause: u64) -> Self {
        Self { due: AtomicU64::new(0), pause }
    }

    /// Due now.
    #[cfg(test)]
    pub(crate) fn expedite(&self) {
        self.due.store(0, Ordering::Relaxed);
    }

    /// Whether it is due at `now`; if so, the caller alone is let through, and the next one a pause later.
    #[inline]
    pub(crate) fn take(&self, now: u64) -> bool {
        let due = self.due.load(Ordering::Relaxed);
        let has_come = now >= due || due - now > self.pause;
        let next = now + self.pause;
        has_come && self.due.compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

/// When to try again what has failed: soon at first, and less often the longer it keeps failing. Times are milliseconds; a time
/// of failure that lies ahead, as the clock was set back, counts as long ago.
#[derive(Debug)]
pub(crate) struct Backoff {
    failed: AtomicU64,
    /// Zero until it fails.
    pause: AtomicU64,
    longest: u64,
}

// ORDERING: relaxed throughout: the two words guard no other memory. A thread that sees one of them older than the other, or
// loses a store to another thread, makes one attempt too many or waits for one pause too long.
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

    /// It succeeded: the next failure counts as the first one again.
    pub(crate) fn end(&self) {
        self.pause.store(0, Ordering::Relaxed);
    }
}

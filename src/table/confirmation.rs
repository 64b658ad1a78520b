//! Whether the path is known to name the table's file.

use crate::protocol::atomic::{AtomicU32, AtomicU64, Ordering};

/// When the path was last seen to name the table's file, and whether that is too long ago to rely on it.
#[derive(Debug)]
pub(crate) struct Confirmation {
    is_doubtful: AtomicU32,
    /// In milliseconds.
    time: AtomicU64,
}

// ORDERING: relaxed throughout: the two words guard no other memory. A holder that sees a doubt, or a confirmation, late is as
// late as if the path had been revalidated that much later; the pause between revalidations allows for that. The swap in
// `doubt` reports the beginning of a doubt to one thread, by atomicity alone.
impl Confirmation {
    /// For how many milliseconds a revalidation is good: within this time, another one finds out what has become of the file.
    const GOOD: u64 = 1000;

    pub(crate) fn at(now: u64) -> Self {
        Self { is_doubtful: AtomicU32::new(0), time: AtomicU64::new(now) }
    }

    #[inline]
    pub(crate) fn is_doubtful(&self) -> bool {
        self.is_doubtful.load(Ordering::Relaxed) != 0
    }

    pub(crate) fn confirm(&self, now: u64) {
        self.time.store(now, Ordering::Relaxed);
        self.is_doubtful.store(0, Ordering::Relaxed);
    }

    /// A revalidation could not find out whether the path names the file. Returns whether the doubt begins with it.
    pub(crate) fn doubt(&self, now: u64) -> bool {
        // A time that lies ahead, as the clock was set back, counts as long ago.
        let is_old = now.wrapping_sub(self.time.load(Ordering::Relaxed)) >= Self::GOOD;
        is_old && self.is_doubtful.swap(1, Ordering::Relaxed) == 0
    }
}

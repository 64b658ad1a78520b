//! The words that processes sleep on.

use std::time::Duration;

use crate::protocol::atomic::{AtomicU32, Ordering, fence};

/// A count that processes sleep on: odd while one sleeps, or is about to. Who wakes them adds 1.
#[derive(Debug)]
#[cfg_attr(not(loom), repr(transparent))]
pub(crate) struct WakeWord {
    word: AtomicU32,
    #[cfg(loom)]
    sleepers: crate::protocol::futex::Sleepers,
}

/// The value that its holder is about to sleep on.
#[derive(Clone, Copy, Debug)]
#[must_use = "nobody is woken who does not sleep"]
pub(crate) struct WaitToken(u32);

const SLEEPING: u32 = 1;

impl WakeWord {
    #[cfg(test)]
    pub(crate) fn new() -> Self {
        Self {
            word: AtomicU32::new(0),
            #[cfg(loom)]
            sleepers: crate::protocol::futex::Sleepers::default(),
        }
    }

    /// Whether who has armed it has not been woken.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn is_same(&self, armed: WaitToken) -> bool {
        self.word.load(Ordering::Relaxed) == armed.0
    }

    /// Says that somebody is about to sleep. What he waits for must be looked at after this.
    pub(crate) fn arm(&self) -> WaitToken {
        let armed = self.word.fetch_or(SLEEPING, Ordering::Relaxed) | SLEEPING;
        // ORDERING: with the fence in `wake`, one of two holds: the sleeper's next look at what he waits for sees the
        // change, or who made it sees that somebody sleeps (store, fence, load on both sides).
        fence(Ordering::SeqCst);
        WaitToken(armed)
    }

    /// Wakes all who sleep. To be called after the change that they wait for.
    pub(crate) fn wake(&self) {
        // ORDERING: the waker's half of `arm`.
        fence(Ordering::SeqCst);
        let woken = |word: u32| (word & SLEEPING != 0).then(|| word.wrapping_add(1));
        // ORDERING: relaxed: who is woken, or finds the word moved, looks at what he waits for, and not at this one.
        if self.word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, woken).is_ok() {
            self.wake_all();
        }
    }
}

#[cfg(not(loom))]
impl WakeWord {
    /// Sleeps until the word is woken, unless it was since it was armed; at most for `limit`. May return sooner.
    pub(crate) fn sleep(&self, armed: WaitToken, limit: Duration) {
        crate::protocol::futex::sleep_on(&self.word, armed.0, limit);
    }

    /// As [`sleep`](Self::sleep), on several words.
    pub(crate) fn sleep_on_any(armed: &[(&Self, WaitToken)], limit: Duration) {
        match armed {
            [(word, armed)] => word.sleep(*armed, limit),
            several => {
                let words: Vec<_> = several.iter().map(|(word, armed)| (&word.word, armed.0)).collect();
                crate::protocol::futex::sleep_on_any(&words, limit);
            }
        }
    }

    fn wake_all(&self) {
        crate::protocol::futex::wake_all(&self.word);
    }
}

#[cfg(loom)]
impl WakeWord {
    /// Without a limit, so that a wake-up which is lost is found out.
    pub(crate) fn sleep(&self, armed: WaitToken, _limit: Duration) {
        self.sleepers.sleep_if(|| self.word.load(Ordering::Relaxed) == armed.0);
    }

    fn wake_all(&self) {
        self.sleepers.wake_all();
    }
}

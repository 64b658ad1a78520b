//! The words that processes sleep on.

use std::time::Duration;

use crate::protocol::atomic::{AtomicU32, Ordering, fence};

/// A count that processes sleep on: odd while one sleeps, or is about to. A wakeup adds 1.
///
/// A count, not a flag: a waiter that has armed the word but is not asleep yet must find it changed by a wakeup, even if another
/// waiter has armed it again since. The count would have to come round within that moment, after 2^31 wakeups.
#[derive(Debug)]
#[cfg_attr(not(loom), repr(transparent))]
pub(crate) struct WakeWord {
    word: AtomicU32,
    #[cfg(loom)]
    sleepers: crate::protocol::futex::Sleepers,
}

/// The value that its holder is about to sleep on.
#[derive(Clone, Copy, Debug)]
#[must_use = "a word is armed to sleep on it"]
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

    /// Whether there was no wakeup since the word was `armed`.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn is_same(&self, armed: WaitToken) -> bool {
        // ORDERING: relaxed: the test's only thread has made every change that `arm` and `wake` make of it.
        self.word.load(Ordering::Relaxed) == armed.0
    }

    /// Marks the word as one that a waiter is about to sleep on. The waiter must check what it waits for after this.
    pub(crate) fn arm(&self) -> WaitToken {
        // ORDERING: relaxed. Pairs with the exchange in `wake`: both are read-modify-writes, so either this one comes first, and
        // the wakeup moves the word on from the token, or the token is of the word after that wakeup. Other memory is ordered
        // by the fence.
        let armed = self.word.fetch_or(SLEEPING, Ordering::Relaxed) | SLEEPING;
        // ORDERING: sequentially consistent, as this orders a store before a load, which no release and acquire do. Pairs with
        // the fence in `wake` (store, fence, load on both sides). One of the two comes first. If it is that one, the waiter's
        // next load of what it waits for sees the change; if it is this one, the load in `wake` sees that the word is armed.
        fence(Ordering::SeqCst);
        WaitToken(armed)
    }

    /// Wakes all waiters that sleep on the word. To be called after the change that they wait for.
    pub(crate) fn wake(&self) {
        // ORDERING: sequentially consistent. Pairs with the fence in `arm`: the change was made before this, and the load of the
        // word comes after it. So a waiter that has missed the change has its word seen as armed here.
        fence(Ordering::SeqCst);
        let woken = |word: u32| (word & SLEEPING != 0).then(|| word.wrapping_add(1));
        // ORDERING: relaxed. Pairs with the read-modify-write in `arm`, and with the comparison that the kernel makes before
        // it puts a waiter to sleep. Neither passes on more than the value: a waiter that is woken, or finds the word moved on,
        // loads what it waits for anew, by an ordering of that load. If the word is not armed, it stays as it is, and its
        // cache line stays shared.
        if self.word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, woken).is_ok() {
            self.wake_all();
        }
    }
}

#[cfg(not(loom))]
impl WakeWord {
    /// Sleeps until the next wakeup, unless there was one since the word was armed; at most for `limit`. May return sooner.
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
    /// Without a limit, so that a lost wakeup is a deadlock, which loom reports.
    pub(crate) fn sleep(&self, armed: WaitToken, _limit: Duration) {
        // ORDERING: relaxed. Pairs with the exchange in `wake`: the lock in `Sleepers`, which `wake_all` takes after that, orders
        // the two as the kernel does.
        self.sleepers.sleep_if(|| self.word.load(Ordering::Relaxed) == armed.0);
    }

    fn wake_all(&self) {
        self.sleepers.wake_all();
    }
}

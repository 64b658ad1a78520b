//! The edge to the operating system's futexes, which processes sleep on.
//!
//! All are shared: with the private flag, the kernel would not find the sleepers of other processes.

#[cfg(not(loom))]
pub(crate) use system::{BLIND, sleep_on, sleep_on_any, wake_all};

#[cfg(not(loom))]
mod system {
    use std::thread::sleep;
    use std::time::Duration;

    use rustix::io::Errno;
    use rustix::thread::futex::{self, ClockId, Flags, Timespec, Wait, WaitFlags, WaitPtr, WaitvFlags};
    use rustix::time::clock_gettime;

    use crate::protocol::atomic::AtomicU32;

    /// The longest sleep if the kernel does not let a process sleep until it is woken.
    pub(crate) const BLIND: Duration = Duration::from_millis(10);

    /// How many words a process can sleep on at once: the kernel's `FUTEX_WAITV_MAX`.
    const MOST: usize = 128;

    /// Sleeps until there is a wakeup of `word`, unless it is no longer `value`; at most for `limit`. May return sooner.
    pub(crate) fn sleep_on(word: &AtomicU32, value: u32, limit: Duration) {
        settle(futex::wait(word, Flags::empty(), value, Some(&timespec(limit))), limit);
    }

    /// Sleeps until there is a wakeup of any of the words, unless one no longer has its value; at most for `limit`. May return
    /// sooner.
    pub(crate) fn sleep_on_any(words: &[(&AtomicU32, u32)], limit: Duration) {
        // `futex_wait` takes a length of time, which saves reading the clock; `futex_waitv` takes a point in time only.
        if let [(word, value)] = words {
            return sleep_on(word, *value, limit);
        }
        let wait = |&(word, value): &(&AtomicU32, u32)| {
            let mut wait = Wait::new();
            wait.val = value.into();
            wait.uaddr = WaitPtr::new(word.as_ptr().cast());
            wait.flags = WaitFlags::SIZE_U32;
            wait
        };
        let waits: Vec<_> = words.iter().take(MOST).map(wait).collect();
        let limit = if words.len() > MOST { limit.min(BLIND) } else { limit };
        let end = timespec(limit) + clock_gettime(ClockId::Monotonic);
        settle(futex::waitv(&waits, WaitvFlags::empty(), Some(&end), ClockId::Monotonic).map(drop), limit);
    }

    pub(crate) fn wake_all(word: &AtomicU32) {
        // It fails for an address that cannot be a futex, and then no process sleeps there.
        let _ = futex::wake(word, Flags::empty(), i32::MAX as u32);
    }

    fn settle(result: rustix::io::Result<()>, limit: Duration) {
        match result {
            Ok(()) | Err(Errno::AGAIN | Errno::INTR | Errno::TIMEDOUT) => {}
            // Forbidden by a sandbox, or unknown to an old kernel: then the caller polls.
            Err(_) => sleep(limit.min(BLIND)),
        }
    }

    fn timespec(time: Duration) -> Timespec {
        // A sleep is short: see `wait::SLICE`.
        Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() }
    }
}

/// The kernel's queue of a futex, in models.
#[cfg(loom)]
#[derive(Debug, Default)]
pub(crate) struct Sleepers {
    queue: crate::protocol::atomic::Mutex<()>,
    woken: crate::protocol::atomic::Condvar,
}

#[cfg(loom)]
impl Sleepers {
    /// Compares the word under the lock that wakeups take, as the kernel does: a wakeup comes before the comparison, or finds
    /// the sleeper in the queue.
    pub(crate) fn sleep_if(&self, is_same: impl FnOnce() -> bool) {
        let queue = self.queue.lock().expect("no panic under the lock");
        if is_same() {
            drop(self.woken.wait(queue).expect("no panic under the lock"));
        }
    }

    pub(crate) fn wake_all(&self) {
        drop(self.queue.lock().expect("no panic under the lock"));
        self.woken.notify_all();
    }
}

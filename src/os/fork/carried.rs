//! What a forked child carries on with if it safely can: values behind locks that no other thread can have held at the fork.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::libc;
use nix::sys::stat::stat;

use super::token;
use crate::os::mapping::Chain;

/// A value that each process has for itself, behind locks that a child could inherit while they are held.
///
/// A child goes on with its parent's value if the parent had no other thread at the fork, as a server has none that loads before it
/// forks its workers; and so does that child's child, if the child had none either. Otherwise the child makes a value of its own at the first use, and leaves the parent's alone.
#[derive(Debug)]
pub(crate) struct ForkCarried<T>(Chain<Instance<T>>);

#[derive(Debug)]
struct Instance<T> {
    /// The token of the process whose value it is, or [`LEFT`].
    process: AtomicU64,
    /// There until it is dropped.
    value: Option<T>,
}

/// In the place of a token: no process has the value any more. Tokens are counted from 1.
const LEFT: u64 = u64::MAX;

impl<T> Instance<T> {
    fn new(value: T) -> Self {
        Self { process: AtomicU64::new(token()), value: Some(value) }
    }

    // ORDERING: relaxed, here and in `renew`: the number is only compared. The value came with the fork.
    #[inline]
    fn is_inherited(&self) -> bool {
        self.process.load(Ordering::Relaxed) != token()
    }

    fn get(&self) -> &T {
        self.value.as_ref().expect("there until it is dropped")
    }
}

impl<T> Drop for Instance<T> {
    fn drop(&mut self) {
        if self.is_inherited() {
            // A thread of the parent may have been changing it at the fork, so it may be in any state.
            std::mem::forget(self.value.take());
        }
    }
}

impl<T> ForkCarried<T> {
    pub(crate) fn new(value: T) -> Self {
        watch_forks();
        Self(Chain::new(Instance::new(value)))
    }

    /// The value of this process; `make` makes one if it cannot be the parent's.
    #[inline]
    pub(crate) fn get(&self, make: impl Fn() -> T) -> &T {
        let latest = self.0.latest();
        if latest.is_inherited() { self.renew(make) } else { latest.get() }
    }

    #[cold]
    fn renew(&self, make: impl Fn() -> T) -> &T {
        loop {
            let latest = self.0.latest();
            let process = latest.process.load(Ordering::Relaxed);
            if process == token() {
                return latest.get();
            }
            if process == LEFT {
                self.0.append_to(latest, Instance::new(make()));
            } else {
                // One thread decides for all: if another one forks meanwhile, they may not agree on the answer, and some would use
                // the parent's value, and others a new one.
                let owner = if was_alone(process) { token() } else { LEFT };
                let _ = latest.process.compare_exchange(process, owner, Ordering::Relaxed, Ordering::Relaxed);
            }
        }
    }
}

/// The processes from which this one descends by forks at which each of them had one thread: the tokens of the oldest and the
/// youngest of them, between which lie those of the others; zero if there are none. This process is one of them while it forks.
///
/// None of them can have left a lock held, nor can this process before it has made the value its own.
static OLDEST: AtomicU64 = AtomicU64::new(0);
static YOUNGEST: AtomicU64 = AtomicU64::new(0);
/// What the two are when this process does not fork.
static INHERITED: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

// ORDERING: relaxed, here and in the handlers: only the handlers store to these words, in the thread that forks, which is the first
// one of the child. If several threads fork at once, a child may find too few of its ancestors there, and never too many, as a
// process that has several threads adds none.

/// Whether `process` is an ancestor of this process that had a single thread when it forked, as had all between them.
fn was_alone(process: u64) -> bool {
    let oldest = OLDEST.load(Ordering::Relaxed);
    oldest != 0 && (oldest..=YOUNGEST.load(Ordering::Relaxed)).contains(&process)
}

/// Async-signal-safe, as all that runs at a fork: a system call and a few stores.
extern "C" fn before_fork() {
    let (oldest, youngest) = (OLDEST.load(Ordering::Relaxed), YOUNGEST.load(Ordering::Relaxed));
    INHERITED[0].store(oldest, Ordering::Relaxed);
    INHERITED[1].store(youngest, Ordering::Relaxed);
    // The directory has a link for each thread, besides its own two.
    let has_one_thread = stat(c"/proc/self/task").is_ok_and(|stat| stat.st_nlink == 3);
    let oldest = if oldest == 0 { token() } else { oldest };
    OLDEST.store(if has_one_thread { oldest } else { 0 }, Ordering::Relaxed);
    YOUNGEST.store(if has_one_thread { token() } else { 0 }, Ordering::Relaxed);
}

/// In the parent, so that a child which is forked without handlers does not take this process for one that had a single thread.
extern "C" fn after_fork() {
    OLDEST.store(INHERITED[0].load(Ordering::Relaxed), Ordering::Relaxed);
    YOUNGEST.store(INHERITED[1].load(Ordering::Relaxed), Ordering::Relaxed);
}

fn watch_forks() {
    static HAS_HANDLERS: AtomicBool = AtomicBool::new(false);
    // ORDERING: relaxed: two threads may both register the handlers, which does no harm.
    if !HAS_HANDLERS.swap(true, Ordering::Relaxed) {
        // SAFETY: the handlers are async-signal-safe. If they cannot be registered, for lack of memory, children make values of
        // their own.
        let _ = unsafe { libc::pthread_atfork(Some(before_fork), Some(after_fork), None) };
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn threads_that_answer_differently_whether_the_parent_was_alone_get_one_value() {
        const PARENT: u64 = u64::MAX / 2;
        let set_alone = |token| [&OLDEST, &YOUNGEST].into_iter().for_each(|word| word.store(token, Ordering::Relaxed));
        let carried = ForkCarried::new(1);
        carried.0.latest().process.store(PARENT, Ordering::Relaxed);
        // This thread finds that the parent was not alone, as another thread forks just now. A third one has found that it was.
        let third = Cell::new(0);
        let mine = *carried.get(|| {
            set_alone(PARENT);
            third.set(*carried.get(|| 2));
            set_alone(0);
            3
        });
        assert_eq!((third.get(), *carried.get(|| 4)), (mine, mine));
    }
}

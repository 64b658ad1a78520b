//! Whether the path is known to name the table's file.

use crate::protocol::atomic::{AtomicU32, AtomicU64, Ordering};

/// At least as many as there are tables in doubt in this process: normally zero, so that a use of a key asks this one word, which
/// is nearly always in the processor's cache, and not its own table.
static IN_DOUBT: Apart = Apart(AtomicU32::new(0));

/// Not in a cache line with anything that is written often, nor in the one beside it, as processors fetch lines in pairs.
#[repr(align(128))]
struct Apart(AtomicU32);

/// Whether a table of this process is in doubt. Then each table is to be asked itself; if not, none need be.
#[inline]
pub(super) fn is_any_in_doubt() -> bool {
    // ORDERING: relaxed. A thread that has seen a doubt of its table, by the acquire in `is_doubtful`, finds the count raised, as
    // it was raised before. To a thread that has not, a count that it reads late is no different from a doubt that begins that
    // much later.
    IN_DOUBT.0.load(Ordering::Relaxed) != 0
}

/// When the path was last seen to name the table's file, and whether that is too long ago to rely on it.
///
/// A doubt is counted in `IN_DOUBT` before it begins and until after it has ended. So the count is never too low, not even in a
/// child that another thread forked between two of these steps. In such a child it may stay too high: then each use of a key asks
/// its table, which takes longer and changes nothing else.
#[derive(Debug)]
pub(crate) struct Confirmation {
    is_doubtful: AtomicU32,
    /// In milliseconds.
    time: AtomicU64,
}

impl Confirmation {
    /// For how many milliseconds a revalidation is good: within this time, another one finds out what has become of the file.
    const GOOD: u64 = 1000;

    pub(crate) fn at(now: u64) -> Self {
        Self { is_doubtful: AtomicU32::new(0), time: AtomicU64::new(now) }
    }

    pub(crate) fn is_doubtful(&self) -> bool {
        // ORDERING: acquire pairs with the release in `doubt`: a thread that has seen the doubt finds it counted, until it ends.
        // A holder that sees a doubt, or a confirmation, late is as late as if the path had been revalidated that much later; the
        // pause between revalidations allows for that.
        self.is_doubtful.load(Ordering::Acquire) != 0
    }

    pub(crate) fn confirm(&self, now: u64) {
        // ORDERING: relaxed: the time guards no other memory. A thread that reads an older one in `doubt` begins a doubt sooner,
        // as if it had revalidated the path before this one did.
        self.time.store(now, Ordering::Relaxed);
        self.end();
    }

    /// A revalidation could not find out whether the path names the file. Returns whether the doubt begins with it.
    pub(crate) fn doubt(&self, now: u64) -> bool {
        // A time that lies ahead, as the clock was set back, counts as long ago.
        // ORDERING: relaxed: see the store in `confirm`.
        if now.wrapping_sub(self.time.load(Ordering::Relaxed)) < Self::GOOD {
            return false;
        }
        // ORDERING: relaxed: the release of the swap keeps this before it.
        IN_DOUBT.0.fetch_add(1, Ordering::Relaxed);
        // ORDERING: release pairs with the acquire in `is_doubtful` and in `end`: the doubt is counted before it is seen, and
        // before it is taken back from the count. By atomicity alone, the swap reports the beginning of a doubt to one thread.
        let begins = self.is_doubtful.swap(1, Ordering::Release) == 0;
        if !begins {
            uncount();
        }
        begins
    }

    /// Ends a doubt, if there is one.
    fn end(&self) {
        // ORDERING: acquire pairs with the release in `doubt`: the doubt that this thread takes back was counted before, so the
        // count does not go below zero. By atomicity alone, each doubt is taken back by one thread.
        if self.is_doubtful.swap(0, Ordering::Acquire) != 0 {
            uncount();
        }
    }
}

impl Drop for Confirmation {
    /// A doubt of a table that is closed must not slow the others down for ever.
    fn drop(&mut self) {
        self.end();
    }
}

fn uncount() {
    // ORDERING: release, for the sake of a child that is forked meanwhile: its memory holds what each thread had stored up to some
    // point, and the end of the doubt must be stored before the count is lowered. Threads need no more than the count itself:
    // see `is_any_in_doubt`.
    IN_DOUBT.0.fetch_sub(1, Ordering::Release);
}

#[cfg(test)]
mod tests {
    use std::panic::{catch_unwind, resume_unwind};

    use super::*;
    use crate::protocol::atomic::steps::{allow, allow_all};

    const GOOD: u64 = Confirmation::GOOD;

    fn counted() -> u32 {
        IN_DOUBT.0.load(Ordering::Relaxed)
    }

    /// Stops `act` before each of its steps in turn, and finds the memory that a child has which another thread forks just then.
    fn stop_at_each_step(is_doubtful: bool, act: fn(&Confirmation)) {
        for steps in 0.. {
            let table = Confirmation::at(0);
            assert!(!is_doubtful || table.doubt(GOOD));
            allow(steps, || resume_unwind(Box::new(())));
            let ended = catch_unwind(|| act(&table)).is_ok();
            allow_all();
            assert!(counted() >= u32::from(table.is_doubtful()), "a doubt is not counted after {steps} steps");
            drop(table);
            assert!(counted() <= u32::from(!ended), "{} are counted after {steps} steps, and there is none", counted());
            IN_DOUBT.0.store(0, Ordering::Relaxed);
            if ended {
                assert!(steps > 1, "there were no steps to stop between");
                return;
            }
        }
    }

    /// One test, as the count is that of the process.
    #[test]
    fn tables_in_doubt_are_counted_exactly_and_at_no_step_too_few() {
        let [one, other] = [(); 2].map(|()| Confirmation::at(10_000));
        assert!(!one.doubt(10_000 + GOOD - 1));
        assert_eq!((counted(), is_any_in_doubt()), (0, false), "it was confirmed less than a second before");
        assert!(one.doubt(10_000 + GOOD));
        assert_eq!((counted(), is_any_in_doubt()), (1, true));
        assert_eq!((one.is_doubtful(), other.is_doubtful()), (true, false));
        assert!(!one.doubt(12_000), "a doubt begins once");
        assert!(other.doubt(12_000));
        assert_eq!(counted(), 2);
        one.confirm(13_000);
        one.confirm(13_000);
        assert_eq!((counted(), one.is_doubtful(), other.is_doubtful()), (1, false, true));
        drop(other);
        assert_eq!((counted(), is_any_in_doubt()), (0, false), "a table that is gone is in doubt no more");
        drop(one);
        assert_eq!(counted(), 0, "a table that was not in doubt was not counted");

        stop_at_each_step(false, |table| _ = table.doubt(GOOD));
        stop_at_each_step(true, |table| _ = table.doubt(GOOD));
        stop_at_each_step(true, |table| table.confirm(0));
        stop_at_each_step(false, |table| table.confirm(0));

        let shared = Confirmation::at(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..10_000 {
                        shared.doubt(GOOD);
                        shared.confirm(0);
                    }
                });
            }
        });
        assert_eq!((counted(), shared.is_doubtful()), (0, false), "a doubt was counted, or taken back, twice");
    }
}

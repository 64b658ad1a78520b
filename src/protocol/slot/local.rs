//! The words that a process keeps to itself, shared by its threads.

use super::{Observed, WAITING_BIT, Word};
use crate::generation::GENERATION;
use crate::protocol::atomic::{AtomicU32, AtomicU64, Ordering};

/// What one holder has seen.
#[derive(Debug)]
pub(crate) struct LastObserved(AtomicU64);

impl LastObserved {
    pub(crate) fn new(observed: Observed) -> Self {
        Self(AtomicU64::new(observed.0))
    }

    #[inline]
    pub(crate) fn get(&self) -> Observed {
        // ORDERING: acquire pairs with `adopt`: a thread that finds the state fresh sees the state.
        Observed(self.0.load(Ordering::Acquire))
    }

    #[inline]
    pub(crate) fn adopt(&self, observed: Observed) {
        // ORDERING: release pairs with `get`.
        self.0.store(observed.0, Ordering::Release);
    }

    /// Follows an update from `before` by the holder itself, if `before` is what it had seen.
    #[inline]
    pub(crate) fn follow(&self, before: Word) {
        // A load and a store, not a compare-exchange, which would double the cost of an update. Two threads that
        // change the state behind one synchronizer at once need a lock for the state itself, and it orders this too.
        let seen = self.0.load(Ordering::Relaxed);
        if before.0 & GENERATION == seen {
            // ORDERING: as in `adopt`.
            self.0.store(seen + 1, Ordering::Release);
        }
    }
}

/// A figure for people.
#[cfg(not(loom))]
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

// ORDERING: relaxed throughout: it orders nothing.
#[cfg(not(loom))]
impl Count {
    /// Returns the new count.
    #[inline]
    pub(crate) fn add_one(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// As `add_one`, at half of its cost: threads that overlap may lose a count. Every number on the way is still returned
    /// to somebody.
    #[inline]
    pub(crate) fn add_one_or_so(&self) -> u64 {
        let count = self.0.load(Ordering::Relaxed) + 1;
        self.0.store(count, Ordering::Relaxed);
        count
    }

    pub(crate) fn add(&self, figure: u64) {
        self.0.fetch_add(figure, Ordering::Relaxed);
    }

    /// Not below zero, as what is taken may be a count that was lost.
    pub(crate) fn take_one(&self) {
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| count.checked_sub(1));
    }

    pub(crate) fn clear(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    pub(crate) fn raise_to(&self, figure: u64) {
        self.0.fetch_max(figure, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

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

/// What a holder and its clones know of updates that are pending. Times are microseconds.
///
/// Threads that overlap may take one update's time for another's, which costs a load of the state.
#[derive(Debug)]
pub(crate) struct PendingMonitor {
    /// When the next look for their makers may be had.
    look: Throttle,
    /// The generation at which they were found pending, and when that was.
    generation: AtomicU64,
    since: AtomicU64,
    /// A word whose updates nobody will finish, and which could not be recovered; zero if there is none.
    lost: AtomicU64,
    /// How many such losses were found.
    losses: AtomicU64,
}

// ORDERING: relaxed throughout: what is known orders nothing.
impl PendingMonitor {
    /// A reader asks the kernel no more often than this.
    const PAUSE: u64 = 1000;

    pub(crate) fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Self { look: Throttle::every(Self::PAUSE), generation: zero(), since: zero(), lost: zero(), losses: zero() }
    }

    /// Whether it is time to look for the makers of what is pending.
    pub(crate) fn is_due(&self, now: u64) -> bool {
        self.look.take(now)
    }

    /// How long the updates of `word` have been pending, or have been known to be lost, as far as this holder has seen.
    pub(crate) fn age(&self, word: Word, now: u64) -> u64 {
        let is_other = self.generation.swap(word.0 & GENERATION, Ordering::Relaxed) != word.0 & GENERATION;
        // If the clock was set back since, the time begins anew.
        if is_other || self.since.load(Ordering::Relaxed) > now {
            self.since.store(now, Ordering::Relaxed);
        }
        now.saturating_sub(self.since.load(Ordering::Relaxed))
    }

    /// Nothing is pending: what is next is another update, though the generation may be the same.
    pub(crate) fn end(&self) {
        self.generation.store(0, Ordering::Relaxed);
        self.lost.store(0, Ordering::Relaxed);
    }

    /// The updates of `word` are lost, and whoever has not loaded the state since is expired.
    pub(crate) fn lose(&self, word: Word, now: u64) {
        self.losses.fetch_add(1, Ordering::Relaxed);
        self.generation.store(word.0 & GENERATION, Ordering::Relaxed);
        self.since.store(now, Ordering::Relaxed);
        self.lost.store(word.0 & !WAITING_BIT, Ordering::Relaxed);
    }

    pub(crate) fn has_lost(&self, word: Word) -> bool {
        self.lost.load(Ordering::Relaxed) == word.0 & !WAITING_BIT
    }

    /// What a ticket for the present `word` is to say.
    pub(crate) fn observed(&self, word: Word) -> Observed {
        match self.has_lost(word) {
            true => Observed::after_loss(word, self.losses.load(Ordering::Relaxed) as u8),
            false => Observed::of(word),
        }
    }
}

/// How many uses of a key may pass before its holder reads the clock, to see whether it is time to look at the table's path.
///
/// Reading the clock costs more than a check, so a holder that checks often reads it seldom. The budget follows the rate of
/// use: it is spent within [`TARGET`](Self::TARGET) as long as the rate stays what it was, and never larger than
/// [`MOST`](Self::MOST). So a slow holder reads the clock at each use, and one whose rate suddenly falls is late by `MOST` uses
/// at most.
#[derive(Debug)]
pub(crate) struct CheckBudget {
    left: AtomicU32,
    granted: AtomicU32,
    /// When that was, in milliseconds.
    since: AtomicU64,
}

// ORDERING: relaxed throughout, and no step of several is atomic: threads that overlap may lose a count, which puts the next
// look off by one use.
impl CheckBudget {
    pub(crate) const MOST: u32 = 64;
    /// How many milliseconds a budget is to last at least, if it is not the largest.
    const TARGET: u64 = 250;

    /// Spent: the first use looks.
    pub(crate) fn new() -> Self {
        Self { left: AtomicU32::new(0), granted: AtomicU32::new(0), since: AtomicU64::new(0) }
    }

    /// Spends one use; `false` if none was left, and [`renew`](Self::renew) is to be called.
    #[inline]
    pub(crate) fn spend(&self) -> bool {
        let left = self.left.load(Ordering::Relaxed).wrapping_sub(1);
        self.left.store(left, Ordering::Relaxed);
        // Below zero, as a subtraction reports the sign by itself; a thread that was late may have gone on below.
        left.cast_signed() >= 0
    }

    /// How many uses were spent since the last renewal, but for the one that found nothing left.
    pub(crate) fn spent(&self) -> u32 {
        self.granted.load(Ordering::Relaxed).saturating_sub(self.left())
    }

    fn left(&self) -> u32 {
        let left = self.left.load(Ordering::Relaxed).cast_signed().max(0).cast_unsigned();
        left.min(self.granted.load(Ordering::Relaxed))
    }

    /// Grants the next budget, at `now` in milliseconds.
    pub(crate) fn renew(&self, now: u64) {
        let spent = u64::from(self.spent()) + 1;
        let since = self.since.swap(now, Ordering::Relaxed);
        // If the clock was set back, nothing is known of the rate.
        let within_target = match now.checked_sub(since) {
            Some(elapsed) => spent * Self::TARGET / elapsed.max(1),
            None => 1,
        };
        // At most doubled, so that a few uses in a row do not count as a high rate.
        let grant = within_target.min(2 * spent).min(Self::MOST.into()) as u32;
        // The use that found nothing left is the first of these.
        let grant = grant.saturating_sub(1);
        self.granted.store(grant, Ordering::Relaxed);
        self.left.store(grant, Ordering::Relaxed);
    }
}

/// When the path was last seen to name the table's file, and whether that is too long ago to rely on it.
#[derive(Debug)]
pub(crate) struct Confirmation {
    is_doubtful: AtomicU32,
    /// In milliseconds.
    time: AtomicU64,
}

// ORDERING: relaxed throughout: a holder that finds out late is as late as if it had looked at the path before.
impl Confirmation {
    /// For how many milliseconds a look is good: within this time, another one finds out what has become of the file.
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

    /// A look could not find out whether the path names the file. Returns whether the doubt begins with it.
    pub(crate) fn doubt(&self, now: u64) -> bool {
        // A time that is still to come, as the clock was set back, is long ago.
        let is_old = now.wrapping_sub(self.time.load(Ordering::Relaxed)) >= Self::GOOD;
        is_old && self.is_doubtful.swap(1, Ordering::Relaxed) == 0
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
#[cfg(not(loom))]
#[derive(Debug)]
pub(crate) struct Backoff {
    failed: AtomicU64,
    /// Zero until it fails.
    pause: AtomicU64,
    longest: u64,
}

// ORDERING: relaxed throughout: it guards nothing but the cost of an attempt more.
#[cfg(not(loom))]
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

/// What was last tried.
#[cfg(not(loom))]
#[derive(Debug, Default)]
pub(crate) struct LastTried(AtomicU64);

// ORDERING: relaxed throughout: a thread that finds an old one tries once more.
#[cfg(not(loom))]
impl LastTried {
    pub(crate) fn differs(&self, what: usize) -> bool {
        self.0.load(Ordering::Relaxed) != what as u64
    }

    pub(crate) fn set(&self, what: usize) {
        self.0.store(what as u64, Ordering::Relaxed);
    }
}

/// A pointer to something that is complete before it is published, and never changes afterwards.
#[cfg(not(loom))]
#[derive(Debug)]
pub(crate) struct Published<T>(crate::protocol::atomic::AtomicPtr<T>);

#[cfg(not(loom))]
impl<T> Published<T> {
    pub(crate) fn new(pointer: *mut T) -> Self {
        Self(crate::protocol::atomic::AtomicPtr::new(pointer))
    }

    #[inline]
    pub(crate) fn get(&self) -> *mut T {
        // ORDERING: pairs with `replace`.
        self.0.load(Ordering::Acquire)
    }

    pub(crate) fn set(&self, new: *mut T) {
        // ORDERING: as in `replace`; a swap, and acquire, so that of two threads that set, the second sees all that the
        // first did before.
        self.0.swap(new, Ordering::AcqRel);
    }

    pub(crate) fn replace(&self, old: *mut T, new: *mut T) -> bool {
        // ORDERING: release: what `new` points to is complete for whoever gets it.
        self.0.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }
}

/// A count that grows until it is closed.
#[cfg(not(loom))]
#[derive(Debug)]
pub(crate) struct ClosableMax(AtomicU32);

#[cfg(not(loom))]
impl ClosableMax {
    const CLOSED: u32 = 1 << 31;

    pub(crate) fn new(count: u32) -> Self {
        Self(AtomicU32::new(count))
    }

    pub(crate) fn get(&self) -> u32 {
        // ORDERING: acquire pairs with `raise`: what is counted is there.
        self.0.load(Ordering::Acquire) & !Self::CLOSED
    }

    pub(crate) fn is_closed(&self) -> bool {
        // ORDERING: acquire pairs with `close`.
        self.0.load(Ordering::Acquire) & Self::CLOSED != 0
    }

    /// Raises the count to `count`; `false` if it was closed first.
    pub(crate) fn raise(&self, count: u32) -> bool {
        // ORDERING: release pairs with `get`: the memory that is counted is mapped, and its address is known. That it is
        // one word decides between a raise and a closing.
        let raised = |present: u32| (present & Self::CLOSED == 0).then_some(present.max(count));
        self.0.fetch_update(Ordering::AcqRel, Ordering::Relaxed, raised).is_ok()
    }

    /// Ends the growth, and says where; `None` if it had ended before.
    pub(crate) fn close(&self) -> Option<u32> {
        // ORDERING: acquire pairs with `raise`: all that was counted is seen.
        let before = self.0.fetch_or(Self::CLOSED, Ordering::AcqRel);
        (before & Self::CLOSED == 0).then_some(before)
    }
}

/// Who uses a descriptor, so that it can be closed while other threads have it.
#[cfg(not(loom))]
#[derive(Debug)]
pub(crate) struct ClosableCount(AtomicU32);

#[cfg(not(loom))]
impl ClosableCount {
    const CLOSED: u32 = 1 << 31;

    pub(crate) fn none() -> Self {
        Self(AtomicU32::new(0))
    }

    /// Comes in; `false` if it is closed. Each `true` calls for one `leave`.
    pub(crate) fn enter(&self) -> bool {
        // ORDERING: acquire and release on all three: what one user does with the descriptor comes before its closing.
        let entered = |count: u32| (count & Self::CLOSED == 0).then_some(count + 1);
        self.0.fetch_update(Ordering::AcqRel, Ordering::Relaxed, entered).is_ok()
    }

    /// Goes; `true` for the last one after closing, who is to close the descriptor.
    pub(crate) fn leave(&self) -> bool {
        self.0.fetch_sub(1, Ordering::AcqRel) == Self::CLOSED + 1
    }

    /// Lets nobody in any more; `true` if nobody is in, and the caller is to close the descriptor.
    pub(crate) fn close(&self) -> bool {
        self.0.fetch_or(Self::CLOSED, Ordering::AcqRel) == 0
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::Count;

    #[test]
    fn a_count_does_not_go_below_zero() {
        let count = Count::default();
        count.take_one();
        assert_eq!((count.get(), count.add_one_or_so(), count.add_one()), (0, 1, 2));
    }
}

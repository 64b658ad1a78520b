//! Counts that can be closed, each in one word: whether a change or the closing came first is decided by atomicity.

use crate::protocol::atomic::{AtomicU32, Ordering};

/// A count that grows until it is closed.
#[derive(Debug)]
pub(crate) struct ClosableMax(AtomicU32);

impl ClosableMax {
    const CLOSED: u32 = 1 << 31;

    pub(crate) fn new(count: u32) -> Self {
        Self(AtomicU32::new(count))
    }

    pub(crate) fn get(&self) -> u32 {
        // ORDERING: acquire pairs with the release in `raise`: each segment that is counted was mapped, and its address stored,
        // before the count was raised.
        self.0.load(Ordering::Acquire) & !Self::CLOSED
    }

    pub(crate) fn is_closed(&self) -> bool {
        // ORDERING: acquire pairs with the release in `close`: a thread that finds the count closed sees the final count. A
        // thread that publishes a segment and then finds the count open may still be missed by the thread that closes, as
        // nothing orders their stores before their loads. That costs memory only: the segment is not counted, so no reference
        // to it is given out, and it is unmapped with the mapping.
        self.0.load(Ordering::Acquire) & Self::CLOSED != 0
    }

    /// Raises the count to `count`; `false` if it was closed first.
    pub(crate) fn raise(&self, count: u32) -> bool {
        // ORDERING: release pairs with the acquire in `get`, and with that in `close`: the memory that is counted is mapped,
        // and its address is stored, before the count includes it. Acquire pairs with the release of an earlier `raise` of
        // another thread, whose segments this count includes. Relaxed on failure: the count is closed, and nothing is read
        // because of it.
        let raised = |present: u32| (present & Self::CLOSED == 0).then_some(present.max(count));
        self.0.fetch_update(Ordering::AcqRel, Ordering::Relaxed, raised).is_ok()
    }

    /// Ends the growth, and returns the final count; `None` if it was closed before.
    pub(crate) fn close(&self) -> Option<u32> {
        // ORDERING: acquire pairs with the release in `raise`: the addresses of all segments that are counted are seen, to be
        // replaced by zeros. Release pairs with the acquire in `is_closed`.
        let before = self.0.fetch_or(Self::CLOSED, Ordering::AcqRel);
        (before & Self::CLOSED == 0).then_some(before)
    }
}

/// How many threads use a descriptor, so that it can be closed while other threads use it.
#[derive(Debug)]
pub(crate) struct ClosableCount(AtomicU32);

impl ClosableCount {
    const CLOSED: u32 = 1 << 31;

    pub(crate) fn none() -> Self {
        Self(AtomicU32::new(0))
    }

    /// Counts a user in; `false` if it is closed. Each `true` calls for one `leave`.
    pub(crate) fn enter(&self) -> bool {
        // ORDERING: acquire and release here, in `leave` and in `close`, which form one chain of changes of the word: what a
        // user does with the descriptor comes before its `leave` (release), and the one thread that is to close the descriptor
        // sees that (acquire in its `leave` or `close`). Relaxed on failure: nothing is used then.
        let entered = |count: u32| (count & Self::CLOSED == 0).then_some(count + 1);
        self.0.fetch_update(Ordering::AcqRel, Ordering::Relaxed, entered).is_ok()
    }

    /// Counts a user out; `true` for the last one after closing, which is to close the descriptor.
    pub(crate) fn leave(&self) -> bool {
        // ORDERING: release pairs with the acquire in a later `leave` or `close` that returns `true`: this user is done with the
        // descriptor. Acquire pairs with the release in each earlier `leave`, if this is the last one.
        self.0.fetch_sub(1, Ordering::AcqRel) == Self::CLOSED + 1
    }

    /// Lets no more users in; `true` if there is none, and the caller is to close the descriptor.
    pub(crate) fn close(&self) -> bool {
        // ORDERING: acquire pairs with the release in each earlier `leave`: all users are done if the count is zero. Release
        // pairs with the acquire of the `leave` that finds the count closed.
        self.0.fetch_or(Self::CLOSED, Ordering::AcqRel) == 0
    }
}

//! Counts that can be closed.

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
#[derive(Debug)]
pub(crate) struct ClosableCount(AtomicU32);

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

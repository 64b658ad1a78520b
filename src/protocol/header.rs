//! The words of the header that change.

use crate::protocol::atomic::{Ordering, fence};
use crate::protocol::layout::{Header, LIVE, RETIRED, RETIRING};

impl Header {
    /// How many segments there are, as the file says; the reader checks it against the mapping.
    pub(crate) fn segments(&self) -> u32 {
        // ORDERING: pairs with `add_segment`; relaxed load and fence as in `Slot::word`.
        let segments = self.segments.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        segments
    }

    /// Publishes `segment`, for which there is room.
    pub(crate) fn add_segment(&self, segment: u32) {
        // ORDERING: release pairs with `segments`.
        self.segments.fetch_max(segment + 1, Ordering::Release);
    }

    pub(crate) fn is_live(&self) -> bool {
        self.state.load(Ordering::Relaxed) == LIVE
    }

    pub(crate) fn is_retired(&self) -> bool {
        // ORDERING: pairs with `end_retiring`: the sweep is complete. Relaxed load and fence as in `Slot::word`.
        let state = self.state.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        state == RETIRED
    }

    /// Asked after a claim: `false` if the sweep of a retiring table may have missed the slot.
    pub(crate) fn is_live_after_claim(&self) -> bool {
        // ORDERING: with the fence in `begin_retiring`, one of two holds: this load sees that state, or the sweep sees
        // the claim (store, fence, load on both sides).
        fence(Ordering::SeqCst);
        self.is_live()
    }

    /// Says that the table is being retired; the sweep comes next.
    pub(crate) fn begin_retiring(&self) {
        let _ = self.state.compare_exchange(LIVE, RETIRING, Ordering::AcqRel, Ordering::Relaxed);
        // ORDERING: the sweeper's half of `is_live_after_claim`.
        fence(Ordering::SeqCst);
    }

    /// Says that every slot is retired, and every update to this table carried to its successor, if there is one.
    pub(crate) fn end_retiring(&self) {
        // ORDERING: release pairs with `is_retired`.
        self.state.store(RETIRED, Ordering::Release);
    }

    /// The boot in which the table was last opened for the first time.
    pub(crate) fn boot(&self) -> [u64; 2] {
        // ORDERING: pairs with `set_boot`; relaxed loads and fence as in `Slot::word`.
        let boot = [self.boot[0].load(Ordering::Relaxed), self.boot[1].load(Ordering::Relaxed)];
        fence(Ordering::Acquire);
        boot
    }

    pub(crate) fn set_boot(&self, boot: [u64; 2]) {
        // ORDERING: release: who reads this boot finds every slot renewed. Half of the old id beside half of the new
        // one equals neither, so a reader in between renews again, which does no harm.
        self.boot[0].store(boot[0], Ordering::Release);
        self.boot[1].store(boot[1], Ordering::Release);
    }
}

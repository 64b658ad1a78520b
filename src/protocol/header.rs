//! The words of the header that change.

use crate::protocol::atomic::{Ordering, fence};
use crate::protocol::layout::{Header, LIVE, RETIRED, RETIRING};

impl Header {
    /// How many segments a table of version 1 has, as the file says; the caller checks it against the mapping.
    pub(crate) fn segments_of_version_1(&self) -> u32 {
        // ORDERING: acquire pairs with the release of processes of version 1 that add a segment: a process that sees the number
        // sees the room for every segment that it counts. A relaxed load and a fence, since memory that is mapped read-only allows
        // no other loads.
        let segments = self.segments_of_version_1.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        segments
    }

    pub(crate) fn is_live(&self) -> bool {
        // ORDERING: relaxed. Reads what `begin_retiring` stores. The state may change right after this load, so no caller may
        // rely on its being new, except after a fence of its own: `is_live_after_claim` has one, which pairs with that in
        // `begin_retiring`, and so has `WakeWord::arm`, which pairs with that in `WakeWord::wake` at the end of a sweep. Others
        // learn that the table has ended by the retired bit of their slot.
        self.state.load(Ordering::Relaxed) == LIVE
    }

    pub(crate) fn is_retired(&self) -> bool {
        // ORDERING: acquire pairs with the release in `end_retiring`: a process that sees the end sees every slot retired. A
        // relaxed load and a fence, since memory that is mapped read-only allows no other loads.
        let state = self.state.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        state == RETIRED
    }

    /// To be called after a claim, one's own or one that was found: `false` if the sweep of a retiring table may have missed the
    /// slot.
    pub(crate) fn is_live_after_claim(&self) -> bool {
        // ORDERING: sequentially consistent, as this orders a store before a load, which no release and acquire do. Pairs with
        // the fence in `begin_retiring` (store, fence, load on both sides). One of the two comes first. If it is that one, the
        // load below sees the state; if it is this one, the sweep sees the claim. The claim may be another process's that
        // this one has found: what was read before the fence counts like what was written.
        fence(Ordering::SeqCst);
        self.is_live()
    }

    /// Sets the state to "retiring", unless it is past that. The sweep comes next.
    pub(crate) fn begin_retiring(&self) {
        // A compare-exchange, so that a process that comes late does not bring a retired table back.
        // ORDERING: relaxed: the fence below orders it for `is_live_after_claim`, and no load of the state relies on more. On
        // failure, the state was set before, by a process that may not have got to its fence, so this one does that, too.
        let _ = self.state.compare_exchange(LIVE, RETIRING, Ordering::Relaxed, Ordering::Relaxed);
        // ORDERING: sequentially consistent. Pairs with the fence in `is_live_after_claim`: the state is stored before this, and
        // the sweep's loads, `SlotDigest::is_claimed`, come after it. So a claimer that does not see the state has its slot swept.
        fence(Ordering::SeqCst);
    }

    /// Sets the state to "retired": every slot is retired, and the successor, if there is one, has every update of this table.
    pub(crate) fn end_retiring(&self) {
        // ORDERING: release pairs with the fence in `is_retired`: the sweep comes before this, and a process that sees this state
        // finds no slot live.
        self.state.store(RETIRED, Ordering::Release);
    }

    /// The boot in which the table was last renewed, or made: in each boot, the first process to open it renews it.
    pub(crate) fn boot(&self) -> [u64; 2] {
        // ORDERING: acquire pairs with the releases in `set_boot`: a process that sees this boot's id sees every slot renewed.
        // Relaxed loads and a fence, since memory that is mapped read-only allows no other loads.
        let boot = [self.boot[0].load(Ordering::Relaxed), self.boot[1].load(Ordering::Relaxed)];
        fence(Ordering::Acquire);
        boot
    }

    pub(crate) fn set_boot(&self, boot: [u64; 2]) {
        // ORDERING: release pairs with the fence in `boot`: a process that reads this id finds every slot renewed. Half of
        // the old id beside half of the new one equals neither, so a reader in between renews again, which does no harm.
        self.boot[0].store(boot[0], Ordering::Release);
        self.boot[1].store(boot[1], Ordering::Release);
    }
}

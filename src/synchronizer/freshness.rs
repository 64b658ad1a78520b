//! Whether what a holder has seen is what there is, and attaching to the successor of a table that was replaced.

use std::sync::Arc;

use super::{GenerationSynchronizer, Ticket};
use crate::error::Error;
use crate::os::clock::{coarse_now, precise_now};
use crate::os::lock::Held;
use crate::protocol::atomic::{AtomicU64, Ordering};
use crate::protocol::observed::Observed;
use crate::protocol::word::Word;
use crate::table::incarnation::Place;
use crate::table::retry::retry;

/// How often to ask for a pending update's lock while others take it and let go of it.
const ROUNDS: u32 = 16;

impl GenerationSynchronizer {
    #[inline]
    pub(super) fn is_expired_by(&self, seen: Observed) -> bool {
        let word = self.places.slot().word();
        if seen.is(word) && self.budget.spend() {
            return false;
        }
        self.is_expired_slow(seen, word)
    }

    #[cold]
    pub(super) fn is_expired_slow(&self, seen: Observed, word: Word) -> bool {
        // A pending update brings every check here, and so does an outage.
        let may_wait = seen.is_before_updates_of(word) || seen.is_of_no_slot() || seen.is_in_doubt();
        if !(may_wait && self.budget.spend()) {
            self.revalidate();
        }
        self.is_overtaken(seen)
    }

    /// A ticket of another slot: of a place that this holder has moved on from, or of another key.
    #[cold]
    pub(super) fn is_expired_elsewhere(&self) -> bool {
        if !self.budget.spend() {
            self.revalidate();
        }
        true
    }

    pub(super) fn is_overtaken(&self, seen: Observed) -> bool {
        let word = self.places.slot().word();
        if word.is_live() && self.table.is_latest(self.places.latest().owner()) {
            return !self.is_fresh(seen, word);
        }
        let now = coarse_now();
        let mut missing = self.missing();
        if missing.is_none() {
            if self.try_to_move_on(now) {
                return true;
            }
            // It may have come to another table.
            missing = self.missing();
        }
        missing.map_or_else(|| !seen.outlives_outage(now, self.table.outage_ttl()), |missing| seen != missing)
    }

    /// Attaches to the key in the latest incarnation, unless it was tried in vain just now.
    pub(super) fn try_to_move_on(&self, now: u64) -> bool {
        let latest = self.table.latest();
        // What another holder of this process has attached to is there; and so is the successor of what is retired for good.
        let found = Arc::as_ptr(latest).addr() | usize::from(latest.slots().header().is_retired());
        if !self.retry.is_due(now) && !self.tried.differs(found) {
            return false;
        }
        let has_moved_on = self.move_on().is_ok();
        if !has_moved_on {
            self.retry.fail(now);
            self.tried.set(found);
        }
        has_moved_on
    }

    pub(super) fn is_fresh(&self, seen: Observed, word: Word) -> bool {
        if word.pending() == 0 {
            self.monitor.end();
        }
        if self.table.is_doubtful() {
            return seen.outlives_doubt(word, coarse_now(), self.table.outage_ttl());
        }
        seen.is(word) || seen.is_before_updates_of(word) && self.is_in_flight(seen, word)
    }

    /// Whether the updates that `word` says are pending have a maker who may still finish them, so that what was `seen` is
    /// as fresh as before. If not, this is their end: the key is updated in their place.
    pub(super) fn is_in_flight(&self, seen: Observed, word: Word) -> bool {
        let now = precise_now();
        let is_old = || u128::from(self.monitor.age(word, now)) >= self.table.pending_limit().as_micros();
        let has_lost = self.monitor.has_lost(word);
        if has_lost && !is_old() {
            return seen == self.monitor.observed(word);
        }
        if !has_lost && !self.monitor.is_due(now) {
            return true;
        }
        let place = self.places.latest();
        let mapping = place.owner().mapping();
        for _ in 0..ROUNDS {
            let present = place.word();
            if !present.is_same(word) {
                return seen.is(present) || seen.is_before_updates_of(present);
            }
            match mapping.held(place) {
                Some(Held::Update | Held::Unknown) if !is_old() => return true,
                // They have taken too long for this process. Others have limits of their own, and may go on.
                Some(Held::Update | Held::Unknown) => break,
                // Somebody else is about to recover them.
                Some(Held::Exclusive) => std::thread::yield_now(),
                // Whoever made them may have abandoned them just before: so it is asked again.
                Some(Held::Foreign) | None if self.read_only => std::thread::yield_now(),
                // If that fails for now, somebody else was faster, or another update has begun.
                Some(Held::Foreign) | None if place.owner().recover(place).is_err() => break,
                Some(Held::Foreign) | None => {}
            }
        }
        // They are lost, but not for all. Should one have been abandoned and another begun each time that this process looked,
        // then the loss is none, and hides one that comes later. So it holds no longer than the limit.
        self.monitor.lose(word, now);
        false
    }

    /// To be called when the budget is spent.
    #[cold]
    pub(crate) fn revalidate(&self) {
        let now = coarse_now();
        self.budget.renew(now);
        self.table.revalidate_if_due(now);
    }

    /// Attaches to the key in the latest incarnation of the table. Nothing seen before counts there.
    pub(super) fn move_on(&self) -> Result<&Place, Error> {
        let place = self.table.attach(&self.key);
        // What was seen in an outage serves as long as that lasts.
        if place.is_ok() || !self.seen.get().is_of_no_slot() {
            self.seen.adopt(Observed::NOTHING);
        }
        self.places.append(place?);
        self.retry.end();
        Ok(self.places.latest())
    }

    pub(super) fn present(&self) -> Result<Ticket, Error> {
        let observed = |place: &Place| {
            let word = place.word();
            let observed = if self.table.is_doubtful() {
                Observed::unconfirmed(word, coarse_now())
            } else {
                self.monitor.observed(word)
            };
            word.is_live().then(|| Ticket::of(observed, place))
        };
        match observed(self.places.latest()) {
            Some(ticket) => Ok(ticket),
            None => self.in_successor(observed),
        }
    }

    /// What to load the state with while there is no slot to attach to.
    pub(super) fn unattached(&self) -> Ticket {
        Ticket::of(self.missing().unwrap_or_else(|| Observed::outage(coarse_now())), self.places.slot())
    }

    /// What there is to be seen while the table has no such key, which this holder may not create. Every process that could
    /// update the key attaches to it first.
    pub(super) fn missing(&self) -> Option<Observed> {
        let latest = self.table.latest();
        let may_be_missing = self.read_only && !self.table.is_doubtful() && latest.slots().header().is_live();
        (may_be_missing && matches!(latest.find(&self.key), Ok(None))).then(|| Observed::missing(latest.number()))
    }

    /// Moves on until `action` succeeds, as the table may be replaced again and again.
    pub(super) fn in_successor<R>(&self, action: impl Fn(&Place) -> Option<R>) -> Result<R, Error> {
        retry(|| Ok(action(self.move_on()?))).map_err(|error| self.explain(error))
    }
}

/// What was last tried.
#[derive(Debug, Default)]
pub(crate) struct LastTried(AtomicU64);

// ORDERING: relaxed throughout: a thread that finds an old one tries once more.
impl LastTried {
    pub(crate) fn differs(&self, what: usize) -> bool {
        self.0.load(Ordering::Relaxed) != what as u64
    }

    pub(crate) fn set(&self, what: usize) {
        self.0.store(what as u64, Ordering::Relaxed);
    }
}

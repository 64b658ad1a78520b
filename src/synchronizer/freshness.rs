//! Whether the state of a holder is fresh, and attaching to the successor of a table that was replaced.

use std::sync::Arc;

use super::{Cold, GenerationSynchronizer, Ticket};
use crate::error::Error;
use crate::os::clock::{coarse_now, precise_now};
use crate::os::lock::Held;
use crate::protocol::atomic::{AtomicU64, Ordering};
use crate::protocol::observed::Observed;
use crate::protocol::word::Word;
use crate::table::incarnation::Place;
use crate::table::retry::retry;

/// How often to ask for the lock of a pending update while other processes take and release it.
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
    fn is_expired_slow(&self, seen: Observed, word: Word) -> bool {
        // During a pending update or an outage, every check comes here, so it must not read the clock each time.
        let may_wait = seen.is_before_updates_of(word) || seen.is_of_no_slot() || seen.is_in_doubt();
        if !(may_wait && self.budget.spend()) {
            self.revalidate();
        }
        self.is_overtaken(seen)
    }

    /// For a ticket of another slot: of a place that this holder has moved on from, or of another key.
    #[cold]
    pub(super) fn is_expired_elsewhere(&self) -> bool {
        if !self.budget.spend() {
            self.revalidate();
        }
        true
    }

    pub(super) fn is_overtaken(&self, seen: Observed) -> bool {
        let word = self.places.slot().word();
        if word.is_live() && self.table().is_latest(self.places.latest().owner()) {
            return !self.is_fresh(seen, word);
        }
        let now = coarse_now();
        let mut missing = self.missing();
        if missing.is_none() {
            if self.try_to_move_on(now) {
                return true;
            }
            // The attempt may have led to another table, in which the key is missing.
            missing = self.missing();
        }
        missing.map_or_else(|| !seen.outlives_outage(now, self.table().outage_ttl()), |missing| seen != missing)
    }

    /// Attaches to the key in the latest incarnation, unless that has just failed and nothing has changed since. Returns whether
    /// it attached.
    fn try_to_move_on(&self, now: u64) -> bool {
        let Cold { table, retry, tried, .. } = self.cold();
        let latest = table.latest();
        // Either change makes an attempt worthwhile before it is due: another holder of this process has opened a newer
        // incarnation, or the latest one is retired for good, so that its successor must exist.
        let found = Arc::as_ptr(latest).addr() | usize::from(latest.slots().header().is_retired());
        if !retry.is_due(now) && !tried.differs(found) {
            return false;
        }
        let has_moved_on = self.move_on().is_ok();
        if !has_moved_on {
            retry.fail(now);
            tried.set(found);
        }
        has_moved_on
    }

    fn is_fresh(&self, seen: Observed, word: Word) -> bool {
        if word.pending() == 0 {
            self.cold().monitor.end();
        }
        if self.table().is_doubtful() {
            return seen.outlives_doubt(word, coarse_now(), self.table().outage_ttl());
        }
        seen.is(word) || seen.is_before_updates_of(word) && self.is_in_flight(seen, word)
    }

    /// Whether the updates that are pending in `word` may still be finished by their makers, so that what was `seen` is as fresh
    /// as before. If all of the makers are dead, this recovers the updates: it updates the key in their place. If it cannot, or
    /// the updates have been pending for longer than the `pending_limit`, they count as lost for this process.
    fn is_in_flight(&self, seen: Observed, word: Word) -> bool {
        let Cold { table, read_only, monitor, .. } = self.cold();
        let now = precise_now();
        let is_old = || u128::from(monitor.age(word, now)) >= table.pending_limit().as_micros();
        let has_lost = monitor.has_lost(word);
        if has_lost && !is_old() {
            return seen == monitor.observed(word);
        }
        if !has_lost && !monitor.is_due(now) {
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
                // The updates have exceeded this process's limit. Other processes have limits of their own, and may still wait.
                Some(Held::Update | Held::Unknown) => break,
                // Another process is about to recover them, or to reset the table.
                Some(Held::Exclusive) => std::thread::yield_now(),
                // This process cannot recover them. But their makers may have ended them after the word was read and before the
                // lock was asked for, so both are read again.
                Some(Held::Foreign) | None if *read_only => std::thread::yield_now(),
                // Recovering succeeds without effect if another process was faster, or another update has begun: the next round
                // reads the word again.
                Some(Held::Foreign) | None if place.owner().recover(place).is_err() => break,
                Some(Held::Foreign) | None => {}
            }
        }
        // They count as lost for this process only. That may be wrong: if in each round an update was abandoned and another one
        // begun, the word was the same each time and no update is lost, and this false loss would hide a true one that comes
        // later. So a loss counts no longer than the limit.
        monitor.lose(word, now);
        false
    }

    /// Renews the budget, and checks the table's path if it is time. To be called when the budget is spent.
    #[cold]
    pub(crate) fn revalidate(&self) {
        let now = coarse_now();
        self.cold().grant.renew(&self.budget, now);
        self.table().revalidate_if_due(now);
    }

    /// Attaches to the key in the latest incarnation of the table. What was seen before is void there, as generations of two
    /// incarnations are not compared.
    pub(super) fn move_on(&self) -> Result<&Place, Error> {
        let place = self.table().attach(self.cache_key());
        // State that was loaded during an outage, or while the key was missing, must keep what it has seen for as long as that
        // lasts; otherwise each failed attempt would expire it.
        if place.is_ok() || !self.seen.get().is_of_no_slot() {
            self.seen.adopt(Observed::NOTHING);
        }
        self.places.append(place?);
        self.cold().retry.end();
        Ok(self.places.latest())
    }

    /// A ticket of what the key has now; this moves on if the table was retired.
    pub(super) fn present(&self) -> Result<Ticket, Error> {
        let observed = |place: &Place| {
            let word = place.word();
            let observed = if self.table().is_doubtful() {
                Observed::unconfirmed(word, coarse_now())
            } else {
                self.cold().monitor.observed(word)
            };
            word.is_live().then(|| Ticket::of(observed, place))
        };
        match observed(self.places.latest()) {
            Some(ticket) => Ok(ticket),
            None => self.in_successor(observed),
        }
    }

    /// The ticket to load the state with while there is no slot to attach to.
    pub(super) fn unattached(&self) -> Ticket {
        Ticket::of(self.missing().unwrap_or_else(|| Observed::outage(coarse_now())), self.places.slot())
    }

    /// What a holder that may not create the key sees while the key is missing; `None` if it is not missing. A missing key cannot
    /// be updated unnoticed, as a process must attach to it, and so create it, before it can update it.
    pub(super) fn missing(&self) -> Option<Observed> {
        let latest = self.table().latest();
        let may_be_missing = self.cold().read_only && !self.table().is_doubtful() && latest.slots().header().is_live();
        (may_be_missing && matches!(latest.find(self.cache_key()), Ok(None)))
            .then(|| Observed::missing(latest.number()))
    }

    /// Moves on until `action` returns something, as the table may be replaced again and again.
    pub(super) fn in_successor<R>(&self, action: impl Fn(&Place) -> Option<R>) -> Result<R, Error> {
        retry(|| Ok(action(self.move_on()?))).map_err(|error| self.explain(error))
    }
}

/// What the last attempt was made with, as a number.
#[derive(Debug, Default)]
pub(crate) struct LastTried(AtomicU64);

// ORDERING: relaxed throughout: the number is only compared, and never used as an address. A thread that finds an old number
// makes one more attempt.
impl LastTried {
    pub(crate) fn differs(&self, what: usize) -> bool {
        self.0.load(Ordering::Relaxed) != what as u64
    }

    pub(crate) fn set(&self, what: usize) {
        self.0.store(what as u64, Ordering::Relaxed);
    }
}

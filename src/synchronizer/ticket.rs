//! Tickets: what is taken before a load and adopted after it.

use crate::generation::Generation;
use crate::protocol::generation_word::GenerationWord;
use crate::protocol::observed::Observed;
use crate::protocol::word::Word;
#[cfg(feature = "map")]
use crate::table::incarnation::Incarnation;
use crate::table::incarnation::Place;

/// The generation from before a load, to be [adopted](crate::GenerationSynchronizer::adopt) after it.
///
/// An update during the load changes the generation, so that state that was loaded with this ticket is expired from the start. A
/// ticket is valid for synchronizers of one key and one [`Table`](crate::Table) (clones included): adopted by any other, it
/// leaves the state expired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use = "a ticket does nothing until it is adopted"]
pub struct Ticket {
    pub(super) observed: Observed,
    /// The address of the slot that it was taken from. No other key of this process has that address.
    slot: usize,
}

impl Ticket {
    /// A ticket with which no state is fresh.
    pub(crate) const VOID: Self = Self { observed: Observed::NOTHING, slot: 0 };

    #[inline]
    pub(super) fn of(observed: Observed, slot: &GenerationWord) -> Self {
        Self { observed, slot: std::ptr::from_ref(slot).addr() }
    }

    #[inline]
    pub(super) fn is_of(self, slot: &GenerationWord) -> bool {
        self.slot == std::ptr::from_ref(slot).addr()
    }

    pub(crate) fn may_sleep_on(self, word: Word) -> bool {
        self.observed.may_sleep_on(word)
    }

    /// Whether the key has not been updated in `incarnation` since the ticket was taken there, and no update is pending.
    #[cfg(feature = "map")]
    #[inline]
    pub(crate) fn is_unchanged_in(self, incarnation: &Incarnation) -> bool {
        incarnation.mapping().generation_at(self.slot).is_some_and(|slot| self.observed.is(slot.word()))
    }

    /// Whether it was taken while freshness could not be known: state that is loaded with it counts as fresh for the
    /// [`outage_ttl`](crate::TableOptions::outage_ttl).
    pub(crate) fn is_unconfirmed(self) -> bool {
        self.observed.is_in_doubt()
    }

    /// The generation at which it was taken; `None` if there was no table to attach to, none that could be
    /// [confirmed](crate::TableOptions::outage_ttl) to be the one at its path, or no such key in a read-only table.
    ///
    /// # Progress
    ///
    /// Wait-free; no system call.
    #[must_use]
    pub fn generation(self) -> Option<Generation> {
        self.observed.generation()
    }
}

/// A ticket together with the slot that it was taken from, which stays mapped: it is checked without its synchronizer.
///
/// What makes a ticket of an old place worthless shows in the word of its slot: a table that is replaced is retired, word by word,
/// or its memory is detached.
#[derive(Debug)]
pub(crate) struct HeldTicket {
    place: Place,
    observed: Observed,
}

impl HeldTicket {
    /// A ticket of `place` with which no state is fresh.
    pub(crate) fn void(place: &Place) -> Self {
        Self { place: place.clone(), observed: Observed::NOTHING }
    }

    /// Whether the key has not been updated since the ticket was taken, and no update is pending.
    #[inline]
    pub(crate) fn is_unchanged(&self) -> bool {
        self.observed.is(self.place.word())
    }

    pub(crate) fn ticket(&self) -> Ticket {
        Ticket::of(self.observed, &self.place)
    }

    /// Holds `ticket`, or a void one if that was not taken from `place`, the latest one.
    pub(crate) fn set(&mut self, ticket: Ticket, place: &Place) {
        if !ticket.is_of(&self.place) {
            // Another thread may have moved on since the ticket was taken. Then the next use finds out.
            self.place = place.clone();
        }
        self.observed = if ticket.is_of(&self.place) { ticket.observed } else { Observed::NOTHING };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GenerationSynchronizer, Table};

    #[test]
    fn a_ticket_that_is_held_follows_its_key_to_another_slot() {
        let folder = tempfile::tempdir().unwrap();
        let table = Table::open(folder.path().join("table")).unwrap();
        let [sync, other] = ["key", "other"].map(|key| GenerationSynchronizer::new(&table, key).unwrap());
        let mut held = HeldTicket::void(sync.place());
        assert!(!held.is_unchanged(), "no state was loaded with it");
        for _ in 0..3 {
            let ticket = sync.ticket();
            held.set(ticket, sync.place());
            assert!(held.is_unchanged());
            assert_eq!(held.ticket(), ticket);
            held.set(other.ticket(), sync.place());
            assert!(!held.is_unchanged(), "a ticket of another slot");
            held.set(ticket, sync.place());
            sync.mark_updated().unwrap();
            assert!(!held.is_unchanged());
            held.set(sync.ticket(), sync.place());
            assert!(held.is_unchanged());
            table.reset().unwrap();
            assert!(!held.is_unchanged(), "its slot is retired");
        }
    }
}

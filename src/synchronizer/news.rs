//! What there is to report to waiters.

#[cfg(feature = "async")]
use super::pace::Pace;
use super::{Cold, GenerationSynchronizer, Ticket};
use crate::os::clock::coarse_now;
use crate::protocol::observed::Observed;
use crate::protocol::word::Word;

/// What one reading of a key finds, as far as it matters to the waiters for the key.
#[derive(Clone, Copy, Debug)]
pub(crate) struct News {
    word: Word,
    is_live: bool,
    /// Whether time alone may make the state expired.
    is_doubtful: bool,
    /// Whether it is time to report a table that cannot be attached to once more to the waiters that have seen nothing.
    may_retry: bool,
    read_only: bool,
}

impl News {
    /// Whether there is news for a waiter with `ticket`. `sync` must be the synchronizer that returned this.
    pub(crate) fn is_for(self, sync: &GenerationSynchronizer, ticket: Ticket) -> bool {
        let is_same = self.is_live && ticket.observed.is(self.word) && !self.is_doubtful;
        !is_same && (self.may_retry || ticket.observed != Observed::NOTHING) && sync.is_overtaken(ticket.observed)
    }

    /// The word at which no waiter that had no news can get any: as long as the key's word is equal to it, the key need not be
    /// polled. Zero if there is no such word, as a pending update must be polled, and time alone may expire the state.
    pub(crate) fn quiet(self) -> u64 {
        match self.is_live && !self.is_doubtful && self.word.pending() == 0 {
            true if self.read_only => self.word.bits(),
            true => self.word.awaited().bits(),
            false => 0,
        }
    }
}

impl GenerationSynchronizer {
    /// Whether a waiter that has loaded the state with `ticket` need not wait any longer. A table that cannot be attached to is
    /// news twice a second.
    pub(crate) fn is_news(&self, ticket: Ticket) -> bool {
        self.table().revalidate_if_due(coarse_now());
        let is_lost = ticket.observed == Observed::NOTHING && !self.places.slot().word().is_live();
        (!is_lost || self.cold().retry.is_long_ago(coarse_now())) && self.is_overtaken(ticket.observed)
    }

    /// Sets the waiting bit, so that the next update wakes the sleepers on the table's wake word, unless this process cannot
    /// write to the table. Returns what the key has now.
    pub(crate) fn await_news(&self) -> News {
        let &Cold { ref table, read_only, ref retry, .. } = self.cold();
        let place = self.places.latest();
        let is_live = place.word().is_live() && table.is_latest(place.owner());
        let word = if read_only || !is_live { place.word() } else { place.await_update() };
        let may_retry = is_live || retry.is_long_ago(coarse_now());
        News { word, is_live, is_doubtful: table.is_doubtful(), may_retry, read_only }
    }

    /// If a waiter with `ticket` finds a change that was reported before: how many milliseconds must pass before it may be
    /// reported again, and a ticket with which to wait for any further change. `None` if there is no change, or it has not been
    /// reported yet.
    pub(crate) fn repeat(&self, ticket: Ticket) -> Option<(u64, Ticket)> {
        let present = self.unadopted(ticket)?;
        Some((self.cold().pace.pause(ticket.observed, present.observed, coarse_now())?, present))
    }

    /// Notes that news is reported to a waiter with `ticket`. A report that comes before its pause is over is not counted, as it
    /// does not come from a loop that fails: the waiter's deadline was reached, or the change was reported to another thread.
    pub(crate) fn note_report(&self, ticket: Ticket) {
        let now = coarse_now();
        if let Some(present) = self.unadopted(ticket)
            && matches!(self.cold().pace.pause(ticket.observed, present.observed, now), None | Some(0))
        {
            self.cold().pace.report(ticket.observed, present.observed, now);
        }
    }

    /// The ticket that a waiter with `ticket` could adopt, if it is another one. `None` also if the table cannot be attached to,
    /// which `is_news` paces itself.
    fn unadopted(&self, ticket: Ticket) -> Option<Ticket> {
        let word = self.places.slot().word();
        let present = Ticket::of(self.cold().monitor.observed(word), self.places.slot());
        (word.is_live() && present.observed != ticket.observed).then_some(present)
    }

    /// How reports to tasks are paced.
    #[cfg(feature = "async")]
    pub(crate) fn pace(&self) -> &Pace {
        &self.cold().pace
    }
}

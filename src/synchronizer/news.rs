//! What there is for those that wait.

#[cfg(feature = "async")]
use super::pace::Pace;
use super::{GenerationSynchronizer, Ticket};
use crate::os::clock::coarse_now;
use crate::protocol::observed::Observed;
use crate::protocol::word::Word;

/// What a look at a key finds for those who wait for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct News {
    word: Word,
    is_live: bool,
    /// Whether time alone may make the state expired.
    is_doubtful: bool,
    /// Whether those who have seen nothing are told of a table that cannot be attached to.
    may_retry: bool,
    read_only: bool,
}

impl News {
    /// Whether there is any for `ticket`; `sync` is what gave this.
    pub(crate) fn is_for(self, sync: &GenerationSynchronizer, ticket: Ticket) -> bool {
        let is_same = self.is_live && ticket.observed.is(self.word) && !self.is_doubtful;
        !is_same && (self.may_retry || ticket.observed != Observed::NOTHING) && sync.is_overtaken(ticket.observed)
    }

    /// The word of which there is no news for those to whom there was none; zero if there may be, as a pending update must be
    /// looked after.
    pub(crate) fn quiet(self) -> u64 {
        match self.is_live && !self.is_doubtful && self.word.pending() == 0 {
            true if self.read_only => self.word.bits(),
            true => self.word.awaited().bits(),
            false => 0,
        }
    }
}

impl GenerationSynchronizer {
    /// Whether somebody who has loaded the state with `ticket` need not wait any longer. A table that cannot be attached to
    /// is news twice a second.
    pub(crate) fn is_news(&self, ticket: Ticket) -> bool {
        self.table.revalidate_if_due(coarse_now());
        let is_lost = ticket.observed == Observed::NOTHING && !self.places.slot().word().is_live();
        (!is_lost || self.retry.is_long_ago(coarse_now())) && self.is_overtaken(ticket.observed)
    }

    /// Has the next update wake those who sleep on the table's wake word, unless this process cannot write to the table, and
    /// tells what there is now.
    pub(crate) fn await_news(&self) -> News {
        let place = self.places.latest();
        let is_live = place.word().is_live() && self.table.is_latest(place.owner());
        let word = if self.read_only || !is_live { place.word() } else { place.await_update() };
        let may_retry = is_live || self.retry.is_long_ago(coarse_now());
        News { word, is_live, is_doubtful: self.table.is_doubtful(), may_retry, read_only: self.read_only }
    }

    /// What was reported of the change that somebody with `ticket` finds now: for how many milliseconds it is not to be
    /// reported again, and a ticket for all that comes after it. `None` if there is none, or it was not reported yet.
    pub(crate) fn repeat(&self, ticket: Ticket) -> Option<(u64, Ticket)> {
        let present = self.unadopted(ticket)?;
        Some((self.pace.pause(ticket.observed, present.observed, coarse_now())?, present))
    }

    /// Notes that somebody with `ticket` is told that there is news. It does not count if that was sooner than is due: the
    /// time was up, or another thread was told as well.
    pub(crate) fn note_report(&self, ticket: Ticket) {
        let now = coarse_now();
        if let Some(present) = self.unadopted(ticket)
            && matches!(self.pace.pause(ticket.observed, present.observed, now), None | Some(0))
        {
            self.pace.report(ticket.observed, present.observed, now);
        }
    }

    /// What somebody with `ticket` could adopt. A table that cannot be attached to has a pace of its own.
    fn unadopted(&self, ticket: Ticket) -> Option<Ticket> {
        let word = self.places.slot().word();
        let present = Ticket::of(self.monitor.observed(word), self.places.slot());
        (word.is_live() && present.observed != ticket.observed).then_some(present)
    }

    /// How reports to tasks are paced.
    #[cfg(feature = "async")]
    pub(crate) fn pace(&self) -> &Pace {
        &self.pace
    }
}

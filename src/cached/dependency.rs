//! A key that a value depends on besides its own.

use std::sync::Arc;

use crate::synchronizer::{GenerationSynchronizer, Ticket};
use crate::table::Table;

/// A key that a value depends on, and the ticket that was taken before the value read what is behind the key.
#[derive(Clone)]
pub(super) struct Dependency {
    pub(super) sync: Arc<GenerationSynchronizer>,
    pub(super) ticket: Ticket,
    /// Whether the key is in another table than the value's own.
    is_elsewhere: bool,
}

impl Dependency {
    pub(super) fn new(sync: Arc<GenerationSynchronizer>, ticket: Ticket) -> Self {
        Self { sync, ticket, is_elsewhere: true }
    }

    /// To be called before the value is put in place, with the table of its own key.
    pub(super) fn belongs_to(&mut self, own: &Table) {
        self.is_elsewhere = !self.sync.table().is(own);
    }

    /// Whether the key has not been updated since. The caller has checked the value's own key just now.
    // A check by the synchronizer writes to its memory, for which threads that use one value would compete at each of its keys.
    // So the words are compared first. That is enough in the value's own table, as the path of that was revalidated with its own
    // key if it was time.
    #[inline]
    pub(super) fn holds(&self) -> bool {
        let is_unchanged = !self.is_elsewhere && !Table::is_any_doubtful() && self.sync.is_unchanged_since(self.ticket);
        is_unchanged || !self.sync.is_expired_since(self.ticket)
    }
}

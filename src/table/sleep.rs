//! Sleeping on a table as a whole.

use std::panic::RefUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use super::Table;
use crate::protocol::futex::BLIND;
use crate::protocol::layout::Header;
use crate::protocol::wake::{WaitToken, WakeWord};

impl Table {
    /// The waiters of this process for this table, which the layer above keeps.
    pub(crate) fn companion<T: Default + Send + Sync + RefUnwindSafe + 'static>(&self) -> Arc<T> {
        self.0.companion.get().get()
    }

    /// Arms the table's wake word, so that the next update of any key wakes; `None` if this process cannot sleep on the word.
    pub(crate) fn arm(&self) -> Option<(&WakeWord, WaitToken)> {
        if self.is_read_only() {
            return None;
        }
        let armed = self.with_current(|current| {
            let header = current.slots().header();
            let token = header.wake.word.arm();
            // Checked after arming: if the table is not live, its waiters may have been woken for the last time before the word
            // was armed.
            Ok(header.is_live().then_some((&header.wake.word, token)))
        });
        armed.ok()
    }

    /// Sleeps on the wake word that was armed, at most for `limit`, which must not exceed one slice of a wait.
    pub(crate) fn sleep(&self, armed: Option<(&WakeWord, WaitToken)>, limit: Duration) {
        match armed {
            Some((word, armed)) => word.sleep(armed, limit),
            None if self.is_read_only() => std::thread::sleep(limit.min(BLIND)),
            // There is no live table to sleep on.
            None => std::thread::sleep(limit),
        }
    }

    /// Wakes all waiters that sleep on the table's wake word.
    pub(crate) fn wake_sleepers(&self) {
        if let Some(header) = self.writable_header() {
            header.wake.word.wake();
        }
    }

    fn writable_header(&self) -> Option<&Header> {
        if self.is_read_only() { None } else { self.current().ok().map(|current| current.slots().header()) }
    }
}

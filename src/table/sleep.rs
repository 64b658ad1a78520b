//! Sleeping on a whole table.

use std::panic::RefUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use super::Table;
use crate::protocol::futex::BLIND;
use crate::protocol::layout::Header;
use crate::protocol::wake::{WaitToken, WakeWord};

impl Table {
    /// What waits for this table in this process.
    pub(crate) fn companion<T: Default + Send + Sync + RefUnwindSafe + 'static>(&self) -> Arc<T> {
        self.0.companion.get().get()
    }

    /// Arms the table's wake word, if this process can sleep on it.
    pub(crate) fn arm(&self) -> Option<(&WakeWord, WaitToken)> {
        if self.is_read_only() {
            return None;
        }
        let armed = self.with_current(|current| {
            let header = current.slots().header();
            let token = header.wake.word.arm();
            // Otherwise its sleepers may have been woken for the last time.
            Ok(header.is_live().then_some((&header.wake.word, token)))
        });
        armed.ok()
    }

    /// Sleeps on what was armed; at most for `limit`, which is to be a slice at most.
    pub(crate) fn sleep(&self, armed: Option<(&WakeWord, WaitToken)>, limit: Duration) {
        match armed {
            Some((word, armed)) => word.sleep(armed, limit),
            None if self.is_read_only() => std::thread::sleep(limit.min(BLIND)),
            // There is no table to be had.
            None => std::thread::sleep(limit),
        }
    }

    /// Wakes all who sleep on the table's wake word.
    pub(crate) fn wake_sleepers(&self) {
        if let Some(header) = self.writable_header() {
            header.wake.word.wake();
        }
    }

    fn writable_header(&self) -> Option<&Header> {
        if self.is_read_only() { None } else { self.current().ok().map(|current| current.slots().header()) }
    }
}

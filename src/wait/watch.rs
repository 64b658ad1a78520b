//! Watching all keys of a table, for tools.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::SlotInfo;
use crate::os::clock::Deadline;
use crate::protocol::generation_word::GenerationWord;
use crate::protocol::slots::Memory as _;
use crate::table::Table;
use crate::table::incarnation::Incarnation;
use crate::wait::{SLICE, time_left};

/// The changes of a table's keys as they happen: an iterator that blocks until there is a change, and never ends.
///
/// Made by [`Table::watch`].
#[derive(Debug)]
pub struct Watch {
    table: Table,
    incarnation: Arc<Incarnation>,
    /// The generations that were reported last, by segment and slot; 0, or nothing, for a slot without a key.
    seen: Vec<Vec<u64>>,
    found: VecDeque<SlotInfo>,
}

impl Table {
    /// Watches all keys of the table: returns each change of a generation from now on, with the key's label. Creating a key is a
    /// change, too. Several updates of one key may be reported as one. Keys that are found changed at the same time are reported
    /// in no particular order.
    ///
    /// After a [`reset`](Self::reset), each key is reported when a process attaches to it in the new table.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use gensync::{GenerationSynchronizer, Table};
    ///
    /// # fn main() -> Result<(), gensync::Error> {
    /// let table = Table::options().anonymous()?;
    /// let mut watch = table.watch();
    /// let sync = GenerationSynchronizer::new(&table, "routes")?;
    /// let change = watch.next_timeout(Duration::from_secs(10)).expect("a key was created");
    /// assert_eq!((&*change.label(), Some(change.generation())), ("routes", sync.sync_gen()));
    /// # Ok(()) }
    /// ```
    ///
    /// # Progress
    ///
    /// For each change, the watch scans all slots of the table, and the update that makes the change makes a system call to wake
    /// the watch. Dropping the watch clears the waiting bits of all slots and wakes the waiters of these keys, by system calls:
    /// other waiters set the bits again, and go back to sleep.
    #[must_use]
    pub fn watch(&self) -> Watch {
        let incarnation = Arc::clone(self.latest());
        let mut watch = Watch { table: self.clone(), incarnation, seen: Vec::new(), found: VecDeque::new() };
        watch.scan_slots();
        watch.found.clear();
        watch
    }
}

impl Watch {
    /// The next change, if it comes within `timeout`.
    ///
    /// # Progress
    ///
    /// Blocking, without polling, as [`wait`](crate::GenerationSynchronizer::wait); a read-only table is scanned every 10
    /// milliseconds. Each scan reads all slots, allocates for the changes that it finds, and asks for the locks of updates that
    /// are pending. If the table was replaced, this opens and maps the successor.
    pub fn next_timeout(&mut self, timeout: Duration) -> Option<SlotInfo> {
        self.next_until(Deadline::after(timeout))
    }

    /// The next change, if it comes before `deadline`.
    ///
    /// # Progress
    ///
    /// As [`next_timeout`](Self::next_timeout).
    pub fn next_deadline(&mut self, deadline: Instant) -> Option<SlotInfo> {
        self.next_until(Some(Deadline::at(deadline)))
    }

    fn next_until(&mut self, deadline: Option<Deadline>) -> Option<SlotInfo> {
        loop {
            if let Some(change) = self.found.pop_front() {
                return Some(change);
            }
            let table = self.table.clone();
            let wait_token = table.arm();
            let has_moved = self.scan_slots();
            if has_moved || !self.found.is_empty() {
                continue;
            }
            let limit = time_left(deadline, SLICE)?;
            table.sleep(wait_token, limit);
        }
    }

    /// Reads every slot, and collects what has changed. Returns whether the slots are those of another incarnation than before.
    fn scan_slots(&mut self) -> bool {
        // If the successor cannot be opened now, the next scan tries again.
        let next = self.table.current().ok().filter(|current| !Arc::ptr_eq(current, &self.incarnation)).cloned();
        let has_moved = next.is_some();
        if let Some(next) = next {
            self.incarnation = next;
            self.seen.clear();
        }
        let slots = self.incarnation.slots();
        let segments = slots.memory().reachable().slots;
        self.seen.resize(segments as usize, Vec::new());
        for (segment, index, slot) in slots.claimed(segments) {
            if !self.await_update(slot.generation) {
                continue;
            }
            let segment = &mut self.seen[segment as usize];
            segment.resize(segment.len().max(index + 1), 0);
            let seen = &mut segment[index];
            if let Some(info) = SlotInfo::of(slot, slots)
                && info.generation().get() != *seen
            {
                *seen = info.generation().get();
                self.found.push_back(info);
            }
        }
        has_moved
    }

    /// Sets the waiting bit, so that updates of the slot wake this watch; `false` if the slot is to be skipped.
    fn await_update(&self, slot: &GenerationWord) -> bool {
        if self.table.is_read_only() {
            return slot.word().is_live();
        }
        let word = slot.await_update();
        // There may be no holder of the key left that would notice that the maker is dead.
        if word.pending() > 0 && self.incarnation.mapping().held(slot).is_none() {
            let _ = self.incarnation.recover(slot);
        }
        word.is_live()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if !self.table.is_read_only() {
            let slots = self.incarnation.slots();
            slots.stop_waiting(slots.claimed(slots.memory().reachable().slots).map(|(_, _, slot)| slot.generation));
        }
    }
}

impl Iterator for Watch {
    type Item = SlotInfo;

    fn next(&mut self) -> Option<SlotInfo> {
        loop {
            if let Some(change) = self.next_until(None) {
                return Some(change);
            }
        }
    }
}

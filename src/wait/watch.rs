//! Watching a whole table, for tools.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::SlotInfo;
use crate::os::clock::Deadline;
use crate::protocol::layout::{Slot, segment_slots};
use crate::table::Table;
use crate::table::incarnation::Incarnation;
use crate::wait::{SLICE, time_left};

/// The changes of a table's keys, as they come: an iterator that blocks until there is one, and never ends.
///
/// Made by [`Table::watch`].
#[derive(Debug)]
pub struct Watch {
    table: Table,
    incarnation: Arc<Incarnation>,
    /// The generations that were told, by segment and slot; 0 for a slot without a key.
    seen: Vec<Vec<u64>>,
    found: VecDeque<SlotInfo>,
}

impl Table {
    /// Watches all keys of the table: gives each change of a generation from now on, with the key's label. A key that is
    /// created meanwhile is a change, too. Several updates of a key may be told as one; all keys that have changed at one time
    /// are told in no order.
    ///
    /// After a [`reset`](Self::reset), the keys that are attached to in the new table are told as they come.
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
    /// Each change costs a look at all slots of the table, and the update that makes it a call of the system. So does dropping
    /// the watch, which takes back that somebody waits: those who really do are woken, and go back to sleep.
    #[must_use]
    pub fn watch(&self) -> Watch {
        let incarnation = Arc::clone(self.latest());
        let mut watch = Watch { table: self.clone(), incarnation, seen: Vec::new(), found: VecDeque::new() };
        watch.look();
        watch.found.clear();
        watch
    }
}

impl Watch {
    /// The next change, if it comes within `timeout`.
    ///
    /// # Progress
    ///
    /// Blocking, without polling, as [`wait`](crate::GenerationSynchronizer::wait); with a read-only table, it looks every 10
    /// milliseconds. Each look goes through all slots, allocates for what it finds, and asks for the locks of updates that
    /// are pending. If the table was replaced, its successor is opened and mapped.
    pub fn next_timeout(&mut self, timeout: Duration) -> Option<SlotInfo> {
        self.next_until(Deadline::after(timeout))
    }

    /// The next change, if it comes until `deadline`.
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
            let armed = table.arm();
            let has_moved = self.look();
            if has_moved || !self.found.is_empty() {
                continue;
            }
            let limit = time_left(deadline, SLICE)?;
            table.sleep(armed, limit);
        }
    }

    /// Looks at every slot, and collects what has changed. Returns whether they are those of another incarnation than before.
    fn look(&mut self) -> bool {
        // If the successor cannot be opened now, that is tried again the next time.
        let next = self.table.current().ok().filter(|current| !Arc::ptr_eq(current, &self.incarnation)).cloned();
        let has_moved = next.is_some();
        if let Some(next) = next {
            self.incarnation = next;
            self.seen.clear();
        }
        let slots = self.incarnation.slots();
        let segments = slots.memory().reachable();
        for segment in self.seen.len() as u32..segments {
            self.seen.push(vec![0; segment_slots(self.incarnation.fixed().capacity, segment) as usize]);
        }
        for (segment, index, slot) in slots.claimed(segments) {
            // Told when it has a name.
            if !slot.has_label() || !self.await_update(slot) {
                continue;
            }
            let seen = &mut self.seen[segment as usize][index as usize];
            if let Some(info) = SlotInfo::of(slot, slots.memory())
                && info.generation().get() != *seen
            {
                *seen = info.generation().get();
                self.found.push_back(info);
            }
        }
        has_moved
    }

    /// Has updates of the slot wake this watch; `false` if the slot is not to be looked at.
    fn await_update(&self, slot: &Slot) -> bool {
        if self.table.is_read_only() {
            return slot.word().is_live();
        }
        let word = slot.await_update();
        // It may be that nobody else looks whether its maker is alive.
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
            slots.stop_waiting(slots.claimed(slots.memory().reachable()).map(|(_, _, slot)| slot));
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

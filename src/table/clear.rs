//! Updating keys that are chosen by what the table says about them.

use super::Table;
use crate::error::{Error, ErrorKind};
use crate::protocol::slots::Memory as _;
use crate::table::incarnation::Incarnation;
use crate::table::info::SlotInfo;

impl Table {
    /// Expires every holder's state of each key that `matches`, as
    /// [`clear`](crate::GenerationSynchronizer::clear) does, and returns those keys as they are then.
    ///
    /// This also ends updates of those keys that killed processes have left pending.
    ///
    /// Meant for keys of which only the label is known, or for many keys. `matches` is called for every key, and for all of
    /// them again if the table is replaced meanwhile.
    ///
    /// ```
    /// use gensync::{GenerationSynchronizer, Table};
    ///
    /// # fn main() -> Result<(), gensync::Error> {
    /// let table = Table::options().anonymous()?;
    /// let user = GenerationSynchronizer::new(&table, "user:1")?;
    /// let routes = GenerationSynchronizer::new(&table, "routes")?;
    /// let cleared = table.clear_matching(|slot| slot.label().starts_with("user:"))?;
    /// assert_eq!(cleared.len(), 1);
    /// assert!(user.is_expired() && !routes.is_expired());
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ReadOnly`]; or the table was replaced, and its successor cannot be opened: then the call should be
    /// repeated.
    ///
    /// # Progress
    ///
    /// As [`Table::slots`](Self::slots), and wakes the waiters for the keys that are cleared. If the table was replaced, it
    /// opens or creates the successor, as [`is_expired`](crate::GenerationSynchronizer::is_expired) does.
    pub fn clear_matching(&self, matches: impl Fn(&SlotInfo) -> bool) -> Result<Vec<SlotInfo>, Error> {
        if self.is_read_only() {
            return Err(self.error(ErrorKind::ReadOnly));
        }
        self.with_current(|current| clear_in(current, &matches)).map_err(|error| self.explain(error))
    }
}

/// Clears the keys of one incarnation; `None` if that incarnation has ended meanwhile.
fn clear_in(current: &Incarnation, matches: impl Fn(&SlotInfo) -> bool) -> Result<Option<Vec<SlotInfo>>, Error> {
    let slots = current.slots();
    let (header, memory) = (slots.header(), slots.memory());
    // `is_live_after_claim` has a fence, which here stands between the caller's change of the source and the scan of the keys.
    // A process that attaches to a key has such a fence between writing the key's slot and loading the state. So if the scan
    // misses a key, its state is loaded after the change.
    if !header.is_live_after_claim() {
        return Ok(None);
    }
    let mut cleared = Vec::new();
    for (_, _, slot) in slots.claimed(memory.outline()?.slots) {
        let found = SlotInfo::of(slot, slots).filter(&matches);
        // Otherwise, what a killed process has left would become one more update at the next check of the key.
        if found.as_ref().is_some_and(SlotInfo::is_abandoned) {
            current.recover(slot.generation)?;
        }
        if found.is_some() {
            slots.announce(slot.generation, slot.generation.expire());
            cleared.extend(SlotInfo::of(slot, slots));
        }
    }
    // If the incarnation has ended, a key may have been loaded through the successor before its slot was cleared here.
    Ok(header.is_live_after_claim().then_some(cleared))
}

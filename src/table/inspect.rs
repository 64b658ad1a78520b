//! Reading a table without changing it.

use std::path::PathBuf;

use super::Table;
use crate::error::Error;
use crate::generation::Generation;
use crate::key::CacheKey;
use crate::os::mapping::Mapping;
use crate::protocol::record::{RecordWord, Reference};
use crate::protocol::segment::{Slot, probe_length};
use crate::protocol::slots::{Memory as _, Slots};
use crate::table::info::{Occupancy, SlotInfo, Stats, TableInfo};
use crate::table::options::default_path;

impl Table {
    /// The path at which [`open_default`](Self::open_default) opens the table of the application `app`. Nothing is created, not
    /// even the folder.
    ///
    /// # Errors
    ///
    /// Those that [`open_default`](Self::open_default) reports about the name, and about the folder if it exists.
    ///
    /// # Progress
    ///
    /// Some system calls, none of which sleeps.
    pub fn default_path(app: &str) -> Result<PathBuf, Error> {
        default_path(app, false)
    }

    /// The present generation of `key`, without creating it; `None` if no process has attached to it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::EmptyKey`](crate::ErrorKind::EmptyKey); or the table was replaced, and its successor cannot be opened.
    ///
    /// # Progress
    ///
    /// Lock-free, and allocates. System calls as those of [`GenerationSynchronizer::new`](crate::GenerationSynchronizer::new).
    pub fn generation(&self, key: impl Into<CacheKey>) -> Result<Option<Generation>, Error> {
        self.read_slot(&self.normalize(key)?, |slot, _| {
            let word = slot.generation.word();
            if word.is_live() { word.generation() } else { None }
        })
    }

    /// What the table says about `key`, without creating it; `None` if no process has attached to it.
    ///
    /// ```
    /// use gensync::{GenerationSynchronizer, Table};
    ///
    /// # fn main() -> Result<(), gensync::Error> {
    /// let table = Table::options().anonymous()?;
    /// GenerationSynchronizer::new(&table, "routes")?.mark_updated()?;
    /// assert_eq!(table.slot("routes")?.expect("it was attached to").updates(), 1);
    /// assert_eq!(table.slot("users")?, None);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`generation`](Self::generation).
    ///
    /// # Progress
    ///
    /// As [`generation`](Self::generation); if an update is pending, it also asks the kernel for its lock.
    pub fn slot(&self, key: impl Into<CacheKey>) -> Result<Option<SlotInfo>, Error> {
        self.read_slot(&self.normalize(key)?, |slot, slots| {
            let info = SlotInfo::of(slot, slots);
            // The word is checked last: whatever was read before the slot was retired is valid.
            info.filter(|_| slot.generation.word().is_live())
        })
    }

    /// What `read` returns for the key's slot. `None` says that the slot is retired: `read` is called again in the successor.
    fn read_slot<R>(
        &self,
        key: &CacheKey,
        read: impl Fn(Slot<'_>, &Slots<Mapping>) -> Option<R>,
    ) -> Result<Option<R>, Error> {
        let found = self.with_current(|current| match current.find(key)? {
            Some(slot) => Ok(read(slot, current.slots()).map(Some)),
            None => Ok(Some(None)),
        });
        found.map_err(|error| self.explain(error).with_key(key.as_str()))
    }

    /// All keys of the table, in no particular order, as they are found while the iterator runs.
    ///
    /// Keys that are created meanwhile may be missing. Segments that this process cannot reach, for lack of address space or
    /// because the file is damaged, are left out.
    ///
    /// # Progress
    ///
    /// Sweeps over the whole table as it goes, never sleeps, and allocates for each key. System calls to map segments that were
    /// added, and for each key that has an update pending.
    pub fn slots(&self) -> impl Iterator<Item = SlotInfo> {
        let slots = self.latest().slots();
        slots.claimed(slots.memory().reachable().slots).filter_map(|(_, _, slot)| SlotInfo::of(slot, slots))
    }

    /// Figures of the table, counted by a scan of all of it. As with [`slots`](Self::slots), they cover only what this process
    /// can reach.
    ///
    /// # Progress
    ///
    /// Sweeps over the whole table, never sleeps, and allocates. System calls to map segments that were added.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let slots = self.latest().slots();
        let memory = slots.memory();
        let outline = memory.reachable();
        let mut occupancy: Vec<_> = memory.capacities(&outline).map(|slots| Occupancy { slots, keys: 0 }).collect();
        let (mut longest_probe, mut used_texts) = (0, 0);
        for (segment, index, slot) in slots.claimed(outline.slots) {
            let found = &mut occupancy[segment as usize];
            found.keys += 1;
            let length =
                slot.digest.digest().and_then(|digest| probe_length(found.slots as usize, segment, index, digest));
            longest_probe = longest_probe.max(length.unwrap_or(0));
            used_texts += slot.record.and_then(RecordWord::get).map_or(0, Reference::bytes);
        }
        let taken: u64 = (0..outline.texts).map(|number| memory.texts(number).taken()).sum();
        Stats {
            keys: occupancy.iter().map(|segment| segment.keys).sum(),
            capacity: occupancy.iter().map(|segment| segment.slots).sum(),
            segments: outline.slots,
            bytes: outline.end,
            text_bytes: taken,
            // A record that is being written is not in use yet.
            lost_bytes: taken.saturating_sub(used_texts),
            longest_probe,
            occupancy,
        }
    }

    /// What the table's header says.
    ///
    /// # Progress
    ///
    /// Wait-free, except that it reads a file of the system, the boot id.
    #[must_use]
    pub fn info(&self) -> TableInfo {
        let incarnation = self.latest();
        TableInfo::of(incarnation.fixed(), incarnation.slots().header())
    }
}

//! One incarnation of a table: its file in memory, and what was fixed when it was created.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use crate::count::Count;
use crate::error::{Error, ErrorKind};
use crate::key::CacheKey;
use crate::os::boot::boot_id;
use crate::os::clock::{now, precise_now};
use crate::os::file::TableFile;
use crate::os::lock::{Held, Kind};
use crate::os::mapping::{Mapping, SlotRef};
use crate::os::pause::FirstSeen;
use crate::os::view::{Presence, View};
use crate::protocol::fixed_header::FixedHeader;
use crate::protocol::generation_word::GenerationWord;
use crate::protocol::layout::HIGHEST_FLOOR;
use crate::protocol::segment::Slot;
use crate::protocol::slot_digest::Digest;
use crate::protocol::slots::{Memory as _, Slots};
use crate::protocol::word::Word;

/// A key's slot, and the incarnation that it is in.
pub(crate) type Place = SlotRef<Incarnation>;

/// A table until it is reset, or its file is replaced.
#[derive(Debug)]
pub(crate) struct Incarnation {
    slots: Slots<Mapping>,
    fixed: FixedHeader,
    /// How this process sees the file's path; `None` for an anonymous table.
    view: Option<View>,
    /// The time since its file was first found to be gone.
    gone: FirstSeen,
    /// How many updates of this process are in flight in this incarnation.
    own_updates: Count,
    /// The time since another process was first found to be replacing it.
    held_up: FirstSeen,
}

impl AsRef<Mapping> for Incarnation {
    fn as_ref(&self) -> &Mapping {
        self.mapping()
    }
}

impl Incarnation {
    pub(crate) fn new(mapping: Mapping, fixed: FixedHeader, path: Option<&Path>) -> Self {
        let (slots, view) = (Slots::new(mapping, fixed.capacity), path.map(View::new));
        let (gone, held_up, own_updates) = (FirstSeen::new(), FirstSeen::new(), Count::default());
        Self { slots, fixed, view, gone, own_updates, held_up }
    }

    pub(crate) fn slots(&self) -> &Slots<Mapping> {
        &self.slots
    }

    #[inline]
    pub(crate) fn mapping(&self) -> &Mapping {
        self.slots.memory()
    }

    pub(crate) fn fixed(&self) -> &FixedHeader {
        &self.fixed
    }

    /// A random number, which no other incarnation of the table has, except by chance.
    pub(crate) fn number(&self) -> u64 {
        let [.., a, b, c, d, e, f, g, h] = self.fixed.incarnation;
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }

    fn digest(&self, key: &CacheKey) -> Digest {
        let digest = Sha256::new().chain_update(self.fixed.salt).chain_update(key.as_str()).finalize();
        let word = |index: usize| u64::from_le_bytes(std::array::from_fn(|i| digest[8 * index + i]));
        Digest::new(word(0), word(1))
    }

    /// The key's slot, which is created if it does not exist: for tables that this process may write to. `None` if the table is
    /// being retired.
    pub(crate) fn attach(self: &Arc<Self>, key: &CacheKey) -> Result<Option<Place>, Error> {
        let start = || self.fixed.start(now());
        match self.slots.attach(self.digest(key), start, key.as_str().as_bytes())? {
            Some(slot) => Ok(Some(SlotRef::new(self, self.sound(slot)?.generation))),
            None => Ok(None),
        }
    }

    /// The key's slot, if the key exists.
    pub(crate) fn find(&self, key: &CacheKey) -> Result<Option<Slot<'_>>, Error> {
        match self.slots.find(self.digest(key))? {
            Some(slot) if slot.generation.word().generation().is_some() => self.sound(slot).map(Some),
            _ => Ok(None),
        }
    }

    /// As [`find`](Self::find), with what keeps the slot mapped.
    pub(crate) fn find_place(self: &Arc<Self>, key: &CacheKey) -> Result<Option<Place>, Error> {
        Ok(self.find(key)?.map(|slot| SlotRef::new(self, slot.generation)))
    }

    /// Refuses a slot that is retired in a table that is not, which only damage explains: the search for a successor would
    /// never end.
    fn sound<'a>(&self, slot: Slot<'a>) -> Result<Slot<'a>, Error> {
        // The word is read first, and a process that retires the table begins with the header: so a slot that it has retired
        // is never found under a live header.
        let word = slot.generation.word();
        if !word.is_live() && self.slots.header().is_live() {
            return Err(ErrorKind::DamagedKey { found: word.bits() }.into());
        }
        Ok(slot)
    }

    /// Ends the updates that are pending at `slot`, if all processes that made them are dead: the key is updated in their
    /// place. Does nothing while an update holds the key's lock.
    ///
    /// # Errors
    ///
    /// The lock cannot be taken by this process.
    pub(crate) fn recover(&self, slot: &GenerationWord) -> Result<(), Error> {
        let found = slot.word();
        if let Some(_lock) = self.mapping().try_lock(slot, Kind::Exclusive)? {
            self.slots.announce(slot, slot.recover());
        } else if self.mapping().held(slot) == Some(Held::Foreign) {
            self.recover_from(slot, found);
        }
        Ok(())
    }

    /// As [`recover`](Self::recover), beside shared locks that are no update's, which keep this process from locking the slot
    /// exclusively. `word` must have been read before it was found that no update holds a lock: an update that begins later
    /// changes the word, and the recovery fails.
    fn recover_from(&self, slot: &GenerationWord, word: Word) {
        if let Some(before) = slot.recover_from(word) {
            self.slots.announce(slot, before);
        }
    }

    /// Whether no key has an update pending. Updates of killed processes are recovered on the way if shared locks that are no
    /// update's keep them from being recovered under an exclusive lock.
    pub(crate) fn is_quiet(&self) -> Result<bool, Error> {
        let mut is_quiet = true;
        for (_, _, slot) in self.slots.claimed(self.mapping().outline()?.slots) {
            let word = slot.generation.word();
            if word.pending() > 0 {
                is_quiet = false;
                if self.mapping().held(slot.generation) == Some(Held::Foreign) {
                    self.recover_from(slot.generation, word);
                }
            }
        }
        Ok(is_quiet)
    }

    /// Whether an update is in flight whose process may be alive: one that was counted in, and whose lock is held.
    pub(crate) fn has_live_updates(&self) -> Result<bool, Error> {
        let mapping = self.mapping();
        if !mapping.has_updates_in_flight() {
            return Ok(false);
        }
        let is_live = |slot: Slot<'_>| matches!(mapping.held(slot.generation), Some(Held::Update | Held::Unknown));
        let mut slots = self.slots.claimed(mapping.outline()?.slots);
        Ok(slots.any(|(_, _, slot)| slot.generation.word().pending() > 0 && is_live(slot)))
    }

    /// Whether the path still names the file. An anonymous table is always present.
    pub(crate) fn presence(&self) -> Presence {
        let mapping = self.mapping();
        self.view.as_ref().map_or(Presence::Here, |view| view.presence(mapping.identity(), || mapping.link_count()))
    }

    /// Whether the file is no longer what its path names.
    pub(crate) fn is_gone(&self) -> bool {
        self.presence() == Presence::Gone
    }

    /// Counts an update of this process in; [`count_own_update_out`](Self::count_own_update_out) counts it out.
    pub(crate) fn count_own_update(&self) {
        self.own_updates.add_one();
    }

    pub(crate) fn count_own_update_out(&self) {
        self.own_updates.take_one();
    }

    /// Whether updates of this process are in flight. In a child that was forked during an update, the parent's counts as its
    /// own.
    pub(crate) fn has_own_updates(&self) -> bool {
        self.own_updates.get() > 0
    }

    /// How long ago this was first called; to be called only when the file is gone. `now` is microseconds.
    pub(crate) fn gone_for(&self, now: u64) -> Duration {
        Duration::from_micros(self.gone.elapsed(now))
    }

    /// How long ago this was first called; to be called only when another process is replacing the file.
    pub(crate) fn held_up_for(&self) -> Duration {
        Duration::from_micros(self.held_up.elapsed(precise_now()))
    }

    /// Shows all processes that the table, which is in `file`, is open here; to be called before it is used. If the last
    /// process that had it open may have lived in another boot, every generation is moved past the present time first: when
    /// that boot ended, processes may have died at any point, and their state with them.
    ///
    /// Boot ids alone do not decide that: containers on one machine may have different ones, or see none. But no process has a
    /// table open across a reboot.
    pub(crate) fn hold(&self, file: &TableFile, may_renew: bool) -> Result<(), Error> {
        let boot = if may_renew { boot_id()? } else { self.slots.header().boot() };
        let is_unknown = may_renew && boot == [0, 0];
        let may_be_another = || is_unknown || self.slots.header().boot() != boot;
        // Under the lock, the second of two processes that find another id finds that the table was renewed, or that another
        // process has it open.
        let _lock = if may_be_another() { file.lock()? } else { None };
        let alone = if may_be_another() { file.try_have_alone()? } else { None };
        let renewed = if alone.is_some() {
            self.slots.renew_all(now().min(HIGHEST_FLOOR).max(self.fixed.floor)).map(|()| {
                // A process that cannot read its boot id leaves the header's to processes that can.
                if !is_unknown {
                    self.slots.header().set_boot(boot);
                }
            })
        } else {
            Ok(())
        };
        drop(alone);
        file.hold()?;
        renewed
    }
}

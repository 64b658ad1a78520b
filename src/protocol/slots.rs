//! Find, claim, help and grow, over any memory.
//!
//! # The protocol
//!
//! A table is shared by processes that cannot rely on one another to live: any of them may be stopped between two instructions
//! and never run again. So no operation here waits for the next step of another process. Each is a sequence of single atomic
//! steps, and after each step the table is in a state from which every other process can work on, and finish what was begun if
//! it needs to. This is what happens at each step, and what a process that stops there leaves behind.
//!
//! A key is named by its *digest*, two words A and B that are never zero. In each *segment* the key may stand in a few *slots*
//! only, which are probed in a fixed order. A slot, once claimed, belongs to its key for ever, and nothing is moved or freed.
//! So there is nothing to reclaim and no ABA problem, and the address of a slot, once found, serves as long as the memory is
//! mapped.
//!
//! ## Finding
//!
//! A search goes through the segments from the last to the first, as half of all keys are in the last one. Claims fill
//! a segment's probe sequence in order, so the first empty slot ends the search of that segment.
//!
//! A search may miss a key that is being claimed at the same time. It does not miss a claim that happened before it: the
//! claimer saw every earlier slot of the sequence taken, and the search, which comes later, cannot find them empty again.
//!
//! ## Claiming
//!
//! A claim goes from the first segment to the last. That order is the same for every process, so all processes that claim one
//! key meet at the first slot that was free for it. Two compare-exchanges take a slot: word A, then word B.
//!
//! - Stopped before A: nothing has happened.
//! - Stopped between A and B: the next process that claims the same key comes to this slot, finds its own A, and finishes with
//!   B. A key that shares only the word A may finish the claim with its own B; then the slot is that key's, and the first
//!   claimer goes on to the next slot, as does every process that looks for the first claimer's key.
//! - Stopped after B: the key stands. The next process that attaches to it gives it its tag, its generation and its label.
//!
//! A half-claimed slot that no process comes back for is lost until a claim of a key with the same A passes by. It is never
//! given back, as no process can know that the claimer is dead rather than slow.
//!
//! ## Beginning
//!
//! The first generation is decided by one compare-exchange of the slot's `first` word, then copied into the generation word by
//! another one. Every process that attaches and finds no generation does both, and copies the value that won, so it does not
//! matter which process was stopped where.
//!
//! ## Checking and updating
//!
//! A load reads the generation word first, then the source, and keeps what it read of the word. The state is fresh while the
//! word is still the same: an update between the two reads leaves the state expired, which costs a load, and never an old state
//! that passes for a fresh one.
//!
//! A plain update is one `fetch_add`, made when the source has been changed. A process that is stopped between the two leaves
//! a change that no holder learns of. A crash-safe update closes that gap: it counts itself in before the change, as a *pending*
//! update in the same word, and afterwards counts itself out and moves the generation on, by one compare-exchange. A word
//! with pending updates equals nothing that a holder has seen. Meanwhile the updater shares a lock on the slot, which the kernel
//! releases when the process dies.
//!
//! - Stopped before it is counted in: nothing has happened.
//! - Stopped while it is counted in: the count stays, and the lock does not. A process that finds a count, and can have the lock
//!   for itself alone, knows that all updates in the count are dead. It replaces them by one update, as any of them may
//!   have changed the source.
//! - Stopped after it is counted out: the update is complete, except for the wakeup (see below).
//!
//! ## Growing
//!
//! When a probe finds no room in any segment, the memory is extended by the next segment, and then the number of segments is
//! raised. The order matters: a process that sees the number uses the segment at once. Two growers extend the same range,
//! which does nothing the second time, and one of them raises the number. Stopped in between: the file is longer than it needs
//! to be, until the next grower raises the number.
//!
//! ## Retiring
//!
//! Retiring ends a table: the state in its header says so, then a *sweep* bumps the generation of every claimed slot and sets
//! its retired bit. The hazard is a slot that is claimed behind the sweep, where updates would reach no holder. So a claimer
//! reads the state after its claim, with full fences on both sides:
//!
//! ```text
//! claimer                            sweeper
//! claims the slot                    sets the state to "retiring"
//! fence                              fence
//! reads the state                    looks for claimed slots
//! ```
//!
//! One of the two fences comes first. If it is the claimer's, the sweep sees the slot; if it is the sweeper's, the claimer sees
//! that the table is retiring, and attaches to the successor. The sweep changes each slot once, however often it runs. So a
//! process that finds a retiring table repeats the sweep, rather than wait for a process that may be dead.
//!
//! ## Waiting
//!
//! A waiter sleeps until a generation moves on. An update must cost nothing more when no process waits: it is one
//! `fetch_add`, and by what that returns the updater knows whether there is a waiter to wake. Two words serve for this: the
//! waiting bit of the generation word, and a *wake word* that is slept on.
//!
//! ```text
//! waiter                             updater
//! arms the wake word                 moves the generation on, and finds the waiting bit
//! fence                              clears the bit
//! sets the waiting bit, and finds    fence
//!   the generation                   moves the wake word on if it is armed,
//! sleeps if it is the one it has       and wakes all that sleep on it
//!   seen and the wake word is
//!   still as armed
//! ```
//!
//! An update that comes before the waiting bit is set is found by the waiter, in the word that setting the bit returns. An
//! update that comes after it finds the bit. Then the fences order the rest as they do in a sweep: the updater sees that the
//! wake word is armed and moves it on, so the kernel, which compares the wake word before it puts the waiter to sleep, either
//! refuses, or has it in the queue that is woken next.
//!
//! - An updater may be so slow to clear the bit that it clears one which a waiter has set after it saw that very update. The
//!   updater then moves the wake word on: so the waiter does not fall asleep, or is woken, and goes round again. The bit must
//!   be cleared *before* the wakeup, as one that is set again in answer to the wakeup must not be lost.
//! - The wake word is a count, not a flag. Were it a flag, another waiter could arm it again between a wakeup and the sleep of
//!   a waiter that had armed it before, which would find it as it was and sleep through the wakeup.
//! - A waiter that leaves without a change may clear the bit, and then wakes the others as an updater does, so that each sets
//!   the bit again. That would be a storm if many waiters came for moments only. So it is done by a waiter that has slept
//!   through a whole slice and was the one to set the bit; by one that watches the whole table; and by the last descriptor of a
//!   key in a process.
//! - A waiter that died, or left sooner, leaves a bit and an armed wake word. They cost the next update one system call.
//! - An updater that died after its change and before the wakeup leaves sleepers; and if it had cleared the bit, the next update
//!   does not wake them either. So no sleep is long: each ends after a slice, and the waiter looks again.
//!
//! Each slot has a wake word for the waiters for its key, and the table has one for waiters for several keys.

use crate::error::{Error, ErrorKind};
use crate::protocol::layout::{Header, Slot, Tag, probe_limit, segment_slots};
use crate::protocol::slot::{Digest, Holder};
use crate::protocol::word::Word;

/// Where a table's words are: a mapped file, or boxes in tests and models.
pub(crate) trait Memory {
    fn header(&self) -> &Header;

    /// How many segments there are and can be reached here.
    ///
    /// # Errors
    ///
    /// The file does not hold what its header says, or this process has no room to map it.
    fn segments(&self) -> Result<u32, Error>;

    /// The slots and tags of a segment below [`segments`](Self::segments).
    fn segment(&self, segment: u32) -> (&[Slot], &[Tag]);

    /// Makes room for `segment`, the next one. Doing it twice does no harm.
    ///
    /// # Errors
    ///
    /// No room.
    fn extend(&self, segment: u32) -> Result<(), Error>;
}

/// The slots of one incarnation of a table.
#[derive(Debug)]
pub(crate) struct Slots<M> {
    memory: M,
    capacity: u64,
}

impl<M: Memory> Slots<M> {
    pub(crate) fn new(memory: M, capacity: u64) -> Self {
        Self { memory, capacity }
    }

    pub(crate) fn memory(&self) -> &M {
        &self.memory
    }

    pub(crate) fn header(&self) -> &Header {
        self.memory.header()
    }

    /// The places where `digest` may stand in `segment`, in the order of probing, without those that by their tags belong to
    /// other keys.
    fn probe(&self, segment: u32, digest: Digest) -> impl Iterator<Item = (&Slot, &Tag)> {
        let (slots, tags) = self.memory.segment(segment);
        let place = digest.place(segment);
        let mask = segment_slots(self.capacity, segment) - 1;
        (0..probe_limit(segment).min(mask + 1)).filter_map(move |i| {
            // Masked by the segment's size; `Memory::segment` returns as many slots, and tags, as that.
            let index = (place.wrapping_add(i * (i + 1) / 2) & mask) as usize;
            tags[index].admits(digest).then(|| (&slots[index], &tags[index]))
        })
    }

    /// The key's slot, without creating it.
    pub(crate) fn find(&self, digest: Digest) -> Result<Option<&Slot>, Error> {
        Ok(self.find_place(digest)?.map(|(slot, _)| slot))
    }

    fn find_place(&self, digest: Digest) -> Result<Option<(&Slot, &Tag)>, Error> {
        for segment in (0..self.memory.segments()?).rev() {
            for place in self.probe(segment, digest) {
                match place.0.holder(digest) {
                    Holder::This => return Ok(Some(place)),
                    Holder::Nobody => break,
                    Holder::Unfinished | Holder::Other => {}
                }
            }
        }
        Ok(None)
    }

    /// The key's slot, claimed if there is none. The caller gives it a generation, see [`Slot::begin`].
    fn claim_place(&self, digest: Digest) -> Result<(&Slot, &Tag), Error> {
        let mut segment = 0;
        loop {
            if segment >= self.memory.segments()? {
                self.grow(segment)?;
            }
            if let Some(place) = self.probe(segment, digest).find(|(slot, _)| slot.claim(digest)) {
                return Ok(place);
            }
            segment += 1;
        }
    }

    /// Appends `segment`, the next one.
    fn grow(&self, segment: u32) -> Result<(), Error> {
        self.memory.extend(segment)?;
        self.header().add_segment(segment);
        match self.memory.segments()? {
            segments if segments > segment => Ok(()),
            // The number was raised here, and never falls: something other than gensync writes to this memory.
            segments => Err(ErrorKind::Damaged {
                field: "number of segments",
                found: segments.into(),
                expected: "one more, as the table was extended",
            }
            .into()),
        }
    }

    /// Finds or claims the key's slot, lets it begin at `start` or later, and labels it.
    ///
    /// `None`: the table is being retired, and the slot may have been missed by the sweep.
    pub(crate) fn attach(&self, digest: Digest, start: u64, label: &[u8]) -> Result<Option<&Slot>, Error> {
        let (slot, tag) = match self.find_place(digest)? {
            Some(place) => place,
            None => self.claim_place(digest)?,
        };
        tag.set(digest);
        if slot.word().generation().is_none() {
            slot.begin(start);
        }
        let is_new = !slot.has_label();
        if is_new {
            slot.write_label(label);
        }
        let is_live = self.header().is_live_after_claim();
        if is_new {
            // There is no waiting bit yet by which an updater would know that a waiter watches the table. Each process that
            // finds no label wakes, so a claimer that died before it could do so is made up for by the next one.
            self.header().wake.word.wake();
        }
        Ok(is_live.then_some(slot))
    }

    /// Wakes the waiters for `slot`, if there are any. To be called after each change of a generation, with the word before
    /// the change. Returns that word.
    #[inline]
    pub(crate) fn announce(&self, slot: &Slot, before: Word) -> Word {
        if before.is_awaited() {
            self.wake(slot);
        }
        before
    }

    #[cold]
    fn wake(&self, slot: &Slot) {
        // The bit is cleared first: a waiter that is woken and has to wait on sets it again, and must not lose it to this.
        slot.end_waiting();
        slot.wake.wake();
        self.header().wake.word.wake();
    }

    /// Clears the waiting bits of `slots`, for which no thread of this process waits any more. Waiters of other processes
    /// are woken, and set their bit again.
    pub(crate) fn stop_waiting<'a>(&self, slots: impl Iterator<Item = &'a Slot>) {
        let mut is_changed = false;
        for slot in slots.filter(|slot| slot.word().is_awaited()) {
            // In this order: a waiter that is woken sets its bit again, and must not lose it to this.
            slot.end_waiting();
            slot.wake.wake();
            is_changed = true;
        }
        if is_changed {
            self.header().wake.word.wake();
        }
    }

    /// The slots of the first `segments` segments that are claimed or half claimed, each with its segment and its index there.
    pub(crate) fn claimed(&self, segments: u32) -> impl Iterator<Item = (u32, u64, &Slot)> {
        (0..segments).flat_map(move |segment| {
            let slots = self.memory.segment(segment).0.iter().enumerate();
            slots.filter(|(_, slot)| slot.is_claimed()).map(move |(index, slot)| (segment, index as u64, slot))
        })
    }

    fn each(&self, action: impl FnMut(&Slot)) -> Result<(), Error> {
        self.claimed(self.memory.segments()?).map(|(_, _, slot)| slot).for_each(action);
        Ok(())
    }

    /// Changes every slot by `change`, which returns the word before it.
    fn change_all(&self, change: impl Fn(&Slot) -> Word) -> Result<(), Error> {
        self.each(|slot| _ = self.announce(slot, change(slot)))
    }

    /// How many slots of `segment` a search probes to reach the claimed slot at `index`, that one included.
    pub(crate) fn probe_length(&self, segment: u32, index: u64, digest: Digest) -> Option<u64> {
        let mask = segment_slots(self.capacity, segment) - 1;
        (0..probe_limit(segment))
            .find(|i| digest.place(segment).wrapping_add(i * (i + 1) / 2) & mask == index)
            .map(|i| i + 1)
    }

    /// Retires every slot. The state is "retiring" from here on, until the caller sets it to "retired".
    pub(crate) fn retire(&self) -> Result<(), Error> {
        // A process that cannot reach all slots would leave some out of the sweep, so it must not begin.
        self.memory.segments()?;
        self.header().begin_retiring();
        // A slot that was retired before is announced again: the process that retired it may have died before it did so.
        self.change_all(Slot::retire)?;
        // A table without keys has no waiting bit either, but may be watched.
        self.header().wake.word.wake();
        Ok(())
    }

    /// Makes one update of every key.
    pub(crate) fn expire_all(&self) -> Result<(), Error> {
        self.change_all(Slot::expire)
    }

    /// Moves every generation past `floor`, see [`Slot::renew`].
    pub(crate) fn renew_all(&self, floor: u64) -> Result<(), Error> {
        self.each(|slot| slot.renew(floor))
    }

    /// The highest generation of all keys; 0 in an empty table.
    pub(crate) fn highest(&self) -> Result<u64, Error> {
        let mut highest = 0;
        self.each(|slot| highest = highest.max(slot.word().generation().map_or(0, |generation| generation.get())))?;
        Ok(highest)
    }
}

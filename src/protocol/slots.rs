//! Find, claim, help and grow, over any memory.
//!
//! # The protocol
//!
//! A table is shared by processes that cannot rely on one another to live: any of them may be stopped between two instructions
//! and never run again. So no operation here waits for the next step of another process. Each is a sequence of single atomic
//! steps, and after each step the table is in a state from which every other process can work on, and finish what was begun if
//! it needs to. This is what happens at each step, and what a process that stops there leaves behind.
//!
//! A key is named by its *digest*, two words A and B that are never zero. In each *segment* of slots the key may stand in a few
//! *slots* only, which are probed in a fixed order. A slot, once claimed, belongs to its key for ever, and nothing is moved or
//! freed. So there is nothing to reclaim and no ABA problem, and the address of a word, once found, serves as long as the memory
//! is mapped.
//!
//! A slot is spread over lanes: its generation word, its digest, its record word and its tag each stand beside those of its
//! neighbours. Eight generation words share a cache line, so that a process which checks many keys reads few lines. Two keys that
//! are updated all the time slow each other down if they share one.
//!
//! ## Finding
//!
//! A search goes through the segments from the last to the first, as half of all keys are in the last one, and looks for the
//! key's tag. Only if it is nowhere, the search looks at the slots without a tag, too: a claimer may have died before it set one.
//! Claims fill a segment's probe sequence in order, so the first empty slot ends the search of that segment.
//!
//! A search may miss a key that is being claimed at the same time. It does not miss a claim that happened before it: the
//! claimer saw every earlier slot of the sequence taken, and the search, which comes later, cannot find them empty again.
//!
//! ## Claiming
//!
//! A claim goes from the first segment to the last, and passes over those that the search has found full for the key: no slot
//! becomes free again. That order is the same for every process, so all processes that claim one key meet at the first slot that
//! was free for it. Two compare-exchanges take a slot: word A, then word B.
//!
//! - Stopped before A: nothing has happened.
//! - Stopped between A and B: the next process that claims the same key comes to this slot, finds its own A, and finishes with
//!   B. A key that shares only the word A may finish the claim with its own B; then the slot is that key's, and the first
//!   claimer goes on to the next slot, as does every process that looks for the first claimer's key.
//! - Stopped after B: the slot is the key's. The next process that attaches to the key gives it its tag, its record and its
//!   generation.
//!
//! A half-claimed slot that no process comes back for is lost until a claim of a key with the same A passes by. It is never
//! given back, as no process can know that the claimer is dead rather than slow.
//!
//! ## Beginning
//!
//! A key begins with a *record*: its first generation and its text. A process that attaches and finds no record writes one where
//! no other process writes, and then makes it the key's by one compare-exchange of the slot's record word. So the first
//! generation and the text are decided together, and whatever can be seen of them is complete. The first generation is then
//! copied into the generation word by another compare-exchange. Every process that attaches and finds no generation does so, with
//! the record that won; a key that has a generation has a record.
//!
//! - Stopped before the record is the key's, within the text or after it: the room of the record is lost, some bytes of a segment
//!   of texts. The process that comes next writes another record.
//! - Two processes write a record for one key: one of them wins, and the other gives its room back, unless a third record was
//!   written behind it.
//! - Stopped before the copy: the next process that attaches makes it.
//!
//! Before a process claims a slot, it makes sure that the last segment of texts has room for the record: a claim cannot be taken
//! back, so a table that has no room for texts would lose a slot for each new key. Others may take that room before the record
//! is written; then the process makes room again, and if there is none, the slot is claimed without a record until the next
//! attempt.
//!
//! Room for a record is had by raising the count of bytes that are taken in the last segment of texts. No process relies on what
//! lies between two records, so one that stops there holds up no other.
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
//! with pending updates equals nothing that a holder has seen. Meanwhile the updater shares a lock of the key, which the kernel
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
//! When a probe finds no room in any segment of slots, or a record none in the last segment of texts, the memory is extended behind
//! the last segment, and then the new segment is written to the *directory*, by a compare-exchange of the first word that is
//! zero. The order matters: a process that sees the word uses the segment at once. The directory is one list, so a segment
//! begins where the one before it ends, and growers of slots and of texts all extend the same range: where both have made room,
//! the second changes nothing. One of them writes the word; the others find it, and go on behind that segment if they still need
//! one. So no room is ever lost. Stopped in between: the file is longer than it needs to be, until the next grower uses that
//! room.
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
//! There are 64 wake words for waiters for one key each, and one for waiters for several keys. Keys that share a wake word wake
//! each other's waiters, which look, and go back to sleep: nothing relies on a wakeup's being for its key.

use crate::error::{Error, ErrorKind, damaged};
use crate::generation::Generation;
use crate::protocol::directory::{Directory, Outline};
use crate::protocol::generation_word::GenerationWord;
use crate::protocol::layout::Header;
use crate::protocol::record::{Record, Reference, TextSegment};
use crate::protocol::segment::{Lanes, Slot, SlotSegment};
use crate::protocol::slot_digest::{Digest, Occupant};
use crate::protocol::wake::WakeWord;
use crate::protocol::word::Word;

/// Where a table's words are: a mapped file, or boxes in tests and models.
pub(crate) trait Memory {
    fn header(&self) -> &Header;

    fn directory(&self) -> &Directory;

    /// The wake word of the waiters for the key with this generation word.
    fn wake_word(&self, generation: &GenerationWord) -> &WakeWord;

    /// The segments that there are and can be reached here.
    ///
    /// # Errors
    ///
    /// The file does not hold what its directory says, or this process has no room to map it.
    fn outline(&self) -> Result<Outline, Error>;

    /// The segments that can be reached here, whatever the directory says of further ones.
    fn reachable(&self) -> Outline;

    /// Segment `number` of those with slots, which [`outline`](Self::outline) has counted.
    fn slots(&self, number: u32) -> SlotSegment<'_>;

    /// Segment `number` of those with texts, which [`outline`](Self::outline) has counted.
    fn texts(&self, number: u32) -> TextSegment<'_>;

    /// Makes room for the segment that `word` describes, behind those of `outline`. Doing it twice does no harm.
    ///
    /// # Errors
    ///
    /// No room.
    fn extend(&self, outline: &Outline, word: u64) -> Result<(), Error>;
}

/// The slots of one incarnation of a table.
#[derive(Debug)]
pub(crate) struct Slots<M> {
    memory: M,
    capacity: u64,
}

/// Where a search has found a key, or a claim has put it.
#[derive(Clone, Copy, Debug)]
struct Found<'a> {
    lanes: Lanes<'a>,
    index: usize,
}

impl<M: Memory> Slots<M> {
    pub(crate) fn new(memory: M, capacity: u64) -> Self {
        Self { memory, capacity }
    }

    #[inline]
    pub(crate) fn memory(&self) -> &M {
        &self.memory
    }

    pub(crate) fn header(&self) -> &Header {
        self.memory.header()
    }

    /// The key's slot, without creating it.
    pub(crate) fn find(&self, digest: Digest) -> Result<Option<Slot<'_>>, Error> {
        Ok(self.search(digest)?.ok().map(|found| found.lanes.slot(found.index)))
    }

    /// Where the key is; or, if it is nowhere, the number of the first segment of slots that may have room for it.
    fn search(&self, digest: Digest) -> Result<Result<Found<'_>, u32>, Error> {
        let segments = self.memory.outline()?.slots;
        // Nearly always the key's tag finds it, or all segments are full but for the last one or two. So the tags of all segments
        // come first: they take one cache line of each, and no load waits for another.
        let mut untagged = 0_u64;
        for number in (0..segments).rev() {
            let SlotSegment::Lanes(lanes) = self.memory.slots(number) else { return Ok(Err(segments)) };
            match lanes.find_tagged(number, digest) {
                Ok(index) => return Ok(Ok(Found { lanes, index })),
                Err(has_untagged) => untagged |= u64::from(has_untagged) << number,
            }
        }
        let mut with_room = segments;
        while let Some(number) = untagged.checked_ilog2() {
            untagged ^= 1 << number;
            let SlotSegment::Lanes(lanes) = self.memory.slots(number) else { break };
            for index in lanes.probe(number, digest) {
                match lanes.digests[index].occupant(digest) {
                    Occupant::This => return Ok(Ok(Found { lanes, index })),
                    Occupant::None => {
                        with_room = number;
                        break;
                    }
                    // A claim of the key may have stopped there, to be finished.
                    Occupant::Half => with_room = number,
                    Occupant::Other => {}
                }
            }
        }
        Ok(Err(with_room))
    }

    /// Claims a slot for the key, or finds the one that it has. A search has found no room in the segments before `number`, where
    /// there will be none any more, as no slot becomes free again.
    fn claim(&self, digest: Digest, mut number: u32) -> Result<Found<'_>, Error> {
        let mut outline = self.memory.outline()?;
        loop {
            while number >= outline.slots {
                outline = self.grow(&outline, outline.more_slots(self.capacity))?;
            }
            // A table of version 1 has no room for further keys.
            if let SlotSegment::Lanes(lanes) = self.memory.slots(number)
                && let Some(index) = lanes.probe(number, digest).find(|index| lanes.digests[*index].claim(digest))
            {
                return Ok(Found { lanes, index });
            }
            number += 1;
        }
    }

    /// Appends the segment that `word` describes to those of `outline`, unless another process appends one first. Returns what
    /// there is then, which is more in either case.
    pub(super) fn grow(&self, outline: &Outline, word: u64) -> Result<Outline, Error> {
        self.memory.extend(outline, word)?;
        self.memory.directory().append(outline.segments, word);
        match self.memory.outline()? {
            grown if grown.segments > outline.segments => Ok(grown),
            // A word was written there, and never changes: something other than gensync writes to this memory.
            _ => Err(damaged("directory", 0, "a further segment, as the table was extended").into()),
        }
    }

    /// Finds the key's slot or claims one, and lets the key begin at `start`, or where another process has let it begin. `start` is
    /// called for a key that has not begun, as it reads a clock.
    ///
    /// `None`: the table is being retired, and the slot may have been missed by the sweep.
    pub(crate) fn attach(
        &self,
        digest: Digest,
        start: impl FnOnce() -> u64,
        key: &[u8],
    ) -> Result<Option<Slot<'_>>, Error> {
        let found = match self.search(digest)? {
            Ok(found) => found,
            Err(with_room) => {
                // Before the claim, as that cannot be taken back: a key that finds no room for its text takes no slot.
                self.texts_with_room(key.len())?;
                self.claim(digest, with_room)?
            }
        };
        found.lanes.set_tag(found.index, digest);
        let slot = found.lanes.slot(found.index);
        let is_new = slot.generation.word().generation().is_none();
        if is_new {
            slot.generation.begin(self.first_generation(found, start(), key)?);
        }
        let is_live = self.header().is_live_after_claim();
        if is_new {
            // There is no waiting bit yet by which an updater would know that a waiter watches the table. Each process that finds
            // no generation wakes; if all of them die before they do, a waiter looks for itself when its sleep ends.
            self.header().wake.word.wake();
        }
        Ok(is_live.then_some(slot))
    }

    /// The generation that the record of a key begins with. The record is written if there is none, and says `start` then.
    fn first_generation(&self, found: Found<'_>, start: u64, key: &[u8]) -> Result<u64, Error> {
        let word = &found.lanes.records[found.index];
        let reference = match word.get() {
            Some(reference) => reference,
            None => {
                let (texts, mine) = self.write_record(start, key)?;
                let winner = word.publish(mine);
                if winner == mine {
                    return Ok(start);
                }
                texts.give_back(mine);
                winner
            }
        };
        // An error if there is a segment that this process cannot map: the record may be there.
        self.memory.outline()?;
        match self.record(reference) {
            Some(record) => Ok(record.first()),
            None => Err(ErrorKind::DamagedRecord { found: reference.bits() }.into()),
        }
    }

    /// Writes a record to the last segment of texts, and appends one if it is full.
    fn write_record(&self, start: u64, key: &[u8]) -> Result<(TextSegment<'_>, Reference), Error> {
        loop {
            let texts = self.texts_with_room(key.len())?;
            // Otherwise, other processes have taken the room.
            if let Some(reference) = texts.write(start, key) {
                return Ok((texts, reference));
            }
        }
    }

    /// The last segment of texts, which is appended unless there is one with room for a key of this `length`.
    fn texts_with_room(&self, length: usize) -> Result<TextSegment<'_>, Error> {
        let mut outline = self.memory.outline()?;
        loop {
            let last = outline.texts.checked_sub(1).map(|number| self.memory.texts(number));
            if let Some(texts) = last.filter(|texts| texts.has_room(length)) {
                return Ok(texts);
            }
            outline = self.grow(&outline, outline.more_texts(TextSegment::bytes_for(length)))?;
        }
    }

    /// The record that `reference` leads to, if it leads to any that this process has mapped.
    pub(crate) fn record(&self, reference: Reference) -> Option<Record<'_>> {
        // In ascending order of their offsets.
        let texts = self.memory.reachable().texts;
        let (mut low, mut high) = (0, texts);
        while low < high {
            let middle = low.midpoint(high);
            if self.memory.texts(middle).begins_before(reference) { low = middle + 1 } else { high = middle }
        }
        self.memory.texts(low.checked_sub(1)?).record(reference)
    }

    /// Whether `reference` leads to a segment that there is, but that this process has not mapped.
    pub(crate) fn is_out_of_reach(&self, reference: Reference) -> bool {
        let reachable = self.memory.reachable();
        reference.offset() >= reachable.end && self.memory.directory().get(reachable.segments) != 0
    }

    /// The record of the key that has `slot`, if it has one.
    pub(crate) fn record_of(&self, slot: Slot<'_>) -> Option<Record<'_>> {
        self.record(slot.record?.get()?)
    }

    /// Wakes the waiters for the key with this generation word, if there are any. To be called after each change of a
    /// generation, with the word before the change. Returns that word.
    #[inline]
    pub(crate) fn announce(&self, generation: &GenerationWord, before: Word) -> Word {
        if before.is_awaited() {
            self.wake(generation);
        }
        before
    }

    #[cold]
    fn wake(&self, generation: &GenerationWord) {
        // The bit is cleared first: a waiter that is woken and has to wait on sets it again, and must not lose it to this.
        generation.end_waiting();
        self.memory.wake_word(generation).wake();
        self.header().wake.word.wake();
    }

    /// Clears the waiting bits of keys for which no thread of this process waits any more. Waiters of other processes
    /// are woken, and set their bit again.
    pub(crate) fn stop_waiting<'a>(&self, generations: impl Iterator<Item = &'a GenerationWord>) {
        let mut is_changed = false;
        for generation in generations.filter(|generation| generation.word().is_awaited()) {
            // In this order: a waiter that is woken sets its bit again, and must not lose it to this.
            generation.end_waiting();
            self.memory.wake_word(generation).wake();
            is_changed = true;
        }
        if is_changed {
            self.header().wake.word.wake();
        }
    }

    /// The slots of the first `segments` segments with slots that are claimed or half claimed, each with the number of its
    /// segment and its index there.
    pub(crate) fn claimed(&self, segments: u32) -> impl Iterator<Item = (u32, usize, Slot<'_>)> {
        (0..segments)
            .flat_map(move |number| self.memory.slots(number).claimed().map(move |(index, slot)| (number, index, slot)))
    }

    fn each(&self, action: impl FnMut(Slot<'_>)) -> Result<(), Error> {
        self.claimed(self.memory.outline()?.slots).map(|(_, _, slot)| slot).for_each(action);
        Ok(())
    }

    /// Changes every generation word by `change`, which returns the word before it.
    fn change_all(&self, change: impl Fn(&GenerationWord) -> Word) -> Result<(), Error> {
        self.each(|slot| _ = self.announce(slot.generation, change(slot.generation)))
    }

    /// Retires every slot. The state is "retiring" from here on, until the caller sets it to "retired".
    pub(crate) fn retire(&self) -> Result<(), Error> {
        // A process that cannot reach all slots would leave some out of the sweep, so it must not begin.
        self.memory.outline()?;
        self.header().begin_retiring();
        // A slot that was retired before is announced again: the process that retired it may have died before it did so.
        self.change_all(GenerationWord::retire)?;
        // A table without keys has no waiting bit either, but may be watched.
        self.header().wake.word.wake();
        Ok(())
    }

    /// Makes one update of every key.
    pub(crate) fn expire_all(&self) -> Result<(), Error> {
        self.change_all(GenerationWord::expire)
    }

    /// Moves every generation past `floor`, see [`GenerationWord::renew`], and the first generations as far.
    pub(crate) fn renew_all(&self, floor: u64) -> Result<(), Error> {
        self.each(|slot| {
            let (before, record) = (slot.generation.word().generation(), self.record_of(slot));
            slot.generation.renew(floor);
            if let (Some(before), Some(after), Some(record)) = (before, slot.generation.word().generation(), record) {
                record.set_first(after.get().wrapping_sub(record.updates(before)));
            }
        })
    }

    /// The highest generation of all keys; 0 in an empty table.
    pub(crate) fn highest(&self) -> Result<u64, Error> {
        let mut highest = 0;
        self.each(|slot| {
            highest = highest.max(slot.generation.word().generation().map_or(0, Generation::get));
        })?;
        Ok(highest)
    }
}

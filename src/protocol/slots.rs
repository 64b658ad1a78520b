//! Find, claim, help and grow, over any memory.
//!
//! # The protocol
//!
//! A key is named by its digest, two words that are never zero. In each segment it may stand in a few slots only, which
//! are probed in a fixed order; a slot, once claimed, belongs to its key for ever, and nothing is moved or freed. So the
//! address of a slot, once found, serves as long as the memory is mapped.
//!
//! **Finding** asks the segments from the last to the first, as half of all keys stand in the last one. Claims fill a
//! segment's probe sequence in order, so the first empty slot ends the search of that segment.
//!
//! **Claiming** asks from the first segment to the last. That order is the same for everybody, so all who claim one key
//! meet at the first slot that was free for it. Two compare-exchanges take a slot: word A, then word B.
//!
//! - Stopped before A: nothing has happened.
//! - Stopped between A and B: whoever claims the same key comes to this slot, finds its own A, and finishes with B. A
//!   key that shares only the word A may finish it with its own B; then the slot is that key's, and the first claimer
//!   goes on to the next slot, as everybody does who looks for its key.
//! - Stopped after B: the key stands; whoever attaches next gives it its tag, its generation and its label.
//!
//! **Beginning.** The first generation is decided by one compare-exchange on the slot's `first` word, then copied into
//! the generation word by another; all who attach do both, so it does not matter who was stopped where.
//!
//! **Growing.** When a probe finds no room in any segment, the memory is extended by the next one and the number of
//! segments raised. Two growers extend the same range, which does nothing the second time, and one of them raises.
//! Stopped in between: the file is longer than it needs to be until the next grower comes by.
//!
//! **Retiring** ends a table: its state says so, then a sweep bumps every claimed slot and sets its retired bit. A
//! claimer reads the state after its claim, with full fences on both sides: either it sees that the table is retiring,
//! and attaches to the successor, or the sweep sees its slot. The sweep changes each slot once, however often it runs,
//! so whoever finds a retiring table does it again rather than wait for a process that may be dead.
//!
//! **Waiting** is for a generation to move on, and nobody pays for it but those who do it and those who wake them. Who
//! waits arms a wake word, sets the waiting bit of the generation word, and looks at the generation that this finds: is
//! it still the one he has seen, he sleeps until the wake word moves on from what it was when he armed it. Whoever moves
//! the generation on learns of the bit by the same instruction; he clears it, moves the wake word on, and wakes all.
//!
//! - The bit may be cleared by an updater that meant others. He then moves the wake word on, so who set it in vain does not
//!   fall asleep, or is woken, and goes round again.
//! - A waiter that leaves without a change may clear the bit, and wakes the others as an updater does, so that each sets it
//!   again. That would be a storm if many waited for moments only: so it is for one that has slept through a whole slice, and
//!   was the one to set the bit; for one that watches the whole table; and for the last descriptor of a key in a process.
//! - A waiter that died, or left sooner, leaves a bit and an armed wake word, which cost the next update one call of the system.
//! - An updater that died after his change leaves sleepers. So nobody sleeps long at a time.
//!
//! Each slot has a wake word for those who wait for its key, and the table one for those who wait for several.

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

    /// The places where `digest` may stand in `segment`, in the order of probing, less those that tags say are others'.
    fn probe(&self, segment: u32, digest: Digest) -> impl Iterator<Item = (&Slot, &Tag)> {
        let (slots, tags) = self.memory.segment(segment);
        let place = digest.place(segment);
        let mask = segment_slots(self.capacity, segment) - 1;
        (0..probe_limit(segment).min(mask + 1)).filter_map(move |i| {
            // Masked by the segment's size, which `segment` answers for.
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

    /// The key's slot, claimed if there is none. The caller lets it begin.
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
            // Somebody writes there who should not.
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
    pub(crate) fn attach(
        &self,
        digest: Digest,
        start: impl FnOnce() -> u64,
        label: &[u8],
    ) -> Result<Option<&Slot>, Error> {
        let (slot, tag) = match self.find_place(digest)? {
            Some(place) => place,
            None => self.claim_place(digest)?,
        };
        tag.set(digest);
        if slot.word().generation().is_none() {
            slot.begin(start());
        }
        let is_new = !slot.has_label();
        if is_new {
            slot.write_label(label);
        }
        let is_live = self.header().is_live_after_claim();
        if is_new {
            // There is no waiting bit yet that could tell who watches the table.
            self.header().wake.word.wake();
        }
        Ok(is_live.then_some(slot))
    }

    /// To be called for each change of a generation, with the word before it: wakes those who wait for it. Returns that
    /// word.
    #[inline]
    pub(crate) fn announce(&self, slot: &Slot, before: Word) -> Word {
        if before.is_awaited() {
            self.wake(slot);
        }
        before
    }

    #[cold]
    fn wake(&self, slot: &Slot) {
        slot.end_waiting();
        slot.wake.wake();
        self.header().wake.word.wake();
    }

    /// Nobody of this process waits for `slots` any more. Others may, who are woken to say so again.
    pub(crate) fn stop_waiting<'a>(&self, slots: impl Iterator<Item = &'a Slot>) {
        let mut is_changed = false;
        for slot in slots.filter(|slot| slot.word().is_awaited()) {
            // In this order: who says again that it waits, as it is woken, must not lose its bit to this.
            slot.end_waiting();
            slot.wake.wake();
            is_changed = true;
        }
        if is_changed {
            self.header().wake.word.wake();
        }
    }

    /// The slots of the first `segments` segments that somebody has begun to claim.
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

    /// How many slots a search looks at before it comes to the claimed slot at `index` of `segment`, that one included.
    pub(crate) fn probe_length(&self, segment: u32, index: u64, digest: Digest) -> Option<u64> {
        let mask = segment_slots(self.capacity, segment) - 1;
        (0..probe_limit(segment))
            .find(|i| digest.place(segment).wrapping_add(i * (i + 1) / 2) & mask == index)
            .map(|i| i + 1)
    }

    /// Retires every slot. The state says "retiring" from here on, until the caller ends it.
    pub(crate) fn retire(&self) -> Result<(), Error> {
        // Slots that this process cannot reach would be left out of the sweep: then nothing is begun.
        self.memory.segments()?;
        self.header().begin_retiring();
        // A slot that was retired before is announced again, as whoever did it may have died before he could do that.
        self.change_all(Slot::retire)?;
        self.header().wake.word.wake();
        Ok(())
    }

    /// One update of every key.
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

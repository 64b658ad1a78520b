//! The protocol over boxed memory: every interleaving of a few steps under loom, many random ones under std.
//!
//! Under loom (`RUSTFLAGS="--cfg loom" cargo test --lib --release`) each model runs all executions with at most three
//! preemptions, or as many as it says. Without it, the same functions run on threads, many times.

// ORDERING in models: what a model keeps beside the table (a source, a loaded state) is accessed relaxed, and pairs with nothing.
// So the protocol alone orders it, and one of its orderings that is too weak shows as an old state beside a new generation.

mod claiming;
mod marking;
#[cfg(shuttle)]
mod mixes;
mod retiring;
#[cfg(not(loom))]
mod stops;
mod updating;
mod waiting;

use crate::error::{Error, ErrorKind};
use crate::protocol::atomic::{Arc, AtomicU32, AtomicU64, Ordering, thread};
use crate::protocol::directory::{Directory, Kind, Outline, SEGMENTS, end_of_new_table, of_new_table};
use crate::protocol::generation_word::GenerationWord;
use crate::protocol::layout::{Header, LIVE, SEGMENTS_OFFSET, TableWakeWord};
use crate::protocol::record::{RECORDS, RecordWord, TextSegment};
use crate::protocol::segment::{Lanes, Slot, SlotSegment};
use crate::protocol::slot_digest::{Digest, SlotDigest, TAGS, Tags};
use crate::protocol::slots::{Memory, Slots};
use crate::protocol::wake::WakeWord;
use crate::protocol::word::Word;

const START: u64 = 1 << 50;

/// Two keys with the same word A, and one that is probed at the same place.
const KEYS: [[u64; 2]; 3] = [[6, 7], [6, 8], [8, 9]];

fn key(index: usize) -> Digest {
    Digest::new(KEYS[index][0], KEYS[index][1])
}

/// A table in boxes, which has all its segments from the beginning, but shows them only when there is "room".
struct Boxed {
    header: Header,
    directory: Directory,
    capacity: u64,
    slots: Vec<BoxedSlots>,
    texts: Vec<BoxedTexts>,
    /// Two, so that some keys share one.
    wake_words: [WakeWord; 2],
    /// Up to which byte there is room so far.
    room: AtomicU64,
}

struct BoxedSlots {
    generations: Vec<GenerationWord>,
    digests: Vec<SlotDigest>,
    records: Vec<RecordWord>,
    tags: Vec<Tags>,
}

struct BoxedTexts {
    words: Vec<AtomicU64>,
    /// Where it begins in the file. Not an atomic of the model checker, as a process knows this of itself.
    offset: std::sync::atomic::AtomicU64,
}

/// How large a table in boxes may become.
#[derive(Clone, Copy)]
struct Size {
    /// How many slots the first segment has.
    capacity: u64,
    /// How many segments of slots there may be.
    slots: u32,
    /// How many segments of texts there may be.
    texts: u32,
    /// For how many records of keys of eight bytes at most each of them has room.
    records: usize,
}

impl Memory for Boxed {
    fn header(&self) -> &Header {
        &self.header
    }

    fn directory(&self) -> &Directory {
        &self.directory
    }

    fn wake_word(&self, generation: &GenerationWord) -> &WakeWord {
        let index = |slots: &BoxedSlots| slots.generations.iter().position(|word| std::ptr::eq(word, generation));
        &self.wake_words[self.slots.iter().find_map(index).expect("a word of this table") % 2]
    }

    fn outline(&self) -> Result<Outline, Error> {
        let mut outline = Outline::new(SEGMENTS_OFFSET);
        loop {
            let word = self.directory.get(outline.segments);
            if word == 0 {
                return Ok(outline);
            }
            let extent = outline.next(self.capacity, word).expect("a segment that follows the others");
            // ORDERING: relaxed. Reads what `extend` stores, and the release and acquire that order the two must be those of
            // `Directory::append` and `Directory::get`.
            assert!(extent.end() <= self.room.load(Ordering::Relaxed), "a segment is used before there is room");
            if extent.kind == Kind::Texts {
                self.texts[extent.number as usize].offset.store(extent.offset, Ordering::Relaxed);
            }
            outline = outline.with(&extent);
        }
    }

    fn reachable(&self) -> Outline {
        self.outline().expect("every segment can be reached")
    }

    fn slots(&self, number: u32) -> SlotSegment<'_> {
        let BoxedSlots { generations, digests, records, tags } = &self.slots[number as usize];
        SlotSegment::Lanes(Lanes { generations, digests, records, tags })
    }

    fn texts(&self, number: u32) -> TextSegment<'_> {
        let BoxedTexts { words, offset } = &self.texts[number as usize];
        TextSegment::new(offset.load(Ordering::Relaxed), words)
    }

    fn extend(&self, outline: &Outline, word: u64) -> Result<(), Error> {
        let extent = outline.next(self.capacity, word).expect("a segment that follows the others");
        let boxes = if extent.kind == Kind::Slots { self.slots.len() } else { self.texts.len() };
        if (extent.number as usize) < boxes {
            // ORDERING: relaxed, for the load in `outline`: the protocol alone must order the two.
            self.room.fetch_max(extent.end(), Ordering::Relaxed);
            return Ok(());
        }
        Err(ErrorKind::TableFull { reason: "no more boxes".to_owned(), advice: "make them larger" }.into())
    }
}

fn table_of(size: Size) -> Arc<Slots<Boxed>> {
    fn boxes<T>(count: usize, new: impl Fn() -> T) -> Vec<T> {
        (0..count).map(|_| new()).collect()
    }
    let slots = |number: u32| {
        let count = (size.capacity << number.saturating_sub(1)) as usize;
        BoxedSlots {
            generations: boxes(count, GenerationWord::new),
            digests: boxes(count, SlotDigest::new),
            records: boxes(count, RecordWord::new),
            tags: boxes(count.div_ceil(TAGS), Tags::new),
        }
    };
    let texts = |_| BoxedTexts {
        words: boxes(RECORDS + 2 * size.records, || AtomicU64::new(0)),
        offset: std::sync::atomic::AtomicU64::new(0),
    };
    let header = Header {
        boot: [AtomicU64::new(0), AtomicU64::new(0)],
        state: AtomicU32::new(LIVE),
        segments_of_version_1: AtomicU32::new(0),
        wake: TableWakeWord { word: WakeWord::new() },
    };
    let mut first = [0; SEGMENTS];
    first[..2].copy_from_slice(&of_new_table(size.capacity));
    let memory = Boxed {
        header,
        directory: Directory { words: first.map(AtomicU64::new) },
        capacity: size.capacity,
        slots: (0..size.slots).map(slots).collect(),
        texts: (0..size.texts).map(texts).collect(),
        wake_words: [WakeWord::new(), WakeWord::new()],
        room: AtomicU64::new(end_of_new_table(size.capacity)),
    };
    Arc::new(Slots::new(memory, size.capacity))
}

/// A table with room for all texts that a model writes.
fn slots(capacity: u64, segments: u32) -> Arc<Slots<Boxed>> {
    table_of(Size { capacity, slots: segments, texts: 1, records: 6 })
}

/// A table in which the first key is, at `START`.
fn table_with_key(capacity: u64, segments: u32) -> Arc<Slots<Boxed>> {
    let table = slots(capacity, segments);
    table.attached(key(0)).unwrap();
    table
}

impl Slots<Boxed> {
    /// The first key's generation word.
    fn slot(&self) -> &GenerationWord {
        self.word_of(key(0)).unwrap()
    }

    fn word_of(&self, digest: Digest) -> Option<&GenerationWord> {
        Some(self.find(digest).unwrap()?.generation)
    }

    /// The wake word of the first key's waiters.
    fn wake_word(&self) -> &WakeWord {
        self.memory().wake_word(self.slot())
    }

    fn word(&self) -> Word {
        self.slot().word()
    }

    /// Attaches, and returns the address of the generation word; `None` if the table is being retired.
    fn attached(&self, digest: Digest) -> Option<usize> {
        let slot = self.attach(digest, || START, b"key").expect("there is room");
        slot.map(|slot| std::ptr::from_ref(slot.generation) as usize)
    }

    /// How often the key with `slot` was updated.
    fn updates(&self, slot: Slot<'_>) -> u64 {
        // The generation is read first: it acquires the record that the key began with.
        let generation = slot.generation.word().generation().expect("a key that has begun");
        self.record_of(slot).expect("a key that has begun has a record").updates(generation)
    }

    /// All slots that are claimed or half claimed.
    fn all(&self) -> impl Iterator<Item = Slot<'_>> {
        self.claimed(self.memory().outline().unwrap().slots).map(|(_, _, slot)| slot)
    }

    /// The slot at `place`, and no other, is completely claimed for `digest`, and is the one that a search finds. It has a text.
    fn assert_unique(&self, digest: Digest, place: usize) {
        let holders: Vec<_> = self
            .all()
            .filter(|slot| slot.digest.digest() == Some(digest))
            .map(|slot| std::ptr::from_ref(slot.generation) as usize)
            .collect();
        assert_eq!(holders, [place], "a key is claimed once");
        let found = self.find(digest).unwrap().expect("the key is found");
        assert_eq!(std::ptr::from_ref(found.generation) as usize, place);
        assert!(found.generation.word().is_live(), "a key that was attached has begun");
        assert_eq!(self.record_of(found).expect("a key that has begun has a record").text(), b"key");
    }
}

fn model(run: impl Fn() + Send + Sync + 'static) {
    model_with(3, run);
}

fn model_with(preemptions: usize, run: impl Fn() + Send + Sync + 'static) {
    #[cfg(shuttle)]
    schedule(shuttle::scheduler::RandomScheduler::new(1000 * preemptions), run);
    #[cfg(all(loom, not(shuttle)))]
    {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(preemptions);
        builder.check(run);
    }
    #[cfg(not(loom))]
    for _ in 0..1000 * preemptions {
        run();
    }
}

#[cfg(shuttle)]
fn schedule(scheduler: impl shuttle::scheduler::Scheduler + 'static, run: impl Fn() + Send + Sync + 'static) {
    let mut config = shuttle::Config::default();
    // It would warn of each ordering that it takes for a sequentially consistent one.
    config.silence_warnings = true;
    shuttle::Runner::new(scheduler, config).run(run);
}

/// Runs both at the same time, each with `shared`, and returns what they return.
fn both<S: Send + Sync + 'static, A: Send + 'static, B>(
    shared: &Arc<S>,
    one: impl FnOnce(&S) -> A + Send + 'static,
    other: impl FnOnce(&S) -> B,
) -> (A, B) {
    let one = {
        let shared = Arc::clone(shared);
        thread::spawn(move || one(&shared))
    };
    let other = other(shared);
    (one.join().unwrap(), other)
}

/// The kernel's lock on a slot: how many holders share it, or `ALONE`.
struct Lock(AtomicU64);

const ALONE: u64 = u64::MAX;

// ORDERING: acquire to take the lock and to look at it, release to let it go, which pair with one another: a holder sees what the
// holders before it did, as with a lock of the kernel.
impl Lock {
    fn try_share(&self) -> bool {
        let shared = |holders: u64| (holders != ALONE).then(|| holders + 1);
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, shared).is_ok()
    }

    /// The kernel does this, too, when a holder dies.
    fn unshare(&self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }

    /// What `/proc/locks` says of it.
    fn is_free(&self) -> bool {
        self.0.load(Ordering::Acquire) == 0
    }

    fn try_alone(&self) -> bool {
        self.0.compare_exchange(0, ALONE, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    fn end_alone(&self) {
        self.0.store(0, Ordering::Release);
    }
}

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
use crate::protocol::atomic::{Arc, AtomicU8, AtomicU32, AtomicU64, Ordering, thread};
use crate::protocol::layout::{Header, LABEL_SIZE, LIVE, Slot, Tag, WakeLine, segment_slots};
use crate::protocol::slot::Digest;
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
    segments: Vec<(Vec<Slot>, Vec<Tag>)>,
    /// For how many segments there is room so far.
    room: AtomicU32,
}

impl Memory for Boxed {
    fn header(&self) -> &Header {
        &self.header
    }

    fn segments(&self) -> Result<u32, Error> {
        Ok(self.header.segments())
    }

    fn segment(&self, segment: u32) -> (&[Slot], &[Tag]) {
        // ORDERING: relaxed. Reads what `extend` stores, and the release and acquire that order the two must be those of
        // `Header::add_segment` and `Header::segments`.
        assert!(segment == 0 || segment < self.room.load(Ordering::Relaxed), "a segment is used before there is room");
        let (slots, tags) = &self.segments[segment as usize];
        (slots, tags)
    }

    fn extend(&self, segment: u32) -> Result<(), Error> {
        if (segment as usize) < self.segments.len() {
            // ORDERING: relaxed, for the load in `segment`: the protocol alone must order the two.
            self.room.fetch_max(segment + 1, Ordering::Relaxed);
            return Ok(());
        }
        Err(ErrorKind::TableFull { reason: "no more boxes".to_owned(), advice: "make them larger" }.into())
    }
}

fn slots(capacity: u64, segments: u32) -> Arc<Slots<Boxed>> {
    let word = || AtomicU64::new(0);
    let slot = |_| Slot {
        generation: word(),
        digest_a: word(),
        digest_b: word(),
        wake: WakeWord::new(),
        key_length: AtomicU32::new(0),
        first: word(),
        label: std::array::from_fn::<_, { LABEL_SIZE / 8 }, _>(|_| word()),
    };
    let tag = |_| Tag(AtomicU8::new(0));
    let segment = |segment| {
        let count = segment_slots(capacity, segment);
        ((0..count).map(slot).collect(), (0..count).map(tag).collect())
    };
    let header = Header {
        boot: [word(), word()],
        state: AtomicU32::new(LIVE),
        segments: AtomicU32::new(1),
        wake: WakeLine { word: WakeWord::new() },
    };
    let memory = Boxed { header, segments: (0..segments).map(segment).collect(), room: AtomicU32::new(1) };
    Arc::new(Slots::new(memory, capacity))
}

/// A table in which the first key is, at `START`.
fn table_with_key(capacity: u64, segments: u32) -> Arc<Slots<Boxed>> {
    let table = slots(capacity, segments);
    table.attached(key(0)).unwrap();
    table
}

impl Slots<Boxed> {
    /// The first key's slot.
    fn slot(&self) -> &Slot {
        self.find(key(0)).unwrap().unwrap()
    }

    fn word(&self) -> Word {
        self.slot().word()
    }

    /// Attaches, and returns the address of the slot; `None` if the table is being retired.
    fn attached(&self, digest: Digest) -> Option<usize> {
        self.attach(digest, START, b"key").expect("there is room").map(|slot| std::ptr::from_ref(slot) as usize)
    }

    /// The slot at `place`, and no other, is completely claimed for `digest`, and is the one that a search finds.
    fn assert_unique(&self, digest: Digest, place: usize) {
        let segments = self.memory().segments().unwrap();
        let holders: Vec<_> = self
            .claimed(segments)
            .filter(|(_, _, slot)| slot.digest() == Some(digest))
            .map(|(_, _, slot)| std::ptr::from_ref(slot) as usize)
            .collect();
        assert_eq!(holders, [place], "a key is claimed once");
        let found = self.find(digest).unwrap().expect("the key is found");
        assert_eq!(std::ptr::from_ref(found) as usize, place);
        assert!(found.word().is_live(), "a key that was attached has begun");
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

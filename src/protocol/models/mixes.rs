//! Larger mixes than loom can try, for faults that need several operations to overlap which no other model here pairs.
//!
//! In each run, some threads do random operations on three keys of a table that has to grow for them, while others sleep
//! until keys are updated. shuttle chooses the operations and the schedule. It takes every ordering for a sequentially
//! consistent one, so it does not notice one that is too weak: loom does, in the other models.

use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler};

use super::{Boxed, KEYS, Lock, START, Size, key as digest, schedule, table_of};
use crate::protocol::atomic::{Arc, AtomicU64, Ordering, thread};
use crate::protocol::generation_word::GenerationWord;
use crate::protocol::observed::Observed;
use crate::protocol::slots::{Memory, Slots};

// ORDERING: relaxed throughout, and paired with nothing: this is bookkeeping beside the table. shuttle takes it for sequentially
// consistent.

const SEGMENTS: u32 = 4;
const WORKERS: usize = 3;
const WAITERS: usize = 2;
const OPERATIONS: usize = 4;

#[derive(Clone, Copy, Debug)]
enum Operation {
    Attach(usize),
    Find(usize),
    Mark(usize),
    Update(usize, Ending),
    Recover(usize),
    Load(usize),
    Check(usize),
    ExpireAll,
    Grow { texts: bool },
    Retire,
}

#[derive(Clone, Copy, Debug)]
enum Ending {
    Finish,
    Abandon,
    KilledBefore,
    KilledAfter,
}

impl Operation {
    fn random() -> Self {
        let mut random = thread_rng();
        let key = random.gen_range(0..KEYS.len());
        match random.gen_range(0..40) {
            0..4 => Self::Attach(key),
            4..7 => Self::Find(key),
            7..15 => Self::Mark(key),
            15..19 => Self::Update(key, Ending::Finish),
            19..21 => Self::Update(key, Ending::Abandon),
            21..23 => Self::Update(key, Ending::KilledBefore),
            23..25 => Self::Update(key, Ending::KilledAfter),
            25..28 => Self::Recover(key),
            28..31 => Self::Load(key),
            31..34 => Self::Check(key),
            34..37 => Self::ExpireAll,
            37..39 => Self::Grow { texts: random.r#gen() },
            _ => Self::Retire,
        }
    }

    /// Whether it is sure to move `key` on, unless the table is retired.
    fn moves_on(self, key: usize) -> bool {
        matches!(self, Self::Mark(moved) | Self::Update(moved, Ending::Finish) if moved == key)
    }
}

/// The data that a key stands for.
struct Source {
    lock: Lock,
    /// How often it was changed.
    state: AtomicU64,
    /// How many of the changes are before an update that has returned: a thread that has loaded fewer is expired.
    expired: AtomicU64,
    /// The address of the slot where the key is attached; zero if no thread has attached it.
    place: AtomicU64,
}

struct World {
    table: Arc<Slots<Boxed>>,
    capacity: u64,
    sources: [Source; KEYS.len()],
    /// The generation that each key reaches at least, unless the table is retired.
    goals: [u64; KEYS.len()],
}

/// What a thread has loaded of each key.
type Loaded = [Option<(Observed, u64)>; KEYS.len()];

impl World {
    /// `None`: the table is being retired.
    fn attach(&self, key: usize) -> Option<&GenerationWord> {
        let slot = self.table.attach(digest(key), || START, b"key").unwrap()?.generation;
        let address = std::ptr::from_ref(slot) as u64;
        let before = self.sources[key].place.swap(address, Ordering::Relaxed);
        assert!(before == 0 || before == address, "a key is at two places");
        Some(slot)
    }

    fn find(&self, key: usize) -> Option<&GenerationWord> {
        let place = self.sources[key].place.load(Ordering::Relaxed);
        let slot = self.table.word_of(digest(key));
        let found = slot.map_or(0, |slot| std::ptr::from_ref(slot) as u64);
        assert!(place == 0 || place == found, "a key is not found where it was attached");
        slot
    }

    fn change(&self, key: usize) -> u64 {
        self.sources[key].state.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Notes that the first `changes` changes of the source are before an update that has returned.
    fn expire_before(&self, key: usize, changes: u64) {
        self.sources[key].expired.fetch_max(changes, Ordering::Relaxed);
    }

    fn mark(&self, key: usize) {
        let Some(slot) = self.attach(key) else { return };
        let changes = self.change(key);
        if self.table.announce(slot, slot.bump()).is_live() {
            self.expire_before(key, changes);
        }
    }

    fn update(&self, key: usize, ending: Ending) {
        let Some(slot) = self.attach(key) else { return };
        let lock = &self.sources[key].lock;
        while !lock.try_share() {
            thread::yield_now();
        }
        if slot.begin_update().is_live() {
            match ending {
                Ending::Finish => {
                    let changes = self.change(key);
                    let before = slot.finish_update();
                    assert!(before.pending() > 0, "a living update was taken for a dead one");
                    self.table.announce(slot, before);
                    self.expire_before(key, changes);
                }
                Ending::Abandon => {
                    assert!(slot.word().pending() > 0, "a living update was taken for a dead one");
                    slot.abandon_update();
                }
                Ending::KilledBefore => {}
                Ending::KilledAfter => _ = self.change(key),
            }
        }
        lock.unshare();
    }

    fn recover(&self, key: usize) {
        let Some(slot) = self.find(key) else { return };
        let source = &self.sources[key];
        if slot.word().pending() > 0 && source.lock.try_alone() {
            let changes = source.state.load(Ordering::Relaxed);
            let before = self.table.announce(slot, slot.recover());
            if before.pending() > 0 {
                self.expire_before(key, changes);
            }
            source.lock.end_alone();
        }
    }

    fn load(&self, key: usize) -> Option<(Observed, u64)> {
        let ticket = Observed::of(self.attach(key)?.word());
        Some((ticket, self.sources[key].state.load(Ordering::Relaxed)))
    }

    fn check(&self, key: usize, loaded: &Loaded) {
        let (Some((observed, state)), Some(slot)) = (loaded[key], self.find(key)) else { return };
        let expired = self.sources[key].expired.load(Ordering::Relaxed);
        assert!(!observed.is(slot.word()) || state >= expired, "an old state passes for a fresh one");
    }

    fn expire_all(&self) {
        let begun = std::array::from_fn::<_, { KEYS.len() }, _>(|key| {
            self.find(key)?.word().generation()?;
            Some(self.sources[key].state.load(Ordering::Relaxed))
        });
        self.table.expire_all().unwrap();
        for (key, changes) in begun.into_iter().enumerate() {
            changes.inspect(|changes| self.expire_before(key, *changes));
        }
    }

    fn grow(&self, texts: bool) {
        let outline = self.table.memory().outline().unwrap();
        let (segments, word) = match texts {
            true => (outline.texts, outline.more_texts(1)),
            false => (outline.slots, outline.more_slots(self.capacity)),
        };
        if segments < SEGMENTS {
            let grown = self.table.grow(&outline, word).unwrap();
            assert!(grown.slots >= outline.slots && grown.texts >= outline.texts, "a segment was taken back");
        }
    }

    fn work(&self, operations: &[Operation]) -> Loaded {
        let mut loaded = Loaded::default();
        for operation in operations {
            match *operation {
                Operation::Attach(key) => _ = self.attach(key),
                Operation::Find(key) => _ = self.find(key),
                Operation::Mark(key) => self.mark(key),
                Operation::Update(key, ending) => self.update(key, ending),
                Operation::Recover(key) => self.recover(key),
                Operation::Load(key) => loaded[key] = self.load(key),
                Operation::Check(key) => self.check(key, &loaded),
                Operation::ExpireAll => self.expire_all(),
                Operation::Grow { texts } => self.grow(texts),
                Operation::Retire => self.table.retire().unwrap(),
            }
        }
        loaded
    }

    /// Waits for one update after another, as long as the workers are sure to make one.
    fn await_goal(&self, key: usize, on_table: bool) -> Loaded {
        let mut loaded = Loaded::default();
        while self.attach(key).is_some() {
            self.check(key, &loaded);
            loaded[key] = self.load(key);
            let Some((seen, _)) = loaded[key] else { break };
            if seen.generation().is_some_and(|generation| generation.get() >= self.goals[key]) {
                break;
            }
            if on_table {
                self.table.wait_on_table_for(digest(key), seen);
            } else {
                self.table.wait_for(digest(key), seen);
            }
        }
        loaded
    }

    /// To be called when all threads have ended.
    fn assert_settled(&self, loaded: &[Loaded]) {
        for (key, source) in self.sources.iter().enumerate() {
            self.recover(key);
            loaded.iter().for_each(|loaded| self.check(key, loaded));
            let place = source.place.load(Ordering::Relaxed);
            let slot = match self.find(key) {
                Some(slot) if place != 0 => slot,
                _ => continue,
            };
            assert_eq!(slot.word().pending(), 0, "a pending update was left, or counted out twice");
            if self.table.header().is_live() {
                self.table.assert_unique(digest(key), place as usize);
                assert!(slot.word().generation().unwrap().get() >= self.goals[key], "an update is lost");
            } else {
                assert!(!slot.word().is_live(), "a slot was missed by the sweep");
            }
        }
    }
}

fn mix() {
    let work: Vec<[Operation; OPERATIONS]> =
        (0..WORKERS).map(|_| std::array::from_fn(|_| Operation::random())).collect();
    let goal = |key| START + work.iter().flatten().filter(|operation| operation.moves_on(key)).count() as u64;
    let source = |_| Source {
        lock: Lock(AtomicU64::new(0)),
        state: AtomicU64::new(1),
        expired: AtomicU64::new(0),
        place: AtomicU64::new(0),
    };
    let capacity = 1 << thread_rng().gen_range(0..2);
    let world = Arc::new(World {
        // Each segment has room for a record of each thread for each key, in case that all of them lose.
        table: table_of(Size { capacity, slots: SEGMENTS, texts: SEGMENTS, records: KEYS.len() * (WORKERS + WAITERS) }),
        capacity,
        sources: std::array::from_fn(source),
        goals: std::array::from_fn(goal),
    });
    let workers = work.into_iter().map(|operations| {
        let world = world.clone();
        thread::spawn(move || world.work(&operations))
    });
    let workers: Vec<_> = workers.collect();
    let waiters = (0..WAITERS).map(|_| {
        let (world, key, on_table) = (world.clone(), thread_rng().gen_range(0..KEYS.len()), thread_rng().r#gen());
        thread::spawn(move || world.await_goal(key, on_table))
    });
    let waiters: Vec<_> = waiters.collect();
    let loaded: Vec<_> = workers.into_iter().chain(waiters).map(|thread| thread.join().unwrap()).collect();
    world.assert_settled(&loaded);
}

#[test]
fn any_mix_of_operations_in_any_order_loses_nothing_and_ends() {
    schedule(RandomScheduler::new(30_000), mix);
}

#[test]
fn any_mix_of_operations_that_is_cut_at_few_points_loses_nothing_and_ends() {
    schedule(PctScheduler::new(4, 30_000), mix);
}

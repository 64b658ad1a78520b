//! The protocol over boxed memory: every interleaving of a few steps under loom, many random ones under std.
//!
//! Under loom (`RUSTFLAGS="--cfg loom" cargo test --lib --release`) each model runs all executions with at most three
//! preemptions, or as many as it says. Without it, the same functions run on threads, many times.

#[cfg(not(loom))]
mod stops;
mod waiting;

use crate::error::{Error, ErrorKind};
use crate::layout::{Header, LABEL_SIZE, LIVE, Slot, Tag, WakeLine, segment_slots};
use crate::slot::{Digest, Seen, Sight, WakeWord};
use crate::sync::{Arc, AtomicU8, AtomicU32, AtomicU64, Ordering, thread};
use crate::table::{Memory, Slots};

const START: u64 = 1 << 50;

/// A table in boxes, with all the segments it may ever have.
struct Boxed {
    header: Header,
    segments: Vec<(Vec<Slot>, Vec<Tag>)>,
}

impl Memory for Boxed {
    fn header(&self) -> &Header {
        &self.header
    }

    fn segments(&self) -> Result<u32, Error> {
        Ok(self.header.segments())
    }

    fn segment(&self, segment: u32) -> (&[Slot], &[Tag]) {
        let (slots, tags) = &self.segments[segment as usize];
        (slots, tags)
    }

    fn extend(&self, segment: u32) -> Result<(), Error> {
        if (segment as usize) < self.segments.len() {
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
    Arc::new(Slots::new(Boxed { header, segments: (0..segments).map(segment).collect() }, capacity))
}

impl Slots<Boxed> {
    /// Attaches and says which slot it got, by its address; `None` if the table is being retired.
    fn attached(&self, digest: Digest) -> Option<usize> {
        self.attach(digest, || START, b"key").expect("there is room").map(|slot| std::ptr::from_ref(slot) as usize)
    }

    /// How many slots hold `digest` whole, which must be no other than the one that is found.
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
    #[cfg(loom)]
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

/// Runs both at once, and returns what they return.
fn both<A: Send + 'static, B: 'static>(one: impl FnOnce() -> A + Send + 'static, other: impl FnOnce() -> B) -> (A, B) {
    let one = thread::spawn(one);
    let other = other();
    (one.join().unwrap(), other)
}

#[test]
fn two_claimers_of_one_key_get_one_slot() {
    model(|| {
        let table = slots(2, 1);
        let key = Digest::new(6, 7);
        let (one, other) = both(
            {
                let table = table.clone();
                move || table.attached(key)
            },
            || table.attached(key),
        );
        assert_eq!(one, other);
        table.assert_unique(key, one.unwrap());
    });
}

#[test]
fn two_keys_with_the_same_word_a_get_a_slot_each() {
    model(|| {
        let table = slots(2, 1);
        let keys = [Digest::new(6, 7), Digest::new(6, 8)];
        let (one, other) = both(
            {
                let table = table.clone();
                move || table.attached(keys[0])
            },
            || table.attached(keys[1]),
        );
        assert_ne!(one, other);
        table.assert_unique(keys[0], one.unwrap());
        table.assert_unique(keys[1], other.unwrap());
    });
}

#[test]
fn a_claim_that_stopped_halfway_is_finished_by_others() {
    model(|| {
        let table = slots(4, 1);
        let keys = [Digest::new(6, 7), Digest::new(6, 8)];
        let stopped = {
            let table = table.clone();
            thread::spawn(move || table.memory().segment(0).0[6 % 4].claim_word_a(keys[0]))
        };
        let (one, other) = both(
            {
                let table = table.clone();
                move || table.attached(keys[0])
            },
            || table.attached(keys[1]),
        );
        stopped.join().unwrap();
        assert_ne!(one, other);
        table.assert_unique(keys[0], one.unwrap());
        table.assert_unique(keys[1], other.unwrap());
    });
}

#[test]
fn two_growers_agree_on_the_new_segment() {
    model(|| {
        let table = slots(1, 2);
        table.attached(Digest::new(2, 2)).unwrap();
        let keys = [Digest::new(6, 7), Digest::new(8, 9)];
        let (one, other) = both(
            {
                let table = table.clone();
                move || table.attached(keys[0])
            },
            || (table.attached(keys[0]), table.attached(keys[1])),
        );
        assert_eq!(one, other.0);
        table.assert_unique(keys[0], one.unwrap());
        table.assert_unique(keys[1], other.1.unwrap());
    });
}

#[test]
fn whoever_attaches_to_a_retiring_table_knows_it_or_is_swept() {
    model(|| {
        let table = slots(2, 1);
        let key = Digest::new(6, 7);
        let (place, ()) = both(
            {
                let table = table.clone();
                move || table.attached(key)
            },
            || table.retire().unwrap(),
        );
        let swept = table.find(key).unwrap().is_some_and(|slot| !slot.word().is_live());
        assert!(place.is_none() || swept, "an attached slot was missed by the sweep");
    });
}

#[test]
fn an_update_before_the_retired_bit_is_in_the_sweeps_past() {
    model(|| {
        let table = slots(2, 1);
        let key = Digest::new(6, 7);
        table.attached(key).unwrap();
        let source = Arc::new(AtomicU64::new(1));
        let (before, ()) = both(
            {
                let (table, source) = (table.clone(), source.clone());
                move || {
                    source.store(2, Ordering::Relaxed);
                    table.find(key).unwrap().unwrap().bump()
                }
            },
            || {
                table.retire().unwrap();
                // What a successor's first user does: no update whose fetch_add saw no retired bit may be missing here.
                let retired = table.find(key).unwrap().unwrap().word();
                let loaded = source.load(Ordering::Relaxed);
                if retired.generation().unwrap().get() == START + 2 {
                    assert_eq!(loaded, 2, "an update that came before the sweep is not seen after it");
                }
            },
        );
        let end = table.find(key).unwrap().unwrap().word();
        assert!(!end.is_live());
        assert_eq!(before.is_live(), before.updated().is_some());
    });
}

#[test]
fn an_update_during_a_load_leaves_the_state_expired() {
    model(|| {
        let table = slots(1, 1);
        let key = Digest::new(6, 7);
        table.attached(key).unwrap();
        let source = Arc::new(AtomicU64::new(1));
        let ((state, seen), _) = both(
            {
                let (table, source) = (table.clone(), source.clone());
                move || {
                    let ticket = Sight::of(table.find(key).unwrap().unwrap().word());
                    let state = source.load(Ordering::Relaxed);
                    let seen = Seen::new(Sight::NOTHING);
                    seen.adopt(ticket);
                    (state, seen)
                }
            },
            || {
                source.store(2, Ordering::Relaxed);
                table.find(key).unwrap().unwrap().bump()
            },
        );
        let fresh = seen.get().is(table.find(key).unwrap().unwrap().word());
        assert!(!fresh || state == 2, "an old state passes for a fresh one");
    });
}

#[test]
fn no_update_is_lost_and_none_is_mistaken_for_another() {
    model(|| {
        let table = slots(1, 1);
        let key = Digest::new(6, 7);
        table.attached(key).unwrap();
        let update = move |table: &Slots<Boxed>, seen: &Seen| {
            let before = table.find(key).unwrap().unwrap().bump();
            seen.follow(before);
            before.updated().unwrap()
        };
        let seen = || Seen::new(Sight::of(table.find(key).unwrap().unwrap().word()));
        let (first, second) = (seen(), seen());
        let ((one, first), (other, second)) = both(
            {
                let table = table.clone();
                move || (update(&table, &first), first)
            },
            || (update(&table, &second), second),
        );
        assert_ne!(one, other, "two updates have one generation");
        let word = table.find(key).unwrap().unwrap().word();
        assert_eq!(word.generation().unwrap().get(), START + 2);
        assert!(!first.get().is(word) && !second.get().is(word), "each has not seen the other's update");
    });
}

/// The kernel's lock on a slot: how many share it, or `ALONE`.
struct Lock(AtomicU64);

const ALONE: u64 = u64::MAX;

impl Lock {
    fn try_share(&self) -> bool {
        let shared = |holders: u64| (holders != ALONE).then(|| holders + 1);
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, shared).is_ok()
    }

    /// Also what the kernel does when a holder dies.
    fn unshare(&self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }

    fn try_alone(&self) -> bool {
        self.0.compare_exchange(0, ALONE, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    fn end_alone(&self) {
        self.0.store(0, Ordering::Release);
    }
}

/// A source behind a key of a table, and the lock on its slot.
struct Place {
    table: Arc<Slots<Boxed>>,
    lock: Lock,
    source: AtomicU64,
}

impl Place {
    const KEY: [u64; 2] = [6, 7];

    fn new() -> Arc<Self> {
        let table = slots(1, 1);
        table.attached(Digest::new(Self::KEY[0], Self::KEY[1])).unwrap();
        Arc::new(Self { table, lock: Lock(AtomicU64::new(0)), source: AtomicU64::new(1) })
    }

    fn slot(&self) -> &Slot {
        self.table.find(Digest::new(Self::KEY[0], Self::KEY[1])).unwrap().unwrap()
    }

    /// An update whose maker is killed before or after it changes the source, or not at all; `false` if it could not
    /// begin.
    fn update(&self, commits: bool, survives: bool) -> bool {
        if !self.lock.try_share() {
            return false;
        }
        self.slot().begin_update();
        if commits {
            self.source.store(2, Ordering::Relaxed);
        }
        if survives && commits {
            let before = self.slot().finish_update();
            assert!(before.pending() > 0, "somebody took a living update for a dead one's");
        } else if survives {
            assert!(self.slot().word().pending() > 0, "somebody took a living update for a dead one's");
            self.slot().abandon_update();
        }
        self.lock.unshare();
        true
    }

    /// A reader's look at a pending update.
    fn recover(&self) {
        if self.slot().word().pending() > 0 && self.lock.try_alone() {
            self.slot().recover();
            self.lock.end_alone();
        }
    }

    fn load(&self) -> (Sight, u64) {
        (Sight::of(self.slot().word()), self.source.load(Ordering::Relaxed))
    }

    /// Once all others have ended: nothing is left pending, and no old state passes for a fresh one.
    fn assert_settled(&self, (sight, state): (Sight, u64)) {
        self.recover();
        let word = self.slot().word();
        assert_eq!(word.pending(), 0, "a pending update was left, or counted out twice");
        assert!(!sight.is(word) || state == self.source.load(Ordering::Relaxed), "an old state passes for a fresh one");
    }
}

#[test]
fn an_update_ends_in_a_new_generation_wherever_its_maker_is_killed() {
    for (commits, survives) in [(false, false), (true, false), (true, true), (false, true)] {
        model(move || {
            let place = Place::new();
            let (_, loaded) = both(
                {
                    let place = place.clone();
                    move || place.update(commits, survives)
                },
                || {
                    place.recover();
                    place.load()
                },
            );
            place.assert_settled(loaded);
        });
    }
}

#[test]
fn who_recovers_a_dead_update_leaves_a_living_one_alone() {
    for commits in [false, true] {
        model(move || {
            let place = Place::new();
            assert!(place.update(true, false));
            let (_, loaded) = both(
                {
                    let place = place.clone();
                    move || place.update(commits, true)
                },
                || {
                    place.recover();
                    let loaded = place.load();
                    place.recover();
                    loaded
                },
            );
            place.assert_settled(loaded);
        });
    }
}

//! Guards against any sequence of operations that behaves otherwise than a plain map of counters.

mod support;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use gensync::{Cached, Generation, GenerationSynchronizer, Table, TableOptions, UpdateError, WaitSet, update_all};
use nix::sys::signal::{Signal, raise};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use support::place::{KINDS, Kind, Place};
use support::{LIMIT, in_child, shared_words};

/// Keys and holders are few, so that operations meet.
const KEYS: usize = 3;
const HOLDERS: usize = 3;
/// The holder that has every key from the beginning, and is looked at first.
const OBSERVER: usize = HOLDERS;
/// The holder that opens the table read-only.
const READER: usize = HOLDERS + 1;

#[derive(Clone, Copy, Debug)]
enum Ending {
    Commit,
    Fail,
    Panic,
    Abandon,
}

#[derive(Clone, Debug)]
enum Operation {
    Attach(usize, usize),
    Clone(usize, usize, usize),
    Read(usize),
    Drop(usize, usize),
    MarkUpdated(usize, usize),
    Clear(usize, usize),
    Refresh(usize, usize),
    /// A load, during which another holder may clear.
    Load(usize, usize, Option<usize>),
    FailingLoad(usize, usize),
    Get(usize, usize),
    Wait(usize, usize),
    WaitForAll(usize),
    /// An update, and what happens before its commit.
    Update(usize, usize, Vec<Operation>, Ending),
    UpdateAll(usize, [usize; 2]),
    /// An update by a process that is killed before or after its commit.
    Killed(usize, usize, bool),
    /// What a forked child does.
    Fork(Vec<Operation>),
    Grow(u32),
    Reset(usize),
    Reopen(usize),
}

use Operation::*;

/// What happens within others: nothing that waits for their end.
fn simple_operation() -> impl Strategy<Value = Operation> {
    let pair = || (0..HOLDERS, 0..KEYS);
    prop_oneof![
        2 => pair().prop_map(|(holder, key)| Attach(holder, key)),
        1 => (pair(), 0..HOLDERS).prop_map(|((holder, key), to)| Clone(holder, key, to)),
        1 => (0..KEYS).prop_map(Read),
        1 => pair().prop_map(|(holder, key)| Drop(holder, key)),
        4 => pair().prop_map(|(holder, key)| MarkUpdated(holder, key)),
        1 => pair().prop_map(|(holder, key)| Clear(holder, key)),
        2 => (0..=READER, 0..KEYS).prop_map(|(holder, key)| Refresh(holder, key)),
        2 => (0..=READER, 0..KEYS, proptest::option::of(0..HOLDERS)).prop_map(|(holder, key, other)| Load(holder, key, other)),
        1 => pair().prop_map(|(holder, key)| FailingLoad(holder, key)),
        2 => pair().prop_map(|(holder, key)| Get(holder, key)),
        1 => (0..=READER, 0..KEYS).prop_map(|(holder, key)| Wait(holder, key)),
        1 => (0..HOLDERS).prop_map(WaitForAll),
        1 => (0..20_u32).prop_map(Grow),
        1 => (0..HOLDERS).prop_map(Reopen),
    ]
}

fn operation() -> impl Strategy<Value = Operation> {
    let pair = || (0..HOLDERS, 0..KEYS);
    let several = || proptest::collection::vec(simple_operation(), 0..4);
    let ending = prop_oneof![Just(Ending::Commit), Just(Ending::Fail), Just(Ending::Panic), Just(Ending::Abandon)];
    prop_oneof![
        20 => simple_operation(),
        3 => (pair(), several(), ending).prop_map(|((holder, key), during, ending)| Update(holder, key, during, ending)),
        1 => (0..HOLDERS, [0..KEYS, 0..KEYS]).prop_map(|(holder, keys)| UpdateAll(holder, keys)),
        1 => (pair(), any::<bool>()).prop_map(|((holder, key), commits)| Killed(holder, key, commits)),
        1 => several().prop_map(Fork),
        1 => (0..HOLDERS).prop_map(Reset),
    ]
}

/// What must come out: how often each key was updated, at which count each holder is, and each value was loaded.
#[derive(Clone, Debug, Default)]
struct Model {
    updates: [u64; KEYS],
    /// None: surely expired.
    seen: BTreeMap<(usize, usize), Option<u64>>,
    values: BTreeMap<(usize, usize), u64>,
}

impl Model {
    fn is_fresh(&self, place: (usize, usize)) -> bool {
        self.seen[&place] == Some(self.updates[place.1])
    }

    /// An update that its maker follows, if it was up to date.
    fn follow(&mut self, place: (usize, usize)) {
        let was_fresh = self.is_fresh(place);
        self.updates[place.1] += 1;
        if was_fresh {
            self.seen.insert(place, Some(self.updates[place.1]));
        }
    }
}

type Value = (Arc<Cached<u64>>, Arc<AtomicU64>);

struct World {
    place: Place,
    options: TableOptions,
    tables: Vec<Table>,
    syncs: BTreeMap<(usize, usize), Rc<GenerationSynchronizer>>,
    values: BTreeMap<(usize, usize), Value>,
    sources: &'static [AtomicU64],
    /// The last generation of each key, and how often it had been updated then.
    generations: [Option<(Generation, u64)>; KEYS],
    model: Model,
}

fn name(key: usize) -> [String; 2] {
    ["key".to_owned(), key.to_string()]
}

impl World {
    fn new(kind: Kind, capacity: u64) -> Self {
        let (place, options) = (Place::new(kind), Table::options().capacity(capacity));
        let mut world = Self {
            tables: (0..=HOLDERS).map(|_| place.open(options.clone())).collect(),
            place,
            options,
            syncs: BTreeMap::new(),
            values: BTreeMap::new(),
            sources: shared_words(KEYS),
            generations: [None; KEYS],
            model: Model::default(),
        };
        (0..KEYS).for_each(|key| world.attach(OBSERVER, key));
        world
    }

    fn attach(&mut self, holder: usize, key: usize) {
        self.keep((holder, key), GenerationSynchronizer::new(&self.tables[holder], name(key)).unwrap());
        self.model.seen.insert((holder, key), Some(self.model.updates[key]));
    }

    fn keep(&mut self, place: (usize, usize), sync: GenerationSynchronizer) {
        self.syncs.insert(place, Rc::new(sync));
    }

    fn sync(&self, holder: usize, key: usize) -> Option<Rc<GenerationSynchronizer>> {
        self.syncs.get(&(holder, key)).cloned()
    }

    fn change(&self, key: usize) -> u64 {
        self.sources[key].fetch_add(1, SeqCst) + 1
    }

    /// Does `operation`, if there is a holder that can.
    fn act(&mut self, operation: &Operation) {
        self.attempt(operation);
        self.check();
    }

    fn attempt(&mut self, operation: &Operation) -> Option<()> {
        match *operation {
            Attach(holder, key) => self.attach(holder, key),
            Reopen(holder) => {
                self.tables[holder] = self.place.open(self.options.clone());
                (0..KEYS).for_each(|key| self.drop_all((holder, key)));
            }
            Clone(holder, key, to) => {
                let clone = (*self.sync(holder, key)?).clone();
                self.keep((to, key), clone);
                self.model.seen.insert((to, key), self.model.seen[&(holder, key)]);
            }
            Read(key) => {
                let table = self.options.clone().read_only(true).open(self.place.path()?).unwrap();
                self.keep((READER, key), GenerationSynchronizer::new(&table, name(key)).unwrap());
                self.model.seen.insert((READER, key), Some(self.model.updates[key]));
            }
            Drop(holder, key) => self.drop_all((holder, key)),
            MarkUpdated(holder, key) => {
                let sync = self.sync(holder, key)?;
                self.change(key);
                sync.mark_updated().unwrap();
                self.model.follow((holder, key));
            }
            Clear(holder, key) => {
                let sync = self.sync(holder, key)?;
                self.change(key);
                sync.clear().unwrap();
                self.model.updates[key] += 1;
            }
            Refresh(holder, key) => {
                self.sync(holder, key)?.refresh().unwrap();
                self.model.seen.insert((holder, key), Some(self.model.updates[key]));
            }
            Load(holder, key, other) => {
                let sync = self.sync(holder, key)?;
                let before = self.model.updates[key];
                sync.refresh_with(|| {
                    other.and_then(|other| self.attempt(&Clear(other, key)));
                    Ok::<_, ()>(())
                })
                .unwrap();
                self.model.seen.insert((holder, key), Some(before));
            }
            FailingLoad(holder, key) => {
                assert!(self.sync(holder, key)?.refresh_with(|| Err::<(), _>(())).is_err());
            }
            Get(holder, key) => self.get(holder, key)?,
            Wait(holder, key) => {
                let waited = self.sync(holder, key)?.wait_timeout(Duration::ZERO);
                assert_eq!(waited.is_changed(), !self.model.is_fresh((holder, key)));
            }
            WaitForAll(holder) => {
                let places: Vec<_> = self.syncs.keys().copied().filter(|place| place.0 == holder).collect();
                let set: WaitSet<'_> = places.iter().map(|place| &*self.syncs[place]).collect();
                let expired = (0..places.len()).filter(|&position| !self.model.is_fresh(places[position]));
                assert_eq!(set.wait_timeout(Duration::ZERO), expired.collect::<Vec<_>>());
            }
            Update(holder, key, ref during, ending) => self.update(holder, key, during, ending)?,
            UpdateAll(holder, keys) => {
                let syncs = [self.sync(holder, keys[0])?, self.sync(holder, keys[1])?];
                let commit = || Ok::<_, ()>(keys.iter().for_each(|&key| _ = self.change(key)));
                update_all(&[&*syncs[0], &*syncs[1]], commit).unwrap();
                // One after the other, in case they are the same.
                keys.iter().for_each(|&key| self.model.follow((holder, key)));
            }
            Killed(holder, key, commits) => {
                let sync = self.sync(holder, key)?;
                let killed = in_child(|| {
                    let _update = sync.begin_update().unwrap();
                    if commits {
                        self.change(key);
                    }
                    raise(Signal::SIGKILL).unwrap();
                });
                assert!(killed.ends_by_kill());
                let observer = self.sync(OBSERVER, key)?;
                observer.refresh().unwrap();
                // Whether it has committed or not, one update takes its place, soon.
                let start = Instant::now();
                while !observer.is_expired() {
                    assert!(start.elapsed() < LIMIT, "a killed update is not noticed");
                }
                self.model.seen.insert((OBSERVER, key), Some(self.model.updates[key]));
                self.model.updates[key] += 1;
            }
            Fork(ref operations) => {
                // What it does for all, the model of it does here.
                let mut shared = self.model.clone();
                in_child(|| operations.iter().for_each(|operation| self.act(operation))).succeeds();
                operations.iter().for_each(|operation| shared.account(operation));
                self.model.updates = shared.updates;
            }
            Grow(keys) => {
                let filler =
                    |i: u32| drop(GenerationSynchronizer::new(&self.tables[OBSERVER], format!("filler {i}")).unwrap());
                (0..keys).for_each(filler);
            }
            Reset(holder) => {
                self.tables[holder].reset().unwrap();
                self.model.updates.iter_mut().for_each(|count| *count += 1);
            }
        }
        Some(())
    }

    fn drop_all(&mut self, place: (usize, usize)) {
        self.syncs.remove(&place);
        self.values.remove(&place);
        self.model.seen.remove(&place);
        self.model.values.remove(&place);
    }

    fn get(&mut self, holder: usize, key: usize) -> Option<()> {
        let place = (holder, key);
        if !self.values.contains_key(&place) {
            let sync = (*self.sync(holder, key)?).clone();
            let loads = Arc::new(AtomicU64::new(0));
            let loader = {
                let (loads, source) = (loads.clone(), &self.sources[key]);
                move || {
                    loads.fetch_add(1, SeqCst);
                    Ok::<_, std::convert::Infallible>(source.load(SeqCst))
                }
            };
            self.values.insert(place, (Arc::new(Cached::new(sync, loader)), loads));
        }
        let (value, loads) = &self.values[&place];
        let before = loads.load(SeqCst);
        assert_eq!(*value.get().unwrap(), self.sources[key].load(SeqCst), "an old value");
        let is_loaded = self.model.values.insert(place, self.model.updates[key]) != Some(self.model.updates[key]);
        assert_eq!(loads.load(SeqCst) - before, u64::from(is_loaded), "a load too many, or too few");
        Some(())
    }

    fn update(&mut self, holder: usize, key: usize, during: &[Operation], ending: Ending) -> Option<()> {
        let sync = self.sync(holder, key)?;
        if let Ending::Abandon = ending {
            let update = sync.begin_update().unwrap();
            during.iter().for_each(|operation| self.act(operation));
            update.abandon();
            return Some(());
        }
        let panicked = Cell::new(false);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            sync.update(|| {
                during.iter().for_each(|operation| self.act(operation));
                self.change(key);
                match ending {
                    Ending::Panic => {
                        panicked.set(true);
                        resume_unwind(Box::new(()))
                    }
                    Ending::Fail => Err(()),
                    _ => Ok(()),
                }
            })
        }));
        match outcome {
            Err(panic) if !panicked.get() => resume_unwind(panic),
            Err(_) | Ok(Ok(())) | Ok(Err(UpdateError::Commit(()))) => {}
            Ok(Err(error)) => panic!("{error:?}"),
        }
        // The maker may have been moved to another holder meanwhile; and after a commit that failed, the maker does not know the source.
        let is_in_place = self.sync(holder, key).is_some_and(|present| Rc::ptr_eq(&present, &sync));
        match is_in_place && !matches!(ending, Ending::Panic | Ending::Fail) {
            true => self.model.follow((holder, key)),
            false => self.model.updates[key] += 1,
        }
        Some(())
    }

    fn check(&mut self) {
        // The observer first, so that every key is there for holders that cannot create one.
        let mut places: Vec<_> = self.syncs.keys().copied().collect();
        places.sort_by_key(|place| place.0 != OBSERVER);
        for place in places {
            let is_expired = self.syncs[&place].is_expired();
            assert_eq!(is_expired, !self.model.is_fresh(place), "holder {} of key {}", place.0, place.1);
            if is_expired && place.0 == OBSERVER {
                self.attempt(&Refresh(OBSERVER, place.1));
            }
        }
        for key in 0..KEYS {
            let (generation, updates) =
                (self.tables[OBSERVER].generation(name(key)).unwrap().unwrap(), self.model.updates[key]);
            if let Some((last, count)) = self.generations[key] {
                let is_right = if count == updates { generation == last } else { generation > last };
                assert!(is_right, "key {key}: {generation} after {count} updates of {updates}, {last}");
            }
            self.generations[key] = Some((generation, updates));
            let label = format!("key:{key}");
            let found: Vec<_> = self.tables[OBSERVER].slots().filter(|slot| slot.label() == label).collect();
            assert!(found.len() == 1 && found[0].generation() == generation, "{found:?}");
        }
    }
}

impl Model {
    /// What `operation` by a forked child means for processes that see nothing of it except the table.
    fn account(&mut self, operation: &Operation) {
        match *operation {
            MarkUpdated(holder, key) | Clear(holder, key) if self.seen.contains_key(&(holder, key)) => {
                self.updates[key] += 1
            }
            Load(holder, key, Some(other))
                if self.seen.contains_key(&(holder, key)) && self.seen.contains_key(&(other, key)) =>
            {
                self.updates[key] += 1;
            }
            Attach(holder, key) => _ = self.seen.insert((holder, key), None),
            Clone(holder, key, to) if self.seen.contains_key(&(holder, key)) => _ = self.seen.insert((to, key), None),
            Drop(holder, key) => _ = self.seen.remove(&(holder, key)),
            Reopen(holder) => self.seen.retain(|&(other, _), _| other != holder),
            // Only those count that a path leads to, which they cannot change.
            Read(key) => _ = self.seen.entry((READER, key)).or_insert(None),
            _ => {}
        }
    }
}

fn run(kind: Kind, capacity: u64, operations: &[Operation]) {
    let mut world = World::new(kind, capacity);
    operations.iter().for_each(|operation| world.act(operation));
}

proptest! {
    #![proptest_config(ProptestConfig {
        // Where tests/ is, there is no lib.rs that it could be found by.
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct("tests/model.regressions"))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_sequence_of_operations(
        kind in proptest::sample::select(KINDS),
        capacity in 1u64..8,
        operations in proptest::collection::vec(operation(), 1..50),
    ) {
        run(kind, capacity, &operations);
    }
}

/// Sequences that found the code broken, made as short as possible by hand.
#[test]
fn the_shortest_sequences_that_have_found_something() {
    let cases: &[&[Operation]] = &[
        // An updater follows its own update.
        &[Attach(0, 0), MarkUpdated(0, 0)],
        // An update that is given up is none.
        &[Attach(1, 2), Update(1, 2, vec![], Ending::Abandon)],
        // A ticket is taken before the load.
        &[Attach(1, 2), Load(1, 2, Some(1))],
        // A clone has seen what it was cloned from has seen, and no more.
        &[Attach(1, 1), Reset(0), Clone(1, 1, 0)],
        // One commit for a key that is named twice is two updates.
        &[Attach(0, 1), UpdateAll(0, [1, 1])],
    ];
    for &kind in KINDS {
        cases.iter().for_each(|operations| run(kind, 1, operations));
    }
}

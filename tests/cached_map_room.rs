//! Guards against a map that takes more than its room: of memory, for values and for what it remembers of keys; and of the table, for
//! keys without bound. And against one that gives up what is in use, or serves what has outlived its time.

#![expect(unsafe_code, reason = "asks the allocator")]

#[path = "support/map.rs"]
mod map;
mod support;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use gensync::{CacheKey, CachedMap, CachedMapBuilder, GenerationSynchronizer, Peek, Table};
use map::{Database, key};
use support::source::{HOUR, anonymous};
use support::{alone, in_child, next_random, path, system_calls};

const TIME: Duration = Duration::from_millis(250);

#[test]
fn there_are_no_more_entries_than_there_is_room_for() {
    for room in [1, 2, 10, 31, 33, 100, 1000, 10_001] {
        let (table, database) = (anonymous(), Database::default());
        let map = database.map(&table).max_entries(room).build();
        assert_eq!(*map.get(&0).unwrap(), *map.get(&0).unwrap());
        assert_eq!(database.loads(), 1, "{room}: nothing is kept");
        for id in 0..(3 * room as u64).max(100) {
            map.get(&id).unwrap();
            assert!(map.len() <= room, "{} of {room}", map.len());
        }
        // Keys do not fall evenly on the parts of the cache.
        assert!(map.len() >= room * 9 / 10 - 10 * usize::from(room > 100), "{} of {room}", map.len());
        assert_eq!(map.weight(), map.len() as u64);
        // What is there is not loaded again.
        let before = database.loads();
        let present = (0..30_100).filter(|id| !matches!(map.peek(id), Peek::Nothing)).count();
        assert_eq!((present, database.loads()), (map.len(), before));
    }
    let map = Database::default().map(&anonymous()).max_entries(usize::MAX).build();
    (0..100).for_each(|id| drop(map.get(&id).unwrap()));
    assert_eq!(map.len(), 100);
}

#[test]
fn weights_are_limited_and_none_is_nothing() {
    for room in [1, 3, 7, 20, 1000, 12_345] {
        let (table, database) = (anonymous(), Database::default());
        let map = database.map(&table).max_weight(room, |_, value| *value).build();
        for id in 0..3 * room {
            database.set(id, Ok(id % 3));
            map.get(&id).unwrap();
            map.get(&id).unwrap();
            assert!(map.weight() <= room && map.len() as u64 <= room, "{} of {room}", map.weight());
        }
        assert!(!map.is_empty(), "{room}: nothing has room");
    }
    // Nor do the greatest weights add up to little.
    let map = Database::default().map(&anonymous()).max_entries(10).max_weight(u64::MAX, |_, _| u64::MAX / 3).build();
    (0..20).for_each(|id| drop(map.get(&id).unwrap()));
    assert!(map.len() <= 3);
    // An entry that becomes too heavy does not stay as it was.
    let (table, database) = (anonymous(), Database::default());
    let map = database.map(&table).max_weight(1000, |_, value| *value).build();
    map.get(&1).unwrap();
    for heavy in [1001, u64::MAX, u64::MAX - 1] {
        map.update(&1, || database.change(1, heavy)).unwrap();
        let before = database.loads();
        assert_eq!((*map.get(&1).unwrap(), *map.get(&1).unwrap()), (heavy, heavy));
        assert_eq!((database.loads() - before, map.len()), (2, 0), "loaded at each use");
    }
    assert_eq!(map.counters().too_heavy, 6);
    // On each machine, whatever the number of its processors: a quarter of the room is enough for what takes a little less.
    let map = database.map(&table).max_weight(1_000_000, |_, value| *value).build();
    database.set(1, Ok(242_000));
    assert_eq!((*map.get(&1).unwrap(), map.len(), map.counters().too_heavy), (242_000, 1, 0));
}

#[test]
fn evicting_costs_no_system_call_and_leaves_the_table_as_it_is() {
    let (table, database) = (anonymous(), Database::default());
    let (small, large) = (database.map(&table).max_entries(10).build(), database.map(&table).build());
    // So that all slots, and the memory that is needed, are there.
    let load_all = |map: &CachedMap<u64, u64>| (0..1000).for_each(|id| drop(map.get(&id).unwrap()));
    [&small, &large].into_iter().for_each(load_all);
    large.remove_all();
    let slots = || table.slots().map(|slot| (slot.label().into_owned(), slot.generation())).collect::<Vec<_>>();
    let before = slots();
    let [evicting, loading] = [&small, &large].map(|map| system_calls(|| load_all(map)));
    assert!(evicting <= loading + 40, "{evicting} system calls to load and evict, {loading} to load");
    load_all(&small);
    assert!(before == slots() && before.len() == 1000);
}

#[test]
fn what_has_outlived_its_time_is_not_served_whatever_happens_and_its_memory_is_freed() {
    type Set = fn(CachedMapBuilder<u64, Arc<()>>) -> CachedMapBuilder<u64, Arc<()>>;
    for (limit, set) in [
        ("live", (|builder| builder.time_to_live(TIME)) as Set),
        ("idle", |builder| builder.time_to_idle(TIME)),
        ("both", |builder| builder.time_to_idle(TIME).time_to_live(HOUR)),
    ] {
        let (table, broken) = (anonymous(), Arc::new(AtomicU64::new(0)));
        let (memory, is_broken) = (Arc::new(()), Arc::clone(&broken));
        let value = Arc::clone(&memory);
        let loader = move |_: &u64| match is_broken.load(SeqCst) {
            0 => Ok(Arc::clone(&value)),
            _ => Err("down"),
        };
        let builder = CachedMap::builder(&table, key, loader).fail_safe(HOUR).stale_while_reloading();
        let map = set(builder.retry_pause(Duration::ZERO)).build();
        (0..50).for_each(|id| drop(map.get(&id).unwrap()));
        assert_eq!(Arc::strong_count(&memory), 52);
        broken.store(1, SeqCst);
        thread::sleep(2 * TIME);
        assert!(map.get(&0).is_err() && map.get_stale_ok(&1).is_err(), "{limit}: served after its time");
        assert!(matches!(map.peek(&2), Peek::Nothing) && map.get_if_fresh(&3).is_none() && map.remove(&60).is_none());
        // Those loads have looked for others.
        assert_eq!((Arc::strong_count(&memory), map.len()), (2, 0), "{limit}");
    }
}

#[test]
fn an_old_value_whose_time_ends_during_the_load_is_not_served_when_the_load_fails() {
    let (table, database) = (anonymous(), Database::default());
    let map = database.map(&table).time_to_live(TIME).fail_safe(HOUR).build();
    map.get(&1).unwrap();
    map.mark_updated(&1).unwrap();
    database.set(1, Err("down"));
    database.hold_up();
    thread::scope(|scope| {
        let leader = scope.spawn(|| map.get(&1));
        database.await_loads(2);
        thread::sleep(2 * TIME);
        database.allow_all();
        assert!(leader.join().unwrap().is_err());
    });
    // Nor if the key has something to remember, as that its load was overtaken.
    let marker = GenerationSynchronizer::new(&table, key(&2)).unwrap();
    let source = database.clone();
    let loader = move |id: &u64| {
        marker.mark_updated().unwrap();
        source.load(id)
    };
    let map = CachedMap::builder(&table, key, loader).time_to_live(TIME).fail_safe(HOUR).build();
    map.get(&2).unwrap();
    database.set(2, Err("down"));
    thread::sleep(2 * TIME);
    assert!(map.get(&2).is_err());
}

#[test]
fn what_is_used_all_the_time_is_not_taken_for_idle() {
    let (table, database) = (anonymous(), Database::default());
    let map = database.map(&table).max_entries(20_000).time_to_idle(TIME).build();
    let stop = &AtomicU64::new(0);
    thread::scope(|scope| {
        for id in 0..2 {
            let map = &map;
            scope.spawn(move || {
                let (mut value, mut used) = (map.get(&id).unwrap(), Instant::now());
                let mut uses = 0_u64;
                while stop.load(SeqCst) == 0 {
                    let now = Instant::now();
                    let next = map.get(&id).unwrap();
                    // Unless the thread had no processor for so long.
                    assert!(Arc::ptr_eq(&value, &next) || used.elapsed() > TIME / 2, "removed after {uses} uses");
                    (value, used, uses) = (next, now, uses + 1);
                }
            });
        }
        // Each load may look for idle ones, which takes some time where there are many.
        let start = Instant::now();
        let mut id = 10;
        while start.elapsed() < 10 * TIME {
            map.get(&id).unwrap();
            id += 1;
        }
        stop.store(1, SeqCst);
        assert!(map.len() < id as usize - 10, "nothing was idle");
    });
}

#[test]
fn no_entry_stays_longer_when_the_clock_is_set_back() {
    type Set = fn(CachedMapBuilder<u64, u64>) -> CachedMapBuilder<u64, u64>;
    let sets: [Set; 3] =
        [|builder| builder.time_to_live(HOUR), |builder| builder.time_to_idle(HOUR), |builder| builder.max_age(HOUR)];
    for set in sets {
        let (table, database) = (anonymous(), Database::default());
        let map = set(database.map(&table)).build();
        // A process with one thread, whose children have its entries.
        in_child(|| {
            (0..10).for_each(|id| drop(map.get(&id).unwrap()));
            let ran = support::after_the_clock_was_set_back(|| {
                assert_eq!(map.len(), 10);
                assert!(map.get_if_fresh(&1).is_none() && !map.peek(&2).is_fresh(), "it stays for ten minutes more");
                (0..2).for_each(|_| (0..10).for_each(|id| drop(map.get(&id).unwrap())));
                assert_eq!((database.loads(), map.len()), (20, 10));
            });
            assert!(!ran || map.get_if_fresh(&1).is_some(), "not this process's clock");
        })
        .succeeds();
    }
}

#[test]
fn keys_share_so_many_generations_and_none_is_stale() {
    const GENERATIONS: u32 = 16;
    const KEYS: u64 = 5000;
    let (table, database) = (anonymous(), Database::default());
    let map = database.map(&table).generations(GENERATIONS).build();
    (0..KEYS).for_each(|id| drop(map.get(&id).unwrap()));
    assert_eq!((database.loads(), table.slots().count()), (KEYS, 16));
    (0..KEYS).for_each(|id| drop(map.get(&id).unwrap()));
    assert_eq!(database.loads(), KEYS);
    let shared = |id: u64| {
        let key = key(&id).in_generations(GENERATIONS.try_into().unwrap());
        GenerationSynchronizer::new(&table, key).unwrap()
    };
    let expired = || (0..KEYS).filter(|id| map.get_if_fresh(id).is_none()).collect::<Vec<_>>();
    // By the map; by another process that knows how keys share generations; and for a family, of which the pattern names a part.
    map.update(&7, || database.change(7, 1)).unwrap();
    let found = expired();
    let of_seven = |id: &u64| shared(*id).cache_key() == shared(7).cache_key();
    assert!(found.iter().copied().eq((0..KEYS).filter(of_seven)), "{} are expired", found.len());
    assert!((200..450).contains(&found.len()), "{} are expired", found.len());
    assert_eq!(*map.get(&7).unwrap(), 1);
    database.set(8, Ok(2));
    in_child(|| _ = shared(8).mark_updated().unwrap()).succeeds();
    assert_eq!((*map.get(&8).unwrap(), *map.get(&7).unwrap()), (2, 1));
    (0..KEYS).for_each(|id| drop(map.get(&id).unwrap()));
    GenerationSynchronizer::new(&table, "other:1").unwrap();
    assert_eq!(map.clear_matching("user:77*").unwrap(), 16, "what the pattern names may share any of them");
    assert_eq!(expired().len() as u64, KEYS);
    assert_eq!(table.slots().count(), 17);
}

#[test]
fn a_collision_costs_reloads_and_ends() {
    // All keys share one generation, and are updated and loaded by several threads at once.
    let (table, database) = (anonymous(), Database::default());
    let map = database.map(&table).generations(1).build();
    let values: Vec<AtomicU64> = (0..8).map(|_| AtomicU64::new(0)).collect();
    thread::scope(|scope| {
        for thread in 0..4_u64 {
            let (map, values, database) = (&map, &values, &database);
            scope.spawn(move || {
                let mut random = thread + 1;
                for round in 1..=500 {
                    let own = 2 * thread;
                    map.update(&own, || database.change(own, round)).unwrap();
                    values[own as usize].store(round, SeqCst);
                    assert_eq!(*map.get(&own).unwrap(), round);
                    let other = 2 * (next_random(&mut random) % 4);
                    let announced = values[other as usize].load(SeqCst);
                    assert!(*map.get(&other).unwrap() >= announced, "stale");
                }
            });
        }
    });
    assert_eq!(table.slots().count(), 1);
}

/// How many bytes the allocator has given out.
fn allocated() -> usize {
    // SAFETY: only asks.
    unsafe { nix::libc::mallinfo2() }.uordblks
}

#[test]
fn keys_whose_loads_fail_are_not_all_remembered() {
    alone(|| {
        type Set = fn(CachedMapBuilder<u64, u64>) -> CachedMapBuilder<u64, u64>;
        for (policy, set) in [
            ("plain", (|builder| builder) as Set),
            ("fail-safe, with a pause", |builder| builder.fail_safe(HOUR).retry_pause(HOUR)),
            ("fail-safe, without a pause", |builder| builder.fail_safe(HOUR).retry_pause(Duration::ZERO)),
        ] {
            // Without a slot for each key in the table, which would be most of it.
            let table = anonymous();
            let failing = CachedMap::builder(&table, key, |_: &u64| Err::<u64, _>("down"));
            let map = set(failing.generations(16).max_entries(1000)).build();
            (0..2000).for_each(|id| assert!(map.get(&id).is_err()));
            let before = allocated();
            (2000..102_000).for_each(|id| assert!(map.get(&id).is_err()));
            let more = allocated().saturating_sub(before);
            assert!(more < 2 << 20, "{policy}: {more} bytes more for 100,000 failures");
            assert!(map.is_empty());
        }
    });
}

#[test]
fn keys_that_are_used_while_an_update_is_in_flight_are_not_all_remembered() {
    alone(|| {
        let table = anonymous();
        // An update of one key, which all others share a generation with.
        let map = CachedMap::builder(&table, key, |id: &u64| Ok::<_, io::Error>(*id)).generations(1).max_entries(1000);
        let map = map.build();
        let writer = map.synchronizer(&0).unwrap();
        let update = writer.begin_update().unwrap();
        (0..10_000).for_each(|id| drop(map.get(&id).unwrap()));
        let before = allocated();
        (10_000..60_000).for_each(|id| drop(map.get(&id).unwrap()));
        let more = allocated().saturating_sub(before);
        assert!(more < 2 << 20, "{more} bytes more for 50,000 keys");
        assert!(map.len() > 900);
        update.finish().unwrap();
        assert!((0..60_000).all(|id| map.get_if_fresh(&id).is_none()));
    });
}

#[test]
fn a_failure_of_a_key_with_an_old_value_is_remembered_however_many_others_fail() {
    let (table, database) = (anonymous(), Database::default());
    let map = database.map(&table).max_entries(1000).fail_safe(HOUR).retry_pause(HOUR).build();
    (0..100).for_each(|id| drop(map.get(&id).unwrap()));
    (0..50_000).for_each(|id| database.set(id, Err("down")));
    map.clear_matching("user:*").unwrap();
    (0..100).for_each(|id| assert_eq!(*map.get(&id).unwrap(), 0));
    (1000..50_000).for_each(|id| assert!(map.get(&id).is_err()));
    let before = database.loads();
    (0..100).for_each(|id| assert_eq!(*map.get(&id).unwrap(), 0, "{id}: the old value is lost"));
    assert_eq!(database.loads(), before, "tried again in the pause");
}

#[test]
fn a_value_goes_when_it_is_evicted_replaced_or_removed() {
    let (table, memory) = (anonymous(), Arc::new(()));
    let value = Arc::clone(&memory);
    let map = CachedMap::builder(&table, key, move |_: &u64| Ok::<_, io::Error>(Arc::clone(&value)));
    let map = map.max_entries(10).build();
    let in_map = || Arc::strong_count(&memory) - 2;
    for id in 0..1000 {
        map.get(&id).unwrap();
        map.mark_updated(&id).unwrap();
        map.get(&id).unwrap();
        map.invalidate(&id).unwrap();
        assert_eq!(in_map(), map.len());
    }
    let present: Vec<u64> = (0..1000).filter(|id| map.peek(id).value().is_some()).collect();
    assert!(!present.is_empty());
    map.remove(&present[0]);
    assert_eq!(in_map(), present.len() - 1);
    map.remove_all();
    assert_eq!(in_map(), 0);
    // Also while something about its key is to be remembered.
    let update = map.synchronizer(&1).unwrap();
    let update = update.begin_update().unwrap();
    map.get(&1).unwrap();
    map.remove(&1);
    assert_eq!(in_map(), 0);
    update.abandon();
    map.get(&1).unwrap();
    drop(map);
    assert_eq!(Arc::strong_count(&memory), 1);
}

#[test]
fn a_table_without_room_for_a_key_is_an_error_and_the_others_go_on() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let database = Database::default();
    let map = database.map(&table).build();
    map.get(&1).unwrap();
    in_child(|| {
        use nix::sys::resource::{Resource, setrlimit};
        // The file can grow no more.
        let size = std::fs::metadata(&path).unwrap().len();
        setrlimit(Resource::RLIMIT_FSIZE, size, size).unwrap();
        let mut id = 2;
        let error = loop {
            match map.get(&id) {
                Ok(_) => id += 1,
                Err(error) => break error,
            }
        };
        assert!(matches!(error.kind(), gensync::ErrorKind::TableFull { .. }), "{error}");
        assert_eq!((error.key(), error.path()), (Some(&*format!("user:{id}")), Some(&*path)));
        assert!((1..id).all(|id| map.get(&id).is_ok()) && map.mark_updated(&1).is_ok());
        assert!(map.update(&id, || Ok::<_, io::Error>(())).is_err() && map.invalidate(&id).is_err());
        map.remove_all();
        assert_eq!(*map.get(&1).unwrap(), 0);
    })
    .succeeds();
    let raw = CachedMap::builder(&table, |name: &String| CacheKey::raw(name), |_| Ok::<_, io::Error>(1)).build();
    assert_eq!(*raw.get("a key").unwrap(), 1);
}

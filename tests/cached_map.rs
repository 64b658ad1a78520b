//! Guards against an entry of a map that is stale, that passes for another key's, or whose key is not treated as a value that stands
//! alone would be; and against loads of one key at the same time.

#[path = "support/map.rs"]
mod map;
mod support;

use std::error::Error as _;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use gensync::{CacheKey, CachedMap, ErrorKind, GenerationSynchronizer, Peek, Table, UpdateError};
use map::{Database, key};
use support::next_random;
use support::source::{HOUR, anonymous};

fn sync(table: &Table, id: u64) -> GenerationSynchronizer {
    GenerationSynchronizer::new(table, key(&id)).unwrap()
}

#[test]
fn each_key_is_loaded_once_and_again_after_each_update_of_its_own() {
    let (table, database) = (anonymous(), Database::default());
    let map = database.map(&table).build();
    (0..100).for_each(|id| database.set(id, Ok(1000 * id)));
    for _ in 0..3 {
        (0..100).for_each(|id| assert_eq!(*map.get(&id).unwrap(), 1000 * id));
    }
    assert_eq!(database.loads(), 100);
    database.set(7, Ok(7001));
    assert_eq!(*map.get(&7).unwrap(), 7000, "no process has announced it");
    GenerationSynchronizer::new(&table, "user:7").unwrap().mark_updated().unwrap();
    assert!(map.get_if_fresh(&7).is_none() && map.get_if_fresh(&8).is_some());
    assert_eq!((*map.get(&7).unwrap(), database.loads()), (7001, 101));
    map.update(&8, || database.change(8, 8001)).unwrap();
    map.mark_updated(&9).unwrap();
    assert!(map.get_if_fresh(&8).is_none() && map.get_if_fresh(&9).is_none());
    let error = map.update(&10, || Err::<(), _>("rejected")).unwrap_err();
    assert!(matches!(error, UpdateError::Commit("rejected")) && map.get_if_fresh(&10).is_none());
    assert_eq!(*map.get(&8).unwrap(), 8001);
    assert_eq!(map.clear_matching("user:1?").unwrap(), 10);
    assert!((0..100).all(|id| map.get_if_fresh(&id).is_none() == (id == 9 || (10..20).contains(&id))));
    let error = map.clear_matching("user:[").unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::InvalidInput { .. }) && error.to_string().contains("\"user:[\""),
        "{error}"
    );
    // A synchronizer, as for an update that ends elsewhere.
    let update = map.synchronizer(&1).unwrap();
    let update = update.begin_update().unwrap();
    assert!(map.get_if_fresh(&1).is_some(), "it is in flight");
    update.finish().unwrap();
    assert!(map.get_if_fresh(&1).is_none());
}

#[test]
fn a_use_of_a_fresh_value_makes_no_key_and_attaches_to_nothing() {
    support::tables(|table| {
        // The table grows several times.
        const KEYS: u64 = 5000;
        let (database, made) = (Database::default(), Arc::new(AtomicU64::new(0)));
        let (count, source) = (Arc::clone(&made), database.clone());
        let make_key = move |id: &u64| {
            count.fetch_add(1, SeqCst);
            key(id)
        };
        let map = CachedMap::builder(table, make_key, move |id| source.load(id)).max_entries(2 * KEYS as usize).build();
        (0..KEYS).for_each(|id| drop(map.get(&id).unwrap()));
        assert_eq!(made.load(SeqCst), KEYS);
        for id in 0..KEYS {
            assert!(map.get(&id).is_ok() && map.get_if_fresh(&id).is_some() && map.peek(&id).is_fresh());
        }
        let ids: Vec<u64> = (0..KEYS).collect();
        assert_eq!(map.get_many(&ids).unwrap().len() as u64, KEYS);
        assert_eq!((made.load(SeqCst), database.loads()), (KEYS, KEYS));
        // Each entry has a generation of its own.
        for id in (0..KEYS).step_by(7) {
            sync(table, id).mark_updated().unwrap();
        }
        assert!((0..KEYS).all(|id| map.peek(&id).is_fresh() != (id % 7 == 0)));
    });
}

#[test]
fn what_calls_find_is_counted_for_all_keys_together() {
    let (table, database) = (anonymous(), Database::default());
    let map = database.map(&table).fail_safe(HOUR).retry_pause(Duration::ZERO).build();
    for round in 0..100 {
        (0..10).for_each(|id| drop(map.get(&id).unwrap()));
        assert!((0..10).all(|id| map.get_if_fresh(&id).is_some() && map.peek(&id).is_fresh()), "round {round}");
    }
    // Each is a hit but the first one of each key; peeks are none.
    assert_eq!((map.counters().hits, map.counters().reloads), (2000 - 10, 10));
    database.set(3, Err("down"));
    map.mark_updated(&3).unwrap();
    assert_eq!(*map.get(&3).unwrap(), 0);
    map.mark_updated(&4).unwrap();
    map.get(&4).unwrap();
    let counters = map.counters();
    assert_eq!((counters.hits, counters.reloads, counters.errors, counters.stale_answers), (1990, 11, 1, 1));
    // Those of other threads are added up; threads that share a place may lose some to each other.
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..10_000).for_each(|use_| drop(map.get(&(5 + use_ % 5)).unwrap())));
        }
    });
    let hits = map.counters().hits - 1990;
    assert!((30_000..=40_000).contains(&hits), "{hits} of 40,000 are counted");
    assert!(format!("{map:?}").contains("len: 10"), "{map:?}");
    fn goes_anywhere(_: &(impl Send + Sync + std::panic::UnwindSafe + std::panic::RefUnwindSafe)) {}
    goes_anywhere(&map);
}

#[test]
fn threads_load_each_key_once_however_many_ask() {
    let (table, database) = (anonymous(), Database::default());
    let map = database.map(&table).build();
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| (0..1000).for_each(|id| drop(map.get(&id).unwrap())));
        }
    });
    assert_eq!(database.loads(), 1000);
}

#[test]
fn no_thread_finds_a_value_that_is_older_than_its_call_and_one_loads_a_key_at_a_time() {
    const KEYS: usize = 20;
    let table = anonymous();
    let words = || Arc::new([const { AtomicU64::new(0) }; KEYS]);
    let (values, loading) = (words(), words());
    let loader = {
        let (values, loading) = (Arc::clone(&values), Arc::clone(&loading));
        move |id: &u64| {
            assert_eq!(loading[*id as usize].fetch_add(1, SeqCst), 0, "two loads of a key at a time");
            let value = values[*id as usize].load(SeqCst);
            thread::yield_now();
            loading[*id as usize].fetch_sub(1, SeqCst);
            Ok::<_, io::Error>(value)
        }
    };
    // With room for some, so that values come and go meanwhile; and with room for all.
    for room in [5, KEYS] {
        let map = CachedMap::builder(&table, key, loader.clone()).max_entries(room).build();
        let (stop, checks) = (AtomicU64::new(0), AtomicU64::new(0));
        thread::scope(|scope| {
            for seed in 1..=6 {
                let (map, values, stop, checks) = (&map, &values, &stop, &checks);
                scope.spawn(move || {
                    let mut random = seed;
                    while stop.load(SeqCst) == 0 {
                        let id = next_random(&mut random) % KEYS as u64;
                        let announced = values[id as usize].load(SeqCst).saturating_sub(1);
                        let value = *map.get(&id).unwrap();
                        assert!(value >= announced, "{value}, after {announced} was announced");
                        checks.fetch_add(1, SeqCst);
                    }
                });
            }
            let writers: Vec<_> = (0..KEYS as u64).map(|id| sync(&table, id)).collect();
            let mut random = 7;
            while checks.load(SeqCst) < 20_000 {
                let id = (next_random(&mut random) % KEYS as u64) as usize;
                values[id].fetch_add(1, SeqCst);
                writers[id].mark_updated().unwrap();
            }
            stop.store(1, SeqCst);
        });
        for id in 0..KEYS as u64 {
            assert_eq!(*map.get(&id).unwrap(), values[id as usize].load(SeqCst));
        }
    }
}

#[test]
fn a_call_is_satisfied_by_a_load_that_began_after_it_although_that_was_overtaken() {
    let table = anonymous();
    let loads = Arc::new(AtomicU64::new(0));
    let loader = {
        let (loads, marker) = (Arc::clone(&loads), sync(&table, 1));
        move |_: &u64| {
            let load = loads.fetch_add(1, SeqCst) + 1;
            thread::yield_now();
            marker.mark_updated().map(|_| load)
        }
    };
    let map = CachedMap::builder(&table, key, loader).build();
    let calls = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..500 {
                    let before = loads.load(SeqCst);
                    calls.fetch_add(1, SeqCst);
                    assert!(*map.get(&1).unwrap() > before, "loaded before the call");
                    assert!(loads.load(SeqCst) <= calls.load(SeqCst), "a call ran more than one load");
                }
            });
        }
    });
    assert_eq!(map.counters().overtaken, map.counters().reloads);
}

#[test]
fn waiters_get_the_value_of_a_load_although_the_map_has_no_room_for_it() {
    let (table, database) = (anonymous(), Database::default());
    let map = database.map(&table).max_weight(100, |id, _| if *id == 1 { 1000 } else { 1 }).build();
    for round in 1..=20 {
        database.hold_up();
        let before = database.loads();
        thread::scope(|scope| {
            let calls = [(); 4].map(|()| scope.spawn(|| *map.get(&1).unwrap()));
            database.await_loads(before + 1);
            // So that they are likely to wait; a call that comes later loads for itself.
            thread::sleep(Duration::from_millis(20));
            database.change(1, round).unwrap();
            database.allow_all();
            assert!(calls.into_iter().all(|call| call.join().unwrap() == round));
        });
        assert_eq!((map.len(), map.peek(&1).value()), (0, None));
        if database.loads() == before + 1 {
            return;
        }
    }
    panic!("waiters loaded for themselves each time");
}

#[test]
fn an_old_value_or_a_deadline_saves_from_waiting() {
    for stale_while_reloading in [false, true] {
        let (table, database) = (anonymous(), Database::default());
        let builder = database.map(&table);
        let map = if stale_while_reloading { builder.stale_while_reloading().build() } else { builder.build() };
        (1..=2).for_each(|id| drop(map.get(&id).unwrap()));
        map.update(&1, || database.change(1, 5)).unwrap();
        database.hold_up();
        thread::scope(|scope| {
            let leader = scope.spawn(|| *map.get(&1).unwrap());
            database.await_loads(3);
            assert_eq!(*map.get_stale_ok(&1).unwrap(), 0);
            for patience in [0, 5] {
                let error = map.get_fresh(&1, Instant::now() + Duration::from_millis(patience)).unwrap_err();
                assert_eq!((error.kind(), error.key()), (&ErrorKind::Deadline, Some("user:1")));
            }
            if stale_while_reloading {
                assert_eq!(*map.get(&1).unwrap(), 0);
            }
            assert_eq!(*map.get_fresh(&2, Instant::now()).unwrap(), 0, "another key");
            let patient = scope.spawn(|| *map.get_fresh(&1, Instant::now() + HOUR).unwrap());
            database.allow_all();
            assert_eq!((leader.join().unwrap(), patient.join().unwrap()), (5, 5));
        });
        assert_eq!(map.counters().stale_answers, 1 + u64::from(stale_while_reloading));
    }
}

#[test]
fn a_key_whose_source_is_broken_is_neither_stormed_nor_trusted_for_ever() {
    let (table, database) = (anonymous(), Database::default());
    let errors = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&errors);
    let map = database
        .map(&table)
        .fail_safe(Duration::from_millis(100))
        .retry_pause(HOUR)
        .on_error(move |error| log.lock().unwrap().push(error.to_string()))
        .build();
    (1..=3).for_each(|id| drop(map.get(&id).unwrap()));
    database.set(1, Err("down"));
    map.mark_updated(&1).unwrap();
    let start = Instant::now();
    for _ in 0..10 {
        assert!(map.get(&1).is_ok_and(|value| *value == 0) || start.elapsed() > Duration::from_millis(90));
    }
    assert!(map.get_fresh(&1, Instant::now() + HOUR).is_err(), "this one wants it fresh");
    thread::sleep(Duration::from_millis(150));
    let error = map.get(&1).unwrap_err();
    assert_eq!((error.source().unwrap().to_string(), error.key()), ("down".to_owned(), Some("user:1")));
    assert_eq!(database.loads(), 4, "the source was stormed");
    let errors = errors.lock().unwrap();
    assert!(errors.len() == 1 && errors[0].contains("user:1"), "{errors:?}");
    assert_eq!(*map.get(&2).unwrap(), 0, "another key");
    // An invalidation ends the pause.
    database.set(1, Ok(5));
    map.invalidate(&1).unwrap();
    assert_eq!(*map.get(&1).unwrap(), 5);
}

#[test]
fn an_old_value_is_not_served_again_when_its_failure_is_forgotten() {
    let (table, database) = (anonymous(), Database::default());
    let map = database.map(&table).fail_safe(Duration::from_millis(50)).retry_pause(Duration::from_millis(1)).build();
    (0..100).for_each(|id| drop(map.get(&id).unwrap()));
    (0..100_000).for_each(|id| database.set(id, Err("down")));
    map.clear_matching("user:*").unwrap();
    (0..100).for_each(|id| drop(map.get(&id)));
    // Counted from the first failure, not from the last one.
    let start = Instant::now();
    while map.get(&0).is_ok() {
        assert!(start.elapsed() < support::LIMIT, "stale for good");
    }
    thread::sleep(Duration::from_millis(60));
    // So many more failures that the first ones are forgotten.
    (1000..12_000).for_each(|id| assert!(map.get(&id).is_err()));
    for id in 0..100 {
        assert!(map.get(&id).is_err() && map.get_stale_ok(&id).is_err(), "{id} is served again");
    }
    database.set(1, Ok(7));
    thread::sleep(Duration::from_millis(20));
    assert_eq!(*map.get(&1).unwrap(), 7);
}

#[test]
fn a_load_that_lasts_longer_than_an_old_value_may_be_served_counts_as_failed() {
    let (table, database) = (anonymous(), Database::default());
    let map = database.map(&table).fail_safe(Duration::from_millis(50)).build();
    map.get(&1).unwrap();
    map.update(&1, || database.change(1, 5)).unwrap();
    database.hold_up();
    thread::scope(|scope| {
        let leader = scope.spawn(|| *map.get(&1).unwrap());
        database.await_loads(2);
        assert!(matches!(map.get(&1).unwrap_err().kind(), ErrorKind::Overdue { .. }));
        assert!(matches!(map.get_stale_ok(&1).unwrap_err().kind(), ErrorKind::Overdue { .. }));
        database.allow_all();
        assert_eq!(leader.join().unwrap(), 5);
    });
    assert_eq!(map.counters().errors, 1);
}

#[test]
fn each_value_has_an_age_of_its_own() {
    let (table, database) = (anonymous(), Database::default());
    let map = database.map(&table).max_age(Duration::from_millis(500)).build();
    map.get(&1).unwrap();
    thread::sleep(Duration::from_millis(300));
    let loaded = Instant::now();
    map.get(&2).unwrap();
    (1..=2).for_each(|id| database.set(id, Ok(5)));
    thread::sleep(Duration::from_millis(300));
    assert_eq!(*map.get(&1).unwrap(), 5, "changed by a program that does not use gensync");
    let peek = map.peek(&2);
    assert!(peek.is_fresh() || loaded.elapsed() > Duration::from_millis(450), "the age of another one");
    thread::sleep(Duration::from_millis(300));
    assert!(matches!(map.peek(&2), Peek::Expired(_)));
    assert_eq!(*map.get(&2).unwrap(), 5);
}

#[test]
fn the_longest_durations_are_as_good_as_for_ever() {
    const MAX: Duration = Duration::MAX;
    let (table, database) = (anonymous(), Database::default());
    let builder = database.map(&table).time_to_live(MAX).time_to_idle(MAX).max_age(MAX).jitter(0.5);
    let map = builder.fail_safe(MAX).retry_pause(MAX).build();
    for _ in 0..3 {
        (0..2).for_each(|id| drop(map.get(&id).unwrap()));
    }
    database.set(1, Err("down"));
    map.mark_updated(&1).unwrap();
    assert!((0..3).all(|_| map.get(&1).is_ok_and(|value| *value == 0)));
    assert_eq!(database.loads(), 3, "no pause");
}

#[test]
fn all_values_expire_with_a_key_that_they_depend_on() {
    let (table, database) = (anonymous(), Database::default());
    let schema = GenerationSynchronizer::new(&table, "schema").unwrap();
    let map = database.map(&table).depends_on(&schema).build();
    (0..10).for_each(|id| drop(map.get(&id).unwrap()));
    schema.mark_updated().unwrap();
    assert!((0..10).all(|id| map.get_if_fresh(&id).is_none() && !map.peek(&id).is_fresh()));
    (0..10).for_each(|id| drop(map.get(&id).unwrap()));
    (0..10).for_each(|id| drop(map.get(&id).unwrap()));
    assert_eq!(database.loads(), 20);
}

#[test]
fn reloads_and_changes_that_were_not_announced_are_reported_with_the_key() {
    let (table, database) = (anonymous(), Database::default());
    let reports = Arc::new(Mutex::new(Vec::new()));
    let report = |what: &'static str| {
        let reports = Arc::clone(&reports);
        move |id: &u64, old: &u64, new: &u64| reports.lock().unwrap().push((what, *id, *old, *new))
    };
    let map = database.map(&table).on_reload(report("reload")).verify(3, report("changed")).build();
    (1..=2).for_each(|id| drop(map.get(&id).unwrap()));
    map.update(&2, || database.change(2, 5)).unwrap();
    map.get(&2).unwrap();
    assert_eq!(*reports.lock().unwrap(), [("reload", 2, 0, 5)]);
    database.set(1, Ok(7));
    let values: Vec<u64> = (0..3).map(|_| *map.get(&1).unwrap()).collect();
    assert_eq!(values, [0, 0, 7], "the third hit verifies");
    assert_eq!(reports.lock().unwrap()[1..], [("reload", 1, 0, 7), ("changed", 1, 0, 7)]);
    let value = map.get_with(&1, || -> Result<u64, io::Error> { panic!("it is fresh, and not due") }).unwrap();
    assert_eq!(*value, 7);
}

#[test]
fn an_entry_is_seen_as_it_is_without_a_use() {
    let (table, database) = (anonymous(), Database::default());
    let map = database.map(&table).build();
    assert!(matches!(map.peek(&1), Peek::Nothing) && map.is_empty());
    let snapshot = map.snapshot(&1).unwrap();
    assert_eq!(snapshot.generation, sync(&table, 1).sync_gen());
    let Peek::Fresh(seen) = map.peek(&1) else { panic!("it is fresh") };
    assert!(Arc::ptr_eq(&seen.value, &snapshot.value) && seen.generation == snapshot.generation);
    let generation = map.mark_updated(&1).unwrap();
    let Peek::Expired(seen) = map.peek(&1) else { panic!("it is expired") };
    assert!(Arc::ptr_eq(&seen.value, &snapshot.value));
    assert_eq!(map.snapshot(&1).unwrap().generation, Some(generation));
    assert_eq!((map.counters().hits, database.loads(), map.len(), map.weight()), (0, 2, 1, 1));
}

#[test]
fn an_invalidation_expires_one_key_in_this_process_and_what_is_being_loaded() {
    let (table, database) = (anonymous(), Database::default());
    let (map, other) = (database.map(&table).build(), database.map(&table).build());
    for map in [&map, &other] {
        (1..=2).for_each(|id| drop(map.get(&id).unwrap()));
    }
    database.set(1, Ok(5));
    map.invalidate(&1).unwrap();
    let Peek::Expired(old) = map.peek(&1) else { panic!("it is expired") };
    assert_eq!((*old.value, old.generation), (0, None));
    assert!(map.get_if_fresh(&2).is_some() && other.get_if_fresh(&1).is_some());
    assert_eq!(*map.get(&1).unwrap(), 5);
    // A key that has no value, and one that is being loaded for the first time and again.
    map.invalidate(&3).unwrap();
    for id in [3, 1] {
        map.mark_updated(&id).unwrap();
        let before = database.loads();
        database.hold_up();
        thread::scope(|scope| {
            let leader = scope.spawn(|| *map.get(&id).unwrap());
            database.await_loads(before + 1);
            map.invalidate(&id).unwrap();
            database.allow_all();
            leader.join().unwrap();
        });
        assert!(map.get_if_fresh(&id).is_none(), "loaded before the invalidation");
        database.set(id, Ok(9));
        assert_eq!(*map.get(&id).unwrap(), 9);
    }
}

#[test]
fn what_was_removed_is_not_served_in_whatever_state_its_key_is() {
    let (table, database) = (anonymous(), Database::default());
    let map = database.map(&table).build();
    map.get(&1).unwrap();
    let other = sync(&table, 1);
    // In flight, so that the state of the key is kept.
    other
        .update(|| {
            map.get(&1).unwrap();
            assert_eq!(map.remove(&1).as_deref(), Some(&0));
            database.change(1, 5)?;
            assert_eq!((map.remove(&1), map.get_if_fresh(&1)), (None, None));
            assert_eq!(*map.get(&1).unwrap(), 5);
            map.remove_all();
            assert!(map.is_empty() && map.weight() == 0);
            database.change(1, 6)?;
            assert_eq!(*map.get(&1).unwrap(), 6);
            io::Result::Ok(())
        })
        .unwrap();
    // A load that is under way puts another one there.
    map.get(&1).unwrap();
    map.update(&1, || database.change(1, 7)).unwrap();
    let before = database.loads();
    database.hold_up();
    thread::scope(|scope| {
        let leader = scope.spawn(|| *map.get(&1).unwrap());
        database.await_loads(before + 1);
        assert_eq!(map.remove(&1).as_deref(), Some(&6));
        database.allow_all();
        assert_eq!(leader.join().unwrap(), 7);
    });
    assert_eq!(map.get_if_fresh(&1).as_deref(), Some(&7));
}

#[test]
fn a_loader_at_the_call_may_borrow_and_is_used_for_what_is_not_fresh() {
    let table = anonymous();
    let names = ["a".to_owned(), "b".to_owned()];
    let map: CachedMap<usize, &str> =
        CachedMap::builder_without_loader(&table, |id: &usize| ["name", &id.to_string()].into()).build();
    let load = |id: usize| names.get(id).map(|_| "borrowed").ok_or("no such name");
    assert_eq!(*map.get_with(&1, || load(1)).unwrap(), "borrowed");
    assert_eq!(*map.get(&1).unwrap(), "borrowed", "it is fresh");
    assert_eq!(map.get_with(&2, || load(2)).unwrap_err().source().unwrap().to_string(), "no such name");
    let error = map.get(&0).unwrap_err();
    assert!(error.source().unwrap().to_string().contains("get_with"), "{error}");
    map.mark_updated(&1).unwrap();
    assert!(map.get(&1).is_err() && map.get_many(&[1]).is_err());
}

#[test]
fn keys_may_be_borrowed_and_absent_values_cached() {
    let table = anonymous();
    let loads = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&loads);
    let map = CachedMap::builder(
        &table,
        |name: &String| ["name", name].into(),
        move |name: &String| {
            count.fetch_add(1, SeqCst);
            Ok::<_, io::Error>((name != "nobody").then_some(name.len()))
        },
    )
    .build();
    for _ in 0..3 {
        assert_eq!((*map.get("somebody").unwrap(), *map.get("nobody").unwrap()), (Some(8), None));
    }
    assert_eq!(loads.load(SeqCst), 2);
    map.mark_updated("nobody").unwrap();
    assert!(map.get_if_fresh("nobody").is_none());
    map.get_stale_ok("nobody").unwrap();
    map.invalidate("somebody").unwrap();
    map.update("somebody", || Ok::<_, io::Error>(())).unwrap();
    assert_eq!(map.remove("somebody").as_deref(), Some(&Some(8)));
    assert!(map.synchronizer("somebody").is_ok() && matches!(map.peek("somebody"), Peek::Nothing));
}

#[test]
fn an_option_or_a_key_that_cannot_be_is_an_error_that_says_so() {
    let table = anonymous();
    let refused = |builder: gensync::CachedMapBuilder<u64, u64>, texts: [&str; 2]| {
        let error = builder.try_build().unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::InvalidInput { .. }));
        assert!(texts.iter().all(|text| error.to_string().contains(text)), "{error}");
    };
    let new = || Database::default().map(&table);
    refused(new().max_entries(0), ["entries", "1 or more"]);
    refused(new().max_weight(0, |_, _| 1), ["weight", "1 or more"]);
    refused(new().generations(0), ["generations", "1 or more"]);
    refused(new().max_age(HOUR).jitter(1.5), ["jitter", "1.5"]);
    refused(new().max_age(HOUR).jitter(f64::NAN), ["jitter", "NaN"]);
    refused(new().jitter(0.5), ["jitter", "max_age"]);
    refused(new().verify(0, |_, _, _| ()), ["verifications", "1 or more"]);
    let panic = std::panic::catch_unwind(|| Database::default().map(&anonymous()).max_entries(0).build()).unwrap_err();
    assert!(panic.downcast_ref::<String>().unwrap().contains("1 or more"));
    let map = CachedMap::builder(&table, |name: &String| CacheKey::from(name), |_| Ok::<_, io::Error>(1)).build();
    let errors = [
        map.get("").unwrap_err(),
        map.invalidate("").unwrap_err(),
        map.mark_updated("").unwrap_err(),
        map.synchronizer("").unwrap_err(),
        map.get_many(&[String::new()]).unwrap_err(),
    ];
    assert!(errors.iter().all(|error| *error.kind() == ErrorKind::EmptyKey));
    assert!(map.get_if_fresh("").is_none() && matches!(map.peek(""), Peek::Nothing));
}

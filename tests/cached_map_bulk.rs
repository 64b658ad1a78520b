//! Guards against loads of many keys at once that load one by one, load a key that is being loaded, wait for each other, or pass one
//! key's trouble on to the others.

#[path = "support/map.rs"]
mod map;
mod support;

use std::collections::HashMap;
use std::error::Error as _;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::thread;
use std::time::Duration;

use gensync::{Cached, CachedMap, CachedMapBuilder, ErrorKind, GenerationSynchronizer, Table, depend_on};
use map::{Database, key, must_end};
use support::source::{HOUR, anonymous, sync};
use support::{await_value, next_random};

type Calls = Arc<Mutex<Vec<Vec<u64>>>>;

/// A builder of a map whose bulk loader loads from the database too, and the calls of that.
fn bulk(database: &Database, table: &Table) -> (CachedMapBuilder<u64, u64>, Calls) {
    let (calls, source) = (Calls::default(), database.clone());
    let log = Arc::clone(&calls);
    let load = move |ids: &[u64]| {
        log.lock().unwrap().push(ids.to_vec());
        ids.iter().map(|id| Ok((*id, source.load(id)?))).collect::<Result<Vec<_>, String>>()
    };
    (database.map(table).bulk_loader(load), calls)
}

fn values(map: &CachedMap<u64, u64>, ids: &[u64]) -> Vec<u64> {
    map.get_many(ids).unwrap().iter().map(|value| **value).collect()
}

#[test]
fn what_is_missing_or_expired_is_loaded_at_once_and_in_the_order_of_the_keys() {
    let (table, database) = (anonymous(), Database::default());
    let (map, calls) = bulk(&database, &table);
    let map = map.build();
    (0..10).for_each(|id| database.set(id, Ok(10 * id)));
    map.get(&2).unwrap();
    assert!(calls.lock().unwrap().is_empty(), "a single one has its own loader");
    assert_eq!(values(&map, &[3, 2, 1, 3, 2]), [30, 20, 10, 30, 20]);
    map.update(&3, || database.change(3, 31)).unwrap();
    assert_eq!(values(&map, &[1, 2, 3]), [10, 20, 31]);
    assert_eq!(values(&map, &[1, 2, 3]), [10, 20, 31]);
    assert_eq!(values(&map, &[]), []);
    assert_eq!(*calls.lock().unwrap(), [vec![3, 1], vec![3]]);
    assert_eq!((map.counters().reloads, *map.get(&1).unwrap()), (4, 10));
    // Without a bulk loader, one by one.
    let map = database.map(&table).build();
    assert_eq!(values(&map, &[3, 3, 1]), [31, 31, 10]);
}

#[test]
fn a_key_that_the_bulk_loader_returns_nothing_for_is_absent_or_an_error() {
    let table = anonymous();
    let even = |ids: &[u64]| -> io::Result<HashMap<u64, Option<u64>>> {
        // And one that nobody has asked for.
        Ok(ids.iter().filter(|id| *id % 2 == 0).chain(&[99]).map(|id| (*id, Some(*id))).collect())
    };
    let new = || CachedMap::builder(&table, key, |id: &u64| Ok::<_, io::Error>(Some(*id))).bulk_loader(even);
    let map = new().absent(|_| None).build();
    let found: Vec<_> = map.get_many(&[1, 2, 3]).unwrap().iter().map(|value| **value).collect();
    assert_eq!(found, [None, Some(2), None]);
    assert_eq!((*map.get(&1).unwrap(), map.len()), (None, 3), "it is cached, and nothing else is");
    let map = new().build();
    let error = map.get_many(&[2, 3, 4, 5]).unwrap_err();
    assert_eq!(error.key(), Some("user:3"), "the first one");
    assert!(error.source().unwrap().to_string().contains("absent"), "{error}");
    assert!(map.get_if_fresh(&2).is_some() && map.get_if_fresh(&4).is_some(), "the others were loaded");
    assert_eq!(map.counters().errors, 2);
}

#[test]
fn a_bulk_loader_that_fails_or_panics_fails_its_keys_alone() {
    let (table, database) = (anonymous(), Database::default());
    let (map, calls) = bulk(&database, &table);
    let map = map.build();
    database.set(3, Err("down"));
    map.get(&1).unwrap();
    let error = map.get_many(&[1, 2, 3, 4]).unwrap_err();
    assert_eq!((error.key(), error.source().unwrap().to_string()), (Some("user:2"), "down".to_owned()));
    assert_eq!((map.counters().errors, map.len()), (3, 1));
    assert_eq!(values(&map, &[1, 2, 4]), [0, 0, 0]);
    assert_eq!(*calls.lock().unwrap(), [vec![2, 3, 4], vec![2, 4]]);

    let (begun, source) = (Arc::new(AtomicU64::new(0)), database.clone());
    let count = Arc::clone(&begun);
    let panicking = move |ids: &[u64]| {
        if count.fetch_add(1, SeqCst) == 0 {
            await_value(&count, 100);
            panic!("in the bulk loader");
        }
        ids.iter().map(|id| Ok((*id, source.load(id)?))).collect::<Result<Vec<_>, String>>()
    };
    let map = Arc::new(database.map(&table).bulk_loader(panicking).build());
    must_end(move || {
        let leader = {
            let map = Arc::clone(&map);
            thread::spawn(move || catch_unwind(AssertUnwindSafe(|| map.get_many(&[5, 6, 7]))).is_err())
        };
        await_value(&begun, 1);
        let waiters = [vec![5, 6], vec![7]].map(|ids| {
            let (map, begun) = (Arc::clone(&map), Arc::clone(&begun));
            thread::spawn(move || {
                begun.fetch_add(100, SeqCst);
                values(&map, &ids)
            })
        });
        assert!(leader.join().unwrap());
        assert_eq!(waiters.map(|waiter| waiter.join().unwrap()), [vec![0, 0], vec![0]]);
    });
}

#[test]
fn old_values_are_served_when_a_bulk_load_fails() {
    let (table, database) = (anonymous(), Database::default());
    let (map, calls) = bulk(&database, &table);
    let errors = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&errors);
    let map = map.fail_safe(HOUR).retry_pause(HOUR).on_error(move |_| _ = count.fetch_add(1, SeqCst)).build();
    values(&map, &[1, 2, 3]);
    map.clear_matching("user:*").unwrap();
    database.set(2, Err("down"));
    for _ in 0..3 {
        assert_eq!(values(&map, &[1, 2, 3]), [0, 0, 0]);
    }
    assert_eq!((calls.lock().unwrap().len(), errors.load(SeqCst)), (2, 3), "they were not tried again at once");
    assert_eq!(map.counters().stale_answers, 9);
    // What has no old value fails, and is the only one.
    assert_eq!(map.get_many(&[1, 2, 4]).unwrap()[0], Arc::new(0));
    assert_eq!(calls.lock().unwrap()[2..], [[4]]);
}

#[test]
fn a_key_that_another_thread_loads_is_waited_for() {
    let (table, database) = (anonymous(), Database::default());
    let (map, calls) = bulk(&database, &table);
    let map = map.build();
    database.hold_up();
    thread::scope(|scope| {
        let single = scope.spawn(|| map.get(&2).unwrap());
        database.await_loads(1);
        let several = scope.spawn(|| map.get_many(&[1, 2, 3]).unwrap());
        // It has begun with one of its own.
        database.await_loads(2);
        let other = scope.spawn(|| map.get_many(&[3, 2]).unwrap());
        let again = scope.spawn(|| map.get(&1).unwrap());
        thread::sleep(Duration::from_millis(20));
        database.allow_all();
        let (single, several, other) = (single.join().unwrap(), several.join().unwrap(), other.join().unwrap());
        assert!(Arc::ptr_eq(&single, &several[1]) && Arc::ptr_eq(&single, &other[1]));
        assert!(Arc::ptr_eq(&several[2], &other[0]) && Arc::ptr_eq(&several[0], &again.join().unwrap()));
    });
    assert_eq!((database.loads(), calls.lock().unwrap().len()), (3, 1));
    // If the other load fails, so does this call; the next one loads.
    map.mark_updated(&2).unwrap();
    database.set(2, Err("down"));
    database.hold_up();
    thread::scope(|scope| {
        let single = scope.spawn(|| map.get(&2).is_err());
        database.await_loads(4);
        let several = scope.spawn(|| map.get_many(&[1, 2, 5]));
        database.await_loads(5);
        database.allow_all();
        assert!(single.join().unwrap());
        assert_eq!(several.join().unwrap().unwrap_err().key(), Some("user:2"));
    });
    assert!(map.get_if_fresh(&5).is_some());
}

#[test]
fn threads_with_keys_in_common_do_not_wait_for_each_other_for_ever() {
    must_end(|| {
        let (table, database) = (anonymous(), Database::default());
        let (map, _) = bulk(&database, &table);
        let map = map.build();
        thread::scope(|scope| {
            for thread in 0..6_u64 {
                let map = &map;
                scope.spawn(move || {
                    let mut random = thread + 1;
                    for _ in 0..400 {
                        let mut ids: Vec<u64> = (0..12).map(|_| next_random(&mut random) % 20).collect();
                        match thread % 3 {
                            0 => ids.sort_unstable(),
                            1 => ids.sort_unstable_by(|a, b| b.cmp(a)),
                            _ => {}
                        }
                        assert_eq!(map.get_many(&ids).unwrap().len(), 12);
                        map.mark_updated(&ids[0]).unwrap();
                        map.get(&ids[5]).unwrap();
                    }
                });
            }
        });
    });
}

#[test]
fn an_update_during_a_bulk_load_leaves_its_key_expired() {
    let (table, database) = (anonymous(), Database::default());
    let (source, writer) = (database.clone(), GenerationSynchronizer::new(&table, key(&2)).unwrap());
    let load = move |ids: &[u64]| {
        let loaded = ids.iter().map(|id| Ok((*id, source.load(id)?))).collect::<Result<Vec<_>, String>>();
        // Another process is faster.
        source.set(2, Ok(5));
        writer.mark_updated().unwrap();
        loaded
    };
    let map = database.map(&table).bulk_loader(load).build();
    assert_eq!(values(&map, &[1, 2, 3]), [0, 0, 0]);
    assert_eq!((1..=3).map(|id| map.get_if_fresh(&id).is_some()).collect::<Vec<_>>(), [true, false, true]);
    assert_eq!((*map.get(&2).unwrap(), map.counters().overtaken), (5, 1));
    // So does an invalidation.
    let map = Arc::new_cyclic(|itself: &Weak<CachedMap<u64, u64>>| {
        let itself = itself.clone();
        let load = move |ids: &[u64]| {
            itself.upgrade().unwrap().invalidate(&1).map(|()| ids.iter().map(|id| (*id, 1)).collect::<Vec<_>>())
        };
        database.map(&table).bulk_loader(load).build()
    });
    map.get_many(&[1, 2]).unwrap();
    assert!(map.get_if_fresh(&1).is_none() && map.get_if_fresh(&2).is_some());
}

#[test]
fn what_a_bulk_loader_depends_on_expires_all_that_it_loaded() {
    let table = anonymous();
    let (tag, page) = (sync(&table), GenerationSynchronizer::new(&table, "page").unwrap());
    let page = Arc::new(Cached::new(page, || Ok::<_, io::Error>(7)));
    let load = {
        let (tag, page) = (tag.clone(), Arc::clone(&page));
        move |ids: &[u64]| {
            depend_on(&tag);
            let value = *page.tracked().get()?;
            Ok::<_, gensync::Error>(ids.iter().map(|id| (*id, value)).collect::<Vec<_>>())
        }
    };
    let map = CachedMap::builder(&table, key, |_| Ok::<_, io::Error>(1)).bulk_loader(load).build();
    let fresh = || (0..4).filter(|id| map.get_if_fresh(id).is_some()).count();
    map.get(&0).unwrap();
    for _ in 0..2 {
        for expire in [&|| _ = tag.mark_updated().unwrap(), &|| _ = page.mark_updated().unwrap()] as [&dyn Fn(); 2] {
            assert_eq!(values(&map, &[0, 1, 2, 3]), [1, 7, 7, 7]);
            assert_eq!(fresh(), 4);
            expire();
            assert_eq!(fresh(), 1, "the one that was loaded by itself depends on nothing");
        }
    }
}

#[test]
fn a_bulk_loader_that_asks_for_its_own_keys_gets_an_error() {
    let errors = must_end(|| {
        let table = anonymous();
        let errors = Arc::new(Mutex::new(Vec::new()));
        let map = Arc::new_cyclic(|itself: &Weak<CachedMap<u64, u64>>| {
            let (itself, errors) = (itself.clone(), Arc::clone(&errors));
            let load = move |ids: &[u64]| {
                let map = itself.upgrade().unwrap();
                let mut errors = errors.lock().unwrap();
                errors.extend(ids.iter().map(|id| map.get(id).unwrap_err()));
                errors.push(map.get_many(ids).unwrap_err());
                assert_eq!(*map.get(&50).unwrap(), 50, "another one");
                Ok::<_, io::Error>(ids.iter().map(|id| (*id, *id)).collect::<Vec<_>>())
            };
            CachedMap::builder(&table, key, |id: &u64| Ok::<_, io::Error>(*id)).bulk_loader(load).build()
        });
        assert_eq!(values(&map, &[1, 2, 3]), [1, 2, 3]);
        std::mem::take(&mut *errors.lock().unwrap())
    });
    assert_eq!(errors.len(), 4);
    assert!(errors.iter().all(|error| *error.kind() == ErrorKind::Recursion), "{errors:?}");
}

#[test]
fn callbacks_come_for_each_key_of_a_bulk_load_and_may_look_at_the_others() {
    must_end(|| {
        let (table, database) = (anonymous(), Database::default());
        let (builder, _) = bulk(&database, &table);
        let seen: Arc<Mutex<Vec<(u64, u64, u64)>>> = Arc::default();
        let (log, map) = (Arc::clone(&seen), Arc::new(OnceLock::<CachedMap<u64, u64>>::new()));
        let itself = Arc::downgrade(&map);
        let builder = builder.on_reload(move |id, old, new| {
            let map = itself.upgrade().unwrap();
            let map = map.get().unwrap();
            log.lock().unwrap().push((*id, *old, *new));
            assert_eq!(*map.get(id).unwrap(), *new, "its own key");
            let other = 3 - id;
            assert!(map.peek(&other).value().is_some());
            match map.get(&other) {
                Ok(value) => assert_eq!(*value, 10 * other),
                Err(error) => assert_eq!(*error.kind(), ErrorKind::Recursion),
            }
        });
        assert!(map.set(builder.build()).is_ok());
        let map = map.get().unwrap();
        values(map, &[1, 2]);
        assert!(seen.lock().unwrap().is_empty(), "there was nothing to replace");
        (1..=2).for_each(|id| map.update(&id, || database.change(id, 10 * id)).unwrap());
        assert_eq!(values(map, &[1, 2]), [10, 20]);
        assert_eq!(*seen.lock().unwrap(), [(1, 0, 10), (2, 0, 20)]);
    });
}

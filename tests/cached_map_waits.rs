//! Guards against waits for a key of a map that sleep through the end of its value, that end without it, that keep in memory what the
//! map has dropped, or that flood a source with loads.

#[path = "support/map.rs"]
mod map;
mod support;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Weak};
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use gensync::{CacheKey, CachedMap, ErrorKind, GenerationSynchronizer, Table};
use map::{Database, key, must_end};
use nix::unistd::{Pid, gettid};
use support::source::{HOUR, anonymous};
use support::{LIMIT, in_child, path};

const NOT_YET: Duration = Duration::from_millis(30);

fn sync(table: &Table, id: u64) -> GenerationSynchronizer {
    GenerationSynchronizer::new(table, key(&id)).unwrap()
}

/// Starts a thread that runs `wait`; returns when it sleeps.
fn asleep<'s, R>(scope: &'s Scope<'s, '_>, wait: impl FnOnce() -> R + Send + 's) -> ScopedJoinHandle<'s, R>
where
    R: Send + 's,
{
    let (send, id) = std::sync::mpsc::channel::<Pid>();
    let waiter = scope.spawn(move || {
        send.send(gettid()).unwrap();
        wait()
    });
    let path = format!("/proc/self/task/{}/syscall", id.recv().unwrap());
    // The number of the system call that the thread sleeps in, and its arguments: a futex with a limit of time, as no mutex has.
    let futex = nix::libc::SYS_futex.to_string();
    let start = Instant::now();
    loop {
        let call = std::fs::read_to_string(&path).unwrap_or_default();
        let call: Vec<&str> = call.split_ascii_whitespace().collect();
        if call.first() == Some(&&*futex) && call[4] != "0x0" {
            return waiter;
        }
        assert!(!waiter.is_finished() && start.elapsed() < LIMIT, "it does not sleep: {call:?}");
        thread::yield_now();
    }
}

#[test]
fn a_wait_ends_with_an_update_of_another_process_and_loads_what_is_not_there() {
    let (_folder, path) = path();
    for table in [anonymous(), Table::open(&path).unwrap()] {
        let database = Database::default();
        let map = database.map(&table).build();
        assert_eq!((*map.wait(&1).unwrap(), *map.wait(&2).unwrap(), database.loads()), (0, 0, 2));
        for value in 1..=3 {
            assert!(map.wait_timeout(&1, NOT_YET).unwrap().is_none(), "there is no update");
            thread::scope(|scope| {
                let waiter = asleep(scope, || map.wait(&1).unwrap());
                sync(&table, 2).mark_updated().unwrap();
                database.set(1, Ok(value));
                in_child(|| _ = sync(&table, 1).mark_updated().unwrap()).succeeds();
                assert_eq!(*waiter.join().unwrap(), value);
            });
            assert_eq!(database.loads(), 2 + value);
        }
        // Expired already.
        map.update(&1, || database.change(1, 9)).unwrap();
        assert_eq!(*map.wait_deadline(&1, Instant::now()).unwrap().unwrap(), 9);
    }
}

#[test]
fn an_update_during_the_load_of_a_wait_ends_the_next_wait_at_once() {
    let (table, database) = (anonymous(), Database::default());
    let map = database.map(&table).build();
    database.hold_up();
    thread::scope(|scope| {
        let waiter = scope.spawn(|| map.wait(&1).unwrap());
        database.await_loads(1);
        in_child(|| _ = sync(&table, 1).mark_updated().unwrap()).succeeds();
        database.allow_all();
        let early = waiter.join().unwrap();
        database.set(1, Ok(2));
        assert_eq!(*map.wait_past(&1, &early).unwrap(), 2);
        assert_eq!(database.loads(), 2);
    });
}

#[test]
fn a_wait_ends_with_each_key_with_age_and_with_an_invalidation() {
    let table = anonymous();
    let other = GenerationSynchronizer::new(&table, "other").unwrap();
    let database = Database::default();
    let map = database.map(&table).depends_on(&other).max_age(Duration::from_millis(300)).build();
    map.get(&1).unwrap();
    other.mark_updated().unwrap();
    database.set(1, Ok(1));
    assert_eq!(map.wait_timeout(&1, Duration::ZERO).unwrap().as_deref(), Some(&1));
    database.set(1, Ok(2));
    assert_eq!(*map.wait(&1).unwrap(), 2, "no process has announced it, but it is too old");
    let map = database.map(&table).build();
    for value in 3..5 {
        let known = map.get(&1).unwrap();
        thread::scope(|scope| {
            let waiters =
                [asleep(scope, || map.wait(&1).unwrap()), asleep(scope, || map.wait_past(&1, &known).unwrap())];
            database.set(1, Ok(value));
            map.invalidate(&1).unwrap();
            assert!(waiters.into_iter().all(|waiter| *waiter.join().unwrap() == value));
        });
    }
}

#[test]
fn two_waiters_share_a_load_and_a_wait_past_a_known_value_misses_none() {
    let (table, database) = (anonymous(), Database::default());
    let map = database.map(&table).build();
    let known = map.get(&1).unwrap();
    for value in 1..=5 {
        let before = map.get(&1).unwrap();
        thread::scope(|scope| {
            let waiters: Vec<_> = (0..2).map(|_| asleep(scope, || map.wait_past(&1, &before).unwrap())).collect();
            map.update(&1, || database.change(1, value)).unwrap();
            for waiter in waiters {
                assert_eq!(*waiter.join().unwrap(), value);
            }
        });
        assert_eq!(database.loads(), 1 + value);
        assert_eq!(*map.wait_past(&1, &known).unwrap(), value, "another thread has loaded it");
    }
}

#[test]
fn that_a_value_is_removed_is_no_news_and_the_next_update_or_value_is() {
    let (table, database) = (anonymous(), Database::default());
    let map = database.map(&table).build();
    for value in 1..=3 {
        let known = map.get(&1).unwrap();
        let loads = database.loads();
        thread::scope(|scope| {
            let waits = || (map.wait(&1).unwrap(), map.wait_timeout(&1, Duration::ZERO).unwrap());
            let waiter = asleep(scope, waits);
            let limited = asleep(scope, || map.wait_timeout(&1, NOT_YET).unwrap());
            map.remove(&1);
            assert!(limited.join().unwrap().is_none());
            assert_eq!((database.loads(), map.len()), (loads, 0), "loaded without an update");
            database.set(1, Ok(value));
            match value {
                // Another thread loads it anew.
                2 => assert_eq!(*map.get(&1).unwrap(), value),
                _ => sync(&table, 1).mark_updated().map(drop).unwrap(),
            }
            let (waited, next) = waiter.join().unwrap();
            assert_eq!((*waited, next, database.loads()), (value, None, loads + 1));
        });
        assert!(!Arc::ptr_eq(&known, &map.get(&1).unwrap()));
    }
}

#[test]
fn a_wait_that_sleeps_keeps_no_value_that_the_map_has_evicted() {
    let table = anonymous();
    let loads = AtomicU64::new(0);
    let loader = move |_: &u64| Ok::<_, io::Error>(loads.fetch_add(1, SeqCst) + 1);
    let map = CachedMap::builder(&table, key, loader).max_entries(100).build();
    let value: Weak<u64> = Arc::downgrade(&map.get(&0).unwrap());
    thread::scope(|scope| {
        let waiters = [asleep(scope, || map.wait(&0).unwrap()), asleep(scope, || map.wait(&0).unwrap())];
        assert_eq!(value.strong_count(), 1);
        let mut others = 0;
        while value.strong_count() > 0 {
            assert!(others < 100_000, "never dropped");
            others += 1;
            // Used more than once, so that it takes the place of an older one.
            (0..3).for_each(|_| drop(map.get(&others).unwrap()));
        }
        assert!(map.get_if_fresh(&0).is_none());
        assert!(waiters.iter().all(|waiter| !waiter.is_finished()));
        map.mark_updated(&0).unwrap();
        let [one, other] = waiters.map(|waiter| waiter.join().unwrap());
        assert!(Arc::ptr_eq(&one, &other) && *one == others + 2, "one load for both");
    });
}

#[test]
fn a_wait_keeps_its_key_no_longer_attended_than_it_loads() {
    let (table, database) = (anonymous(), Database::default());
    // No value has room: one that another thread has loaded is dropped at once unless a call attends the key.
    let map = database.map(&table).max_weight(10, |_, value| if *value == 0 { 1 } else { 1_000_000 }).build();
    map.get(&1).unwrap();
    thread::scope(|scope| {
        let waiter = asleep(scope, || map.wait(&1).unwrap());
        map.remove(&1);
        database.set(1, Ok(7));
        let value = Arc::downgrade(&map.get(&1).unwrap());
        assert_eq!((value.strong_count(), map.len(), waiter.is_finished()), (0, 0, false));
        map.mark_updated(&1).unwrap();
        assert_eq!(*waiter.join().unwrap(), 7);
    });
}

#[test]
fn a_loop_of_waits_does_not_flood_a_broken_source() {
    for pause in [Duration::ZERO, Duration::from_millis(60)] {
        for fails_safe in [false, true] {
            let (table, database) = (anonymous(), Database::default());
            let builder = database.map(&table).retry_pause(pause);
            let map = if fails_safe { builder.fail_safe(HOUR) } else { builder }.build();
            if fails_safe {
                map.get(&1).unwrap();
                map.mark_updated(&1).unwrap();
            }
            let before = database.loads();
            database.set(1, Err("down"));
            let start = Instant::now();
            for loads in 1..=5 {
                assert!(map.wait(&1).is_err());
                assert_eq!(database.loads(), before + loads, "not an error of its own");
            }
            let least = 4 * pause.max(Duration::from_millis(10)) - Duration::from_millis(5);
            assert!(start.elapsed() >= least, "{:?}", start.elapsed());
            assert!(map.wait_timeout(&1, Duration::ZERO).unwrap().is_none(), "it is in the pause");
            database.set(1, Ok(2));
            assert_eq!(*map.wait(&1).unwrap(), 2);
        }
    }
}

#[test]
fn nor_does_one_for_values_that_find_no_room_or_that_outlive_their_time_at_once() {
    let table = anonymous();
    let roomless = |database: &Database| database.map(&table).max_weight(10, |_, _| 1_000_000).build();
    let short_lived = |database: &Database| database.map(&table).time_to_live(Duration::ZERO).build();
    for outlives in [false, true] {
        let database = Database::default();
        let map = if outlives { short_lived(&database) } else { roomless(&database) };
        let start = Instant::now();
        let mut known = Arc::new(0);
        while start.elapsed() < Duration::from_millis(200) {
            map.wait(&1).unwrap();
            known = map.wait_past(&1, &known).unwrap();
        }
        assert!((2..=30).contains(&database.loads()), "{}", database.loads());
        assert!(map.wait_timeout(&1, Duration::ZERO).unwrap().is_none(), "it is in the pause");
    }
}

#[test]
fn nor_does_one_for_a_key_that_cannot_be_had_keep_the_processor_busy() {
    let table = anonymous();
    let map: CachedMap<u64, u64> =
        CachedMap::builder(&table, |_| CacheKey::from(""), |_| Ok::<_, io::Error>(1)).build();
    let start = Instant::now();
    let mut errors = 0;
    while start.elapsed() < Duration::from_millis(200) {
        assert_eq!(*map.wait(&1).unwrap_err().kind(), ErrorKind::EmptyKey);
        errors += 1;
    }
    assert!((2..=30).contains(&errors), "{errors}");
}

#[test]
fn nor_does_one_without_a_table() {
    let (folder, path) = path();
    let table = Table::options().outage_ttl(Duration::from_millis(200)).open(&path).unwrap();
    let database = Database::default();
    let map = database.map(&table).build();
    map.get(&1).unwrap();
    drop(folder);
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(1500) {
        map.wait(&1).unwrap();
    }
    assert!((2..=10).contains(&database.loads()), "{}", database.loads());
}

#[test]
fn a_wait_ends_at_its_deadline_while_another_thread_loads_and_in_a_pause() {
    let (table, database) = (anonymous(), Database::default());
    let map = Arc::new(database.map(&table).retry_pause(HOUR).build());
    let known = map.get(&1).unwrap();
    let start = Instant::now();
    assert!(map.wait_timeout(&1, NOT_YET).unwrap().is_none());
    assert!(start.elapsed() >= NOT_YET);
    map.update(&1, || database.change(1, 2)).unwrap();
    database.hold_up();
    thread::scope(|scope| {
        let leader = scope.spawn(|| *map.get(&1).unwrap());
        database.await_loads(2);
        assert!(map.wait_timeout(&1, NOT_YET).unwrap().is_none());
        assert!(map.wait_deadline(&1, Instant::now()).unwrap().is_none());
        let waiter = asleep(scope, || *map.wait_past(&1, &known).unwrap());
        database.allow_all();
        assert_eq!((leader.join().unwrap(), waiter.join().unwrap()), (2, 2));
    });
    map.mark_updated(&1).unwrap();
    database.set(1, Err("down"));
    assert!(map.wait(&1).is_err());
    assert!(map.wait_timeout(&1, NOT_YET).unwrap().is_none(), "the pause is not over");
    // An invalidation ends the pause.
    let waiter = thread::spawn({
        let map = Arc::clone(&map);
        move || must_end(move || *map.wait(&1).unwrap())
    });
    database.set(1, Ok(3));
    thread::sleep(NOT_YET);
    map.invalidate(&1).unwrap();
    assert_eq!(waiter.join().unwrap(), 3);
}

#[test]
fn a_child_that_is_forked_while_threads_wait_can_wait_itself() {
    let (table, database) = (anonymous(), Database::default());
    let map = database.map(&table).build();
    map.get(&1).unwrap();
    thread::scope(|scope| {
        let waiters = [(); 2].map(|()| asleep(scope, || *map.wait(&1).unwrap()));
        let child = in_child(|| {
            assert_eq!(*map.wait(&1).unwrap(), 0, "it has no value yet");
            assert_eq!(*map.wait(&1).unwrap(), 0);
        });
        child.await_sleep();
        map.mark_updated(&1).unwrap();
        child.succeeds();
        assert!(waiters.into_iter().all(|waiter| waiter.join().unwrap() == 0));
    });
}

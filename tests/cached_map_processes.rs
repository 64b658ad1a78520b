//! Guards against a map that is stale, or storms its source, because of other processes: updates whose makers are killed or stopped,
//! and a table that is reset, replaced, out of reach or read-only.

#[path = "support/map.rs"]
mod map;
mod support;

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use gensync::{CachedMap, CachedMapBuilder, ErrorKind, GenerationSynchronizer, Peek, Table, depend_on};
use map::{Database, key};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use support::{Child, LIMIT, await_value, dawdle, in_child, keep_mounts_apart, next_random, path, shared_words};

/// The deletion of a table's file is noticed within a second; this is a bit more.
const NOTICED: Duration = Duration::from_millis(1200);

fn sync(table: &Table, id: u64) -> GenerationSynchronizer {
    GenerationSynchronizer::new(table, key(&id)).unwrap()
}

/// A map of what stands in words that all processes share.
fn of_words(table: &Table, words: &'static [AtomicU64]) -> CachedMapBuilder<u64, u64> {
    CachedMap::builder(table, key, |id: &u64| Ok::<_, io::Error>(words[*id as usize].load(SeqCst)))
}

fn await_true(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < LIMIT, "never {what}");
    }
}

#[test]
fn updates_of_other_processes_are_seen_at_the_next_call() {
    support::tables(|table| {
        let words = shared_words(100);
        let map = of_words(table, words).build();
        (0..100).for_each(|id| drop(map.get(&id).unwrap()));
        for round in 1..=20 {
            in_child(|| {
                words[7].store(round, SeqCst);
                map.update(&7, || Ok::<_, io::Error>(())).unwrap();
                words[8].store(round, SeqCst);
                sync(table, 8).mark_updated().unwrap();
                (90..100).for_each(|id| words[id].store(round, SeqCst));
                assert_eq!(map.clear_matching("user:9?").unwrap(), 10);
            })
            .succeeds();
            assert!([7, 8, 90, 99].iter().all(|id| *map.get(id).unwrap() == round));
            assert!((10..90).all(|id| map.get_if_fresh(&id).is_some()));
        }
        assert_eq!(map.counters().reloads, 100 + 20 * 4);
    });
}

#[test]
fn an_update_whose_maker_is_killed_is_noticed() {
    support::tables(|table| {
        let words = shared_words(2);
        let map = of_words(table, words).build();
        for round in 1..=10 {
            let step = &shared_words(1)[0];
            map.get(&1).unwrap();
            let maker = in_child(|| {
                let sync = sync(table, 1);
                let _update = sync.begin_update().unwrap();
                words[1].store(round, SeqCst);
                step.store(1, SeqCst);
                thread::sleep(Duration::MAX);
            });
            await_value(step, 1);
            assert_eq!(*map.get(&1).unwrap(), round - 1, "it is in flight");
            maker.kill();
            await_true("noticed", || *map.get(&1).unwrap() == round);
        }
    });
}

#[test]
fn no_update_of_processes_that_are_killed_at_random_is_lost() {
    const KEYS: u64 = 8;
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    // The sources, what of them was announced for certain, and a word to stop by.
    let words = shared_words(2 * KEYS as usize + 1);
    let (sources, announced, stop) = (&words[..8], &words[8..16], &words[16]);
    let map = of_words(&table, sources).max_entries(5).build();
    let update_all = |seed: u64| {
        let mut random = seed;
        loop {
            let id = next_random(&mut random) % KEYS;
            let mut value = 0;
            let commit = || {
                value = sources[id as usize].fetch_add(1, SeqCst) + 1;
                Ok::<_, io::Error>(())
            };
            map.update(&id, commit).unwrap();
            announced[id as usize].fetch_max(value, SeqCst);
        }
    };
    let check_all = |seed: u64| {
        let mut random = seed;
        while stop.load(SeqCst) == 0 {
            let id = next_random(&mut random) % KEYS;
            let least = announced[id as usize].load(SeqCst);
            let value = *map.get(&id).unwrap();
            assert!(value >= least, "{value}, after {least} was announced");
        }
    };
    let checker = in_child(|| check_all(3));
    /// Also if the test fails.
    struct Stop(&'static AtomicU64);
    impl Drop for Stop {
        fn drop(&mut self) {
            self.0.store(1, SeqCst);
        }
    }
    thread::scope(|scope| {
        let stop = Stop(stop);
        let checkers = [1, 2].map(|seed| scope.spawn(move || check_all(seed)));
        let mut random = 4;
        for round in 1..=150 {
            let writers = [round, round + 1000].map(|seed| in_child(|| update_all(seed)));
            let before = sources.iter().map(|source| source.load(SeqCst)).sum::<u64>();
            await_true("updated", || sources.iter().map(|source| source.load(SeqCst)).sum::<u64>() > before);
            dawdle(&mut random, 3000);
            writers.into_iter().for_each(Child::kill);
        }
        drop(stop);
        checkers.into_iter().for_each(|checker| checker.join().unwrap());
    });
    checker.succeeds();
    for id in 0..KEYS {
        await_true("noticed", || *map.get(&id).unwrap() == sources[id as usize].load(SeqCst));
    }
}

#[test]
fn an_update_whose_maker_is_stopped_leaves_the_old_value_until_the_limit_at_no_cost() {
    let (_folder, path) = path();
    let limit = Duration::from_millis(1500);
    let table = Table::options().pending_limit(limit).open(&path).unwrap();
    let (words, step) = (shared_words(3), &shared_words(1)[0]);
    let attached = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&attached);
    let make_key = move |id: &u64| {
        count.fetch_add(1, SeqCst);
        key(id)
    };
    let map = CachedMap::builder(&table, make_key, |id| Ok::<_, io::Error>(words[*id as usize].load(SeqCst))).build();
    (1..=2).for_each(|id| drop(map.get(&id).unwrap()));
    let maker = in_child(|| {
        let sync = sync(&table, 1);
        let update = sync.begin_update().unwrap();
        words[1].store(1, SeqCst);
        step.store(1, SeqCst);
        await_value(step, 2);
        update.finish().unwrap();
    });
    await_value(step, 1);
    kill(maker.pid(), Signal::SIGSTOP).unwrap();
    waitpid(maker.pid(), Some(WaitPidFlag::WUNTRACED)).unwrap();
    let (start, before) = (Instant::now(), attached.load(SeqCst));
    let mut calls = 0;
    while start.elapsed() < limit / 2 {
        assert_eq!((*map.get(&1).unwrap(), map.get_if_fresh(&1).as_deref()), (0, Some(&0)));
        assert!(map.peek(&1).is_fresh());
        calls += 1;
    }
    assert!(calls > 1000, "only {calls} calls");
    assert_eq!(attached.load(SeqCst), before + 1, "the state of the key is not kept");
    await_true("past the limit", || *map.get(&1).unwrap() == 1);
    assert!(start.elapsed() > limit / 2 && map.counters().reloads == 3);
    // Each key has its own limit, and what was loaded after it counts as fresh for as long again.
    assert!(map.get_if_fresh(&1).is_some() && map.counters().reloads == 3);
    kill(maker.pid(), Signal::SIGCONT).unwrap();
    step.store(2, SeqCst);
    maker.succeeds();
    words[1].store(5, SeqCst);
    assert_eq!((*map.get(&1).unwrap(), *map.get(&2).unwrap()), (5, 0), "it has finished in the end");
}

#[test]
fn what_becomes_of_the_tables_file_is_noticed() {
    for trouble in ["deleted", "replaced", "reset"] {
        let (_folder, path) = path();
        let table = Table::open(&path).unwrap();
        let (words, step) = (shared_words(3), &shared_words(1)[0]);
        let map = of_words(&table, words).build();
        (0..3).for_each(|id| drop(map.get(&id).unwrap()));
        let other = in_child(|| {
            await_value(step, 1);
            let table = Table::open(&path).unwrap();
            match trouble {
                "deleted" => fs::remove_file(&path).unwrap(),
                "replaced" => {
                    let next = path.with_extension("next");
                    Table::open(&next).unwrap();
                    fs::rename(next, &path).unwrap();
                }
                _ => table.reset().unwrap(),
            }
            drop(table);
            words[1].store(5, SeqCst);
            sync(&Table::open(&path).unwrap(), 1).mark_updated().unwrap();
        });
        step.store(1, SeqCst);
        other.succeeds();
        let start = Instant::now();
        await_true(trouble, || *map.get(&1).unwrap() == 5);
        assert!(start.elapsed() < NOTICED, "{trouble}");
        // All were expired once, and are cached again.
        (0..3).for_each(|id| drop(map.get(&id).unwrap()));
        let before = map.counters().reloads;
        (0..1000).for_each(|use_| drop(map.get(&(use_ % 3)).unwrap()));
        assert_eq!((map.counters().reloads, before), (6, 6), "{trouble}");
        words[2].store(7, SeqCst);
        sync(&Table::open(&path).unwrap(), 2).mark_updated().unwrap();
        assert_eq!(*map.get(&2).unwrap(), 7, "{trouble}: it is still in the old one");
        // A process that asks seldom, and does nothing but to look.
        fs::remove_file(&path).unwrap();
        thread::sleep(NOTICED);
        assert!(!map.peek(&1).is_fresh() && map.get_if_fresh(&2).is_none(), "{trouble}");
    }
}

#[test]
fn a_table_that_cannot_be_had_is_no_load_at_each_use() {
    for trouble in ["no folder", "no successor"] {
        let (folder, path) = path();
        let home = folder.path().join("home");
        let path = home.join(path.file_name().unwrap());
        fs::create_dir(&home).unwrap();
        let table = Table::options().outage_ttl(Duration::from_millis(1500)).open(&path).unwrap();
        let (database, reports) = (Database::default(), Arc::new(AtomicU64::new(0)));
        let count = Arc::clone(&reports);
        let map = database
            .map(&table)
            .on_error(move |error| {
                assert!(matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotARegularFile { .. }), "{error}");
                count.fetch_add(1, SeqCst);
            })
            .build();
        (0..10).for_each(|id| drop(map.get(&id).unwrap()));
        fs::remove_file(&path).unwrap();
        match trouble {
            "no successor" => fs::create_dir(&path).unwrap(),
            _ => fs::remove_dir(&home).unwrap(),
        }
        await_true(trouble, || map.get_if_fresh(&0).is_none());
        (0..10).for_each(|id| database.set(id, Ok(2)));
        let outage = Instant::now();
        // Keys that are known, and more that are not than there are states at ease.
        (0..3000).for_each(|id| assert_eq!(*map.get(&id).unwrap(), if id < 10 { 2 } else { 0 }, "{trouble}"));
        let took = outage.elapsed();
        assert_eq!((database.loads(), reports.load(SeqCst)), (3010, 1), "{trouble}");
        assert_eq!(map.counters().unconfirmed, 3000);
        if took < Duration::from_millis(500) {
            (0..3000).for_each(|id| drop(map.get(&id).unwrap()));
            assert!(database.loads() == 3010 || outage.elapsed() > Duration::from_millis(1400), "{trouble}: a storm");
        }
        let (before, start) = (database.loads(), Instant::now());
        let mut calls = 0;
        while start.elapsed() < Duration::from_secs(3) {
            map.get(&1).unwrap();
            calls += 1;
        }
        assert!(calls > 1000 && (1..=3).contains(&(database.loads() - before)), "{trouble}: {calls} calls");
        for error in [map.mark_updated(&1).unwrap_err(), map.synchronizer(&5000).unwrap_err()] {
            assert!(error.path() == Some(&path) && error.key().is_some(), "{error}");
        }
        assert_eq!(reports.load(SeqCst), 1, "it is reported once");
        match trouble {
            "no successor" => fs::remove_dir(&path).unwrap(),
            _ => fs::create_dir(&home).unwrap(),
        }
        database.set(1, Ok(3));
        // It is back, and everything expires once.
        Table::open(&path).unwrap();
        await_true(trouble, || *map.get(&1).unwrap() == 3);
        await_true(trouble, || map.snapshot(&1).unwrap().generation.is_some());
        map.update(&1, || database.change(1, 4)).unwrap();
        assert_eq!(*map.get(&1).unwrap(), 4);
    }
}

#[test]
fn a_mount_over_the_folder_does_not_leave_values_fresh_for_good() {
    let (folder, path) = path();
    in_child(|| {
        keep_mounts_apart();
        let table = Table::options().outage_ttl(Duration::from_millis(200)).open(&path).unwrap();
        let (database, reports) = (Database::default(), Arc::new(AtomicU64::new(0)));
        let count = Arc::clone(&reports);
        let map = database
            .map(&table)
            .on_error(move |error| {
                assert_eq!(*error.kind(), ErrorKind::Unconfirmed);
                count.fetch_add(1, SeqCst);
            })
            .build();
        (0..100).for_each(|id| drop(map.get(&id).unwrap()));
        mount(Some("tmpfs"), folder.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        // Others see this one now, and announce there.
        sync(&Table::open(&path).unwrap(), 1).mark_updated().unwrap();
        database.set(1, Ok(2));
        await_true("noticed", || *map.get(&1).unwrap() == 2);
        await_true("in doubt", || !map.peek(&2).is_fresh());
        (0..100).for_each(|id| drop(map.get(&id).unwrap()));
        let (before, start) = (database.loads(), Instant::now());
        while start.elapsed() < Duration::from_secs(2) {
            map.get(&1).unwrap();
        }
        let found = database.loads() - before;
        assert!((5..=11).contains(&found), "{found} loads in ten times the time to live");
        assert_eq!(reports.load(SeqCst), 1, "it is reported once");
        // A process that has the same file still announces there.
        map.update(&1, || database.change(1, 3)).unwrap();
        assert_eq!(*map.get(&1).unwrap(), 3);
        umount2(folder.path(), MntFlags::MNT_DETACH).unwrap();
        await_true("back", || map.snapshot(&1).unwrap().generation.is_some());
        (0..100).for_each(|id| drop(map.get(&id).unwrap()));
        let before = database.loads();
        thread::sleep(Duration::from_millis(300));
        (0..100).for_each(|id| drop(map.get(&id).unwrap()));
        assert_eq!(database.loads(), before, "loaded again although it is back");
    })
    .succeeds();
}

#[test]
fn a_value_whose_key_is_missing_in_a_table_that_is_read_only_is_cached_until_a_writer_marks_it() {
    let (_folder, path) = path();
    let owner = Table::open(&path).unwrap();
    let table = Table::options().read_only(true).open(&path).unwrap();
    let database = Database::default();
    let map = Arc::new(database.map(&table).build());
    for id in 0..2000 {
        (0..3).for_each(|_| drop(map.get(&id).unwrap()));
    }
    (0..2000).for_each(|id| drop(map.get(&id).unwrap()));
    assert_eq!((database.loads(), owner.slots().count(), map.counters().unconfirmed), (2000, 0, 0));
    let is_refused = |error: gensync::Error| matches!(error.kind(), ErrorKind::KeyNotFound | ErrorKind::ReadOnly);
    assert!(is_refused(map.mark_updated(&1).unwrap_err()) && is_refused(map.clear_matching("*").unwrap_err()));
    assert_eq!(map.snapshot(&1).unwrap().generation, None);
    // One that is recent, and one whose state has long been forgotten.
    for id in [1999, 5] {
        map.update(&id, || -> io::Result<()> { panic!("it may not write") }).unwrap_err();
        database.set(id, Ok(1));
        sync(&owner, id).mark_updated().unwrap();
        assert_eq!(*map.get(&id).unwrap(), 1, "{id}: not noticed");
        database.set(id, Ok(2));
        sync(&owner, id).mark_updated().unwrap();
        assert_eq!(*map.get(&id).unwrap(), 2);
    }
    assert_eq!(database.loads(), 2004);
    // Two that are missing are noticed both by a value that depends on them, be it in a map or not.
    let articles = Arc::clone(&map);
    let pages = CachedMap::builder(
        &table,
        |page: &u64| ["page", &page.to_string()].into(),
        move |_: &u64| {
            let articles = articles.tracked();
            Ok::<_, gensync::Error>(*articles.get(&3000)? + *articles.get(&3001)? + *articles.get(&3002)?)
        },
    )
    .build();
    for (round, id) in [3001, 3000, 3002, 3001].into_iter().enumerate() {
        pages.get(&1).unwrap();
        assert!(pages.get_if_fresh(&1).is_some() && pages.peek(&1).is_fresh(), "{round}");
        database.set(id, Ok(10 + round as u64));
        sync(&owner, id).mark_updated().unwrap();
        assert!(pages.get_if_fresh(&1).is_none() && matches!(pages.peek(&1), Peek::Expired(_)), "{round}: not noticed");
    }
    assert_eq!(*pages.get(&1).unwrap(), 11 + 12 + 13);
}

#[test]
fn a_dependency_in_another_table_whose_file_goes_expires_the_value() {
    let ((_folder, path), (_other_folder, other_path)) = (path(), path());
    let [table, other] = [&path, &other_path].map(|path| Table::open(Path::new(path)).unwrap());
    let tag = sync(&other, 7);
    let loads = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&loads);
    let loader = move |id: &u64| {
        depend_on(&tag);
        count.fetch_add(1, SeqCst);
        Ok::<_, io::Error>(*id)
    };
    let map = CachedMap::builder(&table, key, loader).build();
    (0..10).for_each(|id| drop(map.get(&id).unwrap()));
    fs::remove_file(&other_path).unwrap();
    sync(&Table::open(&other_path).unwrap(), 7).mark_updated().unwrap();
    let start = Instant::now();
    await_true("noticed", || {
        map.get(&1).unwrap();
        loads.load(SeqCst) > 10
    });
    assert!(start.elapsed() < NOTICED && map.get_if_fresh(&2).is_none());
    (0..10).for_each(|id| drop(map.get(&id).unwrap()));
    let before = loads.load(SeqCst);
    (0..10).for_each(|id| drop(map.get(&id).unwrap()));
    assert_eq!(loads.load(SeqCst), before);
    sync(&Table::open(&other_path).unwrap(), 7).mark_updated().unwrap();
    assert!((0..10).all(|id| map.get_if_fresh(&id).is_none()), "it is still in the old one");
}

#[cfg(feature = "cli")]
#[test]
fn the_command_marks_keys_of_maps() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let database = Database::default();
    let (map, sharing) = (database.map(&table).build(), database.map(&table).generations(16).build());
    let run = |arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_gensync"));
        let output = command.env("GENSYNC_TABLE", &path).args(arguments).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    (0..200).for_each(|id| drop((map.get(&id).unwrap(), sharing.get(&id).unwrap())));
    run(&["mark", "user:7"]);
    assert!((0..200).all(|id| map.get_if_fresh(&id).is_some() == (id != 7) && sharing.get_if_fresh(&id).is_some()));
    run(&["mark", "--generations", "16", "user:7"]);
    assert!(sharing.get_if_fresh(&7).is_none());
    let fresh = (0..200).filter(|id| sharing.get_if_fresh(id).is_some()).count();
    assert!((150..200).contains(&fresh), "{fresh} are fresh");
    run(&["clear", "user:1?"]);
    assert!((0..200).all(|id| map.get_if_fresh(&id).is_some() == (id != 7 && !(10..20).contains(&id))));
}

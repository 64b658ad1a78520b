//! Guards against SIGKILL at random points: survivors go on, no update is lost, no key is claimed twice.

mod support;

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use gensync::{GenerationSynchronizer, Table};
use support::{Child, in_child, path, shared_words};

const KEYS: usize = 3000;
const KILLS: usize = 300;

/// Kills children in the middle of `work` again and again, after some time that differs.
fn kill_again_and_again(table: &Table, work: impl Fn(&Table, usize)) {
    let started = &shared_words(1)[0];
    for round in 0..KILLS {
        started.store(0, SeqCst);
        let child = in_child(|| {
            started.store(1, SeqCst);
            for i in round.. {
                work(table, i);
            }
        });
        support::await_value(started, 1);
        let start = Instant::now();
        while start.elapsed() < Duration::from_micros(37 * (round as u64 % 50)) {}
        child.kill();
    }
}

fn assert_whole(table: &Table) {
    let digests: Vec<_> = table.slots().map(|slot| slot.digest()).collect();
    let unique: std::collections::HashSet<_> = digests.iter().collect();
    assert_eq!(unique.len(), digests.len(), "a key is there twice");
    for i in 0..KEYS {
        let sync = GenerationSynchronizer::new(table, format!("key {i}")).unwrap();
        let other = GenerationSynchronizer::new(table, format!("key {i}")).unwrap();
        let generation = other.mark_updated().unwrap();
        assert!(sync.is_expired());
        assert_eq!(sync.refresh().unwrap(), generation);
        assert!(!sync.is_expired());
    }
    assert_eq!(table.stats().keys, KEYS as u64);
}

#[test]
fn killed_while_claiming_and_growing() {
    let (_folder, path) = path();
    let table = Table::options().capacity(4).open(&path).unwrap();
    kill_again_and_again(&table, |table, i| {
        drop(GenerationSynchronizer::new(table, format!("key {}", i % KEYS)).unwrap())
    });
    assert_whole(&table);
}

#[test]
fn killed_while_updating() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let reader = GenerationSynchronizer::new(&table, "key 0").unwrap();
    // How many updates had returned when their maker was killed.
    let returned = &shared_words(1)[0];
    let before = reader.sync_gen().unwrap().get();
    kill_again_and_again(&table, |table, _| {
        let sync = GenerationSynchronizer::new(table, "key 0").unwrap();
        for _ in 0..100 {
            sync.mark_updated().unwrap();
            returned.fetch_add(1, SeqCst);
        }
    });
    assert!(reader.is_expired());
    let updates = reader.refresh().unwrap().get() - before;
    let returned = returned.load(SeqCst);
    assert!((returned..=returned + KILLS as u64).contains(&updates), "{updates} updates, {returned} returned");
    assert_whole(&table);
}

#[test]
fn killed_while_resetting() {
    let (folder, path) = path();
    let table = Table::options().capacity(64).open(&path).unwrap();
    let survivor = GenerationSynchronizer::new(&table, "key 0").unwrap();
    for _ in 0..3 {
        kill_again_and_again(&table, |table, _| table.reset().unwrap());
        // The last one may have been killed before it did anything.
        let writer = GenerationSynchronizer::new(&Table::open(&path).unwrap(), "key 0").unwrap();
        writer.mark_updated().unwrap();
        assert!(survivor.is_expired());
        survivor.refresh().unwrap();
        assert!(!survivor.is_expired());
        writer.mark_updated().unwrap();
        assert!(survivor.is_expired(), "two tables where one should be");
    }
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.len() <= 2, "unfinished files pile up: {names:?}");
    assert_whole(&table);
}

#[test]
fn killed_while_creating() {
    let folder = tempfile::tempdir().unwrap();
    let started = &shared_words(1)[0];
    for round in 0..KILLS {
        let path = folder.path().join(format!("table {round}"));
        started.store(0, SeqCst);
        let child: Child = in_child(|| {
            started.store(1, SeqCst);
            loop {
                drop(Table::open(&path).unwrap());
                std::fs::remove_file(&path).unwrap();
            }
        });
        support::await_value(started, 1);
        let start = Instant::now();
        while start.elapsed() < Duration::from_micros(20 * (round as u64 % 25)) {}
        child.kill();
        // Either the whole table is there or nothing is.
        if path.exists() {
            Table::options().create(false).open(&path).unwrap();
            std::fs::remove_file(&path).unwrap();
        }
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "a killed process left something behind");
}

/// The state of a reader that is asked for it at each use.
struct Reader<'a> {
    sync: GenerationSynchronizer,
    source: &'a AtomicU64,
    state: u64,
}

impl<'a> Reader<'a> {
    fn new(table: &Table, source: &'a AtomicU64) -> Self {
        let sync = GenerationSynchronizer::new(table, "key 0").unwrap();
        let state = sync.refresh_with(|| Ok::<_, ()>(source.load(SeqCst))).unwrap();
        Self { sync, source, state }
    }

    fn get(&mut self) -> u64 {
        if self.sync.is_expired() {
            self.state = self.sync.refresh_with(|| Ok::<_, ()>(self.source.load(SeqCst))).unwrap();
        }
        self.state
    }

    /// Nobody updates any more: what was committed must be seen, though nobody may have lived to say so.
    fn await_source(&mut self) {
        let start = Instant::now();
        while self.get() != self.source.load(SeqCst) {
            assert!(start.elapsed() < Duration::from_secs(20), "stale for good");
        }
    }
}

#[test]
fn killed_within_updates_that_two_processes_make() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let words = shared_words(2);
    let (source, announced) = (&words[0], &words[1]);
    let mut reader = Reader::new(&table, source);
    // Another one lives through all of it, checked against the updates that have returned.
    let stop = &shared_words(1)[0];
    let witness = in_child(|| {
        let mut reader = Reader::new(&table, source);
        while stop.load(SeqCst) == 0 {
            let before = announced.load(SeqCst);
            assert!(reader.get() >= before, "an update that returned is not seen");
        }
        reader.await_source();
    });
    let work = |table: &Table| {
        let sync = GenerationSynchronizer::new(table, "key 0").unwrap();
        for _ in 0..50 {
            let committed = sync.update(|| Ok::<_, ()>(source.fetch_add(1, SeqCst) + 1)).unwrap();
            announced.fetch_max(committed, SeqCst);
        }
    };
    for _ in 0..10 {
        let other = in_child(|| {
            loop {
                work(&table);
            }
        });
        for round in 0..KILLS / 10 {
            let started = &shared_words(1)[0];
            let child = in_child(|| {
                started.store(1, SeqCst);
                loop {
                    work(&table);
                }
            });
            support::await_value(started, 1);
            let start = Instant::now();
            while start.elapsed() < Duration::from_micros(53 * (round as u64 % 30)) {}
            child.kill();
            if round == KILLS / 20 {
                table.reset().unwrap();
            }
        }
        other.kill();
        reader.await_source();
    }
    stop.store(1, SeqCst);
    witness.succeeds();
    assert!(source.load(SeqCst) > 1000, "nothing was going on");
    // One that was killed before its commit has left its count, until somebody checks.
    let start = Instant::now();
    while table.slots().any(|slot| slot.pending() > 0) {
        assert!(start.elapsed() < Duration::from_secs(20), "pending for good");
        reader.get();
    }
}

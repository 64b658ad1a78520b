//! Guards against SIGKILL at random points: survivors go on, no update is lost, no key is claimed twice.

mod support;

use std::sync::atomic::Ordering::SeqCst;
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

//! Guards against a reader that gives another value than its `Cached` would: a stale one, or none.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use gensync::{Cached, CachedReader, ErrorKind, GenerationSynchronizer, Table};
use support::source::*;
use support::{await_value, in_child, path, shared_words};

#[test]
fn a_reader_gives_what_is_loaded_and_loads_after_each_update() {
    let table = anonymous();
    let (source, loads, loader) = source();
    let cached = Cached::new(sync(&table), loader);
    let mut reader = CachedReader::new(&cached);
    assert_eq!(loads.load(SeqCst), 0, "nothing is loaded before the first use");
    for value in 2..10 {
        (0..200).for_each(|_| assert_eq!(*reader.get().unwrap(), value - 1));
        set(&source, Ok(value));
        assert_eq!(*reader.get().unwrap(), value - 1, "no process has announced it");
        sync(&table).mark_updated().unwrap();
        assert_eq!(*reader.get().unwrap(), value);
    }
    assert_eq!(loads.load(SeqCst), 9);
    assert!(std::ptr::eq(reader.get().unwrap(), &*cached.get().unwrap()), "it is the same value");
    drop(reader);
    // 201 and one more for each update, less the loads; and the two of the comparison.
    assert_eq!((cached.counters().hits, cached.counters().reloads), (8 * 202 - 9 + 2, 9));
}

#[test]
fn readers_of_several_threads_share_loads() {
    let table = anonymous();
    let (source, loads, loader) = source();
    let cached = Arc::new(Cached::new(sync(&table), loader));
    let read = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut reader = CachedReader::new(Arc::clone(&cached));
                let mut last = 0;
                while last < 50 {
                    let value = *reader.get().unwrap();
                    assert!(value >= last, "an older value came back");
                    if value > last {
                        read.fetch_add(1, SeqCst);
                    }
                    last = value;
                }
            });
        }
        for value in 2..=50 {
            cached.update(|| change(&source, value)).unwrap();
            thread::yield_now();
        }
    });
    // For each update once, and once more if it came during the load.
    assert!(loads.load(SeqCst) <= 1 + 2 * 49, "{} loads", loads.load(SeqCst));
    assert!(read.load(SeqCst) >= 4);
}

#[test]
fn a_reader_reports_errors_and_tries_again() {
    let table = anonymous();
    let (source, loads, loader) = source();
    let cached = Cached::new(sync(&table), loader);
    let mut reader = CachedReader::new(&cached);
    set(&source, Err("broken"));
    assert!(matches!(reader.get().unwrap_err().kind(), ErrorKind::Load { .. }));
    set(&source, Ok(1));
    assert_eq!(*reader.get().unwrap(), 1);
    set(&source, Err("broken again"));
    sync(&table).mark_updated().unwrap();
    for load in 3..6 {
        assert!(
            matches!(reader.get().unwrap_err().kind(), ErrorKind::Load { .. }),
            "the old value passed for a fresh one"
        );
        assert_eq!(loads.load(SeqCst), load);
    }
}

#[test]
fn a_reader_gives_an_old_value_where_its_cached_would() {
    let table = anonymous();
    let (source, loads, loader) = source();
    let cached = Cached::builder(sync(&table), loader).fail_safe(HOUR).retry_pause(HOUR).build().unwrap();
    let mut reader = CachedReader::new(&cached);
    reader.get().unwrap();
    set(&source, Err("broken"));
    sync(&table).mark_updated().unwrap();
    (0..10).for_each(|_| assert_eq!(*reader.get().unwrap(), 1));
    assert_eq!(loads.load(SeqCst), 2, "a broken source is stormed");
    assert_eq!(cached.counters().stale_answers, 10);
}

#[test]
fn what_takes_more_than_a_generation_is_looked_at_each_time() {
    let table = anonymous();
    let other = GenerationSynchronizer::new(&table, "other").unwrap();
    let (source, loads, loader) = source();
    let cached = Cached::builder(sync(&table), loader).depends_on(&other).build().unwrap();
    let mut reader = CachedReader::new(&cached);
    for value in 2..10 {
        (0..100).for_each(|_| assert_eq!(*reader.get().unwrap(), value - 1));
        set(&source, Ok(value));
        GenerationSynchronizer::new(&table, "other").unwrap().mark_updated().unwrap();
    }
    assert_eq!((loads.load(SeqCst), cached.counters().hits), (8, 8 * 100 - 8));

    let (_, loads, loader) = support::source::source();
    let age = Duration::from_millis(20);
    let cached = Cached::builder(sync(&table), loader).max_age(age).build().unwrap();
    let mut reader = CachedReader::new(&cached);
    while loads.load(SeqCst) < 3 {
        reader.get().unwrap();
    }
}

#[test]
fn a_deleted_file_is_noticed_by_a_reader_too() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let (source, _, loader) = source();
    let cached = Cached::new(sync(&table), loader);
    let mut reader = CachedReader::new(&cached);
    reader.get().unwrap();
    std::fs::remove_file(&path).unwrap();
    // In a table that this process knows nothing of.
    set(&source, Ok(2));
    in_child(|| _ = sync(&Table::open(&path).unwrap()).mark_updated().unwrap()).succeeds();
    while *reader.get().unwrap() != 2 {}
}

#[test]
fn a_reader_notices_a_reset_at_once_however_many_it_has_missed() {
    let (_folder, path) = path();
    let [table, owner] = [(); 2].map(|()| Table::open(&path).unwrap());
    let (source, loads, loader) = source();
    let cached = Cached::new(sync(&table), loader);
    let mut idle = CachedReader::new(&cached);
    assert_eq!(*idle.get().unwrap(), 1);
    let mut reader = CachedReader::new(&cached);
    for value in 2..20 {
        (0..200).for_each(|_| assert_eq!(*reader.get().unwrap(), value - 1));
        set(&source, Ok(value));
        owner.reset().unwrap();
        if value % 2 == 0 {
            // The value is in place before the reader comes.
            assert_eq!(*cached.get().unwrap(), value);
        }
        assert_eq!(*reader.get().unwrap(), value);
    }
    assert_eq!(*idle.get().unwrap(), 19);
    assert_eq!(loads.load(SeqCst), 19, "once for each reset, and not while nothing has changed");
    (0..200).for_each(|_| assert_eq!((*idle.get().unwrap(), *reader.get().unwrap()), (19, 19)));
    sync(&owner).mark_updated().unwrap();
    set(&source, Ok(20));
    assert_eq!((*idle.get().unwrap(), *reader.get().unwrap()), (20, 20), "an update in the new table was not noticed");
}

#[test]
fn a_reader_notices_within_64_uses_that_its_value_was_invalidated() {
    let table = anonymous();
    let (source, _, loader) = source();
    let cached = Cached::new(sync(&table), loader);
    let mut reader = CachedReader::new(&cached);
    for value in 2..10 {
        (0..1000).for_each(|_| assert_eq!(*reader.get().unwrap(), value - 1));
        set(&source, Ok(value));
        cached.invalidate();
        let found = (0..64).find(|_| *reader.get().unwrap() == value);
        assert!(found.is_some(), "it reads on what was invalidated");
    }
}

#[test]
fn a_reader_that_was_made_before_a_fork_reads_on_both_sides() {
    let table = anonymous();
    let words = shared_words(2);
    let source = &words[0];
    let cached = Cached::new(sync(&table), move || Ok::<_, std::convert::Infallible>(source.load(SeqCst)));
    let mut reader = CachedReader::new(&cached);
    assert_eq!(*reader.get().unwrap(), 0);
    let child = in_child(|| {
        words[1].store(1, SeqCst);
        while *reader.get().unwrap() != 7 {}
    });
    await_value(&words[1], 1);
    words[0].store(7, SeqCst);
    sync(&table).mark_updated().unwrap();
    assert_eq!(*reader.get().unwrap(), 7);
    child.succeeds();
}

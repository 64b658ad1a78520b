//! Guards against the races that generation synchronizers over a cache server lose, one test each, interleaved by hand.

mod support;

use std::time::UNIX_EPOCH;

use gensync::{GenerationSynchronizer, Table};

/// Three processes' synchronizers of one key.
fn three(table: &Table) -> [GenerationSynchronizer; 3] {
    std::array::from_fn(|_| GenerationSynchronizer::new(table, "key").unwrap())
}

fn anonymous() -> Table {
    Table::options().anonymous().unwrap()
}

#[test]
fn an_update_during_a_load_is_not_hidden_by_the_refresh_after_it() {
    let [reader, writer, _] = three(&anonymous());
    let ticket = reader.ticket();
    // The reader has loaded the old state when the writer changes the source.
    writer.mark_updated().unwrap();
    reader.adopt(ticket);
    assert!(reader.is_expired(), "the old state passes for the new one");
    reader.refresh_with(|| writer.mark_updated()).unwrap();
    assert!(reader.is_expired());
}

#[test]
fn clearing_and_creating_again_within_a_second_gives_another_generation() {
    let [reader, writer, _] = three(&anonymous());
    let mut generations = vec![reader.sync_gen()];
    for _ in 0..100 {
        writer.clear().unwrap();
        assert!(reader.is_expired());
        let generation = Some(writer.refresh().unwrap());
        assert!(!generations.contains(&generation), "a generation came again");
        generations.push(generation);
        assert!(reader.is_expired());
    }
}

#[test]
fn two_writers_on_a_cleared_key_do_not_make_one_generation_of_two() {
    let [first, second, reader] = three(&anonymous());
    reader.clear().unwrap();
    let one = first.mark_updated().unwrap();
    let other = second.mark_updated().unwrap();
    assert!(one < other);
    assert!(first.is_expired(), "the first has not seen the second's update");
    assert!(second.is_expired(), "the second has not seen the first's");
    assert!(reader.is_expired());
}

#[test]
fn a_writer_that_missed_anothers_update_stays_expired() {
    let [writer, other, _] = three(&anonymous());
    other.mark_updated().unwrap();
    writer.mark_updated().unwrap();
    assert!(writer.is_expired(), "its own update hides the one that it missed");
    writer.refresh().unwrap();
    writer.mark_updated().unwrap();
    assert!(!writer.is_expired());
}

#[test]
fn two_increments_at_once_are_two_updates() {
    const UPDATES: u64 = 20_000;
    let (_folder, path) = support::path();
    let table = Table::open(&path).unwrap();
    let before = GenerationSynchronizer::new(&table, "key").unwrap().sync_gen().unwrap();
    let gate = &support::shared_words(1)[0];
    let children = [(); 4].map(|()| {
        support::in_child(|| {
            let sync = GenerationSynchronizer::new(&table, "key").unwrap();
            support::await_value(gate, 1);
            (0..UPDATES).for_each(|_| _ = sync.mark_updated().unwrap());
        })
    });
    gate.store(1, std::sync::atomic::Ordering::SeqCst);
    children.into_iter().for_each(support::Child::succeeds);
    assert_eq!(table.generation("key").unwrap().unwrap().get(), before.get() + 4 * UPDATES);
}

#[test]
fn no_generation_repeats_after_the_file_was_deleted() {
    let (_folder, path) = support::path();
    let mut highest = None;
    let old = GenerationSynchronizer::new(&Table::open(&path).unwrap(), "key").unwrap();
    for _ in 0..5 {
        for _ in 0..1000 {
            let generation = Some(old.mark_updated().unwrap());
            assert!(generation > highest, "a generation came again");
            highest = generation;
        }
        // The promise holds for keys that are updated less than a million times a second.
        while u128::from(highest.unwrap().get()) >= UNIX_EPOCH.elapsed().unwrap().as_micros() {}
        std::fs::remove_file(&path).unwrap();
        let new = GenerationSynchronizer::new(&Table::open(&path).unwrap(), "key").unwrap();
        assert!(new.sync_gen() > highest, "a new file begins behind the old one");
        highest = new.sync_gen();
        // A holder of the deleted file finds out, and is expired, whatever it has seen.
        while !old.is_expired() {}
        assert!(old.refresh().unwrap() >= highest.unwrap());
    }
}

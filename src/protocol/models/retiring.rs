//! A table that is retired while other processes use it.

use super::{START, both, key, model, model_with, slots, table_with_key};
use crate::protocol::atomic::{Arc, AtomicU64, Ordering, thread};
use crate::protocol::slot_digest::Digest;

// ORDERING: the sources are accessed relaxed, and pair with nothing, so that the updates and the sweep alone order them.

#[test]
fn a_process_that_attaches_to_a_retiring_table_knows_it_or_is_swept() {
    model(|| {
        let table = slots(2, 1);
        let (place, ()) = both(&table, |table| table.attached(key(0)), |table| table.retire().unwrap());
        let swept = table.word_of(key(0)).is_some_and(|word| !word.word().is_live());
        assert!(place.is_none() || swept, "an attached slot was missed by the sweep");
    });
}

#[test]
fn an_update_before_the_retired_bit_is_in_the_sweeps_past() {
    model(|| {
        let shared = Arc::new((table_with_key(2, 1), AtomicU64::new(1)));
        let (before, ()) = both(
            &shared,
            |(table, source)| {
                source.store(2, Ordering::Relaxed);
                table.slot().bump()
            },
            |(table, source)| {
                table.retire().unwrap();
                // As the first load in a successor does: no update that saw no retired bit may be missing here.
                let retired = table.word();
                let loaded = source.load(Ordering::Relaxed);
                if retired.generation().unwrap().get() == START + 2 {
                    assert_eq!(loaded, 2, "an update that came before the sweep is not seen after it");
                }
            },
        );
        let end = shared.0.word();
        assert!(!end.is_live());
        assert_eq!(end.generation().unwrap().get(), START + 2, "the update or the sweep is lost");
        assert!(
            before.generation().unwrap().get() == START || !before.is_live(),
            "an update after the sweep did not see the retired bit"
        );
    });
}

#[test]
fn an_updater_that_attaches_beside_another_knows_of_the_end_or_is_in_the_sweeps_past() {
    model_with(2, || {
        let table = table_with_key(2, 1);
        let keys = [key(0), Digest::new(7, 8)];
        let sources = Arc::new([(); 2].map(|()| AtomicU64::new(1)));
        // Whether the update counts: one that does not must be made in the successor.
        let update = |key: usize| {
            let (table, sources) = (table.clone(), sources.clone());
            thread::spawn(move || {
                let Some(slot) = table.attach(keys[key], || START, b"key").unwrap() else { return false };
                sources[key].store(2, Ordering::Relaxed);
                slot.generation.bump().is_live()
            })
        };
        let updaters = [update(0), update(1)];
        table.retire().unwrap();
        let loaded = [0, 1].map(|key: usize| sources[key].load(Ordering::Relaxed));
        for (updater, loaded) in updaters.into_iter().zip(loaded) {
            let counts = updater.join().unwrap();
            assert!(!counts || loaded == 2, "an update that came before the sweep is not seen after it");
        }
        assert!(!table.word().is_live(), "a slot was missed by the sweep");
    });
}

#[test]
fn a_process_that_finds_a_table_retired_finds_every_slot_swept() {
    model(|| {
        let table = table_with_key(2, 1);
        table.attached(Digest::new(7, 8)).unwrap();
        both(
            &table,
            |table| {
                table.retire().unwrap();
                table.header().end_retiring();
            },
            |table| {
                // Found before, as a holder's slot is: a search would order what it reads by itself.
                let words = [key(0), Digest::new(7, 8)].map(|key| table.word_of(key).unwrap());
                if table.header().is_retired() {
                    assert!(!words.iter().any(|word| word.word().is_live()), "the sweep was not complete");
                }
            },
        );
    });
}

#[test]
fn a_reader_that_finds_a_key_and_then_the_table_live_is_retired_with_it() {
    model(|| {
        let table = slots(1, 1);
        let reader = {
            let table = table.clone();
            thread::spawn(move || {
                let is_found = table.word_of(key(0)).is_some_and(|word| word.word().is_live());
                is_found && table.header().is_live_after_claim()
            })
        };
        both(&table, |table| table.retire().unwrap(), |table| _ = table.attached(key(0)));
        assert!(!(reader.join().unwrap() && table.word().is_live()), "a reader holds a slot that is never retired");
    });
}

//! Processes that claim slots at the same time, and grow the table if they must.

use super::{Boxed, START, both, key, model, model_with, slots};
use crate::protocol::atomic::thread;
use crate::protocol::slot::Digest;
use crate::protocol::slots::{Memory, Slots};

#[test]
fn two_claimers_of_one_key_get_one_slot() {
    model(|| {
        let table = slots(2, 1);
        let (one, other) = both(&table, |table| table.attached(key(0)), |table| table.attached(key(0)));
        assert_eq!(one, other);
        table.assert_unique(key(0), one.unwrap());
    });
}

#[test]
fn two_keys_with_the_same_word_a_get_a_slot_each() {
    model(|| {
        let table = slots(2, 1);
        let (one, other) = both(&table, |table| table.attached(key(0)), |table| table.attached(key(1)));
        assert_ne!(one, other);
        table.assert_unique(key(0), one.unwrap());
        table.assert_unique(key(1), other.unwrap());
    });
}

#[test]
fn a_claim_that_stopped_halfway_is_finished_by_others() {
    for is_first in [true, false] {
        model(move || {
            let table = slots(4, 1);
            let mut stopped = Some({
                let table = table.clone();
                thread::spawn(move || table.memory().segment(0).0[6 % 4].claim_word_a(key(0)))
            });
            if is_first {
                stopped.take().unwrap().join().unwrap();
            }
            let (one, other) = both(&table, |table| table.attached(key(0)), |table| table.attached(key(1)));
            if let Some(stopped) = stopped {
                stopped.join().unwrap();
            }
            assert_ne!(one, other);
            table.assert_unique(key(0), one.unwrap());
            table.assert_unique(key(1), other.unwrap());
            assert_eq!(table.claimed(1).count(), 2, "a slot was left half claimed");
        });
    }
}

#[test]
fn two_growers_agree_on_the_new_segment() {
    // Three preemptions would take half a minute.
    model_with(2, || {
        let table = slots(1, 2);
        table.attached(Digest::new(2, 2)).unwrap();
        let (one, other) =
            both(&table, |table| table.attached(key(0)), |table| (table.attached(key(0)), table.attached(key(2))));
        assert_eq!(one, other.0);
        table.assert_unique(key(0), one.unwrap());
        table.assert_unique(key(2), other.1.unwrap());
    });
}

#[test]
fn a_slow_grower_takes_no_segment_back() {
    model(|| {
        let table = slots(1, 3);
        let grow = |table: &Slots<Boxed>, segment: u32| {
            table.memory().extend(segment).unwrap();
            table.header().add_segment(segment);
        };
        both(
            &table,
            move |table| grow(table, 1),
            |table| {
                (1..3).for_each(|segment| grow(table, segment));
                assert_eq!(table.memory().segments().unwrap(), 3);
            },
        );
        assert_eq!(table.memory().segments().unwrap(), 3, "a segment was taken back");
    });
}

#[test]
fn a_process_that_begins_a_slot_later_sets_no_generation_back() {
    model(|| {
        let table = slots(1, 1);
        // A process that attaches, and updates twice.
        let user = |table: &Slots<Boxed>, start: u64| {
            let slot = table.attach(key(0), start, b"key").unwrap().unwrap();
            [(); 2].map(|()| slot.bump().updated().expect("it has begun").get())
        };
        let (one, other) = both(&table, move |table| user(table, START), |table| user(table, START + 1));
        let slot = table.slot();
        assert_eq!(slot.updates(), 4, "the first generation is not the one in the slot");
        let mut generations = [one, other].concat();
        generations.sort_unstable();
        generations.dedup();
        assert_eq!(generations.len(), 4, "a generation is repeated");
        assert_eq!(slot.word().generation().unwrap().get(), generations[3]);
    });
}

#[test]
fn a_process_that_finds_a_key_finds_its_first_generation_and_its_whole_label() {
    model(|| {
        let label = b"more than eight bytes";
        both(
            &slots(1, 1),
            move |table| {
                let Some(slot) = table.find(key(0)).unwrap() else { return };
                if slot.word().generation().is_some() {
                    assert_eq!(slot.updates(), 0, "a generation is seen without the first one");
                }
                let (text, length) = slot.label();
                assert!(length == 0 || text == label, "a length is seen without the text");
            },
            |table| _ = table.attach(key(0), START, label).unwrap(),
        );
    });
}

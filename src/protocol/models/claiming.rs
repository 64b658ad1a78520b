//! Processes that claim slots at the same time, and grow the table if they must.

use super::{Boxed, START, Size, both, key, model, model_with, slots, table_of};
use crate::protocol::atomic::thread;
use crate::protocol::record::{RecordWord, TextSegment};
use crate::protocol::segment::SlotSegment;
use crate::protocol::slot_digest::{Digest, SlotDigest};
use crate::protocol::slots::{Memory as _, Slots};

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
                thread::spawn(move || first_digest(&table).claim_word_a(key(0)))
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
            assert_eq!(table.all().count(), 2, "a slot was left half claimed");
        });
    }
}

/// The first slot's digest.
fn first_digest(table: &Slots<Boxed>) -> &SlotDigest {
    let SlotSegment::Lanes(lanes) = table.memory().slots(0) else { unreachable!("boxes are lanes") };
    &lanes.digests[0]
}

/// The first slot's record word.
fn first_record(table: &Slots<Boxed>) -> &RecordWord {
    let SlotSegment::Lanes(lanes) = table.memory().slots(0) else { unreachable!("boxes are lanes") };
    &lanes.records[0]
}

#[test]
fn two_claimers_of_one_key_for_the_last_slot_of_a_line_get_one_slot() {
    model_with(2, || {
        // As many slots as a word has tags: if the last one has its tag, no tag is missing.
        let table = table_of(Size { capacity: 8, slots: 2, texts: 1, records: 6 });
        let SlotSegment::Lanes(lanes) = table.memory().slots(0) else { unreachable!("boxes are lanes") };
        for index in 0..7 {
            let other = Digest::new(100 + index as u64, (index as u64 + 2) << 56);
            assert!(lanes.digests[index].claim(other));
            lanes.set_tag(index, other);
        }
        let (one, other) = both(&table, |table| table.attached(key(0)), |table| table.attached(key(0)));
        assert_eq!(one, other, "one key has two slots");
    });
}

#[test]
fn two_growers_agree_on_the_new_segment() {
    model_with(2, || {
        let table = slots(1, 2);
        table.attached(Digest::new(2, 2)).unwrap();
        let (one, other) = both(&table, |table| table.attached(key(0)), |table| table.attached(key(0)));
        assert_eq!(one, other);
        table.assert_unique(key(0), one.unwrap());
    });
}

#[test]
fn two_growers_for_two_keys_find_a_slot_each() {
    model_with(2, || {
        let table = slots(1, 3);
        table.attached(Digest::new(2, 2)).unwrap();
        let (one, other) = both(&table, |table| table.attached(key(0)), |table| table.attached(key(2)));
        table.assert_unique(key(0), one.unwrap());
        table.assert_unique(key(2), other.unwrap());
    });
}

#[test]
fn two_growers_of_texts_agree_on_the_new_segment() {
    model_with(2, || {
        let table = table_of(Size { capacity: 4, slots: 1, texts: 3, records: 1 });
        table.attached(key(0)).unwrap();
        let (one, other) = both(&table, |table| table.attached(key(1)), |table| table.attached(key(2)));
        table.assert_unique(key(0), table.attached(key(0)).unwrap());
        table.assert_unique(key(1), one.unwrap());
        table.assert_unique(key(2), other.unwrap());
        assert_eq!(table.memory().outline().unwrap().texts, 3, "a record finds no room in a segment that is full");
    });
}

#[test]
fn a_grower_of_slots_and_one_of_texts_put_one_segment_behind_the_other() {
    model_with(2, || {
        let table = table_of(Size { capacity: 1, slots: 2, texts: 3, records: 1 });
        table.attached(Digest::new(2, 2)).unwrap();
        let outline = table.memory().outline().unwrap();
        let grow = move |table: &Slots<Boxed>, word: u64| {
            table.grow(&outline, word).unwrap();
            table.memory().directory().get(outline.segments)
        };
        let (one, other) = both(
            &table,
            move |table| grow(table, outline.more_slots(1)),
            move |table| grow(table, outline.more_texts(1)),
        );
        assert_eq!(one, other, "a segment has taken the place of another");
        let grown = table.memory().outline().unwrap();
        assert_eq!(grown.segments, outline.segments + 1, "a grower that was late appended a segment all the same");
        let place = table.attached(key(0)).unwrap();
        table.assert_unique(key(0), place);
        assert_eq!((table.memory().outline().unwrap().slots, table.memory().outline().unwrap().texts), (2, 2));
    });
}

#[test]
fn a_process_that_begins_a_slot_later_sets_no_generation_back() {
    model(|| {
        let table = slots(1, 1);
        // A process that attaches, and updates twice.
        let user = |table: &Slots<Boxed>, start: u64| {
            let slot = table.attach(key(0), || start, b"key").unwrap().unwrap();
            [(); 2].map(|()| slot.generation.bump().updated().expect("it has begun").get())
        };
        let (one, other) = both(&table, move |table| user(table, START), |table| user(table, START + 1));
        let slot = table.find(key(0)).unwrap().unwrap();
        assert_eq!(table.updates(slot), 4, "the first generation is not the one in the record");
        let mut generations = [one, other].concat();
        generations.sort_unstable();
        generations.dedup();
        assert_eq!(generations.len(), 4, "a generation is repeated");
        assert_eq!(table.word().generation().unwrap().get(), generations[3]);
    });
}

#[test]
fn a_process_that_finds_a_key_finds_its_first_generation_and_its_whole_text() {
    model(|| {
        let text = b"more than eight bytes";
        both(
            &slots(1, 1),
            move |table| {
                let Some(slot) = table.find(key(0)).unwrap() else { return };
                let generation = slot.generation.word().generation();
                let record = table.record_of(slot);
                if let Some(record) = record {
                    assert_eq!(record.text(), text, "a record is seen without its text");
                    assert_eq!(record.first(), START, "a record is seen without its first generation");
                }
                assert!(generation.is_none() || record.is_some(), "a generation is seen without a record");
                assert!(generation.is_none() || table.updates(slot) == 0, "the first generation is not the first one");
            },
            |table| _ = table.attach(key(0), || START, text).unwrap(),
        );
    });
}

#[test]
fn each_of_two_that_write_a_record_finds_all_of_the_one_that_is_the_keys() {
    model(|| {
        let table = slots(1, 1);
        table.memory().outline().unwrap();
        // By the record word alone: on the way through a table, other fences come between the two.
        let attach = |table: &Slots<Boxed>, first: u64| {
            let (texts, word) = (table.memory().texts(0), first_record(table));
            let reference =
                word.get().unwrap_or_else(|| word.publish(texts.write(first, b"key").expect("there is room")));
            let record = texts.record(reference).expect("it is in the segment");
            assert_eq!(record.text(), b"key", "a record is seen without its text");
            record.first()
        };
        let (one, other) = both(&table, move |table| attach(table, START), |table| attach(table, START + 1));
        assert_eq!(one, other, "a key has two records");
        assert!([START, START + 1].contains(&one), "a record is seen without its first generation");
    });
}

#[test]
fn room_that_is_given_back_is_written_again_by_the_next_writer() {
    model(|| {
        let table = table_of(Size { capacity: 4, slots: 1, texts: 1, records: 4 });
        table.memory().outline().unwrap();
        let write =
            |texts: TextSegment<'_>, index: u64, text: &[u8]| texts.write(START + index, text).expect("there is room");
        // One writes and gives back, as the loser of a race does, and the other one writes for good.
        let (_, reference) = both(
            &table,
            move |table| {
                let texts = table.memory().texts(0);
                texts.give_back(write(texts, 1, b"lost"));
            },
            |table| write(table.memory().texts(0), 2, b"kept"),
        );
        let texts = table.memory().texts(0);
        let [third, fourth] = [(3, &b"third"[..]), (4, b"fourth")].map(|(index, text)| write(texts, index, text));
        for (reference, index, text) in [(reference, 2, &b"kept"[..]), (third, 3, b"third"), (fourth, 4, b"fourth")] {
            let record = texts.record(reference).unwrap();
            assert_eq!((record.first(), &*record.text()), (START + index, text), "a record was written over");
        }
    });
}

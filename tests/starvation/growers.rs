//! Several processes that need room at once, of which some are killed.

use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;

use gensync::{CacheKey, Table};

use super::attach;
use super::layout::{of_kind, segments};
use crate::support::{Traced, dawdle, in_child, next_random, path, shared_words};

/// Key number `i` of a process: short ones need slots, and long ones texts.
fn key(process: usize, i: u64, is_long: bool) -> CacheKey {
    CacheKey::raw(if is_long { format!("{process} {i:0900}") } else { format!("{process} {i}") })
}

/// Where the last segment ends, and how long the file is.
fn ends(path: &Path) -> (u64, u64) {
    let file = fs::read(path).unwrap();
    let end = segments(&file).last().map_or(0, |segment| segment.start + segment.bytes);
    assert!(end <= file.len(), "a segment is in the directory that has no room");
    (end as u64, file.len() as u64)
}

#[test]
fn growers_of_slots_and_of_texts_at_once_that_are_killed_leave_a_table_that_uses_all_of_its_room() {
    let mut random = 0x9e37_79b9_7f4a_7c15;
    for round in 0..90 {
        let (_folder, path) = path();
        let table = Table::options().capacity(16).open(&path).unwrap();
        // Two that need slots, two that need texts, or one of each.
        let kinds = [[false, false], [true, true], [false, true]][round % 3];
        let counts = shared_words(2);
        let mut children: Vec<_> = kinds
            .into_iter()
            .enumerate()
            .map(|(process, is_long)| {
                let path = &path;
                Some(in_child(move || {
                    let table = Table::open(path).unwrap();
                    for i in 0..if is_long { 60 } else { 900 } {
                        attach(&table, key(process, i, is_long)).unwrap().mark_updated().unwrap();
                        counts[process].store(i + 1, SeqCst);
                    }
                }))
            })
            .collect();
        dawdle(&mut random, 40_000);
        let killed = 1 + (next_random(&mut random) % 2) as usize;
        for child in children.iter_mut().take(killed) {
            child.take().unwrap().kill();
        }
        children.into_iter().flatten().for_each(crate::support::Child::succeeds);
        // All that they had is there.
        let mut all = 0;
        for (process, is_long) in kinds.into_iter().enumerate() {
            let count = counts[process].load(SeqCst);
            all += count;
            for i in 0..count {
                let slot = table.slot(key(process, i, is_long)).unwrap().unwrap();
                assert_eq!((slot.label(), slot.updates()), (key(process, i, is_long).as_str().into(), 1));
            }
        }
        let stats = table.stats();
        assert!(stats.keys >= all && stats.keys <= all + killed as u64, "{all}, {stats:?}");
        assert!(stats.lost_bytes <= killed as u64 * 920, "{stats:?}");
        // What a killed grower has left is used by the next.
        let length = use_up(&table, &path);
        let file = fs::read(&path).unwrap();
        let slots: u64 = of_kind(&file, 1).iter().map(|segment| segment.slots as u64).sum();
        assert_eq!((table.stats().capacity, table.stats().bytes), (slots, length));
        assert_eq!(table.stats().lost_bytes, stats.lost_bytes, "more was lost");
        table.reset().unwrap();
        assert_eq!(table.stats().lost_bytes, 0);
    }
}

/// Grows the table beyond the present end of its file, so that its last segment ends with the file. Returns where that is.
fn use_up(table: &Table, path: &Path) -> u64 {
    let before = ends(path).1;
    for i in 0.. {
        let (end, length) = ends(path);
        if end > before {
            assert_eq!(end, length, "there is room that no segment has");
            return length;
        }
        for is_long in [true, false] {
            attach(table, key(7, i, is_long)).unwrap();
        }
    }
    unreachable!("tables grow")
}

#[test]
fn room_that_a_killed_grower_has_made_is_used_by_the_next_whatever_that_needs() {
    for (killed, next) in [(false, false), (false, true), (true, false), (true, true)] {
        let (_folder, path) = path();
        let table = Table::options().capacity(16).open(&path).unwrap();
        for process in 0..4 {
            let mut grower = Traced::new(|| {
                let table = Table::open(&path).unwrap();
                (0..1_000_000).for_each(|i| drop(attach(&table, key(10 + process, i, killed)).unwrap()));
            });
            // It is stopped at the end of the call that has made the room, before it writes the word of the segment.
            let (end, length) = loop {
                assert!(grower.goes_on());
                let (end, length) = ends(&path);
                if length > end {
                    break (end, length);
                }
            };
            drop(grower);
            let keys = table.stats().keys;
            // Until another one needs room, nothing changes.
            attach(&table, key(10 + process, 0, killed)).unwrap();
            assert_eq!((ends(&path), table.stats().keys), ((end, length), keys));
            for i in 0.. {
                attach(&table, key(20 + process, i, next)).unwrap();
                if ends(&path).0 > end {
                    break;
                }
            }
            assert!(table.slots().all(|slot| !slot.is_damaged()));
            let length = use_up(&table, &path);
            let stats = table.stats();
            assert_eq!((stats.bytes, stats.lost_bytes), (length, 0), "{stats:?}");
        }
    }
}

//! Guards against an unintended change of the file format: tables that version 2 has made once are read as they were written.
//!
//! The files are made by `GENSYNC_VECTORS=FOLDER cargo test --test format -- --ignored the_files`, on a little-endian machine, which
//! prints what the constants below say of them. A new version gets new files, and these stay as they are.

#[path = "support/layout.rs"]
mod layout;
mod support;

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use gensync::{Error, ErrorKind, GenerationSynchronizer, OwnerCheck, SlotInfo, Table};
use layout::{claimed, digest, directory_word, of_kind, place_of, put, segments, word};

/// A table of 16 slots with the keys "siteconfig:1", "tenant:a%3Ab" and a hundred times "k"; the second was updated three times. On a
/// machine of the other byte order this test says so.
const GOLDEN: &[u8] = include_bytes!("vectors/version-2.gensync");

/// A table of 16 slots that has grown three times, and its texts twice, with a segment of participants, while updates were in flight
/// and threads waited: all that can be in a file of version 2. Some of it was taken back by hand as far as a process may have come
/// that was killed: "half" has word A alone, "unbegun" both words and no record, "recorded" a record and no generation. The record
/// that "unbegun" had is lost.
const EVERYTHING: &[u8] = include_bytes!("vectors/version-2-everything.gensync");

/// A table of 256 slots, which are four lines, that has grown with its keys "key 0" to "key 399".
const LINES: &[u8] = include_bytes!("vectors/version-2-lines.gensync");

/// The retired table that a reset has left of 16 slots and 3 keys.
const RETIRED: &[u8] = include_bytes!("vectors/version-2-retired.gensync");

/// The keys of the first: updates, generation.
const GOLDEN_KEYS: [(&str, u64, u64); 3] = [
    ("siteconfig:1", 0, 1_795_666_992_225_264),
    ("tenant:a%3Ab", 3, 1_795_666_992_225_314),
    (HUNDRED, 0, 1_795_666_992_225_318),
];
const HUNDRED: &str =
    "kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk";

/// The keys of the second: updates, generation, updates that are pending, whether there is a waiter. Besides, it has 30 keys
/// "filler 0" and so on, without updates.
const KEYS: [(&str, u64, u64, u8, bool); 9] = [
    ("a", 0, 1_795_666_992_225_657, 0, false),
    ("b:c", 1, 1_795_666_992_225_662, 0, false),
    ("tenant:a%3Ab", 2, 1_795_666_992_225_667, 0, false),
    ("pending", 5, 1_795_666_992_225_673, 2, false),
    ("awaited", 6, 1_795_666_992_225_678, 0, true),
    ("both", 7, 1_795_666_992_225_683, 1, true),
    ("\u{1f511} key", 8, 1_795_666_992_225_688, 0, false),
    ("last", 9, 1_795_666_992_225_693, 0, false),
    ("long", 0, 1_795_666_992_225_721, 0, false),
];
const FILLERS: usize = 30;

/// Two keys of the second table that are too long to write down here: "long" stands for 7000 times "long", which is kept whole, and
/// the other is 70,000 times "x", of which 65,536 are kept.
fn text(key: &str) -> String {
    if key == "long" { key.repeat(7000) } else { key.to_owned() }
}
const TOO_LONG: usize = 70_000;

const RETIRED_KEYS: [(&str, u64); 3] =
    [("a", 1_795_666_992_267_231), ("b", 1_795_666_992_267_266), ("c", 1_795_666_992_267_269)];

/// The boot that all three say they were made in, which is none.
const OTHER_BOOT: [u8; 16] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];

const AHEAD: u64 = 1 << 52;

fn file_of(content: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let (folder, path) = support::path();
    fs::write(&path, content).unwrap();
    (folder, path)
}

fn open(path: &Path, read_only: bool) -> Result<Table, Error> {
    Table::options().read_only(read_only).owner(OwnerCheck::Anyone).open(path)
}

fn attach(table: &Table, key: impl Into<String>) -> Result<GenerationSynchronizer, Error> {
    GenerationSynchronizer::new(table, gensync::CacheKey::raw(key.into()))
}

fn generation(table: &Table, key: &str) -> Option<u64> {
    table.generation(gensync::CacheKey::raw(key)).unwrap().map(gensync::Generation::get)
}

/// What a table says of `key`, if it is there.
fn slot(table: &Table, key: &str) -> Option<SlotInfo> {
    let slot = table.slot(gensync::CacheKey::raw(key)).unwrap()?;
    assert_eq!((slot.label().as_ref(), slot.is_truncated(), slot.key_length()), (key, false, key.len()));
    assert!(table.slots().any(|other| other == slot) && !slot.is_damaged(), "{key}");
    Some(slot)
}

/// As if it had been written in the boot of now.
fn of_this_boot(content: &[u8]) -> Vec<u8> {
    let (_folder, path) = support::path();
    Table::open(&path).unwrap();
    let mut content = content.to_vec();
    content[128..144].copy_from_slice(&fs::read(path).unwrap()[128..144]);
    content
}

#[test]
fn a_small_table_of_version_2_is_read_as_it_was_written() {
    let (_folder, path) = file_of(GOLDEN);
    let table = open(&path, true).unwrap();
    let mut slots: Vec<_> = table
        .slots()
        .map(|slot| (slot.label().into_owned(), slot.is_truncated(), slot.updates(), slot.generation().get()))
        .collect();
    slots.sort();
    let mut expected = GOLDEN_KEYS.map(|(key, updates, generation)| (key.to_owned(), false, updates, generation));
    expected.sort();
    assert_eq!(slots, expected);
    for (key, _, expected) in GOLDEN_KEYS {
        assert_eq!(generation(&table, key), Some(expected), "{key} is found by its digest");
    }
    assert_eq!((table.info().layout_version, table.stats().lost_bytes), (2, 0));
    assert!(fs::read(&path).unwrap() == GOLDEN, "reading changed it");
}

#[test]
fn keys_are_found_in_the_lines_where_they_were_put() {
    let (_folder, path) = file_of(LINES);
    let table = open(&path, true).unwrap();
    for key in 0..400 {
        let slot = slot(&table, &format!("key {key}")).expect("it is found by its digest");
        assert_eq!((&*slot.label(), slot.updates()), (&*format!("key {key}"), 0));
    }
    let stats = table.stats();
    assert_eq!((stats.keys, stats.capacity), (400, 512));
    assert!(stats.occupancy[0].keys > 128, "segments fill up from the first");
    drop(table);
    // A writer goes on where they stopped.
    fs::write(&path, of_this_boot(LINES)).unwrap();
    let table = open(&path, false).unwrap();
    (0..400).for_each(|key| drop(attach(&table, format!("key {key}")).unwrap()));
    assert_eq!(table.stats(), stats, "a key was put elsewhere");
}

#[test]
fn the_first_open_after_a_reboot_moves_every_generation_on() {
    let (_folder, path) = support::path();
    let sync = GenerationSynchronizer::new(&Table::open(&path).unwrap(), "key").unwrap();
    for _ in 0..3 {
        sync.mark_updated().unwrap();
    }
    let before = sync.sync_gen().unwrap();
    // What a reboot leaves: another boot's id, an update that was pending, a waiter that is gone.
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[0x5a; 16], 128).unwrap();
    let slot = place_of(&fs::read(&path).unwrap(), "key").unwrap().generation as u64;
    file.write_all_at(&[0x81], slot + 7).unwrap();
    file.write_all_at(&[0x80 | (before.get() >> 48) as u8], slot + 6).unwrap();

    // No process has a table open across a reboot.
    drop((sync, file));
    let table = Table::open(&path).unwrap();
    let after = table.generation("key").unwrap().unwrap();
    assert!(after > before);
    assert_eq!(table.slots().next().unwrap().updates(), 3, "the count of updates goes on");
    let fresh = GenerationSynchronizer::new(&table, "key").unwrap();
    assert!(!fresh.is_expired(), "pending and waiting were cleared");
    drop((fresh, table));
    // Once for each boot.
    assert_eq!(Table::open(&path).unwrap().generation("key").unwrap(), Some(after));
}

const UNFINISHED: [&str; 3] = ["half", "unbegun", "recorded"];
const ALL_KEYS: usize = KEYS.len() + 1 + FILLERS;

fn assert_as_written(table: &Table) {
    for (key, updates, generation, pending, is_awaited) in KEYS {
        let slot = slot(table, &text(key)).unwrap();
        let found = (slot.updates(), slot.generation().get(), slot.pending(), slot.is_awaited());
        assert_eq!(found, (updates, generation, pending, is_awaited), "{key}");
    }
    (0..FILLERS).for_each(|i| assert_eq!(slot(table, &format!("filler {i}")).unwrap().updates(), 0));
    assert_too_long(table);
    assert_eq!(table.slots().count(), ALL_KEYS);
    assert!(UNFINISHED.iter().all(|key| generation(table, key).is_none()));
    let stats = table.stats();
    let found = (stats.keys, stats.capacity, stats.segments, stats.bytes, stats.longest_probe);
    assert_eq!(found, (43, 64, 3, EVERYTHING.len() as u64, 1));
    // The records of "half" and "unbegun": a generation and a word of text.
    assert_eq!(stats.lost_bytes, 32);
}

fn assert_too_long(table: &Table) {
    let key = "x".repeat(TOO_LONG);
    let slot = table.slot(gensync::CacheKey::raw(&*key)).unwrap().unwrap();
    assert_eq!((slot.label().as_ref(), slot.is_truncated(), slot.key_length()), (&key[..65_536], true, TOO_LONG));
}

#[test]
fn all_that_version_2_writes_is_read_as_it_was_written() {
    for content in [EVERYTHING.to_vec(), of_this_boot(EVERYTHING)] {
        let (_folder, path) = file_of(&content);
        let table = open(&path, true).unwrap();
        assert_as_written(&table);
        for key in UNFINISHED {
            let error = GenerationSynchronizer::new(&table, key).unwrap_err();
            assert_eq!(*error.kind(), ErrorKind::KeyNotFound);
        }
        // As no process is left to finish it, and this one cannot.
        let sync = GenerationSynchronizer::new(&table, "pending").unwrap();
        assert!(sync.is_expired() && sync.refresh().unwrap().get() == KEYS[3].2);
        assert!(fs::read(&path).unwrap() == content, "reading changed it");
    }
}

#[test]
fn a_writer_of_another_boot_goes_on_with_all_that_version_2_writes() {
    let (_folder, path) = file_of(EVERYTHING);
    let table = open(&path, false).unwrap();
    for (key, updates, generation, ..) in KEYS {
        let slot = slot(&table, &text(key)).unwrap();
        assert!(slot.generation().get() > generation, "{key} has not moved on");
        assert_eq!((slot.updates(), slot.pending(), slot.is_awaited()), (updates, 0, false), "{key}");
    }
    finish_claims_and_grow(&table);
}

#[test]
fn a_writer_goes_on_with_all_that_version_2_writes() {
    let (_folder, path) = file_of(&of_this_boot(EVERYTHING));
    let table = open(&path, false).unwrap();
    assert_as_written(&table);
    for (key, _, generation, pending, is_awaited) in KEYS {
        let key = text(key);
        let sync = attach(&table, &*key).unwrap();
        assert_eq!(sync.sync_gen().unwrap().get(), generation);
        // A process that finds the makers of these updates gone updates the key in their place.
        assert_eq!(sync.is_expired(), pending > 0, "{key}");
        assert_eq!(sync.refresh().unwrap().get(), generation + u64::from(pending > 0), "{key}");
        let present = slot(&table, &key).unwrap();
        assert_eq!((present.pending(), present.is_awaited()), (0, is_awaited && pending == 0), "{key}");
        sync.mark_updated().unwrap();
        assert!(!slot(&table, &key).unwrap().is_awaited(), "{key}: the waiter was woken");
    }
    finish_claims_and_grow(&table);
}

fn finish_claims_and_grow(table: &Table) {
    let path = table.path().unwrap();
    let before = fs::read(path).unwrap();
    let syncs = UNFINISHED.map(|key| attach(table, key).unwrap());
    let after = fs::read(path).unwrap();
    assert_eq!(claimed(&after), claimed(&before), "a claim was not finished where it was begun");
    let record = |file: &[u8], key| word(file, place_of(file, key).unwrap().record);
    assert_eq!(record(&after, "recorded"), record(&before, "recorded"), "a record was not used");
    assert_eq!((table.stats().keys, table.slots().count()), (ALL_KEYS as u64 + 3, ALL_KEYS + 3));
    for (key, sync) in UNFINISHED.iter().zip(&syncs) {
        assert_eq!(slot(table, key).unwrap().updates(), 0);
        sync.mark_updated().unwrap();
    }
    let participants = of_kind(&before, 3)[0];
    let new: Vec<_> = (0..2000).map(|i| attach(table, format!("new {i}")).unwrap()).collect();
    assert!(table.stats().segments > 3);
    let all = ALL_KEYS + 3 + new.len();
    assert_eq!((table.stats().keys, table.slots().count()), (all as u64, all));
    assert!(
        KEYS.iter().all(|(key, ..)| slot(table, &text(key)).is_some()) && !new.iter().any(|sync| sync.is_expired())
    );
    assert_too_long(table);
    let (range, after) = (participants.start..participants.start + participants.bytes, fs::read(path).unwrap());
    assert!(after[range.clone()] == before[range], "participants were written to");
}

#[test]
fn a_retired_table_of_version_2_is_succeeded_by_a_writer_alone() {
    let mut retiring = RETIRED.to_vec();
    // As a process that was killed before the end may have left it.
    retiring[144] = 2;
    // As if the clock had been far ahead when "c" was made.
    let mut ahead = RETIRED.to_vec();
    let place = place_of(&ahead, "c").unwrap();
    put(&mut ahead, place.generation, 1 << 54 | AHEAD);
    for content in [RETIRED, &retiring, &ahead] {
        let least = if content == ahead { AHEAD } else { 0 };
        let (folder, path) = file_of(content);
        let error = open(&path, true).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "{}: the table was reset or its file replaced, and no successor can be attached to; see whether its file can \
                 be opened",
                path.display()
            )
        );
        assert!(fs::read(&path).unwrap() == content, "reading changed it");
        let reader = fs::File::open(&path).unwrap();
        let table = open(&path, false).unwrap();
        assert_eq!((table.stats().keys, table.stats().capacity), (0, 16));
        for (key, before) in RETIRED_KEYS {
            assert_eq!(generation(&table, key), None);
            let sync = GenerationSynchronizer::new(&table, key).unwrap();
            assert!(sync.sync_gen().unwrap().get() > before.max(least), "a generation is there twice");
        }
        // A process that still has the old table finds that it has ended.
        let mut state = [0; 4];
        reader.read_exact_at(&mut state, 144).unwrap();
        assert_eq!(state, [3, 0, 0, 0]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}

/// Makes the files, in the folder that is given.
#[test]
#[ignore = "makes the golden files, which is done once for a version"]
fn the_files_are_made() {
    let Some(target) = std::env::var_os("GENSYNC_VECTORS").map(PathBuf::from) else {
        eprintln!("skipped, as GENSYNC_VECTORS names no folder");
        return;
    };
    let (_folder, path) = support::path();
    let table = Table::options().capacity(16).open(&path).unwrap();
    let update = |table: &Table, key: &str, count: u64| {
        let sync = attach(table, key).unwrap();
        (0..count).for_each(|_| _ = sync.mark_updated().unwrap());
        sync
    };
    GOLDEN_KEYS.iter().for_each(|(key, updates, _)| drop(update(&table, key, *updates)));
    GOLDEN_KEYS.iter().for_each(|(key, ..)| println!("{key}: {:?}", generation(&table, key)));
    let mut file = fs::read(&path).unwrap();
    file[128..144].copy_from_slice(&OTHER_BOOT);
    fs::write(target.join("version-2.gensync"), &file).unwrap();
    make_everything(&target, update);
    make_retired(&target);
    make_lines(&target);
}

fn make_everything(target: &Path, update: impl Fn(&Table, &str, u64) -> GenerationSynchronizer) {
    let (_folder, path) = support::path();
    let table = Table::options().capacity(16).open(&path).unwrap();
    UNFINISHED.iter().for_each(|key| drop(attach(&table, *key).unwrap()));
    let syncs = KEYS.map(|(key, updates, ..)| update(&table, &text(key), updates));
    drop(table);
    drop(syncs);
    // A segment of participants behind what is there, and then more of the others.
    let mut file = fs::read(&path).unwrap();
    let end = segments(&file).len();
    put(&mut file, layout::DIRECTORY + 8 * end, directory_word(3, 1));
    file.resize(file.len() + layout::PAGE, 0);
    fs::write(&path, &file).unwrap();
    let table = Table::open(&path).unwrap();
    (0..FILLERS).for_each(|i| drop(attach(&table, format!("filler {i}")).unwrap()));
    attach(&table, "x".repeat(TOO_LONG)).unwrap();
    let key = |key| attach(&table, key).unwrap();
    let (pending, both) = (key("pending"), key("both"));
    let updates = [&pending, &pending, &both].map(|sync| sync.begin_update().unwrap());
    let waiting = [key("awaited"), key("both")];
    std::thread::scope(|scope| {
        for sync in &waiting {
            // Pending updates expire a key, so a watch waits for it.
            scope.spawn(|| if sync.is_expired() { std::thread::yield_now() } else { sync.wait() });
        }
        while !table.slot("awaited").unwrap().unwrap().is_awaited() {
            std::thread::yield_now();
        }
        let mut file = fs::read(&path).unwrap();
        let both = place_of(&file, "both").unwrap();
        // A waiter for several keys sets the bit even then.
        let bits = word(&file, both.generation);
        put(&mut file, both.generation, bits | 1 << 55);
        let take_back = |file: &mut Vec<u8>, key: &str, has_digest: bool, has_record: bool| {
            let place = place_of(file, key).unwrap();
            put(file, place.generation, 0);
            if !has_record {
                put(file, place.record, 0);
            }
            if !has_digest {
                put(file, place.digest + 8, 0);
                file[place.tag] = 0;
            }
        };
        take_back(&mut file, "half", false, false);
        take_back(&mut file, "unbegun", true, false);
        take_back(&mut file, "recorded", true, true);
        assert_eq!(digest(&file, "unbegun")[0], word(&file, place_of(&file, "unbegun").unwrap().digest));
        file[128..144].copy_from_slice(&OTHER_BOOT);
        fs::write(target.join("version-2-everything.gensync"), &file).unwrap();
        KEYS.iter().for_each(|(key, ..)| println!("{key}: {:?}", generation(&table, &text(key))));
        println!("{:?} {:?}", table.stats(), segments(&file));
        waiting.iter().for_each(|sync| _ = sync.mark_updated().unwrap());
    });
    updates.into_iter().for_each(|update| update.abandon());
}

fn make_retired(target: &Path) {
    let (_folder, path) = support::path();
    let table = Table::options().capacity(16).open(&path).unwrap();
    let syncs = RETIRED_KEYS.map(|(key, _)| attach(&table, key).unwrap());
    let old = fs::File::open(&path).unwrap();
    table.reset().unwrap();
    drop(syncs);
    let mut content = vec![0; old.metadata().unwrap().len() as usize];
    old.read_exact_at(&mut content, 0).unwrap();
    content[128..144].copy_from_slice(&OTHER_BOOT);
    for (key, _) in RETIRED_KEYS {
        let place = place_of(&content, key).unwrap();
        println!("{key}: {}", word(&content, place.generation) & ((1 << 54) - 1));
    }
    fs::write(target.join("version-2-retired.gensync"), content).unwrap();
}

fn make_lines(target: &Path) {
    let (_folder, path) = support::path();
    let table = Table::options().capacity(256).open(&path).unwrap();
    (0..400).for_each(|key| drop(attach(&table, format!("key {key}")).unwrap()));
    let mut file = fs::read(&path).unwrap();
    file[128..144].copy_from_slice(&OTHER_BOOT);
    fs::write(target.join("version-2-lines.gensync"), &file).unwrap();
}

//! Guards against an unintended change of the file format: a table made by the first version stays readable.

mod support;

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use gensync::{ErrorKind, GenerationSynchronizer, OwnerCheck, SlotInfo, Table};

/// Made once, by a table of 4 slots with the keys "siteconfig:1", "tenant:a%3Ab" and a hundred times "k"; the second
/// was updated three times. On a machine of the other byte order this test says so.
const GOLDEN: &[u8] = include_bytes!("vectors/version-1.gensync");

#[test]
fn a_table_of_version_1_is_read_as_it_was_written() {
    let (_folder, path) = support::path();
    fs::write(&path, GOLDEN).unwrap();
    let table = Table::options().read_only(true).owner(OwnerCheck::Anyone).open(&path).unwrap();
    let mut slots: Vec<_> = table
        .slots()
        .map(|slot| (slot.label().into_owned(), slot.is_truncated(), slot.updates(), slot.generation().get()))
        .collect();
    slots.sort();
    let expected = [
        ("k".repeat(88), true, 0, K_GENERATION),
        ("siteconfig:1".to_owned(), false, 0, SITECONFIG_GENERATION),
        ("tenant:a%3Ab".to_owned(), false, 3, TENANT_GENERATION),
    ];
    assert_eq!(slots, expected);
    for (key, generation) in
        [("siteconfig:1", SITECONFIG_GENERATION), ("tenant:a%3Ab", TENANT_GENERATION), (&"k".repeat(100), K_GENERATION)]
    {
        assert_eq!(table.generation(key).unwrap().unwrap().get(), generation, "{key} is found by its digest");
    }
    assert_eq!(fs::read(&path).unwrap(), GOLDEN, "reading changed it");
}

const K_GENERATION: u64 = 1_795_533_200_401_270;
const SITECONFIG_GENERATION: u64 = 1_795_533_200_401_234;
const TENANT_GENERATION: u64 = 1_795_533_200_401_258;

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
    let slot = slot_offset(&fs::read(&path).unwrap(), before.get());
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

/// The offset of the generation word with `generation`, little-endian.
fn slot_offset(file: &[u8], generation: u64) -> u64 {
    let word = generation.to_le_bytes();
    file.chunks(8).position(|chunk| chunk == word).expect("the generation is in the file") as u64 * 8
}

/// Made once, by a table of 2 slots that has grown twice, while updates were in flight and threads waited: all that can be in a
/// file of version 1. The claims of "half" and "unbegun" were taken back by hand as far as a claimer may have come: to word A
/// without a tag, and to both words.
const EVERYTHING: &[u8] = include_bytes!("vectors/version-1-everything.gensync");

/// Its keys: updates, generation, updates that are pending, whether there is a waiter.
const KEYS: [(&str, u64, u64, u8, bool); 9] = [
    ("a", 0, 1_795_575_983_794_320, 0, false),
    ("b:c", 1, 1_795_575_983_794_341, 0, false),
    ("tenant:a%3Ab", 2, 1_795_575_983_794_380, 0, false),
    ("pending", 5, 1_795_575_983_794_426, 2, false),
    ("awaited", 6, 1_795_575_983_794_453, 0, true),
    ("both", 7, 1_795_575_983_794_470, 1, true),
    ("\u{1f511} key", 8, 1_795_575_983_794_489, 0, false),
    ("last", 9, 1_795_575_983_794_512, 0, false),
    (LONG, 0, 1_795_575_983_794_528, 0, false),
];

/// Its 88th byte is the first of two that are one character.
const LONG: &str =
    concat!("kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk", "kkkkkkkkkkkkkkkkkkkkkkkkkkk\u{e4}rest");

/// The retired table that a reset has left of 2 slots and 3 keys.
const RETIRED: &[u8] = include_bytes!("vectors/version-1-retired.gensync");
const RETIRED_KEYS: [(&str, u64); 3] =
    [("a", 1_795_575_984_796_395), ("b", 1_795_575_984_796_420), ("c", 1_795_575_984_796_459)];

const AHEAD: u64 = 1 << 52;

fn file_of(content: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let (folder, path) = support::path();
    fs::write(&path, content).unwrap();
    (folder, path)
}

fn open(path: &Path, read_only: bool) -> Result<Table, gensync::Error> {
    Table::options().read_only(read_only).owner(OwnerCheck::Anyone).open(path)
}

/// What a table says of `key`, if it is there.
fn slot(table: &Table, key: &str) -> Option<SlotInfo> {
    let generation = table.generation(key).unwrap()?;
    let key = key.replace(' ', "\\x20");
    let slot = table.slots().find(|slot| slot.label_bytes() == &key.as_bytes()[..key.len().min(88)]).unwrap();
    assert_eq!((slot.generation(), slot.is_truncated()), (generation, key.len() > 88), "{key}");
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

fn assert_as_written(table: &Table) {
    for (key, updates, generation, pending, is_awaited) in KEYS {
        let slot = slot(table, key).unwrap();
        let found = (slot.updates(), slot.generation().get(), slot.pending(), slot.is_awaited());
        assert_eq!(found, (updates, generation, pending, is_awaited), "{key}");
    }
    assert_eq!(table.slots().count(), KEYS.len());
    assert_eq!((table.generation("half").unwrap(), table.generation("unbegun").unwrap()), (None, None));
    let stats = table.stats();
    let found = (stats.keys, stats.capacity, stats.segments, stats.bytes, stats.longest_probe);
    assert_eq!(found, (11, 14, 3, 6272, 1));
}

#[test]
fn all_that_version_1_writes_is_read_as_it_was_written() {
    for content in [EVERYTHING.to_vec(), of_this_boot(EVERYTHING)] {
        let (_folder, path) = file_of(&content);
        let table = open(&path, true).unwrap();
        assert_as_written(&table);
        for key in ["half", "unbegun"] {
            let error = GenerationSynchronizer::new(&table, key).unwrap_err();
            assert_eq!(*error.kind(), ErrorKind::KeyNotFound);
        }
        // As no process is left to finish it, and this one cannot.
        let sync = GenerationSynchronizer::new(&table, "pending").unwrap();
        assert!(sync.is_expired() && sync.refresh().unwrap().get() == 1_795_575_983_794_426);
        assert!(fs::read(&path).unwrap() == content, "reading changed it");
    }
}

#[test]
fn a_writer_of_another_boot_goes_on_with_all_that_version_1_writes() {
    let (_folder, path) = file_of(EVERYTHING);
    let table = open(&path, false).unwrap();
    for (key, updates, generation, ..) in KEYS {
        let slot = slot(&table, key).unwrap();
        assert!(slot.generation().get() > generation, "{key} has not moved on");
        assert_eq!((slot.updates(), slot.pending(), slot.is_awaited()), (updates, 0, false), "{key}");
    }
    finish_claims_and_grow(&table);
}

#[test]
fn a_writer_goes_on_with_all_that_version_1_writes() {
    let (_folder, path) = file_of(&of_this_boot(EVERYTHING));
    let table = open(&path, false).unwrap();
    assert_as_written(&table);
    for (key, _, generation, pending, is_awaited) in KEYS {
        let sync = GenerationSynchronizer::new(&table, key).unwrap();
        assert_eq!(sync.sync_gen().unwrap().get(), generation);
        // A process that finds the makers of these updates gone updates the key in their place.
        assert_eq!(sync.is_expired(), pending > 0, "{key}");
        assert_eq!(sync.refresh().unwrap().get(), generation + u64::from(pending > 0), "{key}");
        let present = slot(&table, key).unwrap();
        assert_eq!((present.pending(), present.is_awaited()), (0, is_awaited && pending == 0), "{key}");
        sync.mark_updated().unwrap();
        assert!(!slot(&table, key).unwrap().is_awaited(), "{key}: the waiter was woken");
    }
    finish_claims_and_grow(&table);
}

fn finish_claims_and_grow(table: &Table) {
    let path = table.path().unwrap();
    let claimed = |content: &[u8]| -> Vec<usize> {
        (4096..6272).step_by(128).filter(|slot| content[slot + 8..slot + 16] != [0; 8]).collect()
    };
    let before = claimed(&fs::read(path).unwrap());
    let syncs = ["half", "unbegun"].map(|key| GenerationSynchronizer::new(table, key).unwrap());
    assert_eq!(claimed(&fs::read(path).unwrap()), before, "a claim was not finished where it was begun");
    assert_eq!((table.stats().keys, table.slots().count()), (11, 11));
    for (i, sync) in syncs.iter().enumerate() {
        let slot = slot(table, ["half", "unbegun"][i]).unwrap();
        assert_eq!((slot.label().as_ref(), slot.updates()), (["half", "unbegun"][i], 0));
        sync.mark_updated().unwrap();
    }
    let new: Vec<_> = (0..100).map(|i| GenerationSynchronizer::new(table, format!("new {i}")).unwrap()).collect();
    assert!(table.stats().segments > 3);
    assert_eq!((table.stats().keys, table.slots().count()), (111, 111));
    assert!(KEYS.iter().all(|(key, ..)| slot(table, key).is_some()) && !new.iter().any(|sync| sync.is_expired()));
}

#[test]
fn a_retired_table_of_version_1_is_succeeded_by_a_writer_alone() {
    let mut retiring = RETIRED.to_vec();
    // As a process that was killed before the end may have left it.
    retiring[144] = 2;
    // As if the clock had been far ahead when "c" was made.
    let mut ahead = RETIRED.to_vec();
    let word = (1 << 54 | AHEAD).to_le_bytes();
    ahead[0x1200..0x1208].copy_from_slice(&word);
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
        assert_eq!((table.stats().keys, table.stats().capacity), (0, 2));
        for (key, generation) in RETIRED_KEYS {
            assert_eq!(table.generation(key).unwrap(), None);
            let sync = GenerationSynchronizer::new(&table, key).unwrap();
            assert!(sync.sync_gen().unwrap().get() > generation.max(least), "a generation is there twice");
        }
        // A process that still has the old table finds that it has ended.
        let mut state = [0; 4];
        reader.read_exact_at(&mut state, 144).unwrap();
        assert_eq!(state, [3, 0, 0, 0]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}

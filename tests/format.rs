//! Guards against a change of the file format that nobody meant: a table made by the first version stays readable.

mod support;

use std::fs;
use std::os::unix::fs::FileExt as _;

use gensync::{GenerationSynchronizer, OwnerCheck, Table};

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

    let table = Table::open(&path).unwrap();
    let after = table.generation("key").unwrap().unwrap();
    assert!(after > before);
    assert_eq!(table.slots().next().unwrap().updates(), 3, "the count of updates goes on");
    let fresh = GenerationSynchronizer::new(&table, "key").unwrap();
    assert!(!fresh.is_expired(), "pending and waiting were cleared");
    assert!(sync.is_expired());
    drop(table);
    // Once for each boot.
    assert_eq!(Table::open(&path).unwrap().generation("key").unwrap(), Some(after));
}

/// Where the generation word stands that holds `generation`, little-endian.
fn slot_offset(file: &[u8], generation: u64) -> u64 {
    let word = generation.to_le_bytes();
    file.chunks(8).position(|chunk| chunk == word).expect("the generation is in the file") as u64 * 8
}

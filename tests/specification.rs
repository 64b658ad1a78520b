//! Guards against a specification that is wrong, or incomplete: a reader of the file that was written in another language from the
//! documentation of `src/protocol/layout.rs` alone must find in any table what the program finds in it.

mod support;
#[allow(dead_code, reason = "this file uses a part of it")]
#[path = "cli/tool.rs"]
mod tool;

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering::SeqCst;

use gensync::{CacheKey, GenerationSynchronizer, SlotInfo, Table};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use support::{await_value, in_child, next_random, shared_words};
use tool::{Place, Said, eventually, objects, program, said};

/// How many bytes of a key the file keeps.
const KEPT: usize = 65_536;

/// Runs the reader in Python, with nothing but the standard library.
fn run_reader<'a>(path: &Path, keys: impl IntoIterator<Item = &'a str>) -> Said {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/read_table.py");
    let output = Command::new("python3").args(["-I", "-S", "-B", script]).arg(path).args(keys).output();
    said(output.expect("this test runs tests/read_table.py: it needs python3, 3.10 or newer, in PATH"))
}

/// What the reader finds: all keys, or these.
fn read<'a>(path: &Path, keys: impl IntoIterator<Item = &'a str>) -> Vec<Value> {
    let said = run_reader(path, keys);
    assert_eq!((said.status, &*said.err), (0, ""));
    objects(&said.out)
}

/// The bytes of a key, as the reader prints them.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn open_sync(table: &Table, key: &str) -> GenerationSynchronizer {
    GenerationSynchronizer::new(table, CacheKey::raw(key)).unwrap()
}

/// What is compared: name in `ls --json`, and in what the reader prints.
const FIELDS: [[&str; 2]; 6] = [
    ["digest", "digest"],
    ["key_length", "key_length"],
    ["generation", "generation"],
    ["updates", "updates"],
    ["pending", "pending"],
    ["waiters", "waiting"],
];

/// Asserts that the reader finds what `gensync ls` finds, which is these keys, and finds each by its text. Returns what it has found
/// for each of them.
fn assert_same<'a>(path: &Path, keys: impl IntoIterator<Item = &'a str>) -> Vec<Value> {
    let by_digest = |found: &[Value]| -> HashMap<String, Value> {
        found.iter().map(|key| (key["digest"].as_str().unwrap().to_owned(), key.clone())).collect()
    };
    let listed = said(program().arg("--table").arg(path).args(["--json", "ls"]).output().unwrap());
    assert_eq!((listed.status, &*listed.err), (0, ""));
    let (listed, found) = (objects(&listed.out), read(path, []));
    assert_eq!(found.len(), listed.len());
    let all = by_digest(&found);
    for key in &listed {
        let Some(found) = all.get(key["digest"].as_str().unwrap()) else { panic!("the reader misses {key}") };
        for [of_ls, of_reader] in FIELDS {
            assert_eq!(found[of_reader], key[of_ls], "{of_reader} of {key}");
        }
        match &key["key_hex"] {
            Value::Null => assert_eq!(found["key"], key["key"]),
            bytes => assert_eq!(found["key_hex"], *bytes),
        }
    }
    // Where the slots are is only known to programs.
    for slot in Table::options().read_only(true).open(path).unwrap().slots() {
        assert_eq!(all[&format!("{:032x}", slot.digest())]["offset"], slot.offset(), "{slot:?}");
    }

    let keys: Vec<_> = keys.into_iter().collect();
    assert_eq!(keys.len(), listed.len());
    // The kernel limits the length of a command line.
    let looked_up: Vec<_> = keys.chunks(4000).flat_map(|keys| read(path, keys.iter().copied())).collect();
    assert_eq!(looked_up.len(), keys.len());
    for (key, found) in keys.iter().zip(&looked_up) {
        assert_eq!(found["key_hex"], hex(&key.as_bytes()[..key.len().min(KEPT)]));
        assert_eq!(found["key_length"], key.len());
        assert_eq!(*found, all[found["digest"].as_str().unwrap()]);
    }
    looked_up
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is not a number"))
}

#[test]
fn a_fresh_table_is_read() {
    let place = Place::empty();
    let table = place.table();
    assert_same(&place.path, []);
    let absent = run_reader(&place.path, ["a"]);
    assert_eq!((absent.status, &*absent.out, &*absent.err), (1, "", ""));

    let keys = ["a", "users", "routes"];
    let syncs = keys.map(|key| open_sync(&table, key));
    (0..5).for_each(|_| _ = syncs[1].mark_updated().unwrap());
    let found = assert_same(&place.path, keys);
    assert_eq!(found.iter().map(|key| number(&key["updates"])).collect::<Vec<_>>(), [0, 5, 0]);
    assert!(found.iter().all(|key| key["retired"] == false));
    let one_absent = run_reader(&place.path, ["a", "b", "routes"]);
    assert_eq!((one_absent.status, objects(&one_absent.out).len()), (1, 2));
}

#[test]
fn keys_of_all_lengths_and_scripts_are_read() {
    let place = Place::empty();
    let table = place.table();
    let lengths = [1, 2, 7, 8, 9, 20, 88, 100, 4096, KEPT - 1, KEPT, KEPT + 1, 70_000];
    let mut keys: Vec<_> = lengths.map(|length| "k".repeat(length)).into();
    keys.extend(["ключ", "鍵:1", "🔑", "a\nb\t\"c\"\\", "\u{7f}\u{85}\u{feff}", " "].map(str::to_owned));
    // Each ends at another byte of its last character.
    keys.extend((1..=3).map(|back| format!("{}🔑", "x".repeat(KEPT - back))));
    keys.iter().for_each(|key| drop(open_sync(&table, key)));
    assert_same(&place.path, keys.iter().map(String::as_str));
}

#[test]
fn a_table_that_has_grown_is_read() {
    let place = Place::empty();
    let table = Table::options().capacity(16).open(&place.path).unwrap();
    let keys: Vec<_> = (0..10_000).map(|i| format!("a key of some length: {i}")).collect();
    let mut random = 0x9e37_79b9_7f4a_7c15;
    for key in &keys {
        let sync = open_sync(&table, key);
        (0..next_random(&mut random) % 4).for_each(|_| _ = sync.mark_updated().unwrap());
    }
    let stats = table.stats();
    assert!(stats.segments >= 10, "{stats:?}");
    assert_same(&place.path, keys.iter().map(String::as_str));
}

#[test]
fn pending_updates_and_waiters_are_read_where_locks_and_wake_words_are() {
    let place = Place::empty();
    let table = place.table();
    let keys = ["quiet", "pending", "awaited", "many"];
    let syncs = keys.map(|key| open_sync(&table, key));
    let [_, pending, awaited, many] = &syncs;
    let begun = &shared_words(1)[0];
    let updater = in_child(|| {
        let _update = pending.begin_update().unwrap();
        begun.store(1, SeqCst);
        loop {
            nix::unistd::pause();
        }
    });
    await_value(begun, 1);
    let waiter = in_child(|| {
        awaited.refresh().unwrap();
        awaited.wait();
    });
    eventually("waiting for a waiter", || table.slot(CacheKey::raw("awaited")).unwrap().unwrap().is_awaited());
    waiter.await_sleep();
    let updates: Vec<_> = (0..300).map(|_| many.begin_update().unwrap()).collect();

    let found = assert_same(&place.path, keys);
    assert_eq!(found.iter().map(|key| number(&key["pending"])).collect::<Vec<_>>(), [0, 1, 0, 255]);
    assert_eq!(found.iter().map(|key| &key["waiting"]).collect::<Vec<_>>(), [false, false, true, false]);

    // The lock of an update has 8 bytes, 2^40 behind its generation word.
    let (start, file) = ((1 << 40) + number(&found[1]["offset"]), File::open(&place.path).unwrap());
    let lock = format!(":{} {start} {}", file.metadata().unwrap().ino(), start + 7);
    let locks = fs::read_to_string("/proc/locks").unwrap();
    let is_lock = |line: &&str| line.contains("OFDLCK") && line.contains("READ") && line.ends_with(&lock);
    assert!(locks.lines().any(|line| is_lock(&line)), "{lock} is not in {locks}");
    // The waiter's wake word is odd, and the others are even.
    let is_odd = |offset| {
        let mut word = [0; 4];
        file.read_exact_at(&mut word, offset).unwrap();
        let lowest = if cfg!(target_endian = "little") { word[0] } else { word[3] };
        lowest % 2 == 1
    };
    let odd: Vec<u64> = (0..64).filter(|i| is_odd(4096 + 64 * i)).collect();
    assert_eq!(odd, [number(&found[2]["offset"]) / 8 % 64]);

    drop(updates);
    awaited.mark_updated().unwrap();
    waiter.succeeds();
    updater.kill();
    // The count that a killed process has left is read like any other.
    let found = assert_same(&place.path, keys);
    assert_eq!((&found[1]["pending"], &found[2]["waiting"]), (&1.into(), &false.into()));
}

#[test]
fn a_table_is_read_while_other_processes_write_to_it() {
    const KEYS: u64 = 50;
    let place = Place::empty();
    let table = Table::options().capacity(16).open(&place.path).unwrap();
    let names: Vec<_> = (0..KEYS).map(|i| format!("key:{i}")).collect();
    let syncs: Vec<_> = names.iter().map(|key| open_sync(&table, key)).collect();
    // In each round of reading, the writers make some more keys, with longer texts: the table grows while it is read.
    const NEW_KEYS: u64 = 300;
    const END: u64 = u64::MAX;
    let [round, writes @ ..] = shared_words(3) else { unreachable!() };
    let writers = [0, 1].map(|number| {
        in_child(|| {
            let (mut random, mut made) = (0x9e37_79b9_7f4a_7c15 + number, 0);
            loop {
                let sync = &syncs[(next_random(&mut random) % KEYS) as usize];
                sync.mark_updated().unwrap();
                sync.begin_update().unwrap().finish().unwrap();
                match round.load(SeqCst) {
                    END => break,
                    round if made < round * NEW_KEYS => {
                        drop(open_sync(&table, &format!("new:{number}:{made}:{}", "x".repeat(made as usize / 5))));
                        made += 1;
                    }
                    _ => {}
                }
                writes[number as usize].fetch_add(1, SeqCst);
            }
        })
    });
    let keys_now = || -> HashMap<String, SlotInfo> {
        table.slots().map(|slot| (format!("{:032x}", slot.digest()), slot)).collect()
    };
    for turn in 1..=6 {
        let before = keys_now();
        round.store(turn, SeqCst);
        let marks: Vec<_> = writes.iter().map(|count| count.load(SeqCst)).collect();
        let found = read(&place.path, []);
        // Each writer has written something since.
        writes.iter().zip(marks).for_each(|(count, mark)| await_value(count, mark + 1));
        let by_text = read(&place.path, names.iter().map(String::as_str));
        let after = keys_now();

        let digest = |key: &Value| key["digest"].as_str().unwrap().to_owned();
        for key in found.iter().chain(&by_text) {
            let after = &after[&digest(key)];
            assert_eq!(key["key_hex"], hex(after.label_bytes()));
            assert_eq!((&key["key_length"], &key["offset"]), (&after.key_length().into(), &after.offset().into()));
            let (generation, updates) = (number(&key["generation"]), number(&key["updates"]));
            assert!(generation <= after.generation().get() && updates <= after.updates(), "{key} {after:?}");
            if let Some(before) = before.get(&digest(key)) {
                assert!(generation >= before.generation().get() && updates >= before.updates(), "{key} {before:?}");
            }
            assert!(number(&key["pending"]) <= 2, "{key}");
            assert_eq!((&key["waiting"], &key["retired"]), (&false.into(), &false.into()));
        }
        let found: HashMap<_, _> = found.iter().map(|key| (digest(key), key)).collect();
        assert!(before.keys().all(|digest| found.contains_key(digest)));
        assert_eq!(by_text.len() as u64, KEYS);
    }
    round.store(END, SeqCst);
    writers.into_iter().for_each(support::Child::succeeds);
    let all: Vec<_> = table.slots().map(|slot| slot.label().into_owned()).collect();
    assert!(all.len() as u64 > KEYS + 2 * NEW_KEYS, "few keys were made meanwhile: {}", all.len());
    assert_same(&place.path, all.iter().map(String::as_str));
}

#[test]
#[expect(clippy::host_endian_bytes, reason = "a generation word is in the machine's byte order")]
fn a_table_that_is_reset_and_its_successor_are_read() {
    let place = Place::empty();
    let table = Table::options().capacity(16).open(&place.path).unwrap();
    let keys = ["a", "b"];
    let generations = keys.map(|key| open_sync(&table, key).mark_updated().unwrap().get());
    // A claim that was given up: a digest without a record and a generation.
    let old = File::options().read(true).write(true).open(&place.path).unwrap();
    let word = |offset| {
        let mut word = [0; 8];
        old.read_exact_at(&mut word, offset).unwrap();
        u64::from_ne_bytes(word)
    };
    let free = (0..16).find(|slot| word(8192 + 8 * 16 + 16 * slot) == 0).unwrap();
    old.write_all_at(&[7; 16], 8192 + 8 * 16 + 16 * free).unwrap();
    assert_same(&place.path, keys);

    place.succeed(&["reset", "--yes"]);
    assert_same(&place.path, []);
    let successor = keys.map(|key| drop(open_sync(&table, key)));
    assert_eq!(successor.len(), assert_same(&place.path, keys).len());
    // It has no name any more.
    let old_path = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), old.as_raw_fd()));
    assert_eq!(word(8192 + 8 * free), 1 << 54, "the sweep retires a slot whose key has not begun");
    assert_eq!(read(&old_path, []).len(), 2);
    let found = read(&old_path, keys);
    for (key, generation) in found.iter().zip(generations) {
        assert_eq!((&key["retired"], number(&key["generation"])), (&true.into(), generation + 1));
    }
}

#[test]
fn a_table_that_is_renewed_after_a_reboot_is_read() {
    let place = Place::with_keys(["a", "b"]);
    (0..3).for_each(|_| _ = place.sync("a").mark_updated().unwrap());
    let before = assert_same(&place.path, ["a", "b"]);
    File::options().write(true).open(&place.path).unwrap().write_all_at(&[7; 16], 128).unwrap();
    drop(place.table());
    let after = assert_same(&place.path, ["a", "b"]);
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(before["updates"], after["updates"]);
        assert!(number(&before["generation"]) < number(&after["generation"]));
    }
}

#[test]
fn the_highest_generations_are_read() {
    let place = Place::with_keys([]);
    // The highest floor: keys start at random beyond it.
    let mut header = [0; 88];
    let file = File::options().read(true).write(true).open(&place.path).unwrap();
    file.read_exact_at(&mut header, 0).unwrap();
    header[72..80].copy_from_slice(&(1_u64 << 53).to_le_bytes());
    let checksum = Sha256::digest(&header[..80]);
    header[80..].copy_from_slice(&checksum[..8]);
    file.write_all_at(&header, 0).unwrap();
    let sync = place.sync("a");
    sync.mark_updated().unwrap();
    let _update = sync.begin_update().unwrap();
    let found = assert_same(&place.path, ["a"]);
    assert!(number(&found[0]["generation"]) > 1 << 53);
    assert_eq!((&found[0]["updates"], &found[0]["pending"]), (&1.into(), &1.into()));
}

#[test]
fn an_anonymous_table_is_read_through_its_descriptor() {
    let table = Table::options().capacity(16).anonymous().unwrap();
    let keys: Vec<_> = (0..100).map(|i| format!("key:{i}")).collect();
    keys.iter().for_each(|key| drop(open_sync(&table, key)));
    let descriptors = fs::read_dir(format!("/proc/{}/fd", std::process::id())).unwrap();
    let is_table =
        |path: &PathBuf| fs::read_link(path).is_ok_and(|link| link.to_string_lossy().starts_with("/memfd:gensync"));
    let path = descriptors.map(|entry| entry.unwrap().path()).find(is_table).unwrap();
    assert_same(&path, keys.iter().map(String::as_str));
}

#[test]
fn what_is_no_such_table_is_refused_in_a_line() {
    let place = Place::with_keys(["a"]);
    let whole = fs::read(&place.path).unwrap();
    let offset = number(&read(&place.path, ["a"])[0]["offset"]) as usize;
    let capacity = 1024;
    let record = 8192 + 24 * capacity + (offset - 8192);
    let assert_refused = |path: &Path, text: &str| {
        for keys in [None, Some("a")] {
            let said = run_reader(path, keys);
            assert_eq!((said.status, &*said.out, said.err.lines().count()), (2, "", 1), "{text}: {said:?}");
            assert!(said.err.starts_with(path.to_str().unwrap()) && said.err.contains(text), "{text}: {said:?}");
        }
    };
    assert_refused(place.folder.path(), "not a regular file");
    let path = place.folder.path().join("wrong");
    assert_refused(&path, "no such file");
    for (length, text) in [(0, "magic is b''"), (8, "shorter than 8192 bytes"), (4096, "shorter than 8192 bytes")] {
        fs::write(&path, &whole[..length]).unwrap();
        assert_refused(&path, text);
    }
    fs::write(&path, &whole[..12_288]).unwrap();
    assert_refused(&path, "the file has 12288 bytes, but should have");
    fs::write(&path, "text\n".repeat(2000)).unwrap();
    assert_refused(&path, "magic is");
    // The checksum is right unless it says otherwise.
    let changes: &[(usize, &[u8], &str)] = &[
        (8, &[1], "layout version is 1, not 2"),
        (8, &[3], "layout version is 3, not 2"),
        (12, &[3], "byte-order mark is 3"),
        (16, &[128], "bytes of a slot is 128, not 33"),
        (20, &[0, 16], "beginning of the segments is 4096"),
        (24, &[1, 4], "capacity is 1025"),
        (24, &[8, 0], "capacity is 8, not a power of two from 16"),
        (24, &[0, 8], "no room for 2048 slots"),
        (80, &[whole[80] ^ 1], "the checksum is"),
        (1024, &[4], "unknown kind 4"),
        (1029, &[255], "the file has"),
        (record, &[1], "has its record at"),
        (record, &[8; 4], "has its record at"),
    ];
    for (at, bytes, text) in changes {
        let mut content = whole.clone();
        content[*at..at + bytes.len()].copy_from_slice(bytes);
        if *at < 80 {
            let checksum = Sha256::digest(&content[..80]);
            content[80..88].copy_from_slice(&checksum[..8]);
        }
        fs::write(&path, content).unwrap();
        assert_refused(&path, text);
    }
}

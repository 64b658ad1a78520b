//! Guards against files that are no tables, damaged or out of reach.

#[path = "support/exercise.rs"]
mod exercise;
mod support;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use exercise::layout::{self, DIRECTORY, PAGE, directory_word, of_kind, place_of, put, word};
use exercise::{EVERYTHING, KEYS, exercise, options, replay, seal, telling};
use gensync::{CacheKey, Error, ErrorKind, GenerationSynchronizer, OwnerCheck, Table, WaitSet};
use nix::unistd::Uid;
use support::{in_child, next_random, path};

fn attach(table: &Table, key: &str) -> Result<GenerationSynchronizer, Error> {
    GenerationSynchronizer::new(table, key)
}

/// Opening fails, names the path, and leaves the bytes of the file as they are. Gives what the error says behind the path.
fn refusal(path: &Path) -> String {
    let before = fs::read(path).unwrap();
    let error = Table::open(path).unwrap_err();
    assert_eq!(error.path(), Some(path));
    let text = error.to_string().strip_prefix(&format!("{}: ", path.display())).unwrap().to_owned();
    let reader = Table::options().read_only(true).open(path).unwrap_err();
    assert_eq!(reader.kind(), error.kind(), "read-only, it is refused for another reason");
    assert!(fs::read(path).unwrap() == before, "a refused file was changed");
    text
}

/// A table's file, to be damaged a little and repaired again.
struct Patient {
    _folder: tempfile::TempDir,
    path: PathBuf,
    file: File,
    good: Vec<u8>,
}

impl Patient {
    /// Of one segment of `capacity` slots and one of texts, with the key "key".
    fn new(capacity: u64) -> Self {
        let (folder, path) = path();
        attach(&Table::options().capacity(capacity).open(&path).unwrap(), "key").unwrap();
        let (file, good) = (OpenOptions::new().write(true).open(&path).unwrap(), fs::read(&path).unwrap());
        Self { _folder: folder, path, file, good }
    }

    /// Writes `bytes` at `offset`, and corrects the checksum.
    fn write_sealed(&self, offset: usize, bytes: &[u8]) {
        let mut header = self.good[..4096].to_vec();
        header[offset..offset + bytes.len()].copy_from_slice(bytes);
        seal(&mut header);
        self.file.write_all_at(&header, 0).unwrap();
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        self.file.write_all_at(bytes, offset as u64).unwrap();
    }

    /// Puts a good file in the place of whatever is there.
    fn heal(&mut self) {
        fs::remove_file(&self.path).unwrap();
        fs::write(&self.path, &self.good).unwrap();
        self.file = OpenOptions::new().write(true).open(&self.path).unwrap();
    }
}

fn damaged(field: &str, found: u64, expected: &str) -> String {
    format!("damaged header: {field} is {found}, expected {expected}; stop its users and remove the file")
}

fn truncated(found: u64, expected: u64) -> String {
    format!("truncated table: {found} bytes, expected at least {expected}; stop its users and remove the file")
}

/// Numbers that may confuse the reader of a field: small ones, powers of two and their neighbours, and some that are like nothing.
fn numbers() -> impl Iterator<Item = u64> {
    let powers = (0..64).flat_map(|power| [(1_u64 << power) - 1, 1 << power, (1 << power) + 1]);
    let random = (0..200_u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31) ^ i.wrapping_pow(7));
    powers.chain(random).chain([3, 100, 127, 129, 4095, 4097, u64::MAX - 1, u64::MAX])
}

#[test]
fn what_is_no_table_is_named_and_left_alone() {
    let (_folder, path) = path();
    for (content, found) in [
        (&b""[..], "nothing (the file is empty)"),
        (b"x", "\"x\""),
        (b"gensync", "\"gensync\""),
        (b"#!/bin/sh\nexit 0\n", "\"#!/bin/s\""),
        (&[0; 8192], r#""\x00\x00\x00\x00\x00\x00\x00\x00""#),
        (&[0xff; 200_000], r#""\xff\xff\xff\xff\xff\xff\xff\xff""#),
    ] {
        fs::write(&path, content).unwrap();
        let expected = "expected the bytes \"gensync\\0\"; choose another path, or remove the file";
        assert_eq!(refusal(&path), format!("not a gensync table: it starts with {found}, {expected}"));
    }
    fs::write(&path, "gensync\0short").unwrap();
    assert_eq!(refusal(&path), truncated(13, 4096));
}

#[test]
fn each_byte_of_the_header_is_checked() {
    let patient = Patient::new(16);
    let good = &patient.good;
    // What a number of the fixed part says if the byte at `offset` is `value`.
    let number = |start: usize, length: usize, offset: usize, value: u8| {
        let mut bytes = [0; 8];
        bytes[..length].copy_from_slice(&good[start..start + length]);
        bytes[offset - start] = value;
        u64::from_le_bytes(bytes)
    };
    for offset in (0..88).chain(144..148).chain(DIRECTORY..DIRECTORY + 24) {
        for value in (0..=255).filter(|value| *value != good[offset]) {
            let word = |start, length| number(start, length, offset, value);
            let expected = match offset {
                0..8 => {
                    let start = word(0, 8).to_le_bytes();
                    let expected = "expected the bytes \"gensync\\0\"; choose another path, or remove the file";
                    format!("not a gensync table: it starts with \"{}\", {expected}", start.escape_ascii())
                }
                8..12 => {
                    let advice = match word(8, 4) {
                        1 => {
                            "an older version of gensync; give each version a path of its own, or replace the table: in a \
                             program by TableOptions::replace_older(true), from a shell by `gensync upgrade PATH`; then \
                             restart the processes of the older version, for which everything is expired and updates fail \
                             from then on"
                        }
                        _ => {
                            "another version of gensync; use the same version here, or stop its users and remove the file, or \
                             give each version a path of its own"
                        }
                    };
                    format!("layout version {}, expected 2: made by {advice}", word(8, 4))
                }
                12 if value == 2 => {
                    "byte-order mark 2, expected 1 (1 little-endian, 2 big-endian): made on another kind of \
                                     machine; remove the file"
                        .to_owned()
                }
                12..16 => damaged("byte-order mark", word(12, 4), "1 or 2"),
                16..80 => damaged("checksum of the header", number(80, 8, 80, good[80]), CHECKSUM),
                80..88 => damaged("checksum of the header", word(80, 8), CHECKSUM),
                // These retire the table: see below.
                144 if value == 2 || value == 3 => continue,
                144..148 => damaged("state", word(144, 4), "1, 2 or 3"),
                _ => {
                    let mut file = good.clone();
                    file[offset] = value;
                    let Some(expected) = directory_refusal(&file) else {
                        // The segment of texts is one of another kind, which takes as much.
                        assert!(offset == DIRECTORY + 8 && [1, 3].contains(&value), "byte {offset} is {value}");
                        patient.write(offset, &[value]);
                        let reader = Table::options().read_only(true).open(&patient.path).unwrap();
                        assert!(reader.generation("key").unwrap().is_some());
                        continue;
                    };
                    expected
                }
            };
            patient.write(offset, &[value]);
            assert_eq!(refusal(&patient.path), expected, "byte {offset} is {value}");
        }
        patient.write(offset, &good[offset..=offset]);
    }
    assert!(Table::open(&patient.path).unwrap().generation("key").unwrap().is_some());
}

const CHECKSUM: &str = "the one that its fields give";
/// What is wrong with the directory of a file, found as the specification says.
fn directory_refusal(file: &[u8]) -> Option<String> {
    let (mut end, mut slots) = (8192, 0);
    for found in (0..256).map(|index| word(file, DIRECTORY + 8 * index)).take_while(|word| *word != 0) {
        let (kind, pages) = (found & 0xff, found >> 8);
        let wrong = if !(1..=3).contains(&kind) {
            Some("a segment of slots, texts or participants: 1, 2 or 3 in its lowest byte")
        } else if pages == 0 || pages > ((8 << 30) - end) / 4096 {
            Some("segments of at least one page, that end within 8 GiB")
        } else if kind == 1 && pages != layout::pages_of_slots(layout::slots_of(word(file, 24) as usize, slots)) {
            Some("twice as many slots with each segment of slots, and as many pages as they take")
        } else {
            None
        };
        if let Some(expected) = wrong {
            return Some(damaged("directory", found, expected));
        }
        (end, slots) = (end + pages * 4096, slots + u32::from(kind == 1));
    }
    let size = file.len() as u64;
    match (slots, size < end) {
        (0, _) => Some(damaged("directory", 0, "at least one segment of slots")),
        (_, true) => Some(truncated(size, end)),
        _ => None,
    }
}

#[test]
fn each_field_is_checked_though_the_checksum_is_right() {
    let patient = Patient::new(16);
    let mut tried = 0;
    for found in numbers() {
        for (offset, length, good, field, expected) in
            [(16, 4, 33, "slot size", "33"), (20, 4, 8192, "beginning of the segments", "8192")]
        {
            let found = found & u64::from(u32::MAX);
            if found != good {
                patient.write_sealed(offset, &found.to_le_bytes()[..length]);
                assert_eq!(refusal(&patient.path), damaged(field, found, expected));
                tried += 1;
            }
        }
        if found > 1 << 53 {
            patient.write_sealed(72, &found.to_le_bytes());
            assert_eq!(refusal(&patient.path), damaged("floor", found, "at most 9007199254740992"));
            tried += 1;
        }
        let expected = match found {
            // All fill a page at most.
            16 | 32 | 64 => continue,
            _ if found.is_power_of_two() && (16..=1 << 25).contains(&found) => {
                let expected = "twice as many slots with each segment of slots, and as many pages as they take";
                damaged("directory", directory_word(1, 1), expected)
            }
            _ => damaged("capacity", found, "a power of two, at least 16 and at most 33554432"),
        };
        patient.write_sealed(24, &found.to_le_bytes());
        assert_eq!(refusal(&patient.path), expected);
        tried += 1;
    }
    assert!(tried > 1400, "only {tried} values were tried");
}

#[test]
fn what_is_only_a_number_to_gensync_may_be_any_number() {
    let mut patient = Patient::new(16);
    // Salt, incarnation and creation time; and the floor, as far as there is time left above it.
    let numbers = [0, 1, 1 << 40, 1 << 53, u64::MAX / 2, u64::MAX];
    let places = [32, 40, 48, 56, 64, 72];
    for (offset, number) in places.into_iter().flat_map(|offset| numbers.map(|number| (offset, number))) {
        if offset == 72 && number > 1 << 53 {
            continue;
        }
        patient.write_sealed(offset, &number.to_le_bytes());
        let table = Table::open(&patient.path).unwrap();
        for round in 0..2 {
            let (new, other) = (attach(&table, &format!("new {round}")).unwrap(), attach(&table, "key").unwrap());
            let before = new.sync_gen().unwrap();
            assert!(offset != 72 || before.get() >= number, "a key begins below the floor");
            assert!(new.mark_updated().unwrap() > before && other.mark_updated().is_ok());
            assert!(!new.is_expired());
            table.reset().unwrap();
            assert!(new.is_expired() && new.refresh().is_ok() && !new.is_expired());
            assert!(offset != 72 || number == 1 << 53 || new.sync_gen().unwrap().get() > before.get() + 1);
        }
        drop(table);
        patient.heal();
    }
}

#[test]
fn bytes_of_the_header_that_are_no_field_are_left_alone() {
    let patient = Patient::new(16);
    // The lease is reserved. Behind the directory's first words, words of zero end it.
    let padding = [88..128, 148..256, 260..DIRECTORY, DIRECTORY + 2048..4096];
    for offset in padding.iter().cloned().flatten() {
        patient.write(offset, &[offset as u8 | 1]);
    }
    // As well as what is between two wake words, and behind the lanes of a segment.
    let [slots, ..] = of_kind(&patient.good, 1)[..] else { panic!("no slots") };
    let behind = [4100..4160, slots.start + 33 * slots.slots..slots.start + slots.bytes];
    for range in &behind {
        patient.write(range.start, &vec![0xff; range.len()]);
    }
    let before = fs::read(&patient.path).unwrap();
    let reader = Table::options().read_only(true).open(&patient.path).unwrap();
    assert!(reader.generation("key").unwrap().is_some() && fs::read(&patient.path).unwrap() == before);
    let table = Table::open(&patient.path).unwrap();
    let syncs: Vec<_> = (0..200).map(|i| attach(&table, &format!("{i}")).unwrap()).collect();
    for sync in &syncs {
        sync.mark_updated().unwrap();
        sync.update(|| Ok::<_, ()>(())).unwrap();
    }
    let after = fs::read(&patient.path).unwrap();
    assert!(after.len() > before.len(), "the table has grown");
    for range in padding.into_iter().chain(behind) {
        assert!(after[range.clone()] == before[range], "what is no field was written to");
    }
}

#[test]
fn the_words_that_change_may_say_anything() {
    let mut patient = Patient::new(16);
    let present = |patient: &Patient| Table::open(&patient.path).unwrap().generation("key").unwrap();
    let before = present(&patient).unwrap();
    for number in numbers() {
        let word = number as u32;
        patient.write(144, &word.to_le_bytes());
        match word {
            1 => assert_eq!(present(&patient), Some(before)),
            2 | 3 => {
                let error = Table::options().read_only(true).open(&patient.path).unwrap_err();
                assert_eq!(*error.kind(), ErrorKind::Retired);
                assert!(present(&patient).is_none(), "a retired table has no successor");
                patient.heal();
            }
            _ => assert_eq!(refusal(&patient.path), damaged("state", word.into(), "1, 2 or 3")),
        }
        patient.write(144, &1_u32.to_le_bytes());
    }
    // In a process of its own, as no other process may have the table open, children of other tests included.
    in_child(|| {
        for boot in numbers().step_by(20) {
            let before = present(&patient);
            patient.write(128 + 8 * (boot % 2) as usize, &boot.to_le_bytes());
            assert!(present(&patient) > before, "another boot's table was not renewed");
        }
    })
    .succeeds();
    let (table, key) = (Table::open(&patient.path).unwrap(), slot_of(&patient.good));
    let syncs = [attach(&table, "key").unwrap(), attach(&table, "other").unwrap()];
    for number in [0, 1, 2, u32::MAX - 1, u32::MAX] {
        patient.write(256, &number.to_le_bytes());
        patient.write(4096 + 64 * (key / 8 % 64), &number.to_le_bytes());
        thread::scope(|scope| {
            let one = scope.spawn(|| syncs[0].wait());
            let set = scope.spawn(|| syncs.iter().collect::<WaitSet<'_>>().wait());
            while table.slots().filter(|slot| slot.is_awaited()).count() < 2 {
                thread::yield_now();
            }
            attach(&table, "key").unwrap().mark_updated().unwrap();
            one.join().unwrap();
            assert_eq!(set.join().unwrap(), [0]);
        });
        syncs[0].refresh().unwrap();
    }
}

/// Where the generation word of the one key stands.
fn slot_of(file: &[u8]) -> usize {
    place_of(file, "key").unwrap().generation
}

#[test]
fn a_number_that_is_no_generation_is_reported_and_repaired_by_a_reset() {
    let mut patient = Patient::new(16);
    let offset = slot_of(&patient.good);
    let good = u64::from_le_bytes(patient.good[offset..offset + 8].try_into().unwrap());
    let (generation, retired, waiting, pending) = ((1 << 54) - 1, 1 << 54, 1 << 55, 0xff << 56);
    for word in
        [1, (1 << 40) - 100, (1 << 54) - 1, good | retired, retired | 5, good | retired | waiting, u64::MAX - 100]
            .into_iter()
            .flat_map(|word| [word, word | waiting, word | pending])
    {
        let table = options().open(&patient.path).unwrap();
        let (sync, reader) = (attach(&table, "key").unwrap(), options().read_only(true).open(&patient.path).unwrap());
        let (watching, pollable) = (attach(&reader, "key").unwrap(), sync.pollable().unwrap());
        patient.write(offset, &word.to_le_bytes());
        for error in [
            attach(&table, "key").map(drop),
            table.generation("key").map(drop),
            reader.generation("key").map(drop),
            sync.refresh().map(drop),
            watching.refresh().map(drop),
            sync.begin_update().map(drop),
        ]
        .map(Result::unwrap_err)
        {
            assert!(matches!(error.kind(), ErrorKind::DamagedKey { .. }), "{word:#x}: {error}");
            let text = error.to_string();
            let beginning = format!("{}: key \"key\": damaged key: its generation word is 0x", patient.path.display());
            let found = text.strip_prefix(&beginning).unwrap_or_else(|| panic!("{text}"));
            assert!(found.ends_with(", which is none of a live table; reset the table"), "{text}");
            // The key may have got a waiter meanwhile, which is woken.
            let found = u64::from_str_radix(&found[..16], 16).unwrap();
            assert_eq!(found & (retired | pending), word & (retired | pending), "{text}");
            assert!((found & generation).wrapping_sub(word & generation) < 10, "{text}");
        }
        assert!(sync.is_expired() && watching.is_expired());
        assert!(sync.wait_timeout(Duration::ZERO).is_changed() || sync.is_expired());
        assert!(matches!(sync.mark_updated().unwrap_err().kind(), ErrorKind::DamagedKey { .. }));
        table.reset().unwrap();
        sync.refresh().unwrap();
        assert!(!sync.is_expired() && sync.mark_updated().is_ok());
        drop(pollable);
        patient.heal();
    }
}

#[test]
fn bits_without_a_generation_are_reported_and_repaired_by_a_reset() {
    let mut patient = Patient::new(16);
    let offset = slot_of(&patient.good);
    for word in [1_u64 << 55, 1 << 56, 1 << 54, 3 << 55, 0xff << 56] {
        let (table, reader) =
            (options().open(&patient.path).unwrap(), options().read_only(true).open(&patient.path).unwrap());
        let sync = attach(&table, "key").unwrap();
        let again = || attach(&table, "key").map(drop);
        let attempts: [&dyn Fn() -> Result<(), Error>; 4] =
            [&again, &|| sync.refresh().map(drop), &|| sync.mark_updated().map(drop), &|| {
                sync.begin_update().map(drop)
            }];
        for attempt in attempts {
            patient.write(offset, &word.to_le_bytes());
            let error = attempt().unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::DamagedKey { .. }), "{word:#x}: {error}");
            assert!(sync.is_expired() && sync.wait_timeout(Duration::ZERO).is_changed());
        }
        patient.write(offset, &word.to_le_bytes());
        // It looks as if it had not begun yet.
        for table in [&table, &reader] {
            assert_eq!((table.generation("key").unwrap(), table.slot("key").unwrap()), (None, None));
            assert_eq!((table.slots().count(), table.stats().keys), (0, 1));
        }
        table.reset().unwrap();
        sync.refresh().unwrap();
        assert!(!sync.is_expired() && sync.mark_updated().is_ok());
        drop((table, reader, sync));
        patient.heal();
    }
}

#[test]
fn a_generation_that_was_forged_to_be_the_last_ones_counts_no_further_than_there_are() {
    let patient = Patient::new(16);
    let table = Table::open(&patient.path).unwrap();
    let sync = attach(&table, "key").unwrap();
    for left in 1..20_u64 {
        patient.write(slot_of(&patient.good), &((1 << 54) - 1 - left).to_le_bytes());
        let counted: Vec<_> = std::iter::from_fn(|| sync.mark_updated().ok()).take(100).collect();
        assert_eq!(counted.len() as u64, left);
        assert!(counted.iter().all(|generation| generation.get() < 1 << 54), "{counted:?}");
        assert!(sync.is_expired() && matches!(sync.refresh().unwrap_err().kind(), ErrorKind::DamagedKey { .. }));
    }
    table.reset().unwrap();
    assert!(sync.is_expired() && sync.refresh().is_ok() && sync.mark_updated().is_ok());
    assert!(!sync.is_expired());
}

#[test]
fn a_truncated_table_is_refused_at_every_length() {
    let (_folder, path) = path();
    let table = Table::options().capacity(16).open(&path).unwrap();
    (0..100).for_each(|i| drop(attach(&table, &format!("{i}")).unwrap()));
    assert!(table.stats().segments > 2);
    drop(table);
    let full = fs::metadata(&path).unwrap().len();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    // All lengths in the fixed header, and some about each page and each word of the directory, and between.
    let is_tried = |length: &u64| *length < 150 || (length + 2) % 4096 < 4 || length.is_multiple_of(61);
    for length in (0..full).rev().filter(is_tried) {
        file.set_len(length).unwrap();
        let text = refusal(&path);
        match length {
            0..8 => assert!(text.starts_with("not a gensync table: it starts with "), "{length}: {text}"),
            8..4096 => assert_eq!(text, truncated(length, 4096)),
            _ => assert_eq!(text, truncated(length, full)),
        }
    }
}

#[test]
fn a_table_that_is_longer_than_its_segments_is_as_good_and_grows_over_what_is_there() {
    for (extra, length) in [(0, 16_385), (16, 0), (100, 0), (4096, 0), (300_000, 0), (16, 1 << 40)] {
        let mut patient = Patient::new(16);
        patient.write(patient.good.len(), &vec![0xa5; extra]);
        if length > 0 {
            patient.file.set_len(length).unwrap();
        }
        let table = Table::open(&patient.path).unwrap();
        assert_eq!((table.stats().segments, table.stats().keys), (1, 1));
        let mut syncs = Vec::new();
        let mut refused = 0;
        for key in (0..200).map(|i| i.to_string()) {
            match attach(&table, &key) {
                Ok(sync) => syncs.push(sync),
                // Where a slot is, there may be something that is no generation.
                Err(error) => {
                    assert!(matches!(error.kind(), ErrorKind::DamagedKey { .. }), "{error}");
                    refused += 1;
                }
            }
        }
        for sync in &syncs {
            attach(&table, sync.cache_key().as_str()).unwrap().mark_updated().unwrap();
            assert!(sync.is_expired());
        }
        // And what is taken for a generation is one.
        let (damaged, sound): (Vec<_>, Vec<_>) = table.slots().partition(gensync::SlotInfo::is_damaged);
        assert!(refused <= damaged.len() && damaged.len() <= extra.div_ceil(8), "{refused} refused, and {damaged:?}");
        let missing = (0..200).filter(|i| !sound.iter().any(|slot| slot.label() == i.to_string())).count();
        assert!(missing <= damaged.len(), "{missing} are missing");
        table.reset().unwrap();
        assert!(syncs.iter().all(GenerationSynchronizer::is_expired));
        patient.heal();
    }
}

#[test]
fn what_is_no_regular_file_is_refused() {
    let (folder, path) = path();
    let target = folder.path().join("target");
    Table::open(&target).unwrap();
    symlink(&target, &path).unwrap();
    symlink("nowhere", folder.path().join("dangling")).unwrap();
    symlink("loop", folder.path().join("loop")).unwrap();
    for name in ["table.gensync", "dangling", "loop"] {
        for options in [Table::options(), Table::options().read_only(true)] {
            let error = options.open(folder.path().join(name)).unwrap_err();
            assert_eq!(*error.kind(), ErrorKind::Symlink);
            assert!(error.to_string().ends_with("is a symbolic link, expected a regular file; name the link's target"));
        }
    }
    assert!(!folder.path().join("nowhere").exists());
    let fifo = folder.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let socket = folder.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for (path, found) in [
        (folder.path(), "a folder"),
        (&fifo, "a named pipe"),
        (&socket, "a socket"),
        (Path::new("/dev/null"), "a device"),
    ] {
        for options in [Table::options(), Table::options().read_only(true)] {
            let error = options.open(path).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::NotARegularFile { found: f, .. } if *f == found), "{error}");
            assert!(error.to_string().ends_with(&format!("is {found}, expected a regular file; choose another path")));
        }
    }
}

#[test]
fn links_among_the_folders_are_followed() {
    let (folder, _) = path();
    fs::create_dir(folder.path().join("real")).unwrap();
    for (target, name) in [("real", "link"), ("nowhere", "dangling"), ("loop", "loop")] {
        symlink(target, folder.path().join(name)).unwrap();
    }
    let sync = attach(&Table::open(folder.path().join("real/table")).unwrap(), "key").unwrap();
    let other = attach(&Table::open(folder.path().join("link/table")).unwrap(), "key").unwrap();
    other.mark_updated().unwrap();
    assert!(sync.is_expired(), "it is another table");
    // A reset through one path is seen through the other.
    other.table().reset().unwrap();
    assert_eq!(sync.refresh().unwrap(), other.refresh().unwrap());
    let dangling = folder.path().join("dangling");
    let error = Table::open(dangling.join("table")).unwrap_err();
    assert_eq!((error.kind(), error.missing_folder()), (&ErrorKind::NotFound, Some(&*dangling)));
    assert!(error.to_string().contains("is a symbolic link that leads to no folder"), "{error}");
    assert!(!folder.path().join("nowhere").exists());
    let error = Table::open(folder.path().join("loop/table")).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::InvalidInput { .. }), "{error}");
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("Too many levels of symbolic links"));
}

#[test]
fn a_table_with_two_names_is_one_until_a_reset() {
    let (folder, path) = path();
    let sync = attach(&Table::open(&path).unwrap(), "key").unwrap();
    let name = folder.path().join("second name");
    fs::hard_link(&path, &name).unwrap();
    let other = attach(&Table::open(&name).unwrap(), "key").unwrap();
    other.mark_updated().unwrap();
    assert!(sync.is_expired());
    sync.refresh().unwrap();
    other.refresh().unwrap();
    sync.table().reset().unwrap();
    assert!(sync.is_expired() && other.is_expired());
    sync.refresh().unwrap();
    other.refresh().unwrap();
    let inode = |path: &Path| fs::metadata(path).unwrap().ino();
    assert_ne!(inode(&path), inode(&name), "each name has a table of its own now");
    assert!(!sync.is_expired() && !other.is_expired());
    sync.mark_updated().unwrap();
    assert!(!other.is_expired());
}

#[test]
fn a_missing_table_or_folder_is_reported() {
    let (folder, path) = path();
    assert_eq!(*Table::options().create(false).open(&path).unwrap_err().kind(), ErrorKind::NotFound);
    assert!(!path.exists());
    let error = Table::open(folder.path().join("no/such/folder")).unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::NotFound);
    assert_eq!(error.missing_folder(), Some(&*folder.path().join("no")));
}

#[test]
fn owners_and_permissions_are_checked() {
    if !Uid::effective().is_root() {
        eprintln!("not root: owners cannot be changed");
        return;
    }
    let (folder, path) = path();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    Table::options().mode(0o666).open(&path).unwrap();
    std::os::unix::fs::chown(&path, Some(12_345), None).unwrap();
    let error = Table::open(&path).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::WrongOwner { found: 12_345, .. }), "{error}");
    Table::options().owner(OwnerCheck::User(12_345)).open(&path).unwrap();
    let table = Table::options().owner(OwnerCheck::Anyone).open(&path).unwrap();
    // A reset keeps the owner, or fails before anything has changed.
    table.reset().unwrap();
    assert!(Table::options().owner(OwnerCheck::User(12_345)).open(&path).is_ok());
    let sync = attach(&table, "key").unwrap();
    in_child(|| {
        nix::unistd::setuid(Uid::from_raw(54_321)).unwrap();
        assert!(matches!(table.reset().unwrap_err().kind(), ErrorKind::Permission));
        assert!(!sync.is_expired(), "a reset that failed has changed something");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap_err();
    })
    .succeeds();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    in_child(|| {
        nix::unistd::setuid(Uid::from_raw(54_321)).unwrap();
        let error = Table::options().owner(OwnerCheck::Anyone).open(&path).unwrap_err();
        assert_eq!((error.kind(), error.path()), (&ErrorKind::Permission, Some(&*path)));
    })
    .succeeds();
}

/// A table that has grown, whose keys are "0", "1" and so on.
fn grown() -> (tempfile::TempDir, PathBuf, Vec<u8>) {
    let (folder, path) = path();
    let table = Table::options().capacity(16).open(&path).unwrap();
    (0..40).for_each(|i| drop(attach(&table, &format!("{i}")).unwrap()));
    GenerationSynchronizer::new(&table, CacheKey::raw("long".repeat(1200))).unwrap();
    let file = fs::read(&path).unwrap();
    assert!(of_kind(&file, 1).len() > 2 && of_kind(&file, 2).len() > 1);
    (folder, path, file)
}

/// Runs `work` in a child that must end by itself, and well, in time.
fn ends_well(what: &str, work: impl FnOnce()) {
    let child = in_child(|| {
        // The signal ends the process.
        nix::unistd::alarm::set(60);
        eprintln_on_panic(what, work);
    });
    child.succeeds();
}

fn eprintln_on_panic(what: &str, work: impl FnOnce()) {
    if let Err(panic) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)) {
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), "in a child: {what}");
        std::panic::resume_unwind(panic);
    }
}

/// Words that a directory may have at `index`, whose own is `own`: those that describe something, and numbers.
fn directory_words(own: u64) -> impl Iterator<Item = u64> {
    let pages = [0, 1, 2, 3, 7, 8, 16, 1 << 20, (8 << 30) / 4096 - 2, (8 << 30) / 4096, 1 << 52, u64::MAX >> 8];
    let described = (0..6).flat_map(move |kind| pages.map(|pages| directory_word(kind, pages)));
    described.chain(numbers().step_by(7)).filter(move |word| *word != own)
}

#[test]
fn each_word_of_the_directory_may_be_anything_when_a_table_is_opened() {
    let (_folder, path, good) = grown();
    let words = layout::segments(&good).len();
    let (mut refused, mut opened) = (0, 0);
    for index in (0..words + 2).chain([255]) {
        let offset = DIRECTORY + 8 * index;
        for found in directory_words(word(&good, offset)) {
            let mut file = good.clone();
            put(&mut file, offset, found);
            // A table whose words the others of the test have not yet filled: nothing is shared with the last round.
            fs::remove_file(&path).unwrap();
            fs::write(&path, &file).unwrap();
            if let Some(expected) = directory_refusal(&file) {
                assert_eq!(refusal(&path), expected, "word {index} is {found:#x}");
                refused += 1;
                continue;
            }
            opened += 1;
            if opened % 3 == 0 {
                ends_well(&format!("word {index} is {found:#x}"), || {
                    exercise(&options().open(&path).unwrap(), &mut || ());
                });
            } else {
                let table = options().read_only(true).open(&path).unwrap();
                let _ = (table.slots().count(), table.stats(), table.generation("0").unwrap());
            }
        }
    }
    assert!(refused > 300 && opened > 30, "{refused} were refused, and {opened} opened");
}

#[test]
fn a_directory_that_is_full_is_an_error_for_what_needs_room_and_a_reset_cures_it() {
    for (kind, pages) in [(2, 1), (3, 1), (2, 3)] {
        let patient = Patient::new(16);
        let mut file = patient.good.clone();
        (2..256).for_each(|index| put(&mut file, DIRECTORY + 8 * index, directory_word(kind, pages)));
        file.resize(file.len() + 254 * pages as usize * PAGE, 0);
        patient.write(0, &file);
        let table = Table::open(&patient.path).unwrap();
        let mut syncs = Vec::new();
        let error = (0..).find_map(|i| attach(&table, &format!("{i}")).map(|sync| syncs.push(sync)).err()).unwrap();
        assert!(matches!(error.kind(), ErrorKind::TableFull { .. }) && error.path() == Some(&*patient.path), "{error}");
        assert!(error.to_string().contains("it has 256 segments"), "{error}");
        assert_eq!(syncs.len(), 15, "the first segment is full with \"key\"");
        for sync in &syncs {
            sync.mark_updated().unwrap();
            sync.refresh().unwrap();
        }
        assert_eq!((table.slots().count(), table.stats().segments), (16, 1));
        table.reset().unwrap();
        assert!(syncs.iter().all(GenerationSynchronizer::is_expired));
        (0..100).for_each(|i| drop(attach(&table, &format!("{i}")).unwrap()));
    }
}

#[test]
fn words_behind_the_directorys_end_are_an_error_only_when_the_table_grows_up_to_them() {
    let (_folder, path, mut file) = grown();
    let end = layout::segments(&file).len();
    for (found, is_segment) in [(u64::MAX, false), (directory_word(7, 1), false), (directory_word(3, 1), true)] {
        put(&mut file, DIRECTORY + 8 * (end + 1), found);
        fs::remove_file(&path).unwrap();
        fs::write(&path, &file).unwrap();
        let table = Table::open(&path).unwrap();
        let sync = attach(&table, "0").unwrap();
        let grow = || (0..300).try_for_each(|i| attach(&table, &format!("new {i}")).map(drop));
        let first = grow();
        if is_segment {
            // There is no room for it in the file; as soon as there is, it is a segment, and passed over.
            assert!(matches!(first.unwrap_err().kind(), ErrorKind::Truncated { .. }));
            OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 20).unwrap();
            grow().unwrap();
        } else {
            let length = fs::metadata(&path).unwrap().len();
            for error in [first, grow(), attach(&table, "0").map(drop)] {
                let error = error.unwrap_err();
                assert!(matches!(error.kind(), ErrorKind::Damaged { field: "directory", .. }), "{error}");
                assert_eq!(error.path(), Some(&*path));
            }
            assert_eq!(fs::metadata(&path).unwrap().len(), length, "a call that fails again takes more room");
        }
        // What this process has found before serves it as ever.
        sync.mark_updated().unwrap();
        assert!(!sync.is_expired());
        let labels: Vec<_> = table.slots().map(|slot| slot.label().into_owned()).collect();
        assert!((0..40).all(|i| labels.contains(&i.to_string())), "{labels:?}");
        assert!(table.slots().all(|slot| !slot.is_damaged()));
    }
}

#[test]
fn words_of_the_directory_that_change_under_a_process_change_nothing_that_it_has() {
    let (_folder, path, good) = grown();
    let end = layout::segments(&good).len();
    for index in 0..end + 2 {
        let offset = DIRECTORY + 8 * index;
        let own = word(&good, offset);
        for (round, found) in directory_words(own).step_by(3).chain([0]).enumerate() {
            fs::remove_file(&path).unwrap();
            fs::write(&path, &good).unwrap();
            ends_well(&format!("word {index} becomes {found:#x}"), || {
                let (table, reader) = (options().open(&path).unwrap(), options().read_only(true).open(&path).unwrap());
                let syncs: Vec<_> = (0..40).map(|i| attach(&table, &format!("{i}")).unwrap()).collect();
                let file = OpenOptions::new().write(true).open(&path).unwrap();
                file.write_all_at(&found.to_le_bytes(), offset as u64).unwrap();
                let works = || {
                    for (i, sync) in syncs.iter().enumerate() {
                        sync.mark_updated().unwrap();
                        sync.refresh().unwrap();
                        sync.update(|| Ok::<_, ()>(i)).unwrap();
                        assert!(!sync.is_expired());
                    }
                    for table in [&table, &reader] {
                        let slots: Vec<_> = table.slots().collect();
                        assert!((0..40).all(|i| slots.iter().any(|slot| slot.label() == i.to_string())));
                        assert!(slots.iter().all(|slot| !slot.is_damaged()));
                        let _ = table.stats();
                    }
                };
                works();
                for key in ["0", "other"] {
                    let outcomes = [attach(&table, key).map(drop), attach(&reader, key).map(drop)];
                    for error in outcomes.into_iter().filter_map(Result::err) {
                        assert_eq!((error.path(), error.key()), (Some(&*path), Some(key)), "{error}");
                    }
                }
                let _ = (table.clear_matching(|_| true), table.watch().next_timeout(Duration::ZERO));
                // And back again, or on to what may follow: the process goes on with what it took the word for first.
                let next = [own, directory_word(2, 2), directory_word(3, 1)][round % 3];
                file.write_all_at(&next.to_le_bytes(), offset as u64).unwrap();
                file.set_len(good.len() as u64 + (1 << 20)).unwrap();
                works();
                let _ = (0..100).try_for_each(|i| attach(&table, &format!("new {i}")).map(drop));
                works();
                let _ = table.reset();
            });
        }
    }
}

#[test]
fn a_segment_that_becomes_another_one_while_a_later_word_is_wrong_stays_what_it_was() {
    // The first word is of a segment that can be mapped, and the second of none: so the process has mapped the first, but counts
    // it only when the second is gone.
    let (_folder, path, mut file) = grown();
    let end = layout::segments(&file).len();
    let slots = layout::slots_of(16, of_kind(&file, 1).len() as u32);
    file.resize(file.len() + 64 * PAGE, 0);
    fs::write(&path, &file).unwrap();
    let kinds = [directory_word(1, layout::pages_of_slots(slots)), directory_word(2, 3), directory_word(3, 1)];
    for (first, then) in kinds.into_iter().flat_map(|first| kinds.map(|then| (first, then))) {
        fs::remove_file(&path).unwrap();
        fs::write(&path, &file).unwrap();
        let table = Table::open(&path).unwrap();
        let write = |index: usize, word: u64| {
            let file = OpenOptions::new().write(true).open(&path).unwrap();
            file.write_all_at(&word.to_le_bytes(), (DIRECTORY + 8 * (end + index)) as u64).unwrap();
        };
        write(1, u64::MAX);
        write(0, first);
        assert!(matches!(attach(&table, "0").unwrap_err().kind(), ErrorKind::Damaged { field: "directory", .. }));
        write(0, then);
        write(1, 0);
        (0..200).for_each(|i| drop(attach(&table, &format!("new {i}")).unwrap()));
        assert_eq!(table.slots().filter(|slot| !slot.is_damaged()).count(), 241);
        let stats = table.stats();
        assert!(stats.keys <= stats.capacity && stats.lost_bytes == 0, "{stats:?}");
    }
}

/// Record words that lead nowhere in the table that [`grown`] makes.
fn wrong_records(file: &[u8]) -> Vec<u64> {
    let at = |offset: u64, length: u64| offset | length << 34;
    let (slots, texts) = (of_kind(file, 1), of_kind(file, 2));
    let (slots, first, last) = (slots[0], texts[0], texts[1]);
    let end = |segment: layout::Segment| (segment.start + segment.bytes) as u64;
    let size = file.len() as u64;
    vec![
        1,
        at(0, 1),
        at(4096, 3),
        at(DIRECTORY as u64, 3),
        at(slots.start as u64, 8),
        at(slots.start as u64 + 8, 8),
        // In the count, and before the first record.
        at(first.start as u64, 1),
        at(first.start as u64 + 56, 1),
        // No multiple of a word.
        at(first.start as u64 + 65, 1),
        at(first.start as u64 + 68, 9),
        // From the last words of a segment into the next one, which may have texts itself, and beyond the file.
        at(end(first) - 8, 1),
        at(end(first) - 16, 9),
        at(end(last) - 8, 1),
        at(end(first) - 65_536.min(first.bytes as u64 - 64), 65_536),
        at(end(last) - 64, (1 << 30) - 1),
        at(first.start as u64 + 64, (1 << 30) - 1),
        at(size, 1),
        at(size - 8, 1),
        at((1 << 34) - 8, 5),
        (1 << 34) - 1,
        u64::MAX,
        at(0, (1 << 30) - 1),
    ]
}

#[test]
fn a_record_that_leads_nowhere_is_reported_and_repaired_by_a_reset() {
    let (_folder, path, good) = grown();
    let place = place_of(&good, "7").unwrap();
    for found in wrong_records(&good) {
        let mut file = good.clone();
        put(&mut file, place.record, found);
        fs::remove_file(&path).unwrap();
        fs::write(&path, &file).unwrap();
        // The key has a generation, so it works, though its text is gone.
        let (table, reader) = (options().open(&path).unwrap(), options().read_only(true).open(&path).unwrap());
        for table in [&table, &reader] {
            let slot = table.slot("7").unwrap().unwrap();
            let shown = (slot.label().into_owned(), slot.updates(), slot.key_length(), slot.is_damaged());
            assert_eq!(shown, (String::new(), 0, 0, true), "{found:#x}");
            assert_eq!(table.slots().filter(gensync::SlotInfo::is_damaged).count(), 1);
        }
        let (sync, other) = (attach(&table, "7").unwrap(), attach(&table, "7").unwrap());
        sync.mark_updated().unwrap();
        assert!(other.is_expired() && !sync.is_expired());
        assert_eq!(table.clear_matching(|slot| slot.label().is_empty()).unwrap().len(), 1);
        let stats = table.stats();
        assert!(stats.lost_bytes <= stats.text_bytes && stats.text_bytes <= stats.bytes, "{stats:?}");
        // Another process of another boot would move it on.
        table.reset().unwrap();
        assert!(sync.is_expired() && sync.refresh().is_ok() && !sync.is_expired());
        assert!(!table.slot("7").unwrap().unwrap().is_damaged());
        drop((table, reader, sync, other));

        // A key that was not complete cannot begin.
        put(&mut file, place.generation, 0);
        fs::remove_file(&path).unwrap();
        fs::write(&path, &file).unwrap();
        let table = options().open(&path).unwrap();
        for _ in 0..3 {
            let error = attach(&table, "7").unwrap_err();
            assert_eq!((error.path(), error.key()), (Some(&*path), Some("7")));
            assert!(matches!(error.kind(), ErrorKind::DamagedRecord { .. }), "{error}");
            let expected =
                format!("its record word is {found:#018x}, which leads to no text of a key; reset the table");
            assert!(error.to_string().ends_with(&expected), "{error}");
        }
        assert_eq!((table.generation("7").unwrap(), table.slot("7").unwrap()), (None, None));
        assert!(attach(&table, "8").is_ok() && attach(&table, "new").is_ok());
        table.reset().unwrap();
        attach(&table, "7").unwrap().mark_updated().unwrap();
    }
}

#[test]
fn a_record_that_is_another_one_or_a_part_of_one_gives_a_text_and_no_more() {
    let (_folder, path, good) = grown();
    let [seven, eight] = ["7", "8"].map(|key| place_of(&good, key).unwrap());
    let others = word(&good, eight.record);
    for found in [others, others + 8, others & !(u64::MAX << 34), others | (u64::MAX << 44), others ^ (1 << 34)] {
        for generation in [word(&good, seven.generation), 0] {
            let mut file = good.clone();
            put(&mut file, seven.record, found);
            put(&mut file, seven.generation, generation);
            fs::remove_file(&path).unwrap();
            fs::write(&path, &file).unwrap();
            ends_well(&format!("record {found:#x}"), || {
                let table = options().open(&path).unwrap();
                assert!(table.slots().all(|slot| slot.label_bytes().len() <= 65_536));
                if let Ok(sync) = attach(&table, "7") {
                    let _ = sync.mark_updated();
                }
                table.reset().unwrap();
                attach(&table, "7").unwrap().mark_updated().unwrap();
            });
        }
    }
}

#[test]
fn a_count_of_texts_may_be_any_number() {
    let (_folder, path, good) = grown();
    let texts = of_kind(&good, 2);
    for number in numbers().chain([4033, 4032, 4024, 4031, 8128, 8136, 1 << 34]) {
        let mut file = good.clone();
        texts.iter().for_each(|texts| put(&mut file, texts.start, number));
        fs::remove_file(&path).unwrap();
        fs::write(&path, &file).unwrap();
        let table = options().open(&path).unwrap();
        let stats = table.stats();
        assert!(stats.text_bytes <= stats.bytes && stats.lost_bytes <= stats.text_bytes, "{stats:?}");
        let new: Vec<_> = (0..30).map(|i| attach(&table, &format!("new {i}")).unwrap()).collect();
        GenerationSynchronizer::new(&table, CacheKey::raw("other".repeat(2000))).unwrap();
        new.iter().for_each(|sync| _ = sync.mark_updated().unwrap());
        let after = table.stats();
        assert!(after.bytes < stats.bytes + 40_000, "{stats:?}, then {after:?}");
        if !(number.is_multiple_of(8) && number < 4096) {
            // Nothing was written over what there was.
            let damaged: Vec<_> = table.slots().filter(gensync::SlotInfo::is_damaged).collect();
            assert!(damaged.is_empty(), "{number}: {damaged:?}");
        }
        table.reset().unwrap();
        assert!(new.iter().all(GenerationSynchronizer::is_expired) && table.stats().lost_bytes == 0);
    }
}

#[test]
fn a_count_of_texts_that_is_set_back_while_processes_write_harms_no_key_but_its_text() {
    let (_folder, path, good) = grown();
    let last = of_kind(&good, 2)[1].start as u64;
    let children: Vec<_> = (0..3)
        .map(|child| {
            let path = &path;
            in_child(move || {
                nix::unistd::alarm::set(60);
                let table = Table::open(path).unwrap();
                for i in 0..400 {
                    let sync = attach(&table, &format!("{child} {i}")).unwrap();
                    sync.mark_updated().unwrap();
                    assert!(!sync.is_expired());
                    assert!(table.slots().all(|slot| slot.label_bytes().len() <= 65_536));
                }
            })
        })
        .collect();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    let mut random = 7;
    for _ in 0..3000 {
        let number = [0, 8, 12, 4000, u64::MAX, u64::MAX - 7][next_random(&mut random) as usize % 6];
        file.write_all_at(&number.to_le_bytes(), last).unwrap();
        thread::yield_now();
    }
    children.into_iter().for_each(support::Child::succeeds);
    let table = options().open(&path).unwrap();
    assert_eq!(table.stats().keys, 41 + 1200);
    table.reset().unwrap();
    assert_eq!(table.stats().lost_bytes, 0);
}

#[test]
fn tags_and_digests_may_be_anything() {
    let (_folder, path, good) = grown();
    let places = layout::places(&good);
    let mut random = 1;
    let mut cases: Vec<(String, Vec<u8>)> = Vec::new();
    let mut add = |name: &str, change: &mut dyn FnMut(&mut Vec<u8>, &layout::Place)| {
        let mut file = good.clone();
        places.iter().for_each(|place| change(&mut file, place));
        cases.push((name.to_owned(), file));
    };
    for tag in [0, 1, 0x80, 0xff] {
        add(&format!("all tags {tag}"), &mut |file, place| file[place.tag] = tag);
    }
    add("tags of no order", &mut |file, place| file[place.tag] = next_random(&mut random) as u8);
    add("no word B", &mut |file, place| put(file, place.digest + 8, 0));
    add("no word A", &mut |file, place| put(file, place.digest, 0));
    add("words B without tags or A", &mut |file, place| {
        file[place.tag] = 0;
        put(file, place.digest, 0);
        put(file, place.digest + 8, 7);
    });
    let [a, b] = layout::digest(&good, "7");
    add("all are one key", &mut |file, place| {
        put(file, place.digest, a);
        put(file, place.digest + 8, b);
        file[place.tag] = (b >> 56).max(1) as u8;
    });
    add("all are half of one key", &mut |file, place| {
        put(file, place.digest, a);
        put(file, place.digest + 8, 0);
        file[place.tag] = 0;
    });
    add("all are claimed for nothing", &mut |file, place| {
        put(file, place.digest, u64::MAX);
        put(file, place.digest + 8, u64::MAX);
        put(file, place.generation, 0);
        put(file, place.record, 0);
        file[place.tag] = 0xff;
    });
    for (name, file) in cases {
        fs::remove_file(&path).unwrap();
        fs::write(&path, &file).unwrap();
        ends_well(&name, || {
            let table = options().open(&path).unwrap();
            let syncs: Vec<_> = (0..60).map(|i| attach(&table, &format!("{i}")).unwrap()).collect();
            for (i, sync) in syncs.iter().enumerate() {
                let other = attach(&table, &format!("{i}")).unwrap();
                sync.mark_updated().unwrap();
                assert!(other.is_expired(), "a key that was attached to is in two places");
            }
            assert!(fs::metadata(&path).unwrap().len() < good.len() as u64 + 100_000, "it grows and grows");
            exercise(&table, &mut || ());
            assert!(syncs.iter().all(GenerationSynchronizer::is_expired));
        });
    }
}

/// A word as an attacker may choose it, or chance.
fn any_word(random: &mut u64, file: &[u8]) -> u64 {
    let number = next_random(random);
    match number >> 61 {
        0 => next_random(random),
        1 => 0,
        2 => directory_word(number % 5, number >> 8 & 15),
        // A record somewhere in the file.
        3 => ((next_random(random) % (file.len() as u64 + 8192)) & !7) | (number & 0xffff) << 34,
        4 => (1 << 50) | number & 0xffff | (number >> 16 & 3) << 54 | (number >> 20 & 3) << 56,
        5 => (1 << (number % 64)) - (number >> 10 & 1),
        6 => number & 0xff,
        _ => u64::MAX - (number & 15),
    }
}

#[test]
fn thousands_of_random_changes_before_a_table_is_opened_and_while_it_is_in_use_are_harmless() {
    const RANDOM: u64 = 0x9e37_79b9_7f4a_7c15;
    for batch in 0..30 {
        let mut random = RANDOM.wrapping_mul(2 * batch + 1);
        ends_well(&format!("batch {batch}"), || {
            for case in 0..20 {
                // As the fuzzer's inputs are made: flags, changes in use, changes before.
                let flags = (next_random(&mut random) & 0x2e) as u8 | if case % 4 > 0 { 4 } else { 0 };
                let (in_use, before) = (next_random(&mut random) % 12, next_random(&mut random) % 12);
                let mut input = vec![flags, in_use as u8];
                for _ in 0..in_use + before {
                    input.extend_from_slice(&next_random(&mut random).to_le_bytes()[..2]);
                    input.extend_from_slice(&any_word(&mut random, EVERYTHING).to_le_bytes());
                }
                eprintln_on_panic(&format!("input {input:?}"), || replay(&input));
            }
        });
    }
}

#[test]
fn thousands_of_random_changes_by_another_process_while_a_table_is_in_use_are_harmless() {
    let (_folder, path) = path();
    let telling = telling(EVERYTHING);
    let mut boot = vec![0; 16];
    File::open(Patient::new(16).path).map(|file| file.read_exact_at(&mut boot, 128)).unwrap().unwrap();
    for round in 0..60 {
        let mut good = EVERYTHING.to_vec();
        good[128..144].copy_from_slice(&boot);
        let _ = fs::remove_file(&path);
        fs::write(&path, &good).unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        let mut random = 0x2545_f491_4f6c_dd1d_u64.wrapping_mul(2 * round + 1);
        let table = options().open(&path).unwrap();
        let reader = options().read_only(true).open(&path).unwrap();
        let words = support::shared_words(1);
        let child = in_child(|| {
            nix::unistd::alarm::set(60);
            eprintln_on_panic(&format!("round {round}"), || {
                for _ in 0..3 {
                    let syncs: Vec<_> = KEYS.iter().filter_map(|key| attach(&table, key).ok()).collect();
                    for sync in &syncs {
                        let _ = (sync.is_expired(), sync.mark_updated(), sync.refresh(), sync.begin_update().map(drop));
                        let _ = sync.wait_timeout(Duration::ZERO);
                    }
                    let _ = (0..40).try_for_each(|i| attach(&table, &format!("new {i}")).map(drop));
                    let _ = (table.slots().count(), table.stats(), table.clear_matching(|slot| slot.updates() > 3));
                    let _ = table.watch().next_timeout(Duration::ZERO);
                    for key in KEYS {
                        let _ = (table.slot(key), table.generation(key), reader.slot(key));
                        if let Ok(sync) = attach(&reader, key) {
                            let _ = (sync.is_expired(), sync.refresh(), sync.wait_timeout(Duration::ZERO));
                        }
                    }
                    let _ = (reader.slots().count(), reader.stats(), reader.watch().next_timeout(Duration::ZERO));
                }
                exercise(&table, &mut || ());
            });
            words[0].store(1, std::sync::atomic::Ordering::SeqCst);
        });
        let mut changes = 0;
        while words[0].load(std::sync::atomic::Ordering::SeqCst) == 0 && changes < 20_000 {
            let offset = telling[next_random(&mut random) as usize % telling.len()];
            // Not the state, by which a process would find the table retired at once.
            if offset != 144 {
                file.write_all_at(&any_word(&mut random, EVERYTHING).to_le_bytes(), offset as u64).unwrap();
            }
            changes += 1;
        }
        child.succeeds();
    }
}

#[test]
fn a_damaged_table_of_version_1_is_refused_or_replaced() {
    const VERSION_1: [&[u8]; 3] = [
        include_bytes!("vectors/version-1.gensync"),
        include_bytes!("vectors/version-1-everything.gensync"),
        include_bytes!("vectors/version-1-retired.gensync"),
    ];
    let (mut replaced, mut refused) = (0, 0);
    let mut random = 0x2545_f491_4f6c_dd1d;
    for case in 0..600 {
        let mut file = VERSION_1[case % 3].to_vec();
        for _ in 0..next_random(&mut random) % 12 {
            let word = any_word(&mut random, &file);
            let offset = match next_random(&mut random) % 8 {
                // The number of segments, the state, and the fixed part.
                0 => 148,
                1 => 144,
                2 => 16 + 8 * (next_random(&mut random) as usize % 8),
                _ => 4096 + 4 * (next_random(&mut random) as usize % ((file.len() - 4100) / 4)),
            };
            match offset {
                144 | 148 => file[offset..offset + 4].copy_from_slice(&((word % 5) as u32).to_le_bytes()),
                _ => put(&mut file, offset, word),
            }
        }
        seal(&mut file);
        let (folder, path) = path();
        fs::write(&path, &file).unwrap();
        let words = support::shared_words(1);
        ends_well(&format!("case {case}"), || match options().replace_older(true).open(&path) {
            Ok(table) => {
                assert_eq!(table.info().layout_version, 2);
                if case % 10 == 0 {
                    exercise(&table, &mut || ());
                }
                attach(&table, "a").unwrap().mark_updated().unwrap();
                words[0].store(1, std::sync::atomic::Ordering::SeqCst);
            }
            Err(error) => {
                assert_eq!(error.path(), Some(&*path), "{error}");
                assert!(fs::read(&path).unwrap() == file, "a refused file was changed: {error}");
            }
        });
        let is_replaced = words[0].load(std::sync::atomic::Ordering::SeqCst) == 1;
        (replaced, refused) = (replaced + u32::from(is_replaced), refused + u32::from(!is_replaced));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "something is left behind");
    }
    assert!(replaced > 100 && refused > 100, "{replaced} were replaced, {refused} refused");
}

#[test]
fn what_the_fuzzer_found_stays_harmless() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let mut inputs: Vec<_> = fs::read_dir(corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
    inputs.sort();
    assert!(inputs.len() > 20, "only {} inputs are there", inputs.len());
    for input in inputs {
        replay(&fs::read(input).unwrap());
    }
}

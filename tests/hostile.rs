//! Guards against files that are no tables, damaged or out of reach.

#[path = "support/exercise.rs"]
mod exercise;
mod support;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use exercise::{options, replay, seal};
use gensync::{Error, ErrorKind, GenerationSynchronizer, OwnerCheck, Table, WaitSet};
use nix::unistd::Uid;
use support::{in_child, path};

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
    /// Of one segment of `capacity` slots, with the key "key".
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
    let patient = Patient::new(4);
    let good = &patient.good;
    let size = good.len() as u64;
    // What a number of the fixed part says if the byte at `offset` is `value`.
    let number = |start: usize, length: usize, offset: usize, value: u8| {
        let mut bytes = [0; 8];
        bytes[..length].copy_from_slice(&good[start..start + length]);
        bytes[offset - start] = value;
        u64::from_le_bytes(bytes)
    };
    for offset in (0..88).chain(144..152) {
        for value in (0..=255).filter(|value| *value != good[offset]) {
            let word = |start, length| number(start, length, offset, value);
            let expected = match offset {
                0..8 => {
                    let start = word(0, 8).to_le_bytes();
                    let expected = "expected the bytes \"gensync\\0\"; choose another path, or remove the file";
                    format!("not a gensync table: it starts with \"{}\", {expected}", start.escape_ascii())
                }
                8..12 => format!(
                    "layout version {}, expected 1: made by another version of gensync; use the same version here, or stop its \
                     users and remove the file, or give each version a path of its own",
                    word(8, 4)
                ),
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
                _ => match word(148, 4) {
                    segments @ 2..=23 => truncated(size, end_of(4, segments as u32)),
                    segments => damaged("number of segments", segments, SEGMENTS),
                },
            };
            patient.write(offset, &[value]);
            assert_eq!(refusal(&patient.path), expected, "byte {offset} is {value}");
        }
        patient.write(offset, &good[offset..=offset]);
    }
    assert!(Table::open(&patient.path).unwrap().generation("key").unwrap().is_some());
}

const CHECKSUM: &str = "the one that its fields give";
const SEGMENTS: &str = "at least 1, of at most 8 GiB together";

/// Where a table of `segments` segments ends.
fn end_of(capacity: u64, segments: u32) -> u64 {
    let slots = |segment| capacity << segment;
    4096 + (0..segments).map(|segment| 128 * slots(segment) + u64::next_multiple_of(slots(segment), 128)).sum::<u64>()
}

#[test]
fn each_field_is_checked_though_the_checksum_is_right() {
    let patient = Patient::new(4);
    let size = patient.good.len() as u64;
    let mut tried = 0;
    for found in numbers() {
        for (offset, length, good, field, expected) in
            [(16, 4, 128, "slot size", "128"), (20, 4, 4096, "header size", "4096")]
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
            1 | 2 | 4 => continue,
            _ if found.is_power_of_two() && found <= 1 << 25 => truncated(size, end_of(found, 1)),
            _ => damaged("capacity", found, "a power of two, at most 33554432"),
        };
        patient.write_sealed(24, &found.to_le_bytes());
        assert_eq!(refusal(&patient.path), expected);
        tried += 1;
    }
    assert!(tried > 1400, "only {tried} values were tried");
}

#[test]
fn what_is_only_a_number_to_gensync_may_be_any_number() {
    let mut patient = Patient::new(4);
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
    let patient = Patient::new(4);
    let padding = [88..128, 152..256, 260..4096];
    for offset in padding.iter().cloned().flatten() {
        patient.write(offset, &[offset as u8 | 1]);
    }
    // As well as tags for slots that this segment does not have.
    patient.write(4096 + 4 * 128 + 4, &[0xff; 124]);
    let before = fs::read(&patient.path).unwrap();
    let reader = Table::options().read_only(true).open(&patient.path).unwrap();
    assert!(reader.generation("key").unwrap().is_some() && fs::read(&patient.path).unwrap() == before);
    let table = Table::open(&patient.path).unwrap();
    let syncs: Vec<_> = (0..20).map(|i| attach(&table, &format!("{i}")).unwrap()).collect();
    for sync in &syncs {
        sync.mark_updated().unwrap();
        sync.update(|| Ok::<_, ()>(())).unwrap();
    }
    let after = fs::read(&patient.path).unwrap();
    assert!(after.len() > before.len(), "the table has grown");
    let tags = 4096 + 4 * 128 + 4..4096 + 5 * 128;
    for range in padding.into_iter().chain(std::iter::once(tags)) {
        assert!(after[range.clone()] == before[range], "what is no field was written to");
    }
}

#[test]
fn the_words_that_change_may_say_anything() {
    let mut patient = Patient::new(4);
    let size = patient.good.len() as u64;
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
        patient.write(148, &word.to_le_bytes());
        match word {
            1 => assert_eq!(present(&patient), Some(before)),
            2..=23 => assert_eq!(refusal(&patient.path), truncated(size, end_of(4, word))),
            _ => assert_eq!(refusal(&patient.path), damaged("number of segments", word.into(), SEGMENTS)),
        }
        patient.write(148, &1_u32.to_le_bytes());
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
        patient.write(key + 24, &number.to_le_bytes());
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

/// Where the one key's slot stands.
fn slot_of(file: &[u8]) -> usize {
    4096 + 128 * file[4096..].chunks(128).position(|slot| slot[8..16] != [0; 8]).unwrap()
}

#[test]
fn a_number_that_is_no_generation_is_reported_and_repaired_by_a_reset() {
    let mut patient = Patient::new(4);
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
fn a_generation_that_was_forged_to_be_the_last_ones_counts_no_further_than_there_are() {
    let patient = Patient::new(4);
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
    let table = Table::options().capacity(4).open(&path).unwrap();
    (0..30).for_each(|i| drop(attach(&table, &format!("{i}")).unwrap()));
    assert!(table.stats().segments > 2);
    drop(table);
    let full = fs::metadata(&path).unwrap().len();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    for length in (0..full).rev() {
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
    for (extra, length) in [(0, 4737), (16, 0), (100, 0), (4096, 0), (300_000, 0), (16, 1 << 40)] {
        let mut patient = Patient::new(4);
        patient.write(patient.good.len(), &vec![0xa5; extra]);
        if length > 0 {
            patient.file.set_len(length).unwrap();
        }
        let table = Table::open(&patient.path).unwrap();
        assert_eq!((table.stats().segments, table.stats().keys), (1, 1));
        let syncs: Vec<_> = (0..200).map(|i| attach(&table, &format!("{i}")).unwrap()).collect();
        for (i, sync) in syncs.iter().enumerate() {
            attach(&table, &format!("{i}")).unwrap().mark_updated().unwrap();
            assert!(sync.is_expired());
        }
        let slots: Vec<_> = table.slots().map(|slot| slot.label().into_owned()).collect();
        assert!((0..200).all(|i| slots.contains(&i.to_string())), "{slots:?}");
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

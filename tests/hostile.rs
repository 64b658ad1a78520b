//! Guards against files that are no tables, damaged or out of reach.

mod support;

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use gensync::{Error, ErrorKind, GenerationSynchronizer, OwnerCheck, Table};
use nix::unistd::Uid;
use support::{in_child, path};

fn attach(table: &Table, key: &str) -> Result<GenerationSynchronizer, Error> {
    GenerationSynchronizer::new(table, key)
}

/// Opening fails, names the path, and leaves the bytes of the file as they are.
fn refused(path: &Path) -> ErrorKind {
    let before = fs::read(path).unwrap();
    let error = Table::open(path).unwrap_err();
    assert_eq!(error.path(), Some(path));
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    assert!(Table::options().read_only(true).open(path).is_err());
    assert_eq!(fs::read(path).unwrap(), before, "a refused file was changed");
    error.kind().clone()
}

#[test]
fn what_is_no_table_is_named_and_left_alone() {
    let (_folder, path) = path();
    for content in [&b""[..], b"x", b"gensync", b"#!/bin/sh\nexit 0\n", &[0; 8192], &[0xff; 200_000]] {
        fs::write(&path, content).unwrap();
        let kind = refused(&path);
        assert!(matches!(kind, ErrorKind::NotATable { .. }), "{kind:?}");
    }
    fs::write(&path, "gensync\0short").unwrap();
    assert!(matches!(refused(&path), ErrorKind::Truncated { found: 13, .. }));
}

#[test]
fn each_field_of_the_header_is_checked() {
    let (_folder, path) = path();
    attach(&Table::open(&path).unwrap(), "key").unwrap();
    let good = fs::read(&path).unwrap();
    for offset in (0..88).chain(144..152) {
        for flip in [1, 0x80, 0xff] {
            let mut bad = good.clone();
            bad[offset] ^= flip;
            fs::write(&path, &bad).unwrap();
            if Table::options().read_only(true).open(&path).is_ok() {
                // A state of 2 or 3 would be repaired; a number of segments that fits is one.
                panic!("byte {offset} xor {flip:#x} was not noticed");
            }
            let kind = refused(&path);
            let right = match offset {
                0..8 => matches!(kind, ErrorKind::NotATable { .. }),
                8..12 => matches!(kind, ErrorKind::LayoutVersion { expected: 1, .. }),
                12 if flip == 1 => matches!(kind, ErrorKind::Damaged { .. }),
                144..152 => matches!(kind, ErrorKind::Damaged { .. } | ErrorKind::Truncated { .. }),
                _ => matches!(kind, ErrorKind::Damaged { .. }),
            };
            assert!(right, "byte {offset} xor {flip:#x}: {kind:?}");
        }
    }
    let mut other = good.clone();
    other[12] = 2;
    fs::write(&path, &other).unwrap();
    assert!(matches!(refused(&path), ErrorKind::ByteOrder { found: 2, expected: 1, .. }));
    fs::write(&path, &good).unwrap();
    assert!(Table::open(&path).unwrap().generation("key").unwrap().is_some());
}

#[test]
fn a_truncated_table_is_refused_at_every_length() {
    let (_folder, path) = path();
    let table = Table::options().capacity(8).open(&path).unwrap();
    (0..50).for_each(|i| drop(attach(&table, &format!("{i}")).unwrap()));
    let good = fs::read(&path).unwrap();
    for length in (8..good.len()).step_by(61).chain([4095, 4096, 4097, good.len() - 1]) {
        fs::write(&path, &good[..length]).unwrap();
        let kind = refused(&path);
        assert!(matches!(kind, ErrorKind::Truncated { found, .. } if found == length as u64), "{length}: {kind:?}");
    }
}

#[test]
fn what_is_no_regular_file_is_refused() {
    let (folder, path) = path();
    let target = folder.path().join("target");
    Table::open(&target).unwrap();
    symlink(&target, &path).unwrap();
    assert_eq!(*Table::open(&path).unwrap_err().kind(), ErrorKind::Symlink);
    symlink("nowhere", folder.path().join("dangling")).unwrap();
    assert_eq!(*Table::open(folder.path().join("dangling")).unwrap_err().kind(), ErrorKind::Symlink);
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
        let error = Table::open(path).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::NotARegularFile { found: f, .. } if *f == found), "{error}");
    }
}

#[test]
fn a_missing_table_or_folder_is_told() {
    let (folder, path) = path();
    assert_eq!(*Table::options().create(false).open(&path).unwrap_err().kind(), ErrorKind::NotFound);
    assert!(!path.exists());
    let error = Table::open(folder.path().join("no/such/folder")).unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::NotFound);
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
fn a_neighbour_that_scribbles_over_the_table_causes_no_panic_and_no_endless_loop() {
    use std::io::{Seek as _, Write as _};
    let (_folder, path) = path();
    let table = Table::options().capacity(64).open(&path).unwrap();
    let sync = attach(&table, "key").unwrap();
    let mut file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for round in 0..3000 {
        let offset = if round % 3 == 0 { 128 + random % 32 } else { 4096 + random % (64 * 129) };
        let bytes = std::array::from_fn::<u8, 24, _>(|_| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 56) as u8
        });
        file.seek(std::io::SeekFrom::Start(offset)).unwrap();
        file.write_all(&bytes[..1 + round % 24]).unwrap();
        let _ = sync.is_expired();
        let _ = (sync.mark_updated(), sync.clear(), sync.refresh());
        let _ = (attach(&table, &format!("key {round}")), table.generation("key"));
        let _ = (table.stats(), table.slots().count());
        if round % 50 == 0 {
            let _ = table.reset();
        }
    }
}

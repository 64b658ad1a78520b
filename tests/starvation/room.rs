//! No room on the disk, or no inode.

use std::error::Error as _;
use std::fs;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Instant;

use gensync::{CacheKey, Cached, Error, GenerationSynchronizer, Table, UpdateError};
use nix::mount::MsFlags;

use super::disk::Mount;
use super::{assert_loses_nothing, assert_recovered, assert_works, attach, attach_all, grow, is_full, layout, names};
use crate::support::{in_child, shared_words};

#[test]
fn a_full_disk_is_an_error_and_existing_keys_go_on_working() {
    let Some(disk) = Mount::tmpfs("size=512k") else { return };
    let path = disk.path("table");
    let table = Table::options().capacity(16).open(&path).unwrap();
    let mut syncs = Vec::new();
    let error = attach_all(&table, &mut syncs);
    assert!(is_full(&error), "{error}");
    assert_eq!(error.path(), Some(&*path));
    assert!(error.key().is_some() && error.source().is_some());
    assert!(syncs.len() > 1000);
    assert_works(&table, &syncs);
    // A reset needs room for a second file first: either it works, or nothing has changed.
    fs::write(disk.path("ballast"), vec![0; 1 << 20]).unwrap_err();
    let error = table.reset().unwrap_err();
    assert!(is_full(&error), "{error}");
    assert!(syncs.iter().all(|sync| !sync.is_expired()), "a reset that failed has changed something");
    // A second table does not fit; with room again, all goes on.
    assert!(Table::open(disk.path("second")).is_err());
    fs::remove_file(disk.path("ballast")).unwrap();
    disk.remount(MsFlags::empty(), "size=8m").unwrap();
    assert_recovered(&table, &syncs);
}

/// A key of a table that grows by slots and by texts: now and then a long one.
fn mixed_key(i: usize) -> CacheKey {
    CacheKey::raw(if i % 40 == 39 { format!("{i:06000}") } else { format!("{i}") })
}

/// Lets the disk be full when each segment up to that number is to be appended, of slots and of texts: there is room for nothing, for
/// one page, for two, four, and so on until there is enough.
fn full_at_each_growth(disk: &Mount, last: usize) {
    let path = disk.path("table");
    let table = Table::options().capacity(1).open(&path).unwrap();
    let other = Table::open(&path).unwrap();
    let segments = || layout::segments(&fs::read(&path).unwrap());
    let mut syncs = vec![attach(&table, mixed_key(0)).unwrap()];
    let mut failures = 0;
    while segments().len() < last {
        let present = segments().len();
        // A disk may keep what was reserved before it was full.
        for pages in [0].into_iter().chain((0..).map(|power| 1 << power)) {
            let _ballast = disk.fill(pages * 4096);
            let error = loop {
                match attach(&table, mixed_key(syncs.len())) {
                    Err(error) => break Some(error),
                    Ok(sync) => syncs.push(sync),
                }
                if segments().len() > present {
                    break None;
                }
            };
            let Some(error) = error else { break };
            failures += 1;
            assert!(is_full(&error), "{error}");
            let key = mixed_key(syncs.len());
            assert_eq!((error.path(), error.key()), (Some(&*path), Some(key.as_str())));
            let stats = table.stats();
            assert_eq!(stats.lost_bytes, 0, "{stats:?}");
            // Another process finds the same.
            assert!(is_full(&attach(&other, key.clone()).unwrap_err()));
            assert_loses_nothing(if pages % 2 == 0 { &table } else { &other }, &key);
            assert_works(&table, &syncs[syncs.len().saturating_sub(10)..]);
        }
        let file = fs::read(&path).unwrap();
        let end = layout::segments(&file).last().map_or(0, |segment| segment.start + segment.bytes);
        assert!(end <= file.len(), "a segment is in the directory that has no room");
    }
    let kinds = [1, 2].map(|kind| layout::of_kind(&fs::read(&path).unwrap(), kind).len());
    assert!(kinds[0] > 3 && kinds[1] > 3 && failures >= last - 2, "{kinds:?}, {failures} failures");
    assert_recovered(&table, &syncs);
}

#[test]
fn a_memory_disk_may_be_full_at_every_growth() {
    let Some(disk) = Mount::tmpfs("size=8m") else { return };
    full_at_each_growth(&disk, 20);
}

#[test]
fn a_disk_may_be_full_at_every_growth() {
    let Some(disk) = Mount::ext4(24 << 20) else { return };
    full_at_each_growth(&disk, 20);
}

#[test]
fn a_disk_may_be_full_between_the_pieces_of_a_great_segment() {
    // Room is made in pieces of 16 MiB. The slots take 132 MiB and the first texts 128; the next texts 16, and then 18.
    let Some(disk) = Mount::tmpfs("size=640m") else { return };
    let path = disk.path("table");
    let table = Table::options().capacity(1 << 22).open(&path).unwrap();
    let texts = || {
        let mut header = vec![0; 8192];
        File::open(&path).unwrap().read_exact_at(&mut header, 0).unwrap();
        layout::of_kind(&header, 2).len()
    };
    let key = |i: usize| CacheKey::raw(format!("{i:065000}"));
    let mut syncs = Vec::new();
    while texts() < 2 {
        syncs.push(attach(&table, key(syncs.len())).unwrap());
    }
    let ballast = disk.fill(17 << 20);
    let error = loop {
        match attach(&table, key(syncs.len())) {
            Ok(sync) => syncs.push(sync),
            Err(error) => break error,
        }
    };
    assert!(is_full(&error) && texts() == 2, "{error}");
    // The first piece is taken, and stays so.
    let free = disk.free();
    assert!(free < 2 << 20, "{free} bytes are free");
    assert_loses_nothing(&table, &key(syncs.len()));
    assert_eq!(disk.free(), free);
    assert_works(&table, &syncs[..10]);
    drop(ballast);
    attach(&table, key(syncs.len())).unwrap();
    assert_eq!((texts(), table.stats().lost_bytes), (3, 0));
    table.reset().unwrap();
    assert!(syncs.iter().all(GenerationSynchronizer::is_expired));
}

/// Runs `attempt` with nothing free, a page, two pages, and so on until it succeeds, and returns how often it failed.
fn until_there_is_room(disk: &Mount, attempt: impl Fn() -> Result<(), Error>) -> u64 {
    for pages in 0..20 {
        let _ballast = disk.fill(pages * 4096);
        let (names_before, free) = (names(disk.folder()), disk.free());
        match attempt() {
            Ok(()) => return pages,
            Err(error) => assert!(is_full(&error) && error.path().is_some(), "{error}"),
        }
        assert_eq!((names(disk.folder()), disk.free()), (names_before, free), "it left something behind");
    }
    panic!("there is no room for a small table");
}

#[test]
fn a_table_is_created_whole_or_not_at_all() {
    let Some(disk) = Mount::tmpfs("size=1m") else { return };
    let failures = until_there_is_room(&disk, || Table::options().capacity(64).open(disk.path("table")).map(drop));
    assert_eq!(failures, 4, "the header and 64 slots take four pages");
    let table = Table::options().create(false).open(disk.path("table")).unwrap();
    assert_recovered(&table, &[attach(&table, "key").unwrap()]);
}

#[test]
fn a_reset_is_made_whole_or_not_at_all() {
    let disks = [Mount::tmpfs("size=1m"), Mount::ext4(4 << 20)];
    for disk in disks.into_iter().flatten() {
        let table = Table::options().capacity(64).open(disk.path("table")).unwrap();
        let other = Table::open(disk.path("table")).unwrap();
        let syncs = [attach(&table, "one").unwrap(), attach(&table, "two").unwrap()];
        let elsewhere = attach(&other, "two").unwrap();
        let failures = until_there_is_room(&disk, || {
            assert!(syncs.iter().chain([&elsewhere]).all(|sync| !sync.is_expired()), "it has changed something");
            assert_works(&table, &syncs);
            elsewhere.refresh().unwrap();
            table.reset()
        });
        assert!(failures >= 4, "{failures}");
        assert!(syncs.iter().chain([&elsewhere]).all(GenerationSynchronizer::is_expired));
        assert_recovered(&table, &syncs);
    }
}

#[test]
fn a_table_on_a_full_disk_can_be_written_to_for_ever() {
    let Some(disk) = Mount::ext4(8 << 20) else { return };
    let table = Table::options().capacity(64).open(disk.path("table")).unwrap();
    let mut syncs = Vec::new();
    grow(&table, 5, &mut syncs);
    let _ballast = disk.fill(0);
    for _ in 0..20 {
        assert_works(&table, &syncs);
        // What was written goes to the disk, and the next write begins anew.
        nix::unistd::syncfs(File::open(disk.folder()).unwrap().as_fd()).unwrap();
    }
    assert!(is_full(&attach_all(&table, &mut syncs)));
}

#[test]
fn without_an_inode_nothing_can_be_created_and_nothing_is_changed() {
    let Some(disk) = Mount::tmpfs("size=8m,nr_inodes=4") else { return };
    // The folder itself takes one.
    let table = Table::options().capacity(16).open(disk.path("table")).unwrap();
    let mut syncs = vec![attach(&table, "0").unwrap()];
    let fillers: Vec<_> = (0..).map_while(|i| File::create(disk.path(&format!("{i}"))).ok().map(|_| i)).collect();
    assert!(!fillers.is_empty());
    for error in [Table::open(disk.path("new")).unwrap_err(), table.reset().unwrap_err()] {
        assert!(is_full(&error) && error.path().is_some() && error.to_string().contains("inode"), "{error}");
    }
    assert!(!disk.path("new").exists() && !syncs[0].is_expired());
    // Growing takes none.
    grow(&table, 4, &mut syncs);
    assert_works(&table, &syncs);
    fs::remove_file(disk.path("0")).unwrap();
    assert_recovered(&table, &syncs);
}

/// A process that was killed after it had begun to reset the table leaves it like this.
fn begin_to_retire(path: &Path) {
    // In the byte order of the machine.
    let state = if cfg!(target_endian = "little") { [2, 0, 0, 0] } else { [0, 0, 0, 2] };
    File::options().write(true).open(path).unwrap().write_all_at(&state, 144).unwrap();
}

/// Retires the key of this generation word, as such a process does next.
#[expect(clippy::host_endian_bytes, reason = "a word stands in the file in the machine's own order")]
fn retire_key(path: &Path, generation: u64) {
    let found = fs::read(path).unwrap().chunks_exact(8).position(|word| word == generation.to_ne_bytes()).unwrap();
    let word = (generation + 1) | 1 << 54;
    File::options().write(true).open(path).unwrap().write_all_at(&word.to_ne_bytes(), 8 * found as u64).unwrap();
}

#[test]
fn a_retired_table_that_finds_no_room_for_its_successor_expires_everything_until_there_is_room() {
    let Some(disk) = Mount::tmpfs("size=1m") else { return };
    let path = disk.path("table");
    let table = Table::options().capacity(64).open(&path).unwrap();
    let other = Table::open(&path).unwrap();
    let (sync, elsewhere) = (attach(&table, "key").unwrap(), attach(&other, "key").unwrap());
    let source = &shared_words(1)[0];
    let cached = Cached::new(attach(&table, "key").unwrap(), || Ok::<_, Error>(source.load(SeqCst)));
    assert_eq!(*cached.get().unwrap(), 0);
    let ballast = disk.fill(0);
    begin_to_retire(&path);
    assert!(is_full(&attach(&other, "new").unwrap_err()));
    // The key was not retired yet, and retiring it expires it: until then, it works.
    assert!(!sync.is_expired() && !elsewhere.is_expired());
    let before = sync.mark_updated().unwrap();
    assert!(!sync.is_expired() && elsewhere.is_expired());
    retire_key(&path, before.get());
    let start = Instant::now();
    for i in 1..=100 {
        source.store(i, SeqCst);
        assert!(sync.is_expired() && elsewhere.is_expired());
        cached.get().unwrap();
        assert_eq!(sync.ticket().generation(), None);
        // An update is not lost silently.
        assert!(is_full(&sync.mark_updated().unwrap_err()));
        assert!(is_full(&sync.refresh().unwrap_err()));
        let error = sync.update(|| -> Result<(), Error> { unreachable!() }).unwrap_err();
        assert!(matches!(&error, UpdateError::Begin(error) if is_full(error)), "{error}");
        for error in [attach(&table, "key").unwrap_err(), Table::open(&path).unwrap_err(), table.reset().unwrap_err()] {
            assert!(is_full(&error) && error.path() == Some(&path), "{error}");
        }
    }
    let loads = cached.counters().unconfirmed;
    assert!((1..=1 + start.elapsed().as_secs()).contains(&loads), "{loads} loads, not one a second");
    while *cached.get().unwrap() != 100 {}
    assert_eq!(names(disk.folder()).len(), 2, "unfinished files pile up");
    drop(ballast);
    // What is announced now reaches the processes that have not noticed yet that there is room.
    let announced = sync.mark_updated().unwrap();
    assert!(announced > before, "a generation has come again");
    assert!(elsewhere.is_expired());
    while elsewhere.ticket().generation().is_none() {}
    assert!(elsewhere.is_expired());
    assert_eq!(elsewhere.refresh().unwrap(), announced);
    source.store(7, SeqCst);
    sync.mark_updated().unwrap();
    assert_eq!(*cached.get().unwrap(), 7);
    assert!(elsewhere.is_expired());
    cached.get().unwrap();
    assert!(!cached.synchronizer().is_expired(), "a storm of loads");
    sync.refresh().unwrap();
    assert_recovered(&table, &[sync, elsewhere]);
}

// File systems that reserve no room, or not for good.

#[test]
fn a_file_system_without_fallocate_holds_tables_that_grow() {
    let disks = [Mount::ramfs(), Mount::on_disk("ext2", &["-q", "-m", "0", "-b", "4096"], 32 << 20)];
    for disk in disks.into_iter().flatten() {
        let path = disk.path("table");
        let table = Table::options().capacity(16).open(&path).unwrap();
        let mut syncs = Vec::new();
        grow(&table, 6, &mut syncs);
        assert_recovered(&table, &syncs);
    }
}

#[test]
fn processes_that_grow_a_table_at_once_without_fallocate_lose_nothing() {
    const KEYS: usize = 1000;
    const PROCESSES: u64 = 4;
    let disks = [Mount::ramfs(), Mount::on_disk("ext2", &["-q", "-m", "0", "-b", "4096"], 32 << 20)];
    for disk in disks.into_iter().flatten() {
        for round in 0..5 {
            let path = disk.path(&format!("table{round}"));
            let table = Table::options().capacity(1).open(&path).unwrap();
            let children: Vec<_> = (0..PROCESSES)
                .map(|_| {
                    in_child(|| {
                        let table = Table::open(&path).unwrap();
                        (0..KEYS).for_each(|i| _ = attach(&table, format!("{i}")).unwrap().mark_updated().unwrap());
                    })
                })
                .collect();
            children.into_iter().for_each(crate::support::Child::succeeds);
            let keys: Vec<_> = table.slots().collect();
            assert_eq!(keys.len(), KEYS);
            assert!(keys.iter().all(|key| key.updates() == PROCESSES), "an update was overwritten");
        }
    }
}

#[test]
fn a_full_disk_without_fallocate_is_an_error_and_the_table_works_on() {
    let Some(disk) = Mount::on_disk("ext2", &["-q", "-m", "0", "-b", "4096"], 4 << 20) else { return };
    let path = disk.path("table");
    let table = Table::options().capacity(16).open(&path).unwrap();
    let mut syncs = Vec::new();
    let error = attach_all(&table, &mut syncs);
    assert!(is_full(&error), "{error}");
    assert_eq!(error.path(), Some(&*path));
    assert_works(&table, &syncs);
}

#[test]
fn a_full_btrfs_takes_updates_of_the_keys_that_there_are() {
    let Some(disk) = Mount::on_disk("btrfs", &["-q", "-m", "single", "-d", "single"], 128 << 20) else { return };
    let path = disk.path("table");
    let table = Table::options().capacity(1024).open(&path).unwrap();
    let mut syncs = Vec::new();
    grow(&table, 2, &mut syncs);
    let rounds = |count| {
        for _ in 0..count {
            syncs.iter().for_each(|sync| _ = sync.mark_updated().unwrap());
            // To the disk: what is written next is written anew there.
            assert!(std::process::Command::new("sync").arg("-f").arg(&path).status().unwrap().success());
        }
    };
    rounds(2);
    let ballast = File::create(disk.path("ballast")).unwrap();
    let mut end = 0;
    for piece in [1 << 20, 4096] {
        while ballast.write_all_at(&vec![1; piece], end).is_ok() {
            end += piece as u64;
        }
        let _ = ballast.sync_all();
    }
    in_child(|| rounds(10)).succeeds();
    assert!(syncs.iter().all(GenerationSynchronizer::is_expired));
}

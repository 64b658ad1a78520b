//! File systems that change or go away, and places that are not there.

use std::fs;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use gensync::{Cached, Error, ErrorKind, GenerationSynchronizer, Table, UpdateError};
use nix::mount::{MntFlags, MsFlags, umount2};
use nix::unistd::Uid;

use super::disk::Mount;
use super::{STRANGER, assert_recovered, assert_works, attach, attach_all, await_expiry, grow, names};
use crate::support::{in_child, path};

/// Whether `error` says that the table is on a disk that cannot be written to.
fn is_read_only(error: &Error) -> bool {
    *error.kind() == ErrorKind::ReadOnlyFileSystem
}

#[test]
fn a_read_only_mount_is_reported() {
    let Some(disk) = Mount::tmpfs("size=1m") else { return };
    let path = disk.path("table");
    let table = Table::options().capacity(16).open(&path).unwrap();
    let sync = attach(&table, "key").unwrap();
    // It cannot be made read-only while a table there is open for writing.
    assert_eq!(disk.remount(MsFlags::MS_RDONLY, ""), Err(nix::errno::Errno::EBUSY));
    assert_recovered(&table, &[sync]);
    drop(table);
    disk.remount(MsFlags::MS_RDONLY, "").unwrap();
    for error in [Table::open(&path).unwrap_err(), Table::open(disk.path("new")).unwrap_err()] {
        assert!(is_read_only(&error) && error.path().is_some(), "{error}");
    }
    let table = Table::options().read_only(true).open(&path).unwrap();
    let sync = attach(&table, "key").unwrap();
    assert!(!sync.is_expired() && !sync.wait_timeout(Duration::from_millis(1)).is_changed());
    disk.remount(MsFlags::empty(), "").unwrap();
    let writer = Table::open(&path).unwrap();
    attach(&writer, "key").unwrap().mark_updated().unwrap();
    assert!(sync.is_expired());
    assert_recovered(&writer, &[attach(&writer, "key").unwrap()]);
}

/// A disk that reported an error is made read-only, even while files are open there.
#[test]
fn a_disk_that_failed_under_a_table_is_an_error_for_what_needs_the_disk() {
    let Some(disk) = Mount::ext4(8 << 20) else { return };
    let path = disk.path("table");
    let table = Table::options().capacity(16).open(&path).unwrap();
    let mut syncs = Vec::new();
    grow(&table, 2, &mut syncs);
    // What was written goes to the disk, and the next write begins anew.
    nix::unistd::syncfs(File::open(disk.folder()).unwrap().as_fd()).unwrap();
    if disk.remount(MsFlags::empty(), "abort").is_err() {
        eprintln!("skipped, as the disk cannot be made to fail");
        return;
    }
    in_child(|| {
        let error = attach_all(&table, &mut syncs);
        assert!(is_read_only(&error) && error.path() == Some(&path), "{error:?}");
        for error in
            [table.reset().unwrap_err(), Table::open(&path).unwrap_err(), Table::open(disk.path("new")).unwrap_err()]
        {
            assert!(is_read_only(&error) && error.path().is_some(), "{error:?}");
        }
        assert!(syncs.iter().all(|sync| !sync.is_expired()), "a reset that failed has changed something");
        for sync in &syncs {
            sync.mark_updated().unwrap();
            assert!(!sync.is_expired());
        }
        let error = syncs[0].update(|| -> Result<(), Error> { unreachable!() }).unwrap_err();
        assert!(matches!(&error, UpdateError::Begin(error) if is_read_only(error)), "{error:?}");
        let reader = Table::options().read_only(true).open(&path).unwrap();
        assert_eq!(attach(&reader, "0").unwrap().sync_gen(), syncs[0].sync_gen());
    })
    .succeeds();
}

#[test]
fn a_folder_that_is_removed_under_a_table_expires_everything_until_it_is_back() {
    let (folder, _) = path();
    let home = folder.path().join("home");
    let path = home.join("table");
    fs::create_dir(&home).unwrap();
    let table = Table::open(&path).unwrap();
    let other = Table::open(&path).unwrap();
    let (sync, elsewhere) = (attach(&table, "key").unwrap(), attach(&other, "key").unwrap());
    let cached = Cached::new(attach(&table, "key").unwrap(), || Ok::<_, Error>(()));
    cached.get().unwrap();
    let start = Instant::now();
    let before = sync.sync_gen().unwrap();
    fs::remove_dir_all(&home).unwrap();
    await_expiry(&sync);
    for _ in 0..20 {
        assert!(sync.is_expired() && elsewhere.is_expired());
        cached.get().unwrap();
        let counters = cached.counters();
        assert_eq!(counters.unconfirmed, counters.reloads - 1);
        assert!(
            (1..=1 + start.elapsed().as_secs()).contains(&counters.unconfirmed),
            "a load at each use: {counters:?}"
        );
        for error in [sync.mark_updated(), sync.refresh()].map(Result::unwrap_err) {
            assert!(*error.kind() == ErrorKind::NotFound && error.path() == Some(&path), "{error}");
        }
        for error in [attach(&table, "new").unwrap_err(), table.reset().unwrap_err(), Table::open(&path).unwrap_err()] {
            assert!(*error.kind() == ErrorKind::NotFound && error.path() == Some(&path), "{error}");
        }
    }
    fs::create_dir(&home).unwrap();
    let announced = sync.mark_updated().unwrap();
    assert!(announced > before, "a generation has come again");
    assert!(elsewhere.is_expired());
    assert_eq!(elsewhere.refresh().unwrap(), announced);
    assert_recovered(&table, &[sync]);
}

#[test]
fn a_folder_that_is_closed_to_the_process_changes_nothing_for_what_is_open() {
    if !Uid::effective().is_root() {
        eprintln!("not root: no privileges to drop");
        return;
    }
    for mode in [0o555, 0o111, 0o000] {
        let (folder, path) = path();
        let table = Table::options().capacity(4).mode(0o666).open(&path).unwrap();
        let mut syncs = vec![attach(&table, "0").unwrap()];
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(mode)).unwrap();
        in_child(|| {
            nix::unistd::setuid(Uid::from_raw(STRANGER)).unwrap();
            grow(&table, 5, &mut syncs);
            assert_works(&table, &syncs);
            match table.reset() {
                Err(error) => {
                    assert!(
                        mode == 0 && *error.kind() == ErrorKind::Permission && error.path() == Some(&path),
                        "{error}"
                    );
                    assert!(syncs.iter().all(|sync| !sync.is_expired()), "a reset that failed has changed something");
                }
                // It cannot be replaced, but written to.
                Ok(()) => {
                    assert!(mode != 0 && syncs.iter().all(GenerationSynchronizer::is_expired));
                    syncs.iter().for_each(|sync| _ = sync.refresh().unwrap());
                }
            }
            // A file that cannot be seen is not taken for gone.
            let end = Instant::now() + Duration::from_millis(1100);
            while Instant::now() < end {
                assert!(!syncs[0].is_expired());
            }
        })
        .succeeds();
        // Seen again with the permission.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
        assert!(syncs[0].is_expired());
        assert_recovered(&table, &syncs);
    }
}

#[test]
fn state_is_loaded_once_in_its_time_to_live_while_the_tables_file_system_is_unmounted() {
    let Some(disk) = Mount::tmpfs("size=2m") else { return };
    let path = disk.path("table");
    let table = Table::options().capacity(4).open(&path).unwrap();
    let other = Table::open(&path).unwrap();
    let mut syncs = vec![attach(&table, "0").unwrap()];
    let elsewhere = attach(&other, "0").unwrap();
    umount2(disk.folder(), MntFlags::MNT_DETACH).unwrap();
    let (start, mut loads) = (Instant::now(), 0);
    while start.elapsed() < Duration::from_millis(2500) {
        if syncs[0].is_expired() {
            loads += 1;
            syncs[0].refresh_with(|| Ok::<_, Error>(())).unwrap();
        }
    }
    assert!((1..=3).contains(&loads), "{loads} loads in 2.5 seconds");
    grow(&table, 5, &mut syncs);
    // Processes that have the same file still see each other's updates; this one has not looked yet.
    let _ = elsewhere.is_expired();
    for _ in 0..3 {
        elsewhere.refresh().unwrap();
        assert!(!elsewhere.is_expired());
        syncs[0].mark_updated().unwrap();
        assert!(elsewhere.is_expired());
    }
    // There is nothing at the path to replace.
    let generations = || table.slots().map(|slot| slot.generation()).max();
    let before = generations();
    let error = table.reset().unwrap_err();
    assert!(*error.kind() == ErrorKind::NotFound && error.path() == Some(&path), "{error}");
    assert_eq!(generations(), before, "a reset that failed has changed something");
    // A process that opens the path now makes another table.
    let stranger = attach(&Table::open(&path).unwrap(), "0").unwrap();
    stranger.mark_updated().unwrap();
    assert_eq!(generations(), before);
    fs::remove_file(&path).unwrap();
}

// Places that are not there.

/// Runs `work` in a process without /proc, and without /dev/shm.
fn in_bare_system(work: impl FnOnce()) {
    if !Uid::effective().is_root() {
        eprintln!("not root: nothing can be unmounted");
        return;
    }
    in_child(|| {
        crate::support::keep_mounts_apart();
        for place in ["/proc", "/dev/shm"] {
            // Several may lie over one another.
            while umount2(place, MntFlags::MNT_DETACH).is_ok() {}
        }
        assert!(!Path::new("/proc/self").exists());
        work();
    })
    .succeeds();
}

#[test]
fn without_proc_all_works_but_updates_of_anonymous_tables() {
    let (folder, path) = path();
    let inherited = Table::options().anonymous().unwrap();
    in_bare_system(|| {
        let table = Table::options().capacity(4).open(&path).unwrap();
        assert_recovered(&table, &[attach(&table, "0").unwrap()]);
        assert_eq!(names(folder.path()), ["table.gensync"], "unfinished files are left behind");
        for table in [&inherited, &Table::options().capacity(4).anonymous().unwrap()] {
            let mut syncs = vec![attach(table, "0").unwrap()];
            let error = syncs[0].update(|| -> Result<(), Error> { unreachable!() }).unwrap_err();
            let UpdateError::Begin(error) = error else { panic!("{error:?}") };
            assert!(error.to_string().contains("/proc"), "{error}");
            grow(table, 2, &mut syncs);
            syncs.iter().for_each(|sync| _ = sync.mark_updated().unwrap());
            assert!(syncs.iter().all(|sync| !sync.is_expired()));
            assert!(table.slots().all(|slot| slot.pending() == 0));
            table.reset().unwrap();
            assert!(syncs.iter().all(GenerationSynchronizer::is_expired));
        }
        #[cfg(feature = "shm")]
        if let Err(error) = Table::options().named("gensync-bare") {
            assert_eq!((error.kind(), error.path()), (&ErrorKind::NotFound, Some(Path::new("/dev/shm/gensync-bare"))));
        } else {
            // There is a folder below what was mounted there.
            fs::remove_file("/dev/shm/gensync-bare").unwrap();
        }
    });
    let table = Table::options().create(false).open(&path).unwrap();
    assert_recovered(&table, &[attach(&table, "0").unwrap()]);
}

//! Limits of the process: file size, address space, threads, memory.

use std::error::Error as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use gensync::{CacheKey, ErrorKind, GenerationSynchronizer, Table};
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::Uid;

use super::disk::Mount;
use super::{
    STRANGER, assert_loses_nothing, assert_recovered, assert_works, attach, attach_all, await_expiry, grow, is_full,
    limit, names,
};
use crate::support::place::{KINDS, Place};
use crate::support::{in_child, path};

/// Runs `test` with each kind of table.
fn kinds(capacity: u64, mut test: impl FnMut(Table)) {
    KINDS.iter().for_each(|kind| test(Place::new(*kind).open(Table::options().capacity(capacity))));
}

/// The sizes of a table with one segment of slots, two, and so on; another one may have its texts grow sooner or later.
fn sizes(capacity: u64, count: u32) -> Vec<u64> {
    let table = Table::options().capacity(capacity).anonymous().unwrap();
    let mut syncs = Vec::new();
    (1..=count)
        .map(|segments| {
            grow(&table, segments, &mut syncs);
            table.stats().bytes
        })
        .collect()
}

#[test]
fn no_signal_ends_a_process_that_would_exceed_its_file_size() {
    let sizes = sizes(16, 8);
    // With the signal's default action.
    let allow = |size| limit(Resource::RLIMIT_FSIZE, size);
    in_child(|| {
        let folder = tempfile::tempdir().unwrap();
        for size in [0, 1, 4095, 4096, sizes[0] - 1] {
            allow(size);
            for made in [
                Table::options().capacity(16).open(folder.path().join("table")),
                Table::options().capacity(16).anonymous(),
            ] {
                let error = made.unwrap_err();
                assert!(is_full(&error) && error.to_string().contains("ulimit -f"), "{error}");
            }
            assert_eq!(names(folder.path()).len(), 0);
        }
        for size in &sizes[1..7] {
            allow(size - 1);
            kinds(16, |table| {
                let mut syncs = Vec::new();
                let error = attach_all(&table, &mut syncs);
                assert!(is_full(&error) && error.to_string().contains("ulimit"), "{error}");
                assert!(error.path() == table.path() && table.stats().bytes < *size);
                assert_works(&table, &syncs);
                if table.path().is_some() {
                    // A successor begins small.
                    table.reset().unwrap();
                    assert_works(&table, &syncs[..1]);
                    syncs.clear();
                    attach_all(&table, &mut syncs);
                }
                // One without a name is as long as it will ever be.
                let before = table.stats();
                let raised = size + (64 << 10);
                allow(raised);
                assert!(is_full(&attach_all(&table, &mut syncs)));
                let after = table.stats();
                assert!(after.bytes <= raised && after.lost_bytes == 0, "{after:?}");
                assert_eq!(after.bytes > before.bytes, table.path().is_some(), "{before:?}, then {after:?}");
                assert_works(&table, &syncs);
                allow(size - 1);
            });
        }
    })
    .succeeds();
}

#[test]
fn a_file_size_limit_that_came_after_the_table_is_an_error_at_its_growth() {
    let sizes = sizes(16, 8);
    for size in &sizes[1..7] {
        kinds(16, |table| {
            let mut syncs = vec![attach(&table, "0").unwrap()];
            in_child(|| {
                limit(Resource::RLIMIT_FSIZE, size - 1);
                let error = attach_all(&table, &mut syncs);
                assert!(is_full(&error) && error.to_string().contains("ulimit"), "{error}");
                let stats = table.stats();
                assert!(stats.bytes < *size && stats.lost_bytes == 0, "{stats:?}");
                assert_works(&table, &syncs);
            })
            .succeeds();
            grow(&table, table.stats().segments + 1, &mut syncs);
            assert_works(&table, &syncs);
        });
    }
}

#[cfg(feature = "shm")]
#[test]
fn a_named_table_is_opened_under_any_file_size_limit() {
    let sizes = sizes(1024, 1);
    let name = format!("gensync-limited-{}", std::process::id());
    let path = Path::new("/dev/shm").join(&name);
    for limited in [20_000, sizes[0] - 1, sizes[0], sizes[0] + 1, 2 * sizes[0], u64::from(u32::MAX)] {
        // Made by its path or by its name, it is as long as its segments.
        let table = Table::open(&path).unwrap();
        let sync = attach(&table, "0").unwrap();
        in_child(|| {
            limit(Resource::RLIMIT_FSIZE, limited);
            let named = Table::options().named(&name).unwrap();
            attach(&named, "0").unwrap().mark_updated().unwrap();
            let error = (0..10_000).find_map(|i| attach(&named, format!("{i}")).err());
            assert!(error.as_ref().is_none_or(is_full), "{error:?}");
            assert_eq!(error.is_some(), limited < 10 * sizes[0]);
        })
        .succeeds();
        assert!(sync.is_expired());
        fs::remove_file(&path).unwrap();
        in_child(|| {
            limit(Resource::RLIMIT_FSIZE, limited);
            let made = Table::options().named(&name);
            assert_eq!(made.is_ok(), limited >= sizes[0], "{made:?}");
            assert!(made.is_ok() || is_full(&made.unwrap_err()));
        })
        .succeeds();
        let _ = fs::remove_file(&path);
    }
}

#[test]
fn a_call_that_fails_under_a_limit_again_and_again_loses_nothing_and_works_when_the_limit_is_raised() {
    // Limits on file size and on address space, each met by growth of slots and of texts.
    for (is_file_size, is_long) in [(true, false), (true, true), (false, false), (false, true)] {
        kinds(16, |table| {
            let key = |i: usize| CacheKey::raw(if is_long { format!("{i:05000}") } else { format!("{i}") });
            in_child(|| {
                let mut syncs: Vec<_> = (0..5).map(|i| attach(&table, key(i)).unwrap()).collect();
                syncs.reserve(100_000);
                let size = table.stats().bytes + 3 * 4096;
                let resource = if is_file_size { Resource::RLIMIT_FSIZE } else { Resource::RLIMIT_AS };
                match is_file_size {
                    true => limit(resource, size),
                    false => spare_address_space(1 << 20),
                }
                let error = loop {
                    match attach(&table, key(syncs.len())) {
                        Ok(sync) => syncs.push(sync),
                        Err(error) => break error,
                    }
                };
                assert!(is_full(&error) && error.to_string().contains("ulimit"), "{error}");
                assert_eq!(table.stats().lost_bytes, 0);
                assert_loses_nothing(&table, &key(syncs.len()));
                limit(resource, getrlimit(resource).unwrap().1);
                assert_works(&table, &syncs[..5]);
                (0..100).for_each(|_| syncs.push(attach(&table, key(syncs.len())).unwrap()));
                assert_eq!(table.stats().lost_bytes, 0);
            })
            .succeeds();
        });
    }
}

// Address space.

/// From now on, this process can have no more than `bytes` of address space.
fn spare_address_space(bytes: u64) {
    let pages: u64 = fs::read_to_string("/proc/self/statm").unwrap().split(' ').next().unwrap().parse().unwrap();
    limit(Resource::RLIMIT_AS, pages * 4096 + bytes);
}

/// Runs `action` with no more than `bytes` of address space to spare.
fn with_little<T>(bytes: u64, action: impl FnOnce() -> T) -> T {
    spare_address_space(bytes);
    let result = action();
    limit(Resource::RLIMIT_AS, getrlimit(Resource::RLIMIT_AS).unwrap().1);
    result
}

#[test]
fn with_little_address_space_a_table_grows_less_and_works() {
    for power in 12..24 {
        let (_folder, path) = path();
        in_child(|| {
            let options = Table::options().capacity(16);
            let table = match with_little(1 << power, || options.open(&path)) {
                Ok(table) => table,
                Err(error) => {
                    assert!(power < 14 && matches!(error.kind(), ErrorKind::System { .. }), "{power}: {error:?}");
                    assert!(error.to_string().contains("ulimit -v"), "{error}");
                    assert_eq!(error.path(), Some(&*path));
                    Table::options().capacity(16).open(&path).unwrap();
                    return;
                }
            };
            // What the program itself needs meanwhile is there.
            let mut syncs = Vec::with_capacity(200_000);
            let before = table.stats();
            let error = with_little(1 << power, || attach_all(&table, &mut syncs));
            assert!(is_full(&error) && error.to_string().contains("ulimit -v"), "{error}");
            assert!(table.stats().bytes <= before.bytes + (1 << power));
            assert_works(&table, &syncs[..syncs.len().min(100)]);
            // Another process lets it grow: then new keys may stand where this process cannot see them.
            let great = Table::open(&path).unwrap();
            grow(&great, table.stats().segments + 1, &mut syncs);
            let error = with_little(0, || attach(&table, "one more")).unwrap_err();
            assert!(error.to_string().contains("ulimit -v") && error.path() == Some(&path), "{error}");
            assert!(attach(&great, "0").unwrap().mark_updated().is_ok() && syncs[0].is_expired());
            // A process that cannot sweep the table does not begin to retire it.
            assert!(with_little(0, || table.reset()).unwrap_err().to_string().contains("ulimit -v"));
            syncs.iter().for_each(|sync| _ = sync.refresh().unwrap());
            drop(Table::open(&path).unwrap());
            assert!(syncs.iter().all(|sync| !sync.is_expired()), "a reset that failed has changed something");
            // Without the limit, no update is missed.
            attach(&table, "one more").unwrap();
            table.reset().unwrap();
            assert!(syncs.iter().all(GenerationSynchronizer::is_expired));
            assert_works(&table, &syncs[..1]);
        })
        .succeeds();
    }
}

#[test]
fn keys_with_texts_that_a_process_cannot_map_are_not_damaged() {
    let (_folder, path) = path();
    in_child(|| {
        let reader = Table::open(&path).unwrap();
        let writer = Table::open(&path).unwrap();
        for key in 0..400 {
            GenerationSynchronizer::new(&writer, CacheKey::raw(format!("{key:060000}"))).unwrap();
        }
        with_little(2 << 20, || {
            let slots: Vec<_> = reader.slots().collect();
            assert_eq!(slots.len(), 400);
            assert!(slots.iter().any(|slot| slot.label_bytes().is_empty()), "all texts could be mapped");
            assert!(!slots.iter().any(gensync::SlotInfo::is_damaged));
        });
        assert!(reader.slots().all(|slot| slot.label_bytes().len() == 60_000 && !slot.is_damaged()));
    })
    .succeeds();
}

#[test]
fn a_process_that_cannot_map_all_of_a_table_notices_that_it_is_deleted() {
    let (_folder, path) = path();
    in_child(|| {
        let table = Table::options().capacity(16).open(&path).unwrap();
        let sync = attach(&table, "0").unwrap();
        let great = Table::open(&path).unwrap();
        grow(&great, 10, &mut Vec::new());
        drop(great);
        spare_address_space(0);
        attach(&table, "one more").unwrap_err();
        fs::remove_file(&path).unwrap();
        await_expiry(&sync);
        limit(Resource::RLIMIT_AS, getrlimit(Resource::RLIMIT_AS).unwrap().1);
        let new = attach(&Table::open(&path).unwrap(), "0").unwrap();
        sync.refresh().unwrap();
        new.mark_updated().unwrap();
        assert!(sync.is_expired());
    })
    .succeeds();
}

#[test]
fn tables_are_opened_until_there_is_no_address_space_left() {
    let (_folder, path) = path();
    let sync = attach(&Table::open(&path).unwrap(), "key").unwrap();
    in_child(|| {
        spare_address_space((8 << 30) + (300 << 20));
        let tables: Vec<_> = std::iter::from_fn(|| Table::open(&path).ok()).take(50).collect();
        assert_eq!(tables.len(), 50, "they take no more than they are long");
        assert!(tables.iter().all(|table| attach(table, "key").is_ok()));
        assert!(tables.iter().all(|table| attach(table, "key").unwrap().mark_updated().is_ok()));
    })
    .succeeds();
    assert!(sync.is_expired());
}

// Threads.

#[test]
fn without_a_thread_there_is_an_error_and_later_a_thread() {
    if !Uid::effective().is_root() {
        eprintln!("not root: the limit of another user cannot be reached");
        return;
    }
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let (sync, writer) = (attach(&table, "key").unwrap(), attach(&table, "key").unwrap());
    in_child(|| {
        nix::unistd::setuid(Uid::from_raw(STRANGER)).unwrap();
        // This process is the one.
        limit(Resource::RLIMIT_NPROC, 1);
        for _ in 0..100 {
            let error = sync.pollable().unwrap_err();
            assert!(error.to_string().contains("thread"), "{error}");
            assert_eq!(error.path(), Some(&*path));
            assert!(error.source().unwrap().to_string().contains("temporarily unavailable"), "{error:?}");
            #[cfg(feature = "async")]
            {
                let error = poll(sync.changed()).map(Result::unwrap_err);
                assert!(
                    matches!(&error, std::task::Poll::Ready(error) if error.to_string().contains("thread")),
                    "{error:?}"
                );
                let mut changes = sync.changes();
                let item = poll(std::future::poll_fn(|context| {
                    tokio_stream::Stream::poll_next(std::pin::Pin::new(&mut changes), context)
                }));
                assert!(matches!(item, std::task::Poll::Ready(Some(Err(_)))), "{item:?}");
            }
        }
        assert!(!sync.is_expired() && !sync.wait_timeout(Duration::from_millis(1)).is_changed());
        limit(Resource::RLIMIT_NPROC, getrlimit(Resource::RLIMIT_NPROC).unwrap().1);
        let pollable = sync.pollable().unwrap();
        writer.mark_updated().unwrap();
        while !pollable.acknowledge() {
            std::thread::yield_now();
        }
        // News needs no thread.
        limit(Resource::RLIMIT_NPROC, 1);
        drop(pollable);
        #[cfg(feature = "async")]
        assert!(matches!(poll(sync.changed()), std::task::Poll::Ready(Ok(()))));
    })
    .succeeds();
}

#[cfg(feature = "async")]
fn poll<T>(future: impl Future<Output = T>) -> std::task::Poll<T> {
    std::pin::pin!(future).poll(&mut std::task::Context::from_waker(std::task::Waker::noop()))
}

// Memory.

/// A group of processes that may use so much memory, what they put into files in memory included.
struct MemoryGroup(PathBuf);

impl MemoryGroup {
    fn new(name: &str, bytes: u64) -> Option<Self> {
        let folder = Path::new("/sys/fs/cgroup/memory");
        if !Uid::effective().is_root() || !folder.join("memory.limit_in_bytes").exists() {
            eprintln!("skipped, as memory groups (of version 1) cannot be had here");
            return None;
        }
        let group = Self(folder.join(format!("gensync-test-{}-{name}", std::process::id())));
        fs::create_dir(&group.0).unwrap();
        fs::write(group.0.join("memory.limit_in_bytes"), bytes.to_string()).unwrap();
        Some(group)
    }

    fn join(&self) {
        fs::write(self.0.join("cgroup.procs"), std::process::id().to_string()).unwrap();
    }

    fn kill_nobody(&self) {
        fs::write(self.0.join("memory.oom_control"), "1").unwrap();
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_process_that_is_killed_for_want_of_memory_as_it_grows_a_table_leaves_it_whole() {
    let Some(disk) = Mount::tmpfs("size=256m") else { return };
    for megabytes in [3, 4, 5] {
        let path = disk.path(&format!("{megabytes}"));
        let table = Table::options().capacity(64).open(&path).unwrap();
        let survivor = attach(&table, "0").unwrap();
        let Some(group) = MemoryGroup::new(&format!("killed-{megabytes}"), megabytes << 20) else { return };
        let child = in_child(|| {
            group.join();
            for i in 0..1_000_000 {
                attach(&table, format!("{i}")).unwrap().mark_updated().unwrap();
            }
        });
        assert!(child.ends_by_kill());
        let stats = table.stats();
        assert!(stats.keys > 1000 && stats.bytes < (megabytes << 20) + (1 << 20), "{stats:?}");
        assert!(survivor.is_expired());
        survivor.refresh().unwrap();
        assert_recovered(&table, &[survivor]);
    }
}

#[test]
fn growth_beyond_the_memory_of_a_group_that_kills_nobody_is_an_error() {
    let Some(disk) = Mount::tmpfs("size=256m") else { return };
    let path = disk.path("table");
    let table = Table::options().capacity(64).open(&path).unwrap();
    let survivor = attach(&table, "0").unwrap();
    let Some(group) = MemoryGroup::new("refused", 5 << 20) else { return };
    group.kill_nobody();
    in_child(|| {
        group.join();
        let error = (0..1_000_000).find_map(|i| attach(&table, format!("{i}")).err()).unwrap();
        assert!(error.path() == Some(&path) && error.key().is_some(), "{error}");
        assert!(error.source().unwrap().to_string().contains("memory"), "{error:?}");
        assert!(matches!(error.kind(), ErrorKind::System { .. }), "{error:?}");
        survivor.mark_updated().unwrap();
    })
    .succeeds();
    assert!(survivor.is_expired());
    survivor.refresh().unwrap();
    assert_recovered(&table, &[survivor]);
}

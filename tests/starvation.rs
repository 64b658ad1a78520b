//! Guards against exhausted resources: no room, no inode, no descriptor, no address space, no thread, a file system that goes away. Each
//! ends in an error that names the path, with a table that works on, and is forgotten when there is enough again.

#[path = "starvation/descriptors.rs"]
mod descriptors;
#[path = "starvation/disk.rs"]
mod disk;
#[path = "starvation/file_systems.rs"]
mod file_systems;
#[path = "starvation/growers.rs"]
mod growers;
#[path = "support/layout.rs"]
mod layout;
#[path = "starvation/limits.rs"]
mod limits;
#[path = "starvation/room.rs"]
mod room;
mod support;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use gensync::{CacheKey, Error, ErrorKind, GenerationSynchronizer, Table};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use support::in_child;

/// The user "nobody", so that limits of a user and permissions apply.
const STRANGER: u32 = 54_321;

fn attach(table: &Table, key: impl Into<gensync::CacheKey>) -> Result<GenerationSynchronizer, Error> {
    GenerationSynchronizer::new(table, key)
}

fn is_full(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::TableFull { .. })
}

/// The soft limit from now on.
fn limit(resource: Resource, value: u64) {
    setrlimit(resource, value, getrlimit(resource).unwrap().1).unwrap();
}

/// Attaches to new keys until one of them finds no room.
fn attach_all(table: &Table, syncs: &mut Vec<GenerationSynchronizer>) -> Error {
    loop {
        match attach(table, format!("{}", syncs.len())) {
            Ok(sync) => syncs.push(sync),
            Err(error) => return error,
        }
    }
}

/// The key that found no room finds none when it is tried again, nor do others, unless there happens to be a place for them; and no
/// room is lost by that.
fn assert_loses_nothing(table: &Table, key: &CacheKey) {
    let figures = || {
        let stats = table.stats();
        let size = table.path().map(|path| fs::metadata(path).unwrap().len());
        (stats.keys, stats.text_bytes, stats.lost_bytes, stats.bytes, stats.capacity, size)
    };
    let before = figures();
    for _ in 0..100 {
        assert!(is_full(&attach(table, key.clone()).unwrap_err()));
    }
    assert_eq!(figures(), before);
    let others = (0..100).map(|i| CacheKey::raw(format!("{} other {i}", key.as_str())));
    let is_new = |other: &CacheKey| table.generation(other).unwrap().is_none();
    let found = others.filter(|other| {
        is_new(other) && attach(table, other.clone()).map_err(|error| assert!(is_full(&error))).is_ok()
    });
    let (found, after) = (found.count() as u64, figures());
    // Room for texts may have been made before there was none for a slot; the next key takes it.
    assert_eq!((after.0, after.2, after.4), (before.0 + found, before.2, before.4));
    assert!(after.3 <= before.3 + before.3 / 8 + 4096, "{before:?}, then {after:?}");
    for _ in 0..100 {
        assert!(is_full(&attach(table, key.clone()).unwrap_err()));
    }
    assert_eq!(figures(), after);
}

/// Attaches to new keys until the table has so many segments.
fn grow(table: &Table, segments: u32, syncs: &mut Vec<GenerationSynchronizer>) {
    while table.stats().segments < segments {
        (0..1 + syncs.len() / 8).for_each(|_| syncs.push(attach(table, format!("{}", syncs.len())).unwrap()));
    }
}

/// All that can be done with existing keys can be done, in this process and in another one.
fn assert_works(table: &Table, syncs: &[GenerationSynchronizer]) {
    let work = || {
        let sync = syncs.last().unwrap();
        sync.refresh().unwrap();
        let same = attach(table, sync.cache_key().clone()).unwrap();
        let generation = sync.mark_updated().unwrap();
        assert!(same.is_expired() && !sync.is_expired());
        assert_eq!(same.refresh().unwrap(), generation);
        assert!(!same.is_expired());
        same.update(|| Ok::<_, Error>(())).unwrap();
        assert!(sync.is_expired());
        sync.refresh().unwrap();
        sync.clear().unwrap();
        assert!(same.is_expired() && sync.is_expired());
        for sync in syncs {
            sync.mark_updated().unwrap();
            sync.refresh().unwrap();
            assert!(!sync.is_expired());
        }
        assert!(table.slots().all(|slot| slot.pending() == 0));
    };
    work();
    in_child(work).succeeds();
    syncs.iter().for_each(|sync| _ = sync.refresh().unwrap());
}

/// Everything works, what needs room as well.
fn assert_recovered(table: &Table, syncs: &[GenerationSynchronizer]) {
    assert_works(table, syncs);
    let segments = table.stats().segments;
    for i in 0.. {
        attach(table, format!("late{i}")).unwrap();
        if table.stats().segments > segments {
            break;
        }
    }
    table.reset().unwrap();
    assert!(syncs.iter().all(GenerationSynchronizer::is_expired));
    assert_works(table, syncs);
}

fn names(folder: &Path) -> Vec<std::ffi::OsString> {
    let mut names: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    names
}

/// Waits until `sync` is expired. Checks it as a busy program does.
fn await_expiry(sync: &GenerationSynchronizer) -> Duration {
    let start = Instant::now();
    while !sync.is_expired() {
        assert!(start.elapsed() < support::LIMIT, "never noticed");
        std::thread::yield_now();
    }
    start.elapsed()
}

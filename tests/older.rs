//! Guards against an emulation of version 1 that differs from what processes of version 1 do: an upgrade that was tested with it
//! would lose updates of the real ones.
//!
//! Here the crate itself still is of version 1. So each side opens what the other one has made, and they work on one table.

mod support;
#[path = "support/version_1.rs"]
mod version_1;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Instant;

use gensync::{ErrorKind, GenerationSynchronizer, OwnerCheck, Table};
use nix::sys::signal::{Signal, raise};
use support::{
    Child, LIMIT, Traced, await_value, dawdle, in_child, is_overslept, micros, next_random, path, shared_words,
};
use version_1::{Key, RETIRED, RETIRING, Refused, Retired, SLOT, SleepOn, boot_id, native};

fn attach(table: &Table) -> GenerationSynchronizer {
    GenerationSynchronizer::new(table, "key").unwrap()
}

/// A table, made by the emulation, with one key; the crate's view of both.
fn both() -> (tempfile::TempDir, Key, GenerationSynchronizer) {
    let (folder, path) = path();
    let key = version_1::Table::create(&path, 8).attach("key").unwrap();
    let sync = attach(&Table::open(&path).unwrap());
    assert_eq!(sync.sync_gen().unwrap().get(), key.generation());
    (folder, key, sync)
}

fn keys() -> Vec<String> {
    let long = ["k".repeat(87), "k".repeat(88), format!("{}\u{e4}rest", "k".repeat(87)), "k".repeat(200)];
    let odd = ["\u{1f511}", "a:b", "tenant:a%3Ab"].map(str::to_owned);
    long.into_iter().chain(odd).chain((0..56).map(|i| format!("key-{i}"))).collect()
}

/// The file's bytes without what depends on the time: the generations of its slots and when they began.
fn timeless(path: &Path, capacity: u64) -> Vec<u8> {
    let mut bytes = fs::read(path).unwrap();
    for segment in 0..u32::from(bytes[148]) {
        let start = version_1::segment_offset(capacity, segment);
        for slot in (0..(capacity << segment) as usize).map(|index| start + SLOT * index) {
            let is_claimed = bytes[slot + 8..slot + 16] != [0; 8];
            for word in [slot, slot + 32].into_iter().filter(|_| is_claimed) {
                assert_ne!(bytes[word..word + 8], [0; 8], "the slot has not begun");
                bytes[word..word + 8].fill(0);
            }
        }
    }
    bytes
}

#[test]
fn the_same_keys_make_the_same_bytes() {
    for capacity in [1, 2, 16, 64, 256] {
        let (_folder, path) = path();
        let copy = path.with_extension("copy");
        let table = Table::options().capacity(capacity).open(&path).unwrap();
        fs::copy(&path, &copy).unwrap();
        let emulated = version_1::Table::open(&copy).unwrap();
        for key in keys() {
            drop(GenerationSynchronizer::new(&table, key.as_str()).unwrap());
            emulated.attach(&key).unwrap();
        }
        assert_eq!((table.stats().segments > 1, table.stats().segments), (capacity < 64, emulated.segments()));
        // 63 keys in 64 slots: most of them are not where their search begins.
        assert!(capacity != 64 || table.stats().longest_probe > 4);
        assert!(timeless(&path, capacity) == timeless(&copy, capacity));
    }
}

#[test]
fn both_grow_one_table_at_once() {
    for round in 0..20 {
        let (_folder, path) = path();
        drop(version_1::Table::create(&path, 1));
        let start = &shared_words(1)[0];
        let names = |seed: u64| {
            let mut keys: Vec<_> = (0..100).map(|i| format!("{i}")).collect();
            let mut random = seed;
            (1..keys.len()).for_each(|i| keys.swap(i, (next_random(&mut random) % (i as u64 + 1)) as usize));
            keys
        };
        let emulated = |seed: u64| {
            let table = version_1::Table::open(&path).unwrap();
            await_value(start, 1);
            names(seed).iter().for_each(|key| _ = table.attach(key).unwrap().mark().unwrap());
        };
        let real = |seed: u64| {
            let table = Table::open(&path).unwrap();
            await_value(start, 1);
            let mark =
                |key: &String| GenerationSynchronizer::new(&table, key.as_str()).unwrap().mark_updated().unwrap();
            names(seed).iter().for_each(|key| _ = mark(key));
        };
        let seed = 4 * round + 1;
        let children = [
            in_child(|| emulated(seed)),
            in_child(|| real(seed + 1)),
            in_child(|| emulated(seed + 2)),
            in_child(|| real(seed + 3)),
        ];
        start.store(1, SeqCst);
        children.into_iter().for_each(Child::succeeds);
        let table = Table::open(&path).unwrap();
        let mut updates: Vec<_> = table.slots().map(|slot| (slot.label().into_owned(), slot.updates())).collect();
        let mut expected: Vec<_> = (0..100).map(|i| (i.to_string(), 4)).collect();
        updates.sort_unstable();
        expected.sort_unstable();
        assert_eq!(updates, expected, "a key is there twice, or an update is lost");
    }
}

#[test]
fn a_new_table_is_like_one_of_the_crate() {
    let (_folder, path) = path();
    let other = path.with_extension("other");
    for capacity in [1, 2, 128, 1024] {
        drop(version_1::Table::create(&path, capacity));
        Table::options().capacity(capacity).open(&other).unwrap();
        let mut files = [&path, &other].map(|path| fs::read(path).unwrap());
        for file in &mut files {
            let mut header = file[..4096].to_vec();
            version_1::seal(&mut header);
            assert_eq!(file[80..88], header[80..88], "the checksum");
            // Random numbers, the time, and the checksum of all.
            file[32..72].fill(0);
            file[80..88].fill(0);
        }
        assert!(files[0] == files[1]);
        let table = Table::open(&path).unwrap();
        assert_eq!((table.stats().capacity, table.stats().segments), (capacity, 1));
        fs::remove_file(&path).unwrap();
        fs::remove_file(&other).unwrap();
    }
}

#[test]
fn each_finds_what_the_other_has_made() {
    for capacity in [2, 64] {
        let (_folder, path) = path();
        let table = Table::options().capacity(capacity).open(&path).unwrap();
        let syncs: Vec<_> =
            keys().iter().map(|key| GenerationSynchronizer::new(&table, key.as_str()).unwrap()).collect();
        let emulated = version_1::Table::open(&path).unwrap();
        for (key, sync) in keys().iter().zip(&syncs) {
            let found = emulated.get(key).unwrap();
            assert_eq!(found.generation(), sync.sync_gen().unwrap().get());
            assert_eq!(found.offset(), emulated.attach(key).unwrap().offset());
            sync.mark_updated().unwrap();
            assert_eq!(found.updates(), 1);
            assert!(found.is_expired());
        }
        assert!(emulated.get("new").is_none());
        let new = emulated.attach("new").unwrap();
        let found = table.slots().find(|slot| slot.label() == "new").unwrap();
        assert_eq!((found.generation().get(), found.updates()), (new.generation(), 0));
        new.mark().unwrap();
        assert_eq!(table.generation("new").unwrap().unwrap().get(), new.generation());
        assert_eq!(table.slots().count(), keys().len() + 1, "a key is there twice");
    }
}

#[test]
fn marks_of_each_expire_the_other() {
    let (_folder, key, sync) = both();
    for _ in 0..3 {
        let generation = key.mark().unwrap();
        assert!(sync.is_expired() && key.is_expired());
        assert_eq!(sync.refresh().unwrap().get(), generation);
        key.refresh_with(|| ()).unwrap();
        assert!(!sync.is_expired() && !key.is_expired());
        let generation = sync.mark_updated().unwrap();
        assert!(key.is_expired());
        assert_eq!(key.ticket(), Ok(generation.get()));
        key.refresh_with(|| ()).unwrap();
        sync.refresh().unwrap();
    }
    let reader = version_1::Table::open_read_only(sync.table().path().unwrap()).unwrap().get("key").unwrap();
    assert!(!reader.is_expired());
    sync.mark_updated().unwrap();
    assert!(reader.is_expired());
}

#[test]
fn updates_of_each_are_pending_for_the_other() {
    let (_folder, key, sync) = both();
    let pending = || sync.table().slots().next().unwrap().pending();
    let update = key.begin_update().unwrap();
    assert_eq!((pending(), key.pending()), (1, 1));
    assert!(!sync.is_expired() && !key.is_expired(), "an update is in flight");
    let other = sync.begin_update().unwrap();
    assert_eq!(pending(), 2);
    assert!(!sync.is_expired() && !key.is_expired());
    let generation = update.finish().unwrap();
    assert_eq!((pending(), key.generation()), (1, generation));
    assert!(sync.is_expired() && key.is_expired());
    key.refresh_with(|| ()).unwrap();
    sync.refresh().unwrap();
    assert!(!sync.is_expired() && !key.is_expired(), "the other one is in flight");
    assert_eq!(other.finish().unwrap().get(), generation + 1);
    assert!(key.is_expired());
    key.refresh_with(|| ()).unwrap();
    key.begin_update().unwrap().abandon();
    sync.begin_update().unwrap().abandon();
    assert!(!sync.is_expired() && !key.is_expired() && pending() == 0);
    assert_eq!(key.update(|| 7), Ok(7));
    assert!(sync.is_expired());
}

/// A child that begins an update and is killed in the middle of it.
fn dies_in_an_update(begin: impl FnOnce()) {
    let child = in_child(|| {
        begin();
        unreachable!("killed within");
    });
    assert!(child.ends_by_kill());
}

fn die_emulated(path: &Path) {
    dies_in_an_update(|| {
        let key = version_1::Table::open(path).unwrap().attach("key").unwrap();
        let _update = key.begin_update().unwrap();
        raise(Signal::SIGKILL).unwrap();
    });
}

#[test]
fn each_recovers_an_update_whose_process_was_killed() {
    let (_folder, key, sync) = both();
    let path = sync.table().path().unwrap();
    die_emulated(path);
    assert_eq!(key.pending(), 1);
    assert!(sync.is_expired(), "the crate announces it");
    assert_eq!((key.pending(), key.updates()), (0, 1));
    assert!(key.is_expired());
    key.refresh_with(|| ()).unwrap();
    sync.refresh().unwrap();
    dies_in_an_update(|| {
        let sync = attach(&Table::open(path).unwrap());
        let _update = sync.begin_update().unwrap();
        raise(Signal::SIGKILL).unwrap();
    });
    let reader = version_1::Table::open_read_only(path).unwrap().get("key").unwrap();
    assert!(reader.is_expired(), "lost for a reader");
    assert_eq!(key.pending(), 1);
    assert!(key.is_expired(), "the emulation announces it");
    assert_eq!((key.pending(), key.updates()), (0, 2));
    assert!(sync.is_expired());
    // The lock is gone with the process before it was counted in: nothing has happened.
    sync.refresh().unwrap();
    dies_in_an_update(|| {
        let key = version_1::Table::open(path).unwrap().attach("key").unwrap();
        let _locked = key.lock_for_update();
        raise(Signal::SIGKILL).unwrap();
    });
    assert!(!sync.is_expired());
}

#[test]
fn waiters_of_each_are_woken_by_the_other() {
    let (_folder, _key, sync) = both();
    let path = sync.table().path().unwrap();
    let words = shared_words(1);
    let changed = &words[0];
    for sleep_on in [SleepOn::Key, SleepOn::Table] {
        for is_update in [false, true] {
            let waiter = in_child(|| {
                let key = version_1::Table::open(path).unwrap().attach("key").unwrap();
                assert!(key.wait(sleep_on, LIMIT), "no wakeup");
            });
            waiter.await_sleep();
            while !sync.table().slots().next().unwrap().is_awaited() {
                std::thread::yield_now();
            }
            match is_update {
                true => sync.update(|| Ok::<_, ()>(())).unwrap(),
                false => _ = sync.mark_updated().unwrap(),
            }
            waiter.succeeds();
        }
    }
    for is_update in [false, true] {
        changed.store(0, SeqCst);
        let waiter = in_child(|| {
            let sync = attach(&Table::open(path).unwrap());
            let start = micros();
            assert!(sync.wait_timeout(LIMIT).is_changed());
            assert!(!is_overslept(start, changed.load(SeqCst)), "not woken");
        });
        let key = version_1::Table::open(path).unwrap().attach("key").unwrap();
        while !key.is_awaited() {
            std::thread::yield_now();
        }
        changed.store(micros(), SeqCst);
        match is_update {
            true => key.update(|| ()).unwrap(),
            false => _ = key.mark().unwrap(),
        }
        waiter.succeeds();
        assert!(!key.is_awaited());
    }
    // A table that is watched as a whole: by a new key, too.
    changed.store(0, SeqCst);
    let waiter = in_child(|| {
        let mut watch = Table::open(path).unwrap().watch();
        changed.store(2, SeqCst);
        assert_eq!(watch.next_timeout(LIMIT).unwrap().label(), "new");
    });
    await_value(changed, 2);
    waiter.await_sleep();
    version_1::Table::open(path).unwrap().attach("new").unwrap();
    waiter.succeeds();
}

#[test]
fn a_reset_retires_the_emulated_holders_and_wakes_the_waiters() {
    let (_folder, key, sync) = both();
    let path = sync.table().path().unwrap();
    let waiters = [SleepOn::Key, SleepOn::Table].map(|sleep_on| {
        let waiter = in_child(move || {
            let key = version_1::Table::open(path).unwrap().attach("key").unwrap();
            assert!(key.wait(sleep_on, LIMIT), "no wakeup");
            assert!(key.is_retired());
        });
        waiter.await_sleep();
        waiter
    });
    let old = key.generation();
    sync.table().reset().unwrap();
    waiters.into_iter().for_each(Child::succeeds);
    assert!(key.is_expired() && key.is_expired(), "for ever");
    assert_eq!(key.mark(), Err(Retired));
    assert_eq!(key.ticket(), Err(Retired));
    assert_eq!(key.update(|| unreachable!("the source must not be changed")), Err(Retired));
    assert_eq!(key.table().state(), RETIRED);
    assert!(key.table().attach("new").is_err());
    let next = key.table().successor().unwrap().attach("key").unwrap();
    assert!(next.generation() > old);
    sync.refresh().unwrap();
    next.mark().unwrap();
    assert!(sync.is_expired(), "both go on in one table");
}

#[test]
fn a_reset_waits_for_an_emulated_update_in_flight_and_holds_up_new_ones() {
    let (_folder, key, sync) = both();
    let path = sync.table().path().unwrap();
    let update = key.begin_update().unwrap();
    let resetter = in_child(|| Table::open(path).unwrap().reset().unwrap());
    while !key.table().is_held_up() {
        std::thread::yield_now();
    }
    resetter.await_sleep();
    assert!(!key.table().are_updates_excluded() && key.table().state() == version_1::LIVE && !key.is_expired());
    update.finish().unwrap();
    resetter.succeeds();
    assert!(key.is_retired());

    // Once no update is in flight, none begins, until the table is retired.
    let key = key.table().successor().unwrap().attach("key").unwrap();
    let mut resetter = Traced::new(|| Table::open(path).unwrap().reset().unwrap());
    while !key.table().are_updates_excluded() {
        assert!(resetter.goes_on());
    }
    let updater = in_child(|| {
        let key = version_1::Table::open(path).unwrap().attach("key").unwrap();
        assert_eq!(key.update(|| unreachable!("the source must not be changed")), Err(Retired));
    });
    updater.await_sleep();
    assert!(!key.is_retired() && key.pending() == 0);
    while resetter.goes_on() {}
    updater.succeeds();
    assert!(key.is_retired());
}

#[test]
fn the_emulation_finishes_a_reset_whose_process_was_killed() {
    // With each stop of a reset, until it succeeds.
    for stops in 0.. {
        let (_folder, key, sync) = both();
        let path = sync.table().path().unwrap().to_owned();
        let old = key.generation();
        let mut resetter = Traced::new(|| Table::open(&path).unwrap().reset().unwrap());
        let is_killed = (0..stops).all(|_| resetter.goes_on());
        drop(resetter);
        let (state, is_in_place) = (key.table().state(), key.table().is_in_place());
        let next = match key.mark() {
            Ok(_) => {
                assert!(state == version_1::LIVE && is_in_place);
                continue;
            }
            Err(Retired) => key.table().successor().unwrap().attach("key").unwrap(),
        };
        assert!(next.generation() > old && key.table().state() == RETIRED);
        assert!(sync.is_expired());
        sync.refresh().unwrap();
        assert_eq!(sync.sync_gen().unwrap().get(), next.generation());
        next.mark().unwrap();
        assert!(sync.is_expired(), "both go on in one table");
        if !is_killed {
            assert_eq!((state, is_in_place), (RETIRED, false));
            return;
        }
    }
}

#[test]
fn the_crate_goes_on_in_what_the_emulation_has_put_in_place() {
    let (_folder, key, sync) = both();
    let path = sync.table().path().unwrap();
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&native(RETIRING), 144).unwrap();
    let next = key.table().successor().unwrap().attach("key").unwrap();
    assert!(key.is_retired() && key.table().state() == RETIRED);
    assert!(sync.is_expired());
    assert_eq!(sync.refresh().unwrap().get(), next.generation());
    let update = next.begin_update().unwrap();
    assert!(!sync.is_expired());
    update.finish().unwrap();
    assert!(sync.is_expired());
}

#[test]
fn a_newer_version_at_the_path_is_reported_by_each() {
    let (_folder, key, sync) = both();
    let path = sync.table().path().unwrap();
    let mut newer = fs::read(path).unwrap();
    newer[8] = 2;
    version_1::seal(&mut newer);
    let aside = path.with_extension("newer");
    fs::write(&aside, newer).unwrap();
    sync.table().remove().unwrap();
    fs::rename(&aside, path).unwrap();
    assert_eq!(key.mark(), Err(Retired));
    assert_eq!(key.table().successor().unwrap_err(), Refused::Version(2));
    assert!(key.is_expired());
    let error = sync.mark_updated().unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::LayoutVersion { found: 2, expected: 1, .. }), "{error}");
    assert!(sync.is_expired());
}

#[test]
fn a_table_is_not_renewed_while_the_emulation_has_it_open() {
    // In a child, as no other process may have a copy of the descriptors.
    in_child(|| {
        let (_folder, path) = path();
        let key = version_1::Table::create(&path, 8).attach("key").unwrap();
        let generation = key.generation();
        OpenOptions::new().write(true).open(&path).unwrap().write_all_at(&[0x5a; 16], 128).unwrap();
        assert_eq!(version_1::Table::open(&path).unwrap_err(), Refused::OtherBoot);
        let of_table = || Table::open(&path).unwrap().generation("key").unwrap().unwrap().get();
        assert_eq!(of_table(), generation);
        drop(key);
        assert!(of_table() > generation);
        assert_eq!(version_1::Table::open(&path).unwrap().get("key").unwrap().updates(), 0);
    })
    .succeeds();
}

#[test]
fn what_is_no_table_of_version_1_is_refused_by_each() {
    let (_folder, path) = path();
    drop(version_1::Table::create(&path, 8).attach("key").unwrap());
    let good = fs::read(&path).unwrap();
    let refused = |change: &dyn Fn(&mut Vec<u8>), sealed: bool| {
        let mut bytes = good.clone();
        change(&mut bytes);
        if sealed {
            version_1::seal(&mut bytes);
        }
        fs::remove_file(&path).unwrap();
        fs::write(&path, bytes).unwrap();
        Table::open(&path).unwrap_err();
        version_1::Table::open(&path).unwrap_err()
    };
    assert_eq!(refused(&|bytes| bytes[0] = b'x', true), Refused::NotATable);
    assert_eq!(refused(&|bytes| bytes[8] = 2, true), Refused::Version(2));
    assert_eq!(refused(&|bytes| bytes[32] ^= 1, false), Refused::Damaged("checksum"));
    assert_eq!(refused(&|bytes| bytes[12] = 2, true), Refused::Damaged("byte order"));
    assert_eq!(refused(&|bytes| bytes[16] = 64, true), Refused::Damaged("slot size"));
    assert_eq!(refused(&|bytes| bytes[20] = 1, true), Refused::Damaged("header size"));
    assert_eq!(refused(&|bytes| bytes[24] = 7, true), Refused::Damaged("capacity"));
    assert_eq!(refused(&|bytes| bytes[79] = 1, true), Refused::Damaged("floor"));
    assert_eq!(refused(&|bytes| bytes[144] = 4, true), Refused::Damaged("state"));
    assert_eq!(refused(&|bytes| bytes[148] = 0, true), Refused::Damaged("segments"));
    assert_eq!(refused(&|bytes| bytes[148] = 2, true), Refused::Truncated);
    assert_eq!(refused(&|bytes| bytes.truncate(5000), true), Refused::Truncated);
    fs::remove_file(&path).unwrap();
    assert_eq!(version_1::Table::open(&path).unwrap_err(), Refused::Missing);
}

#[test]
fn the_golden_files_are_read_as_they_were_written() {
    let (_folder, path) = path();
    let golden: [&[u8]; 3] = [
        include_bytes!("vectors/version-1.gensync"),
        include_bytes!("vectors/version-1-everything.gensync"),
        include_bytes!("vectors/version-1-retired.gensync"),
    ];
    for (index, content) in golden.into_iter().enumerate() {
        let mut content = content.to_vec();
        content[128..144].copy_from_slice(&boot_id());
        fs::write(&path, &content).unwrap();
        let emulated = [version_1::Table::open(&path), version_1::Table::open_read_only(&path)].map(Result::unwrap);
        if index == 2 {
            for table in emulated {
                assert_eq!(table.state(), RETIRED);
                for key in ["a", "b", "c"] {
                    let key = table.get(key).unwrap();
                    assert!(key.is_retired() && key.is_expired() && key.ticket() == Err(Retired));
                }
            }
            continue;
        }
        let table = Table::options().read_only(true).owner(OwnerCheck::Anyone).open(&path).unwrap();
        let names: Vec<_> = table.slots().map(|slot| slot.label().into_owned()).collect();
        assert_eq!(names.len(), [3, 9][index]);
        let whole = |label: &String| match (index, label.len()) {
            (0, 88) => "k".repeat(100),
            (1, 88..) => format!("{}\u{e4}rest", "k".repeat(87)),
            _ => label.clone(),
        };
        for (slot, name) in table.slots().zip(&names) {
            for emulated in &emulated {
                let key = emulated.get(&whole(name)).unwrap_or_else(|| panic!("{name} is not found"));
                let found = (key.generation(), key.updates(), key.pending(), key.is_awaited());
                assert_eq!(found, (slot.generation().get(), slot.updates(), slot.pending(), slot.is_awaited()));
                assert_eq!(key.table().capacity(), [4, 2][index]);
            }
        }
        assert!(emulated.iter().all(|table| table.get("half").is_none() && table.get("unbegun").is_none()));
        assert!(fs::read(&path).unwrap() == content, "reading changed it");
        if index == 1 {
            // The claims that were begun are finished where they are.
            for key in ["half", "unbegun"] {
                assert_eq!(emulated[0].attach(key).unwrap().updates(), 0);
                assert_eq!(table.slots().filter(|slot| slot.label() == key).count(), 1);
            }
        }
    }
}

/// Kills a child, which must not have failed before.
fn kill(child: Child) {
    nix::sys::signal::kill(child.pid(), Signal::SIGKILL).unwrap();
    let _ = child.ends_by_kill();
}

const NAMES: [&str; 2] = ["marked", "updated"];

/// Emulated processes and real ones change two sources, reset the table, and are killed at any moment. Whatever was announced must
/// be seen by all.
#[test]
fn no_update_is_lost_between_the_emulation_and_the_crate() {
    for round in 1..=20_u64 {
        let (_folder, path) = path();
        drop(version_1::Table::create(&path, 8));
        let words = shared_words(5);
        let (sources, announced, stop) = (&words[..2], &words[2..4], &words[4]);
        let emulated = |seed: u64| {
            let mut random = seed;
            let mut table = version_1::Table::open(&path).unwrap();
            while stop.load(SeqCst) == 0 {
                let index = (next_random(&mut random) % 2) as usize;
                let written = table.attach(NAMES[index]).and_then(|key| match index {
                    0 => {
                        let state = sources[0].fetch_add(1, SeqCst) + 1;
                        key.mark().map(|_| state)
                    }
                    _ => key.update(|| {
                        dawdle(&mut random, 50);
                        sources[1].fetch_add(1, SeqCst) + 1
                    }),
                });
                match written {
                    Ok(state) => _ = announced[index].fetch_max(state, SeqCst),
                    Err(Retired) => table = table.successor().unwrap(),
                }
            }
        };
        let real = |seed: u64| {
            let mut random = seed;
            let table = Table::open(&path).unwrap();
            let syncs = NAMES.map(|name| GenerationSynchronizer::new(&table, name).unwrap());
            while stop.load(SeqCst) == 0 {
                let index = (next_random(&mut random) % 2) as usize;
                let state = match index {
                    0 => {
                        let state = sources[0].fetch_add(1, SeqCst) + 1;
                        syncs[0].mark_updated().unwrap();
                        state
                    }
                    _ => syncs[1].update(|| Ok::<_, ()>(sources[1].fetch_add(1, SeqCst) + 1)).unwrap(),
                };
                announced[index].fetch_max(state, SeqCst);
                if next_random(&mut random).is_multiple_of(500) {
                    table.reset().unwrap();
                }
            }
        };
        let check_emulated = || {
            let mut table = version_1::Table::open(&path).unwrap();
            'table: while stop.load(SeqCst) == 0 {
                let Ok(key) = table.attach(NAMES[1]) else {
                    table = table.successor().unwrap();
                    continue;
                };
                let load = || sources[1].load(SeqCst);
                let Ok(mut state) = key.refresh_with(load) else { continue };
                while stop.load(SeqCst) == 0 {
                    let before = announced[1].load(SeqCst);
                    if key.is_expired() {
                        match key.refresh_with(load) {
                            Ok(loaded) => state = loaded,
                            Err(Retired) => {
                                table = table.successor().unwrap();
                                continue 'table;
                            }
                        }
                    }
                    assert!(state >= before, "the emulation misses an update");
                }
            }
        };
        let check_real = || {
            let table = Table::open(&path).unwrap();
            let syncs = NAMES.map(|name| GenerationSynchronizer::new(&table, name).unwrap());
            let load = |index: usize| syncs[index].refresh_with(|| Ok::<_, ()>(sources[index].load(SeqCst))).unwrap();
            let mut states = [0, 1].map(load);
            while stop.load(SeqCst) == 0 {
                for index in 0..2 {
                    let before = announced[index].load(SeqCst);
                    if syncs[index].is_expired() {
                        states[index] = load(index);
                    }
                    assert!(states[index] >= before, "the crate misses an update");
                }
            }
        };
        let readers = [in_child(check_emulated), in_child(check_real)];
        let mut random = round;
        let start = Instant::now();
        let mut writers: Vec<_> = Vec::new();
        while start.elapsed().as_millis() < 300 {
            if writers.len() >= 4 {
                kill(writers.remove((next_random(&mut random) % 4) as usize));
            }
            let seed = next_random(&mut random);
            writers.push(if seed.is_multiple_of(2) { in_child(|| emulated(seed)) } else { in_child(|| real(seed)) });
            dawdle(&mut random, 20_000);
        }
        // The last killed one may have left an update pending: it is announced by the readers.
        stop.store(1, SeqCst);
        readers.into_iter().chain(writers).for_each(Child::succeeds);
    }
}

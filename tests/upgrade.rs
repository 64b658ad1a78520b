//! Guards against updates that are lost, and processes that stay stale, when a table of version 1 is replaced while processes of
//! version 1 are at work on it.
//!
//! Those are emulated, as the crate does not write version 1 any more.

mod support;
#[path = "support/version_1.rs"]
mod version_1;

use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use gensync::{Error, ErrorKind, GenerationSynchronizer, OwnerCheck, Table, TableOptions};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::signal::{Signal, raise};
use nix::unistd::{Uid, alarm};
use support::{Child, LIMIT, Traced, await_value, dawdle, in_child, next_random, path, shared_words};
use version_1::{LIVE, RETIRED, RETIRING, Refused, Retired, SLOT, SleepOn, native};

const OLDER: u32 = 1;
const PRESENT: u32 = 2;

fn options() -> TableOptions {
    Table::options().owner(OwnerCheck::Anyone)
}

fn replacing() -> TableOptions {
    options().replace_older(true)
}

fn attach(table: &Table, key: &str) -> GenerationSynchronizer {
    GenerationSynchronizer::new(table, key).unwrap()
}

/// A table of version 1 with one key.
fn older() -> (tempfile::TempDir, PathBuf, version_1::Key) {
    let (folder, path) = path();
    let key = version_1::Table::create(&path, 16).attach("key").unwrap();
    (folder, path, key)
}

/// Waits until a process holds updates up.
fn await_hold_up(key: &version_1::Key) {
    let start = Instant::now();
    while !key.table().is_held_up() {
        assert!(start.elapsed() < LIMIT, "no process holds updates up");
        std::thread::yield_now();
    }
}

fn layout_version(path: &Path) -> u32 {
    let mut version = [0; 4];
    File::open(path).unwrap().read_exact_at(&mut version, 8).unwrap();
    u32::from_le_bytes(version)
}

fn names(path: &Path) -> Vec<std::ffi::OsString> {
    let entries = fs::read_dir(path.parent().unwrap()).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    names
}

fn assert_refused(error: &Error, path: &Path) {
    let is_version = matches!(error.kind(), ErrorKind::LayoutVersion { found: OLDER, expected: PRESENT, .. });
    assert!(is_version && error.path() == Some(path), "{error}");
    let text = error.to_string();
    assert!(text.contains("replace_older(true)") && text.contains("gensync upgrade"), "{text}");
}

/// A holder of a table that was replaced: whatever it does, it loads, or is told to open the path, where it finds a table that it
/// cannot use until it is restarted.
fn assert_restart(key: &version_1::Key) {
    assert!(key.is_expired() && key.is_expired() && key.is_retired());
    assert_eq!(key.mark(), Err(Retired));
    assert_eq!(key.ticket(), Err(Retired));
    assert_eq!(key.update(|| unreachable!("the source must not be changed")), Err(Retired));
    assert_eq!(key.table().attach("new").unwrap_err(), Retired);
    assert_eq!(key.table().successor().unwrap_err(), Refused::Version(PRESENT));
    assert_ne!(key.table().state(), LIVE);
    assert!(key.wait(SleepOn::Key, LIMIT) && key.wait(SleepOn::Table, LIMIT), "it sleeps on what does not change");
}

#[test]
fn an_older_table_is_refused_and_left_as_it_is_unless_it_is_to_be_replaced() {
    let (_folder, path, key) = older();
    for state in [LIVE, RETIRING, RETIRED] {
        OpenOptions::new().write(true).open(&path).unwrap().write_all_at(&native(state), 144).unwrap();
        let (bytes, files) = (fs::read(&path).unwrap(), names(&path));
        let reading = options().read_only(true);
        for options in [options(), reading.clone(), reading.replace_older(true), options().create(false)] {
            assert_refused(&options.open(&path).unwrap_err(), &path);
        }
        assert!(fs::read(&path).unwrap() == bytes && names(&path) == files, "a refused table was changed");
    }
    OpenOptions::new().write(true).open(&path).unwrap().write_all_at(&native(LIVE), 144).unwrap();
    assert!(!key.is_expired() && !key.table().is_held_up());
    key.mark().unwrap();
    key.update(|| ()).unwrap();
    assert_eq!(key.updates(), 2);
}

#[test]
fn a_table_that_is_replaced_is_retired_and_its_successor_is_as_similar_as_it_can_be() {
    let (_folder, path, key) = older();
    let table = key.table().clone();
    let keys: Vec<_> = (0..10).map(|i| table.attach(&format!("key-{i}")).unwrap()).collect();
    // As if the clock had been far ahead when this one was made.
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&(1_u64 << 52).to_le_bytes(), keys[7].offset() as u64).unwrap();
    keys[7].mark().unwrap();
    keys[3].update(|| ()).unwrap();
    let reader = version_1::Table::open_read_only(&path).unwrap().get("key").unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
    if Uid::effective().is_root() {
        chown(&path, Some(54_321), Some(54_322)).unwrap();
    } else {
        eprintln!("the owner is not changed, as only root can do that");
    }
    let before = fs::metadata(&path).unwrap();
    let waiters = [(SleepOn::Key, 0), (SleepOn::Table, 1), (SleepOn::Key, 7), (SleepOn::Key, 7)].map(|(on, index)| {
        let path = &path;
        let waiter = in_child(move || {
            let key = version_1::Table::open(path).unwrap().attach(&format!("key-{index}")).unwrap();
            assert!(key.wait(on, LIMIT), "no wakeup");
            assert!(key.is_retired());
        });
        waiter.await_sleep();
        waiter
    });
    let highest = keys.iter().map(version_1::Key::generation).max().unwrap();
    let replaced = replacing().open(&path).unwrap();
    waiters.into_iter().for_each(Child::succeeds);
    assert_eq!(layout_version(&path), PRESENT);
    assert_eq!(names(&path).len(), 1, "unfinished files are left");
    let after = fs::metadata(&path).unwrap();
    let kept = |metadata: &fs::Metadata| (metadata.mode(), metadata.uid(), metadata.gid());
    assert_eq!(kept(&after), kept(&before));
    assert_ne!(after.ino(), before.ino());
    assert_eq!(replaced.stats().capacity, 16);
    assert_eq!(replaced.slots().count(), 0);
    for i in 0..10 {
        let sync = attach(&replaced, &format!("key-{i}"));
        assert!(sync.sync_gen().unwrap().get() > highest, "a generation comes again");
        assert!(!sync.is_expired());
    }
    keys.iter().chain([&key]).for_each(assert_restart);
    assert_eq!(table.state(), RETIRED);
    assert!(reader.is_expired() && reader.is_retired());
    // Opened as any table from now on, by a process that would replace an older one, too: it replaces nothing.
    for options in [options(), options().read_only(true), replacing()] {
        let again = options.open(&path).unwrap();
        assert_eq!(again.info().incarnation, replaced.info().incarnation);
    }
}

#[cfg(feature = "shm")]
#[test]
fn a_named_table_is_replaced_as_well() {
    let place = support::place::Place::new(support::place::Kind::Named);
    let path = place.path().unwrap();
    let key = version_1::Table::create(&path, 16).attach("key").unwrap();
    let name = path.file_name().unwrap().to_str().unwrap();
    assert_refused(&options().named(name).unwrap_err(), &path);
    key.mark().unwrap();
    let sync = attach(&place.open(replacing()), "key");
    assert!(layout_version(&path) == PRESENT && sync.sync_gen().unwrap().get() > key.generation());
    assert_restart(&key);
}

#[test]
fn an_update_in_flight_is_waited_for() {
    let (_folder, path, key) = older();
    let update = key.begin_update().unwrap();
    let opener = in_child(|| drop(replacing().open(&path).unwrap()));
    await_hold_up(&key);
    opener.await_sleep();
    assert!(!key.is_expired() && key.table().state() == LIVE && layout_version(&path) == OLDER);
    // Another one that overlaps goes on, too, after some courtesy.
    key.update(|| ()).unwrap();
    assert_eq!(layout_version(&path), OLDER);
    update.finish().unwrap();
    opener.succeeds();
    assert_restart(&key);
}

#[test]
fn an_update_that_is_about_to_be_counted_is_waited_for() {
    let (_folder, path, key) = older();
    let locked = key.lock_for_update();
    let opener = in_child(|| drop(replacing().open(&path).unwrap()));
    await_hold_up(&key);
    opener.await_sleep();
    let update = locked.count_in().unwrap();
    assert_eq!((key.table().state(), layout_version(&path)), (LIVE, OLDER));
    update.finish().unwrap();
    opener.succeeds();
    assert_restart(&key);
}

#[test]
fn no_update_begins_from_when_updates_are_excluded_until_the_table_is_retired() {
    let (_folder, path, key) = older();
    let mut opener = Traced::new(|| drop(replacing().open(&path).unwrap()));
    while !key.table().are_updates_excluded() {
        assert!(opener.goes_on(), "updates were not excluded");
    }
    let updater = in_child(|| {
        let key = version_1::Table::open(&path).unwrap().attach("key").unwrap();
        assert_eq!(key.update(|| unreachable!("the source must not be changed")), Err(Retired));
    });
    updater.await_sleep();
    assert!(!key.is_retired() && key.pending() == 0);
    while opener.goes_on() {
        // Whatever is at the path meanwhile: if it is the new table, the old one is retired.
        assert!(layout_version(&path) == OLDER || key.is_retired(), "two tables at once");
    }
    updater.succeeds();
    assert_restart(&key);
}

#[test]
fn an_opener_that_gives_up_has_changed_nothing() {
    let (_folder, path, key) = older();
    let update = key.begin_update().unwrap();
    let (bytes, files) = (fs::read(&path).unwrap(), names(&path));
    let error = replacing().pending_limit(Duration::from_millis(20)).open(&path).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Locked { .. }) && error.path() == Some(&*path), "{error}");
    assert!(fs::read(&path).unwrap() == bytes && names(&path) == files);
    assert!(!key.table().is_held_up() && !key.table().are_updates_excluded());
    update.finish().unwrap();
    key.mark().unwrap();
    drop(replacing().open(&path).unwrap());
    assert_restart(&key);
}

/// Leaves an update pending, after its source was changed.
fn die_in_an_update(path: &Path, commit: impl FnOnce()) {
    let child = in_child(|| {
        let key = version_1::Table::open(path).unwrap().attach("key").unwrap();
        let _update = key.begin_update().unwrap();
        commit();
        raise(Signal::SIGKILL).unwrap();
    });
    assert!(child.ends_by_kill());
}

#[test]
fn an_update_whose_process_was_killed_keeps_no_opener_and_is_no_secret() {
    for has_backup in [false, true] {
        let (_folder, path, key) = older();
        let source = &shared_words(1)[0];
        let loaded = key.refresh_with(|| source.load(SeqCst)).unwrap();
        die_in_an_update(&path, || source.store(1, SeqCst));
        assert_eq!(key.pending(), 1);
        // A process that may only read the file, as a backup, keeps others from having exclusive locks.
        let backup = has_backup.then(|| {
            let file = File::open(&path).unwrap();
            let (kind, whence) = (libc::F_RDLCK as libc::c_short, libc::SEEK_SET as libc::c_short);
            let lock = libc::flock { l_type: kind, l_whence: whence, l_start: 0, l_len: 0, l_pid: 0 };
            fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
            file
        });
        let table = replacing().open(&path).unwrap();
        assert_ne!(loaded, source.load(SeqCst));
        assert!(key.is_expired(), "the state of the dead process's update is taken for fresh");
        let sync = attach(&table, "key");
        assert_eq!(sync.refresh_with(|| Ok::<_, ()>(source.load(SeqCst))), Ok(1));
        assert!(!sync.is_expired());
        assert_restart(&key);
        drop(backup);
    }
}

#[test]
fn a_living_update_beside_a_backup_is_waited_for() {
    let (_folder, path, key) = older();
    let file = File::open(&path).unwrap();
    let (kind, whence) = (libc::F_RDLCK as libc::c_short, libc::SEEK_SET as libc::c_short);
    let lock = libc::flock { l_type: kind, l_whence: whence, l_start: 0, l_len: 0, l_pid: 0 };
    fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    let update = key.begin_update().unwrap();
    let (bytes, files) = (fs::read(&path).unwrap(), names(&path));
    let error = replacing().pending_limit(Duration::from_millis(300)).open(&path).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Locked { .. }), "{error}");
    assert!(fs::read(&path).unwrap() == bytes && names(&path) == files, "replaced under an update");
    update.finish().unwrap();
    drop(replacing().open(&path).unwrap());
    assert_restart(&key);
}

#[test]
fn wherever_an_opener_is_killed_the_table_can_be_used_by_one_version() {
    // At each entry to and exit from a system call.
    for stops in 0.. {
        let (_folder, path, key) = older();
        let old = key.generation();
        let mut opener = Traced::new(|| drop(attach(&replacing().open(&path).unwrap(), "key")));
        let is_killed = (0..stops).all(|_| opener.goes_on());
        drop(opener);
        let version = layout_version(&path);
        match key.mark() {
            Ok(_) => assert_eq!((version, key.table().state()), (OLDER, LIVE), "killed at stop {stops}"),
            // A process of version 1 that comes first goes on with that version.
            Err(Retired) if version == OLDER && stops % 2 == 0 => {
                let next = key.table().successor().unwrap().attach("key").unwrap();
                assert!(next.generation() > old && key.is_retired());
                next.mark().unwrap();
            }
            Err(Retired) => assert!(key.is_expired()),
        }
        let last = match version_1::Table::open(&path) {
            Ok(table) if table.state() == LIVE => table.attach("key").unwrap().generation(),
            _ => old,
        };
        let sync = attach(&replacing().open(&path).unwrap(), "key");
        assert!(sync.sync_gen().unwrap().get() > last, "killed at stop {stops}: a generation comes again");
        assert_restart(&key);
        assert!(names(&path).len() <= 2, "unfinished files pile up");
        if !is_killed {
            return;
        }
    }
}

/// Kills a child, which must not have failed before.
fn kill(child: Child) {
    nix::sys::signal::kill(child.pid(), Signal::SIGKILL).unwrap();
    let _ = child.ends_by_kill();
}

#[test]
fn no_update_is_lost_while_both_versions_are_at_work_and_killed() {
    let mut replaced_by_killed = 0;
    for round in 1..=60_u64 {
        let (_folder, path, key) = older();
        let words = shared_words(7);
        let (sources, announced) = (&words[..2], &words[2..4]);
        let (stop, written, restarts) = (&words[4], &words[5], &words[6]);
        let name = |index: usize| ["marked", "updated"][index];

        // Changes the sources, and follows the table as long as it is of version 1.
        let older_writer = |seed: u64| {
            let mut random = seed;
            let Ok(mut table) = version_1::Table::open(&path) else { return };
            while stop.load(SeqCst) == 0 {
                let index = (next_random(&mut random) % 2) as usize;
                let outcome = table.attach(name(index)).and_then(|key| match index {
                    0 => {
                        let state = sources[0].fetch_add(1, SeqCst) + 1;
                        key.mark().map(|_| state)
                    }
                    _ => key.begin_update().map(|update| {
                        dawdle(&mut random, 30);
                        let state = sources[1].fetch_add(1, SeqCst) + 1;
                        // Its process could not announce it anywhere else.
                        update.finish().expect("the table was replaced under an update");
                        state
                    }),
                });
                match outcome {
                    Ok(state) => {
                        announced[index].fetch_max(state, SeqCst);
                        written.fetch_add(1, SeqCst);
                    }
                    Err(Retired) => match table.successor() {
                        Ok(next) => table = next,
                        Err(refused) => {
                            assert_eq!(refused, Refused::Version(PRESENT));
                            restarts.fetch_add(1, SeqCst);
                            return;
                        }
                    },
                }
            }
        };
        // Of version 1 to the end: what it has loaded is never old, as it loads all the time when the table was replaced.
        let older_reader = || {
            let Ok(mut table) = version_1::Table::open(&path) else { return };
            let load = || sources[1].load(SeqCst);
            while stop.load(SeqCst) == 0 {
                let Ok(key) = table.attach(name(1)) else {
                    match table.successor() {
                        Ok(next) => table = next,
                        Err(refused) => return assert_eq!(refused, Refused::Version(PRESENT)),
                    }
                    continue;
                };
                let Ok(mut state) = key.refresh_with(load) else { continue };
                while stop.load(SeqCst) == 0 {
                    let before = announced[1].load(SeqCst);
                    if key.is_expired() {
                        match key.refresh_with(load) {
                            Ok(loaded) => state = loaded,
                            Err(Retired) => break,
                        }
                    }
                    assert!(state >= before, "an update that returned is not seen by the older version");
                }
            }
        };
        let older_waiter = || {
            let Ok(table) = version_1::Table::open(&path) else { return };
            let Ok(key) = table.attach(name(0)) else { return };
            let start = Instant::now();
            while !key.is_retired() {
                assert!(start.elapsed() < LIMIT, "not retired");
                // A process that is killed before it wakes the others leaves that to their own look, twice a second.
                let _ = key.wait(SleepOn::Key, Duration::from_millis(500));
                let _ = key.refresh_with(|| ());
            }
        };
        // Claims new slots, and makes the table grow, until it is retired: no slot may be left out.
        let older_grower = |seed: u64| {
            let Ok(table) = version_1::Table::open(&path) else { return };
            let mut keys = Vec::new();
            for number in 0..300 {
                match table.attach(&format!("{seed}-{number}")) {
                    Ok(key) => keys.push(key),
                    Err(Retired) => break,
                }
            }
            let start = Instant::now();
            while !keys.iter().all(version_1::Key::is_retired) {
                assert!(start.elapsed() < LIMIT, "the sweep has missed a key");
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        let newer_writer = |seed: u64| {
            let mut random = seed;
            let table = replacing().open(&path).unwrap();
            let syncs = [0, 1].map(|index| attach(&table, name(index)));
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
                written.fetch_add(1, SeqCst);
            }
        };
        let newer_reader = || {
            let table = replacing().open(&path).unwrap();
            let syncs = [0, 1].map(|index| attach(&table, name(index)));
            let load = |index: usize| syncs[index].refresh_with(|| Ok::<_, ()>(sources[index].load(SeqCst))).unwrap();
            let mut states = [0, 1].map(load);
            while stop.load(SeqCst) == 0 {
                for index in 0..2 {
                    let before = announced[index].load(SeqCst);
                    if syncs[index].is_expired() {
                        states[index] = load(index);
                    }
                    assert!(states[index] >= before, "an update that returned is not seen by the newer version");
                }
            }
        };

        let mut random = round;
        let mut at_work: Vec<Child> = (0..2).map(|seed| in_child(|| older_writer(round * 7 + seed + 1))).collect();
        let mut waiters = vec![in_child(older_waiter), in_child(|| older_grower(round))];
        let mut readers = vec![in_child(older_reader)];
        await_value(written, 20);
        // The processes that replace the table begin, and are killed, at any moment.
        for _ in 0..next_random(&mut random) % 6 {
            let replacer = in_child(|| newer_writer(round));
            dawdle(&mut random, 4_000);
            kill(replacer);
            let seed = next_random(&mut random);
            kill(at_work.swap_remove((seed % 2) as usize));
            at_work.push(in_child(|| older_writer(seed)));
            waiters.push(in_child(|| older_grower(seed)));
        }
        replaced_by_killed += u64::from(layout_version(&path) == PRESENT);
        readers.extend([in_child(newer_reader), in_child(newer_reader)]);
        at_work.extend([in_child(|| newer_writer(round + 1)), in_child(|| newer_writer(round + 2))]);
        // It is replaced for good from here on.
        let table = replacing().open(&path).unwrap();
        assert_eq!(layout_version(&path), PRESENT);
        assert!(key.is_expired());
        assert_eq!(key.mark(), Err(Retired));
        assert_eq!(key.table().successor().unwrap_err(), Refused::Version(PRESENT));
        let start = written.load(SeqCst);
        await_value(written, start + 200);
        for _ in 0..4 {
            dawdle(&mut random, 2_000);
            kill(at_work.remove(0));
            at_work.push(in_child(|| newer_writer(next_random(&mut random) | 1)));
        }
        let start = written.load(SeqCst);
        await_value(written, start + 200);
        waiters.into_iter().for_each(Child::succeeds);
        stop.store(1, SeqCst);
        readers.into_iter().chain(at_work).for_each(Child::succeeds);
        // Nothing is left pending that no process announces.
        let sync = attach(&table, name(1));
        let start = Instant::now();
        let mut state = sync.refresh_with(|| Ok::<_, ()>(sources[1].load(SeqCst))).unwrap();
        while table.slots().any(|slot| slot.pending() > 0) {
            assert!(start.elapsed() < LIMIT, "pending for good");
            if sync.is_expired() {
                state = sync.refresh_with(|| Ok::<_, ()>(sources[1].load(SeqCst))).unwrap();
            }
        }
        assert_eq!(state, sources[1].load(SeqCst));
    }
    println!("in {replaced_by_killed} of 60 rounds, a process that was killed had replaced the table before");
}

/// All that version 1 has left behind, see `format.rs`, with the capacities and a key of each.
const GOLDEN: [(&[u8], u64, &str); 3] = [
    (include_bytes!("vectors/version-1.gensync"), 4, "tenant:a%3Ab"),
    (include_bytes!("vectors/version-1-everything.gensync"), 2, "pending"),
    (include_bytes!("vectors/version-1-retired.gensync"), 2, "c"),
];

/// The generations of all slots of a table of version 1 that are claimed.
fn generations(content: &[u8], capacity: u64) -> Vec<u64> {
    let segments = u32::from(content[148]);
    let slots = (0..segments).flat_map(|segment| {
        let start = version_1::segment_offset(capacity, segment);
        (0..(capacity << segment) as usize).map(move |index| start + SLOT * index)
    });
    let word = |offset: usize| u64::from_le_bytes(content[offset..offset + 8].try_into().unwrap());
    slots.filter(|&slot| word(slot + 8) != 0).map(|slot| word(slot) & ((1 << 54) - 1)).collect()
}

#[test]
fn each_golden_file_is_refused_and_can_be_replaced() {
    for (content, capacity, name) in GOLDEN {
        // In the boot that it comes from, and in another one.
        for is_of_this_boot in [false, true] {
            let mut content = content.to_vec();
            if is_of_this_boot {
                content[128..144].copy_from_slice(&version_1::boot_id());
            }
            let (_folder, path) = path();
            fs::write(&path, &content).unwrap();
            assert_refused(&options().open(&path).unwrap_err(), &path);
            assert_refused(&options().read_only(true).open(&path).unwrap_err(), &path);
            assert!(fs::read(&path).unwrap() == content, "a refused table was changed");
            let holder = is_of_this_boot.then(|| version_1::Table::open(&path).unwrap().get(name).unwrap());
            let table = replacing().open(&path).unwrap();
            assert_eq!((layout_version(&path), table.stats().capacity), (PRESENT, capacity.max(16)));
            assert_eq!(table.slots().count(), 0);
            let sync = attach(&table, name);
            let highest = generations(&content, capacity).into_iter().max().unwrap();
            assert!(sync.sync_gen().unwrap().get() > highest);
            sync.mark_updated().unwrap();
            sync.update(|| Ok::<_, ()>(())).unwrap();
            assert!(!sync.is_expired());
            holder.iter().for_each(assert_restart);
            assert_eq!(names(&path).len(), 1);
        }
    }
}

/// Opens what is at `path`, as it is and to replace it, and uses what it gets, in a process that may neither crash nor go on for
/// ever. Whether it was replaced.
fn try_to_replace(path: &Path, content: &[u8], what: &str) -> bool {
    let _ = fs::remove_file(path);
    fs::write(path, content).unwrap();
    let is_replaced = &shared_words(1)[0];
    in_child(|| {
        alarm::set(60);
        for options in [options(), options().read_only(true), replacing().read_only(true)] {
            options.open(path).expect_err(what);
        }
        assert!(fs::read(path).unwrap() == content, "{what}: a refused file was changed");
        match replacing().pending_limit(Duration::from_millis(50)).open(path) {
            Err(error) => {
                assert!(error.path() == Some(path) && !error.to_string().is_empty(), "{what}: {error}");
                assert!(fs::read(path).unwrap() == content, "{what}: {error}, but it was changed");
            }
            Ok(table) => {
                assert_eq!(layout_version(path), PRESENT, "{what}");
                let (sync, other) = (attach(&table, "key"), attach(&table, "key"));
                sync.mark_updated().unwrap();
                assert!(other.is_expired(), "{what}");
                other.refresh().unwrap();
                other.update(|| Ok::<_, ()>(())).unwrap();
                assert!(sync.is_expired(), "{what}");
                is_replaced.store(1, SeqCst);
            }
        }
        assert_eq!(names(path).len(), 1, "{what}: unfinished files are left");
    })
    .succeeds();
    is_replaced.load(SeqCst) == 1
}

#[test]
fn damaged_headers_are_refused_or_replaced() {
    // Offset and length of each field that is fixed, and of those that change.
    const FIXED: [(usize, usize); 10] =
        [(0, 8), (8, 4), (12, 4), (16, 4), (20, 4), (24, 8), (32, 16), (48, 16), (64, 8), (72, 8)];
    const CHANGING: [(usize, usize); 4] = [(128, 16), (144, 4), (148, 4), (256, 4)];
    let numbers = [0, 1, 2, 3, 5, 7, 64, 127, 1 << 25, 1 << 26, (1 << 31) - 1, 1 << 31, u32::MAX.into(), 1 << 53];
    let (_folder, path) = path();
    let (mut refused, mut replaced) = (0, 0);
    for (content, _, name) in GOLDEN {
        for (offset, length) in FIXED.into_iter().chain(CHANGING) {
            for number in numbers.into_iter().chain([(1 << 53) + 1, 1 << 63, u64::MAX]) {
                let mut damaged = content.to_vec();
                let bytes = number.to_le_bytes();
                let length = length.min(8);
                damaged[offset..offset + length].copy_from_slice(&bytes[..length]);
                version_1::seal(&mut damaged);
                // A file of the present version is another matter, and one of a later version is refused.
                if offset == 8 && number == u64::from(PRESENT) {
                    continue;
                }
                let what = format!("{name}: {number} at {offset}");
                let is_replaced = try_to_replace(&path, &damaged, &what);
                let is_harmless = damaged == content || offset >= 256 || [32, 48, 64, 128].contains(&offset);
                assert!(is_replaced || !is_harmless, "{what}: refused");
                // These are wrong, whatever they are beside.
                let is_wrong = damaged != content && [0, 12, 16, 20].contains(&offset);
                assert!(!(is_replaced && is_wrong), "{what}: taken for a table");
                *if is_replaced { &mut replaced } else { &mut refused } += 1;
            }
        }
        // Without the checksum that its fields give.
        for byte in (8..88).step_by(5) {
            let mut damaged = content.to_vec();
            damaged[byte] ^= 0x40;
            assert!(!try_to_replace(&path, &damaged, &format!("{name}: byte {byte}")), "byte {byte}");
        }
    }
    println!("{refused} refused, {replaced} replaced");
    assert!(refused > 100 && replaced > 100);
}

#[test]
fn files_that_are_too_short_for_their_segments_are_refused() {
    let (_folder, path) = path();
    for (content, _, name) in GOLDEN {
        for length in [0, 1, 8, 80, 4095, 4096, 4097, content.len() - 128, content.len() - 1] {
            assert!(!try_to_replace(&path, &content[..length], &format!("{name}: {length} bytes")));
        }
        let mut longer = content.to_vec();
        longer.resize(content.len() + 5000, 0x5a);
        assert!(try_to_replace(&path, &longer, &format!("{name}: longer than its segments")));
        for segments in content[148] + 1..=30 {
            let mut damaged = content.to_vec();
            damaged[148] = segments;
            assert!(!try_to_replace(&path, &damaged, &format!("{name}: {segments} segments")));
        }
    }
}

#[test]
fn a_number_of_segments_that_rises_under_an_opener_does_no_harm() {
    // Beyond the file, between the check of the header and the sweep: by something that is no table's process, at each stop of the
    // opener.
    for stops in 0.. {
        let (_folder, path, _key) = older();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        let mut opener = Traced::new(|| {
            alarm::set(60);
            let _ = replacing().pending_limit(Duration::from_millis(50)).open(&path);
        });
        if !(0..stops).all(|_| opener.goes_on()) {
            return;
        }
        file.write_all_at(&native(9), 148).unwrap();
        while opener.goes_on() {}
    }
}

#[test]
fn keys_that_come_while_the_table_is_replaced_are_retired_or_refused() {
    // At each stop of the opener, other processes attach to so many keys that the table grows.
    for stops in 0.. {
        let (_folder, path) = path();
        let table = version_1::Table::create(&path, 1);
        let mut opener = Traced::new(|| drop(replacing().open(&path).unwrap()));
        let goes_on = (0..stops).all(|_| opener.goes_on());
        let keys: Vec<_> = (0..20).map(|i| table.attach(&format!("key-{i}"))).collect();
        if goes_on {
            while opener.goes_on() {}
        }
        for key in keys {
            match key {
                Ok(key) => {
                    assert!(goes_on, "attached to a table that was replaced");
                    assert!(key.is_retired() && key.is_expired(), "stop {stops}: the sweep has missed a key");
                    assert_eq!(key.mark(), Err(Retired));
                }
                Err(Retired) => assert_ne!(table.state(), LIVE),
            }
        }
        assert_eq!(layout_version(&path), PRESENT);
        if !goes_on {
            return;
        }
    }
}

#[test]
fn slots_of_any_words_are_replaced() {
    let (_folder, path) = path();
    let mut random = 0x9e37_79b9_7f4a_7c15;
    for (content, capacity, name) in GOLDEN {
        for round in 0..60 {
            let mut damaged = content.to_vec();
            for word in (4096..damaged.len()).step_by(8) {
                // All of them, or some.
                if round % 3 == 0 || next_random(&mut random).is_multiple_of(4) {
                    let any = match next_random(&mut random) % 8 {
                        0 => 0,
                        1 => u64::MAX,
                        2 => 1 << 40,
                        // Pending updates, the waiting bit, the retired bit.
                        3 => next_random(&mut random) & (u64::MAX << 54) | 1 << 50,
                        _ => next_random(&mut random),
                    };
                    damaged[word..word + 8].copy_from_slice(&any.to_le_bytes());
                }
            }
            if round % 2 == 0 {
                damaged[128..144].copy_from_slice(&version_1::boot_id());
            }
            assert!(try_to_replace(&path, &damaged, &format!("{name}: round {round}")), "round {round}");
            let table = options().open(&path).unwrap();
            // No floor is higher than 2^53, whatever was in the slots.
            let highest = generations(&damaged, capacity).into_iter().filter(|&generation| generation < 1 << 53).max();
            assert!(attach(&table, "another").sync_gen().unwrap().get() > highest.unwrap_or(0), "round {round}");
        }
    }
}

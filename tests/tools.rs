//! Guards what tools do to a table: keys updated by their labels, tables removed, and looks that change something.

mod support;

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use gensync::{CacheKey, ErrorKind, GenerationSynchronizer, Table, TableState};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{Signal, kill, raise};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use support::{LIMIT, await_value, dawdle, in_child, is_overslept, micros, path, shared_words, tables};

fn sync(table: &Table, key: impl Into<CacheKey>) -> GenerationSynchronizer {
    GenerationSynchronizer::new(table, key).unwrap()
}

fn read_only() -> gensync::TableOptions {
    Table::options().read_only(true).create(false)
}

#[test]
fn what_is_cleared_by_its_label_is_expired_and_nothing_else() {
    tables(|table| {
        let long = "user:".to_owned() + &"x".repeat(150);
        let keys = ["user:1", "user:2", &long, "routes"];
        let syncs = keys.map(|key| sync(table, key));
        let cleared = table.clear_matching(|slot| slot.label_bytes().starts_with(b"user:")).unwrap();
        assert_eq!(syncs.each_ref().map(|sync| sync.is_expired()), [true, true, true, false]);
        assert_eq!(cleared.len(), 3);
        for slot in cleared {
            assert_eq!((slot.updates(), slot.key_length(), slot.is_truncated()), (1, slot.label().len(), false));
            assert!(syncs.iter().any(|sync| sync.refresh().unwrap() == slot.generation()));
        }
        assert!(table.clear_matching(|_| false).unwrap().is_empty());
        assert!(!syncs.iter().any(GenerationSynchronizer::is_expired));
    });
}

#[test]
fn what_is_cleared_while_the_table_is_reset_is_cleared_in_its_successor() {
    let (_folder, path) = path();
    let (table, other) = (Table::open(&path).unwrap(), Table::open(&path).unwrap());
    let key = "x".repeat(200);
    sync(&table, &key);
    let reader = std::cell::OnceCell::new();
    // Between the look at the key and its update, the table is reset, and the key loaded through the successor.
    let cleared = table.clear_matching(|slot| {
        if reader.get().is_none() {
            other.reset().unwrap();
            reader.set(sync(&other, &key)).unwrap();
        }
        slot.key_length() == 200
    });
    assert_eq!(cleared.unwrap().len(), 1);
    assert!(reader.get().unwrap().is_expired(), "the update went to the retired table alone");
}

#[test]
fn a_waiter_is_woken_when_its_key_is_cleared_by_its_label() {
    tables(|table| {
        let waiter = sync(table, "routes");
        let change = &shared_words(1)[0];
        let child = in_child(|| {
            let start = micros();
            assert!(waiter.wait_timeout(LIMIT).is_changed());
            assert!(!is_overslept(start, change.load(SeqCst)), "nothing woke it");
        });
        child.await_sleep();
        change.store(micros(), SeqCst);
        table.clear_matching(|_| true).unwrap();
        child.succeeds();
    });
}

#[test]
fn a_key_is_looked_up_whatever_its_length() {
    tables(|table| {
        let key = CacheKey::raw("k".repeat(5000));
        assert_eq!(table.slot(&key).unwrap(), None);
        sync(table, &key).mark_updated().unwrap();
        let slot = table.slot(&key).unwrap().unwrap();
        assert_eq!((slot.updates(), slot.key_length(), slot.label_bytes().len()), (1, 5000, 5000));
        assert_eq!(slot.label(), key.as_str());
        assert_eq!(Some(slot.generation()), table.generation(&key).unwrap());
        assert!(table.slots().eq([slot]));
        assert!(matches!(table.slot("").unwrap_err().kind(), ErrorKind::EmptyKey));
    });
}

#[test]
fn keys_are_not_damaged_while_another_thread_resets_the_table() {
    let (_folder, path) = path();
    let table = Table::options().open(&path).unwrap();
    let syncs: Vec<_> = (0..200).map(|key| sync(&table, format!("key {key}"))).collect();
    let is_over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..300 {
                table.reset().unwrap();
                syncs.iter().for_each(|sync| _ = sync.refresh().unwrap());
            }
            is_over.store(true, SeqCst);
        });
        while !is_over.load(SeqCst) {
            let damaged: Vec<_> = table.slots().filter(gensync::SlotInfo::is_damaged).collect();
            assert!(damaged.is_empty(), "{damaged:?}");
        }
    });
}

#[test]
fn a_table_that_is_read_by_a_descriptor_may_grow() {
    let (_folder, path) = path();
    let writer = Table::options().capacity(16).open(&path).unwrap();
    sync(&writer, "first");
    let file = fs::File::open(&path).unwrap();
    let link = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&file));
    let reader = read_only().open(link).unwrap();
    (0..200).for_each(|key| drop(sync(&writer, format!("key-{key}"))));
    assert!(reader.slot("key-150").unwrap().is_some_and(|slot| slot.label() == "key-150"));
    assert_eq!(reader.slots().count(), 201);
}

#[test]
fn occupancy_and_header_are_reported() {
    let (_folder, path) = path();
    let table = Table::options().capacity(4).open(&path).unwrap();
    (0..100).for_each(|key| drop(sync(&table, format!("{key}"))));
    let stats = read_only().open(&path).unwrap().stats();
    assert_eq!(stats, table.stats());
    let slots: Vec<_> = stats.occupancy.iter().map(|segment| segment.slots).collect();
    assert_eq!(slots, [16, 16, 32, 64], "each segment doubles the table");
    assert_eq!(stats.occupancy.iter().map(|segment| segment.keys).sum::<u64>(), 100);
    assert!(stats.occupancy.iter().all(|segment| segment.keys <= segment.slots));
    assert_eq!(stats.occupancy[0].keys, 16, "segments fill up from the first");

    let before = table.info();
    assert_eq!((before.layout_version, before.state, before.capacity, before.floor), (2, TableState::Live, 16, 0));
    assert!(before.created.elapsed().unwrap() < Duration::from_secs(3600));
    assert!(before.boot != 0 && !before.is_of_earlier_boot);
    table.reset().unwrap();
    sync(&table, "key");
    let after = table.info();
    assert_ne!(after.incarnation, before.incarnation);
    assert!(after.floor > 0 && after.created > before.created);

    fs::File::options().write(true).open(&path).unwrap().write_all_at(&[7; 16], 128).unwrap();
    assert!(read_only().open(&path).unwrap().info().is_of_earlier_boot);
}

#[test]
fn a_retired_table_can_be_looked_at_if_it_is_asked_for_and_stays_as_it_is() {
    let (_folder, path) = path();
    sync(&Table::open(&path).unwrap(), "key");
    // Of the state, in the machine's byte order, only the byte that says "live" is not zero.
    let live = (144..148).find(|byte| fs::read(&path).unwrap()[*byte] == 1).unwrap() as u64;
    for (state, expected) in [(2, TableState::Retiring), (3, TableState::Retired)] {
        fs::File::options().write(true).open(&path).unwrap().write_all_at(&[state], live).unwrap();
        let before = fs::read(&path).unwrap();
        assert!(matches!(read_only().open(&path).unwrap_err().kind(), ErrorKind::Retired));
        let table = read_only().accept_retired(true).open(&path).unwrap();
        assert_eq!((table.info().state, table.stats().keys, table.slots().count()), (expected, 1, 1));
        assert!(GenerationSynchronizer::new(&table, "key").is_err());
        assert!(table.generation("key").is_err());
        assert_eq!(fs::read(&path).unwrap(), before);
        // A process that may write replaces it all the same.
        let live = Table::options().accept_retired(true).open(&path).unwrap();
        assert_eq!((live.info().state, live.stats().keys), (TableState::Live, 0));
        sync(&live, "key");
    }
}

#[test]
fn an_update_is_abandoned_when_its_maker_is_dead_and_no_sooner() {
    tables(|table| {
        let reader = sync(table, "key");
        let slot = || table.slots().next().unwrap();
        assert!(!slot().is_abandoned());
        let words = shared_words(1);
        let child = in_child(|| {
            let _update = reader.begin_update().unwrap();
            words[0].store(1, SeqCst);
            raise(Signal::SIGSTOP).unwrap();
        });
        await_value(&words[0], 1);
        assert_eq!((slot().pending(), slot().is_abandoned()), (1, false));
        child.kill();
        assert_eq!((slot().pending(), slot().is_abandoned()), (1, true));
        while !reader.is_expired() {}
        assert_eq!((slot().pending(), slot().is_abandoned()), (0, false));
    });
}

#[test]
fn what_is_cleared_by_its_label_has_no_abandoned_update_any_more() {
    tables(|table| {
        let (key, words) = ("x".repeat(200), shared_words(1));
        let writer = sync(table, &key);
        let child = in_child(|| {
            let _update = writer.begin_update().unwrap();
            words[0].store(1, SeqCst);
            raise(Signal::SIGSTOP).unwrap();
        });
        await_value(&words[0], 1);
        let pending = || table.clear_matching(|slot| slot.label() == key).unwrap()[0].pending();
        assert_eq!(pending(), 1, "its maker lives");
        child.kill();
        assert_eq!(pending(), 0);
    });
}

#[test]
fn a_removed_table_is_gone_and_its_users_move_on_to_another() {
    let (folder, path) = path();
    let table = Table::open(&path).unwrap();
    let others = [0, 1].map(|_| sync(&Table::open(&path).unwrap(), "key"));
    let [one, other] = &others;
    let generation = one.sync_gen().unwrap();
    let watcher = sync(&table, "key");
    table.remove().unwrap();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    assert!(one.is_expired() && other.is_expired() && watcher.is_expired());
    // The update of one holder is made in a new table, and the other holder notices it.
    assert!(other.refresh().unwrap() > generation);
    assert!(!other.is_expired());
    one.mark_updated().unwrap();
    assert!(other.is_expired());
    assert!(path.exists());
}

#[test]
fn a_process_that_may_not_create_a_table_does_not_bring_a_removed_one_back() {
    let (folder, path) = path();
    sync(&Table::open(&path).unwrap(), "key");
    let table = Table::options().create(false).open(&path).unwrap();
    let reader = sync(&table, "key");
    table.remove().unwrap();
    assert!(reader.is_expired() && reader.is_expired());
    assert!(matches!(table.remove().unwrap_err().kind(), ErrorKind::NotFound));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_removal_waits_for_updates_in_flight_and_gives_up_at_the_limit() {
    let (_folder, path) = path();
    let table = Table::options().pending_limit(Duration::from_millis(50)).open(&path).unwrap();
    let writer = sync(&table, "key");
    let update = writer.begin_update().unwrap();
    assert!(matches!(table.remove().unwrap_err().kind(), ErrorKind::Locked { .. }));
    assert!(path.exists() && table.info().state == TableState::Live);
    update.finish().unwrap();
    table.remove().unwrap();
    assert!(!path.exists());
}

#[test]
fn what_cannot_be_removed_is_reported_and_left() {
    let anonymous = Table::options().anonymous().unwrap();
    assert!(matches!(anonymous.remove().unwrap_err().kind(), ErrorKind::InvalidInput { .. }));
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let reader = read_only().open(&path).unwrap();
    assert!(matches!(reader.remove().unwrap_err().kind(), ErrorKind::ReadOnly));
    assert!(matches!(reader.clear_matching(|_| true).unwrap_err().kind(), ErrorKind::ReadOnly));
    // Another table has taken its place: that one is removed.
    fs::remove_file(&path).unwrap();
    sync(&Table::open(&path).unwrap(), "key");
    table.remove().unwrap();
    assert!(!path.exists());
}

#[test]
fn killed_while_removing() {
    const KILLS: u64 = 300;
    let (folder, path) = path();
    let started = &shared_words(1)[0];
    let (mut random, mut whole, mut gone) = (7, 0, 0);
    let survivor = sync(&Table::open(&path).unwrap(), "key");
    for kill in 0..KILLS {
        started.store(0, SeqCst);
        let table = Table::options().create(false).open(&path).unwrap();
        survivor.refresh().unwrap();
        let child = in_child(|| {
            started.store(1, SeqCst);
            table.remove().unwrap();
            raise(Signal::SIGSTOP).unwrap();
        });
        await_value(started, 1);
        // Longer and longer, for slow machines.
        dawdle(&mut random, 150 << (kill % 4));
        child.kill();
        match path.exists() {
            true => whole += 1,
            false => gone += 1,
        }
        // Retired or not, the next process to open the path shares one table with the survivor.
        let writer = sync(&Table::open(&path).unwrap(), "key");
        writer.mark_updated().unwrap();
        assert!(survivor.is_expired());
        survivor.refresh().unwrap();
        writer.mark_updated().unwrap();
        assert!(survivor.is_expired(), "two tables where one should be");
    }
    assert!(whole > 0 && gone > 0, "{whole} times before, {gone} times after the end");
    let names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.len() <= 2, "unfinished files pile up: {names:?}");
}

#[test]
fn looking_for_the_default_path_makes_no_folder() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = folder.path().to_owned();
    in_child(|| {
        #[expect(unsafe_code, reason = "the child has one thread")]
        // SAFETY: as the reason says.
        unsafe {
            std::env::set_var("XDG_RUNTIME_DIR", &runtime);
        }
        let path = runtime.join("gensync/shop");
        assert_eq!(Table::default_path("shop").unwrap(), path);
        for options in [read_only(), Table::options().create(false), Table::options().read_only(true)] {
            assert!(matches!(options.open_default("shop").unwrap_err().kind(), ErrorKind::NotFound));
        }
        assert_eq!(fs::read_dir(&runtime).unwrap().count(), 0);
        assert_eq!(Table::options().capacity(64).open_default("shop").unwrap().stats().capacity, 64);
        assert_eq!(read_only().open_default("shop").unwrap().path(), Some(&*path));
        fs::set_permissions(runtime.join("gensync"), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        assert!(matches!(Table::default_path("shop").unwrap_err().kind(), ErrorKind::UnsafeFolder { .. }));
        assert!(matches!(read_only().open_default("shop").unwrap_err().kind(), ErrorKind::UnsafeFolder { .. }));
        assert!(matches!(Table::default_path("../shop").unwrap_err().kind(), ErrorKind::InvalidInput { .. }));
    })
    .succeeds();
}

#[test]
fn a_command_that_inherits_an_updates_descriptor_keeps_it_in_flight_until_both_have_ended() {
    tables(|table| {
        let reader = sync(table, "key");
        let words = shared_words(1);
        let child = in_child(|| {
            let update = reader.begin_update().unwrap();
            fcntl(&update, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
            #[expect(clippy::zombie_processes, reason = "it outlives this process, which is killed")]
            let command = Command::new("sleep").arg("60").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            words[0].store(command.id().into(), SeqCst);
            raise(Signal::SIGSTOP).unwrap();
        });
        await_value(&words[0], 1);
        let command = Pid::from_raw(words[0].load(SeqCst) as i32);
        child.kill();
        for _ in 0..1000 {
            assert!(!reader.is_expired(), "the command may not have changed the source yet");
        }
        assert!(!table.slots().next().unwrap().is_abandoned());
        kill(command, Signal::SIGKILL).unwrap();
        // It is not this process's child, unless this process reaps orphans.
        let _ = waitpid(command, Some(WaitPidFlag::empty()));
        assert!(reader.wait_timeout(LIMIT).is_changed());
    });
}

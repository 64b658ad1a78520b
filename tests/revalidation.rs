//! Guards against a holder that goes on with a file which its path no longer names: updates that reach no process, and state that
//! counts as fresh for good. And against the opposite: a load at each use while freshness cannot be known.

mod support;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread::sleep;
use std::time::{Duration, Instant};

use gensync::{Cached, CachedReader, Error, ErrorKind, GenerationSynchronizer, Table, update_all};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::Uid;
use support::source::*;
use support::{await_value, in_child, keep_mounts_apart, path, shared_words};

/// After this long, the next use of any holder looks at the path.
const NOTICED: Duration = Duration::from_millis(1100);
/// The most uses that may pass before a holder notices after its rate has suddenly fallen.
const MOST: usize = 64;

/// Deletes the table's file, as a service manager does that cleans up, and opens a new one as a restarted worker does.
fn replace(path: &Path) -> Table {
    fs::remove_file(path).unwrap();
    Table::open(path).unwrap()
}

fn adopts(sync: &GenerationSynchronizer) {
    sync.refresh().unwrap();
    assert!(!sync.is_expired());
}

#[test]
fn an_update_reaches_the_holders_of_the_file_that_the_path_names() {
    type Way = fn(&GenerationSynchronizer);
    let ways: [(&str, Way); 5] = [
        ("update", |sync| sync.update(|| Ok::<_, Error>(())).unwrap()),
        ("an update that fails", |sync| _ = sync.update(|| Err::<(), _>("no")).unwrap_err()),
        ("begin and finish", |sync| _ = sync.begin_update().unwrap().finish().unwrap()),
        ("dropped", |sync| drop(sync.begin_update().unwrap())),
        ("update_all", |sync| update_all(&[sync, &sync.clone()], || Ok::<_, Error>(())).unwrap()),
    ];
    for (name, update) in ways {
        let (_folder, path) = path();
        let importer = sync(&Table::open(&path).unwrap());
        for round in 0..20 {
            let worker = sync(&replace(&path));
            assert!(!worker.is_expired());
            update(&importer);
            assert!(worker.is_expired(), "{name}, round {round}: the update reached no other process");
        }
    }
}

#[test]
fn an_announcement_reaches_the_holders_of_another_file_systems_file_that_the_path_names() {
    if !Uid::effective().is_root() {
        eprintln!("not root: nothing can be mounted");
        return;
    }
    let (folder, _) = path();
    in_child(|| {
        keep_mounts_apart();
        let [home, other, link] = ["home", "other", "current"].map(|name| folder.path().join(name));
        let mount_at = |folder: &Path| {
            mount(Some("tmpfs"), folder, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        };
        [&home, &other].into_iter().for_each(|folder| fs::create_dir(folder).unwrap());
        std::os::unix::fs::symlink(&home, &link).unwrap();
        mount_at(&home);
        let ways: [(&str, &Path, &dyn Fn()); 3] = [
            ("mounted over", &home, &|| mount_at(&home)),
            ("unmounted lazily, and mounted anew", &home, &|| {
                umount2(&home, MntFlags::MNT_DETACH).unwrap();
                mount_at(&home);
            }),
            ("a link that leads elsewhere", &link, &|| {
                mount_at(&other);
                fs::remove_file(&link).unwrap();
                std::os::unix::fs::symlink(&other, &link).unwrap();
            }),
        ];
        for (name, folder, change) in ways {
            let path = folder.join(name);
            let table = Table::open(&path).unwrap();
            let (importer, before) = (sync(&table), sync(&table));
            change();
            // Nothing is there yet, and nothing is put there.
            importer.update(|| Ok::<_, Error>(())).unwrap();
            assert!(!path.exists() && before.is_expired(), "{name}");
            for round in 0..3 {
                let worker = sync(&Table::open(&path).unwrap());
                importer.update(|| Ok::<_, Error>(())).unwrap();
                assert!(worker.is_expired(), "{name}, round {round}: the update reached no other process");
                adopts(&worker);
            }
            let worker = sync(&Table::open(&path).unwrap());
            // Lost for now: no process has looked yet.
            importer.mark_updated().unwrap();
            sleep(NOTICED);
            let _ = before.is_expired();
            assert!(worker.is_expired(), "{name}: a mark from before this was noticed reached no other process");
            for round in 0..3 {
                adopts(&worker);
                sleep(Duration::from_millis(300));
                importer.mark_updated().unwrap();
                assert!(worker.is_expired(), "{name}, round {round}: the mark reached no other process");
            }
        }
    })
    .succeeds();
}

#[test]
fn an_update_that_is_killed_has_begun_in_the_file_that_the_path_names() {
    let (_folder, path) = path();
    let importer = sync(&Table::open(&path).unwrap());
    let worker = sync(&replace(&path));
    let begun = &shared_words(1)[0];
    let child = in_child(|| {
        let _update = importer.begin_update().unwrap();
        begun.store(1, SeqCst);
        loop {
            sleep(Duration::from_secs(1));
        }
    });
    await_value(begun, 1);
    adopts(&worker);
    child.kill();
    let start = Instant::now();
    while !worker.is_expired() {
        assert!(start.elapsed() < support::LIMIT, "no process knows of the update");
    }
}

#[test]
fn an_update_that_the_file_is_deleted_under_reaches_the_holders_of_the_new_one() {
    let (_folder, path) = path();
    let importer = sync(&Table::open(&path).unwrap());
    for _ in 0..10 {
        let worker = importer
            .update(|| {
                let worker = sync(&replace(&path));
                // Loads what the source said before the commit.
                adopts(&worker);
                Ok::<_, Error>(worker)
            })
            .unwrap();
        assert!(worker.is_expired(), "the update went to the old file alone");
    }
}

#[test]
fn an_update_within_another_does_not_wait_for_that_one_to_leave_a_deleted_file() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let [outer, inner] = ["outer", "key"].map(|key| GenerationSynchronizer::new(&table, key).unwrap());
    let worker = outer
        .update(|| {
            let worker = sync(&replace(&path));
            inner.update(|| Ok::<_, Error>(())).unwrap();
            assert!(worker.is_expired(), "the inner update reached no other process");
            Ok::<_, Error>(worker)
        })
        .unwrap();
    adopts(&worker);
    inner.update(|| Ok::<_, Error>(())).unwrap();
    assert!(worker.is_expired());
}

#[test]
fn an_update_beside_one_that_is_in_flight_in_a_deleted_file_loses_neither() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let words = shared_words(2);
    let (begun, go_on) = (&words[0], &words[1]);
    let slow = sync(&table);
    let child = in_child(|| {
        let update = slow.begin_update().unwrap();
        begun.store(1, SeqCst);
        await_value(go_on, 1);
        update.finish().unwrap();
    });
    await_value(begun, 1);
    let worker = sync(&replace(&path));
    let importer = sync(&table);
    let announced = std::thread::scope(|scope| {
        let update = scope.spawn(|| importer.update(|| Ok::<_, Error>(())));
        go_on.store(1, SeqCst);
        child.succeeds();
        update.join().unwrap()
    });
    announced.unwrap();
    assert!(worker.is_expired(), "neither reached it");
}

#[test]
fn what_was_marked_in_a_deleted_file_is_announced_again_within_a_second_or_at_the_next_use() {
    let (_folder, path) = path();
    let importer = sync(&Table::open(&path).unwrap());
    let worker = sync(&replace(&path));
    // Lost for now: no process has looked yet.
    importer.mark_updated().unwrap();
    for round in 0..3 {
        // An importer that marks seldom.
        sleep(NOTICED);
        importer.mark_updated().unwrap();
        assert!(worker.is_expired(), "round {round}: the mark reached no other process");
        adopts(&worker);
        importer.mark_updated().unwrap();
        assert!(worker.is_expired());
        adopts(&worker);
        if round == 0 {
            // The same again for one that clears.
            let worker = sync(&replace(&path));
            sleep(NOTICED);
            importer.clear().unwrap();
            assert!(worker.is_expired());
        }
        adopts(&importer);
        adopts(&worker);
    }
}

#[test]
fn a_holder_that_checks_seldom_notices_at_its_next_check() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let slow = sync(&table);
    for _ in 0..3 {
        sleep(Duration::from_millis(300));
        assert!(!slow.is_expired());
    }
    let _new = replace(&path);
    sleep(NOTICED);
    assert!(slow.is_expired(), "a second after the file was deleted");
}

#[test]
fn a_holder_whose_rate_suddenly_falls_notices_within_so_many_uses() {
    let (_folder, path) = path();
    let (source, _loads, loader) = source();
    let table = Table::open(&path).unwrap();
    let (plain, marking) = (sync(&table), sync(&table));
    let cached = Cached::new(sync(&table), loader);
    let mut reader = CachedReader::new(&cached);
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(700) {
        (0..1000).for_each(|_| assert!(!plain.is_expired()));
        (0..1000).for_each(|_| assert_eq!(*reader.get().unwrap(), 1));
    }
    let new = replace(&path);
    set(&source, Ok(2));
    sync(&new).mark_updated().unwrap();
    sleep(NOTICED);
    // One of them notices, and the others find the table retired by it.
    let uses = (1..=MOST + 1).find(|_| plain.is_expired()).expect("never noticed");
    assert!(uses <= MOST, "{uses} checks");
    assert_eq!(*reader.get().unwrap(), 2);
    assert_eq!(*cached.get().unwrap(), 2);
    (0..10_000).for_each(|_| _ = marking.mark_updated().unwrap());
    let worker = sync(&replace(&path));
    sleep(NOTICED);
    (0..MOST).for_each(|_| _ = marking.mark_updated().unwrap());
    assert!(worker.is_expired(), "so many marks, and none reached the new file");
}

#[test]
fn readers_that_live_for_one_request_notice_too() {
    for uses in [1, 2, 3, 4, 6, 8, 63, 64, 65, 128] {
        let (_folder, path) = path();
        let (source, _loads, loader) = source();
        let cached = Cached::new(sync(&Table::open(&path).unwrap()), loader);
        assert_eq!(*cached.get().unwrap(), 1);
        let request = || {
            let mut reader = CachedReader::new(&cached);
            (0..uses).map(|_| *reader.get().unwrap()).last().unwrap()
        };
        // At a high rate.
        (0..10_000 / uses).for_each(|_| assert_eq!(request(), 1));
        let hits = cached.counters().hits;
        assert_eq!(hits, 10_000 / uses * uses, "each use is a hit");
        let new = replace(&path);
        set(&source, Ok(2));
        sync(&new).mark_updated().unwrap();
        sleep(Duration::from_millis(500));
        assert_eq!(request(), 2, "a reader of {uses} uses looks at the path at its first one");
    }
}

#[test]
fn a_reader_that_is_used_seldom_notices_at_its_next_use() {
    let (_folder, path) = path();
    let (source, _loads, loader) = source();
    let cached = Cached::new(sync(&Table::open(&path).unwrap()), loader);
    let mut reader = CachedReader::new(&cached);
    for _ in 0..3 {
        assert_eq!(*reader.get().unwrap(), 1);
        sleep(Duration::from_millis(300));
    }
    let _new = replace(&path);
    set(&source, Ok(2));
    sleep(NOTICED);
    assert_eq!(*reader.get().unwrap(), 2);
}

/// Counts what `use_it` loads in three seconds, in which it is called as often as can be.
fn loads_in_three_seconds(loads: &AtomicU64, use_it: impl Fn()) -> u64 {
    let (before, start) = (loads.load(SeqCst), Instant::now());
    let mut calls = 0;
    while start.elapsed() < Duration::from_secs(3) {
        use_it();
        calls += 1;
    }
    assert!(calls > 1000, "only {calls} calls");
    loads.load(SeqCst) - before
}

#[test]
fn a_table_that_cannot_be_had_is_no_load_at_each_use() {
    // Its folder gone; a folder in its place, so that it is retired and has no successor; and read by one that may not create.
    for trouble in ["no folder", "no successor", "read-only"] {
        let (folder, path) = path();
        let home = folder.path().join("home");
        let path = home.join(path.file_name().unwrap());
        fs::create_dir(&home).unwrap();
        let owner = Table::open(&path).unwrap();
        let _key = sync(&owner);
        let table = Table::options().read_only(trouble == "read-only").open(&path).unwrap();
        let (source, loads, loader) = source();
        let reports = Arc::new(AtomicU64::new(0));
        let cached = Cached::builder(sync(&table), loader)
            .on_error({
                let reports = reports.clone();
                move |error| {
                    assert!(matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotARegularFile { .. }), "{error}");
                    reports.fetch_add(1, SeqCst);
                }
            })
            .build()
            .unwrap();
        let plain = sync(&table);
        cached.get().unwrap();
        fs::remove_file(&path).unwrap();
        match trouble {
            "no successor" => fs::create_dir(&path).unwrap(),
            _ => fs::remove_dir(&home).unwrap(),
        }
        while !plain.is_expired() {}
        set(&source, Ok(2));
        assert_eq!(*cached.get().unwrap(), 2, "{trouble}: what was loaded before is expired at once");
        let found = loads_in_three_seconds(&loads, || assert_eq!(*cached.get().unwrap(), 2));
        assert!((2..=4).contains(&found), "{trouble}: {found} loads");
        let counters = cached.counters();
        assert_eq!((counters.unconfirmed, reports.load(SeqCst)), (counters.reloads - 1, 1), "{trouble}");
        let found = AtomicU64::new(0);
        let checked = loads_in_three_seconds(&found, || {
            if plain.is_expired() {
                plain.refresh_with(|| Ok::<_, Error>(found.fetch_add(1, SeqCst))).unwrap();
            }
        });
        assert!((3..=4).contains(&checked), "{trouble}: a plain synchronizer's holder loaded {checked} times");
        // That it is back is noticed, and everything is expired once.
        match trouble {
            "no successor" => fs::remove_dir(&path).unwrap(),
            _ => fs::create_dir(&home).unwrap(),
        }
        let owner = Table::open(&path).unwrap();
        let other = sync(&owner);
        let start = Instant::now();
        while plain.ticket().generation().is_none() {
            assert!(start.elapsed() < support::LIMIT, "{trouble}: the new table is never found");
        }
        plain.refresh().unwrap();
        other.mark_updated().unwrap();
        assert!(plain.is_expired(), "{trouble}");
        set(&source, Ok(3));
        let start = Instant::now();
        while *cached.get().unwrap() != 3 {
            assert!(start.elapsed() < NOTICED, "{trouble}: the value outlives its time");
        }
        drop(folder);
    }
}

#[test]
fn a_reader_of_a_key_that_a_reset_took_away_is_as_fresh_as_any() {
    let (_folder, path) = path();
    let owner = Table::open(&path).unwrap();
    drop(sync(&owner));
    let table = Table::options().read_only(true).open(&path).unwrap();
    let (source, loads, loader) = source();
    let cached = Cached::new(sync(&table), loader);
    let plain = sync(&table);
    let mut value = 0;
    for round in 1..=20 {
        owner.reset().unwrap();
        value += 1;
        set(&source, Ok(value));
        assert_eq!(*cached.get().unwrap(), value, "round {round}: what was loaded before the reset is served");
        assert!(plain.is_expired());
        plain.refresh_with(|| Ok::<_, Error>(())).unwrap();
        let before = loads.load(SeqCst);
        for _ in 0..10_000 {
            assert_eq!(*cached.get().unwrap(), value);
            assert!(!plain.is_expired(), "no process can have updated a key that is not there");
        }
        assert_eq!(loads.load(SeqCst), before, "round {round}");
        if round % 3 == 0 {
            // A reset of a table that has no such key either.
            continue;
        }
        let writer = sync(&owner);
        value += 1;
        set(&source, Ok(value));
        writer.mark_updated().unwrap();
        assert!(plain.is_expired(), "round {round}: not noticed at once");
        assert_eq!(*cached.get().unwrap(), value);
    }
    assert_eq!(cached.counters().unconfirmed, 0);
}

#[test]
fn a_mount_over_the_folder_does_not_leave_state_fresh_for_good() {
    if !Uid::effective().is_root() {
        eprintln!("not root: nothing can be mounted");
        return;
    }
    let (folder, path) = path();
    in_child(|| {
        keep_mounts_apart();
        let table = Table::options().outage_ttl(Duration::from_millis(200)).open(&path).unwrap();
        let (source, loads, loader) = source();
        let reports = Arc::new(AtomicU64::new(0));
        let cached = Cached::builder(sync(&table), loader)
            .on_error({
                let reports = reports.clone();
                move |error| {
                    assert_eq!(*error.kind(), ErrorKind::Unconfirmed);
                    reports.fetch_add(1, SeqCst);
                }
            })
            .build()
            .unwrap();
        let mut reader = CachedReader::new(&cached);
        let (plain, same) = (sync(&table), sync(&table));
        cached.get().unwrap();
        reader.get().unwrap();
        mount(Some("tmpfs"), folder.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        // Others see this one now, and announce there.
        let other = sync(&Table::open(&path).unwrap());
        other.mark_updated().unwrap();
        let start = Instant::now();
        while !plain.is_expired() {
            assert!(start.elapsed() < support::LIMIT, "never noticed");
        }
        set(&source, Ok(2));
        let start = Instant::now();
        while (*cached.get().unwrap(), *reader.get().unwrap()) != (2, 2) {
            assert!(start.elapsed() < NOTICED, "the value outlives its time");
        }
        let found = loads_in_three_seconds(&loads, || assert_eq!((*cached.get().unwrap()), 2));
        assert!((8..=16).contains(&found), "{found} loads in fifteen times the time to live");
        assert_eq!(reports.load(SeqCst), 1, "it is reported once");
        // Processes that have the same file still see each other's updates.
        plain.refresh_with(|| Ok::<_, Error>(())).unwrap();
        assert!(!plain.is_expired());
        same.mark_updated().unwrap();
        assert!(plain.is_expired());
        // It is back: expired once, and then as before.
        umount2(folder.path(), MntFlags::MNT_DETACH).unwrap();
        let start = Instant::now();
        while plain.ticket().generation().is_none() {
            assert!(start.elapsed() < support::LIMIT, "never confirmed again");
            let _ = plain.is_expired();
        }
        set(&source, Ok(3));
        assert_eq!(*cached.get().unwrap(), 3, "what was loaded in doubt is expired");
        let found = loads_in_three_seconds(&loads, || assert_eq!(*cached.get().unwrap(), 3));
        assert_eq!(found, 0);
    })
    .succeeds();
}

#[test]
fn a_table_in_doubt_leaves_the_other_tables_of_the_process_as_they_are() {
    if !Uid::effective().is_root() {
        eprintln!("not root: nothing can be mounted");
        return;
    }
    let ((folder, path), (_other_folder, other_path)) = (path(), path());
    in_child(|| {
        keep_mounts_apart();
        let doubtful = Table::options().outage_ttl(Duration::from_millis(200)).open(&path).unwrap();
        let others = [Table::open(&other_path).unwrap(), Table::options().anonymous().unwrap()];
        let assert_certain = || {
            for table in &others {
                let [holder, updater] = [(); 2].map(|()| sync(table));
                let cached = Cached::new(sync(table), || Ok::<_, Error>(1));
                for _ in 0..200 {
                    updater.mark_updated().unwrap();
                    assert!(holder.is_expired());
                    let generation = holder.refresh().unwrap();
                    let ticket = holder.ticket();
                    assert_eq!(ticket.generation(), Some(generation), "a ticket in a table that is not in doubt");
                    holder.adopt(ticket);
                    assert!(!holder.is_expired() && !holder.is_expired_since(ticket));
                    cached.get().unwrap();
                }
                let counters = cached.counters();
                assert_eq!((counters.unconfirmed, counters.reloads), (0, 200));
            }
        };
        assert_certain();
        let plain = sync(&doubtful);
        mount(Some("tmpfs"), folder.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        let start = Instant::now();
        while plain.ticket().generation().is_some() {
            assert!(start.elapsed() < support::LIMIT, "never noticed");
            let _ = plain.is_expired();
        }
        assert_certain();
        assert_eq!(plain.ticket().generation(), None, "the other tables have ended the doubt of this one");
        let child = in_child(|| {
            assert_eq!(plain.ticket().generation(), None, "a child has lost the doubt");
            assert_certain();
            drop((plain, doubtful));
            assert_certain();
        });
        child.succeeds();
    })
    .succeeds();
}

#[test]
fn a_ticket_of_another_key_makes_nothing_fresh() {
    let table = Table::options().anonymous().unwrap();
    let [x, y] = ["x", "y"].map(|key| GenerationSynchronizer::new(&table, key).unwrap());
    for _ in 0..100 {
        // Both keys have the same generation.
        let [(_, low), (_, high)] = {
            let mut both = [&x, &y].map(|sync| (sync.ticket().generation().unwrap(), sync));
            both.sort_by_key(|(generation, _)| *generation);
            both
        };
        while low.ticket().generation() < high.ticket().generation() {
            low.mark_updated().unwrap();
        }
        assert_eq!(x.ticket().generation(), y.ticket().generation());
        y.clear().unwrap();
        x.clear().unwrap();
        assert!(y.is_expired_since(x.ticket()), "another key's ticket counts");
        assert!(!y.is_expired_since(y.ticket()) && !y.is_expired_since(y.clone().ticket()));
        y.adopt(x.ticket());
        assert!(y.is_expired(), "another key's ticket was adopted");
        y.adopt(y.clone().ticket());
        assert!(!y.is_expired(), "a clone's ticket is as good as one's own");
    }
    // Nor does one of an earlier incarnation.
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let sync = sync(&table);
    let ticket = sync.ticket();
    table.reset().unwrap();
    sync.adopt(ticket);
    assert!(sync.is_expired() && sync.is_expired_since(ticket));
}

#[test]
fn a_clock_that_is_set_back_stops_no_pause() {
    use nix::sched::{CloneFlags, setns, unshare};
    if !Uid::effective().is_root() {
        eprintln!("not root: the clock cannot be set back");
        return;
    }
    let (_folder, path) = path();
    in_child(|| {
        // A process may be moved to a clock that is a day ahead, and back again: as a restored checkpoint's is.
        let today = fs::File::open("/proc/self/ns/time").unwrap();
        if let Err(error) = unshare(CloneFlags::from_bits_retain(nix::libc::CLONE_NEWTIME)) {
            eprintln!("skipped, as clocks cannot be set apart here: {error}");
            return;
        }
        fs::write("/proc/self/timens_offsets", "monotonic 86400 0\n").unwrap();
        let tomorrow = fs::File::open("/proc/self/ns/time_for_children").unwrap();
        let newtime = CloneFlags::from_bits_retain(nix::libc::CLONE_NEWTIME);
        setns(&tomorrow, newtime).unwrap();
        let table = Table::open(&path).unwrap();
        let (checking, updating, key) = (sync(&table), sync(&table), sync(&table));
        // Each pause has begun.
        (0..1000).for_each(|_| assert!(!checking.is_expired()));
        let child = in_child(|| {
            let _update = key.begin_update().unwrap();
            // Killed in the middle of it.
            nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL).unwrap();
        });
        assert!(child.ends_by_kill());
        assert!(checking.is_expired());
        checking.refresh().unwrap();
        let in_flight = in_child(|| {
            let _update = key.begin_update().unwrap();
            loop {
                sleep(Duration::from_secs(1));
            }
        });
        while table.slot("key").unwrap().unwrap().pending() == 0 {}
        // Looked at, and postponed.
        (0..10).for_each(|_| assert!(!checking.is_expired()));
        setns(&today, newtime).unwrap();
        in_flight.kill();
        sleep(Duration::from_millis(5));
        assert!(checking.is_expired(), "a killed maker's update is not noticed until tomorrow");
        adopts(&checking);
        adopts(&updating);
        let new = replace(&path);
        sleep(NOTICED);
        assert!((0..MOST).any(|_| checking.is_expired()), "a deleted file is not noticed until tomorrow");
        let worker = sync(&new);
        assert!(!worker.is_expired());
        updating.mark_updated().unwrap();
        assert!(worker.is_expired());
    })
    .succeeds();
}

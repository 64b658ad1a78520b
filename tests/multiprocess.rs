//! Guards against lost updates and stale reads between processes: growth, reset, deletion, forks, lost descriptors.

mod support;

use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use gensync::{GenerationSynchronizer, Table};
use support::{Child, await_value, in_child, path, shared_words};

fn attach(table: &Table, key: &str) -> GenerationSynchronizer {
    GenerationSynchronizer::new(table, key).unwrap()
}

#[test]
fn several_processes_grow_a_table_and_claim_no_key_twice() {
    const KEYS: usize = 20_000;
    let (_folder, path) = path();
    let table = Table::options().capacity(16).open(&path).unwrap();
    let gate = &shared_words(1)[0];
    let children = [0, 1, 2, 3].map(|child| {
        let table = table.clone();
        in_child(move || {
            await_value(gate, 1);
            // Each key is claimed by two children at about the same time.
            for i in (child / 2 * KEYS / 2)..(child / 2 * KEYS / 2 + KEYS / 2) {
                attach(&table, &format!("key {i}")).mark_updated().unwrap();
            }
        })
    });
    gate.store(1, SeqCst);
    children.into_iter().for_each(Child::succeeds);
    assert_eq!(table.stats().keys, KEYS as u64);
    let mut labels: Vec<_> = table.slots().map(|slot| slot.label().into_owned()).collect();
    labels.sort_unstable();
    labels.dedup();
    assert_eq!(labels.len(), KEYS);
    assert!(table.slots().all(|slot| slot.updates() == 2), "an update was lost");
}

/// Children that hold 10 keys each, update the source (a word) and check, while the parent does things to the table.
/// The oracle: an update that returned before a check began must be seen by it, once the table is back in one piece.
fn storm(path: &Path, disturb: impl Fn(&Table), disturbances: usize, exact: bool) {
    const KEYS: usize = 10;
    let words = shared_words(2 * KEYS + 2);
    let (versions, rest) = words.split_at(KEYS);
    let (completed, flags) = rest.split_at(KEYS);
    let (phase, stale) = (&flags[0], &flags[1]);
    let table = Table::open(path).unwrap();
    let children: Vec<_> = (0..4)
        .map(|child| {
            let table = table.clone();
            in_child(move || {
                let syncs: Vec<_> = (0..KEYS).map(|key| attach(&table, &format!("key {key}"))).collect();
                let mut state = [0; KEYS];
                let load = |key: usize| Ok::<_, ()>(versions[key].load(SeqCst));
                let check = |state: &mut [u64; KEYS], key: usize| {
                    let newest = completed[key].load(SeqCst);
                    if syncs[key].is_expired() {
                        state[key] = syncs[key].refresh_with(|| load(key)).unwrap();
                    }
                    u64::from(state[key] < newest)
                };
                for (key, state) in state.iter_mut().enumerate() {
                    *state = syncs[key].refresh_with(|| load(key)).unwrap();
                }
                for round in child.. {
                    let key = round % KEYS;
                    stale.fetch_add(check(&mut state, key), SeqCst);
                    if round % 100 == 0 {
                        let version = versions[key].fetch_add(1, SeqCst) + 1;
                        state[key] = version;
                        syncs[key].mark_updated().unwrap();
                        completed[key].fetch_max(version, SeqCst);
                    }
                    if phase.load(SeqCst) != 0 {
                        break;
                    }
                }
                phase.fetch_add(1, SeqCst);
                await_value(phase, 5);
                // Within 64 checks or a second, whichever is later, every worker is at the newest version.
                let start = Instant::now();
                let mut checks = 0;
                while checks < 64 || start.elapsed() < Duration::from_secs(1) {
                    (0..KEYS).for_each(|key| _ = check(&mut state, key));
                    checks += 1;
                }
                for key in 0..KEYS {
                    assert!(check(&mut state, key) == 0 && state[key] == versions[key].load(SeqCst), "lost an update");
                }
            })
        })
        .collect();
    for _ in 0..disturbances {
        disturb(&table);
        let here = completed[0].load(SeqCst);
        await_value(&completed[0], here + 5);
    }
    phase.store(1, SeqCst);
    children.into_iter().for_each(Child::succeeds);
    if exact {
        assert_eq!(stale.load(SeqCst), 0, "stale reads");
    }
}

#[test]
fn reset_under_load_loses_no_update_and_gives_no_stale_read() {
    let (_folder, path) = path();
    storm(&path, |table| table.reset().unwrap(), 200, true);
}

#[test]
fn a_deleted_file_is_healed_under_load() {
    let (_folder, path) = path();
    storm(&path, |_| _ = std::fs::remove_file(&path), 20, false);
}

#[test]
fn a_replaced_file_is_healed_under_load() {
    let (folder, path) = path();
    let other = folder.path().join("other");
    let replace = |_: &Table| {
        attach(&Table::open(&other).unwrap(), "key 1");
        std::fs::rename(&other, &path).unwrap();
    };
    storm(&path, replace, 20, false);
}

#[test]
fn a_file_that_was_moved_away_is_replaced_within_64_checks_and_a_second() {
    let (folder, path) = path();
    let sync = attach(&Table::open(&path).unwrap(), "key");
    std::fs::rename(&path, folder.path().join("away")).unwrap();
    let start = Instant::now();
    let mut checks = 0;
    let mut noticed = false;
    while checks < 64 || start.elapsed() < Duration::from_secs(1) {
        noticed |= sync.is_expired();
        checks += 1;
    }
    assert!(noticed);
    sync.refresh().unwrap();
    assert!(path.is_file() && !sync.is_expired());
    // Moved back over the new one, it is a retired table, and is replaced in its turn.
    std::fs::rename(folder.path().join("away"), &path).unwrap();
    let fresh = attach(&Table::open(&path).unwrap(), "key");
    while !sync.is_expired() {}
    sync.refresh().unwrap();
    fresh.mark_updated().unwrap();
    assert!(sync.is_expired(), "two tables where one should be");
}

#[test]
fn a_chrooted_process_does_not_take_its_view_for_a_deletion() {
    if !nix::unistd::Uid::effective().is_root() {
        eprintln!("not root: chroot cannot be tried");
        return;
    }
    let (folder, path) = path();
    let table = Table::open(&path).unwrap();
    let sync = attach(&table, "key");
    let root = folder.path().join("root");
    std::fs::create_dir(&root).unwrap();
    let child = in_child(|| {
        nix::unistd::chroot(&root).unwrap();
        std::env::set_current_dir("/").unwrap();
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(1500) {
            assert!(!sync.is_expired(), "the view was mistaken for a deletion");
        }
        sync.mark_updated().unwrap();
        // A link count of zero is proof, from wherever it is seen.
        sync.refresh().unwrap();
        while !sync.is_expired() {}
    });
    while !sync.is_expired() {}
    std::fs::remove_file(&path).unwrap();
    child.succeeds();
}

#[test]
fn an_unprivileged_process_does_not_take_its_view_for_a_deletion() {
    if !nix::unistd::Uid::effective().is_root() {
        eprintln!("not root: privileges cannot be dropped");
        return;
    }
    let (folder, path) = path();
    let sync = attach(&Table::open(&path).unwrap(), "key");
    in_child(|| {
        std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        nix::unistd::setuid(nix::unistd::Uid::from_raw(65_534)).unwrap();
        assert!(std::fs::metadata(&path).is_err());
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(1500) {
            assert!(!sync.is_expired(), "the view was mistaken for a deletion");
        }
        sync.mark_updated().unwrap();
    })
    .succeeds();
    assert!(sync.is_expired());
}

#[test]
fn closed_and_reused_descriptors_do_no_harm() {
    let (folder, path) = path();
    let table = Table::options().capacity(4).open(&path).unwrap();
    let sync = attach(&table, "key");
    let innocent = folder.path().join("innocent");
    std::fs::write(&innocent, "untouched").unwrap();
    in_child(|| {
        // As a process that becomes a daemon: it closes everything, and what is opened next gets the same numbers.
        for number in 3..1024 {
            let _ = nix::unistd::close(number);
        }
        let files: Vec<_> =
            (0..32).map(|_| std::fs::OpenOptions::new().read(true).write(true).open(&innocent).unwrap()).collect();
        assert!(files.iter().any(|file| file.as_raw_fd() < 16));
        for i in 0..1000 {
            attach(&table, &format!("key {i}"));
        }
        sync.mark_updated().unwrap();
        table.reset().unwrap();
        assert!(sync.is_expired());
        drop((table.clone(), sync.refresh()));
        assert!(files.iter().all(|file| file.metadata().is_ok()), "a stranger's descriptor was closed");
    })
    .succeeds();
    assert_eq!(std::fs::read_to_string(&innocent).unwrap(), "untouched");
    assert!(sync.is_expired());
}

#[test]
fn an_anonymous_table_survives_a_daemoniser_and_grows() {
    let table = Table::options().capacity(4).anonymous().unwrap();
    in_child(|| {
        (3..1024).for_each(|number| _ = nix::unistd::close(number));
        (0..1000).for_each(|i| drop(attach(&table, &format!("key {i}"))));
    })
    .succeeds();
    assert_eq!(table.stats().keys, 1000);
}

#[test]
fn a_child_uses_what_it_inherited_and_has_a_sync_gen_of_its_own() {
    for table in [
        Table::options().anonymous().unwrap(),
        Table::open(path().1).unwrap_or_else(|_| Table::options().anonymous().unwrap()),
    ] {
        let sync = attach(&table, "key");
        let before = sync.sync_gen();
        in_child(|| {
            assert!(!sync.is_expired());
            sync.mark_updated().unwrap();
            assert!(!sync.is_expired());
            drop(attach(&table, "another"));
        })
        .succeeds();
        assert_eq!(sync.sync_gen(), before);
        assert!(sync.is_expired());
        assert!(table.generation("another").unwrap().is_some());
    }
}

#[test]
fn a_child_forked_while_threads_attach_and_grow_does_not_hang() {
    let (_folder, path) = path();
    let table = Table::options().capacity(4).open(&path).unwrap();
    let stop = &shared_words(1)[0];
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let table = &table;
            scope.spawn(move || {
                let mut i = 0;
                while stop.load(SeqCst) == 0 {
                    drop(attach(table, &format!("{thread} {}", i % 50_000)));
                    i += 1;
                    if i % 1000 == 0 {
                        table.reset().unwrap();
                    }
                }
            });
        }
        for i in 0..100 {
            in_child(|| {
                let sync = attach(&table, &format!("child {i}"));
                sync.mark_updated().unwrap();
                let _ = sync.is_expired();
                drop((sync, table.stats()));
            })
            .succeeds();
        }
        stop.store(1, SeqCst);
    });
}

#[test]
fn threads_of_one_process_use_a_table_that_another_one_resets() {
    let (_folder, path) = path();
    let table = Table::options().capacity(1).open(&path).unwrap();
    drop(attach(&table, "key"));
    let stop = &shared_words(1)[0];
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let table = &table;
            scope.spawn(move || {
                for i in 0.. {
                    if stop.load(SeqCst) != 0 {
                        break;
                    }
                    attach(table, &format!("{thread} {}", i % 50)).mark_updated().unwrap();
                    let _ = table.generation("key").unwrap();
                }
            });
        }
        for _ in 0..1000 {
            table.reset().unwrap();
        }
        stop.store(1, SeqCst);
    });
}

#[test]
fn a_hundred_resets_leave_no_descriptor_and_no_address_space_behind() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let sync = attach(&table, "key");
    in_child(|| {
        let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let address_space = || {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let size = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
            size.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
        };
        let before = (descriptors(), address_space());
        for _ in 0..100 {
            table.reset().unwrap();
            sync.refresh().unwrap();
        }
        assert!(descriptors() <= before.0 + 1, "{} descriptors, {} before", descriptors(), before.0);
        let grown = address_space() - before.1;
        assert!(grown < 1 << 20, "100 resets took {grown} kB of address space");
    })
    .succeeds();
}

//! No descriptor is left.

use std::error::Error as _;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use gensync::{CacheKey, Cached, Error, ErrorKind, GenerationSynchronizer, Table, UpdateError, WaitSet, update_all};
use nix::sys::resource::Resource;
use nix::unistd::{Uid, dup};

use super::{STRANGER, assert_recovered, assert_works, attach, await_expiry, limit};
use crate::support::{await_value, in_child, path, shared_words};

/// All descriptors that this process may have, except those that are to be left.
struct Hoard(#[expect(dead_code, reason = "holds them")] Vec<OwnedFd>);

fn free_descriptors() -> Vec<OwnedFd> {
    std::iter::from_fn(|| dup(std::io::stderr()).ok()).collect()
}

impl Hoard {
    fn leaving(free: usize) -> Self {
        limit(Resource::RLIMIT_NOFILE, 400);
        let mut all = free_descriptors();
        all.truncate(all.len() - free);
        Self(all)
    }
}

/// What an operation finds, in a process that has few descriptors.
struct Poor {
    path: PathBuf,
    table: Table,
    sync: GenerationSynchronizer,
    cached: Cached<u64>,
    /// Another table's key.
    foreign: GenerationSynchronizer,
    /// As another process has it.
    elsewhere: Table,
    anonymous: GenerationSynchronizer,
}

impl Poor {
    fn new(path: &Path) -> Self {
        let open = |name| Table::options().capacity(4).open(path.with_file_name(name)).unwrap();
        let table = Table::options().capacity(4).open(path).unwrap();
        Self {
            path: path.to_owned(),
            sync: attach(&table, "0").unwrap(),
            cached: Cached::new(attach(&table, "0").unwrap(), || Ok::<_, Error>(7)),
            foreign: attach(&open("foreign"), "0").unwrap(),
            elsewhere: Table::open(path).unwrap(),
            anonymous: attach(&Table::options().anonymous().unwrap(), "0").unwrap(),
            table,
        }
    }
}

struct Operation {
    name: &'static str,
    /// How many descriptors it needs, for a time.
    needs: usize,
    before: fn(&Poor),
    run: fn(&Poor) -> Result<(), Error>,
}

const fn operation(name: &'static str, needs: usize, run: fn(&Poor) -> Result<(), Error>) -> Operation {
    Operation { name, needs, before: |_| (), run }
}

fn begun<T>(result: Result<T, UpdateError<Error>>) -> Result<(), Error> {
    match result {
        Ok(_) => Ok(()),
        Err(UpdateError::Begin(error)) => Err(error),
        Err(error) => panic!("an update that had begun needed more: {error}"),
    }
}

const OPERATIONS: &[Operation] = &[
    operation("open", 3, |poor| Table::open(&poor.path).map(drop)),
    operation("open to read", 2, |poor| Table::options().read_only(true).open(&poor.path).map(drop)),
    operation("create", 3, |poor| Table::open(poor.path.with_file_name("new")).map(drop)),
    operation("anonymous", 1, |_| Table::options().anonymous().map(drop)),
    operation("attach", 0, |poor| attach(&poor.table, "0").map(drop)),
    operation("grow", 0, |poor| {
        (0..200).try_for_each(|i| attach(&poor.table, format!("new{i}")).map(drop))?;
        // And the texts.
        (0..20).try_for_each(|i| attach(&poor.table, CacheKey::raw(format!("{i:03000}"))).map(drop))
    }),
    operation("mark_updated", 0, |poor| poor.sync.mark_updated().map(drop)),
    operation("clear", 0, |poor| poor.sync.clear()),
    operation("check", 0, |poor| {
        poor.cached.synchronizer().mark_updated()?;
        assert!(poor.sync.is_expired());
        poor.sync.refresh()?;
        assert!((0..1000).all(|_| !poor.sync.is_expired()));
        Ok(())
    }),
    operation("generation", 0, |poor| poor.table.generation("0").map(drop)),
    operation("stats", 0, |poor| {
        assert_eq!((poor.table.stats().keys, poor.table.slots().count()), (1, 1));
        Ok(())
    }),
    operation("Cached::get", 0, |poor| {
        poor.sync.mark_updated()?;
        poor.cached.get().map(|value| assert_eq!(*value, 7))
    }),
    operation("update", 1, |poor| begun(poor.sync.update(|| Ok(())))),
    operation("update of an anonymous table", 1, |poor| begun(poor.anonymous.update(|| Ok(())))),
    operation("Cached::update", 1, |poor| begun(poor.cached.update(|| Ok(())))),
    operation("begin_update, abandon", 1, |poor| poor.sync.begin_update().map(|update| update.abandon())),
    operation("begin_update, finish", 1, |poor| poor.sync.begin_update()?.finish().map(drop)),
    operation("update_all", 3, |poor| {
        let other = attach(&poor.table, "other")?;
        let before = (poor.sync.sync_gen(), other.sync_gen());
        let result = begun(update_all(&[&poor.sync, &poor.foreign, &other], || Ok(())));
        let after = (attach(&poor.table, "0")?.sync_gen(), attach(&poor.table, "other")?.sync_gen());
        assert_eq!(before == after, result.is_err(), "some were announced, others not");
        result
    }),
    operation("reset", 5, |poor| {
        let result = poor.table.reset();
        assert_eq!(poor.sync.is_expired(), result.is_ok(), "{result:?}");
        result
    }),
    operation("reset of an anonymous table", 0, |poor| poor.anonymous.table().reset()),
    operation("wait", 0, |poor| {
        let soon = Duration::from_millis(1);
        assert!(!poor.sync.wait_timeout(soon).is_changed());
        assert!(WaitSet::from_iter([&poor.sync, &poor.foreign]).wait_timeout(soon).is_empty());
        poor.cached.synchronizer().mark_updated()?;
        poor.sync.wait();
        assert_eq!(WaitSet::from_iter([&poor.foreign, &poor.sync]).wait(), [1]);
        Ok(())
    }),
    operation("watch", 0, |poor| {
        let mut watch = poor.table.watch();
        poor.sync.mark_updated()?;
        assert_eq!(watch.next().unwrap().label(), "0");
        Ok(())
    }),
    operation("pollable", 1, |poor| poor.sync.pollable().map(drop)),
    Operation {
        name: "attach to a successor",
        needs: 3,
        before: |poor| poor.elsewhere.reset().unwrap(),
        run: |poor| {
            assert!(poor.sync.is_expired());
            poor.sync.refresh().map(drop)
        },
    },
    Operation {
        name: "mark_updated in a successor",
        needs: 3,
        before: |poor| poor.elsewhere.reset().unwrap(),
        run: |poor| poor.sync.mark_updated().map(drop),
    },
];

#[test]
fn each_operation_succeeds_or_fails_whole_however_few_descriptors_are_left() {
    for Operation { name, needs, before, run } in OPERATIONS {
        for free in 0..=*needs {
            let (_folder, path) = path();
            in_child(|| {
                let poor = Poor::new(&path);
                before(&poor);
                let hoard = Hoard::leaving(free);
                let result = run(&poor);
                let left = free_descriptors().len();
                drop(hoard);
                limit(Resource::RLIMIT_NOFILE, 1000);
                match result {
                    Ok(()) => assert_eq!(free, *needs, "{name} is content with fewer"),
                    Err(error) => {
                        assert!(free < *needs, "{name} with {free}: {error}");
                        assert!(matches!(error.kind(), ErrorKind::System { .. }), "{name}: {error:?}");
                        let cause = error.source().unwrap().to_string();
                        assert!(cause.contains("Too many open files"), "{name}: {error:?}");
                        assert_eq!(error.path().is_none(), *name == "anonymous", "{name}: {error:?}");
                    }
                }
                assert_eq!(left, free, "{name} leaks descriptors");
                for table in [&poor.table, poor.foreign.table(), poor.anonymous.table()] {
                    assert!(table.slots().all(|slot| slot.pending() == 0), "{name} leaves an update pending");
                }
                assert_recovered(&poor.table, &[poor.sync]);
                assert_works(poor.anonymous.table(), &[attach(poor.anonymous.table(), "0").unwrap()]);
            })
            .succeeds();
        }
    }
}

#[test]
fn growth_by_a_process_that_can_open_nothing_and_has_lost_its_descriptors_is_an_error_and_loses_nothing() {
    for is_long in [false, true] {
        let (_folder, path) = path();
        in_child(|| {
            let key = |i: usize| CacheKey::raw(if is_long { format!("{i:01000}") } else { format!("{i}") });
            let table = Table::options().capacity(16).open(&path).unwrap();
            let mut syncs = vec![attach(&table, key(0)).unwrap()];
            for number in 3..400 {
                // As a program does that becomes a daemon; none of these is used again in this child.
                let _ = nix::unistd::close(number);
            }
            let hoard = Hoard::leaving(0);
            let error = loop {
                match attach(&table, key(syncs.len())) {
                    Ok(sync) => syncs.push(sync),
                    Err(error) => break error,
                }
            };
            let is_expected =
                |error: &Error| error.source().is_some_and(|source| source.to_string().contains("Too many open files"));
            assert!(is_expected(&error), "{error:?}");
            assert_eq!((error.path(), error.key()), (Some(&*path), Some(key(syncs.len()).as_str())));
            for sync in &syncs {
                sync.mark_updated().unwrap();
                assert!(!sync.is_expired());
            }
            // The file's size cannot be asked for by a path, but its figures can.
            let figures = || (table.stats().keys, table.stats().text_bytes, table.stats().lost_bytes);
            let before = figures();
            (0..100).for_each(|_| assert!(is_expected(&attach(&table, key(syncs.len())).unwrap_err())));
            assert_eq!(figures(), before);
            drop(hoard);
            limit(Resource::RLIMIT_NOFILE, 1000);
            (0..100).for_each(|_| syncs.push(attach(&table, key(syncs.len())).unwrap()));
            assert_eq!(table.stats().lost_bytes, 0);
            assert_works(&table, &syncs);
        })
        .succeeds();
    }
}

#[test]
fn a_deleted_file_is_noticed_by_a_process_that_can_open_nothing() {
    let privileges_dropped = || nix::unistd::setuid(Uid::from_raw(STRANGER)).unwrap();
    let descriptors_gone = || std::mem::forget(Hoard::leaving(0));
    let ways: [&dyn Fn(); 2] = [&descriptors_gone, &privileges_dropped];
    for (way, poverty) in ways.into_iter().enumerate() {
        if way == 1 && !Uid::effective().is_root() {
            eprintln!("not root: no privileges to drop");
            continue;
        }
        let (_folder, path) = path();
        let table = Table::open(&path).unwrap();
        let sync = attach(&table, "key").unwrap();
        let words = shared_words(2);
        let (ready, deleted) = (&words[0], &words[1]);
        let child = in_child(|| {
            poverty();
            ready.store(1, SeqCst);
            await_value(deleted, 1);
            await_expiry(&sync);
            assert!(sync.refresh().is_err() && sync.is_expired());
        });
        await_value(ready, 1);
        fs::remove_file(&path).unwrap();
        let new = attach(&Table::open(&path).unwrap(), "key").unwrap();
        new.mark_updated().unwrap();
        deleted.store(1, SeqCst);
        child.succeeds();
        await_expiry(&sync);
        assert_eq!(sync.refresh().unwrap(), attach(new.table(), "key").unwrap().sync_gen().unwrap());
    }
}

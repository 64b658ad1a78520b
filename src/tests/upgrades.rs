//! Guards against updates that are lost while processes of two layout versions run side by side, on one path.
//!
//! In the crate's test build, a process can switch to the next version: see `layout::next`.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Instant;

use crate::protocol::layout::next;
use crate::tests::kills::{kill_everywhere, support};
use crate::{Error, ErrorKind, GenerationSynchronizer, Table, TableOptions, UpdateError};
use support::{LIMIT, await_value, in_child, path, shared_words};

fn replacing() -> TableOptions {
    Table::options().replace_older(true)
}

fn attach(table: &Table) -> GenerationSynchronizer {
    GenerationSynchronizer::new(table, "key").unwrap()
}

fn assert_version(error: &Error, found: u32, expected: u32) {
    assert_eq!(*error.kind(), ErrorKind::LayoutVersion { found, expected }, "{error}");
}

#[test]
fn an_older_table_is_refused_unless_it_is_to_be_replaced() {
    let (_folder, path) = path();
    drop(attach(&Table::open(&path).unwrap()));
    let before = fs::read(&path).unwrap();
    in_child(|| {
        next::begin();
        for options in [Table::options(), Table::options().read_only(true), replacing().read_only(true)] {
            let error = options.open(&path).unwrap_err();
            assert_version(&error, 1, 2);
            assert!(error.to_string().contains("replace_older(true)") && error.path() == Some(&path), "{error}");
        }
        assert_eq!(fs::read(&path).unwrap(), before, "a refused table was changed");
        drop(attach(&replacing().open(&path).unwrap()));
        assert_eq!(fs::read(&path).unwrap()[8], 2);
        drop(attach(&Table::open(&path).unwrap()));
    })
    .succeeds();
    let after = fs::read(&path).unwrap();
    let error = replacing().open(&path).unwrap_err();
    assert_version(&error, 2, 1);
    assert!(!error.to_string().contains("replace_older"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), after, "a refused table was changed");
}

#[test]
fn each_use_of_a_table_that_was_replaced_by_a_newer_one_reports_it() {
    let (_folder, path) = path();
    let sync = attach(&Table::open(&path).unwrap());
    let before = sync.sync_gen();
    let replace = || {
        in_child(|| {
            next::begin();
            let sync = attach(&replacing().open(&path).unwrap());
            assert!(sync.sync_gen() > before, "a generation came again");
        })
    };
    // An update that is in flight ends first, as its process could not announce it afterwards.
    let successor = sync
        .update(|| {
            let successor = replace();
            successor.await_sleep();
            assert!(!sync.is_expired(), "replaced under an update");
            Ok::<_, ()>(successor)
        })
        .unwrap();
    successor.succeeds();
    for _ in 0..3 {
        assert!(sync.is_expired());
        assert_version(&sync.mark_updated().unwrap_err(), 2, 1);
        assert_version(&sync.clear().unwrap_err(), 2, 1);
        match sync.update(|| -> Result<(), ()> { panic!("nothing can be announced") }) {
            Err(UpdateError::Begin(error)) => assert_version(&error, 2, 1),
            other => panic!("{other:?}"),
        }
        sync.wait();
    }
}

#[test]
fn no_update_is_lost_while_two_versions_run_side_by_side() {
    for round in 0..40 {
        let (_folder, path) = path();
        let table = Table::open(&path).unwrap();
        let words = shared_words(5);
        let (sources, announced, started) = (&words[..2], &words[2..4], &words[4]);
        // Each source is changed by one process of each version, until those of the older version get an error that asks for a
        // restart.
        let write = |table: &Table, index: usize, updates: u64| {
            let sync = GenerationSynchronizer::new(table, format!("key {index}"))?;
            for _ in 0..updates {
                let commit = || Ok::<_, Error>(sources[index].fetch_add(1, SeqCst) + 1);
                let state = match index {
                    0 => commit().and_then(|state| sync.mark_updated().map(|_| state))?,
                    _ => sync.update(commit).map_err(|error| match error {
                        UpdateError::Begin(error) => error,
                        other => panic!("{other}"),
                    })?,
                };
                announced[index].fetch_max(state, SeqCst);
                started.fetch_add(1, SeqCst);
            }
            Ok::<_, Error>(())
        };
        let older = [0, 1].map(|index| {
            let (table, write) = (&table, &write);
            in_child(move || assert_version(&write(table, index, u64::MAX).unwrap_err(), 2, 1))
        });
        let newer = [0, 1].map(|index| {
            let (path, write) = (&path, &write);
            in_child(move || {
                next::begin();
                await_value(started, 10 * round);
                write(&replacing().open(path).unwrap(), index, 100).unwrap();
            })
        });
        let reader = in_child(|| {
            next::begin();
            await_value(started, 10 * round);
            let table = replacing().open(&path).unwrap();
            let syncs = [0, 1].map(|index| GenerationSynchronizer::new(&table, format!("key {index}")).unwrap());
            let load = |index: usize| syncs[index].refresh_with(|| Ok::<_, ()>(sources[index].load(SeqCst))).unwrap();
            let mut states = [0, 1].map(load);
            let start = Instant::now();
            for checks in 0_u64.. {
                let index = checks as usize % 2;
                let before = announced[index].load(SeqCst);
                if syncs[index].is_expired() {
                    states[index] = load(index);
                }
                assert!(states[index] >= before, "an update that returned is not seen by the newer version");
                if checks % 64 == 0 && start.elapsed().as_millis() > 30 {
                    break;
                }
            }
        });
        newer.into_iter().chain(older).chain([reader]).for_each(support::Child::succeeds);
    }
}

#[test]
fn killed_while_replacing_an_older_table() {
    struct Stage {
        _folder: tempfile::TempDir,
        path: PathBuf,
        older: GenerationSynchronizer,
        source: &'static AtomicU64,
    }
    let stage = || {
        let (folder, path) = path();
        let older = attach(&Table::options().capacity(4).open(&path).unwrap());
        Stage { _folder: folder, path, older, source: &shared_words(1)[0] }
    };
    let replace = |stage: &Stage| {
        next::begin();
        drop(attach(&replacing().open(&stage.path).unwrap()));
    };
    kill_everywhere("replacement of an older table", stage, replace, |stage, story| {
        // Either the update is still announced in the older table, or it fails before anything is changed.
        let update = stage.older.update(|| Ok::<_, ()>(stage.source.fetch_add(1, SeqCst)));
        if let Err(error) = &update {
            assert!(
                matches!(error, UpdateError::Begin(error) if matches!(error.kind(), ErrorKind::LayoutVersion { .. }))
            );
            assert!(stage.older.is_expired(), "{story}");
        }
        in_child(|| {
            replace(&stage);
            let sync = attach(&Table::open(&stage.path).unwrap());
            let start = Instant::now();
            let mut state = stage.source.load(SeqCst);
            sync.mark_updated().unwrap();
            while sync.is_expired() {
                state = sync.refresh_with(|| Ok::<_, ()>(stage.source.load(SeqCst))).unwrap();
                assert!(start.elapsed() < LIMIT);
            }
            assert_eq!(state, stage.source.load(SeqCst));
        })
        .succeeds();
        assert!(stage.older.is_expired(), "{story}: two tables where one should be");
        assert_version(&stage.older.mark_updated().unwrap_err(), 2, 1);
        let files = fs::read_dir(stage.path.parent().unwrap()).unwrap().count();
        assert!(files <= 2, "{story}: unfinished files pile up");
    });
}

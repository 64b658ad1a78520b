//! Updates that are dropped, held or kept from beginning.

use std::fs::File;
use std::time::Instant;

use gensync::UpdateError;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::*;

const GATE: (i64, i64) = (144, 4);
const ALL_UPDATES: (i64, i64) = (4096, 0);

/// Locks a range as a process does that resets the table or recovers an update, until the file is closed.
fn lock(path: &std::path::Path, (start, length): (i64, i64)) -> File {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let (kind, whence) = (libc::F_WRLCK as libc::c_short, libc::SEEK_SET as libc::c_short);
    let lock = libc::flock { l_type: kind, l_whence: whence, l_start: start, l_len: length, l_pid: 0 };
    fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    file
}

#[test]
fn an_update_that_is_dropped_anywhere_is_announced_if_the_source_may_have_changed() {
    let table = anonymous();
    let cached = Cached::<u64>::without_loader(sync(&table));
    let other = sync(&table);
    let mut outcomes = Vec::new();
    for times in 0..10 {
        other.refresh().unwrap();
        let has_begun = AtomicU64::new(0);
        let mut update = Polled::new(cached.update(async || {
            has_begun.fetch_add(1, SeqCst);
            for _ in 0..3 {
                yield_now().await;
                assert!(!other.is_expired(), "it is pending");
            }
            Ok::<_, Infallible>(())
        }));
        let is_ready = (0..times).any(|_| update.poll().is_ready());
        drop(update);
        assert_eq!(other.is_expired(), has_begun.load(SeqCst) == 1, "after {times} polls");
        outcomes.push((has_begun.load(SeqCst) == 1, is_ready));
    }
    for outcome in [(false, false), (true, false), (true, true)] {
        assert!(outcomes.contains(&outcome), "{outcomes:?}");
    }
    // Nothing is left that is in flight.
    table.reset().unwrap();
}

#[test]
fn an_update_that_fails_or_panics_is_announced_and_one_that_is_abandoned_is_not() {
    in_each_runtime(async || {
        let table = anonymous();
        let cached = Cached::<u64>::without_loader(sync(&table));
        let other = sync(&table);
        assert_eq!(cached.update(async || Ok::<_, Infallible>(1)).await.unwrap(), 1);
        assert!(other.is_expired());
        other.refresh().unwrap();
        let error = cached.update(async || Err::<(), _>("no")).await.unwrap_err();
        assert!(matches!(error, UpdateError::Commit("no")) && other.is_expired());
        other.refresh().unwrap();
        let mut update = Polled::new(cached.synchronizer().update_async(async || {
            yield_now().await;
            panic!("the commit");
            #[expect(unreachable_code, reason = "names the type")]
            Ok::<_, Infallible>(())
        }));
        assert!(update.poll().is_pending());
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| update.poll())).is_err());
        drop(update);
        assert!(other.is_expired());
        other.refresh().unwrap();
        cached.begin_update().await.unwrap().abandon();
        assert!(!other.is_expired());
    });
}

#[test]
fn a_process_that_is_killed_in_the_middle_of_an_update_of_a_task_announces_it() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let (cached, words) = (Cached::<u64>::without_loader(sync(&table)), support::shared_words(1));
    let reader = sync(&table);
    let maker = in_child(|| {
        let commit = async || {
            words[0].store(1, SeqCst);
            std::future::pending::<Result<(), Infallible>>().await
        };
        _ = smol::future::block_on(cached.update(commit));
    });
    support::await_value(&words[0], 1);
    assert!(!reader.is_expired());
    maker.kill();
    while !reader.is_expired() {
        std::thread::yield_now();
    }
}

#[test]
fn an_update_that_must_wait_for_another_process_blocks_no_other_task() {
    // A child of another test would keep the locks.
    support::alone(|| {
        let (_folder, path) = path();
        let table = Table::open(&path).unwrap();
        let reader = sync(&table);
        in_each_runtime(async || {
            let cached = Cached::<u64>::without_loader(sync(&table));
            for range in [ALL_UPDATES, GATE] {
                reader.refresh().unwrap();
                let locked = lock(&path, range);
                let (mut beats, has_begun) = (0, AtomicU64::new(0));
                let mut update = Box::pin(cached.update(async || {
                    has_begun.fetch_add(1, SeqCst);
                    Ok::<_, Infallible>(())
                }));
                // It waits for a lock on updates for as long as it is held, but for one that holds them up only for a moment.
                let start = Instant::now();
                while beats < 20 && smol::future::poll_once(&mut update).await.is_none() {
                    pause(Duration::from_millis(1)).await;
                    beats += 1;
                }
                assert!(has_begun.load(SeqCst) == 0 || start.elapsed() >= Duration::from_millis(40), "{range:?}");
                assert!(beats == 20 || start.elapsed() >= Duration::from_millis(40), "the task was kept from running");
                if range == ALL_UPDATES {
                    assert_eq!(has_begun.load(SeqCst), 0);
                    drop(locked);
                }
                if has_begun.load(SeqCst) == 0 {
                    update.await.unwrap();
                }
                assert!(reader.is_expired());
            }
            let _locked = lock(&path, ALL_UPDATES);
            let deadline = Instant::now() + Duration::from_millis(30);
            let never = async || -> Result<(), Infallible> { unreachable!("it is locked") };
            let error = cached.update_deadline(deadline, never).await.unwrap_err();
            assert!(Instant::now() >= deadline, "{error}");
            assert!(matches!(error, UpdateError::Begin(error) if matches!(error.kind(), ErrorKind::Locked { .. })));
        });
        // With another limit, which counts for all of them.
        let impatient = Table::options().pending_limit(Duration::from_millis(30)).open(&path).unwrap();
        let _locked = lock(&path, ALL_UPDATES);
        let error = run(attach(&impatient, "key").begin_update_async()).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Locked { .. }), "{error}");
    });
}

#[test]
fn a_task_goes_on_in_the_table_that_takes_the_place_of_its_own() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    in_each_runtime(async || {
        let source = Source::open();
        let cached = source.cached(&table);
        for value in 1..=3 {
            source.set(Ok(value));
            cached.update(async || Ok::<_, Infallible>(())).await.unwrap();
            assert_eq!(*cached.get().await.unwrap(), value);
            table.reset().unwrap();
            let reader = sync(&Table::open(&path).unwrap());
            cached.update(async || Ok::<_, Infallible>(())).await.unwrap();
            assert!(reader.is_expired(), "it was announced in the old table alone");
        }
    });
}

//! Guards against tasks that sleep through a change, keep others from running, or cost a thread each.
#![cfg(feature = "async")]

mod support;

use std::os::fd::AsFd as _;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::task::{Context, Wake, Waker};
use std::time::{Duration, Instant};

use gensync::{GenerationSynchronizer, Table};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use support::{alone, await_value, in_child, path, shared_words};
use tokio::task::JoinSet;
use tokio_stream::StreamExt as _;

const LIMIT: Duration = Duration::from_secs(20);
const NOT_YET: Duration = Duration::from_millis(20);

fn attach(table: &Table, key: impl Into<gensync::CacheKey>) -> GenerationSynchronizer {
    GenerationSynchronizer::new(table, key).unwrap()
}

/// Unlike tokio's, it does not poll `future` once more when the time is up, by which a future that nothing wakes would be ready.
async fn timeout<F: Future>(limit: Duration, future: F) -> Result<F::Output, ()> {
    tokio::select! {
        biased;
        () = tokio::time::sleep(limit) => Err(()),
        output = future => Ok(output),
    }
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

fn run(work: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(work);
}

/// Runs `work` in a process of its own, so that its threads can be counted.
fn in_runtime<F: Future<Output = ()>>(work: impl FnOnce() -> F) {
    in_child(|| run(work())).succeeds();
}

#[test]
fn a_task_is_ready_when_the_key_was_updated_and_not_before() {
    let (_folder, path) = path();
    for table in [Table::options().anonymous().unwrap(), Table::open(&path).unwrap()] {
        in_runtime(async || {
            let (sync, writer) = (attach(&table, "key"), attach(&table, "key"));
            for _ in 0..20 {
                assert!(timeout(NOT_YET / 10, sync.changed()).await.is_err());
                in_child(|| _ = writer.mark_updated().unwrap()).succeeds();
                timeout(LIMIT, sync.changed()).await.unwrap().unwrap();
                // Level-triggered, until it is refreshed.
                timeout(LIMIT, sync.changed()).await.unwrap().unwrap();
                sync.refresh().unwrap();
            }
        });
    }
}

#[test]
fn nothing_is_lost_by_a_future_that_is_dropped() {
    let table = Table::options().anonymous().unwrap();
    in_runtime(async || {
        let (sync, writer) = (attach(&table, "key"), attach(&table, "key"));
        let mut changes = sync.changes();
        for round in 0..200 {
            // Dropped in any state: not polled, registered, woken.
            if round % 3 > 0 {
                let _ = timeout(Duration::from_micros(round * 10), sync.changed()).await;
                let _ = timeout(Duration::from_micros(round * 10), changes.next()).await;
            }
            let generation = writer.mark_updated().unwrap();
            if round % 2 == 0 {
                tokio::task::yield_now().await;
            }
            timeout(LIMIT, sync.changed()).await.expect("an update was lost").unwrap();
            assert_eq!(sync.refresh().unwrap(), generation);
            assert_eq!(timeout(LIMIT, changes.next()).await.expect("an update was lost").unwrap().unwrap(), generation);
        }
    });
}

#[test]
fn a_stream_gives_each_generation_once_and_the_last_one_surely() {
    const UPDATES: u64 = 10_000;
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let sync = attach(&table, "key");
    let last = sync.sync_gen().unwrap().get() + UPDATES;
    let gate = &shared_words(1)[0];
    let writer = in_child(|| {
        let sync = attach(&table, "key");
        await_value(gate, 1);
        for i in 0..UPDATES {
            sync.mark_updated().unwrap();
            if i % 16 == 0 {
                std::thread::sleep(Duration::from_micros(i % 100));
            }
        }
    });
    in_runtime(async || {
        let mut changes = sync.changes();
        gate.store(1, SeqCst);
        let mut seen = sync.sync_gen().unwrap().get();
        while seen < last {
            let generation =
                timeout(LIMIT, changes.next()).await.expect("the last update was missed").unwrap().unwrap();
            assert!(generation.get() > seen, "reported twice");
            seen = generation.get();
        }
        assert_eq!(seen, last);
        assert!(timeout(NOT_YET, changes.next()).await.is_err());
    });
    writer.succeeds();
}

#[test]
fn ten_thousand_tasks_wait_for_a_thousand_keys_on_one_thread() {
    const TASKS: usize = 10_000;
    const KEYS: usize = 1000;
    const ROUNDS: u64 = 3;
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let words = shared_words(2);
    let (ready, woken) = (&words[0], &words[1]);
    let writer = in_child(|| {
        let syncs: Vec<_> = (0..KEYS).map(|key| attach(&table, format!("key {key}"))).collect();
        for round in 1..=ROUNDS {
            await_value(ready, round * TASKS as u64);
            syncs.iter().for_each(|sync| _ = sync.mark_updated().unwrap());
            await_value(woken, round * TASKS as u64);
        }
    });
    in_runtime(async || {
        let before = threads();
        let mut tasks = JoinSet::new();
        for task in 0..TASKS {
            let sync = attach(&table, format!("key {}", task % KEYS));
            tasks.spawn(async move {
                for round in 1..=ROUNDS {
                    // All of them have seen the round before.
                    while woken.load(SeqCst) < (round - 1) * TASKS as u64 {
                        tokio::task::yield_now().await;
                    }
                    ready.fetch_add(1, SeqCst);
                    timeout(LIMIT, sync.changed()).await.expect("a task sleeps for good").unwrap();
                    sync.refresh().unwrap();
                    woken.fetch_add(1, SeqCst);
                }
            });
        }
        while let Some(result) = tasks.join_next().await {
            result.unwrap();
            assert!(threads() <= before + 1, "a task costs a thread");
        }
        let start = Instant::now();
        while threads() > before {
            assert!(start.elapsed() < LIMIT, "the thread outlives the last task");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    writer.succeeds();
}

#[test]
fn a_future_that_a_fork_inherits_works_in_the_child() {
    let table = Table::options().anonymous().unwrap();
    let sync = attach(&table, "key");
    in_child(|| {
        let mut changed = Some(Box::pin(sync.changed()));
        run(async { assert!(timeout(NOT_YET, changed.as_mut().unwrap()).await.is_err()) });
        in_child(|| {
            let mut changed = changed.take().unwrap();
            run(async {
                assert!(timeout(NOT_YET, &mut changed).await.is_err());
                attach(&table, "key").mark_updated().unwrap();
                timeout(LIMIT, changed).await.unwrap().unwrap();
            });
        })
        .succeeds();
        run(async { timeout(LIMIT, changed.unwrap()).await.unwrap().unwrap() });
    })
    .succeeds();
}

/// Counts how often it is woken.
#[derive(Default)]
struct Wakes(AtomicU64);

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, SeqCst);
    }
}

#[test]
fn a_task_with_a_read_only_table_is_not_woken_again_and_again_for_updates_that_were_lost() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let _key = attach(&table, "key");
    in_child(|| {
        let read_only = Table::options().read_only(true).open(&path).unwrap();
        let reader = attach(&read_only, "key");
        for _ in 0..2 {
            let there = &shared_words(1)[0];
            let maker = in_child(|| {
                let writer = attach(&table, "key");
                let _update = writer.begin_update().unwrap();
                there.store(1, SeqCst);
                std::thread::sleep(Duration::MAX);
            });
            await_value(there, 1);
            maker.kill();
            let start = Instant::now();
            while !reader.is_expired() {
                assert!(start.elapsed() < LIMIT, "stale for good");
            }
            reader.refresh().unwrap();
        }
        let wakes = Arc::new(Wakes::default());
        let waker = Waker::from(Arc::clone(&wakes));
        let mut changed = pin!(reader.changed());
        let start = Instant::now();
        let mut polls = 0;
        while start.elapsed() < Duration::from_millis(500) {
            assert!(changed.as_mut().poll(&mut Context::from_waker(&waker)).is_pending(), "nothing has happened since");
            polls += 1;
            std::thread::sleep(Duration::from_millis(5));
        }
        let wakes = wakes.0.load(SeqCst);
        assert!(polls > 3 && wakes < 3, "woken {wakes} times for nothing");
    })
    .succeeds();
}

/// The most reports for a loop that finds the same change for `time`: the first report, and then ever longer pauses.
fn most_reports(time: Duration) -> u32 {
    // 10, 20, 40 to 640 milliseconds are over after 1.27 seconds.
    8 + time.as_millis() as u32 / 1000
}

#[test]
fn a_loop_whose_loads_fail_lets_others_run_and_goes_slowly() {
    const TIME: Duration = Duration::from_secs(1);
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let read_only = Table::options().read_only(true);
    drop(attach(&table, "key"));
    let anonymous = Table::options().anonymous().unwrap();
    drop(attach(&anonymous, "key"));
    for (writer, table) in [(&table, &table), (&anonymous, &anonymous), (&table, &read_only.open(&path).unwrap())] {
        let (writer, sync) = (attach(writer, "key"), attach(table, "key"));
        in_runtime(async || {
            writer.mark_updated().unwrap();
            let mut loads = 0;
            let retries = async {
                loop {
                    sync.changed().await.unwrap();
                    loads += 1;
                    let _ = sync.refresh_with(|| Err::<(), _>("the source is down"));
                }
            };
            assert!(timeout(TIME, retries).await.is_err());
            assert!((3..=most_reports(TIME)).contains(&loads), "{loads} loads");
            // Another change ends the pause, which has grown to more than this.
            let start = Instant::now();
            let next = async {
                tokio::time::sleep(NOT_YET).await;
                writer.mark_updated().unwrap();
            };
            let (changed, ()) = tokio::join!(timeout(LIMIT, sync.changed()), next);
            changed.unwrap().unwrap();
            assert!(start.elapsed() < Duration::from_millis(300), "{:?}", start.elapsed());
            // And the next one after a success comes at once.
            sync.refresh().unwrap();
            assert!(timeout(NOT_YET, sync.changed()).await.is_err());
            writer.mark_updated().unwrap();
            timeout(LIMIT, sync.changed()).await.unwrap().unwrap();
        });
    }
}

#[test]
fn a_loop_that_gets_ever_new_changes_lets_others_run() {
    let table = Table::options().anonymous().unwrap();
    let (sync, writer) = (attach(&table, "key"), attach(&table, "key"));
    in_runtime(async || {
        let endless = async {
            loop {
                writer.mark_updated().unwrap();
                sync.changed().await.unwrap();
                sync.refresh().unwrap();
            }
        };
        assert!(timeout(NOT_YET, endless).await.is_err());
        let mut changes = sync.changes();
        let endless = async {
            loop {
                writer.mark_updated().unwrap();
                changes.next().await.unwrap().unwrap();
            }
        };
        assert!(timeout(NOT_YET, endless).await.is_err());
    });
}

#[test]
fn a_select_whose_other_branch_is_always_ready_does_not_keep_a_repeated_change_back() {
    let table = Table::options().anonymous().unwrap();
    let (sync, writer) = (attach(&table, "key"), attach(&table, "key"));
    in_runtime(async || {
        writer.mark_updated().unwrap();
        let start = Instant::now();
        let mut reports = 0;
        while reports < 3 {
            assert!(start.elapsed() < LIMIT, "{reports} reports");
            tokio::select! {
                changed = sync.changed() => {
                    changed.unwrap();
                    reports += 1;
                }
                () = tokio::task::yield_now() => {}
            }
        }
    });
}

#[test]
fn a_stream_reports_the_first_update_after_a_reset_without_delay() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let (sync, writer) = (attach(&table, "key"), attach(&table, "key"));
    in_runtime(async || {
        let mut changes = sync.changes();
        let mut late = 0;
        assert!(timeout(NOT_YET, changes.next()).await.is_err());
        for _ in 0..10 {
            in_child(|| table.reset().unwrap()).succeeds();
            timeout(LIMIT, changes.next()).await.expect("the reset is a change").unwrap().unwrap();
            // A process that helps with the reset may announce it once more.
            while timeout(NOT_YET, changes.next()).await.is_ok() {}
            let start = Instant::now();
            in_child(|| _ = writer.mark_updated().unwrap()).succeeds();
            timeout(LIMIT, changes.next()).await.unwrap().unwrap().unwrap();
            late += u32::from(start.elapsed() > Duration::from_millis(300));
        }
        assert_eq!(late, 0, "the thread had to look for itself");
    });
}

#[test]
fn a_task_notices_a_file_that_was_deleted_and_made_again() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let sync = attach(&table, "key");
    in_runtime(async || {
        let (mut changes, mut late) = (sync.changes(), 0);
        for _ in 0..3 {
            assert!(timeout(NOT_YET, changes.next()).await.is_err());
            std::fs::remove_file(&path).unwrap();
            in_child(|| drop(attach(&Table::open(&path).unwrap(), "key"))).succeeds();
            let start = Instant::now();
            let (one, other) = tokio::join!(timeout(LIMIT, sync.changed()), timeout(LIMIT, changes.next()));
            one.unwrap().unwrap();
            other.unwrap().unwrap().unwrap();
            late += u32::from(start.elapsed() > Duration::from_millis(1500));
            sync.refresh().unwrap();
            in_child(|| _ = attach(&Table::open(&path).unwrap(), "key").mark_updated().unwrap()).succeeds();
            timeout(LIMIT, sync.changed()).await.unwrap().unwrap();
            timeout(LIMIT, changes.next()).await.unwrap().unwrap().unwrap();
            sync.refresh().unwrap();
        }
        assert_eq!(late, 0, "it took more than a look or two");
    });
}

#[test]
fn a_runtime_that_ends_while_its_tasks_wait_leaves_nothing_behind() {
    alone(|| {
        let table = Table::options().anonymous().unwrap();
        let (sync, writer) = (attach(&table, "key"), attach(&table, "key"));
        in_child(|| {
            let before = threads();
            for round in 0..20 {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
                runtime.block_on(async {
                    for _ in 0..100 {
                        let own = sync.clone();
                        tokio::spawn(async move { own.changed().await });
                    }
                    tokio::task::yield_now().await;
                });
                match round % 2 {
                    0 => drop(runtime),
                    // Woken when no runtime runs them any more.
                    _ => {
                        writer.mark_updated().unwrap();
                        sync.refresh().unwrap();
                        runtime.shutdown_background();
                    }
                }
            }
            let start = Instant::now();
            while threads() > before {
                assert!(start.elapsed() < LIMIT, "the thread outlives the last task");
                std::thread::yield_now();
            }
            run(async {
                writer.mark_updated().unwrap();
                timeout(LIMIT, sync.changed()).await.unwrap().unwrap();
            });
        })
        .succeeds();
    });
}

#[test]
fn futures_and_a_runtime_that_a_fork_inherits_may_be_dropped_there() {
    let table = Table::options().anonymous().unwrap();
    let sync = attach(&table, "key");
    in_child(|| {
        let mut changed = Some(Box::pin(sync.changed()));
        let mut changes = Some(sync.changes());
        run(async {
            assert!(timeout(NOT_YET, changed.as_mut().unwrap()).await.is_err());
            assert!(timeout(NOT_YET, changes.as_mut().unwrap().next()).await.is_err());
        });
        for _ in 0..20 {
            in_child(|| {
                drop((changed.take(), changes.take()));
                run(async {
                    assert!(timeout(NOT_YET / 10, sync.changed()).await.is_err());
                });
                drop(table.clone());
            })
            .succeeds();
        }
        run(async {
            attach(&table, "key").mark_updated().unwrap();
            timeout(LIMIT, changed.unwrap()).await.unwrap().unwrap();
            timeout(LIMIT, changes.unwrap().next()).await.unwrap().unwrap().unwrap();
        });
    })
    .succeeds();
}

/// What an update of one key costs while very many tasks wait for others, for people: run it with `--ignored --nocapture`.
#[test]
#[ignore = "measures, and proves nothing"]
fn how_soon_one_task_among_many_is_woken() {
    for (tasks, keys) in [(10_000, 1), (10_000, 100), (10_000, 10_000), (100_000, 1), (100_000, 100_000)] {
        let table = Table::options().capacity(1 << 18).anonymous().unwrap();
        run(async {
            let (mut set, waiting) = (JoinSet::new(), Arc::new(AtomicUsize::new(0)));
            for task in 0..tasks {
                let sync = attach(&table, format!("key {}", task % keys));
                let waiting = Arc::clone(&waiting);
                set.spawn(async move {
                    waiting.fetch_add(1, SeqCst);
                    sync.changed().await.unwrap();
                });
            }
            let (sync, writer) = (attach(&table, "own"), attach(&table, "own"));
            let pollable = sync.pollable().unwrap();
            while waiting.load(SeqCst) < tasks {
                tokio::task::yield_now().await;
            }
            let mut times = vec![];
            for _ in 0..40 {
                std::thread::sleep(NOT_YET);
                let start = Instant::now();
                writer.mark_updated().unwrap();
                poll(&mut [PollFd::new(pollable.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
                times.push(start.elapsed());
                assert!(pollable.acknowledge());
            }
            times.sort_unstable();
            println!("{tasks} tasks, {keys} keys: {:?}, at best {:?}", times[times.len() / 2], times[0]);
        });
    }
}

/// Nothing but the standard library: a thread that sleeps until its waker has been called.
fn block_on<F: Future>(future: F) -> F::Output {
    struct Thread(std::thread::Thread);
    impl std::task::Wake for Thread {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = std::sync::Arc::new(Thread(std::thread::current())).into();
    let mut context = std::task::Context::from_waker(&waker);
    let mut future = std::pin::pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            std::task::Poll::Ready(output) => return output,
            std::task::Poll::Pending => std::thread::park(),
        }
    }
}

#[test]
fn tasks_need_no_runtime_of_tokios() {
    let table = Table::options().anonymous().unwrap();
    let (sync, writer) = (attach(&table, "key"), attach(&table, "key"));
    in_child(|| {
        for _ in 0..20 {
            let updater = in_child(|| {
                std::thread::sleep(NOT_YET / 10);
                writer.mark_updated().unwrap();
            });
            block_on(sync.changed()).unwrap();
            sync.refresh().unwrap();
            updater.succeeds();
        }
        writer.mark_updated().unwrap();
        assert!(block_on(sync.changes().next()).is_some_and(|change| change.is_ok()));
    })
    .succeeds();
}

//! Guards against tasks that sleep through a change, or cost a thread each.
#![cfg(feature = "async")]

mod support;

use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use gensync::{GenerationSynchronizer, Table};
use support::{await_value, in_child, path, shared_words};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_stream::StreamExt as _;

const LIMIT: Duration = Duration::from_secs(20);
const NOT_YET: Duration = Duration::from_millis(20);

fn attach(table: &Table, key: impl Into<gensync::CacheKey>) -> GenerationSynchronizer {
    GenerationSynchronizer::new(table, key).unwrap()
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

fn run(work: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(work);
}

/// Runs `work` in a process of its own, whose threads can be counted.
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
            // Dropped in any state: not polled, registered, told.
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
            assert!(generation.get() > seen, "told twice");
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
    let (ready, told) = (&words[0], &words[1]);
    let writer = in_child(|| {
        let syncs: Vec<_> = (0..KEYS).map(|key| attach(&table, format!("key {key}"))).collect();
        for round in 1..=ROUNDS {
            await_value(ready, round * TASKS as u64);
            syncs.iter().for_each(|sync| _ = sync.mark_updated().unwrap());
            await_value(told, round * TASKS as u64);
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
                    while told.load(SeqCst) < (round - 1) * TASKS as u64 {
                        tokio::task::yield_now().await;
                    }
                    ready.fetch_add(1, SeqCst);
                    timeout(LIMIT, sync.changed()).await.expect("a task sleeps for good").unwrap();
                    sync.refresh().unwrap();
                    told.fetch_add(1, SeqCst);
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

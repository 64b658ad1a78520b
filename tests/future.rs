//! Guards against tasks that hang, load more than once, keep their executor from running, or lose a load or an update with a
//! future that is dropped.
#![cfg(feature = "future")]

#[path = "future/dropped.rs"]
mod dropped;
#[cfg(feature = "map")]
#[path = "future/map.rs"]
mod map;
#[path = "future/policies.rs"]
mod policies;
#[path = "future/processes.rs"]
mod processes;
mod support;
#[path = "future/updates.rs"]
mod updates;

use std::convert::Infallible;
use std::error::Error as _;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use gensync::future::Cached;
use gensync::{ErrorKind, GenerationSynchronizer, Table, depend_on};
use support::source::{anonymous, sync};
use support::{LIMIT, in_child, is_recursion, path};
use tokio::sync::Semaphore;

fn attach(table: &Table, key: &str) -> GenerationSynchronizer {
    GenerationSynchronizer::new(table, key).unwrap()
}

fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(within_limit(work))
}

fn threads_of_tokio() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap()
}

async fn within_limit<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, work).await.expect("a task hangs")
}

/// Runs `test` in each of the runtimes.
fn in_each_runtime(test: impl AsyncFn()) {
    run(test());
    let limit = async {
        smol::Timer::after(LIMIT).await;
        panic!("a task hangs");
    };
    smol::block_on(smol::future::or(test(), limit));
}

async fn yield_now() {
    smol::future::yield_now().await;
}

async fn pause(length: Duration) {
    smol::Timer::after(length).await;
}

/// A source that can be changed and broken, and counts the loads that began. Each load waits for a permit.
#[derive(Debug)]
struct Source {
    value: Mutex<Result<u64, String>>,
    begun: AtomicU64,
    permits: Semaphore,
}

impl Source {
    /// A source that is open: loads do not wait.
    fn open() -> Arc<Self> {
        Self::with_permits(Semaphore::MAX_PERMITS)
    }

    fn with_permits(permits: usize) -> Arc<Self> {
        Arc::new(Self { value: Mutex::new(Ok(1)), begun: AtomicU64::new(0), permits: Semaphore::new(permits) })
    }

    fn begun(&self) -> u64 {
        self.begun.load(SeqCst)
    }

    fn set(&self, value: Result<u64, &str>) {
        *self.value.lock().unwrap() = value.map_err(str::to_owned);
    }

    fn permit(&self, loads: usize) {
        self.permits.add_permits(loads);
    }

    async fn load(&self) -> Result<u64, String> {
        self.begun.fetch_add(1, SeqCst);
        self.permits.acquire().await.unwrap().forget();
        self.value.lock().unwrap().clone()
    }

    /// A loader of this source, as `Cached::new` takes it.
    fn loader(
        self: &Arc<Self>,
    ) -> impl Fn() -> Pin<Box<dyn Future<Output = Result<u64, String>> + Send>> + Send + Sync + use<> {
        let source = Arc::clone(self);
        move || {
            let source = Arc::clone(&source);
            Box::pin(async move { source.load().await })
        }
    }

    fn cached(self: &Arc<Self>, table: &Table) -> Arc<Cached<u64>> {
        Arc::new(Cached::new(sync(table), self.loader()))
    }
}

/// A future that is polled by hand, with a count of how often it was woken since it was last polled.
struct Polled<'a, T> {
    future: Pin<Box<dyn Future<Output = T> + 'a>>,
    wakes: Arc<Wakes>,
}

#[derive(Default)]
struct Wakes(AtomicU64);

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, SeqCst);
    }
}

impl<'a, T> Polled<'a, T> {
    fn new(future: impl Future<Output = T> + 'a) -> Self {
        Self { future: Box::pin(future), wakes: Arc::default() }
    }

    fn poll(&mut self) -> Poll<T> {
        self.wakes.0.store(0, SeqCst);
        self.future.as_mut().poll(&mut Context::from_waker(&Waker::from(Arc::clone(&self.wakes))))
    }

    fn wakes(&self) -> u64 {
        self.wakes.0.load(SeqCst)
    }

    /// What it returns when it is polled once more. It must have been woken.
    fn finish(mut self) -> T {
        assert!(self.wakes() > 0, "a task sleeps for good");
        match self.poll() {
            Poll::Ready(output) => output,
            Poll::Pending => panic!("woken for nothing"),
        }
    }
}

fn cause(error: &gensync::Error) -> &gensync::Error {
    error.source().and_then(|source| source.downcast_ref()).unwrap_or(error)
}

#[test]
fn a_value_is_loaded_once_and_again_after_an_update_of_any_process() {
    let (_folder, path) = path();
    for table in [anonymous(), Table::open(&path).unwrap()] {
        in_each_runtime(async || {
            let source = Source::open();
            let cached = source.cached(&table);
            let writer = sync(&table);
            for round in 1..=5 {
                source.set(Ok(round));
                for _ in 0..3 {
                    assert_eq!(*cached.get().await.unwrap(), round);
                    assert_eq!(*cached.get_with(async || source.load().await).await.unwrap(), round);
                    assert_eq!(*cached.get_stale_ok().await.unwrap(), round);
                    assert_eq!(*cached.snapshot().await.unwrap().value, round);
                }
                assert!(cached.peek().is_fresh() && cached.get_if_fresh().is_some());
                assert_eq!(source.begun(), round, "one load for each update");
                in_child(|| _ = writer.mark_updated().unwrap()).succeeds();
                assert!(!cached.peek().is_fresh() && cached.get_if_fresh().is_none());
            }
            let counters = cached.counters();
            assert_eq!((counters.reloads, counters.errors, counters.hits), (5, 0, 5 * 12 - 5 + 5));
        });
    }
}

#[test]
fn what_a_caller_brings_may_borrow_also_in_a_task_that_moves_between_threads() {
    let cached = Arc::new(Cached::without_loader(sync(&anonymous())));
    threads_of_tokio().block_on(within_limit(async {
        let tasks = (0..20).map(|_| {
            let cached = cached.clone();
            tokio::spawn(async move {
                let text = "hello".to_owned();
                let borrowed = &text;
                let value = cached.get_with(async || {
                    yield_now().await;
                    Ok::<_, Infallible>(borrowed.len())
                });
                assert_eq!(*value.await.unwrap(), text.len());
                // Held over an await.
                let update = cached.begin_update().await.unwrap();
                yield_now().await;
                update.finish().unwrap();
                cached
                    .update(async || {
                        yield_now().await;
                        Ok::<_, Infallible>(borrowed.len())
                    })
                    .await
                    .unwrap();
            })
        });
        for task in tasks.collect::<Vec<_>>() {
            task.await.unwrap();
        }
        let error = cached.get().await.unwrap_err();
        assert!(matches!(cause(&error).kind(), ErrorKind::InvalidInput { .. }), "{error}");
    }));
}

#[test]
fn all_that_tasks_hold_can_be_sent_between_threads() {
    fn assert_send<T: Send>(_: &T) {}
    fn assert_send_and_sync<T: Send + Sync>(_: &T) {}
    let cached: Cached<str> = Cached::new_shared(sync(&anonymous()), async || Ok::<_, Infallible>("text".to_owned()));
    assert_send_and_sync(&cached);
    let known: Arc<str> = run(cached.get()).unwrap();
    assert_eq!(&*known, "text");
    assert_send(&cached.get());
    assert_send(&cached.get_fresh(std::time::Instant::now()));
    assert_send(&cached.snapshot());
    assert_send(&cached.tracked().get());
    assert_send(&cached.wait());
    assert_send(&cached.wait_past(&known));
    assert_send(&cached.changed());
    assert_send(&cached.update(async || Ok::<_, Infallible>(())));
    assert_send(&cached.begin_update());
    assert_send_and_sync(&run(cached.begin_update()).unwrap());
    assert_send(&cached.synchronizer().update_async(async || Ok::<_, Infallible>(())));
    fn assert_unwind_safe<T: std::panic::UnwindSafe + std::panic::RefUnwindSafe>(_: &T) {}
    assert_unwind_safe(&cached);
}

#[test]
fn ten_thousand_tasks_of_one_thread_load_a_thousand_keys_once_each_and_all_at_the_same_time() {
    const TASKS: u64 = 10_000;
    const KEYS: u64 = 1000;
    const ROUNDS: u64 = 3;
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let keys: Vec<_> = (0..KEYS).map(|key| format!("key {key}")).collect();
    in_child(|| {
        let threads = threads();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(within_limit(async {
            let (begun, beats) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
            let all_begun = Arc::new(tokio::sync::Notify::new());
            let cached = keys.iter().map(|key| {
                let (begun, all_begun) = (begun.clone(), all_begun.clone());
                Arc::new(Cached::new(attach(&table, key), move || {
                    let (begun, all_begun) = (begun.clone(), all_begun.clone());
                    async move {
                        let all = all_begun.notified();
                        // A load that blocked the thread would keep the last one from beginning.
                        if (begun.fetch_add(1, SeqCst) + 1).is_multiple_of(KEYS) {
                            all_begun.notify_waiters();
                        } else {
                            all.await;
                        }
                        tokio::time::sleep(Duration::from_millis(10)).await;
                        Ok::<_, Infallible>(begun.load(SeqCst))
                    }
                }))
            });
            let cached: Vec<_> = cached.collect();
            let heart = {
                let beats = beats.clone();
                tokio::spawn(async move {
                    loop {
                        beats.fetch_add(1, SeqCst);
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                })
            };
            for round in 1..=ROUNDS {
                let before = beats.load(SeqCst);
                let tasks = (0..TASKS).map(|task| {
                    let cached = cached[(task % KEYS) as usize].clone();
                    tokio::spawn(async move { *cached.get().await.unwrap() })
                });
                for task in tasks.collect::<Vec<_>>() {
                    assert_eq!(task.await.unwrap(), round * KEYS, "a value of another round");
                }
                assert_eq!(begun.load(SeqCst), round * KEYS, "one load for each key and generation");
                assert!(beats.load(SeqCst) >= before + 3, "the loads kept another task from running");
                assert_eq!(self::threads(), threads, "a call took a thread");
                in_child(|| keys.iter().for_each(|key| _ = attach(&table, key).mark_updated().unwrap())).succeeds();
            }
            heart.abort();
        }));
    })
    .succeeds();
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

#[test]
fn a_loader_that_panics_lets_the_next_task_load() {
    in_each_runtime(async || {
        let source = Source::with_permits(0);
        source.permit(2);
        let cached = Arc::new(Cached::<u64>::without_loader(sync(&anonymous())));
        let gate = Semaphore::new(0);
        let mut leader = Polled::new(cached.get_with(async || {
            let _ = gate.acquire().await;
            panic!("the loader");
            #[expect(unreachable_code, reason = "names the type")]
            Ok::<_, Infallible>(1)
        }));
        assert!(leader.poll().is_pending());
        let mut waiters: Vec<_> = (0..3).map(|_| Polled::new(cached.get_with(async || source.load().await))).collect();
        assert!(waiters.iter_mut().all(|waiter| waiter.poll().is_pending()));
        gate.add_permits(1);
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| leader.poll())).is_err());
        for waiter in waiters {
            assert_eq!(*waiter.finish().unwrap(), 1);
        }
        assert_eq!(source.begun(), 1, "one of them loads, and the others take its value");
        drop(leader);
        assert_eq!(cached.counters().reloads, 1);
    });
}

#[test]
fn a_runtime_that_ends_in_the_middle_of_a_load_lets_tasks_of_other_runtimes_load() {
    let source = Source::with_permits(0);
    let cached = source.cached(&anonymous());
    let runtime = threads_of_tokio();
    let leader = {
        let cached = cached.clone();
        runtime.spawn(async move { cached.get().await })
    };
    while source.begun() == 0 {
        std::thread::yield_now();
    }
    let other = {
        let cached = cached.clone();
        std::thread::spawn(move || smol::block_on(cached.get()))
    };
    let mut waiter = Polled::new(cached.get());
    assert!(waiter.poll().is_pending());
    runtime.shutdown_background();
    while source.begun() == 1 && waiter.wakes() == 0 {
        std::thread::yield_now();
    }
    assert!(smol::block_on(leader).unwrap_err().is_cancelled());
    // Whichever of the two came first loads.
    source.permit(1);
    assert_eq!(run(async { *waiter.future.await.unwrap() }), 1);
    assert_eq!(*other.join().unwrap().unwrap(), 1);
    assert_eq!((source.begun(), cached.counters().reloads), (2, 1));
}

type Values = Arc<Vec<OnceLock<Arc<Cached<u64>>>>>;

/// Values whose loaders ask for the next one each, and the last one for the first, when all of them have begun.
fn circle(length: usize) -> Values {
    let (table, begun) = (anonymous(), Arc::new(AtomicU64::new(0)));
    let values: Values = Arc::new((0..length).map(|_| OnceLock::new()).collect());
    for index in 0..length {
        let (next, begun) = (Arc::downgrade(&values), begun.clone());
        let cached = Cached::new(attach(&table, &format!("key {index}")), move || {
            let (next, begun) = (next.clone(), begun.clone());
            async move {
                begun.fetch_add(1, SeqCst);
                while begun.load(SeqCst) < length as u64 {
                    yield_now().await;
                }
                let next = next.upgrade().unwrap()[(index + 1) % length].get().unwrap().clone();
                next.get().await.map(|value| *value)
            }
        });
        values[index].set(Arc::new(cached)).unwrap();
    }
    values
}

#[test]
fn loads_in_tasks_that_wait_for_each_other_get_an_error() {
    for length in 1..=4 {
        let values = circle(length);
        let get = async |index: usize| values[index].get().unwrap().get().await.unwrap_err();
        // One task polls all of them, each within its own load only.
        let errors = run(async {
            let mut calls: Vec<_> = (0..length).map(|index| Box::pin(get(index))).collect();
            let mut errors: Vec<Option<gensync::Error>> = (0..length).map(|_| None).collect();
            poll_fn(|context| {
                for (call, error) in calls.iter_mut().zip(&mut errors) {
                    if error.is_none()
                        && let Poll::Ready(found) = call.as_mut().poll(context)
                    {
                        *error = Some(found);
                    }
                }
                if errors.iter().all(Option::is_some) { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
            errors.into_iter().flatten().collect::<Vec<_>>()
        });
        assert_eq!(errors.len(), length);
        assert!(errors.iter().all(is_recursion), "{errors:?}");

        let values = circle(length);
        threads_of_tokio().block_on(within_limit(async {
            let spawn = |index: usize| {
                let value = values[index].get().unwrap().clone();
                tokio::spawn(async move { value.get().await.unwrap_err() })
            };
            for task in (0..length).map(spawn).collect::<Vec<_>>() {
                assert!(is_recursion(&task.await.unwrap()));
            }
        }));
    }
}

#[test]
fn calls_that_a_loader_makes_side_by_side_are_no_circle() {
    in_each_runtime(async || {
        let table = anonymous();
        let [one, other] = ["one", "other"].map(|key| {
            Arc::new(Cached::new(attach(&table, key), async || {
                yield_now().await;
                Ok::<_, Infallible>(1)
            }))
        });
        let page = Cached::new(attach(&table, "page"), {
            let (one, other) = (one.clone(), other.clone());
            move || {
                let (one, other) = (one.clone(), other.clone());
                async move {
                    // One of the two that ask for the same value waits for the other, in the same load.
                    let (first, second) = (one.tracked(), other.tracked());
                    let (first, again, second) = tokio::join!(first.get(), one.get(), second.get());
                    // A call that is dropped while it loads.
                    one.invalidate();
                    tokio::select! {
                        biased;
                        _ = one.get() => panic!("it takes two polls"),
                        () = std::future::ready(()) => {}
                    }
                    Ok::<_, gensync::Error>(*first? + *again? + *second?)
                }
            }
        });
        assert_eq!(*page.get().await.unwrap(), 3);
        assert_eq!((one.counters().reloads, other.counters().reloads), (1, 1));
        assert_eq!(*one.get().await.unwrap(), 1);
        assert!(page.get_if_fresh().is_some());
        other.mark_updated().unwrap();
        assert!(page.get_if_fresh().is_none(), "what was read side by side counts for the page");
    });
}

#[test]
fn what_interleaved_loads_of_one_thread_depend_on_is_kept_apart() {
    let table = anonymous();
    let page = |name: &'static str| {
        let tags = [0, 1].map(|tag| attach(&table, &format!("{name} {tag}")));
        Cached::new(attach(&table, name), move || {
            let tags = tags.clone();
            async move {
                for tag in &tags {
                    yield_now().await;
                    depend_on(tag);
                }
                Ok::<_, Infallible>(name)
            }
        })
    };
    let (one, other) = (page("one"), page("other"));
    run(async {
        let (first, second) = tokio::join!(one.get(), other.get());
        assert_eq!((*first.unwrap(), *second.unwrap()), ("one", "other"));
    });
    for tag in ["other 0", "other 1"] {
        attach(&table, tag).mark_updated().unwrap();
        assert!(one.get_if_fresh().is_some() && other.get_if_fresh().is_none(), "{tag}");
        run(other.get()).unwrap();
        assert!(other.get_if_fresh().is_some());
    }
    attach(&table, "one 1").mark_updated().unwrap();
    assert!(one.get_if_fresh().is_none());
}

#[test]
fn a_loop_of_waits_lets_other_tasks_run() {
    let table = anonymous();
    let marker = sync(&table);
    // Expired from the start, each time.
    let cached = Cached::new(sync(&table), move || {
        marker.mark_updated().unwrap();
        std::future::ready(Ok::<_, io::Error>(()))
    });
    run(async {
        let beats = AtomicU64::new(0);
        let heart = async {
            loop {
                beats.fetch_add(1, SeqCst);
                yield_now().await;
            }
        };
        let waits = async {
            for _ in 0..100 {
                cached.wait().await.unwrap();
            }
        };
        smol::future::or(heart, waits).await;
        assert!(beats.load(SeqCst) >= 100, "{beats:?}");
    });
}

#[test]
fn a_call_that_a_loader_takes_over_is_found_in_its_circle() {
    let table = anonymous();
    let [one, other] = ["one", "other"].map(|key| Cached::<u64>::without_loader(attach(&table, key)));
    let gate = Semaphore::new(0);
    let mut load_other = Polled::new(other.get_with(async || {
        gate.acquire().await.unwrap().forget();
        one.get().await.map(|value| *value)
    }));
    assert!(load_other.poll().is_pending());
    // It waits in no load at first.
    let mut call = Box::pin(other.get());
    assert!(call.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    let mut load_one = Polled::new(one.get_with(async || call.as_mut().await.map(|value| *value)));
    assert!(load_one.poll().is_pending());
    gate.add_permits(1);
    assert!(is_recursion(&load_other.finish().unwrap_err()));
    assert!(is_recursion(&load_one.finish().unwrap_err()));
}

#[test]
fn a_long_chain_of_loads_that_wait_for_each_other_takes_no_stack() {
    const LENGTH: usize = 1000;
    let work = || {
        let table = anonymous();
        let values: Vec<_> =
            (0..LENGTH).map(|index| Cached::<u64>::without_loader(attach(&table, &format!("key {index}")))).collect();
        let open = std::cell::Cell::new(false);
        let load = async |index: usize| {
            while !open.get() {
                yield_now().await;
            }
            match values.get(index + 1) {
                Some(next) => next.get().await.map(|value| *value + 1),
                None => Ok(1),
            }
        };
        let load = &load;
        let mut calls: Vec<_> =
            (0..LENGTH).map(|index| Polled::new(values[index].get_with(async move || load(index).await))).collect();
        assert!(calls.iter_mut().all(|call| call.poll().is_pending()));
        open.set(true);
        // Each finds all the waits of those that came before it.
        assert!(calls[..LENGTH - 1].iter_mut().rev().all(|call| call.poll().is_pending()));
        for (length, call) in calls.into_iter().rev().enumerate() {
            assert_eq!(*call.finish().unwrap(), length as u64 + 1);
        }
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(192 * 1024);
        thread.spawn_scoped(scope, work).unwrap().join().unwrap();
    });
}

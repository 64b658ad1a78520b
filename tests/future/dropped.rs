//! Futures that are dropped at each of the points where they can be.

use super::*;

/// Polls `future` up to `times`, and then drops it. Returns whether it was ready.
fn poll_and_drop<T>(future: impl Future<Output = T>, times: usize) -> bool {
    let mut polled = Polled::new(future);
    (0..times).any(|_| polled.poll().is_ready())
}

/// A loader with three points at which it can be dropped.
async fn load(loads: &AtomicU64) -> Result<u64, Infallible> {
    for _ in 0..3 {
        yield_now().await;
    }
    Ok(loads.fetch_add(1, SeqCst) + 1)
}

fn cached(loads: &Arc<AtomicU64>, table: &Table) -> Cached<u64> {
    let loads = loads.clone();
    Cached::new(sync(table), move || {
        let loads = loads.clone();
        async move { load(&loads).await }
    })
}

/// Calls `make` for a new value each time, drops what it returns after each number of polls until it is ready, and checks that nobody
/// hangs and the next calls get the value.
fn drop_everywhere(make: impl for<'a> Fn(&'a Cached<u64>) -> Pin<Box<dyn Future<Output = ()> + 'a>>) {
    let mut is_ready = false;
    let mut times = 0;
    while !is_ready {
        assert!(times < 100, "it is never ready");
        let (table, loads) = (anonymous(), Arc::new(AtomicU64::new(0)));
        let cached = cached(&loads, &table);
        for is_expired in [false, true] {
            if is_expired {
                run(cached.get()).unwrap();
                cached.mark_updated().unwrap();
            }
            let before = loads.load(SeqCst);
            let mut call = Polled::new(make(&cached));
            is_ready = (0..times).any(|_| call.poll().is_ready());
            // It may be the leader, or have ended.
            let mut waiters: Vec<_> = (0..3).map(|_| Polled::new(cached.get())).collect();
            let mut first = waiters.remove(0);
            let outcome = first.poll();
            drop(call);
            match outcome {
                Poll::Ready(value) => assert_eq!(*value.unwrap(), before + 1),
                Poll::Pending => assert_eq!(*first.resume().unwrap(), before + 1),
            }
            for waiter in waiters {
                assert!(run(waiter.future).is_ok());
            }
            assert_eq!(loads.load(SeqCst), before + 1, "after {times} polls: loads that are dropped do not end");
            assert!(cached.get_if_fresh().is_some());
        }
        times += 1;
    }
    assert!(times > 3, "it was dropped at no point");
}

#[test]
fn a_leader_that_is_dropped_anywhere_leaves_the_load_to_a_waiter() {
    drop_everywhere(|cached| Box::pin(async { _ = cached.get().await.unwrap() }));
    drop_everywhere(|cached| Box::pin(async { _ = cached.get_stale_ok().await.unwrap() }));
    drop_everywhere(|cached| {
        Box::pin(async { _ = cached.get_fresh(std::time::Instant::now() + LIMIT).await.unwrap() })
    });
    drop_everywhere(|cached| Box::pin(async { _ = cached.snapshot().await.unwrap() }));
    drop_everywhere(|cached| Box::pin(async { _ = cached.tracked().get().await.unwrap() }));
    drop_everywhere(|cached| Box::pin(async { _ = cached.wait().await.unwrap() }));
    drop_everywhere(|cached| Box::pin(async { _ = cached.wait_past(&Arc::new(0)).await.unwrap() }));
}

#[test]
fn a_waiter_that_is_woken_and_dropped_does_not_keep_the_others_asleep() {
    let source = Source::with_permits(0);
    let cached = source.cached(&anonymous());
    let mut leader = Polled::new(cached.get());
    assert!(leader.poll().is_pending());
    let mut waiters: Vec<_> = (0..5).map(|_| Polled::new(cached.get())).collect();
    assert!(waiters.iter_mut().all(|waiter| waiter.poll().is_pending()));
    drop(leader);
    assert!(waiters.iter().all(|waiter| waiter.wakes() == 1));
    // Those that were woken first are dropped: before they are polled again, and after.
    drop(waiters.remove(0));
    assert!(waiters[0].poll().is_pending());
    assert_eq!(source.begun(), 2, "it is the leader now");
    assert!(waiters[1].poll().is_pending());
    drop(waiters.remove(0));
    assert_eq!(waiters[0].wakes(), 1);
    source.permit(1);
    for mut waiter in waiters {
        assert!(matches!(waiter.poll(), Poll::Ready(Ok(value)) if *value == 1));
    }
    assert_eq!((source.begun(), cached.counters().reloads), (3, 1));
}

#[test]
fn a_wait_that_is_dropped_anywhere_loses_no_update() {
    let (table, loads) = (anonymous(), Arc::new(AtomicU64::new(0)));
    let cached = cached(&loads, &table);
    for times in 0..20 {
        run(cached.get()).unwrap();
        let before = loads.load(SeqCst);
        assert!(!poll_and_drop(cached.wait(), times), "there is no update");
        cached.mark_updated().unwrap();
        let has_waited = poll_and_drop(cached.wait(), times);
        if !has_waited {
            assert_eq!(*run(cached.wait()).unwrap(), before + 1);
        }
        assert_eq!(loads.load(SeqCst), before + 1);
    }
}

#[test]
fn tasks_that_give_up_again_and_again_are_forgotten() {
    let source = Source::with_permits(0);
    let cached = source.cached(&anonymous());
    let mut leader = Polled::new(cached.get());
    assert!(leader.poll().is_pending());
    let mut stays = Polled::new(cached.get());
    assert!(stays.poll().is_pending());
    let wakes = Arc::new(Wakes::default());
    let waker = Waker::from(wakes.clone());
    for _ in 0..1000 {
        let mut call = Box::pin(cached.get());
        for _ in 0..3 {
            assert!(call.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        }
    }
    drop(waker);
    assert_eq!(Arc::strong_count(&wakes), 1, "wakers of tasks that are gone are kept");
    source.permit(1);
    assert_eq!(*leader.finish_anyway().unwrap(), 1);
    assert_eq!(*stays.finish().unwrap(), 1);
    assert_eq!(wakes.0.load(SeqCst), 0);
}

impl<T> Polled<'_, T> {
    /// Polls it whenever it was woken, until it is ready.
    fn resume(mut self) -> T {
        loop {
            assert!(self.wakes() > 0, "a task sleeps for good");
            if let Poll::Ready(output) = self.poll() {
                return output;
            }
        }
    }

    fn finish_anyway(mut self) -> T {
        match self.poll() {
            Poll::Ready(output) => output,
            Poll::Pending => panic!("it is not ready"),
        }
    }
}

#[test]
fn what_a_loader_drops_belongs_to_its_load() {
    // A future whose destructor asks for the value that is being loaded would wait for itself if it were outside of the load.
    struct Asks(Arc<OnceLock<Arc<gensync::Cached<u64>>>>, Arc<Mutex<Vec<ErrorKind>>>);
    impl Drop for Asks {
        fn drop(&mut self) {
            let error = self.0.get().unwrap().get().unwrap_err();
            self.1.lock().unwrap().push(cause(&error).kind().clone());
        }
    }
    let table = anonymous();
    let (blocking, errors) = (Arc::new(OnceLock::new()), Arc::new(Mutex::new(Vec::new())));
    let (asks, kinds) = (blocking.clone(), errors.clone());
    let cached = Arc::new(Cached::new(attach(&table, "tasks"), move || {
        let asks = Asks(asks.clone(), kinds.clone());
        async move {
            let _asks = asks;
            std::future::pending::<Result<u64, Infallible>>().await
        }
    }));
    let waits = Arc::downgrade(&cached);
    let value = gensync::Cached::new(attach(&table, "threads"), move || {
        // In the scope of the task's load, or it would wait for it for ever.
        run(waits.upgrade().unwrap().get()).map(|value| *value)
    });
    blocking.set(Arc::new(value)).unwrap();
    let mut call = Polled::new(cached.get());
    assert!(call.poll().is_pending());
    drop(call);
    assert_eq!(*errors.lock().unwrap(), [ErrorKind::Recursion]);
}

#[test]
fn a_call_that_a_thread_keeps_until_it_ends_lets_others_load() {
    type Kept = std::cell::RefCell<Option<Pin<Box<dyn Future<Output = Result<Arc<u64>, gensync::Error>>>>>>;
    thread_local! {
        static KEPT: Kept = const { std::cell::RefCell::new(None) };
    }
    let source = Source::with_permits(0);
    let cached = source.cached(&anonymous());
    let keeper = {
        let cached = cached.clone();
        // Used first, this is dropped last, when the thread has no other locals any more.
        move || {
            KEPT.with_borrow_mut(|_| ());
            let mut call: Pin<Box<dyn Future<Output = _>>> = Box::pin(async move { cached.get().await });
            assert!(call.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
            KEPT.set(Some(call));
        }
    };
    std::thread::spawn(keeper).join().unwrap();
    let mut call = Polled::new(cached.get());
    assert!(call.poll().is_pending());
    assert_eq!(source.begun(), 2, "a load that is gone is waited for");
    source.permit(1);
    assert_eq!(*call.finish().unwrap(), 1);
}

#[test]
fn tasks_of_several_threads_that_come_and_go_find_every_update() {
    const UPDATES: u64 = 2000;
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let (source, loads) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let cached = Arc::new(Cached::new(sync(&table), {
        let (source, loads) = (source.clone(), loads.clone());
        move || {
            let (source, loads) = (source.clone(), loads.clone());
            async move {
                let value = source.load(SeqCst);
                for _ in 0..loads.fetch_add(1, SeqCst) % 4 {
                    tokio::task::yield_now().await;
                }
                Ok::<_, Infallible>(value)
            }
        }
    }));
    threads_of_tokio().block_on(within_limit(async {
        let readers = (0..16).map(|reader| {
            let (cached, source) = (cached.clone(), source.clone());
            tokio::spawn(async move {
                let mut random = 0x9e37_79b9 + reader;
                let mut reads = 0;
                while source.load(SeqCst) < UPDATES {
                    // Dropped after a few polls, or waited for.
                    let times = support::next_random(&mut random) % 8;
                    let before = source.load(SeqCst);
                    let mut call = std::pin::pin!(cached.get());
                    let mut polls = 0;
                    let value = poll_fn(|context| match call.as_mut().poll(context) {
                        Poll::Ready(value) => Poll::Ready(Some(value)),
                        Poll::Pending if polls == times => Poll::Ready(None),
                        Poll::Pending => {
                            polls += 1;
                            if times < 6 {
                                context.waker().wake_by_ref();
                            }
                            Poll::Pending
                        }
                    });
                    if let Some(value) = value.await {
                        // What was complete before the call, the update in flight apart.
                        assert!(*value.unwrap() + 1 >= before, "an update was missed");
                        reads += 1;
                    }
                    tokio::task::yield_now().await;
                }
                reads
            })
        });
        let readers: Vec<_> = readers.collect();
        let waiter = {
            let (cached, source) = (cached.clone(), source.clone());
            tokio::spawn(async move {
                let mut known = cached.get().await.unwrap();
                while *known < UPDATES {
                    known = cached.wait_past(&known).await.unwrap();
                    assert!(*known <= source.load(SeqCst));
                }
            })
        };
        for update in 1..=UPDATES {
            let commit = async || {
                source.store(update, SeqCst);
                tokio::task::yield_now().await;
                Ok::<_, Infallible>(())
            };
            cached.update(commit).await.unwrap();
            assert_eq!(*cached.get().await.unwrap(), update);
        }
        for reader in readers {
            assert!(reader.await.unwrap() > 0);
        }
        waiter.await.unwrap();
    }));
    let counters = cached.counters();
    assert!(counters.reloads <= loads.load(SeqCst) && counters.errors == 0, "{counters:?}");
}

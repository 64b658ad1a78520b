//! The policies, which are those of the blocking face: that the awaiting one asks for them, and paces what it repeats.

use std::time::Instant;

use super::*;
use gensync::future::CachedBuilder;
use support::source::HOUR;

const SOON: Duration = Duration::from_millis(50);

fn builder(source: &Arc<Source>, table: &Table) -> CachedBuilder<u64> {
    Cached::builder(sync(table), source.loader())
}

#[test]
fn an_old_value_or_a_deadline_saves_from_waiting() {
    in_each_runtime(async || {
        let source = Source::with_permits(1);
        let table = anonymous();
        let cached = builder(&source, &table).stale_while_reloading().build().unwrap();
        assert_eq!(*cached.get().await.unwrap(), 1);
        source.set(Ok(2));
        cached.mark_updated().unwrap();
        let mut leader = Polled::new(cached.get());
        assert!(leader.poll().is_pending());
        assert_eq!(*cached.get().await.unwrap(), 1);
        assert_eq!(*cached.get_stale_ok().await.unwrap(), 1);
        let deadline = Instant::now() + SOON;
        let error = cached.get_fresh(deadline).await.unwrap_err();
        assert!(*error.kind() == ErrorKind::Deadline && Instant::now() >= deadline, "{error}");
        let mut fresh = Polled::new(cached.get_fresh(Instant::now() + LIMIT));
        assert!(fresh.poll().is_pending());
        source.permit(1);
        assert_eq!(*leader.future.await.unwrap(), 2);
        assert_eq!(*fresh.finish().unwrap(), 2);
        assert_eq!((cached.counters().stale_answers, source.begun()), (2, 2));
    });
}

#[test]
fn a_load_that_lasts_longer_than_an_old_value_may_be_served_counts_as_failed() {
    in_each_runtime(async || {
        let source = Source::with_permits(1);
        let table = anonymous();
        let errors = Arc::new(AtomicU64::new(0));
        let count = errors.clone();
        let cached =
            builder(&source, &table).fail_safe(SOON).on_error(move |_| _ = count.fetch_add(1, SeqCst)).build().unwrap();
        assert_eq!(*cached.get().await.unwrap(), 1);
        cached.mark_updated().unwrap();
        let mut leader = Polled::new(cached.get());
        assert!(leader.poll().is_pending());
        for _ in 0..2 {
            let error = cached.get().await.unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Overdue { lasted, .. } if *lasted >= SOON), "{error}");
        }
        source.permit(1);
        assert_eq!(*leader.future.await.unwrap(), 1);
        assert_eq!(*cached.get().await.unwrap(), 1);
        assert_eq!((cached.counters().errors, errors.load(SeqCst), source.begun()), (1, 0, 2));
    });
}

#[test]
fn loads_that_are_dropped_again_and_again_do_not_let_an_old_value_be_served_for_ever() {
    let source = Source::with_permits(1);
    let cached = builder(&source, &anonymous()).stale_while_reloading().fail_safe(SOON).build().unwrap();
    run(cached.get()).unwrap();
    cached.mark_updated().unwrap();
    let start = Instant::now();
    loop {
        let mut leader = Polled::new(cached.get());
        assert!(leader.poll().is_pending());
        let mut other = Polled::new(cached.get());
        match other.poll() {
            Poll::Ready(value) => assert_eq!(*value.unwrap(), 1),
            Poll::Pending => break,
        }
        assert!(start.elapsed() < LIMIT, "the source hangs, and no call notices");
    }
    assert!(start.elapsed() >= SOON - Duration::from_millis(10));
    source.permit(1);
    assert_eq!(*run(cached.get()).unwrap(), 1);
    cached.mark_updated().unwrap();
    let mut leader = Polled::new(cached.get());
    assert!(leader.poll().is_pending());
    assert_eq!(*run(cached.get()).unwrap(), 1, "the time begins anew");
}

#[test]
fn a_broken_source_is_neither_stormed_nor_trusted_for_ever() {
    in_each_runtime(async || {
        let source = Source::open();
        let table = anonymous();
        let errors = Arc::new(AtomicU64::new(0));
        let count = errors.clone();
        let cached = builder(&source, &table)
            .fail_safe(4 * SOON)
            .retry_pause(SOON)
            .on_error(move |_| _ = count.fetch_add(1, SeqCst))
            .build()
            .unwrap();
        assert_eq!(*cached.get().await.unwrap(), 1);
        source.set(Err("down"));
        cached.mark_updated().unwrap();
        let start = Instant::now();
        let error = loop {
            match cached.get().await {
                Ok(value) => assert_eq!(*value, 1),
                Err(error) => break error,
            }
            yield_now().await;
        };
        let elapsed = start.elapsed();
        assert!(elapsed >= 4 * SOON - Duration::from_millis(10), "{elapsed:?}");
        assert!(matches!(error.kind(), ErrorKind::Load { reason, .. } if reason == "down"), "{error}");
        let loads = source.begun() - 1;
        assert!(loads <= elapsed.as_millis() as u64 / (SOON.as_millis() as u64 - 10) + 1, "{loads} in {elapsed:?}");
        assert_eq!((cached.counters().errors, errors.load(SeqCst)), (loads, loads));
        // A waiter gets the error of the load that it waited for.
        source.set(Ok(2));
        while cached.get().await.is_err() {
            yield_now().await;
        }
        assert_eq!(*cached.get().await.unwrap(), 2);
    });
}

#[test]
fn waiters_for_a_load_that_fails_get_its_error_and_do_not_load_in_turn() {
    let source = Source::with_permits(0);
    source.set(Err("down"));
    let cached = source.cached(&anonymous());
    let mut leader = Polled::new(cached.get());
    assert!(leader.poll().is_pending());
    let mut waiters: Vec<_> = (0..5).map(|_| Polled::new(cached.get())).collect();
    assert!(waiters.iter_mut().all(|waiter| waiter.poll().is_pending()));
    source.permit(10);
    assert!(leader.finish().is_err());
    for waiter in waiters {
        let error = waiter.finish().unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Load { .. }), "{error}");
    }
    assert_eq!((source.begun(), cached.counters().errors), (1, 1));
}

#[test]
fn a_value_expires_by_age_and_with_each_key_that_it_depends_on() {
    in_each_runtime(async || {
        let source = Source::open();
        let table = anonymous();
        let other = attach(&table, "other");
        let reloads = Arc::new(Mutex::new(Vec::new()));
        let list = reloads.clone();
        let cached = builder(&source, &table)
            .max_age(HOUR)
            .jitter(0.5)
            .depends_on(&other)
            .on_reload(move |old, new| list.lock().unwrap().push((*old, *new)))
            .build()
            .unwrap();
        for value in 1..=3 {
            source.set(Ok(value));
            assert_eq!(*cached.get().await.unwrap(), value);
            other.mark_updated().unwrap();
        }
        assert_eq!(*reloads.lock().unwrap(), [(1, 2), (2, 3)]);
        let aging = builder(&source, &table).max_age(SOON).build().unwrap();
        let first = aging.get().await.unwrap();
        let next = aging.wait().await.unwrap();
        assert!(!Arc::ptr_eq(&first, &next) && aging.counters().reloads == 2);
        while aging.get_if_fresh().is_some() {
            yield_now().await;
        }
        assert!(builder(&source, &table).jitter(2.0).build().is_err());
    });
}

#[test]
fn verification_reports_a_change_that_was_not_announced() {
    in_each_runtime(async || {
        let source = Source::open();
        let table = anonymous();
        let reports = Arc::new(Mutex::new(Vec::new()));
        let list = reports.clone();
        let cached = builder(&source, &table)
            .verify(3, move |cached, loaded| list.lock().unwrap().push((*cached, *loaded)))
            .build()
            .unwrap();
        for _ in 0..7 {
            assert_eq!(*cached.get().await.unwrap(), 1);
        }
        // The 3rd and the 6th hit are verified.
        assert_eq!((source.begun(), reports.lock().unwrap().len()), (3, 0));
        source.set(Ok(2));
        for value in [1, 1, 2] {
            assert_eq!(*cached.get().await.unwrap(), value);
            assert!(cached.get_if_fresh().is_some(), "which verifies nothing");
        }
        assert_eq!(*reports.lock().unwrap(), [(1, 2)]);
        source.set(Err("down"));
        for _ in 0..3 {
            assert_eq!(*cached.get().await.unwrap(), 2);
        }
        assert_eq!((cached.counters().errors, cached.counters().reloads), (1, 4));
        // A verification that is dropped leaves the value as it is.
        let source = Source::with_permits(1);
        let cached = builder(&source, &table).verify(1, |_, _| {}).build().unwrap();
        cached.get().await.unwrap();
        let mut call = Polled::new(cached.get());
        assert!(call.poll().is_pending());
        assert_eq!(*cached.get().await.unwrap(), 1, "while another call verifies");
        drop(call);
        assert!(cached.get_if_fresh().is_some());
    });
}

#[test]
fn a_callback_that_asks_for_the_value_gets_what_is_in_place() {
    let source = Source::open();
    let table = anonymous();
    let itself: Arc<OnceLock<Arc<Cached<u64>>>> = Arc::default();
    let answers = Arc::new(Mutex::new(Vec::new()));
    let (value, list) = (itself.clone(), answers.clone());
    let cached = builder(&source, &table).on_reload(move |_, _| {
        let answer = Polled::new(value.get().unwrap().get()).poll();
        list.lock().unwrap().push(match answer {
            Poll::Ready(answer) => *answer.unwrap(),
            Poll::Pending => panic!("it would wait for itself"),
        });
    });
    let cached = Arc::new(cached.build().unwrap());
    assert!(itself.set(cached.clone()).is_ok());
    for value in 1..=3 {
        source.set(Ok(value));
        assert_eq!(*run(cached.get()).unwrap(), value);
        cached.mark_updated().unwrap();
    }
    assert_eq!(*answers.lock().unwrap(), [2, 3]);
}

#[test]
fn a_loop_of_waits_does_not_storm_a_broken_source() {
    for pause in [SOON, Duration::ZERO] {
        in_each_runtime(async || {
            let source = Source::open();
            source.set(Err("down"));
            let table = anonymous();
            let cached = builder(&source, &table).retry_pause(pause).build().unwrap();
            let start = Instant::now();
            for loads in 1..=5 {
                assert!(cached.wait().await.is_err());
                assert_eq!(source.begun(), loads);
            }
            let least = 4 * pause.max(Duration::from_millis(10));
            assert!(start.elapsed() >= least - Duration::from_millis(5), "{:?}", start.elapsed());
            source.set(Ok(1));
            assert_eq!(*cached.wait().await.unwrap(), 1);
        });
    }
}

#[test]
fn a_wait_that_lets_a_broken_source_rest_ends_when_another_task_has_loaded() {
    let source = Source::open();
    source.set(Err("down"));
    let cached = builder(&source, &anonymous()).retry_pause(HOUR).build().unwrap();
    assert!(run(cached.wait()).is_err());
    let mut wait = Polled::new(cached.wait());
    for _ in 0..3 {
        assert!(wait.poll().is_pending());
    }
    source.set(Ok(1));
    assert_eq!(*run(cached.get()).unwrap(), 1);
    assert_eq!(*wait.finish().unwrap(), 1);
}

#[test]
fn a_wait_ends_with_an_update_of_another_process_and_not_before() {
    let (_folder, path) = path();
    for table in [anonymous(), Table::open(&path).unwrap()] {
        in_each_runtime(async || {
            let source = Source::open();
            let cached = source.cached(&table);
            let writer = sync(&table);
            assert_eq!(*cached.wait().await.unwrap(), 1, "there was none");
            for value in 2..=4 {
                let not_yet = async {
                    pause(Duration::from_millis(20)).await;
                    None
                };
                let early = smol::future::or(async { Some(cached.wait().await) }, not_yet).await;
                assert!(early.is_none(), "{early:?}");
                let known = cached.get().await.unwrap();
                let (waited, past, ()) = tokio::join!(cached.wait(), cached.wait_past(&known), async {
                    for _ in 0..3 {
                        yield_now().await;
                    }
                    source.set(Ok(value));
                    in_child(|| _ = writer.mark_updated().unwrap()).succeeds();
                });
                assert_eq!((*waited.unwrap(), *past.unwrap()), (value, value));
            }
            assert_eq!(source.begun(), 4);
        });
    }
}

#[test]
fn a_wait_ends_with_an_invalidation_and_with_a_load_of_another_task_at_once() {
    let source = Source::open();
    let cached = builder(&source, &anonymous()).verify(1, |_, _| {}).build().unwrap();
    run(cached.get()).unwrap();
    let mut wait = Polled::new(cached.wait());
    for _ in 0..3 {
        assert!(wait.poll().is_pending());
    }
    cached.invalidate();
    assert_eq!(*wait.finish().unwrap(), 1);
    let mut wait = Polled::new(cached.wait());
    for _ in 0..3 {
        assert!(wait.poll().is_pending());
    }
    // Verified, and so replaced, though no update was made.
    run(cached.get()).unwrap();
    assert_eq!(*wait.finish().unwrap(), 1);
    assert_eq!(source.begun(), 3);
}

#[test]
fn only_waits_for_a_time_or_an_update_take_a_thread_and_give_it_back() {
    let table = anonymous();
    in_child(|| {
        let before = threads();
        let source = Source::with_permits(1);
        let cached = builder(&source, &table).fail_safe(HOUR).build().unwrap();
        let plain = Cached::<u64>::without_loader(attach(&table, "plain"));
        let mut calls = [Polled::new(plain.get_with(async || source.load().await)), Polled::new(plain.get())];
        assert!(calls[0].poll().is_ready());
        plain.mark_updated().unwrap();
        calls[0] = Polled::new(plain.get_with(async || source.load().await));
        assert!(calls.iter_mut().all(|call| call.poll().is_pending()));
        assert_eq!(threads(), before, "it waits for the load of another task");
        source.permit(2);
        run(cached.get()).unwrap();
        cached.mark_updated().unwrap();
        let mut calls = [Polled::new(cached.get()), Polled::new(cached.get())];
        assert!(calls.iter_mut().all(|call| call.poll().is_pending()));
        assert_eq!(threads(), before + 1, "it waits for a limit");
        drop(calls);
        while threads() > before {
            std::thread::yield_now();
        }
    })
    .succeeds();
}

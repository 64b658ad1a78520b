//! Guards against waits for a value that end too early or too late: with the value that is known already, with an error that
//! was reported before, or when the deadline is long past.

mod support;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use gensync::{Cached, GenerationSynchronizer};
use support::await_value;
use support::source::*;

/// A few ticks of the coarse clock.
const AGE: Duration = Duration::from_millis(10);

/// A value that differs at each load.
fn numbered(age: Duration) -> Cached<u64> {
    let loads = AtomicU64::new(0);
    let loader = move || Ok::<_, io::Error>(loads.fetch_add(1, SeqCst) + 1);
    Cached::builder(sync(&anonymous()), loader).max_age(age).build().unwrap()
}

#[test]
fn a_wait_past_a_value_that_ages_does_not_give_it_back() {
    let cached = numbered(AGE);
    let mut known = cached.get().unwrap();
    for _ in 0..40 {
        let next = cached.wait_past(&known).unwrap();
        assert!(!Arc::ptr_eq(&known, &next) && *next == *known + 1);
        known = next;
    }
    assert_eq!(cached.counters().reloads, 41);
}

#[test]
fn a_wait_for_a_value_that_ages_loads_another_one_each_time() {
    let cached = numbered(AGE);
    for expected in 1..40 {
        assert_eq!(*cached.wait().unwrap(), expected);
    }
    for expected in 40..80 {
        let value = cached.wait_timeout(support::LIMIT).unwrap();
        assert_eq!(value.as_deref(), Some(&expected));
    }
}

#[test]
fn a_wait_without_patience_reports_an_age() {
    let cached = numbered(AGE);
    cached.get().unwrap();
    for expected in (2..30).step_by(4) {
        thread::sleep(3 * AGE);
        assert_eq!(cached.wait_timeout(Duration::ZERO).unwrap().as_deref(), Some(&expected));
        thread::sleep(3 * AGE);
        assert_eq!(cached.wait_deadline(Instant::now()).unwrap().as_deref(), Some(&(expected + 1)));
        thread::sleep(3 * AGE);
        let value = cached.get().unwrap();
        assert_eq!(*value, expected + 2);
        cached.mark_updated().unwrap();
        assert_eq!(cached.wait_timeout(Duration::ZERO).unwrap().as_deref(), Some(&(expected + 3)));
    }
}

#[test]
fn each_error_of_a_loop_of_waits_is_that_of_a_load_of_its_own() {
    let table = anonymous();
    for fails_safe in [false, true] {
        let (source, loads, loader) = source();
        let builder = Cached::builder(sync(&table), loader).retry_pause(AGE);
        let builder = if fails_safe { builder.fail_safe(HOUR) } else { builder };
        let cached = builder.build().unwrap();
        cached.get().unwrap();
        set(&source, Err("down"));
        cached.mark_updated().unwrap();
        for errors in 1..30 {
            assert!(cached.wait().is_err());
            assert_eq!(loads.load(SeqCst), 1 + errors, "reported twice");
        }
    }
}

#[test]
fn a_wait_ends_at_its_deadline_while_another_thread_loads() {
    let table = anonymous();
    let begun = Arc::default();
    let (open, loader) = gated(&begun);
    let cached = Cached::new(sync(&table), loader);
    let known = cached.get().unwrap();
    cached.mark_updated().unwrap();
    thread::scope(|scope| {
        let leader = scope.spawn(|| *cached.get().unwrap());
        await_value(&begun, 2);
        // The gate opens when these have ended.
        assert!(cached.wait_timeout(AGE).unwrap().is_none());
        assert!(cached.wait_timeout(Duration::ZERO).unwrap().is_none());
        assert!(cached.wait_deadline(Instant::now() + AGE).unwrap().is_none());
        let waiter = scope.spawn(|| *cached.wait_past(&known).unwrap());
        open.send(()).unwrap();
        assert_eq!((leader.join().unwrap(), waiter.join().unwrap()), (2, 2));
    });
}

#[test]
fn a_wait_that_lets_a_broken_source_rest_ends_when_another_thread_has_loaded() {
    let table = anonymous();
    let (source, _, loader) = source();
    let cached = Cached::builder(sync(&table), loader).retry_pause(HOUR).build().unwrap();
    let known = cached.get().unwrap();
    set(&source, Err("down"));
    cached.mark_updated().unwrap();
    assert!(cached.wait().is_err());
    let start = Instant::now();
    assert!(cached.wait_timeout(AGE).unwrap().is_none(), "the pause is not over");
    assert!(start.elapsed() >= AGE);
    thread::scope(|scope| {
        let waiters = [scope.spawn(|| cached.wait().unwrap()), scope.spawn(|| cached.wait_past(&known).unwrap())];
        // So that they are likely to have begun; if not, the test shows less.
        thread::sleep(5 * AGE);
        set(&source, Ok(2));
        assert_eq!(*cached.get().unwrap(), 2);
        // One that came after this load waits for the next one.
        while !waiters.iter().all(|waiter| waiter.is_finished()) {
            cached.mark_updated().unwrap();
            thread::sleep(Duration::from_millis(1));
        }
        assert!(waiters.into_iter().all(|waiter| *waiter.join().unwrap() == 2));
    });
}

#[test]
fn a_wait_notices_an_invalidation() {
    let table = anonymous();
    let (source, _, loader) = source();
    let cached = Cached::new(sync(&table), loader);
    let known = cached.get().unwrap();
    thread::scope(|scope| {
        let waiter = scope.spawn(|| *cached.wait_past(&known).unwrap());
        set(&source, Ok(2));
        cached.invalidate();
        assert_eq!(waiter.join().unwrap(), 2);
    });
}

#[test]
fn a_wait_keeps_no_old_value() {
    let table = anonymous();
    let loads = AtomicU64::new(0);
    let value = Arc::new(());
    let cached = Cached::new(sync(&table), {
        let value = value.clone();
        // The first load gives the only hold of what it holds.
        move || Ok::<_, io::Error>(if loads.fetch_add(1, SeqCst) == 0 { Some(value.clone()) } else { None })
    });
    cached.get().unwrap();
    assert_eq!(Arc::strong_count(&value), 3);
    thread::scope(|scope| {
        let elsewhere = GenerationSynchronizer::new(&table, "key").unwrap();
        let waiter = scope.spawn(|| cached.wait().unwrap());
        elsewhere.mark_updated().unwrap();
        cached.get().unwrap();
        while !waiter.is_finished() {
            elsewhere.mark_updated().unwrap();
            thread::sleep(Duration::from_millis(1));
        }
        assert!(waiter.join().unwrap().is_none());
    });
    assert_eq!(Arc::strong_count(&value), 2);
}

#[test]
fn nothing_stands_still_when_the_clock_is_set_back() {
    let table = anonymous();
    let (source, loads, loader) = source();
    let cached = Cached::builder(sync(&table), loader)
        .max_age(Duration::from_secs(60))
        .fail_safe(Duration::from_secs(120))
        .retry_pause(Duration::from_secs(60))
        .build()
        .unwrap();
    cached.get().unwrap();
    let ran = support::after_the_clock_was_set_back(|| {
        set(&source, Ok(2));
        assert!(!cached.peek().is_fresh(), "fresh for eleven minutes");
        assert_eq!(cached.wait_timeout(Duration::ZERO).unwrap().as_deref(), Some(&2));
        assert_eq!((*cached.get().unwrap(), loads.load(SeqCst)), (2, 2));
    });
    if ran {
        assert_eq!((*cached.get().unwrap(), loads.load(SeqCst)), (1, 1), "not this process's clock");
    }
}

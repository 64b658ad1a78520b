//! Guards against a value that is stale, or that passes for another generation's, and against loads that storm the source or
//! wait for ever.

mod support;

use std::error::Error as _;
use std::io;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use gensync::{
    Cached, CachedProjection, CachedReader, ErrorKind, GenerationSynchronizer, Part, Peek, Snapshot, UpdateError,
};
use support::await_value;
use support::source::*;

#[test]
fn a_value_is_loaded_once_and_again_after_each_update() {
    let table = anonymous();
    let (source, loads, loader) = source();
    let cached = Cached::new(sync(&table), loader);
    assert!(cached.get_if_fresh().is_none());
    assert_eq!(loads.load(SeqCst), 0, "nothing is loaded before the first use");
    for _ in 0..100 {
        assert_eq!(*cached.get().unwrap(), 1);
    }
    assert_eq!(loads.load(SeqCst), 1);
    for value in 2..10 {
        set(&source, Ok(value));
        assert_eq!(*cached.get().unwrap(), value - 1, "no process has announced it");
        sync(&table).mark_updated().unwrap();
        assert!(cached.get_if_fresh().is_none());
        assert_eq!(*cached.get().unwrap(), value);
        assert_eq!(cached.get_if_fresh().as_deref(), Some(&value));
    }
    assert_eq!(loads.load(SeqCst), 9);
    let counters = cached.counters();
    assert_eq!((counters.hits, counters.reloads, counters.errors, counters.stale_answers), (115, 9, 0, 0));
}

#[test]
fn what_this_process_updates_it_reads() {
    let table = anonymous();
    let (source, _, loader) = source();
    let (here, there) = (Cached::new(sync(&table), loader), sync(&table));
    here.get().unwrap();
    here.update(|| change(&source, 2)).unwrap();
    assert_eq!(*here.get().unwrap(), 2);
    assert!(there.is_expired());
    let error = here.update(|| Err::<(), _>("rejected")).unwrap_err();
    assert!(matches!(error, UpdateError::Commit("rejected")));
    // While an update is in flight, the value is not loaded again.
    there.update(|| here.get().map(|value| assert_eq!(*value, 2))).unwrap();
    let reloads = here.counters().reloads;
    let update = there.begin_update().unwrap();
    here.get().unwrap();
    here.get().unwrap();
    assert_eq!(here.counters().reloads, reloads + 1, "once for the update before, not for this one");
    update.abandon();
}

#[test]
fn an_update_during_the_load_leaves_the_value_expired() {
    let table = anonymous();
    let (source, loads, loader) = source();
    let writer = sync(&table);
    let cached = Cached::new(sync(&table), {
        let source = source.clone();
        move || {
            let value = loader();
            if value == Ok(1) {
                // Another process is faster.
                set(&source, Ok(2));
                writer.mark_updated().unwrap();
            }
            value
        }
    });
    assert_eq!(*cached.get().unwrap(), 1, "the source was like that after the call had begun");
    assert_eq!(*cached.get().unwrap(), 2);
    assert_eq!(*cached.get().unwrap(), 2);
    assert_eq!(loads.load(SeqCst), 2);
}

#[test]
fn no_thread_finds_a_value_with_another_ones_generation() {
    let table = anonymous();
    let first = sync(&table).sync_gen().unwrap().get();
    let value = Arc::new(AtomicU64::new(0));
    let cached = Cached::new(sync(&table), {
        let value = value.clone();
        move || Ok::<_, io::Error>(value.load(SeqCst))
    });
    let stop = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while stop.load(SeqCst) == 0 {
                    let announced = value.load(SeqCst).saturating_sub(1);
                    let snapshot = cached.snapshot().unwrap();
                    let updates = snapshot.generation.unwrap().get() - first;
                    assert!(*snapshot.value >= updates, "older than its generation");
                    assert!(*snapshot.value >= announced, "older than the call");
                }
            });
        }
        let writer = sync(&table);
        for _ in 0..20_000 {
            value.fetch_add(1, SeqCst);
            writer.mark_updated().unwrap();
        }
        stop.store(1, SeqCst);
    });
    let snapshot = cached.snapshot().unwrap();
    assert_eq!((*snapshot.value, snapshot.generation.unwrap().get()), (20_000, first + 20_000));
}

#[test]
fn one_thread_loads_and_the_others_wait_for_it() {
    let table = anonymous();
    let begun = Arc::default();
    let (open, loader) = gated(&begun);
    let cached = Cached::new(sync(&table), loader);
    cached.get().unwrap();
    sync(&table).mark_updated().unwrap();
    thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| *cached.get().unwrap())).collect();
        await_value(&begun, 2);
        open.send(()).unwrap();
        assert!(threads.into_iter().all(|thread| thread.join().unwrap() == 2));
    });
    assert_eq!(begun.load(SeqCst), 2);
}

#[test]
fn an_old_value_or_a_deadline_saves_from_waiting() {
    let table = anonymous();
    for stale_while_reloading in [false, true] {
        let begun = Arc::default();
        let (open, loader) = gated(&begun);
        let builder = Cached::builder(sync(&table), loader);
        let builder = if stale_while_reloading { builder.stale_while_reloading() } else { builder };
        let cached = builder.build().unwrap();
        cached.get().unwrap();
        sync(&table).mark_updated().unwrap();
        thread::scope(|scope| {
            let loader = scope.spawn(|| *cached.get().unwrap());
            await_value(&begun, 2);
            // The gate stays closed until these have their answer.
            assert_eq!(*cached.get_stale_ok().unwrap(), 1);
            for patience in [0, 5] {
                let error = cached.get_fresh(Instant::now() + Duration::from_millis(patience)).unwrap_err();
                assert_eq!(*error.kind(), ErrorKind::Deadline);
            }
            if stale_while_reloading {
                assert_eq!(*cached.get().unwrap(), 1);
            }
            let patient = scope.spawn(|| *cached.get_fresh(Instant::now() + HOUR).unwrap());
            open.send(()).unwrap();
            assert_eq!((loader.join().unwrap(), patient.join().unwrap()), (2, 2));
        });
        assert_eq!(cached.counters().stale_answers, 1 + u64::from(stale_while_reloading));
        assert!(cached.counters().longest_load >= Duration::from_millis(5));
    }
}

#[test]
fn an_error_goes_to_the_caller_and_the_value_stays_expired() {
    let table = anonymous();
    let (source, loads, loader) = source();
    let cached = Cached::new(sync(&table), loader);
    set(&source, Err("no such table"));
    let error = cached.get().unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Load { reason, .. } if reason == "no such table"));
    assert_eq!(error.key(), Some("key"));
    assert_eq!(error.source().unwrap().to_string(), "no such table");
    set(&source, Ok(1));
    assert_eq!(*cached.get().unwrap(), 1);
    sync(&table).mark_updated().unwrap();
    set(&source, Err("gone again"));
    assert!(cached.get().is_err() && cached.get_stale_ok().is_err());
    set(&source, Ok(2));
    assert_eq!(*cached.get().unwrap(), 2);
    assert_eq!((loads.load(SeqCst), cached.counters().errors), (5, 3));
}

#[test]
fn a_waiter_for_a_load_that_fails_gets_its_error() {
    let table = anonymous();
    let begun = Arc::default();
    let (open, loader) = gated(&begun);
    let cached = Cached::new(sync(&table), loader);
    cached.get().unwrap();
    sync(&table).mark_updated().unwrap();
    thread::scope(|scope| {
        let leader = scope.spawn(|| cached.get().unwrap_err());
        await_value(&begun, 2);
        let waiter = scope.spawn(|| cached.get().unwrap_err());
        // If it comes too late, it loads for itself, and fails likewise.
        drop(open);
        for error in [leader.join().unwrap(), waiter.join().unwrap()] {
            assert!(error.source().unwrap().is::<io::Error>(), "the loader's own error");
        }
    });
}

#[test]
fn a_waiter_for_a_load_is_not_given_an_earlier_ones_failure() {
    let table = anonymous();
    let begun = Arc::default();
    let (open, loader) = gated(&begun);
    let cached = Cached::new(sync(&table), move || match loader() {
        Ok(1) => Err(io::Error::other("the first one")),
        loaded => loaded,
    });
    assert!(cached.get().is_err());
    thread::scope(|scope| {
        let leader = scope.spawn(|| *cached.get().unwrap());
        await_value(&begun, 2);
        // It wakes at the deadline, when no load has ended.
        let error = cached.get_fresh(Instant::now() + Duration::from_millis(5)).unwrap_err();
        open.send(()).unwrap();
        assert_eq!(leader.join().unwrap(), 2);
        assert_eq!(*error.kind(), ErrorKind::Deadline);
    });
}

#[test]
fn a_broken_source_is_neither_stormed_nor_trusted_for_ever() {
    let table = anonymous();
    let (source, loads, loader) = source();
    let errors = Arc::new(AtomicU64::new(0));
    let count = errors.clone();
    let cached = Cached::builder(sync(&table), loader)
        .fail_safe(Duration::from_millis(100))
        .retry_pause(HOUR)
        .on_error(move |error| {
            assert!(matches!(error.kind(), ErrorKind::Load { .. }));
            count.fetch_add(1, SeqCst);
        })
        .build()
        .unwrap();
    cached.get().unwrap();
    set(&source, Err("down"));
    sync(&table).mark_updated().unwrap();
    let start = Instant::now();
    for _ in 0..10 {
        assert!(cached.get().is_ok_and(|value| *value == 1) || start.elapsed() > Duration::from_millis(90));
    }
    assert!(cached.get_fresh(Instant::now() + HOUR).is_err(), "this one wants it fresh");
    // Its age is what ends it.
    thread::sleep(Duration::from_millis(150));
    let error = cached.get().unwrap_err();
    assert_eq!(error.source().unwrap().to_string(), "down");
    assert_eq!((loads.load(SeqCst), errors.load(SeqCst)), (2, 1), "the source was stormed");
}

#[test]
fn a_source_that_works_again_is_noticed_after_the_pause() {
    let table = anonymous();
    let (source, _, loader) = source();
    let cached =
        Cached::builder(sync(&table), loader).fail_safe(HOUR).retry_pause(Duration::from_millis(1)).build().unwrap();
    cached.get().unwrap();
    set(&source, Err("down"));
    sync(&table).mark_updated().unwrap();
    assert_eq!(*cached.get().unwrap(), 1);
    set(&source, Ok(2));
    let start = Instant::now();
    while *cached.get().unwrap() != 2 {
        assert!(start.elapsed() < Duration::from_secs(20), "stale for good");
    }
    assert!(cached.counters().stale_answers >= 1);
}

#[test]
fn a_value_is_no_older_than_its_age_limit() {
    let table = anonymous();
    let (source, _, loader) = source();
    let cached = Cached::builder(sync(&table), loader).max_age(Duration::from_millis(30)).build().unwrap();
    cached.get().unwrap();
    set(&source, Ok(2));
    thread::sleep(Duration::from_millis(60));
    assert_eq!(*cached.get().unwrap(), 2, "changed by a program that does not use gensync");
}

#[test]
fn the_longest_durations_are_as_good_as_for_ever() {
    let table = anonymous();
    let (source, loads, loader) = source();
    let cached = Cached::builder(sync(&table), loader)
        .max_age(Duration::MAX)
        .jitter(0.5)
        .fail_safe(Duration::MAX)
        .retry_pause(Duration::MAX)
        .build()
        .unwrap();
    for _ in 0..3 {
        assert_eq!(*cached.get().unwrap(), 1);
    }
    assert_eq!(loads.load(SeqCst), 1);
    set(&source, Err("down"));
    sync(&table).mark_updated().unwrap();
    for _ in 0..3 {
        assert_eq!(*cached.get().unwrap(), 1);
    }
    assert_eq!(loads.load(SeqCst), 2, "no pause");
}

#[test]
fn jitter_keeps_values_from_ageing_all_at_once() {
    let table = anonymous();
    let (source, loads, loader) = source();
    let loader = Arc::new(loader);
    let values: Vec<_> = (0..64)
        .map(|_| {
            let loader = loader.clone();
            Cached::builder(sync(&table), move || loader()).max_age(Duration::from_secs(2)).jitter(1.0).build().unwrap()
        })
        .collect();
    let load_all = || values.iter().for_each(|value| _ = value.get().unwrap());
    load_all();
    set(&source, Ok(2));
    thread::sleep(Duration::from_millis(500));
    load_all();
    let aged = loads.load(SeqCst) - 64;
    assert!((1..64).contains(&aged), "{aged} of 64 values aged");
}

#[test]
fn a_value_expires_with_each_key_that_it_depends_on() {
    let table = anonymous();
    let others = ["users", "groups"].map(|key| GenerationSynchronizer::new(&table, key).unwrap());
    let (_, loads, loader) = source();
    let cached = Cached::builder(sync(&table), loader).depends_on(&others[0]).depends_on(&others[1]).build().unwrap();
    for other in others.iter().chain([&sync(&table)]) {
        cached.get().unwrap();
        let before = loads.load(SeqCst);
        cached.get().unwrap();
        assert_eq!(loads.load(SeqCst), before);
        other.mark_updated().unwrap();
        cached.get().unwrap();
        assert_eq!(loads.load(SeqCst), before + 1);
    }
}

#[test]
fn each_reload_is_reported_with_the_old_value_and_the_new_one() {
    let table = anonymous();
    let (source, _, loader) = source();
    let reported = Arc::new(Mutex::new(Vec::new()));
    let report = reported.clone();
    let cached = Cached::builder(sync(&table), loader)
        .on_reload(move |old, new| report.lock().unwrap().push((*old, *new)))
        .build()
        .unwrap();
    cached.get().unwrap();
    for value in 2..4 {
        cached.update(|| change(&source, value)).unwrap();
        cached.get().unwrap();
    }
    assert_eq!(*reported.lock().unwrap(), [(1, 2), (2, 3)]);
}

#[test]
fn verification_reports_a_change_that_was_not_announced() {
    let table = anonymous();
    let (source, _, loader) = source();
    let reports = Arc::new(Mutex::new(Vec::new()));
    let report = reports.clone();
    let cached = Cached::builder(sync(&table), loader)
        .verify(3, move |cached, loaded| report.lock().unwrap().push((*cached, *loaded)))
        .build()
        .unwrap();
    for value in 2..5 {
        cached.update(|| change(&source, value)).unwrap();
        for _ in 0..5 {
            cached.get().unwrap();
        }
    }
    assert_eq!(*reports.lock().unwrap(), [], "those were announced");
    set(&source, Ok(5));
    for _ in 0..6 {
        cached.get().unwrap();
    }
    assert_eq!(*reports.lock().unwrap(), [(4, 5)]);
    assert_eq!(*cached.get().unwrap(), 5);
}

#[test]
fn verification_does_not_report_what_is_changed_within_an_update() {
    let table = anonymous();
    let dependency = GenerationSynchronizer::new(&table, "other").unwrap();
    for changed in [&sync(&table), &dependency] {
        let (source, loads, loader) = source();
        let cached = Cached::builder(sync(&table), loader)
            .depends_on(&dependency)
            .verify(1, |cached, loaded| panic!("{cached} became {loaded}"))
            .build()
            .unwrap();
        cached.get().unwrap();
        changed
            .update(|| {
                change(&source, 2)?;
                assert_eq!(*cached.get().unwrap(), 2);
                assert_eq!(loads.load(SeqCst), 2, "not verified");
                io::Result::Ok(())
            })
            .unwrap();
    }
}

#[test]
fn a_verification_that_fails_leaves_no_trace_but_an_error() {
    let table = anonymous();
    let (source, loads, loader) = source();
    let errors = Arc::new(AtomicU64::new(0));
    let count = errors.clone();
    let cached = Cached::builder(sync(&table), loader)
        .verify(1, |_, _| ())
        .fail_safe(Duration::from_millis(500))
        .retry_pause(HOUR)
        .on_error(move |_| _ = count.fetch_add(1, SeqCst))
        .build()
        .unwrap();
    cached.get().unwrap();
    set(&source, Err("a blip"));
    assert_eq!(*cached.get().unwrap(), 1);
    assert_eq!((loads.load(SeqCst), cached.counters().errors, errors.load(SeqCst)), (2, 1, 1));
    // It does not keep a new value away until the pause is over.
    set(&source, Ok(2));
    sync(&table).mark_updated().unwrap();
    assert_eq!(*cached.get().unwrap(), 2);
    // Nor does the age of the old value count from it.
    set(&source, Err("another blip"));
    assert_eq!(*cached.get().unwrap(), 2);
    thread::sleep(Duration::from_millis(600));
    sync(&table).mark_updated().unwrap();
    assert_eq!(*cached.get().unwrap(), 2);
    assert_eq!(cached.counters().stale_answers, 1);
}

#[test]
fn get_if_fresh_does_not_verify() {
    let table = anonymous();
    let (_, loads, loader) = source();
    let cached = Cached::builder(sync(&table), loader).verify(2, |_, _| ()).build().unwrap();
    cached.get().unwrap();
    for _ in 0..4 {
        assert!(cached.get_if_fresh().is_some());
    }
    assert_eq!(loads.load(SeqCst), 1);
    // Nor does it take another call's turn.
    for _ in 0..4 {
        cached.get().unwrap();
        assert!(cached.get_if_fresh().is_some());
    }
    assert_eq!(loads.load(SeqCst), 3);
}

#[test]
fn a_builder_refuses_what_makes_no_sense() {
    let table = anonymous();
    let builder = || Cached::builder(sync(&table), source().2);
    let text = |built: Result<Cached<u64>, gensync::Error>| built.unwrap_err().to_string();
    assert_eq!(text(builder().max_age(HOUR).jitter(1.5).build()), "the jitter is 1.5, expected a fraction, 0 to 1");
    assert!(text(builder().max_age(HOUR).jitter(f64::NAN).build()).contains("NaN"));
    assert!(text(builder().jitter(0.5).build()).contains("max_age"));
    assert!(text(builder().verify(0, |_, _| ()).build()).contains("expected 1 or more"));
}

#[test]
fn a_wait_returns_the_value_that_comes_after_the_one_in_place() {
    let table = anonymous();
    let (source, loads, loader) = source();
    let cached = Cached::new(sync(&table), loader);
    assert_eq!(*cached.wait().unwrap(), 1, "there was none in place");
    assert!(cached.wait_timeout(Duration::from_millis(5)).unwrap().is_none());
    assert!(cached.wait_deadline(Instant::now()).unwrap().is_none());
    thread::scope(|scope| {
        let waiters = [(); 3].map(|()| scope.spawn(|| *cached.wait().unwrap()));
        // Not only once: a waiter may come after the first update.
        while !waiters.iter().all(|waiter| waiter.is_finished()) {
            set(&source, Ok(2));
            sync(&table).mark_updated().unwrap();
            thread::sleep(Duration::from_millis(1));
        }
        assert!(waiters.into_iter().all(|waiter| waiter.join().unwrap() == 2));
    });
    // Expired already.
    cached.update(|| change(&source, 3)).unwrap();
    assert_eq!(*cached.wait_deadline(Instant::now()).unwrap().unwrap(), 3);
    assert_eq!(loads.load(SeqCst), cached.counters().reloads);
}

#[test]
fn a_wait_past_a_known_value_misses_none_that_another_thread_has_loaded() {
    let table = anonymous();
    let (source, _, loader) = source();
    let cached = Cached::new(sync(&table), loader);
    let known = cached.get().unwrap();
    cached.update(|| change(&source, 2)).unwrap();
    assert_eq!(*cached.get().unwrap(), 2);
    assert_eq!(*cached.wait_past(&known).unwrap(), 2);
}

#[test]
fn a_wait_ends_with_each_key_and_with_age() {
    let table = anonymous();
    let other = GenerationSynchronizer::new(&table, "other").unwrap();
    let elsewhere = sync(&anonymous());
    let (source, _, loader) = source();
    let cached = Cached::builder(sync(&table), loader)
        .depends_on(&other)
        .depends_on(&elsewhere)
        .max_age(Duration::from_millis(300))
        .build()
        .unwrap();
    cached.get().unwrap();
    for (value, key) in [(2, &other), (3, &elsewhere), (4, &sync(&table))] {
        let before = cached.counters().reloads;
        set(&source, Ok(value));
        key.mark_updated().unwrap();
        assert_eq!(*cached.wait().unwrap(), value);
        assert_eq!(cached.counters().reloads, before + 1);
    }
    set(&source, Ok(5));
    assert_eq!(*cached.wait().unwrap(), 5, "no process has announced it, but it is too old");
}

#[test]
fn a_loop_of_waits_does_not_storm_a_broken_source() {
    let table = anonymous();
    let (source, loads, loader) = source();
    let cached = Cached::builder(sync(&table), loader).retry_pause(Duration::from_millis(100)).build().unwrap();
    cached.get().unwrap();
    set(&source, Err("down"));
    sync(&table).mark_updated().unwrap();
    let start = Instant::now();
    for _ in 0..4 {
        assert!(cached.wait().is_err());
    }
    assert!(start.elapsed() > Duration::from_millis(250), "the source was stormed");
    assert!(cached.wait_timeout(Duration::from_millis(1)).unwrap().is_none());
    assert_eq!(loads.load(SeqCst), 5);
    set(&source, Ok(2));
    assert_eq!(*cached.wait().unwrap(), 2);
}

#[test]
fn nor_does_one_that_asks_for_no_pause() {
    let table = anonymous();
    let (source, loads, loader) = source();
    let cached = Cached::builder(sync(&table), loader).retry_pause(Duration::ZERO).build().unwrap();
    set(&source, Err("down"));
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(200) {
        assert!(cached.wait().is_err());
    }
    assert!(loads.load(SeqCst) <= 30, "{loads:?}");
}

#[test]
fn the_synchronizer_of_a_value_has_seen_what_is_in_place() {
    let table = anonymous();
    let (source, _, loader) = source();
    let cached = Cached::new(sync(&table), loader);
    cached.get().unwrap();
    for value in 2..5 {
        assert!(!cached.synchronizer().is_expired());
        cached.update(|| change(&source, value)).unwrap();
        assert!(cached.synchronizer().is_expired(), "what it has changed itself is not in place yet");
        cached.synchronizer().wait();
        assert_eq!(*cached.get().unwrap(), value);
    }
}

#[test]
fn whatever_is_done_with_its_synchronizer_an_old_value_is_not_fresh() {
    let table = anonymous();
    let (source, _, loader) = source();
    let cached = Cached::new(sync(&table), loader);
    cached.get().unwrap();
    let own = cached.synchronizer();
    let deeds: [&dyn Fn(); 7] = [
        &|| _ = own.mark_updated().unwrap(),
        &|| own.clear().unwrap(),
        &|| own.update(|| Ok::<_, io::Error>(())).unwrap(),
        &|| _ = own.begin_update().unwrap().finish().unwrap(),
        &|| _ = cached.mark_updated().unwrap(),
        &|| cached.clear().unwrap(),
        &|| _ = cached.begin_update().unwrap().finish().unwrap(),
    ];
    let mut value = 1;
    for deed in deeds {
        for adopt in [&|| (), &|| _ = own.refresh().unwrap(), &|| own.adopt(own.ticket())] as [&dyn Fn(); 3] {
            value += 1;
            set(&source, Ok(value));
            deed();
            assert!(own.is_expired(), "the value is not loaded");
            adopt();
            assert!(cached.get_if_fresh().is_none() && !cached.peek().is_fresh());
            assert_eq!(*cached.wait_deadline(Instant::now()).unwrap().unwrap(), value);
            assert!(!own.is_expired());
        }
    }
    // A clone is the caller's own, and follows its own updates.
    let clone = own.clone();
    clone.mark_updated().unwrap();
    assert!(!clone.is_expired() && own.is_expired());
}

#[test]
fn a_value_is_marked_by_itself_in_other_processes_as_well() {
    let table = anonymous();
    let (_, loads, loader) = source();
    let loader = Arc::new(loader);
    let values = [loader.clone(), loader].map(|loader| Cached::new(sync(&table), move || loader()));
    values.iter().for_each(|value| _ = value.get().unwrap());
    let before = values[0].snapshot().unwrap().generation.unwrap();
    assert_eq!(values[0].mark_updated().unwrap().get(), before.get() + 1);
    assert!(values.iter().all(|value| value.get_if_fresh().is_none()));
    values[1].clear().unwrap();
    values.iter().for_each(|value| _ = value.get().unwrap());
    assert_eq!(loads.load(SeqCst), 4);
}

#[test]
fn peeking_shows_what_is_there_and_loads_nothing() {
    let table = anonymous();
    let (_, loads, loader) = source();
    let cached = Cached::builder(sync(&table), loader).max_age(HOUR).build().unwrap();
    assert!(matches!(cached.peek(), Peek::Nothing));
    assert!(cached.peek().value().is_none() && cached.peek().snapshot().is_none() && !cached.peek().is_fresh());
    let snapshot = cached.snapshot().unwrap();
    let hits = cached.counters().hits;
    let Peek::Fresh(fresh) = cached.peek() else { panic!("it was loaded just now") };
    assert!(Arc::ptr_eq(&fresh.value, &snapshot.value) && fresh.generation == snapshot.generation);
    cached.mark_updated().unwrap();
    let Peek::Expired(old) = cached.peek().clone() else { panic!("it was updated") };
    assert!(Arc::ptr_eq(&old.value, &snapshot.value) && old.generation == snapshot.generation);
    assert_eq!((loads.load(SeqCst), cached.counters().hits), (1, hits));
}

#[test]
fn an_invalidated_value_is_loaded_again_in_this_place_only() {
    let table = anonymous();
    let (source, loads, loader) = source();
    let loader = Arc::new(loader);
    let [here, there] = [loader.clone(), loader].map(|loader| Cached::new(sync(&table), move || loader()));
    here.invalidate();
    assert!(matches!(here.peek(), Peek::Nothing));
    assert_eq!((*here.get().unwrap(), *there.get().unwrap()), (1, 1));
    let mut reader = CachedReader::new(&here);
    reader.get().unwrap();
    set(&source, Ok(2));
    here.invalidate();
    let Peek::Expired(old) = here.peek() else { panic!("fresh") };
    assert_eq!((*old.value, old.generation), (1, None));
    assert!(here.get_if_fresh().is_none());
    assert_eq!((*here.get().unwrap(), *there.get().unwrap(), loads.load(SeqCst)), (2, 1, 3));
    assert!((0..64).any(|_| *reader.get().unwrap() == 2));
    // Also in the pause after a failure, and the old value is still there to be served.
    let (source, loads, loader) = self::source();
    let cached = Cached::builder(sync(&table), loader).fail_safe(HOUR).retry_pause(HOUR).build().unwrap();
    cached.get().unwrap();
    set(&source, Err("down"));
    for loaded in 2..5 {
        cached.invalidate();
        assert_eq!(*cached.get().unwrap(), 1);
        assert_eq!(*cached.get().unwrap(), 1);
        assert_eq!(loads.load(SeqCst), loaded);
    }
    set(&source, Ok(2));
    cached.invalidate();
    assert_eq!(*cached.get().unwrap(), 2);
}

#[test]
fn a_value_that_is_invalidated_while_it_is_loaded_is_loaded_again() {
    let table = anonymous();
    let begun = Arc::default();
    let (open, loader) = gated(&begun);
    let cached = Cached::new(sync(&table), loader);
    cached.get().unwrap();
    cached.mark_updated().unwrap();
    thread::scope(|scope| {
        let leader = scope.spawn(|| *cached.get().unwrap());
        await_value(&begun, 2);
        cached.invalidate();
        let waiter = scope.spawn(|| *cached.get().unwrap());
        open.send(()).unwrap();
        open.send(()).unwrap();
        assert_eq!((leader.join().unwrap(), waiter.join().unwrap()), (2, 3));
    });
    assert_eq!((*cached.get().unwrap(), cached.counters().reloads), (3, 3));
}

#[test]
fn a_view_is_of_the_value_that_is_in_place() {
    #[derive(Debug)]
    struct Settings {
        routes: Vec<String>,
        greeting: String,
    }
    let table = anonymous();
    let loads = AtomicU64::new(0);
    let cached = Arc::new(Cached::new(sync(&table), move || {
        let load = loads.fetch_add(1, SeqCst) + 1;
        Ok::<_, io::Error>(Settings { routes: vec![format!("/{load}")], greeting: format!("hello {load}") })
    }));
    let (routes, owned) =
        (cached.map(|all| &all.routes[..]), CachedProjection::new(Arc::clone(&cached), |all| &*all.greeting));
    assert!(routes.get_if_fresh().is_none());
    let old: Part<Settings, [String], _> = routes.get().unwrap();
    assert_eq!((&old[..], &*owned.get().unwrap()), (&["/1".to_owned()][..], "hello 1"));
    cached.mark_updated().unwrap();
    assert!(routes.get_if_fresh().is_none());
    assert_eq!((&*routes.get_stale_ok().unwrap(), &*old.clone()), (&["/2".to_owned()][..], &["/1".to_owned()][..]));
    assert_eq!(&*owned.get_fresh(Instant::now()).unwrap(), "hello 2");
    assert_eq!(Part::whole(&old).greeting, "hello 1");
    assert_eq!((routes.cached().counters().reloads, format!("{old:?}")), (2, r#"["/1"]"#.to_owned()));
}

#[test]
fn a_value_may_have_no_size_of_its_own() {
    let table = anonymous();
    let greeting = Cached::<str>::new_shared(sync(&table), || Ok::<_, io::Error>("hello".to_owned()));
    let snapshot: Snapshot<str> = greeting.snapshot().unwrap();
    assert_eq!((&*greeting.get().unwrap(), &*snapshot.clone().value), ("hello", "hello"));
    assert_eq!(CachedReader::new(&greeting).get().unwrap(), "hello");
    assert_eq!(&*greeting.map(|text| &text[..1]).get().unwrap(), "h");
    let display = Cached::<dyn std::fmt::Display + Send + Sync>::builder_shared(sync(&table), || {
        Ok::<Arc<dyn std::fmt::Display + Send + Sync>, io::Error>(Arc::new(7))
    })
    .on_reload(|old, new| assert_eq!(old.to_string(), new.to_string()))
    .build()
    .unwrap();
    assert_eq!(display.get().unwrap().to_string(), "7");
    // A loader may give what it gave before: that is no other value than the known one.
    let shared: Arc<[u8]> = Arc::new([1, 2]);
    let again = shared.clone();
    let same = Cached::<[u8]>::new_shared(sync(&table), move || Ok::<_, io::Error>(again.clone()));
    assert!(Arc::ptr_eq(&same.get().unwrap(), &shared));
}

#[test]
fn a_value_goes_through_a_caught_panic() {
    fn check<T: UnwindSafe + RefUnwindSafe>() {}
    check::<Cached<Vec<u64>>>();
    check::<Cached<str>>();
    check::<Snapshot<u64>>();
    check::<Peek<u64>>();
    check::<CachedReader<u64, Arc<Cached<u64>>>>();
    check::<GenerationSynchronizer>();
    check::<gensync::Table>();
    check::<gensync::Ticket>();
}

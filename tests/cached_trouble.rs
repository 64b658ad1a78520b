//! Guards against loaders, callbacks and values of the user's that misbehave: they must not hang others, loop, or be hung.

mod support;

use std::error::Error as _;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Barrier, Mutex, OnceLock, Weak, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use gensync::{Cached, ErrorKind, GenerationSynchronizer};
use support::source::*;
use support::{alone, await_value, in_child};

#[test]
fn a_loader_that_marks_a_key_of_its_value_is_reported_and_does_not_loop() {
    let table = anonymous();
    let dependency = GenerationSynchronizer::new(&table, "other").unwrap();
    for marker in [sync(&table), dependency.clone()] {
        let (_, loads, loader) = source();
        let reports = Arc::new(Mutex::new(Vec::new()));
        let report = reports.clone();
        let cached = Cached::builder(sync(&table), move || {
            marker.mark_updated().unwrap();
            loader()
        })
        .depends_on(&dependency)
        .on_error(move |error| report.lock().unwrap().push(error.kind().clone()))
        .build()
        .unwrap();
        for calls in 1..=20 {
            assert_eq!(*cached.get().unwrap(), 1);
            assert_eq!(loads.load(SeqCst), calls, "one load for each call");
        }
        let reports = reports.lock().unwrap();
        assert!(matches!(reports[..], [ErrorKind::Overtaken { loads: 8, .. }, ErrorKind::Overtaken { loads: 16, .. }]));
        assert_eq!(cached.counters().overtaken, 20);
    }
}

#[test]
fn a_loader_that_asks_for_its_own_value_gets_an_error() {
    let table = anonymous();
    let cached = Arc::new_cyclic(|itself: &Weak<Cached<u64>>| {
        let itself = itself.clone();
        Cached::new(sync(&table), move || itself.upgrade().unwrap().get().map(|value| *value))
    });
    let error = cached.get().unwrap_err();
    let cause = error.source().unwrap().downcast_ref::<gensync::Error>().unwrap();
    assert_eq!(*cause.kind(), ErrorKind::Recursion);
}

#[test]
fn a_callback_that_asks_for_the_value_gets_what_is_in_place() {
    let table = anonymous();
    let (loads, depth) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let answers = Arc::new(Mutex::new(Vec::new()));
    let cached = Arc::new_cyclic(|itself: &Weak<Cached<u64>>| {
        let (marker, count) = (sync(&table), loads.clone());
        let ask = {
            let (itself, depth, answers) = (itself.clone(), depth.clone(), answers.clone());
            move || {
                assert!(depth.fetch_add(1, SeqCst) < 3, "it goes on and on");
                let answer = itself.upgrade().unwrap().get();
                answers
                    .lock()
                    .unwrap()
                    .push(answer.map(|value| *value).map_err(|error| error.source().unwrap().to_string()));
                depth.fetch_sub(1, SeqCst);
            }
        };
        let ask_again = ask.clone();
        Cached::builder(sync(&table), move || {
            // Expires the value even as it is loaded.
            marker.mark_updated().unwrap();
            match count.fetch_add(1, SeqCst) + 1 {
                1 => Err(io::Error::other("the first one")),
                load => Ok(load),
            }
        })
        .on_error(move |_| ask())
        .on_reload(move |_, _| ask_again())
        .build()
        .unwrap()
    });
    assert!(cached.get().is_err());
    for load in 2..5 {
        assert_eq!(*cached.get().unwrap(), load);
    }
    assert_eq!(*answers.lock().unwrap(), [Err("the first one".to_owned()), Ok(3), Ok(4)]);
    assert_eq!((loads.load(SeqCst), cached.counters().stale_answers), (4, 2));
}

#[test]
fn callbacks_come_one_at_a_time_and_in_the_order_of_the_loads() {
    let table = anonymous();
    let (loads, last, inside) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let cached = Cached::builder(sync(&table), move || Ok::<_, io::Error>(loads.fetch_add(1, SeqCst)))
        .on_reload(move |old, new| {
            assert_eq!(inside.fetch_add(1, SeqCst), 0, "two at a time");
            assert_eq!(last.swap(*new, SeqCst), *old, "out of order");
            thread::yield_now();
            inside.fetch_sub(1, SeqCst);
        })
        .build()
        .unwrap();
    cached.get().unwrap();
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let marker = sync(&table);
                for _ in 0..1000 {
                    marker.mark_updated().unwrap();
                    cached.get().unwrap();
                }
            });
        }
    });
}

#[test]
fn a_waiter_for_a_load_does_not_wait_for_its_callbacks() {
    let table = anonymous();
    let begun = Arc::default();
    let (open, loader) = gated(&begun);
    let (answer, answered) = mpsc::channel();
    let answered = Mutex::new(answered);
    let cached = Cached::builder(sync(&table), loader)
        .on_reload(move |_, _| answered.lock().unwrap().recv_timeout(Duration::from_secs(10)).unwrap())
        .build()
        .unwrap();
    cached.get().unwrap();
    sync(&table).mark_updated().unwrap();
    thread::scope(|scope| {
        let leader = scope.spawn(|| *cached.get().unwrap());
        await_value(&begun, 2);
        let waiter = scope.spawn(|| {
            let value = *cached.get().unwrap();
            answer.send(()).unwrap();
            value
        });
        open.send(()).unwrap();
        assert_eq!((leader.join().unwrap(), waiter.join().unwrap()), (2, 2));
    });
}

#[test]
fn a_callback_that_panics_lets_the_next_thread_load() {
    let table = anonymous();
    let (source, _, loader) = source();
    let cached = Cached::builder(sync(&table), loader)
        .on_reload(|_, new| assert_ne!(*new, 2, "in the callback"))
        .build()
        .unwrap();
    cached.get().unwrap();
    cached.update(|| change(&source, 2)).unwrap();
    assert!(catch_unwind(AssertUnwindSafe(|| cached.get())).is_err());
    assert_eq!(*cached.get().unwrap(), 2, "the load itself went well");
    cached.update(|| change(&source, 3)).unwrap();
    thread::scope(|scope| assert_eq!(scope.spawn(|| *cached.get().unwrap()).join().unwrap(), 3));
}

/// Needs another thread's `get` to be dropped, once.
struct Demanding {
    number: u64,
    armed: Arc<AtomicU64>,
    itself: Weak<Cached<Demanding>>,
}

impl Drop for Demanding {
    fn drop(&mut self) {
        if self.armed.compare_exchange(self.number, 0, SeqCst, SeqCst).is_ok() {
            assert!(others_can_get(self.itself.upgrade().unwrap()), "dropped under a lock");
        }
    }
}

#[test]
fn an_old_value_is_dropped_where_it_hinders_nobody() {
    const THREADS: u64 = 4;
    let table = anonymous();
    let (armed, callers) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let cached = Arc::new_cyclic(|itself: &Weak<Cached<Demanding>>| {
        let (loads, itself, armed, callers) = (AtomicU64::new(0), itself.clone(), armed.clone(), callers.clone());
        Cached::new(sync(&table), move || {
            if armed.load(SeqCst) > 0 {
                // Now one of the others is likely to have the last reference to the old value.
                await_value(&callers, THREADS);
                thread::sleep(Duration::from_millis(2));
            }
            let number = loads.fetch_add(1, SeqCst) + 1;
            Ok::<_, io::Error>(Demanding { number, armed: armed.clone(), itself: itself.clone() })
        })
    });
    for _ in 0..10 {
        let present = cached.get().unwrap().number;
        callers.store(0, SeqCst);
        armed.store(present, SeqCst);
        cached.synchronizer().mark_updated().unwrap();
        thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    callers.fetch_add(1, SeqCst);
                    cached.get().unwrap();
                });
            }
        });
        assert_eq!(armed.load(SeqCst), 0, "the old value is not dropped");
    }
}

/// Needs another thread's `get` to be shown, or dropped.
#[derive(Debug)]
struct DemandingError {
    armed: Arc<AtomicU64>,
    itself: Weak<Cached<u64>>,
}

impl DemandingError {
    fn demand(&self) {
        if self.armed.swap(0, SeqCst) == 1 {
            assert!(others_can_get(self.itself.upgrade().unwrap()), "used under a lock");
        }
    }
}

impl fmt::Display for DemandingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.demand();
        f.write_str("demanding")
    }
}

impl Drop for DemandingError {
    fn drop(&mut self) {
        self.demand();
    }
}

impl std::error::Error for DemandingError {}

#[test]
fn an_error_is_shown_and_dropped_where_it_hinders_nobody() {
    let table = anonymous();
    for pause in [Duration::ZERO, HOUR] {
        let (armed, broken) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(1)));
        let cached = Arc::new_cyclic(|itself: &Weak<Cached<u64>>| {
            let (itself, armed, broken) = (itself.clone(), armed.clone(), broken.clone());
            let loader = move || match broken.load(SeqCst) {
                0 => Ok(1),
                _ => Err(DemandingError { armed: armed.clone(), itself: itself.clone() }),
            };
            Cached::builder(sync(&table), loader).fail_safe(HOUR).retry_pause(pause).build().unwrap()
        });
        assert!(cached.get().is_err());
        if pause.is_zero() {
            broken.store(0, SeqCst);
        }
        armed.store(1, SeqCst);
        assert_eq!(cached.get().is_ok(), pause.is_zero());
        assert_eq!(armed.load(SeqCst), 0, "neither shown nor dropped");
    }
}

#[test]
fn a_loader_that_panics_lets_the_next_thread_load() {
    let table = anonymous();
    let begun = Arc::new(AtomicU64::new(0));
    let cached = Cached::new(sync(&table), {
        let begun = begun.clone();
        move || match begun.fetch_add(1, SeqCst) {
            0 => panic!("in the loader"),
            load => Ok::<_, io::Error>(load),
        }
    });
    thread::scope(|scope| {
        let threads: Vec<_> =
            (0..4).map(|_| scope.spawn(|| catch_unwind(AssertUnwindSafe(|| *cached.get().unwrap())))).collect();
        let results: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert_eq!(results.iter().filter(|result| result.is_err()).count(), 1);
        assert!(results.iter().flatten().all(|value| *value == 1));
    });
}

#[test]
fn a_forked_child_goes_its_own_way_whatever_the_parents_threads_were_doing() {
    alone(|| {
        let table = anonymous();
        let begun = Arc::default();
        let (open, loader) = gated(&begun);
        let parent = std::process::id();
        let cached = Cached::new(sync(&table), move || if std::process::id() == parent { loader() } else { Ok(100) });
        cached.get().unwrap();
        // A child has the value that its parent had.
        in_child(|| assert_eq!(*cached.get().unwrap(), 1)).succeeds();
        sync(&table).mark_updated().unwrap();
        let started = &AtomicU64::new(0);
        thread::scope(|scope| {
            let leader = scope.spawn(|| *cached.get().unwrap());
            await_value(&begun, 2);
            let wait = || {
                started.fetch_add(1, SeqCst);
                *cached.get().unwrap()
            };
            let waiters: Vec<_> = (0..4).map(|_| scope.spawn(wait)).collect();
            await_value(started, 4);
            for _ in 0..50 {
                // In the parent, the load goes on.
                in_child(|| {
                    assert_eq!(*cached.get().unwrap(), 100);
                    sync(&table).clear().unwrap();
                    let values: Vec<_> = thread::scope(|scope| {
                        (0..2)
                            .map(|_| scope.spawn(|| *cached.get().unwrap()))
                            .collect::<Vec<_>>()
                            .into_iter()
                            .map(|thread| thread.join().unwrap())
                            .collect()
                    });
                    assert_eq!(values, [100, 100]);
                })
                .succeeds();
            }
            // Its updates have overtaken the load, so the waiters that came after it began need another one.
            open.send(()).unwrap();
            open.send(()).unwrap();
            assert_eq!(leader.join().unwrap(), 2);
            assert!(waiters.into_iter().all(|thread| (2..=3).contains(&thread.join().unwrap())));
        });
    });
}

#[test]
#[expect(unsafe_code, reason = "forks in the loader")]
fn a_loader_that_forks_returns_in_both() {
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, Pid, fork};
    let table = anonymous();
    let parent = std::process::id();
    let (reports, marker) = (Arc::new(AtomicU64::new(0)), sync(&table));
    let count = reports.clone();
    let cached = Cached::builder(sync(&table), move || {
        // SAFETY: the child takes no lock that another thread of the parent may hold at the fork.
        let child = match unsafe { fork() }? {
            ForkResult::Parent { child } => child.as_raw(),
            ForkResult::Child => {
                marker.mark_updated().unwrap();
                0
            }
        };
        Ok::<_, nix::Error>(child)
    })
    .on_error(move |_| _ = count.fetch_add(1, SeqCst))
    .build()
    .unwrap();
    let child = *cached.get().unwrap();
    if std::process::id() != parent {
        let again = sync(&table).clear().is_ok() && cached.synchronizer().table().path().is_none();
        let is_reported = reports.load(SeqCst) > 0;
        // SAFETY: ends the process.
        unsafe { nix::libc::_exit(if child == 0 && again && !is_reported { 7 } else { 1 }) }
    }
    assert!(matches!(waitpid(Pid::from_raw(child), None).unwrap(), WaitStatus::Exited(_, 7)));
    assert_eq!(cached.counters().reloads, 1);
}

/// The error, and what caused it, down to the first cause.
fn causes(error: &gensync::Error) -> Vec<&(dyn std::error::Error + 'static)> {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    let mut causes = Vec::new();
    while let Some(cause) = next {
        causes.push(cause);
        next = cause.source();
    }
    causes
}

fn is_recursion(error: &gensync::Error) -> bool {
    let errors = causes(error).into_iter().filter_map(|cause| cause.downcast_ref::<gensync::Error>());
    errors.into_iter().any(|error| *error.kind() == ErrorKind::Recursion)
}

type Values = Arc<OnceLock<Vec<Cached<u64>>>>;

/// Values in a ring: the loader of each asks for the next value, and the last one's for the first. The first loads all begin before
/// one of them asks.
fn circle(length: usize) -> Values {
    let table = anonymous();
    let (values, barrier) = (Values::default(), Arc::new(Barrier::new(length)));
    let value = |i: usize| {
        let (next, barrier, loads) = (Arc::downgrade(&values), barrier.clone(), AtomicU64::new(0));
        let sync = GenerationSynchronizer::new(&table, format!("key-{i}")).unwrap();
        Cached::new(sync, move || {
            if loads.fetch_add(1, SeqCst) == 0 {
                barrier.wait();
            }
            let values = next.upgrade().unwrap();
            values.get().unwrap()[(i + 1) % length].get().map(|value| *value)
        })
    };
    assert!(values.set((0..length).map(value).collect()).is_ok());
    values
}

/// Each value is asked for in a thread of its own; gives their errors, or fails if one hangs.
fn errors_of(values: &Values, spawn: impl Fn(Box<dyn FnOnce() + Send>)) -> Vec<gensync::Error> {
    let length = values.get().unwrap().len();
    let (answer, answered) = mpsc::channel();
    for i in 0..length {
        let (values, answer) = (values.clone(), answer.clone());
        spawn(Box::new(move || answer.send(values.get().unwrap()[i].get().unwrap_err()).unwrap()));
    }
    (0..length).map(|_| answered.recv_timeout(support::LIMIT).expect("a thread hangs")).collect()
}

#[test]
fn loaders_that_ask_for_each_others_values_in_several_threads_get_an_error() {
    for length in [2, 3, 7] {
        let errors = errors_of(&circle(length), |work| _ = thread::spawn(work));
        assert!(errors.iter().all(is_recursion), "{errors:?}");
        let mut texts = errors.iter().flat_map(causes).map(ToString::to_string);
        let circle = texts.find(|text| text.contains("wait for each other")).unwrap();
        assert!((0..length).all(|i| circle.contains(&format!("\"key-{i}\" for"))), "{circle}");
    }
}

#[test]
fn loaders_that_ask_for_each_others_values_in_one_thread_get_an_error() {
    let values = circle(1);
    assert!(is_recursion(&values.get().unwrap()[0].get().unwrap_err()));
}

#[test]
fn loads_in_tasks_that_wait_for_each_other_get_an_error() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let errors = errors_of(&circle(2), |work| _ = runtime.spawn_blocking(work));
    assert!(errors.iter().all(is_recursion), "{errors:?}");
}

#[test]
fn a_forked_child_finds_its_own_circles_whatever_the_parents_threads_wait_for() {
    alone(|| {
        let table = anonymous();
        let begun = Arc::default();
        let (open, loader) = gated(&begun);
        let cached = Cached::new(sync(&table), loader);
        cached.get().unwrap();
        sync(&table).mark_updated().unwrap();
        let (started, stop) = (AtomicU64::new(0), AtomicU64::new(0));
        thread::scope(|scope| {
            let leader = scope.spawn(|| cached.get().unwrap());
            await_value(&begun, 2);
            // These go on and off the list all the time.
            let waiters = [(); 2].map(|()| {
                scope.spawn(|| {
                    started.fetch_add(1, SeqCst);
                    while stop.load(SeqCst) == 0 {
                        let _ = cached.get_fresh(Instant::now() + Duration::from_micros(50));
                    }
                })
            });
            await_value(&started, 2);
            for _ in 0..30 {
                in_child(|| {
                    let errors = errors_of(&circle(2), |work| _ = thread::spawn(work));
                    assert!(errors.iter().all(is_recursion));
                })
                .succeeds();
            }
            stop.store(1, SeqCst);
            waiters.into_iter().for_each(|waiter| waiter.join().unwrap());
            open.send(()).unwrap();
            leader.join().unwrap();
        });
    });
}

#[test]
fn loads_that_wait_for_each_other_in_no_circle_get_no_error() {
    const VALUES: usize = 4;
    let table = anonymous();
    let values = Values::default();
    let value = |i: usize| {
        let lower = Arc::downgrade(&values);
        let ask = move || -> Result<u64, gensync::Error> {
            let values = lower.upgrade().unwrap();
            (0..i).try_fold(1, |sum, j| Ok(sum + *values.get().unwrap()[j].get()?))
        };
        let ask_again = ask.clone();
        let sync = GenerationSynchronizer::new(&table, format!("key-{i}")).unwrap();
        Cached::builder(sync, ask).on_reload(move |_, _| _ = ask_again().unwrap()).build().unwrap()
    };
    assert!(values.set((0..VALUES).map(value).collect()).is_ok());
    let values = values.get().unwrap();
    thread::scope(|scope| {
        for thread in 0..VALUES {
            scope.spawn(move || {
                for round in 0..2000 {
                    values[(thread + round) % VALUES].mark_updated().unwrap();
                    let i = (thread * 3 + round / 2) % VALUES;
                    assert_eq!(*values[i].get().unwrap(), 1 << i);
                }
            });
        }
    });
}

#[test]
fn a_thread_that_a_loader_starts_and_waits_for_ends_at_its_deadline() {
    let table = anonymous();
    let cached = Arc::new_cyclic(|itself: &Weak<Cached<u64>>| {
        let itself = itself.clone();
        Cached::new(sync(&table), move || {
            let itself = itself.upgrade().unwrap();
            let soon = Instant::now() + Duration::from_millis(5);
            thread::spawn(move || itself.get_fresh(soon)).join().unwrap().map(|value| *value)
        })
    });
    let error = cached.get().unwrap_err();
    let cause = error.source().unwrap().downcast_ref::<gensync::Error>().unwrap();
    assert_eq!(*cause.kind(), ErrorKind::Deadline);
}

#[test]
fn a_load_that_lasts_longer_than_an_old_value_may_be_served_counts_as_failed() {
    let table = anonymous();
    let is_overdue = |error: gensync::Error| matches!(error.kind(), ErrorKind::Overdue { .. });
    for stale_while_reloading in [true, false] {
        let begun = Arc::default();
        let (open, loader) = gated(&begun);
        let builder = Cached::builder(sync(&table), loader)
            .fail_safe(Duration::from_millis(200))
            .max_age(Duration::from_millis(20));
        let builder = if stale_while_reloading { builder.stale_while_reloading() } else { builder };
        let cached = builder.build().unwrap();
        cached.get().unwrap();
        thread::sleep(Duration::from_millis(40));
        thread::scope(|scope| {
            let start = Instant::now();
            let leader = scope.spawn(|| *cached.get().unwrap());
            await_value(&begun, 2);
            // The gate is closed all the time.
            let error = loop {
                match cached.get() {
                    Ok(value) => assert!(stale_while_reloading && *value == 1, "there is no other one"),
                    Err(error) => break error,
                }
                assert!(start.elapsed() < support::LIMIT, "stale without bound");
            };
            assert!(is_overdue(error));
            assert!(start.elapsed() > Duration::from_millis(100), "not allowed to be stale");
            assert!(is_overdue(cached.get().unwrap_err()) && is_overdue(cached.get_stale_ok().unwrap_err()));
            assert_eq!(cached.counters().errors, 1, "one load, however many find it");
            // These have a limit of their own.
            let soon = Instant::now() + Duration::from_millis(5);
            assert_eq!(*cached.get_fresh(soon).unwrap_err().kind(), ErrorKind::Deadline);
            let patient = scope.spawn(|| *cached.get_fresh(Instant::now() + HOUR).unwrap());
            open.send(()).unwrap();
            // In case the patient one came too late.
            let _ = open.send(());
            assert_eq!(leader.join().unwrap(), 2);
            assert!(patient.join().unwrap() >= 2);
        });
        assert_eq!(cached.counters().errors, 1);
    }
}

#[test]
fn a_load_that_hangs_and_fails_in_the_end_is_counted_once() {
    let table = anonymous();
    let begun = Arc::default();
    let (open, loader) = gated(&begun);
    let cached = Cached::builder(sync(&table), loader).fail_safe(Duration::from_millis(50)).build().unwrap();
    cached.get().unwrap();
    cached.mark_updated().unwrap();
    thread::scope(|scope| {
        let leader = scope.spawn(|| cached.get());
        await_value(&begun, 2);
        assert!(matches!(cached.get().unwrap_err().kind(), ErrorKind::Overdue { .. }));
        drop(open);
        let error = leader.join().unwrap().unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Load { .. }), "an old value was served for too long");
    });
    assert_eq!(cached.counters().errors, 1);
}

#[test]
fn a_first_load_may_last_as_long_as_it_does() {
    let table = anonymous();
    let (open, gate) = mpsc::channel::<()>();
    let (gate, begun) = (Mutex::new(gate), Arc::new(AtomicU64::new(0)));
    let cached = Cached::builder(sync(&table), {
        let begun = begun.clone();
        move || {
            begun.fetch_add(1, SeqCst);
            gate.lock().unwrap().recv()?;
            Ok::<_, mpsc::RecvError>(1)
        }
    })
    .fail_safe(Duration::from_millis(1))
    .build()
    .unwrap();
    thread::scope(|scope| {
        let leader = scope.spawn(|| *cached.get().unwrap());
        await_value(&begun, 1);
        let waiter = scope.spawn(|| *cached.get().unwrap());
        thread::sleep(Duration::from_millis(30));
        open.send(()).unwrap();
        assert_eq!((leader.join().unwrap(), waiter.join().unwrap()), (1, 1));
    });
    assert_eq!(cached.counters().errors, 0);
}

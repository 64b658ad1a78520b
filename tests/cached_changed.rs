//! Guards against tasks and event loops that sleep through the end of a value, by whatever it ends, or that spin when it cannot
//! be loaded.

mod support;

use std::os::fd::AsFd as _;
#[cfg(feature = "async")]
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;
#[cfg(feature = "async")]
use std::time::Instant;

use gensync::{Cached, GenerationSynchronizer, Pollable};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use support::in_child;
use support::source::*;

const NOT_YET: Duration = Duration::from_millis(30);

fn is_readable(pollable: &Pollable, patience: Duration) -> bool {
    let timeout = PollTimeout::try_from(patience).unwrap();
    poll(&mut [PollFd::new(pollable.as_fd(), PollFlags::POLLIN)], timeout).unwrap() > 0
}

/// Whether the descriptor becomes readable; reading it makes it unreadable again.
fn reports_change(pollable: &Pollable) -> bool {
    is_readable(pollable, support::LIMIT) && pollable.acknowledge() && !is_readable(pollable, Duration::ZERO)
}

fn is_silent(pollable: &Pollable) -> bool {
    !is_readable(pollable, NOT_YET)
}

#[test]
fn a_descriptor_reports_each_key_in_all_processes() {
    let table = anonymous();
    let other = GenerationSynchronizer::new(&table, "other").unwrap();
    let elsewhere = sync(&anonymous());
    let (_, _, loader) = source();
    let cached = Cached::builder(sync(&table), loader).depends_on(&other).depends_on(&elsewhere).build().unwrap();
    let pollable = cached.pollable().unwrap();
    assert!(reports_change(&pollable), "there is no value");
    cached.get().unwrap();
    assert!(is_silent(&pollable));
    for _ in 0..3 {
        for key in [&other, &elsewhere, &sync(&table), cached.synchronizer()] {
            in_child(|| _ = key.mark_updated().unwrap()).succeeds();
            assert!(reports_change(&pollable));
            cached.get().unwrap();
            assert!(is_silent(&pollable));
        }
        for mark in [&|| cached.mark_updated().map(drop), &|| cached.clear(), &|| cached.synchronizer().clear()]
            as [&dyn Fn() -> Result<(), gensync::Error>; 3]
        {
            mark().unwrap();
            assert!(reports_change(&pollable), "this process must load as well");
            cached.get().unwrap();
        }
    }
    cached.begin_update().unwrap().finish().unwrap();
    assert!(is_readable(&cached.pollable().unwrap(), support::LIMIT), "expired before it was made");
    assert!(reports_change(&pollable));
    cached.get().unwrap();
    cached.invalidate();
    assert!(reports_change(&pollable));
    assert!(is_readable(&cached.pollable().unwrap(), support::LIMIT));
}

#[test]
fn a_descriptor_reports_each_age() {
    let table = anonymous();
    let (_, _, loader) = source();
    let cached = Cached::builder(sync(&table), loader).max_age(Duration::from_millis(100)).build().unwrap();
    cached.get().unwrap();
    let pollable = cached.pollable().unwrap();
    for _ in 0..3 {
        assert!(is_readable(&pollable, support::LIMIT), "older than its age");
        assert!(!cached.peek().is_fresh(), "reported too early");
        pollable.acknowledge();
        assert!(is_silent(&pollable));
        cached.get().unwrap();
    }
    std::thread::sleep(Duration::from_millis(150));
    assert!(is_readable(&cached.pollable().unwrap(), support::LIMIT), "too old before it was made");
}

#[cfg(feature = "async")]
mod tasks {
    use super::*;
    use std::sync::Arc;
    use support::LIMIT;

    /// Unlike tokio's, it does not poll `future` once more when the time is up, by which a future that nothing wakes would be ready.
    async fn timeout<F: Future>(limit: Duration, future: F) -> Result<F::Output, ()> {
        tokio::select! {
            biased;
            () = tokio::time::sleep(limit) => Err(()),
            output = future => Ok(output),
        }
    }

    fn run(work: impl Future<Output = ()>) {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(work);
    }

    #[test]
    fn a_task_is_ready_when_the_value_has_ended_and_not_before() {
        let table = anonymous();
        let other = GenerationSynchronizer::new(&table, "other").unwrap();
        let (_, loads, loader) = source();
        let cached = Cached::builder(sync(&table), loader).depends_on(&other).build().unwrap();
        run(async {
            timeout(LIMIT, cached.changed()).await.unwrap().unwrap();
            assert_eq!(loads.load(SeqCst), 0, "it does not load");
            for _ in 0..5 {
                for key in [&other, &sync(&table), cached.synchronizer()] {
                    cached.get().unwrap();
                    assert!(timeout(NOT_YET, cached.changed()).await.is_err());
                    let waits = cached.changed();
                    in_child(|| _ = key.mark_updated().unwrap()).succeeds();
                    timeout(LIMIT, waits).await.unwrap().unwrap();
                    // Level-triggered, until it is loaded.
                    timeout(LIMIT, cached.changed()).await.unwrap().unwrap();
                }
                cached.get().unwrap();
                cached.synchronizer().mark_updated().unwrap();
                timeout(LIMIT, cached.changed()).await.expect("this process must load as well").unwrap();
            }
        });
    }

    #[test]
    fn a_task_that_waits_is_woken_by_a_key_and_by_age() {
        let table = anonymous();
        let (_, _, loader) = source();
        let cached = Cached::builder(sync(&table), loader).max_age(Duration::from_millis(60)).build().unwrap();
        run(async {
            for _ in 0..5 {
                cached.get().unwrap();
                let (_, reloads) =
                    tokio::join!(async { timeout(LIMIT, cached.changed()).await.unwrap().unwrap() }, async {
                        cached.counters().reloads
                    });
                assert!(!cached.peek().is_fresh(), "reported too early");
                assert_eq!(cached.counters().reloads, reloads);
            }
            cached.get().unwrap();
            let (waited, ()) = tokio::join!(timeout(LIMIT, cached.changed()), async {
                tokio::task::yield_now().await;
                sync(&table).mark_updated().unwrap();
            });
            waited.unwrap().unwrap();
        });
    }

    #[test]
    fn a_task_notices_that_others_have_replaced_the_value() {
        let table = anonymous();
        let (_, _, loader) = source();
        let cached = Cached::new(sync(&table), loader);
        cached.get().unwrap();
        run(async {
            let (one, two) = (cached.changed(), cached.changed());
            cached.mark_updated().unwrap();
            timeout(LIMIT, one).await.unwrap().unwrap();
            cached.get().unwrap();
            timeout(LIMIT, two).await.expect("sleeps through a change").unwrap();
        });
    }

    #[test]
    fn a_task_that_waits_notices_an_invalidation() {
        let table = anonymous();
        let (source, _, loader) = source();
        let cached = Cached::builder(sync(&table), loader).retry_pause(HOUR).build().unwrap();
        cached.get().unwrap();
        let notices = || {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    // The others wait by now.
                    std::thread::sleep(NOT_YET);
                    cached.invalidate();
                });
                run(async {
                    let waits = || timeout(Duration::from_secs(5), cached.changed());
                    let (one, two) = tokio::join!(waits(), waits());
                    one.and(two).expect("sleeps through it").unwrap();
                });
            });
        };
        notices();
        // In the pause after a load that failed, too.
        set(&source, Err("down"));
        assert!(cached.get().is_err());
        run(async { assert!(timeout(NOT_YET, cached.changed()).await.is_err()) });
        notices();
        // And between the look and the registration.
        set(&source, Ok(1));
        let (ready, is_ready) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let cached = &cached;
            scope.spawn(move || is_ready.iter().for_each(|()| cached.invalidate()));
            run(async move {
                for _ in 0..500 {
                    cached.get().unwrap();
                    ready.send(()).unwrap();
                    timeout(LIMIT, cached.changed()).await.expect("sleeps through it").unwrap();
                }
            });
        });
    }

    #[test]
    fn a_loop_whose_loads_fail_goes_slowly_and_lets_other_tasks_run() {
        let table = anonymous();
        let (source, loads, loader) = source();
        let cached = Cached::builder(sync(&table), loader).retry_pause(Duration::from_millis(100)).build().unwrap();
        cached.get().unwrap();
        set(&source, Err("down"));
        cached.mark_updated().unwrap();
        let failing = async || {
            loop {
                cached.changed().await.unwrap();
                if cached.get().is_ok() {
                    return;
                }
            }
        };
        run(async {
            assert!(timeout(Duration::from_millis(350), failing()).await.is_err(), "no other task has run");
            assert!((2..=5).contains(&loads.load(SeqCst)), "{loads:?}");
            set(&source, Ok(2));
            timeout(LIMIT, failing()).await.unwrap();
        });
    }

    #[test]
    fn a_loop_that_does_not_load_goes_slowly_and_lets_other_tasks_run() {
        let table = anonymous();
        let (_, _, loader) = source();
        let cached = Cached::new(sync(&table), loader);
        for is_loaded in [false, true] {
            if is_loaded {
                cached.get().unwrap();
                cached.mark_updated().unwrap();
            }
            let mut reports = 0;
            run(async {
                let looping = async {
                    loop {
                        cached.changed().await.unwrap();
                        reports += 1;
                    }
                };
                let _: Result<(), _> = timeout(Duration::from_millis(300), looping).await;
            });
            assert!((1..=6).contains(&reports), "{reports}");
        }
    }

    #[test]
    fn a_loop_that_is_always_behind_lets_other_tasks_run() {
        let table = anonymous();
        let (_, _, loader) = source();
        let cached = Cached::new(sync(&table), loader);
        run(async {
            let start = Instant::now();
            let looping = async {
                loop {
                    cached.changed().await.unwrap();
                    cached.get().unwrap();
                    cached.mark_updated().unwrap();
                    assert!(start.elapsed() < LIMIT, "no other task has run");
                }
            };
            let _: Result<(), _> = timeout(NOT_YET, looping).await;
        });
    }

    #[test]
    fn a_future_that_a_fork_inherits_works_in_the_child() {
        let table = anonymous();
        let (_, _, loader) = source();
        let cached = Arc::new(Cached::new(sync(&table), loader));
        cached.get().unwrap();
        in_child(|| {
            let mut changed = Some(Box::pin(cached.changed()));
            run(async { assert!(timeout(NOT_YET, changed.as_mut().unwrap()).await.is_err()) });
            in_child(|| {
                let mut changed = changed.take().unwrap();
                run(async {
                    assert!(timeout(NOT_YET, &mut changed).await.is_err());
                    sync(&table).mark_updated().unwrap();
                    timeout(LIMIT, changed).await.unwrap().unwrap();
                });
            })
            .succeeds();
            run(async { timeout(LIMIT, changed.unwrap()).await.unwrap().unwrap() });
        })
        .succeeds();
    }
}

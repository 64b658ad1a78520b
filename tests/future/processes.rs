//! Forks in the middle of what tasks do: the child goes its own way, with a runtime of its own.
//!
//! The timers of smol work in no forked child, as a thread drives them that the child does not have.

use nix::sys::wait::{WaitStatus, waitpid};
use support::fork_here;

use super::*;

/// Runs `child` in a fork of this process, which must be a child of the harness itself.
fn forked(child: impl FnOnce()) {
    match fork_here() {
        Some(pid) => assert!(matches!(waitpid(pid, None).unwrap(), WaitStatus::Exited(_, 0)), "the child failed"),
        None => {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
            std::process::exit(i32::from(result.is_err()));
        }
    }
}

#[test]
fn a_child_that_is_forked_in_the_middle_of_a_load_loads_for_itself() {
    let (_folder, path) = path();
    for table in [anonymous(), Table::open(&path).unwrap()] {
        in_child(|| {
            let source = Source::with_permits(0);
            let cached = source.cached(&table);
            let mut leader = Polled::new(cached.get());
            let mut waiters: Vec<_> = (0..3).map(|_| Polled::new(cached.get())).collect();
            let mut waits: Vec<_> = (0..2).map(|_| Polled::new(cached.wait())).collect();
            assert!(leader.poll().is_pending());
            for _ in 0..2 {
                assert!(waiters.iter_mut().all(|waiter| waiter.poll().is_pending()));
                assert!(waits.iter_mut().all(|wait| wait.poll().is_pending()));
            }
            // What the child polls on, drops, and leaves alone.
            let (mut waiting, mut waiting_for_next) = (waiters.pop(), waits.pop());
            forked(|| {
                // One for the parent's load, which is first in the queue in the child's memory as well.
                source.permit(2);
                let mut own = Polled::new(waiting.take().unwrap().future);
                // The load that it waited for is the parent's.
                assert!(matches!(own.poll(), Poll::Ready(Ok(value)) if *value == 1));
                assert_eq!(source.begun(), 2);
                assert_eq!(*smol::future::block_on(cached.get()).unwrap(), 1);
                drop(waiters.pop());
                drop(waits.pop());
                assert_eq!(*run(waiting_for_next.take().unwrap().future).unwrap(), 1);
                cached.mark_updated().unwrap();
                source.permit(1);
                assert_eq!(*run(cached.get()).unwrap(), 1);
                assert_eq!(source.begun(), 3);
            });
            source.permit(1);
            assert_eq!(*leader.finish().unwrap(), 1);
            // The child has marked the key updated since that load began, so there is another one.
            source.permit(1);
            for waiter in waiters.into_iter().chain(waiting).chain(waits).chain(waiting_for_next) {
                assert!(waiter.wakes() > 0);
                assert_eq!(*run(waiter.future).unwrap(), 1);
            }
            assert_eq!(source.begun(), 2);
        })
        .succeeds();
    }
}

#[test]
fn a_wait_that_a_fork_inherits_works_in_the_child() {
    let table = anonymous();
    let writer = sync(&table);
    in_child(|| {
        let source = Source::open();
        let cached = Cached::builder(sync(&table), source.loader()).verify(1, |_, _| {}).build().unwrap();
        run(cached.get()).unwrap();
        let mut wait = Polled::new(cached.wait());
        for _ in 0..3 {
            assert!(wait.poll().is_pending());
        }
        let mut wait = Some(wait);
        forked(|| {
            let mut wait = wait.take().unwrap();
            assert!(wait.poll().is_pending());
            source.set(Ok(2));
            // Verified, and so replaced, which no key reports.
            assert_eq!(*run(cached.get()).unwrap(), 2);
            assert_eq!(*wait.finish().unwrap(), 2);
            let mut wait = Polled::new(cached.wait());
            for _ in 0..2 {
                assert!(wait.poll().is_pending());
            }
            writer.mark_updated().unwrap();
            assert_eq!(*run(wait.future).unwrap(), 2);
        });
        assert_eq!(*run(wait.unwrap().future).unwrap(), 1);
    })
    .succeeds();
}

#[test]
fn a_child_that_is_forked_in_the_middle_of_an_update_finishes_nothing() {
    let table = anonymous();
    let reader = sync(&table);
    in_child(|| {
        let cached = Cached::<u64>::without_loader(sync(&table));
        let gate = Semaphore::new(0);
        let mut update = Some(Polled::new(cached.update(async || {
            gate.acquire().await.unwrap().forget();
            Ok::<_, Infallible>(())
        })));
        assert!(update.as_mut().unwrap().poll().is_pending());
        forked(|| drop(update.take()));
        assert!(!reader.is_expired());
        gate.add_permits(1);
        update.unwrap().finish().unwrap();
        assert!(reader.is_expired());
    })
    .succeeds();
}

#[test]
fn processes_that_fork_with_tasks_at_work_each_see_all_updates() {
    const CHILDREN: u64 = 4;
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let words = support::shared_words(2);
    let (value, seen) = (&words[0], &words[1]);
    let cached = Cached::new(sync(&table), || async { Ok::<_, Infallible>(words[0].load(SeqCst)) });
    run(cached.get()).unwrap();
    let children: Vec<_> = (0..CHILDREN)
        .map(|_| {
            in_child(|| {
                run(async {
                    for round in 1..=20 {
                        while *cached.wait().await.unwrap() < round {}
                        seen.fetch_add(1, SeqCst);
                    }
                });
            })
        })
        .collect();
    for round in 1..=20 {
        let commit = async || {
            value.store(round, SeqCst);
            Ok::<_, Infallible>(())
        };
        run(cached.update(commit)).unwrap();
        support::await_value(seen, round * CHILDREN);
    }
    children.into_iter().for_each(support::Child::succeeds);
}

#[test]
fn where_no_thread_can_be_started_a_wait_fails_and_does_not_spin_and_loads_go_on() {
    use nix::sys::resource::{Resource, setrlimit};
    use nix::unistd::{Uid, setuid};
    let table = anonymous();
    in_child(|| {
        setrlimit(Resource::RLIMIT_NPROC, 0, 0).unwrap();
        // The limit does not apply to root.
        if Uid::effective().is_root() {
            setuid(Uid::from_raw(54_321)).unwrap();
        }
        assert!(std::thread::Builder::new().spawn(|| {}).is_err());
        let source = Source::with_permits(1);
        let cached = source.cached(&table);
        run(cached.get()).unwrap();
        let start = std::time::Instant::now();
        for _ in 0..50 {
            let error = run(cached.wait()).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::System { .. }), "{error}");
        }
        assert!(start.elapsed() >= Duration::from_millis(40), "{:?}", start.elapsed());
        cached.mark_updated().unwrap();
        let mut calls: Vec<_> = (0..3).map(|_| Polled::new(cached.get())).collect();
        assert!(calls.iter_mut().all(|call| call.poll().is_pending()));
        let mut limited = Polled::new(cached.get_fresh(std::time::Instant::now() + LIMIT));
        assert!(matches!(limited.poll(), Poll::Ready(Err(_))), "it would wait past its deadline");
        source.permit(1);
        for call in calls {
            assert_eq!(*call.finish().unwrap(), 1);
        }
    })
    .succeeds();
}

//! Guards against a forked child that is taken for an ancestor of the same process id, and against locks that a child keeps
//! of a parent that was killed.

mod support;

use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use gensync::{Cached, ErrorKind, GenerationSynchronizer, Table};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::Pid;
use support::{Child, alone, await_value, fork_here, in_child, path, shared_words};

fn sync(table: &Table) -> GenerationSynchronizer {
    GenerationSynchronizer::new(table, "key").unwrap()
}

/// What is left of a process that ends without unwinding: its child goes on.
fn end() -> ! {
    nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL).unwrap();
    unreachable!()
}

/// From now on, the first process that is forked in this namespace of process ids has the number `next`.
fn set_next_id(next: i32) {
    std::fs::write("/proc/sys/kernel/ns_last_pid", (next - 1).to_string()).unwrap();
}

#[test]
fn a_child_with_the_process_id_of_an_ancestor_is_not_taken_for_it() {
    let words = shared_words(2);
    let (result, loading) = (&words[0], &words[1]);
    let namespace = in_child(|| {
        if unshare(CloneFlags::CLONE_NEWPID).is_err() {
            eprintln!("skipped: this user may make no namespace of process ids");
            result.store(u64::MAX, SeqCst);
            return;
        }
        // The first process of the namespace reaps the others, and keeps it alive.
        in_child(|| {
            assert_eq!(Pid::this().as_raw(), 1);
            assert!(in_child(|| generations(result, loading)).ends_by_kill());
            await_value(result, 1);
        })
        .succeeds();
    });
    namespace.succeeds();
    match result.load(SeqCst) {
        u64::MAX => {}
        result => assert_eq!(result, 1, "what failed stands above"),
    }
}

/// A is process 2: it forks B and ends; B forks C, which is process 2 again.
fn generations(result: &'static AtomicU64, loading: &'static AtomicU64) {
    let id = Pid::this();
    assert_eq!(id.as_raw(), 2);
    let table = Table::options().anonymous().unwrap();
    let writer = sync(&table);
    let value = Cached::new(sync(&table), move || {
        // The first one never ends.
        if loading.fetch_add(1, SeqCst) == 0 {
            std::thread::sleep(Duration::MAX);
        }
        Ok::<_, std::io::Error>(7)
    });
    let pollable = sync(&table).pollable().unwrap();
    let update = GenerationSynchronizer::new(&table, "other").unwrap();
    let update = update.begin_update().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| value.get());
        await_value(loading, 1);
        if fork_here().is_some() {
            end();
        }
        // B: A is reaped by the first process, or its number is not free.
        while nix::sys::signal::kill(id, None).is_ok() {
            std::thread::yield_now();
        }
        set_next_id(2);
        if let Some(child) = fork_here() {
            assert_eq!(child, id, "the process id was not free");
            nix::sys::wait::waitpid(child, None).unwrap();
            end();
        }
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            assert_eq!(Pid::this(), id);
            let start = Instant::now();
            // By a deadline, so that a wait for a load that no thread makes fails.
            let got = value.get_fresh(start + Duration::from_secs(10));
            assert_eq!(*got.expect("it waits for the load of an ancestor"), 7);
            let error = update.finish().unwrap_err();
            assert_eq!(*error.kind(), ErrorKind::Inherited, "it has finished an ancestor's update");
            drop(pollable);
            let pollable = writer.pollable().unwrap();
            sync(&table).mark_updated().unwrap();
            let mut descriptors = [PollFd::new(pollable.as_fd(), PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(10_000).unwrap();
            assert_eq!(poll(&mut descriptors, timeout).unwrap(), 1, "its descriptor never becomes readable");
        }));
        result.store(if outcome.is_ok() { 1 } else { 2 }, SeqCst);
        end();
    });
}

#[test]
fn a_child_that_was_forked_during_a_reset_keeps_no_lock_of_a_parent_that_is_killed() {
    alone(|| {
        let (_folder, path) = path();
        let table = Table::open(&path).unwrap();
        let writer = sync(&table);
        let words = shared_words(3);
        let (resets, children, stop) = (&words[0], &words[1], &words[2]);
        for round in 0..50 {
            words.iter().for_each(|word| word.store(0, SeqCst));
            let parent = in_child(|| {
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        let table = Table::open(&path).unwrap();
                        loop {
                            table.reset().unwrap();
                            resets.fetch_add(1, SeqCst);
                        }
                    });
                    await_value(resets, 2 + round % 7);
                    if fork_here().is_some() {
                        // At once, so that the table which the child may have locked is still the one in use.
                        end();
                    }
                    children.store(1, SeqCst);
                    while stop.load(SeqCst) == 0 {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    end();
                });
            });
            await_value(children, 1);
            assert!(parent.ends_by_kill());
            // The kernel has released what the parent held, and the child sleeps.
            let inode = format!(":{} ", std::fs::metadata(&path).unwrap().ino());
            let locks = std::fs::read_to_string("/proc/locks").unwrap();
            let held = locks.lines().filter(|line| line.contains("OFDLCK") && line.contains(&inode));
            // That it has the table open is true of the child as well.
            let held: Vec<_> = held.filter(|line| !line.ends_with(" 128 143")).collect();
            assert!(held.is_empty(), "a child keeps a lock of its parent's: {held:?}");
            let begun = writer.update_deadline(Instant::now() + Duration::from_secs(5), || Ok::<_, ()>(()));
            let reset = begun.is_ok().then(|| table.reset());
            stop.store(1, SeqCst);
            begun.expect("a child keeps a lock of its parent's");
            reset.unwrap().expect("a child keeps a lock of its parent's");
        }
    });
}

#[test]
fn a_child_that_lives_on_keeps_no_update_in_flight() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let reader = sync(&table);
    let words = shared_words(2);
    let maker = in_child(|| {
        let writer = sync(&table);
        let _update = writer.begin_update().unwrap();
        let _heir: Child = in_child(|| {
            words[0].store(1, SeqCst);
            await_value(&words[1], 1);
        });
        std::thread::sleep(Duration::MAX);
    });
    await_value(&words[0], 1);
    maker.kill();
    let start = Instant::now();
    while !reader.is_expired() && start.elapsed() < Duration::from_secs(10) {}
    words[1].store(1, SeqCst);
    assert!(reader.is_expired(), "no process notices that the maker was killed");
}

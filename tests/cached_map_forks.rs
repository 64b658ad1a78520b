//! Guards against a forked child that cannot use the map that it inherits, as a thread of its parent was changing it; that undoes
//! something for its parent; or that loads what its parent had.

#![expect(unsafe_code, reason = "forks by a bare system call, and drops a map in a child")]

#[path = "support/map.rs"]
mod map;
mod support;

use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use gensync::{CacheKey, CachedMap, CachedMapBuilder, Table};
use map::{Database, key};
use nix::libc;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use support::source::{HOUR, anonymous};
use support::{Child, LIMIT, alone, await_value, fork_here, in_child, next_random, shared_words};

/// A map of what stands in words that all processes share.
fn of_words(table: &Table, words: &'static [AtomicU64]) -> CachedMapBuilder<u64, u64> {
    CachedMap::builder(table, key, |id: &u64| Ok::<_, io::Error>(words[*id as usize].load(SeqCst)))
}

/// What a thread does that is only to be there.
fn be_there_until(stop: &AtomicU64) {
    let start = Instant::now();
    while stop.load(SeqCst) == 0 && start.elapsed() < LIMIT {
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_child_of_a_parent_with_one_thread_starts_with_its_entries() {
    in_child(|| {
        let (words, table) = (shared_words(101), anonymous());
        let map = of_words(&table, words).max_entries(200).build();
        (0..100).for_each(|id| drop(map.get(&id).unwrap()));
        let child = in_child(|| {
            (0..100).for_each(|id| drop(map.get(&id).unwrap()));
            assert_eq!(map.counters().reloads, 100, "loaded again");
            // From here on, each goes its own way.
            map.get(&100).unwrap();
            map.remove(&1).unwrap();
            words[2].store(5, SeqCst);
            map.mark_updated(&2).unwrap();
            assert_eq!((*map.get(&2).unwrap(), map.len()), (5, 100));
            // A grandchild has them too, though the child has used the map.
            in_child(|| {
                assert!(map.get_if_fresh(&2).is_some() && map.get_if_fresh(&3).is_some() && map.len() == 100);
                // So has one whose parents have not used it.
                in_child(|| in_child(|| assert!(map.get_if_fresh(&2).is_some() && map.len() == 100)).succeeds())
                    .succeeds();
            })
            .succeeds();
            // One that has threads now is as good as any; its children start anew.
            let stop = &AtomicU64::new(0);
            thread::scope(|scope| {
                scope.spawn(move || be_there_until(stop));
                in_child(|| {
                    assert!(map.is_empty() && map.get_if_fresh(&3).is_none());
                    assert_eq!((*map.get(&3).unwrap(), map.len()), (0, 1));
                })
                .succeeds();
                stop.store(1, SeqCst);
            });
            assert_eq!(map.len(), 100);
        });
        child.succeeds();
        assert_eq!((map.len(), *map.get(&2).unwrap()), (100, 5));
        assert!(map.get_if_fresh(&1).is_some() && map.get_if_fresh(&100).is_none());
        assert_eq!(map.counters().reloads, 101);
        // By a bare system call, which runs no handlers: it starts anew.
        let child = || {
            assert!(map.get_if_fresh(&3).is_none() && *map.get(&3).unwrap() == 0 && map.len() == 1);
        };
        // SAFETY: a child with a copy of all memory, as after a fork; this process has one thread.
        match unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) } {
            0 => {
                let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
                // SAFETY: ends the process.
                unsafe { libc::_exit(i32::from(outcome.is_err())) }
            }
            pid => {
                let status = waitpid(Pid::from_raw(pid as i32), None).unwrap();
                assert!(matches!(status, WaitStatus::Exited(_, 0)), "{status:?}");
            }
        }
    })
    .succeeds();
}

#[test]
fn children_that_inherit_a_map_drop_it_without_harm() {
    in_child(|| {
        let memory = Arc::new(());
        for threads in [0, 1] {
            let table = anonymous();
            let value = Arc::clone(&memory);
            let loader = move |_: &u64| Ok::<_, io::Error>(Arc::clone(&value));
            let map = Box::new(CachedMap::builder(&table, key, loader).max_entries(50).build());
            (0..100).for_each(|id| drop(map.get(&id).unwrap()));
            let stop = &AtomicU64::new(0);
            thread::scope(|scope| {
                (0..threads).for_each(|_| _ = scope.spawn(move || be_there_until(stop)));
                for uses_it in [true, false] {
                    in_child(|| {
                        if uses_it {
                            (0..100).for_each(|id| drop(map.get(&id).unwrap()));
                        }
                        // SAFETY: the child ends without using it again.
                        drop(unsafe { Box::from_raw(std::ptr::from_ref(&*map).cast_mut()) });
                        assert!(threads == 1 || Arc::strong_count(&memory) == 1 || !uses_it);
                    })
                    .succeeds();
                }
                stop.store(1, SeqCst);
            });
            let counted = Arc::strong_count(&memory) - 2;
            assert_eq!(counted, map.len());
            drop(map);
            assert_eq!(Arc::strong_count(&memory), 1);
        }
    })
    .succeeds();
}

#[test]
fn children_forked_at_any_moment_can_use_the_map() {
    alone(|| {
        let (table, words) = (anonymous(), shared_words(64));
        let new = || of_words(&table, words).fail_safe(HOUR).time_to_idle(Duration::from_millis(20));
        let map = new().max_entries(20).bulk_loader(load_all(words)).build();
        let stop = &AtomicU64::new(0);
        thread::scope(|scope| {
            for seed in 1..=4 {
                let map = &map;
                scope.spawn(move || {
                    let mut random = seed;
                    while stop.load(SeqCst) == 0 {
                        let id = next_random(&mut random) % 64;
                        match random % 16 {
                            0 => _ = map.mark_updated(&id).unwrap(),
                            1 => drop(map.remove(&id)),
                            2 => map.invalidate(&id).unwrap(),
                            3 => drop(map.get_many(&[id, 1, 2, 3]).unwrap()),
                            4 => drop(map.peek(&id)),
                            5 if id == 5 => map.remove_all(),
                            6 => drop(map.get_with(&id, || Err::<u64, _>("down"))),
                            _ => drop(map.get(&id).unwrap()),
                        }
                    }
                });
            }
            for round in 0..100 {
                let child = in_child(|| {
                    for id in 0..64 {
                        words[id as usize].fetch_add(1, SeqCst);
                        map.mark_updated(&id).unwrap();
                        let least = words[id as usize].load(SeqCst);
                        assert!(*map.get(&id).unwrap() >= least, "stale");
                    }
                    map.get_many(&[1, 2, 3]).unwrap();
                    map.clear_matching("user:1*").unwrap();
                    let twice = || (0..2).for_each(|_| (0..64).for_each(|id| drop(map.get(&id).unwrap())));
                    if round % 4 == 0 {
                        thread::scope(|scope| (0..2).for_each(|_| _ = scope.spawn(twice)));
                        in_child(twice).succeeds();
                    }
                    map.remove_all();
                    assert!(map.is_empty());
                });
                ends(child);
            }
            stop.store(1, SeqCst);
        });
    });
}

fn load_all(words: &'static [AtomicU64]) -> impl Fn(&[u64]) -> io::Result<Vec<(u64, u64)>> {
    |ids| Ok(ids.iter().map(|id| (*id, words[*id as usize].load(SeqCst))).collect())
}

/// Fails if a child does not end.
fn ends(child: Child) {
    let start = Instant::now();
    let is_there = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", child.pid())).unwrap();
        !stat.rsplit_once(") ").unwrap().1.starts_with('Z')
    };
    while is_there() {
        assert!(start.elapsed() < LIMIT, "a child hangs");
        thread::sleep(Duration::from_micros(200));
    }
    child.succeeds();
}

/// A key that keeps a comparison waiting, which the map makes in the middle of a change, under a lock.
#[derive(Clone, Debug)]
struct SlowKey(u64, Arc<AtomicU64>);

impl Eq for SlowKey {}

impl PartialEq for SlowKey {
    fn eq(&self, other: &Self) -> bool {
        if self.1.load(SeqCst) == 1 {
            self.1.store(2, SeqCst);
            let start = Instant::now();
            // Longer than it takes to find out that a child hangs.
            while self.1.load(SeqCst) < 3 && start.elapsed() < 2 * LIMIT {
                thread::yield_now();
            }
        }
        self.0 == other.0
    }
}

impl std::hash::Hash for SlowKey {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

#[test]
fn a_child_that_is_forked_in_the_middle_of_a_change_can_use_the_map() {
    alone(|| {
        let table = anonymous();
        let step = Arc::new(AtomicU64::new(0));
        let make_key = |key: &SlowKey| CacheKey::from(["slow", &key.0.to_string()]);
        let map = CachedMap::builder(&table, make_key, |key: &SlowKey| Ok::<_, io::Error>(key.0)).build();
        let key = |id| SlowKey(id, Arc::clone(&step));
        type Change = fn(&CachedMap<SlowKey, u64>, SlowKey);
        let changes: [Change; 4] = [
            |map, key| drop(map.get(&key).unwrap()),
            |map, key| drop(map.remove(&key)),
            |map, key| map.invalidate(&key).unwrap(),
            |map, key| drop(map.get_many([&key]).unwrap()),
        ];
        for change in changes {
            map.get(&key(1)).unwrap();
            map.mark_updated(&key(1)).unwrap();
            step.store(1, SeqCst);
            thread::scope(|scope| {
                let thread = scope.spawn(|| change(&map, key(1)));
                await_value(&step, 2);
                ends(in_child(|| {
                    step.store(0, SeqCst);
                    (0..20).for_each(|id| assert_eq!(*map.get(&key(id)).unwrap(), id));
                    map.remove_all();
                }));
                step.store(3, SeqCst);
                thread.join().unwrap();
            });
            step.store(0, SeqCst);
            assert_eq!(*map.get(&key(1)).unwrap(), 1);
        }
    });
}

#[test]
fn a_loader_that_forks_returns_in_both_and_a_child_that_is_forked_meanwhile_loads_for_itself() {
    in_child(|| {
        for threads in [0, 1] {
            let stop = &AtomicU64::new(0);
            thread::scope(|scope| {
                (0..threads).for_each(|_| _ = scope.spawn(move || be_there_until(stop)));
                let table = anonymous();
                let forked = AtomicU64::new(0);
                let loader = move |id: &u64| {
                    let child = (*id == 1 && forked.fetch_add(1, SeqCst) == 0).then(fork_here);
                    Ok::<_, io::Error>(child.map_or(0, |child| child.map_or(-1, |child| child.as_raw())))
                };
                let map = CachedMap::builder(&table, key, loader).build();
                map.get(&2).unwrap();
                match *map.get(&1).unwrap() {
                    -1 => {
                        let works = std::panic::catch_unwind(|| {
                            assert_eq!((*map.get(&2).unwrap(), *map.get(&1).unwrap()), (0, -1));
                            map.mark_updated(&1).unwrap();
                            assert_eq!((*map.get(&1).unwrap(), *map.get(&3).unwrap()), (0, 0));
                        });
                        // SAFETY: ends the process.
                        unsafe { libc::_exit(if works.is_ok() { 7 } else { 1 }) }
                    }
                    child => {
                        let status = waitpid(Pid::from_raw(child), None).unwrap();
                        assert!(matches!(status, WaitStatus::Exited(_, 7)), "{status:?}");
                        assert_eq!((*map.get(&1).unwrap(), map.counters().reloads), (0, 3), "the child has marked it");
                    }
                }
                stop.store(1, SeqCst);
            });
        }
    })
    .succeeds();
    // While a thread of the parent loads, and others wait for it.
    alone(|| {
        let (table, database) = (anonymous(), Database::default());
        let map = database.map(&table).build();
        map.get(&2).unwrap();
        database.hold_up();
        thread::scope(|scope| {
            let calls = [(); 3].map(|()| scope.spawn(|| *map.get(&1).unwrap()));
            database.await_loads(2);
            for _ in 0..20 {
                ends(in_child(|| {
                    database.allow_all();
                    assert_eq!((*map.get(&1).unwrap(), *map.get(&2).unwrap()), (0, 0));
                }));
            }
            database.allow_all();
            assert!(calls.into_iter().all(|call| call.join().unwrap() == 0));
        });
        assert_eq!(database.loads(), 2);
    });
}

//! Guards against loaders, callbacks, keys and values of the user's that misbehave or come back to the map: they must not hang others,
//! loop, or be hung. No code of the user may run under a lock.

#[path = "support/map.rs"]
mod map;
mod support;

use std::error::Error as _;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Barrier, Mutex, OnceLock, Weak, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use gensync::{Cached, CachedMap, CachedMapBuilder, ErrorKind, GenerationSynchronizer, Peek, Table};
use map::{Database, key, must_end};
use support::source::{HOUR, anonymous};
use support::{alone, in_child, is_recursion};

/// A map that its own loader, callbacks and values know.
struct Cyclic<V>(Arc<OnceLock<CachedMap<u64, V>>>);

impl<V: Send + Sync + 'static> Cyclic<V> {
    fn new(build: impl FnOnce(Itself<V>) -> CachedMapBuilder<u64, V>) -> Self {
        let map = Arc::new(OnceLock::new());
        let built = build(Itself(Arc::downgrade(&map))).build();
        assert!(map.set(built).is_ok());
        Self(map)
    }

    fn map(&self) -> &CachedMap<u64, V> {
        self.0.get().unwrap()
    }
}

struct Itself<V>(Weak<OnceLock<CachedMap<u64, V>>>);

impl<V> Clone for Itself<V> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<V> Itself<V> {
    /// Runs `work` with the map; not when it is dropped itself.
    fn with<R>(&self, work: impl FnOnce(&CachedMap<u64, V>) -> R) -> Option<R> {
        self.0.upgrade().map(|map| work(map.get().unwrap()))
    }
}

/// Uses its map in every way when it is dropped, if it is armed, and has another thread do so as well.
struct Demanding {
    id: u64,
    armed: Arc<AtomicU64>,
    dropped: Arc<AtomicU64>,
    map: Itself<Demanding>,
}

impl Drop for Demanding {
    fn drop(&mut self) {
        self.dropped.fetch_add(1, SeqCst);
        // Once at a time, or each value that is loaded here would evict, and drop, another one.
        if self.armed.compare_exchange(1, 2, SeqCst, SeqCst).is_err() {
            return;
        }
        self.map.with(|map| use_all(map, self.id));
        let (map, id, (answer, answered)) = (self.map.clone(), self.id, mpsc::channel());
        thread::spawn(move || {
            map.with(|map| use_all(map, id));
            answer.send(())
        });
        answered.recv_timeout(Duration::from_secs(10)).expect("dropped under a lock");
        self.armed.store(1, SeqCst);
    }
}

fn use_all(map: &CachedMap<u64, Demanding>, id: u64) {
    for id in [id, id + 1, 1_000_000] {
        map.get(&id).unwrap();
        let _ = (map.peek(&id), map.get_if_fresh(&id), map.len(), map.weight(), map.counters());
        map.invalidate(&id).unwrap();
        map.mark_updated(&id).unwrap();
        map.remove(&id);
    }
    map.get_many(&[id, id + 1]).unwrap();
}

fn demanding(
    table: &Table,
    set: impl FnOnce(CachedMapBuilder<u64, Demanding>) -> CachedMapBuilder<u64, Demanding>,
) -> (Cyclic<Demanding>, Arc<AtomicU64>, Arc<AtomicU64>) {
    let (armed, dropped) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let map = Cyclic::new(|map| {
        let (armed, dropped) = (Arc::clone(&armed), Arc::clone(&dropped));
        let new = move |id: u64| {
            let (armed, dropped, map) = (Arc::clone(&armed), Arc::clone(&dropped), map.clone());
            Demanding { id, armed, dropped, map }
        };
        let new_one = new.clone();
        let load = move |id: &u64| if *id < 2_000_000 { Ok(new(*id)) } else { Err("down") };
        let load_all =
            move |ids: &[u64]| Ok::<_, io::Error>(ids.iter().map(|id| (*id, new_one(*id))).collect::<Vec<_>>());
        set(CachedMap::builder(table, key, load).bulk_loader(load_all))
    });
    (map, armed, dropped)
}

#[test]
fn a_value_that_uses_the_map_when_it_is_dropped_hangs_neither_itself_nor_others() {
    const TIME: Duration = Duration::from_millis(100);
    must_end(|| {
        let table = anonymous();
        let (cyclic, armed, dropped) = demanding(&table, |builder| builder.max_entries(10).time_to_idle(TIME));
        let map = cyclic.map();
        let mut last = 0;
        let mut dropped_by = |what: &str, work: &dyn Fn()| {
            armed.store(1, SeqCst);
            work();
            let now = dropped.load(SeqCst);
            assert!(now > last, "{what} has dropped nothing");
            assert_eq!(armed.swap(0, SeqCst), 1, "{what}");
            last = now;
        };
        let fill = || (0..10).for_each(|id| drop(map.get(&id).unwrap()));
        dropped_by("an eviction", &|| (0..30).for_each(|id| drop(map.get(&id).unwrap())));
        fill();
        dropped_by("a reload", &|| {
            map.mark_updated(&9).unwrap();
            map.get(&9).unwrap();
        });
        fill();
        dropped_by("a reload of many", &|| {
            map.get_many(&[6, 7, 8, 9]).unwrap();
            map.clear_matching("user:*").unwrap();
            map.get_many(&[6, 7, 8, 9]).unwrap();
        });
        fill();
        dropped_by("a removal", &|| drop(map.remove(&9)));
        fill();
        dropped_by("a removal of all", &|| map.remove_all());
        fill();
        thread::sleep(2 * TIME);
        dropped_by("a purge", &|| drop(map.get(&500).unwrap()));
        fill();
        thread::sleep(2 * TIME);
        dropped_by("a peek", &|| assert!(matches!(map.peek(&9), Peek::Nothing)));
        let oversized = demanding(&table, |builder| builder.max_weight(10, |id, _| if *id == 5 { 1000 } else { 1 }));
        let map = oversized.0.map();
        oversized.1.store(1, SeqCst);
        (0..3).for_each(|_| drop(map.get(&5).unwrap()));
        assert!(oversized.2.load(SeqCst) >= 3);
    });
}

#[test]
fn a_value_that_is_removed_while_it_is_expired_may_use_the_map() {
    /// Invalidates its key when it is dropped.
    struct Invalidating(Itself<Self>);

    impl Drop for Invalidating {
        fn drop(&mut self) {
            self.0.with(|map| map.invalidate(&1).unwrap());
        }
    }

    must_end(|| {
        let table = anonymous();
        let cyclic = Cyclic::new(|map| {
            let load = move |_: &u64| Ok::<_, io::Error>(Invalidating(map.clone()));
            // It has outlived its time as soon as it is there.
            CachedMap::builder(&table, key, load).time_to_live(Duration::ZERO)
        });
        let (map, start) = (cyclic.map(), Instant::now());
        let is_over = || start.elapsed() > Duration::from_secs(1);
        thread::scope(|scope| {
            // More threads than processors, so that the one below is interrupted anywhere.
            scope.spawn(|| {
                while !is_over() {
                    map.get(&1).unwrap();
                    thread::sleep(Duration::from_micros(20));
                }
            });
            for _ in 0..3 {
                scope.spawn(|| {
                    while !is_over() {
                        drop(map.remove(&1));
                        thread::sleep(Duration::from_micros(30));
                    }
                });
            }
            while !is_over() {
                map.invalidate(&1).unwrap();
            }
        });
    });
}

#[test]
fn a_value_that_goes_with_a_failure_that_is_forgotten_may_use_the_map() {
    must_end(|| {
        let table = anonymous();
        let broken = Arc::new(AtomicU64::new(0));
        let is_broken = Arc::clone(&broken);
        let (cyclic, armed, dropped) = demanding(&table, |builder| {
            builder.fail_safe(Duration::from_millis(1)).retry_pause(Duration::ZERO).on_error(move |_| {
                is_broken.fetch_add(1, SeqCst);
            })
        });
        let map = cyclic.map();
        (0..200).for_each(|id| drop(map.get(&id).unwrap()));
        map.clear_matching("user:*").unwrap();
        (0..200).for_each(|id| drop(map.get_with(&id, || Err::<Demanding, _>("down"))));
        assert!(broken.load(SeqCst) >= 200);
        thread::sleep(Duration::from_millis(50));
        armed.store(1, SeqCst);
        (2_000_000..2_010_000).for_each(|id| assert!(map.get(&id).is_err()));
        assert!(dropped.load(SeqCst) >= 200, "nothing was forgotten");
    });
}

/// Needs another thread's use of its map to be shown, or dropped.
#[derive(Debug)]
struct DemandingError(Itself<u64>, Arc<AtomicU64>);

impl<V> fmt::Debug for Itself<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map")
    }
}

impl DemandingError {
    fn demand(&self) {
        if self.1.swap(0, SeqCst) == 1 {
            let (map, (answer, answered)) = (self.0.clone(), mpsc::channel());
            let ask =
                move |map: &CachedMap<u64, u64>| (0..3).map(|id| map.get(&id).is_ok()).filter(|is_ok| *is_ok).count();
            thread::spawn(move || answer.send(map.with(ask)));
            answered.recv_timeout(Duration::from_secs(10)).expect("used under a lock");
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
    for pause in [Duration::ZERO, HOUR] {
        must_end(move || {
            let (armed, broken) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(1)));
            let cyclic = Cyclic::new(|map| {
                let (armed, broken) = (Arc::clone(&armed), Arc::clone(&broken));
                let loader = move |id: &u64| match broken.load(SeqCst) {
                    0 => Ok(*id),
                    _ => Err(DemandingError(map.clone(), Arc::clone(&armed))),
                };
                CachedMap::builder(&anonymous(), key, loader).fail_safe(HOUR).retry_pause(pause)
            });
            let map = cyclic.map();
            (0..3).for_each(|id| assert!(map.get(&id).is_err()));
            if pause.is_zero() {
                broken.store(0, SeqCst);
            }
            armed.store(1, SeqCst);
            assert_eq!(map.get(&1).is_ok(), pause.is_zero());
            // Sweeps as well.
            (10..3000).for_each(|id| drop(map.get(&id)));
            assert_eq!(armed.load(SeqCst), 0, "neither shown nor dropped");
        });
    }
}

#[test]
fn a_loader_that_asks_for_its_own_key_gets_an_error_and_for_others_their_values() {
    must_end(|| {
        let cyclic = Cyclic::new(|map| {
            CachedMap::builder(&anonymous(), key, move |id: &u64| {
                // 0 asks for itself; 1 to 9 for the one below, down to 1; 10 for 11, and 11 for 10.
                let other = match id {
                    0 => 0,
                    1 => return Ok(1),
                    2..=9 => id - 1,
                    _ => 21 - id,
                };
                map.with(|map| map.get(&other).map(|value| *value + 1)).unwrap()
            })
        });
        let map = cyclic.map();
        let error = map.get(&0).unwrap_err();
        assert!(is_recursion(&error) && error.key() == Some("user:0"), "{error}");
        assert_eq!((*map.get(&9).unwrap(), map.len()), (9, 9));
        assert!(is_recursion(&map.get(&10).unwrap_err()) && is_recursion(&map.get_many(&[11]).unwrap_err()));
        assert_eq!(map.len(), 9);
    });
}

#[test]
fn loaders_of_several_threads_that_ask_for_each_others_keys_get_an_error() {
    for length in [2_u64, 3, 7] {
        let errors = must_end(move || {
            let (barrier, loads) = (Barrier::new(length as usize), AtomicU64::new(0));
            let cyclic = Cyclic::new(|map: Itself<u64>| {
                CachedMap::builder(&anonymous(), key, move |id: &u64| {
                    if loads.fetch_add(1, SeqCst) < length {
                        barrier.wait();
                    }
                    map.with(|map| map.get(&((id + 1) % length)).map(|value| *value)).unwrap()
                })
            });
            thread::scope(|scope| {
                let map = cyclic.map();
                let threads: Vec<_> = (0..length).map(|id| scope.spawn(move || map.get(&id).unwrap_err())).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
            })
        });
        assert!(errors.iter().all(is_recursion), "{errors:?}");
    }
}

#[test]
fn loads_that_wait_for_each_other_in_no_circle_get_no_error() {
    const KEYS: u64 = 5;
    must_end(|| {
        let cyclic = Cyclic::new(|map| {
            let ask = move |id: &u64| -> Result<u64, gensync::Error> {
                map.with(|map| (0..*id).try_fold(1, |sum, lower| Ok(sum + *map.get(&lower)?))).unwrap()
            };
            let ask_again = ask.clone();
            CachedMap::builder(&anonymous(), key, ask)
                .max_entries(3)
                .on_reload(move |id, _, _| assert_eq!(ask_again(id).unwrap(), 1 << id))
        });
        let map = cyclic.map();
        thread::scope(|scope| {
            for thread in 0..4 {
                scope.spawn(move || {
                    for round in 0..1000 {
                        map.mark_updated(&((thread + round) % KEYS)).unwrap();
                        let id = (thread * 3 + round / 2) % KEYS;
                        assert_eq!(*map.get(&id).unwrap(), 1 << id);
                    }
                });
            }
        });
    });
}

#[test]
fn callbacks_may_ask_for_their_key_and_come_one_at_a_time() {
    must_end(|| {
        let (inside, last) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let database = Database::default();
        let cyclic = Cyclic::new(|map| {
            let again = map.clone();
            database
                .map(&anonymous())
                .on_reload(move |id, old, new| {
                    assert_eq!(inside.fetch_add(1, SeqCst), 0, "two at a time");
                    assert!(last.swap(*new, SeqCst) == *old, "out of order");
                    map.with(|map| assert_eq!(*map.get(id).unwrap(), *new)).unwrap();
                    inside.fetch_sub(1, SeqCst);
                })
                .on_error(move |error| {
                    again.with(|map| {
                        let same = map.get(&7).unwrap_err();
                        assert_eq!((same.key(), error.key()), (Some("user:7"), Some("user:7")));
                    });
                })
        });
        let map = cyclic.map();
        map.get(&1).unwrap();
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let present = database.load(&1).unwrap();
                        map.update(&1, || database.change(1, present + 1)).unwrap();
                        map.get(&1).unwrap();
                    }
                });
            }
        });
        database.set(7, Err("down"));
        assert!(map.get(&7).is_err());
    });
}

#[test]
fn whatever_panics_lets_the_next_call_load() {
    for culprit in ["loader", "weigher", "key", "on_error", "on_reload", "verify"] {
        must_end(move || {
            let table = anonymous();
            let armed = Arc::new(AtomicU64::new(0));
            let panic = |what: &'static str| {
                let armed = Arc::clone(&armed);
                move || assert!(what != culprit || armed.swap(0, SeqCst) == 0, "on purpose")
            };
            let database = Database::default();
            let (source, in_loader, in_key) = (database.clone(), panic("loader"), panic("key"));
            let (in_weigher, in_on_error, in_on_reload) = (panic("weigher"), panic("on_error"), panic("on_reload"));
            let in_verify = panic("verify");
            let loader = move |id: &u64| {
                in_loader();
                source.load(id)
            };
            let make_key = move |id: &u64| {
                in_key();
                key(id)
            };
            let map = CachedMap::builder(&table, make_key, loader)
                .max_weight(100, move |_, _| {
                    in_weigher();
                    1
                })
                .on_error(move |_| in_on_error())
                .on_reload(move |_, _, _| in_on_reload())
                .verify(2, move |_, _, _| in_verify())
                .build();
            map.get(&1).unwrap();
            if culprit == "on_error" {
                database.set(1, Err("down"));
            } else {
                database.set(1, Ok(5));
            }
            if culprit != "verify" {
                GenerationSynchronizer::new(&table, key(&1)).unwrap().mark_updated().unwrap();
            }
            armed.store(1, SeqCst);
            assert!((0..3).any(|_| catch_unwind(AssertUnwindSafe(|| map.get(&1))).is_err()), "{culprit}");
            assert_eq!(armed.load(SeqCst), 0, "{culprit}");
            database.set(1, Ok(6));
            map.mark_updated(&1).unwrap();
            let others = thread::scope(|scope| {
                let threads = [(); 2].map(|()| scope.spawn(|| *map.get(&1).unwrap()));
                threads.map(|thread| thread.join().unwrap())
            });
            assert_eq!((others, *map.get(&2).unwrap()), ([6, 6], 0), "{culprit}");
        });
    }
}

#[test]
fn a_weigher_may_use_the_map() {
    let outcomes = must_end(|| {
        let outcomes = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&outcomes);
        let cyclic = Cyclic::new(|map| {
            let loader = |id: &u64| Ok::<_, io::Error>(*id);
            CachedMap::builder(&anonymous(), key, loader).max_weight(1000, move |id, _| {
                let own = map.with(|map| map.get(id).map(|value| *value)).unwrap();
                let other = map.with(|map| (*id > 0).then(|| *map.get(&(id - 1)).unwrap())).unwrap();
                log.lock().unwrap().push((own, other));
                1
            })
        });
        assert_eq!((*cyclic.map().get(&2).unwrap(), cyclic.map().len()), (2, 3));
        std::mem::take(&mut *outcomes.lock().unwrap())
    });
    let others: Vec<_> = outcomes.iter().map(|(_, other)| *other).collect();
    assert_eq!(others, [None, Some(0), Some(1)]);
    assert!(outcomes.iter().all(|(own, _)| is_recursion(own.as_ref().unwrap_err())), "it is being loaded");
}

#[test]
fn a_value_that_asks_for_its_key_when_a_failing_load_drops_it_does_not_wait_for_itself() {
    struct Asking(Weak<Cached<Asking>>, Arc<AtomicU64>);
    impl Drop for Asking {
        fn drop(&mut self) {
            if self.1.swap(0, SeqCst) == 1 {
                let _ = self.0.upgrade().unwrap().get();
            }
        }
    }
    must_end(|| {
        let (table, armed) = (anonymous(), Arc::new(AtomicU64::new(1)));
        let many: Vec<_> = (0..16_385).map(|i| GenerationSynchronizer::new(&table, format!("{i}")).unwrap()).collect();
        let cached = Arc::new_cyclic(|itself: &Weak<Cached<Asking>>| {
            let (itself, armed) = (itself.clone(), Arc::clone(&armed));
            Cached::new(GenerationSynchronizer::new(&table, "key").unwrap(), move || {
                many.iter().for_each(gensync::depend_on);
                Ok::<_, io::Error>(Asking(itself.clone(), Arc::clone(&armed)))
            })
        });
        let error = cached.get().err().unwrap();
        assert!(error.source().unwrap().to_string().contains("16,384"), "{error}");
        assert_eq!(armed.load(SeqCst), 0);
    });
}

#[test]
fn destructors_that_run_as_a_thread_ends_may_load() {
    struct Last(Arc<Cached<u64>>, Arc<CachedMap<u64, u64>>);
    impl Drop for Last {
        fn drop(&mut self) {
            self.0.mark_updated().unwrap();
            self.1.mark_updated(&1).unwrap();
            assert_eq!((*self.0.get().unwrap(), *self.1.get(&1).unwrap()), (7, 1));
        }
    }
    thread_local! {
        static LAST: std::cell::RefCell<Option<Last>> = const { std::cell::RefCell::new(None) };
    }
    // In a child, as a panic in such a destructor ends the process.
    alone(|| {
        in_child(|| {
            let table = anonymous();
            let cached =
                Arc::new(Cached::new(GenerationSynchronizer::new(&table, "key").unwrap(), || Ok::<_, io::Error>(7)));
            let map = Arc::new(CachedMap::builder(&table, key, |id: &u64| Ok::<_, io::Error>(*id)).build());
            let last = Last(Arc::clone(&cached), Arc::clone(&map));
            let work = move || {
                // Before the thread's first load, so that it is dropped after all that loads need.
                LAST.set(Some(last));
                LAST.with_borrow(|last| last.as_ref().map(|last| (last.0.get().unwrap(), last.1.get(&1).unwrap())));
            };
            thread::spawn(work).join().unwrap();
            assert_eq!((cached.counters().reloads, map.counters().reloads), (2, 2));
        })
        .succeeds();
    });
}

#[test]
fn a_thread_that_a_loader_starts_and_waits_for_ends_at_its_deadline() {
    let error = must_end(|| {
        let cyclic = Cyclic::new(|map: Itself<u64>| {
            CachedMap::builder(&anonymous(), key, move |id: &u64| {
                let (map, id) = (map.clone(), *id);
                let soon = Instant::now() + Duration::from_millis(5);
                thread::spawn(move || map.with(|map| map.get_fresh(&id, soon).map(|value| *value)).unwrap())
                    .join()
                    .unwrap()
            })
        });
        cyclic.map().get(&1).unwrap_err()
    });
    assert_eq!(*error.source().unwrap().downcast_ref::<gensync::Error>().unwrap().kind(), ErrorKind::Deadline);
}

#[test]
fn a_load_that_marks_its_own_key_is_reported_and_does_not_loop() {
    let table = anonymous();
    let marker = GenerationSynchronizer::new(&table, key(&1)).unwrap();
    let reports = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&reports);
    let database = Database::default();
    let source = database.clone();
    let loader = move |id: &u64| {
        if *id == 1 {
            marker.mark_updated().unwrap();
        }
        source.load(id)
    };
    let map = CachedMap::builder(&table, key, loader)
        .on_error(move |error| {
            assert!(matches!(error.kind(), ErrorKind::Overtaken { .. }) && error.key() == Some("user:1"));
            count.fetch_add(1, SeqCst);
        })
        .build();
    for calls in 1..=20 {
        (1..=2).for_each(|id| drop(map.get(&id).unwrap()));
        assert_eq!(database.loads(), calls + 1, "one load for each call, and one of the other key");
    }
    assert_eq!((reports.load(SeqCst), map.counters().overtaken), (2, 20));
}

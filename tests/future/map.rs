//! Many keys in tasks.

use std::collections::BTreeSet;

use gensync::CacheKey;
use gensync::future::{CachedMap, CachedMapBuilder};

use super::*;

type Map = CachedMap<u64, Option<u64>>;

/// A source of numbers from 0 to 999, each of which can be changed, that counts its loads. A load waits for a permit.
struct Numbers {
    added: AtomicU64,
    loads: Mutex<Vec<Vec<u64>>>,
    permits: Semaphore,
}

impl Numbers {
    fn with_permits(permits: usize) -> Arc<Self> {
        Arc::new(Self { added: AtomicU64::new(0), loads: Mutex::default(), permits: Semaphore::new(permits) })
    }

    fn open() -> Arc<Self> {
        Self::with_permits(Semaphore::MAX_PERMITS)
    }

    async fn load(&self, numbers: Vec<u64>) -> Result<Vec<(u64, u64)>, String> {
        self.loads.lock().unwrap().push(numbers.clone());
        self.permits.acquire().await.unwrap().forget();
        let numbers = numbers.into_iter().filter(|number| *number < 1000);
        Ok(numbers.map(|number| (number, number + self.added.load(SeqCst))).collect())
    }

    fn loads(&self) -> Vec<Vec<u64>> {
        std::mem::take(&mut self.loads.lock().unwrap())
    }

    fn builder(self: &Arc<Self>, table: &Table) -> CachedMapBuilder<u64, Option<u64>> {
        let (one, many) = (Arc::clone(self), Arc::clone(self));
        let one = move |number| {
            let source = Arc::clone(&one);
            async move { Ok::<_, String>(source.load(vec![number]).await?.pop().map(|(_, value)| value)) }
        };
        let many = move |numbers| {
            let source = Arc::clone(&many);
            async move {
                let found = source.load(numbers).await?;
                Ok::<_, String>(found.into_iter().map(|(number, value)| (number, Some(value))))
            }
        };
        CachedMap::builder(table, key, one).bulk_loader(many).absent(|_| None)
    }
}

fn key(number: &u64) -> CacheKey {
    ["number", &number.to_string()].into()
}

#[test]
fn each_key_is_loaded_once_and_again_after_an_update_of_any_process() {
    in_each_runtime(async || {
        let (_folder, path) = path();
        let table = Table::open(&path).unwrap();
        let source = Numbers::open();
        let map = source.builder(&table).build();
        for _ in 0..3 {
            for number in [1, 2, 3] {
                assert_eq!(*map.get(&number).await.unwrap(), Some(number));
            }
            assert_eq!(*map.get(&5000).await.unwrap(), None, "that a value is absent is kept as well");
        }
        assert_eq!(source.loads(), [[1], [2], [3], [5000]]);
        in_child(|| _ = attach(&Table::open(&path).unwrap(), "number:2").mark_updated().unwrap()).succeeds();
        map.update(&3, async || Ok::<_, Infallible>(source.added.fetch_add(10, SeqCst))).await.unwrap();
        assert!([1, 5000].iter().all(|number| map.get_if_fresh(number).is_some()));
        assert!([2, 3].iter().all(|number| map.get_if_fresh(number).is_none()));
        assert_eq!((*map.get(&2).await.unwrap(), *map.get(&3).await.unwrap()), (Some(12), Some(13)));
        assert_eq!(source.loads(), [[2], [3]]);
        assert_eq!(map.clear_matching("number:?").unwrap(), 3);
        assert_eq!(
            map.get_many(&[1, 2, 5000]).await.unwrap().iter().map(|value| **value).collect::<Vec<_>>(),
            [Some(11), Some(12), None]
        );
        assert_eq!(source.loads(), [[1, 2]], "5000 is fresh");
    });
}

#[test]
fn what_a_caller_brings_may_borrow_also_in_a_task_that_moves_between_threads() {
    fn assert_send<T: Send>(_: &T) {}
    let map: Arc<CachedMap<String, usize>> =
        Arc::new(CachedMap::builder_without_loader(&anonymous(), |name: &String| ["name", name].into()).build());
    threads_of_tokio().block_on(within_limit(async {
        let tasks = (0..100).map(|task| {
            let map = Arc::clone(&map);
            tokio::spawn(async move {
                let name = format!("{}", task % 10);
                let length = map.get_with(&*name, async || Ok::<_, Infallible>(name.len())).await.unwrap();
                let commit = async || Ok::<_, Infallible>(name.len());
                map.update(&*name, commit).await.unwrap() + *length
            })
        });
        for task in tasks.collect::<Vec<_>>() {
            assert_eq!(task.await.unwrap(), 2);
        }
    }));
    assert_send(&map.get("name"));
    assert_send(&map.get_fresh("name", std::time::Instant::now()));
    assert_send(&map.snapshot("name"));
    assert_send(&map.tracked().get("name"));
    assert_send(&map.get_many(&["name".to_owned()]));
    let name = Arc::new(1);
    assert_send(&map.wait("name"));
    assert_send(&map.wait_past("name", &name));
    assert_send(&map.update("name", async || Ok::<_, Infallible>(())));
    let error = run(map.get("another")).unwrap_err();
    assert!(error.source().unwrap().to_string().contains("get_with"), "{error:?}");
}

#[test]
fn ten_thousand_tasks_of_one_thread_load_a_thousand_keys_of_one_map_once_each() {
    const TASKS: u64 = 10_000;
    const KEYS: u64 = 1000;
    let table = anonymous();
    let source = Numbers::open();
    run(async {
        let waiting = Arc::new(tokio::sync::Notify::new());
        let begun = Arc::new(AtomicU64::new(0));
        let map = Arc::new({
            let (source, waiting) = (Arc::clone(&source), Arc::clone(&waiting));
            let begun = Arc::clone(&begun);
            CachedMap::builder(&table, key, move |number| {
                let (source, waiting, begun) = (Arc::clone(&source), Arc::clone(&waiting), Arc::clone(&begun));
                async move {
                    let all = waiting.notified();
                    // A load that blocked the thread, or that waited for that of another key, would keep the last one from beginning.
                    if (begun.fetch_add(1, SeqCst) + 1).is_multiple_of(KEYS) {
                        waiting.notify_waiters();
                    } else {
                        all.await;
                    }
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    Ok::<_, String>(source.load(vec![number]).await?[0].1)
                }
            })
            .build()
        });
        for round in 1..=3 {
            let tasks = (0..TASKS).map(|task| {
                let map = Arc::clone(&map);
                tokio::spawn(async move { *map.get(&(task % KEYS)).await.unwrap() - task % KEYS })
            });
            for task in tasks.collect::<Vec<_>>() {
                assert_eq!(task.await.unwrap(), round - 1, "a value of another round");
            }
            assert_eq!(source.loads().into_iter().flatten().collect::<BTreeSet<_>>().len() as u64, KEYS);
            assert_eq!(begun.load(SeqCst), round * KEYS, "one load for each key and generation");
            source.added.fetch_add(1, SeqCst);
            assert_eq!(map.clear_matching("number:*").unwrap() as u64, KEYS);
        }
    });
}

#[test]
fn a_call_that_is_dropped_anywhere_leaves_its_loads_to_the_others() {
    for bulk in [false, true] {
        for times in 0..8 {
            let source = Numbers::with_permits(0);
            let map = source.builder(&anonymous()).build();
            let numbers = [1, 2, 3];
            let mut first: Polled<'_, ()> = match bulk {
                false => Polled::new(async { drop(map.get(&1).await) }),
                true => Polled::new(async { drop(map.get_many(&numbers).await) }),
            };
            (0..times).for_each(|_| assert!(first.poll().is_pending()));
            let mut others: Vec<_> = numbers.iter().map(|number| Polled::new(map.get(number))).collect();
            let mut many = Polled::new(map.get_many(&numbers));
            assert!(others.iter_mut().all(|other| other.poll().is_pending()) && many.poll().is_pending());
            drop(first);
            source.permits.add_permits(10);
            for (number, other) in numbers.iter().zip(others) {
                assert_eq!(*run(other.future).unwrap(), Some(*number));
            }
            assert_eq!(run(many.future).unwrap().len(), 3);
            let ended = map.counters();
            assert_eq!((ended.reloads, ended.errors), (3, 0), "after {times} polls");
        }
    }
}

#[test]
fn calls_for_several_keys_in_opposite_orders_load_each_key_once() {
    let source = Numbers::with_permits(0);
    let map = source.builder(&anonymous()).build();
    let (one, other) = ([1, 2, 3, 4], [6, 5, 4, 3]);
    let (mut first, mut second) = (Polled::new(map.get_many(&one)), Polled::new(map.get_many(&other)));
    assert!(first.poll().is_pending() && second.poll().is_pending());
    let mut single = Polled::new(map.get(&6));
    assert!(single.poll().is_pending());
    assert_eq!(source.loads(), [vec![1, 2, 3, 4], vec![6, 5]]);
    source.permits.add_permits(2);
    let values = |values: Vec<Arc<Option<u64>>>| values.iter().map(|value| value.unwrap()).collect::<Vec<_>>();
    assert!(second.poll().is_pending(), "it waits for what the first one loads");
    assert_eq!(values(run(first.future).unwrap()), one);
    assert_eq!(values(run(second.future).unwrap()), other);
    assert_eq!(*run(single.future).unwrap(), Some(6));
    assert!(source.loads().is_empty());
}

#[test]
fn a_value_that_finds_no_room_goes_to_all_that_wait_for_it() {
    let source = Numbers::with_permits(0);
    let map = source.builder(&anonymous()).max_weight(10, |_, _| 1_000_000).build();
    let mut calls: Vec<_> = (0..10).map(|_| Polled::new(map.get(&1))).collect();
    assert!(calls.iter_mut().all(|call| call.poll().is_pending()));
    source.permits.add_permits(1);
    for call in calls {
        assert_eq!(*run(call.future).unwrap(), Some(1));
    }
    assert_eq!((source.loads().len(), map.len()), (1, 0));
}

#[test]
fn a_page_depends_on_what_its_loader_has_looked_up_side_by_side() {
    in_each_runtime(async || {
        let table = anonymous();
        let source = Numbers::open();
        let numbers = Arc::new(source.builder(&table).build());
        let tag = attach(&table, "tag");
        let pages: CachedMap<u64, u64> = CachedMap::builder(&table, |page: &u64| ["page", &page.to_string()].into(), {
            let (numbers, tag) = (Arc::clone(&numbers), tag.clone());
            move |page: u64| {
                let (numbers, tag) = (Arc::clone(&numbers), tag.clone());
                async move {
                    let read = async |number: u64| {
                        yield_now().await;
                        Ok::<_, gensync::Error>(numbers.tracked().get(&number).await?.unwrap_or(0))
                    };
                    let (one, other) = tokio::join!(read(2 * page), read(2 * page + 1));
                    depend_on(&tag);
                    Ok::<_, gensync::Error>(one? + other?)
                }
            }
        })
        .build();
        let mut sums = Vec::new();
        for page in 0..3 {
            sums.push(*pages.get(&page).await.unwrap());
        }
        assert_eq!(sums, [1, 5, 9]);
        let fresh = || (0..3).filter(|page| pages.get_if_fresh(page).is_some()).collect::<Vec<u64>>();
        numbers.mark_updated(&3).unwrap();
        assert_eq!(fresh(), [0, 2]);
        pages.get(&1).await.unwrap();
        assert_eq!(fresh(), [0, 1, 2]);
        tag.mark_updated().unwrap();
        assert!(fresh().is_empty());
    });
}

#[test]
fn an_update_that_is_dropped_anywhere_is_announced_if_the_source_may_have_changed() {
    let table = anonymous();
    let map = Numbers::open().builder(&table).build();
    let other = attach(&table, "number:1");
    for times in 0..10 {
        other.refresh().unwrap();
        let has_begun = AtomicU64::new(0);
        let mut update = Polled::new(map.update(&1, async || {
            has_begun.fetch_add(1, SeqCst);
            for _ in 0..3 {
                yield_now().await;
                assert!(!other.is_expired(), "it is pending");
            }
            Ok::<_, Infallible>(())
        }));
        (0..times).any(|_| update.poll().is_ready());
        drop(update);
        assert_eq!(other.is_expired(), has_begun.load(SeqCst) == 1, "after {times} polls");
    }
    // Nothing is left that is in flight.
    table.reset().unwrap();
}

#[test]
fn a_loader_that_panics_or_asks_for_its_own_key_keeps_no_other_task_waiting() {
    let table = anonymous();
    let own: Arc<OnceLock<Arc<Map>>> = Arc::default();
    let map = Arc::new({
        let own = Arc::clone(&own);
        CachedMap::builder(&table, key, move |number| {
            let own = Arc::clone(&own);
            async move {
                match number {
                    1 => panic!("the loader panics"),
                    2 => Ok(*own.get().unwrap().get(&2).await?),
                    number => Ok::<_, gensync::Error>(Some(number)),
                }
            }
        })
        .build()
    });
    assert!(own.set(Arc::clone(&map)).is_ok());
    threads_of_tokio().block_on(within_limit(async {
        for _ in 0..2 {
            let panicking = Arc::clone(&map);
            assert!(tokio::spawn(async move { panicking.get(&1).await }).await.unwrap_err().is_panic());
            let error = map.get(&2).await.unwrap_err();
            assert_eq!(*cause(&error).kind(), ErrorKind::Recursion);
            assert_eq!(*map.get(&3).await.unwrap(), Some(3));
        }
    }));
}

/// Polls until the call sleeps.
fn falls_asleep<T>(call: &mut Polled<'_, T>) {
    while call.poll().is_pending() {
        if call.wakes() == 0 {
            return;
        }
    }
    panic!("it does not sleep");
}

#[test]
fn a_wait_for_a_key_ends_with_an_update_of_another_process_and_not_before() {
    let (_folder, path) = path();
    for table in [anonymous(), Table::open(&path).unwrap()] {
        in_each_runtime(async || {
            let source = Numbers::open();
            let map = source.builder(&table).build();
            assert_eq!(*map.wait(&1).await.unwrap(), Some(1), "there was none");
            for added in 1..=3 {
                let not_yet = async {
                    pause(Duration::from_millis(20)).await;
                    None
                };
                let early = smol::future::or(async { Some(map.wait(&1).await) }, not_yet).await;
                assert!(early.is_none(), "{early:?}");
                let known = map.get(&1).await.unwrap();
                let (waited, past, ()) = tokio::join!(map.wait(&1), map.wait_past(&1, &known), async {
                    for _ in 0..3 {
                        yield_now().await;
                    }
                    source.added.store(added, SeqCst);
                    in_child(|| _ = attach(&table, "number:1").mark_updated().unwrap()).succeeds();
                });
                assert_eq!((*waited.unwrap(), *past.unwrap()), (Some(1 + added), Some(1 + added)));
            }
            assert_eq!(source.loads().len(), 4);
        });
    }
}

#[test]
fn a_wait_for_a_key_is_woken_by_an_invalidation_and_by_another_tasks_value_but_not_by_a_removal() {
    let source = Numbers::open();
    let map = source.builder(&anonymous()).build();
    let known = run(map.get(&1)).unwrap();
    let mut waits = [Polled::new(map.wait(&1)), Polled::new(map.wait_past(&1, &known))];
    waits.iter_mut().for_each(falls_asleep);
    let mut other = Polled::new(map.wait(&2));
    run(map.get(&2)).unwrap();
    falls_asleep(&mut other);
    map.invalidate(&1).unwrap();
    for wait in waits {
        assert_eq!(*wait.finish().unwrap(), Some(1));
    }
    assert_eq!(source.loads(), [[1], [2], [1]]);
    let mut waits = [Polled::new(map.wait(&1)), Polled::new(map.wait(&1))];
    waits.iter_mut().for_each(falls_asleep);
    map.remove(&1);
    waits.iter_mut().for_each(falls_asleep);
    assert!(source.loads().is_empty() && other.wakes() == 0);
    // There is no update, but another value.
    let value = run(map.get(&1)).unwrap();
    for wait in waits {
        assert!(Arc::ptr_eq(&wait.finish().unwrap(), &value));
    }
    // A value that is gone is expired by its key all the same.
    let mut wait = Polled::new(map.wait(&1));
    falls_asleep(&mut wait);
    map.remove_all();
    source.added.store(10, SeqCst);
    map.mark_updated(&1).unwrap();
    assert_eq!(*run(wait.future).unwrap(), Some(11));
    assert_eq!(source.loads(), [[1], [1]]);
}

#[test]
fn a_wait_for_a_key_that_is_dropped_anywhere_loses_no_update() {
    let loads = Arc::new(AtomicU64::new(0));
    let map = CachedMap::builder(&anonymous(), key, {
        let loads = Arc::clone(&loads);
        move |_| {
            let loads = Arc::clone(&loads);
            async move {
                for _ in 0..3 {
                    yield_now().await;
                }
                Ok::<_, Infallible>(loads.fetch_add(1, SeqCst) + 1)
            }
        }
    })
    .build();
    let poll_and_drop = |times: usize| {
        let mut polled = Polled::new(map.wait(&1));
        (0..times).any(|_| polled.poll().is_ready())
    };
    for times in 0..20 {
        run(map.get(&1)).unwrap();
        let before = loads.load(SeqCst);
        assert!(!poll_and_drop(times), "there is no update");
        map.mark_updated(&1).unwrap();
        if !poll_and_drop(times) {
            assert_eq!(*run(map.wait(&1)).unwrap(), before + 1);
        }
        assert_eq!(loads.load(SeqCst), before + 1);
    }
}

#[test]
fn tasks_that_wait_for_a_key_share_a_load_and_keep_no_value_and_let_others_run() {
    run(async {
        let source = Numbers::open();
        let map = Arc::new(source.builder(&anonymous()).build());
        let value = Arc::downgrade(&map.get(&1).await.unwrap());
        let tasks = (0..100).map(|_| {
            let map = Arc::clone(&map);
            tokio::spawn(async move { map.wait(&1).await.unwrap() })
        });
        let tasks: Vec<_> = tasks.collect();
        pause(Duration::from_millis(20)).await;
        assert_eq!(value.strong_count(), 1);
        map.remove(&1);
        assert_eq!(value.strong_count(), 0);
        map.mark_updated(&1).unwrap();
        let mut values = Vec::new();
        for task in tasks {
            values.push(task.await.unwrap());
        }
        assert!(values.iter().all(|value| Arc::ptr_eq(value, &values[0])));
        assert_eq!(source.loads(), [[1], [1]]);
    });
}

/// How often a loop of waits goes round in 200 milliseconds, in which other tasks can run.
fn rounds<V>(map: &CachedMap<u64, V>) -> u64 {
    let rounds = AtomicU64::new(0);
    in_each_runtime(async || {
        rounds.store(0, SeqCst);
        let waits = async {
            loop {
                drop(map.wait(&1).await);
                rounds.fetch_add(1, SeqCst);
            }
        };
        smol::future::or(pause(Duration::from_millis(200)), waits).await;
    });
    rounds.into_inner()
}

#[test]
fn a_loop_of_waits_for_a_key_that_gets_no_value_goes_slowly_and_lets_other_tasks_run() {
    let table = anonymous();
    let source = Numbers::open();
    let failing = CachedMap::builder(&table, key, async |_| Err::<u64, _>("down")).retry_pause(Duration::ZERO).build();
    let roomless = source.builder(&table).max_weight(10, |_, _| 1_000_000).build();
    let nameless = CachedMap::builder(&table, |_| CacheKey::from(""), async |_| Ok::<_, Infallible>(1)).build();
    for rounds in [rounds(&failing), rounds(&roomless), rounds(&nameless)] {
        assert!((2..=30).contains(&rounds), "{rounds}");
    }
    assert!((2..=60).contains(&(source.loads().len())));
    let slow = CachedMap::builder(&table, key, async |_| Err::<u64, _>("down")).retry_pause(LIMIT).build();
    assert!(run(slow.wait(&1)).is_err());
    assert_eq!(rounds(&slow), 0, "it is in the pause");
}

#[test]
fn a_wait_for_a_key_that_lets_a_broken_source_rest_ends_when_another_task_has_loaded() {
    let is_down = Arc::new(AtomicU64::new(1));
    let map = CachedMap::builder(&anonymous(), key, {
        let is_down = Arc::clone(&is_down);
        move |number| {
            let is_down = Arc::clone(&is_down);
            async move { if is_down.load(SeqCst) == 1 { Err("down") } else { Ok(number) } }
        }
    })
    .retry_pause(LIMIT * 100)
    .build();
    assert!(run(map.wait(&1)).is_err());
    let mut wait = Polled::new(map.wait(&1));
    falls_asleep(&mut wait);
    is_down.store(0, SeqCst);
    assert_eq!(*run(map.get(&1)).unwrap(), 1);
    assert_eq!(*wait.finish().unwrap(), 1);
}

#[test]
fn without_a_table_a_loop_of_waits_goes_slowly() {
    let (folder, path) = path();
    let table = Table::options().outage_ttl(Duration::from_millis(200)).open(&path).unwrap();
    let source = Numbers::open();
    let map = source.builder(&table).build();
    run(map.get(&1)).unwrap();
    drop(folder);
    run(async {
        let waits = async {
            loop {
                map.wait(&1).await.unwrap();
            }
        };
        smol::future::or(pause(Duration::from_millis(1500)), waits).await;
    });
    let loads = source.loads().len();
    assert!((2..=10).contains(&loads), "{loads}");
}

//! Guards against SIGKILL at random points: survivors go on and wake up, no update is lost, no key is claimed twice.

mod support;

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use gensync::{GenerationSynchronizer, Table, WaitSet};
use support::{
    Child, LIMIT, alone, await_value, dawdle, in_child, is_overslept, micros, path, shared_words, system_calls, tables,
};

const KEYS: usize = 3000;
const KILLS: usize = 300;

/// Kills children in the middle of `work` again and again, after some time that differs.
fn kill_again_and_again(table: &Table, work: impl Fn(&Table, usize)) {
    let started = &shared_words(1)[0];
    for round in 0..KILLS {
        started.store(0, SeqCst);
        let child = in_child(|| {
            started.store(1, SeqCst);
            for i in round.. {
                work(table, i);
            }
        });
        support::await_value(started, 1);
        let start = Instant::now();
        while start.elapsed() < Duration::from_micros(37 * (round as u64 % 50)) {}
        child.kill();
    }
}

fn assert_whole(table: &Table) {
    let digests: Vec<_> = table.slots().map(|slot| slot.digest()).collect();
    let unique: std::collections::HashSet<_> = digests.iter().collect();
    assert_eq!(unique.len(), digests.len(), "a key is there twice");
    for i in 0..KEYS {
        let sync = GenerationSynchronizer::new(table, format!("key {i}")).unwrap();
        let other = GenerationSynchronizer::new(table, format!("key {i}")).unwrap();
        let generation = other.mark_updated().unwrap();
        assert!(sync.is_expired());
        assert_eq!(sync.refresh().unwrap(), generation);
        assert!(!sync.is_expired());
    }
    assert_eq!(table.stats().keys, KEYS as u64);
}

#[test]
fn killed_while_claiming_and_growing() {
    let (_folder, path) = path();
    let table = Table::options().capacity(4).open(&path).unwrap();
    kill_again_and_again(&table, |table, i| {
        drop(GenerationSynchronizer::new(table, format!("key {}", i % KEYS)).unwrap())
    });
    assert_whole(&table);
}

#[test]
fn killed_while_updating() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let reader = GenerationSynchronizer::new(&table, "key 0").unwrap();
    // How many updates had returned when their maker was killed.
    let returned = &shared_words(1)[0];
    let before = reader.sync_gen().unwrap().get();
    kill_again_and_again(&table, |table, _| {
        let sync = GenerationSynchronizer::new(table, "key 0").unwrap();
        for _ in 0..100 {
            sync.mark_updated().unwrap();
            returned.fetch_add(1, SeqCst);
        }
    });
    assert!(reader.is_expired());
    let updates = reader.refresh().unwrap().get() - before;
    let returned = returned.load(SeqCst);
    assert!((returned..=returned + KILLS as u64).contains(&updates), "{updates} updates, {returned} returned");
    assert_whole(&table);
}

#[test]
fn killed_while_resetting() {
    let (folder, path) = path();
    let table = Table::options().capacity(64).open(&path).unwrap();
    let survivor = GenerationSynchronizer::new(&table, "key 0").unwrap();
    for _ in 0..3 {
        kill_again_and_again(&table, |table, _| table.reset().unwrap());
        // The last one may have been killed before it did anything.
        let writer = GenerationSynchronizer::new(&Table::open(&path).unwrap(), "key 0").unwrap();
        writer.mark_updated().unwrap();
        assert!(survivor.is_expired());
        survivor.refresh().unwrap();
        assert!(!survivor.is_expired());
        writer.mark_updated().unwrap();
        assert!(survivor.is_expired(), "two tables where one should be");
    }
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.len() <= 2, "unfinished files pile up: {names:?}");
    assert_whole(&table);
}

#[test]
fn killed_while_creating() {
    let folder = tempfile::tempdir().unwrap();
    let started = &shared_words(1)[0];
    for round in 0..KILLS {
        let path = folder.path().join(format!("table {round}"));
        started.store(0, SeqCst);
        let child: Child = in_child(|| {
            started.store(1, SeqCst);
            loop {
                drop(Table::open(&path).unwrap());
                std::fs::remove_file(&path).unwrap();
            }
        });
        support::await_value(started, 1);
        let start = Instant::now();
        while start.elapsed() < Duration::from_micros(20 * (round as u64 % 25)) {}
        child.kill();
        // Either the whole table is there or nothing is.
        if path.exists() {
            Table::options().create(false).open(&path).unwrap();
            std::fs::remove_file(&path).unwrap();
        }
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "a killed process left something behind");
}

/// The state of a reader that is asked for it at each use.
struct Reader<'a> {
    sync: GenerationSynchronizer,
    source: &'a AtomicU64,
    state: u64,
}

impl<'a> Reader<'a> {
    fn new(table: &Table, source: &'a AtomicU64) -> Self {
        let sync = GenerationSynchronizer::new(table, "key 0").unwrap();
        let state = sync.refresh_with(|| Ok::<_, ()>(source.load(SeqCst))).unwrap();
        Self { sync, source, state }
    }

    fn get(&mut self) -> u64 {
        if self.sync.is_expired() {
            self.state = self.sync.refresh_with(|| Ok::<_, ()>(self.source.load(SeqCst))).unwrap();
        }
        self.state
    }

    /// There are no updates any more: what was committed must be seen, even if every process that could announce it was killed.
    fn await_source(&mut self) {
        let start = Instant::now();
        while self.get() != self.source.load(SeqCst) {
            assert!(start.elapsed() < Duration::from_secs(20), "stale for good");
        }
    }
}

#[test]
fn killed_within_updates_that_two_processes_make() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let words = shared_words(2);
    let (source, announced) = (&words[0], &words[1]);
    let mut reader = Reader::new(&table, source);
    // Another one lives through all of it, checked against the updates that have returned.
    let stop = &shared_words(1)[0];
    let witness = in_child(|| {
        let mut reader = Reader::new(&table, source);
        while stop.load(SeqCst) == 0 {
            let before = announced.load(SeqCst);
            assert!(reader.get() >= before, "an update that returned is not seen");
        }
        reader.await_source();
    });
    let work = |table: &Table| {
        let sync = GenerationSynchronizer::new(table, "key 0").unwrap();
        for _ in 0..50 {
            let committed = sync.update(|| Ok::<_, ()>(source.fetch_add(1, SeqCst) + 1)).unwrap();
            announced.fetch_max(committed, SeqCst);
        }
    };
    for _ in 0..10 {
        let other = in_child(|| {
            loop {
                work(&table);
            }
        });
        for round in 0..KILLS / 10 {
            let started = &shared_words(1)[0];
            let child = in_child(|| {
                started.store(1, SeqCst);
                loop {
                    work(&table);
                }
            });
            support::await_value(started, 1);
            let start = Instant::now();
            while start.elapsed() < Duration::from_micros(53 * (round as u64 % 30)) {}
            child.kill();
            if round == KILLS / 20 {
                table.reset().unwrap();
            }
        }
        other.kill();
        reader.await_source();
    }
    stop.store(1, SeqCst);
    witness.succeeds();
    assert!(source.load(SeqCst) > 1000, "nothing was going on");
    // An updater that was killed before its commit has left its count, until a process checks.
    let start = Instant::now();
    while table.slots().any(|slot| slot.pending() > 0) {
        assert!(start.elapsed() < Duration::from_secs(20), "pending for good");
        reader.get();
    }
}

fn attach<const COUNT: usize>(table: &Table, keys: [&str; COUNT]) -> [GenerationSynchronizer; COUNT] {
    keys.map(|key| GenerationSynchronizer::new(table, key).unwrap())
}

/// Waits for all of `syncs`, of which the first one will be updated.
fn wait(syncs: &[GenerationSynchronizer], limit: Duration) -> bool {
    match syncs {
        [one] => one.wait_timeout(limit).is_changed(),
        several => several.iter().collect::<WaitSet<'_>>().wait_timeout(limit) == [0],
    }
}

#[test]
fn a_waiter_that_was_killed_costs_one_wake_once() {
    let table = Table::options().anonymous().unwrap();
    let syncs = attach(&table, ["key", "other"]);
    let update = || _ = syncs[0].mark_updated().unwrap();
    let base = system_calls(|| ());
    for members in [&syncs[..1], &syncs[..]] {
        for killed in [1, 10] {
            let waiters: Vec<_> = (0..killed).map(|_| in_child(|| assert!(!wait(members, LIMIT)))).collect();
            waiters.iter().for_each(Child::await_sleep);
            waiters.into_iter().for_each(Child::kill);
            assert_eq!(system_calls(update), base + 1);
            assert_eq!(system_calls(|| (0..100).for_each(|_| update())), base, "it was paid for before");
            syncs[0].refresh().unwrap();
        }
    }
}

#[test]
fn killed_while_waiting() {
    tables(|table| {
        let words = shared_words(5);
        let (started, overslept, change, woken) = (&words[0], &words[1], &words[2], &words[3..]);
        let syncs = attach(table, ["key", "other"]);
        let writer = &attach(table, ["key"])[0];
        let members = [&syncs[..1], &syncs[..]];
        let _survivors: Vec<_> = (0..2)
            .map(|survivor| {
                in_child(move || {
                    loop {
                        let start = micros();
                        assert!(wait(members[survivor], LIMIT));
                        overslept.fetch_add(is_overslept(start, change.load(SeqCst)).into(), SeqCst);
                        let generation = members[survivor][0].refresh().unwrap();
                        woken[survivor].store(generation.get(), SeqCst);
                    }
                })
            })
            .collect();
        let mut random = 1;
        for round in 0..KILLS {
            started.store(0, SeqCst);
            let victim = in_child(|| {
                started.store(1, SeqCst);
                let mut random = round as u64 + 1;
                loop {
                    wait(members[round % 2], Duration::from_micros(40));
                    dawdle(&mut random, 5);
                }
            });
            await_value(started, 1);
            dawdle(&mut random, 200);
            // Killed before the update, or in the middle of being woken.
            let mut victim = Some(victim);
            if round % 3 == 0 {
                drop(victim.take());
            }
            change.store(micros(), SeqCst);
            let generation = writer.mark_updated().unwrap().get();
            drop(victim);
            let start = Instant::now();
            while woken.iter().any(|woken| woken.load(SeqCst) < generation) {
                assert!(start.elapsed() < LIMIT, "a waiter missed an update after {round} kills");
                std::thread::yield_now();
            }
        }
        assert_eq!(overslept.load(SeqCst), 0, "a wakeup was lost");
    });
}

/// Each kill may leave waiters that notice half a second later: so there is a key for each, and one waiter for all.
#[test]
fn killed_while_updating_what_others_wait_for() {
    alone(|| {
        tables(|table| {
            let words = shared_words(3 * KILLS + 2);
            let (sources, rest) = words.split_at(KILLS);
            let (loaded, flags) = rest.split_at(2 * KILLS);
            let (ready, started) = (&flags[0], &flags[1]);
            let attach = || -> Vec<_> {
                (0..KILLS).map(|key| GenerationSynchronizer::new(table, format!("key {key}")).unwrap()).collect()
            };
            let syncs = attach();
            let load = |key: usize, sync: &GenerationSynchronizer, loaded: &[AtomicU64]| {
                let state = sync.refresh_with(|| Ok::<_, ()>(sources[key].load(SeqCst))).unwrap();
                loaded[key].store(state, SeqCst);
            };
            let _waiters = [
                in_child(|| {
                    std::thread::scope(|scope| {
                        for (key, sync) in syncs.iter().enumerate() {
                            scope.spawn(move || {
                                ready.fetch_add(1, SeqCst);
                                loop {
                                    sync.wait();
                                    load(key, sync, &loaded[..KILLS]);
                                }
                            });
                        }
                    });
                }),
                in_child(|| {
                    let set: WaitSet<'_> = syncs.iter().collect();
                    ready.fetch_add(1, SeqCst);
                    loop {
                        set.wait().into_iter().for_each(|key| load(key, &syncs[key], &loaded[KILLS..]));
                    }
                }),
            ];
            await_value(ready, KILLS as u64 + 1);
            let mut random = 1;
            let writers = attach();
            for (key, writer) in writers.iter().enumerate() {
                started.store(0, SeqCst);
                let victim = in_child(|| {
                    for round in 0_u64.. {
                        // The source is changed before an update that does not outlive its maker, and within one that does.
                        match round % 4 {
                            0 => writer.update(|| Ok::<_, ()>(sources[key].fetch_add(1, SeqCst))).map(drop).unwrap(),
                            _ => drop(writer.mark_updated().unwrap()),
                        }
                        started.store(1, SeqCst);
                    }
                });
                await_value(started, 1);
                dawdle(&mut random, 300);
                victim.kill();
            }
            // There are no updates any more.
            let start = Instant::now();
            let is_fresh =
                |(key, loaded): (usize, &AtomicU64)| loaded.load(SeqCst) == sources[key % KILLS].load(SeqCst);
            while !loaded.iter().enumerate().all(is_fresh) {
                assert!(start.elapsed() < LIMIT, "a waiter sleeps through an update");
                std::thread::yield_now();
            }
            while table.slots().any(|slot| slot.pending() > 0) {
                assert!(start.elapsed() < LIMIT, "pending for good, though a process waits");
            }
        });
    });
}

#[test]
fn killed_within_an_update_that_others_sleep_through() {
    tables(|table| {
        let syncs: Vec<_> = attach(table, ["key", "other"]).into();
        let third = &attach(&Table::options().anonymous().unwrap(), ["key"])[0];
        let several: Vec<_> = [&syncs[0], &syncs[1], third].map(Clone::clone).into();
        for changed in [false, true] {
            let words = shared_words(2);
            let (source, there) = (&words[0], &words[1]);
            let waiters = [&syncs[..1], &syncs[..], &several[..]]
                .map(|members| in_child(move || assert!(wait(members, LIMIT), "stale for good")));
            waiters.iter().for_each(Child::await_sleep);
            let maker = in_child(|| {
                let _update = syncs[0].begin_update().unwrap();
                source.fetch_add(u64::from(changed), SeqCst);
                there.store(1, SeqCst);
                std::thread::sleep(Duration::MAX);
            });
            await_value(there, 1);
            waiters.iter().for_each(Child::await_sleep);
            maker.kill();
            waiters.into_iter().for_each(Child::succeeds);
            assert!(wait(&syncs[..1], LIMIT) && wait(&several, LIMIT));
            several[0].refresh().unwrap();
            syncs[0].refresh().unwrap();
            assert!(!wait(&syncs, Duration::from_millis(5)), "it is recovered once, not again and again");
        }
    });
}

#[test]
fn killed_while_resetting_the_table_that_others_wait_in() {
    let (_folder, path) = path();
    let table = Table::options().capacity(64).open(&path).unwrap();
    let words = shared_words(4);
    let (started, source, loaded) = (&words[0], &words[1], &words[2..]);
    let syncs = attach(&table, ["key", "other"]);
    let members = [&syncs[..1], &syncs[..]];
    let _waiters: Vec<_> = (0..2)
        .map(|waiter| {
            in_child(move || {
                loop {
                    wait(members[waiter], LIMIT);
                    let load = || Ok::<_, ()>(source.load(SeqCst));
                    let state = members[waiter].iter().map(|sync| sync.refresh_with(load).unwrap()).min();
                    loaded[waiter].store(state.unwrap(), SeqCst);
                }
            })
        })
        .collect();
    let mut random = 1;
    for round in 0..KILLS {
        started.store(0, SeqCst);
        let resetter = in_child(|| {
            started.store(1, SeqCst);
            table.reset().unwrap();
        });
        await_value(started, 1);
        dawdle(&mut random, 400);
        resetter.kill();
        // By a process that has had the table open all the time, and by one that opens it now.
        let table = if round % 2 == 0 { table.clone() } else { Table::open(&path).unwrap() };
        let state = source.fetch_add(1, SeqCst) + 1;
        attach(&table, ["key"])[0].mark_updated().unwrap();
        let start = Instant::now();
        while loaded.iter().any(|loaded| loaded.load(SeqCst) < state) {
            assert!(start.elapsed() < LIMIT, "a waiter stays with a table that is gone, after {round} kills");
            std::thread::yield_now();
        }
    }
}

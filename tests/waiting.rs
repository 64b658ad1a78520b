//! Guards against waits that sleep through a change, end without one, or keep the processor busy.

#![expect(unsafe_code, reason = "a signal sets the clock back in the middle of a wait")]

mod support;

use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use gensync::{GenerationSynchronizer, Table, WaitSet, Waited};
use nix::sys::signal::{Signal, kill};
use support::{
    Child, LIMIT, await_value, be_interrupted, dawdle, in_child, interruptions, is_overslept, micros, path,
    shared_words, system_calls, tables,
};

const NOT_YET: Duration = Duration::from_millis(20);

fn attach(table: &Table, key: &str) -> GenerationSynchronizer {
    GenerationSynchronizer::new(table, key).unwrap()
}

fn anonymous() -> Table {
    Table::options().anonymous().unwrap()
}

fn read_only(path: &Path) -> Table {
    Table::options().read_only(true).open(path).unwrap()
}

/// The ways to wait for the first of `syncs`.
const WAYS: [fn(&[GenerationSynchronizer], Duration) -> bool; 3] = [
    |syncs, limit| syncs[0].wait_timeout(limit).is_changed(),
    // On the key's wake word, as there is nothing else to wait for.
    |syncs, limit| syncs.iter().take(1).collect::<WaitSet<'_>>().wait_timeout(limit) == [0],
    |syncs, limit| syncs.iter().collect::<WaitSet<'_>>().wait_timeout(limit) == [0],
];

fn time_out(syncs: &[GenerationSynchronizer]) {
    for way in WAYS {
        let start = Instant::now();
        assert!(!way(syncs, NOT_YET), "nothing has changed");
        assert!(start.elapsed() >= NOT_YET, "it did not wait");
    }
}

#[test]
fn an_update_before_the_wait_ends_it_at_once() {
    tables(|table| {
        let syncs = ["key", "other"].map(|key| attach(table, key));
        in_child(|| _ = attach(table, "key").mark_updated().unwrap()).succeeds();
        // As often as it is asked for, and whatever the time.
        for way in WAYS {
            assert!(way(&syncs, LIMIT) && way(&syncs, Duration::ZERO));
        }
        assert_eq!(syncs[0].wait_deadline(Instant::now()), Waited::Changed);
        let past = Instant::now() - Duration::from_millis(1);
        assert_eq!(syncs[0].wait_deadline(past), Waited::Changed);
        assert_eq!(syncs.iter().collect::<WaitSet<'_>>().wait_deadline(past), [0]);
        syncs[0].wait();
        syncs[0].refresh().unwrap();
        time_out(&syncs);
    });
}

#[test]
fn without_a_change_a_wait_ends_when_its_time_is_up() {
    tables(|table| {
        let syncs = ["key", "other"].map(|key| attach(table, key));
        time_out(&syncs);
        let set: WaitSet<'_> = syncs.iter().collect();
        for past in [Instant::now(), Instant::now() - Duration::from_millis(1)] {
            assert_eq!(syncs[0].wait_deadline(past), Waited::TimedOut);
            assert!(set.wait_deadline(past).is_empty());
        }
        assert_eq!(syncs[0].wait_timeout(Duration::ZERO), Waited::TimedOut);
        assert!(set.wait_timeout(Duration::ZERO).is_empty());
        // Longer than a process sleeps at once.
        let deadline = Instant::now() + Duration::from_millis(600);
        assert_eq!(syncs[0].wait_deadline(deadline), Waited::TimedOut);
        assert!(Instant::now() >= deadline);
    });
}

#[test]
fn a_wait_without_end_ends_with_a_change() {
    tables(|table| {
        for way in WAYS {
            let syncs = ["key", "other"].map(|key| attach(table, key));
            let waiter = in_child(|| assert!(way(&syncs, Duration::MAX)));
            waiter.await_sleep();
            syncs[0].mark_updated().unwrap();
            waiter.succeeds();
        }
    });
}

#[test]
fn ones_own_update_does_not_end_ones_own_wait() {
    tables(|table| {
        let syncs = ["key", "other"].map(|key| attach(table, key));
        syncs[0].mark_updated().unwrap();
        syncs[0].update(|| Ok::<_, ()>(())).unwrap();
        time_out(&syncs);
        syncs[0].clear().unwrap();
        assert!(syncs[0].wait_timeout(LIMIT).is_changed(), "it was cleared for its maker, too");
    });
}

#[test]
fn an_update_of_another_key_ends_no_wait() {
    tables(|table| {
        let words = shared_words(1);
        let syncs = ["key", "other"].map(|key| attach(table, key));
        let third = attach(table, "third");
        let waiters = WAYS.map(|way| {
            in_child(|| {
                assert!(way(&syncs, LIMIT));
                words[0].fetch_add(1, SeqCst);
            })
        });
        for _ in 0..100 {
            waiters.iter().for_each(Child::await_sleep);
            third.mark_updated().unwrap();
        }
        assert_eq!(words[0].load(SeqCst), 0);
        syncs[0].mark_updated().unwrap();
        waiters.into_iter().for_each(Child::succeeds);
    });
}

#[test]
fn several_updates_are_reported_as_one() {
    tables(|table| {
        let syncs = ["key", "other"].map(|key| attach(table, key));
        in_child(|| (0..100).for_each(|_| _ = attach(table, "key").mark_updated().unwrap())).succeeds();
        assert!(syncs[0].wait_timeout(LIMIT).is_changed());
        syncs[0].refresh().unwrap();
        time_out(&syncs);
    });
}

#[test]
fn sixty_four_processes_wake_by_one_update() {
    tables(|table| {
        let words = shared_words(2);
        let (overslept, change) = (&words[0], &words[1]);
        let syncs = ["key", "other"].map(|key| attach(table, key));
        for _ in 0..2 {
            let waiters: Vec<_> = (0..64)
                .map(|i| {
                    in_child(|| {
                        let start = micros();
                        assert!(WAYS[i % WAYS.len()](&syncs, LIMIT));
                        overslept.fetch_add(is_overslept(start, change.load(SeqCst)).into(), SeqCst);
                    })
                })
                .collect();
            waiters.iter().for_each(Child::await_sleep);
            change.store(micros(), SeqCst);
            syncs[0].mark_updated().unwrap();
            waiters.into_iter().for_each(Child::succeeds);
            syncs[0].refresh().unwrap();
        }
        assert_eq!(overslept.load(SeqCst), 0);
    });
}

/// What processes of a storm of updates share.
struct Storm<'a> {
    /// The two keys of the first table, and that of the second.
    syncs: [GenerationSynchronizer; KEYS],
    /// The source of each key.
    versions: &'a [AtomicU64],
    /// When each was last updated.
    changes: &'a [AtomicU64],
    /// Which version each waiter has loaded.
    loaded: &'a [AtomicU64],
    overslept: &'a AtomicU64,
}

const KEYS: usize = 3;

/// The keys that each waiter waits for, and how long at a time.
const WAITERS: [(&[usize], Duration); 7] = [
    (&[0], Duration::MAX),
    (&[0], Duration::MAX),
    // Marks again and again that it waits, and then does not wait.
    (&[0], Duration::from_micros(30)),
    (&[1], Duration::MAX),
    (&[0, 1], Duration::MAX),
    (&[0, 1, 2], Duration::MAX),
    (&[1, 2], Duration::from_micros(100)),
];

impl Storm<'_> {
    fn wait_and_load(&self, waiter: usize) {
        let (keys, limit) = WAITERS[waiter];
        let syncs: Vec<_> = keys.iter().map(|&key| self.syncs[key].clone()).collect();
        let set: WaitSet<'_> = syncs.iter().collect();
        let mut random = waiter as u64 + 1;
        loop {
            let start = micros();
            let changed = match &syncs[..] {
                [one] => Vec::from_iter(one.wait_timeout(limit).is_changed().then_some(0)),
                _ => set.wait_timeout(limit),
            };
            for position in changed {
                let key = keys[position];
                let change = self.changes[key].load(SeqCst);
                self.overslept.fetch_add(is_overslept(start, change).into(), SeqCst);
                // Some see one of two updates, and others both.
                dawdle(&mut random, 5);
                let load = || Ok::<_, ()>(self.versions[key].load(SeqCst));
                let version = syncs[position].refresh_with(load).unwrap();
                self.loaded[waiter * KEYS + key].store(version, SeqCst);
            }
            dawdle(&mut random, 10);
        }
    }

    fn update(&self, key: usize, round: u64) {
        let version = self.versions[key].fetch_add(1, SeqCst) + 1;
        self.changes[key].store(micros(), SeqCst);
        match round % 16 {
            0 => self.syncs[key].clear().unwrap(),
            1 => self.syncs[key].update(|| Ok::<_, ()>(())).unwrap(),
            _ => _ = self.syncs[key].mark_updated().unwrap(),
        }
        for waiter in (0..WAITERS.len()).filter(|&waiter| WAITERS[waiter].0.contains(&key)) {
            let start = Instant::now();
            while self.loaded[waiter * KEYS + key].load(SeqCst) < version {
                assert!(start.elapsed() < LIMIT, "waiter {waiter} missed a change of key {key} in round {round}");
                std::thread::yield_now();
            }
        }
    }
}

/// In each round two updaters make one update each, and then none until all have loaded it: a waiter that sleeps through it finds
/// it only at its own next look, as nothing else wakes it.
#[test]
fn no_wake_up_is_lost_between_two_updaters_and_many_waiters() {
    const ROUNDS: u64 = 3000;
    let (_folder, path) = path();
    for [first, second] in [[anonymous(), anonymous()], [Table::open(&path).unwrap(), anonymous()]] {
        let words = shared_words(2 * KEYS + WAITERS.len() * KEYS + 3);
        let (versions, rest) = words.split_at(KEYS);
        let (changes, rest) = rest.split_at(KEYS);
        let (loaded, rest) = rest.split_at(WAITERS.len() * KEYS);
        let (overslept, rounds) = (&rest[0], &rest[1..]);
        let syncs = [attach(&first, "0"), attach(&first, "1"), attach(&second, "2")];
        let storm = Storm { syncs, versions, changes, loaded, overslept };
        let _waiters: Vec<_> = (0..WAITERS.len()).map(|waiter| in_child(|| storm.wait_and_load(waiter))).collect();
        let updaters = [0, 1].map(|updater| {
            let (storm, rounds) = (&storm, &rounds);
            in_child(move || {
                let mut random = updater as u64 + 100;
                for round in 0..ROUNDS {
                    rounds[updater].store(round, SeqCst);
                    await_value(&rounds[1 - updater], round);
                    dawdle(&mut random, 20);
                    // Mostly the same.
                    let key = [0, 0, 1, 0, 2, random as usize % KEYS][round as usize % 6];
                    storm.update(key, round);
                }
                rounds[updater].store(ROUNDS, SeqCst);
            })
        });
        updaters.into_iter().for_each(Child::succeeds);
        assert_eq!(overslept.load(SeqCst), 0, "a wakeup was lost");
    }
}

#[test]
fn a_set_reports_which_keys_have_changed() {
    let (_folder, path) = path();
    let (file, other) = (Table::open(&path).unwrap(), anonymous());
    let keys = [(&file, "a"), (&file, "b"), (&other, "a"), (&other, "b"), (&file, "c")];
    let syncs = keys.map(|(table, key)| attach(table, key));
    let mut set = WaitSet::new();
    assert_eq!(syncs.each_ref().map(|sync| set.add(sync)), [0, 1, 2, 3, 4]);
    assert_eq!(set.members().len(), 5);
    for changed in [vec![0], vec![3], vec![1, 2], vec![0, 1, 2, 3, 4], vec![4]] {
        let waiter = in_child(|| {
            // Some may be updated when it is awake again.
            let mut reported = vec![];
            while reported.len() < changed.len() {
                for position in set.wait_timeout(LIMIT) {
                    syncs[position].refresh().unwrap();
                    reported.push(position);
                }
            }
            reported.sort_unstable();
            assert_eq!(reported, changed);
        });
        waiter.await_sleep();
        changed.iter().for_each(|&position| _ = attach(keys[position].0, keys[position].1).mark_updated().unwrap());
        waiter.succeeds();
        assert_eq!(set.wait(), changed);
        assert_eq!(set.wait_timeout(LIMIT), changed, "they are reported until they are loaded");
        changed.iter().for_each(|&position| _ = syncs[position].refresh().unwrap());
        assert!(set.wait_timeout(Duration::ZERO).is_empty());
    }
}

#[test]
fn a_key_may_stand_in_a_set_more_than_once() {
    let table = anonymous();
    let syncs = ["key", "other", "key"].map(|key| attach(&table, key));
    let set: WaitSet<'_> = syncs.iter().chain(&syncs[..1]).collect();
    attach(&table, "key").mark_updated().unwrap();
    assert_eq!(set.wait(), [0, 2, 3]);
    syncs[0].refresh().unwrap();
    assert_eq!(set.wait(), [2], "each has seen what it has");
}

#[test]
fn a_set_may_have_more_tables_than_a_process_can_sleep_on() {
    const TABLES: usize = 140;
    let tables: Vec<_> = (0..TABLES).map(|_| Table::options().capacity(1).anonymous().unwrap()).collect();
    let syncs: Vec<_> = tables.iter().map(|table| attach(table, "key")).collect();
    for count in [127, 128, 129, TABLES] {
        for changed in [0, count / 2, count - 1] {
            let waiter = in_child(|| {
                assert_eq!(syncs[..count].iter().collect::<WaitSet<'_>>().wait_timeout(LIMIT), [changed]);
            });
            waiter.await_sleep();
            syncs[changed].mark_updated().unwrap();
            waiter.succeeds();
        }
    }
}

#[test]
fn an_empty_set_can_be_waited_for_with_a_limit_only() {
    let set = WaitSet::new();
    let start = Instant::now();
    assert!(set.wait_timeout(NOT_YET).is_empty());
    assert!(start.elapsed() >= NOT_YET);
    assert!(set.wait_deadline(start).is_empty());
    let panic = std::panic::catch_unwind(|| set.wait()).unwrap_err();
    assert!(panic.downcast_ref::<&str>().unwrap().contains("waiting for nothing"));
}

#[test]
fn a_process_that_can_only_read_a_table_waits_for_others_updates() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let other = anonymous();
    let writer = attach(&table, "key");
    attach(&table, "other");
    let reader = read_only(&path);
    for _ in 0..5 {
        let syncs = [attach(&reader, "key"), attach(&reader, "other"), attach(&other, "other")];
        let waiters = WAYS.map(|way| in_child(|| assert!(way(&syncs, LIMIT))));
        waiters.iter().for_each(Child::await_sleep);
        writer.mark_updated().unwrap();
        waiters.into_iter().for_each(Child::succeeds);
        // It does not keep others from being woken.
        let waiter = in_child(|| assert_eq!(syncs[1..].iter().collect::<WaitSet<'_>>().wait_timeout(LIMIT), [1]));
        waiter.await_sleep();
        attach(&other, "other").mark_updated().unwrap();
        waiter.succeeds();
    }
    let reader = attach(&reader, "key");
    assert!(reader.wait_timeout(NOT_YET).is_timed_out());
    // Through a reset, and past a deletion.
    table.reset().unwrap();
    drop(attach(&table, "key"));
    assert!(reader.wait_timeout(LIMIT).is_changed());
    reader.refresh().unwrap();
    assert!(reader.wait_timeout(NOT_YET).is_timed_out());
    std::fs::remove_file(&path).unwrap();
    assert!(reader.wait_timeout(LIMIT).is_changed());
}

#[test]
fn signals_do_not_end_a_wait() {
    const SIGNALS: u64 = 300;
    tables(|table| {
        let syncs = ["key", "other"].map(|key| attach(table, key));
        for way in WAYS {
            let words = shared_words(2);
            let (ready, returned) = (&words[0], &words[1]);
            let waiter = in_child(|| {
                be_interrupted();
                ready.store(1, SeqCst);
                assert!(way(&syncs, LIMIT));
                assert_eq!(interruptions(), SIGNALS, "it was not put to the test");
                returned.store(1, SeqCst);
                // Nor do they make it longer.
                syncs[0].refresh().unwrap();
                assert!(!way(&syncs, NOT_YET));
                ready.store(2, SeqCst);
            });
            await_value(ready, 1);
            for _ in 0..SIGNALS {
                waiter.await_sleep();
                kill(waiter.pid(), Signal::SIGUSR1).unwrap();
            }
            waiter.await_sleep();
            assert_eq!(returned.load(SeqCst), 0, "a signal ended it");
            syncs[0].mark_updated().unwrap();
            let start = Instant::now();
            while ready.load(SeqCst) < 2 {
                assert!(start.elapsed() < LIMIT, "signals make a wait longer");
                if returned.load(SeqCst) == 1 {
                    kill(waiter.pid(), Signal::SIGUSR1).unwrap();
                }
                std::thread::yield_now();
            }
            waiter.succeeds();
        }
    });
}

static TODAY: AtomicI32 = AtomicI32::new(-1);

extern "C" fn set_the_clock_back(_: i32) {
    // SAFETY: a system call, with a descriptor that stays open.
    unsafe { nix::libc::setns(TODAY.load(SeqCst), nix::libc::CLONE_NEWTIME) };
}

#[test]
fn a_wait_with_a_limit_does_not_stand_still_when_the_clock_is_set_back() {
    use nix::sched::{CloneFlags, setns, unshare};
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, sigaction};
    let newtime = CloneFlags::from_bits_retain(nix::libc::CLONE_NEWTIME);
    let cached = gensync::Cached::new(attach(&anonymous(), "key"), || Ok::<_, std::io::Error>(1));
    cached.get().unwrap();
    let broken = gensync::Cached::builder(attach(&anonymous(), "key"), || Err::<u64, _>(std::io::Error::other("down")))
        .retry_pause(Duration::MAX)
        .build()
        .unwrap();
    let table = anonymous();
    let (sync, other) = (attach(&table, "key"), attach(&table, "other"));
    const TIME: Duration = Duration::from_millis(1500);
    let waits: [&dyn Fn(); 5] = [
        &|| assert!(sync.wait_timeout(TIME).is_timed_out()),
        &|| assert!(WaitSet::from_iter([&sync, &other]).wait_timeout(TIME).is_empty()),
        &|| assert!(table.watch().next_timeout(TIME).is_none()),
        &|| assert!(cached.wait_timeout(TIME).unwrap().is_none()),
        // Whether it tries again then, or its time is up.
        &|| assert!(broken.get().is_err() && !matches!(broken.wait_timeout(TIME), Ok(Some(_)))),
    ];
    for (index, wait) in waits.iter().enumerate() {
        let words = shared_words(1);
        let waiter = in_child(|| {
            // A process may be moved to a clock that is a day ahead, and back again: as a restored checkpoint's is.
            let today = std::fs::File::open("/proc/self/ns/time").unwrap();
            if let Err(error) = unshare(newtime) {
                eprintln!("skipped, as clocks cannot be set apart here: {error}");
                return words[0].store(2, SeqCst);
            }
            std::fs::write("/proc/self/timens_offsets", "monotonic 86400 0\n").unwrap();
            setns(std::fs::File::open("/proc/self/ns/time_for_children").unwrap(), newtime).unwrap();
            TODAY.store(std::os::fd::AsRawFd::as_raw_fd(&today), SeqCst);
            let action = SigAction::new(SigHandler::Handler(set_the_clock_back), SaFlags::SA_RESTART, SigSet::empty());
            // SAFETY: the handler is async-signal-safe.
            unsafe { sigaction(Signal::SIGUSR1, &action) }.unwrap();
            words[0].store(1, SeqCst);
            wait();
            words[0].store(2, SeqCst);
        });
        let start = Instant::now();
        while words[0].load(SeqCst) == 0 {
            std::thread::yield_now();
        }
        if words[0].load(SeqCst) == 1 {
            waiter.await_sleep();
            kill(waiter.pid(), Signal::SIGUSR1).unwrap();
        }
        while words[0].load(SeqCst) < 2 {
            assert!(start.elapsed() < LIMIT, "wait {index} stands still until tomorrow");
            std::thread::sleep(Duration::from_millis(1));
        }
        waiter.succeeds();
    }
}

#[test]
fn a_child_forked_while_threads_wait_can_wait_itself() {
    tables(|table| {
        let words = shared_words(2);
        let (overslept, change) = (&words[0], &words[1]);
        let stop = AtomicU64::new(0);
        let syncs = ["key", "other"].map(|key| attach(table, key));
        std::thread::scope(|scope| {
            for way in WAYS {
                let (syncs, stop) = (&syncs, &stop);
                scope.spawn(move || {
                    let own = syncs.each_ref().map(Clone::clone);
                    while stop.load(SeqCst) == 0 {
                        assert!(way(&own, LIMIT), "the thread was disturbed");
                        own[0].refresh().unwrap();
                    }
                });
            }
            for round in 0..30 {
                let child = in_child(|| {
                    let start = micros();
                    assert!(WAYS[round % WAYS.len()](&syncs, LIMIT));
                    overslept.fetch_add(is_overslept(start, change.load(SeqCst)).into(), SeqCst);
                });
                child.await_sleep();
                change.store(micros(), SeqCst);
                attach(table, "key").mark_updated().unwrap();
                child.succeeds();
                syncs[0].refresh().unwrap();
            }
            stop.store(1, SeqCst);
            attach(table, "key").mark_updated().unwrap();
        });
        assert_eq!(overslept.load(SeqCst), 0);
    });
}

#[test]
fn an_abandoned_update_wakes_no_waiter_and_a_finished_one_wakes_all() {
    tables(|table| {
        let words = shared_words(3);
        let (returned, overslept, change) = (&words[0], &words[1], &words[2]);
        let syncs = ["key", "other"].map(|key| attach(table, key));
        let waiters = WAYS.map(|way| {
            in_child(|| {
                let start = micros();
                assert!(way(&syncs, LIMIT));
                returned.fetch_add(1, SeqCst);
                overslept.fetch_add(is_overslept(start, change.load(SeqCst)).into(), SeqCst);
            })
        });
        let writer = attach(table, "key");
        for _ in 0..100 {
            waiters.iter().for_each(Child::await_sleep);
            writer.begin_update().unwrap().abandon();
        }
        let update = writer.begin_update().unwrap();
        waiters.iter().for_each(Child::await_sleep);
        // Longer than they sleep at a time: they check for themselves, and look at the update's lock.
        std::thread::sleep(Duration::from_millis(600));
        assert_eq!(returned.load(SeqCst), 0);
        change.store(micros(), SeqCst);
        update.finish().unwrap();
        waiters.into_iter().for_each(Child::succeeds);
        assert_eq!(overslept.load(SeqCst), 0);
    });
}

#[test]
fn a_reset_wakes_all_sleepers_at_once() {
    tables(|table| {
        let words = shared_words(2);
        let (overslept, change) = (&words[0], &words[1]);
        for by_another in [false, true].repeat(5) {
            let syncs = ["key", "other"].map(|key| attach(table, key));
            let wait = |way: usize| {
                let start = micros();
                let limit = start + 20_000_000;
                // The set reports both.
                match way {
                    0 => assert!(syncs[0].wait_timeout(LIMIT).is_changed()),
                    _ => assert!(!syncs.iter().collect::<WaitSet<'_>>().wait_timeout(LIMIT).is_empty()),
                }
                assert!(micros() < limit);
                overslept.fetch_add(is_overslept(start, change.load(SeqCst)).into(), SeqCst);
                syncs[0].refresh().unwrap();
            };
            let waiters = [0, 1].map(|way| in_child(|| wait(way)));
            std::thread::scope(|scope| {
                // Of this process, too.
                scope.spawn(|| wait(0));
                waiters.iter().for_each(Child::await_sleep);
                change.store(micros(), SeqCst);
                match by_another {
                    true => in_child(|| table.reset().unwrap()).succeeds(),
                    false => table.reset().unwrap(),
                }
            });
            waiters.into_iter().for_each(Child::succeeds);
        }
        assert_eq!(overslept.load(SeqCst), 0);
    });
}

#[test]
fn waiters_find_out_that_the_file_was_deleted_or_replaced() {
    for replace in [false, true] {
        let (folder, path) = path();
        let table = Table::open(&path).unwrap();
        let other = anonymous();
        let syncs = [attach(&table, "key"), attach(&table, "other"), attach(&other, "key")];
        let set = |members: &[GenerationSynchronizer]| {
            let reported = members.iter().collect::<WaitSet<'_>>().wait_timeout(LIMIT);
            assert!(!reported.is_empty() && !reported.contains(&2));
        };
        let waiters = [
            in_child(|| assert!(syncs[0].wait_timeout(LIMIT).is_changed())),
            in_child(|| set(&syncs[..2])),
            in_child(|| set(&syncs)),
        ];
        waiters.iter().for_each(Child::await_sleep);
        match replace {
            false => std::fs::remove_file(&path).unwrap(),
            true => {
                let other = folder.path().join("other");
                attach(&Table::open(&other).unwrap(), "key");
                std::fs::rename(&other, &path).unwrap();
            }
        }
        let start = Instant::now();
        waiters.into_iter().for_each(Child::succeeds);
        assert!(start.elapsed() < Duration::from_millis(1500), "more than a look or two: {:?}", start.elapsed());
        // From then on they have the same table again.
        assert!(syncs[0].wait_timeout(LIMIT).is_changed());
        syncs[0].refresh().unwrap();
        let waiter = in_child(|| assert!(syncs[0].wait_timeout(LIMIT).is_changed()));
        waiter.await_sleep();
        attach(&Table::open(&path).unwrap(), "key").mark_updated().unwrap();
        waiter.succeeds();
    }
}

#[test]
fn without_a_table_waits_end_twice_a_second_and_not_more_often() {
    const RETURNS: u32 = 4;
    let other = anonymous();
    let wait = |several: bool| {
        let (folder, path) = path();
        let table = Table::open(&path).unwrap();
        let syncs = [attach(&table, "key"), attach(&other, "key")];
        drop(folder);
        let mut first = None;
        for _ in 0..=RETURNS {
            match several {
                true => assert_eq!(syncs.iter().collect::<WaitSet<'_>>().wait_timeout(LIMIT), [0]),
                false => assert!(syncs[0].wait_timeout(LIMIT).is_changed()),
            }
            syncs[0].refresh().unwrap_err();
            first.get_or_insert_with(Instant::now);
        }
        let elapsed = first.unwrap().elapsed();
        assert!(elapsed > RETURNS * Duration::from_millis(400), "a storm of loads: {elapsed:?}");
        // It is there again.
        std::fs::create_dir(path.parent().unwrap()).unwrap();
        let start = Instant::now();
        while syncs[0].refresh().is_err() {
            assert!(start.elapsed() < LIMIT);
            syncs[0].wait();
        }
        assert!(syncs[0].wait_timeout(NOT_YET).is_timed_out());
        std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
    };
    std::thread::scope(|scope| {
        for several in [false, true] {
            scope.spawn(move || wait(several));
        }
    });
}

#[test]
fn a_state_that_cannot_be_known_to_be_fresh_is_never_reported_fresh_when_the_time_is_up() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    drop((attach(&table, "key"), attach(&table, "other")));
    let reader = read_only(&path);
    let syncs = [attach(&reader, "key"), attach(&reader, "other")];
    // No process that may write attaches to the keys in the successor.
    table.reset().unwrap();
    for _ in 0..20 {
        let moment = Duration::from_micros(100);
        assert!(syncs[0].wait_timeout(moment).is_changed());
        assert_eq!(syncs.iter().collect::<WaitSet<'_>>().wait_timeout(moment), [0, 1]);
    }
}

/// The most reports for a loop that finds the same change for `time`: the first report, and then ever longer pauses.
fn most_reports(time: Duration) -> u32 {
    // 10, 20, 40 to 640 milliseconds are over after 1.27 seconds.
    8 + time.as_millis() as u32 / 1000
}

#[test]
fn a_loop_whose_loads_fail_goes_slowly_and_takes_another_change_at_once() {
    const TIME: Duration = Duration::from_secs(1);
    let (_folder, path) = path();
    let (file, memory) = (Table::open(&path).unwrap(), anonymous());
    [&file, &memory].iter().for_each(|table| drop([attach(table, "key"), attach(table, "other")]));
    for (writers, table) in [(&file, &file), (&memory, &memory), (&file, &read_only(&path))] {
        for way in WAYS {
            let syncs = ["key", "other"].map(|key| attach(table, key));
            let writer = attach(writers, "key");
            writer.mark_updated().unwrap();
            let (start, mut loads) = (Instant::now(), 0);
            while start.elapsed() < TIME {
                assert!(way(&syncs, LIMIT));
                let _ = syncs[0].refresh_with(|| Err::<(), _>("the source is down"));
                loads += 1;
            }
            assert!((3..=most_reports(start.elapsed())).contains(&loads), "{loads} loads");
            // The end of the time ends the pause, but what is reported is still so.
            let start = Instant::now();
            assert!(way(&syncs, NOT_YET));
            assert!(start.elapsed() < LIMIT / 40, "the time was up");
            // So does another change.
            assert!(way(&syncs, LIMIT));
            let start = Instant::now();
            std::thread::scope(|scope| {
                let waiter = scope.spawn(|| assert!(way(&syncs, LIMIT)));
                std::thread::sleep(NOT_YET);
                writer.mark_updated().unwrap();
                waiter.join().unwrap();
            });
            assert!(start.elapsed() < LIMIT / 40, "{:?}", start.elapsed());
            // What was adopted is not waited for, and the next change is new.
            syncs[0].refresh().unwrap();
            assert!(!way(&syncs, NOT_YET));
            writer.mark_updated().unwrap();
            assert!(way(&syncs, LIMIT));
        }
    }
}

#[test]
fn a_member_of_a_set_that_cannot_be_loaded_does_not_delay_the_others() {
    let table = anonymous();
    let syncs = ["bad", "good"].map(|key| attach(&table, key));
    let set: WaitSet<'_> = syncs.iter().collect();
    let writers = ["bad", "good"].map(|key| attach(&table, key));
    writers[0].mark_updated().unwrap();
    // Until the pause is half a second or more.
    (0..7).for_each(|_| assert_eq!(set.wait(), [0]));
    let mut late = 0;
    for _ in 0..5 {
        writers[1].mark_updated().unwrap();
        let start = Instant::now();
        assert_eq!(set.wait(), [0, 1]);
        late += u32::from(start.elapsed() > Duration::from_millis(200));
        syncs[1].refresh().unwrap();
    }
    assert_eq!(late, 0);
    assert_eq!(syncs.iter().collect::<WaitSet<'_>>().into_iter().count(), set.members().len());
    assert!((&set).into_iter().zip(&syncs).all(|(one, other)| std::ptr::eq(one, other)));
}

#[test]
fn threads_that_wait_with_one_synchronizer_are_all_woken_at_once() {
    let table = anonymous();
    let (sync, writer) = (attach(&table, "key"), attach(&table, "key"));
    for _ in 0..10 {
        let slept = Barrier::new(9);
        std::thread::scope(|scope| {
            let waiters = [(); 8].map(|()| {
                scope.spawn(|| {
                    slept.wait();
                    let start = Instant::now();
                    assert!(sync.wait_timeout(LIMIT).is_changed());
                    start.elapsed()
                })
            });
            slept.wait();
            std::thread::sleep(NOT_YET);
            writer.mark_updated().unwrap();
            for waiter in waiters {
                let elapsed = waiter.join().unwrap();
                assert!(elapsed < Duration::from_millis(400), "{elapsed:?}");
            }
        });
        sync.refresh().unwrap();
    }
}

#[test]
fn a_wait_makes_a_handful_of_system_calls() {
    const TIME: Duration = Duration::from_secs(2);
    let (_folder, path) = path();
    let (file, other) = (Table::open(&path).unwrap(), anonymous());
    let syncs = [attach(&file, "key"), attach(&file, "other"), attach(&other, "key")];
    let reader = [attach(&read_only(&path), "key")];
    let base = system_calls(|| ());
    std::thread::scope(|scope| {
        // Each sleeps at least four times, and looks at the file.
        for (members, most) in
            [(&syncs[..1], 24), (&syncs[..2], 24), (&syncs[..], 40), (&syncs[2..], 24), (&reader, 500)]
        {
            scope.spawn(move || {
                let calls =
                    system_calls(|| assert!(members.iter().collect::<WaitSet<'_>>().wait_timeout(TIME).is_empty()));
                assert!((4..=most).contains(&(calls - base)), "{} of {most} system calls", calls - base);
            });
        }
    });
}

#[test]
fn an_update_costs_a_system_call_only_if_somebody_waits() {
    let table = anonymous();
    let syncs = ["key", "other"].map(|key| attach(&table, key));
    let update = || _ = syncs[0].mark_updated().unwrap();
    let base = system_calls(|| ());
    assert_eq!(system_calls(|| (0..1000).for_each(|_| update())), base);
    for way in WAYS {
        syncs[0].refresh().unwrap();
        // Another process that waits, then one that has stopped waiting.
        let waiter = in_child(|| assert!(way(&syncs, LIMIT)));
        waiter.await_sleep();
        assert_eq!(system_calls(update), base + 1);
        waiter.succeeds();
        syncs[0].refresh().unwrap();
        assert!(!way(&syncs, NOT_YET));
        assert_eq!(system_calls(update), base + 1);
        assert_eq!(system_calls(|| (0..100).for_each(|_| update())), base, "it was paid for before");
    }
}

//! Guards against changes that tools, event loops and tasks do not notice, and against threads that outlive their purpose.

mod support;

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use gensync::{GenerationSynchronizer, Pollable, Table, WaitSet};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use support::{Child, await_value, in_child, is_overslept, micros, path, shared_words};

const LIMIT: Duration = Duration::from_secs(20);
const NOT_YET: Duration = Duration::from_millis(20);

fn attach(table: &Table, key: &str) -> GenerationSynchronizer {
    GenerationSynchronizer::new(table, key).unwrap()
}

fn anonymous() -> Table {
    Table::options().anonymous().unwrap()
}

fn is_readable(pollable: &Pollable, limit: Duration) -> bool {
    let timeout = PollTimeout::try_from(limit).unwrap();
    poll(&mut [PollFd::new(pollable.as_fd(), PollFlags::POLLIN)], timeout).unwrap() == 1
}

/// How many threads this process has that wait for updates.
fn notifiers() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let name = |task: std::io::Result<std::fs::DirEntry>| std::fs::read_to_string(task.unwrap().path().join("comm"));
    tasks.filter_map(|task| name(task).ok()).filter(|name| name == "gensync\n").count()
}

fn eventually(otherwise: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < LIMIT, "{otherwise}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_watch_reports_changes_of_other_processes_and_new_keys() {
    let (_folder, path) = path();
    let table = Table::options().capacity(4).open(&path).unwrap();
    let known = attach(&table, "known");
    for read_only in [false, true] {
        let mut watch = Table::options().read_only(read_only).open(&path).unwrap().watch();
        assert_eq!(watch.next_timeout(NOT_YET), None, "nothing has changed since the watch began");
        in_child(|| _ = known.mark_updated().unwrap()).succeeds();
        let change = watch.next().unwrap();
        assert_eq!((&*change.label(), Some(change.generation())), ("known", table.generation("known").unwrap()));
        // More than fit into the first segments.
        in_child(|| (0..100).for_each(|i| drop(attach(&table, &format!("{read_only} {i}"))))).succeeds();
        let new: HashSet<_> = (0..100).map(|_| watch.next_timeout(LIMIT).unwrap().label().into_owned()).collect();
        assert_eq!(new.len(), 100);
        assert_eq!(watch.next_timeout(NOT_YET), None);
    }
}

#[test]
fn a_watch_ends_with_the_last_generation_of_each_key() {
    const UPDATES: u64 = 20_000;
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let keys: Vec<_> = (0..20).map(|i| format!("key-{i}")).collect();
    let syncs: Vec<_> = keys.iter().map(|key| attach(&table, key)).collect();
    let mut watch = table.watch();
    let before: HashMap<_, _> = keys.iter().map(|key| (key.clone(), table.generation(key).unwrap().unwrap())).collect();
    let done = &shared_words(1)[0];
    let children = [0, 1].map(|first| {
        in_child(|| {
            for i in first..UPDATES {
                syncs[(i * 7) as usize % syncs.len()].mark_updated().unwrap();
            }
            done.fetch_add(1, SeqCst);
        })
    });
    let mut last = before.clone();
    let mut slow = 0;
    loop {
        let is_over = done.load(SeqCst) == 2;
        let start = Instant::now();
        match watch.next_timeout(LIMIT / 10) {
            Some(change) => {
                let generation = last.get_mut(&*change.label()).unwrap();
                assert!(change.generation() > *generation, "reported twice");
                *generation = change.generation();
                slow += u64::from(!is_over && start.elapsed() > Duration::from_millis(400));
            }
            None if is_over => break,
            None => {}
        }
        if keys.iter().all(|key| table.generation(key).unwrap() == Some(last[key])) && done.load(SeqCst) == 2 {
            break;
        }
    }
    children.into_iter().for_each(Child::succeeds);
    for key in &keys {
        assert_eq!(Some(last[key]), table.generation(key).unwrap(), "the last change of {key} was missed");
    }
    assert_eq!(slow, 0, "a wakeup was lost");
}

#[test]
fn a_watch_follows_a_table_that_is_reset_or_deleted() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let sync = attach(&table, "key");
    let mut watch = table.watch();
    for reset in [true, false] {
        match reset {
            true => in_child(|| table.reset().unwrap()).succeeds(),
            false => std::fs::remove_file(&path).unwrap(),
        }
        // Attached to again by any process that uses it.
        let user = in_child(|| {
            loop {
                sync.wait();
                sync.refresh().unwrap();
            }
        });
        let change =
            watch.next_timeout(LIMIT).unwrap_or_else(|| panic!("the watch stayed with the old table, reset: {reset}"));
        assert_eq!(change.label(), "key");
        user.kill();
    }
}

#[test]
fn a_watch_finds_an_update_whose_maker_was_killed() {
    let table = anonymous();
    let sync = attach(&table, "key");
    let mut watch = table.watch();
    let there = &shared_words(1)[0];
    let maker = in_child(|| {
        let _update = sync.begin_update().unwrap();
        there.store(1, SeqCst);
        std::thread::sleep(Duration::MAX);
    });
    await_value(there, 1);
    assert_eq!(watch.next_timeout(NOT_YET), None, "the update has not completed");
    maker.kill();
    assert_eq!(watch.next_timeout(LIMIT).expect("no other process would look").pending(), 0);
}

fn is_awaited(table: &Table, key: &str) -> bool {
    table.slot(key).unwrap().unwrap().is_awaited()
}

#[test]
fn an_orderly_end_leaves_no_mark_of_a_waiter() {
    let (_folder, path) = path();
    for table in [anonymous(), Table::open(&path).unwrap()] {
        let syncs = ["key", "other"].map(|key| attach(&table, key));
        let marks = || ["key", "other"].map(|key| is_awaited(&table, key));
        let long = Duration::from_millis(600);
        let watch = table.watch();
        assert_eq!(marks(), [true; 2]);
        drop(watch);
        assert_eq!(marks(), [false; 2]);
        assert!(syncs[0].wait_timeout(long).is_timed_out());
        assert_eq!(marks(), [false; 2]);
        assert!(syncs.iter().collect::<WaitSet<'_>>().wait_timeout(long).is_empty());
        assert_eq!(marks(), [false; 2]);
        let pollables = [(); 2].map(|()| syncs[0].pollable().unwrap());
        eventually("no waiter has left a mark", || marks() == [true, false]);
        let [one, other] = pollables;
        drop(one);
        assert_eq!(marks(), [true, false], "there is another one");
        drop(other);
        // The thread may be looking at that moment.
        eventually("a descriptor leaves a mark", || marks() == [false; 2]);
    }
}

#[test]
fn an_orderly_end_does_not_keep_other_waiters_from_being_woken() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let words = shared_words(3);
    let (overslept, change, stop) = (&words[0], &words[1], &words[2]);
    let syncs = ["key", "other"].map(|key| attach(&table, key));
    let leavers = [(); 2].map(|()| {
        in_child(|| {
            while stop.load(SeqCst) == 0 {
                drop(table.watch());
                drop(syncs[0].pollable().unwrap());
            }
        })
    });
    for round in 0..200 {
        let waiters = [0, 1].map(|way| {
            in_child(|| {
                let start = micros();
                match way {
                    0 => assert!(syncs[0].wait_timeout(LIMIT).is_changed()),
                    _ => assert_eq!(syncs.iter().collect::<WaitSet<'_>>().wait_timeout(LIMIT), [0]),
                }
                overslept.fetch_add(is_overslept(start, change.load(SeqCst)).into(), SeqCst);
            })
        });
        waiters.iter().for_each(Child::await_sleep);
        std::thread::sleep(Duration::from_micros(round * 7 % 1000));
        change.store(micros(), SeqCst);
        syncs[0].mark_updated().unwrap();
        waiters.into_iter().for_each(Child::succeeds);
        syncs[0].refresh().unwrap();
    }
    stop.store(1, SeqCst);
    leavers.into_iter().for_each(Child::succeeds);
    assert_eq!(overslept.load(SeqCst), 0, "a wakeup was lost");
}

#[test]
fn a_descriptor_is_readable_after_each_update() {
    let (_folder, path) = path();
    for table in [anonymous(), Table::open(&path).unwrap()] {
        let (sync, writer) = (attach(&table, "key"), attach(&table, "key"));
        let pollable = sync.pollable().unwrap();
        assert!(!is_readable(&pollable, NOT_YET) && !pollable.acknowledge());
        for _ in 0..100 {
            in_child(|| _ = writer.mark_updated().unwrap()).succeeds();
            assert!(is_readable(&pollable, LIMIT));
            assert!(pollable.acknowledge() && !pollable.acknowledge());
            assert!(sync.is_expired());
            sync.refresh().unwrap();
        }
        // Of what was not seen when it was made.
        writer.mark_updated().unwrap();
        assert!(is_readable(&sync.pollable().unwrap(), LIMIT));
    }
}

#[test]
fn a_descriptor_is_readable_after_a_reset_and_with_a_read_only_table() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let writer = attach(&table, "key");
    let read_only = Table::options().read_only(true).open(&path).unwrap();
    let syncs = [attach(&table, "key"), attach(&read_only, "key")];
    let pollables = syncs.each_ref().map(|sync| sync.pollable().unwrap());
    for round in 0..6 {
        match round % 2 {
            0 => in_child(|| _ = writer.mark_updated().unwrap()).succeeds(),
            _ => in_child(|| {
                table.reset().unwrap();
                drop(attach(&table, "key"));
            })
            .succeeds(),
        }
        for pollable in &pollables {
            assert!(is_readable(pollable, LIMIT), "round {round}");
            pollable.acknowledge();
        }
    }
}

#[test]
fn descriptors_and_watches_notice_a_file_that_was_deleted_and_made_again() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    drop(attach(&table, "key"));
    let read_only = Table::options().read_only(true).open(&path).unwrap();
    let syncs = [attach(&table, "key"), attach(&read_only, "key")];
    let mut watch = Table::open(&path).unwrap().watch();
    let pollables = syncs.each_ref().map(|sync| sync.pollable().unwrap());
    for round in 0..3 {
        std::fs::remove_file(&path).unwrap();
        in_child(|| drop(attach(&Table::open(&path).unwrap(), "key"))).succeeds();
        let start = Instant::now();
        assert_eq!(watch.next_timeout(LIMIT).expect("the watch stays with the old file").label(), "key");
        for pollable in &pollables {
            assert!(is_readable(pollable, LIMIT), "round {round}");
            pollable.acknowledge();
        }
        assert!(start.elapsed() < Duration::from_millis(1500), "more than a look or two: {:?}", start.elapsed());
        in_child(|| _ = attach(&Table::open(&path).unwrap(), "key").mark_updated().unwrap()).succeeds();
        assert!(pollables.iter().all(|pollable| is_readable(pollable, LIMIT) && pollable.acknowledge()));
        while watch.next_timeout(NOT_YET).is_some() {}
    }
}

#[test]
fn a_descriptor_reports_a_change_that_is_not_adopted_once_and_a_lost_table_twice_a_second() {
    let (folder, path) = path();
    let table = Table::open(&path).unwrap();
    let (sync, writer) = (attach(&table, "key"), attach(&table, "key"));
    let pollable = sync.pollable().unwrap();
    writer.mark_updated().unwrap();
    assert!(is_readable(&pollable, LIMIT) && pollable.acknowledge());
    assert!(!is_readable(&pollable, NOT_YET), "the same change is reported again");
    drop(folder);
    let (start, mut reports) = (Instant::now(), 0);
    while start.elapsed() < Duration::from_secs(2) {
        if is_readable(&pollable, Duration::from_millis(100)) {
            assert!(pollable.acknowledge() && sync.refresh().is_err());
            reports += 1;
        }
    }
    assert!((1..=5).contains(&reports), "{reports} times");
}

#[test]
fn many_descriptors_of_one_key_and_of_many_each_report_their_own() {
    const KEYS: usize = 50;
    let table = anonymous();
    let syncs: Vec<_> = (0..KEYS).map(|key| attach(&table, &key.to_string())).collect();
    let mut pollables: Vec<_> = (0..3 * KEYS).map(|i| Some(syncs[i % KEYS].pollable().unwrap())).collect();
    for round in 0..4 * KEYS {
        let key = round * 7 % KEYS;
        syncs[key].mark_updated().unwrap();
        for (i, pollable) in pollables.iter().enumerate().filter(|(i, _)| i % KEYS == key) {
            assert!(is_readable(pollable.as_ref().unwrap(), LIMIT), "{i} in round {round}");
            assert!(pollable.as_ref().unwrap().acknowledge());
        }
        let disturbed = pollables.iter().flatten().filter(|pollable| pollable.acknowledge()).count();
        assert_eq!(disturbed, 0, "others were notified");
        // Some go, at times the last one of a key, and others come.
        for i in 0..=round % 3 {
            pollables[key + i * KEYS] = None;
        }
        for i in 0..=round % 3 {
            pollables[key + i * KEYS] = Some(syncs[key].pollable().unwrap());
        }
    }
}

#[test]
fn a_child_may_drop_what_it_inherits() {
    in_child(|| {
        let table = anonymous();
        let sync = attach(&table, "key");
        let mut pollable = Some(sync.pollable().unwrap());
        for _ in 0..50 {
            in_child(|| {
                drop(pollable.take());
                let own = sync.pollable().unwrap();
                sync.clone().mark_updated().unwrap();
                assert!(is_readable(&own, LIMIT));
            })
            .succeeds();
            let pollable = pollable.as_ref().unwrap();
            assert!(is_readable(pollable, LIMIT), "the parent's was ended");
            pollable.acknowledge();
            assert_eq!(notifiers(), 1);
        }
    })
    .succeeds();
}

#[test]
fn no_update_is_missed_between_descriptors_that_come_and_go() {
    let table = anonymous();
    let value = &shared_words(1)[0];
    let stop = &shared_words(1)[0];
    let writer = in_child(|| {
        let sync = attach(&table, "key");
        while stop.load(SeqCst) == 0 {
            value.fetch_add(1, SeqCst);
            sync.mark_updated().unwrap();
            std::thread::yield_now();
        }
    });
    let slow = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let sync = attach(&table, "key");
                for _ in 0..1000 {
                    let pollable = sync.pollable().unwrap();
                    let start = Instant::now();
                    assert!(is_readable(&pollable, LIMIT));
                    slow.fetch_add(u64::from(start.elapsed() > Duration::from_millis(400)), SeqCst);
                    pollable.acknowledge();
                    let before = value.load(SeqCst);
                    let seen = sync.refresh_with(|| Ok::<_, ()>(value.load(SeqCst))).unwrap();
                    assert!(seen >= before);
                }
            });
        }
    });
    stop.store(1, SeqCst);
    writer.succeeds();
    assert_eq!(slow.into_inner(), 0, "a wakeup was lost");
}

#[test]
fn one_thread_serves_all_and_ends_with_the_last() {
    in_child(|| {
        let (table, other) = (anonymous(), anonymous());
        assert_eq!(notifiers(), 0, "a thread was started without being asked for");
        let pollables: Vec<_> = (0..100).map(|i| attach(&table, &format!("{i}")).pollable().unwrap()).collect();
        // It takes its name when it runs.
        eventually("no thread, or one too many", || notifiers() == 1);
        let another = attach(&other, "key").pollable().unwrap();
        eventually("no thread for another table", || notifiers() == 2);
        drop(another);
        eventually("a thread outlives its last descriptor", || notifiers() == 1);
        drop(pollables);
        eventually("a thread outlives its last descriptor", || notifiers() == 0);
        let again = attach(&table, "0").pollable().unwrap();
        eventually("no thread is started again", || notifiers() == 1);
        attach(&table, "0").mark_updated().unwrap();
        assert!(is_readable(&again, LIMIT));
    })
    .succeeds();
}

#[test]
fn a_forked_child_has_descriptors_of_its_own() {
    let table = anonymous();
    let sync = attach(&table, "key");
    let pollable = sync.pollable().unwrap();
    for _ in 0..50 {
        in_child(|| {
            let own = sync.pollable().unwrap();
            attach(&table, "key").mark_updated().unwrap();
            assert!(is_readable(&own, LIMIT));
            drop((own, &pollable));
        })
        .succeeds();
        assert!(is_readable(&pollable, LIMIT), "the parent's thread was disturbed");
        pollable.acknowledge();
        sync.refresh().unwrap();
    }
}

#[test]
fn without_a_descriptor_there_is_a_clear_error() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    in_child(|| {
        let sync = attach(&table, "key");
        let files = Resource::RLIMIT_NOFILE;
        let (soft, hard) = getrlimit(files).unwrap();
        let limit = std::fs::File::open("/dev/null").unwrap().as_raw_fd() as u64;
        setrlimit(files, limit, hard).unwrap();
        let error = sync.pollable().unwrap_err();
        setrlimit(files, soft, hard).unwrap();
        assert_eq!((error.path(), error.key()), (Some(&*path), Some("key")));
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("Too many open files"));
        assert_eq!(notifiers(), 0);
    })
    .succeeds();
}

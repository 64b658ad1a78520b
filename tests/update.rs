//! Guards against a commit that outlives its announcement: updates by a process that is killed, panics, forks or never ends.

mod support;

use std::cell::Cell;
use std::convert::Infallible;
use std::error::Error;
use std::os::fd::AsRawFd as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use gensync::{ErrorKind, GenerationSynchronizer, Table, Update, UpdateError, update_all};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::resource::{Resource, setrlimit};
use support::{Child, await_value, in_child, path, shared_words, system_calls, tables};

fn anonymous() -> Table {
    Table::options().anonymous().unwrap()
}

fn sync(table: &Table) -> GenerationSynchronizer {
    GenerationSynchronizer::new(table, "key").unwrap()
}

fn pending(table: &Table) -> u8 {
    table.slots().find(|slot| slot.label() == "key").unwrap().pending()
}

/// Where the maker of an update is when it is killed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Killed {
    BeforeCommit,
    AfterCommit,
    AfterFinish,
}

const STEPS: [Killed; 3] = [Killed::BeforeCommit, Killed::AfterCommit, Killed::AfterFinish];

/// A child that updates `source`, and stays where it is to be killed.
fn updater(table: &Table, source: &AtomicU64, step: Killed) -> Child {
    let there = &shared_words(1)[0];
    let child = in_child(|| {
        let sync = sync(table);
        let update = sync.begin_update().unwrap();
        if step != Killed::BeforeCommit {
            source.store(2, SeqCst);
        }
        if step == Killed::AfterFinish {
            update.finish().unwrap();
        }
        there.store(1, SeqCst);
        std::thread::sleep(Duration::MAX);
    });
    await_value(there, 1);
    child
}

/// Checks until the state is expired, which must not take for ever.
fn await_expiry(sync: &GenerationSynchronizer) {
    let start = Instant::now();
    while !sync.is_expired() {
        assert!(start.elapsed() < Duration::from_secs(20), "stale for good");
    }
}

/// Longer than the pause between two checks by a reader whether an update's maker is alive.
fn past_the_bound() {
    std::thread::sleep(Duration::from_millis(2));
}

#[test]
fn wherever_the_maker_is_killed_every_other_process_ends_fresh() {
    tables(|table| {
        for step in STEPS {
            let words = shared_words(3);
            let (source, loaded, done) = (&words[0], &words[1], &words[2]);
            let reader = || {
                let sync = sync(table);
                let mut state = sync.refresh_with(|| Ok::<_, ()>(source.load(SeqCst))).unwrap();
                loaded.fetch_add(1, SeqCst);
                await_value(done, 1);
                past_the_bound();
                if sync.is_expired() {
                    state = sync.refresh_with(|| Ok::<_, ()>(source.load(SeqCst))).unwrap();
                }
                assert_eq!(state, source.load(SeqCst), "stale after a kill {step:?}");
                assert!(!sync.is_expired(), "it must be recovered once, not again and again");
            };
            let readers = [in_child(reader), in_child(reader)];
            await_value(loaded, 2);
            updater(table, source, step).kill();
            done.store(1, SeqCst);
            readers.into_iter().for_each(Child::succeeds);
            assert_eq!(pending(table), 0);
        }
    });
}

#[test]
fn readers_keep_their_state_while_an_update_is_in_flight() {
    tables(|table| {
        let source = &shared_words(1)[0];
        let reader = sync(table);
        let child = updater(table, source, Killed::AfterCommit);
        assert_eq!(pending(table), 1);
        for _ in 0..5 {
            assert!(!reader.is_expired(), "the update has not completed");
            past_the_bound();
        }
        // A reader that begins now is not expired either, and is expired when the update ends.
        let late = sync(table);
        late.refresh_with(|| Ok::<_, ()>(source.load(SeqCst))).unwrap();
        assert!(!late.is_expired());
        child.kill();
        past_the_bound();
        assert!(reader.is_expired() && late.is_expired());
    });
}

#[test]
fn a_pending_update_costs_a_reader_no_more_than_one_system_call_a_millisecond() {
    let table = anonymous();
    let words = shared_words(2);
    let (checks, micros) = (&words[0], &words[1]);
    let (writer, reader) = (sync(&table), sync(&table));
    let update = writer.begin_update().unwrap();
    let calls = system_calls(|| {
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(200) {
            assert!(!reader.is_expired());
            checks.fetch_add(1, SeqCst);
        }
        micros.store(start.elapsed().as_micros() as u64, SeqCst);
    });
    let milliseconds = micros.load(SeqCst) / 1000;
    assert!(calls > 10, "the lock was looked at {calls} times: no process would notice a kill");
    assert!(calls <= milliseconds + 10, "{calls} system calls in {milliseconds} ms");
    assert!(checks.load(SeqCst) > 10 * calls);
    update.finish().unwrap();
}

#[test]
fn an_update_is_announced_once_and_followed_by_its_maker() {
    let table = anonymous();
    let (writer, reader) = (sync(&table), sync(&table));
    let before = reader.sync_gen().unwrap().get();
    assert_eq!(writer.update(|| Ok::<_, ()>("saved")).unwrap(), "saved");
    assert!(!writer.is_expired() && reader.is_expired());
    assert_eq!(reader.refresh().unwrap().get(), before + 1);

    // Not followed, as another update came in between.
    let other = sync(&table);
    writer.update(|| other.mark_updated()).unwrap();
    assert!(writer.is_expired());
    assert_eq!(pending(&table), 0);
}

#[test]
fn an_error_of_a_commit_is_a_source_whatever_its_type() {
    let writer = sync(&anonymous());
    let number = || "many".parse::<u32>().map(drop);
    let error = writer.update(number).unwrap_err();
    assert!(error.source().is_none(), "says the documentation");
    let text = error.to_string();
    let error = error.boxed();
    assert_eq!(error.to_string(), text);
    assert!(error.source().unwrap().is::<std::num::ParseIntError>());
    // A commit's error of a type that is no `Error` can be made one.
    let text = writer.update(|| Err::<(), _>("disk on fire")).unwrap_err().boxed();
    assert_eq!(text.source().unwrap().to_string(), "disk on fire");
}

#[test]
fn a_commit_that_fails_is_announced_and_its_error_given_back() {
    let table = anonymous();
    let (writer, reader) = (sync(&table), sync(&table));
    let error = writer.update(|| Err::<(), _>("disk on fire")).unwrap_err();
    assert!(matches!(error, UpdateError::Commit("disk on fire")));
    assert_eq!(error.to_string(), "the commit failed, and was announced all the same: disk on fire");
    assert!(reader.is_expired());
    // Errors of any type go through `?`.
    let boxed = || -> Result<(), Box<dyn Error>> {
        writer.update(|| Err::<(), Box<dyn Error>>("boxed".into()))?;
        writer.update(|| Err::<(), _>(std::io::Error::other("plain")))?;
        Ok(())
    };
    assert!(boxed().unwrap_err().to_string().ends_with("boxed"));
}

#[test]
fn a_panic_in_the_commit_is_announced() {
    let table = anonymous();
    let (writer, reader) = (sync(&table), sync(&table));
    let result = catch_unwind(AssertUnwindSafe(|| writer.update(|| -> Result<(), ()> { panic!("in the commit") })));
    assert!(result.is_err());
    assert!(reader.is_expired());
    assert_eq!(pending(&table), 0);
}

#[test]
fn a_maker_whose_change_failed_is_expired_like_all_others() {
    tables(|table| {
        let (writer, other) = (sync(table), GenerationSynchronizer::new(table, "other").unwrap());
        let source = Cell::new(1);
        // What it has in memory is what it last saw of the source, which a failed change has left half done.
        let failures: [(&str, &dyn Fn()); 6] = [
            ("an error", &|| {
                let fails = || {
                    source.set(2);
                    Err::<(), _>("half done")
                };
                writer.update(fails).unwrap_err();
            }),
            ("a panic", &|| {
                let update = || writer.update(|| -> Result<(), ()> { panic!("in the commit") });
                catch_unwind(AssertUnwindSafe(update)).unwrap_err();
            }),
            ("an update dropped by ?", &|| {
                let change = || -> Result<(), std::num::ParseIntError> {
                    let update = writer.begin_update().unwrap();
                    source.set("two".parse()?);
                    update.finish().unwrap();
                    Ok(())
                };
                change().unwrap_err();
            }),
            ("an update dropped", &|| drop(writer.begin_update().unwrap())),
            ("an error of several", &|| {
                update_all(&[&writer, &other], || Err::<(), _>(())).unwrap_err();
                assert!(other.is_expired());
            }),
            ("a panic of several", &|| {
                let update = || update_all(&[&other, &writer], || -> Result<(), ()> { panic!("in the commit") });
                catch_unwind(AssertUnwindSafe(update)).unwrap_err();
                assert!(other.is_expired());
            }),
        ];
        for (how, fail) in failures {
            let reader = sync(table);
            for sync in [&writer, &other] {
                sync.refresh().unwrap();
            }
            fail();
            assert!(reader.is_expired(), "{how} was not announced");
            assert!(writer.is_expired(), "{how} left its maker fresh");
            assert_eq!(pending(table), 0, "{how}");
        }
        // A change that succeeds is still followed.
        writer.refresh().unwrap();
        writer.update(|| Ok::<_, ()>(())).unwrap();
        assert!(!writer.is_expired());
    });
}

#[test]
fn an_abandoned_update_leaves_the_generation() {
    let table = anonymous();
    let (writer, reader) = (sync(&table), sync(&table));
    writer.begin_update().unwrap().abandon();
    assert!(!reader.is_expired() && !writer.is_expired());
    assert_eq!((reader.sync_gen(), pending(&table)), (writer.sync_gen(), 0));
    // Beside another one.
    let other = writer.begin_update().unwrap();
    writer.begin_update().unwrap().abandon();
    past_the_bound();
    assert!(!reader.is_expired());
    other.finish().unwrap();
    assert!(reader.is_expired());
}

#[test]
fn updates_nest_on_one_key_and_on_several() {
    let table = anonymous();
    let other = GenerationSynchronizer::new(&table, "other").unwrap();
    let (writer, reader) = (sync(&table), sync(&table));
    let before = reader.sync_gen().unwrap().get();
    writer
        .update(|| {
            other.update(|| {
                assert_eq!(pending(&table), 1);
                sync(&table).update(|| {
                    assert_eq!(pending(&table), 2);
                    Ok::<_, ()>(())
                })
            })
        })
        .unwrap();
    assert_eq!(pending(&table), 0);
    assert_eq!(reader.refresh().unwrap().get(), before + 2);
}

#[test]
fn one_commit_updates_several_keys_or_none() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let keys = ["a", "b", "c"].map(|key| GenerationSynchronizer::new(&table, key).unwrap());
    let readers = ["a", "b", "c"].map(|key| GenerationSynchronizer::new(&table, key).unwrap());
    let all: Vec<_> = keys.iter().collect();
    update_all(&all, || {
        assert!(table.slots().all(|slot| slot.pending() == 1));
        Ok::<_, ()>(())
    })
    .unwrap();
    assert!(readers.iter().all(GenerationSynchronizer::is_expired));
    readers.iter().for_each(|reader| _ = reader.refresh().unwrap());

    let unwritable = Table::options().read_only(true).open(&path).unwrap();
    let unwritable = GenerationSynchronizer::new(&unwritable, "c").unwrap();
    let error = update_all(&[&keys[0], &keys[1], &unwritable], || -> Result<(), ()> { unreachable!() }).unwrap_err();
    assert!(matches!(error, UpdateError::Begin(error) if *error.kind() == ErrorKind::ReadOnly));
    assert!(table.slots().all(|slot| slot.pending() == 0));
    assert!(!readers.iter().any(GenerationSynchronizer::is_expired), "nothing was changed");
}

#[test]
fn more_updates_of_one_key_at_once_than_can_be_counted() {
    let table = anonymous();
    let (writer, reader) = (sync(&table), sync(&table));
    let before = reader.sync_gen().unwrap().get();
    let mut updates: Vec<Update<'_>> = (0..300).map(|_| writer.begin_update().unwrap()).collect();
    assert_eq!(pending(&table), 255);
    past_the_bound();
    assert!(!reader.is_expired());
    for update in updates.drain(..299) {
        update.finish().unwrap();
    }
    assert!(reader.is_expired());
    assert_eq!(reader.refresh().unwrap().get(), before + 299);
    past_the_bound();
    assert!(!reader.is_expired(), "the last one is still in flight");
    updates.pop().unwrap().finish().unwrap();
    assert!(reader.is_expired());
    // The count, which could not go down, is cleared by a process that finds that no maker is left.
    reader.refresh().unwrap();
    past_the_bound();
    await_expiry(&reader);
    reader.refresh().unwrap();
    assert_eq!(pending(&table), 0);
    assert!(!reader.is_expired());
}

#[test]
fn threads_and_processes_update_one_key_at_once() {
    let table = anonymous();
    let (reader, source) = (sync(&table), &shared_words(1)[0]);
    let before = reader.sync_gen().unwrap().get();
    let work = || {
        for _ in 0..200 {
            sync(&table).update(|| Ok::<_, ()>(source.fetch_add(1, SeqCst))).unwrap();
        }
    };
    let children = [in_child(work), in_child(work)];
    std::thread::scope(|scope| {
        scope.spawn(work);
        scope.spawn(work);
    });
    children.into_iter().for_each(Child::succeeds);
    assert_eq!(source.load(SeqCst), 800);
    assert_eq!(reader.refresh().unwrap().get(), before + 800);
    assert_eq!(pending(&table), 0);
}

#[test]
fn a_child_forked_in_the_middle_finishes_nothing() {
    tables(|table| {
        let (writer, reader) = (sync(table), sync(table));
        let generation = reader.sync_gen();
        let update = Cell::new(Some(writer.begin_update().unwrap()));
        in_child(|| {
            let error = update.take().unwrap().finish().unwrap_err();
            assert_eq!(*error.kind(), ErrorKind::Inherited);
            assert!(error.to_string().contains("before the fork"), "{error}");
        })
        .succeeds();
        in_child(|| drop(update.take())).succeeds();
        in_child(|| update.take().unwrap().abandon()).succeeds();
        assert_eq!((reader.refresh().ok(), pending(table)), (generation, 1));
        past_the_bound();
        assert!(!reader.is_expired(), "a child let go of its parent's lock");

        // A child has updates of its own, and its parent's lock is none of its concern.
        in_child(|| writer.update(|| Ok::<_, ()>(())).unwrap()).succeeds();
        assert!(reader.is_expired());
        reader.refresh().unwrap();
        past_the_bound();
        assert!(!reader.is_expired());
        update.take().unwrap().finish().unwrap();
        assert!(reader.is_expired());
        assert_eq!(pending(table), 0);
    });
}

#[test]
fn an_update_that_a_forked_child_keeps_alive_counts_as_lost_after_the_limit() {
    let (_folder, path) = path();
    let table = Table::options().pending_limit(Duration::from_millis(30)).open(&path).unwrap();
    let words = shared_words(2);
    let (there, grandchild) = (&words[0], &words[1]);
    let maker = in_child(|| {
        let sync = sync(&table);
        let update = sync.begin_update().unwrap();
        // Passed on, as to a command that makes the commit.
        fcntl(&update, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        let heir = in_child(|| std::thread::sleep(Duration::MAX));
        grandchild.store(heir.pid().as_raw() as u64, SeqCst);
        there.store(1, SeqCst);
        std::thread::sleep(Duration::MAX);
    });
    await_value(there, 1);
    let reader = sync(&table);
    maker.kill();
    assert!(!reader.is_expired(), "the lock is still held");
    for _ in 0..3 {
        await_expiry(&reader);
        reader.refresh().unwrap();
        // Loaded again, and good for as long again.
        assert!(!reader.is_expired());
        past_the_bound();
        assert!(!reader.is_expired());
    }
    let heir = nix::unistd::Pid::from_raw(grandchild.load(SeqCst) as i32);
    nix::sys::signal::kill(heir, nix::sys::signal::Signal::SIGKILL).unwrap();
    await_expiry(&reader);
}

#[test]
fn a_forked_child_that_lives_on_does_not_hide_that_the_maker_was_killed() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let words = shared_words(2);
    let (there, grandchild) = (&words[0], &words[1]);
    let maker = in_child(|| {
        let sync = sync(&table);
        let update = Cell::new(Some(sync.begin_update().unwrap()));
        let heir = in_child(|| {
            // Nor does it close the file that has the number by now, when it ends the update.
            let stranger = std::fs::File::open("/dev/null").unwrap();
            drop(update.take());
            stranger.metadata().unwrap();
            there.fetch_add(1, SeqCst);
            std::thread::sleep(Duration::MAX);
        });
        grandchild.store(heir.pid().as_raw() as u64, SeqCst);
        there.fetch_add(1, SeqCst);
        std::thread::sleep(Duration::MAX);
    });
    await_value(there, 2);
    let reader = sync(&table);
    maker.kill();
    past_the_bound();
    let is_expired = reader.is_expired();
    let heir = nix::unistd::Pid::from_raw(grandchild.load(SeqCst) as i32);
    nix::sys::signal::kill(heir, nix::sys::signal::Signal::SIGKILL).unwrap();
    assert!(is_expired, "the child has kept its parent's lock");
}

#[test]
fn a_limit_counts_for_the_process_that_has_it_alone() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let writer = sync(&table);
    let hasty = Table::options().pending_limit(Duration::from_millis(5)).open(&path).unwrap();
    let (hasty, patient) = (sync(&hasty), sync(&table));
    let update = writer.begin_update().unwrap();
    let generation = table.generation("key").unwrap();
    for _ in 0..3 {
        await_expiry(&hasty);
        hasty.refresh().unwrap();
        assert!(!patient.is_expired(), "another process's limit made this one load");
    }
    assert_eq!(table.generation("key").unwrap(), generation);
    update.finish().unwrap();
    assert!(hasty.is_expired() && patient.is_expired());
}

#[test]
fn an_update_may_be_begun_without_waiting_or_by_a_deadline() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let (writer, reader) = (sync(&table), sync(&table));
    writer.try_begin_update().unwrap().finish().unwrap();
    assert!(reader.is_expired());
    // As a process that recovers an update locks the slot, and one that resets the table locks the gate and all slots.
    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    for (start, length) in [(4096, 0), (144, 4)] {
        let mut lock = nix::libc::flock {
            l_type: nix::libc::F_WRLCK as _,
            l_whence: nix::libc::SEEK_SET as _,
            l_start: start,
            l_len: length,
            l_pid: 0,
        };
        fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
        let error = writer.try_begin_update().unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Locked { .. }), "{error}");
        let deadline = Instant::now() + Duration::from_millis(20);
        let error = writer.begin_update_deadline(deadline).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Locked { .. }) && Instant::now() >= deadline, "{error}");
        let error = writer.update_deadline(deadline, || -> Result<(), ()> { unreachable!() }).unwrap_err();
        assert!(matches!(error, UpdateError::Begin(_)), "{error:?}");
        lock.l_type = nix::libc::F_UNLCK as _;
        fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    }
    let deadline = Instant::now() + Duration::from_secs(20);
    writer.update_deadline(deadline, || Ok::<_, ()>(())).unwrap();
    writer.begin_update_deadline(deadline).unwrap().finish().unwrap();
    assert_eq!(pending(&table), 0);
}

#[test]
fn the_error_of_a_commit_is_the_source_of_what_is_returned() {
    let writer = sync(&anonymous());
    let io = writer.update(|| Err::<(), _>(std::io::Error::other("plain"))).unwrap_err();
    assert!(io.source().unwrap().downcast_ref::<std::io::Error>().is_some());
    let boxed = writer.update(|| Err::<(), Box<dyn Error>>("boxed".into())).unwrap_err();
    assert_eq!(boxed.source().unwrap().to_string(), "boxed");
    let sendable = writer.update(|| Err::<(), Box<dyn Error + Send + Sync>>("sendable".into())).unwrap_err();
    assert_eq!(sendable.source().unwrap().to_string(), "sendable");
}

#[test]
fn each_key_that_cannot_be_announced_is_reported() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let keys = ["a", "b", "c"].map(|key| GenerationSynchronizer::new(&table, key).unwrap());
    let all: Vec<_> = keys.iter().collect();
    let copies = in_child(|| {
        let forked = Cell::new(None);
        let outcome = update_all(&all, || {
            // The child comes back from the commit, and can announce nothing that its parent began.
            forked.set(support::fork_here());
            Err::<(), _>("failed as well")
        });
        match (outcome.unwrap_err(), forked.into_inner()) {
            (UpdateError::Announce { error, further, commit, .. }, None) => {
                let keys: Vec<_> = std::iter::once(&error).chain(&further).filter_map(|error| error.key()).collect();
                assert_eq!((keys, commit), (vec!["a", "b", "c"], Some("failed as well")));
            }
            (UpdateError::Commit(_), Some(child)) => {
                let status = nix::sys::wait::waitpid(child, None).unwrap();
                assert!(matches!(status, nix::sys::wait::WaitStatus::Exited(_, 0)), "{status:?}");
            }
            (error, child) => panic!("{error:?} in the process with the child {child:?}"),
        }
    });
    copies.succeeds();
}

#[test]
fn a_program_that_was_started_in_the_middle_keeps_nothing_alive() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let words = shared_words(2);
    let (there, program) = (&words[0], &words[1]);
    let maker = in_child(|| {
        let sync = sync(&table);
        let _update = sync.begin_update().unwrap();
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        program.store(child.id().into(), SeqCst);
        there.store(1, SeqCst);
        child.wait().unwrap();
    });
    await_value(there, 1);
    let reader = sync(&table);
    maker.kill();
    past_the_bound();
    assert!(reader.is_expired());
    let program = nix::unistd::Pid::from_raw(program.load(SeqCst) as i32);
    nix::sys::signal::kill(program, nix::sys::signal::Signal::SIGKILL).unwrap();
}

#[test]
fn without_permission_an_update_cannot_begin_and_all_else_goes_on() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let (writer, reader) = (sync(&table), sync(&table));
    let owner = nix::unistd::Uid::effective();
    in_child(|| {
        if owner.is_root() {
            nix::unistd::setuid(nix::unistd::Uid::from_raw(65_534)).unwrap();
        } else {
            // Its owner needs permission, too.
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o000)).unwrap();
        }
        let error = writer.begin_update().unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::Permission);
        assert_eq!(error.path(), Some(&*path));
        writer.mark_updated().unwrap();
        assert!(!writer.is_expired() && reader.is_expired());
    })
    .succeeds();
}

#[test]
fn a_reader_that_cannot_recover_a_lost_update_loads_once() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let source = &shared_words(1)[0];
    let before = sync(&table).sync_gen();
    let read_only = Table::options().read_only(true).open(&path).unwrap();
    let reader = sync(&read_only);
    let mut state = source.load(SeqCst);
    let child = updater(&table, source, Killed::AfterCommit);
    assert!(!reader.is_expired());
    // A ticket from before the kill is not good enough.
    let early = reader.ticket();
    child.kill();
    past_the_bound();
    assert!(reader.is_expired());
    assert!(reader.is_expired(), "it stays so until the state is loaded");
    reader.adopt(early);
    assert!(reader.is_expired());
    for _ in 0..3 {
        if reader.is_expired() {
            state = reader.refresh_with(|| Ok::<_, ()>(source.load(SeqCst))).unwrap();
        }
        past_the_bound();
        assert!(!reader.is_expired(), "a storm of loads");
    }
    assert_eq!(state, 2);
    assert_eq!((reader.sync_gen(), pending(&table)), (before, 1), "a reader wrote to the table");
    // The next one is lost likewise.
    updater(&table, source, Killed::AfterCommit).kill();
    past_the_bound();
    assert!(reader.is_expired());
    reader.refresh().unwrap();
    let clone = reader.clone();
    assert!(!clone.is_expired() && !reader.is_expired(), "the clone of a fresh synchronizer is expired");
    // A process that can write recovers them all.
    let writer = sync(&table);
    await_expiry(&writer);
    assert!(reader.is_expired());
    assert_eq!(pending(&table), 0);
}

#[test]
fn without_a_descriptor_an_update_cannot_begin_and_a_lost_one_is_noticed() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let source = &shared_words(1)[0];
    let (writer, reader) = (sync(&table), sync(&table));
    let victim = updater(&table, source, Killed::AfterCommit);
    let words = shared_words(2);
    let (ready, killed) = (&words[0], &words[1]);
    let child = in_child(|| {
        let free = std::fs::File::open("/dev/null").unwrap();
        let limit = free.as_raw_fd() as u64;
        drop(free);
        setrlimit(Resource::RLIMIT_NOFILE, limit, limit).unwrap();
        let error = writer.update(|| -> Result<(), Infallible> { unreachable!() }).unwrap_err();
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        assert!(error.source().unwrap().to_string().contains("Too many open files"), "{error:?}");
        assert!(!reader.is_expired());
        ready.store(1, SeqCst);
        await_value(killed, 1);
        past_the_bound();
        assert!(reader.is_expired());
        reader.refresh().unwrap();
        past_the_bound();
        assert!(!reader.is_expired(), "a storm of loads");
    });
    await_value(ready, 1);
    victim.kill();
    killed.store(1, SeqCst);
    child.succeeds();
}

#[test]
fn a_reset_waits_for_the_updates_in_flight() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    for step in [Killed::BeforeCommit, Killed::AfterCommit] {
        let words = shared_words(2);
        let (source, reset) = (&words[0], &words[1]);
        let reader = sync(&table);
        let victim = updater(&table, source, step);
        let resetter = in_child(|| {
            table.reset().unwrap();
            reset.store(1, SeqCst);
        });
        past_the_bound();
        assert_eq!(reset.load(SeqCst), 0, "a table was replaced under an update");
        assert!(!reader.is_expired());
        let other = sync(&table);
        other.update(|| Ok::<_, ()>(())).unwrap();
        victim.kill();
        resetter.succeeds();
        assert!(reader.is_expired());
        let state = reader.refresh_with(|| Ok::<_, ()>(source.load(SeqCst))).unwrap();
        assert_eq!(state, source.load(SeqCst));
        assert!(!reader.is_expired());
    }
}

#[test]
fn a_reset_gives_up_at_the_limit_and_has_changed_nothing() {
    let (folder, path) = path();
    let table = Table::options().pending_limit(Duration::from_millis(20)).open(&path).unwrap();
    let (writer, reader) = (sync(&table), sync(&table));
    let generation = reader.sync_gen();
    let update = writer.begin_update().unwrap();
    let error = table.reset().unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Locked { .. }) && error.path() == Some(&*path), "{error}");
    assert_eq!((sync(&table).sync_gen(), std::fs::read_dir(folder.path()).unwrap().count()), (generation, 1));
    update.finish().unwrap();
    assert!(reader.is_expired());
    table.reset().unwrap();
    assert_eq!(table.slots().count(), 0);
}

#[test]
fn updates_that_overlap_without_end_do_not_keep_a_reset_from_beginning() {
    let (_folder, path) = path();
    let table = Table::options().pending_limit(Duration::from_secs(20)).open(&path).unwrap();
    let words = shared_words(2);
    let (stop, updates) = (&words[0], &words[1]);
    let work = || {
        let (sync, other) = (sync(&table), GenerationSynchronizer::new(&table, "other").unwrap());
        while stop.load(SeqCst) == 0 {
            let commit = || {
                std::thread::sleep(Duration::from_millis(2));
                Ok::<_, ()>(())
            };
            update_all(&[&sync, &other], commit).unwrap();
            updates.fetch_add(1, SeqCst);
        }
    };
    let children = [(); 4].map(|()| in_child(work));
    await_value(updates, 20);
    for _ in 0..3 {
        table.reset().expect("it was never its turn");
    }
    stop.store(1, SeqCst);
    children.into_iter().for_each(Child::succeeds);
}

#[test]
fn a_dead_update_is_noticed_when_a_living_one_beside_it_has_ended() {
    tables(|table| {
        let source = &shared_words(1)[0];
        for finish in [false, true] {
            let (writer, reader) = (sync(table), sync(table));
            let victim = updater(table, source, Killed::AfterCommit);
            let living = writer.begin_update().unwrap();
            victim.kill();
            past_the_bound();
            assert!(!reader.is_expired(), "the living one's lock hides it");
            match finish {
                true => drop(living.finish().unwrap()),
                false => living.abandon(),
            }
            past_the_bound();
            assert!(reader.is_expired());
            reader.refresh().unwrap();
            past_the_bound();
            let _ = reader.is_expired();
            assert_eq!(pending(table), 0);
        }
    });
}

#[test]
fn a_process_that_cannot_recover_does_not_take_another_update_for_the_lost_one() {
    const LIMIT: Duration = Duration::from_millis(60);
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let writer = sync(&table);
    let read_only = Table::options().read_only(true).pending_limit(LIMIT).open(&path).unwrap();
    let reader = sync(&read_only);
    // It takes too long, and then it is abandoned: for the reader it is lost.
    let update = writer.begin_update().unwrap();
    let start = Instant::now();
    while !reader.is_expired() {
        assert!(start.elapsed() < Duration::from_secs(20), "stale for good");
    }
    assert!(reader.is_expired(), "it stays so until the state is loaded");
    reader.refresh().unwrap();
    assert!(!reader.is_expired(), "a storm of loads");
    update.abandon();
    // The next one looks the same in the table.
    let source = &shared_words(1)[0];
    let victim = updater(&table, source, Killed::BeforeCommit);
    let state = reader.refresh_with(|| Ok::<_, ()>(source.load(SeqCst))).unwrap();
    source.store(state + 1, SeqCst);
    victim.kill();
    await_expiry(&reader);
    assert_eq!(pending(&table), 1, "a reader wrote to the table");
}

#[test]
fn an_update_is_no_older_than_itself() {
    let table = Table::options().pending_limit(Duration::from_millis(200)).anonymous().unwrap();
    let (writer, reader) = (sync(&table), sync(&table));
    let update = writer.begin_update().unwrap();
    assert!(!reader.is_expired());
    update.abandon();
    std::thread::sleep(Duration::from_millis(300));
    // Used meanwhile, as a state is.
    (0..200).for_each(|_| assert!(!reader.is_expired()));
    let update = writer.begin_update().unwrap();
    past_the_bound();
    assert!(!reader.is_expired(), "it was taken for the one before");
    update.abandon();
}

#[test]
fn an_abandoned_update_makes_no_process_load() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let read_only = Table::options().read_only(true).open(&path).unwrap();
    let writer = sync(&table);
    let stop = &shared_words(1)[0];
    let abandoner = in_child(|| {
        while stop.load(SeqCst) == 0 {
            writer.begin_update().unwrap().abandon();
        }
    });
    std::thread::scope(|scope| {
        for table in [&table, &read_only, &read_only] {
            scope.spawn(|| {
                let reader = sync(table);
                let start = Instant::now();
                while start.elapsed() < Duration::from_secs(1) {
                    assert!(!reader.is_expired(), "nothing was changed");
                }
            });
        }
    });
    stop.store(1, SeqCst);
    abandoner.succeeds();
}

#[test]
fn a_commit_that_closes_all_descriptors_does_no_harm_to_those_that_get_their_numbers() {
    let (folder, path) = path();
    let table = Table::open(&path).unwrap();
    let (writer, reader) = (sync(&table), sync(&table));
    let innocent = folder.path().join("innocent");
    in_child(|| {
        let open = || std::fs::File::create(&innocent).unwrap();
        let files = writer
            .update(|| {
                (3..1024).for_each(|number| _ = nix::unistd::close(number));
                Ok::<_, ()>([(); 32].map(|()| open()))
            })
            .unwrap();
        assert!(files.iter().all(|file| file.metadata().is_ok()), "a stranger's descriptor was closed");
        assert!(!writer.is_expired() && reader.is_expired());
    })
    .succeeds();
}

#[test]
fn the_file_is_deleted_under_an_update() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let source = &shared_words(1)[0];
    let reader = sync(&table);
    let victim = updater(&table, source, Killed::AfterCommit);
    std::fs::remove_file(&path).unwrap();
    let newcomer = sync(&Table::open(&path).unwrap());
    // Past a look at the file, which the reader has every half second at most.
    std::thread::sleep(Duration::from_secs(1));
    for _ in 0..200 {
        assert!(!reader.is_expired(), "it left the file in which the update will be found");
    }
    victim.kill();
    await_expiry(&reader);
    // Found there, it is announced in the new file when the deletion is noticed.
    let start = Instant::now();
    while !newcomer.is_expired() {
        assert!(start.elapsed() < Duration::from_secs(20), "stale for good");
        if reader.is_expired() {
            reader.refresh().unwrap();
        }
    }
}

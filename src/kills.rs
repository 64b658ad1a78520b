//! Guards against SIGKILL at the worst moment: each operation is begun by a process that is killed before its next access of an
//! atomic, or before or after its next system call, for every one of them; then others go on.
//!
//! It stands here and not in `tests/`, as only the crate's own test build can be stopped at the accesses (see `sync/steps.rs`).

#[path = "../tests/support/mod.rs"]
pub(crate) mod support;

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use nix::sys::ptrace;
use nix::sys::signal::{Signal, raise};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::sync::steps;
use crate::{GenerationSynchronizer, Table, WaitSet, update_all};
use support::{Child, LIMIT, in_child, shared_words};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    File,
    Anonymous,
    #[cfg(feature = "shm")]
    Named,
}

const KINDS: &[Kind] = &[
    Kind::File,
    Kind::Anonymous,
    #[cfg(feature = "shm")]
    Kind::Named,
];

/// Where a table is, or will be.
struct Place {
    kind: Kind,
    folder: tempfile::TempDir,
    capacity: u64,
    name: String,
}

impl Place {
    fn new(kind: Kind, capacity: u64) -> Self {
        static PLACES: AtomicU64 = AtomicU64::new(0);
        let name = format!("gensync-kills-{}-{}", std::process::id(), PLACES.fetch_add(1, SeqCst));
        Self { kind, folder: tempfile::tempdir().unwrap(), capacity, name }
    }

    fn open(&self) -> Table {
        let options = Table::options().capacity(self.capacity);
        match self.kind {
            Kind::File => options.open(self.folder.path().join(&self.name)).unwrap(),
            Kind::Anonymous => options.anonymous().unwrap(),
            #[cfg(feature = "shm")]
            Kind::Named => options.named(&self.name).unwrap(),
        }
    }

    /// All that has been made.
    fn files(&self) -> Vec<PathBuf> {
        let entries = |folder: &Path| fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        let mut files: Vec<PathBuf> = entries(self.folder.path());
        #[cfg(feature = "shm")]
        if self.kind == Kind::Named {
            files = entries(Path::new("/dev/shm"));
        }
        files.retain(|path| path.to_str().is_some_and(|path| path.contains(&self.name)));
        files
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.files().into_iter().for_each(|path| _ = fs::remove_file(path));
    }
}

/// A table in which two keys are, and what this process has loaded from their sources.
struct Stage {
    place: Place,
    table: Table,
    syncs: [GenerationSynchronizer; 2],
    sources: &'static [AtomicU64],
    loaded: [u64; 2],
}

impl Stage {
    fn new(kind: Kind, capacity: u64) -> Self {
        let place = Place::new(kind, capacity);
        let table = place.open();
        let syncs = ["key", "other"].map(|key| GenerationSynchronizer::new(&table, key).unwrap());
        Self { place, table, syncs, sources: shared_words(3), loaded: [0; 2] }
    }

    fn update(&self, index: usize) {
        self.syncs[index].update(|| Ok::<_, ()>(self.sources[index].fetch_add(1, SeqCst))).map(drop).unwrap();
    }

    fn update_both(&self) {
        let commit = || Ok::<_, ()>(self.sources[..2].iter().for_each(|source| _ = source.fetch_add(1, SeqCst)));
        update_all(&[&self.syncs[0], &self.syncs[1]], commit).unwrap();
    }

    /// Leaves an update whose maker was killed after its commit.
    fn update_and_die(&self) {
        in_child(|| {
            let _update = self.syncs[0].begin_update().unwrap();
            self.sources[0].fetch_add(1, SeqCst);
            raise(Signal::SIGKILL).unwrap();
        })
        .ends_by_kill();
    }

    fn get(&mut self, index: usize) -> u64 {
        if self.syncs[index].is_expired() {
            let load = || Ok::<_, ()>(self.sources[index].load(SeqCst));
            self.loaded[index] = self.syncs[index].refresh_with(load).unwrap();
        }
        self.loaded[index]
    }

    /// Whoever was killed, whatever it has left: what was changed is seen, and everything can be done.
    fn assert_whole(mut self, story: &str) {
        let start = Instant::now();
        // What is only changed within `update`.
        for index in 0..2 {
            while self.get(index) != self.sources[index].load(SeqCst) {
                assert!(start.elapsed() < LIMIT, "{story}: stale for good");
            }
        }
        while self.table.slots().any(|slot| slot.pending() > 0) {
            assert!(start.elapsed() < LIMIT, "{story}: pending for good");
            (0..2).for_each(|index| _ = self.get(index));
        }
        let fresh = if self.place.kind == Kind::Anonymous { self.table.clone() } else { self.place.open() };
        let other = ["key", "other"].map(|key| GenerationSynchronizer::new(&fresh, key).unwrap());
        let waiter = in_child(|| assert!(self.syncs[0].wait_timeout(LIMIT).is_changed(), "{story}: nobody wakes it"));
        for (sync, other) in self.syncs.iter().zip(&other) {
            other.mark_updated().unwrap();
            assert!(sync.is_expired(), "{story}: two tables where one should be");
            sync.refresh().unwrap();
            other.update(|| Ok::<_, ()>(())).unwrap();
            assert!(sync.is_expired(), "{story}: two tables where one should be");
            sync.refresh().unwrap();
            assert!(!sync.is_expired());
            sync.clear().unwrap();
            assert!(other.is_expired());
        }
        waiter.succeeds();
        for key in 0..6 {
            drop(GenerationSynchronizer::new(&fresh, format!("new {key}")).unwrap());
        }
        let mut digests: Vec<_> = fresh.slots().map(|slot| slot.digest()).collect();
        digests.sort_unstable();
        assert!(digests.windows(2).all(|pair| pair[0] != pair[1]), "{story}: a key is there twice");
        assert!(digests.len() >= 8, "{story}: a key is missing");
        fresh.reset().unwrap();
        assert!(self.syncs.iter().all(GenerationSynchronizer::is_expired), "{story}: a reset is not seen");
        let files = self.place.files();
        assert!(files.len() <= 2, "{story}: unfinished files pile up: {files:?}");
    }
}

/// Where a process is killed.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// After so many accesses of atomics.
    Step(u64),
    /// After so many beginnings and ends of system calls.
    Call(u64),
}

impl Child {
    fn status(self) -> WaitStatus {
        let status = waitpid(self.pid(), None).unwrap();
        // It is gone: there is nothing to kill.
        std::mem::forget(self);
        status
    }

    fn ends_by_kill(self) -> bool {
        match self.status() {
            WaitStatus::Signaled(_, Signal::SIGKILL, _) => true,
            WaitStatus::Exited(_, 0) => false,
            status => panic!("neither killed nor well: {status:?}"),
        }
    }
}

/// Runs `work` in a process that is killed at `moment`; `false` if it ends before.
fn is_killed_at(moment: Moment, work: impl FnOnce()) -> bool {
    match moment {
        Moment::Step(count) => in_child(|| {
            steps::allow(count, || raise(Signal::SIGKILL).unwrap());
            work();
            steps::allow_all();
        })
        .ends_by_kill(),
        Moment::Call(count) => {
            let child = in_child(|| {
                ptrace::traceme().unwrap();
                raise(Signal::SIGSTOP).unwrap();
                work();
            });
            if let Some(status) = stops(child.pid(), count) {
                std::mem::forget(child);
                assert!(matches!(status, WaitStatus::Exited(_, 0)), "not killed, and not well: {status:?}");
                return false;
            }
            child.kill();
            true
        }
    }
}

/// Lets `process` begin or end `count` system calls; its status if it ends before.
fn stops(process: Pid, count: u64) -> Option<WaitStatus> {
    waitpid(process, None).unwrap();
    ptrace::setoptions(process, ptrace::Options::PTRACE_O_TRACESYSGOOD).unwrap();
    for _ in 0..count {
        ptrace::syscall(process, None).unwrap();
        match waitpid(process, None).unwrap() {
            WaitStatus::PtraceSyscall(_) => {}
            status => return Some(status),
        }
    }
    None
}

/// Kills `work` at every moment there is, each time on a new stage, and returns how many there were.
pub(crate) fn kill_everywhere<S>(what: &str, stage: impl Fn() -> S, work: impl Fn(&S), check: impl Fn(S, &str)) {
    let mut counts = [0; 2];
    for (sort, moment) in [Moment::Step as fn(u64) -> Moment, Moment::Call].into_iter().enumerate() {
        for count in 0.. {
            let (stage, moment) = (stage(), moment(count));
            let was_killed = is_killed_at(moment, || work(&stage));
            check(stage, &format!("{what}, killed at {moment:?}"));
            if !was_killed {
                break;
            }
            counts[sort] += 1;
        }
        assert!(counts[sort] > 0, "{what}: nothing was tried");
    }
    println!("{what}: killed at {} accesses, and around {} system calls", counts[0], counts[1] / 2);
}

/// As `kill_everywhere`, with every kind of table.
fn kill_on_every_kind(what: &str, capacity: u64, prepare: impl Fn(&Stage), work: impl Fn(&Stage)) {
    for &kind in KINDS {
        let stage = || {
            let stage = Stage::new(kind, capacity);
            prepare(&stage);
            stage
        };
        kill_everywhere(&format!("{kind:?}: {what}"), stage, &work, Stage::assert_whole);
    }
}

#[test]
fn killed_while_creating() {
    for &kind in KINDS {
        let create = |place: &Place| drop(GenerationSynchronizer::new(&place.open(), "key").unwrap());
        kill_everywhere(
            &format!("{kind:?}: creation"),
            || Place::new(kind, 4),
            create,
            |place, story| {
                let files = place.files();
                assert!(files.len() <= 1, "{story}: {files:?}");
                if kind != Kind::Anonymous && !files.is_empty() {
                    let options = Table::options().read_only(true).create(false);
                    options.open(&files[0]).unwrap_or_else(|error| panic!("{story}: half a table: {error}"));
                }
                create(&place);
            },
        );
    }
}

#[test]
fn killed_while_attaching_and_growing() {
    let attach = |stage: &Stage, key: &str| drop(GenerationSynchronizer::new(&stage.table, key).unwrap());
    kill_on_every_kind("attach to a new key", 64, |_| (), |stage| attach(stage, "new 1"));
    kill_on_every_kind("attach to a key that is there", 64, |_| (), |stage| attach(stage, "other"));
    // Two keys fill a segment of two at most; the third needs room.
    kill_on_every_kind(
        "growth by two segments",
        1,
        |_| (),
        |stage| (0..6).for_each(|key| attach(stage, &format!("new {key}"))),
    );
}

#[test]
fn killed_while_updating() {
    let commit = |stage: &Stage| stage.update(0);
    kill_on_every_kind("update", 4, |_| (), commit);
    kill_on_every_kind("update of two keys", 4, |_| (), Stage::update_both);
    kill_on_every_kind("update after one whose maker died", 4, Stage::update_and_die, commit);
    kill_on_every_kind("abandoned update", 4, |_| (), |stage| stage.syncs[0].begin_update().unwrap().abandon());
    let recover = |stage: &Stage| {
        while !stage.syncs[0].is_expired() {}
    };
    kill_on_every_kind("recovery of an update", 4, Stage::update_and_die, recover);
}

#[test]
fn killed_while_marking_and_loading() {
    kill_on_every_kind("mark_updated", 4, |_| (), |stage| _ = stage.syncs[0].mark_updated().unwrap());
    kill_on_every_kind("clear", 4, |_| (), |stage| stage.syncs[0].clear().unwrap());
    let expire = |stage: &Stage| GenerationSynchronizer::new(&stage.table, "key").unwrap().clear().unwrap();
    kill_on_every_kind("check and load", 4, expire, |stage| {
        assert!(stage.syncs[0].is_expired());
        stage.syncs[0].refresh_with(|| Ok::<_, ()>(())).unwrap();
    });
}

#[test]
fn killed_while_resetting() {
    kill_on_every_kind("reset", 1, |_| (), |stage| stage.table.reset().unwrap());
    kill_on_every_kind("reset with a dead update", 4, Stage::update_and_die, |stage| stage.table.reset().unwrap());
    // The successor is there; who has the old table moves on.
    let reset_elsewhere = |stage: &Stage| match stage.place.kind {
        Kind::Anonymous => stage.table.reset().unwrap(),
        _ => stage.place.open().reset().unwrap(),
    };
    kill_on_every_kind("moving on", 4, reset_elsewhere, |stage| {
        assert!(stage.syncs[0].is_expired());
        stage.syncs[0].refresh().unwrap();
    });
}

#[test]
fn killed_while_waiting() {
    const MOMENT: Duration = Duration::from_micros(100);
    kill_on_every_kind("wait for a key", 4, |_| (), |stage| _ = stage.syncs[0].wait_timeout(MOMENT));
    kill_on_every_kind(
        "wait for several keys",
        4,
        |_| (),
        |stage| {
            _ = stage.syncs.iter().collect::<WaitSet<'_>>().wait_timeout(MOMENT);
        },
    );
    kill_on_every_kind("wait with a dead update", 4, Stage::update_and_die, |stage| {
        assert!(stage.syncs[0].wait_timeout(LIMIT).is_changed());
    });
    kill_on_every_kind(
        "wake",
        4,
        |stage| _ = stage.syncs[0].wait_timeout(MOMENT),
        |stage| {
            stage.syncs[0].mark_updated().unwrap();
        },
    );
}

/// Every update on disk is one of another boot.
fn age(path: &Path) {
    fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(&[0x5a; 16], 128).unwrap();
}

#[test]
fn killed_in_the_first_open_after_a_reboot() {
    for kind in KINDS.iter().copied().filter(|kind| *kind != Kind::Anonymous) {
        let stage = || {
            let stage = Stage::new(kind, 4);
            stage.update_and_die();
            age(&stage.place.files()[0]);
            stage
        };
        let open = |stage: &Stage| drop(stage.place.open());
        kill_everywhere(&format!("{kind:?}: open after a reboot"), stage, open, Stage::assert_whole);
    }
}

#[test]
fn killed_while_finding_the_file_gone() {
    for kind in KINDS.iter().copied().filter(|kind| *kind != Kind::Anonymous) {
        let stage = || {
            let stage = Stage::new(kind, 4);
            fs::remove_file(&stage.place.files()[0]).unwrap();
            stage
        };
        let notice = |stage: &Stage| {
            stage.table.make_look_due();
            stage.table.generation("key").unwrap();
            assert!(stage.syncs[0].is_expired());
        };
        kill_everywhere(&format!("{kind:?}: a deleted file"), stage, notice, |stage, story| {
            notice(&stage);
            stage.assert_whole(story);
        });
    }
}

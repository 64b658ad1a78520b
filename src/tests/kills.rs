//! Guards against SIGKILL at the worst moment: each operation is begun by a process that is killed before its next access of an
//! atomic, or before or after its next system call, once for each of them; then other processes continue.
//!
//! These tests are not in `tests/`, as only the crate's own test build can be stopped at an access (see
//! `protocol/atomic/steps.rs`).

#[path = "../../tests/support/mod.rs"]
pub(crate) mod support;

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, raise};

use crate::protocol::atomic::steps;
use crate::{CacheKey, GenerationSynchronizer, Table, WaitSet, update_all};
use support::place::{KINDS, Kind, Place};
use support::{LIMIT, Traced, in_child, shared_words};

/// A table with two keys, and what this process has loaded from their sources.
struct Stage {
    place: Place,
    table: Table,
    syncs: [GenerationSynchronizer; 2],
    sources: &'static [AtomicU64],
    loaded: [u64; 2],
}

impl Stage {
    fn new(kind: Kind, capacity: u64) -> Self {
        let place = Place::new(kind);
        let table = place.open(Table::options().capacity(capacity));
        let syncs = ["key", "other"].map(|key| GenerationSynchronizer::new(&table, key).unwrap());
        Self { place, table, syncs, sources: shared_words(2), loaded: [0; 2] }
    }

    /// The table as another process opens it; if it is anonymous, as this process has it.
    fn fresh(&self) -> Table {
        self.place.open(Table::options())
    }

    fn update(&self) {
        self.syncs[0].update(|| Ok::<_, ()>(self.sources[0].fetch_add(1, SeqCst))).map(drop).unwrap();
    }

    fn update_both(&self) {
        let commit = || Ok::<_, ()>(self.sources.iter().for_each(|source| _ = source.fetch_add(1, SeqCst)));
        update_all(&[&self.syncs[0], &self.syncs[1]], commit).unwrap();
    }

    /// Leaves an update whose process was killed after its commit.
    fn update_and_die(&self) {
        let maker = in_child(|| {
            let _update = self.syncs[0].begin_update().unwrap();
            self.sources[0].fetch_add(1, SeqCst);
            raise(Signal::SIGKILL).unwrap();
        });
        assert!(maker.ends_by_kill());
    }

    fn get(&mut self, index: usize) -> u64 {
        if self.syncs[index].is_expired() {
            let load = || Ok::<_, ()>(self.sources[index].load(SeqCst));
            self.loaded[index] = self.syncs[index].refresh_with(load).unwrap();
        }
        self.loaded[index]
    }

    /// Whichever process was killed, and whatever it has left: every change is seen, and every operation works.
    fn assert_whole(mut self, story: &str) {
        let start = Instant::now();
        // The sources are changed within `update` only.
        for index in 0..2 {
            while self.get(index) != self.sources[index].load(SeqCst) {
                assert!(start.elapsed() < LIMIT, "{story}: stale for good");
            }
        }
        while self.table.slots().any(|slot| slot.pending() > 0) {
            assert!(start.elapsed() < LIMIT, "{story}: pending for good");
            (0..2).for_each(|index| _ = self.get(index));
        }
        let fresh = self.fresh();
        let other = ["key", "other"].map(|key| GenerationSynchronizer::new(&fresh, key).unwrap());
        let waiter = in_child(|| assert!(self.syncs[0].wait_timeout(LIMIT).is_changed(), "{story}: no wakeup"));
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
    /// After so many entries to and exits from system calls.
    Call(u64),
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
            // Dropping it kills the process where it is.
            let mut traced = Traced::new(work);
            (0..count).all(|_| traced.goes_on())
        }
    }
}

/// Kills `work` at each of its moments, each time on a new stage, checks what it has left, and prints how many moments there
/// were.
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
        let create = |place: &Place| {
            drop(GenerationSynchronizer::new(&place.open(Table::options().capacity(4)), "key").unwrap());
        };
        kill_everywhere(
            &format!("{kind:?}: creation"),
            || Place::new(kind),
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
    let attach =
        |stage: &Stage, key: &str| drop(GenerationSynchronizer::new(&stage.table, CacheKey::raw(key)).unwrap());
    kill_on_every_kind("attach to a new key", 64, |_| (), |stage| attach(stage, "new 1"));
    kill_on_every_kind("attach to a key that is there", 64, |_| (), |stage| attach(stage, "other"));
    // Sixteen slots, of which two are taken already, and a page of texts.
    let fill = |stage: &Stage| (0..14).for_each(|key| attach(stage, &format!("filler {key}")));
    let long = "long ".repeat(1000);
    let grow = |stage: &Stage, key: &str, grown: [bool; 2]| {
        let room = |stage: &Stage| [stage.table.stats().capacity > 16, stage.table.stats().text_bytes > 4096];
        assert_eq!(room(stage), [false; 2]);
        attach(stage, key);
        assert_eq!(room(stage), grown, "the table has not grown as it should");
    };
    for (prepare, key, grown) in [
        (&fill as &dyn Fn(&Stage), "new 1", [true, false]),
        (&|_: &Stage| (), &*long, [false, true]),
        (&fill, &*long, [true, true]),
    ] {
        let stage = Stage::new(Kind::File, 16);
        prepare(&stage);
        grow(&stage, key, grown);
        kill_on_every_kind(&format!("growth {grown:?}"), 16, prepare, |stage| attach(stage, key));
    }
}

#[test]
fn killed_while_updating() {
    kill_on_every_kind("update", 4, |_| (), Stage::update);
    kill_on_every_kind("update of two keys", 4, |_| (), Stage::update_both);
    kill_on_every_kind("update after one whose process died", 4, Stage::update_and_die, Stage::update);
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
    // The successor exists; a holder of the old table moves on.
    let reset_elsewhere = |stage: &Stage| stage.fresh().reset().unwrap();
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

/// Makes the table one of another boot.
fn age(path: &Path) {
    fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(&[0x5a; 16], 128).unwrap();
}

#[test]
fn killed_in_the_first_open_after_a_reboot() {
    for kind in KINDS.iter().copied().filter(|kind| *kind != Kind::Anonymous) {
        let before = &shared_words(1)[0];
        let stage = || {
            let place = Place::new(kind);
            // In a process of its own, as no process may have the table open any more, children of other tests included.
            let maker = in_child(|| {
                let sync = GenerationSynchronizer::new(&place.open(Table::options().capacity(4)), "key").unwrap();
                before.store(sync.sync_gen().unwrap().get(), SeqCst);
                let _update = sync.begin_update().unwrap();
                raise(Signal::SIGKILL).unwrap();
            });
            assert!(maker.ends_by_kill());
            age(&place.files()[0]);
            place
        };
        let open = |place: &Place| drop(place.open(Table::options().capacity(4)));
        kill_everywhere(&format!("{kind:?}: open after a reboot"), stage, open, |place, story| {
            in_child(|| {
                let table = place.open(Table::options().capacity(4));
                let generation = table.generation("key").unwrap().unwrap();
                assert!(generation.get() > before.load(SeqCst), "{story}: not renewed");
                assert!(table.slots().all(|slot| slot.pending() == 0), "{story}: still pending");
                assert!(!table.info().is_of_earlier_boot, "{story}: half an id");
                drop(table);
                let again = place.open(Table::options().capacity(4)).generation("key").unwrap();
                assert_eq!(again, Some(generation), "{story}: renewed again");
            })
            .succeeds();
        });
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
            stage.table.make_revalidation_due();
            stage.table.generation("key").unwrap();
            assert!(stage.syncs[0].is_expired());
        };
        kill_everywhere(&format!("{kind:?}: a deleted file"), stage, notice, |stage, story| {
            notice(&stage);
            stage.assert_whole(story);
        });
    }
}

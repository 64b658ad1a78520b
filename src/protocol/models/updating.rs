//! Crash-safe updates, beside loads of the state, and recoveries of updates that were killed on the way.

use super::{Boxed, Lock, both, model, model_with, table_with_key};
use crate::protocol::atomic::{Arc, AtomicU64, Ordering, thread};
use crate::protocol::generation_word::GenerationWord;
use crate::protocol::observed::Observed;
use crate::protocol::slots::Slots;

// ORDERING: the source is accessed relaxed, and pairs with nothing, so that the protocol and the lock alone order it.

/// A source behind a key of a table, and the lock on its slot.
struct Place {
    table: Arc<Slots<Boxed>>,
    lock: Lock,
    source: AtomicU64,
}

impl Place {
    fn new() -> Arc<Self> {
        Arc::new(Self { table: table_with_key(1, 1), lock: Lock(AtomicU64::new(0)), source: AtomicU64::new(1) })
    }

    fn slot(&self) -> &GenerationWord {
        self.table.slot()
    }

    /// An update that is killed before or after it changes the source, or survives; `false` if it could not begin.
    fn update(&self, commits: bool, survives: bool) -> bool {
        if !self.lock.try_share() {
            return false;
        }
        self.slot().begin_update();
        if commits {
            self.source.store(2, Ordering::Relaxed);
        }
        if survives && commits {
            let before = self.slot().finish_update();
            assert!(before.pending() > 0, "a living update was taken for a dead one");
        } else if survives {
            assert!(self.slot().word().pending() > 0, "a living update was taken for a dead one");
            self.slot().abandon_update();
        }
        self.lock.unshare();
        true
    }

    /// What a reader does that finds a pending update.
    fn recover(&self) {
        if self.slot().word().pending() > 0 && self.lock.try_alone() {
            self.slot().recover();
            self.lock.end_alone();
        }
    }

    /// As `recover`, if a lock that is no update's keeps the reader from locking the slot exclusively.
    fn recover_beside_a_foreign_lock(&self) {
        let found = self.slot().word();
        if found.pending() > 0 && self.lock.is_free() {
            self.slot().recover_from(found);
        }
    }

    fn load(&self) -> (Observed, u64) {
        (Observed::of(self.slot().word()), self.source.load(Ordering::Relaxed))
    }

    /// To be called when all threads have ended: nothing is left pending, and no old state passes for a fresh one.
    fn assert_settled(&self, (observed, state): (Observed, u64)) {
        self.recover();
        let word = self.slot().word();
        assert_eq!(word.pending(), 0, "a pending update was left, or counted out twice");
        assert!(
            !observed.is(word) || state == self.source.load(Ordering::Relaxed),
            "an old state passes for a fresh one"
        );
    }
}

#[test]
fn an_update_ends_in_a_new_generation_wherever_its_maker_is_killed() {
    for (commits, survives) in [(false, false), (true, false), (true, true), (false, true)] {
        model(move || {
            let place = Place::new();
            let (_, loaded) = both(
                &place,
                move |place| place.update(commits, survives),
                |place| {
                    place.recover();
                    place.load()
                },
            );
            place.assert_settled(loaded);
        });
    }
}

#[test]
fn a_recovery_of_a_dead_update_leaves_a_living_one_alone() {
    for commits in [false, true] {
        model(move || {
            let place = Place::new();
            let old = place.load();
            assert!(place.update(true, false));
            let (_, loaded) = both(
                &place,
                move |place| place.update(commits, true),
                |place| {
                    place.recover();
                    let loaded = place.load();
                    place.recover();
                    loaded
                },
            );
            place.assert_settled(loaded);
            place.assert_settled(old);
        });
    }
}

#[test]
fn a_load_beside_an_update_and_its_recovery_does_not_keep_an_old_state() {
    for (commits, survives) in [(true, false), (true, true), (false, true)] {
        model_with(2, move || {
            let place = Place::new();
            let updater = {
                let place = place.clone();
                thread::spawn(move || place.update(commits, survives))
            };
            let recoverer = {
                let place = place.clone();
                thread::spawn(move || place.recover())
            };
            let loaded = place.load();
            updater.join().unwrap();
            recoverer.join().unwrap();
            place.assert_settled(loaded);
        });
    }
}

#[test]
fn a_recovery_beside_a_foreign_lock_leaves_a_living_update_alone() {
    for (commits, survives) in [(false, true), (true, true), (true, false)] {
        model(move || {
            let place = Place::new();
            let old = place.load();
            assert!(place.update(true, false));
            let (_, loaded) = both(
                &place,
                move |place| place.update(commits, survives),
                |place| {
                    place.recover_beside_a_foreign_lock();
                    place.load()
                },
            );
            place.assert_settled(loaded);
            place.assert_settled(old);
        });
    }
}

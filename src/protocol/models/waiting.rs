//! Waiters, and updates that wake them. Under loom no sleep has a limit, so a lost wakeup is a deadlock.

use std::time::Duration;

use super::{Boxed, START, both, key, model, model_with, slots, table_with_key};
use crate::protocol::atomic::{Arc, AtomicU64, Ordering, thread};
use crate::protocol::observed::Observed;
use crate::protocol::slot_digest::Digest;
use crate::protocol::slots::{Memory as _, Slots};

// ORDERING: the source is accessed relaxed, and pairs with nothing, so that the update and the end of the wait alone order it.

/// Without loom, longer than any test: a waiter that sleeps through it is too late.
const LIMIT: Duration = Duration::from_secs(100);

impl Slots<Boxed> {
    fn update(&self) {
        self.announce(self.slot(), self.slot().bump());
    }

    /// Waits for `key` alone.
    pub(super) fn wait_for(&self, key: Digest, seen: Observed) {
        let slot = self.word_of(key).unwrap();
        while seen.may_sleep_on(slot.word()) {
            let wake_word = self.memory().wake_word(slot);
            let armed = wake_word.arm();
            if seen.may_sleep_on(slot.await_update()) {
                wake_word.sleep(armed, LIMIT);
            }
        }
    }

    /// Waits for `key` as one of several, or for the table to be retired.
    pub(super) fn wait_on_table_for(&self, key: Digest, seen: Observed) {
        let slot = self.word_of(key).unwrap();
        while seen.may_sleep_on(slot.word()) {
            let armed = self.header().wake.word.arm();
            if !self.header().is_live() {
                return;
            }
            if seen.may_sleep_on(slot.await_update()) {
                self.header().wake.word.sleep(armed, LIMIT);
            }
        }
    }
}

#[test]
fn a_waiter_does_not_sleep_through_an_update_and_finds_what_came_before_it() {
    for on_table in [false, true] {
        model(move || {
            let shared = Arc::new((table_with_key(2, 1), AtomicU64::new(1)));
            let seen = Observed::of(shared.0.word());
            both(
                &shared,
                |(table, source)| {
                    source.store(2, Ordering::Relaxed);
                    table.update();
                },
                |(table, source)| {
                    if on_table {
                        table.wait_on_table_for(key(0), seen)
                    } else {
                        table.wait_for(key(0), seen)
                    }
                    assert_eq!(source.load(Ordering::Relaxed), 2);
                },
            );
        });
    }
}

#[test]
fn two_waiters_that_saw_different_generations_are_woken_by_two_updaters() {
    two_waiters_and_two_updaters(false);
}

#[test]
fn two_waiters_of_a_table_that_saw_different_generations_are_woken_by_two_updaters() {
    two_waiters_and_two_updaters(true);
}

fn two_waiters_and_two_updaters(on_table: bool) {
    // With four threads, three preemptions would take hours.
    model_with(2, move || {
        let table = table_with_key(2, 1);
        let seen = Observed::of(table.word());
        let updaters = [(); 2].map(|()| {
            let table = table.clone();
            thread::spawn(move || table.update())
        });
        let late = {
            let table = table.clone();
            thread::spawn(move || {
                let seen = Observed::of(table.word());
                if seen.generation().unwrap().get() < START + 2 {
                    table.wait_for(key(0), seen);
                }
            })
        };
        if on_table {
            table.wait_on_table_for(key(0), seen)
        } else {
            table.wait_for(key(0), seen)
        }
        late.join().unwrap();
        updaters.into_iter().for_each(|updater| updater.join().unwrap());
        assert_eq!(table.word().generation().unwrap().get(), START + 2);
    });
}

#[test]
fn a_waiter_that_leaves_does_not_keep_others_from_being_woken() {
    for on_table in [false, true] {
        model_with(2, move || {
            let table = table_with_key(2, 1);
            let seen = Observed::of(table.word());
            // As the waiter that leaves, which was the one to set the bit.
            let _ = table.slot().await_update();
            let others = {
                let (updater, leaver) = (table.clone(), table.clone());
                [
                    thread::spawn(move || updater.update()),
                    thread::spawn(move || leaver.stop_waiting(std::iter::once(leaver.slot()))),
                ]
            };
            if on_table {
                table.wait_on_table_for(key(0), seen)
            } else {
                table.wait_for(key(0), seen)
            }
            others.into_iter().for_each(|other| other.join().unwrap());
            assert_ne!(Observed::of(table.word()), seen);
        });
    }
}

#[test]
fn a_waiter_does_not_sleep_through_the_end_of_its_table() {
    for on_table in [false, true] {
        model(move || {
            let table = table_with_key(2, 1);
            let seen = Observed::of(table.word());
            both(
                &table,
                |table| table.retire().unwrap(),
                |table| if on_table { table.wait_on_table_for(key(0), seen) } else { table.wait_for(key(0), seen) },
            );
        });
    }
}

#[test]
fn a_process_that_attached_beside_the_end_of_a_table_does_not_wait_for_a_dead_update_there() {
    model(|| {
        let table = table_with_key(2, 1);
        table.slot().begin_update();
        both(
            &table,
            |table| table.retire().unwrap(),
            |table| {
                if table.attached(key(0)).is_some() {
                    table.wait_for(key(0), Observed::of(table.word()));
                }
            },
        );
    });
}

#[test]
fn a_recovery_of_a_dead_update_wakes_its_waiters() {
    model(|| {
        let table = table_with_key(2, 1);
        let seen = Observed::of(table.word());
        table.slot().begin_update();
        both(
            &table,
            |table| _ = table.announce(table.slot(), table.slot().recover()),
            |table| table.wait_for(key(0), seen),
        );
    });
}

#[test]
fn a_watcher_of_a_table_does_not_sleep_through_a_new_key() {
    model(|| {
        both(
            &slots(2, 1),
            |table| table.attached(key(0)).unwrap(),
            |table| {
                while !table.all().any(|slot| slot.generation.word().generation().is_some()) {
                    let armed = table.header().wake.word.arm();
                    if !table.all().any(|slot| slot.generation.word().generation().is_some()) {
                        table.header().wake.word.sleep(armed, LIMIT);
                    }
                }
            },
        );
    });
}

#[test]
fn a_watcher_of_an_empty_table_does_not_sleep_through_its_end() {
    model(|| {
        both(
            &slots(1, 1),
            |table| table.retire().unwrap(),
            |table| loop {
                let armed = table.header().wake.word.arm();
                if !table.header().is_live() {
                    return;
                }
                table.header().wake.word.sleep(armed, LIMIT);
            },
        );
    });
}

#[test]
fn a_waiter_does_not_sleep_through_an_update_beside_one_of_a_key_that_shares_its_wake_word() {
    model_with(2, || {
        let table = table_with_key(1, 3);
        let other = Digest::new(2, 2);
        table.attached(other).unwrap();
        let shared = table.memory().wake_word(table.word_of(other).unwrap());
        assert!(std::ptr::eq(shared, table.wake_word()), "the keys do not share a wake word");
        let seen = [key(0), other].map(|key| Observed::of(table.word_of(key).unwrap().word()));
        let waiter = {
            let table = table.clone();
            thread::spawn(move || table.wait_for(other, seen[1]))
        };
        both(
            &table,
            move |table| {
                for digest in [key(0), other] {
                    let word = table.word_of(digest).unwrap();
                    table.announce(word, word.bump());
                }
            },
            move |table| table.wait_for(key(0), seen[0]),
        );
        waiter.join().unwrap();
    });
}

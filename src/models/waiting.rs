//! Waiters and those who wake them. Under loom nobody sleeps for a limited time, so a wake-up that is lost is a deadlock.

use std::time::Duration;

use super::{START, Slots, both, model, model_with, slots};
use crate::models::Boxed;
use crate::slot::{Digest, Sight, Word};
use crate::sync::{Arc, AtomicU64, Ordering, thread};

const KEY: [u64; 2] = [6, 7];
/// Without loom, longer than any test: who sleeps through it is late for good.
const LIMIT: Duration = Duration::from_secs(100);

fn key() -> Digest {
    Digest::new(KEY[0], KEY[1])
}

/// A table with one key, whose source is at `START`.
fn table() -> Arc<Slots<Boxed>> {
    let table = slots(2, 1);
    table.attached(key()).unwrap();
    table
}

impl Slots<Boxed> {
    fn word(&self) -> Word {
        self.find(key()).unwrap().unwrap().word()
    }

    fn generation(&self) -> u64 {
        self.word().generation().unwrap().get()
    }

    fn update(&self) {
        let slot = self.find(key()).unwrap().unwrap();
        self.announce(slot, slot.bump());
    }

    /// Waits for `key` alone.
    pub(super) fn wait_for(&self, key: Digest, seen: Sight) {
        let slot = self.find(key).unwrap().unwrap();
        while seen.may_sleep_on(slot.word()) {
            let armed = slot.wake.arm();
            if seen.may_sleep_on(slot.await_update()) {
                slot.wake.sleep(armed, LIMIT);
            }
        }
    }

    /// Waits for `key` as one of several, or for the table to be retired.
    pub(super) fn wait_on_table_for(&self, key: Digest, seen: Sight) {
        let slot = self.find(key).unwrap().unwrap();
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
            let (table, source) = (table(), Arc::new(AtomicU64::new(1)));
            let seen = Sight::of(table.word());
            both(
                {
                    let (table, source) = (table.clone(), source.clone());
                    move || {
                        source.store(2, Ordering::Relaxed);
                        table.update();
                    }
                },
                || {
                    if on_table {
                        table.wait_on_table_for(key(), seen)
                    } else {
                        table.wait_for(key(), seen)
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
        let table = table();
        let seen = Sight::of(table.word());
        let updaters = [(); 2].map(|()| {
            let table = table.clone();
            thread::spawn(move || table.update())
        });
        let late = {
            let table = table.clone();
            thread::spawn(move || {
                let seen = Sight::of(table.word());
                if seen.generation().unwrap().get() < START + 2 {
                    table.wait_for(key(), seen);
                }
            })
        };
        if on_table {
            table.wait_on_table_for(key(), seen)
        } else {
            table.wait_for(key(), seen)
        }
        late.join().unwrap();
        updaters.into_iter().for_each(|updater| updater.join().unwrap());
        assert_eq!(table.generation(), START + 2);
    });
}

#[test]
fn a_waiter_does_not_sleep_through_the_end_of_its_table() {
    for on_table in [false, true] {
        model(move || {
            let table = table();
            let seen = Sight::of(table.word());
            both(
                {
                    let table = table.clone();
                    move || table.retire().unwrap()
                },
                || if on_table { table.wait_on_table_for(key(), seen) } else { table.wait_for(key(), seen) },
            );
        });
    }
}

#[test]
fn who_finds_a_dead_update_wakes_those_who_wait_for_it() {
    model(|| {
        let table = table();
        let seen = Sight::of(table.word());
        table.find(key()).unwrap().unwrap().begin_update();
        both(
            {
                let table = table.clone();
                move || {
                    let slot = table.find(key()).unwrap().unwrap();
                    table.announce(slot, slot.recover());
                }
            },
            || table.wait_for(key(), seen),
        );
    });
}

#[test]
fn who_watches_the_table_does_not_sleep_through_a_new_key() {
    model(|| {
        let table = slots(2, 1);
        both(
            {
                let table = table.clone();
                move || table.attached(key()).unwrap()
            },
            || {
                while !table.claimed(1).any(|(_, _, slot)| slot.has_label()) {
                    let armed = table.header().wake.word.arm();
                    if !table.claimed(1).any(|(_, _, slot)| slot.has_label()) {
                        table.header().wake.word.sleep(armed, LIMIT);
                    }
                }
            },
        );
    });
}

#[test]
fn who_watches_an_empty_table_does_not_sleep_through_its_end() {
    model(|| {
        let table = slots(1, 1);
        both(
            {
                let table = table.clone();
                move || table.retire().unwrap()
            },
            || loop {
                let armed = table.header().wake.word.arm();
                if !table.header().is_live() {
                    return;
                }
                table.header().wake.word.sleep(armed, LIMIT);
            },
        );
    });
}

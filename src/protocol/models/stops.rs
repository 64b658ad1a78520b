//! Every operation, stopped before each of its steps: afterwards another process can finish all operations, no update is lost,
//! and no key is there twice.
//!
//! A stop stands for a process that is killed: it takes no more steps, and the kernel releases its lock. The others find the
//! memory as it left it. As a stop may leave something that only a second one brings to light, all pairs of stops are tried.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use super::{Boxed, KEYS, START, Size, key, table_of};
use crate::protocol::atomic::{Arc, AtomicU64, Ordering, steps};
use crate::protocol::observed::Observed;
use crate::protocol::slots::Slots;
use crate::protocol::wake::WaitToken;

// ORDERING: relaxed: operations stop and go on in one thread, which sees what it has written.

/// A table, the source of its first key, and a waiter that has loaded the source and sleeps until the key is updated.
struct World {
    table: Arc<Slots<Boxed>>,
    lock: Lock,
    source: AtomicU64,
    /// Whether an update has returned.
    announced: Cell<bool>,
    /// Whether there was a reboot, which no sleeper outlives.
    rebooted: Cell<bool>,
    loaded: (Observed, u64),
    asleep: WaitToken,
}

/// The kernel's lock on a slot. The kernel releases it when its holder dies, which here is an unwinding. Taking it is no step.
#[derive(Default)]
struct Lock {
    sharing: Cell<u32>,
    is_alone: Cell<bool>,
}

struct Shared<'a>(&'a Lock);

impl Drop for Shared<'_> {
    fn drop(&mut self) {
        self.0.sharing.update(|count| count - 1);
    }
}

struct Alone<'a>(&'a Lock);

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.0.is_alone.set(false);
    }
}

impl Lock {
    fn try_share(&self) -> Option<Shared<'_>> {
        (!self.is_alone.get()).then(|| {
            self.sharing.update(|count| count + 1);
            Shared(self)
        })
    }

    fn try_alone(&self) -> Option<Alone<'_>> {
        let is_free = self.sharing.get() == 0 && !self.is_alone.replace(true);
        is_free.then(|| Alone(self))
    }
}

impl World {
    fn new() -> Self {
        // The third key finds no room beside the first, nor does any key's text.
        let table = table_of(Size { capacity: 1, slots: 3, texts: 12, records: 1 });
        table.attached(key(0)).unwrap();
        let asleep = table.wake_word().arm();
        let loaded = (Observed::of(table.slot().await_update()), 1);
        Self {
            table,
            lock: Lock::default(),
            source: AtomicU64::new(1),
            announced: Cell::new(false),
            rebooted: Cell::new(false),
            loaded,
            asleep,
        }
    }

    fn update(&self, ending: Ending) {
        let _lock = self.lock.try_share().expect("no living process has it alone");
        let slot = self.table.slot();
        if !slot.begin_update().is_live() {
            return;
        }
        match ending {
            Ending::Abandon => slot.abandon_update(),
            Ending::Finish => {
                self.source.fetch_add(1, Ordering::Relaxed);
                self.table.announce(slot, slot.finish_update());
                self.announced.set(true);
            }
        }
    }

    fn recover(&self) {
        let slot = self.table.slot();
        if slot.word().pending() > 0 {
            let _lock = self.lock.try_alone().expect("no living process shares it");
            self.table.announce(slot, slot.recover());
        }
    }

    fn wait_on_key(&self) {
        let _ = (self.table.wake_word().arm(), self.table.slot().await_update());
    }

    fn wait_on_table(&self) {
        let _ = (self.table.header().wake.word.arm(), self.table.slot().await_update());
    }

    fn reset(&self) {
        self.table.retire().unwrap();
        self.table.highest().unwrap();
        self.table.header().end_retiring();
        self.announced.set(true);
    }

    fn expire_all(&self) {
        self.table.expire_all().unwrap();
        self.announced.set(true);
    }

    fn renew_all(&self) {
        self.rebooted.set(true);
        self.table.renew_all(START + 100).unwrap();
        self.announced.set(true);
    }

    fn mark_updated(&self) {
        let slot = self.table.slot();
        self.table.announce(slot, slot.bump());
        self.announced.set(true);
    }

    /// Checks the table, does all operations once more, and checks it again. `is_whole`: no operation has stopped halfway.
    fn assert_whole(&self, is_whole: bool, story: &dyn Fn() -> String) {
        self.recover();
        let slot = self.table.slot();
        assert_eq!(slot.word().pending(), 0, "{}: an update is pending for good", story());
        let (observed, state) = self.loaded;
        let is_updated = self.announced.get() || state != self.source.load(Ordering::Relaxed);
        assert!(!(observed.is(slot.word()) && is_updated), "{}: an update is lost", story());
        if is_whole && self.announced.get() && !self.rebooted.get() {
            assert!(!self.table.wake_word().is_same(self.asleep), "{}: the sleeper is not woken", story());
        }
        OPERATIONS.iter().filter(|(name, _)| *name != "reset").for_each(|(_, run)| run(self));
        assert_eq!(slot.word().pending(), 0, "{}: an update is pending for good", story());
        // An updater that stops between its update and the wakeup leaves sleepers, which look again after a slice.
        let is_asleep = self.table.wake_word().is_same(self.asleep);
        assert!(!(is_asleep && observed.is(slot.word())), "{}: the sleeper would find nothing if it looked", story());
        if self.table.header().is_live() {
            for index in 0..KEYS.len() {
                let place = self.table.attached(key(index)).unwrap();
                self.table.assert_unique(key(index), place);
            }
        }
        // A waiter that goes to sleep now is woken by the next update.
        let (armed, word) = (self.table.wake_word().arm(), slot.await_update());
        if word.is_live() {
            self.mark_updated();
            assert!(!self.table.wake_word().is_same(armed), "{}: a new sleeper is not woken", story());
        }
        self.reset();
        for slot in self.table.all() {
            assert!(!slot.generation.word().is_live(), "{}: a slot outlives its table", story());
        }
        assert!(self.table.attached(key(0)).is_none() && self.table.header().is_retired());
    }
}

#[derive(Clone, Copy)]
enum Ending {
    Finish,
    Abandon,
}

type Operation = fn(&World);

const OPERATIONS: &[(&str, Operation)] = &[
    ("attach", |world| _ = world.table.attached(key(0))),
    ("attach beside the same word A, and grow", |world| _ = world.table.attached(key(1))),
    ("attach without room, and grow", |world| _ = world.table.attached(key(2))),
    ("find", |world| _ = world.table.find(key(2)).unwrap()),
    ("update", |world| world.update(Ending::Finish)),
    ("abandon", |world| world.update(Ending::Abandon)),
    ("recover", World::recover),
    ("mark updated", World::mark_updated),
    ("wait for a key", World::wait_on_key),
    ("wait for any key", World::wait_on_table),
    ("expire all", World::expire_all),
    ("renew all", World::renew_all),
    ("reset", World::reset),
];

struct Stopped;

/// Runs the first `count` steps of `operation`; `false` if it has no more than those, and so has ended.
fn stops_after(count: u64, operation: Operation, world: &World) -> bool {
    steps::allow(count, || resume_unwind(Box::new(Stopped)));
    let result = catch_unwind(AssertUnwindSafe(|| operation(world)));
    steps::allow_all();
    match result {
        Ok(()) => false,
        Err(panic) if panic.is::<Stopped>() => true,
        Err(panic) => resume_unwind(panic),
    }
}

#[test]
fn a_process_that_stops_at_any_step_leaves_a_table_that_others_can_use() {
    let (mut single, mut pairs) = (0, 0);
    for &(name, operation) in OPERATIONS {
        for count in 0.. {
            let world = World::new();
            let has_stopped = stops_after(count, operation, &world);
            world.assert_whole(!has_stopped, &|| format!("{name}, stopped after {count} steps"));
            single += 1;
            for &(second_name, second) in OPERATIONS {
                for second_count in 0.. {
                    let world = World::new();
                    let first_has_stopped = stops_after(count, operation, &world);
                    let has_stopped = stops_after(second_count, second, &world);
                    world.assert_whole(!(first_has_stopped || has_stopped), &|| {
                        format!("{name}, stopped after {count} steps; then {second_name}, after {second_count}")
                    });
                    pairs += 1;
                    if !has_stopped {
                        break;
                    }
                }
            }
            if !has_stopped {
                break;
            }
        }
    }
    println!("{} operations: {single} stops, {pairs} pairs of stops", OPERATIONS.len());
}

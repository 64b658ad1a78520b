//! What a map knows of the waits for its values.

#[cfg(feature = "future")]
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::cached::period::Period;
use crate::cached::wait::SHORTEST_PAUSE;
use crate::os::clock::coarse_now;
use crate::synchronizer::GenerationSynchronizer;
#[cfg(feature = "future")]
use crate::wait::notifier::Notifier;

/// What a map knows of the waits for its values.
#[derive(Default)]
pub(super) struct Waits {
    /// When a wait last ended that has left nothing in the map by which the next one is paced, as it finds no value there: the
    /// value has found no room, or the key cannot be attached to. In milliseconds of the coarse clock.
    fruitless: AtomicU64,
    /// How many tasks wait.
    #[cfg(feature = "future")]
    tasks: AtomicUsize,
}

// ORDERING: relaxed throughout: `fruitless` is a time to be compared. `tasks` is raised before the task looks for the value in
// place, and read after a value was put there. Both happen under the same lock of the cache, so either the task finds that value,
// or its addition comes before the read.
impl Waits {
    pub(super) fn note_fruitless(&self) {
        self.fruitless.store(coarse_now(), Ordering::Relaxed);
    }

    /// The pause before a wait may load a value that is not in the map.
    pub(super) fn pause(&self) -> Period {
        Period::new(self.fruitless.load(Ordering::Relaxed), SHORTEST_PAUSE)
    }

    /// Wakes the tasks that wait for the key of `sync`, of which another value was put in place.
    pub(super) fn wake(&self, sync: &GenerationSynchronizer) {
        #[cfg(feature = "future")]
        if self.tasks.load(Ordering::Relaxed) > 0 {
            sync.table().companion::<Notifier>().wake_tasks(sync.cache_key());
        }
        #[cfg(not(feature = "future"))]
        let _ = sync;
    }

    /// Counts a task that waits until what this returns is dropped.
    #[cfg(feature = "future")]
    pub(super) fn begin_task(&self) -> WaitingTask<'_> {
        self.tasks.fetch_add(1, Ordering::Relaxed);
        WaitingTask(self)
    }
}

#[cfg(feature = "future")]
pub(super) struct WaitingTask<'m>(&'m Waits);

#[cfg(feature = "future")]
impl Drop for WaitingTask<'_> {
    fn drop(&mut self) {
        self.0.tasks.fetch_sub(1, Ordering::Relaxed);
    }
}

//! Which thread of this process waits for which load: loads that wait for each other in a circle would never end.
//!
//! A thread says what it is about to wait for, and then follows the waits from there: to the thread that makes that load, to
//! the load which that thread waits for, and so on. If it comes back to itself, it fails instead of waiting. All this is
//! done under one lock, so the last thread of a circle finds the others' waits, and nobody finds a circle that is none: a
//! thread that is woken is on the list for a moment longer, but the load that it waited for has ended, which ends the path.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

use arc_swap::ArcSwapOption;

use crate::os::fork::{OfOneProcess, token};

pub(super) struct Waits {
    process: u64,
    threads: Mutex<HashMap<ThreadId, Wait>>,
}

struct Wait {
    /// The thread that makes the load, until it has ended.
    leader: Box<dyn Fn() -> Option<ThreadId> + Send>,
    /// For people.
    key: String,
}

/// The keys of loads that wait for each other, each for the next one, and the last for the first.
#[derive(Debug)]
pub(super) struct Circle(Vec<String>);

impl fmt::Display for Circle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the loads wait for each other: ")?;
        self.0.iter().try_for_each(|key| write!(f, "\"{}\" for ", key.escape_debug()))?;
        write!(f, "\"{}\"", self.0.first().map_or("", String::as_str).escape_debug())
    }
}

impl std::error::Error for Circle {}

impl OfOneProcess for Waits {
    fn new() -> Self {
        Self { process: token(), threads: Mutex::default() }
    }

    fn is_inherited(&self) -> bool {
        self.process != token()
    }
}

impl Waits {
    /// This process's. Made at the first wait, without a lock that a child could inherit.
    fn get() -> Arc<Self> {
        static WAITS: ArcSwapOption<Waits> = ArcSwapOption::const_empty();
        loop {
            let present = WAITS.load_full();
            if let Some(present) = present.clone().filter(|present| !present.is_inherited()) {
                return present;
            }
            WAITS.compare_and_swap(&present, Some(Arc::new(Self::new())));
            // Never dropped, as it may be in any state.
            std::mem::forget(present);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ThreadId, Wait>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// This thread's wait, until it is dropped.
pub(super) struct Waiting(Arc<Waits>);

impl Waiting {
    /// For a wait that ends when there is no `pilot` any more, which is the thread that makes the load.
    pub(super) fn new(leader: impl Fn() -> Option<ThreadId> + Send + 'static, key: &str) -> Result<Self, Circle> {
        let (waits, this) = (Waits::get(), std::thread::current().id());
        let mut threads = waits.lock();
        let mut keys = vec![key.to_owned()];
        let mut next = leader();
        while let Some(thread) = next {
            if thread == this {
                return Err(Circle(keys));
            }
            let Some(wait) = threads.get(&thread) else { break };
            keys.push(wait.key.clone());
            next = (wait.leader)();
        }
        threads.insert(this, Wait { leader: Box::new(leader), key: key.to_owned() });
        drop(threads);
        Ok(Self(waits))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let wait = self.0.lock().remove(&std::thread::current().id());
        // Not under the lock: it may be the last hold of its flights, and of an error of the user's in them.
        drop(wait);
    }
}

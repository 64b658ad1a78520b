//! Records which thread of this process waits for which load, to detect loads that wait for each other in a circle and would
//! never end.
//!
//! Before a thread waits for a load, it follows the waits from there: to the leader of that load, to the load which that thread
//! waits for, and so on. If the path leads back to the thread itself, it fails instead of waiting; otherwise it records its wait.
//! All this is done under one lock, so the last thread of a circle finds the waits of the others. No thread finds a circle where
//! there is none: the wait of a thread that was woken stays on record for a moment, but the load that it waited for has ended,
//! which ends the path.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

use crate::os::fork::{ForkLocal, OfOneProcess, token};

pub(super) struct Waits {
    process: u64,
    threads: Mutex<HashMap<ThreadId, Wait>>,
}

struct Wait {
    /// Returns the leader of the load; `None` when the load has ended.
    leader: Box<dyn Fn() -> Option<ThreadId> + Send>,
    /// The key of the value, for the error's text.
    key: String,
}

/// The keys of loads that wait for each other, each for the next one, and the last one for the first.
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
    /// The waits of this process.
    fn get() -> Arc<Self> {
        static WAITS: ForkLocal<Waits> = ForkLocal::new();
        WAITS.get()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ThreadId, Wait>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps the wait of this thread on record until it is dropped.
pub(super) struct Waiting(Arc<Waits>);

impl Waiting {
    /// Records a wait for the load that `leader` returns the leader of, until it returns `None`.
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
        // Not under the lock: this may drop the last reference to a `SingleFlight`, and with it an error of the user.
        drop(wait);
    }
}

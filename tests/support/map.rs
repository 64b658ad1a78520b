//! A source of many values, and maps of them.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use gensync::{CacheKey, CachedMap, CachedMapBuilder, Table};

use super::support::await_value;

/// A source of numbers by their ids, of which each can be changed and broken. An id that was not set has the value 0.
#[derive(Clone, Debug, Default)]
pub(crate) struct Database(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    values: Mutex<HashMap<u64, Result<u64, String>>>,
    loads: AtomicU64,
    /// How many loads may end, plus one; zero if there is no limit.
    allowed: AtomicU64,
}

impl Database {
    pub(crate) fn set(&self, id: u64, value: Result<u64, &str>) {
        self.0.values.lock().unwrap().insert(id, value.map_err(str::to_owned));
    }

    pub(crate) fn change(&self, id: u64, value: u64) -> io::Result<()> {
        self.set(id, Ok(value));
        Ok(())
    }

    pub(crate) fn load(&self, id: &u64) -> Result<u64, String> {
        let load = self.0.loads.fetch_add(1, SeqCst) + 1;
        while (1..=load).contains(&self.0.allowed.load(SeqCst)) {
            std::thread::yield_now();
        }
        self.0.values.lock().unwrap().get(id).cloned().unwrap_or(Ok(0))
    }

    /// How many loads have begun.
    pub(crate) fn loads(&self) -> u64 {
        self.0.loads.load(SeqCst)
    }

    pub(crate) fn await_loads(&self, loads: u64) {
        await_value(&self.0.loads, loads);
    }

    /// Loads from here on wait until more of them are allowed.
    pub(crate) fn hold_up(&self) {
        self.allow(0);
    }

    /// Lets so many of the loads that were held up, or come next, go on.
    pub(crate) fn allow(&self, more: u64) {
        match self.0.allowed.load(SeqCst) {
            0 => self.0.allowed.store(self.loads() + more + 1, SeqCst),
            allowed => self.0.allowed.store(allowed + more, SeqCst),
        }
    }

    pub(crate) fn allow_all(&self) {
        self.0.allowed.store(0, SeqCst);
    }

    /// A builder of a map that loads from here.
    pub(crate) fn map(&self, table: &Table) -> CachedMapBuilder<u64, u64> {
        let this = self.clone();
        CachedMap::builder(table, key, move |id| this.load(id))
    }
}

/// The key of `id` in the table.
pub(crate) fn key(id: &u64) -> CacheKey {
    ["user", &id.to_string()].into()
}

/// Fails if `work` takes longer than anything takes: it hangs.
pub(crate) fn must_end<R: Send + 'static>(work: impl FnOnce() -> R + Send + 'static) -> R {
    let (send, receive) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || send.send(work()));
    match receive.recv_timeout(super::support::LIMIT) {
        Ok(result) => result,
        Err(_) if thread.is_finished() => std::panic::resume_unwind(thread.join().unwrap_err()),
        Err(_) => panic!("it hangs"),
    }
}

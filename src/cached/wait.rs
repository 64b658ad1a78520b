//! Waiting for the next value.

use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::{Cached, Entry, Terms};
use crate::error::Error;
use crate::handle::coarse_now;
use crate::wait::{Awaited, Waited, wait_for_any};

impl<T> Cached<T> {
    /// Blocks until the value that is in place is expired, and returns the fresh one; if none is in place yet, loads it.
    ///
    /// As [`GenerationSynchronizer::wait`](crate::GenerationSynchronizer::wait), it ends at once if the value is expired
    /// already, and several updates may be told as one; it also ends when the value is too old, or a key that it depends on is
    /// updated. What counts as in place is up to all threads: one that must act on each new value while others may load it
    /// calls [`wait_past`](Self::wait_past) with the one that it has.
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get), whatever was built to hide errors. The next wait does not try again before the
    /// [`retry_pause`](crate::CachedBuilder::retry_pause) has passed, so that a loop does not storm a broken source.
    ///
    /// # Progress
    ///
    /// Blocking, without polling: as [`GenerationSynchronizer::wait`](crate::GenerationSynchronizer::wait).
    pub fn wait(&self) -> Result<Arc<T>, Error> {
        loop {
            if let Some(value) = self.wait_until(None, None)? {
                return Ok(value);
            }
        }
    }

    /// As [`wait`](Self::wait), no longer than `timeout`: `None` says that the time was up. A load is not cut short.
    ///
    /// # Errors
    ///
    /// As [`wait`](Self::wait).
    ///
    /// # Progress
    ///
    /// As [`wait`](Self::wait).
    pub fn wait_timeout(&self, timeout: Duration) -> Result<Option<Arc<T>>, Error> {
        self.wait_until(None, Instant::now().checked_add(timeout))
    }

    /// As [`wait_timeout`](Self::wait_timeout), until `deadline`.
    ///
    /// # Errors
    ///
    /// As [`wait`](Self::wait).
    ///
    /// # Progress
    ///
    /// As [`wait`](Self::wait).
    pub fn wait_deadline(&self, deadline: Instant) -> Result<Option<Arc<T>>, Error> {
        self.wait_until(None, Some(deadline))
    }

    /// Blocks until there is a fresh value other than `known`, which this `Cached` gave, and returns it.
    ///
    /// # Errors
    ///
    /// As [`wait`](Self::wait).
    ///
    /// # Progress
    ///
    /// As [`wait`](Self::wait).
    pub fn wait_past(&self, known: &Arc<T>) -> Result<Arc<T>, Error> {
        loop {
            if let Some(value) = self.wait_until(Some(known), None)? {
                return Ok(value);
            }
        }
    }

    /// Until there is a fresh value that is not `known`; any other than the present one if none is.
    fn wait_until(&self, known: Option<&Arc<T>>, deadline: Option<Instant>) -> Result<Option<Arc<T>>, Error> {
        let known = |entry: &Arc<Entry<T>>| known.is_none_or(|known| Arc::ptr_eq(known, &entry.value));
        if let Some(entry) = self.current.load_full().filter(known) {
            let awaited: Vec<_> = self.tickets(&entry).map(|(sync, ticket)| Awaited { sync, ticket }).collect();
            let age = self.policy.max_age.map(|_| entry.expires.saturating_sub(coarse_now()));
            let expires = age.and_then(|age| Instant::now().checked_add(Duration::from_millis(age)));
            // Nobody need keep an old value for this one's sake.
            drop(entry);
            let end = deadline.into_iter().chain(expires).min();
            if wait_for_any(&awaited, end) == Waited::TimedOut && end == deadline {
                return Ok(None);
            }
        }
        if let Some(ended) = self.flights.get().last_failure() {
            let retry = ended.saturating_add(self.policy.retry_pause()).saturating_sub(coarse_now());
            let pause = Duration::from_millis(retry);
            match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                Some(left) if left < pause => {
                    sleep(left);
                    return Ok(None);
                }
                _ => sleep(pause),
            }
        }
        self.get_slow(Terms::FRESH).map(|entry| Some(entry.value()))
    }
}

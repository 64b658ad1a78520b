//! Waiting for the next value.

use std::ptr;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::period::Period;
use super::{Cached, Entry, GetOptions};
use crate::error::{Error, ErrorKind};
use crate::os::clock::{Deadline, coarse_now};
use crate::wait::{Awaited, SLICE, wait_for_any};

/// Even if no pause is asked for, a loop of waits does not keep the processor busy with loads that fail.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);

impl<T: ?Sized> Cached<T> {
    /// Blocks until the value that is in place is expired, and returns the fresh one; if none is in place yet, loads it.
    ///
    /// ```
    /// # use gensync::{Cached, GenerationSynchronizer, Table};
    /// # fn load_routes() -> Result<Vec<String>, std::io::Error> { Ok(Vec::new()) }
    /// # fn main() -> Result<(), gensync::Error> {
    /// # let table = Table::options().anonymous()?;
    /// let routes = Cached::new(GenerationSynchronizer::new(&table, "routes")?, load_routes);
    /// loop {
    ///     match routes.wait() {
    ///         Ok(routes) => println!("{} routes", routes.len()),
    ///         Err(error) => eprintln!("will be tried again: {error}"), // after the retry_pause
    ///     }
    /// #   break;
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// As [`GenerationSynchronizer::wait`](crate::GenerationSynchronizer::wait), it ends at once if the value is expired
    /// already, and several updates may be told as one; it also ends when the value is too old, or a key that it depends on is
    /// updated. What counts as in place is up to all threads: one that must act on each new value while others may load it
    /// calls [`wait_past`](Self::wait_past) with the one that it has.
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get), whatever was built to hide errors. The next wait does not try again before the
    /// [`retry_pause`](crate::CachedBuilder::retry_pause) has passed, and 10 milliseconds at least, so that a loop does not storm
    /// a broken source.
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

    /// As [`wait`](Self::wait), no longer than `timeout`: `None` says that the time was up, also while another thread loads or a broken
    /// source rests. A load that this call runs itself is not cut short. A value that is expired already is told of even
    /// without a timeout.
    ///
    /// # Errors
    ///
    /// As [`wait`](Self::wait).
    ///
    /// # Progress
    ///
    /// As [`wait`](Self::wait).
    pub fn wait_timeout(&self, timeout: Duration) -> Result<Option<Arc<T>>, Error> {
        self.wait_until(None, Deadline::after(timeout))
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
        self.wait_until(None, Some(Deadline::at(deadline)))
    }

    /// Blocks until there is a fresh value other than `known`, which this `Cached` gave, and returns it. What a loader
    /// [shares](Self::new_shared) is another value only if it is another `Arc`.
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
    fn wait_until(&self, known: Option<&Arc<T>>, deadline: Option<Deadline>) -> Result<Option<Arc<T>>, Error> {
        // Nobody need keep an old value for this one's sake.
        let present = self.current.load_full().as_ref().map_or_else(Weak::new, Arc::downgrade);
        let is_known = |entry: &Arc<Entry<T>>| match known {
            Some(known) => Arc::ptr_eq(known, &entry.value),
            None => ptr::eq(present.as_ptr(), Arc::as_ptr(entry)),
        };
        loop {
            if let Some(entry) = self.current.load_full().filter(&is_known)
                && !self.is_outlived(entry, deadline)
            {
                return Ok(None);
            }
            if !self.rest_after_failure(deadline) {
                return Ok(None);
            }
            match self.get_slow(GetOptions { deadline, ..GetOptions::FRESH }) {
                Ok(entry) if is_known(&entry) => {}
                Ok(entry) => return Ok(Some(entry.value())),
                Err(error) if *error.kind() == ErrorKind::Deadline => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// Sleeps until `entry` is expired, or no longer in place; `false` if that is not so at the deadline.
    fn is_outlived(&self, entry: Arc<Entry<T>>, deadline: Option<Deadline>) -> bool {
        let awaited: Vec<_> = self.tickets(&entry).map(|(sync, ticket)| Awaited { sync, ticket }).collect();
        let age = self.policy.max_age.map(|_| entry.age);
        let address = Arc::as_ptr(&entry);
        drop(entry);
        loop {
            let now = coarse_now();
            if age.is_some_and(|age| age.is_over(now)) {
                return true;
            }
            let end = age.and_then(|age| age.end(now)).map(Deadline::at);
            let end = deadline.into_iter().chain(end).chain(Deadline::after(SLICE)).min();
            if wait_for_any(&awaited, end).is_changed() {
                return true;
            }
            // By another thread's invalidation, of which no key tells.
            if !self.current.load().as_ref().is_some_and(|entry| ptr::eq(Arc::as_ptr(entry), address)) {
                return true;
            }
            if deadline.is_some_and(Deadline::is_reached) {
                return age.is_some_and(|age| age.is_over(coarse_now()));
            }
        }
    }

    /// Sleeps until a load that failed may be tried again, or another thread has loaded well; `false` if that is not so at the
    /// deadline.
    fn rest_after_failure(&self, deadline: Option<Deadline>) -> bool {
        let single_flight = self.single_flight.get();
        // Not a later one's pause as well: threads that do not wait may fail again and again.
        let Some(ended) = single_flight.last_failure() else { return true };
        let pause = Period::new(ended, self.policy.retry_pause.max(SHORTEST_PAUSE));
        while single_flight.last_failure().is_some() {
            let now = coarse_now();
            if pause.is_over(now) {
                break;
            }
            if deadline.is_some_and(Deadline::is_reached) {
                return false;
            }
            let end = deadline.map(|deadline| deadline.at).into_iter().chain(pause.end(now)).min();
            single_flight.rest(end.or_else(|| Instant::now().checked_add(SLICE)));
        }
        true
    }
}

//! Waiting for the next value.

use std::ptr;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::period::Period;
use super::{Cached, Entry, GetOptions};
use crate::error::{Error, ErrorKind};
use crate::os::clock::{Deadline, coarse_now};
use crate::wait::{Awaited, SLICE, wait_for_any};

/// The least pause after a load that failed, so that a loop of waits does not keep the processor busy even if the `retry_pause`
/// is zero.
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
    /// As [`GenerationSynchronizer::wait`](crate::GenerationSynchronizer::wait), this ends at once if the value is expired
    /// already, and several updates may be reported as one. It also ends when the value is too old, or when a key that it depends
    /// on is updated. Any thread may replace the value in place: a thread that must act on each new value while other threads may
    /// load calls [`wait_past`](Self::wait_past) with the value that it has.
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get), even if this `Cached` was built to serve old values after errors. The next wait does not try again
    /// before the [`retry_pause`](crate::CachedBuilder::retry_pause) has passed, and at least 10 milliseconds, so that a loop
    /// does not flood a broken source with loads.
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

    /// As [`wait`](Self::wait), no longer than `timeout`. `None` means that the timeout has passed, possibly while another thread
    /// was loading, or in the pause after a load that failed. A load that this call runs itself is not interrupted. If the value
    /// is expired already, it is loaded even if the timeout is zero.
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

    /// Blocks until there is a fresh value other than `known`, which this `Cached` has returned before, and returns it. Values of
    /// a loader that [shares](Self::new_shared) them are different only if they are different `Arc`s.
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

    /// Waits until there is a fresh value other than `known`, or other than the value in place if `known` is `None`. Returns
    /// `None` at the deadline.
    fn wait_until(&self, known: Option<&Arc<T>>, deadline: Option<Deadline>) -> Result<Option<Arc<T>>, Error> {
        // Weak, as a call that waits must not keep an old value alive.
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

    /// Sleeps until `entry` is expired or no longer in place; returns `false` if it is neither at the deadline.
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
            // Another thread may have loaded or invalidated the value, which no key reports.
            if !self.current.load().as_ref().is_some_and(|entry| ptr::eq(Arc::as_ptr(entry), address)) {
                return true;
            }
            if deadline.is_some_and(Deadline::is_reached) {
                return age.is_some_and(|age| age.is_over(coarse_now()));
            }
        }
    }

    /// Sleeps until the load may be tried again after a failure, or another thread has loaded successfully; returns `false` if
    /// the deadline comes first.
    fn rest_after_failure(&self, deadline: Option<Deadline>) -> bool {
        let single_flight = self.single_flight.get();
        // Only the pause of this failure counts: threads that do not wait may fail again and again, and each failure would
        // prolong it.
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

//! Waiting for the next value.

use std::ops::Deref;
use std::ptr;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::base::Base;
use super::cell::Cell as _;
use super::period::Period;
use super::single_flight::SingleFlight;
use super::{Cached, Entry, GetOptions};
use crate::error::{Error, ErrorKind};
use crate::os::clock::{Deadline, coarse_now};
use crate::synchronizer::{GenerationSynchronizer, Ticket};
use crate::wait::{Awaited, SLICE, wait_for_any};

/// The least pause after a load that failed, so that a loop of waits does not keep the processor busy even if the `retry_pause`
/// is zero.
pub(super) const SHORTEST_PAUSE: Duration = Duration::from_millis(10);

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
        let options = GetOptions { deadline, ..GetOptions::FRESH };
        wait_until(&self.base, known, deadline, || self.get_slow(options))
    }
}

/// What a wait asks of a value, which stands alone or is one of a map. A wait may last for ever: what it keeps while it sleeps is
/// no more than what is returned here.
pub(super) trait Waitable {
    type Value: ?Sized;

    /// The entry in place, expired or not.
    fn present(&self) -> Option<Arc<Entry<Self::Value>>>;
    /// Whether `entry` is the one that is `known`.
    fn is_same(&self, known: &Known<Self::Value>, entry: &Arc<Entry<Self::Value>>) -> bool;
    /// Whether the entry that is `known` was replaced or invalidated in this process, which no key reports.
    fn is_replaced(&self, known: &Known<Self::Value>) -> bool;
    /// The synchronizer of the value's key.
    fn sync(&self) -> Result<impl Deref<Target = GenerationSynchronizer>, Error>;
    fn single_flight(&self) -> Result<Arc<SingleFlight>, Error>;
    fn retry_pause(&self) -> Duration;

    /// A pause before the next load that no other load ends.
    fn pause(&self) -> Option<Period> {
        None
    }
}

/// An entry that a wait knows, without keeping its value alive. While this exists, no other entry or value has its address.
pub(super) struct Known<T: ?Sized> {
    pub(super) entry: Weak<Entry<T>>,
    #[cfg_attr(not(feature = "map"), expect(dead_code, reason = "entries of a map have no address that stays"))]
    pub(super) value: Weak<T>,
    #[cfg_attr(not(feature = "map"), expect(dead_code, reason = "entries of a map have no address that stays"))]
    pub(super) ticket: Ticket,
}

impl<T: ?Sized> Known<T> {
    pub(super) fn of(entry: &Arc<Entry<T>>) -> Self {
        let ticket = entry.freshness.ticket;
        Self { entry: Arc::downgrade(entry), value: Arc::downgrade(&entry.value), ticket }
    }
}

impl<T: ?Sized> Waitable for Base<T> {
    type Value = T;

    fn present(&self) -> Option<Arc<Entry<T>>> {
        self.current()
    }

    fn is_same(&self, known: &Known<T>, entry: &Arc<Entry<T>>) -> bool {
        ptr::eq(known.entry.as_ptr(), Arc::as_ptr(entry))
    }

    fn is_replaced(&self, known: &Known<T>) -> bool {
        !self.current.load().as_ref().is_some_and(|entry| self.is_same(known, entry))
    }

    fn sync(&self) -> Result<impl Deref<Target = GenerationSynchronizer>, Error> {
        Ok(&self.sync)
    }

    fn single_flight(&self) -> Result<Arc<SingleFlight>, Error> {
        Ok(self.single_flight.get())
    }

    fn retry_pause(&self) -> Duration {
        self.policy.retry_pause
    }
}

/// What tells the value that a wait is to end with from the one that is known already: `known`, or the value in place if that is
/// `None`.
pub(super) fn is_known<W: Waitable + ?Sized>(
    place: &W,
    known: Option<&Arc<W::Value>>,
) -> impl Fn(&Arc<Entry<W::Value>>) -> bool {
    let present = if known.is_none() { place.present().as_ref().map(Known::of) } else { None };
    move |entry| match known {
        Some(known) => Arc::ptr_eq(known, &entry.value),
        None => present.as_ref().is_some_and(|present| place.is_same(present, entry)),
    }
}

/// Blocks until there is a fresh value other than `known`, or other than the value in place if `known` is `None`; `load` returns
/// the fresh entry. Returns `None` at the deadline.
pub(super) fn wait_until<W: Waitable + ?Sized>(
    place: &W,
    known: Option<&Arc<W::Value>>,
    deadline: Option<Deadline>,
    load: impl Fn() -> Result<Arc<Entry<W::Value>>, Error>,
) -> Result<Option<Arc<W::Value>>, Error> {
    let is_known = is_known(place, known);
    let mut awaited = place.present().filter(&is_known);
    loop {
        if let Some(entry) = awaited.take()
            && !is_outlived(place, entry, deadline)?
        {
            return Ok(None);
        }
        if !rest(place, deadline)? {
            return Ok(None);
        }
        match load() {
            Ok(entry) if is_known(&entry) => awaited = Some(entry),
            Ok(entry) => return Ok(Some(entry.value())),
            Err(error) if *error.kind() == ErrorKind::Deadline => return Ok(None),
            Err(error) => return Err(error),
        }
    }
}

/// Sleeps until `entry` is expired or no longer in place; returns `false` if it is neither at the deadline.
fn is_outlived<W: Waitable + ?Sized>(
    place: &W,
    entry: Arc<Entry<W::Value>>,
    deadline: Option<Deadline>,
) -> Result<bool, Error> {
    // What decides is kept, but not the value.
    let (freshness, known, sync) = (entry.freshness.clone(), Known::of(&entry), place.sync()?);
    drop(entry);
    let awaited: Vec<_> = freshness.tickets(&sync).map(|(sync, ticket)| Awaited { sync, ticket }).collect();
    let age = Some(freshness.age()).filter(|age| !age.is_endless());
    loop {
        let now = coarse_now();
        // Another thread may have loaded or invalidated the value, which no key reports.
        if age.is_some_and(|age| age.is_over(now)) || place.is_replaced(&known) {
            return Ok(true);
        }
        let end = age.and_then(|age| age.end(now)).map(Deadline::at);
        let end = deadline.into_iter().chain(end).chain(Deadline::after(SLICE)).min();
        if wait_for_any(&awaited, end).is_changed() {
            return Ok(true);
        }
        if deadline.is_some_and(Deadline::is_reached) {
            return Ok(age.is_some_and(|age| age.is_over(coarse_now())) || place.is_replaced(&known));
        }
    }
}

/// Sleeps until the value may be loaded again after a failure, or another thread has loaded successfully; returns `false` if the
/// deadline comes first.
fn rest<W: Waitable + ?Sized>(place: &W, deadline: Option<Deadline>) -> Result<bool, Error> {
    let is_reached = || deadline.is_some_and(Deadline::is_reached);
    let end = |pause: Period| deadline.map(|deadline| deadline.at).into_iter().chain(pause.end(coarse_now())).min();
    if let Some(pause) = place.pause() {
        while !pause.is_over(coarse_now()) {
            if is_reached() {
                return Ok(false);
            }
            let end = end(pause).map(|end| end.saturating_duration_since(Instant::now()));
            std::thread::sleep(end.map_or(SLICE, |end| end.min(SLICE)));
        }
    }
    // Only the pause of this failure counts: threads that do not wait may fail again and again, and each failure would prolong it.
    let Some(ended) = place.single_flight()?.last_failure() else { return Ok(true) };
    let pause = Period::new(ended, place.retry_pause().max(SHORTEST_PAUSE));
    loop {
        // Asked for each time: a map may have forgotten it meanwhile.
        let single_flight = place.single_flight()?;
        if single_flight.last_failure().is_none() || pause.is_over(coarse_now()) {
            return Ok(true);
        }
        if is_reached() {
            return Ok(false);
        }
        single_flight.rest(end(pause).or_else(|| Instant::now().checked_add(SLICE)));
    }
}

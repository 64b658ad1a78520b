//! Waiting for the next value of a key.

use std::borrow::Borrow;
use std::hash::Hash;
use std::ops::Deref;
use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::CachedMap;
use super::core::Core;
use crate::cached::cell::Cell as _;
use crate::cached::load::{self, Call, GetOptions};
use crate::cached::period::Period;
use crate::cached::single_flight::SingleFlight;
use crate::cached::value::Entry;
use crate::cached::wait::{Known, Waitable, wait_until};
use crate::error::{Error, ErrorKind};
use crate::os::clock::Deadline;
use crate::synchronizer::GenerationSynchronizer;

impl<K: Clone + Eq + Hash, V> CachedMap<K, V> {
    /// Blocks until the value of `key` that is in the map is expired, and returns the fresh one; if none is in the map, loads it.
    ///
    /// ```
    /// # use gensync::{CachedMap, Table};
    /// # fn main() -> Result<(), gensync::Error> {
    /// # let table = Table::options().anonymous()?;
    /// # fn load_routes(site: &String) -> std::io::Result<Vec<String>> { Ok(vec![format!("/{site}")]) }
    /// let routes = CachedMap::builder(&table, |site: &String| ["routes", site].into(), load_routes).build();
    /// loop {
    ///     match routes.wait("shop") {
    ///         Ok(routes) => println!("{} routes", routes.len()),
    ///         Err(error) => eprintln!("will be tried again: {error}"), // after the retry_pause
    ///     }
    /// #   break;
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// As [`Cached::wait`](crate::Cached::wait), this ends at once if the value is expired already, and several updates may be
    /// reported as one. It also ends when the value is too old, when a key that it depends on is updated, and, within half a
    /// second, when another thread has replaced or [invalidated](Self::invalidate) it. A thread that must act on each new value
    /// while other threads may load calls [`wait_past`](Self::wait_past) with the value that it has.
    ///
    /// That the value is evicted or removed meanwhile is no news: the wait goes on until it would have expired, or another value
    /// of the key is in the map. An invalidation finds only a value that is in the map. A wait is no use of the value, and keeps
    /// neither the value nor anything else of the key in the map.
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get), even if the map was built to serve old values after errors. The next wait does not try again before
    /// the [`retry_pause`](crate::CachedMapBuilder::retry_pause) has passed, and at least 10 milliseconds, so that a loop does
    /// not flood a broken source with loads. Nor does a wait load a value that is not in the map within 10 milliseconds of one
    /// that the map has found no room for.
    ///
    /// # Panics
    ///
    /// As [`get`](Self::get).
    ///
    /// # Progress
    ///
    /// Blocking, without polling: as [`GenerationSynchronizer::wait`](crate::GenerationSynchronizer::wait).
    pub fn wait<Q>(&self, key: &Q) -> Result<Arc<V>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        loop {
            if let Some(value) = self.wait_until(key, None, None)? {
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
    /// # Panics
    ///
    /// As [`wait`](Self::wait).
    ///
    /// # Progress
    ///
    /// As [`wait`](Self::wait).
    pub fn wait_timeout<Q>(&self, key: &Q, timeout: Duration) -> Result<Option<Arc<V>>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        self.wait_until(key, None, Deadline::after(timeout))
    }

    /// As [`wait_timeout`](Self::wait_timeout), until `deadline`.
    ///
    /// # Errors
    ///
    /// As [`wait`](Self::wait).
    ///
    /// # Panics
    ///
    /// As [`wait`](Self::wait).
    ///
    /// # Progress
    ///
    /// As [`wait`](Self::wait).
    pub fn wait_deadline<Q>(&self, key: &Q, deadline: Instant) -> Result<Option<Arc<V>>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        self.wait_until(key, None, Some(Deadline::at(deadline)))
    }

    /// Blocks until there is a fresh value of `key` other than `known`, which this map has returned before, and returns it. If
    /// `known` is no longer in the map, that is at once.
    ///
    /// # Errors
    ///
    /// As [`wait`](Self::wait).
    ///
    /// # Panics
    ///
    /// As [`wait`](Self::wait).
    ///
    /// # Progress
    ///
    /// As [`wait`](Self::wait).
    pub fn wait_past<Q>(&self, key: &Q, known: &Arc<V>) -> Result<Arc<V>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        loop {
            if let Some(value) = self.wait_until(key, Some(known), None)? {
                return Ok(value);
            }
        }
    }

    fn wait_until<Q>(
        &self,
        key: &Q,
        known: Option<&Arc<V>>,
        deadline: Option<Deadline>,
    ) -> Result<Option<Arc<V>>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        let place = Place { core: &self.core, key: key.to_owned() };
        let options = GetOptions { deadline, ..GetOptions::FRESH };
        let load = || {
            let cell = place.core.attend(place.key.clone())?;
            load::run(Call::new(&cell, options), || (self.loader)(&cell.key))
        };
        let waited = wait_until(&place, known, deadline, load);
        match &waited {
            Ok(None) => {}
            Ok(Some(_)) => place.note_end(None),
            Err(error) => place.note_end(Some(error)),
        }
        waited
    }
}

/// One key of a map, which is not attended.
pub(super) struct Place<'m, K: Clone + Eq + Hash, V> {
    pub(super) core: &'m Core<K, V>,
    pub(super) key: K,
}

impl<K: Clone + Eq + Hash, V> Place<'_, K, V> {
    /// To be called at the end of a wait that has loaded or failed.
    pub(super) fn note_end(&self, error: Option<&Error>) {
        // What a load that failed has left behind paces the next wait by itself.
        let has_left_nothing = match error {
            None => self.core.present(&self.key).is_none(),
            Some(error) => !matches!(error.kind(), ErrorKind::Load { .. }),
        };
        if has_left_nothing {
            self.core.waits.note_fruitless();
        }
    }
}

impl<K: Clone + Eq + Hash, V> Waitable for Place<'_, K, V> {
    type Value = V;

    fn present(&self) -> Option<Arc<Entry<V>>> {
        self.core.present(&self.key).map(Arc::new)
    }

    fn is_same(&self, known: &Known<V>, entry: &Arc<Entry<V>>) -> bool {
        ptr::eq(known.value.as_ptr(), Arc::as_ptr(&entry.value))
    }

    fn is_replaced(&self, known: &Known<V>) -> bool {
        // An invalidation leaves the value in place, with another ticket.
        self.present().is_some_and(|entry| !self.is_same(known, &entry) || entry.freshness.ticket != known.ticket)
    }

    fn sync(&self) -> Result<impl Deref<Target = GenerationSynchronizer>, Error> {
        Ok(self.core.attend(self.key.clone())?.shared_sync())
    }

    fn single_flight(&self) -> Result<Arc<SingleFlight>, Error> {
        Ok(self.core.attend(self.key.clone())?.single_flight())
    }

    fn retry_pause(&self) -> Duration {
        self.core.policy().retry_pause
    }

    fn pause(&self) -> Option<Period> {
        self.core.present(&self.key).is_none().then(|| self.core.waits.pause())
    }
}

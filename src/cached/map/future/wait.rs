//! Waiting for the next value of a key in a task.

use std::borrow::Borrow;
use std::hash::Hash;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use super::CachedMap;
use crate::cached::drive;
use crate::cached::future::wait::{TaskWaitable, wait};
use crate::cached::load::{Call, GetOptions};
use crate::cached::map::wait::Place;
use crate::cached::single_flight::Waiter;
use crate::error::Error;
use crate::os::clock::coarse_now;
use crate::table::Table;

impl<K: Clone + Eq + Hash, V> CachedMap<K, V> {
    /// Waits until the value of `key` that is in the map is expired, and returns the fresh one; if none is in the map, loads it.
    ///
    /// ```
    /// # use gensync::{Table, future::CachedMap};
    /// # async fn load_routes(site: String) -> std::io::Result<Vec<String>> { Ok(vec![format!("/{site}")]) }
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), gensync::Error> {
    /// # let table = Table::options().anonymous()?;
    /// let routes = CachedMap::builder(&table, |site: &String| ["routes", site].into(), load_routes).build();
    /// loop {
    ///     match routes.wait("shop").await {
    ///         Ok(routes) => println!("{} routes", routes.len()),
    ///         Err(error) => eprintln!("will be tried again: {error}"), // after the retry_pause
    ///     }
    /// #   break;
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// This ends at once if the value is expired already, and several updates may be reported as one. It also ends when the value
    /// is too old, when a key that it depends on is updated, and when another task has replaced or
    /// [invalidated](Self::invalidate) it. A task that must act on each new value while other tasks may load calls
    /// [`wait_past`](Self::wait_past) with the value that it has. For a limit of time, use that of your runtime. For a value that
    /// is evicted or removed meanwhile, see [`gensync::CachedMap::wait`](crate::CachedMap::wait).
    ///
    /// # Cancel safety
    ///
    /// Cancel-safe: if the future is dropped before it is ready, the next wait ends at once if the value in the map is expired. A
    /// load that this call runs is dropped with it, see [the module](crate::future#a-call-that-is-dropped).
    ///
    /// # Errors
    ///
    /// As [`gensync::CachedMap::wait`](crate::CachedMap::wait), and with its pauses. Also if no thread can be started.
    ///
    /// # Panics
    ///
    /// As [`get`](Self::get).
    ///
    /// # Progress
    ///
    /// As [`GenerationSynchronizer::changed`](crate::GenerationSynchronizer::changed), for each key; then as [`get`](Self::get).
    /// A wait yields once, so that a loop of waits does not keep other tasks from running.
    pub async fn wait<Q>(&self, key: &Q) -> Result<Arc<V>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        self.wait_for_other(key.to_owned(), None).await
    }

    /// Waits until there is a fresh value of `key` other than `known`, which this map has returned before, and returns it. If
    /// `known` is no longer in the map, that is at once.
    ///
    /// # Cancel safety
    ///
    /// Cancel-safe, as [`wait`](Self::wait).
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
    pub async fn wait_past<Q>(&self, key: &Q, known: &Arc<V>) -> Result<Arc<V>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        self.wait_for_other(key.to_owned(), Some(known)).await
    }

    async fn wait_for_other(&self, key: K, known: Option<&Arc<V>>) -> Result<Arc<V>, Error> {
        let place = &Place { core: &self.core, key };
        let _waiting = self.core.waits.begin_task();
        let load = || async {
            let cell = place.core.attend(place.key.clone())?;
            drive::run(Call::new(&cell, GetOptions::FRESH), || (self.loader)(cell.key.clone())).await
        };
        let waited = wait(place, known, load).await;
        place.note_end(waited.as_ref().err());
        waited
    }
}

impl<K: Clone + Eq + Hash, V> TaskWaitable for Place<'_, K, V> {
    fn waiter(&self) -> Option<Waiter> {
        None
    }

    fn table(&self) -> &Table {
        self.core.table()
    }

    fn fail(&self, _context: &Context<'_>, error: Error) -> Poll<Result<(), Error>> {
        // A pause of the task itself would need the thread that could not be started.
        if !self.core.waits.pause().is_over(coarse_now()) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Poll::Ready(Err(error))
    }
}

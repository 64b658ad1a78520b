//! Waiting for a value in an event loop.

use super::base::Base;
use super::{Cached, cell};
use crate::error::Error;
use crate::os::clock::coarse_now;
#[cfg(feature = "async")]
use crate::wait::notifier::Notifier;
use crate::wait::pollable::Pollable;

impl<T: ?Sized> Cached<T> {
    /// A descriptor that becomes readable when the value may be expired: with each update of its key and of the keys that it
    /// [depends on](crate::CachedBuilder::depends_on), and when the value in place reaches its
    /// [age](crate::CachedBuilder::max_age); at once if the value is expired, or there is none. Several of these events may be
    /// reported as one.
    ///
    /// It does not load. When a new value is loaded, the descriptor follows the age of that value. Of the keys that a loader
    /// [finds](crate::depend_on), it follows those of the value that is in place when it is made: for such a value, make another
    /// descriptor after each load.
    ///
    /// ```
    /// use gensync::{Cached, GenerationSynchronizer, Table};
    /// use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    /// # use std::os::fd::AsFd;
    ///
    /// # fn load_routes() -> Result<Vec<String>, std::io::Error> { Ok(Vec::new()) }
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let table = Table::options().anonymous()?;
    /// let routes = Cached::new(GenerationSynchronizer::new(&table, "routes")?, load_routes);
    /// let pollable = routes.pollable()?;
    /// loop {
    ///     // A load that failed must be tried again after a while, as the descriptor does not become readable for it.
    ///     let timeout = if routes.peek().is_fresh() { PollTimeout::NONE } else { PollTimeout::from(1000u16) };
    ///     poll(&mut [PollFd::new(pollable.as_fd(), PollFlags::POLLIN)], timeout)?; // among others
    ///     pollable.acknowledge();
    ///     if let Err(error) = routes.get() {
    ///         eprintln!("will be tried again: {error}");
    ///     }
    /// #   break;
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// An age is noticed to within the clock's tick, some milliseconds.
    ///
    /// # Errors
    ///
    /// As [`GenerationSynchronizer::pollable`](crate::GenerationSynchronizer::pollable).
    ///
    /// # Progress
    ///
    /// As [`GenerationSynchronizer::pollable`](crate::GenerationSynchronizer::pollable), for each key.
    pub fn pollable(&self) -> Result<Pollable, Error> {
        self.base.pollable()
    }
}

impl<T: ?Sized> Base<T> {
    fn pollable(&self) -> Result<Pollable, Error> {
        let entry = self.current.load_full();
        let keys = match &entry {
            Some(entry) => entry.freshness.tickets(&self.sync).collect::<Vec<_>>(),
            None => cell::keys(self).map(|sync| (sync, sync.ticket())).collect(),
        };
        let pollable = Pollable::of_keys(&keys)?;
        if let Some(registration) = pollable.first() {
            self.single_flight.get().add_alarm(registration);
        }
        // A value that was loaded before the alarm was added did not set it; a later one does.
        match self.current.load_full() {
            None => pollable.make_readable(),
            Some(present) if entry.is_none() || !self.is_fresh(&present) => pollable.make_readable(),
            Some(present) => self.single_flight.get().set_alarms(present.freshness.age().due()),
        }
        Ok(pollable)
    }

    /// Notifies all descriptors and tasks now.
    pub(super) fn ring_alarms(&self) {
        self.single_flight.get().set_alarms(coarse_now());
        #[cfg(feature = "async")]
        self.sync.table().companion::<Notifier>().wake_tasks(self.sync.cache_key());
    }
}

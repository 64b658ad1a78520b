//! Waiting in an event loop: a descriptor that is readable when a key was updated.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::Error;
use crate::synchronizer::{GenerationSynchronizer, Ticket};
use crate::wait::notifier::{Registration, Target};

/// A descriptor that becomes readable when a key was updated: for `poll`, `epoll` and event loops that are built on them.
///
/// It becomes readable once for each change, or for several changes at a time, whether or not they are adopted; and twice a
/// second while the table cannot be attached to. A load that fails must be tried again by a timer of the program.
///
/// Made by [`GenerationSynchronizer::pollable`]. It belongs to the process that made it: a child that is forked later shares the
/// descriptor with its parent, and must make one of its own.
///
/// ```
/// use gensync::{GenerationSynchronizer, Table};
/// use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
/// # use std::os::fd::AsFd;
///
/// # fn load_routes() -> Result<(), gensync::Error> { Ok(()) }
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let table = Table::options().anonymous()?;
/// let sync = GenerationSynchronizer::new(&table, "routes")?;
/// let pollable = sync.pollable()?;
/// # GenerationSynchronizer::new(&table, "routes")?.mark_updated()?;
/// loop {
///     // A load that failed must be tried again after a while, as the descriptor does not become readable for it.
///     let timeout = if sync.is_expired() { PollTimeout::from(1000u16) } else { PollTimeout::NONE };
///     poll(&mut [PollFd::new(pollable.as_fd(), PollFlags::POLLIN)], timeout)?; // among others
///     pollable.acknowledge();
///     if sync.is_expired()
///         && let Err(error) = sync.refresh_with(load_routes)
///     {
///         eprintln!("will be tried again: {error}");
///     }
/// #   break;
/// }
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Pollable {
    descriptor: Arc<EventFd>,
    registrations: Vec<Arc<Registration>>,
}

impl Pollable {
    /// A descriptor that becomes readable when the generation of one of the keys is not the one of its ticket. There must be at
    /// least one key.
    pub(crate) fn of_keys(keys: &[(&GenerationSynchronizer, Ticket)]) -> Result<Self, Error> {
        let descriptor = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| keys[0].0.explain(Error::system("making a descriptor to poll", errno)))?;
        let descriptor = Arc::new(descriptor);
        let register = |(sync, ticket): &(&GenerationSynchronizer, Ticket)| {
            Registration::new(sync, *ticket, Target::Descriptor(Arc::clone(&descriptor))).map(Arc::new)
        };
        let registrations = keys.iter().map(register).collect::<Result<_, _>>()?;
        Ok(Self { descriptor, registrations })
    }

    pub(crate) fn first(&self) -> Option<&Arc<Registration>> {
        self.registrations.first()
    }

    pub(crate) fn make_readable(&self) {
        // This fails only if the count is at its maximum, 2^64 - 2, and then the descriptor is readable.
        let _ = self.descriptor.write(1);
    }

    /// Makes the descriptor unreadable until the next update; `false` if it was unreadable already. To be called before the state
    /// is loaded, so that an update during the load makes the descriptor readable again.
    ///
    /// # Progress
    ///
    /// One system call, which does not block.
    pub fn acknowledge(&self) -> bool {
        self.descriptor.read().is_ok()
    }
}

impl AsFd for Pollable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl AsRawFd for Pollable {
    fn as_raw_fd(&self) -> RawFd {
        self.descriptor.as_fd().as_raw_fd()
    }
}

impl GenerationSynchronizer {
    /// A descriptor that becomes readable with each update of the key that this synchronizer has not seen at the time of this
    /// call: at once if the state is expired. Several updates may be reported as one.
    ///
    /// All descriptors and tasks of a [`Table`](crate::Table) in one process share one thread, which starts with the first of
    /// them and ends with the last. The thread has all signals blocked.
    ///
    /// # Errors
    ///
    /// No descriptor is left, or no thread can be started.
    ///
    /// # Progress
    ///
    /// Makes a descriptor, and takes a lock that is shared by the threads of this process only; the shared thread holds this lock
    /// while it reads one word of each key that has waiters. The first descriptor starts the thread. If the table was replaced,
    /// this attaches to the successor: opening, mapping and retiring files. Dropping the [`Pollable`] takes the same lock, closes
    /// the descriptor, and wakes the thread if it was the last one.
    pub fn pollable(&self) -> Result<Pollable, Error> {
        Pollable::of_keys(&[(self, self.seen_ticket())])
    }
}

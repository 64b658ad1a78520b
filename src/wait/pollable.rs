//! Waiting in an event loop: a descriptor that is readable when a key was updated.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::Error;
use crate::synchronizer::{GenerationSynchronizer, Ticket};
use crate::wait::notifier::{Registration, Target};

/// A descriptor that becomes readable when a key was updated: for `poll`, `epoll` and what is made of them.
///
/// It becomes so once for each change, or for several at a time, whether or not that is adopted; and twice a second while the
/// table cannot be attached to. A load that fails must be tried again by a timer of the program's own.
///
/// Made by [`GenerationSynchronizer::pollable`]. It is the process's own: a child that was forked since shares its parent's,
/// and must make one for itself.
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
///     // A load that failed is tried again by and by, as nothing else asks for it.
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
    /// Readable when one of the keys is not what its ticket saw. There must be one.
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
        // It fails if nobody has read it for 2^64 - 2 times, and then it is readable.
        let _ = self.descriptor.write(1);
    }

    /// Makes it unreadable until the next update; `false` if it was already. To be called before the state is loaded, so that
    /// an update during the load makes it readable again.
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
    /// A descriptor that becomes readable with each update of the key, from the generation on that this synchronizer has seen
    /// now: if it is expired, at once. Several updates may be told as one.
    ///
    /// All descriptors and tasks of a [`Table`](crate::Table) in one process share one thread, which begins with the first and
    /// ends with the last. Its signals are blocked.
    ///
    /// # Errors
    ///
    /// No descriptor is left, or no thread can be started.
    ///
    /// # Progress
    ///
    /// Makes a descriptor, and takes a lock that only threads of this process have, which the thread holds while it looks at
    /// one word of each key that is waited for. The first one starts the thread. If the table was replaced, it attaches to the
    /// successor, which is opened and mapped. Dropping the [`Pollable`] takes the same lock, closes the descriptor, and wakes
    /// the thread if it was the last one.
    pub fn pollable(&self) -> Result<Pollable, Error> {
        Pollable::of_keys(&[(self, self.seen_ticket())])
    }
}

//! The end of the listener: the reader of a pipe is gone, or a terminal was closed.
//!
//! A command that waits writes nothing for hours, so a failing write would not show it in time. Therefore a thread polls the
//! descriptor, and the kernel reports the hangup without a write.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Held during work that must be completed before the process may end.
static BUSY: Mutex<()> = Mutex::new(());

/// From now on, the process ends with `status` when the other end of standard output is gone.
pub(crate) fn end_with_the_listener(status: u8) {
    // If no thread can be started, the next write finds out.
    let _ = std::thread::Builder::new().name("hangup".to_owned()).spawn(move || {
        let out = io::stdout();
        let mut descriptors = [PollFd::new(out.as_fd(), PollFlags::empty())];
        loop {
            match poll(&mut descriptors, PollTimeout::NONE) {
                Err(Errno::EINTR) => {}
                Err(_) => return,
                Ok(_) => {
                    let found = descriptors[0].revents().unwrap_or(PollFlags::empty());
                    if !found.intersects(PollFlags::POLLERR | PollFlags::POLLHUP) {
                        return;
                    }
                    let _guard = busy();
                    std::process::exit(status.into());
                }
            }
        }
    });
}

/// While this guard is held, a hangup does not end the process.
pub(crate) fn busy() -> MutexGuard<'static, ()> {
    BUSY.lock().unwrap_or_else(PoisonError::into_inner)
}

//! The end of who listens: a pipe whose reader is gone, a terminal that was closed.
//!
//! A command that waits writes nothing for hours, and would not find out by writing. So a thread asks the kernel, which tells
//! without anything being written.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Held while something is done that is to be completed first.
static BUSY: Mutex<()> = Mutex::new(());

/// From now on, the process ends with `status` when standard output has nobody at its other end.
pub(crate) fn end_with_the_listener(status: u8) {
    // Without a thread, it is as it would be without this: found out by writing.
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

/// While this is kept, the process goes on.
pub(crate) fn busy() -> MutexGuard<'static, ()> {
    BUSY.lock().unwrap_or_else(PoisonError::into_inner)
}

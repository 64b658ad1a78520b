//! Locks on parts of a table's file that the kernel lets go of when their holder dies.
//!
//! They are open-file-description locks: they belong to a descriptor, not to a process, so threads of one process hold
//! them side by side. A forked child has the descriptor too, and would keep the lock of a parent that is killed; one that
//! the parent lets go of is gone for the child as well.

use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::stat::fstat;

use crate::error::Error;
use crate::mapping::Identity;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Shared,
    Exclusive,
}

/// A part of a file, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) start: u64,
    /// 0: to the end of the file, wherever that will be.
    pub(crate) length: u64,
}

impl Range {
    fn describe(self, kind: libc::c_int) -> libc::flock {
        libc::flock {
            l_type: kind as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: self.start as libc::off_t,
            l_len: self.length as libc::off_t,
            l_pid: 0,
        }
    }
}

/// A lock that is held. Dropped by the process that took it, it is let go of; dropped by a forked child, it is not.
#[derive(Debug)]
pub(crate) struct RangeLock {
    file: ManuallyDrop<File>,
    identity: Identity,
    range: Range,
    owner: u32,
}

impl RangeLock {
    /// Takes the lock, if nobody holds one against it. `file` must not share its description with anybody.
    pub(crate) fn try_new(file: File, identity: Identity, range: Range, kind: Kind) -> Result<Option<Self>, Error> {
        let is_taken = set(file.as_fd(), range, Some(kind))?;
        Ok(is_taken.then(|| Self { file: ManuallyDrop::new(file), identity, range, owner: std::process::id() }))
    }

    /// Whether this is a forked child's copy of its parent's.
    pub(crate) fn is_inherited(&self) -> bool {
        self.owner != std::process::id()
    }
}

impl AsFd for RangeLock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for RangeLock {
    fn drop(&mut self) {
        // Who closes all descriptors to become a daemon may have given the number to another file.
        if !fstat(&*self.file).is_ok_and(|stat| Identity::of(&stat) == self.identity) {
            return;
        }
        // Closing the descriptor would not do while a child has it.
        if !self.is_inherited() {
            let _ = fcntl(&*self.file, FcntlArg::F_OFD_SETLK(&self.range.describe(libc::F_UNLCK)));
        }
        let _ = nix::unistd::close(self.file.as_raw_fd());
    }
}

/// Makes the lock that `file`'s own description has on the range one of another kind, or none: in one step, so that nobody
/// else gets it in between. `false` while somebody holds a lock against it; then nothing has changed.
pub(crate) fn set(file: BorrowedFd<'_>, range: Range, kind: Option<Kind>) -> Result<bool, Error> {
    let wanted = match kind {
        Some(Kind::Shared) => libc::F_RDLCK,
        Some(Kind::Exclusive) => libc::F_WRLCK,
        None => libc::F_UNLCK,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&range.describe(wanted))) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(errno) => Err(Error::system("locking a part of the table's file", errno)),
    }
}

/// What kind of lock somebody holds on a part of the range, other than through the description of `file`.
pub(crate) fn held(file: BorrowedFd<'_>, range: Range) -> nix::Result<Option<Kind>> {
    let mut answer = range.describe(libc::F_WRLCK);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut answer))?;
    Ok(match libc::c_int::from(answer.l_type) {
        libc::F_RDLCK => Some(Kind::Shared),
        libc::F_WRLCK => Some(Kind::Exclusive),
        _ => None,
    })
}

//! Reserving room in a file before it is used.

use std::io::IoSlice;
use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::sys::stat::fstat;
use rustix::io::{ReadWriteFlags, pwritev2};

use crate::error::{Error, ErrorKind};

/// What the failure to map memory means for a table that grows.
pub(crate) fn no_room(error: Error, bytes: u64) -> Error {
    use std::error::Error as _;
    let source = error.source().and_then(|source| source.downcast_ref::<std::io::Error>()?.raw_os_error());
    match source.map(Errno::from_raw) {
        Some(Errno::ENOMEM | Errno::EAGAIN) => ErrorKind::TableFull {
            reason: format!("this process may map no further {bytes} bytes"),
            advice: "reset the table to be rid of old keys, or raise the limits on address space and locked memory (ulimit -v, -l)",
        }
        .into(),
        _ => error,
    }
}

/// Refuses a file size over the process's limit, for which the kernel would send SIGXFSZ, which kills.
pub(crate) fn check_size_limit(size: u64) -> Result<(), Error> {
    match getrlimit(Resource::RLIMIT_FSIZE) {
        Ok((limit, _)) if limit != RLIM_INFINITY && size > limit => Err(ErrorKind::TableFull {
            reason: format!("the file would grow to {size} bytes, over the process's file size limit of {limit}"),
            advice: "raise the limit (ulimit -f)",
        }
        .into()),
        _ => Ok(()),
    }
}

/// Reserves the bytes from `start` to `end` on the disk, so that writing there cannot fail later.
///
/// By fallocate itself, which never shrinks the file, keeps its contents, and writes nothing. Where the file system does not
/// support it (ramfs, ext2), zeros are written behind the file's end.
pub(crate) fn allocate(file: BorrowedFd<'_>, start: u64, end: u64) -> Result<(), Error> {
    check_size_limit(end)?;
    // In pieces, so that a process that is interrupted by signals again and again still makes progress.
    const PIECE: u64 = 16 << 20;
    let mut from = start;
    while from < end {
        let length = PIECE.min(end - from);
        match fallocate(file, FallocateFlags::empty(), from.cast_signed(), length.cast_signed()) {
            Ok(()) => from += length,
            Err(Errno::EINTR) => {}
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => return append(file, end),
            Err(errno) => return Err(Error::system(RESERVING, errno)),
        }
    }
    Ok(())
}

const RESERVING: &str = "reserving room for the table";

/// Appends zeros until the file has `end` bytes or more.
///
/// Several processes may append at once while others already use what one of them has appended. Each piece goes to where the
/// file ends at that moment, so nothing is ever overwritten; at worst, the file becomes longer than needed by one piece for
/// each process.
fn append(file: BorrowedFd<'_>, end: u64) -> Result<(), Error> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    loop {
        let size = fstat(file).map_err(|errno| Error::system(RESERVING, errno))?.st_size.cast_unsigned();
        if size >= end {
            return Ok(());
        }
        // As many as are missing; fewer than the whole array only at the end.
        let length = ZEROS.len().min(usize::try_from(end - size).unwrap_or(usize::MAX));
        match pwritev2(file, &[IoSlice::new(&ZEROS[..length])], 0, ReadWriteFlags::APPEND) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(Error::system(RESERVING, Errno::from_raw(errno.raw_os_error()))),
        }
    }
}

/// Has the file system rewrite a file, which is still empty, in place, if it would write elsewhere otherwise (btrfs): only then
/// is reserved room of use. Nothing changes if that is not possible.
pub(crate) fn rewrite_in_place(file: BorrowedFd<'_>) {
    // Only on btrfs, where the flag means this: other file systems may not know it, or refuse it.
    if rustix::fs::fstatfs(file).is_ok_and(|stat| stat.f_type == nix::sys::statfs::BTRFS_SUPER_MAGIC.0)
        && let Ok(flags) = rustix::fs::ioctl_getflags(file)
    {
        let _ = rustix::fs::ioctl_setflags(file, flags | rustix::fs::IFlags::NOCOW);
    }
}

//! Whether the file system writes a file's pages to another place when they are rewritten, although room was reserved for them.

#![expect(unsafe_code, reason = "asks for a file's extents, for which there is no safe call")]

use std::fs::File;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use nix::libc;

/// The kernel's `struct fiemap` with some extents (linux/fiemap.h).
#[repr(C)]
struct Map {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [Extent; COUNT],
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved: [u64; 2],
    flags: u32,
    reserved_too: [u32; 3],
}

const COUNT: usize = 64;
/// `_IOWR('f', 11, struct fiemap)`, which is 32 bytes without its extents.
const FS_IOC_FIEMAP: u32 = 0xc020_660b;
const LAST: u32 = 0x1;
const SHARED: u32 = 0x2000;

/// The reason why an update on a full disk would end in a SIGBUS; `None` if none is known.
pub(crate) fn written_elsewhere(path: &Path, kind: &str) -> Option<&'static str> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = File::options().read(true).custom_flags(flags).open(path).ok()?;
    let is_in_place =
        || rustix::fs::ioctl_getflags(file.as_fd()).is_ok_and(|flags| flags.contains(rustix::fs::IFlags::NOCOW));
    if shares_extents(&file) {
        Some("shares extents with a snapshot or a copy")
    } else if kind == "btrfs" && !is_in_place() {
        Some("is not rewritten in place, as it was not made here")
    } else {
        None
    }
}

/// `false` also where the file system does not report it.
fn shares_extents(file: &File) -> bool {
    let mut start = 0;
    loop {
        let mut map = Map {
            start,
            length: u64::MAX - start,
            flags: 0,
            mapped: 0,
            count: COUNT as u32,
            reserved: 0,
            extents: [Extent::default(); COUNT],
        };
        // SAFETY: the kernel writes to `map` no more extents than `count` says, for which there is room.
        if unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP as _, &raw mut map) } != 0 {
            return false;
        }
        let found = &map.extents[..COUNT.min(map.mapped as usize)];
        if found.iter().any(|extent| extent.flags & SHARED != 0) {
            return true;
        }
        match found.last() {
            Some(last) if last.flags & LAST == 0 && last.length > 0 => start = last.logical + last.length,
            _ => return false,
        }
    }
}

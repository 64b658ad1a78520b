//! What the system reports about a table's file and the place that it is in.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{FsType, statfs};
use nix::sys::statvfs::statvfs;

/// The name of the file system that `path` is on.
pub(crate) fn kind(path: &Path) -> String {
    // The kernel's numbers (linux/magic.h).
    let names = [
        (0x0102_1994, "tmpfs"),
        (0x8584_58f6, "ramfs"),
        (0xef53, "ext4"),
        (0x5846_5342, "xfs"),
        (0x9123_683e, "btrfs"),
        (0x794c_7630, "overlayfs"),
        (0x2fc1_2fc1, "zfs"),
        (0x6573_5546, "FUSE"),
        (0xf2f5_2010, "f2fs"),
    ];
    let Ok(answer) = statfs(path) else { return "unknown".to_owned() };
    let FsType(number) = answer.filesystem_type();
    let name = names.into_iter().find(|(known, _)| *known == number);
    name.map_or_else(|| format!("{number:#x}"), |(_, name)| name.to_owned())
}

/// Whether the file system is memory.
pub(crate) fn is_memory(kind: &str) -> bool {
    matches!(kind, "tmpfs" | "ramfs")
}

/// How much room there is for files.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    pub(crate) total: u64,
    pub(crate) available: u64,
    /// Whether another file may be made.
    pub(crate) has_inodes: bool,
}

/// `None` where there is no limit.
pub(crate) fn room(path: &Path) -> Option<Room> {
    let answer = statvfs(path).ok().filter(|answer| answer.blocks() > 0)?;
    let bytes = |blocks: u64| blocks.saturating_mul(answer.fragment_size());
    let has_inodes = answer.files() == 0 || answer.files_available() > 0;
    Some(Room { total: bytes(answer.blocks()), available: bytes(answer.blocks_available()), has_inodes })
}

pub(crate) fn folder(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    absolute.parent().map_or_else(|| absolute.clone(), Path::to_owned)
}

/// The permission bits as `chmod` takes them, and whether any other user may write.
pub(crate) fn mode(metadata: &Metadata) -> (String, bool) {
    let mode = metadata.mode() & 0o7777;
    (format!("{mode:04o}"), mode & 0o002 != 0)
}

/// A number of bytes for people.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let mut size = count as f64;
    let mut unit = "bytes";
    for next in UNITS {
        if size < 1024.0 {
            break;
        }
        (size, unit) = (size / 1024.0, next);
    }
    if unit == "bytes" { format!("{count} bytes") } else { format!("{size:.1} {unit}") }
}

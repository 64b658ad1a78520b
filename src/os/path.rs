//! Paths, and what they lead to.

use std::io;
use std::path::Path;

use nix::errno::Errno;
use rustix::fs::{CWD, StatxAttributes, StatxFlags, statx};

use crate::error::{Error, ErrorKind};
use crate::os::mapping::DESCRIPTORS;

/// Whether `path` is `/proc/PID/fd/NUMBER`, a descriptor of some process.
pub(crate) fn is_descriptor(path: &Path) -> bool {
    let words: Option<Vec<_>> = path.iter().map(|word| word.to_str()).collect();
    let is_number = |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
    matches!(words.as_deref(), Some(["/", "proc", process, "fd", number]) if is_number(process) && is_number(number))
}

pub(crate) fn is_missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::ENOENT | Errno::ENOTDIR))
}

pub(crate) fn has_proc() -> bool {
    Path::new(DESCRIPTORS).exists()
}

pub(crate) fn folder(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// An error that names the first folder on the way to `path` that does not exist; `NotFound` if all of them exist.
pub(crate) fn missing_folder(path: &Path) -> Error {
    let is_there = |folder: &&Path| std::fs::metadata(folder).is_ok_and(|metadata| metadata.is_dir());
    let missing = folder(path).ancestors().take_while(|folder| !is_there(folder)).last();
    match missing.filter(|folder| !folder.as_os_str().is_empty()) {
        Some(folder) => {
            let found = match std::fs::symlink_metadata(folder) {
                Ok(metadata) if metadata.is_symlink() => "is a symbolic link that leads to no folder",
                Ok(_) => "is not a folder",
                Err(_) => "does not exist",
            };
            Error::no_folder(folder, found)
        }
        None => ErrorKind::NotFound.into(),
    }
}

/// The attributes of the file at `path`, some of which keep it from being replaced.
pub(crate) fn attributes(path: &Path) -> Result<StatxAttributes, Error> {
    let asked = statx(CWD, path, rustix::fs::AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE);
    let found = asked.map_err(|error| Error::io("looking at the table's file", &error.into()))?;
    Ok(found.stx_attributes & found.stx_attributes_mask)
}

/// Whether the file at `path` is a mount point itself.
pub(crate) fn is_mount_point(path: &Path) -> Result<bool, Error> {
    Ok(attributes(path)?.contains(StatxAttributes::MOUNT_ROOT))
}

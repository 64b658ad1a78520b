//! Whether a table's file can be replaced, as a reset does.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::{AccessFlags, Uid, eaccess};

use super::Finding;
use crate::filesystem::folder;
use crate::output::printable;

const CHECK: &str = "replacement";

/// What keeps the file at `path` from being replaced; `None` if nothing is known that does.
pub(super) fn check(path: &Path) -> Option<Finding> {
    let folder = folder(path);
    let shown = printable(folder.display().to_string().as_bytes());
    if is_mount_point(path) {
        return Some(Finding::problem(
            CHECK,
            "the file is a mount point of its own, so nothing here can replace it: a reset or a removal fails, and one made \
             outside is never seen here",
            "mount the folder that it is in, instead of the file, and restart what uses it here",
        ));
    }
    let user = Uid::effective();
    match eaccess(&folder, AccessFlags::W_OK | AccessFlags::X_OK) {
        Err(Errno::EROFS) => {
            return Some(Finding::note(
                CHECK,
                format!("{shown} is read-only here: the table cannot be reset or removed from here"),
                "where that is needed, do it where the folder is writable",
            ));
        }
        Err(_) => {
            return Some(Finding::note(
                CHECK,
                format!("this user may not write to {shown}: it can neither reset nor remove the table"),
                "where that is needed, do it as the folder's owner or as root",
            ));
        }
        Ok(()) => {}
    }
    let (file, place) = (fs::symlink_metadata(path).ok()?, fs::metadata(&folder).ok()?);
    let is_kept = place.mode() & 0o1000 != 0 && ![file.uid(), place.uid(), 0].contains(&user.as_raw());
    is_kept.then(|| {
        Finding::note(
            CHECK,
            format!("the file is another user's, in {shown}, where only its owner may replace it"),
            "where that is needed, reset or remove the table as its owner or as root",
        )
    })
}

/// Whether the file itself is mounted, as by `docker run -v FILE:FILE`.
fn is_mount_point(path: &Path) -> bool {
    let Ok(path) = fs::canonicalize(path) else { return false };
    // As the kernel writes it there.
    let place: Vec<u8> = path
        .as_os_str()
        .as_bytes()
        .iter()
        .flat_map(|byte| match byte {
            b' ' | b'\t' | b'\n' | b'\\' => format!("\\{byte:03o}").into_bytes(),
            byte => vec![*byte],
        })
        .collect();
    let mounts = fs::read("/proc/self/mountinfo").unwrap_or_default();
    mounts.split(|byte| *byte == b'\n').any(|line| line.split(|byte| *byte == b' ').nth(4) == Some(&*place))
}

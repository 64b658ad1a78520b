//! Whether a table's file can be replaced, as a reset does.

use std::path::Path;

use gensync::{ErrorKind, Table};
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};

use super::Finding;
use crate::printable::printable;

const CHECK: &str = "replacement";

/// What prevents the file of `table`, which is at `path`, from being replaced; `None` if nothing is known to.
pub(super) fn check(table: &Table, path: &Path) -> Option<Finding> {
    if let Some(finding) = check_mount(path) {
        return Some(finding);
    }
    let error = table.replaceable().err()?;
    let reason = match error.kind() {
        ErrorKind::NotReplaceable { reason, .. } => reason.clone(),
        _ => error.to_string(),
    };
    let found = format!("this user can neither replace nor remove the table: {}", printable(reason.as_bytes()));
    Some(Finding::note(CHECK, found, "where that is needed, do it as the owner of the file and its folder, or as root"))
}

/// Whether a mount prevents that, whatever the file's format is.
pub(super) fn check_mount(path: &Path) -> Option<Finding> {
    is_mount_point(path).then(|| {
        Finding::problem(
            CHECK,
            "the file is a mount point of its own, so nothing here can replace it: a reset expires it in place, a removal fails, \
             and a table that is made outside is never seen here",
            "mount the folder that it is in, instead of the file, and restart what uses it here",
        )
    })
}

/// Whether the file itself is mounted, as by `docker run -v FILE:FILE`.
pub(crate) fn is_mount_point(path: &Path) -> bool {
    let found = statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE);
    found.is_ok_and(|found| (found.stx_attributes & found.stx_attributes_mask).contains(StatxAttributes::MOUNT_ROOT))
}

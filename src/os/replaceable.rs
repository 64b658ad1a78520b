//! Whether a table's file can be replaced or removed.

use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::sys::stat::FileStat;
use nix::unistd::{AccessFlags, Gid, Uid, faccessat, getgroups};
use rustix::fs::StatxAttributes;
use rustix::thread::{CapabilitySet, capabilities};

use crate::error::{Error, ErrorKind};
use crate::os::file::TableFile;
use crate::os::owner::check_mapped;
use crate::os::path::{attributes, folder, is_missing, is_mount_point};

/// Checks that `file`, which is at `path`, can be replaced by another file or removed. Whatever can be known about that is
/// checked here, as it is too late once the table is retired.
///
/// # Errors
///
/// [`ErrorKind::NotReplaceable`] if it cannot; or another kind if that cannot be found out.
pub(crate) fn check_replaceable(file: &TableFile, path: &Path) -> Result<(), Error> {
    let place = folder(path);
    if is_mount_point(path)? {
        let reason = "it is a mount point itself; mount its folder instead, or do it where the file comes from";
        return not_replaceable(reason.to_owned());
    }
    let fixed = StatxAttributes::IMMUTABLE | StatxAttributes::APPEND;
    for (what, path) in [("the file", path), ("its folder", place)] {
        if attributes(path)?.intersects(fixed) {
            return not_replaceable(format!("{what} is immutable or append-only; lift that with `chattr -i -a`"));
        }
    }
    match faccessat(AT_FDCWD, place, AccessFlags::W_OK | AccessFlags::X_OK, AtFlags::AT_EACCESS) {
        Err(errno @ (Errno::EACCES | Errno::EPERM)) => {
            let reason = format!("this process may not write to the folder {} ({})", place.display(), errno.desc());
            return not_replaceable(format!("{reason}; let its owner do it"));
        }
        result => result.map_err(|errno| Error::system("looking at the table's folder", errno))?,
    }
    // Renaming a file to its own name does nothing, but whatever else guards names, such as a sandbox, refuses it like any
    // other renaming.
    match std::fs::rename(path, path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let reason =
                format!("the system keeps this process from it ({error}), though its user may; so does a sandbox");
            return not_replaceable(format!("{reason}; do it outside of that"));
        }
        Err(error) if !is_missing(&error) => return Err(Error::io("looking at the table's file", &error)),
        _ => {}
    }
    let stat = file.stat()?;
    let around = nix::sys::stat::stat(place).map_err(|errno| Error::system("looking at the table's folder", errno))?;
    let user = Uid::effective().as_raw();
    let is_own = |owner: u32| owner == user && check_mapped(owner).is_ok();
    let is_sticky = around.st_mode & nix::libc::S_ISVTX != 0;
    if is_sticky && !is_own(stat.st_uid) && !is_own(around.st_uid) && !may_act_as_owner(&stat) {
        return not_replaceable(format!(
            "the folder {} is sticky, and the file belongs to user {}; let that user or root do it",
            place.display(),
            stat.st_uid
        ));
    }
    Ok(())
}

/// Checks that this process may create a file that belongs to the same user and group.
pub(crate) fn check_owner_can_be_given(file: &TableFile) -> Result<(), Error> {
    let stat = file.stat()?;
    let (user, group) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    let groups = getgroups().unwrap_or_default();
    let is_own = Uid::effective() == user && (Gid::effective() == group || groups.contains(&group));
    if is_own || has_capability(CapabilitySet::CHOWN) {
        return Ok(());
    }
    not_replaceable(format!(
        "it belongs to user {} and group {}, and this process cannot give another file to them; let that user or root do it",
        stat.st_uid, stat.st_gid
    ))
}

fn not_replaceable(reason: String) -> Result<(), Error> {
    Err(ErrorKind::NotReplaceable { reason }.into())
}

fn has_capability(capability: CapabilitySet) -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(capability))
}

/// Root of a user namespace has no rights outside of it, nor over files of users that are not mapped into it.
fn may_act_as_owner(stat: &FileStat) -> bool {
    has_capability(CapabilitySet::FOWNER) && check_mapped(stat.st_uid).is_ok()
}

//! Whether a path still names the file that was opened by it.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::os::identity::{Identity, identity};
use crate::os::path::{folder, is_missing, is_mount_point};

/// How the process saw the file system when it opened a table, which distinguishes a file that is gone from one that the
/// process can no longer see.
#[derive(Debug)]
pub(crate) struct View {
    path: PathBuf,
    root: Option<Identity>,
    /// The device of the folder, unless the file is a mount point itself. It is not the file's: overlayfs gives its files
    /// another device than its folders.
    device: Option<u64>,
}

/// What becomes known when a table's path is revalidated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Presence {
    Here,
    Gone,
    Unknown,
}

impl View {
    pub(crate) fn new(path: &Path) -> Self {
        let is_mounted = || is_mount_point(path).unwrap_or(false);
        let around = std::fs::metadata(folder(path)).ok().filter(|_| !is_mounted());
        Self { path: path.to_owned(), root: root(), device: around.map(|folder| folder.dev()) }
    }

    /// Whether `own` is still what the path names: one system call if it is.
    ///
    /// A link count of zero always means that the file is gone. A missing name, or another file, means so only on the same
    /// device and from the same root: otherwise something was mounted over the folder, for this process or for all. A process
    /// that cannot see the folder, because it is confined to another root or lacks permission, relies on the link count alone.
    pub(crate) fn presence(&self, own: Identity, links: impl FnOnce() -> Option<nix::libc::nlink_t>) -> Presence {
        let found = std::fs::symlink_metadata(&self.path);
        if found.as_ref().is_ok_and(|metadata| identity(metadata) == own) {
            return Presence::Here;
        }
        let links = links();
        if links == Some(0) {
            return Presence::Gone;
        }
        let is_confined = root() != self.root || self.root.is_none();
        let folder = std::fs::metadata(folder(&self.path));
        match (found, folder) {
            _ if is_confined => links.map_or(Presence::Unknown, |_| Presence::Here),
            (Ok(_), Ok(folder)) if Some(folder.dev()) == self.device => Presence::Gone,
            (Err(error), Ok(folder)) if is_missing(&error) && Some(folder.dev()) == self.device => Presence::Gone,
            (Err(error), _) if error.kind() == io::ErrorKind::PermissionDenied => {
                links.map_or(Presence::Unknown, |_| Presence::Here)
            }
            _ => Presence::Unknown,
        }
    }
}

fn root() -> Option<Identity> {
    std::fs::metadata("/").ok().map(|metadata| identity(&metadata))
}

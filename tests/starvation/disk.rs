//! Disks that a test may fill.

use std::fs;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::statvfs;

/// A file system of its own, unmounted with the test.
pub(crate) struct Mount(tempfile::TempDir);

impl Mount {
    pub(crate) fn tmpfs(options: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        match mount(Some("tmpfs"), folder.path(), Some("tmpfs"), MsFlags::empty(), Some(options)) {
            Ok(()) => Some(Self(folder)),
            Err(error) => {
                eprintln!("skipped, as a file system cannot be mounted here: {error}");
                None
            }
        }
    }

    /// In memory, without a limit and without `fallocate`.
    pub(crate) fn ramfs() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        match mount(Some("ramfs"), folder.path(), Some("ramfs"), MsFlags::empty(), None::<&str>) {
            Ok(()) => Some(Self(folder)),
            Err(error) => {
                eprintln!("skipped, as a file system cannot be mounted here: {error}");
                None
            }
        }
    }

    /// One on a disk, of as many bytes.
    pub(crate) fn ext4(size: u64) -> Option<Self> {
        // Nothing is set aside for root.
        Self::on_disk("ext4", &["-q", "-m", "0", "-b", "4096"], size)
    }

    /// In a file that is deleted at once, made by `mkfs.KIND` with `options`.
    pub(crate) fn on_disk(kind: &str, options: &[&str], size: u64) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(size).unwrap();
        let run = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
        let is_there = run(Command::new(format!("mkfs.{kind}")).args(options).arg(image.path()))
            && run(Command::new("mount").args(["-t", kind, "-o", "loop"]).arg(image.path()).arg(folder.path()));
        if !is_there {
            eprintln!("skipped, as a disk with {kind} cannot be made and mounted here");
        }
        is_there.then_some(Self(folder))
    }

    pub(crate) fn folder(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn remount(&self, flags: MsFlags, options: &str) -> nix::Result<()> {
        mount(None::<&str>, self.0.path(), None::<&str>, MsFlags::MS_REMOUNT | flags, Some(options))
    }

    /// In bytes.
    pub(crate) fn free(&self) -> u64 {
        let stat = statvfs(self.0.path()).unwrap();
        stat.blocks_available() * stat.fragment_size()
    }

    /// Leaves so many bytes free, by a file that is there as long as what is returned.
    pub(crate) fn fill(&self, leave: u64) -> Ballast {
        let path = self.path("ballast");
        let file = File::create(&path).unwrap();
        let mut size = 0;
        // In ever smaller pieces, as a disk takes some for its own purposes.
        for piece in (12..26).rev().map(|power| 1 << power) {
            while self.free() >= leave + piece && fallocate(&file, FallocateFlags::empty(), size, piece as i64).is_ok()
            {
                size += piece as i64;
            }
        }
        assert!(self.free().saturating_sub(leave) < 8192, "{} bytes are free, not {leave}", self.free());
        Ballast(path)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

pub(crate) struct Ballast(PathBuf);

impl Drop for Ballast {
    fn drop(&mut self) {
        // Emptied first: another test's child may have inherited it.
        let _ = File::create(&self.0);
        let _ = fs::remove_file(&self.0);
    }
}

//! Which file systems a table may be on.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sys::statfs::{self, fstatfs};

use crate::error::{Error, ErrorKind};

/// The magic number of FUSE.
pub(crate) const FUSE: u64 = 0x6573_5546;

pub(crate) fn check_file_system(file: &File, allowed: &[u64]) -> Result<(), Error> {
    let kind =
        fstatfs(file).map_err(|errno| Error::system("asking for the file system's type", errno))?.filesystem_type();
    // The numbers have 32 bits; some machines extend their sign.
    let magic = u64::from(kind.0 as u32);
    if LOCAL.contains(&magic) || allowed.contains(&magic) {
        return Ok(());
    }
    Err(match NETWORKS.iter().find(|(number, _)| *number == magic) {
        Some(&(magic, found)) => ErrorKind::NetworkFileSystem { found, magic },
        None => ErrorKind::UnknownFileSystem { magic },
    }
    .into())
}

/// The file systems on which a file belongs to one machine, and all mappings of it are the same memory (linux/magic.h).
const LOCAL: [u64; 11] = [
    0x0102_1994, // tmpfs, of anonymous memory too
    0x8584_58f6, // ramfs
    0xef53,      // ext2, ext3, ext4
    0x5846_5342, // XFS
    0x9123_683e, // Btrfs
    0xf2f5_2010, // F2FS
    0x2fc1_2fc1, // ZFS
    0xca45_1a4e, // bcachefs
    0x3153_464a, // JFS
    0x3434,      // NILFS
    0x794c_7630, // overlayfs, which writes to a file of one of the others
];

/// The names of file systems whose files may be open on several machines.
const NETWORKS: [(u64, &str); 20] = [
    (0x6969, "NFS"),
    (0x517b, "SMB"),
    (0xff53_4d42, "SMB"),
    (0xfe53_4d42, "SMB"),
    (FUSE, "FUSE"),
    (0x5346_414f, "AFS"),
    (0x6b41_4653, "AFS"),
    (0x7375_7245, "Coda"),
    (0x0102_1997, "9P"),
    (0x00c3_6400, "Ceph"),
    (0x0116_1970, "GFS2"),
    (0x7461_636f, "OCFS2"),
    (0x0bd0_0bd0, "Lustre"),
    (0x4750_4653, "GPFS"),
    (0x1983_0326, "BeeGFS"),
    (0xaad7_aaea, "PanFS"),
    (0xbeef_dead, "StorNext"),
    (0x786f_4256, "vboxsf"),
    (0xbacb_acbc, "vmhgfs"),
    (0x7c7c_6673, "prl_fs"),
];

/// Whether the file is on overlayfs, where a file that is opened for reading only is the lower one, and stays the lower one for
/// the process that has it open when others write to the upper one.
pub(crate) fn is_on_overlay(file: &File) -> bool {
    fstatfs(file).is_ok_and(|found| found.filesystem_type() == statfs::OVERLAYFS_SUPER_MAGIC)
}

/// Makes the file at `path` the upper one, without changing its contents.
pub(crate) fn copy_up(path: &Path) -> io::Result<()> {
    let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
    OpenOptions::new().write(true).custom_flags(flags).open(path).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_are_known_by_their_numbers() {
        let name = |magic| NETWORKS.iter().find(|(number, _)| *number == magic).map(|(_, name)| *name);
        for (magic, expected) in [(0x6969, "NFS"), (0x517b, "SMB"), (0x6573_5546, "FUSE"), (0x0bd0_0bd0, "Lustre")] {
            assert_eq!(name(magic), Some(expected));
        }
        assert!(NETWORKS.iter().all(|(magic, _)| !LOCAL.contains(magic)));
    }
}

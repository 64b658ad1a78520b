//! A table's file: refuse what is not one, create it whole, replace it when it was retired, see whether it is gone.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{FileStat, fstat};
use nix::sys::statfs::{self, fstatfs};
use nix::unistd::{AccessFlags, Gid, Uid, faccessat, getgroups, linkat};
use rustix::fs::{CWD, StatxAttributes, StatxFlags, statx};
use rustix::thread::{CapabilitySet, capabilities};

use crate::error::{Error, ErrorKind};
use crate::os::clock::{now, with_patience};
use crate::os::identity::Identity;
use crate::os::lock::{Kind, LentLock, Range, RangeLock, is_held_by_reader, is_held_by_writer, set};
use crate::os::mapping::{BOOT, DESCRIPTORS, SLOTS, allocate, check_size_limit, rewrite_in_place};
use crate::os::owner::{OwnerCheck, check_mapped};
use crate::protocol::layout::{FixedHeader, HEADER_SIZE, MAGIC, OLDEST, segment_offset, version};

/// How long to wait for another process that replaces the file. It is a matter of microseconds unless that process is
/// stopped; without the lock two replacements may follow each other, and whoever has the first one finds it gone.
pub(crate) const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// The bytes that are locked for it: the header's fixed part.
const REPLACEMENT: Range = Range { start: 0, length: 128 };

/// What the hidden name of an unfinished table begins with; sixteen random hexadecimal digits follow. Random, as a name that can
/// be foretold could be taken by somebody else; and short, whatever the table is called.
const UNFINISHED: &str = ".gensync-";

/// The magic number of FUSE.
pub(crate) const FUSE: u64 = 0x6573_5546;

/// Which files are accepted as tables, and how they are opened.
#[derive(Clone, Debug, Default)]
pub(crate) struct FileOptions {
    pub(crate) read_only: bool,
    pub(crate) replace_older: bool,
    pub(crate) owner: OwnerCheck,
    /// The magic numbers of file systems that are accepted, though not known to be local.
    pub(crate) allowed_file_systems: Vec<u64>,
}

/// An open table file whose header was checked.
#[derive(Debug)]
pub(crate) struct TableFile {
    pub(crate) file: File,
    pub(crate) fixed: FixedHeader,
    pub(crate) segments: u32,
}

impl TableFile {
    /// Opens the table at `path`; `None` if nothing is there. Changes nothing, whatever is there.
    pub(crate) fn open(path: &Path, options: &FileOptions) -> Result<Option<Self>, Error> {
        let refuse = |kind: ErrorKind| Err(Error::from(kind).at(path));
        // Asked before opening, as opening alone does things to devices and pipes, and again of what was opened.
        // Of an anonymous table, another process's descriptor is all that can be named.
        let follows = options.read_only && is_descriptor(path);
        let metadata = if follows { std::fs::metadata(path) } else { std::fs::symlink_metadata(path) };
        match metadata {
            Ok(metadata) => check_type(&metadata).map_err(|kind| Error::from(kind).at(path))?,
            Err(error) if is_missing(&error) => return Ok(None),
            Err(error) => return Err(Error::io("looking at the table's file", &error).at(path)),
        }
        let mut open = OpenOptions::new();
        let no_follow = if follows { OFlag::empty() } else { OFlag::O_NOFOLLOW };
        open.read(true).write(!options.read_only).custom_flags((no_follow | OFlag::O_NONBLOCK).bits());
        let file = match open.open(path) {
            Ok(file) if options.read_only && is_on_overlay(&file) => match copy_up(path).and_then(|()| open.open(path))
            {
                Ok(file) => file,
                Err(error) if is_missing(&error) => return Ok(None),
                Err(error) => match Error::io("opening the table's file", &error) {
                    refused if matches!(refused.kind(), ErrorKind::Permission | ErrorKind::ReadOnlyFileSystem) => {
                        return refuse(ErrorKind::ReadOnlyOverlay);
                    }
                    error => return Err(error.at(path)),
                },
            },
            Ok(file) => file,
            Err(error) if is_missing(&error) => return Ok(None),
            Err(error) if error.raw_os_error() == Some(Errno::ELOOP as i32) => return refuse(ErrorKind::Symlink),
            Err(error) => return Err(Error::io("opening the table's file", &error).at(path)),
        };
        Self::of_file(file, options).map(Some).map_err(|error| error.at(path))
    }

    pub(crate) fn of_file(file: File, options: &FileOptions) -> Result<Self, Error> {
        let metadata = file.metadata().map_err(|error| Error::io("looking at the table's file", &error))?;
        check_type(&metadata)?;
        check_file_system(&file, &options.allowed_file_systems)?;
        options.owner.check(metadata.uid())?;
        let mut page = Vec::with_capacity(HEADER_SIZE);
        read_start(&file, &mut page).map_err(|error| Error::io("reading the table's header", &error))?;
        // Asked after the header was read: a table that grows meanwhile is longer than its header says, never shorter.
        let size = file.metadata().map_err(|error| Error::io("looking at the table's file", &error))?.len();
        let oldest = if options.replace_older && !options.read_only { OLDEST } else { version() };
        let (fixed, segments) = FixedHeader::decode(&page, size, oldest)?;
        Ok(Self { file, fixed, segments })
    }

    /// Whether it is to be replaced, as it was made by an older version.
    pub(crate) fn is_older(&self) -> bool {
        self.fixed.version < version()
    }

    pub(crate) fn stat(&self) -> Result<FileStat, Error> {
        fstat(&self.file).map_err(|errno| Error::system("looking at the table's file", errno))
    }

    /// Takes the lock under which a file is replaced or renewed, which is let go of by dropping what is returned. `None` if
    /// a process that may write the file has it for as long as `patience` lasts, as a stopped one does.
    pub(crate) fn try_lock(&self, patience: Duration) -> Result<Option<Lock<'_>>, Error> {
        let attempt = || match RangeLock::try_new(|| open_again(&self.file), REPLACEMENT, Kind::Exclusive) {
            Ok(lock) => Ok(lock.map(Lock::Own)),
            // Without /proc, without the right to open it once more, or without a descriptor.
            Err(_) => {
                Ok::<_, Error>(LentLock::try_new(self.file.as_fd(), REPLACEMENT, Kind::Exclusive)?.map(Lock::Lent))
            }
        };
        with_patience(patience, || match attempt()? {
            // Not deduced from who does not hold it, as that changes between two questions.
            None if is_held_by_reader(self.file.as_fd(), REPLACEMENT).unwrap_or(false) => Ok(Some(Lock::KeptByReader)),
            lock => Ok(lock),
        })
    }

    /// As [`try_lock`](Self::try_lock); waits as long as is worth it, and then goes on without the lock.
    pub(crate) fn lock(&self) -> Result<Option<Lock<'_>>, Error> {
        self.try_lock(LOCK_PATIENCE)
    }

    /// Whether nobody else has the table open, and no update is in flight. Then nobody opens it, or begins an update, before
    /// [`hold`](Self::hold) is called.
    pub(crate) fn try_have_alone(&self) -> Result<bool, Error> {
        let file = self.file.as_fd();
        // A lock lasts as long as the memory that was mapped through its descriptor. A named table's was mapped through another: if
        // the holder has closed all descriptors, its updates alone have locks.
        Ok(set(file, BOOT, Some(Kind::Exclusive))? && set(file, SLOTS, Some(Kind::Exclusive))?)
    }

    /// Lets everybody know that the table is open, as long as this description of its file is.
    pub(crate) fn hold(&self) -> Result<(), Error> {
        let file = self.file.as_fd();
        set(file, SLOTS, None)?;
        // Somebody who has the table alone is about to renew it. Does that last, it is a stopped process.
        with_patience(LOCK_PATIENCE, || set(file, BOOT, Some(Kind::Shared)).map(|is_taken| is_taken.then_some(())))?;
        Ok(())
    }

    /// Whether another file can be put in the place of this one, which is at `path`, or none. What can be known of that is asked
    /// here, as it is too late when the table is retired.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotReplaceable`] if not; or it cannot be found out.
    pub(crate) fn check_replaceable(&self, path: &Path) -> Result<(), Error> {
        let place = folder(path);
        if attributes(path)?.contains(StatxAttributes::MOUNT_ROOT) {
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
        // Of a file onto itself it does nothing, but is refused like another one by what else guards names, as a sandbox does.
        match std::fs::rename(path, path) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                let reason =
                    format!("the system keeps this process from it ({error}), though its user may; so does a sandbox");
                return not_replaceable(format!("{reason}; do it outside of that"));
            }
            Err(error) if !is_missing(&error) => return Err(Error::io("looking at the table's file", &error)),
            _ => {}
        }
        let stat = self.stat()?;
        let around =
            nix::sys::stat::stat(place).map_err(|errno| Error::system("looking at the table's folder", errno))?;
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

    /// Whether this process may make a file that belongs to the same user and group.
    pub(crate) fn check_owner_can_be_given(&self) -> Result<(), Error> {
        let stat = self.stat()?;
        let (user, group) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        let groups = getgroups().unwrap_or_default();
        let is_own = Uid::effective() == user && (Gid::effective() == group || groups.contains(&group));
        if is_own || has_capability(CapabilitySet::CHOWN) {
            return Ok(());
        }
        not_replaceable(format!(
            "it belongs to user {} and group {}, to whom this process cannot give another file; let that user or root do it",
            stat.st_uid, stat.st_gid
        ))
    }
}

fn not_replaceable(reason: String) -> Result<(), Error> {
    Err(ErrorKind::NotReplaceable { reason }.into())
}

fn has_capability(capability: CapabilitySet) -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(capability))
}

/// Root of a user namespace is nobody outside of it, and to files of those who are not mapped into it.
fn may_act_as_owner(stat: &FileStat) -> bool {
    has_capability(CapabilitySet::FOWNER) && check_mapped(stat.st_uid).is_ok()
}

/// What the system says of the file at `path` that makes it one which stays.
fn attributes(path: &Path) -> Result<StatxAttributes, Error> {
    let asked = statx(CWD, path, rustix::fs::AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE);
    let found = asked.map_err(|error| Error::io("looking at the table's file", &error.into()))?;
    Ok(found.stx_attributes & found.stx_attributes_mask)
}

/// What [`TableFile::lock`] gives.
#[derive(Debug)]
pub(crate) enum Lock<'a> {
    Own(#[expect(dead_code, reason = "held until it is dropped")] RangeLock),
    Lent(#[expect(dead_code, reason = "held until it is dropped")] LentLock<'a>),
    /// A process that may only read the file keeps it from being had, for which nobody waits.
    KeptByReader,
}

/// Opens `file` once more, for a lock of its own.
fn open_again(file: &File) -> Result<File, Error> {
    let link = Path::new(DESCRIPTORS).join(file.as_raw_fd().to_string());
    let file = OpenOptions::new().read(true).write(true).open(link);
    file.map_err(|error| Error::io("opening the table's file again", &error))
}

/// On overlayfs a file that is only read is the lower one, and stays so for who has it open when others write to another.
fn is_on_overlay(file: &File) -> bool {
    fstatfs(file).is_ok_and(|found| found.filesystem_type() == statfs::OVERLAYFS_SUPER_MAGIC)
}

/// Makes the file at `path` the upper one, without changing what is in it.
fn copy_up(path: &Path) -> io::Result<()> {
    let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
    OpenOptions::new().write(true).custom_flags(flags).open(path).map(drop)
}

fn read_start(file: &File, page: &mut Vec<u8>) -> io::Result<()> {
    page.resize(HEADER_SIZE, 0);
    let mut filled = 0;
    while filled < HEADER_SIZE {
        match file.read_at(&mut page[filled..], filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    page.truncate(filled);
    Ok(())
}

fn is_missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::ENOENT | Errno::ENOTDIR))
}

pub(crate) fn identity(metadata: &Metadata) -> Identity {
    Identity { device: metadata.dev(), inode: metadata.ino() }
}

/// Whether `path` is `/proc/PID/fd/NUMBER`, a descriptor of some process.
pub(crate) fn is_descriptor(path: &Path) -> bool {
    let words: Option<Vec<_>> = path.iter().map(|word| word.to_str()).collect();
    let is_number = |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
    matches!(words.as_deref(), Some(["/", "proc", process, "fd", number]) if is_number(process) && is_number(number))
}

fn check_type(metadata: &Metadata) -> Result<(), ErrorKind> {
    let file_type = metadata.file_type();
    let found = if file_type.is_file() {
        return Ok(());
    } else if file_type.is_symlink() {
        return Err(ErrorKind::Symlink);
    } else if file_type.is_dir() {
        "a folder"
    } else if file_type.is_fifo() {
        "a named pipe"
    } else if file_type.is_socket() {
        "a socket"
    } else {
        "a device"
    };
    Err(ErrorKind::NotARegularFile { found })
}

fn check_file_system(file: &File, allowed: &[u64]) -> Result<(), Error> {
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

/// The file systems of which all mappings of a file, on the one machine that has it, are the same memory (linux/magic.h).
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

/// Those that have a name, of the file systems whose files may be open on several machines.
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

/// What a new table is made of.
#[derive(Debug)]
pub(crate) struct NewTable {
    capacity: u64,
    boot: [u64; 2],
    mode: u32,
    /// The user and group to give it to; `None`: the creator's.
    owner: Option<(u32, u32)>,
    /// Sparse up to this size; 0: as long as its segments.
    size: u64,
    allowed_file_systems: Vec<u64>,
    accepted: OwnerCheck,
}

impl NewTable {
    pub(crate) fn new(capacity: u64, mode: u32, size: u64, options: &FileOptions) -> Result<Self, Error> {
        let (allowed_file_systems, accepted) = (options.allowed_file_systems.clone(), options.owner);
        Ok(Self { capacity, boot: boot_id()?, mode, owner: None, size, allowed_file_systems, accepted })
    }

    /// A successor, as like its predecessor as can be: others must be able to open it just the same.
    pub(crate) fn succeeding(fixed: &FixedHeader, stat: &FileStat, options: &FileOptions) -> Result<Self, Error> {
        let sparse = stat.st_blocks * 512 < stat.st_size;
        Ok(Self {
            capacity: fixed.capacity,
            boot: boot_id()?,
            mode: stat.st_mode & 0o777,
            owner: Some((stat.st_uid, stat.st_gid)),
            size: if sparse { stat.st_size as u64 } else { 0 },
            allowed_file_systems: options.allowed_file_systems.clone(),
            accepted: options.owner,
        })
    }

    /// Makes a table that has no name yet, in the folder of `path`. What can fail for want of room or permission
    /// fails here.
    pub(crate) fn prepare(self, path: &Path) -> Result<UnlinkedTable, Error> {
        self.unnamed(path).map_err(|error| error.at(path))
    }

    fn unnamed(self, path: &Path) -> Result<UnlinkedTable, Error> {
        let mut open = OpenOptions::new();
        open.read(true).write(true).mode(0o600);
        let named = || -> Result<UnlinkedTable, Error> {
            // A process killed here leaves it behind.
            let (mut unlinked, name) = with_unfinished_name(path, |name| {
                match open.clone().custom_flags(OFlag::O_NOFOLLOW.bits()).create_new(true).open(name) {
                    Ok(file) => Ok(Some(self.unlinked(file))),
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(None),
                    Err(error) => Err(Error::io("creating the table", &error)),
                }
            })?;
            unlinked.name = Some(name);
            unlinked.claim()?;
            Ok(unlinked)
        };
        let unlinked = match open.clone().custom_flags(OFlag::O_TMPFILE.bits()).open(folder(path)) {
            Ok(file) if has_proc() => self.unlinked(file),
            // Without /proc, an unnamed file cannot be named.
            Ok(_) => named()?,
            // Not every file system has unnamed files.
            Err(error)
                if matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::EOPNOTSUPP | Errno::EISDIR)) =>
            {
                named()?
            }
            Err(error) if is_missing(&error) => return Err(missing_folder(path)),
            Err(error) => return Err(Error::io("creating the table", &error)),
        };
        self.furnish(&unlinked.file)?;
        Ok(unlinked)
    }

    fn unlinked(&self, file: File) -> UnlinkedTable {
        UnlinkedTable { file, lock: None, name: None, capacity: self.capacity, boot: self.boot }
    }

    /// A table in memory that only this process and its children have.
    pub(crate) fn anonymous(self) -> Result<File, Error> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = memfd_create("gensync", flags).map_err(|errno| Error::system("creating anonymous memory", errno))?;
        let file = File::from(file);
        self.furnish(&file)?;
        write_header(&file, self.capacity, 0, self.boot)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(|errno| Error::system("sealing anonymous memory", errno))?;
        Ok(file)
    }

    fn furnish(&self, file: &File) -> Result<(), Error> {
        check_file_system(file, &self.allowed_file_systems)?;
        let doing = |action| move |error| Error::io(action, &error);
        let metadata = file.metadata().map_err(doing("looking at the new table"))?;
        // Whoever makes a table opens it next: one that would be refused then is not left behind.
        self.accepted.check(self.owner.map_or(metadata.uid(), |(user, _)| user))?;
        if let Some((user, group)) = self.owner.filter(|owner| *owner != (metadata.uid(), metadata.gid())) {
            std::os::unix::fs::fchown(file, Some(user), Some(group)).map_err(doing("giving the table to its owner"))?;
        }
        // Set afterwards, as the mode given to open is subject to the umask.
        file.set_permissions(std::fs::Permissions::from_mode(self.mode)).map_err(doing("setting the table's mode"))?;
        let end = segment_offset(self.capacity, 1);
        rewrite_in_place(file.as_fd());
        allocate(file.as_fd(), 0, end)?;
        if self.size > end {
            check_size_limit(self.size)?;
            file.set_len(self.size).map_err(doing("setting the table's size"))?;
        }
        Ok(())
    }
}

/// A table but for its header and its name.
#[derive(Debug)]
pub(crate) struct UnlinkedTable {
    file: File,
    /// Of its own description, as a forked child would keep one of `file`'s. None if it is locked by `file`, or not at all.
    lock: Option<RangeLock>,
    name: Option<PathBuf>,
    capacity: u64,
    boot: [u64; 2],
}

impl UnlinkedTable {
    /// Names the table, whose keys start at `floor` or later; `false` if something has the name already.
    pub(crate) fn link(self, path: &Path, floor: u64) -> Result<bool, Error> {
        let written = write_header(&self.file, self.capacity, floor, self.boot);
        written.and_then(|()| self.link_to(path)).map_err(|error| error.at(path))
    }

    /// Gives it a hidden name beside `path`, and a header, so that one call is left to be made.
    pub(crate) fn stand_by(mut self, path: &Path) -> Result<Self, Error> {
        if self.name.is_none() {
            let mut stand_by = || {
                self.claim()?;
                let (_, name) = with_unfinished_name(path, |name| Ok(self.link_to(name)?.then_some(())))?;
                Ok(name)
            };
            self.name = Some(stand_by().map_err(|error: Error| error.at(path))?);
        }
        Ok(self)
    }

    /// Says whose the file is, before anybody finds it under its hidden name: locked, it is in use.
    fn claim(&mut self) -> Result<(), Error> {
        match RangeLock::try_new(|| open_again(&self.file), REPLACEMENT, Kind::Exclusive) {
            Ok(lock) => self.lock = lock,
            // As in `try_lock`.
            Err(_) => _ = set(self.file.as_fd(), REPLACEMENT, Some(Kind::Exclusive))?,
        }
        write_header(&self.file, self.capacity, 0, self.boot)
    }

    /// Gives it, which [stands by](Self::stand_by), the name of the retired table at `path`. To be called under that one's lock.
    pub(crate) fn replace(mut self, path: &Path, floor: u64) -> Result<(), Error> {
        let replace = || {
            // Written over what is there already, which takes no room.
            write_header(&self.file, self.capacity, floor, self.boot)?;
            let name = self.name.as_deref().unwrap_or(path);
            std::fs::rename(name, path).map_err(|error| Error::io("replacing the retired table", &error))
        };
        replace().map_err(|error| error.at(path))?;
        self.name = None;
        Ok(())
    }

    fn link_to(&self, path: &Path) -> Result<bool, Error> {
        let unnamed = || Path::new(DESCRIPTORS).join(self.file.as_raw_fd().to_string());
        let source = self.name.clone().unwrap_or_else(unnamed);
        match linkat(AT_FDCWD, &source, AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW) {
            Ok(()) => Ok(true),
            Err(Errno::EEXIST) => Ok(false),
            Err(errno) => Err(Error::system("naming the new table", errno)),
        }
    }
}

impl Drop for UnlinkedTable {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            let _ = std::fs::remove_file(name);
        }
        // If it was locked by this descriptor: a child that was forked meanwhile has a copy, which would keep the lock.
        let _ = set(self.file.as_fd(), REPLACEMENT, None);
    }
}

/// Removes the table at `path`. To be called under its lock.
pub(crate) fn remove(path: &Path) -> Result<(), Error> {
    match std::fs::remove_file(path) {
        Err(error) if !is_missing(&error) => Err(Error::io("removing the table", &error).at(path)),
        _ => Ok(()),
    }
}

/// Removes the unfinished tables beside `path` that killed processes of this user have left there, if they can be removed.
pub(crate) fn remove_unfinished(path: &Path) {
    for entry in std::fs::read_dir(folder(path)).into_iter().flatten().flatten() {
        if is_unfinished_name(&entry.file_name()) && is_left_over(&entry.path()) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

fn is_unfinished_name(name: &std::ffi::OsStr) -> bool {
    let digits = name.to_str().and_then(|name| name.strip_prefix(UNFINISHED));
    digits.is_some_and(|digits| digits.len() == 16 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Whether the file is a table of this user that nobody has locked. Anybody may have put something else there under such a name.
fn is_left_over(name: &Path) -> bool {
    let user = Uid::effective().as_raw();
    let is_own = |metadata: Metadata| metadata.is_file() && metadata.uid() == user && check_mapped(user).is_ok();
    if !std::fs::symlink_metadata(name).is_ok_and(is_own) {
        return false;
    }
    let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
    let Ok(file) = OpenOptions::new().read(true).custom_flags(flags).open(name) else { return false };
    let mut start = [0; MAGIC.len()];
    file.metadata().is_ok_and(is_own)
        && file.read_exact_at(&mut start, 0).is_ok()
        && start == MAGIC
        && is_held_by_writer(file.as_fd(), REPLACEMENT) == Ok(false)
}

/// Tries `action` with hidden names beside `path` until one is free, which is what it says by giving something.
fn with_unfinished_name<R>(
    path: &Path,
    action: impl Fn(&Path) -> Result<Option<R>, Error>,
) -> Result<(R, PathBuf), Error> {
    loop {
        let name = folder(path).join(format!("{UNFINISHED}{}", hex::encode(random::<8>()?)));
        if let Some(result) = action(&name)? {
            return Ok((result, name));
        }
    }
}

/// Which folder of those that lead to `path` is not there; `NotFound` if all are.
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

fn write_header(file: &File, capacity: u64, floor: u64, boot: [u64; 2]) -> Result<(), Error> {
    let fixed =
        FixedHeader { version: version(), capacity, salt: random()?, incarnation: random()?, created: now(), floor };
    file.write_all_at(&fixed.encode(boot), 0).map_err(|error| Error::io("writing the table's header", &error))
}

fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|_| ErrorKind::System { action: "asking the system for random numbers" })?;
    Ok(bytes)
}

fn has_proc() -> bool {
    Path::new(DESCRIPTORS).exists()
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The kernel's id of this boot; zero where it does not tell.
///
/// # Errors
///
/// It could not be asked, for want of descriptors or memory.
pub(crate) fn boot_id() -> Result<[u64; 2], Error> {
    let id = match std::fs::read_to_string("/proc/sys/kernel/random/boot_id") {
        Err(error)
            if matches!(
                error.raw_os_error().map(Errno::from_raw),
                Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM)
            ) =>
        {
            return Err(Error::io("asking the system for its boot id", &error));
        }
        id => id.unwrap_or_default(),
    };
    let number = u128::from_str_radix(&id.trim().replace('-', ""), 16).unwrap_or(0);
    Ok([(number >> 64) as u64, number as u64])
}

/// How the process saw the file system when it opened a table, so that it can tell a file that is gone from one that
/// it can no longer see.
#[derive(Debug)]
pub(crate) struct View {
    path: PathBuf,
    root: Option<Identity>,
    /// The device of the folder, unless the file is a mount point itself. Not the file's: overlayfs gives its files another one
    /// than its folders.
    device: Option<u64>,
}

/// What a look at a table's path finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Presence {
    Here,
    Gone,
    Unknown,
}

impl View {
    pub(crate) fn new(path: &Path) -> Self {
        let is_mounted = || attributes(path).is_ok_and(|found| found.contains(StatxAttributes::MOUNT_ROOT));
        let around = std::fs::metadata(folder(path)).ok().filter(|_| !is_mounted());
        Self { path: path.to_owned(), root: root(), device: around.map(|folder| folder.dev()) }
    }

    /// Whether `own` is still what the path names: one system call if it is.
    ///
    /// A link count of zero always says that it is gone. A missing name, or another file, says so only on the same device and
    /// from the same root: otherwise something was mounted over the folder for this process, or for all. A process that cannot
    /// see the folder, being confined to another root or without permission, goes by the link count alone.
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

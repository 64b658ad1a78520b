//! A table's file: refuse what is not one, create it whole, replace it when it was retired, see whether it is gone.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{FileStat, fstat};
use nix::sys::statfs::{self, FsType, fstatfs};
use nix::unistd::{Uid, linkat};

use crate::error::{Error, ErrorKind};
use crate::layout::{Facts, HEADER_SIZE, OLDEST, segment_offset, version};
use crate::mapping::{DESCRIPTORS, Identity, allocate, check_size_limit};
use crate::options::{OwnerCheck, TableOptions};

/// How long to wait for another process that replaces the file. It is a matter of microseconds unless that process is
/// stopped; without the lock two replacements may follow each other, and whoever has the first one finds it gone.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// What a successor is called before it takes its predecessor's name. The same for all, so that a process killed in between
/// leaves one file at most, which the next one removes.
const SUCCESSOR: &str = "successor";

/// An open table file whose header was checked.
#[derive(Debug)]
pub(crate) struct TableFile {
    pub(crate) file: File,
    pub(crate) facts: Facts,
    pub(crate) segments: u32,
}

impl TableFile {
    /// Opens the table at `path`; `None` if nothing is there. Changes nothing, whatever is there.
    pub(crate) fn open(path: &Path, options: &TableOptions) -> Result<Option<Self>, Error> {
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
            Ok(file) => file,
            Err(error) if is_missing(&error) => return Ok(None),
            Err(error) if error.raw_os_error() == Some(Errno::ELOOP as i32) => return refuse(ErrorKind::Symlink),
            Err(error) => return Err(Error::io("opening the table's file", &error).at(path)),
        };
        Self::of_file(file, options).map(Some).map_err(|error| error.at(path))
    }

    pub(crate) fn of_file(file: File, options: &TableOptions) -> Result<Self, Error> {
        let metadata = file.metadata().map_err(|error| Error::io("looking at the table's file", &error))?;
        check_type(&metadata)?;
        check_file_system(&file, options.allow_fuse)?;
        options.owner.check(metadata.uid())?;
        let mut page = Vec::with_capacity(HEADER_SIZE);
        read_start(&file, &mut page).map_err(|error| Error::io("reading the table's header", &error))?;
        // Asked after the header was read: a table that grows meanwhile is longer than its header says, never shorter.
        let size = file.metadata().map_err(|error| Error::io("looking at the table's file", &error))?.len();
        let oldest = if options.replaces_older() { OLDEST } else { version() };
        let (facts, segments) = Facts::decode(&page, size, oldest)?;
        Ok(Self { file, facts, segments })
    }

    /// Whether it is to be replaced, as it was made by an older version.
    pub(crate) fn is_older(&self) -> bool {
        self.facts.version < version()
    }

    pub(crate) fn stat(&self) -> Result<FileStat, Error> {
        fstat(&self.file).map_err(|errno| Error::system("looking at the table's file", errno))
    }

    /// Takes the lock under which a file is replaced or renewed. Let go of by dropping what is returned.
    pub(crate) fn lock(&self) -> Result<Lock<'_>, Error> {
        let start = Instant::now();
        loop {
            match self.file.try_lock() {
                Ok(()) => return Ok(Lock(&self.file)),
                Err(std::fs::TryLockError::WouldBlock) if start.elapsed() < LOCK_PATIENCE => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                // Held by a stopped process, or inherited by a child of one that was killed: see LOCK_PATIENCE.
                Err(std::fs::TryLockError::WouldBlock) => return Ok(Lock(&self.file)),
                Err(std::fs::TryLockError::Error(error)) => return Err(Error::io("locking the table's file", &error)),
            }
        }
    }
}

/// Unlocked when dropped, explicitly: a child that was forked meanwhile has a copy of the descriptor.
#[derive(Debug)]
pub(crate) struct Lock<'a>(&'a File);

impl Drop for Lock<'_> {
    fn drop(&mut self) {
        let _ = self.0.unlock();
    }
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

fn check_file_system(file: &File, allow_fuse: bool) -> Result<(), Error> {
    let kind =
        fstatfs(file).map_err(|errno| Error::system("asking for the file system's type", errno))?.filesystem_type();
    match network_file_system(kind) {
        Some("FUSE") if allow_fuse => Ok(()),
        Some(found) => Err(ErrorKind::NetworkFileSystem { found }.into()),
        None => Ok(()),
    }
}

/// The name of a file system whose files may be open on several machines.
fn network_file_system(kind: FsType) -> Option<&'static str> {
    // The kernel's numbers (linux/magic.h) that nix has no names for.
    const CIFS: FsType = FsType(0xff53_4d42);
    const SMB2: FsType = FsType(0xfe53_4d42);
    const V9FS: FsType = FsType(0x0102_1997);
    const CEPH: FsType = FsType(0x00c3_6400);
    const GFS2: FsType = FsType(0x0116_1970);
    const OCFS2: FsType = FsType(0x7461_636f);
    [
        (statfs::NFS_SUPER_MAGIC, "NFS"),
        (statfs::SMB_SUPER_MAGIC, "SMB"),
        (CIFS, "SMB"),
        (SMB2, "SMB"),
        (statfs::FUSE_SUPER_MAGIC, "FUSE"),
        (statfs::AFS_SUPER_MAGIC, "AFS"),
        (statfs::CODA_SUPER_MAGIC, "Coda"),
        (V9FS, "9P"),
        (CEPH, "Ceph"),
        (GFS2, "GFS2"),
        (OCFS2, "OCFS2"),
    ]
    .into_iter()
    .find_map(|(number, name)| (number == kind).then_some(name))
}

/// What a new table is made of.
#[derive(Debug)]
pub(crate) struct Blueprint {
    capacity: u64,
    boot: [u64; 2],
    mode: u32,
    /// The user and group to give it to; `None`: the creator's.
    owner: Option<(u32, u32)>,
    /// Sparse up to this size; 0: as long as its segments.
    size: u64,
    allow_fuse: bool,
}

impl Blueprint {
    pub(crate) fn new(options: &TableOptions, size: u64) -> Result<Self, Error> {
        let (capacity, boot) = (options.checked_capacity()?, boot_id()?);
        Ok(Self { capacity, boot, mode: options.mode, owner: None, size, allow_fuse: options.allow_fuse })
    }

    /// A successor, as like its predecessor as can be: others must be able to open it just the same.
    pub(crate) fn succeeding(facts: &Facts, stat: &FileStat, options: &TableOptions) -> Result<Self, Error> {
        let sparse = stat.st_blocks * 512 < stat.st_size;
        Ok(Self {
            capacity: facts.capacity,
            boot: boot_id()?,
            mode: stat.st_mode & 0o777,
            owner: Some((stat.st_uid, stat.st_gid)),
            size: if sparse { stat.st_size as u64 } else { 0 },
            allow_fuse: options.allow_fuse,
        })
    }

    /// Makes a table that has no name yet, in the folder of `path`. What can fail for want of room or permission
    /// fails here.
    pub(crate) fn prepare(self, path: &Path) -> Result<Prepared, Error> {
        self.unnamed(path).map_err(|error| error.at(path))
    }

    fn unnamed(self, path: &Path) -> Result<Prepared, Error> {
        let mut open = OpenOptions::new();
        open.read(true).write(true).mode(0o600);
        let named = || -> Result<Prepared, Error> {
            // A process killed here leaves it behind.
            let name = sibling(path, &hex::encode(random::<8>()?));
            let file =
                open.clone().create_new(true).open(&name).map_err(|error| Error::io("creating the table", &error))?;
            Ok(Prepared { file, name: Some(name), capacity: self.capacity, boot: self.boot })
        };
        let prepared = match open.clone().custom_flags(OFlag::O_TMPFILE.bits()).open(folder(path)) {
            Ok(file) if has_proc() => Prepared { file, name: None, capacity: self.capacity, boot: self.boot },
            // Without /proc, an unnamed file cannot be named.
            Ok(_) => named()?,
            // Not every file system has unnamed files.
            Err(error)
                if matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::EOPNOTSUPP | Errno::EISDIR)) =>
            {
                named()?
            }
            Err(error) if is_missing(&error) => return Err(ErrorKind::NotFound.into()),
            Err(error) => return Err(Error::io("creating the table", &error)),
        };
        self.furnish(&prepared.file)?;
        Ok(prepared)
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
        check_file_system(file, self.allow_fuse)?;
        let doing = |action| move |error| Error::io(action, &error);
        let metadata = file.metadata().map_err(doing("looking at the new table"))?;
        if let Some((user, group)) = self.owner.filter(|owner| *owner != (metadata.uid(), metadata.gid())) {
            std::os::unix::fs::fchown(file, Some(user), Some(group)).map_err(doing("giving the table to its owner"))?;
        }
        // Set afterwards, as the mode given to open is subject to the umask.
        file.set_permissions(std::fs::Permissions::from_mode(self.mode)).map_err(doing("setting the table's mode"))?;
        let end = segment_offset(self.capacity, 1);
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
pub(crate) struct Prepared {
    file: File,
    name: Option<PathBuf>,
    capacity: u64,
    boot: [u64; 2],
}

impl Prepared {
    /// Names the table, whose keys start at `floor` or later; `false` if something has the name already.
    pub(crate) fn link(self, path: &Path, floor: u64) -> Result<bool, Error> {
        let written = write_header(&self.file, self.capacity, floor, self.boot);
        written.and_then(|()| self.link_to(path)).map_err(|error| error.at(path))
    }

    /// Gives it the name of the retired table at `path`. To be called under that one's lock.
    pub(crate) fn replace(self, path: &Path, floor: u64) -> Result<(), Error> {
        let step = sibling(path, SUCCESSOR);
        let replace = || {
            write_header(&self.file, self.capacity, floor, self.boot)?;
            remove_unfinished(&step)?;
            self.link_to(&step)?;
            std::fs::rename(&step, path).map_err(|error| Error::io("replacing the retired table", &error))
        };
        replace().map_err(|error| error.at(path))
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

impl Drop for Prepared {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            let _ = std::fs::remove_file(name);
        }
    }
}

/// Removes the table at `path`, and an unfinished successor. To be called under its lock.
pub(crate) fn remove(path: &Path) -> Result<(), Error> {
    remove_if_there(path, "removing the table")?;
    remove_unfinished(&sibling(path, SUCCESSOR))
}

fn remove_unfinished(successor: &Path) -> Result<(), Error> {
    remove_if_there(successor, "removing an unfinished successor")
}

fn remove_if_there(path: &Path, doing: &'static str) -> Result<(), Error> {
    match std::fs::remove_file(path) {
        Err(error) if !is_missing(&error) => Err(Error::io(doing, &error).at(path)),
        _ => Ok(()),
    }
}

fn write_header(file: &File, capacity: u64, floor: u64, boot: [u64; 2]) -> Result<(), Error> {
    let facts = Facts { version: version(), capacity, salt: random()?, incarnation: random()?, created: now(), floor };
    file.write_all_at(&facts.encode(boot), 0).map_err(|error| Error::io("writing the table's header", &error))
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

/// A hidden name beside `path`.
fn sibling(path: &Path, suffix: &str) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".");
    name.push(suffix);
    folder(path).join(name)
}

/// Microseconds since the epoch, by the clock on the wall.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_micros() as u64)
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
        Self { path: path.to_owned(), root: root() }
    }

    /// Whether `own` is still what the path names. A missing name, or another file, counts only if it is seen from the
    /// same root and on the same device; a link count of zero always counts.
    pub(crate) fn presence(&self, own: Identity, links: Option<nix::libc::nlink_t>) -> Presence {
        if links == Some(0) {
            return Presence::Gone;
        }
        if root() != self.root || self.root.is_none() {
            return Presence::Unknown;
        }
        let same_device = |path: &Path| std::fs::metadata(path).is_ok_and(|metadata| metadata.dev() == own.device);
        match std::fs::symlink_metadata(&self.path) {
            Ok(metadata) if identity(&metadata) == own => Presence::Here,
            Ok(_) if same_device(folder(&self.path)) => Presence::Gone,
            Err(error) if is_missing(&error) && same_device(folder(&self.path)) => Presence::Gone,
            Ok(_) | Err(_) => Presence::Unknown,
        }
    }
}

fn root() -> Option<Identity> {
    std::fs::metadata("/").ok().map(|metadata| identity(&metadata))
}

impl OwnerCheck {
    fn check(self, found: u32) -> Result<(), ErrorKind> {
        let user = Uid::effective().as_raw();
        let (accepted, expected) = match self {
            Self::CurrentUserOrRoot => (found == user || found == 0, format!("{user} (this process's user) or 0")),
            Self::User(user) => (found == user, user.to_string()),
            Self::Anyone => return Ok(()),
        };
        if accepted { Ok(()) } else { Err(ErrorKind::WrongOwner { found, expected }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_that_are_shared_between_machines_are_known_by_their_numbers() {
        for (number, name) in
            [(0x6969, "NFS"), (0x517b, "SMB"), (0xff53_4d42, "SMB"), (0x6573_5546, "FUSE"), (0x0102_1997, "9P")]
        {
            assert_eq!(network_file_system(FsType(number)), Some(name));
        }
        for number in [0x0102_1994, 0xef53, 0x5846_5342, 0x9123_683e, 0x794c_7630] {
            assert_eq!(network_file_system(FsType(number)), None, "tmpfs, ext4, XFS, Btrfs and overlayfs are local");
        }
    }
}

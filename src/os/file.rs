//! A table's file: refuse what is not a table, and lock it.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::{FileStat, fstat};

use crate::error::{Error, ErrorKind};
use crate::os::clock::with_patience;
use crate::os::file_system::{check_file_system, copy_up, is_on_overlay};
use crate::os::lock::{Kind, LentLock, Range, RangeLock, UpdateLocks, is_held_by_reader, set};
use crate::os::mapping::{BOOT, DESCRIPTORS};
use crate::os::owner::OwnerCheck;
use crate::os::path::{is_descriptor, is_missing};
use crate::protocol::directory::Extent;
use crate::protocol::fixed_header::FixedHeader;
use crate::protocol::layout::{HEADER_SIZE, OLDEST, VERSION};

/// How long to wait for another process that replaces the file. That takes microseconds unless the process is stopped. Without
/// the lock, two replacements may follow each other, and the holders of the first one find it gone.
pub(crate) const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// The bytes that are locked for a replacement: the header's fixed part.
pub(crate) const REPLACEMENT: Range = Range { start: 0, length: 128 };

/// Which files are accepted as tables, and how they are opened.
#[derive(Clone, Debug, Default)]
pub(crate) struct FileOptions {
    pub(crate) read_only: bool,
    pub(crate) replace_older: bool,
    pub(crate) owner: OwnerCheck,
    /// The magic numbers of file systems that are accepted although they are not known to be local.
    pub(crate) allowed_file_systems: Vec<u64>,
}

/// An open table file whose header was checked.
#[derive(Debug)]
pub(crate) struct TableFile {
    pub(crate) file: File,
    pub(crate) fixed: FixedHeader,
    /// Where its segments are.
    pub(crate) extents: Vec<Extent>,
}

impl TableFile {
    /// Opens the table at `path`; `None` if nothing is there. Changes nothing, whatever the path names.
    pub(crate) fn open(path: &Path, options: &FileOptions) -> Result<Option<Self>, Error> {
        let refuse = |kind: ErrorKind| Err(Error::from(kind).at(path));
        // The type is checked before opening, as opening alone has effects on devices and pipes, and once more of what was
        // opened. Symbolic links are followed only for another process's descriptor, which is the only path that an anonymous
        // table has.
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
        // Read after the header: a table that grows meanwhile is longer than its header says, never shorter.
        let size = file.metadata().map_err(|error| Error::io("looking at the table's file", &error))?.len();
        let oldest = if options.replace_older && !options.read_only { OLDEST } else { VERSION };
        let (fixed, extents) = FixedHeader::decode(&page, size, oldest)?;
        Ok(Self { file, fixed, extents })
    }

    /// Whether it is to be replaced because an older version created it.
    pub(crate) fn is_older(&self) -> bool {
        self.fixed.version < VERSION
    }

    pub(crate) fn stat(&self) -> Result<FileStat, Error> {
        fstat(&self.file).map_err(|errno| Error::system("looking at the table's file", errno))
    }

    /// Takes the lock under which a file is replaced or renewed; dropping what is returned releases it. `None` if a process
    /// that may write the file holds it for as long as `patience` lasts, as a stopped process does.
    pub(crate) fn try_lock(&self, patience: Duration) -> Result<Option<Lock<'_>>, Error> {
        with_patience(patience, || match self.try_lock_range(REPLACEMENT)? {
            // Asked directly, not deduced from there being no exclusive lock, as that may change between two questions.
            None if is_held_by_reader(self.file.as_fd(), REPLACEMENT).unwrap_or(false) => Ok(Some(Lock::KeptByReader)),
            lock => Ok(lock),
        })
    }

    /// Locks a part of the file, of which a forked child keeps no copy, unless the file cannot be opened once more: without /proc,
    /// without permission to open it, or without a free descriptor. Then the lock belongs to this description.
    fn try_lock_range(&self, range: Range) -> Result<Option<Lock<'_>>, Error> {
        match RangeLock::try_new(|| open_again(&self.file), range, Kind::Exclusive) {
            Ok(lock) => Ok(lock.map(Lock::Own)),
            Err(_) => Ok(LentLock::try_new(self.file.as_fd(), range, Kind::Exclusive)?.map(Lock::Lent)),
        }
    }

    /// As [`try_lock`](Self::try_lock), with [`LOCK_PATIENCE`]; on `None`, the caller goes on without the lock.
    pub(crate) fn lock(&self) -> Result<Option<Lock<'_>>, Error> {
        self.try_lock(LOCK_PATIENCE)
    }

    /// A lock if no other process has the table open, and no update is in flight. While it is held, no update begins; until
    /// [`hold`](Self::hold) is called, no process opens the table.
    pub(crate) fn try_have_alone(&self) -> Result<Option<Lock<'_>>, Error> {
        // A lock lasts as long as the memory that was mapped through its file description. The memory of a named table was
        // mapped through another description: if its holder has closed all descriptors, only its updates hold locks.
        let is_alone = set(self.file.as_fd(), BOOT, Some(Kind::Exclusive))?;
        if is_alone { self.try_lock_range(UpdateLocks::of(self.fixed.is_of_version_1()).all()) } else { Ok(None) }
    }

    /// Shows all processes that the table is open, for as long as this description of its file is open.
    pub(crate) fn hold(&self) -> Result<(), Error> {
        let file = self.file.as_fd();
        // A process that has the table alone is about to renew it. If that takes longer than this, the process is stopped.
        with_patience(LOCK_PATIENCE, || set(file, BOOT, Some(Kind::Shared)).map(|is_taken| is_taken.then_some(())))?;
        Ok(())
    }
}

/// What [`TableFile::lock`] returns.
#[derive(Debug)]
pub(crate) enum Lock<'a> {
    Own(#[expect(dead_code, reason = "held until it is dropped")] RangeLock),
    Lent(#[expect(dead_code, reason = "held until it is dropped")] LentLock<'a>),
    /// A process that may only read the file keeps the lock from being taken; no caller waits for that.
    KeptByReader,
}

/// Opens `file` once more, for a lock of its own.
pub(crate) fn open_again(file: &File) -> Result<File, Error> {
    let link = Path::new(DESCRIPTORS).join(file.as_raw_fd().to_string());
    let file = OpenOptions::new().read(true).write(true).open(link);
    file.map_err(|error| Error::io("opening the table's file again", &error))
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

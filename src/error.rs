//! The one error type of the crate.

use std::fmt;
use std::io;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;

/// What went wrong, with the path and the key concerned.
///
/// The text says what was found, what was expected and what to do; [`kind`](Self::kind) is for programs. The cause in
/// the operating system, where there is one, is the [`source`](std::error::Error::source).
///
/// ```
/// use gensync::{ErrorKind, Table};
///
/// let error = Table::options().create(false).open("/dev/shm/no-such.gensync").unwrap_err();
/// assert!(matches!(error.kind(), ErrorKind::NotFound));
/// assert!(error.to_string().contains("/dev/shm/no-such.gensync"));
/// ```
///
/// In functions that return [`io::Error`], `?` converts it to one of the closest [`io::ErrorKind`]. The `io::Error` contains the
/// whole of it, for [`get_ref`](io::Error::get_ref) and [`downcast`](io::Error::downcast).
#[derive(Clone)]
pub struct Error(Box<Inner>);

#[derive(Clone, Debug)]
struct Inner {
    kind: ErrorKind,
    path: Option<PathBuf>,
    key: Option<String>,
    source: Option<Source>,
    /// The first folder of the path that does not exist, and what is there instead.
    missing: Option<(PathBuf, &'static str)>,
}

/// Shared, as all threads that waited for one load get its error.
pub(crate) type Source = Arc<dyn std::error::Error + Send + Sync>;

/// The kinds of [`Error`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The file is not a gensync table.
    #[error(
        "not a gensync table: it starts with {}, expected the bytes \"gensync\\0\"; choose another path, or remove the file",
        Shown(.found)
    )]
    #[non_exhaustive]
    NotATable {
        /// The first bytes of the file, at most eight.
        found: Vec<u8>,
    },
    /// The table was made by a version of gensync with another file format. An older one can be replaced, by
    /// [`replace_older(true)`](crate::TableOptions::replace_older) or `gensync upgrade`; the text says so.
    #[error(
        "layout version {found}, expected {expected}: made by {}",
        if is_older(*.found, *.expected) {
            "an older version of gensync; give each version a path of its own, or replace the table: in a program by \
             TableOptions::replace_older(true), from a shell by `gensync upgrade PATH`; then restart the processes of the older \
             version, for which everything is expired and updates fail from then on"
        } else {
            "another version of gensync; use the same version here, or stop its users and remove the file, or give each version \
             a path of its own"
        }
    )]
    #[non_exhaustive]
    LayoutVersion {
        /// The version in the file.
        found: u32,
        /// The version that this crate reads and writes.
        expected: u32,
    },
    /// The table was made on a machine of the other byte order.
    #[error(
        "byte-order mark {found}, expected {expected} (1 little-endian, 2 big-endian): made on another kind of machine; \
         remove the file"
    )]
    #[non_exhaustive]
    ByteOrder {
        /// The mark in the file.
        found: u32,
        /// The mark of this machine.
        expected: u32,
    },
    /// The file is shorter than its header says.
    #[error("truncated table: {found} bytes, expected at least {expected}; stop its users and remove the file")]
    #[non_exhaustive]
    Truncated {
        /// The size of the file in bytes.
        found: u64,
        /// The least size that its header calls for, in bytes.
        expected: u64,
    },
    /// A field of the header holds a value that gensync never writes.
    #[error("damaged header: {field} is {found}, expected {expected}; stop its users and remove the file")]
    #[non_exhaustive]
    Damaged {
        /// The field's name.
        field: &'static str,
        /// What it holds.
        found: u64,
        /// What it may hold.
        expected: &'static str,
    },
    /// The generation word of a key holds a value that gensync never writes, in a table that has no successor.
    #[error("damaged key: its generation word is {found:#018x}, which is none of a live table; reset the table")]
    #[non_exhaustive]
    DamagedKey {
        /// The word.
        found: u64,
    },
    /// The record word of a key that has no generation yet holds a value that gensync never writes, so the key cannot begin.
    #[error("damaged key: its record word is {found:#018x}, which leads to no text of a key; reset the table")]
    #[non_exhaustive]
    DamagedRecord {
        /// The word.
        found: u64,
    },
    /// The file belongs to a user that the owner check does not accept.
    #[error(
        "belongs to user {found}, expected {expected}: another user could forge generations; use a path of your own, or \
         accept that owner in TableOptions"
    )]
    #[non_exhaustive]
    WrongOwner {
        /// The owner's user id.
        found: u32,
        /// The users that the check accepts.
        expected: String,
    },
    /// The folder of a default table belongs to another user, is writable by others or is not a folder.
    #[error("unsafe folder: {found}, expected a folder of user {user} with mode 0700; correct or remove it")]
    #[non_exhaustive]
    UnsafeFolder {
        /// What is wrong with it.
        found: String,
        /// The user id that it should belong to.
        user: u32,
    },
    /// The operating system refuses access.
    #[error("permission denied; check the owner and mode of the file and of its folders")]
    Permission,
    /// The file system is mounted read-only.
    #[error("the file system is read-only; choose another path, or open the table with read_only(true)")]
    ReadOnlyFileSystem,
    /// The path is a symbolic link.
    #[error("is a symbolic link, expected a regular file; name the link's target")]
    Symlink,
    /// The path is a folder, a device, a pipe or a socket.
    #[error("is {found}, expected a regular file; choose another path")]
    #[non_exhaustive]
    NotARegularFile {
        /// What the path is.
        found: &'static str,
    },
    /// The file system is shared between machines, where a mapping is not.
    #[error(
        "is on a {found} file system (magic number {magic:#x}), whose mappings are not coherent between machines; use a local \
         one, such as /dev/shm, or {} if no other machine has it mounted",
        if *.found == "FUSE" { "allow_fuse(true)".to_owned() } else { format!("allow_file_system({magic:#x})") }
    )]
    #[non_exhaustive]
    NetworkFileSystem {
        /// The file system's name.
        found: &'static str,
        /// Its magic number.
        magic: u64,
    },
    /// The file system is not among those that are known to be local.
    #[error(
        "is on a file system with the magic number {magic:#x}, which is none of those known to keep mappings coherent; use a \
         local one, such as /dev/shm, or allow_file_system({magic:#x}) if no other machine has it mounted and mappings of \
         one file in several processes share memory there"
    )]
    #[non_exhaustive]
    UnknownFileSystem {
        /// The magic number, as `stat --file-system --format %t` shows it.
        magic: u64,
    },
    /// The table is to be opened read-only on overlayfs by a process that may not write to it.
    #[error(
        "is on overlayfs, where the first process that opens the file for writing puts a copy in its place, and a process that \
         has the original open never sees the copy; this process may not open the file for writing, which would make the copy \
         beforehand; put the table on a tmpfs or a volume, or let this process write to the file"
    )]
    ReadOnlyOverlay,
    /// The table's file can be neither replaced nor removed, at least not by this process.
    #[error("the table's file cannot be replaced or removed: {reason}")]
    #[non_exhaustive]
    NotReplaceable {
        /// What stands in the way, and what to do.
        reason: String,
    },
    /// There is no room for another key: the disk is full, or a quota, the file size limit or the greatest size of a table is
    /// reached.
    #[error("table full: {reason}; existing keys go on working; {advice}")]
    #[non_exhaustive]
    TableFull {
        /// What is exhausted.
        reason: String,
        /// What to do.
        advice: &'static str,
    },
    /// The table was opened read-only.
    #[error("the table is open read-only and this would write to it; open it without read_only(true)")]
    ReadOnly,
    /// The key is not in the table, and a read-only table cannot create it.
    #[error("no such key, and the table is open read-only: let a process that may write attach to the key first")]
    KeyNotFound,
    /// The key is empty.
    #[error("the cache key is empty; give at least one character")]
    EmptyKey,
    /// There is no file at the path, and none may be created; or the folder for it does not exist, which the text and
    /// [`Error::missing_folder`] name.
    #[error(
        "no such table, and it may not be created; check the path, or let a process with create(true) open it first"
    )]
    NotFound,
    /// An option or an argument is out of its range.
    #[error("{what} is {found}, expected {expected}")]
    #[non_exhaustive]
    InvalidInput {
        /// Which option or argument.
        what: &'static str,
        /// The value that was given.
        found: String,
        /// The values that are accepted.
        expected: &'static str,
    },
    /// The table was reset or its file replaced, and its successor cannot be attached to now.
    #[error(
        "the table was reset or its file replaced, and no successor can be attached to; see whether its file can be opened"
    )]
    Retired,
    /// The path of the table leads to another file system than before, so that it cannot be known whether other processes
    /// use the same file.
    #[error(
        "the table's path leads to another file system than when it was opened, as after a mount over its folder: other \
         processes may use another file; undo the mount, or end this process"
    )]
    Unconfirmed,
    /// The update was begun by the parent, before this process was forked.
    #[error(
        "the update was begun before the fork, by the parent, and only the parent can finish it; let the child begin an \
         update of its own"
    )]
    Inherited,
    /// A part of the table's file stayed locked: by an [`update`](crate::GenerationSynchronizer::update) that does not end, or by
    /// a process that was stopped while it reset the table.
    #[error(
        "a part of the table's file {}; `grep OFDLCK /proc/*/fdinfo/* | grep -v ' 128 143$'` names the processes: let the one \
         that holds the lock go on, or end it",
        match .seconds {
            0 => "is locked, by a reset or an update; try again, or allow more time".to_owned(),
            seconds => format!("has been locked for {seconds} s, by an update that does not end or by a stopped process"),
        }
    )]
    #[non_exhaustive]
    Locked {
        /// How long this process waited, in seconds.
        seconds: u64,
    },
    /// The loader of a [`Cached`](crate::Cached) failed; its error is the source.
    #[error("the value could not be loaded: {reason}")]
    #[non_exhaustive]
    Load {
        /// The loader's error, as text.
        reason: String,
    },
    /// Another thread was still loading the value of a [`Cached`](crate::Cached) at the deadline.
    #[error("the value was still being loaded at the deadline; take the old one with get_stale_ok, or allow more time")]
    Deadline,
    /// A load of a [`Cached`](crate::Cached) has lasted longer than an old value may be served
    /// ([`fail_safe`](crate::CachedBuilder::fail_safe)), and counts as failed.
    #[error(
        "the value has been loading for {lasted:?}, longer than an old one may be served, {allowed:?}; see what the loader \
         waits for, and give it a time limit of its own"
    )]
    #[non_exhaustive]
    Overdue {
        /// How long it has lasted so far.
        lasted: Duration,
        /// How long an old value may be served.
        allowed: Duration,
    },
    /// The loader of a [`Cached`](crate::Cached) asked for the value that it is to load, directly or through other values, which
    /// may be loaded in other threads. In the latter case, the source names the keys of the loads that wait for each other.
    #[error(
        "the loader asks for the value that it is to load, directly or through the loaders of other values; let it read the \
         source itself, and let loaders ask for each other's values in one direction only"
    )]
    Recursion,
    /// Each of several loads of a [`Cached`](crate::Cached) in a row was overtaken by an update of its key, or of a key that it
    /// depends on.
    #[error(
        "the key, or one that it depends on, was updated during each of the last {loads} loads; a loader must mark none of \
         them updated, and a key that is updated faster than it is loaded should be several keys"
    )]
    #[non_exhaustive]
    Overtaken {
        /// The number of loads.
        loads: u64,
    },
    /// Any other failure of the operating system.
    #[error("{action} failed")]
    #[non_exhaustive]
    System {
        /// What was attempted.
        action: &'static str,
    },
}

/// Whether a table of version `found` can be replaced by one of the version that is `expected`. There is no version 0.
fn is_older(found: u32, expected: u32) -> bool {
    (1..expected).contains(&found)
}

/// The first bytes of a file, as text where they are text.
struct Shown<'a>(&'a [u8]);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => f.write_str("nothing (the file is empty)"),
            bytes => write!(f, "\"{}\"", bytes.escape_ascii()),
        }
    }
}

impl Error {
    pub(crate) fn new(kind: ErrorKind) -> Self {
        Self(Box::new(Inner { kind, path: None, key: None, source: None, missing: None }))
    }

    /// An error of the operating system, of the kind that fits its number; [`ErrorKind::System`] if none does.
    pub(crate) fn system(action: &'static str, errno: Errno) -> Self {
        let kind = match errno {
            Errno::EACCES | Errno::EPERM => ErrorKind::Permission,
            Errno::EROFS => ErrorKind::ReadOnlyFileSystem,
            Errno::ENOSPC | Errno::EDQUOT => ErrorKind::TableFull {
                reason: if errno == Errno::ENOSPC {
                    "no space, or no inode, is left on the file system"
                } else {
                    "the disk quota is used up"
                }
                .to_owned(),
                advice: "free some space there",
            },
            Errno::EFBIG => ErrorKind::TableFull {
                reason: "the file would be larger than the file system or the process allows".to_owned(),
                advice: "raise the file size limit (ulimit -f)",
            },
            Errno::ENAMETOOLONG => ErrorKind::InvalidInput {
                what: "the table's path",
                found: "too long".to_owned(),
                expected: "at most 255 bytes for each name in it, and 4095 for all of it",
            },
            Errno::ELOOP => ErrorKind::InvalidInput {
                what: "the table's path",
                found: "one through symbolic links that lead back to themselves".to_owned(),
                expected: "a path whose folders can be followed",
            },
            _ => ErrorKind::System { action },
        };
        let mut error = Self::new(kind);
        error.0.source = Some(Arc::new(io::Error::from(errno)));
        error
    }

    /// There is no table, as its `folder` does not exist; `found` says what is there instead.
    #[cfg(not(loom))]
    pub(crate) fn no_folder(folder: &Path, found: &'static str) -> Self {
        let mut error = Self::new(ErrorKind::NotFound);
        error.0.missing = Some((folder.to_owned(), found));
        error
    }

    /// A loader's error.
    #[cfg(not(loom))]
    pub(crate) fn load(source: &Source) -> Self {
        let mut error = Self::new(ErrorKind::Load { reason: source.to_string() });
        error.0.source = Some(Arc::clone(source));
        error
    }

    #[cfg(not(loom))]
    pub(crate) fn caused_by(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.0.source = Some(Arc::new(source));
        self
    }

    pub(crate) fn io(action: &'static str, source: &io::Error) -> Self {
        match source.raw_os_error() {
            Some(number) => Self::system(action, Errno::from_raw(number)),
            // From the standard library: a path that cannot be passed to a system call, as it contains a zero byte.
            None => {
                let mut error = Self::new(ErrorKind::System { action });
                error.0.source = Some(Arc::new(io::Error::new(source.kind(), source.to_string())));
                error
            }
        }
    }

    pub(crate) fn at(mut self, path: &Path) -> Self {
        self.0.path.get_or_insert_with(|| path.to_owned());
        self
    }

    pub(crate) fn with_key(mut self, key: &str) -> Self {
        self.0.key.get_or_insert_with(|| key.to_owned());
        self
    }

    /// What went wrong.
    #[must_use]
    pub fn kind(&self) -> &ErrorKind {
        &self.0.kind
    }

    /// The file or folder concerned, if there is one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// The first folder of the path that does not exist, if that is why there is no table.
    #[must_use]
    pub fn missing_folder(&self) -> Option<&Path> {
        self.0.missing.as_ref().map(|(folder, _)| &**folder)
    }

    /// The cache key concerned, if there is one.
    #[must_use]
    pub fn key(&self) -> Option<&str> {
        self.0.key.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.0.path {
            write!(f, "{}: ", path.display())?;
        }
        if let Some(key) = &self.0.key {
            write!(f, "key \"{}\": ", key.escape_debug())?;
        }
        match &self.0.missing {
            Some((folder, found)) => {
                write!(f, "no such folder: {} {found}; make it, or check the path", folder.display())
            }
            None => self.0.kind.fmt(f),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { kind, path, key, source, missing } = &*self.0;
        f.debug_struct("Error")
            .field("kind", kind)
            .field("path", path)
            .field("key", key)
            .field("source", source)
            .field("missing", missing)
            .finish()
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|source| &**source as _)
    }
}

pub(crate) fn damaged(field: &'static str, found: u64, expected: &'static str) -> ErrorKind {
    ErrorKind::Damaged { field, found, expected }
}

impl From<ErrorKind> for Error {
    fn from(kind: ErrorKind) -> Self {
        Self::new(kind)
    }
}

// An error is never changed after it is returned, so no panic can leave it half changed. Its source is only read; the compiler
// cannot know that of a trait object.
impl UnwindSafe for Error {}
impl RefUnwindSafe for Error {}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        use io::ErrorKind as Io;

        let kind = match &error.0.kind {
            ErrorKind::NotATable { .. }
            | ErrorKind::LayoutVersion { .. }
            | ErrorKind::ByteOrder { .. }
            | ErrorKind::Truncated { .. }
            | ErrorKind::Damaged { .. }
            | ErrorKind::DamagedKey { .. }
            | ErrorKind::DamagedRecord { .. } => Io::InvalidData,
            ErrorKind::WrongOwner { .. }
            | ErrorKind::UnsafeFolder { .. }
            | ErrorKind::Permission
            | ErrorKind::ReadOnly
            | ErrorKind::Inherited => Io::PermissionDenied,
            ErrorKind::ReadOnlyFileSystem => Io::ReadOnlyFilesystem,
            ErrorKind::Symlink
            | ErrorKind::NotARegularFile { .. }
            | ErrorKind::EmptyKey
            | ErrorKind::InvalidInput { .. } => Io::InvalidInput,
            ErrorKind::NetworkFileSystem { .. } => Io::Unsupported,
            ErrorKind::KeyNotFound | ErrorKind::NotFound => Io::NotFound,
            ErrorKind::Locked { .. } | ErrorKind::Deadline => Io::TimedOut,
            ErrorKind::Recursion => Io::Deadlock,
            kind => {
                let source = error.0.source.as_deref().map(|source| source as &(dyn std::error::Error + 'static));
                match source.and_then(|source| source.downcast_ref::<io::Error>()) {
                    Some(cause) => cause.kind(),
                    None if matches!(kind, ErrorKind::TableFull { .. }) => Io::StorageFull,
                    None => Io::Other,
                }
            }
        };
        Self::new(kind, error)
    }
}

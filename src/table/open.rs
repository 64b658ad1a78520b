//! Opening a table, and creating it.

use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit};

use super::replace::{exclude_updates, floor_of_successor, replace};
use super::{HOLDERS_PATIENCE, READER_PAUSE, Shared, Table, TableOptions, options};
use crate::error::{Error, ErrorKind};
use crate::os::file::TableFile;
use crate::os::mapping::Mapping;
use crate::os::new_table::NewTable;
use crate::os::path::{is_descriptor, missing_folder};
use crate::protocol::directory::end_of_new_table;
use crate::protocol::layout::MAX_SIZE;
use crate::table::incarnation::Incarnation;
use crate::table::retry::retry;

#[derive(Debug)]
pub(super) enum Source {
    Path(PathBuf),
    Anonymous,
    #[cfg(feature = "shm")]
    Named {
        name: String,
        path: PathBuf,
    },
}

impl Table {
    fn open_path(path: &Path, options: TableOptions) -> Result<Self, Error> {
        let refuse = |found: &str| {
            let (found, expected) = (found.to_owned(), "the path of a file, such as /dev/shm/shop.gensync");
            Err(ErrorKind::InvalidInput { what: "the table's path", found, expected }.into())
        };
        match path.as_os_str().as_bytes() {
            [] => return refuse("empty"),
            bytes if bytes.contains(&0) => return refuse("one with a zero byte in it"),
            _ => {}
        }
        let absolute = std::path::absolute(path).map_err(|error| Error::io("finding the path", &error).at(path))?;
        Self::open_source(Source::Path(absolute), options)
    }

    #[cfg(feature = "shm")]
    fn open_named(name: &str, options: TableOptions) -> Result<Self, Error> {
        let name = name.strip_prefix('/').unwrap_or(name);
        options::checked_name("the segment's name", name)?;
        let path = Path::new("/dev/shm").join(name);
        writable("the named table", "a writable one; to read only, open /dev/shm/NAME by its path", &options)
            .map_err(|error| error.at(&path))?;
        Self::open_source(Source::Named { name: name.to_owned(), path }, options)
    }

    fn open_source(source: Source, options: TableOptions) -> Result<Self, Error> {
        let first = open(&source, &options, None)?;
        Ok(Self(Arc::new(Shared::new(options, source, first))))
    }

    fn create_anonymous(options: TableOptions) -> Result<Self, Error> {
        writable("the anonymous table", "a writable one, as no other process could create its keys", &options)?;
        let capacity = options.checked_capacity()?;
        let size = sparse_size(end_of_new_table(capacity));
        let new = NewTable::new(capacity, options.mode, size, &options.file)?.anonymous()?;
        let file = TableFile::of_file(new, &options.file)?;
        let mapping = Mapping::of_file(file.file, None, &file.fixed, &file.extents, false)?;
        let first = Arc::new(Incarnation::new(mapping, file.fixed, None));
        Ok(Self(Arc::new(Shared::new(options, Source::Anonymous, first))))
    }
}

impl TableOptions {
    /// Opens the table at `path`, or creates it.
    ///
    /// A symbolic link at the path itself is refused, wherever it leads; links among its folders are followed. A user that may
    /// write to the folder can put any file there: prefer a folder of your own, or a sticky one such as `/dev/shm`. A table
    /// with several names (hard links) is one table until a [`reset`](Table::reset), which gives a new file to one of the names
    /// only.
    ///
    /// A file that is a mount point itself (`docker -v /dev/shm/shop.gensync:/dev/shm/shop.gensync`) can be opened, but cannot
    /// be replaced from within the container: see [`Table::replaceable`]. When the host replaces its file, by a reset for
    /// example, the mount still shows the old file, and every key there stays expired: mount the folder instead.
    ///
    /// On overlayfs, a read-only table is first opened for writing and closed again, so that the process sees the file that
    /// writers use; if that is not permitted, the error is [`ErrorKind::ReadOnlyOverlay`].
    ///
    /// For a moment, a successor has a hidden name beside `path`: `.gensync-` and 16 random hexadecimal digits. So has a new
    /// table if the file system has no files without a name, or there is no /proc. A process that is killed at that moment
    /// leaves the file there, and the next reset of a table in that folder by the same user removes it.
    ///
    /// # Errors
    ///
    /// Every [`ErrorKind`] except those about keys. A file that is not a table of this version is left untouched.
    ///
    /// # Progress
    ///
    /// Blocking: reads and writes files, and sleeps while another process creates or replaces the table, or has an update in
    /// flight in a table that is replaced.
    pub fn open(self, path: impl AsRef<Path>) -> Result<Table, Error> {
        Table::open_path(path.as_ref(), self)
    }

    /// Opens or creates the table of the application `app` that belongs to this user, at the path that [`Table::open_default`]
    /// uses. The folder is created only if the table may be created.
    ///
    /// # Errors
    ///
    /// As [`Table::open_default`].
    ///
    /// # Progress
    ///
    /// As [`open`](Self::open).
    pub fn open_default(self, app: &str) -> Result<Table, Error> {
        let path = options::default_path(app, self.create && !self.file.read_only)?;
        self.open(path)
    }

    /// Creates a table without a name, in memory that forked children share (a sealed memfd).
    ///
    /// # Errors
    ///
    /// No descriptor or no memory is left, the capacity is out of range, or the table would be read-only.
    ///
    /// # Progress
    ///
    /// Some system calls, none of which sleeps.
    pub fn anonymous(self) -> Result<Table, Error> {
        Table::create_anonymous(self)
    }

    /// Opens or creates the named POSIX shared memory segment `name` (one component, with or without a leading `/`).
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open). Options that say [`read_only`](Self::read_only) are refused: open `/dev/shm/NAME` by its path
    /// to read only.
    ///
    /// # Progress
    ///
    /// As [`open`](Self::open).
    #[cfg(feature = "shm")]
    pub fn named(self, name: &str) -> Result<Table, Error> {
        Table::open_named(name, self)
    }
}

impl Source {
    pub(super) fn path(&self) -> Option<&Path> {
        match self {
            Self::Path(path) => Some(path),
            Self::Anonymous => None,
            #[cfg(feature = "shm")]
            Self::Named { path, .. } => Some(path),
        }
    }

    /// Maps `file`; `None` if its name leads to another file by now.
    pub(super) fn map(&self, file: &TableFile, options: &TableOptions) -> Result<Option<Incarnation>, Error> {
        let fixed = &file.fixed;
        // A file that is opened by a descriptor's path has no name of its own from which it could be gone.
        let path = self.path().filter(|path| !(options.file.read_only && is_descriptor(path)));
        let own = file.file.try_clone().map_err(|error| Error::io("keeping the table's file open", &error))?;
        let mapping = match self {
            #[cfg(feature = "shm")]
            Self::Named { name, path } => match Mapping::of_named(own, path, name, fixed, &file.extents)? {
                Some(mapping) => mapping,
                None => return Ok(None),
            },
            _ => Mapping::of_file(own, path, fixed, &file.extents, options.file.read_only)?,
        };
        Ok(Some(Incarnation::new(mapping, fixed.clone(), path)))
    }
}

fn writable(what: &'static str, expected: &'static str, options: &TableOptions) -> Result<(), Error> {
    match options.file.read_only {
        true => Err(ErrorKind::InvalidInput { what, found: "read-only".to_owned(), expected }.into()),
        false => Ok(()),
    }
}

/// Opens the live table that the source names: creates it if it is missing, and replaces it if it is retired.
pub(super) fn open(
    source: &Source,
    options: &TableOptions,
    predecessor: Option<&Incarnation>,
) -> Result<Arc<Incarnation>, Error> {
    let path = source.path().ok_or(ErrorKind::Retired)?;
    let open = || {
        retry(|| {
            let Some(file) = TableFile::open(path, &options.file)? else {
                create(path, options, predecessor)?;
                return Ok(None);
            };
            let Some(incarnation) = source.map(&file, options)? else { return Ok(None) };
            let is_live = incarnation.slots().header().is_live();
            if (is_live && !file.is_older()) || options.accepts_retired() {
                incarnation.hold(&file, !options.file.read_only)?;
                return Ok(Some(Arc::new(incarnation)));
            }
            if options.file.read_only {
                // A process that may write may be about to replace it.
                if predecessor.is_some_and(|holder| holder.held_up_for() >= HOLDERS_PATIENCE) {
                    return Err(ErrorKind::Retired.into());
                }
                std::thread::sleep(READER_PAUSE);
                return Ok(None);
            }
            let _excluded = if is_live { Some(exclude_updates(&incarnation, options.pending_limit)?) } else { None };
            replace(path, &file, &incarnation, predecessor, options.pending_limit, || {
                succeeding(&file, options)?.prepare(path)?.stand_by(path)
            })?;
            Ok(None)
        })
    };
    open().map_err(|error: Error| error.at(path))
}

pub(super) fn create(path: &Path, options: &TableOptions, predecessor: Option<&Incarnation>) -> Result<(), Error> {
    if !options.create || options.file.read_only {
        return Err(missing_folder(path));
    }
    let stat = predecessor.and_then(|predecessor| Some((predecessor, predecessor.mapping().stat().ok()?)));
    let new_table = match stat {
        Some((predecessor, stat)) => NewTable::succeeding(predecessor.fixed(), &stat, &options.file)?,
        None => NewTable::new(options.checked_capacity()?, options.mode, 0, &options.file)?,
    };
    let floor = predecessor.map_or(Ok(0), floor_of_successor)?;
    // If another process has created one first, that is as good.
    let _created = new_table.prepare(path)?.link(path, floor)?;
    Ok(())
}

pub(super) fn succeeding(file: &TableFile, options: &TableOptions) -> Result<NewTable, Error> {
    NewTable::succeeding(&file.fixed, &file.stat()?, &options.file)
}

/// The maximum size, or as much of it as the process may give a file, for tables whose size is set once.
fn sparse_size(least: u64) -> u64 {
    let limit = getrlimit(Resource::RLIMIT_FSIZE).map_or(u64::MAX, |(limit, _)| limit);
    MAX_SIZE.min(limit).max(least)
}

//! Creating a table, which is complete before it has its name.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::FileStat;
use nix::unistd::{Uid, linkat};

use crate::error::{Error, ErrorKind};
use crate::os::allocation::{allocate, check_size_limit, rewrite_in_place};
use crate::os::boot::boot_id;
use crate::os::clock::now;
use crate::os::file::{FileOptions, REPLACEMENT, open_again};
use crate::os::file_system::check_file_system;
use crate::os::lock::{Kind, RangeLock, is_held_by_writer, set};
use crate::os::mapping::DESCRIPTORS;
use crate::os::owner::{OwnerCheck, check_mapped};
use crate::os::path::{folder, has_proc, is_missing, missing_folder};
use crate::protocol::directory::end_of_new_table;
use crate::protocol::fixed_header::FixedHeader;
use crate::protocol::layout::{LEAST_CAPACITY, MAGIC, VERSION};

/// What the hidden name of an unfinished table begins with; sixteen random hexadecimal digits follow. They are random, as
/// another process could take a name that it can predict; and the name is short, however long the table's is.
const UNFINISHED: &str = ".gensync-";

/// What a new table is made of.
#[derive(Debug)]
pub(crate) struct NewTable {
    capacity: u64,
    boot: [u64; 2],
    mode: u32,
    /// The user and group to give the file to; `None`: those of the creator.
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

    /// A successor, as similar to its predecessor as possible: other processes must be able to open it just the same.
    pub(crate) fn succeeding(fixed: &FixedHeader, stat: &FileStat, options: &FileOptions) -> Result<Self, Error> {
        let sparse = stat.st_blocks * 512 < stat.st_size;
        Ok(Self {
            // Version 1 knew less.
            capacity: fixed.capacity.max(LEAST_CAPACITY),
            boot: boot_id()?,
            mode: stat.st_mode & 0o777,
            owner: Some((stat.st_uid, stat.st_gid)),
            size: if sparse { stat.st_size as u64 } else { 0 },
            allowed_file_systems: options.allowed_file_systems.clone(),
            accepted: options.owner,
        })
    }

    /// Creates a table that has no name yet, in the folder of `path`. Whatever can fail for lack of room or permission fails
    /// here.
    pub(crate) fn prepare(self, path: &Path) -> Result<UnlinkedTable, Error> {
        self.unnamed(path).map_err(|error| error.at(path))
    }

    fn unnamed(self, path: &Path) -> Result<UnlinkedTable, Error> {
        let mut open = OpenOptions::new();
        open.read(true).write(true).mode(0o600);
        let named = || -> Result<UnlinkedTable, Error> {
            // A process that is killed from here on leaves the file behind.
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
            // Without /proc, an unnamed file cannot be given a name.
            Ok(_) => named()?,
            // Not every file system supports unnamed files.
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

    /// A table in memory that only this process and its children can use.
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
        // The process that creates a table opens it next. If it would refuse the table then, it fails here, and leaves no table
        // behind.
        self.accepted.check(self.owner.map_or(metadata.uid(), |(user, _)| user))?;
        if let Some((user, group)) = self.owner.filter(|owner| *owner != (metadata.uid(), metadata.gid())) {
            std::os::unix::fs::fchown(file, Some(user), Some(group)).map_err(doing("giving the table to its owner"))?;
        }
        // Set after opening, as the umask applies to the mode that open is given.
        file.set_permissions(std::fs::Permissions::from_mode(self.mode)).map_err(doing("setting the table's mode"))?;
        let end = end_of_new_table(self.capacity);
        rewrite_in_place(file.as_fd());
        allocate(file.as_fd(), 0, end)?;
        if self.size > end {
            check_size_limit(self.size)?;
            file.set_len(self.size).map_err(doing("setting the table's size"))?;
        }
        Ok(())
    }
}

/// A table that is complete except for its header and its name.
#[derive(Debug)]
pub(crate) struct UnlinkedTable {
    file: File,
    /// Taken through a description of its own, as a forked child would keep a lock of `file`'s description. `None` if the lock
    /// is `file`'s, or there is no lock.
    lock: Option<RangeLock>,
    name: Option<PathBuf>,
    capacity: u64,
    boot: [u64; 2],
}

impl UnlinkedTable {
    /// Gives the table its name; its keys start at `floor` or later. `false` if the name exists already.
    pub(crate) fn link(self, path: &Path, floor: u64) -> Result<bool, Error> {
        let written = write_header(&self.file, self.capacity, floor, self.boot);
        written.and_then(|()| self.link_to(path)).map_err(|error| error.at(path))
    }

    /// Gives it a hidden name beside `path`, and a header, so that only one call is left to put it in place.
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

    /// Locks the file, which says that it is in use, before another process can find it under its hidden name.
    fn claim(&mut self) -> Result<(), Error> {
        match RangeLock::try_new(|| open_again(&self.file), REPLACEMENT, Kind::Exclusive) {
            Ok(lock) => self.lock = lock,
            // There is no /proc, no permission to open the file once more, or no free descriptor: the lock is `file`'s.
            Err(_) => _ = set(self.file.as_fd(), REPLACEMENT, Some(Kind::Exclusive))?,
        }
        write_header(&self.file, self.capacity, 0, self.boot)
    }

    /// Puts it, after [`stand_by`](Self::stand_by), in the place of the retired table at `path`. To be called under the retired
    /// table's lock.
    pub(crate) fn replace(mut self, path: &Path, floor: u64) -> Result<(), Error> {
        let replace = || {
            // The header overwrites the one that is there already, which takes no room.
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
        // In case the lock is this description's: a child that was forked meanwhile has a copy of the descriptor, which would
        // keep the lock.
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

/// Removes the unfinished tables that killed processes of this user have left beside `path`, as far as they can be removed.
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

/// Whether the file is a table of this user that no process has locked. Other users may have put something else there under
/// such a name.
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

/// Tries `action` with hidden names beside `path` until it returns something, which says that the name was free.
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

fn write_header(file: &File, capacity: u64, floor: u64, boot: [u64; 2]) -> Result<(), Error> {
    let fixed =
        FixedHeader { version: VERSION, capacity, salt: random()?, incarnation: random()?, created: now(), floor };
    file.write_all_at(&fixed.encode(boot), 0).map_err(|error| Error::io("writing the table's header", &error))
}

fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|_| ErrorKind::System { action: "asking the system for random numbers" })?;
    Ok(bytes)
}

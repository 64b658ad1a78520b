//! How a table is opened.

use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::Uid;

use crate::error::{Error, ErrorKind};
use crate::key::KeyNormalizer;
use crate::os::file::FileOptions;
use crate::os::file_system::FUSE;
use crate::os::owner::{OwnerCheck, check_mapped};
use crate::os::privilege::has_callers_environment;
use crate::protocol::layout::{LEAST_CAPACITY, MAX_CAPACITY};

/// Options for opening a [`Table`](crate::Table); made by [`Table::options`](crate::Table::options).
///
/// ```no_run
/// use gensync::{KeyNormalizer, Table};
///
/// # fn main() -> Result<(), gensync::Error> {
/// let table = Table::options()
///     .capacity(4096)
///     .mode(0o660)
///     .normalizer(KeyNormalizer::new().domain("example.com"))
///     .open("/dev/shm/shop.gensync")?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
#[must_use = "options do nothing until `open`, `anonymous` or `named` is called"]
pub struct TableOptions {
    capacity: u64,
    pub(crate) mode: u32,
    pub(crate) create: bool,
    pub(crate) file: FileOptions,
    accept_retired: bool,
    pub(crate) normalizer: KeyNormalizer,
    pub(crate) pending_limit: Duration,
    pub(crate) outage_ttl: Duration,
}

impl Default for TableOptions {
    fn default() -> Self {
        Self {
            capacity: 1024,
            mode: 0o600,
            create: true,
            file: FileOptions::default(),
            accept_retired: false,
            normalizer: KeyNormalizer::default(),
            pending_limit: Duration::from_secs(30),
            outage_ttl: Duration::from_secs(1),
        }
    }
}

impl TableOptions {
    /// How many slots the first segment of a new table has: 1 to 33,554,432, rounded up to a power of two, and at least 16; 1024
    /// unless set. A table grows by itself, when seven to nine tenths of its slots are in use; this only saves the growth.
    pub fn capacity(mut self, slots: u64) -> Self {
        self.capacity = slots;
        self
    }

    /// The permission bits of a new file, exactly (the umask does not apply); 0600 unless set.
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    /// Whether a missing table is created; `true` unless set. A read-only table is never created.
    pub fn create(mut self, create: bool) -> Self {
        self.create = create;
        self
    }

    /// Opens the table without write permission: for checks and refreshes of existing keys.
    ///
    /// Then the path may also be `/proc/PID/fd/NUMBER`, a descriptor of another process, to inspect its anonymous table.
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.file.read_only = read_only;
        self
    }

    /// Whether a table that was created by an older version of gensync, with another file format, is replaced by a new one.
    /// `false` unless set: then such a table is refused with [`ErrorKind::LayoutVersion`].
    ///
    /// The old table is retired as by a [`reset`](crate::Table::reset), so that no update is lost when processes of two
    /// versions run side by side: each update that was announced in the old table has come before whatever is loaded through
    /// the new one, and each later update fails. For processes of the older version, everything is expired from then on, and
    /// their updates fail with `LayoutVersion`, until they are restarted with the newer version. A table of a newer version is
    /// never replaced.
    ///
    /// `gensync upgrade` does the same by hand.
    pub fn replace_older(mut self, replace: bool) -> Self {
        self.file.replace_older = replace;
        self
    }

    /// How keys that are not [raw](crate::CacheKey::raw) are normalized.
    pub fn normalizer(mut self, normalizer: KeyNormalizer) -> Self {
        self.normalizer = normalizer;
        self
    }

    /// Which user's file is accepted; [`OwnerCheck::CurrentUserOrRoot`] unless set.
    pub fn owner(mut self, owner: OwnerCheck) -> Self {
        self.file.owner = owner;
        self
    }

    /// How long an update begun by [`update`](crate::GenerationSynchronizer::update) may be in flight before this process
    /// counts it as lost, although the process that makes it seems to be alive; 30 seconds unless set.
    ///
    /// State is served for this long before it is loaded again, by this process alone: other processes have limits of their
    /// own. [`reset`](crate::Table::reset) waits for updates in flight for as long, and then fails. An update waits for at most
    /// as long until it may begin.
    pub fn pending_limit(mut self, limit: Duration) -> Self {
        self.pending_limit = limit;
        self
    }

    /// How long state that was loaded while its freshness could not be known counts as fresh; one second unless set, at most
    /// some days.
    ///
    /// Freshness cannot be known when the table was retired or deleted and can neither be opened nor created again, and when
    /// its path leads to another file system than before, as after a mount over its folder. The next attempt to open it is made
    /// within milliseconds of the first failure, and later ones less and less often, down to twice a second. State that was
    /// loaded before is expired at once. State that is loaded meanwhile counts as fresh for this long, so that each holder
    /// loads once in this time and not at each use. When the table can be used again, all of that state is expired once more.
    pub fn outage_ttl(mut self, ttl: Duration) -> Self {
        self.outage_ttl = ttl;
        self
    }

    /// Accepts a FUSE file system. This is only safe if no other machine has it mounted, and if its driver keeps shared
    /// mappings coherent.
    pub fn allow_fuse(mut self, allow: bool) -> Self {
        self.file.allowed_file_systems.retain(|magic| *magic != FUSE);
        self.file.allowed_file_systems.extend(allow.then_some(FUSE));
        self
    }

    /// Accepts the file system with this magic number, which the error of a refused one names; may be called for several.
    ///
    /// These are always accepted: tmpfs, ramfs, ext2 to ext4, XFS, Btrfs, F2FS, ZFS, bcachefs, JFS, NILFS and overlayfs. Any
    /// other may be shared between machines, or may give each process pages of its own. Accepting it is only safe if no other
    /// machine has it mounted, and if all mappings of one of its files are the same memory.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), gensync::Error> {
    /// // The shared folder of a virtual machine, which nothing else uses.
    /// let table = gensync::Table::options().allow_file_system(0x786f_4256).open("/media/sf_own/shop.gensync")?;
    /// # Ok(()) }
    /// ```
    pub fn allow_file_system(mut self, magic: u64) -> Self {
        self.file.allowed_file_systems.push(magic);
        self
    }

    /// Whether a retired table is opened too, for inspection, if it is opened [read-only](Self::read_only); `false` unless set.
    /// Such a table is left when a [`reset`](crate::Table::reset) was broken off and no process that may write has opened the
    /// table since. [`slots`](crate::Table::slots), [`stats`](crate::Table::stats) and [`info`](crate::Table::info) work; its
    /// keys cannot be attached to.
    pub fn accept_retired(mut self, accept: bool) -> Self {
        self.accept_retired = accept;
        self
    }

    pub(crate) fn accepts_retired(&self) -> bool {
        self.file.read_only && self.accept_retired
    }

    pub(crate) fn checked_capacity(&self) -> Result<u64, Error> {
        match self.capacity {
            slots @ 1..=MAX_CAPACITY => Ok(slots.next_power_of_two().max(LEAST_CAPACITY)),
            slots => Err(ErrorKind::InvalidInput {
                what: "the capacity",
                found: slots.to_string(),
                expected: "1 to 33554432 slots",
            }
            .into()),
        }
    }
}

/// Checks that `name` is a file name that does not lead out of its folder.
pub(crate) fn checked_name(what: &'static str, name: &str) -> Result<(), Error> {
    if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
        let expected = "a file name: not empty, not \".\" or \"..\", without \"/\" and NUL";
        return Err(ErrorKind::InvalidInput { what, found: format!("\"{}\"", name.escape_debug()), expected }.into());
    }
    Ok(())
}

/// The path of an application's table, in a folder that belongs to its user alone, and is created if `create` says so.
pub(crate) fn default_path(app: &str, create: bool) -> Result<PathBuf, Error> {
    checked_name("the application's name", app)?;
    let runtime = if has_callers_environment() { None } else { std::env::var_os("XDG_RUNTIME_DIR") };
    let folder = match runtime.map(PathBuf::from) {
        Some(runtime) if runtime.is_absolute() => {
            check_runtime(&runtime).map_err(|error| error.at(&runtime))?;
            runtime.join("gensync")
        }
        _ => PathBuf::from(format!("/dev/shm/gensync-{}", Uid::effective())),
    };
    let own = if create { own_folder(&folder) } else { check_folder(&folder).or_else(missing) };
    own.map_err(|error| error.at(&folder))?;
    Ok(folder.join(app))
}

/// `sudo` and `su` keep the variable: a folder that root created there would lock its user out.
fn check_runtime(runtime: &Path) -> Result<(), Error> {
    let user = Uid::effective().as_raw();
    match std::fs::metadata(runtime) {
        Ok(metadata) if metadata.uid() != user && metadata.uid() != 0 => {
            let found = format!(
                "XDG_RUNTIME_DIR belongs to user {}, as after sudo or su; unset it, run this as that user, or name the table's path",
                metadata.uid()
            );
            Err(ErrorKind::UnsafeFolder { found, user }.into())
        }
        _ => Ok(()),
    }
}

fn missing(error: Error) -> Result<(), Error> {
    if matches!(error.kind(), ErrorKind::NotFound) { Ok(()) } else { Err(error) }
}

fn own_folder(folder: &Path) -> Result<(), Error> {
    let user = Uid::effective().as_raw();
    check_mapped(user)
        .map_err(|unmapped| ErrorKind::UnsafeFolder { found: format!("it would belong to {unmapped}"), user })?;
    match std::fs::DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(Error::io("creating the folder", &error))
        }
        _ => check_folder(folder),
    }
}

fn check_folder(folder: &Path) -> Result<(), Error> {
    let metadata = match std::fs::symlink_metadata(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(ErrorKind::NotFound.into()),
        result => result.map_err(|error| Error::io("looking at the folder", &error))?,
    };
    let user = Uid::effective().as_raw();
    let found = if !metadata.is_dir() {
        "it is no folder".to_owned()
    } else if let Err(unmapped) = check_mapped(metadata.uid()) {
        format!("it belongs to {unmapped}")
    } else if metadata.uid() != user {
        format!("it belongs to user {}", metadata.uid())
    } else if metadata.mode() & 0o022 != 0 {
        format!("others may write to it (mode {:04o})", metadata.mode() & 0o7777)
    } else {
        return Ok(());
    };
    Err(ErrorKind::UnsafeFolder { found, user }.into())
}

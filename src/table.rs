//! `Table`: a table as a process holds it, through all of its incarnations.

mod clear;
mod confirmation;
mod end;
pub(crate) mod incarnation;
mod info;
mod inspect;
pub(crate) mod options;
mod sleep;

pub use crate::os::owner::OwnerCheck;
pub use info::{Occupancy, SlotInfo, Stats, TableInfo, TableState};
pub use options::TableOptions;

use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};

use self::end::{exclude_updates, replace};
use crate::error::{Error, ErrorKind};
use crate::key::CacheKey;
use crate::os::clock::{coarse_now, precise_now, with_patience};
use crate::os::file::TableFile;
use crate::os::fork::{Companion, ForkLocal};
use crate::os::mapping::{Chain, Mapping};
use crate::os::new_table::NewTable;
use crate::os::path::{is_descriptor, missing_folder};
use crate::os::pause::Throttle;
use crate::os::view::Presence;
use crate::protocol::layout::{HIGHEST_FLOOR, MAX_SIZE, segment_offset};
use crate::table::confirmation::Confirmation;
use crate::table::incarnation::{Incarnation, Place};

/// At least so many milliseconds pass between two looks at a table's path, and between two attempts to attach to a table
/// that cannot be attached to.
///
/// Less than half a second, so that a use which comes a second after the last look always looks, whichever holder of the
/// process had the turn before it.
pub(crate) const PAUSE: u64 = 490;

/// How often an operation starts again because the table was replaced under it, before it gives up.
pub(crate) const ATTEMPTS: u32 = 100;

/// How long a reader who finds a retired table waits before he looks again whether it was replaced, [`ATTEMPTS`] times.
const READER_PAUSE: Duration = Duration::from_millis(3);

/// How long the checks of a process wait in all for somebody else who replaces the table. It is ready by then, but for one call
/// of the system and a sweep.
const HOLDERS_PATIENCE: Duration = Duration::from_millis(250);

/// A table of generations that processes of this host share.
///
/// Cheap to clone; the clones are one table. It may be used by all threads, and by children forked at any time.
///
/// ```
/// use gensync::{GenerationSynchronizer, Table};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("shop.gensync");
/// let table = Table::open(&path)?;
/// let sync = GenerationSynchronizer::new(&table, "siteconfig:1")?;
/// sync.mark_updated()?;
/// assert_eq!(table.slots().next().unwrap().updates(), 1);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Table(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    options: TableOptions,
    source: Source,
    incarnations: Chain<Arc<Incarnation>>,
    /// When the next look at the path is due.
    revalidation: Throttle,
    confirmation: Confirmation,
    companion: ForkLocal<Companion>,
}

impl Shared {
    fn new(options: TableOptions, source: Source, first: Arc<Incarnation>) -> Self {
        let (revalidation, confirmation) = (Throttle::every(PAUSE), Confirmation::at(coarse_now()));
        let incarnations = Chain::new(first);
        Self { options, source, incarnations, revalidation, confirmation, companion: ForkLocal::new() }
    }
}

#[derive(Debug)]
enum Source {
    Path(PathBuf),
    Anonymous,
    #[cfg(feature = "shm")]
    Named {
        name: String,
        path: PathBuf,
    },
}

impl Table {
    /// Opens the table at `path`, or creates it with mode 0600 and room for 1024 keys in its first segment.
    ///
    /// The natural home is `/dev/shm`. A relative path is taken from the working directory of now.
    ///
    /// # Errors
    ///
    /// As [`TableOptions::open`].
    ///
    /// # Progress
    ///
    /// As [`TableOptions::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        Self::options().open(path)
    }

    /// Opens or creates the table of the application `app` that belongs to this user:
    /// `$XDG_RUNTIME_DIR/gensync/APP`, or `/dev/shm/gensync-UID/APP` where that variable is not an absolute path. UID is the
    /// effective user.
    ///
    /// A program that is set-uid or set-gid, or was given capabilities by its file, does not look at the variable, which its
    /// caller has set.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::UnsafeFolder`] if the folder, which is made with mode 0700, belongs to someone else or is writable
    /// by others; [`ErrorKind::InvalidInput`] if `app` is not a plain file name; else as [`TableOptions::open`].
    ///
    /// # Progress
    ///
    /// As [`TableOptions::open`].
    pub fn open_default(app: &str) -> Result<Self, Error> {
        Self::options().open_default(app)
    }

    /// Options for opening a table in other ways.
    pub fn options() -> TableOptions {
        TableOptions::default()
    }

    pub(crate) fn open_path(path: &Path, options: TableOptions) -> Result<Self, Error> {
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
    pub(crate) fn open_named(name: &str, options: TableOptions) -> Result<Self, Error> {
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

    pub(crate) fn create_anonymous(options: TableOptions) -> Result<Self, Error> {
        writable("the anonymous table", "a writable one, as nobody else could create its keys", &options)?;
        let capacity = options.checked_capacity()?;
        let size = sparse_size(segment_offset(capacity, 1));
        let new = NewTable::new(capacity, options.mode, size, &options.file)?.anonymous()?;
        let file = TableFile::of_file(new, &options.file)?;
        let mapping = Mapping::of_file(file.file, None, &file.fixed, file.segments, false)?;
        let first = Arc::new(Incarnation::new(mapping, file.fixed, None));
        Ok(Self(Arc::new(Shared::new(options, Source::Anonymous, first))))
    }

    /// The path of the table's file; `None` for an anonymous one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.0.source.path()
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.0.options.file.read_only
    }

    pub(crate) fn pending_limit(&self) -> Duration {
        self.0.options.pending_limit
    }

    /// An error about this table.
    pub(crate) fn error(&self, kind: ErrorKind) -> Error {
        self.explain(kind.into())
    }

    pub(crate) fn explain(&self, error: Error) -> Error {
        match self.path() {
            Some(path) => error.at(path),
            None => error,
        }
    }

    pub(crate) fn normalize(&self, key: impl Into<CacheKey>) -> Result<CacheKey, Error> {
        let key = key.into();
        if key.as_str().is_empty() {
            return Err(self.error(ErrorKind::EmptyKey));
        }
        Ok(self.0.options.normalizer.normalize(key))
    }

    pub(crate) fn latest(&self) -> &Arc<Incarnation> {
        self.0.incarnations.latest()
    }

    /// Whether `incarnation` is the one to use, as far as this process knows.
    pub(crate) fn is_latest(&self, incarnation: &Arc<Incarnation>) -> bool {
        Arc::ptr_eq(self.latest(), incarnation)
    }

    /// What was found in `incarnation`; `None` if another thread has moved on from it meanwhile, and given back its memory and
    /// its descriptor.
    fn while_latest<R>(&self, incarnation: &Arc<Incarnation>, result: Result<R, Error>) -> Result<Option<R>, Error> {
        if self.is_latest(incarnation) { result.map(Some) } else { Ok(None) }
    }

    /// Attaches to `key`, in the latest incarnation.
    pub(crate) fn attach(&self, key: &CacheKey) -> Result<Place, Error> {
        let attach = || {
            for _ in 0..ATTEMPTS {
                let current = self.current()?;
                let found = if self.is_read_only() {
                    current.find(key).and_then(|place| place.ok_or(ErrorKind::KeyNotFound.into()).map(Some))
                } else {
                    current.attach(key)
                };
                if let Some(Some(place)) = self.while_latest(current, found)? {
                    return Ok(place);
                }
            }
            Err(ErrorKind::Retired.into())
        };
        attach().map_err(|error: Error| self.explain(error).with_key(key.as_str()))
    }

    /// The latest incarnation; another one than before if that was retired or its file is gone.
    pub(crate) fn current(&self) -> Result<&Arc<Incarnation>, Error> {
        self.revalidate_if_due(coarse_now());
        for _ in 0..ATTEMPTS {
            let latest = self.latest();
            if latest.slots().header().is_live() {
                return Ok(latest);
            }
            self.succeed(latest)?;
        }
        Err(ErrorKind::Retired.into())
    }

    /// Looks at the path, if it is time: the one place that decides when. `now` is milliseconds of the coarse clock.
    pub(crate) fn revalidate_if_due(&self, now: u64) {
        if self.0.revalidation.take(now) {
            let latest = self.latest();
            match latest.presence() {
                Presence::Here => self.0.confirmation.confirm(now),
                Presence::Unknown if self.0.confirmation.doubt(now) => self.expire_at_path(),
                Presence::Unknown => {}
                Presence::Gone => _ = self.leave(latest),
            }
        }
    }

    /// Whether it cannot be confirmed any more that the path names the file: then an update may have gone to another one.
    #[inline]
    pub(crate) fn is_doubtful(&self) -> bool {
        self.0.confirmation.is_doubtful()
    }

    /// How long state serves that was loaded while its freshness could not be known, in milliseconds.
    pub(crate) fn outage_ttl(&self) -> u64 {
        u64::try_from(self.0.options.outage_ttl.as_millis()).unwrap_or(u64::MAX)
    }

    /// Moves on from `latest`, whose path names another file or none: this process, and all others that have it. `false` while
    /// an update that is in flight there keeps them.
    fn leave(&self, latest: &Arc<Incarnation>) -> bool {
        // If the maker of an update that is in flight there is killed, it takes a process that has the old file to announce
        // it. So none moves on before the update has ended.
        let excluded = (!self.is_read_only()).then(|| latest.mapping().try_exclude_updates());
        let is_held_up = match &excluded {
            None => false,
            Some(Ok(Some(_))) => false,
            // A lock of a process that may only read the file does not count.
            Some(Ok(None)) => {
                latest.mapping().are_updates_excluded() || !latest.is_quiet().is_ok_and(|is_quiet| is_quiet)
            }
            // A process that can open nothing more cannot keep updates from beginning, but sees those that have begun.
            Some(Err(_)) => latest.mapping().has_updates_in_flight(),
        };
        if is_held_up && latest.gone_for(precise_now()) < self.pending_limit() {
            return false;
        }
        if self.succeed(latest).is_err() && latest.slots().header().is_live() {
            // It could not even be retired, being read-only or damaged: let it be retired for this process.
            latest.mapping().detach();
        }
        true
    }

    /// Moves on from `owner`, whose file is gone, before an update begins. Waits for updates in flight there, but not for those
    /// of this process, which may be the caller's own. `false` if the update must begin there because of them.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Locked`]: the updates there did not end in time.
    pub(crate) fn leave_for_update(&self, owner: &Arc<Incarnation>, patience: Duration) -> Result<bool, Error> {
        let left = with_patience(patience, || {
            let has_left = !self.is_latest(owner) || self.leave(owner);
            Ok::<_, Error>((has_left || owner.has_own_updates()).then_some(has_left))
        })?;
        left.ok_or_else(|| self.error(ErrorKind::Locked { seconds: patience.as_secs() }))
    }

    /// To be called when an update was announced in `owner`: if the path names another file by now, the key is updated there as
    /// well.
    ///
    /// # Errors
    ///
    /// There is another file, and it cannot be attached to.
    pub(crate) fn follow_update(&self, owner: &Arc<Incarnation>, key: &CacheKey) -> Result<(), Error> {
        // A holder of a file that comes to the path after this look has loaded its state after the update.
        let presence = owner.presence();
        if presence == Presence::Here || !self.is_latest(owner) {
            return Ok(());
        }
        if presence == Presence::Unknown {
            return self.announce_elsewhere(key);
        }
        // The process that retires the table began after the update had ended, as it locks the slots, and what comes after the
        // table was loaded later, or is expired by that process when it has retired the table. Should it be killed before, this
        // one goes on for it.
        if !owner.slots().header().is_live() {
            let _ = self.succeed(owner);
            return Ok(());
        }
        // Moving on announces everything there. Not before other updates here have ended; but this one cannot wait for them.
        if self.leave(owner) && self.latest().slots().header().is_live() {
            return Ok(());
        }
        match self.announce_at_path(self.0.options.clone(), Some(owner), key) {
            // Nobody can have loaded anything through a file that is not there.
            Err(_) if self.path().is_some_and(|path| !path.exists()) => Ok(()),
            result => result,
        }
    }

    /// Updates the key in the table that was put over this one, if there is one: those who come to the path now use that, and
    /// those who came before, this one.
    pub(crate) fn announce_elsewhere(&self, key: &CacheKey) -> Result<(), Error> {
        match self.announce_at_path(self.0.options.clone().create(false), None, key) {
            Err(error) if *error.kind() == ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    /// Expires everything in the table that was put over this one, if there is one: what was announced here alone, until that was
    /// noticed, is announced there.
    fn expire_at_path(&self) {
        if !self.is_read_only()
            && let Ok(next) = open(&self.0.source, &self.0.options.clone().create(false), None)
        {
            let _ = next.slots().expire_all();
        }
    }

    /// Updates the key in the table at the path, which this process need not move on to.
    fn announce_at_path(
        &self,
        options: TableOptions,
        predecessor: Option<&Incarnation>,
        key: &CacheKey,
    ) -> Result<(), Error> {
        let next = open(&self.0.source, &options, predecessor)?;
        if let Some(place) = next.attach(key)? {
            next.slots().announce(&place, place.bump());
        }
        Ok(())
    }

    #[cfg(test)]
    pub(crate) fn make_look_due(&self) {
        self.0.revalidation.expedite();
    }

    /// Moves on from a table that is being retired, or whose file is gone. Whoever gets here does all that remains to
    /// be done of retiring it, as the process that began may be dead.
    fn succeed(&self, from: &Arc<Incarnation>) -> Result<(), Error> {
        if !self.is_latest(from) {
            return Ok(());
        }
        let Some(next) = self.while_latest(from, self.successor(from))? else { return Ok(()) };
        // Holders that noticed the last succession after it have written to what was emptied then.
        if let Some(older) = self.0.incarnations.previous() {
            older.mapping().detach_again();
        }
        self.0.incarnations.append(next);
        self.0.confirmation.confirm(coarse_now());
        from.mapping().detach();
        Ok(())
    }

    fn successor(&self, from: &Arc<Incarnation>) -> Result<Arc<Incarnation>, Error> {
        let is_unfinished = || !self.is_read_only() && !from.slots().header().is_retired();
        // Where it is still what the path names, that is for the one of all processes which has the lock to do: it takes a sweep
        // over all of the table.
        if is_unfinished() && from.presence() != Presence::Here {
            from.slots().retire()?;
        }
        let next = open(&self.0.source, &self.0.options, Some(from))?;
        if is_unfinished() {
            // Updates may have gone to the old file while others used the new one: announce them there as well, before
            // anybody may think that it was done.
            from.slots().retire()?;
            next.slots().expire_all()?;
            from.slots().header().end_retiring();
        }
        Ok(next)
    }
}

impl TableOptions {
    /// Opens the table at `path`, or creates it.
    ///
    /// A symbolic link at the path itself is refused, wherever it leads; links among its folders are followed. Who may write to
    /// the folder can put any file there: prefer one that is your own, or sticky, as `/dev/shm` is. A table with several names
    /// (hard links) is one, until a [`reset`](Table::reset), which gives a new file to one of them only.
    ///
    /// A file that is a mount point itself (`docker -v /dev/shm/shop.gensync:/dev/shm/shop.gensync`) can be opened, but not be
    /// replaced from within: see [`Table::replaceable`]. When the host replaces its own, by a reset for example, the mount still
    /// shows the old file, and every key there is expired for good: mount the folder instead.
    ///
    /// On overlayfs, a read-only table is first opened for writing and closed again, so that the process sees the file that
    /// writers use; where that is not permitted, it is [`ErrorKind::ReadOnlyOverlay`].
    ///
    /// A successor stands for a moment under a hidden name beside `path`, `.gensync-` and 16 random hexadecimal digits; and so does
    /// a new table, if the file system has no files without a name, or there is no /proc. A process that is killed then leaves it
    /// there, to be removed by the next reset of a table in that folder by the same user.
    ///
    /// # Errors
    ///
    /// Every kind of [`ErrorKind`] but those about keys. A file that is not a table of this version is left untouched.
    ///
    /// # Progress
    ///
    /// Blocking: file input and output, and sleeping while another process makes or replaces the table, or has an update in flight in
    /// one that is replaced.
    pub fn open(self, path: impl AsRef<Path>) -> Result<Table, Error> {
        Table::open_path(path.as_ref(), self)
    }

    /// Opens the table of the application `app` that belongs to this user, where [`Table::open_default`] has it; or creates
    /// it. The folder is made only if the table may be created.
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
    /// No descriptor or no memory is left; the capacity is out of range; or the table would be read-only.
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
    /// As [`open`](Self::open). A read-only one is refused: open `/dev/shm/NAME` by path for that.
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
    fn path(&self) -> Option<&Path> {
        match self {
            Self::Path(path) => Some(path),
            Self::Anonymous => None,
            #[cfg(feature = "shm")]
            Self::Named { path, .. } => Some(path),
        }
    }

    /// Maps `file`; `None` if it has lost its name.
    fn map(&self, file: &TableFile, options: &TableOptions) -> Result<Option<Incarnation>, Error> {
        let fixed = &file.fixed;
        // What a descriptor names has no place that it could be gone from.
        let path = self.path().filter(|path| !(options.file.read_only && is_descriptor(path)));
        let own = file.file.try_clone().map_err(|error| Error::io("keeping the table's file open", &error))?;
        let mapping = match self {
            #[cfg(feature = "shm")]
            Self::Named { name, path } => match Mapping::of_named(own, path, name, fixed, file.segments)? {
                Some(mapping) => mapping,
                None => return Ok(None),
            },
            _ => Mapping::of_file(own, path, fixed, file.segments, options.file.read_only)?,
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

/// Opens the live table that the source names: creates a missing one, replaces a retired one.
fn open(source: &Source, options: &TableOptions, predecessor: Option<&Incarnation>) -> Result<Arc<Incarnation>, Error> {
    let path = source.path().ok_or(ErrorKind::Retired)?;
    let open = || {
        for _ in 0..ATTEMPTS {
            let Some(file) = TableFile::open(path, &options.file)? else {
                create(path, options, predecessor)?;
                continue;
            };
            let Some(incarnation) = source.map(&file, options)? else { continue };
            let is_live = incarnation.slots().header().is_live();
            if (is_live && !file.is_older()) || options.accepts_retired() {
                incarnation.hold(&file, !options.file.read_only)?;
                return Ok(Arc::new(incarnation));
            }
            if options.file.read_only {
                // Somebody may be about to replace it.
                if predecessor.is_some_and(|holder| holder.held_up_for() >= HOLDERS_PATIENCE) {
                    break;
                }
                std::thread::sleep(READER_PAUSE);
                continue;
            }
            let _excluded = if is_live { Some(exclude_updates(&incarnation, options.pending_limit)?) } else { None };
            replace(path, &file, &incarnation, predecessor, options.pending_limit, || {
                succeeding(&file, options)?.prepare(path)?.stand_by(path)
            })?;
        }
        Err(ErrorKind::Retired.into())
    };
    open().map_err(|error: Error| error.at(path))
}

fn create(path: &Path, options: &TableOptions, predecessor: Option<&Incarnation>) -> Result<(), Error> {
    if !options.create || options.file.read_only {
        return Err(missing_folder(path));
    }
    let stat = predecessor.and_then(|predecessor| Some((predecessor, predecessor.mapping().stat().ok()?)));
    let new_table = match stat {
        Some((predecessor, stat)) => NewTable::succeeding(predecessor.fixed(), &stat, &options.file)?,
        None => NewTable::new(options.checked_capacity()?, options.mode, 0, &options.file)?,
    };
    let floor = predecessor.map_or(Ok(0), floor_of_successor)?;
    // Somebody else's is as good.
    let _created = new_table.prepare(path)?.link(path, floor)?;
    Ok(())
}

fn succeeding(file: &TableFile, options: &TableOptions) -> Result<NewTable, Error> {
    NewTable::succeeding(&file.fixed, &file.stat()?, &options.file)
}

fn floor_of_successor(old: &Incarnation) -> Result<u64, Error> {
    Ok((old.slots().highest()?.max(old.fixed().floor) + 1).min(HIGHEST_FLOOR))
}

/// As much of the greatest size as the process may give a file, for tables whose size is set once.
fn sparse_size(least: u64) -> u64 {
    let limit = getrlimit(Resource::RLIMIT_FSIZE).map_or(u64::MAX, |(limit, _)| limit);
    MAX_SIZE.min(limit).max(least)
}

//! `Table`: a table as a process holds it, through all of its incarnations.

mod clear;
mod end;
mod look;
mod sleep;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit};
use nix::time::{ClockId, clock_gettime};

use self::end::{exclude_updates, replace};
use crate::error::{Error, ErrorKind};
use crate::file::{Blueprint, TableFile, is_descriptor};
use crate::incarnation::{Incarnation, Place};
use crate::key::CacheKey;
use crate::layout::{HIGHEST_FLOOR, MAX_SIZE, segment_offset};
use crate::mapping::{Chain, Mapping};
use crate::notifier::Notifier;
use crate::options::TableOptions;
use crate::process::PerProcess;
use crate::slot::Turn;

/// At least so many milliseconds pass between two looks at a table's file, and between two attempts to attach to one
/// that cannot be attached to.
///
/// A look is due every 64 checks, and no sooner than this. Half a second, so that both together stay below the longer
/// of 64 checks and a second at any rate of checks.
pub(crate) const PAUSE: u64 = 490;

/// How often an operation starts again because the table was replaced under it, before it gives up.
pub(crate) const ATTEMPTS: u32 = 100;

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
    /// When the next look at the file is due.
    look: Turn,
    notifier: PerProcess<Notifier>,
}

impl Shared {
    fn new(options: TableOptions, source: Source, first: Arc<Incarnation>) -> Self {
        let (incarnations, look) = (Chain::new(first), Turn::at(0));
        Self { options, source, incarnations, look, notifier: PerProcess::new() }
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
    pub fn open_default(app: &str) -> Result<Self, Error> {
        Self::options().open_default(app)
    }

    /// Options for opening a table in other ways.
    pub fn options() -> TableOptions {
        TableOptions::default()
    }

    pub(crate) fn open_path(path: &Path, options: TableOptions) -> Result<Self, Error> {
        let absolute = std::path::absolute(path).map_err(|error| Error::io("finding the path", &error).at(path))?;
        Self::open_source(Source::Path(absolute), options)
    }

    #[cfg(feature = "shm")]
    pub(crate) fn open_named(name: &str, options: TableOptions) -> Result<Self, Error> {
        let name = name.strip_prefix('/').unwrap_or(name);
        crate::options::checked_name("the segment's name", name)?;
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
        let size = Source::Anonymous.size(options.checked_capacity()?);
        let file = TableFile::of_file(Blueprint::new(&options, size)?.anonymous()?, &options)?;
        let mapping = Mapping::of_file(file.file, None, &file.facts, file.segments, false)?;
        let first = Arc::new(Incarnation::new(mapping, file.facts, None));
        Ok(Self(Arc::new(Shared::new(options, Source::Anonymous, first))))
    }

    /// The path of the table's file; `None` for an anonymous one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.0.source.path()
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.0.options.read_only
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
        self.look_if_due();
        for _ in 0..ATTEMPTS {
            let latest = self.latest();
            if latest.slots().header().is_live() {
                return Ok(latest);
            }
            self.succeed(latest)?;
        }
        Err(ErrorKind::Retired.into())
    }

    /// Looks, now and then, whether the path still names the file. If not, this process and all others that have the
    /// file move on to the one that is there now.
    pub(crate) fn look_if_due(&self) {
        if !self.0.look.take(coarse_now(), PAUSE) {
            return;
        }
        let latest = self.latest();
        if !latest.is_gone() {
            return;
        }
        // If the maker of an update that is in flight there is killed, it takes one who has the old file to announce it.
        // So nobody moves on before the update has ended.
        let excluded = (!self.is_read_only()).then(|| latest.mapping().try_exclude_updates());
        let is_held_up = match &excluded {
            None => false,
            Some(Ok(lock)) => lock.is_none(),
            // Whoever can open nothing more cannot keep updates from beginning, but sees those that have begun.
            Some(Err(_)) => latest.mapping().has_updates_in_flight(),
        };
        if is_held_up && latest.gone_for(precise_now()) < self.pending_limit() {
            return;
        }
        if self.succeed(latest).is_err() && latest.slots().header().is_live() {
            // It could not even be retired, being read-only or damaged: let it be retired for this process.
            latest.mapping().empty();
        }
    }

    #[cfg(test)]
    pub(crate) fn make_look_due(&self) {
        self.0.look.postpone(0);
    }

    /// Moves on from a table that is being retired, or whose file is gone. Whoever gets here does all that remains to
    /// be done of retiring it, as the process that began may be dead.
    fn succeed(&self, from: &Arc<Incarnation>) -> Result<(), Error> {
        if !self.is_latest(from) {
            return Ok(());
        }
        let Some(next) = self.while_latest(from, self.successor(from))? else { return Ok(()) };
        self.0.incarnations.append(next);
        from.mapping().empty();
        Ok(())
    }

    fn successor(&self, from: &Arc<Incarnation>) -> Result<Arc<Incarnation>, Error> {
        let unfinished = !self.is_read_only() && !from.slots().header().is_retired();
        if unfinished {
            from.slots().retire()?;
        }
        let next = open(&self.0.source, &self.0.options, Some(from))?;
        if unfinished {
            // Updates may have gone to the old file while others used the new one: announce them there as well, before
            // anybody may think that it was done.
            next.slots().expire_all()?;
            from.slots().header().end_retiring();
        }
        Ok(next)
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

    /// The least size of a new file.
    fn size(&self, capacity: u64) -> u64 {
        if matches!(self, Self::Path(_)) { 0 } else { sparse_size(segment_offset(capacity, 1)) }
    }

    /// Maps `file`; `None` if it has lost its name.
    fn map(&self, file: &TableFile, options: &TableOptions) -> Result<Option<Incarnation>, Error> {
        let facts = &file.facts;
        // What a descriptor names has no place that it could be gone from.
        let path = self.path().filter(|path| !(options.read_only && is_descriptor(path)));
        let own = file.file.try_clone().map_err(|error| Error::io("keeping the table's file open", &error))?;
        let mapping = match self {
            #[cfg(feature = "shm")]
            Self::Named { name, path } => {
                // Made by path, it may be as short as its segments; what is mapped at once is all it can grow to.
                let size = self.size(facts.capacity);
                if (file.stat()?.st_size as u64) < size {
                    own.set_len(size).map_err(|error| Error::io("setting the table's size", &error))?;
                }
                match Mapping::of_named(own, path, name, facts, file.segments)? {
                    Some(mapping) => mapping,
                    None => return Ok(None),
                }
            }
            _ => Mapping::of_file(own, path, facts, file.segments, options.read_only)?,
        };
        Ok(Some(Incarnation::new(mapping, facts.clone(), path)))
    }
}

fn writable(what: &'static str, expected: &'static str, options: &TableOptions) -> Result<(), Error> {
    match options.read_only {
        true => Err(ErrorKind::InvalidInput { what, found: "read-only".to_owned(), expected }.into()),
        false => Ok(()),
    }
}

/// Opens the live table that the source names: creates a missing one, replaces a retired one.
fn open(source: &Source, options: &TableOptions, predecessor: Option<&Incarnation>) -> Result<Arc<Incarnation>, Error> {
    let path = source.path().ok_or(ErrorKind::Retired)?;
    let open = || {
        for _ in 0..ATTEMPTS {
            let Some(file) = TableFile::open(path, options)? else {
                create(source, path, options, predecessor)?;
                continue;
            };
            let Some(incarnation) = source.map(&file, options)? else { continue };
            let is_live = incarnation.slots().header().is_live();
            if (is_live && !file.is_older()) || options.accepts_retired() {
                if !options.read_only {
                    incarnation.renew_after_boot(&file)?;
                }
                return Ok(Arc::new(incarnation));
            }
            if options.read_only {
                return Err(ErrorKind::Retired.into());
            }
            let _excluded = if is_live { Some(exclude_updates(&incarnation, options.pending_limit)?) } else { None };
            replace(path, &file, &incarnation, succeeding(&file, options)?.prepare(path)?)?;
        }
        Err(ErrorKind::Retired.into())
    };
    open().map_err(|error: Error| error.at(path))
}

fn create(
    source: &Source,
    path: &Path,
    options: &TableOptions,
    predecessor: Option<&Incarnation>,
) -> Result<(), Error> {
    if !options.create || options.read_only {
        return Err(ErrorKind::NotFound.into());
    }
    let stat = predecessor.and_then(|predecessor| Some((predecessor, predecessor.mapping().stat().ok()?)));
    let blueprint = match stat {
        Some((predecessor, stat)) => Blueprint::succeeding(predecessor.facts(), &stat, options)?,
        None => Blueprint::new(options, source.size(options.checked_capacity()?))?,
    };
    let floor = predecessor.map_or(Ok(0), floor_of_successor)?;
    // Somebody else's is as good.
    let _created = blueprint.prepare(path)?.link(path, floor)?;
    Ok(())
}

fn succeeding(file: &TableFile, options: &TableOptions) -> Result<Blueprint, Error> {
    Blueprint::succeeding(&file.facts, &file.stat()?, options)
}

/// Asks `attempt` again and again until it gives something, for as long as `patience` lasts.
pub(crate) fn with_patience<R, E>(
    patience: Duration,
    attempt: impl Fn() -> Result<Option<R>, E>,
) -> Result<Option<R>, E> {
    let start = Instant::now();
    loop {
        match attempt()? {
            None if start.elapsed() < patience => std::thread::sleep(Duration::from_millis(1).min(patience)),
            result => return Ok(result),
        }
    }
}

fn floor_of_successor(old: &Incarnation) -> Result<u64, Error> {
    Ok((old.slots().highest()?.max(old.facts().floor) + 1).min(HIGHEST_FLOOR))
}

/// As much of the greatest size as the process may give a file, for tables whose size is set once.
fn sparse_size(least: u64) -> u64 {
    let limit = getrlimit(Resource::RLIMIT_FSIZE).map_or(u64::MAX, |(limit, _)| limit);
    MAX_SIZE.min(limit).max(least)
}

/// Milliseconds of a clock that only goes forward, to within a few; the cheapest one.
pub(crate) fn coarse_now() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE)
        .map_or(0, |time| time.tv_sec() as u64 * 1000 + time.tv_nsec() as u64 / 1_000_000)
}

/// Microseconds of a clock that only goes forward.
pub(crate) fn precise_now() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |time| time.tv_sec() as u64 * 1_000_000 + time.tv_nsec() as u64 / 1000)
}

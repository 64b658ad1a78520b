//! `Table`: a table as a process holds it, across all of its incarnations.

mod clear;
mod confirmation;
mod end;
pub(crate) mod incarnation;
mod info;
mod inspect;
mod open;
pub(crate) mod options;
mod replace;
pub(crate) mod retry;
mod sleep;
mod succession;

pub use crate::os::owner::OwnerCheck;
pub use info::{Occupancy, SlotInfo, Stats, TableInfo, TableState};
pub use options::TableOptions;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use self::open::Source;
use crate::error::{Error, ErrorKind};
use crate::key::CacheKey;
use crate::os::clock::coarse_now;
use crate::os::fork::{Companion, ForkLocal};
use crate::os::mapping::Chain;
use crate::os::pause::Throttle;
use crate::table::confirmation::Confirmation;
use crate::table::incarnation::{Incarnation, Place};

/// At least so many milliseconds pass between two revalidations of a table's path, and between two attempts to attach to a
/// table that cannot be attached to.
///
/// Less than half a second, so that a use which comes a second after the last revalidation always revalidates, whichever holder
/// in the process did so last.
pub(crate) const PAUSE: u64 = 490;

/// How long a reader that finds a retired table waits before it checks again whether the table was replaced; it does so up to a
/// hundred times.
const READER_PAUSE: Duration = Duration::from_millis(3);

/// How long the checks of a process wait in total for another process that is replacing the table. The successor is ready when
/// its predecessor is retired, so that a sweep and one system call are all that remains.
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
    /// When the path is to be revalidated next.
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

impl Table {
    /// Opens the table at `path`, or creates it with mode 0600 and room for 1024 keys in its first segment.
    ///
    /// The natural place is `/dev/shm`. A relative path is resolved against the present working directory.
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
    /// A program that is set-uid or set-gid, or has capabilities from its file, ignores the variable, because its caller has
    /// set it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::UnsafeFolder`] if the folder, which is created with mode 0700, belongs to another user or is writable by
    /// others; [`ErrorKind::InvalidInput`] if `app` is not a plain file name; otherwise as [`TableOptions::open`].
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

    /// The path of the table's file; `None` for an anonymous one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.0.source.path()
    }

    /// Whether this is `other`, or a clone of it.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
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

    #[inline]
    pub(crate) fn latest(&self) -> &Arc<Incarnation> {
        self.0.incarnations.latest()
    }

    /// Whether `incarnation` is the one to use, as far as this process knows.
    pub(crate) fn is_latest(&self, incarnation: &Arc<Incarnation>) -> bool {
        Arc::ptr_eq(self.latest(), incarnation)
    }

    /// Attaches to `key`, in the latest incarnation.
    pub(crate) fn attach(&self, key: &CacheKey) -> Result<Place, Error> {
        let place = self.with_current(|current| {
            if !self.is_read_only() {
                return current.attach(key);
            }
            let place = current.find_place(key)?.ok_or(ErrorKind::KeyNotFound)?;
            // As after a claim: a sweep may have missed a slot that another process has claimed since.
            Ok(current.slots().header().is_live_after_claim().then_some(place))
        });
        place.map_err(|error| self.explain(error).with_key(key.as_str()))
    }

    /// Whether it can no longer be confirmed that the path names the file: then an update may have gone to another file.
    pub(crate) fn is_doubtful(&self) -> bool {
        self.0.confirmation.is_doubtful()
    }

    /// Whether [`is_doubtful`](Self::is_doubtful) may be true of any table of this process. This reads nothing that belongs to one
    /// table.
    #[inline]
    pub(crate) fn is_any_doubtful() -> bool {
        confirmation::is_any_in_doubt()
    }

    /// How long, in milliseconds, state that was loaded while its freshness could not be known counts as fresh.
    pub(crate) fn outage_ttl(&self) -> u64 {
        u64::try_from(self.0.options.outage_ttl.as_millis()).unwrap_or(u64::MAX)
    }
}

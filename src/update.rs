//! Crash-safe updates: a change of the source that cannot outlive its announcement.
//!
//! An update counts itself in before the source is changed, and out afterwards, and the step that counts it out is the
//! update of the generation. In between it holds a lock on the key's slot in the file, which the kernel lets go of when
//! the process dies. Readers that find an update pending go on with what they have, as the update has not completed; at
//! most once a millisecond each asks the kernel whether the lock is held. When it is not, and only then, the reader takes
//! the lock for itself alone, clears the count and updates the generation.
//!
//! The maker may be killed at any step:
//!
//! - before it has counted itself in: nothing has happened;
//! - before or after the source is changed: the lock is gone, the count is left, and the first reader to notice updates
//!   the generation, whether the source was changed or not;
//! - after it has counted itself out: the update is complete.
//!
//! The lock is taken before the count is raised, and let go of after it is lowered. So who holds the lock for itself
//! alone knows that everybody who is counted is dead.
//!
//! While another update of the same key is in flight, its lock hides that a dead one's is gone: readers notice when it has
//! ended.
//!
//! Whoever resets the table takes a lock on all of its slots first, so that no update is in flight while there are two
//! tables: a maker that is killed then would leave its count in the one that nobody looks at. As updates may overlap
//! without end, those that are about to begin let him go first, if they come upon his other lock, on the header's state.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use crate::error::{Error, ErrorKind};
use crate::generation::Generation;
use crate::handle::with_patience;
use crate::incarnation::Place;
use crate::lock::{Kind, RangeLock};
use crate::synchronizer::GenerationSynchronizer;

/// How long an update that is about to begin lets somebody go first who waits to reset the table.
///
/// Not for ever: what he waits for may be another update of this same thread.
const COURTESY: Duration = Duration::from_millis(50);

/// Why an update failed, and what that means for the source.
#[derive(Debug)]
#[non_exhaustive]
pub enum UpdateError<E> {
    /// The update could not begin: the source was not touched.
    Begin(Error),
    /// Changing the source failed, with this error. As some of it may have been changed nevertheless, the update was
    /// announced.
    Commit(E),
    /// The source was changed, but that could not be announced: call
    /// [`mark_updated`](GenerationSynchronizer::mark_updated) until it succeeds.
    #[non_exhaustive]
    Announce {
        /// Why not.
        error: Error,
        /// The error of changing the source, if that failed as well.
        commit: Option<E>,
    },
}

impl<E: fmt::Display> fmt::Display for UpdateError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Begin(error) => write!(f, "the update could not begin, and nothing was changed: {error}"),
            Self::Commit(error) => write!(f, "the commit failed, and was announced all the same: {error}"),
            Self::Announce { error, commit: None } => {
                write!(f, "the source was changed, which could not be announced; call mark_updated: {error}")
            }
            Self::Announce { error, commit: Some(commit) } => {
                write!(f, "the commit failed ({commit}), which could not be announced; call mark_updated: {error}")
            }
        }
    }
}

// Not of errors alone: `Box<dyn Error>` and `anyhow::Error` are none.
impl<E: fmt::Debug + fmt::Display> std::error::Error for UpdateError<E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Begin(error) | Self::Announce { error, .. } => std::error::Error::source(error),
            Self::Commit(_) => None,
        }
    }
}

impl GenerationSynchronizer {
    /// Changes the source by `commit`, and announces it, whatever happens in between: every other holder's state is
    /// expired afterwards, also if this process is killed on the way.
    ///
    /// While `commit` runs, the update is *pending*: the others serve what they have, and do not load it again. It ends
    /// when `commit` returns or panics, and also if that gives an error, as some of the source may have been changed; to
    /// say that nothing was, use [`begin_update`](Self::begin_update) and [`abandon`](Update::abandon). If the process is
    /// killed, every other one notices at its next check, or within a millisecond of its last look at the lock; while other
    /// updates of the key are in flight, when they have ended.
    ///
    /// The caller's own state counts as up to date afterwards if it was before, as with
    /// [`mark_updated`](Self::mark_updated).
    ///
    /// Updates of one key may overlap, in threads and processes, and updates of several keys may be nested; gensync does
    /// not put them in order, which is the source's business. A child that is forked meanwhile must not return from
    /// `commit`: its copy of the update finishes nothing. If it lives on and the parent is killed, the others notice
    /// after [`pending_limit`](crate::TableOptions::pending_limit).
    ///
    /// ```
    /// # use gensync::{GenerationSynchronizer, Table};
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("settings.json");
    /// # let sync = GenerationSynchronizer::new(&Table::options().anonymous()?, "settings")?;
    /// sync.update(|| std::fs::write(&path, r#"{"greeting": "hello"}"#))?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// See [`UpdateError`]. It cannot begin if the table is read-only, if no descriptor is left, or if this process may
    /// not open the table's file any more.
    ///
    /// # Progress
    ///
    /// Blocking only while another process resets the table, or recovers a killed one's update. It opens the table's file
    /// once more, and makes some ten system calls.
    pub fn update<T, E>(&self, commit: impl FnOnce() -> Result<T, E>) -> Result<T, UpdateError<E>> {
        update_all(&[self], commit)
    }

    /// Begins a crash-safe update, to be finished when the source was changed: see [`update`](Self::update).
    ///
    /// # Errors
    ///
    /// As [`UpdateError::Begin`].
    ///
    /// # Progress
    ///
    /// As [`update`](Self::update).
    pub fn begin_update(&self) -> Result<Update<'_>, Error> {
        self.check_writable()?;
        let limit = self.table().pending_limit();
        let (place, lock) = self.begin(|place| {
            let mapping = place.owner().mapping();
            with_patience(COURTESY, || Ok::<_, Error>((!mapping.is_held_up()).then_some(())))?;
            // Only who resets the table, or recovers an update, has it for itself, and not for long.
            with_patience(limit, || mapping.try_lock(place, Kind::Shared))?
                .ok_or_else(|| self.error(ErrorKind::Locked { seconds: limit.as_secs() }))
        })?;
        Ok(Update { sync: self, place, lock: Some(lock) })
    }
}

/// Changes the source of several keys by one `commit`: [`update`](GenerationSynchronizer::update) for all of them.
///
/// ```
/// use gensync::{GenerationSynchronizer, Table, update_all};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # fn move_user() -> std::io::Result<()> { Ok(()) }
/// let table = Table::options().anonymous()?;
/// let users = GenerationSynchronizer::new(&table, "users")?;
/// let groups = GenerationSynchronizer::new(&table, "groups")?;
/// update_all(&[&users, &groups], || move_user())?;
/// # Ok(()) }
/// ```
///
/// # Errors
///
/// As [`update`](GenerationSynchronizer::update). If one of the keys cannot begin, the source is not touched and none is
/// announced; if one cannot be announced, the others are.
///
/// # Progress
///
/// As [`update`](GenerationSynchronizer::update), for each key.
pub fn update_all<T, E>(
    syncs: &[&GenerationSynchronizer],
    commit: impl FnOnce() -> Result<T, E>,
) -> Result<T, UpdateError<E>> {
    let mut updates = Vec::with_capacity(syncs.len());
    for sync in syncs {
        match sync.begin_update() {
            Ok(update) => updates.push(update),
            Err(error) => {
                updates.into_iter().for_each(Update::abandon);
                return Err(UpdateError::Begin(error));
            }
        }
    }
    // Should it panic, the updates are dropped, and so finished.
    let outcome = commit();
    let announced = updates.into_iter().map(|update| update.finish().map(drop)).fold(Ok(()), Result::and);
    match announced {
        Ok(()) => outcome.map_err(UpdateError::Commit),
        Err(error) => Err(UpdateError::Announce { error, commit: outcome.err() }),
    }
}

/// A crash-safe update in flight, from [`begin_update`](GenerationSynchronizer::begin_update).
///
/// Dropped, it is [finished](Self::finish), as when the thread panics. A process that ends without dropping it is taken
/// for killed: the update is announced by whoever notices.
#[derive(Debug)]
#[must_use = "dropping it at once announces an update that was not made"]
pub struct Update<'a> {
    sync: &'a GenerationSynchronizer,
    place: &'a Place,
    /// Until the update has ended.
    lock: Option<RangeLock>,
}

impl Update<'_> {
    /// Announces the update: to be called when the change of the source is complete. Returns the new generation.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Inherited`] in a child that was forked since the update began; or the table was replaced in spite of
    /// the update, and its successor cannot be attached to: then call
    /// [`mark_updated`](GenerationSynchronizer::mark_updated) until it succeeds.
    pub fn finish(mut self) -> Result<Generation, Error> {
        self.close()
    }

    /// Ends the update without announcing it, as nothing was changed: the generation stays.
    ///
    /// Does nothing in a child that was forked since the update began.
    pub fn abandon(mut self) {
        if let Some(lock) = self.lock.take()
            && !lock.is_inherited()
        {
            self.sync.abandon(self.place);
        }
    }

    fn close(&mut self) -> Result<Generation, Error> {
        let Some(lock) = self.lock.take().filter(|lock| !lock.is_inherited()) else {
            return Err(self.sync.error(ErrorKind::Inherited));
        };
        let generation = self.sync.finish(self.place)?;
        // Nobody moves on to another file while there is a lock on this one.
        drop(lock);
        self.sync.follow_update(self.place)?;
        Ok(generation)
    }
}

/// The descriptor with the lock that tells of the update's maker. It is closed on `exec`; a child that inherits it all the
/// same, as a command that makes the commit, keeps the update in flight for as long as it lives, should this process be
/// killed.
impl AsFd for Update<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.lock.as_ref().expect("held until the update has ended").as_fd()
    }
}

impl Drop for Update<'_> {
    fn drop(&mut self) {
        if self.lock.is_some() {
            let _ = self.close();
        }
    }
}

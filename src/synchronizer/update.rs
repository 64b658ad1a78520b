//! Crash-safe updates: a change of the source that cannot outlive its announcement.
//!
//! The process that makes an update is called its *maker*. The slot of the key counts the updates that are *pending*: begun
//! and not ended. The maker raises this count before the source is changed and lowers it afterwards, and the atomic step that
//! lowers the count also updates the generation. In between, the maker shares a lock of the key on the table's file, which
//! the kernel releases when the process dies. A reader that finds an update pending goes on with the state that it has, as the
//! update has not completed; at most once a millisecond, it asks the kernel whether the lock is held. Only if it is not, the
//! reader takes the lock exclusively, clears the count and updates the generation. This is called *recovering* the update.
//!
//! The maker may be killed at any step:
//!
//! - before it has raised the count: the source was not touched, and there is nothing to announce;
//! - after that, and before it has lowered the count: the lock is released, the count stays, and the first reader that notices
//!   updates the generation, whether the source was changed or not, as no process can know that;
//! - after it has lowered the count: the update is complete and announced.
//!
//! The lock is taken before the count is raised, and released after the count is lowered. So as long as a maker is alive, each
//! of its updates that is counted is covered by a shared lock. A process that holds the lock exclusively therefore knows that the
//! makers of all updates that are counted are dead.
//!
//! While another update of the same key is in flight, its lock hides that the lock of a dead maker is gone. Readers notice the
//! dead maker when the other update has ended.
//!
//! A process that resets the table first takes the lock on all updates, so that no update is in flight while there are two
//! tables: a maker that was killed then would leave its count in the old table, where no process looks any more. Updates may
//! overlap without end, and then there may never be a moment without one. So the resetting process also holds a lock on the
//! header's state, and an update that is about to begin waits for a moment if it finds this lock held.

mod beginning;
#[cfg(feature = "future")]
mod tasks;

use std::any::Any;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use self::beginning::{Beginning, COURTESY};
use crate::error::{Error, ErrorKind};
use crate::generation::Generation;
use crate::os::lock::RangeLock;
use crate::synchronizer::GenerationSynchronizer;
use crate::table::incarnation::Place;

/// The pause between two attempts to begin an update.
const MOMENT: Duration = Duration::from_millis(1);

/// Why an update failed, and what that means for the source.
#[derive(Debug)]
#[non_exhaustive]
pub enum UpdateError<E> {
    /// The update could not begin: the source was not touched.
    Begin(Error),
    /// The commit failed with this error. The update was announced nevertheless, as a part of the source may have been changed.
    Commit(E),
    /// The source was changed, but the update could not be announced: call
    /// [`mark_updated`](GenerationSynchronizer::mark_updated) until it succeeds.
    #[non_exhaustive]
    Announce {
        /// Why it could not be announced.
        error: Error,
        /// The errors of further keys of an [`update_all`] that could not be announced.
        further: Vec<Error>,
        /// The error of the commit, if that failed as well.
        commit: Option<E>,
    },
}

impl<E: fmt::Display> fmt::Display for UpdateError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Begin(error) => write!(f, "the update could not begin, and nothing was changed: {error}"),
            Self::Commit(error) => write!(f, "the commit failed, and was announced all the same: {error}"),
            Self::Announce { error, further, commit } => {
                match commit {
                    None => f.write_str("the source was changed")?,
                    Some(commit) => write!(f, "the commit failed ({commit})")?,
                }
                write!(f, ", which could not be announced; call mark_updated: {error}")?;
                further.iter().try_for_each(|error| write!(f, "; {error}"))
            }
        }
    }
}

/// The [`source`](std::error::Error::source) of a [`Commit`](UpdateError::Commit) is its error, if that is an
/// [`std::io::Error`], an [`Error`] or a `Box<dyn std::error::Error>`, with or without `Send` and `Sync`. An error of any other
/// type appears in the text only: match on the variant to get the error itself.
///
/// The reason is that `E` need not implement [`std::error::Error`] (`Box<dyn Error>` and `anyhow::Error` do not), and generic
/// code cannot ask a type whether it does. [`boxed`](Self::boxed) makes every error available as a source.
impl<E: fmt::Debug + fmt::Display + 'static> std::error::Error for UpdateError<E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Begin(error) | Self::Announce { error, .. } => std::error::Error::source(error),
            Self::Commit(error) => as_error(error),
        }
    }
}

impl<E> UpdateError<E> {
    /// The same error with the error of the commit in a box, so that it is the [`source`](std::error::Error::source) of a
    /// [`Commit`](Self::Commit) whatever its type is: for reports that print the causes of an error.
    ///
    /// ```
    /// use std::error::Error;
    /// use gensync::UpdateError;
    ///
    /// let number = "many".parse::<u32>();
    /// let error = UpdateError::Commit(number.unwrap_err()).boxed();
    /// assert!(error.source().unwrap().is::<std::num::ParseIntError>());
    /// ```
    #[must_use]
    pub fn boxed(self) -> UpdateError<Box<dyn std::error::Error + Send + Sync>>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        match self {
            Self::Begin(error) => UpdateError::Begin(error),
            Self::Commit(error) => UpdateError::Commit(error.into()),
            Self::Announce { error, further, commit } => {
                UpdateError::Announce { error, further, commit: commit.map(Into::into) }
            }
        }
    }
}

fn as_error(error: &dyn Any) -> Option<&(dyn std::error::Error + 'static)> {
    if let Some(error) = error.downcast_ref::<std::io::Error>() {
        Some(error)
    } else if let Some(error) = error.downcast_ref::<Error>() {
        Some(error)
    } else if let Some(error) = error.downcast_ref::<Box<dyn std::error::Error + Send + Sync>>() {
        Some(&**error)
    } else if let Some(error) = error.downcast_ref::<Box<dyn std::error::Error + Send>>() {
        Some(&**error)
    } else {
        error.downcast_ref::<Box<dyn std::error::Error>>().map(|error| &**error)
    }
}

impl GenerationSynchronizer {
    /// Changes the source by `commit` and announces the update, whatever happens in between: the state of every other holder is
    /// expired afterwards, even if this process is killed on the way.
    ///
    /// While `commit` runs, the update is *pending*: other holders serve the state that they have, and do not load it again. The
    /// update ends when `commit` returns or panics. It is announced even if `commit` returns an error, as a part of the source
    /// may have been changed; to end an update that changed nothing, use [`begin_update`](Self::begin_update) and
    /// [`abandon`](Update::abandon). If this process is killed, each other process notices at its next check, or up to a
    /// millisecond later if it has just asked for the lock. If other updates of the key are in flight, it notices when they have
    /// ended.
    ///
    /// If `commit` succeeds, the caller's own state counts as fresh afterwards if it was fresh before, as with
    /// [`mark_updated`](Self::mark_updated). If it fails or panics, the caller's state is expired as well, as it is then unknown
    /// what the source holds.
    ///
    /// Updates of one key may overlap, in threads and processes, and updates of several keys may be nested; gensync does
    /// not put them in order: that is up to the source. A child that is forked meanwhile must not return from `commit`: its copy
    /// of the update finishes nothing. If the parent is killed, other processes notice even though the child lives on.
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
    /// See [`UpdateError`]. The update cannot begin if the table is read-only, if no descriptor is left, or if this process may
    /// not open the table's file any more.
    ///
    /// # Progress
    ///
    /// Sleeps while another process resets the table or recovers the update of a killed process: at most for the
    /// [`pending_limit`](crate::TableOptions::pending_limit). To sleep less or not at all, use
    /// [`update_deadline`](Self::update_deadline) or [`try_begin_update`](Self::try_begin_update).
    ///
    /// This opens the table's file once more, takes a lock on it, and makes some ten system calls. If the table was replaced, it
    /// opens the successor, or creates it.
    pub fn update<T, E>(&self, commit: impl FnOnce() -> Result<T, E>) -> Result<T, UpdateError<E>> {
        update_all(&[self], commit)
    }

    /// As [`update`](Self::update), but gives up at the `deadline` if the update could not begin by then. The time that `commit`
    /// takes is not limited.
    ///
    /// # Errors
    ///
    /// As [`update`](Self::update); [`ErrorKind::Locked`] in an [`UpdateError::Begin`] at the deadline.
    ///
    /// # Progress
    ///
    /// As [`update`](Self::update); sleeps until the deadline at most, or for the
    /// [`pending_limit`](crate::TableOptions::pending_limit) if that is shorter. If the table was replaced, this opens or creates
    /// the successor, which may wait past the deadline for another process that is creating it.
    pub fn update_deadline<T, E>(
        &self,
        deadline: Instant,
        commit: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, UpdateError<E>> {
        let begun = self.begin_update_deadline(deadline).map_err(UpdateError::Begin)?;
        commit_all(vec![begun], commit)
    }

    /// Begins a crash-safe update, to be [finished](Update::finish) when the source has been changed: see
    /// [`update`](Self::update).
    ///
    /// # Errors
    ///
    /// As [`UpdateError::Begin`].
    ///
    /// # Progress
    ///
    /// As [`update`](Self::update).
    pub fn begin_update(&self) -> Result<Update<'_>, Error> {
        self.begin_update_within(COURTESY, self.table().pending_limit())
    }

    /// As [`begin_update`](Self::begin_update), but gives up at the `deadline`.
    ///
    /// # Errors
    ///
    /// As [`begin_update`](Self::begin_update); [`ErrorKind::Locked`] at the deadline.
    ///
    /// # Progress
    ///
    /// As [`update_deadline`](Self::update_deadline).
    pub fn begin_update_deadline(&self, deadline: Instant) -> Result<Update<'_>, Error> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.begin_update_within(left.min(COURTESY), left.min(self.table().pending_limit()))
    }

    /// As [`begin_update`](Self::begin_update), but does not wait for other processes.
    ///
    /// ```
    /// use gensync::{ErrorKind, GenerationSynchronizer, Table};
    ///
    /// # fn main() -> Result<(), gensync::Error> {
    /// # let table = Table::options().anonymous()?;
    /// let sync = GenerationSynchronizer::new(&table, "settings")?;
    /// match sync.try_begin_update() {
    ///     Ok(update) => {
    ///         // Change the source here.
    ///         update.finish()?;
    ///     }
    ///     Err(error) if matches!(error.kind(), ErrorKind::Locked { .. }) => { /* Try again later. */ }
    ///     Err(error) => return Err(error),
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`begin_update`](Self::begin_update); [`ErrorKind::Locked`] if another process is just resetting the table or
    /// recovering the update of a killed process.
    ///
    /// # Progress
    ///
    /// As [`update`](Self::update), without sleeping. If the table was replaced, this opens or creates the successor, which may
    /// wait for another process that is creating it.
    pub fn try_begin_update(&self) -> Result<Update<'_>, Error> {
        self.begin_update_within(Duration::ZERO, Duration::ZERO)
    }

    fn begin_update_within(&self, courtesy: Duration, limit: Duration) -> Result<Update<'_>, Error> {
        let mut beginning = Beginning::new(self, courtesy, limit)?;
        loop {
            if let Some(update) = beginning.attempt()? {
                return Ok(update);
            }
            std::thread::sleep(MOMENT.min(limit));
        }
    }

    /// Ends an update that was begun at `place`: it is pending no more, and is announced. The holder follows it if it `knows`
    /// what is in the source now.
    pub(crate) fn finish(&self, place: &Place, knows: bool) -> Result<Generation, Error> {
        place.owner().count_own_update_out();
        let before = self.announce(place, place.finish_update());
        match before.updated() {
            Some(generation) => {
                if knows && !self.is_detoured {
                    self.seen.follow(before);
                }
                Ok(generation)
            }
            None => self.bump_successor(),
        }
    }

    /// Ends an update that was begun at `place` and changed nothing: it is pending no more, and is not announced.
    pub(crate) fn abandon(&self, place: &Place) {
        place.owner().count_own_update_out();
        place.abandon_update();
    }

    /// If the path names another file by now, announces there as well an update that was finished at `place`. Its lock must
    /// have been released.
    pub(crate) fn follow_update(&self, place: &Place) -> Result<(), Error> {
        self.table().follow_update(place.owner(), self.cache_key()).map_err(|error| self.explain(error))
    }
}

/// Changes the source of several keys by one `commit`: [`update`](GenerationSynchronizer::update) for all of them at once.
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
/// As [`update`](GenerationSynchronizer::update). If the update of one key cannot begin, `commit` is not called and none is
/// announced. If one cannot be announced, the others are, and the error holds everything that went wrong.
///
/// # Progress
///
/// As [`update`](GenerationSynchronizer::update), for each key.
pub fn update_all<T, E>(
    syncs: &[&GenerationSynchronizer],
    commit: impl FnOnce() -> Result<T, E>,
) -> Result<T, UpdateError<E>> {
    let mut updates: Vec<Update<'_>> = Vec::with_capacity(syncs.len());
    for sync in syncs {
        match sync.begin_update() {
            Ok(update) => updates.push(update),
            Err(error) => {
                updates.into_iter().for_each(Update::abandon);
                return Err(UpdateError::Begin(error));
            }
        }
    }
    commit_all(updates, commit)
}

fn commit_all<T, E>(updates: Vec<Update<'_>>, commit: impl FnOnce() -> Result<T, E>) -> Result<T, UpdateError<E>> {
    // If it panics, the updates are dropped, which announces them.
    let outcome = commit();
    let announce = |mut update: Update<'_>| update.close(outcome.is_ok()).err();
    let mut errors = updates.into_iter().filter_map(announce).collect::<Vec<_>>().into_iter();
    match errors.next() {
        None => outcome.map_err(UpdateError::Commit),
        Some(error) => Err(UpdateError::Announce { error, further: errors.collect(), commit: outcome.err() }),
    }
}

/// A crash-safe update in flight, from [`begin_update`](GenerationSynchronizer::begin_update).
///
/// Dropping it, as `?` or a panic does, announces the update and expires the state of the synchronizer that began it as well, as
/// it is unknown how far the change of the source got. A process that ends without dropping it counts as killed: the next process
/// that checks the key announces the update.
#[derive(Debug)]
#[must_use = "dropping it at once announces an update that was not made"]
pub struct Update<'a> {
    sync: &'a GenerationSynchronizer,
    place: &'a Place,
    /// Until the update has ended.
    lock: Option<RangeLock>,
}

impl Update<'_> {
    /// Announces the update: to be called when the change of the source is complete. Returns the new generation, which the
    /// synchronizer that began the update counts as seen if its state was fresh before.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Inherited`] in a child that was forked since the update began; or the table was replaced in spite of
    /// the update, and its successor cannot be attached to: then call
    /// [`mark_updated`](GenerationSynchronizer::mark_updated) until it succeeds.
    ///
    /// # Progress
    ///
    /// Some system calls, none of which sleeps unless the table was replaced: then this opens or creates the successor.
    pub fn finish(mut self) -> Result<Generation, Error> {
        self.close(true)
    }

    /// Ends the update without announcing it, as nothing was changed: the generation stays the same. There is one exception. At
    /// most 254 pending updates of a key can be counted exactly; if more were in flight at once, one announcement is made when
    /// all have ended, even if each of them was abandoned.
    ///
    /// Does nothing in a child that was forked since the update began.
    ///
    /// # Progress
    ///
    /// Some system calls, none of which sleeps.
    pub fn abandon(mut self) {
        if let Some(lock) = self.lock.take()
            && !lock.is_inherited()
        {
            self.sync.abandon(self.place);
        }
    }

    fn close(&mut self, knows: bool) -> Result<Generation, Error> {
        let Some(lock) = self.lock.take().filter(|lock| !lock.is_inherited()) else {
            return Err(self.sync.error(ErrorKind::Inherited));
        };
        let generation = self.sync.finish(self.place, knows)?;
        // `follow_update` may have to move on to another file, and no process does so while a lock is held on this one.
        drop(lock);
        self.sync.follow_update(self.place)?;
        Ok(generation)
    }
}

/// The descriptor of the lock that shows that the maker of the update is alive. It is closed on `exec` and in a forked child.
/// Where a child makes the commit, as a command does, the update should stay in flight for as long as the child lives, even if
/// this process is killed. To achieve this, clear the close-on-exec flag before the child is started, which then inherits the
/// descriptor.
impl AsFd for Update<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.lock.as_ref().expect("held until the update has ended").as_fd()
    }
}

impl Drop for Update<'_> {
    fn drop(&mut self) {
        if self.lock.is_some() {
            let _ = self.close(false);
        }
    }
}

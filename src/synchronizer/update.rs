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

use std::any::Any;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind};
use crate::generation::Generation;
use crate::os::clock::{Deadline, with_patience};
use crate::os::lock::{Kind, RangeLock};
use crate::synchronizer::GenerationSynchronizer;
use crate::table::incarnation::Place;
use crate::table::retry::retry;

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
        /// The errors of further keys of an [`update_all`] that could not be announced.
        further: Vec<Error>,
        /// The error of changing the source, if that failed as well.
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
/// [`std::io::Error`], an [`Error`] or a `Box<dyn std::error::Error>`, with or without `Send` and `Sync`. Of any other type, the
/// text has all that is known here: match on the variant to have the error itself.
///
/// That is so because `E` need not be an error, as `Box<dyn Error>` and `anyhow::Error` are none, and Rust cannot ask a
/// type whether it is one. [`boxed`](Self::boxed) makes a source of every error.
impl<E: fmt::Debug + fmt::Display + 'static> std::error::Error for UpdateError<E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Begin(error) | Self::Announce { error, .. } => std::error::Error::source(error),
            Self::Commit(error) => as_error(error),
        }
    }
}

impl<E> UpdateError<E> {
    /// The same, with the error of changing the source in a box, which is the [`source`](std::error::Error::source) of a
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
    /// Changes the source by `commit`, and announces it, whatever happens in between: every other holder's state is
    /// expired afterwards, also if this process is killed on the way.
    ///
    /// While `commit` runs, the update is *pending*: the others serve what they have, and do not load it again. It ends
    /// when `commit` returns or panics, and also if that gives an error, as some of the source may have been changed; to
    /// say that nothing was, use [`begin_update`](Self::begin_update) and [`abandon`](Update::abandon). If the process is
    /// killed, every other one notices at its next check, or within a millisecond of its last look at the lock; while other
    /// updates of the key are in flight, when they have ended.
    ///
    /// If `commit` succeeds, the caller's own state counts as up to date afterwards if it was before, as with
    /// [`mark_updated`](Self::mark_updated). If it fails or panics, the caller's state is expired like everybody's, as nobody
    /// knows what is in the source then.
    ///
    /// Updates of one key may overlap, in threads and processes, and updates of several keys may be nested; gensync does
    /// not put them in order, which is the source's business. A child that is forked meanwhile must not return from
    /// `commit`: its copy of the update finishes nothing, and if the parent is killed, the others notice though the child lives
    /// on.
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
    /// Sleeps while another process resets the table, or recovers a killed one's update: at most for the
    /// [`pending_limit`](crate::TableOptions::pending_limit). To sleep less or not at all, use
    /// [`update_deadline`](Self::update_deadline) or [`try_begin_update`](Self::try_begin_update).
    ///
    /// It opens the table's file once more, takes a lock on it, and makes some ten system calls. If the table was replaced, it
    /// opens the successor, or makes it.
    pub fn update<T, E>(&self, commit: impl FnOnce() -> Result<T, E>) -> Result<T, UpdateError<E>> {
        update_all(&[self], commit)
    }

    /// As [`update`](Self::update), but gives up at the `deadline` if the update could not begin by then. `commit` may take as
    /// long as it likes.
    ///
    /// # Errors
    ///
    /// As [`update`](Self::update); [`ErrorKind::Locked`] in an [`UpdateError::Begin`] at the deadline.
    ///
    /// # Progress
    ///
    /// As [`update`](Self::update); sleeps no longer than until the deadline, or the
    /// [`pending_limit`](crate::TableOptions::pending_limit) if that is sooner. If the table was replaced, the successor is opened,
    /// or made; that may wait for another process which is making it, past the deadline.
    pub fn update_deadline<T, E>(
        &self,
        deadline: Instant,
        commit: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, UpdateError<E>> {
        let begun = self.begin_update_deadline(deadline).map_err(UpdateError::Begin)?;
        commit_all(vec![begun], commit)
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
    /// As [`begin_update`](Self::begin_update); [`ErrorKind::Locked`] if another process resets the table, or recovers a killed
    /// one's update, just now.
    ///
    /// # Progress
    ///
    /// As [`update`](Self::update), without sleeping. If the table was replaced, the successor is opened, or made; that may wait
    /// for another process which is making it.
    pub fn try_begin_update(&self) -> Result<Update<'_>, Error> {
        self.begin_update_within(Duration::ZERO, Duration::ZERO)
    }

    fn begin_update_within(&self, courtesy: Duration, limit: Duration) -> Result<Update<'_>, Error> {
        self.check_writable()?;
        let end = Deadline::after(limit);
        let left = || end.map_or(limit, Deadline::left);
        let locked = || self.error(ErrorKind::Locked { seconds: limit.as_secs() });
        let lock = |place: &Place| {
            let mapping = place.owner().mapping();
            let is_let_in = with_patience(courtesy, || Ok::<_, Error>((!mapping.is_held_up()).then_some(())))?;
            // Without the time for courtesy, it is not begun before the one that waits.
            if is_let_in.is_none() && courtesy < COURTESY {
                return Err(locked());
            }
            // Only who resets the table, or recovers an update, has it for itself, and not for long.
            with_patience(left(), || mapping.try_lock(place, Kind::Shared))?.ok_or_else(locked)
        };
        let (place, lock) = self.begin(lock, left)?;
        Ok(Update { sync: self, place, lock: Some(lock) })
    }

    /// Counts an update in, in the latest incarnation, where `lock` must be taken first. Gives the place, and the lock.
    ///
    /// If the file is gone, waits for updates in flight there, for as long as `patience` says is left.
    pub(crate) fn begin<L>(
        &self,
        lock: impl Fn(&Place) -> Result<L, Error>,
        patience: impl Fn() -> Duration,
    ) -> Result<(&Place, L), Error> {
        // In a file that is gone, as updates in flight keep this process there: `follow_update` announces it in the new one.
        let mut stays = false;
        let begun = retry(|| {
            let place = self.places.latest();
            // Whoever retires a table holds a lock against this one, so it does not happen from here on.
            let held = lock(place);
            if !stays && place.owner().is_gone() {
                // A lock in the old file would keep this process there.
                drop(held);
                stays = !self.table.leave_for_update(place.owner(), patience())?;
                if !stays {
                    self.move_on()?;
                }
                return Ok(None);
            }
            // The header is asked as well: whoever was retiring the table may have died before coming to this slot.
            if place.owner().slots().header().is_live() && place.word().is_live() {
                // Not asked before: it may be that there is nothing left to lock.
                let held = held?;
                if place.begin_update().is_live() {
                    place.owner().count_own_update();
                    return Ok(Some((place, held)));
                }
            }
            self.move_on()?;
            Ok(None)
        });
        begun.map_err(|error| self.explain(error))
    }

    /// Counts an update out that was begun at `place`, and announces it. The holder follows it if it `knows` what is in the
    /// source now.
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

    /// Counts an update out that was begun at `place`, and changed nothing.
    pub(crate) fn abandon(&self, place: &Place) {
        place.owner().count_own_update_out();
        place.abandon_update();
    }

    /// Announces an update that was finished at `place`, and whose lock was let go of, in the file that the path names by now
    /// as well.
    pub(crate) fn follow_update(&self, place: &Place) -> Result<(), Error> {
        self.table.follow_update(place.owner(), &self.key).map_err(|error| self.explain(error))
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
/// announced; if one cannot be announced, the others are, and the error has all that went wrong.
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
    // Should it panic, the updates are dropped, and so announced.
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
/// Dropped, as by `?` or when the thread panics, it is announced, and the synchronizer that began it is expired as well: nobody
/// knows how far the change of the source got. A process that ends without dropping it is taken for killed: the update is
/// announced by whoever notices.
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
    /// synchronizer that began it has seen if it was up to date before.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Inherited`] in a child that was forked since the update began; or the table was replaced in spite of
    /// the update, and its successor cannot be attached to: then call
    /// [`mark_updated`](GenerationSynchronizer::mark_updated) until it succeeds.
    ///
    /// # Progress
    ///
    /// Some system calls, none of which sleeps, but if the table was replaced: then the successor is opened, or made.
    pub fn finish(mut self) -> Result<Generation, Error> {
        self.close(true)
    }

    /// Ends the update without announcing it, as nothing was changed: the generation stays. But if more than 254 updates of the
    /// key were in flight at once, which is as many as are counted, one announcement is made when all have ended, though each of
    /// them was abandoned.
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
        // Nobody moves on to another file while there is a lock on this one.
        drop(lock);
        self.sync.follow_update(self.place)?;
        Ok(generation)
    }
}

/// The descriptor with the lock that tells of the update's maker. It is closed on `exec`, and in a forked child. A child that is
/// to keep the update in flight for as long as it lives, should this process be killed, as a command that makes the commit,
/// inherits it if its close-on-exec flag is cleared before the child is started.
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

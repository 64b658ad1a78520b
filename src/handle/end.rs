//! Ending an incarnation of a table: another one follows it, or none.

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{ATTEMPTS, Table, floor_of_successor, succeeding, with_patience};
use crate::error::{Error, ErrorKind};
use crate::file::{Prepared, TableFile, identity, remove};
use crate::incarnation::Incarnation;
use crate::lock::RangeLock;
use crate::mapping::Identity;

impl Table {
    /// Ends this incarnation of the table and begins another: every key's state is expired in every process, and keys
    /// that nobody attaches to any more are gone. No update is lost, whoever makes it meanwhile.
    ///
    /// Waits for [updates](crate::GenerationSynchronizer::update) in flight, and holds others up meanwhile, but no longer
    /// than the [`pending_limit`](crate::TableOptions::pending_limit). So it must not be called within an update.
    ///
    /// The new file has the capacity, mode and owner of the old one. An anonymous table cannot be replaced: there,
    /// every key gets a new generation, and all keys stay.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ReadOnly`]; [`ErrorKind::Locked`] if an update does not end; or a new file cannot be made. Then nothing
    /// has changed.
    pub fn reset(&self) -> Result<(), Error> {
        if self.is_read_only() {
            return Err(self.error(ErrorKind::ReadOnly));
        }
        let reset = || match self.path() {
            Some(path) => self.replace_or_remove(path, |current, file| self.begin_successor(path, current, file)),
            None => self.latest().slots().expire_all(),
        };
        reset().map_err(|error| self.explain(error))
    }

    /// Removes the table's file. Every key's state is expired in every process that has it open, and no update is lost,
    /// whoever makes it meanwhile.
    ///
    /// A process that has the table open, may create one, and uses it again, makes a new one; so end them first, if the file
    /// is to stay away. So does this `Table`, unless it was opened with [`create(false)`](crate::TableOptions::create).
    ///
    /// Waits for updates in flight as [`reset`](Self::reset) does. Killed on the way, it leaves the table, or one that is
    /// retiring, which the next process to open it for writing replaces.
    ///
    /// ```
    /// # use gensync::Table;
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("shop.gensync");
    /// Table::open(&path)?.remove()?;
    /// assert!(!path.exists());
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`reset`](Self::reset); also [`ErrorKind::InvalidInput`] for an anonymous table, which has no file.
    pub fn remove(&self) -> Result<(), Error> {
        if self.is_read_only() {
            return Err(self.error(ErrorKind::ReadOnly));
        }
        let Some(path) = self.path() else {
            let (found, expected) =
                ("an anonymous one".to_owned(), "one that has a file; an anonymous one ends with its users");
            return Err(ErrorKind::InvalidInput { what: "the table to remove", found, expected }.into());
        };
        self.replace_or_remove(path, |current, file| self.end_for_good(path, current, &file))
            .map_err(|error| self.explain(error))
    }

    /// Runs `end` on the latest incarnation and its file while no update is in flight, until it says that it was done.
    fn replace_or_remove(
        &self,
        path: &Path,
        end: impl Fn(&Arc<Incarnation>, TableFile) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        for _ in 0..ATTEMPTS {
            let current = self.current()?;
            let excluded = exclude_updates(current, self.pending_limit());
            let Some(_excluded) = self.while_latest(current, excluded)? else { continue };
            match TableFile::open(path, &self.0.options)? {
                Some(file) if Identity::of(&file.stat()?) == current.mapping().identity() => {
                    if end(current, file)? {
                        return Ok(());
                    }
                }
                // It was replaced behind our back: what stands there now is what is to be ended.
                _ if current.is_gone() => self.succeed(current)?,
                Some(_) | None => return Err(ErrorKind::NotFound.into()),
            }
        }
        Err(ErrorKind::Retired.into())
    }

    fn begin_successor(&self, path: &Path, current: &Arc<Incarnation>, file: TableFile) -> Result<bool, Error> {
        let prepared = succeeding(&file, &self.0.options)?.prepare(path)?;
        self.while_latest(current, replace(path, &file, current, prepared))?;
        drop(file);
        match self.succeed(current) {
            // It is done, and whoever needs the successor tries again.
            Err(_) if current.slots().header().is_retired() => Ok(true),
            result => result.map(|()| true),
        }
    }

    fn end_for_good(&self, path: &Path, current: &Arc<Incarnation>, file: &TableFile) -> Result<bool, Error> {
        let is_done = self.while_latest(current, retire_and_remove(path, file, current))?;
        if is_done == Some(false) {
            // Somebody was faster: what he has put there is what is to be removed.
            self.succeed(current)?;
        }
        Ok(is_done == Some(true))
    }
}

/// For how long nothing must be pending if the table is to be retired beside locks that cannot be told from those of updates.
///
/// Twice what an update waits before it begins when it finds the gate shut, so that those that came before have been counted in.
const QUIET: Duration = Duration::from_millis(100);

/// Keeps updates of `table` from beginning, once those in flight have ended. What is held must be kept.
pub(super) fn exclude_updates(table: &Incarnation, patience: Duration) -> Result<[Option<RangeLock>; 2], Error> {
    let mapping = table.mapping();
    // A process that may only read the file can keep this from having either lock, by a shared lock on all of it, as a backup
    // may take. It is not waited for.
    let gate = with_patience(patience, || {
        let gate = mapping.try_hold_updates_up()?;
        Ok::<_, Error>((gate.is_some() || !mapping.is_held_up()).then_some(gate))
    })?;
    let quiet_since = Cell::new(None);
    let excluded = with_patience(patience, || {
        let excluded = mapping.try_exclude_updates()?;
        if excluded.is_some() {
            return Ok(Some(excluded));
        }
        if mapping.are_updates_excluded() || !table.is_quiet()? {
            quiet_since.set(None);
            return Ok::<_, Error>(None);
        }
        // Nothing is pending, so the locks are none of updates, or of some that are about to be counted in.
        let since = quiet_since.get().unwrap_or_else(Instant::now);
        quiet_since.set(Some(since));
        Ok((since.elapsed() >= QUIET.min(patience / 2)).then_some(None))
    })?;
    if excluded.is_none() && !mapping.are_updates_excluded() {
        return Err(ErrorKind::Locked { seconds: patience.as_secs() }.into());
    }
    // Or somebody holds the lock for himself alone who began to reset the table, and was stopped. Then no update is in flight
    // either.
    Ok([gate.flatten(), excluded.flatten()])
}

/// Retires `old`, which `file` at `path` is, and puts `prepared` into its place, if nobody else has done so.
pub(super) fn replace(path: &Path, file: &TableFile, old: &Incarnation, prepared: Prepared) -> Result<(), Error> {
    old.slots().retire()?;
    with_the_lock(path, file, old, || {
        prepared.replace(path, floor_of_successor(old)?)?;
        old.slots().header().end_retiring();
        Ok(())
    })?;
    Ok(())
}

/// Runs `action` under the lock of `table`, which `file` is, if that is what `path` names; otherwise `false`.
fn with_the_lock(
    path: &Path,
    file: &TableFile,
    table: &Incarnation,
    action: impl FnOnce() -> Result<(), Error>,
) -> Result<bool, Error> {
    let _lock = file.lock()?;
    let in_place =
        std::fs::symlink_metadata(path).is_ok_and(|metadata| identity(&metadata) == table.mapping().identity());
    if in_place {
        action()?;
    }
    Ok(in_place)
}

/// Retires `table`, which `file` at `path` is, and removes the file; `false` if the path is another one's by now.
fn retire_and_remove(path: &Path, file: &TableFile, table: &Incarnation) -> Result<bool, Error> {
    // Unlike a successor, which may be put there by whoever finds the table retired, nothing is to come after it: so the lock
    // comes first.
    with_the_lock(path, file, table, || {
        table.slots().retire()?;
        remove(path)?;
        table.slots().header().end_retiring();
        Ok(())
    })
}

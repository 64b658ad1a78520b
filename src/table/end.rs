//! Ending an incarnation of a table: another one follows it, or none.

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::open::succeeding;
use super::succession::floor_of_successor;
use super::{ATTEMPTS, HOLDERS_PATIENCE, Table};
use crate::error::{Error, ErrorKind};
use crate::os::clock::with_patience;
use crate::os::file::{Lock, TableFile};
use crate::os::identity::Identity;
use crate::os::identity::identity;
use crate::os::lock::RangeLock;
use crate::os::new_table::{UnlinkedTable, remove, remove_unfinished};
use crate::os::replaceable::{check_owner_can_be_given, check_replaceable};
use crate::table::incarnation::Incarnation;

/// After how long a process that has the table open takes whoever replaces it for stopped, and makes a successor of its own. All
/// of them do, each one as large as the table: so it is longer than a sweep over a great table takes on a busy machine.
const HOLDERS_LIMIT: Duration = Duration::from_secs(6);

impl Table {
    /// Ends this incarnation of the table and begins another: every key's state is expired in every process, and keys
    /// that nobody attaches to any more are gone. No update is lost, whoever makes it meanwhile.
    ///
    /// Waits for [updates](crate::GenerationSynchronizer::update) in flight, and holds others up meanwhile, but no longer
    /// than the [`pending_limit`](crate::TableOptions::pending_limit). So it must not be called within an update.
    ///
    /// The new file has the capacity, mode and owner of the old one. An anonymous table cannot be replaced, nor one that is not
    /// [replaceable](Self::replaceable): there, every key gets a new generation, and all keys stay, as does the
    /// [incarnation](crate::TableInfo::incarnation), by which the two can be told apart.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ReadOnly`]; [`ErrorKind::Locked`] if an update does not end; or a new file cannot be made, for want of
    /// room or of the right to give it to the table's owner. Then nothing has changed.
    ///
    /// # Progress
    ///
    /// Blocking: makes system calls and a file as large as the table, sweeps over all keys, and sleeps while updates are in flight,
    /// or another process replaces the table.
    pub fn reset(&self) -> Result<(), Error> {
        if self.is_read_only() {
            return Err(self.error(ErrorKind::ReadOnly));
        }
        let reset = || match self.path() {
            Some(path) => self.replace_or_remove(
                path,
                |file| match check_replaceable(file, path) {
                    Ok(()) => succeeding(file, &self.0.options)?.prepare(path)?.stand_by(path).map(Some),
                    Err(error) if matches!(error.kind(), ErrorKind::NotReplaceable { .. }) => Ok(None),
                    Err(error) => Err(error),
                },
                |current, file, unlinked| match unlinked {
                    Some(unlinked) => self.begin_successor(path, current, file, unlinked),
                    None => self.expire_in_place(current),
                },
            ),
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
    /// As [`reset`](Self::reset); also [`ErrorKind::NotReplaceable`] if this process cannot remove the file, and
    /// [`ErrorKind::InvalidInput`] for an anonymous table, which has none. Then nothing has changed.
    ///
    /// # Progress
    ///
    /// As [`reset`](Self::reset), without making a file.
    pub fn remove(&self) -> Result<(), Error> {
        if self.is_read_only() {
            return Err(self.error(ErrorKind::ReadOnly));
        }
        let Some(path) = self.path() else {
            let (found, expected) =
                ("an anonymous one".to_owned(), "one that has a file; an anonymous one ends with its users");
            return Err(ErrorKind::InvalidInput { what: "the table to remove", found, expected }.into());
        };
        self.replace_or_remove(
            path,
            |file| check_replaceable(file, path),
            |current, file, ()| self.end_for_good(path, current, &file),
        )
        .map_err(|error| self.explain(error))
    }

    /// Whether this process can put another file in the place of the table's, as [`reset`](Self::reset) does, or
    /// [remove](Self::remove) it. Changes nothing, and may be asked of a read-only table too.
    ///
    /// ```
    /// # use gensync::Table;
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("shop.gensync");
    /// Table::open(&path)?.replaceable()?;
    /// assert!(Table::options().anonymous()?.replaceable().is_err());
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotReplaceable`] says why not: the file is a mount point itself, the folder is not to be written to by this
    /// process, it is sticky and the file another user's, one of them is immutable or append-only, a sandbox keeps this process
    /// from renaming the file, or the new file could not be given to the owner of the old one. Or that cannot be found out.
    ///
    /// # Progress
    ///
    /// Some system calls, none of which sleeps.
    pub fn replaceable(&self) -> Result<(), Error> {
        let Some(path) = self.path() else {
            let reason = "it is anonymous, and has no name; a reset gives every key a new generation".to_owned();
            return Err(ErrorKind::NotReplaceable { reason }.into());
        };
        let check = || {
            let file = TableFile::open(path, &self.0.options.file)?.ok_or(ErrorKind::NotFound)?;
            check_replaceable(&file, path)?;
            check_owner_can_be_given(&file)
        };
        check().map_err(|error| self.explain(error))
    }

    /// Runs `end` on the latest incarnation and its file while no update is in flight, until it says that it was done. What can
    /// fail, or takes long, is for `prepare` to do before.
    fn replace_or_remove<P>(
        &self,
        path: &Path,
        prepare: impl Fn(&TableFile) -> Result<P, Error>,
        end: impl Fn(&Arc<Incarnation>, TableFile, P) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        for _ in 0..ATTEMPTS {
            let current = self.current()?;
            let file = match TableFile::open(path, &self.0.options.file)? {
                Some(file) if Identity::of(&file.stat()?) == current.mapping().identity() => file,
                // It was replaced behind our back: what stands there now is what is to be ended.
                _ if current.is_gone() => {
                    self.succeed(current)?;
                    continue;
                }
                Some(_) | None => return Err(ErrorKind::NotFound.into()),
            };
            let unlinked = prepare(&file)?;
            let excluded = exclude_updates(current, self.pending_limit());
            let Some(_excluded) = self.while_latest(current, excluded)? else { continue };
            if end(current, file, unlinked)? {
                return Ok(());
            }
        }
        Err(ErrorKind::Retired.into())
    }

    fn begin_successor(
        &self,
        path: &Path,
        current: &Arc<Incarnation>,
        file: TableFile,
        unlinked: UnlinkedTable,
    ) -> Result<bool, Error> {
        let replaced =
            self.while_latest(current, replace(path, &file, current, None, self.pending_limit(), || Ok(unlinked)))?;
        drop(file);
        match self.succeed(current) {
            // It is done, and whoever needs the successor tries again.
            Err(_) if replaced == Some(true) && current.slots().header().is_retired() => Ok(true),
            result => result.map(|()| replaced == Some(true)),
        }
    }

    fn expire_in_place(&self, current: &Arc<Incarnation>) -> Result<bool, Error> {
        let is_done = self.while_latest(current, current.slots().expire_all())?;
        // Somebody else may have been able to replace it.
        Ok(is_done.is_some() && current.slots().header().is_live())
    }

    fn end_for_good(&self, path: &Path, current: &Arc<Incarnation>, file: &TableFile) -> Result<bool, Error> {
        let is_done = self.while_latest(current, retire_and_remove(path, file, current, self.pending_limit()))?;
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

/// Retires `old`, which `file` at `path` is, and puts what `prepare` makes into its place; `false` if somebody else has done so.
///
/// All that can fail comes before anything is retired, and only the one who has the lock prepares a successor here: it is as
/// large as the table. `holder` is who moves on to the successor, if it is not to wait long. Updates that are in flight
/// nevertheless are waited for as long as `patience` lasts.
pub(super) fn replace(
    path: &Path,
    file: &TableFile,
    old: &Incarnation,
    holder: Option<&Incarnation>,
    patience: Duration,
    prepare: impl FnOnce() -> Result<UnlinkedTable, Error>,
) -> Result<bool, Error> {
    with_the_lock(path, file, old, holder, || {
        check_replaceable(file, path)?;
        // Asked before as well: it would be prepared in vain, again and again.
        refuse_beside_updates(old, holder, patience)?;
        let unlinked = prepare()?;
        old.slots().retire()?;
        if !outlast_updates(path, old, holder, patience)? {
            return Ok(false);
        }
        unlinked.replace(path, floor_of_successor(old)?)?;
        old.slots().header().end_retiring();
        remove_unfinished(path);
        Ok(true)
    })
}

/// Waits until no update is in flight in `old`, which is retired; `false` if another file has its name by then.
///
/// One may have begun between the last look and the retiring of its key, where a lock of somebody who only reads the file kept
/// updates from being excluded. While there is no successor, nobody can load anything that its maker's death would leave
/// unannounced: all is expired, and what is loaded later is loaded after the maker's end. A holder that checks does not wait: it
/// fails, and asks again later.
fn outlast_updates(
    path: &Path,
    old: &Incarnation,
    holder: Option<&Incarnation>,
    patience: Duration,
) -> Result<bool, Error> {
    refuse_beside_updates(old, holder, patience)?;
    if holder.is_none() {
        with_patience(patience, || Ok::<_, Error>((!old.has_live_updates()?).then_some(())))?;
    }
    Ok(is_in_place(path, old))
}

fn refuse_beside_updates(old: &Incarnation, holder: Option<&Incarnation>, patience: Duration) -> Result<(), Error> {
    match holder {
        Some(holder) if old.has_live_updates()? && holder.held_up_for() < patience => Err(ErrorKind::Retired.into()),
        _ => Ok(()),
    }
}

fn is_in_place(path: &Path, table: &Incarnation) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|metadata| identity(&metadata) == table.mapping().identity())
}

/// Runs `action` under the lock of `table`, which `file` is, if that is what `path` names; otherwise `false`, which `action` may
/// find as well.
fn with_the_lock(
    path: &Path,
    file: &TableFile,
    table: &Incarnation,
    holder: Option<&Incarnation>,
    action: impl FnOnce() -> Result<bool, Error>,
) -> Result<bool, Error> {
    let _lock = match holder {
        None => file.lock()?,
        Some(holder) => lock_soon(file, holder)?,
    };
    if is_in_place(path, table) { action() } else { Ok(false) }
}

/// The lock of `file`, by which `holder` is about to be replaced. While somebody else has it, who is to put the successor there,
/// checks of this process wait for it together no longer than [`HOLDERS_PATIENCE`], and fail from then on; until it has been
/// held for so long that its holder must have been stopped.
fn lock_soon<'a>(file: &'a TableFile, holder: &Incarnation) -> Result<Option<Lock<'a>>, Error> {
    if let Some(lock) = file.try_lock(Duration::ZERO)? {
        return Ok(Some(lock));
    }
    let waited = holder.held_up_for();
    match file.try_lock(HOLDERS_PATIENCE.saturating_sub(waited))? {
        None if waited < HOLDERS_LIMIT => Err(ErrorKind::Retired.into()),
        lock => Ok(lock),
    }
}

/// Retires `table`, which `file` at `path` is, and removes the file; `false` if the path is another one's by now.
fn retire_and_remove(path: &Path, file: &TableFile, table: &Incarnation, patience: Duration) -> Result<bool, Error> {
    // Unlike a successor, which may be put there by whoever finds the table retired, nothing is to come after it: so the lock
    // comes first.
    with_the_lock(path, file, table, None, || {
        check_replaceable(file, path)?;
        table.slots().retire()?;
        if !outlast_updates(path, table, None, patience)? {
            return Ok(false);
        }
        remove(path)?;
        table.slots().header().end_retiring();
        remove_unfinished(path);
        Ok(true)
    })
}

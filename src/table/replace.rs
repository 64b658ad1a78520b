//! Retiring an incarnation and putting another one in its place, under its lock.

use std::cell::Cell;
use std::path::Path;
use std::time::{Duration, Instant};

use super::HOLDERS_PATIENCE;
use crate::error::{Error, ErrorKind};
use crate::os::clock::with_patience;
use crate::os::file::{Lock, TableFile};
use crate::os::identity::identity;
use crate::os::lock::RangeLock;
use crate::os::new_table::{UnlinkedTable, remove, remove_unfinished};
use crate::os::replaceable::check_replaceable;
use crate::protocol::layout::HIGHEST_FLOOR;
use crate::table::incarnation::Incarnation;

/// After how long a process that has the table open takes the process that replaces it for stopped, and creates a successor of
/// its own. All processes that have it open do so, and each successor is as large as the table: so the limit is longer than a
/// sweep over a large table takes on a busy machine.
const HOLDERS_LIMIT: Duration = Duration::from_secs(6);

/// For how long no update may have been pending if the table is to be retired while there are shared locks that might be those
/// of updates.
///
/// Twice as long as an update waits before it begins when it finds that updates are held up: so updates that took their locks
/// before have been counted in by then.
const QUIET: Duration = Duration::from_millis(100);

/// Waits until no update of `table` is in flight, and keeps others from beginning for as long as the locks that are returned
/// are held.
pub(super) fn exclude_updates(table: &Incarnation, patience: Duration) -> Result<[Option<RangeLock>; 2], Error> {
    let mapping = table.mapping();
    // A process that may only read the file can keep this one from taking either lock, by a shared lock on all of it, such as a
    // backup may take. Such a lock is not waited for.
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
        // No update is pending, so the locks are either no updates', or those of updates that are about to be counted in.
        let since = quiet_since.get().unwrap_or_else(Instant::now);
        quiet_since.set(Some(since));
        Ok((since.elapsed() >= QUIET.min(patience / 2)).then_some(None))
    })?;
    if excluded.is_none() && !mapping.are_updates_excluded() {
        return Err(ErrorKind::Locked { seconds: patience.as_secs() }.into());
    }
    // If there is no lock in `excluded`, either all has been quiet for long enough; or another process, which began to reset
    // the table and was stopped, has excluded updates. Then no update is in flight either.
    Ok([gate.flatten(), excluded.flatten()])
}

/// Retires `old`, which is in `file` at `path`, and puts the table that `prepare` returns in its place; `false` if another
/// process has done so.
///
/// Whatever can fail comes before anything is retired. Only the process that has the lock prepares a successor, as that is as
/// large as the table. `holder`, if there is one, is the incarnation from which a check moves on to the successor; a check must
/// not wait for long. Updates that are in flight in spite of the exclusion are waited for as long as `patience` lasts.
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
        // Checked here as well as after the retiring: otherwise successors would be prepared in vain, again and again.
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

/// Waits until no update is in flight in `old`, which is retired; `false` if its name leads to another file by then.
///
/// An update may have begun after the last check and before its key was retired, if a shared lock of a process that may only
/// read the file kept updates from being excluded. If the process that makes the update is killed, nothing announces it. That
/// does no harm while there is no successor, because until then everything is expired, and what is loaded through the successor
/// is loaded after that process has ended. A check that moves on does not wait: it fails, and is tried again later.
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

/// Runs `action` under the lock of `table`, which is in `file`, if `path` names that file; otherwise returns `false`, as
/// `action` may do as well.
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

/// The lock of `file`, for a check that moves on from `holder`. While another process has the lock, which is to put the
/// successor in place, the checks of this process wait for it no longer than [`HOLDERS_PATIENCE`] in total, and fail from then
/// on. When the lock has been held for [`HOLDERS_LIMIT`], the process that holds it must have been stopped: then this goes on
/// without the lock.
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

/// Retires `table`, which is in `file` at `path`, and removes the file; `false` if the path names another file by now.
pub(super) fn retire_and_remove(
    path: &Path,
    file: &TableFile,
    table: &Incarnation,
    patience: Duration,
) -> Result<bool, Error> {
    // Any process that finds the table retired puts a successor in its place under the lock. Here there must be none, so the
    // lock is taken before the table is retired, and held until the file is gone.
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

pub(super) fn floor_of_successor(old: &Incarnation) -> Result<u64, Error> {
    Ok((old.slots().highest()?.max(old.fixed().floor) + 1).min(HIGHEST_FLOOR))
}

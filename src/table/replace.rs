//! Retiring an incarnation and putting another one in its place, under the lock.

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

/// After how long a process that has the table open takes whoever replaces it for stopped, and makes a successor of its own. All
/// of them do, each one as large as the table: so it is longer than a sweep over a great table takes on a busy machine.
const HOLDERS_LIMIT: Duration = Duration::from_secs(6);

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
pub(super) fn retire_and_remove(
    path: &Path,
    file: &TableFile,
    table: &Incarnation,
    patience: Duration,
) -> Result<bool, Error> {
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

pub(super) fn floor_of_successor(old: &Incarnation) -> Result<u64, Error> {
    Ok((old.slots().highest()?.max(old.fixed().floor) + 1).min(HIGHEST_FLOOR))
}

//! Moving on from one incarnation of a table to the next.

use std::sync::Arc;

use super::open::open;
use super::retry::retry;
use super::{Table, TableOptions};
use crate::error::{Error, ErrorKind};
use crate::key::CacheKey;
use crate::os::clock::{coarse_now, precise_now};
use crate::os::view::Presence;
use crate::table::incarnation::Incarnation;

impl Table {
    /// What `action` returns for the live incarnation; repeated in the next one if it returns nothing, or if its incarnation is
    /// no longer the latest when it returns.
    pub(super) fn with_current<'a, R>(
        &'a self,
        action: impl Fn(&'a Arc<Incarnation>) -> Result<Option<R>, Error>,
    ) -> Result<R, Error> {
        retry(|| {
            let Some(current) = self.try_current()? else { return Ok(None) };
            Ok(self.while_latest(current, action(current))?.flatten())
        })
    }

    /// The result of an operation on `incarnation`; `None` if another thread has moved on from it meanwhile, and has given back
    /// its memory and its descriptor, which makes the result meaningless.
    pub(super) fn while_latest<R>(
        &self,
        incarnation: &Arc<Incarnation>,
        result: Result<R, Error>,
    ) -> Result<Option<R>, Error> {
        if self.is_latest(incarnation) { result.map(Some) } else { Ok(None) }
    }

    /// The live incarnation: a new one if the last one was retired, or its file is gone.
    pub(crate) fn current(&self) -> Result<&Arc<Incarnation>, Error> {
        retry(|| self.try_current())
    }

    /// The latest incarnation, if it is live; if it is not, this moves on to the next one.
    pub(super) fn try_current(&self) -> Result<Option<&Arc<Incarnation>>, Error> {
        self.revalidate_if_due(coarse_now());
        let latest = self.latest();
        if latest.slots().header().is_live() {
            return Ok(Some(latest));
        }
        self.succeed(latest)?;
        Ok(None)
    }

    /// Revalidates the path if that is due; no other code decides when it is. `now` is milliseconds of the coarse clock.
    #[inline]
    pub(crate) fn revalidate_if_due(&self, now: u64) {
        if self.0.revalidation.take(now) {
            self.revalidate(now);
        }
    }

    #[cold]
    fn revalidate(&self, now: u64) {
        let latest = self.latest();
        match latest.presence() {
            Presence::Here => self.0.confirmation.confirm(now),
            Presence::Unknown if self.0.confirmation.doubt(now) => self.expire_at_path(),
            Presence::Unknown => {}
            Presence::Gone => _ = self.leave(latest),
        }
    }

    /// Moves on from `latest`, whose path names another file or none: retires it, so that this process and all others that have
    /// it open move on. `false` while an update that is in flight there keeps them.
    fn leave(&self, latest: &Arc<Incarnation>) -> bool {
        // If a process is killed that has an update in flight there, only a process that has the old file open can announce the
        // update. So none moves on before the update has ended.
        let excluded = (!self.is_read_only()).then(|| latest.mapping().try_exclude_updates());
        let is_held_up = match &excluded {
            None => false,
            Some(Ok(Some(_))) => false,
            // A shared lock of a process that may only read the file does not count.
            Some(Ok(None)) => {
                latest.mapping().are_updates_excluded() || !latest.is_quiet().is_ok_and(|is_quiet| is_quiet)
            }
            // A process that cannot open the file again, for its lock, cannot keep updates from beginning, but it sees those
            // that have begun.
            Some(Err(_)) => latest.mapping().has_updates_in_flight(),
        };
        if is_held_up && latest.gone_for(precise_now()) < self.pending_limit() {
            return false;
        }
        if self.succeed(latest).is_err() && latest.slots().header().is_live() {
            // The file could not even be retired, because it is read-only or damaged. Without its memory, this process takes it
            // for retired.
            latest.mapping().detach();
        }
        true
    }

    /// Moves on from `owner`, whose file is gone, before an update begins; `None` while other processes have updates in flight
    /// there. `false` if the update must begin in `owner` because of updates in flight of this process, which may be the caller's
    /// own.
    pub(crate) fn leave_for_update(&self, owner: &Arc<Incarnation>) -> Option<bool> {
        let has_left = !self.is_latest(owner) || self.leave(owner);
        (has_left || owner.has_own_updates()).then_some(has_left)
    }

    /// To be called after an update was announced in `owner`: if the path names another file by now, the key is updated in that
    /// table as well.
    ///
    /// # Errors
    ///
    /// There is another file, and its table cannot be attached to.
    pub(crate) fn follow_update(&self, owner: &Arc<Incarnation>, key: &CacheKey) -> Result<(), Error> {
        // A holder of a file that gets this path after this check loads its state after the update.
        let presence = owner.presence();
        if presence == Presence::Here || !self.is_latest(owner) {
            return Ok(());
        }
        if presence == Presence::Unknown {
            return self.announce_elsewhere(key);
        }
        // The process that retires the table has the lock on all updates, so it began after the update had ended. State of the
        // successor was loaded later, or is expired by that process when it has retired the table. If it is killed before, this
        // process continues in its place.
        if !owner.slots().header().is_live() {
            let _ = self.succeed(owner);
            return Ok(());
        }
        // Moving on announces everything in the new table. It has to wait until other updates in `owner` have ended, for which
        // this update cannot wait.
        if self.leave(owner) && self.latest().slots().header().is_live() {
            return Ok(());
        }
        match self.announce_at_path(self.0.options.clone(), Some(owner), key) {
            // No process can have loaded anything through a file that does not exist.
            Err(_) if self.path().is_some_and(|path| !path.exists()) => Ok(()),
            result => result,
        }
    }

    /// Updates the key in another table that the path leads to now, if there is one: processes that open the path now use that
    /// table, and processes that opened it before use this one.
    pub(crate) fn announce_elsewhere(&self, key: &CacheKey) -> Result<(), Error> {
        match self.announce_at_path(self.0.options.clone().create(false), None, key) {
            Err(error) if *error.kind() == ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    /// Expires everything in another table that the path leads to now, if there is one: what was announced in this table alone,
    /// before that was noticed, is announced there.
    fn expire_at_path(&self) {
        if !self.is_read_only()
            && let Ok(next) = open(&self.0.source, &self.0.options.clone().create(false), None)
        {
            let _ = next.slots().expire_all();
        }
    }

    /// Updates the key in the table at the path; this process need not move on to that table.
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
    pub(crate) fn make_revalidation_due(&self) {
        self.0.revalidation.expedite();
    }

    /// Moves on from a table that is being retired, or whose file is gone. Each process that gets here completes the retiring,
    /// as the process that began it may be dead.
    pub(super) fn succeed(&self, from: &Arc<Incarnation>) -> Result<(), Error> {
        if !self.is_latest(from) {
            return Ok(());
        }
        let Some(next) = self.while_latest(from, self.successor(from))? else { return Ok(()) };
        // Holders that noticed the last succession late have written to memory that was detached then.
        if let Some(older) = self.0.incarnations.previous() {
            older.mapping().detach_again();
        }
        self.0.incarnations.append(next);
        self.0.confirmation.confirm(coarse_now());
        from.mapping().detach();
        Ok(())
    }

    pub(super) fn successor(&self, from: &Arc<Incarnation>) -> Result<Arc<Incarnation>, Error> {
        let is_unfinished = || !self.is_read_only() && !from.slots().header().is_retired();
        // If the path still names the file, the retiring is left to the one process that has the lock, in `open`, because it
        // takes a sweep over all of the table.
        if is_unfinished() && from.presence() != Presence::Here {
            from.slots().retire()?;
        }
        let next = open(&self.0.source, &self.0.options, Some(from))?;
        if is_unfinished() {
            // Updates may have gone to the old file while other processes used the new one: announce them in the new one as
            // well, before the old one says that its retiring is complete.
            from.slots().retire()?;
            next.slots().expire_all()?;
            from.slots().header().end_retiring();
        }
        Ok(next)
    }
}

//! How an update begins: it takes the lock of its key, and waits for processes that exclude it, without sleeping itself.

use std::time::Duration;

use super::Update;
use crate::error::{Error, ErrorKind};
use crate::os::clock::Deadline;
use crate::os::lock::{Kind, RangeLock};
use crate::synchronizer::GenerationSynchronizer;
use crate::table::incarnation::Place;
use crate::table::retry::retry;

/// How long an update that is about to begin waits for a process that is about to reset the table.
///
/// Not for ever: that process may be waiting for another update of this same thread to end.
pub(super) const COURTESY: Duration = Duration::from_millis(50);

/// An update that is about to begin: how long it waits for other processes. It does not sleep itself, as tasks must not.
pub(super) struct Beginning<'a> {
    sync: &'a GenerationSynchronizer,
    /// For how long it lets a process go ahead that is about to reset the table; and until when, once it has found one.
    courtesy: Duration,
    courtesy_end: Option<Deadline>,
    /// For how long it waits in all, and until when.
    limit: Duration,
    end: Option<Deadline>,
    /// Whether the update begins in a file that is gone, as updates of this process that are in flight keep it there. Then
    /// `follow_update` announces it in the new file as well.
    stays: bool,
}

/// How one step of an attempt ended.
enum Begun<'a> {
    Update(Update<'a>),
    /// Not yet, as another process has the lock.
    Locked,
    /// Not yet: this process must look for the latest incarnation once more.
    Moved,
}

impl<'a> Beginning<'a> {
    pub(super) fn new(sync: &'a GenerationSynchronizer, courtesy: Duration, limit: Duration) -> Result<Self, Error> {
        sync.check_writable()?;
        let end = Deadline::after(limit);
        Ok(Self { sync, courtesy, courtesy_end: None, limit, end, stays: false })
    }

    /// Tries to begin the update; `None` if another process has the lock, and there is time left to try again.
    pub(super) fn attempt(&mut self) -> Result<Option<Update<'a>>, Error> {
        let attempted = retry(|| match self.step()? {
            Begun::Update(update) => Ok(Some(Some(update))),
            Begun::Locked => Ok(Some(None)),
            Begun::Moved => Ok(None),
        });
        attempted.map_err(|error| self.sync.explain(error))
    }

    /// Counts an update as pending in the latest incarnation, after taking its lock there.
    ///
    /// If the file of that incarnation is gone, the updates in flight there must end first, so that this process can move on to
    /// the successor.
    fn step(&mut self) -> Result<Begun<'a>, Error> {
        let sync = self.sync;
        let place = sync.places.latest();
        // A process that retires a table excludes this lock while it does, so the table is not retired from here on.
        let held = match self.lock(place) {
            Ok(None) => return Ok(Begun::Locked),
            Ok(Some(lock)) => Ok(lock),
            Err(error) => Err(error),
        };
        if !self.stays && place.owner().is_gone() {
            // No process leaves a file while an update's lock is held there, so this lock would keep this process there.
            drop(held);
            match sync.table().leave_for_update(place.owner()) {
                None if self.is_over() => return Err(self.locked()),
                None => return Ok(Begun::Locked),
                Some(has_left) => self.stays = !has_left,
            }
            if !self.stays {
                sync.move_on()?;
            }
            return Ok(Begun::Moved);
        }
        // The header is checked as well as the slot: a process that was retiring the table may have died after it marked the
        // header and before it reached this slot.
        if place.owner().slots().header().is_live() && place.word().is_live() {
            // An error of the lock counts only here: a table that is retired may have no file left to lock.
            let held = held?;
            if place.begin_update().is_live() {
                place.owner().count_own_update();
                return Ok(Begun::Update(Update { sync, place, lock: Some(held) }));
            }
        }
        sync.move_on()?;
        Ok(Begun::Moved)
    }

    /// The lock of an update at `place`; `None` if another process has it, and there is time left to try again.
    fn lock(&mut self, place: &Place) -> Result<Option<RangeLock>, Error> {
        let mapping = place.owner().mapping();
        if mapping.is_held_up() {
            let courtesy_end = self.courtesy_end.or_else(|| Deadline::after(self.courtesy));
            self.courtesy_end = courtesy_end;
            if !courtesy_end.is_some_and(Deadline::is_reached) {
                return Ok(None);
            }
            // A caller that has no time to wait for the reset must not begin ahead of it: callers that poll would keep it waiting
            // for ever.
            if self.courtesy < COURTESY {
                return Err(self.locked());
            }
        }
        // Only a process that resets the table or recovers an update holds the lock exclusively, and not for long.
        match mapping.try_lock(place, Kind::Shared)? {
            None if self.is_over() => Err(self.locked()),
            lock => Ok(lock),
        }
    }

    fn is_over(&self) -> bool {
        self.end.is_some_and(Deadline::is_reached)
    }

    fn locked(&self) -> Error {
        self.sync.error(ErrorKind::Locked { seconds: self.limit.as_secs() })
    }
}

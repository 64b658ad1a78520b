//! The one thread of a process that waits for all descriptors and tasks of a table.
//!
//! It sleeps on the table's wake word, as a [`WaitSet`](crate::WaitSet) does. It begins with the first registration and ends
//! with the last.
//!
//! Registrations are grouped by key. When the thread wakes, it cannot know which key was updated, so it compares one word
//! of each key with what it left there; only a key whose word has moved costs more, and then as much as its own
//! registrations. It reads the clock, and looks at the file, once for all keys.
//!
//! A registration need not wake the thread: it sets the waiting bit of its key itself. If the thread is asleep by then, its
//! wake word is armed, and an update of the key wakes it; if it is not, it comes by all keys before it sleeps. Only one that
//! is to be told at a certain time, whatever happens, wakes the thread if that would sleep longer.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Duration;

use nix::sys::eventfd::EventFd;
use nix::sys::signal::{SigSet, SigmaskHow};

use crate::error::Error;
use crate::key::CacheKey;
use crate::os::clock::coarse_now;
use crate::os::fork::token;
use crate::protocol::futex::BLIND;
use crate::synchronizer::{GenerationSynchronizer, Ticket};
use crate::table::Table;
use crate::table::incarnation::Place;
use crate::wait::SLICE;

pub(crate) struct Notifier {
    process: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    is_running: bool,
    last: u64,
    /// The keys; None where there is room for another one, so that none need move.
    groups: Vec<Option<Group>>,
    free: Vec<usize>,
    by_key: HashMap<CacheKey, usize>,
    /// When to tell a registration at the latest, in milliseconds, by time and number; and the group that it is in.
    timers: BTreeMap<(u64, u64), usize>,
    /// When the timers were looked at last.
    looked: u64,
    /// How long the thread sleeps, if nobody wakes it.
    sleeps_until: u64,
}

/// All registrations for one key.
struct Group {
    /// Its slot, and the word that was left there: as long as it is the same, there is nothing to tell. Zero if there may be.
    place: Place,
    quiet: u64,
    /// Boxed, so that little memory is between one group's word and the next one's.
    members: Box<Members>,
}

struct Members {
    /// Of the group's own; what it has seen does not matter.
    sync: GenerationSynchronizer,
    entries: BTreeMap<u64, Entry>,
}

/// Somebody to tell when a key was updated.
struct Entry {
    /// What it was told of, or has seen itself.
    ticket: Ticket,
    target: Target,
    /// When it is told in any case.
    due: Option<u64>,
}

pub(crate) enum Target {
    Descriptor(Arc<EventFd>),
    /// None while it need not be told.
    #[cfg_attr(not(feature = "async"), expect(dead_code, reason = "descriptors are for all"))]
    Task(Option<Waker>),
}

impl Entry {
    fn is_armed(&self) -> bool {
        !matches!(self.target, Target::Task(None))
    }

    /// What is to be told. From here on, it has been.
    fn take_target(&mut self, sync: &GenerationSynchronizer) -> Target {
        match &mut self.target {
            Target::Descriptor(descriptor) => {
                // Without a table, this is void, and it is told again with the next attempt to attach.
                self.ticket = sync.ticket();
                Target::Descriptor(Arc::clone(descriptor))
            }
            Target::Task(waker) => Target::Task(waker.take()),
        }
    }
}

impl Group {
    fn new(sync: GenerationSynchronizer) -> Self {
        let place = sync.place().clone();
        Self { place, quiet: 0, members: Box::new(Members { sync, entries: BTreeMap::new() }) }
    }

    fn has_moved(&self) -> bool {
        // A mapping that was given back reads as zero, too.
        self.quiet == 0 || self.place.word().bits() != self.quiet
    }

    /// Takes those that are to be told to `due`, and has the next update wake the thread for the others.
    fn look(&mut self, due: &mut Vec<Target>) {
        let Members { sync, entries } = &mut *self.members;
        if !entries.values().any(Entry::is_armed) {
            return;
        }
        let news = sync.await_news();
        for entry in entries.values_mut() {
            if entry.is_armed() && news.is_for(sync, entry.ticket) {
                due.push(entry.take_target(sync));
            }
        }
        self.quiet = news.quiet();
        if !std::ptr::eq(&*self.place, &**sync.place()) {
            self.place = sync.place().clone();
            self.quiet = 0;
        }
    }
}

impl Members {
    /// Whether there is news for `ticket`. If not, the next update wakes the thread.
    fn has_news(&self, ticket: Ticket) -> bool {
        // The first look may find that the table was replaced, which is no news for a ticket of the successor.
        (0..2).all(|_| self.sync.await_news().is_for(&self.sync, ticket))
    }
}

impl State {
    /// Takes all that are to be told now to `due`.
    fn look(&mut self, now: u64, due: &mut Vec<Target>) {
        for group in self.groups.iter_mut().flatten() {
            if group.has_moved() {
                group.look(due);
            }
        }
        // If the clock was set back, as when a checkpoint is restored, nobody knows when they are due: each one that is told
        // looks for itself.
        let due_until = if now < self.looked { u64::MAX } else { now };
        self.looked = now;
        while let Some(timer) = self.timers.first_entry().filter(|timer| timer.key().0 <= due_until) {
            let ((_, id), index) = timer.remove_entry();
            let Some(Group { members, .. }) = &mut self.groups[index] else { continue };
            let Members { sync, entries } = &mut **members;
            due.extend(entries.get_mut(&id).map(|entry| entry.take_target(sync)));
        }
    }

    /// Has the next update tell a registration. Gives the target if that is a descriptor and there is news now; a task looks
    /// for itself after this.
    fn arm(&mut self, id: u64, group: usize) -> Option<Target> {
        let members = &self.groups[group].as_ref()?.members;
        let has_news = members.has_news(members.entries.get(&id)?.ticket);
        let Members { sync, entries } = &mut *self.groups[group].as_mut()?.members;
        let entry = entries.get_mut(&id)?;
        if has_news && matches!(entry.target, Target::Descriptor(_)) {
            return Some(entry.take_target(sync));
        }
        if has_news {
            // If the task finds none, it is asked to look again soon.
            let soon = coarse_now() + BLIND.as_millis() as u64;
            let due = entry.due.map_or(soon, |due| due.min(soon));
            self.set_timer(id, group, Some(due));
        }
        None
    }

    /// Sets when a registration is told in any case; this need not wake the thread.
    fn set_timer(&mut self, id: u64, group: usize, due: Option<u64>) {
        let entry = self.groups[group].as_mut().and_then(|group| group.members.entries.get_mut(&id));
        let Some(entry) = entry else { return };
        if let Some(before) = std::mem::replace(&mut entry.due, due) {
            self.timers.remove(&(before, id));
        }
        if let Some(due) = due {
            self.timers.insert((due, id), group);
        }
    }

    fn group(&mut self, sync: &GenerationSynchronizer) -> usize {
        if let Some(index) = self.by_key.get(sync.cache_key()) {
            return *index;
        }
        let group = Some(Group::new(sync.clone()));
        let index = self.free.pop().unwrap_or(self.groups.len());
        match self.groups.get_mut(index) {
            Some(place) => *place = group,
            None => self.groups.push(group),
        }
        self.by_key.insert(sync.cache_key().clone(), index);
        index
    }

    /// What is to be dropped when the lock is released.
    fn remove(&mut self, id: u64, index: usize) -> (Option<Entry>, Option<Group>) {
        self.set_timer(id, index, None);
        let Some(group) = &mut self.groups[index] else { return (None, None) };
        let entry = group.members.entries.remove(&id);
        if !group.members.entries.is_empty() {
            return (entry, None);
        }
        self.by_key.remove(group.members.sync.cache_key());
        self.free.push(index);
        let group = self.groups[index].take();
        if self.by_key.is_empty() {
            (self.groups, self.free) = Default::default();
        }
        (entry, group)
    }
}

impl Target {
    fn tell(self) {
        match self {
            // It fails if nobody has read it for 2^64 - 2 times, and then it is readable.
            Self::Descriptor(descriptor) => _ = descriptor.write(1),
            // A runtime's panic must not end the thread, which others rely on.
            Self::Task(waker) => _ = catch_unwind(AssertUnwindSafe(|| waker.into_iter().for_each(Waker::wake))),
        }
    }
}

impl Default for Notifier {
    fn default() -> Self {
        Self { process: token(), state: Mutex::default() }
    }
}

impl Notifier {
    fn is_inherited(&self) -> bool {
        self.process != token()
    }

    /// No code of the user's runs under the lock, so wakers are neither called nor dropped there.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(self: &Arc<Self>, table: &Table) -> Result<(), Error> {
        let (this, table) = (Arc::clone(self), table.clone());
        // Signals are for the program's own threads.
        let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK);
        let thread = std::thread::Builder::new().name("gensync".to_owned()).spawn(move || this.run(&table));
        if let Ok(mask) = mask {
            let _ = mask.thread_set_mask();
        }
        thread.map(drop).map_err(|error| Error::io("starting the thread that waits for updates", &error))
    }

    /// Has the tasks that wait for `key` look for themselves.
    #[cfg(feature = "async")]
    pub(crate) fn wake_tasks(&self, key: &CacheKey) {
        let mut state = self.lock();
        let group = state.by_key.get(key).copied().and_then(|index| state.groups[index].as_mut());
        let entries = group.into_iter().flat_map(|group| group.members.entries.values_mut());
        let wakers: Vec<Target> = entries
            .filter_map(|entry| match &mut entry.target {
                Target::Descriptor(_) => None,
                Target::Task(waker) => Some(Target::Task(waker.take())),
            })
            .collect();
        drop(state);
        wakers.into_iter().for_each(Target::tell);
    }

    fn run(&self, table: &Table) {
        loop {
            // Looks at the file, too, if it is time.
            let armed = table.arm();
            let limit;
            let now = coarse_now();
            let mut due = vec![];
            {
                let mut state = self.lock();
                if state.by_key.is_empty() {
                    state.is_running = false;
                    return;
                }
                state.look(now, &mut due);
                let next = state.timers.first_key_value().map_or(u64::MAX, |(&(due, _), _)| due);
                state.sleeps_until = if due.is_empty() { next.min(now + SLICE.as_millis() as u64) } else { now };
                limit = Duration::from_millis(state.sleeps_until - now);
            }
            match due.is_empty() {
                true => table.sleep(armed, limit),
                false => due.into_iter().for_each(Target::tell),
            }
        }
    }
}

/// A place on the list, until it is dropped.
pub(crate) struct Registration {
    notifier: Arc<Notifier>,
    table: Table,
    group: usize,
    id: u64,
}

impl Registration {
    /// Puts `target` on the list, to be told when the key of `sync` is not what `ticket` saw.
    pub(crate) fn new(sync: &GenerationSynchronizer, ticket: Ticket, target: Target) -> Result<Self, Error> {
        let table = sync.table().clone();
        let notifier: Arc<Notifier> = table.companion();
        let mut state = notifier.lock();
        state.last += 1;
        let (id, group) = (state.last, state.group(sync));
        if let Some(group) = &mut state.groups[group] {
            group.members.entries.insert(id, Entry { ticket, target, due: None });
        }
        let due = state.arm(id, group);
        let started = if state.is_running { Ok(()) } else { notifier.start(&table) };
        state.is_running |= started.is_ok();
        drop(state);
        let this = Self { notifier, table, group, id };
        started.map_err(|error| this.table.explain(error))?;
        due.into_iter().for_each(Target::tell);
        Ok(this)
    }

    pub(crate) fn is_inherited(&self) -> bool {
        self.notifier.is_inherited()
    }

    /// Has `waker` called when the key is not what `ticket` saw, and when `due` has come, if there is one, in milliseconds of
    /// the coarse clock. What has happened before this call is for the caller to look at.
    #[cfg(feature = "async")]
    pub(crate) fn set_waker(&self, waker: Waker, ticket: Ticket, due: Option<u64>) {
        let mut target = Target::Task(Some(waker));
        let mut state = self.notifier.lock();
        state.set_timer(self.id, self.group, due);
        if let Some(group) = &mut state.groups[self.group]
            && let Some(entry) = group.members.entries.get_mut(&self.id)
        {
            entry.ticket = ticket;
            std::mem::swap(&mut entry.target, &mut target);
        }
        let _ = state.arm(self.id, self.group);
        self.wake_for_timers(state);
        drop(target);
    }

    /// Has it told when `due` has come as well, in milliseconds of the coarse clock.
    pub(crate) fn set_due(&self, due: Option<u64>) {
        let mut state = self.notifier.lock();
        state.set_timer(self.id, self.group, due);
        self.wake_for_timers(state);
    }

    /// Wakes the thread if it would sleep for too long.
    fn wake_for_timers(&self, mut state: MutexGuard<'_, State>) {
        let next = state.timers.first_key_value().map_or(u64::MAX, |(&(due, _), _)| due);
        let is_early = next < state.sleeps_until;
        if is_early {
            // Others that come before the thread does need not wake it.
            state.sleeps_until = next;
        }
        drop(state);
        if is_early {
            self.table.wake_sleepers();
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if self.is_inherited() {
            // In a forked child, the list may be in any state, and must not be dropped.
            std::mem::forget(Arc::clone(&self.notifier));
            return;
        }
        let mut state = self.notifier.lock();
        let removed = state.remove(self.id, self.group);
        let is_last = state.by_key.is_empty();
        drop(state);
        // A task waits for a moment, and mostly again: only a descriptor that is gone is so for good.
        if let (Some(Entry { target: Target::Descriptor(_), .. }), Some(group)) = &removed
            && !self.table.is_read_only()
        {
            group.place.owner().slots().stop_waiting(std::iter::once(&*group.place));
        }
        drop(removed);
        if is_last {
            self.table.wake_sleepers();
        }
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration").field("id", &self.id).finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use nix::sys::eventfd::EfdFlags;

    #[test]
    fn no_timer_stands_still_when_the_clock_is_set_back() {
        let table = Table::options().anonymous().unwrap();
        let sync = GenerationSynchronizer::new(&table, "key").unwrap();
        let (mut state, mut due) = (State::default(), vec![]);
        let group = state.group(&sync);
        let descriptor = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap());
        let entry = Entry { ticket: sync.ticket(), target: Target::Descriptor(descriptor), due: None };
        state.groups[group].as_mut().unwrap().members.entries.insert(1, entry);
        state.set_timer(1, group, Some(86_400_000));
        for now in [86_390_000, 86_399_999] {
            state.look(now, &mut due);
            assert!(due.is_empty(), "too early");
        }
        state.look(1000, &mut due);
        assert_eq!(due.len(), 1, "not told for a day");
        state.set_timer(1, group, Some(2000));
        state.look(1999, &mut due);
        assert_eq!(due.len(), 1, "too early");
        state.look(2000, &mut due);
        assert_eq!(due.len(), 2);
    }
}

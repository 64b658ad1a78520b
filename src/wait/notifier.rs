//! The notifier of a table: one thread in each process that waits on behalf of all descriptors and tasks.
//!
//! The thread sleeps on the table's wake word, as a [`WaitSet`](crate::WaitSet) does. It starts with the first registration and
//! ends with the last. A *registration* is a descriptor or a task that is to be notified when one key is updated.
//!
//! Registrations are grouped by key. When the thread wakes, it cannot know which key was updated, so it compares one word of each
//! key with the word that it left there. A key costs more only if its word has changed, in proportion to its own registrations.
//! The thread reads the clock and checks the file once for all keys.
//!
//! A new registration need not wake the thread: it sets the waiting bit of its key itself. If the thread is asleep by then, the
//! table's wake word is armed, and an update of the key wakes the thread. If the thread is awake, it scans all keys before it
//! sleeps again. Only a registration with a due time, or a [`Timer`], wakes the thread, if the thread would sleep past that time.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
#[cfg(feature = "future")]
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
#[cfg(feature = "future")]
use std::task::Poll;
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
    /// The keys; `None` where there is room for another key, so that a group never moves to another index.
    groups: Vec<Option<Group>>,
    free: Vec<usize>,
    by_key: HashMap<CacheKey, usize>,
    /// The due times of registrations in milliseconds: by time and number, with the index of the group.
    timers: BTreeMap<(u64, u64), usize>,
    /// The tasks that sleep until a time, by time and number, and how many tasks may sleep.
    #[cfg(feature = "future")]
    sleepers: BTreeMap<(u64, u64), Waker>,
    alarms: usize,
    /// When the timers were last scanned.
    scanned: u64,
    /// Until when the thread sleeps if it is not woken.
    sleeps_until: u64,
}

/// All registrations for one key.
struct Group {
    /// Its slot, and the word that was left there: as long as the word stays the same, there is nothing to report. Zero if the
    /// group must be scanned each time.
    place: Place,
    quiet: u64,
    /// Boxed, so that groups are small: a scan reads one word of each.
    members: Box<Members>,
}

struct Members {
    /// The group's own synchronizer; what it has seen does not matter.
    sync: GenerationSynchronizer,
    entries: BTreeMap<u64, Entry>,
}

/// A registration, as its group keeps it.
struct Entry {
    /// What was last reported to it, or what it has seen itself.
    ticket: Ticket,
    target: Target,
    /// When it is notified in any case, in milliseconds of the coarse clock.
    due: Option<u64>,
}

pub(crate) enum Target {
    Descriptor(Arc<EventFd>),
    /// `None` while the task need not be notified.
    #[cfg_attr(not(feature = "async"), expect(dead_code, reason = "descriptors are for all"))]
    Task(Option<Waker>),
}

impl Entry {
    fn is_waiting(&self) -> bool {
        !matches!(self.target, Target::Task(None))
    }

    /// Returns what the caller must notify. It counts as notified from here on.
    fn take_target(&mut self, sync: &GenerationSynchronizer) -> Target {
        match &mut self.target {
            Target::Descriptor(descriptor) => {
                // While the table cannot be attached to, this ticket is void, and the next attempt to attach notifies it again.
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
        // A mapping that was detached reads as zero, which differs from any word that was left there.
        self.quiet == 0 || self.place.word().bits() != self.quiet
    }

    /// Adds the registrations that must be notified to `due`, and sets the waiting bit, so that the next update wakes the thread
    /// for the others.
    fn scan(&mut self, due: &mut Vec<Target>) {
        let Members { sync, entries } = &mut *self.members;
        if !entries.values().any(Entry::is_waiting) {
            return;
        }
        let news = sync.await_news();
        for entry in entries.values_mut() {
            if entry.is_waiting() && news.is_for(sync, entry.ticket) {
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
    /// Whether there is news for `ticket`. If there is none, the next update wakes the thread.
    fn has_news(&self, ticket: Ticket) -> bool {
        // Asked twice: the first time may find that the table was replaced, which is no news for a ticket of the successor.
        (0..2).all(|_| self.sync.await_news().is_for(&self.sync, ticket))
    }
}

impl State {
    /// Adds all registrations that must be notified now to `due`.
    fn scan(&mut self, now: u64, due: &mut Vec<Target>) {
        for group in self.groups.iter_mut().flatten() {
            if group.has_moved() {
                group.scan(due);
            }
        }
        // If the clock was set back, as when a checkpoint is restored, it is unknown when the timers are due, so all of them are:
        // a registration that is notified checks for itself.
        let due_until = if now < self.scanned { u64::MAX } else { now };
        self.scanned = now;
        while let Some(timer) = self.timers.first_entry().filter(|timer| timer.key().0 <= due_until) {
            let ((_, id), index) = timer.remove_entry();
            let Some(Group { members, .. }) = &mut self.groups[index] else { continue };
            let Members { sync, entries } = &mut **members;
            due.extend(entries.get_mut(&id).map(|entry| entry.take_target(sync)));
        }
        #[cfg(feature = "future")]
        while let Some(sleeper) = self.sleepers.first_entry().filter(|sleeper| sleeper.key().0 <= due_until) {
            due.push(Target::Task(Some(sleeper.remove())));
        }
    }

    fn is_empty(&self) -> bool {
        self.by_key.is_empty() && self.alarms == 0
    }

    /// When a registration or a sleeper is next due.
    fn next_due(&self) -> u64 {
        let due = self.timers.first_key_value().map_or(u64::MAX, |(&(due, _), _)| due);
        #[cfg(feature = "future")]
        let due = self.sleepers.first_key_value().map_or(due, |(&(sleeper, _), _)| sleeper.min(due));
        due
    }

    /// Sets the waiting bit, so that the next update notifies a registration. Returns the target if it is a descriptor and there
    /// is news now; a task checks for itself after this.
    fn arm(&mut self, id: u64, group: usize) -> Option<Target> {
        let members = &self.groups[group].as_ref()?.members;
        let has_news = members.has_news(members.entries.get(&id)?.ticket);
        let Members { sync, entries } = &mut *self.groups[group].as_mut()?.members;
        let entry = entries.get_mut(&id)?;
        if has_news && matches!(entry.target, Target::Descriptor(_)) {
            return Some(entry.take_target(sync));
        }
        if has_news {
            // The task may find no news when it checks, as its synchronizer is not the group's: while the table cannot be
            // attached to, each has news at times of its own. Then nothing else would wake the task, so it is notified soon.
            let soon = coarse_now() + BLIND.as_millis() as u64;
            let due = entry.due.map_or(soon, |due| due.min(soon));
            self.set_timer(id, group, Some(due));
        }
        None
    }

    /// Sets when a registration is notified in any case. This does not wake the thread.
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

    /// Removes a registration. Returns what must be dropped after the lock is released.
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
    fn notify(self) {
        match self {
            // This fails only if the count is at its maximum, 2^64 - 2, and then the descriptor is readable.
            Self::Descriptor(descriptor) => _ = descriptor.write(1),
            Self::Task(waker) => waker.into_iter().for_each(wake),
        }
    }
}

/// Calls `waker`. A panic of a runtime's waker must not end what calls it, which others rely on.
pub(crate) fn wake(waker: Waker) {
    let _ = catch_unwind(AssertUnwindSafe(|| waker.wake()));
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

    /// No code of the user runs under the lock, as it may call back into gensync and would deadlock: wakers are neither called
    /// nor dropped there.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the thread if it does not run. To be called with the lock held, on what the lock guards.
    fn ensure_running(self: &Arc<Self>, state: &mut State, table: &Table) -> Result<(), Error> {
        if !state.is_running {
            self.start(table).map_err(|error| table.explain(error))?;
            state.is_running = true;
        }
        Ok(())
    }

    fn start(self: &Arc<Self>, table: &Table) -> Result<(), Error> {
        let (this, table) = (Arc::clone(self), table.clone());
        // Signals must reach the program's own threads: the new thread inherits a mask that blocks all of them.
        let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK);
        let thread = std::thread::Builder::new().name("gensync".to_owned()).spawn(move || this.run(&table));
        if let Ok(mask) = mask {
            let _ = mask.thread_set_mask();
        }
        thread.map(drop).map_err(|error| Error::io("starting the thread that waits for updates", &error))
    }

    /// Wakes the tasks that wait for `key`, so that they check for themselves.
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
        wakers.into_iter().for_each(Target::notify);
    }

    /// Wakes the thread if it would sleep past the first due time.
    fn wake_for_timers(&self, mut state: MutexGuard<'_, State>, table: &Table) {
        let next = state.next_due();
        let is_early = next < state.sleeps_until;
        if is_early {
            // Further registrations that are due no sooner than this one need not wake the thread once more.
            state.sleeps_until = next;
        }
        drop(state);
        if is_early {
            table.wake_sleepers();
        }
    }

    fn run(&self, table: &Table) {
        loop {
            // The wake word is armed before the keys are scanned, so that an update which comes after its key was scanned ends
            // the sleep. This also checks the file if it is time.
            let wait_token = table.arm();
            let limit;
            let now = coarse_now();
            let mut due = vec![];
            {
                let mut state = self.lock();
                if state.is_empty() {
                    state.is_running = false;
                    return;
                }
                state.scan(now, &mut due);
                let next = state.next_due();
                state.sleeps_until = if due.is_empty() { next.min(now + SLICE.as_millis() as u64) } else { now };
                limit = Duration::from_millis(state.sleeps_until - now);
            }
            match due.is_empty() {
                true => table.sleep(wait_token, limit),
                false => due.into_iter().for_each(Target::notify),
            }
        }
    }
}

/// Keeps a descriptor or a task registered with the notifier until it is dropped.
pub(crate) struct Registration {
    notifier: Arc<Notifier>,
    table: Table,
    group: usize,
    id: u64,
}

impl Registration {
    /// Registers `target`, to be notified when the generation of `sync`'s key is not the one of `ticket`.
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
        let started = notifier.ensure_running(&mut state, &table);
        drop(state);
        let this = Self { notifier, table, group, id };
        started?;
        due.into_iter().for_each(Target::notify);
        Ok(this)
    }

    pub(crate) fn is_inherited(&self) -> bool {
        self.notifier.is_inherited()
    }

    /// Registers `waker`, to be called when the generation of the key is not the one of `ticket`, and at `due`, if given, in
    /// milliseconds of the coarse clock. The caller must check afterwards for what happened before this call.
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
        self.notifier.wake_for_timers(state, &self.table);
        drop(target);
    }

    /// Sets when it is notified in any case, in milliseconds of the coarse clock; `None` for never.
    pub(crate) fn set_due(&self, due: Option<u64>) {
        let mut state = self.notifier.lock();
        state.set_timer(self.id, self.group, due);
        self.notifier.wake_for_timers(state, &self.table);
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if self.is_inherited() {
            // In a forked child, the state may be half changed by a thread of the parent, so it must be neither used nor dropped.
            std::mem::forget(Arc::clone(&self.notifier));
            return;
        }
        let mut state = self.notifier.lock();
        let removed = state.remove(self.id, self.group);
        let is_last = state.is_empty();
        drop(state);
        // The waiting bit is cleared for descriptors only. A task often registers again soon, and would set the bit again.
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

/// Wakes a task at a time, until it is dropped.
#[cfg(feature = "future")]
pub(crate) struct Timer {
    table: Table,
    /// `None` until it is set for the first time.
    alarm: Option<Alarm>,
}

/// What the notifier keeps for a timer.
#[cfg(feature = "future")]
struct Alarm {
    notifier: Arc<Notifier>,
    table: Table,
    id: u64,
    /// When it is due, if it is set.
    due: u64,
}

#[cfg(feature = "future")]
impl Timer {
    pub(crate) fn new(table: &Table) -> Self {
        Self { table: table.clone(), alarm: None }
    }

    /// Calls `waker` at `due`, in milliseconds of the coarse clock, and perhaps sooner: if the clock is set back. What was set
    /// before does not count any more.
    pub(crate) fn set(&mut self, waker: &Waker, due: u64) -> Result<(), Error> {
        let waker = waker.clone();
        self.alarm.take_if(|alarm| alarm.notifier.is_inherited());
        let alarm = self.alarm.get_or_insert_with(|| Alarm::new(&self.table));
        let mut state = alarm.notifier.lock();
        alarm.notifier.ensure_running(&mut state, &self.table)?;
        let before = state.sleepers.remove(&(alarm.due, alarm.id));
        alarm.due = due;
        let replaced = state.sleepers.insert((due, alarm.id), waker);
        alarm.notifier.wake_for_timers(state, &self.table);
        drop((before, replaced));
        Ok(())
    }

    /// Sleeps for `length` milliseconds of the coarse clock, or until the clock is set back.
    pub(crate) async fn sleep(&mut self, length: u64) -> Result<(), Error> {
        let start = coarse_now();
        poll_fn(|context| match coarse_now().wrapping_sub(start) >= length {
            true => Poll::Ready(Ok(())),
            false => match self.set(context.waker(), start + length) {
                Ok(()) => Poll::Pending,
                Err(error) => Poll::Ready(Err(error)),
            },
        })
        .await
    }
}

#[cfg(feature = "future")]
impl Alarm {
    fn new(table: &Table) -> Self {
        let notifier: Arc<Notifier> = table.companion();
        let mut state = notifier.lock();
        (state.last, state.alarms) = (state.last + 1, state.alarms + 1);
        let id = state.last;
        drop(state);
        Self { notifier, table: table.clone(), id, due: 0 }
    }
}

#[cfg(feature = "future")]
impl Drop for Alarm {
    fn drop(&mut self) {
        if self.notifier.is_inherited() {
            // As for registrations.
            std::mem::forget(Arc::clone(&self.notifier));
            return;
        }
        let mut state = self.notifier.lock();
        let waker = state.sleepers.remove(&(self.due, self.id));
        state.alarms -= 1;
        let is_last = state.is_empty();
        drop(state);
        drop(waker);
        if is_last {
            self.table.wake_sleepers();
        }
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
            state.scan(now, &mut due);
            assert!(due.is_empty(), "too early");
        }
        state.scan(1000, &mut due);
        assert_eq!(due.len(), 1, "not notified for a day");
        state.set_timer(1, group, Some(2000));
        state.scan(1999, &mut due);
        assert_eq!(due.len(), 1, "too early");
        state.scan(2000, &mut due);
        assert_eq!(due.len(), 2);
    }
}

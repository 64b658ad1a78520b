//! Waiting for updates: sleep until a generation moves on.
//!
//! The protocol is described in `protocol/slots.rs`. A waiter for one key sleeps on one of the table's 64 wake words,
//! which keys share; a waiter for several keys sleeps on the one of their table. Updates of other keys that have waiters may wake
//! either.
//!
//! Sleeps are cut into slices. At the end of each slice, the waiter checks three things for which it may not be woken: whether
//! the table's file is still there, whether the maker of a pending update is dead, and whether the generation has moved on
//! because an updater was killed before it could wake the waiters.

#[cfg(feature = "async")]
pub(crate) mod changed;
pub(crate) mod notifier;
pub(crate) mod pollable;
mod watch;

#[cfg(feature = "async")]
pub use changed::{Changed, Changes};
pub use pollable::Pollable;
pub use watch::Watch;

use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::os::clock::Deadline;
use crate::protocol::futex::BLIND;
use crate::protocol::slots::Memory as _;
use crate::protocol::wake::WakeWord;
use crate::synchronizer::{GenerationSynchronizer, Ticket};
use crate::table::incarnation::{Incarnation, Place};

/// The longest time that a waiter sleeps before it checks for itself.
pub(crate) const SLICE: Duration = Duration::from_millis(500);

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "it says whether the state is expired"]
#[non_exhaustive]
pub enum Waited {
    /// The generation is no longer the one seen: the state must be loaded again.
    Changed,
    /// The deadline was reached, and the generation is still the one seen.
    TimedOut,
}

impl Waited {
    /// Whether the generation has changed.
    #[must_use]
    pub fn is_changed(self) -> bool {
        self == Self::Changed
    }

    /// Whether the deadline was reached first.
    #[must_use]
    pub fn is_timed_out(self) -> bool {
        self == Self::TimedOut
    }
}

impl GenerationSynchronizer {
    /// Blocks until the generation is not the one that the synchronizer had seen at the call, even if another thread adopts a
    /// newer one meanwhile.
    ///
    /// If the state [is expired](Self::is_expired) already, the wait ends at once, so that no update is missed between a check
    /// and a wait. Several updates may be reported as one. Any number of threads and processes may wait for one key.
    ///
    /// A change ends every wait until it is adopted. So that a loop of loads that fail does not keep the processor busy, there is
    /// a pause before a change is reported again: 10 milliseconds the first time, and twice as long each further time, up to a
    /// second. Another change ends this pause at once, and so does the deadline. While the table cannot be attached to, which
    /// counts as expired, this returns twice a second or at the deadline.
    ///
    /// ```
    /// # use gensync::{GenerationSynchronizer, Table};
    /// # fn load_routes() -> Result<(), gensync::Error> { Ok(()) }
    /// # fn main() -> Result<(), gensync::Error> {
    /// # let table = Table::options().anonymous()?;
    /// let sync = GenerationSynchronizer::new(&table, "routes")?;
    /// # let other = GenerationSynchronizer::new(&table, "routes")?;
    /// # other.mark_updated()?;
    /// loop {
    ///     sync.wait();
    ///     if let Err(error) = sync.refresh_with(load_routes) {
    ///         eprintln!("will be tried again: {error}"); // after a pause, which grows
    ///     }
    /// #   break;
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Progress
    ///
    /// Blocking, without polling: the thread sleeps on a futex, and checks for itself twice a second. So it also notices, within
    /// a second, that the table's file was deleted, and, within half a second, that the maker of a pending update was killed.
    /// Signals do not end the wait. A process that has the table open read-only cannot leave a mark there that it waits, so it
    /// checks the key every 10 milliseconds instead. If the table was replaced, this attaches to the successor: opening, mapping
    /// and retiring files.
    pub fn wait(&self) {
        let _ = self.wait_until(self.seen_ticket(), None);
    }

    /// As [`wait`](Self::wait), no longer than `timeout`.
    ///
    /// # Progress
    ///
    /// As [`wait`](Self::wait).
    pub fn wait_timeout(&self, timeout: Duration) -> Waited {
        self.wait_until(self.seen_ticket(), Deadline::after(timeout))
    }

    /// As [`wait`](Self::wait), until `deadline` at most. A change that is there already is reported even if the deadline has
    /// passed.
    ///
    /// # Progress
    ///
    /// As [`wait`](Self::wait).
    pub fn wait_deadline(&self, deadline: Instant) -> Waited {
        self.wait_until(self.seen_ticket(), Some(Deadline::at(deadline)))
    }

    fn wait_until(&self, ticket: Ticket, deadline: Option<Deadline>) -> Waited {
        let awaited = [Awaited { sync: self, ticket }];
        pause(&awaited, deadline);
        let waited = wait_for_any(&awaited, deadline);
        if waited.is_changed() {
            self.note_report(ticket);
        }
        waited
    }
}

/// One key that a waiter waits for, and what the waiter has seen of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Awaited<'a> {
    pub(crate) sync: &'a GenerationSynchronizer,
    pub(crate) ticket: Ticket,
}

impl Awaited<'_> {
    fn is_news(&self) -> bool {
        self.sync.is_news(self.ticket)
    }

    fn is_expired(&self) -> bool {
        self.sync.is_expired_since(self.ticket)
    }
}

/// Sleeps until one of the keys was updated.
pub(crate) fn wait_for_any(awaited: &[Awaited<'_>], deadline: Option<Deadline>) -> Waited {
    let (mut bits, mut is_long) = (Vec::new(), false);
    loop {
        if awaited.iter().any(Awaited::is_news) {
            return Waited::Changed;
        }
        let Some(limit) = time_left(deadline, SLICE) else {
            // While a table cannot be attached to, that is news only now and then, but the state is expired all the time.
            if awaited.iter().any(Awaited::is_expired) {
                return Waited::Changed;
            }
            // Clearing a bit wakes the other waiters, so that each sets it again. After short waits the bits stay, as many of
            // them would wake each other all the time.
            if is_long {
                leave(bits);
            }
            return Waited::TimedOut;
        };
        is_long |= limit == SLICE;
        match awaited {
            [one] if !one.sync.table().is_read_only() => sleep_on_key(one, limit, &mut bits),
            several => sleep_on_tables(several, limit, &mut bits),
        }
    }
}

/// Clears the waiting bits that a waiter has set and that no update has cleared: otherwise the next update of each key would make
/// a system call to wake no one.
fn leave(mut bits: Vec<&Place>) {
    while let Some(place) = bits.first() {
        let owner = Arc::clone(place.owner());
        let is_there = |place: &&Place| Arc::ptr_eq(place.owner(), &owner);
        owner.slots().stop_waiting(bits.iter().copied().filter(is_there).map(|place| &**place));
        bits.retain(|place| !is_there(place));
    }
}

/// Sets the waiting bit of the key, and adds the place to `bits` if the bit was not set before. Returns `false` if the waiter
/// must not sleep, as there is news.
fn await_update<'a>(awaited: &Awaited<'a>, place: &'a Place, bits: &mut Vec<&'a Place>) -> bool {
    let word = place.await_update();
    if !word.is_awaited() && word.is_live() {
        bits.push(place);
    }
    awaited.ticket.may_sleep_on(word)
}

/// Sleeps while the only changes are ones that were reported before and may not be reported again yet.
fn pause(awaited: &[Awaited<'_>], deadline: Option<Deadline>) {
    // Pauses are measured by the coarse clock, which is up to a tick behind the clock of the sleeps, so one sleep may be too
    // short.
    loop {
        let mut least = None;
        let mut further = Vec::with_capacity(awaited.len());
        for one in awaited {
            let repeat = one.sync.repeat(one.ticket);
            least = least.into_iter().chain(repeat.map(|(pause, _)| pause)).min();
            further.push(Awaited { sync: one.sync, ticket: repeat.map_or(one.ticket, |(_, present)| present) });
        }
        let Some(pause @ 1..) = least else { return };
        let end = Deadline::after(Duration::from_millis(pause));
        let is_changed = wait_for_any(&further, deadline.into_iter().chain(end).min()).is_changed();
        if is_changed || time_left(deadline, SLICE).is_none() {
            return;
        }
    }
}

/// How long to sleep: until the deadline, but no longer than `slice`. `None` if the deadline is reached.
pub(crate) fn time_left(deadline: Option<Deadline>, slice: Duration) -> Option<Duration> {
    let Some(deadline) = deadline else { return Some(slice) };
    let left = deadline.left();
    (!left.is_zero()).then(|| left.min(slice))
}

fn sleep_on_key<'a>(awaited: &Awaited<'a>, limit: Duration, bits: &mut Vec<&'a Place>) {
    let place = awaited.sync.place();
    // Armed before the generation word is read: an update that is not found here finds the waiting bit and moves the wake word
    // on, so that the sleep ends at once.
    let wake_word = place.owner().mapping().wake_word(place);
    let wait_token = wake_word.arm();
    match await_update(awaited, place, bits) {
        true => wake_word.sleep(wait_token, limit),
        // There is news, which the caller finds next.
        false if place.word().is_live() => {}
        // The place is retired and no successor could be attached to, so no update can wake this thread.
        false => sleep(limit.min(BLIND)),
    }
}

fn sleep_on_tables<'a>(awaited: &[Awaited<'a>], limit: Duration, bits: &mut Vec<&'a Place>) {
    let places: Vec<&'a Place> = awaited.iter().map(|awaited| awaited.sync.place()).collect();
    // The place of a key that could not be attached to is retired though its table is live.
    let is_blind = |(awaited, place): (&Awaited<'_>, &&Place)| {
        let is_live = place.owner().slots().header().is_live() && place.word().is_live();
        awaited.sync.table().is_read_only() || !is_live
    };
    if awaited.is_empty() {
        return sleep(limit);
    }
    if awaited.iter().zip(&places).any(is_blind) {
        return sleep(limit.min(BLIND));
    }
    let mut tables: Vec<&Arc<Incarnation>> = places.iter().map(|place| place.owner()).collect();
    tables.sort_unstable_by_key(|table| Arc::as_ptr(table));
    tables.dedup_by(|one, other| Arc::ptr_eq(one, other));
    let words: Vec<&WakeWord> = tables.iter().map(|table| &table.slots().header().wake.word).collect();
    // Armed before the generation words are read, for the same reason: an update that is not found below moves on the wake word
    // of its table, so that the sleep ends at once.
    let wait_tokens: Vec<_> = words.into_iter().map(|word| (word, word.arm())).collect();
    if awaited.iter().zip(places).all(|(awaited, place)| await_update(awaited, place, bits)) {
        WakeWord::sleep_on_any(&wait_tokens, limit);
    }
}

/// Several synchronizers, of one table or of several, to wait for all of them at once.
///
/// ```
/// use gensync::{GenerationSynchronizer, Table, WaitSet};
///
/// # fn main() -> Result<(), gensync::Error> {
/// let table = Table::options().anonymous()?;
/// let keys = ["users", "groups", "routes"];
/// let syncs: Vec<_> = keys.iter().map(|key| GenerationSynchronizer::new(&table, *key)).collect::<Result<_, _>>()?;
/// let set: WaitSet<'_> = syncs.iter().collect();
///
/// GenerationSynchronizer::new(&table, "groups")?.mark_updated()?; // in another process
/// assert_eq!(set.wait(), [1]);
/// syncs[1].refresh()?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, Default)]
pub struct WaitSet<'a>(Vec<&'a GenerationSynchronizer>);

impl<'a> WaitSet<'a> {
    /// An empty set.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `sync`, and returns its position, which the waits return for it.
    pub fn add(&mut self, sync: &'a GenerationSynchronizer) -> usize {
        self.0.push(sync);
        self.0.len() - 1
    }

    /// The synchronizers, in the order of their positions.
    #[must_use]
    pub fn members(&self) -> &[&'a GenerationSynchronizer] {
        &self.0
    }

    /// Blocks until at least one of the generations is not the one seen, and returns the positions of all that are not. If their
    /// states are not loaded, the next wait reports them again: after a pause that grows, as described at
    /// [`GenerationSynchronizer::wait`], unless there is another change.
    ///
    /// # Panics
    ///
    /// If the set is empty, as this would block for ever.
    ///
    /// # Progress
    ///
    /// As [`GenerationSynchronizer::wait`]. An update of another key that has waiters wakes this thread as well, and the thread
    /// goes back to sleep. A set of several tables needs Linux 5.16 or newer; on older kernels this polls every 10 milliseconds.
    #[must_use]
    pub fn wait(&self) -> Vec<usize> {
        assert!(!self.0.is_empty(), "waiting for nothing would never end");
        self.wait_until(None)
    }

    /// As [`wait`](Self::wait), no longer than `timeout`. An empty result means that the timeout has passed. The set may be
    /// empty.
    ///
    /// # Progress
    ///
    /// As [`wait`](Self::wait).
    #[must_use]
    pub fn wait_timeout(&self, timeout: Duration) -> Vec<usize> {
        self.wait_until(Deadline::after(timeout))
    }

    /// As [`wait_timeout`](Self::wait_timeout), until `deadline`.
    ///
    /// # Progress
    ///
    /// As [`wait`](Self::wait).
    #[must_use]
    pub fn wait_deadline(&self, deadline: Instant) -> Vec<usize> {
        self.wait_until(Some(Deadline::at(deadline)))
    }

    fn wait_until(&self, deadline: Option<Deadline>) -> Vec<usize> {
        let awaited: Vec<_> = self.0.iter().map(|sync| Awaited { sync, ticket: sync.seen_ticket() }).collect();
        pause(&awaited, deadline);
        while wait_for_any(&awaited, deadline).is_changed() {
            let changed = awaited.iter().enumerate().filter(|(_, awaited)| awaited.is_expired());
            let changed: Vec<_> = changed.map(|(position, _)| position).collect();
            changed.iter().for_each(|&position| awaited[position].sync.note_report(awaited[position].ticket));
            if !changed.is_empty() {
                return changed;
            }
        }
        Vec::new()
    }
}

impl<'a> FromIterator<&'a GenerationSynchronizer> for WaitSet<'a> {
    fn from_iter<I: IntoIterator<Item = &'a GenerationSynchronizer>>(syncs: I) -> Self {
        Self(syncs.into_iter().collect())
    }
}

impl<'a> Extend<&'a GenerationSynchronizer> for WaitSet<'a> {
    fn extend<I: IntoIterator<Item = &'a GenerationSynchronizer>>(&mut self, syncs: I) {
        self.0.extend(syncs);
    }
}

impl<'a> IntoIterator for WaitSet<'a> {
    type Item = &'a GenerationSynchronizer;
    type IntoIter = std::vec::IntoIter<Self::Item>;

    /// The synchronizers, in the order of their positions.
    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<'s, 'a> IntoIterator for &'s WaitSet<'a> {
    type Item = &'a GenerationSynchronizer;
    type IntoIter = std::iter::Copied<std::slice::Iter<'s, Self::Item>>;

    /// As [`members`](WaitSet::members).
    fn into_iter(self) -> Self::IntoIter {
        self.0.iter().copied()
    }
}

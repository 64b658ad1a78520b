//! Waiting for updates: sleep until a generation moves on.
//!
//! The protocol is described in `protocol/slots.rs`. Who waits for one key sleeps on the wake word of its slot; who waits for several, on
//! that of their table, where updates of other awaited keys disturb him.
//!
//! Sleeps are cut into slices. At each one's end, a sleeper looks whether the table's file is still there, whether an
//! update is pending that nobody will finish, and whether the generation has moved on though nobody lived to wake him.

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
use crate::protocol::wake::WakeWord;
use crate::synchronizer::{GenerationSynchronizer, Ticket};
use crate::table::incarnation::{Incarnation, Place};

/// How long a process sleeps at most before it looks for itself.
pub(crate) const SLICE: Duration = Duration::from_millis(500);

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "it says whether the state is expired"]
#[non_exhaustive]
pub enum Waited {
    /// The generation is not the one seen any more: the state must be loaded again.
    Changed,
    /// The time was up, and the generation is still the one seen.
    TimedOut,
}

impl Waited {
    /// Whether the generation has changed.
    #[must_use]
    pub fn is_changed(self) -> bool {
        self == Self::Changed
    }

    /// Whether the time was up first.
    #[must_use]
    pub fn is_timed_out(self) -> bool {
        self == Self::TimedOut
    }
}

impl GenerationSynchronizer {
    /// Blocks until the generation is not the one that the synchronizer has seen at the call, whatever another thread has it
    /// see meanwhile.
    ///
    /// If the state [is expired](Self::is_expired) already, that ends it at once, so that none is missed between a check and a wait. Several
    /// updates may be told as one. Any number of threads and processes may wait for one key.
    ///
    /// A change ends each wait until it is adopted. So that a loop whose loads fail does not become a storm, a wait that begins
    /// with a change that was reported before reports it 10 milliseconds after the last time; twice as long after each further
    /// one, up to a second. Another change ends this pause at once, and so does the end of the time. While the table
    /// cannot be attached to, which counts as expired, this returns twice a second or when the time is up.
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
    /// Blocking, without polling: the thread sleeps on a futex, and looks for itself twice a second. So it also notices,
    /// within a second, that the table's file was deleted, and within half a second an update whose maker was killed in the
    /// middle of it. Signals do not end it. With a read-only table, where nothing can be left to tell that somebody waits,
    /// it looks every 10 milliseconds. If the table was replaced, it attaches to the successor: opening, mapping and
    /// retiring files.
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

    /// As [`wait`](Self::wait), until `deadline` at most. A change that came before is told also after it.
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

/// What a waiter has seen of one key.
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
            // A table that cannot be attached to is news only now and then, but what it is for is expired all the time.
            if awaited.iter().any(Awaited::is_expired) {
                return Waited::Changed;
            }
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

/// Clears the waiting bits that a waiter has set, and that no update has cleared.
fn leave(mut bits: Vec<&Place>) {
    while let Some(place) = bits.first() {
        let owner = Arc::clone(place.owner());
        let is_there = |place: &&Place| Arc::ptr_eq(place.owner(), &owner);
        owner.slots().stop_waiting(bits.iter().copied().filter(is_there).map(|place| &**place));
        bits.retain(|place| !is_there(place));
    }
}

/// Says that this waits for `awaited`, and notes the place if nobody else had said so. `false` if there is no need to sleep.
fn await_update<'a>(awaited: &Awaited<'a>, place: &'a Place, bits: &mut Vec<&'a Place>) -> bool {
    let word = place.await_update();
    if !word.is_awaited() && word.is_live() {
        bits.push(place);
    }
    awaited.ticket.may_sleep_on(word)
}

/// Sleeps as long as nothing is to be reported but changes that were reported before, and that too lately to be reported again.
fn pause(awaited: &[Awaited<'_>], deadline: Option<Deadline>) {
    // The clock of the pauses is behind the one of the sleeps by up to a tick, so that one sleep may be too short.
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

/// How long to sleep, at most for `slice`; `None` when the deadline is reached.
pub(crate) fn time_left(deadline: Option<Deadline>, slice: Duration) -> Option<Duration> {
    let Some(deadline) = deadline else { return Some(slice) };
    let left = deadline.left();
    (!left.is_zero()).then(|| left.min(slice))
}

fn sleep_on_key<'a>(awaited: &Awaited<'a>, limit: Duration, bits: &mut Vec<&'a Place>) {
    let place = awaited.sync.place();
    let armed = place.wake.arm();
    match await_update(awaited, place, bits) {
        true => place.wake.sleep(armed, limit),
        // There is news, or no table: then it is for the next look to tell.
        false if place.word().is_live() => {}
        false => sleep(limit.min(BLIND)),
    }
}

fn sleep_on_tables<'a>(awaited: &[Awaited<'a>], limit: Duration, bits: &mut Vec<&'a Place>) {
    let places: Vec<&'a Place> = awaited.iter().map(|awaited| awaited.sync.place()).collect();
    let is_blind = |(awaited, place): (&Awaited<'_>, &&Place)| {
        awaited.sync.table().is_read_only() || !place.owner().slots().header().is_live()
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
    let armed: Vec<_> = words.into_iter().map(|word| (word, word.arm())).collect();
    if awaited.iter().zip(places).all(|(awaited, place)| await_update(awaited, place, bits)) {
        WakeWord::sleep_on_any(&armed, limit);
    }
}

/// Several synchronizers, of one table or of several, to wait for all at once.
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

    /// Adds `sync`, and returns its position, by which the waits name it.
    pub fn add(&mut self, sync: &'a GenerationSynchronizer) -> usize {
        self.0.push(sync);
        self.0.len() - 1
    }

    /// The synchronizers by position.
    #[must_use]
    pub fn members(&self) -> &[&'a GenerationSynchronizer] {
        &self.0
    }

    /// Blocks until one of the generations is not the one seen, and returns the positions of all that are not. They are
    /// told again by the next wait if their states are not loaded before; after a pause that grows, as
    /// [`GenerationSynchronizer::wait`] has it, unless there is another change.
    ///
    /// # Panics
    ///
    /// If the set is empty, as this would block for ever.
    ///
    /// # Progress
    ///
    /// As [`GenerationSynchronizer::wait`]; an update of a key that others wait for wakes the thread, too, which goes to
    /// sleep again. With several tables, it takes Linux 5.16 or newer not to poll every 10 milliseconds.
    #[must_use]
    pub fn wait(&self) -> Vec<usize> {
        assert!(!self.0.is_empty(), "waiting for nothing would never end");
        self.wait_until(None)
    }

    /// As [`wait`](Self::wait), no longer than `timeout`: an empty answer says that the time was up. It may be an empty set.
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

    /// The synchronizers by position.
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

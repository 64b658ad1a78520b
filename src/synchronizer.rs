//! What one holder has seen of one key.

mod budget;
mod pace;
mod pending;
pub(crate) mod update;

pub use update::{Update, UpdateError, update_all};

use std::sync::Arc;
use std::time::Duration;

pub(crate) use self::budget::CheckBudget;
use self::pace::Pace;
use self::pending::PendingMonitor;
use crate::error::{Error, ErrorKind};
use crate::generation::Generation;
use crate::key::CacheKey;
use crate::os::clock::{coarse_now, precise_now};
use crate::os::lock::Held;
use crate::os::mapping::Places;
use crate::os::pause::Backoff;
use crate::protocol::atomic::{AtomicU64, Ordering};
use crate::protocol::layout::Slot;
use crate::protocol::observed::{LastObserved, Observed};
use crate::protocol::word::Word;
use crate::table::incarnation::{Incarnation, Place};
use crate::table::{ATTEMPTS, PAUSE, Table};

/// How often to ask for a pending update's lock while others take it and let go of it.
const ROUNDS: u32 = 16;

/// Keeps one piece of state fresh: remembers the generation that its holder has seen, and compares it with the shared
/// one.
///
/// Each process has its own, for each key it holds state of; it may be made before a fork and used after it, in parent
/// and children alike. Threads may share one if they share the state, under a lock of the state's own; threads with
/// state of their own need a synchronizer of their own (which is faster, too). Dropping one changes nothing shared.
///
/// The names are those of Djblets' class, and so is what they mean, less its races.
///
/// ```
/// use gensync::{GenerationSynchronizer, Table};
///
/// # fn load_settings() -> Result<String, std::io::Error> { Ok(String::new()) }
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let table = Table::options().anonymous()?;
/// let sync = GenerationSynchronizer::new(&table, "siteconfig:1")?;
/// let mut settings = sync.refresh_with(load_settings)?;
///
/// // At each use:
/// if sync.is_expired() {
///     settings = sync.refresh_with(load_settings)?;
/// }
///
/// // Who changes the source says so, after the change is complete:
/// sync.mark_updated()?;
/// # drop(settings);
/// # Ok(()) }
/// ```
#[derive(Debug)]
#[repr(C, align(64))]
pub struct GenerationSynchronizer {
    // What each use asks for stands in one cache line, which no other synchronizer has a part of.
    places: Places<Incarnation>,
    seen: LastObserved,
    budget: CheckBudget,
    read_only: bool,
    /// Whether updates take the slow path: what cannot be made, or is not adopted.
    is_detoured: bool,
    // The rest is for what is done seldom.
    table: Table,
    key: CacheKey,
    /// When the next attempt to attach to a successor may be made.
    retry: Backoff,
    /// The address of the incarnation that the last attempt was made with, and one if it was retired for good by then.
    tried: LastTried,
    /// One for all clones, as what was seen tells of losses by the numbers that they have there.
    monitor: Arc<PendingMonitor>,
    /// How soon those who wait are told again of what they do not adopt.
    pace: Pace,
}

/// What a look at a key finds for those who wait for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct News {
    word: Word,
    is_live: bool,
    /// Whether time alone may make the state expired.
    is_doubtful: bool,
    /// Whether those who have seen nothing are told of a table that cannot be attached to.
    may_retry: bool,
    read_only: bool,
}

impl News {
    /// Whether there is any for `ticket`; `sync` is what gave this.
    pub(crate) fn is_for(self, sync: &GenerationSynchronizer, ticket: Ticket) -> bool {
        let is_same = self.is_live && ticket.observed.is(self.word) && !self.is_doubtful;
        !is_same && (self.may_retry || ticket.observed != Observed::NOTHING) && sync.is_overtaken(ticket.observed)
    }

    /// The word of which there is no news for those to whom there was none; zero if there may be, as a pending update must be
    /// looked after.
    pub(crate) fn quiet(self) -> u64 {
        match self.is_live && !self.is_doubtful && self.word.pending() == 0 {
            true if self.read_only => self.word.bits(),
            true => self.word.awaited().bits(),
            false => 0,
        }
    }
}

impl Clone for GenerationSynchronizer {
    /// Another synchronizer of the same key, which has seen what this one has seen. It allocates, and makes no system call.
    fn clone(&self) -> Self {
        let places = Places::new(self.places.latest().clone());
        Self::assemble(places, self.seen.get(), self.table.clone(), self.key.clone(), Arc::clone(&self.monitor))
    }
}

/// The generation from before a load, to be [adopted](GenerationSynchronizer::adopt) after it.
///
/// An update during the load makes the generation another one, so that state loaded with this ticket stays expired. It serves
/// synchronizers of one key and one [`Table`] (clones included): adopted by any other, it leaves the state expired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a ticket does nothing until it is adopted"]
pub struct Ticket {
    observed: Observed,
    /// The address of the slot that it was taken of, which no other key of this process has.
    slot: usize,
}

impl Ticket {
    /// Of which nothing is fresh.
    pub(crate) const VOID: Self = Self { observed: Observed::NOTHING, slot: 0 };

    #[inline]
    fn of(observed: Observed, slot: &Slot) -> Self {
        Self { observed, slot: std::ptr::from_ref(slot).addr() }
    }

    #[inline]
    fn is_of(self, slot: &Slot) -> bool {
        self.slot == std::ptr::from_ref(slot).addr()
    }

    pub(crate) fn may_sleep_on(self, word: Word) -> bool {
        self.observed.may_sleep_on(word)
    }

    /// Whether it was taken while freshness could not be known: what is loaded with it serves for the
    /// [`outage_ttl`](crate::TableOptions::outage_ttl).
    pub(crate) fn is_unconfirmed(self) -> bool {
        self.observed.is_in_doubt()
    }

    /// The generation that it stands for; `None` if there was no table to attach to, none that could be
    /// [confirmed](crate::TableOptions::outage_ttl) to be the one at its path, or no such key in a table that is read only.
    ///
    /// # Progress
    ///
    /// Wait-free; no system call.
    #[must_use]
    pub fn generation(self) -> Option<Generation> {
        self.observed.generation()
    }
}

impl GenerationSynchronizer {
    /// Attaches to `key`, and creates its generation if it is new.
    ///
    /// The present generation counts as seen, as in Djblets: whoever loaded the state before this call must check it
    /// against a [`ticket`](Self::ticket) taken before that load, or load again with
    /// [`refresh_with`](Self::refresh_with).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::EmptyKey`]; [`ErrorKind::TableFull`] if a new key needs room that cannot be had;
    /// [`ErrorKind::KeyNotFound`] if the key is new and the table read-only; or the table was replaced, and its
    /// successor cannot be opened.
    ///
    /// # Progress
    ///
    /// Lock-free, and allocates. It makes system calls if the table must grow, and looks at the file's path up to twice a second.
    /// When the table was replaced, as [`is_expired`](Self::is_expired).
    pub fn new(table: &Table, key: impl Into<CacheKey>) -> Result<Self, Error> {
        let key = table.normalize(key)?;
        let place = table.attach(&key)?;
        let observed = Observed::of(place.word());
        Ok(Self::assemble(Places::new(place), observed, table.clone(), key, Arc::new(PendingMonitor::new())))
    }

    fn assemble(
        places: Places<Incarnation>,
        observed: Observed,
        table: Table,
        key: CacheKey,
        monitor: Arc<PendingMonitor>,
    ) -> Self {
        let (seen, budget, read_only) = (LastObserved::new(observed), CheckBudget::new(), table.is_read_only());
        let (retry, tried, pace, is_detoured) = (Backoff::up_to(PAUSE), LastTried::default(), Pace::new(), read_only);
        Self { places, seen, budget, read_only, is_detoured, table, key, retry, tried, monitor, pace }
    }

    /// Does not adopt its own updates from here on: for a holder whose state is not what it writes. A clone does.
    pub(crate) fn without_following(mut self) -> Self {
        self.is_detoured = true;
        self
    }

    /// Whether the state must be loaded again: its key was updated since the generation was seen.
    ///
    /// Where that cannot be known, because the table was replaced and its successor cannot be attached to, the answer
    /// is `true` until the state is loaded, and again when the [`outage_ttl`](crate::TableOptions::outage_ttl) has passed. A
    /// process that reads only finds no key after a [reset](Table::reset) until a writer attaches to it again: state that it
    /// loads meanwhile is fresh for as long as the key is missing.
    ///
    /// A table whose file was deleted or replaced is noticed by the first check that comes a second after that. A holder
    /// that checks often looks at a clock once in a quarter of a second, or in 64 checks if that is sooner; so one whose rate
    /// suddenly falls may make up to 64 checks more before it notices.
    ///
    /// # Progress
    ///
    /// Wait-free: one load of shared memory, no allocation, no system call. After an update, and now and then, as told above,
    /// it also looks at a clock, and up to twice a second at the file's path.
    ///
    /// Not wait-free, and with system calls and allocations: while an update is pending, it asks the kernel for the maker's lock
    /// at most once a millisecond, and announces the update in the place of a maker that was killed; when the table was replaced,
    /// it opens the successor, which may take file input and output, making it, and sleeping for as long as another process makes
    /// it, up to some seconds if that one is stopped.
    #[inline]
    #[must_use]
    pub fn is_expired(&self) -> bool {
        self.is_expired_by(self.seen.get())
    }

    /// Whether state that was loaded with `ticket` must be loaded again: [`is_expired`](Self::is_expired) for state that
    /// keeps its ticket beside it, as a value that threads replace as a whole.
    ///
    /// # Progress
    ///
    /// As [`is_expired`](Self::is_expired).
    #[inline]
    #[must_use]
    pub fn is_expired_since(&self, ticket: Ticket) -> bool {
        if ticket.is_of(self.places.slot()) { self.is_expired_by(ticket.observed) } else { self.is_expired_elsewhere() }
    }

    #[inline]
    fn is_expired_by(&self, seen: Observed) -> bool {
        let word = self.places.slot().word();
        if seen.is(word) && self.budget.spend() {
            return false;
        }
        self.is_expired_slow(seen, word)
    }

    #[cold]
    fn is_expired_slow(&self, seen: Observed, word: Word) -> bool {
        // A pending update brings every check here, and so does an outage.
        let may_wait = seen.is_before_updates_of(word) || seen.is_of_no_slot() || seen.is_in_doubt();
        if !(may_wait && self.budget.spend()) {
            self.revalidate();
        }
        self.is_overtaken(seen)
    }

    /// A ticket of another slot: of a place that this holder has moved on from, or of another key.
    #[cold]
    fn is_expired_elsewhere(&self) -> bool {
        if !self.budget.spend() {
            self.revalidate();
        }
        true
    }

    fn is_overtaken(&self, seen: Observed) -> bool {
        let word = self.places.slot().word();
        if word.is_live() && self.table.is_latest(self.places.latest().owner()) {
            return !self.is_fresh(seen, word);
        }
        let now = coarse_now();
        let mut missing = self.missing();
        if missing.is_none() {
            if self.try_to_move_on(now) {
                return true;
            }
            // It may have come to another table.
            missing = self.missing();
        }
        missing.map_or_else(|| !seen.outlives_outage(now, self.table.outage_ttl()), |missing| seen != missing)
    }

    /// Attaches to the key in the latest incarnation, unless it was tried in vain just now.
    fn try_to_move_on(&self, now: u64) -> bool {
        let latest = self.table.latest();
        // What another holder of this process has attached to is there; and so is the successor of what is retired for good.
        let found = Arc::as_ptr(latest).addr() | usize::from(latest.slots().header().is_retired());
        if !self.retry.is_due(now) && !self.tried.differs(found) {
            return false;
        }
        let has_moved_on = self.move_on().is_ok();
        if !has_moved_on {
            self.retry.fail(now);
            self.tried.set(found);
        }
        has_moved_on
    }

    fn is_fresh(&self, seen: Observed, word: Word) -> bool {
        if word.pending() == 0 {
            self.monitor.end();
        }
        if self.table.is_doubtful() {
            return seen.outlives_doubt(word, coarse_now(), self.table.outage_ttl());
        }
        seen.is(word) || seen.is_before_updates_of(word) && self.is_in_flight(seen, word)
    }

    /// Whether the updates that `word` says are pending have a maker who may still finish them, so that what was `seen` is
    /// as fresh as before. If not, this is their end: the key is updated in their place.
    fn is_in_flight(&self, seen: Observed, word: Word) -> bool {
        let now = precise_now();
        let is_old = || u128::from(self.monitor.age(word, now)) >= self.table.pending_limit().as_micros();
        let has_lost = self.monitor.has_lost(word);
        if has_lost && !is_old() {
            return seen == self.monitor.observed(word);
        }
        if !has_lost && !self.monitor.is_due(now) {
            return true;
        }
        let place = self.places.latest();
        let mapping = place.owner().mapping();
        for _ in 0..ROUNDS {
            let present = place.word();
            if !present.is_same(word) {
                return seen.is(present) || seen.is_before_updates_of(present);
            }
            match mapping.held(place) {
                Some(Held::Update | Held::Unknown) if !is_old() => return true,
                // They have taken too long for this process. Others have limits of their own, and may go on.
                Some(Held::Update | Held::Unknown) => break,
                // Somebody else is about to recover them.
                Some(Held::Exclusive) => std::thread::yield_now(),
                // Whoever made them may have abandoned them just before: so it is asked again.
                Some(Held::Foreign) | None if self.read_only => std::thread::yield_now(),
                // If that fails for now, somebody else was faster, or another update has begun.
                Some(Held::Foreign) | None if place.owner().recover(place).is_err() => break,
                Some(Held::Foreign) | None => {}
            }
        }
        // They are lost, but not for all. Should one have been abandoned and another begun each time that this process looked,
        // then the loss is none, and hides one that comes later. So it holds no longer than the limit.
        self.monitor.lose(word, now);
        false
    }

    /// Spends one use of the budget; `false` if [`revalidate`](Self::revalidate) is to be called.
    #[inline]
    pub(crate) fn spend(&self) -> bool {
        self.budget.spend()
    }

    /// To be called when the budget is spent.
    #[cold]
    pub(crate) fn revalidate(&self) {
        let now = coarse_now();
        self.budget.renew(now);
        self.table.revalidate_if_due(now);
    }

    /// Attaches to the key in the latest incarnation of the table. Nothing seen before counts there.
    fn move_on(&self) -> Result<&Place, Error> {
        let place = self.table.attach(&self.key);
        // What was seen in an outage serves as long as that lasts.
        if place.is_ok() || !self.seen.get().is_of_no_slot() {
            self.seen.adopt(Observed::NOTHING);
        }
        self.places.append(place?);
        self.retry.end();
        Ok(self.places.latest())
    }

    fn present(&self) -> Result<Ticket, Error> {
        let observed = |place: &Place| {
            let word = place.word();
            let observed = if self.table.is_doubtful() {
                Observed::unconfirmed(word, coarse_now())
            } else {
                self.monitor.observed(word)
            };
            word.is_live().then(|| Ticket::of(observed, place))
        };
        match observed(self.places.latest()) {
            Some(ticket) => Ok(ticket),
            None => self.in_successor(observed),
        }
    }

    /// What to load the state with while there is no slot to attach to.
    fn unattached(&self) -> Ticket {
        Ticket::of(self.missing().unwrap_or_else(|| Observed::outage(coarse_now())), self.places.slot())
    }

    /// What there is to be seen while the table has no such key, which this holder may not create. Every process that could
    /// update the key attaches to it first.
    fn missing(&self) -> Option<Observed> {
        let latest = self.table.latest();
        let may_be_missing = self.read_only && !self.table.is_doubtful() && latest.slots().header().is_live();
        (may_be_missing && matches!(latest.find(&self.key), Ok(None))).then(|| Observed::missing(latest.number()))
    }

    /// Moves on until `action` succeeds, as the table may be replaced again and again.
    fn in_successor<R>(&self, action: impl Fn(&Place) -> Option<R>) -> Result<R, Error> {
        for _ in 0..ATTEMPTS {
            if let Some(result) = action(self.move_on()?) {
                return Ok(result);
            }
        }
        Err(self.error(ErrorKind::Retired))
    }

    /// An error about this key.
    pub(crate) fn error(&self, kind: ErrorKind) -> Error {
        self.explain(kind.into())
    }

    pub(crate) fn explain(&self, error: Error) -> Error {
        self.table.explain(error).with_key(self.key.as_str())
    }

    /// What the holder has seen, as a ticket.
    pub(crate) fn seen_ticket(&self) -> Ticket {
        Ticket::of(self.seen.get(), self.places.slot())
    }

    /// The key's slot, as far as this holder has moved on.
    pub(crate) fn place(&self) -> &Place {
        self.places.latest()
    }

    /// Whether somebody who has loaded the state with `ticket` need not wait any longer. A table that cannot be attached to
    /// is news twice a second.
    pub(crate) fn is_news(&self, ticket: Ticket) -> bool {
        self.table.revalidate_if_due(coarse_now());
        let is_lost = ticket.observed == Observed::NOTHING && !self.places.slot().word().is_live();
        (!is_lost || self.retry.is_long_ago(coarse_now())) && self.is_overtaken(ticket.observed)
    }

    /// Has the next update wake those who sleep on the table's wake word, unless this process cannot write to the table, and
    /// tells what there is now.
    pub(crate) fn await_news(&self) -> News {
        let place = self.places.latest();
        let is_live = place.word().is_live() && self.table.is_latest(place.owner());
        let word = if self.read_only || !is_live { place.word() } else { place.await_update() };
        let may_retry = is_live || self.retry.is_long_ago(coarse_now());
        News { word, is_live, is_doubtful: self.table.is_doubtful(), may_retry, read_only: self.read_only }
    }

    /// What was reported of the change that somebody with `ticket` finds now: for how many milliseconds it is not to be
    /// reported again, and a ticket for all that comes after it. `None` if there is none, or it was not reported yet.
    pub(crate) fn repeat(&self, ticket: Ticket) -> Option<(u64, Ticket)> {
        let present = self.unadopted(ticket)?;
        Some((self.pace.pause(ticket.observed, present.observed, coarse_now())?, present))
    }

    /// Notes that somebody with `ticket` is told that there is news. It does not count if that was sooner than is due: the
    /// time was up, or another thread was told as well.
    pub(crate) fn note_report(&self, ticket: Ticket) {
        let now = coarse_now();
        if let Some(present) = self.unadopted(ticket)
            && matches!(self.pace.pause(ticket.observed, present.observed, now), None | Some(0))
        {
            self.pace.report(ticket.observed, present.observed, now);
        }
    }

    /// What somebody with `ticket` could adopt. A table that cannot be attached to has a pace of its own.
    fn unadopted(&self, ticket: Ticket) -> Option<Ticket> {
        let word = self.places.slot().word();
        let present = Ticket::of(self.monitor.observed(word), self.places.slot());
        (word.is_live() && present.observed != ticket.observed).then_some(present)
    }

    /// How reports to tasks are paced.
    #[cfg(feature = "async")]
    pub(crate) fn pace(&self) -> &Pace {
        &self.pace
    }

    /// Whether nothing has happened since `ticket` was taken: no update, and none that is pending.
    #[inline]
    pub(crate) fn is_unchanged(&self, ticket: Ticket) -> bool {
        ticket.observed.is(self.places.slot().word())
    }

    /// Whether state that was loaded with `ticket` is fresh. The caller has seen to the budget.
    pub(crate) fn confirms(&self, ticket: Ticket) -> bool {
        ticket.is_of(self.places.slot()) && !self.is_overtaken(ticket.observed)
    }

    /// Takes a ticket: to be called before the state is loaded.
    ///
    /// Where freshness cannot be known, as there is no table to attach to, state that was loaded with the ticket serves for the
    /// [`outage_ttl`](crate::TableOptions::outage_ttl).
    ///
    /// # Progress
    ///
    /// Wait-free, as [`is_expired`](Self::is_expired), unless the table was replaced.
    #[inline]
    pub fn ticket(&self) -> Ticket {
        let slot = self.places.slot();
        match Observed::settled(slot.word()) {
            Some(observed) if !self.table.is_doubtful() => Ticket::of(observed, slot),
            _ => self.ticket_slow(),
        }
    }

    #[cold]
    fn ticket_slow(&self) -> Ticket {
        self.present().unwrap_or_else(|_| self.unattached())
    }

    /// As [`ticket`](Self::ticket), and why freshness cannot be known, if so.
    pub(crate) fn ticket_with_reason(&self) -> (Ticket, Option<Error>) {
        let ticket = self.ticket();
        if !ticket.is_unconfirmed() {
            return (ticket, None);
        }
        match self.present() {
            Ok(ticket) => (ticket, ticket.is_unconfirmed().then(|| self.error(ErrorKind::Unconfirmed))),
            Err(error) => {
                let ticket = self.unattached();
                (ticket, ticket.is_unconfirmed().then_some(error))
            }
        }
    }

    /// Adopts a ticket of this synchronizer: to be called when the state is loaded and in place. A ticket of another key or
    /// another [`Table`] leaves the state expired.
    ///
    /// # Progress
    ///
    /// Wait-free; shared memory is not touched.
    #[inline]
    pub fn adopt(&self, ticket: Ticket) {
        let is_own = ticket.is_of(self.places.slot());
        self.seen.adopt(if is_own { ticket.observed } else { Observed::NOTHING });
    }

    /// Loads the state with a ticket: takes it, runs `load`, adopts it.
    ///
    /// An update that is made during the load leaves the state expired.
    ///
    /// # Errors
    ///
    /// The error of `load`; then nothing is adopted.
    ///
    /// # Progress
    ///
    /// As [`ticket`](Self::ticket) and [`adopt`](Self::adopt), and whatever `load` does.
    pub fn refresh_with<T, E>(&self, load: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let ticket = self.ticket();
        let state = load()?;
        self.adopt(ticket);
        Ok(state)
    }

    /// Adopts the present generation, and returns it.
    ///
    /// As in Djblets, with its race: called after a load, it hides an update that was made during the load. Prefer
    /// [`refresh_with`](Self::refresh_with), or call it before the load.
    ///
    /// # Errors
    ///
    /// The table was replaced, and its successor cannot be attached to; then the state stays expired.
    ///
    /// # Progress
    ///
    /// As [`is_expired`](Self::is_expired).
    #[inline]
    pub fn refresh(&self) -> Result<Generation, Error> {
        let settled = Observed::settled(self.places.slot().word());
        match settled.and_then(|observed| Some((observed, observed.generation()?))) {
            Some((observed, generation)) if !self.table.is_doubtful() => {
                self.seen.adopt(observed);
                Ok(generation)
            }
            _ => self.refresh_slow(),
        }
    }

    #[cold]
    fn refresh_slow(&self) -> Result<Generation, Error> {
        let ticket = self.present()?;
        self.adopt(ticket);
        self.places.slot().word().generation().ok_or_else(|| self.error(ErrorKind::Retired))
    }

    /// Announces that the source was updated, and returns the new generation: every other holder's state is expired.
    ///
    /// The caller's own state counts as up to date afterwards if it was before: it knows what it wrote. If another
    /// process made an update in between, the caller has not seen that one, and is expired.
    ///
    /// To be called when the update of the source is complete. What the caller wrote before is visible to whoever finds
    /// the state expired because of it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ReadOnly`]; or the table was replaced, and its successor cannot be attached to, or something was mounted over
    /// it, and another table that is there cannot be: then the update is not announced there, and the call should be repeated.
    ///
    /// # Progress
    ///
    /// Wait-free: one atomic addition, no allocation, no system call. Now and then it also looks at a clock and at the
    /// file's path, as [`is_expired`](Self::is_expired) does: an update that went to a file which was deleted or replaced less
    /// than a second before is announced again when that is noticed. Use [`update`](Self::update) where that must not
    /// depend on a later use. If somebody waits for the key, one or two system calls wake them, which do not sleep.
    ///
    /// Not wait-free when the table was replaced: then as [`is_expired`](Self::is_expired).
    #[inline]
    pub fn mark_updated(&self) -> Result<Generation, Error> {
        self.bump(|before| self.seen.follow(before))
    }

    /// Expires the state of every holder, the caller's too.
    ///
    /// In Djblets this removes the generation from the cache, and the next one may be the old one again. Here it is one
    /// more update, which the caller does not adopt.
    ///
    /// # Errors
    ///
    /// As [`mark_updated`](Self::mark_updated).
    ///
    /// # Progress
    ///
    /// As [`mark_updated`](Self::mark_updated).
    pub fn clear(&self) -> Result<(), Error> {
        self.bump(|_| ()).map(drop)
    }

    #[inline]
    fn bump(&self, follow: impl FnOnce(Word)) -> Result<Generation, Error> {
        if self.is_detoured {
            return self.bump_detoured();
        }
        let before = self.places.slot().bump();
        let Some(generation) = before.updated_unawaited() else {
            return self.bump_slow(before, follow);
        };
        follow(before);
        if self.budget.spend() { Ok(generation) } else { self.revalidate_after(generation) }
    }

    #[cold]
    #[inline(never)]
    fn bump_detoured(&self) -> Result<Generation, Error> {
        self.check_writable()?;
        self.bump_slow(self.places.slot().bump(), |_| ())
    }

    pub(crate) fn check_writable(&self) -> Result<(), Error> {
        if self.read_only { self.refuse() } else { Ok(()) }
    }

    #[cold]
    #[inline(never)]
    fn refuse<R>(&self) -> Result<R, Error> {
        Err(self.error(ErrorKind::ReadOnly))
    }

    /// Gives `generation` back, so that a caller that ends with this need not keep it.
    #[cold]
    fn revalidate_after(&self, generation: Generation) -> Result<Generation, Error> {
        self.revalidate();
        if self.table.is_doubtful() {
            self.table.announce_elsewhere(&self.key).map_err(|error| self.explain(error))?;
        }
        Ok(generation)
    }

    /// Somebody waits for the update that found `before`, or it must be made in the successor.
    #[cold]
    fn bump_slow(&self, before: Word, follow: impl FnOnce(Word)) -> Result<Generation, Error> {
        let Some(generation) = before.updated() else { return self.bump_successor() };
        // If another thread has moved on since, this wakes others in vain, and those at the old place were woken when it was
        // retired.
        self.announce(self.places.latest(), before);
        follow(before);
        if self.budget.spend() { Ok(generation) } else { self.revalidate_after(generation) }
    }

    /// The table was retired when the update came: make it in the successor. Nobody who attaches there can have loaded
    /// the state before this process found the retired bit, but for the update's being made.
    fn bump_successor(&self) -> Result<Generation, Error> {
        self.in_successor(|place| self.announce(place, place.bump()).updated())
    }

    fn announce(&self, place: &Place, before: Word) -> Word {
        place.owner().slots().announce(place, before)
    }

    /// Counts an update in, in the latest incarnation, where `lock` must be taken first. Gives the place, and the lock.
    ///
    /// If the file is gone, waits for updates in flight there, for as long as `patience` says is left.
    pub(crate) fn begin<L>(
        &self,
        lock: impl Fn(&Place) -> Result<L, Error>,
        patience: impl Fn() -> Duration,
    ) -> Result<(&Place, L), Error> {
        // In a file that is gone, as updates in flight keep this process there: `follow_update` announces it in the new one.
        let mut stays = false;
        for _ in 0..ATTEMPTS {
            let place = self.places.latest();
            // Whoever retires a table holds a lock against this one, so it does not happen from here on.
            let held = lock(place);
            if !stays && place.owner().is_gone() {
                // A lock in the old file would keep this process there.
                drop(held);
                stays = !self.table.leave_for_update(place.owner(), patience())?;
                if !stays {
                    self.move_on()?;
                }
                continue;
            }
            // The header is asked as well: whoever was retiring the table may have died before coming to this slot.
            if place.owner().slots().header().is_live() && place.word().is_live() {
                // Not asked before: it may be that there is nothing left to lock.
                let held = held?;
                if place.begin_update().is_live() {
                    place.owner().count_own_update();
                    return Ok((place, held));
                }
            }
            self.move_on()?;
        }
        Err(self.error(ErrorKind::Retired))
    }

    /// Counts an update out that was begun at `place`, and announces it. The holder follows it if it `knows` what is in the
    /// source now.
    pub(crate) fn finish(&self, place: &Place, knows: bool) -> Result<Generation, Error> {
        place.owner().count_own_update_out();
        let before = self.announce(place, place.finish_update());
        match before.updated() {
            Some(generation) => {
                if knows && !self.is_detoured {
                    self.seen.follow(before);
                }
                Ok(generation)
            }
            None => self.bump_successor(),
        }
    }

    /// Counts an update out that was begun at `place`, and changed nothing.
    pub(crate) fn abandon(&self, place: &Place) {
        place.owner().count_own_update_out();
        place.abandon_update();
    }

    /// Announces an update that was finished at `place`, and whose lock was let go of, in the file that the path names by now
    /// as well.
    pub(crate) fn follow_update(&self, place: &Place) -> Result<(), Error> {
        self.table.follow_update(place.owner(), &self.key).map_err(|error| self.explain(error))
    }

    /// The generation that the holder has seen; `None` if it was lost with a table that was replaced, or cannot be confirmed,
    /// or if a table that is read only has no such key.
    ///
    /// # Progress
    ///
    /// Wait-free; no system call.
    #[must_use]
    pub fn sync_gen(&self) -> Option<Generation> {
        self.seen.get().generation()
    }

    /// The key, normalized.
    ///
    /// # Progress
    ///
    /// Wait-free; no system call.
    #[must_use]
    pub fn cache_key(&self) -> &CacheKey {
        &self.key
    }

    /// The table.
    ///
    /// # Progress
    ///
    /// Wait-free; no system call.
    #[must_use]
    pub fn table(&self) -> &Table {
        &self.table
    }
}

/// What was last tried.
#[derive(Debug, Default)]
pub(crate) struct LastTried(AtomicU64);

// ORDERING: relaxed throughout: a thread that finds an old one tries once more.
impl LastTried {
    pub(crate) fn differs(&self, what: usize) -> bool {
        self.0.load(Ordering::Relaxed) != what as u64
    }

    pub(crate) fn set(&self, what: usize) {
        self.0.store(what as u64, Ordering::Relaxed);
    }
}

//! What one holder has seen of one key.

mod budget;
mod freshness;
mod news;
mod pace;
mod pending;
mod ticket;
pub(crate) mod update;

pub use ticket::Ticket;
pub use update::{Update, UpdateError, update_all};

use std::sync::Arc;

pub(crate) use self::budget::CheckBudget;
use self::freshness::LastTried;
use self::pace::Pace;
use self::pending::PendingMonitor;
use crate::error::{Error, ErrorKind};
use crate::generation::Generation;
use crate::key::CacheKey;
use crate::os::mapping::Places;
use crate::os::pause::Backoff;
use crate::protocol::observed::{LastObserved, Observed};
use crate::protocol::word::Word;
use crate::table::incarnation::{Incarnation, Place};
use crate::table::{PAUSE, Table};

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

impl Clone for GenerationSynchronizer {
    /// Another synchronizer of the same key, which has seen what this one has seen. It allocates, and makes no system call.
    fn clone(&self) -> Self {
        let places = Places::new(self.places.latest().clone());
        Self::assemble(places, self.seen.get(), self.table.clone(), self.key.clone(), Arc::clone(&self.monitor))
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

    /// Spends one use of the budget; `false` if [`revalidate`](Self::revalidate) is to be called.
    #[inline]
    pub(crate) fn spend(&self) -> bool {
        self.budget.spend()
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

//! What one holder has seen of one key.

mod budget;
mod freshness;
mod news;
mod pace;
mod pending;
mod ticket;
pub(crate) mod update;

pub(crate) use ticket::HeldTicket;
pub use ticket::Ticket;
pub use update::{Update, UpdateError, update_all};

use std::sync::Arc;

pub(crate) use self::budget::{CheckBudget, LastGrant};
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
/// generation of the key.
///
/// The *holder* is the code that keeps the state. Each process has its own synchronizer for each key of which it holds state. A
/// synchronizer may be made before a fork and used after it, in the parent and in its children. Threads may share one if they
/// share the state, under a lock that guards the state; threads with state of their own need a synchronizer of their own (which
/// is faster, too, unless it stands beside that of another thread: two neighbours in memory share a cache line, to which each use
/// writes). Dropping one changes nothing that is shared.
///
/// The names and their meanings are those of Djblets' class, without its races.
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
/// // A process that changes the source announces it after the change is complete:
/// sync.mark_updated()?;
/// # drop(settings);
/// # Ok(()) }
/// ```
// A server that keeps the state of thousands of keys fresh pays for a check with the cache lines that it misses, not with
// instructions. So what a check, a ticket or an update reads of this process's memory is 32 bytes, aligned so that they never lie
// across two lines: two synchronizers stand in one line of an array. Whatever else there is stands behind one pointer.
#[derive(Debug)]
#[repr(C, align(32))]
pub struct GenerationSynchronizer {
    /// The key's slot; and the pointer to what is used seldom.
    places: Places<Incarnation, Cold>,
    /// What is compared with the slot's word.
    seen: LastObserved,
    /// How many uses are left before the clock is read: the only field that a check writes.
    budget: CheckBudget,
    /// Whether updates take the slow path: because the table is read-only, or because the holder does not adopt its own updates.
    is_detoured: bool,
}

const _: () = assert!(size_of::<GenerationSynchronizer>() == 32 && align_of::<GenerationSynchronizer>() == 32);

/// What a check that finds the state fresh does not use. First, and together, what is used when the budget is spent.
#[derive(Debug)]
#[repr(C)]
struct Cold {
    /// The grant of the budget.
    grant: LastGrant,
    table: Table,
    /// Shared by all clones, as what a clone has seen refers to losses by their numbers in this monitor.
    monitor: Arc<PendingMonitor>,
    key: CacheKey,
    read_only: bool,
    /// When the next attempt to attach to a successor may be made.
    retry: Backoff,
    /// The address of the incarnation with which the last attempt was made, plus one if it had been retired for good by then.
    tried: LastTried,
    /// How soon a change that is not adopted is reported to waiters again.
    pace: Pace,
}

impl Clone for GenerationSynchronizer {
    /// Another synchronizer of the same key, which has seen what this one has seen. Allocates, and makes no system call.
    fn clone(&self) -> Self {
        let Cold { table, key, monitor, .. } = self.cold();
        Self::assemble(self.place().clone(), self.seen.get(), table.clone(), key.clone(), Arc::clone(monitor))
    }
}

impl GenerationSynchronizer {
    /// Attaches to `key`, and creates its generation if it is new.
    ///
    /// The present generation counts as seen, as in Djblets: a caller that has loaded the state before this call must check it
    /// against a [`ticket`](Self::ticket) taken before that load, or load it again with
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
    /// Lock-free, and allocates. It makes system calls if the table must grow, and checks the file's path up to twice a second.
    /// If the table was replaced, as [`is_expired`](Self::is_expired).
    pub fn new(table: &Table, key: impl Into<CacheKey>) -> Result<Self, Error> {
        let key = table.normalize(key)?;
        let place = table.attach(&key)?;
        let observed = Observed::of(place.word());
        Ok(Self::assemble(place, observed, table.clone(), key, Arc::new(PendingMonitor::new())))
    }

    /// As [`new`](Self::new), for a `key` that is normalized already. If it cannot be attached to now, as the table was replaced or
    /// as this process may not create it, the synchronizer keeps trying, as one does whose table was replaced.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::TableFull`].
    #[cfg(feature = "map")]
    pub(crate) fn new_or_unattached(table: &Table, key: CacheKey) -> Result<Self, Error> {
        let (place, observed) = match table.attach(&key) {
            Ok(place) => {
                let observed = Observed::of(place.word());
                (place, observed)
            }
            Err(error) if matches!(error.kind(), ErrorKind::TableFull { .. }) => return Err(error),
            Err(_) => (Place::nowhere(table.latest()), Observed::NOTHING),
        };
        let sync = Self::assemble(place, observed, table.clone(), key, Arc::new(PendingMonitor::new()));
        Ok(sync.without_following())
    }

    fn assemble(place: Place, observed: Observed, table: Table, key: CacheKey, monitor: Arc<PendingMonitor>) -> Self {
        let (read_only, grant) = (table.is_read_only(), LastGrant::new());
        let (retry, tried, pace) = (Backoff::up_to(PAUSE), LastTried::default(), Pace::new());
        let places = Places::new(place, Cold { grant, table, monitor, key, read_only, retry, tried, pace });
        let (seen, budget) = (LastObserved::new(observed), CheckBudget::new());
        Self { places, seen, budget, is_detoured: read_only }
    }

    fn cold(&self) -> &Cold {
        self.places.cold()
    }

    /// Does not adopt its own updates from here on: for a holder that must load even what it has written itself. A clone adopts
    /// its own updates again.
    pub(crate) fn without_following(mut self) -> Self {
        self.is_detoured = true;
        self
    }

    /// Whether the state must be loaded again, because its key was updated since the generation was seen.
    ///
    /// If the table was replaced and its successor cannot be attached to, freshness cannot be known. Then the answer is `true`
    /// until the state is loaded, and again when the [`outage_ttl`](crate::TableOptions::outage_ttl) has passed. After a
    /// [reset](Table::reset), a process that has the table open read-only finds no key until a writer attaches to the key again:
    /// state that it loads meanwhile is fresh for as long as the key is missing.
    ///
    /// The first check that comes at least a second after the table's file was deleted or replaced notices it. A holder that
    /// checks often reads a clock once in a quarter of a second, or once in 64 checks if that is sooner. So if the rate of
    /// checks suddenly falls, up to 64 more checks may pass before it notices.
    ///
    /// # Progress
    ///
    /// Wait-free: one load of shared memory, no allocation, no system call. After an update, and now and then as described above,
    /// it also reads a clock, and up to twice a second it checks the file's path.
    ///
    /// It is not wait-free, makes system calls and allocates in two cases. While an update is pending, it asks the kernel at most
    /// once a millisecond whether the maker's lock is held, and announces the update in place of a maker that was killed. If the
    /// table was replaced, it opens the successor, which may involve file input and output, creating the file, and sleeping while
    /// another process creates it, for some seconds if that process is stopped.
    #[inline]
    #[must_use]
    pub fn is_expired(&self) -> bool {
        self.is_expired_by(self.seen.get())
    }

    /// Whether state that was loaded with `ticket` must be loaded again: [`is_expired`](Self::is_expired) for state that is kept
    /// together with its ticket, such as a value that threads replace as a whole.
    ///
    /// # Progress
    ///
    /// As [`is_expired`](Self::is_expired).
    #[inline]
    #[must_use]
    pub fn is_expired_since(&self, ticket: Ticket) -> bool {
        if ticket.is_of(self.places.slot()) { self.is_expired_by(ticket.observed) } else { self.is_expired_elsewhere() }
    }

    /// Spends one use of the budget; `false` if none was left, and [`revalidate`](Self::revalidate) must be called.
    #[inline]
    pub(crate) fn spend(&self) -> bool {
        self.budget.spend()
    }

    /// An error about this key.
    pub(crate) fn error(&self, kind: ErrorKind) -> Error {
        self.explain(kind.into())
    }

    pub(crate) fn explain(&self, error: Error) -> Error {
        self.table().explain(error).with_key(self.cache_key().as_str())
    }

    /// What the holder has seen, as a ticket.
    pub(crate) fn seen_ticket(&self) -> Ticket {
        Ticket::of(self.seen.get(), self.places.slot())
    }

    /// The key's slot, as far as this holder has moved on.
    pub(crate) fn place(&self) -> &Place {
        self.places.latest()
    }

    /// Whether the key has not been updated since `ticket` was taken, and no update is pending.
    #[inline]
    pub(crate) fn is_unchanged(&self, ticket: Ticket) -> bool {
        ticket.observed.is(self.places.slot().word())
    }

    /// As [`is_unchanged`](Self::is_unchanged), for a ticket that may be of another place than the latest one.
    #[inline]
    pub(crate) fn is_unchanged_since(&self, ticket: Ticket) -> bool {
        let slot = self.places.slot();
        ticket.is_of(slot) && ticket.observed.is(slot.word())
    }

    /// Whether state that was loaded with `ticket` is fresh. The caller has spent the budget, or revalidated.
    pub(crate) fn confirms(&self, ticket: Ticket) -> bool {
        ticket.is_of(self.places.slot()) && !self.is_overtaken(ticket.observed)
    }

    /// Takes a ticket: to be called before the state is loaded.
    ///
    /// If freshness cannot be known, because there is no table to attach to, state that is loaded with the ticket counts as fresh
    /// for the [`outage_ttl`](crate::TableOptions::outage_ttl).
    ///
    /// # Progress
    ///
    /// Wait-free, as [`is_expired`](Self::is_expired), unless the table was replaced.
    #[inline]
    pub fn ticket(&self) -> Ticket {
        let slot = self.places.slot();
        match Observed::settled(slot.word()) {
            Some(observed) if !Table::is_any_doubtful() => Ticket::of(observed, slot),
            _ => self.ticket_slow(),
        }
    }

    #[cold]
    fn ticket_slow(&self) -> Ticket {
        self.present().unwrap_or_else(|_| self.unattached())
    }

    /// As [`ticket`](Self::ticket), with the reason if freshness cannot be known.
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
    /// Wait-free; does not access the shared memory.
    #[inline]
    pub fn adopt(&self, ticket: Ticket) {
        let is_own = ticket.is_of(self.places.slot());
        self.seen.adopt(if is_own { ticket.observed } else { Observed::NOTHING });
    }

    /// Loads the state with a ticket: takes a ticket, runs `load`, and adopts the ticket.
    ///
    /// An update that is made during the load leaves the state expired.
    ///
    /// # Errors
    ///
    /// The error of `load`; then the ticket is not adopted.
    ///
    /// # Progress
    ///
    /// As [`ticket`](Self::ticket), [`adopt`](Self::adopt) and `load`.
    pub fn refresh_with<T, E>(&self, load: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let ticket = self.ticket();
        let state = load()?;
        self.adopt(ticket);
        Ok(state)
    }

    /// Adopts the present generation, and returns it.
    ///
    /// This has the race of the Djblets method of this name: called after a load, it hides an update that was made during the
    /// load. Prefer [`refresh_with`](Self::refresh_with), or call this before the load.
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
            Some((observed, generation)) if !Table::is_any_doubtful() => {
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

    /// Announces that the source was updated, and returns the new generation: the state of every other holder is expired.
    ///
    /// The caller's own state counts as fresh afterwards if it was fresh before, as the caller knows what it wrote. If another
    /// process made an update in between, the caller has not seen that update, and its state is expired.
    ///
    /// To be called when the update of the source is complete. What the caller wrote before this call is visible to each holder
    /// that finds its state expired because of it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ReadOnly`]; or the table was replaced, and its successor cannot be attached to; or something was mounted over
    /// the table, and the other table that its path leads to now cannot be attached to. In these cases the update is not
    /// announced there, and the call should be repeated.
    ///
    /// # Progress
    ///
    /// Wait-free: one atomic addition, no allocation, no system call. Now and then it also reads a clock and checks the file's
    /// path, as [`is_expired`](Self::is_expired) does: an update that went to a file which was deleted or replaced less than a
    /// second before is announced again when a later use notices that. Where this must not depend on a later use, call
    /// [`update`](Self::update). If there are waiters for the key, one or two system calls wake them; these do not sleep.
    ///
    /// Not wait-free if the table was replaced: then as [`is_expired`](Self::is_expired).
    #[inline]
    pub fn mark_updated(&self) -> Result<Generation, Error> {
        self.bump(|before| self.seen.follow(before))
    }

    /// Expires the state of every holder, the caller's too.
    ///
    /// In Djblets, this removes the generation from the cache, and the next generation may be equal to the old one. Here it is
    /// one more update, which the caller does not adopt.
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
        if self.cold().read_only { self.refuse() } else { Ok(()) }
    }

    #[cold]
    #[inline(never)]
    fn refuse<R>(&self) -> Result<R, Error> {
        Err(self.error(ErrorKind::ReadOnly))
    }

    /// Returns `generation`, so that a caller that ends with this call need not save it in between.
    #[cold]
    fn revalidate_after(&self, generation: Generation) -> Result<Generation, Error> {
        self.revalidate();
        if self.table().is_doubtful() {
            self.table().announce_elsewhere(self.cache_key()).map_err(|error| self.explain(error))?;
        }
        Ok(generation)
    }

    /// Completes an update that found `before` and is not plain: there are waiters to wake, it must be made in the successor, or
    /// the holder does not adopt it.
    #[cold]
    fn bump_slow(&self, before: Word, follow: impl FnOnce(Word)) -> Result<Generation, Error> {
        let Some(generation) = before.updated() else { return self.bump_successor() };
        // If another thread has moved on to a new place since the update was made, this needlessly wakes the waiters there. The
        // waiters at the old place were woken when it was retired.
        self.announce(self.places.latest(), before);
        follow(before);
        if self.budget.spend() { Ok(generation) } else { self.revalidate_after(generation) }
    }

    /// Makes an update in the successor, as the table was retired when the update came. Holders of the old table are expired by
    /// its retirement. A holder that attaches to the successor before this update is made there is expired by the update.
    fn bump_successor(&self) -> Result<Generation, Error> {
        self.in_successor(|place| self.announce(place, place.bump()).updated())
    }

    fn announce(&self, place: &Place, before: Word) -> Word {
        place.owner().slots().announce(place, before)
    }

    /// The generation that the holder has seen; `None` if it was lost with a table that was replaced, if it cannot be confirmed,
    /// or if a read-only table has no such key.
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
        &self.cold().key
    }

    /// The table.
    ///
    /// # Progress
    ///
    /// Wait-free; no system call.
    #[must_use]
    pub fn table(&self) -> &Table {
        &self.cold().table
    }
}

//! What one holder has seen of one key.

use crate::error::{Error, ErrorKind};
use crate::generation::Generation;
use crate::handle::{ATTEMPTS, PAUSE, Table, coarse_now, precise_now};
use crate::incarnation::{Incarnation, Place};
use crate::key::CacheKey;
use crate::lock::Kind;
use crate::mapping::Places;
use crate::slot::{Countdown, Pace, Seen, Sight, Turn, Vigil, Word};

/// Every so many updates of a key, its updater looks at the clock, and at the file if it is time.
const UPDATES_PER_LOOK: u64 = 64;

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
    seen: Seen,
    countdown: Countdown,
    read_only: bool,
    // The rest is for what is done seldom.
    table: Table,
    key: CacheKey,
    /// When the next attempt to attach to a successor may be made.
    retry: Turn,
    vigil: Vigil,
    /// How soon those who wait are told again of what they do not adopt.
    pace: Pace,
}

/// What a look at a key finds for those who wait for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct News {
    word: Word,
    is_live: bool,
    /// Whether those who have seen nothing are told of a table that cannot be attached to.
    may_retry: bool,
    read_only: bool,
}

impl News {
    /// Whether there is any for `ticket`; `sync` is what gave this.
    pub(crate) fn is_for(self, sync: &GenerationSynchronizer, ticket: Ticket) -> bool {
        let may_be = !(self.is_live && ticket.0.is(self.word)) && (self.may_retry || ticket != Ticket::VOID);
        may_be && sync.is_overtaken(ticket.0)
    }

    /// The word of which there is no news for those to whom there was none; zero if there may be, as a pending update must be
    /// looked after.
    pub(crate) fn quiet(self) -> u64 {
        match self.is_live && self.word.pending() == 0 {
            true if self.read_only => self.word.bits(),
            true => self.word.awaited().bits(),
            false => 0,
        }
    }
}

impl Clone for GenerationSynchronizer {
    /// Another synchronizer of the same key, which has seen what this one has seen.
    fn clone(&self) -> Self {
        let places = Places::new(self.places.latest().clone());
        Self::assemble(places, self.seen.get().without_loss(), self.table.clone(), self.key.clone())
    }
}

/// The generation from before a load, to be [adopted](GenerationSynchronizer::adopt) after it.
///
/// An update during the load makes the generation another one, so that state loaded with this ticket stays expired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a ticket does nothing until it is adopted"]
pub struct Ticket(Sight);

impl Ticket {
    /// Of which nothing is fresh.
    pub(crate) const VOID: Self = Self(Sight::NOTHING);

    pub(crate) fn may_sleep_on(self, word: Word) -> bool {
        self.0.may_sleep_on(word)
    }

    /// The generation that it stands for; `None` if there was no table to attach to.
    #[must_use]
    pub fn generation(self) -> Option<Generation> {
        self.0.generation()
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
    /// Lock-free; it makes system calls if the table must grow.
    pub fn new(table: &Table, key: impl Into<CacheKey>) -> Result<Self, Error> {
        let key = table.normalize(key)?;
        let place = table.attach(&key)?;
        let sight = Sight::of(place.word());
        Ok(Self::assemble(Places::new(place), sight, table.clone(), key))
    }

    fn assemble(places: Places<Incarnation>, sight: Sight, table: Table, key: CacheKey) -> Self {
        let (seen, countdown, read_only) = (Seen::new(sight), Countdown::new(), table.is_read_only());
        Self {
            places,
            seen,
            countdown,
            read_only,
            table,
            key,
            retry: Turn::at(0),
            vigil: Vigil::new(),
            pace: Pace::new(),
        }
    }

    /// Whether the state must be loaded again: its key was updated since the generation was seen.
    ///
    /// Where that cannot be known, because the table was replaced and its successor cannot be attached to, the answer
    /// is `true`. A table whose file was deleted or replaced is noticed within 64 checks or one second, whichever is
    /// later.
    ///
    /// # Progress
    ///
    /// Wait-free: one load of shared memory, no allocation, no system call. After an update, and every 64 checks, it
    /// also looks at a clock, and up to twice a second at the file's path.
    #[inline]
    #[must_use]
    pub fn is_expired(&self) -> bool {
        self.is_expired_since(Ticket(self.seen.get()))
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
        let word = self.places.slot().word();
        if ticket.0.is(word) && self.countdown.tick() {
            return false;
        }
        self.is_expired_slow(ticket.0, word)
    }

    #[cold]
    fn is_expired_slow(&self, seen: Sight, word: Word) -> bool {
        // A pending update brings every check here.
        if !(seen.is_before_updates_of(word) && self.countdown.tick()) {
            self.look();
        }
        self.is_overtaken(seen)
    }

    fn is_overtaken(&self, seen: Sight) -> bool {
        let word = self.places.slot().word();
        if word.is_live() && self.table.is_latest(self.places.latest().owner()) {
            return !self.is_fresh(seen, word);
        }
        let now = coarse_now();
        if self.retry.is_due(now) && self.move_on().is_err() {
            self.retry.postpone(now + PAUSE);
        }
        true
    }

    fn is_fresh(&self, seen: Sight, word: Word) -> bool {
        if word.pending() == 0 {
            self.vigil.end();
        }
        seen.is(word) || seen.is_before_updates_of(word) && self.is_in_flight(seen, word)
    }

    /// Whether the updates that `word` says are pending have a maker who may still finish them, so that what was `seen` is
    /// as fresh as before. If not, this is their end: the key is updated in their place.
    fn is_in_flight(&self, seen: Sight, word: Word) -> bool {
        let now = precise_now();
        let is_old = || u128::from(self.vigil.age(word, now)) >= self.table.pending_limit().as_micros();
        let has_lost = self.vigil.has_lost(word);
        if has_lost && !is_old() {
            return seen == self.vigil.sight(word);
        }
        if !has_lost && !self.vigil.is_due(now) {
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
                Some(Kind::Shared) if !is_old() => return true,
                Some(Kind::Shared) if self.read_only => break,
                Some(Kind::Shared) => {
                    self.announce(place, place.expire());
                    return false;
                }
                // Somebody else is about to recover them.
                Some(Kind::Exclusive) => std::thread::yield_now(),
                // Whoever made them may have abandoned them just before: so it is asked again.
                None if self.read_only => std::thread::yield_now(),
                // If that fails for now, somebody else was faster, or another update has begun.
                None if place.owner().recover(place).is_err() => break,
                None => {}
            }
        }
        // They are lost, but not for all. Should one have been abandoned and another begun each time that this process looked,
        // then the loss is none, and hides one that comes later. So it holds no longer than the limit.
        self.vigil.lose(word, now);
        false
    }

    /// To be called every `CHECKS_PER_LOOK` checks.
    #[cold]
    pub(crate) fn look(&self) {
        self.countdown.restart();
        self.table.look_if_due();
    }

    /// Attaches to the key in the latest incarnation of the table. Nothing seen before counts there.
    fn move_on(&self) -> Result<&Place, Error> {
        self.seen.adopt(Sight::NOTHING);
        self.places.append(self.table.attach(&self.key)?);
        Ok(self.places.latest())
    }

    fn present(&self) -> Result<Sight, Error> {
        let word = self.places.slot().word();
        if word.is_live() {
            return Ok(self.vigil.sight(word));
        }
        self.in_successor(|place| Some(place.word()).filter(|word| word.is_live()).map(Sight::of))
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
        Ticket(self.seen.get())
    }

    /// The key's slot, as far as this holder has moved on.
    pub(crate) fn place(&self) -> &Place {
        self.places.latest()
    }

    /// Whether somebody who has loaded the state with `ticket` need not wait any longer. A table that cannot be attached to
    /// is news as often as that is tried.
    pub(crate) fn is_news(&self, ticket: Ticket) -> bool {
        self.table.look_if_due();
        let is_lost = ticket.0 == Sight::NOTHING && !self.places.slot().word().is_live();
        (!is_lost || self.retry.is_due(coarse_now())) && self.is_overtaken(ticket.0)
    }

    /// Has the next update wake those who sleep on the table's wake word, unless this process cannot write to the table, and
    /// tells what there is now.
    pub(crate) fn await_news(&self) -> News {
        let place = self.places.latest();
        let is_live = place.word().is_live() && self.table.is_latest(place.owner());
        let word = if self.read_only || !is_live { place.word() } else { place.await_update() };
        News { word, is_live, may_retry: is_live || self.retry.is_due(coarse_now()), read_only: self.read_only }
    }

    /// What was reported of the change that somebody with `ticket` finds now: for how many milliseconds it is not to be
    /// reported again, and a ticket for all that comes after it. `None` if there is none, or it was not reported yet.
    pub(crate) fn repeat(&self, ticket: Ticket) -> Option<(u64, Ticket)> {
        let present = self.unadopted(ticket)?;
        Some((self.pace.pause(ticket.0, present.0, coarse_now())?, present))
    }

    /// Notes that somebody with `ticket` is told that there is news. It does not count if that was sooner than is due: the
    /// time was up, or another thread was told as well.
    pub(crate) fn note_report(&self, ticket: Ticket) {
        let now = coarse_now();
        if let Some(present) = self.unadopted(ticket)
            && matches!(self.pace.pause(ticket.0, present.0, now), None | Some(0))
        {
            self.pace.report(ticket.0, present.0, now);
        }
    }

    /// What somebody with `ticket` could adopt. A table that cannot be attached to has a pace of its own.
    fn unadopted(&self, ticket: Ticket) -> Option<Ticket> {
        let word = self.places.slot().word();
        let present = Ticket(self.vigil.sight(word));
        (word.is_live() && present != ticket).then_some(present)
    }

    /// How reports to tasks are paced.
    #[cfg(feature = "tokio")]
    pub(crate) fn pace(&self) -> &Pace {
        &self.pace
    }

    /// Whether nothing has happened since `ticket` was taken: no update, and none that is pending.
    #[inline]
    pub(crate) fn is_unchanged(&self, ticket: Ticket) -> bool {
        ticket.0.is(self.places.slot().word())
    }

    /// Takes a ticket: to be called before the state is loaded.
    ///
    /// Without a table to attach to, the ticket is void: adopting it leaves the state expired.
    ///
    /// # Progress
    ///
    /// Wait-free, as [`is_expired`](Self::is_expired), unless the table was replaced.
    #[inline]
    pub fn ticket(&self) -> Ticket {
        self.places.slot().word().settled().map_or_else(|| self.ticket_slow(), Ticket)
    }

    #[cold]
    fn ticket_slow(&self) -> Ticket {
        Ticket(self.present().unwrap_or(Sight::NOTHING))
    }

    /// Adopts a ticket of this synchronizer: to be called when the state is loaded and in place.
    ///
    /// # Progress
    ///
    /// Wait-free; shared memory is not touched.
    #[inline]
    pub fn adopt(&self, ticket: Ticket) {
        self.seen.adopt(ticket.0);
    }

    /// Loads the state with a ticket: takes it, runs `load`, adopts it.
    ///
    /// An update that is made during the load leaves the state expired.
    ///
    /// # Errors
    ///
    /// The error of `load`; then nothing is adopted.
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
        let settled = self.places.slot().word().settled();
        match settled.and_then(|sight| Some((sight, sight.generation()?))) {
            Some((sight, generation)) => {
                self.seen.adopt(sight);
                Ok(generation)
            }
            None => self.refresh_slow(),
        }
    }

    #[cold]
    fn refresh_slow(&self) -> Result<Generation, Error> {
        let present = self.present()?;
        self.seen.adopt(present);
        present.generation().ok_or_else(|| self.error(ErrorKind::Retired))
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
    /// [`ErrorKind::ReadOnly`]; or the table was replaced, and its successor cannot be attached to: then the update is
    /// not announced, and the call should be repeated.
    ///
    /// # Progress
    ///
    /// Wait-free: one atomic addition, no allocation, no system call. The 64th update of a
    /// key, and each 64th after it, also looks at a clock, and up to twice a second at the file's path.
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
        if self.read_only {
            return self.refuse();
        }
        let before = self.places.slot().bump();
        let Some(generation) = before.updated_unawaited() else {
            return self.bump_slow(before, follow);
        };
        follow(before);
        if generation.get().is_multiple_of(UPDATES_PER_LOOK) { self.look_at(generation) } else { Ok(generation) }
    }

    pub(crate) fn check_writable(&self) -> Result<(), Error> {
        if self.read_only { self.refuse() } else { Ok(()) }
    }

    #[cold]
    #[inline(never)]
    fn refuse<R>(&self) -> Result<R, Error> {
        Err(self.error(ErrorKind::ReadOnly))
    }

    /// Looks, and gives `generation` back, so that whoever calls this last need not keep it.
    #[cold]
    fn look_at(&self, generation: Generation) -> Result<Generation, Error> {
        self.look();
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
        Ok(generation)
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
    pub(crate) fn begin<L>(&self, lock: impl Fn(&Place) -> Result<L, Error>) -> Result<(&Place, L), Error> {
        for _ in 0..ATTEMPTS {
            let place = self.places.latest();
            // Whoever retires a table holds a lock against this one, so it does not happen from here on.
            let held = lock(place);
            // The header is asked as well: whoever was retiring the table may have died before coming to this slot.
            if place.owner().slots().header().is_live() && place.word().is_live() {
                // Not asked before: it may be that there is nothing left to lock.
                let held = held?;
                if place.begin_update().is_live() {
                    return Ok((place, held));
                }
            }
            self.move_on()?;
        }
        Err(self.error(ErrorKind::Retired))
    }

    /// Counts an update out that was begun at `place`, and announces it.
    pub(crate) fn finish(&self, place: &Place) -> Result<Generation, Error> {
        let before = self.announce(place, place.finish_update());
        match before.updated() {
            Some(generation) => {
                self.seen.follow(before);
                Ok(generation)
            }
            None => self.bump_successor(),
        }
    }

    /// The generation that the holder has seen; `None` if it was lost with a table that was replaced.
    #[must_use]
    pub fn sync_gen(&self) -> Option<Generation> {
        self.seen.get().generation()
    }

    /// The key, normalized.
    #[must_use]
    pub fn cache_key(&self) -> &CacheKey {
        &self.key
    }

    /// The table.
    #[must_use]
    pub fn table(&self) -> &Table {
        &self.table
    }
}

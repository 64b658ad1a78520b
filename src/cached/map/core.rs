//! What the blocking and the asynchronous map share: all but the loader.

use std::borrow::Borrow;
use std::cell::RefCell;
use std::hash::Hash;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::attended::{Attended, State};
use super::store::{Limits, Store};
use super::usage::Usage;
use super::waits::Waits;
use crate::cached::cell::{self, Cell, Replaced};
use crate::cached::counters::{Counters, Metrics};
use crate::cached::dependencies::depend_on_value;
use crate::cached::load::GetOptions;
use crate::cached::period::Period;
use crate::cached::policy::{Policy, Verification};
use crate::cached::scope::Scope;
use crate::cached::single_flight::SingleFlight;
use crate::cached::value::{Entry, Freshness, Peek, Residence};
use crate::error::{Error, ErrorKind};
use crate::key::CacheKey;
use crate::os::clock::coarse_now;
use crate::os::fork::ForkCarried;
use crate::os::pause::Throttle;
use crate::synchronizer::{GenerationSynchronizer, Ticket};
use crate::table::Table;

type MakeKey<K> = Box<dyn Fn(&K) -> CacheKey + Send + Sync>;

/// How a map is to be; what its builder collects.
pub(super) struct Options<K, V> {
    pub(super) table: Table,
    make_key: MakeKey<K>,
    pub(super) generations: Option<u32>,
    pub(super) limits: Limits<K, V>,
    pub(super) policy: Policy<V, K>,
}

/// How many entries a map has room for unless it is said.
pub(super) const MAX_ENTRIES: usize = 10_000;

impl<K, V> Options<K, V> {
    pub(super) fn new(table: &Table, make_key: impl Fn(&K) -> CacheKey + Send + Sync + 'static) -> Self {
        let limits = Limits {
            room: MAX_ENTRIES as u64,
            entries: MAX_ENTRIES,
            weigher: None,
            time_to_live: None,
            time_to_idle: None,
        };
        let (table, make_key) = (table.clone(), Box::new(make_key));
        Self { table, make_key, generations: None, limits, policy: Policy::new() }
    }
}

pub(super) struct Core<K, V> {
    options: Options<K, V>,
    generations: Option<NonZeroU32>,
    metrics: Metrics,
    usage: Usage,
    /// When entries that have outlived their limits are removed next.
    purge: Option<Throttle>,
    pub(super) waits: Waits,
    resident: ForkCarried<Resident<K, V>>,
}

/// What is behind locks.
struct Resident<K, V> {
    store: Store<K, V>,
    attended: Attended<K, V>,
}

/// What a lookup finds.
pub(super) enum Found<V> {
    Nothing,
    Expired(Entry<V>),
    Fresh(Entry<V>),
}

impl<K: Clone + Eq + Hash, V> Resident<K, V> {
    fn new(limits: &Limits<K, V>) -> Self {
        Self { store: Store::new(limits), attended: Attended::new(limits.entries) }
    }
}

impl<K: Clone + Eq + Hash, V> Core<K, V> {
    pub(super) fn new(options: Options<K, V>) -> Result<Self, Error> {
        options.policy.check()?;
        if options.limits.room == 0 {
            let what = if options.limits.weigher.is_some() { "the max_weight" } else { "the max_entries" };
            return Err(ErrorKind::InvalidInput { what, found: "0".to_owned(), expected: "1 or more" }.into());
        }
        let generations = options.generations.map(NonZeroU32::try_from).transpose().map_err(|_| {
            let (what, found) = ("the number of generations", "0".to_owned());
            Error::from(ErrorKind::InvalidInput { what, found, expected: "1 or more" })
        })?;
        let purge = options.limits.shortest_time().map(|time| Throttle::every(time.max(1)));
        let resident = ForkCarried::new(Resident::new(&options.limits));
        let (metrics, usage, waits) = (Metrics::default(), Usage::new(), Waits::default());
        Ok(Self { options, generations, metrics, usage, purge, waits, resident })
    }

    #[inline]
    fn resident(&self) -> &Resident<K, V> {
        self.resident.get(|| Resident::new(&self.options.limits))
    }

    pub(super) fn policy(&self) -> &Policy<V, K> {
        &self.options.policy
    }

    pub(super) fn default_options(&self) -> GetOptions {
        GetOptions::of(self.policy())
    }

    /// The value of `key`, if its generation alone decides that it is fresh, and nothing else is to be done; otherwise what was
    /// found of it, for [`check`](Self::check).
    // The entry is taken apart where it was returned: to move it as a whole costs more than all that is checked here.
    #[inline]
    pub(super) fn hit<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Result<Arc<V>, Option<Entry<V>>>
    where
        K: Borrow<Q>,
    {
        match self.resident().store.get(key) {
            Some(Entry { value, freshness: Freshness { ticket, conditions: None } })
                if self.is_unchanged(ticket) && self.usage.stripe().spend() =>
            {
                Ok(value)
            }
            found => Err(found),
        }
    }

    /// What is found of `key`, for [`check`](Self::check).
    pub(super) fn find<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<Entry<V>>
    where
        K: Borrow<Q>,
    {
        self.resident().store.get(key)
    }

    /// The entry of `key` that is in the map, fresh or not. That is no use of it.
    pub(super) fn present(&self, key: &K) -> Option<Entry<V>> {
        self.resident().store.peek(key)
    }

    /// Whether an entry that was found is fresh, where more than the generation decides, or where that has changed, or the table
    /// is to be revalidated. It counts as used if it is.
    #[inline(never)]
    pub(super) fn check(&self, key: &K, found: Option<Entry<V>>) -> Found<V> {
        let Some(entry) = found.filter(|entry| self.resident().store.is_resident(key, entry)) else {
            return Found::Nothing;
        };
        if !self.holds(&entry) {
            return Found::Expired(entry);
        }
        let stripe = self.usage.stripe();
        if !stripe.spend() {
            stripe.revalidate(&self.options.table);
            if !self.holds(&entry) {
                return Found::Expired(entry);
            }
            stripe.count_hit();
        }
        Found::Fresh(entry)
    }

    /// Whether the generation of a key is the one of `ticket`, with which an entry of it was loaded.
    #[inline]
    fn is_unchanged(&self, ticket: Ticket) -> bool {
        let table = &self.options.table;
        let is_doubtful = Table::is_any_doubtful() && table.is_doubtful();
        !is_doubtful && ticket.is_unchanged_in(table.latest())
    }

    /// Whether `entry` is fresh by the generations as they are. If not, it may be fresh all the same: an update may be pending.
    fn holds(&self, entry: &Entry<V>) -> bool {
        self.is_unchanged(entry.freshness.ticket)
            && entry.freshness.conditions.as_ref().is_none_or(|conditions| conditions.hold())
    }

    /// The value of `key` if it is fresh. It is not verified, as that would load it.
    pub(super) fn get_if_fresh<Q>(&self, key: &Q) -> Option<Arc<V>>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        match self.hit(key) {
            Ok(value) => Some(value),
            Err(None) => None,
            Err(found) => {
                let key = key.to_owned();
                match self.check(&key, found) {
                    Found::Fresh(entry) => Some(entry.value),
                    Found::Nothing => None,
                    Found::Expired(entry) => {
                        let cell = self.attend(key).ok()?;
                        let is_fresh = entry.freshness.is_fresh(cell.sync());
                        is_fresh.then(|| {
                            cell.count_hit();
                            entry.value
                        })
                    }
                }
            }
        }
    }

    pub(super) fn peek<Q>(&self, key: &Q) -> Peek<V>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        let Some(entry) = self.resident().store.peek(key) else { return Peek::Nothing };
        // A use spends the budget instead, but this is none.
        self.options.table.revalidate_if_due(coarse_now());
        let is_fresh = || {
            let cell = self.attend(key.to_owned());
            cell.is_ok_and(|cell| entry.freshness.is_fresh(cell.sync()))
        };
        if self.holds(&entry) || is_fresh() { Peek::Fresh(entry.snapshot()) } else { Peek::Expired(entry.snapshot()) }
    }

    /// Whether a hit is to be verified. To be called once at each hit of a call that may load.
    #[inline]
    pub(super) fn is_verification_due(&self) -> bool {
        self.policy().verification.as_ref().is_some_and(Verification::is_due)
    }

    fn cache_key(&self, key: &K) -> Result<CacheKey, Error> {
        let made = (self.options.make_key)(key);
        self.options.table.normalize(match self.generations {
            Some(count) => made.in_generations(count),
            None => made,
        })
    }

    pub(super) fn synchronizer(&self, key: &K) -> Result<GenerationSynchronizer, Error> {
        Ok(GenerationSynchronizer::new(&self.options.table, self.cache_key(key)?)?.without_following())
    }

    /// As [`synchronizer`](Self::synchronizer), also while the table cannot be attached to: for checks alone.
    pub(super) fn dependency(&self, key: &K) -> Result<GenerationSynchronizer, Error> {
        GenerationSynchronizer::new_or_unattached(&self.options.table, self.cache_key(key)?)
    }

    /// Lets the value that is being loaded depend on a value of this map, which its loader has read.
    pub(super) fn depend_on(&self, key: &K, freshness: &Freshness) -> Result<(), Error> {
        if Scope::innermost().is_some() {
            let sync = self.tracked(key)?;
            depend_on_value(|| sync, freshness);
        }
        Ok(())
    }

    /// The synchronizer by which a value is checked that was made of the value of `key`. While an update is pending, it must not
    /// take for fresh what was expired here: so it shares what is known of that update.
    fn tracked(&self, key: &K) -> Result<Arc<GenerationSynchronizer>, Error> {
        match self.resident().attended.synchronizer(key) {
            Some(sync) => Ok(sync),
            None => self.dependency(key).map(Arc::new),
        }
    }

    /// The cell of `key`, to load its value into.
    pub(super) fn attend(&self, key: K) -> Result<KeyCell<'_, K, V>, Error> {
        if let Some(purge) = &self.purge
            && purge.take(coarse_now())
        {
            self.resident().store.purge();
        }
        let attended = &self.resident().attended;
        let state = match attended.find(&key) {
            Some(state) => state,
            None => {
                let new = State::new(self.dependency(&key)?);
                // Dropped when no lock is held, as dropping a value may run code of the user.
                let outlived = RefCell::new(Vec::new());
                attended.insert(&key, new, |key, state, is_crowded| self.is_of_use(key, state, is_crowded, &outlived))
            }
        };
        Ok(KeyCell { core: self, key, state: Some(state), has_replaced: AtomicBool::new(false) })
    }

    /// Whether a state is kept that no call uses. With a failure that is forgotten goes the old value, which would
    /// otherwise be served for too long: it is moved to `outlived`.
    fn is_of_use(&self, key: &K, state: &State<V>, is_crowded: bool, outlived: &RefCell<Vec<(K, Entry<V>)>>) -> bool {
        let (now, store) = (coarse_now(), &self.resident().store);
        let (word, has_value) = (state.sync.place().word(), store.contains(key));
        // What is known of a pending update decides about a value that was loaded before. Any number of keys may share its
        // generation.
        if word.pending() > 0 && (has_value || !is_crowded) {
            return true;
        }
        let Some((since, retry)) = state.single_flight.get().trouble() else {
            // Each use of a value that was loaded in an outage needs it.
            return !word.is_live() && has_value;
        };
        if retry.is_some_and(|retry| !retry.is_over(now)) && (has_value || !is_crowded) {
            return true;
        }
        let Some(staleness) = self.policy().max_staleness else { return false };
        if has_value && !Period::new(since, staleness).is_over(now) {
            return true;
        }
        outlived.borrow_mut().extend(store.remove(key));
        false
    }

    pub(super) fn invalidate(&self, key: K) -> Result<(), Error> {
        cell::invalidate(&self.attend(key)?);
        Ok(())
    }

    pub(super) fn remove<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<Arc<V>>
    where
        K: Borrow<Q>,
    {
        self.resident().store.remove(key).map(|(_, entry)| entry.value)
    }

    pub(super) fn clear(&self) {
        self.resident().store.clear();
    }

    pub(super) fn len(&self) -> usize {
        self.resident().store.len()
    }

    pub(super) fn weight(&self) -> u64 {
        self.resident().store.weight()
    }

    pub(super) fn counters(&self) -> Counters {
        self.metrics.read(self.usage.hits())
    }

    pub(super) fn clear_matching(&self, pattern: &str) -> Result<usize, Error> {
        let pattern = glob::Pattern::new(pattern).map_err(|error| {
            let found = format!("{pattern:?} ({error})");
            let expected = "a pattern with *, ? and [...], such as user:*; [*] stands for a * itself";
            Error::from(ErrorKind::InvalidInput { what: "the pattern", found, expected })
        })?;
        let shared = self.generations.map(|count| format!("%/{count}/"));
        // A key that the pattern matches may share any generation of its family, and may be longer than its label.
        let cleared = self.options.table.clear_matching(|slot| {
            let label = slot.label();
            let may_share = shared.as_ref().is_some_and(|shared| label.contains(&**shared));
            slot.is_truncated() || may_share || pattern.matches(&label)
        })?;
        Ok(cleared.len())
    }

    pub(super) fn table(&self) -> &Table {
        &self.options.table
    }
}

/// One key of a map, while it is attended.
pub(super) struct KeyCell<'m, K: Clone + Eq + Hash, V> {
    core: &'m Core<K, V>,
    pub(super) key: K,
    /// There until it is dropped.
    state: Option<Arc<State<V>>>,
    /// Whether a value was put in place, which tasks may wait for.
    has_replaced: AtomicBool,
}

impl<K: Clone + Eq + Hash, V> KeyCell<'_, K, V> {
    fn state(&self) -> &State<V> {
        self.state.as_ref().expect("there until it is dropped")
    }

    /// The synchronizer of the key, to be kept for longer than the key is attended.
    pub(super) fn shared_sync(&self) -> Arc<GenerationSynchronizer> {
        Arc::clone(&self.state().sync)
    }
}

impl<K: Clone + Eq + Hash, V> Cell for KeyCell<'_, K, V> {
    type Value = V;
    type Key = K;

    fn key(&self) -> &K {
        &self.key
    }

    fn sync(&self) -> &GenerationSynchronizer {
        &self.state().sync
    }

    fn policy(&self) -> &Policy<V, K> {
        self.core.policy()
    }

    fn metrics(&self) -> &Metrics {
        &self.core.metrics
    }

    fn single_flight(&self) -> Arc<SingleFlight> {
        self.state().single_flight.get()
    }

    fn current(&self) -> Option<Arc<Entry<V>>> {
        let entry = self.core.resident().store.look(&self.key);
        entry.map(Arc::new).or_else(|| self.state().latest.load_full())
    }

    fn replace(&self, entry: Arc<Entry<V>>) -> Replaced<V> {
        // ORDERING: relaxed: read only by `drop`, to which this is borrowed exclusively.
        self.has_replaced.store(true, Ordering::Relaxed);
        let store = &self.core.resident().store;
        let old = store.look(&self.key).map(Arc::new);
        let evicted = store.insert(self.key.clone(), Entry::clone(&entry));
        if evicted.iter().any(|evicted| Arc::ptr_eq(&evicted.value, &entry.value)) {
            self.core.metrics.too_heavy.add_one();
        }
        let latest = self.state().latest.swap(Some(entry));
        // All of them, so that no value is dropped here: another thread may have removed it from the cache just now.
        let evicted = evicted.into_iter().map(|entry| entry.value);
        let evicted = evicted.chain([&old, &latest].into_iter().flatten().map(|entry| entry.value())).collect();
        Replaced { evicted, old: old.or(latest).filter(|old| self.may_stay(old)) }
    }

    fn count_hit(&self) {
        self.core.usage.stripe().count_hit();
    }

    fn may_stay(&self, entry: &Entry<V>) -> bool {
        !self.core.resident().store.has_outlived(entry)
    }

    fn residence(&self, value: &V) -> Option<Residence> {
        self.core.options.limits.residence(&self.key, value)
    }
}

impl<K: Clone + Eq + Hash, V> Drop for KeyCell<'_, K, V> {
    fn drop(&mut self) {
        if let Some(state) = self.state.take() {
            let sync = self.has_replaced.get_mut().then(|| Arc::clone(&state.sync));
            self.core.resident().attended.release(&self.key, state);
            // When no lock is held, as wakers are code of the user.
            if let Some(sync) = sync {
                self.core.waits.wake(&sync);
            }
        }
    }
}

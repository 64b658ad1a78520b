//! The values of a map: a bounded cache, which decides what to evict.

use std::borrow::Borrow;
use std::cell::RefCell;
use std::hash::Hash;
use std::sync::atomic::Ordering;
use std::time::Duration;

use quick_cache::sync::Cache;
use quick_cache::{DefaultHashBuilder, Lifecycle, OptionsBuilder, Weighter};

use crate::cached::period::Period;
use crate::cached::value::{Entry, Residence};
use crate::os::clock::coarse_now;

/// How many values a map has room for, and how long they stay.
pub(super) struct Limits<K, V> {
    /// The most that all entries may weigh, or how many there may be if they are not weighed.
    pub(super) room: u64,
    /// How many entries are expected.
    pub(super) entries: usize,
    pub(super) weigher: Option<Weigher<K, V>>,
    pub(super) time_to_live: Option<Duration>,
    pub(super) time_to_idle: Option<Duration>,
}

/// The most that an entry weighs, or all of them together: the cache adds some weights before it compares them.
const HEAVIEST: u64 = u64::MAX / 4;

pub(super) type Weigher<K, V> = Box<dyn Fn(&K, &V) -> u64 + Send + Sync>;

impl<K, V> Limits<K, V> {
    /// What decides how long an entry stays, besides that there is room for it; `None` if nothing does, and it weighs 1.
    pub(super) fn residence(&self, key: &K, value: &V) -> Option<Residence> {
        let is_limited = self.weigher.is_some() || self.time_to_live.is_some() || self.time_to_idle.is_some();
        is_limited.then(|| Residence {
            // Nothing would ever evict an entry without weight.
            weight: self.weigher.as_ref().map_or(1, |weigh| weigh(key, value).clamp(1, HEAVIEST)),
            life: Period::new(coarse_now(), self.time_to_live.unwrap_or(Duration::MAX)),
            used: coarse_now().into(),
        })
    }

    /// The shortest time after which an entry may have outlived its limits, in milliseconds; `None` if no process lives so long.
    pub(super) fn shortest_time(&self) -> Option<u64> {
        let shortest = self.time_to_live.into_iter().chain(self.time_to_idle).min()?;
        u64::try_from(shortest.as_millis()).ok().filter(|time| *time < u64::MAX / 2)
    }
}

/// In how many parts there are heavy entries, at most: an entry must fit into one of them, on every machine.
const WEIGHED_PARTS: usize = 4;

pub(super) struct Store<K, V> {
    entries: Cache<K, Entry<V>, ByResidence, DefaultHashBuilder, Outside>,
    idle: Duration,
}

impl<K: Eq + Hash, V> Store<K, V> {
    pub(super) fn new(limits: &Limits<K, V>) -> Self {
        // No more fit in, as each weighs 1 at least. So there are not so many shards that nothing has room in one.
        let most = limits.entries.min(usize::try_from(limits.room).unwrap_or(usize::MAX));
        let room = limits.room.min(HEAVIEST);
        let with_room = |room: u64| {
            let mut options = OptionsBuilder::new();
            options.weight_capacity(room).estimated_items_capacity(most);
            if limits.weigher.is_some() {
                options.shards(WEIGHED_PARTS);
            }
            let options = options.build().expect("both capacities are given");
            Cache::with_options(options, ByResidence, DefaultHashBuilder::default(), Outside)
        };
        let mut entries = with_room(room);
        if entries.capacity() > room {
            // The room of each shard was rounded up.
            let shards = entries.num_shards() as u64;
            entries = with_room(room / shards * shards);
        }
        Self { entries, idle: limits.time_to_idle.unwrap_or(Duration::MAX) }
    }

    /// The entry of `key`. It may have outlived its limits: see [`is_resident`](Self::is_resident).
    #[inline]
    pub(super) fn get<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<Entry<V>>
    where
        K: Borrow<Q>,
    {
        self.entries.get(key)
    }

    pub(super) fn contains<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.entries.contains_key(key)
    }

    /// Whether the entry that was found of `key` may stay, and counts as used; removes it otherwise.
    pub(super) fn is_resident(&self, key: &K, entry: &Entry<V>) -> bool {
        let Some(residence) = residence(entry) else { return true };
        let (is_over, now) = self.is_over(residence);
        if is_over {
            // Another thread may have put a newer one in its place.
            self.entries.remove_if(key, |present| self.has_outlived(present));
            return false;
        }
        // ORDERING: relaxed: a time to be compared, and no other memory is read because of it. The greater one stays, as this
        // thread may have slept since it read the clock.
        if self.idle < Duration::MAX && residence.used.load(Ordering::Relaxed) < now {
            residence.used.fetch_max(now, Ordering::Relaxed);
        }
        true
    }

    /// Whether an entry must not stay any longer.
    pub(super) fn has_outlived(&self, entry: &Entry<V>) -> bool {
        residence(entry).is_some_and(|residence| self.is_over(residence).0)
    }

    /// Whether the time of an entry is over, and the time that it is now.
    fn is_over(&self, residence: &Residence) -> (bool, u64) {
        // ORDERING: acquire keeps the clock from being read before the time of the last use, which another thread may have stored
        // meanwhile: a time that lies ahead of the clock counts as long ago. It pairs with no release, as that time guards no
        // memory.
        let used = residence.used.load(Ordering::Acquire);
        let now = coarse_now();
        (residence.life.is_over(now) || Period::new(used, self.idle).is_over(now), now)
    }

    /// The entry of `key`, unless it has outlived its limits. It does not count as used, and nothing is removed.
    pub(super) fn peek<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<Entry<V>>
    where
        K: Borrow<Q>,
    {
        self.look(key).filter(|entry| !self.has_outlived(entry))
    }

    /// As [`peek`](Self::peek), also if it has outlived its limits. Another thread may remove it meanwhile, so that what this
    /// returns is the last there is of the value.
    pub(super) fn look<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<Entry<V>>
    where
        K: Borrow<Q>,
    {
        self.entries.peek(key)
    }

    /// Returns what was evicted, `entry` itself if there is no room for it.
    pub(super) fn insert(&self, key: K, entry: Entry<V>) -> Vec<Entry<V>> {
        let mut evicted = Vec::new();
        self.entries.insert_with_lifecycle(key, entry, &mut evicted);
        evicted
    }

    /// Removes the entry of `key`, and returns it.
    pub(super) fn remove<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<(K, Entry<V>)>
    where
        K: Borrow<Q>,
    {
        self.entries.remove(key)
    }

    /// Removes the entries that have outlived their limits.
    pub(super) fn purge(&self) {
        self.retain(|entry| !self.has_outlived(entry));
    }

    /// Removes all entries.
    pub(super) fn clear(&self) {
        self.retain(|_| false);
    }

    fn retain(&self, stays: impl Fn(&Entry<V>) -> bool) {
        // Dropped when no lock of the cache is held, as dropping a value may run code of the user.
        let removed = RefCell::new(Vec::new());
        self.entries.retain(|_, entry| {
            let stays = stays(entry);
            if !stays {
                removed.borrow_mut().push(entry.clone());
            }
            stays
        });
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn weight(&self) -> u64 {
        self.entries.weight()
    }
}

fn residence<V>(entry: &Entry<V>) -> Option<&Residence> {
    entry.freshness.conditions.as_ref()?.residence.as_ref()
}

/// An entry's weight, which was found when it was made: it must not change.
#[derive(Clone)]
struct ByResidence;

impl<K, V> Weighter<K, Entry<V>> for ByResidence {
    fn weight(&self, _key: &K, entry: &Entry<V>) -> u64 {
        residence(entry).map_or(1, |residence| residence.weight)
    }
}

/// Keeps what is evicted until no lock is held, as dropping a value may run code of the user.
#[derive(Clone)]
struct Outside;

impl<K, V> Lifecycle<K, Entry<V>> for Outside {
    type RequestState = Vec<Entry<V>>;

    fn on_evict(&self, evicted: &mut Self::RequestState, _key: K, entry: Entry<V>) {
        evicted.push(entry);
    }
}

//! The keys of a map that need attention: a load is under way, or failed, or an update is pending, or the table cannot be attached
//! to.
//!
//! A value that is fresh needs no more than the ticket that stands beside it. All else that a `Cached` has for its one value, a
//! key has only while it is attended: from the first call that finds no fresh value until the last of these calls has ended, and
//! longer if there is something to remember, such as a failure.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hash};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwapOption;

use crate::cached::single_flight::SingleFlight;
use crate::cached::value::Entry;
use crate::os::fork::ForkLocal;
use crate::synchronizer::GenerationSynchronizer;

/// What a key has while it is attended.
pub(super) struct State<V> {
    /// Shared with waits, which keep it while they sleep and nothing else of this.
    pub(super) sync: Arc<GenerationSynchronizer>,
    pub(super) single_flight: ForkLocal<SingleFlight>,
    /// The value that was put in place last, which the cache may have no room for: the calls that wait for it get it from here.
    /// There only while a call attends the key, or values would stay that were removed from the cache.
    pub(super) latest: ArcSwapOption<Entry<V>>,
}

impl<V> State<V> {
    pub(super) fn new(sync: GenerationSynchronizer) -> Self {
        Self { sync: Arc::new(sync), single_flight: ForkLocal::new(), latest: ArcSwapOption::empty() }
    }

    /// Whether there is nothing to remember when the calls have ended.
    fn is_settled(&self) -> bool {
        let word = self.sync.place().word();
        word.is_live() && word.pending() == 0 && self.single_flight.get().is_settled()
    }
}

const SHARDS: usize = 16;

pub(super) struct Attended<K, V> {
    shards: [Mutex<Shard<K, V>>; SHARDS],
    hasher: RandomState,
    /// How many states a part may have before only those are kept without which an answer would be wrong.
    crowd: usize,
}

struct Shard<K, V> {
    states: HashMap<K, Arc<State<V>>>,
    /// How many states there may be before those are swept that are of no use any more.
    most: usize,
}

/// How many states a part keeps before it sweeps.
const FEW: usize = 64;

impl<K: Clone + Eq + Hash, V> Attended<K, V> {
    /// For a map that has room for so many `entries`: it remembers about as many failures.
    pub(super) fn new(entries: usize) -> Self {
        let shard = || Mutex::new(Shard { states: HashMap::new(), most: FEW });
        let crowd = (entries / SHARDS).max(FEW);
        Self { shards: std::array::from_fn(|_| shard()), hasher: RandomState::new(), crowd }
    }

    fn lock(&self, key: &K) -> MutexGuard<'_, Shard<K, V>> {
        let shard = self.hasher.hash_one(key) as usize % SHARDS;
        self.shards[shard].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state of `key`, if it is attended.
    pub(super) fn find(&self, key: &K) -> Option<Arc<State<V>>> {
        self.lock(key).states.get(key).cloned()
    }

    /// The synchronizer of `key`, if it is attended. It knows of updates that are pending since when they are.
    // Found under the lock: a call that ends counts the references to the state.
    pub(super) fn synchronizer(&self, key: &K) -> Option<Arc<GenerationSynchronizer>> {
        self.lock(key).states.get(key).map(|state| Arc::clone(&state.sync))
    }

    /// The state of `key`, which is `new` unless there is one. `is_of_use` decides which states are kept that no call uses; with
    /// `true`, there are so many that they are kept only if an answer would be wrong otherwise.
    pub(super) fn insert(
        &self,
        key: &K,
        new: State<V>,
        is_of_use: impl Fn(&K, &State<V>, bool) -> bool,
    ) -> Arc<State<V>> {
        let mut swept = Vec::new();
        let mut shard = self.lock(key);
        let Shard { states, most } = &mut *shard;
        if states.len() >= *most {
            let is_crowded = states.len() >= self.crowd;
            swept.extend(
                states.extract_if(|key, state| Arc::strong_count(state) == 1 && !is_of_use(key, state, is_crowded)),
            );
            *most = FEW.max(2 * states.len());
            states.shrink_to(*most);
        }
        let state = Arc::clone(shard.states.entry(key.clone()).or_insert_with(|| Arc::new(new)));
        drop(shard);
        // Not under the lock, as dropping a value may run code of the user.
        drop(swept);
        state
    }

    /// Ends the attention of one call for `key`.
    pub(super) fn release(&self, key: &K, state: Arc<State<V>>) {
        let mut shard = self.lock(key);
        let (mut latest, mut removed) = (None, None);
        // In a child that was forked during the call, there may be another one, or none. Otherwise, this leaves the last reference
        // to the map, under the lock, so that of several calls which end at once one finds itself to be the last.
        if let Some(present) = shard.states.get(key).filter(|present| Arc::ptr_eq(present, &state)) {
            drop(state);
            if Arc::strong_count(present) == 1 {
                latest = present.latest.swap(None);
                removed = if present.is_settled() { shard.states.remove(key) } else { None };
            }
        }
        drop(shard);
        // Not under the lock, as dropping a value may run code of the user.
        drop((latest, removed));
    }
}

//! Loading the values of several keys by one call of a loader.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::sync::Arc;

use super::core::{Core, Found, KeyCell};
use crate::cached::load::{Attempt, Call, GetOptions, Step};
use crate::cached::scope::Scope;
use crate::cached::value::Entry;
use crate::error::{Error, ErrorKind, Source};

pub(super) type Entries<'k, K, V> = HashMap<&'k K, Entry<V>>;
pub(super) type Cells<'k, 'm, K, V> = Vec<(&'k K, KeyCell<'m, K, V>)>;
/// Makes the value of a key that the loader returns none for.
pub(super) type Absent<K, V> = Box<dyn Fn(&K) -> V + Send + Sync>;

/// Adds the entries of `keys` that are fresh to `entries`. Returns the cells of the other keys.
pub(super) fn take_fresh<'k, 'm, K: Clone + Eq + Hash, V>(
    core: &'m Core<K, V>,
    keys: &[&'k K],
    entries: &mut Entries<'k, K, V>,
) -> Result<Cells<'k, 'm, K, V>, Error> {
    let (mut cells, mut known) = (Vec::new(), HashSet::with_capacity(keys.len()));
    for &key in keys.iter().filter(|key| known.insert(**key)) {
        match core.check(key, core.find(key)) {
            Found::Fresh(entry) => drop(entries.insert(key, entry)),
            Found::Expired(_) | Found::Nothing => cells.push((key, core.attend(key.clone())?)),
        }
    }
    Ok(cells)
}

/// What a call does for keys whose values are not fresh.
pub(super) struct Plan<'k, 'c, 'm, K: Clone + Eq + Hash, V> {
    pub(super) loads: Loads<'k, 'c, 'm, K, V>,
    /// The keys that other calls are loading. They are to be waited for when the own loads have ended: otherwise two calls could
    /// wait for each other.
    pub(super) waits: Vec<(&'k K, Call<'c, KeyCell<'m, K, V>>)>,
}

impl<'k, 'c, 'm, K: Clone + Eq + Hash, V> Plan<'k, 'c, 'm, K, V> {
    /// Begins the loads that no other call runs. Values that can be had without a load are added to `entries`.
    pub(super) fn new(
        cells: &'c Cells<'k, 'm, K, V>,
        options: GetOptions,
        entries: &mut Entries<'k, K, V>,
    ) -> Result<Self, Error> {
        let (mut loads, mut waits) = (Vec::new(), Vec::new());
        for (key, cell) in cells {
            let mut call = Call::new(cell, options);
            match call.next() {
                Step::Return(result) => drop(entries.insert(key, Entry::clone(&*result?))),
                Step::Load(attempt) => loads.push((*key, call, attempt)),
                Step::Wait { .. } => waits.push((*key, call)),
            }
        }
        Ok(Self { loads: Loads(loads), waits })
    }
}

/// The loads of one call of a loader.
pub(super) struct Loads<'k, 'c, 'm, K: Clone + Eq + Hash, V>(Vec<Load<'k, 'c, 'm, K, V>>);

type Load<'k, 'c, 'm, K, V> = (&'k K, Call<'c, KeyCell<'m, K, V>>, Attempt<'c, KeyCell<'m, K, V>>);

impl<'k, K: Clone + Eq + Hash, V> Loads<'k, '_, '_, K, V> {
    /// The keys to call the loader with; empty if it need not be called.
    pub(super) fn keys(&self) -> Vec<K> {
        self.0.iter().map(|(key, ..)| K::clone(key)).collect()
    }

    /// The scopes to run the loader in: those of all loads, so that none of them waits for another one.
    pub(super) fn scopes(&self) -> Vec<Arc<Scope>> {
        self.0.iter().map(|(.., attempt)| Arc::clone(attempt.scope())).collect()
    }

    /// Ends the loads with what the loader returned, and adds them to `entries`. Returns the first error.
    pub(super) fn finish(
        self,
        mut outcome: Result<HashMap<K, Arc<V>>, Source>,
        absent: Option<&Absent<K, V>>,
        entries: &mut Entries<'k, K, V>,
    ) -> Result<(), Error> {
        let scopes = self.scopes();
        let Some(last) = scopes.last() else { return Ok(()) };
        // What the loader has found, which the innermost scope has collected, holds for all its values.
        let found = last.collect(|collected| collected.clone());
        scopes.iter().for_each(|scope| scope.collect(|collected| *collected = found.clone()));
        // For the callbacks: while one runs, the later loads are under way.
        let _entered = Scope::enter_all(&scopes);
        // Dropped when all loads have ended, as dropping a value may run code of the user, which may ask for one of the keys.
        let (mut first_error, mut kept) = (None, Vec::new());
        for (key, call, attempt) in self.0 {
            let value = match &mut outcome {
                Ok(loaded) => take(loaded, key, absent),
                Err(error) => Err(Arc::clone(error)),
            };
            match call.finish_keeping(attempt, value, &mut kept) {
                Ok(entry) => drop(entries.insert(key, Entry::clone(&entry))),
                Err(error) => drop(first_error.get_or_insert(error)),
            }
        }
        first_error.map_or(Ok(()), Err)
    }
}

/// Takes the value of `key` out of what was loaded.
pub(super) fn take<K: Eq + Hash, V>(
    loaded: &mut HashMap<K, Arc<V>>,
    key: &K,
    absent: Option<&Absent<K, V>>,
) -> Result<Arc<V>, Source> {
    match (loaded.remove(key), absent) {
        (Some(value), _) => Ok(value),
        (None, Some(absent)) => Ok(Arc::new(absent(key))),
        (None, None) => {
            let (what, found) = ("what the bulk loader returned for this key", "nothing".to_owned());
            let expected = "a value of each key that it is called for, or a map that is built with `absent`";
            Err(Arc::new(Error::from(ErrorKind::InvalidInput { what, found, expected })))
        }
    }
}

/// The pairs that a loader returned.
pub(super) fn collect<K: Eq + Hash, V>(pairs: impl IntoIterator<Item = (K, V)>) -> HashMap<K, Arc<V>> {
    pairs.into_iter().map(|(key, value)| (key, Arc::new(value))).collect()
}

/// The values of `keys`, in their order, all of which have an entry.
pub(super) fn in_order<K: Eq + Hash, V>(keys: &[&K], entries: &Entries<'_, K, V>) -> Vec<Arc<V>> {
    keys.iter().map(|key| entries[key].value()).collect()
}

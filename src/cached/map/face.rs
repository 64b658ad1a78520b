//! What maps of both faces can do without loading or waiting.

/// The methods of a map that neither load nor wait.
macro_rules! map_methods {
    () => {
        /// The value of `key` if it is in the map and fresh. Never runs the loader.
        ///
        /// # Progress
        ///
        /// As [`get`](Self::get) while the value is fresh.
        #[must_use]
        pub fn get_if_fresh<Q>(&self, key: &Q) -> Option<std::sync::Arc<V>>
        where
            K: std::borrow::Borrow<Q>,
            Q: Eq + std::hash::Hash + ToOwned<Owned = K> + ?Sized,
        {
            self.core.get_if_fresh(key)
        }

        /// The value of `key` that is in the map, and whether it is fresh. Neither loads nor waits, and does not count as a use.
        ///
        /// # Progress
        ///
        /// As [`get`](Self::get) while the value is fresh, and reads a clock each time.
        #[must_use]
        pub fn peek<Q>(&self, key: &Q) -> $crate::Peek<V>
        where
            K: std::borrow::Borrow<Q>,
            Q: Eq + std::hash::Hash + ToOwned<Owned = K> + ?Sized,
        {
            self.core.peek(key)
        }

        /// Announces that the source of `key` was updated: its value is expired in all processes, including this one. If the
        /// announcement must not be lost, see [`update`](Self::update).
        ///
        /// # Errors
        ///
        /// As [`GenerationSynchronizer::new`](crate::GenerationSynchronizer::new) and
        /// [`GenerationSynchronizer::mark_updated`](crate::GenerationSynchronizer::mark_updated).
        ///
        /// # Progress
        ///
        /// As [`GenerationSynchronizer::new`](crate::GenerationSynchronizer::new) and
        /// [`GenerationSynchronizer::mark_updated`](crate::GenerationSynchronizer::mark_updated).
        pub fn mark_updated<Q>(&self, key: &Q) -> Result<$crate::Generation, $crate::Error>
        where
            K: std::borrow::Borrow<Q>,
            Q: Eq + std::hash::Hash + ToOwned<Owned = K> + ?Sized,
        {
            self.synchronizer(key)?.mark_updated()
        }

        /// Makes all processes load the values of all keys in the table again whose text matches the glob `pattern`, such as
        /// `user:*`; returns how many keys these are. It need not be keys of this map, nor keys that this process knows.
        ///
        /// The text of a key is what [`Table::slots`](crate::Table::slots) shows: normalized, its parts escaped (`:` becomes
        /// `%3A`) and joined by `:`. If the keys of this map [share generations](CachedMapBuilder::generations), all of these are
        /// cleared too, as a key that matches may have any of them; and so are keys that are too long for the table to have all
        /// of their text.
        ///
        /// # Errors
        ///
        /// As [`Table::clear_matching`](crate::Table::clear_matching);
        /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) if it is not a pattern.
        ///
        /// # Progress
        ///
        /// As [`Table::clear_matching`](crate::Table::clear_matching): it reads all keys of the table.
        pub fn clear_matching(&self, pattern: &str) -> Result<usize, $crate::Error> {
            self.core.clear_matching(pattern)
        }

        /// Expires the value of `key` in this process only, as [`Cached::invalidate`](crate::Cached::invalidate) does. What changed
        /// the source announces that to all processes by [`update`](Self::update) or [`mark_updated`](Self::mark_updated).
        ///
        /// # Errors
        ///
        /// [`ErrorKind::EmptyKey`](crate::ErrorKind::EmptyKey) or [`ErrorKind::TableFull`](crate::ErrorKind::TableFull), of a key
        /// that has no value.
        ///
        /// # Progress
        ///
        /// As [`GenerationSynchronizer::new`](crate::GenerationSynchronizer::new).
        pub fn invalidate<Q>(&self, key: &Q) -> Result<(), $crate::Error>
        where
            K: std::borrow::Borrow<Q>,
            Q: Eq + std::hash::Hash + ToOwned<Owned = K> + ?Sized,
        {
            self.core.invalidate(key.to_owned())
        }

        /// Removes the value of `key` from the map, to free its memory in this process, and returns it. Nothing is announced. A
        /// load that is under way puts another one there.
        pub fn remove<Q>(&self, key: &Q) -> Option<std::sync::Arc<V>>
        where
            K: std::borrow::Borrow<Q>,
            Q: Eq + std::hash::Hash + ?Sized,
        {
            self.core.remove(key)
        }

        /// Removes all values from the map, to free their memory in this process. Nothing is announced.
        pub fn remove_all(&self) {
            self.core.clear();
        }

        /// A synchronizer of the key's generation, to begin an update that ends elsewhere. It has seen the present generation,
        /// and adopts nothing by itself, neither the loads of this map nor updates that are announced through it.
        ///
        /// # Errors
        ///
        /// As [`GenerationSynchronizer::new`](crate::GenerationSynchronizer::new).
        ///
        /// # Progress
        ///
        /// As [`GenerationSynchronizer::new`](crate::GenerationSynchronizer::new).
        pub fn synchronizer<Q>(&self, key: &Q) -> Result<$crate::GenerationSynchronizer, $crate::Error>
        where
            K: std::borrow::Borrow<Q>,
            Q: Eq + std::hash::Hash + ToOwned<Owned = K> + ?Sized,
        {
            self.core.synchronizer(&key.to_owned())
        }

        /// This map, to be read by the loader of another value, which then depends on what it reads: see
        /// [`depend_on`](crate::depend_on) and [`Cached::tracked`](crate::Cached::tracked).
        #[must_use]
        pub fn tracked(&self) -> $crate::Tracked<'_, Self> {
            $crate::cached::Tracked(self)
        }

        /// What this map has done so far, for all its keys.
        #[must_use]
        pub fn counters(&self) -> $crate::Counters {
            self.core.counters()
        }

        /// How many values are in the map, expired ones included.
        #[must_use]
        pub fn len(&self) -> usize {
            self.core.len()
        }

        /// Whether no value is in the map.
        #[must_use]
        pub fn is_empty(&self) -> bool {
            self.len() == 0
        }

        /// What the values in the map weigh, or how many there are if they are not [weighed](CachedMapBuilder::max_weight).
        #[must_use]
        pub fn weight(&self) -> u64 {
            self.core.weight()
        }

        /// The table.
        #[must_use]
        pub fn table(&self) -> &$crate::Table {
            self.core.table()
        }
    };
}
pub(super) use map_methods;

//! Building a `CachedMap`: its options and its callbacks.

use std::fmt;
use std::hash::Hash;

use super::core::Options;
use super::many::{self, Absent};
use super::{BulkLoader, CachedMap, Loader};
use crate::cached::policy::policy_methods;
use crate::cached::source;

/// The methods of the builders of maps of both faces, except those that take a loader.
macro_rules! map_options {
    () => {
        /// How many entries a map has room for unless it is said.
        pub const MAX_ENTRIES: usize = $crate::cached::map::core::MAX_ENTRIES;

        pub(super) fn new(options: $crate::cached::map::core::Options<K, V>, loader: Loader<K, V>) -> Self {
            Self { options, loader, bulk_loader: None, absent: None }
        }

        /// How many entries there may be at most; [`MAX_ENTRIES`](Self::MAX_ENTRIES) unless set. It may be a few less, as the cache
        /// consists of parts of equal size, and a part may be full while another one is not.
        ///
        /// Of keys without an entry whose loads fail, about as many are remembered for the [`retry_pause`](Self::retry_pause).
        pub fn max_entries(mut self, entries: usize) -> Self {
            self.options.limits.entries = entries;
            if self.options.limits.weigher.is_none() {
                self.options.limits.room = entries as u64;
            }
            self
        }

        /// How much all entries may weigh at most, by what `weigh` returns when an entry is put in; a weight of 0 counts as 1,
        /// and one of more than 2<sup>62</sup> as that. Then [`max_entries`](Self::max_entries) does not limit how many there
        /// are: it is how many are expected.
        ///
        /// The cache consists of four parts at most, each of which has an equal share of the room. So an entry that weighs more
        /// than a quarter of the room (97 percent of that, to be exact) is not kept, but loaded at each use, and
        /// [`Counters::too_heavy`](crate::Counters::too_heavy) counts it.
        ///
        /// `weigh` may use the map, but calls for the key that it weighs fail with
        /// [`ErrorKind::Recursion`](crate::ErrorKind::Recursion).
        pub fn max_weight(mut self, weight: u64, weigh: impl Fn(&K, &V) -> u64 + Send + Sync + 'static) -> Self {
            self.options.limits.room = weight;
            self.options.limits.weigher = Some(Box::new(weigh));
            self
        }

        /// An entry is removed this long after its value was loaded, fresh or not. Unlike the value of a
        /// [`max_age`](Self::max_age), it is not served any more, whatever happens, and its memory is freed.
        ///
        /// A value that has read the entry through [`tracked`](crate::CachedMap::tracked) is expired then as well.
        ///
        /// Exact to the clock's tick, some milliseconds. The memory is freed when the entry is next asked for, or evicted; or by
        /// a call that loads any key, of which one in each such period looks for entries that have outlived it.
        pub fn time_to_live(mut self, time: std::time::Duration) -> Self {
            self.options.limits.time_to_live = Some(time);
            self
        }

        /// An entry is removed when it was not used for so long, to free its memory: when that happens, it says nothing about the
        /// values that depend on the entry. Otherwise as [`time_to_live`](Self::time_to_live).
        pub fn time_to_idle(mut self, time: std::time::Duration) -> Self {
            self.options.limits.time_to_idle = Some(time);
            self
        }

        /// The keys share so many generations, so that any number of keys, such as URLs or sessions, takes no more than these of
        /// the table: see [`CacheKey::in_generations`](crate::CacheKey::in_generations), which says how a key's generation is
        /// found. An update of a key also expires the values of the keys that share its generation, which are then loaded again
        /// at their next use.
        ///
        /// All that use these keys must use the same number, and make the keys in the same way. With
        /// `|url: &String| ["url", url].into()` and 4096 generations, the change of a page is announced on the command line by
        /// `gensync mark --generations 4096 --part url --part http://example.com/`, part by part. Errors
        /// name the key of the generation, which is not that of the value.
        pub fn generations(mut self, count: u32) -> Self {
            self.options.generations = Some(count);
            self
        }

        /// Sets what makes the value of a key that the [bulk loader](Self::bulk_loader) returned nothing for, as a query returns
        /// no row for what is not there: `|_| None` if the values are `Option`s.
        pub fn absent(mut self, make: impl Fn(&K) -> V + Send + Sync + 'static) -> Self {
            self.absent = Some(Box::new(make));
            self
        }

        /// Sets a callback that is called with the key, the old value and the new one after each load of a key whose old value is
        /// in the map.
        ///
        /// For what the callback may do, see [Callbacks](Self#callbacks).
        pub fn on_reload(mut self, callback: impl Fn(&K, &V, &V) + Send + Sync + 'static) -> Self {
            self.options.policy.on_reload = Some(Box::new(callback));
            self
        }

        /// For development: at each `every`-th hit of a call that may load, loads the value although it is fresh, and calls
        /// `report` with the key, the cached value and the loaded one if they differ. See
        /// [`CachedBuilder::verify`](crate::CachedBuilder::verify).
        ///
        /// For what `report` may do, see [Callbacks](Self#callbacks).
        pub fn verify(mut self, every: u64, report: impl Fn(&K, &V, &V) + Send + Sync + 'static) -> Self
        where
            V: PartialEq,
        {
            self.options.policy.verification = Some($crate::cached::policy::Verification::new(every, report));
            self
        }

        /// Builds the map. Nothing is loaded before the first use.
        ///
        /// # Panics
        ///
        /// If an option is invalid: where options come from outside of the program, call [`try_build`](Self::try_build).
        #[track_caller]
        pub fn build(self) -> CachedMap<K, V> {
            match self.try_build() {
                Ok(map) => map,
                Err(error) => panic!("{error}"),
            }
        }

        /// As [`build`](Self::build), but returns an error if an option is invalid.
        ///
        /// # Errors
        ///
        /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) if there is no room for an entry, if the number of generations
        /// is 0, if the jitter is not from 0 to 1 or is given without a [`max_age`](Self::max_age), or if the `every` of
        /// [`verify`](Self::verify) is 0.
        pub fn try_build(self) -> Result<CachedMap<K, V>, $crate::Error> {
            let Self { options, loader, bulk_loader, absent } = self;
            Ok(CachedMap { core: $crate::cached::map::core::Core::new(options)?, loader, bulk_loader, absent })
        }
    };
}
#[cfg_attr(not(feature = "future"), expect(unused_imports, reason = "the other face uses it"))]
pub(super) use map_options;

/// Builds a [`CachedMap`]; made by [`CachedMap::builder`].
///
/// ```
/// use std::time::Duration;
///
/// use gensync::{CachedMap, Table};
///
/// # fn main() -> Result<(), gensync::Error> {
/// # fn load_user(id: &u64) -> std::io::Result<String> { Ok(id.to_string()) }
/// let table = Table::options().anonymous()?;
/// let users = CachedMap::builder(&table, |id: &u64| ["user", &id.to_string()].into(), load_user)
///     .max_entries(100_000)
///     .stale_while_reloading()
///     .fail_safe(Duration::from_secs(300))
///     .on_error(|error| eprintln!("{error}")) // which names the key
///     .build();
/// users.get(&1)?;
/// # Ok(()) }
/// ```
///
/// # Callbacks
///
/// They are called as those of a `Cached`: see [there](crate::CachedBuilder#callbacks). After a bulk load, they may ask for the
/// other keys of that load only by [`get_if_fresh`](CachedMap::get_if_fresh) and [`peek`](CachedMap::peek): other calls fail with
/// [`ErrorKind::Recursion`](crate::ErrorKind::Recursion) for the keys whose callbacks are still to come.
#[must_use = "a builder does nothing until `build` is called"]
pub struct CachedMapBuilder<K, V> {
    options: Options<K, V>,
    loader: Loader<K, V>,
    bulk_loader: Option<BulkLoader<K, V>>,
    absent: Option<Absent<K, V>>,
}

impl<K: Clone + Eq + Hash, V> CachedMapBuilder<K, V> {
    map_options!();

    /// Sets a loader of several values at once, for [`get_many`](CachedMap::get_many). It returns pairs of a key and its value, in
    /// any order, such as a `Vec` or a `HashMap`. What it returns for keys that it was not called for is ignored; a key that it
    /// returns nothing for fails, unless there is an [`absent`](Self::absent).
    pub fn bulk_loader<I, E>(mut self, loader: impl Fn(&[K]) -> Result<I, E> + Send + Sync + 'static) -> Self
    where
        I: IntoIterator<Item = (K, V)>,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        self.bulk_loader = Some(Box::new(move |keys| loader(keys).map(many::collect).map_err(source)));
        self
    }

    policy_methods!(options.policy);
}

impl<K, V> fmt::Debug for CachedMapBuilder<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CachedMapBuilder").field("table", &self.options.table).finish_non_exhaustive()
    }
}

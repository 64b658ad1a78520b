//! What a bounded cache of many keys can stand on: moka and quick_cache, beside a hash map behind a lock, which bounds nothing.
//!
//! Four tables: what a hit costs, the drop of the value included; how often a trace of skewed keys hits; what an entry takes in memory; and
//! how slow the slowest accesses are, as a cache that keeps house within its calls makes some callers pay for all. Figures of time are
//! taken by turns, as those taken one after another drift apart on a machine that does other work.
//!
//! All stores hash with ahash, unless a line says "own hasher": then it is the library's default, or the standard one.
//! A further kind of store is one implementation of [`Store`] and one line where the stores are listed.
//!
//! What gensync adds to the cache that it is built on comes first, and alone with `cargo bench --bench caches -- map`.
//!
//! With GENSYNC_BENCH_SHORT in the environment, all of it takes a few seconds, and says little.

#![expect(unsafe_code, reason = "asks the allocator how much is in use")]

#[expect(dead_code, reason = "no folder is needed here")]
mod support;

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash};
use std::hint::black_box;
use std::sync::{Arc, Barrier, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use gensync::{CacheKey, CachedMap, GenerationSynchronizer, Table, depend_on};
use nix::libc;
use quick_cache::sync::DefaultLifecycle;
use quick_cache::{OptionsBuilder, UnitWeighter};
use rustix::time::{ClockId, clock_gettime};

use support::Spread;

fn main() {
    let scale = if support::short() {
        Scale {
            rounds: 3,
            gets: 20_000,
            sizes: &[1000, 10_000],
            distinct: 20_000,
            trace: 50_000,
            capacities: &[1000],
            entries: 10_000,
        }
    } else {
        Scale {
            rounds: 7,
            gets: 1_000_000,
            sizes: &[1000, 10_000, 100_000],
            distinct: 1_000_000,
            trace: 5_000_000,
            capacities: &[1000, 10_000],
            entries: 100_000,
        }
    };
    scale.cached_map();
    if std::env::args().any(|argument| argument == "map") {
        return;
    }
    scale.hit_costs();
    scale.hit_ratios();
    scale.memory();
    scale.slowest();
}

struct Scale {
    /// How often the stores take turns.
    rounds: usize,
    /// How many gets a thread has in a turn, at least.
    gets: usize,
    /// How many entries the stores have whose hits are timed.
    sizes: &'static [usize],
    /// How many distinct keys a trace has, and how many accesses.
    distinct: usize,
    trace: usize,
    /// How many entries the stores have room for that a trace is played to.
    capacities: &'static [usize],
    /// How many entries there are when memory is measured, and the slowest accesses.
    entries: usize,
}

/// A map of many keys, as the measurements use it.
trait Store<K, V>: Sync {
    fn get(&self, key: &K) -> Option<V>;

    fn insert(&self, key: K, value: V);

    fn len(&self) -> usize;

    /// Does what is put off.
    fn settle(&self) {}

    /// Gets all these keys, and says how many there were. Provided here so that a get is called directly, not through a table of functions.
    fn hits(&self, keys: &[K]) -> usize {
        keys.iter().filter(|key| black_box(self.get(black_box(key))).is_some()).count()
    }
}

struct Named<K, V> {
    name: &'static str,
    store: Box<dyn Store<K, V>>,
}

impl<K, V> Named<K, V> {
    fn new(name: &'static str, store: impl Store<K, V> + 'static) -> Self {
        Self { name, store: Box::new(store) }
    }
}

type Fast = ahash::RandomState;

/// The stores that all tables have; the first is what the others are compared with.
fn stores<K: Key, V: Value>(capacity: usize) -> Vec<Named<K, V>> {
    vec![
        Named::new("HashMap in a RwLock", bare::<K, V, Fast>(capacity)),
        Named::new("moka", moka::<K, V, Fast>(capacity, None, None)),
        Named::new("quick_cache", quick::<K, V, Fast>(capacity)),
    ]
}

type Bare<K, V, S> = RwLock<HashMap<K, V, S>>;

fn bare<K: Key, V: Value, S: Hasher>(_: usize) -> Bare<K, V, S> {
    RwLock::new(HashMap::default())
}

impl<K: Key, V: Value, S: Hasher> Store<K, V> for Bare<K, V, S> {
    fn get(&self, key: &K) -> Option<V> {
        self.read().ok()?.get(key).cloned()
    }

    fn insert(&self, key: K, value: V) {
        self.write().expect("no panic under the lock").insert(key, value);
    }

    fn len(&self) -> usize {
        self.read().expect("no panic under the lock").len()
    }
}

type Moka<K, V, S> = moka::sync::Cache<K, V, S>;

fn moka<K: Key, V: Value, S: Hasher>(capacity: usize, live: Option<Duration>, idle: Option<Duration>) -> Moka<K, V, S> {
    let mut builder = moka::sync::Cache::builder().max_capacity(capacity as u64);
    if let Some(live) = live {
        builder = builder.time_to_live(live);
    }
    if let Some(idle) = idle {
        builder = builder.time_to_idle(idle);
    }
    builder.build_with_hasher(S::default())
}

impl<K: Key, V: Value, S: Hasher> Store<K, V> for Moka<K, V, S> {
    fn get(&self, key: &K) -> Option<V> {
        Self::get(self, key)
    }

    fn insert(&self, key: K, value: V) {
        Self::insert(self, key, value);
    }

    fn len(&self) -> usize {
        self.iter().count()
    }

    fn settle(&self) {
        self.run_pending_tasks();
    }
}

type Quick<K, V, S> = quick_cache::sync::Cache<K, V, UnitWeighter, S>;

fn quick<K: Key, V: Value, S: Hasher>(capacity: usize) -> Quick<K, V, S> {
    let mut options = OptionsBuilder::new();
    options.estimated_items_capacity(capacity).weight_capacity(capacity as u64);
    let options = options.build().expect("both capacities");
    Quick::with_options(options, UnitWeighter, S::default(), DefaultLifecycle::default())
}

/// Has room from the first for all that it may hold, and does not double what it has when that is full.
fn reserved<K: Key, V: Value, S: Hasher>(capacity: usize) -> Quick<K, V, S> {
    let cache = quick(capacity);
    cache.reserve(capacity);
    cache
}

impl<K: Key, V: Value, S: Hasher> Store<K, V> for Quick<K, V, S> {
    fn get(&self, key: &K) -> Option<V> {
        Self::get(self, key)
    }

    fn insert(&self, key: K, value: V) {
        Self::insert(self, key, value);
    }

    fn len(&self) -> usize {
        Self::len(self)
    }
}

/// quick_cache knows no time: a limit to it is what the value says, compared with the clock at each get.
struct TimedQuick<K, S> {
    cache: Quick<K, Stored, S>,
    coarse: bool,
}

impl<K: Key, S: Hasher> Store<K, Stored> for TimedQuick<K, S> {
    fn get(&self, key: &K) -> Option<Stored> {
        let now = clock_gettime(if self.coarse { ClockId::MonotonicCoarse } else { ClockId::Monotonic });
        let now = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
        self.cache.get(key).filter(|stored| now < stored.deadline)
    }

    fn insert(&self, key: K, value: Stored) {
        self.cache.insert(key, value);
    }

    fn len(&self) -> usize {
        self.cache.len()
    }
}

/// A store whose values are allocated when they are put in, as gensync's map does it, so that the two have as much in memory.
struct Owning<S>(S);

impl<K, S: Store<K, Arc<u64>>> Store<K, Arc<u64>> for Owning<S> {
    fn get(&self, key: &K) -> Option<Arc<u64>> {
        self.0.get(key)
    }

    fn insert(&self, key: K, value: Arc<u64>) {
        self.0.insert(key, Arc::new(*value));
    }

    fn len(&self) -> usize {
        self.0.len()
    }

    fn hits(&self, keys: &[K]) -> usize {
        self.0.hits(keys)
    }
}

/// gensync's map, on quick_cache with its own hasher.
struct Map<K: Key>(CachedMap<K, u64>);

impl<K: Key> Map<K> {
    fn new(capacity: usize) -> Self {
        let table = Table::options().capacity(capacity.max(1024) as u64).anonymous().expect("memory for a table");
        Self(CachedMap::builder_without_loader(&table, |key: &K| key.name()).max_entries(capacity).build())
    }
}

impl<K: Key> Store<K, Arc<u64>> for Map<K> {
    fn get(&self, key: &K) -> Option<Arc<u64>> {
        self.0.get_if_fresh(key)
    }

    fn insert(&self, key: K, value: Arc<u64>) {
        self.0.get_with(&key, || Ok::<_, std::convert::Infallible>(*value)).expect("room for the key");
    }

    fn len(&self) -> usize {
        self.0.len()
    }

    fn hits(&self, keys: &[K]) -> usize {
        keys.iter().filter(|key| black_box(self.0.get(black_box(*key))).is_ok()).count()
    }
}

/// A map whose values depend on `count` further keys, and how many bytes of memory that takes for each of these.
fn depending(count: usize) -> (Map<u64>, i64) {
    let table = Table::options().capacity(2 * count as u64 + 64).anonymous().expect("memory for a table");
    let key =
        |number: usize| GenerationSynchronizer::new(&table, format!("object:{number}")).expect("room for the key");
    let objects: Vec<_> = (0..count).map(key).collect();
    let map = CachedMap::builder_without_loader(&table, |key: &u64| key.name()).build();
    let before = in_use();
    let load = || {
        objects.iter().for_each(depend_on);
        Ok::<_, std::convert::Infallible>(0)
    };
    map.get_with(&0, load).expect("a value");
    let bytes = (in_use() - before) / count.max(1) as i64;
    (Map(map), bytes)
}

trait Hasher: BuildHasher + Clone + Default + Send + Sync + 'static {}

impl<S: BuildHasher + Clone + Default + Send + Sync + 'static> Hasher for S {}

trait Key: Clone + Eq + Hash + Send + Sync + 'static {
    const NAME: &'static str;

    fn new(number: u64) -> Self;

    /// In a table.
    fn name(&self) -> CacheKey;
}

impl Key for u64 {
    const NAME: &'static str = "u64";

    fn new(number: u64) -> Self {
        number
    }

    fn name(&self) -> CacheKey {
        self.to_string().into()
    }
}

impl Key for String {
    const NAME: &'static str = "String";

    /// Of 20 characters.
    fn new(number: u64) -> Self {
        format!("tenant:{number:013}")
    }

    fn name(&self) -> CacheKey {
        self.into()
    }
}

trait Value: Clone + Send + Sync + 'static {
    const NAME: &'static str;

    fn new(number: u64) -> Self;
}

impl Value for Arc<u64> {
    const NAME: &'static str = "8 bytes";

    fn new(number: u64) -> Self {
        Self::new(number)
    }
}

/// What a cache would keep that checks each value: the value, what was seen before it was loaded, and what it depends on.
#[derive(Clone)]
struct Stored {
    _value: Arc<u64>,
    _generation: u64,
    deadline: u64,
    _dependencies: Option<Arc<Vec<u64>>>,
}

impl Value for Stored {
    const NAME: &'static str = "32 bytes";

    fn new(number: u64) -> Self {
        const { assert!(size_of::<Self>() == 32) };
        Self { _value: Arc::new(number), _generation: number, deadline: u64::MAX, _dependencies: None }
    }
}

impl Scale {
    /// gensync's map beside the cache that it is built on.
    fn cached_map(&self) {
        fn both<K: Key>(room: usize) -> Vec<Named<K, Arc<u64>>> {
            vec![
                Named::new(
                    "quick_cache, own hasher",
                    Owning(quick::<K, Arc<u64>, quick_cache::DefaultHashBuilder>(room)),
                ),
                Named::new("CachedMap", Map::<K>::new(room)),
            ]
        }
        self.hit_head();
        for &size in self.sizes {
            self.hit_cost(size, both::<u64>(2 * size));
            self.hit_cost(size, both::<String>(2 * size));
        }
        println!("one value that depends on keys that its loader has found");
        for count in [0, 1, 12, 1000, 10_000] {
            let (depending, bytes) = depending(count);
            let name = format!("CachedMap, {count} keys, {bytes} bytes each").leak();
            Self { gets: self.gets / (count + 10) * 10, ..*self }.hit_cost(1, vec![Named::new(name, depending)]);
        }
        self.memory_head();
        self.memory_of(both::<u64>, self.entries);
        self.memory_of(both::<String>, self.entries);
        println!();
    }

    fn hit_head(&self) {
        println!(
            "{:<60}{:>22}{:>20}{:>26}",
            "a get that hits, ns", "one thread", "of the first", "each of two threads"
        );
    }

    fn memory_head(&self) {
        println!(
            "\n{:<52}{:>20}{:>20}{:>14}",
            "bytes an entry, beyond what an Arc points to", "filled", "overfilled", "entries"
        );
    }

    fn hit_costs(&self) {
        self.hit_head();
        for &size in self.sizes {
            // So large that a cache of several parts has room in each.
            let room = 2 * size;
            self.hit_cost(size, stores::<u64, Arc<u64>>(room));
            self.hit_cost(size, stores::<u64, Stored>(room));
            self.hit_cost(size, stores::<String, Arc<u64>>(room));
            self.hit_cost(size, stores::<String, Stored>(room));
        }
        let (size, room) = (self.entries, 2 * self.entries);
        println!("the hashers that one gets without asking");
        self.hit_cost(
            size,
            vec![
                Named::new("HashMap in a RwLock, own hasher", bare::<u64, Arc<u64>, std::hash::RandomState>(room)),
                Named::new("moka, own hasher", moka::<u64, Arc<u64>, std::hash::RandomState>(room, None, None)),
                Named::new("quick_cache, own hasher", quick::<u64, Arc<u64>, quick_cache::DefaultHashBuilder>(room)),
            ],
        );
        println!("limits to an entry's time");
        let hour = Some(Duration::from_secs(3600));
        for size in [self.sizes[0], self.entries] {
            let room = 2 * size;
            let mut stores = stores::<u64, Stored>(room);
            stores.push(Named::new("moka, time to live", moka::<u64, Stored, Fast>(room, hour, None)));
            stores.push(Named::new("moka, time to idle", moka::<u64, Stored, Fast>(room, None, hour)));
            stores.push(Named::new("moka, both", moka::<u64, Stored, Fast>(room, hour, hour)));
            for (name, coarse) in [("quick_cache, a deadline", false), ("quick_cache, a deadline, coarse clock", true)]
            {
                stores.push(Named::new(name, TimedQuick { cache: quick::<u64, Stored, Fast>(room), coarse }));
            }
            self.hit_cost(size, stores);
        }
    }

    /// By turns, of stores that have all the keys, and are asked for them in another order than that in which they came.
    fn hit_cost<K: Key, V: Value>(&self, size: usize, stores: Vec<Named<K, V>>) {
        let mut random = Random::new();
        let keys: Vec<K> = random.shuffled(size).into_iter().map(K::new).collect();
        for Named { store, .. } in &stores {
            for number in random.shuffled(size) {
                store.insert(K::new(number), V::new(number));
            }
            store.settle();
        }
        let rounds: Vec<Vec<(f64, f64)>> = (0..self.rounds)
            .map(|_| stores.iter().map(|store| (self.cost(store, &keys, 1), self.cost(store, &keys, 2))).collect())
            .collect();
        for (i, Named { name, .. }) in stores.iter().enumerate() {
            let one = Spread::of(rounds.iter().map(|round| round[i].0));
            let ratio = Spread::of(rounds.iter().map(|round| round[i].0 / round[0].0));
            let two = Spread::of(rounds.iter().map(|round| round[i].1));
            let name = format!("{name}, {} -> {}, {size}", K::NAME, V::NAME);
            println!("{name:<60}{:>22}{:>20}{:>26}", one.text(), ratio.text(), two.text());
        }
    }

    /// Of one get by one of so many threads, in nanoseconds. Each thread begins at another key.
    fn cost<K: Key, V: Value>(&self, store: &Named<K, V>, keys: &[K], threads: usize) -> f64 {
        let Named { name, store } = store;
        let passes = self.gets.div_ceil(keys.len());
        let start = Barrier::new(threads);
        let gets_of = |thread: usize| {
            let (later, sooner) = keys.split_at(thread * keys.len() / threads);
            // Fills the processor's cache, and what the thread has for itself.
            store.hits(keys);
            start.wait();
            let start = Instant::now();
            let hits: usize = (0..passes).map(|_| store.hits(sooner) + store.hits(later)).sum();
            let elapsed = start.elapsed();
            assert_eq!(hits, passes * keys.len(), "{name} has lost keys that it has room for");
            elapsed.as_nanos() as f64 / hits as f64
        };
        thread::scope(|scope| {
            let spawned: Vec<_> = (0..threads).map(|thread| scope.spawn(move || gets_of(thread))).collect();
            spawned.into_iter().map(|thread| thread.join().expect("no panic in a thread")).sum::<f64>() / threads as f64
        })
    }

    /// Of traces that are skewed by Zipf's law: the key of rank r is asked for in proportion to 1 / r^s. Each store gets a key, and
    /// inserts it if it was not there. Scans ask for keys that never come again; only what the others hit is counted.
    fn hit_ratios(&self) {
        let (distinct, trace) = (self.distinct, self.trace);
        println!("\n{:<52}{:>14}{:>14}", format!("{trace} accesses to {distinct} keys"), "hits, %", "ns an access");
        for skew in [0.8, 1.0, 1.2] {
            let zipf = Zipf::new(distinct, skew);
            let mut random = Random::new();
            let numbers: Vec<u64> = (0..trace).map(|_| zipf.rank(&mut random)).collect();
            for &capacity in self.capacities {
                println!(
                    "s = {skew}, room for {capacity}; the {capacity} most frequent keys have {:.2} %",
                    100.0 * zipf.share(capacity),
                );
                for scan in [0, 2 * capacity] {
                    for Named { name, store } in bounded(capacity) {
                        let Played { hits, nanoseconds } = self.play(&*store, &numbers, scan);
                        let name = if scan == 0 { name.to_owned() } else { format!("{name}, with scans of {scan}") };
                        println!("    {name:<48}{hits:>14.2}{nanoseconds:>14.1}");
                    }
                }
            }
        }
    }

    fn play(&self, store: &dyn Store<u64, Arc<u64>>, numbers: &[u64], scan: usize) -> Played {
        const SCANS: usize = 20;
        // The first part fills the store.
        let warm_up = numbers.len() / 5;
        let (mut hits, mut accesses) = (0, 0);
        let access = |number: u64| {
            let hit = store.get(&number).is_some();
            if !hit {
                store.insert(number, Arc::new(number));
            }
            hit
        };
        let mut scanned = self.distinct as u64;
        let start = Instant::now();
        for (i, &number) in numbers.iter().enumerate() {
            if scan > 0 && i % (numbers.len() / SCANS) == 0 {
                accesses += scan;
                (scanned..scanned + scan as u64).for_each(|number| _ = access(number));
                scanned += scan as u64;
            }
            hits += u32::from(access(number) && i >= warm_up);
        }
        let nanoseconds = start.elapsed().as_nanos() as f64 / (accesses + numbers.len()) as f64;
        Played { hits: 100.0 * f64::from(hits) / (numbers.len() - warm_up) as f64, nanoseconds }
    }

    fn memory(&self) {
        let entries = self.entries;
        self.memory_head();
        self.memory_of(stores::<u64, Arc<u64>>, entries);
        self.memory_of(stores::<u64, Stored>, entries);
        self.memory_of(stores::<String, Arc<u64>>, entries);
        self.memory_of(stores::<String, Stored>, entries);
        let of_pointers = |room| vec![Named::new("quick_cache, reserved", reserved::<u64, Arc<u64>, Fast>(room))];
        self.memory_of(of_pointers, entries);
        self.memory_of(
            |room| {
                let hour = Some(Duration::from_secs(3600));
                vec![
                    Named::new("moka, time to live", moka::<u64, Stored, Fast>(room, hour, None)),
                    Named::new("moka, both", moka::<u64, Stored, Fast>(room, hour, hour)),
                    Named::new("quick_cache, reserved", reserved::<u64, Stored, Fast>(room)),
                ]
            },
            entries,
        );
    }

    /// In a store that was just filled, and in one that was given three times as many keys as it has room for; that of what the caller
    /// would have without a store, the values, is not counted.
    fn memory_of<K: Key, V: Value>(&self, stores: impl Fn(usize) -> Vec<Named<K, V>>, room: usize) {
        let names: Vec<_> = stores(1).into_iter().map(|named| named.name).collect();
        for (i, name) in names.into_iter().enumerate() {
            let values: Vec<V> = (0..3 * room as u64).map(V::new).collect();
            // What a store leaves to be freed later is freed before the next one is measured, or almost all of it.
            let before = in_use();
            let store = stores(room).swap_remove(i).store;
            let fill = |values: &[V], first: usize| {
                for (i, value) in values.iter().enumerate() {
                    store.insert(K::new((first + i) as u64), value.clone());
                }
                (0..10).for_each(|_| store.settle());
                (in_use() - before) as f64 / store.len() as f64
            };
            let filled = fill(&values[..room], 0);
            let overfilled = fill(&values[room..], room);
            let name = format!("{name}, {} -> {}", K::NAME, V::NAME);
            println!("{name:<52}{filled:>20.1}{overfilled:>20.1}{:>14}", store.len());
        }
    }

    /// Each access timed for itself, the clock's own time included.
    fn slowest(&self) {
        println!(
            "\n{:<40}{:>10}{:>10}{:>10}{:>10}{:>12}",
            "one access of many, ns", "50 %", "99 %", "99.9 %", "99.99 %", "slowest"
        );
        let line = |name: &str, mut times: Vec<u64>| {
            times.sort_unstable();
            let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
            println!("{name:<40}{:>10}{:>10}{:>10}{:>10}{:>12}", at(0.5), at(0.99), at(0.999), at(0.9999), at(1.0));
        };
        let mut random = Random::new();
        for Named { name, store } in stores::<u64, Arc<u64>>(2 * self.entries) {
            (0..self.entries as u64).for_each(|number| store.insert(number, Arc::new(number)));
            store.settle();
            let timed = |number: u64| {
                let start = Instant::now();
                drop(black_box(store.get(&number)));
                start.elapsed().as_nanos() as u64
            };
            let times = (0..self.gets).map(|_| timed(random.below(self.entries as u64))).collect();
            line(&format!("{name}, a hit"), times);
        }
        let zipf = Zipf::new(self.distinct, 1.0);
        for Named { name, store } in bounded(self.entries) {
            let (mut hits, mut inserts) = (Vec::new(), Vec::new());
            for _ in 0..2 * self.gets {
                let number = zipf.rank(&mut random);
                let start = Instant::now();
                let value = black_box(store.get(&number));
                let got = start.elapsed();
                if value.is_some() {
                    hits.push(got.as_nanos() as u64);
                } else {
                    let value = Arc::new(number);
                    let start = Instant::now();
                    store.insert(number, value);
                    inserts.push(start.elapsed().as_nanos() as u64);
                }
            }
            line(&format!("{name}, Zipf's law, a hit"), hits);
            line(&format!("{name}, Zipf's law, an insert"), inserts);
        }
    }
}

/// The share of hits in hundredths, and the time of an access.
struct Played {
    hits: f64,
    nanoseconds: f64,
}

/// The stores that keep to their capacity.
fn bounded<K: Key, V: Value>(capacity: usize) -> Vec<Named<K, V>> {
    stores(capacity).split_off(1)
}

/// The bytes that the allocator has given out, with what it adds to each piece.
fn in_use() -> i64 {
    // SAFETY: it takes nothing, and only reads, under the allocator's own locks.
    let info = unsafe { libc::mallinfo2() };
    (info.uordblks + info.hblkhd) as i64
}

/// Ranks that follow Zipf's law.
struct Zipf {
    /// For each rank, how often it or a smaller one is asked for.
    cumulative: Vec<f64>,
}

impl Zipf {
    fn new(ranks: usize, skew: f64) -> Self {
        let mut sum = 0.0;
        let sums = (1..=ranks).map(|rank| {
            sum += (rank as f64).powf(-skew);
            sum
        });
        Self { cumulative: sums.collect() }
    }

    fn rank(&self, random: &mut Random) -> u64 {
        let at = random.unit() * self.cumulative[self.cumulative.len() - 1];
        self.cumulative.partition_point(|&sum| sum <= at) as u64
    }

    /// Of the accesses to the first ranks.
    fn share(&self, ranks: usize) -> f64 {
        self.cumulative[ranks - 1] / self.cumulative[self.cumulative.len() - 1]
    }
}

/// Random numbers of low quality (xorshift with a multiplication).
struct Random(u64);

impl Random {
    fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// From 0 up to, but without, 1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn below(&mut self, limit: u64) -> u64 {
        (self.unit() * limit as f64) as u64
    }

    /// The numbers below `count`, in random order.
    fn shuffled(&mut self, count: usize) -> Vec<u64> {
        let mut numbers: Vec<u64> = (0..count as u64).collect();
        for i in (1..count).rev() {
            numbers.swap(i, self.below(i as u64 + 1) as usize);
        }
        numbers
    }
}

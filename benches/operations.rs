//! What each operation costs, beside the bare operation that is the lower limit of its cost, on a mapping of the same kind.
//!
//! Criterion measures each of the two for itself. On a machine that does other work, figures taken one after another
//! drift apart, so both are measured by turns as well, and a table of these ratios comes last.
//!
//! With GENSYNC_BENCH_SHORT in the environment, all of it takes a few seconds, and says little.

#![expect(unsafe_code, reason = "maps files, for the bare operations")]

mod support;

use std::cell::Cell;
use std::fs::File;
use std::hint::black_box;
use std::io::{self, Read as _};
use std::ops::Deref;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use criterion::{BatchSize, Criterion};
use gensync::{Cached, CachedReader, Generation, GenerationSynchronizer, Table};
use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use sha2::{Digest as _, Sha256};

use support::Spread;

fn main() {
    let short = support::short();
    let listing = std::env::args().any(|argument| argument == "--list");
    let scale = match (listing, short) {
        (true, _) => Scale { rounds: 0, operations: 0, attaches: 0, fills: &[], many: (1, "1,000,000") },
        (_, true) => Scale {
            rounds: 3,
            operations: 100_000,
            attaches: 1000,
            fills: &[(1, 10_000, "10,000"), (1, 100_000, "100,000")],
            many: (10_000, "10,000"),
        },
        (_, false) => Scale {
            rounds: 7,
            operations: 20_000_000,
            attaches: 20_000,
            fills: &[(3, 1_000_000, "1,000,000"), (1, 10_000_000, "10,000,000")],
            many: (1_000_000, "1,000,000"),
        },
    };
    let mut criterion = Criterion::default().warm_up_time(Duration::from_millis(500));
    criterion = criterion.measurement_time(Duration::from_secs(2));
    if short {
        criterion = criterion.sample_size(10).nresamples(1000).warm_up_time(Duration::from_millis(10));
        criterion = criterion.measurement_time(Duration::from_millis(50));
    }
    let folder = support::folder().expect("a folder for the tables");
    let mut bench = Bench { criterion: criterion.configure_from_args(), scale, folder: folder.path() };

    let mut lines = bench.single_words();
    lines.extend(bench.cached());
    lines.extend(bench.updates());
    lines.extend(bench.attach_to_existing_keys());
    bench.attach_to_new_keys();
    bench.open();
    let sizes = bench.sizes();
    bench.criterion.final_summary();
    if !listing {
        println!("\n{:<40}{:>20}{:>20}{:>20}", "by turns", "gensync, ns", "bare, ns", "gensync / bare");
        for Line { name, gensync, bare, ratio } in lines {
            println!("{name:<40}{:>20}{:>20}{:>20}", gensync.text(), bare.text(), ratio.text());
        }
        println!("{sizes}");
    }
}

struct Scale {
    /// How often gensync and the bare operation take turns.
    rounds: usize,
    /// How many operations a turn has.
    operations: u64,
    /// How many attaches a turn has, each timed for itself.
    attaches: usize,
    /// How many tables are filled with how many keys.
    fills: &'static [(usize, u64, &'static str)],
    /// How many keys the large table has that is attached to.
    many: (u64, &'static str),
}

/// One line of the last table, in nanoseconds: the medians, least and greatest of the rounds.
struct Line {
    name: String,
    gensync: Spread,
    bare: Spread,
    ratio: Spread,
}

struct Bench<'a> {
    criterion: Criterion,
    scale: Scale,
    folder: &'a Path,
}

impl Bench<'_> {
    fn single_words(&mut self) -> Vec<Line> {
        let table = Table::open(self.folder.join("single")).expect("a table");
        let sync = GenerationSynchronizer::new(&table, key(0)).expect("room for a key");
        let words = Words::new(self.folder, 4096);
        // ORDERING: the bare operations have the orderings of gensync's, acquire for a check and AcqRel for an update, so that the ratio is of
        // the same promise. Nothing else is published by these words.
        let (word, seen) = (&words[0], words[0].load(Acquire));
        let copy = AtomicU64::new(0);
        // As if it were read elsewhere, so that the compiler keeps the store.
        black_box(&copy);
        [
            self.compare(
                "is_expired",
                Self::FAST,
                || black_box(&sync).is_expired(),
                || black_box(word).load(Acquire) != seen,
            ),
            self.compare(
                "mark_updated",
                Self::FAST,
                || black_box(&sync).mark_updated().map_or(0, Generation::get),
                || black_box(word).fetch_add(1, AcqRel),
            ),
            self.compare(
                "refresh",
                Self::FAST,
                || black_box(&sync).refresh().map_or(0, Generation::get),
                || {
                    let generation = black_box(word).load(Acquire);
                    copy.store(generation, Release);
                    generation
                },
            ),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    /// A fresh value, beside the pointer behind which it is kept, loaded alone and with its reference count.
    fn cached(&mut self) -> Vec<Line> {
        let table = Table::open(self.folder.join("cached")).expect("a table");
        let sync = GenerationSynchronizer::new(&table, key(0)).expect("room for a key");
        let cached = Cached::new(sync, || Ok::<_, io::Error>(1u64));
        let bare = ArcSwapOption::from_pointee(1u64);
        let get = || black_box(&cached).get().map_or(0, |value| *value);
        let mut reader = CachedReader::new(&cached);
        let words = Words::new(self.folder, 4096);
        let (word, seen, value) = (&words[0], words[0].load(Acquire), AtomicU64::new(1));
        [
            self.compare("Cached::get", Self::FAST, get, || {
                black_box(&bare).load().as_ref().map_or(0, |value| **value)
            }),
            self.compare("Cached::get (load_full)", Self::FAST, get, || {
                black_box(&bare).load_full().map_or(0, |value| *value)
            }),
            self.compare(
                "CachedReader::get",
                Self::FAST,
                || black_box(&mut reader).get().map_or(0, |value| *value),
                || if black_box(word).load(Acquire) == seen { black_box(&value).load(Acquire) } else { 0 },
            ),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    /// Crash-safe updates beside the lock that they take, and a check while one is pending beside a bare check.
    fn updates(&mut self) -> Vec<Line> {
        let path = self.folder.join("updates");
        let table = Table::open(&path).expect("a table");
        let sync = || GenerationSynchronizer::new(&table, key(0)).expect("room for a key");
        let (writer, reader) = (sync(), sync());
        let file = File::options().read(true).write(true).open(&path).expect("the table's file");
        let lock = |kind: i32| {
            let range = libc::flock { l_type: kind as i16, l_whence: 0, l_start: 8192, l_len: 128, l_pid: 0 };
            fcntl(&file, FcntlArg::F_OFD_SETLK(&range)).expect("a lock that no other process has")
        };
        let lock_and_unlock = || lock(libc::F_RDLCK) + lock(libc::F_UNLCK);
        let open_and_lock = || {
            let file = File::options().read(true).write(true).open(&path).expect("the table's file");
            let range = libc::flock { l_type: 0, l_whence: 0, l_start: 8192, l_len: 128, l_pid: 0 };
            fcntl(&file, FcntlArg::F_OFD_SETLK(&range)).expect("a lock that no other process has")
        };
        let update = || black_box(&writer).update(|| Ok::<_, io::Error>(0)).unwrap_or(1);
        let mut lines = vec![
            self.compare("update beside lock and unlock", Self::SLOW, update, lock_and_unlock),
            self.compare("update beside open, lock and close", Self::SLOW, update, open_and_lock),
        ];
        let words = Words::new(self.folder, 4096);
        let (word, seen) = (&words[0], words[0].load(Acquire));
        reader.refresh().expect("a live table");
        let pending = writer.begin_update().expect("an update");
        lines.push(self.compare(
            "is_expired while an update is pending",
            Self::SLOW,
            || black_box(&reader).is_expired(),
            || black_box(word).load(Acquire) != seen,
        ));
        pending.abandon();
        lines.into_iter().flatten().collect()
    }

    /// The parts of the scale's operations that a turn has.
    const FAST: u64 = 1;
    const SLOW: u64 = 50;

    fn compare<R>(
        &mut self,
        name: &str,
        part: u64,
        mut gensync: impl FnMut() -> R,
        mut bare: impl FnMut() -> R,
    ) -> Option<Line> {
        let mut group = self.criterion.benchmark_group(name);
        group.bench_function("gensync", |bencher| bencher.iter_custom(|operations| time(operations, &mut gensync)));
        group.bench_function("bare", |bencher| bencher.iter_custom(|operations| time(operations, &mut bare)));
        group.finish();
        let operations = self.scale.operations / part;
        let each = |elapsed: Duration| elapsed.as_nanos() as f64 / operations as f64;
        self.by_turns(name, || each(time(operations, &mut gensync)), || each(time(operations, &mut bare)))
    }

    fn by_turns(&self, name: &str, mut gensync: impl FnMut() -> f64, mut bare: impl FnMut() -> f64) -> Option<Line> {
        let rounds: Vec<_> = (0..self.scale.rounds).map(|_| (gensync(), bare())).collect();
        (!rounds.is_empty()).then(|| Line {
            name: name.to_owned(),
            gensync: Spread::of(rounds.iter().map(|round| round.0)),
            bare: Spread::of(rounds.iter().map(|round| round.1)),
            ratio: Spread::of(rounds.iter().map(|round| round.0 / round.1)),
        })
    }

    /// The bare operation sets the cost of memory apart: it hashes the key, and looks at one of as many words, 128 bytes apart, which
    /// in a large table is in no cache.
    fn attach_to_existing_keys(&mut self) -> Vec<Line> {
        let sizes = [(1000, "1,000"), self.scale.many];
        sizes.into_iter().filter_map(|(count, label)| self.attach_to_one_of(count, label)).collect()
    }

    fn attach_to_one_of(&mut self, count: u64, label: &str) -> Option<Line> {
        let (table, _) = fill(&self.folder.join(label), &keys(count));
        let words = Words::new(self.folder, count * Words::APART);
        let random = Random::new();
        let random_key = || key(random.below(count));
        let attach = |key: &str| GenerationSynchronizer::new(&table, key).expect("a key of the table");
        let look_up = |key: &str| words.of_key(key).load(Acquire);

        let name = format!("attach to an existing key of {label}");
        // So few that they are still in the processor's cache when they are attached to, as after a caller has just made the key.
        let batch = BatchSize::NumIterations(100);
        let mut group = self.criterion.benchmark_group(&name);
        group.bench_function("gensync", |bencher| bencher.iter_batched_ref(random_key, |key| attach(key), batch));
        group.bench_function("bare", |bencher| bencher.iter_batched_ref(random_key, |key| look_up(key), batch));
        group.finish();

        let attaches = self.scale.attaches;
        let clock = || median_of_single(attaches, random_key, |_| ());
        self.by_turns(
            &format!("attach to one of {label} keys"),
            || median_of_single(attaches, random_key, attach) - clock(),
            || median_of_single(attaches, random_key, look_up) - clock(),
        )
    }

    /// In new tables that need not grow. The bare operation claims one word, of pages that are in memory.
    fn attach_to_new_keys(&mut self) {
        let (path, keys) = (self.folder.join("new"), keys(500));
        let mut group = self.criterion.benchmark_group("attach to a new key");
        group.bench_function("gensync", |bencher| {
            bencher.iter_custom(|iterations| {
                in_parts(&keys, iterations, |keys| {
                    let table = Table::open(&path).expect("a table");
                    std::fs::remove_file(&path).expect("the table's file");
                    time_all(keys, |key| GenerationSynchronizer::new(&table, key).expect("room for a key"))
                })
            })
        });
        group.bench_function("bare", |bencher| {
            bencher.iter_custom(|iterations| {
                in_parts(&keys, iterations, |keys| {
                    let words = Words::new(self.folder, 1024 * Words::APART);
                    time_all(keys, |key| words.of_key(key).compare_exchange(0, 1, AcqRel, Acquire))
                })
            })
        });
        group.finish();
    }

    fn open(&mut self) {
        let path = self.folder.join("open");
        let table = Table::open(&path).expect("a table");
        let mut group = self.criterion.benchmark_group("open");
        group.bench_function("gensync", |bencher| bencher.iter(|| Table::open(&path).expect("the table")));
        group.bench_function("bare", |bencher| {
            bencher.iter(|| {
                let file = File::options().read(true).write(true).open(&path).expect("the table's file");
                MmapRaw::map_raw(&file).expect("a mapping")
            })
        });
        group.finish();
        drop(table);
    }

    /// How long it takes to fill large tables, and how large tables are.
    fn sizes(&self) -> String {
        let mut text = String::new();
        for &(times, count, label) in self.scale.fills {
            let (path, keys) = (self.folder.join("filled"), keys(count));
            let mut bytes = 0;
            let seconds = Spread::of((0..times).map(|_| {
                let (_table, elapsed) = fill(&path, &keys);
                bytes = allocated(&path);
                std::fs::remove_file(&path).expect("the table's file");
                elapsed.as_secs_f64()
            }));
            text += &format!(
                "{label} new keys of 20 characters by one process, from an empty table, growth included: {} s; {:.1} bytes a key\n",
                seconds.text(),
                bytes as f64 / count as f64,
            );
        }
        let path = self.folder.join("few");
        let (few, _) = fill(&path, &keys(800));
        text + &format!(
            "800 keys in a table of capacity 1024: {} bytes, {} of them allocated",
            few.stats().bytes,
            allocated(&path)
        )
    }
}

/// The bytes that a file takes.
fn allocated(path: &Path) -> u64 {
    path.metadata().expect("the table's file").blocks() * 512
}

/// Of 20 characters.
fn key(number: u64) -> String {
    format!("tenant:{number:013}")
}

fn keys(count: u64) -> Vec<String> {
    (0..count).map(key).collect()
}

/// Makes a table with these keys, and says how long it took.
fn fill(path: &Path, keys: &[String]) -> (Table, Duration) {
    let start = Instant::now();
    let table = Table::open(path).expect("a table");
    for key in keys {
        GenerationSynchronizer::new(&table, key).expect("room for a key");
    }
    (table, start.elapsed())
}

/// The one loop for criterion and for the turns: with a single caller, the operation is a part of it.
fn time<R>(operations: u64, operation: &mut impl FnMut() -> R) -> Duration {
    let start = Instant::now();
    for _ in 0..operations {
        black_box(operation());
    }
    start.elapsed()
}

/// The median of operations on one key each, in nanoseconds. Making the key does not count, nor dropping the result.
fn median_of_single<R>(count: usize, key: impl Fn() -> String, operation: impl Fn(&str) -> R) -> f64 {
    Spread::of((0..count).map(|_| {
        let key = key();
        let start = Instant::now();
        let result = operation(black_box(&key));
        let elapsed = start.elapsed();
        black_box(result);
        elapsed.as_nanos() as f64
    }))
    .median
}

/// `iterations` in parts that have a key for each.
fn in_parts(keys: &[String], iterations: u64, mut part: impl FnMut(&[String]) -> Duration) -> Duration {
    let parts = (0..iterations).step_by(keys.len());
    parts.map(|done| part(&keys[..keys.len().min((iterations - done) as usize)])).sum()
}

/// Dropping the results does not count.
fn time_all<R>(keys: &[String], operation: impl Fn(&str) -> R) -> Duration {
    let mut results = Vec::with_capacity(keys.len());
    let start = Instant::now();
    results.extend(keys.iter().map(|key| operation(key)));
    let elapsed = start.elapsed();
    black_box(results);
    elapsed
}

/// Words of a file that is mapped as a table is, all of its pages in memory.
struct Words(MmapRaw);

impl Words {
    /// How many bytes the words of keys are apart, so that none shares a cache line, nor the line that is fetched with it.
    const APART: u64 = 128;

    fn new(folder: &Path, bytes: u64) -> Self {
        let mut file = tempfile::tempfile_in(folder).expect("a file");
        io::copy(&mut io::repeat(0).take(bytes), &mut file).expect("room for the file");
        Self(MmapOptions::new().populate().map_raw(&file).expect("a mapping"))
    }

    /// The word that the hash of `key` leads to.
    fn of_key(&self, key: &str) -> &AtomicU64 {
        const APART: usize = Words::APART as usize / size_of::<AtomicU64>();
        const SALT: [u8; 16] = [7; 16];
        let digest = Sha256::new().chain_update(SALT).chain_update(key).finalize();
        let number = u64::from_le_bytes(std::array::from_fn(|i| digest[i]));
        // Without a division, which would distort the figure.
        let index = (u128::from(number) * (self.len() / APART) as u128) >> 64;
        &self[index as usize * APART]
    }
}

impl Deref for Words {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: the range is mapped as long as self lives, to a file that no other process has and that keeps its length;
        // it is aligned to a page, and every value is a valid atomic.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() / size_of::<AtomicU64>()) }
    }
}

/// Random numbers of low quality (xorshift).
struct Random(Cell<u64>);

impl Random {
    fn new() -> Self {
        Self(Cell::new(0x9e37_79b9_7f4a_7c15))
    }

    fn below(&self, limit: u64) -> u64 {
        let mut number = self.0.get();
        number ^= number << 13;
        number ^= number >> 7;
        number ^= number << 17;
        self.0.set(number);
        number % limit
    }
}

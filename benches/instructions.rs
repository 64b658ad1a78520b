//! How many instructions the operations of each use take: unlike times, the same on a busy machine and an idle one,
//! so that a check that costs more than before is noticed here before its time can be measured.
//!
//! Runs itself under valgrind's callgrind, which must be installed, and fails if an operation takes more than `EXPECTED` says;
//! on other processors than x86-64, it only prints the counts. Another compiler may lay out code in another way, so a few instructions
//! more are let pass. What the kernel does is not counted.

#[path = "support/callgrind.rs"]
mod callgrind;

use std::collections::HashMap;
use std::hint::black_box;
use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use arc_swap::ArcSwapOption;
use gensync::{Cached, CachedMap, CachedReader, GenerationSynchronizer, Table};

use callgrind::Costs;

/// The instructions of each operation of `counted`, its return included, with Rust 1.95 on x86-64. After another compiler or an
/// intended change, write down what the table of `cargo bench --bench instructions` says.
const EXPECTED: [(&str, u32); 17] = [
    ("load", 2),
    ("load_and_compare", 4),
    ("fetch_add", 3),
    ("arc_swap_load", 70),
    ("arc_swap_load_full", 70),
    ("is_expired", 16),
    ("is_expired_since", 18),
    ("ticket", 14),
    ("refresh", 16),
    ("mark_updated", 27),
    ("mark_updated_after_another", 27),
    ("clear", 30),
    ("cached_get", 97),
    ("cached_get_if_fresh", 97),
    ("cached_reader_get", 26),
    ("quick_cache_get", 84),
    ("cached_map_get", 183),
];

/// Two more, or three in a hundred of long ones, may come from the compiler's choices.
fn most(expected: u32) -> u32 {
    expected + (expected * 3).div_ceil(100).max(2)
}

/// Many times the 64 uses after which a holder reads the clock, so that a 64th of what that takes is in each count.
const CALLS: u32 = 64 * 32;
/// After which a holder's rate of use is known to be high.
const WARM_UP: u32 = 256;

mod counted {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering::*};

    use arc_swap::ArcSwapOption;
    use gensync::{Cached, CachedMap, CachedReader, Error, Generation, GenerationSynchronizer, Ticket};
    use quick_cache::sync::Cache;

    type Reader<'a> = CachedReader<u64, &'a Cached<u64>>;

    crate::callgrind::counted! {
        load(word: &AtomicU64) -> u64 = word.load(Acquire);
        load_and_compare(word: &AtomicU64, seen: u64) -> bool = word.load(Acquire) != seen;
        fetch_add(word: &AtomicU64) -> u64 = word.fetch_add(1, AcqRel);
        arc_swap_load(value: &ArcSwapOption<u64>) -> u64 = value.load().as_ref().map_or(0, |value| **value);
        arc_swap_load_full(value: &ArcSwapOption<u64>) -> Option<Arc<u64>> = value.load_full();
        is_expired(sync: &GenerationSynchronizer) -> bool = sync.is_expired();
        is_expired_since(sync: &GenerationSynchronizer, ticket: Ticket) -> bool = sync.is_expired_since(ticket);
        ticket(sync: &GenerationSynchronizer) -> Ticket = sync.ticket();
        refresh(sync: &GenerationSynchronizer) -> Result<Generation, Error> = sync.refresh();
        mark_updated(sync: &GenerationSynchronizer) -> Result<Generation, Error> = sync.mark_updated();
        mark_updated_after_another(sync: &&GenerationSynchronizer) -> Result<Generation, Error> = sync.mark_updated();
        clear(sync: &GenerationSynchronizer) -> Result<(), Error> = sync.clear();
        cached_get(cached: &Cached<u64>) -> Result<Arc<u64>, Error> = cached.get();
        cached_get_if_fresh(cached: &Cached<u64>) -> Option<Arc<u64>> = cached.get_if_fresh();
        cached_reader_get(reader: &mut Reader<'_>) -> u64 = reader.get().map_or(0, |value| *value);
        quick_cache_get(cache: &Cache<u64, Arc<u64>>, key: &u64) -> Option<Arc<u64>> = cache.get(key);
        cached_map_get(map: &CachedMap<u64, u64>, key: &u64) -> Result<Arc<u64>, Error> = map.get(key);
    }
}

/// Nothing of what is counted here looks at a file, as the table has none.
fn operate() {
    let table = Table::options().anonymous().expect("a table");
    let sync = || GenerationSynchronizer::new(&table, "key").expect("room for a key");
    let word = AtomicU64::new(1);
    let value = ArcSwapOption::from_pointee(1);
    // A thread's first load takes another path.
    drop(value.load());
    repeat(|| counted::load(black_box(&word)));
    repeat(|| counted::load_and_compare(black_box(&word), black_box(1)));
    repeat(|| counted::fetch_add(black_box(&word)));
    repeat(|| counted::arc_swap_load(black_box(&value)));
    repeat(|| counted::arc_swap_load_full(black_box(&value)));

    let fresh = busy(sync());
    repeat(|| counted::is_expired(black_box(&fresh)));
    let ticket = fresh.ticket();
    repeat(|| counted::is_expired_since(black_box(&fresh), black_box(ticket)));
    repeat(|| counted::ticket(black_box(&fresh)));
    repeat(|| counted::refresh(black_box(&fresh)));

    let updater = busy(sync());
    repeat(|| counted::mark_updated(black_box(&updater)));
    let late = busy(sync());
    updater.clear().expect("a live table");
    repeat(|| counted::mark_updated_after_another(black_box(&&late)));
    repeat(|| counted::clear(black_box(&updater)));

    let cached = || {
        let cached = Cached::new(sync(), || Ok::<_, io::Error>(1));
        (0..WARM_UP).for_each(|_| _ = cached.get().expect("a value"));
        cached
    };
    let fresh = cached();
    repeat(|| counted::cached_get(black_box(&fresh)));
    let fresh = cached();
    repeat(|| counted::cached_get_if_fresh(black_box(&fresh)));
    let mut reader = CachedReader::new(&fresh);
    (0..WARM_UP).for_each(|_| _ = reader.get().expect("a value"));
    repeat(|| counted::cached_reader_get(black_box(&mut reader)));

    let cache = quick_cache::sync::Cache::new(100);
    cache.insert(1, Arc::new(1));
    repeat(|| counted::quick_cache_get(black_box(&cache), black_box(&1)));
    let key = |key: &u64| key.to_string().into();
    let map = CachedMap::builder(&table, key, |key: &u64| Ok::<_, io::Error>(*key)).max_entries(100).build();
    (0..WARM_UP).for_each(|_| _ = map.get(&1).expect("a value"));
    repeat(|| counted::cached_map_get(black_box(&map), black_box(&1)));
}

fn busy(sync: GenerationSynchronizer) -> GenerationSynchronizer {
    (0..WARM_UP).for_each(|_| assert!(!sync.is_expired()));
    sync
}

fn repeat<R>(mut operation: impl FnMut() -> R) {
    (0..CALLS).for_each(|_| drop(black_box(operation())));
}

fn main() -> ExitCode {
    let given = |name: &str| std::env::args().any(|argument| argument == name);
    // Nor as a test, which is compiled in another way.
    if given("--counted") || !given("--bench") {
        operate();
        return ExitCode::SUCCESS;
    }
    let result = callgrind::profile(&[], &["--counted"]).and_then(|costs| check(&costs));
    result.map_or_else(
        |error| {
            eprintln!("{error}");
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    )
}

fn check(costs: &HashMap<String, Costs>) -> Result<(), String> {
    println!("{:<24}{:>12}{:>12}", "instructions", "counted", "expected");
    let mut errors = Vec::new();
    for (name, expected) in EXPECTED {
        let Some(costs) = costs.get(name) else {
            errors.push(callgrind::not_counted(name));
            continue;
        };
        let count = costs["Ir"].round() as u32;
        println!("{name:<24}{count:>12}{expected:>12}");
        let most = most(expected);
        if count > most && cfg!(target_arch = "x86_64") {
            errors.push(format!(
                "{name} takes {count} instructions, at most {most} expected; if that is meant, change EXPECTED in {}",
                file!()
            ));
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(errors.join("\n")) }
}

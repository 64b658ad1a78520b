//! How much of the processor's cache a check of many keys takes: unlike times, the same on a busy machine and an idle one, and on each
//! processor, as the caches are simulated.
//!
//! Runs itself under valgrind's callgrind, which must be installed, with caches of usual sizes: 32 KiB of data in the first level, 2 MiB in
//! the last, lines of 64 bytes. All keys are used in one shuffled order, again and again: fresh, at a high rate of use, and first
//! without counting, so that the caches hold of the keys what they can. Beside gensync stands what it cannot fall below: a word in an
//! array for each key, compared with what was seen, which stands in another array.
//!
//! The figures are for one operation, its call and its return included, but nothing of the loop around it. Those of two runs differ in the
//! last digit only, by the table's salt, which places the keys. Nothing fails because of a figure. It takes half a minute.

#[path = "support/callgrind.rs"]
mod callgrind;

use std::convert::Infallible;
use std::hint::black_box;
use std::process::ExitCode;
use std::sync::atomic::AtomicU64;

use gensync::{Cached, CachedReader, GenerationSynchronizer, Table};

/// The functions of `counted`, and what they are.
const OPERATIONS: [(&str, &str); 5] = [
    ("word_of_packed", "bare words, eight to a line"),
    ("word_of_apart", "bare words, a line each"),
    ("is_expired", "is_expired"),
    ("cached_reader_get", "CachedReader::get"),
    ("cached_get", "Cached::get"),
];

const KEYS: [usize; 2] = [1000, 100_000];

const LINE: usize = 64;
const FIRST_LEVEL: &str = "--D1=32768,8,64";
const LAST_LEVEL: &str = "--LL=2097152,16,64";
/// A last level that holds whatever the keys take, for the count of all their lines.
const ENDLESS: (usize, &str) = (64 << 20, "--LL=67108864,16,64");

/// Only what is done in this function is counted; the caches are simulated throughout.
const COLLECT: &str = "--toggle-collect=*::collected*";

/// After which a holder's budget of uses without a look at the clock is the largest, and as good as unspent.
const WARM_UP: usize = 64;
/// How often all keys are used before it counts, and then. What a warm holder has left suffices for both, and for each way of use.
const SETTLING: usize = 1;
const COUNTED: usize = 2;

mod counted {
    use std::sync::atomic::{AtomicU64, Ordering::*};

    use gensync::{Cached, CachedReader, GenerationSynchronizer};

    type Reader<'a> = CachedReader<u64, &'a Cached<u64>>;

    crate::callgrind::counted! {
        word_of_packed(word: &AtomicU64, seen: &u64) -> bool = word.load(Acquire) != *seen;
        // Unlike the one above in the order of its arguments, as the compiler would merge the two.
        word_of_apart(seen: &u64, word: &AtomicU64) -> bool = word.load(Acquire) != *seen;
        is_expired(sync: &GenerationSynchronizer) -> bool = sync.is_expired();
        cached_reader_get(reader: &mut Reader<'_>) -> u64 = reader.get().map_or(0, |value| *value);
        cached_get(cached: &Cached<u64>) -> u64 = cached.get().map_or(0, |value| *value);
    }
}

/// A word alone in its line.
#[repr(align(64))]
struct Apart(AtomicU64);

/// Uses each key in each way. Nothing of it looks at a file, as the table has none.
fn operate(passes: &Passes) {
    let keys = passes.order.len();
    let numbers = || 0..keys as u64;
    let seen: Vec<u64> = numbers().collect();
    let packed: Vec<_> = numbers().map(AtomicU64::new).collect();
    let apart: Vec<_> = numbers().map(|number| Apart(AtomicU64::new(number))).collect();
    passes.make(|key| assert!(!counted::word_of_packed(black_box(&packed[key]), black_box(&seen[key]))));
    passes.make(|key| assert!(!counted::word_of_apart(black_box(&seen[key]), black_box(&apart[key].0))));

    let table = Table::options().anonymous().expect("a table");
    let sync =
        |number| GenerationSynchronizer::new(&table, format!("tenant:{number}:settings")).expect("room for a key");
    let syncs: Vec<_> = numbers().map(sync).collect();
    // Key by key, as the budget is granted by the rate of use.
    for sync in &syncs {
        (0..WARM_UP).for_each(|_| assert!(!sync.is_expired()));
    }
    passes.make(|key| assert!(!counted::is_expired(black_box(&syncs[key]))));

    let values = syncs.into_iter().zip(numbers());
    let cached = |(sync, number)| Cached::new(sync, move || Ok::<_, Infallible>(number));
    let values: Vec<_> = values.map(cached).collect();
    let mut readers: Vec<_> = values.iter().map(CachedReader::new).collect();
    for (reader, number) in readers.iter_mut().zip(numbers()) {
        (0..WARM_UP).for_each(|_| assert_eq!(reader.get().ok(), Some(&number)));
    }
    passes.make(|key| assert_eq!(counted::cached_get(black_box(&values[key])), key as u64));
    passes.make(|key| assert_eq!(counted::cached_reader_get(black_box(&mut readers[key])), key as u64));
}

/// How all keys are used.
struct Passes {
    order: Vec<u32>,
    /// Whether they are used once, and are in no cache before.
    cold: bool,
}

impl Passes {
    fn new(keys: usize, cold: bool) -> Self {
        let mut order: Vec<_> = (0..keys as u32).collect();
        // Random numbers of low quality (xorshift), the same in each run.
        let mut number = 0x9e37_79b9_7f4a_7c15_u64;
        for last in (1..keys).rev() {
            number ^= number << 13;
            number ^= number >> 7;
            number ^= number << 17;
            order.swap(last, (number % (last as u64 + 1)) as usize);
        }
        Self { order, cold }
    }

    /// `operation` is of one key, and calls a function of `counted`.
    fn make(&self, mut operation: impl FnMut(usize)) {
        if self.cold {
            let others = vec![0_u8; 2 * ENDLESS.0];
            others.iter().step_by(LINE).for_each(|byte| _ = black_box(*byte));
            collected(&self.order, &mut operation);
        } else {
            (0..SETTLING).for_each(|_| once(&self.order, &mut operation));
            (0..COUNTED).for_each(|_| collected(&self.order, &mut operation));
        }
    }
}

#[inline(never)]
fn collected(order: &[u32], operation: &mut impl FnMut(usize)) {
    once(order, operation);
}

fn once(order: &[u32], operation: &mut impl FnMut(usize)) {
    order.iter().for_each(|&key| operation(key as usize));
}

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().collect();
    let keys_after = |name: &str| {
        let position = arguments.iter().position(|argument| argument == name)?;
        arguments.get(position + 1)?.parse::<usize>().ok()
    };
    for (name, cold) in [(WARM, false), (COLD, true)] {
        if let Some(keys) = keys_after(name) {
            operate(&Passes::new(keys, cold));
            return ExitCode::SUCCESS;
        }
    }
    // Nor as a test, which is compiled in another way.
    if !arguments.iter().any(|argument| argument == "--bench") {
        operate(&Passes::new(KEYS[0], false));
        return ExitCode::SUCCESS;
    }
    println!(
        "For one operation, with simulated caches ({FIRST_LEVEL} {LAST_LEVEL}: bytes, ways, bytes of a line). The last column: how many \
         different lines one use of all keys touches, by the number of keys."
    );
    for keys in KEYS {
        if let Err(error) = print(keys) {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// The arguments by which this program runs itself, each before the number of keys.
const WARM: &str = "--warm";
const COLD: &str = "--cold";

fn print(keys: usize) -> Result<(), String> {
    let argument = keys.to_string();
    let profile = |last_level, argument: [&str; 2]| {
        callgrind::profile(&["--cache-sim=yes", FIRST_LEVEL, last_level, COLLECT], &argument)
    };
    let warm = profile(LAST_LEVEL, [WARM, &argument])?;
    let cold = profile(ENDLESS.1, [COLD, &argument])?;
    let columns = ["instructions", "reads, writes", "1st missed", "last missed", "lines a key"];
    println!("\n{:<28}{}", format!("{keys} keys"), columns.map(|column| format!("{column:>15}")).concat());
    for (name, label) in OPERATIONS {
        let warm = warm.get(name).ok_or_else(|| callgrind::not_counted(name))?;
        let cold = cold.get(name).ok_or_else(|| callgrind::not_counted(name))?;
        let figures = [
            warm["Ir"],
            warm["Dr"] + warm["Dw"],
            warm["D1mr"] + warm["D1mw"],
            warm["DLmr"] + warm["DLmw"],
            cold["DLmr"] + cold["DLmw"],
        ];
        println!("{label:<28}{}", figures.map(|figure| format!("{figure:>15.2}")).concat());
    }
    Ok(())
}

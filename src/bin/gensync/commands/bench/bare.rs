//! The bare atomics and futexes that gensync is compared with.

use std::hint::black_box;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::*};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use rustix::thread::futex::{self, Flags};

use super::{BATCH, median, nanoseconds, time};

pub(super) fn load(slice: Duration) -> f64 {
    let word = AtomicU64::new(7);
    // ORDERING: Acquire pairs with nothing here: it is the cost of the load in `is_expired` that is measured.
    time(slice, || _ = black_box(black_box(&word).load(Acquire)))
}

pub(super) fn add(slice: Duration) -> f64 {
    let word = AtomicU64::new(7);
    // ORDERING: AcqRel pairs with nothing here: it is the cost of the addition in `mark_updated` that is measured.
    time(slice, || _ = black_box(black_box(&word).fetch_add(1, AcqRel)))
}

/// A word with two cache lines of its own, as prefetchers fetch lines in pairs.
#[derive(Default)]
#[repr(align(128))]
struct Line(AtomicU64);

pub(super) fn contention(slice: Duration, threads: u64, is_shared: bool) -> f64 {
    let lines: Vec<Line> = (0..threads).map(|_| Line::default()).collect();
    let start = Barrier::new(threads as usize);
    scope(|scope| {
        let threads: Vec<_> = (0..threads as usize)
            .map(|number| {
                let (word, start) = (&lines[if is_shared { 0 } else { number }].0, &start);
                scope.spawn(move || {
                    start.wait();
                    let (start, mut count) = (Instant::now(), 0.0);
                    while start.elapsed() < slice {
                        // ORDERING: AcqRel pairs with nothing here: it is the cost of the contended addition that is measured.
                        (0..BATCH).for_each(|_| _ = black_box(word.fetch_add(1, AcqRel)));
                        count += f64::from(BATCH);
                    }
                    count / start.elapsed().as_secs_f64() / 1e6
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or(f64::NAN)).sum()
    })
}

/// Microseconds from the change of a word to the moment when its waiter reads the clock.
///
/// ORDERING: the AcqRel addition to `word` pairs with the waiter's Acquire load of it. So the waiter's time, which it stores in
/// `woken` after that load, comes after the 0 that was stored before the addition, and is not overwritten by it; and a waiter
/// that has seen the last addition also sees `is_over`, which was stored before it. A waiter that has not seen it does not sleep
/// on, as the futex compares the word again. The Release store of the time pairs with the Acquire load of `woken` in the loop
/// that waits for it. `is_over` is stored with Release and loaded with Acquire, although the word already
/// carries it.
pub(super) fn waking(slice: Duration, rest: Duration) -> f64 {
    let (word, woken, is_over) = (AtomicU32::new(0), AtomicU64::new(0), AtomicBool::new(false));
    scope(|scope| {
        scope.spawn(|| {
            let mut seen = 0;
            while !is_over.load(Acquire) {
                let _ = futex::wait(&word, Flags::empty(), seen, None);
                let present = word.load(Acquire);
                if present != seen {
                    woken.store(nanoseconds(), Release);
                    seen = present;
                }
            }
        });
        let (start, mut times) = (Instant::now(), Vec::new());
        while start.elapsed() < slice {
            sleep(rest);
            woken.store(0, Release);
            let before = nanoseconds();
            word.fetch_add(1, AcqRel);
            let _ = futex::wake(&word, Flags::empty(), 1);
            let after = loop {
                match woken.load(Acquire) {
                    0 => std::thread::yield_now(),
                    after => break after,
                }
            };
            times.push((after - before) as f64 / 1000.0);
        }
        is_over.store(true, Release);
        word.fetch_add(1, AcqRel);
        let _ = futex::wake(&word, Flags::empty(), 1);
        median(&mut times)
    })
}

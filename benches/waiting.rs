//! What it takes to wake processes that wait for a key, and what that costs the process that updates it, beside a bare futex.
//!
//! Forked processes sleep until a word has moved on: a key's generation, and a word of a shared page, by turns, as figures
//! that are taken one after another drift on a machine that does other work. Prints a table, and leaves it in cargo's
//! target folder as `waiting/results.json`.
//!
//! With GENSYNC_BENCH_SHORT in the environment, all of it takes a few seconds, and says little.

#![expect(unsafe_code, reason = "forks, and shares a page between the processes")]

mod support;

use std::cell::Cell;
use std::error::Error;
use std::fs::{self, File};
use std::hint::black_box;
use std::io::{self, Write as _};
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::*};
use std::thread::{sleep, yield_now};
use std::time::{Duration, Instant};

use gensync::{GenerationSynchronizer, Table};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use rustix::thread::futex::{self, Flags};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::Serialize;

use support::Spread;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// How many processes wait for one key.
const CROWD: usize = 64;

/// What processes wait for. A forked one has a copy that has seen what the original had seen.
trait Beacon {
    /// Moves on, and wakes all waiters.
    fn update(&self);

    /// Moves on so many times, while there is no waiter and the updater knows that, as far as it can.
    fn update_unawaited(&self, times: u32);

    /// Sleeps until it is no longer what was seen.
    fn wait(&self);

    fn see(&self);
}

impl Beacon for GenerationSynchronizer {
    fn update(&self) {
        self.mark_updated().expect("a live table");
    }

    fn update_unawaited(&self, times: u32) {
        for _ in 0..times {
            black_box(black_box(self).mark_updated()).expect("a live table");
        }
    }

    fn wait(&self) {
        self.wait();
    }

    fn see(&self) {
        self.refresh().expect("a live table");
    }
}

/// A word as a shared futex. The process that updates it must know whether there is a waiter.
struct Bare {
    word: &'static AtomicU32,
    seen: Cell<u32>,
}

impl Bare {
    fn new(word: &'static AtomicU32) -> Self {
        Self { word, seen: Cell::new(0) }
    }
}

// ORDERING: an update is AcqRel and a look acquire, as of a generation in gensync: a waiter that sees the new number in `wait` or `see`
// sees what the updater wrote before its `fetch_add`. The kernel compares the word again before it puts the waiter to sleep.
impl Beacon for Bare {
    fn update(&self) {
        self.word.fetch_add(1, AcqRel);
        futex::wake(self.word, Flags::empty(), i32::MAX as u32).expect("a futex");
    }

    fn update_unawaited(&self, times: u32) {
        for _ in 0..times {
            black_box(black_box(self.word).fetch_add(1, AcqRel));
        }
    }

    fn wait(&self) {
        let seen = self.seen.get();
        while self.word.load(Acquire) == seen {
            // Whatever ended the sleep, the word shows whether it was an update.
            let _ = futex::wait(self.word, Flags::empty(), seen, None);
        }
    }

    fn see(&self) {
        self.seen.set(self.word.load(Acquire));
    }
}

/// A figure, in nanoseconds.
#[derive(Serialize)]
struct Row {
    name: &'static str,
    gensync: Spread,
    bare: Spread,
    /// Gensync by bare, round by round.
    ratio: Spread,
}

struct Scale {
    /// How often gensync and the bare futex take turns.
    rounds: usize,
    /// How many round trips a turn has.
    trips: usize,
    /// How often a turn wakes a crowd.
    crowds: usize,
    /// How many updates without a waiter a turn has.
    updates: u32,
    /// How many waiters a turn kills.
    kills: usize,
}

fn main() -> Outcome<()> {
    let scale = if support::short() {
        Scale { rounds: 3, trips: 500, crowds: 3, updates: 100_000, kills: 10 }
    } else {
        Scale { rounds: 11, trips: 10_000, crowds: 50, updates: 10_000_000, kills: 200 }
    };
    let rounds = scale.rounds;
    let folder = support::folder()?;
    let table = Table::open(folder.path().join("waiting"))?;
    let page = Page::new()?;
    let gensync = [GenerationSynchronizer::new(&table, "ping")?, GenerationSynchronizer::new(&table, "pong")?];
    let bare = [&page.ping, &page.pong].map(|line| Bare::new(&line.0));
    let stage = Stage { gensync, bare, page, start: Instant::now(), scale };

    let cores = cores()?;
    let mut rows = Vec::new();
    let (core, another) = (cores[0], cores.get(1));
    rows.extend(stage.compare(["woken on the waker's core"], |pair| stage.ping_pong(pair, [core, core]))?);
    if let Some(&another) = another {
        rows.extend(stage.compare(["woken on another core"], |pair| stage.ping_pong(pair, [core, another]))?);
    }
    rows.extend(stage.compare(["the last of 64 woken"], |[beacon, _]| stage.crowd(beacon))?);
    rows.extend(stage.compare(["update, nobody waits"], |[beacon, _]| stage.alone(beacon))?);
    let names = ["update, the waiter was killed", "the next update"];
    rows.extend(stage.compare(names, |[beacon, _]| stage.bereaved(beacon))?);

    println!("{} cores, {rounds} rounds: medians of nanoseconds (least–greatest)\n", cores.len());
    println!("{:<32}{:>26}{:>26}{:>20}", "", "gensync", "bare", "gensync / bare");
    for Row { name, gensync, bare, ratio } in &rows {
        println!("{name:<32}{:>26}{:>26}{:>20}", gensync.text(), bare.text(), ratio.text());
    }
    let results = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("waiting");
    let json = results.join("results.json");
    fs::create_dir_all(&results)?;
    let report = serde_json::json!({ "cores": cores.len(), "rounds": rounds, "rows": rows });
    serde_json::to_writer_pretty(File::create(&json)?, &report)?;
    println!("\n{}", json.display());
    Ok(())
}

/// The cores that this process may run on.
fn cores() -> Outcome<Vec<usize>> {
    let set = sched_getaffinity(None)?;
    Ok((0..CpuSet::MAX_CPU).filter(|&core| set.is_set(core)).collect())
}

fn stay_on(core: usize) -> Outcome<()> {
    let mut set = CpuSet::new();
    set.set(core);
    Ok(sched_setaffinity(None, &set)?)
}

struct Stage {
    gensync: [GenerationSynchronizer; 2],
    bare: [Bare; 2],
    page: &'static Page,
    start: Instant,
    scale: Scale,
}

impl Stage {
    fn compare<const N: usize>(
        &self,
        names: [&'static str; N],
        measure: impl Fn([&dyn Beacon; 2]) -> Outcome<[f64; N]>,
    ) -> Outcome<[Row; N]> {
        let mut rounds = Vec::new();
        for _ in 0..self.scale.rounds {
            let [one, other] = &self.gensync;
            let gensync = measure([one, other])?;
            let [one, other] = &self.bare;
            rounds.push((gensync, measure([one, other])?));
        }
        Ok(std::array::from_fn(|figure| Row {
            name: names[figure],
            gensync: Spread::of(rounds.iter().map(|(gensync, _)| gensync[figure])),
            bare: Spread::of(rounds.iter().map(|(_, bare)| bare[figure])),
            ratio: Spread::of(rounds.iter().map(|(gensync, bare)| gensync[figure] / bare[figure])),
        }))
    }

    /// Half a round trip between two processes that are bound to cores. Left alone, the scheduler puts them on one core now and on
    /// two then, and these differ more than what is compared.
    fn ping_pong(&self, [ping, pong]: [&dyn Beacon; 2], cores: [usize; 2]) -> Outcome<[f64; 1]> {
        ping.see();
        pong.see();
        let mut processes = Processes::default();
        processes.fork(|| {
            stay_on(cores[1])?;
            for _ in 0..self.scale.trips {
                ping.wait();
                ping.see();
                pong.update();
            }
            Ok(())
        })?;
        processes.fork(|| {
            stay_on(cores[0])?;
            let trip = || {
                let start = Instant::now();
                ping.update();
                pong.wait();
                pong.see();
                start.elapsed()
            };
            self.hand_over((0..self.scale.trips).map(|_| trip()));
            Ok(())
        })?;
        processes.join()?;
        Ok([self.handed_over() / 2.0])
    }

    /// From an update until the last of a crowd has woken.
    fn crowd(&self, beacon: &dyn Beacon) -> Outcome<[f64; 1]> {
        let Page { announced, woken, last, done, .. } = self.page;
        announced.0.store(0, SeqCst);
        woken.0.store(0, SeqCst);
        let done = Bare::new(&done.0);
        beacon.see();
        let mut processes = Processes::default();
        for _ in 0..CROWD {
            processes.fork(|| {
                for round in 1..=self.scale.crowds {
                    announced.0.fetch_add(1, SeqCst);
                    beacon.wait();
                    last.0.fetch_max(self.start.elapsed().as_nanos() as u64, SeqCst);
                    beacon.see();
                    if woken.0.fetch_add(1, SeqCst) + 1 == (round * CROWD) as u64 {
                        done.update();
                    }
                }
                Ok(())
            })?;
        }
        let waiters = processes.0.clone();
        processes.fork(|| {
            let mut times = Vec::new();
            for round in 1..=self.scale.crowds {
                while announced.0.load(SeqCst) < (round * CROWD) as u64 {
                    sleep(Duration::from_millis(1));
                }
                waiters.iter().try_for_each(|&waiter| until_asleep(waiter))?;
                done.see();
                let start = self.start.elapsed();
                beacon.update();
                done.wait();
                times.push(Duration::from_nanos(last.0.load(SeqCst)) - start);
            }
            self.hand_over(times);
            Ok(())
        })?;
        processes.join()?;
        Ok([self.handed_over()])
    }

    /// An update without a waiter.
    fn alone(&self, beacon: &dyn Beacon) -> Outcome<[f64; 1]> {
        let updates = self.scale.updates;
        let start = Instant::now();
        beacon.update_unawaited(updates);
        Ok([start.elapsed().as_nanos() as f64 / f64::from(updates)])
    }

    /// The first two updates after a waiter was killed. Each includes a look at the clock.
    fn bereaved(&self, beacon: &dyn Beacon) -> Outcome<[f64; 2]> {
        let mut times = [Vec::new(), Vec::new()];
        for _ in 0..self.scale.kills {
            beacon.see();
            let mut processes = Processes::default();
            let waiter = processes.fork(|| {
                beacon.wait();
                Ok(())
            })?;
            until_asleep(waiter)?;
            drop(processes);
            // After a fork, the first write to each page is expensive.
            beacon.see();
            let start = Instant::now();
            beacon.update();
            let between = Instant::now();
            beacon.update_unawaited(1);
            times[1].push(between.elapsed());
            times[0].push(between - start);
        }
        Ok(times.map(median))
    }

    /// Leaves the median for the parent.
    fn hand_over(&self, times: impl IntoIterator<Item = Duration>) {
        self.page.result.0.store(median(times) as u64, SeqCst);
    }

    fn handed_over(&self) -> f64 {
        self.page.result.0.load(SeqCst) as f64
    }
}

/// In nanoseconds.
fn median(times: impl IntoIterator<Item = Duration>) -> f64 {
    Spread::of(times.into_iter().map(|time| time.as_nanos() as f64)).median
}

/// Returns when the process sleeps. It must have nothing to sleep on except what it waits for.
fn until_asleep(process: Pid) -> Outcome<()> {
    loop {
        let status = fs::read_to_string(format!("/proc/{process}/stat"))?;
        // The state follows the name, which may be anything, in brackets.
        match status.rsplit_once(") ").and_then(|(_, fields)| fields.chars().next()) {
            Some('S') => return Ok(()),
            Some('R' | 'D') => yield_now(),
            state => return Err(format!("a process that should wait has the state {state:?}").into()),
        }
    }
}

/// The processes that have not ended. Dropping them kills them.
#[derive(Default)]
struct Processes(Vec<Pid>);

impl Processes {
    fn fork(&mut self, work: impl FnOnce() -> Outcome<()>) -> Outcome<Pid> {
        io::stdout().flush()?;
        // SAFETY: this process has one thread.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => {
                self.0.push(child);
                Ok(child)
            }
            ForkResult::Child => {
                let work = || set_pdeathsig(Signal::SIGKILL).map_err(Into::into).and_then(|()| work());
                // Leaves by `exit` whatever happens, as the table's folder and the other processes are the parent's.
                std::process::exit(match catch_unwind(AssertUnwindSafe(work)) {
                    Ok(Ok(())) => 0,
                    Ok(Err(error)) => {
                        eprintln!("a process: {error}");
                        1
                    }
                    Err(_) => 101,
                })
            }
        }
    }

    /// Returns when all have ended, or when one ended badly, as others may wait for that one.
    fn join(mut self) -> Outcome<()> {
        while !self.0.is_empty() {
            let status = waitpid(None, None)?;
            self.0.retain(|&process| Some(process) != status.pid());
            if !matches!(status, WaitStatus::Exited(_, 0)) {
                return Err(format!("a process ended badly: {status:?}").into());
            }
        }
        Ok(())
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        for &process in &self.0 {
            let _ = kill(process, Signal::SIGKILL);
            let _ = waitpid(process, None);
        }
    }
}

/// What all processes share.
struct Page {
    ping: Line<AtomicU32>,
    pong: Line<AtomicU32>,
    done: Line<AtomicU32>,
    /// How often a process of the crowd was about to wait.
    announced: Line<AtomicU64>,
    /// How often a process of the crowd has woken.
    woken: Line<AtomicU64>,
    /// When the last one woke, in nanoseconds since the start.
    last: Line<AtomicU64>,
    result: Line<AtomicU64>,
}

/// Two cache lines, as processors fetch them in pairs.
#[repr(align(128))]
struct Line<T>(T);

impl Page {
    fn new() -> Outcome<&'static Self> {
        let size = NonZeroUsize::new(size_of::<Self>()).ok_or("nothing to share")?;
        // SAFETY: a new mapping, of zeros, which are valid atomics; it is never unmapped.
        Ok(unsafe {
            let base = mmap_anonymous(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED)?;
            base.cast().as_ref()
        })
    }
}

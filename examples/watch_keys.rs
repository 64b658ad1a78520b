//! Workers that sleep until their key changes, and how long it takes to wake them.
//!
//! The parent updates the keys in turn. Before each update it notes the update's number and time in a page that all
//! processes share, and a forked worker that wakes must find the note of the update that woke it, or of a later one. A
//! latency is the time from just before `mark_updated` to just after `wait`. If one wakeup reports several updates to a
//! worker, they are coalesced, and the latency is that of the oldest. A worker that has not seen its key's last update has
//! missed it.
//!
//! On a virtual machine of two cores:
//!
//! ```text
//! 4 workers watch 2 keys; 3000 updates, one every 1ms
//!
//! worker   key   wakeups coalesced  missed    p50 µs    p99 µs  p99.9 µs    max µs
//!      0     0      1498         2       0      20.5      41.5     941.1     942.6
//!      1     1      1498         2       0      23.6      64.3    1026.0    1026.6
//!      2     0      1499         1       0      17.7      38.8     929.3     930.3
//!      3     1      1498         2       0      20.6      66.7    1020.9    1030.1
//!    all            5993         7       0      21.2      51.0    1017.9    1030.1
//! ```

#![expect(unsafe_code, reason = "forks, and shares a page of notes between the processes")]

use std::error::Error;
use std::io::{self, Write as _};
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::thread::sleep;
use std::time::{Duration, Instant};

use clap::Parser;
use gensync::{GenerationSynchronizer, Table};
use hdrhistogram::Histogram;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

/// Forked workers that sleep until their key changes.
#[derive(Parser)]
#[command(name = "watch_keys")]
struct Options {
    /// How many workers to fork, each of which watches one key
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=256))]
    workers: u32,
    /// How many keys, shared out among the workers
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    keys: u32,
    /// How many updates of all keys together
    #[arg(long, default_value_t = 3000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    updates: u32,
    /// The time from one update to the next
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(0..=10_000_000))]
    interval_microseconds: u32,
}

type Outcome<T> = Result<T, Box<dyn Error>>;

/// How long workers may go on after the last update.
const PATIENCE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("watch_keys: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Returns how many changes were missed.
fn run(options: &Options) -> Outcome<u64> {
    let table = Table::options().anonymous()?;
    let board = Board::new(options)?;
    let syncs = (0..board.keys).map(|key| attach(&table, key)).collect::<Outcome<Vec<_>>>()?;

    let mut workers = Workers(Vec::new());
    for worker in 0..board.workers {
        workers.fork(|| watch(&table, &board, worker))?;
    }
    // ORDERING: SeqCst, for simplicity. Pairs with the worker's addition to `ready` after its first `refresh`: no update begins
    // before every worker has read its first generation.
    while board.ready().load(SeqCst) < board.workers as u64 {
        workers.reap()?;
        sleep(Duration::from_millis(1));
    }

    let interval = Duration::from_micros(options.interval_microseconds.into());
    println!(
        "{} workers watch {} keys; {} updates, one every {interval:?}\n",
        board.workers, board.keys, board.updates
    );
    let start = Instant::now();
    for update in 0..board.updates {
        sleep((interval * update as u32).saturating_sub(start.elapsed()));
        let key = update % board.keys;
        board.note(update);
        syncs[key].mark_updated()?;
    }

    let end = Instant::now() + PATIENCE;
    while !workers.0.is_empty() && Instant::now() < end {
        workers.reap()?;
        sleep(Duration::from_millis(1));
    }
    drop(workers);
    report(&board)
}

fn attach(table: &Table, key: usize) -> Outcome<GenerationSynchronizer> {
    Ok(GenerationSynchronizer::new(table, ["watched", &key.to_string()])?)
}

/// What a worker does: sleeps until its key changes, until it has seen the last change.
fn watch(table: &Table, board: &Board, worker: usize) -> Outcome<()> {
    let (key, row) = (board.key(worker), board.row(worker));
    let sync = attach(table, key)?;
    let first = sync.refresh()?.get();
    // ORDERING: SeqCst, for simplicity. Pairs with the parent's load of `ready`: the parent updates only after the
    // `refresh` above.
    board.ready().fetch_add(1, SeqCst);
    let mut seen = 0;
    while seen < board.updates_of(key) {
        sync.wait();
        let woken = board.now();
        // An anonymous table is never replaced, so each update moves the generation on by one.
        let present = sync.refresh()?.get() - first;
        // ORDERING: Relaxed. The loads of `noted` and `time` pair with the parent's stores in `note`. The update makes them
        // visible: the parent stores before `mark_updated`, which releases, and `refresh` above acquires. The worker alone
        // writes its row, and the parent reads it after `waitpid`.
        if board.noted(key).load(Relaxed) < present {
            row.unnoted().fetch_add(1, Relaxed);
        }
        row.latency(seen).store((woken - board.time(key, seen).load(Relaxed)).max(1), Relaxed);
        row.seen().store(present, Relaxed);
        seen = present;
    }
    Ok(())
}

fn report(board: &Board) -> Outcome<u64> {
    println!(
        "{:>6} {:>5} {:>9} {:>9} {:>7} {:>9} {:>9} {:>9} {:>9}",
        "worker", "key", "wakeups", "coalesced", "missed", "p50 µs", "p99 µs", "p99.9 µs", "max µs"
    );
    let mut total = Tally::new()?;
    for worker in 0..board.workers {
        let tally = board.tally(worker)?;
        tally.print(&worker.to_string(), &board.key(worker).to_string());
        total.add(&tally)?;
    }
    total.print("all", "");
    Ok(total.missed)
}

/// The wakeups and latencies of one worker, or of all.
struct Tally {
    latencies: Histogram<u64>,
    coalesced: u64,
    missed: u64,
}

impl Tally {
    fn new() -> Outcome<Self> {
        Ok(Self { latencies: Histogram::new(3)?, coalesced: 0, missed: 0 })
    }

    fn add(&mut self, other: &Self) -> Outcome<()> {
        self.coalesced += other.coalesced;
        self.missed += other.missed;
        Ok(self.latencies.add(&other.latencies)?)
    }

    fn print(&self, worker: &str, key: &str) {
        let Self { latencies, coalesced, missed } = self;
        let [median, p99, p999, max] =
            [0.5, 0.99, 0.999, 1.0].map(|quantile| latencies.value_at_quantile(quantile) as f64 / 1e3);
        println!(
            "{worker:>6} {key:>5} {:>9} {coalesced:>9} {missed:>7} {median:>9.1} {p99:>9.1} {p999:>9.1} {max:>9.1}",
            latencies.len()
        );
    }
}

/// The workers that have not ended. Dropping them kills them.
struct Workers(Vec<Pid>);

impl Workers {
    fn fork(&mut self, work: impl FnOnce() -> Outcome<()>) -> Outcome<()> {
        io::stdout().flush()?;
        // SAFETY: this process has one thread.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => self.0.push(child),
            ForkResult::Child => {
                let work = || set_pdeathsig(Signal::SIGKILL).map_err(Into::into).and_then(|()| work());
                // Leaves by `exit` in any case, as only the parent may kill the other workers.
                std::process::exit(match catch_unwind(AssertUnwindSafe(work)) {
                    Ok(Ok(())) => 0,
                    Ok(Err(error)) => {
                        eprintln!("worker: {error}");
                        1
                    }
                    Err(_) => 101,
                })
            }
        }
        Ok(())
    }

    /// Removes the workers that have ended, and fails if one of them did not succeed.
    fn reap(&mut self) -> Outcome<()> {
        while !self.0.is_empty() {
            let status = waitpid(None, Some(WaitPidFlag::WNOHANG))?;
            let Some(ended) = status.pid() else { break };
            self.0.retain(|&pid| pid != ended);
            if !matches!(status, WaitStatus::Exited(_, 0)) {
                return Err(format!("a worker ended badly: {status:?}").into());
            }
        }
        Ok(())
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for &pid in &self.0 {
            let _ = kill(pid, Signal::SIGKILL);
            let _ = waitpid(pid, None);
        }
    }
}

/// The page that all processes share: notes of the updates, and what each worker has seen of them.
struct Board {
    words: &'static [AtomicU64],
    workers: usize,
    keys: usize,
    updates: usize,
    start: Instant,
}

impl Board {
    fn new(options: &Options) -> Outcome<Self> {
        let [workers, keys, updates] = [options.workers, options.keys, options.updates].map(|count| count as usize);
        let count = 1 + keys + updates + workers * Row::length(updates, keys);
        let size = NonZeroUsize::new(count * size_of::<AtomicU64>()).ok_or("nothing to share")?;
        // SAFETY: a new mapping, of zeros, which are valid atomics; it is never unmapped.
        let words = unsafe {
            let base = mmap_anonymous(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED)?;
            std::slice::from_raw_parts(base.cast().as_ptr(), count)
        };
        Ok(Self { words, workers, keys, updates, start: Instant::now() })
    }

    /// Nanoseconds, by a clock that all processes share.
    fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    /// The key that a worker watches.
    fn key(&self, worker: usize) -> usize {
        worker % self.keys
    }

    fn updates_of(&self, key: usize) -> u64 {
        (self.updates + self.keys - 1 - key) as u64 / self.keys as u64
    }

    /// How many workers may be woken.
    fn ready(&self) -> &AtomicU64 {
        &self.words[0]
    }

    /// How many updates of `key` were noted.
    fn noted(&self, key: usize) -> &AtomicU64 {
        &self.words[1 + key]
    }

    /// When an update of `key` was begun, by the number of those before it.
    fn time(&self, key: usize, before: u64) -> &AtomicU64 {
        &self.words[1 + self.keys + before as usize * self.keys + key]
    }

    fn note(&self, update: usize) {
        let (key, before) = (update % self.keys, (update / self.keys) as u64);
        // ORDERING: Relaxed. Pairs with the worker's loads after it wakes: the `mark_updated` that follows releases both stores.
        self.noted(key).store(before + 1, Relaxed);
        self.time(key, before).store(self.now(), Relaxed);
    }

    fn row(&self, worker: usize) -> Row {
        let length = Row::length(self.updates, self.keys);
        Row(&self.words[1 + self.keys + self.updates + worker * length..][..length])
    }

    fn tally(&self, worker: usize) -> Outcome<Tally> {
        let (row, mut tally) = (self.row(worker), Tally::new()?);
        // ORDERING: Relaxed. These loads pair with the worker's stores to its row: the worker has ended, and `waitpid` has
        // returned.
        let seen = row.seen().load(Relaxed);
        for before in 0..seen {
            match row.latency(before).load(Relaxed) {
                0 => tally.coalesced += 1,
                latency => tally.latencies.record(latency)?,
            }
        }
        tally.missed = self.updates_of(self.key(worker)) - seen + row.unnoted().load(Relaxed);
        Ok(tally)
    }
}

/// One worker's words.
struct Row(&'static [AtomicU64]);

impl Row {
    fn length(updates: usize, keys: usize) -> usize {
        2 + updates.div_ceil(keys)
    }

    /// How many updates the worker knows of.
    fn seen(&self) -> &AtomicU64 {
        &self.0[0]
    }

    /// How often the worker woke and did not find the note of the update that woke it.
    fn unnoted(&self) -> &AtomicU64 {
        &self.0[1]
    }

    /// The nanoseconds that an update took to wake the worker; 0 if it was coalesced with one before.
    fn latency(&self, before: u64) -> &AtomicU64 {
        &self.0[2 + before as usize]
    }
}

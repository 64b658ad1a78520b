//! A pre-forked server in small: workers answer requests from memory, and notice at once when a setting changes.
//!
//! Each key has a settings file, replaced by rename. A worker checks `is_expired` at each request and loads the file
//! again if so; now and then it writes a new version and marks it updated. An oracle outside gensync, a page that all
//! processes share, holds for each key the newest version with a complete update: an answer from an older one is a stale
//! read. With `--kill`, workers die at random and are forked again.

#![expect(unsafe_code, reason = "forks, and shares a page of counters between the processes")]

use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use std::time::{Duration, Instant};

use clap::Parser;
use gensync::{GenerationSynchronizer, Table};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use serde::{Deserialize, Serialize};

/// Forked workers that keep their settings fresh through gensync.
#[derive(Parser)]
#[command(name = "forked_workers")]
struct Options {
    /// How many workers to fork
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=256))]
    workers: u32,
    /// How long they work, in seconds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    seconds: u32,
    /// How many keys, each with a settings file
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    keys: u32,
    /// How many updates all workers together make in a second
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(0..=100_000))]
    updates_per_second: u32,
    /// SIGKILL a random worker ten times a second, and fork it again
    #[arg(long)]
    kill: bool,
}

type Outcome<T> = Result<T, Box<dyn Error>>;

/// What a worker holds in memory, and what the files hold.
#[derive(Serialize, Deserialize)]
struct Settings {
    version: u64,
    greeting: String,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("forked_workers: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Outcome<bool> {
    stop_on_signals()?;
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let folder = tempfile::Builder::new().prefix("forked_workers-").tempdir_in(parent)?;
    let site = Site { folder: folder.path().to_owned(), board: Board::new(options)? };
    for key in 0..site.board.keys {
        site.save(key, &Settings { version: 1, greeting: "Hello".to_owned() })?;
        // ORDERING: Relaxed. Pairs with the workers' loads of `completed`: they are forked after this.
        site.board.completed(key).store(1, Relaxed);
    }
    let table = Table::open(folder.path().join("table.gensync"))?;

    let start = Instant::now();
    let mut pids = (0..options.workers as usize)
        .map(|worker| site.fork_worker(&table, worker, options))
        .collect::<Outcome<Vec<_>>>()?;
    let mut random = Random(u64::from(std::process::id()) | 1 << 40);
    let mut kills = 0u64;
    println!("{} workers, {} keys, {} updates a second", options.workers, options.keys, options.updates_per_second);
    let end = start + Duration::from_secs(options.seconds.into());
    let (mut next_line, mut checks_before) = (start + Duration::from_secs(1), 0);
    // ORDERING: Relaxed. Pairs with the store in the signal handler `stop`; the flag is the whole message.
    while Instant::now() < end && !STOP.load(Relaxed) {
        std::thread::sleep(Duration::from_millis(100).min(end - Instant::now()));
        none_died()?;
        if options.kill {
            let worker = random.below(pids.len() as u64) as usize;
            kill(pids[worker], Signal::SIGKILL)?;
            waitpid(pids[worker], None)?;
            pids[worker] = site.fork_worker(&table, worker, options)?;
            kills += 1;
        }
        if Instant::now() >= next_line {
            let total = site.board.totals();
            let seconds = start.elapsed().as_secs();
            println!(
                "{seconds:4} s  {:6.1} million checks/s  {:8} reloads  {:7} updates  {kills:4} kills  {} stale reads",
                (total.checks - checks_before) as f64 / 1e6,
                total.reloads,
                total.updates,
                total.stale
            );
            checks_before = total.checks;
            next_line += Duration::from_secs(1);
        }
    }
    let elapsed = start.elapsed();

    // No worker may update any more when the workers check for the last time.
    //
    // ORDERING: SeqCst, for simplicity. DRAINING asks the workers to stop, and pairs with their Relaxed load of the phase, which
    // may come late. Each worker's store to DRAINED, after its last update, pairs with the load in `row_sum`; ENDING, stored
    // after all of them, pairs with the worker's load in its loop. So every update comes before every worker's last check.
    site.board.phase().store(DRAINING, SeqCst);
    while site.board.row_sum(Row::DRAINED) < pids.len() as u64 {
        std::thread::sleep(Duration::from_millis(1));
        none_died()?;
    }
    site.board.phase().store(ENDING, SeqCst);
    for pid in pids {
        let status = waitpid(pid, None)?;
        if !matches!(status, WaitStatus::Exited(_, 0)) {
            return Err(format!("a worker ended badly: {status:?}").into());
        }
    }
    report(&site, options, elapsed, kills)
}

fn none_died() -> Outcome<()> {
    match waitpid(None, Some(WaitPidFlag::WNOHANG))? {
        WaitStatus::StillAlive => Ok(()),
        status => Err(format!("a worker ended by itself: {status:?}").into()),
    }
}

/// What the parent and the workers have in common.
struct Site {
    folder: PathBuf,
    board: Board,
}

impl Site {
    fn file(&self, key: usize) -> PathBuf {
        self.folder.join(format!("settings-{key}.json"))
    }

    fn load(&self, key: usize) -> Outcome<Settings> {
        Ok(serde_json::from_slice(&fs::read(self.file(key))?)?)
    }

    /// Replaces the settings file: readers find the old version or the new one.
    fn save(&self, key: usize, settings: &Settings) -> Outcome<()> {
        let new = self.folder.join(format!("settings-{key}.new"));
        fs::write(&new, serde_json::to_vec(settings)?)?;
        Ok(fs::rename(new, self.file(key))?)
    }

    /// One writer at a time for each key. The system drops the lock of a process that is killed.
    fn lock(&self, key: usize) -> Outcome<File> {
        let lock = File::create(self.folder.join(format!("settings-{key}.lock")))?;
        lock.lock()?;
        Ok(lock)
    }

    fn fork_worker(&self, table: &Table, worker: usize, options: &Options) -> Outcome<Pid> {
        io::stdout().flush()?;
        // SAFETY: this process has one thread.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(child),
            ForkResult::Child => {
                // Leaves by `exit` in any case, as only the parent may remove the folder.
                let work = || Worker::start(self, table, worker, options)?.work();
                std::process::exit(match std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)) {
                    Ok(Ok(())) => 0,
                    Ok(Err(error)) => {
                        eprintln!("worker {worker}: {error}");
                        1
                    }
                    Err(_) => 101,
                })
            }
        }
    }
}

struct Worker<'a> {
    site: &'a Site,
    row: Row<'a>,
    syncs: Vec<GenerationSynchronizer>,
    settings: Vec<Settings>,
    random: Random,
    between_updates: Duration,
}

impl<'a> Worker<'a> {
    fn start(site: &'a Site, table: &Table, worker: usize, options: &Options) -> Outcome<Self> {
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        let keys = 0..site.board.keys;
        let syncs = keys
            .clone()
            .map(|key| GenerationSynchronizer::new(table, ["settings", &key.to_string()]))
            .collect::<Result<Vec<_>, _>>()?;
        let load = |key: usize| syncs[key].refresh_with(|| site.load(key));
        let settings = keys.map(load).collect::<Outcome<Vec<_>>>()?;
        let between_updates = match options.updates_per_second {
            0 => Duration::MAX,
            rate => Duration::from_secs(options.workers.into()) / rate,
        };
        let random = Random(u64::from(std::process::id()) << 20 | 1);
        Ok(Self { site, row: site.board.row(worker), syncs, settings, random, between_updates })
    }

    fn work(mut self) -> Outcome<()> {
        let board = &self.site.board;
        let start = Instant::now();
        let mut updates = 0;
        for request in 0u64.. {
            let key = self.random.below(board.keys as u64) as usize;
            if request.is_multiple_of(4096) {
                self.time_checks(key);
            }
            if request.is_multiple_of(64) && start.elapsed() >= self.between_updates.saturating_mul(updates + 1) {
                updates += 1;
                self.update(key)?;
            }
            self.answer(key)?;
            // ORDERING: Relaxed. Pairs with the parent's store of DRAINING, which publishes nothing else; it may be seen late.
            if board.phase().load(Relaxed) != WORKING {
                break;
            }
        }
        // ORDERING: SeqCst, for simplicity. The store releases this worker's updates to the parent's load in `row_sum`; the load
        // pairs with the parent's store of ENDING, and acquires the updates of all other workers.
        self.row.word(Row::DRAINED).store(1, SeqCst);
        while board.phase().load(SeqCst) != ENDING {
            std::thread::sleep(Duration::from_millis(1));
        }
        for key in 0..board.keys {
            self.answer(key)?;
            // ORDERING: Relaxed. Pairs with the load in `report`, which runs after `waitpid`.
            self.row.last_version(key).store(self.settings[key].version, Relaxed);
        }
        Ok(())
    }

    /// One request.
    fn answer(&mut self, key: usize) -> Outcome<()> {
        // ORDERING: Acquire pairs with the Release `fetch_max` in `update`: the update of the version that is read here was
        // complete before the check below, which therefore must notice it.
        let newest = self.site.board.completed(key).load(Acquire);
        let expired = self.syncs[key].is_expired();
        self.row.count(Row::CHECKS);
        if expired {
            self.settings[key] = self.syncs[key].refresh_with(|| self.site.load(key))?;
            self.row.count(Row::RELOADS);
        }
        if self.settings[key].version < newest {
            self.row.count(Row::STALE);
        }
        Ok(())
    }

    /// Times a single check, and a run of them, as one takes less time than the clock's resolution.
    fn time_checks(&self, key: usize) {
        let sync = &self.syncs[key];
        let start = Instant::now();
        let mut expired = sync.is_expired();
        let single = start.elapsed();
        let start = Instant::now();
        for _ in 0..Row::RUN {
            expired |= sync.is_expired();
        }
        let run = start.elapsed();
        // What the checks said is not lost: the state stays expired until it is loaded.
        std::hint::black_box(expired);
        self.row.time_checks(single.as_nanos() as u64, run.as_nanos() as u64);
    }

    fn update(&mut self, key: usize) -> Outcome<()> {
        let _lock = self.site.lock(key)?;
        let version = self.site.load(key)?.version + 1;
        let settings = Settings { version, greeting: format!("Hello from {}", std::process::id()) };
        // If this worker is killed within the update, before or after the file is replaced, no worker stays stale.
        self.syncs[key].update(|| self.site.save(key, &settings))?;
        // ORDERING: Release pairs with the Acquire load in `answer`: a worker that reads this version also sees the update above.
        self.site.board.completed(key).fetch_max(version, Release);
        self.settings[key] = settings;
        self.row.count(Row::UPDATES);
        Ok(())
    }
}

fn report(site: &Site, options: &Options, elapsed: Duration, kills: u64) -> Outcome<bool> {
    let board = &site.board;
    println!(
        "\n{:>6}  {:>14}  {:>9}  {:>8}  {:>15}  {:>12}",
        "worker", "checks", "reloads", "updates", "median check ns", "max check ns"
    );
    for worker in 0..options.workers as usize {
        let row = board.row(worker);
        let figures = row.figures();
        let (median, max) = (row.median_check(), row.word(Row::MAX_CHECK).load(Relaxed));
        println!(
            "{worker:>6}  {:>14}  {:>9}  {:>8}  {median:>15.2}  {max:>12}",
            figures.checks, figures.reloads, figures.updates
        );
    }
    let total = board.totals();
    println!("{:>6}  {:>14}  {:>9}  {:>8}", "all", total.checks, total.reloads, total.updates);
    println!(
        "\nmedian: of runs of {} checks; max: of single ones, reading the clock and being descheduled included",
        Row::RUN
    );
    println!(
        "{:.1} million checks a second, {kills} workers killed",
        total.checks as f64 / elapsed.as_secs_f64() / 1e6
    );

    let mut behind = 0;
    for key in 0..board.keys {
        let newest = site.load(key)?.version;
        for worker in 0..options.workers as usize {
            let version = board.row(worker).last_version(key).load(Relaxed);
            if version != newest {
                println!("worker {worker} ended at version {version} of key {key}, the newest is {newest}");
                behind += 1;
            }
        }
    }
    if behind == 0 {
        println!("every worker ended at the newest version of each of {} keys", board.keys);
    }
    println!("stale reads: {}", total.stale);
    Ok(total.stale == 0 && behind == 0)
}

/// The page that all processes share: the oracle, and the workers' counters, which outlive a worker that is killed.
struct Board {
    words: &'static [AtomicU64],
    keys: usize,
    workers: usize,
}

const WORKING: u64 = 0;
const DRAINING: u64 = 1;
const ENDING: u64 = 2;

impl Board {
    fn new(options: &Options) -> Outcome<Self> {
        let (keys, workers) = (options.keys as usize, options.workers as usize);
        let count = 1 + keys + workers * Row::length(keys);
        let size = NonZeroUsize::new(count * size_of::<AtomicU64>()).ok_or("nothing to share")?;
        // SAFETY: a new mapping, of zeros, which are valid atomics; it is never unmapped.
        let words = unsafe {
            let base = mmap_anonymous(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED)?;
            std::slice::from_raw_parts(base.cast().as_ptr(), count)
        };
        Ok(Self { words, keys, workers })
    }

    fn phase(&self) -> &AtomicU64 {
        &self.words[0]
    }

    /// The newest version of `key` with a complete update.
    fn completed(&self, key: usize) -> &AtomicU64 {
        &self.words[1 + key]
    }

    fn row(&self, worker: usize) -> Row<'_> {
        let length = Row::length(self.keys);
        Row(&self.words[1 + self.keys + worker * length..][..length])
    }

    fn row_sum(&self, word: usize) -> u64 {
        (0..self.workers).map(|worker| self.row(worker).word(word).load(SeqCst)).sum()
    }

    fn totals(&self) -> Figures {
        let sum = |word| self.row_sum(word);
        Figures {
            checks: sum(Row::CHECKS),
            reloads: sum(Row::RELOADS),
            updates: sum(Row::UPDATES),
            stale: sum(Row::STALE),
        }
    }
}

struct Figures {
    checks: u64,
    reloads: u64,
    updates: u64,
    stale: u64,
}

/// One worker's counters.
///
/// ORDERING: Relaxed, except DRAINED. One worker alone writes a row, and a worker that replaces a killed one is forked after its
/// death. The parent's loads pair with these stores: those for its lines may be late, and those for the report run after
/// `waitpid`.
struct Row<'a>(&'a [AtomicU64]);

impl<'a> Row<'a> {
    const CHECKS: usize = 0;
    const RELOADS: usize = 1;
    const UPDATES: usize = 2;
    const STALE: usize = 3;
    const DRAINED: usize = 4;
    const MAX_CHECK: usize = 5;
    /// How often a run of so many checks took so many nanoseconds, the last one for all that took longer.
    const TIMES: usize = 6;
    const TIMES_COUNT: usize = 2000;
    const RUN: u64 = 100;

    fn length(keys: usize) -> usize {
        Self::TIMES + Self::TIMES_COUNT + keys
    }

    fn word(&self, word: usize) -> &'a AtomicU64 {
        &self.0[word]
    }

    /// Only its worker writes a row, so this need not be one step.
    fn count(&self, word: usize) {
        self.word(word).store(self.word(word).load(Relaxed) + 1, Relaxed);
    }

    /// `single` and `run` are nanoseconds.
    fn time_checks(&self, single: u64, run: u64) {
        self.word(Self::CHECKS).store(self.word(Self::CHECKS).load(Relaxed) + 1 + Self::RUN, Relaxed);
        self.count(Self::TIMES + (run as usize).min(Self::TIMES_COUNT - 1));
        self.word(Self::MAX_CHECK).fetch_max(single, Relaxed);
    }

    /// The median of the runs, in nanoseconds for one check.
    fn median_check(&self) -> f64 {
        let times: Vec<_> = (0..Self::TIMES_COUNT).map(|time| self.word(Self::TIMES + time).load(Relaxed)).collect();
        let half = times.iter().sum::<u64>() / 2;
        let mut below = 0;
        let run = times.iter().position(|count| {
            below += count;
            below > half
        });
        run.unwrap_or(0) as f64 / Self::RUN as f64
    }

    fn last_version(&self, key: usize) -> &'a AtomicU64 {
        self.word(Self::TIMES + Self::TIMES_COUNT + key)
    }

    fn figures(&self) -> Figures {
        let get = |word| self.word(word).load(Relaxed);
        Figures {
            checks: get(Self::CHECKS),
            reloads: get(Self::RELOADS),
            updates: get(Self::UPDATES),
            stale: get(Self::STALE),
        }
    }
}

/// Numbers that need not be good (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

static STOP: AtomicBool = AtomicBool::new(false);

/// SIGINT and SIGTERM end the run early, with a report and nothing left behind.
fn stop_on_signals() -> nix::Result<()> {
    extern "C" fn stop(_: i32) {
        // ORDERING: Relaxed. Pairs with the load of `STOP` in the parent's loop; the flag is the whole message.
        STOP.store(true, Relaxed);
    }
    let action = SigAction::new(SigHandler::Handler(stop), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler stores into an atomic, which any handler may.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

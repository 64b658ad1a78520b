//! `bench`: what gensync costs on this machine, beside the bare atomics that it is made of.
//!
//! The table is a temporary one. Processes of this same program contend for its keys and wait for them. Threads contend for the
//! bare atomics and futexes, as it makes no difference to caches and the kernel.

mod bare;

use std::hint::black_box;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::thread::{available_parallelism, sleep};
use std::time::{Duration, Instant};

use gensync::{GenerationSynchronizer, Table};
use nix::time::{ClockId, clock_gettime};
use serde_json::json;

use crate::arguments::{Bench, BenchWorker};
use crate::child::this_program;
use crate::failure::{DONE, Failure, Outcome};
use crate::output::{FAINT, GOOD, HEADING, Output};

/// Operations between two readings of the clock.
const BATCH: u32 = 10_000;
/// The time from one wakeup to the next, in which the waiter falls asleep again.
const REST: Duration = Duration::from_millis(2);

/// What was measured, for gensync and for the bare atomic or futex.
struct Measured {
    name: String,
    unit: &'static str,
    ours: f64,
    bare: f64,
}

pub(crate) fn bench(options: &Bench, output: &mut Output) -> Outcome {
    let folder =
        ["/dev/shm".into(), std::env::temp_dir()].into_iter().find_map(|place| tempfile::tempdir_in(place).ok());
    let folder =
        folder.ok_or_else(|| Failure::Unusable("no folder for a table can be made in /dev/shm or /tmp".to_owned()))?;
    let path = folder.path().join("table.gensync");
    let table = Table::open(&path)?;
    let processes = options.processes.unwrap_or_else(|| available_parallelism().map_or(1, |count| count.get() as u64));
    // Four things, two ways each, and contention of two kinds.
    let slice = Duration::from_secs(options.seconds) / 10;
    let sync = GenerationSynchronizer::new(&table, "key")?;

    show(output, &check(&sync, slice))?;
    show(output, &mark(&sync, slice))?;
    show(output, &waking(&table, &path, slice)?)?;
    show(output, &contention(&path, processes, true, slice)?)?;
    show(output, &contention(&path, processes, false, slice)?)?;
    Ok(DONE)
}

fn show(output: &mut Output, measured: &Measured) -> Outcome<()> {
    const WIDTH: f64 = 40.0;
    let Measured { name, unit, ours, bare } = measured;
    if output.is_json() {
        output.object(&json!({ "name": name, "unit": unit, "gensync": ours, "bare": bare }))?;
        return output.flush();
    }
    output.line(&output.styled(HEADING, name))?;
    let greatest = ours.max(*bare).max(f64::MIN_POSITIVE);
    for (label, value, style) in [("gensync", ours, GOOD), ("bare", bare, FAINT)] {
        let bar = "█".repeat(((value / greatest * WIDTH).round() as usize).max(1));
        let bar = output.styled(style, &format!("{bar:<40}"));
        output.line(&format!("  {label:<7}  {bar}  {value:.1} {unit}"))?;
    }
    output.flush()
}

/// Nanoseconds of one `operation`: the median of many batches.
fn time(slice: Duration, mut operation: impl FnMut()) -> f64 {
    let (start, mut batches) = (Instant::now(), Vec::new());
    while start.elapsed() < slice {
        let batch = Instant::now();
        (0..BATCH).for_each(|_| operation());
        batches.push(batch.elapsed().as_nanos() as f64 / f64::from(BATCH));
    }
    median(&mut batches)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn check(sync: &GenerationSynchronizer, slice: Duration) -> Measured {
    let ours = time(slice, || _ = black_box(sync.is_expired()));
    Measured { name: "check: is_expired, and a load".to_owned(), unit: "ns", ours, bare: bare::load(slice) }
}

fn mark(sync: &GenerationSynchronizer, slice: Duration) -> Measured {
    let ours = time(slice, || _ = black_box(sync.mark_updated()));
    Measured { name: "mark: mark_updated, and an atomic addition".to_owned(), unit: "ns", ours, bare: bare::add(slice) }
}

fn waking(table: &Table, path: &Path, slice: Duration) -> Outcome<Measured> {
    let sync = GenerationSynchronizer::new(table, "waking")?;
    let mut worker = Worker::start(path, "waking", 0)?;
    let (start, mut times) = (Instant::now(), Vec::new());
    while start.elapsed() < slice {
        sleep(REST);
        let before = nanoseconds();
        sync.mark_updated()?;
        times.push(worker.number()? - before as f64);
    }
    drop(worker);
    let (ours, bare) = (median(&mut times) / 1000.0, bare::waking(slice, REST));
    Ok(Measured { name: "waking a process, and a bare futex".to_owned(), unit: "µs", ours, bare })
}

fn contention(path: &Path, processes: u64, is_shared: bool, slice: Duration) -> Outcome<Measured> {
    let key = |number: u64| if is_shared { "shared".to_owned() } else { format!("own {number}") };
    let milliseconds = (slice.as_millis() as u64).max(1);
    let workers = (0..processes).map(|number| Worker::start(path, &key(number), milliseconds));
    let mut workers = workers.collect::<Outcome<Vec<_>>>()?;
    workers.iter_mut().try_for_each(Worker::go)?;
    let mut ours = 0.0;
    for worker in &mut workers {
        ours += worker.number()?;
    }
    let keys = if is_shared { "one key" } else { "a key each" };
    Ok(Measured {
        name: format!("contention: {processes} processes mark {keys}"),
        unit: "million/s",
        ours,
        bare: bare::contention(slice, processes, is_shared),
    })
}

/// Another process of this program.
struct Worker {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Worker {
    fn start(path: &Path, key: &str, milliseconds: u64) -> Outcome<Self> {
        let start = || {
            let mut command = this_program()?;
            command.arg("bench-worker").arg(path).args([key, &milliseconds.to_string()]);
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()
        };
        let mut process = start().map_err(|error| Failure::Unusable(format!("no process can be started: {error}")))?;
        let (input, output) = (process.stdin.take().expect("a pipe"), process.stdout.take().expect("a pipe"));
        let mut worker = Self { process, input, output: BufReader::new(output) };
        // Its first number says that it is ready.
        worker.number()?;
        Ok(worker)
    }

    fn go(&mut self) -> Outcome<()> {
        self.input.write_all(b"\n").map_err(|error| Failure::Unusable(format!("a worker has ended: {error}")))
    }

    fn number(&mut self) -> Outcome<f64> {
        let mut line = String::new();
        let _ = self.output.read_line(&mut line);
        line.trim().parse().map_err(|_| Failure::Unusable("a worker has ended before it was done".to_owned()))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// One of several worker processes. The process that started it says what to do by the arguments.
pub(crate) fn worker(options: &BenchWorker) -> Outcome {
    let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
    let table = Table::options().create(false).open(&options.path)?;
    let sync = GenerationSynchronizer::new(&table, &*options.key)?;
    let mut output = std::io::stdout();
    writeln!(output, "0")?;
    if options.milliseconds == 0 {
        loop {
            sync.wait();
            let now = nanoseconds();
            sync.refresh()?;
            writeln!(output, "{now}")?;
        }
    }
    std::io::stdin().lock().read_line(&mut String::new())?;
    let (start, mut count) = (Instant::now(), 0.0);
    while start.elapsed() < Duration::from_millis(options.milliseconds) {
        (0..BATCH).for_each(|_| _ = black_box(sync.mark_updated()));
        count += f64::from(BATCH);
    }
    writeln!(output, "{}", count / start.elapsed().as_secs_f64() / 1e6)?;
    Ok(DONE)
}

/// A clock that all processes share.
fn nanoseconds() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}

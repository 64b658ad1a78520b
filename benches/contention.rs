//! What processes that work at the same time cost each other, on a table and on bare atomic words.
//!
//! Forked processes start together and do one thing for a fixed time, on a table and on words of a shared page by
//! turns, as figures that are taken one after another drift on a machine that does other work. Prints a table, and
//! leaves it in cargo's target folder as `contention/results.json` and `contention/throughput.svg`.
//!
//! With GENSYNC_BENCH_SHORT in the environment, all of it takes a few seconds, and says little.

#![expect(unsafe_code, reason = "forks, and shares a page between the processes")]

mod support;

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::hint::black_box;
use std::io::{self, Write as _};
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::time::{Duration, Instant};

use gensync::{GenerationSynchronizer, Table};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use plotters::prelude::*;
use serde::Serialize;

use support::Spread;

type Outcome<T> = Result<T, Box<dyn Error>>;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Operation {
    Update,
    Check,
}

use Operation::{Check, Update};

impl Operation {
    fn plural(self) -> &'static str {
        match self {
            Update => "updates",
            Check => "checks",
        }
    }
}

struct Workload {
    name: &'static str,
    /// What the first process does, and what all others do.
    first: Operation,
    rest: Operation,
    keys: Keys,
}

/// The keys of a workload's processes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keys {
    /// All have the same one.
    One,
    /// Each has one of its own.
    Own,
    /// Each of two processes has one of many: the two that are nearest to each other in the table.
    Nearest,
    /// The two that are farthest from each other.
    Farthest,
}

/// The plot shows the first four.
const WORKLOADS: [Workload; 6] = [
    Workload { name: "all update one key", first: Update, rest: Update, keys: Keys::One },
    Workload { name: "each updates its own key", first: Update, rest: Update, keys: Keys::Own },
    Workload { name: "one updates, the rest check", first: Update, rest: Check, keys: Keys::One },
    Workload { name: "each checks its own key", first: Check, rest: Check, keys: Keys::Own },
    Workload {
        name: "each updates its own of 1000 keys, far apart",
        first: Update,
        rest: Update,
        keys: Keys::Farthest,
    },
    Workload {
        name: "each updates its own of 1000 keys, the nearest",
        first: Update,
        rest: Update,
        keys: Keys::Nearest,
    },
];

impl Workload {
    fn operation(&self, process: usize) -> Operation {
        if process == 0 { self.first } else { self.rest }
    }

    fn key(&self, process: usize) -> usize {
        if self.keys == Keys::One { 0 } else { process }
    }

    fn most_processes(&self) -> usize {
        if matches!(self.keys, Keys::Nearest | Keys::Farthest) { 2 } else { usize::MAX }
    }
}

/// A table of many keys, and where they are in it.
struct Many {
    table: Table,
    nearest: [String; 2],
    farthest: [String; 2],
    /// How many bytes the two nearest are apart.
    distance: u64,
    /// With how many others a key shares its cache line, on average.
    sharing: f64,
}

impl Many {
    const KEYS: usize = 1000;
    const LINE: u64 = 64;

    fn new(path: &Path) -> Outcome<Self> {
        let table = Table::open(path)?;
        let place = |key: usize| {
            let key = key.to_string();
            GenerationSynchronizer::new(&table, &*key)?;
            let slot = table.slot(&*key)?.ok_or("a new key is not in the table")?;
            Ok((slot.offset(), key))
        };
        let mut places = (0..Self::KEYS).map(place).collect::<Outcome<Vec<_>>>()?;
        places.sort_unstable();
        let lines = places.chunk_by(|one, next| one.0 / Self::LINE == next.0 / Self::LINE);
        let sharing = lines.map(|line| line.len() * (line.len() - 1)).sum::<usize>() as f64 / Self::KEYS as f64;
        let distance = |pair: &[(u64, String)]| pair[1].0 - pair[0].0;
        // In one line rather than at the borders of two.
        let nearness = |pair: &&[(u64, String)]| (pair[0].0 / Self::LINE != pair[1].0 / Self::LINE, distance(pair));
        let nearest = places.windows(2).min_by_key(nearness).ok_or("too few keys")?;
        let keys = |one: &(u64, String), other: &(u64, String)| [one.1.clone(), other.1.clone()];
        Ok(Self {
            nearest: keys(&nearest[0], &nearest[1]),
            farthest: keys(&places[0], &places[Self::KEYS - 1]),
            distance: distance(nearest),
            sharing,
            table,
        })
    }

    fn print(&self) {
        println!(
            "\nOf the {} keys, the two nearest are {} bytes apart. A key shares its line of {} bytes with {:.2} others on average, \
             so that two keys chosen at random share one in {:.3} % of cases.",
            Self::KEYS,
            self.distance,
            Self::LINE,
            self.sharing,
            self.sharing / (Self::KEYS - 1) as f64 * 100.0
        );
    }
}

/// What the processes work on.
#[derive(Clone, Copy)]
enum Side {
    Gensync,
    Bare,
}

/// What one process did.
struct Work {
    operation: Operation,
    count: u64,
    nanoseconds: u64,
}

/// What the processes of a round with the same operation did.
struct Total {
    throughput: f64,
    nanoseconds: f64,
}

/// One operation of a workload, by one number of processes.
#[derive(Serialize)]
struct Row {
    workload: &'static str,
    processes: usize,
    operation: Operation,
    gensync: Figures,
    bare: Figures,
    /// The throughput of gensync by that of the bare word, round by round.
    ratio: Spread,
}

#[derive(Serialize)]
struct Figures {
    /// Million operations a second, of all processes together.
    throughput: Spread,
    /// What one operation takes its process, waiting for a core included.
    nanoseconds: Spread,
    /// The throughput by that of one process, round by round.
    scaling: Option<Spread>,
}

fn main() -> Outcome<()> {
    let (rounds, milliseconds) = if support::short() { (3, 3) } else { (5, 200) };
    let cores = std::thread::available_parallelism()?.get();
    let mut counts = vec![1, 2, cores, 2 * cores];
    counts.sort_unstable();
    counts.dedup();

    let folder = support::folder()?;
    let table = Table::open(folder.path().join("contention"))?;
    let page = Page::new(2 * cores)?;
    let many = Many::new(&folder.path().join("many"))?;
    let stage = Stage { table, many, page, duration: Duration::from_millis(milliseconds) };
    let mut rows = Vec::new();
    for workload in &WORKLOADS {
        let counts = counts.iter().copied().filter(|&count| count <= workload.most_processes());
        rows.extend(stage.measure(workload, &counts.collect::<Vec<_>>(), rounds)?);
    }
    println!("{cores} cores, {rounds} rounds of {milliseconds} ms: median (least–greatest)\n");
    print(&rows);
    stage.many.print();

    let results = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("contention");
    let (json, plot) = (results.join("results.json"), results.join("throughput.svg"));
    std::fs::create_dir_all(&results)?;
    let report = serde_json::json!({ "cores": cores, "rounds": rounds, "milliseconds": milliseconds, "rows": rows });
    serde_json::to_writer_pretty(File::create(&json)?, &report)?;
    draw(&plot, &rows, &counts)?;
    println!("\n{}\n{}", json.display(), plot.display());
    Ok(())
}

/// What the processes have in common.
struct Stage {
    table: Table,
    many: Many,
    page: Page,
    duration: Duration,
}

impl Stage {
    fn measure(&self, workload: &Workload, counts: &[usize], rounds: usize) -> Outcome<Vec<Row>> {
        let mut totals = BTreeMap::<_, Vec<[Total; 2]>>::new();
        for _ in 0..rounds {
            for &processes in counts {
                let gensync = self.round(workload, Side::Gensync, processes)?;
                let bare = self.round(workload, Side::Bare, processes)?;
                for operation in [Update, Check] {
                    if let (Some(gensync), Some(bare)) = (Total::of(&gensync, operation), Total::of(&bare, operation)) {
                        totals.entry((operation, processes)).or_default().push([gensync, bare]);
                    }
                }
            }
        }
        let row = |(&(operation, processes), rounds): (&(Operation, usize), &Vec<[Total; 2]>)| {
            let alone = totals.get(&(operation, 1));
            let figures = |side: usize| Figures {
                throughput: Spread::of(rounds.iter().map(|round| round[side].throughput)),
                nanoseconds: Spread::of(rounds.iter().map(|round| round[side].nanoseconds)),
                scaling: alone.map(|alone| {
                    let pairs = rounds.iter().zip(alone);
                    Spread::of(pairs.map(|(round, alone)| round[side].throughput / alone[side].throughput))
                }),
            };
            let ratio = Spread::of(rounds.iter().map(|[gensync, bare]| gensync.throughput / bare.throughput));
            Row { workload: workload.name, processes, operation, gensync: figures(0), bare: figures(1), ratio }
        };
        Ok(totals.iter().map(row).collect())
    }

    fn round(&self, workload: &Workload, side: Side, processes: usize) -> Outcome<Vec<Work>> {
        self.page.clear();
        let children = (0..processes).map(|process| self.fork_process(workload, side, process));
        let children = children.collect::<Outcome<Vec<_>>>()?;
        while self.page.ready().load(SeqCst) < processes as u64 {
            match waitpid(None, Some(WaitPidFlag::WNOHANG))? {
                WaitStatus::StillAlive => std::thread::yield_now(),
                status => return Err(format!("a process ended before it began: {status:?}").into()),
            }
        }
        self.page.start().store(1, SeqCst);
        for child in children {
            let status = waitpid(child, None)?;
            if !matches!(status, WaitStatus::Exited(_, 0)) {
                return Err(format!("a process ended badly: {status:?}").into());
            }
        }
        let work = |process| {
            let [count, nanoseconds] = self.page.result(process).each_ref().map(|word| word.load(SeqCst));
            Work { operation: workload.operation(process), count, nanoseconds }
        };
        Ok((0..processes).map(work).collect())
    }

    fn fork_process(&self, workload: &Workload, side: Side, process: usize) -> Outcome<Pid> {
        io::stdout().flush()?;
        // SAFETY: this process has one thread.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(child),
            ForkResult::Child => {
                // Leaves by `exit` whatever happens, as the table's folder is the parent's to remove.
                let work = || self.work(workload, side, process);
                std::process::exit(match catch_unwind(AssertUnwindSafe(work)) {
                    Ok(Ok(())) => 0,
                    Ok(Err(error)) => {
                        eprintln!("process {process}: {error}");
                        1
                    }
                    Err(_) => 101,
                })
            }
        }
    }

    fn work(&self, workload: &Workload, side: Side, process: usize) -> Outcome<()> {
        set_pdeathsig(Signal::SIGKILL)?;
        let (key, many) = (workload.key(process), &self.many);
        let sync = match workload.keys {
            Keys::One | Keys::Own => GenerationSynchronizer::new(&self.table, ["contention", &key.to_string()])?,
            Keys::Nearest => GenerationSynchronizer::new(&many.table, &*many.nearest[key])?,
            Keys::Farthest => GenerationSynchronizer::new(&many.table, &*many.farthest[key])?,
        };
        let word = match workload.keys {
            Keys::One | Keys::Own => self.page.bare(key),
            // In neighbouring lines, as an array of words that each have a line would be.
            Keys::Nearest | Keys::Farthest => self.page.bare_of_array(key),
        };
        let mut seen = word.load(Acquire);
        self.page.ready().fetch_add(1, SeqCst);
        while self.page.start().load(SeqCst) == 0 {
            std::thread::yield_now();
        }
        let (count, elapsed) = match (side, workload.operation(process)) {
            (Side::Gensync, Update) => self.repeat(|| black_box(&sync).mark_updated().expect("a live table")),
            (Side::Gensync, Check) => self.repeat(|| {
                let expired = black_box(&sync).is_expired();
                if expired {
                    sync.refresh().expect("a live table");
                }
                expired
            }),
            (Side::Bare, Update) => self.repeat(|| black_box(word).fetch_add(1, AcqRel)),
            (Side::Bare, Check) => self.repeat(|| {
                let present = black_box(word).load(Acquire);
                let expired = present != seen;
                seen = present;
                expired
            }),
        };
        let result = self.page.result(process);
        result[0].store(count, SeqCst);
        result[1].store(elapsed.as_nanos() as u64, SeqCst);
        Ok(())
    }

    fn repeat<R>(&self, mut operation: impl FnMut() -> R) -> (u64, Duration) {
        // So many that reading the clock does not matter.
        const RUN: u64 = 500;
        let start = Instant::now();
        let mut count = 0;
        loop {
            for _ in 0..RUN {
                black_box(operation());
            }
            count += RUN;
            let elapsed = start.elapsed();
            if elapsed >= self.duration {
                return (count, elapsed);
            }
        }
    }
}

impl Total {
    fn of(work: &[Work], operation: Operation) -> Option<Self> {
        let work = work.iter().filter(|work| work.operation == operation);
        let count: u64 = work.clone().map(|work| work.count).sum();
        let nanoseconds: u64 = work.clone().map(|work| work.nanoseconds).sum();
        let throughput = work.map(|work| work.count as f64 * 1e3 / work.nanoseconds as f64).sum();
        (count > 0).then(|| Self { throughput, nanoseconds: nanoseconds as f64 / count as f64 })
    }
}

/// Words that all processes share, each but a result's two in cache lines of its own.
struct Page {
    words: &'static [AtomicU64],
    processes: usize,
}

impl Page {
    /// Two cache lines, as processors fetch them in pairs.
    const LINE: usize = 128 / size_of::<AtomicU64>();

    fn new(processes: usize) -> Outcome<Self> {
        let count = (2 + 2 * processes) * Self::LINE;
        let size = NonZeroUsize::new(count * size_of::<AtomicU64>()).ok_or("nothing to share")?;
        // SAFETY: a new mapping, of zeros, which are valid atomics; it is never unmapped.
        let words = unsafe {
            let base = mmap_anonymous(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED)?;
            std::slice::from_raw_parts(base.cast().as_ptr(), count)
        };
        Ok(Self { words, processes })
    }

    fn clear(&self) {
        self.words.iter().for_each(|word| word.store(0, SeqCst));
    }

    /// How many processes wait for the start.
    fn ready(&self) -> &AtomicU64 {
        &self.words[0]
    }

    fn start(&self) -> &AtomicU64 {
        &self.words[Self::LINE]
    }

    /// How many operations a process did, and in how many nanoseconds.
    fn result(&self, process: usize) -> [&AtomicU64; 2] {
        let line = (2 + process) * Self::LINE;
        [&self.words[line], &self.words[line + 1]]
    }

    fn bare(&self, key: usize) -> &AtomicU64 {
        &self.words[(2 + self.processes + key) * Self::LINE]
    }

    /// Like `bare`, but in one cache line each.
    fn bare_of_array(&self, key: usize) -> &AtomicU64 {
        &self.words[(2 + self.processes) * Self::LINE + key * (Self::LINE / 2)]
    }
}

fn print(rows: &[Row]) {
    println!(
        "{:>19}  {:>36}  {:>36}  {:>18}  {:>18}",
        "", "million operations a second", "nanoseconds for one", "throughput", "times one process"
    );
    println!(
        "{:>9} {:>9}  {:>18}{:>18}  {:>18}{:>18}  {:>18}  {:>9}{:>9}",
        "processes", "operation", "gensync", "bare", "gensync", "bare", "gensync / bare", "gensync", "bare"
    );
    let mut workload = "";
    for row in rows {
        if row.workload != workload {
            workload = row.workload;
            println!("\n{workload}");
        }
        let Row { gensync, bare, .. } = row;
        let scaling = |side: &Figures| side.scaling.map_or(String::new(), |spread| format!("{:.2}", spread.median));
        println!(
            "{:>9} {:>9}  {:>18}{:>18}  {:>18}{:>18}  {:>18}  {:>9}{:>9}",
            row.processes,
            row.operation.plural(),
            gensync.throughput.text(),
            bare.throughput.text(),
            gensync.nanoseconds.text(),
            bare.nanoseconds.text(),
            row.ratio.text(),
            scaling(gensync),
            scaling(bare)
        );
    }
}

/// A chart for each workload: throughput by the number of processes, least and greatest as a bar.
fn draw(path: &Path, rows: &[Row], counts: &[usize]) -> Outcome<()> {
    let root = SVGBackend::new(path, (1200, 900)).into_drawing_area();
    root.fill(&WHITE)?;
    let panels =
        root.titled("Processes at work at the same time: gensync and a bare atomic word", ("sans-serif", 26))?;
    let most = counts.iter().copied().max().unwrap_or(1) as f64;
    for (panel, workload) in panels.split_evenly((2, 2)).iter().zip(&WORKLOADS) {
        let rows: Vec<_> = rows.iter().filter(|row| row.workload == workload.name).collect();
        let sides = |row: &Row| [row.gensync.throughput.max, row.bare.throughput.max];
        let highest = rows.iter().copied().flat_map(sides).fold(0.0, f64::max);
        let mut chart = ChartBuilder::on(panel)
            .caption(workload.name, ("sans-serif", 20))
            .margin(15)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d((1.0..most * 1.05).log_scale().base(2.0), 0.0..highest * 1.3)?;
        chart
            .configure_mesh()
            .x_desc("processes")
            .y_desc("million operations a second")
            .x_label_formatter(&|processes| format!("{processes:.0}"))
            .y_label_formatter(&|throughput| format!("{throughput:.0}"))
            .label_style(("sans-serif", 15))
            .light_line_style(TRANSPARENT)
            .draw()?;
        for operation in [Update, Check] {
            let rows: Vec<_> = rows.iter().filter(|row| row.operation == operation).collect();
            if rows.is_empty() {
                continue;
            }
            let gensync: fn(&Row) -> &Figures = |row| &row.gensync;
            let bare: fn(&Row) -> &Figures = |row| &row.bare;
            for (side, figures, colour) in [("gensync", gensync, BLUE), ("bare", bare, RED)] {
                // The two operations of a workload that mixes them.
                let style = colour.mix(if operation == Update { 1.0 } else { 0.5 }).stroke_width(2);
                let points = rows.iter().map(|row| (row.processes as f64, figures(row).throughput));
                chart
                    .draw_series(
                        LineSeries::new(points.clone().map(|(x, throughput)| (x, throughput.median)), style)
                            .point_size(3),
                    )?
                    .label(format!("{side}, {}", operation.plural()))
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style));
                let bars = points.map(|(x, Spread { min, max, .. })| PathElement::new([(x, min), (x, max)], style));
                chart.draw_series(bars)?;
            }
        }
        chart
            .configure_series_labels()
            .label_font(("sans-serif", 15))
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK)
            .draw()?;
    }
    root.present()?;
    Ok(())
}

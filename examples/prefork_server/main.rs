//! A pre-forked HTTP server: the parent binds and forks, the workers answer from memory, and a `PUT` to any of them is
//! seen by all of them at their next request.
//!
//! The settings are in an SQLite database. Each worker is a process with a tokio runtime of one thread, connections of
//! its own, and a `Cached`, made after the fork over the table that it inherits. A change is a transaction within
//! `Cached::update`: if the worker is killed after the commit and before the announcement, the others notice the change
//! nevertheless. To see that, run it with `--die-before-bump`.
//!
//! ```text
//! $ cargo run --example prefork_server -- --listen 127.0.0.1:8080
//! listening on http://127.0.0.1:8080
//! ```
//!
//! And in another terminal:
//!
//! ```text
//! $ w=' worker %header{x-worker} generation %header{x-generation}\n'
//! $ curl -sw "$w" localhost:8080/settings
//! {"version":1,"greeting":"Hello"} worker 23902 generation 1795545965124526
//! $ curl -sw "$w" localhost:8080/settings
//! {"version":1,"greeting":"Hello"} worker 23903 generation 1795545965124526
//! $ curl -sSw "$w" -X PUT --json '{"greeting": "Good morning"}' localhost:8080/settings
//! {"version":2,"greeting":"Good morning"} worker 23904 generation
//! $ curl -sw "$w" localhost:8080/settings
//! {"version":2,"greeting":"Good morning"} worker 23901 generation 1795545965124527
//! $ curl -sw "$w" localhost:8080/settings
//! {"version":2,"greeting":"Good morning"} worker 23902 generation 1795545965124527
//! $ curl -s localhost:8080/healthz
//! {"counters":{"errors":0,"hits":0,"longest_load_us":0,"overtaken":0,"reloads":0,"stale_answers":0},"generation":1795545965124527,"worker":23904}
//! ```
//!
//! With `--die-before-bump`:
//!
//! ```text
//! $ curl -sw "$w" localhost:8080/settings
//! {"version":1,"greeting":"Hello"} worker 23915 generation 1795545965692254
//! $ curl -sSw "$w" -X PUT --json '{"greeting": "Good morning"}' localhost:8080/settings
//! curl: (52) Empty reply from server
//!  worker  generation
//! $ curl -sw "$w" localhost:8080/settings
//! {"version":2,"greeting":"Good morning"} worker 23915 generation 1795545965692255
//! $ curl -sw "$w" localhost:8080/settings
//! {"version":2,"greeting":"Good morning"} worker 23917 generation 1795545965692255
//! ```
//!
//! SIGTERM and SIGINT end it: the workers finish what they have begun, and the temporary folder is removed.

#![expect(unsafe_code, reason = "forks")]

mod store;
mod worker;

use std::collections::HashMap;
use std::error::Error;
use std::io::{self, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use gensync::Table;
use nix::errno::Errno;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, alarm, fork, getpid, getppid};

use store::Store;

/// An HTTP server of forked workers that keep their settings fresh through gensync.
#[derive(Parser)]
#[command(name = "prefork_server")]
struct Options {
    /// The address to listen on; port 0 for any that is free
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// How many workers to fork
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: u16,
    /// The SQLite database, created if there is none [default: in a temporary folder]
    #[arg(long)]
    database: Option<PathBuf>,
    /// The gensync table, created if there is none [default: in a temporary folder]
    #[arg(long)]
    table: Option<PathBuf>,
    /// A worker that has committed a change aborts before it can announce it
    #[arg(long)]
    die_before_bump: bool,
}

type Outcome<T> = Result<T, Box<dyn Error>>;

/// A worker that ends sooner than this has failed at once.
const AT_ONCE: Duration = Duration::from_millis(100);
/// So many workers in a row may fail at once before the parent pauses at each.
const FAILURES: u32 = 8;
const PAUSE: Duration = Duration::from_millis(500);
/// More than a worker needs: it waits for idle connections first, and then for a transaction.
const SECONDS_TO_END: u32 = 15;

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("prefork_server: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Outcome<()> {
    // Blocked, they wait until the parent asks for them. So no handler is needed, and none is missed; and the folder is
    // removed whenever the signal comes.
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD, Signal::SIGALRM].into_iter().collect();
    let mask = signals.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;

    let folder = tempfile::Builder::new().prefix("prefork_server-").tempdir()?;
    let database = options.database.clone().unwrap_or_else(|| folder.path().join("settings.db"));
    // Closed again before the fork, which a connection must not be carried across.
    drop(Store::create(&database)?);
    let listener = TcpListener::bind(options.listen)?;
    listener.set_nonblocking(true)?;
    let table = Table::open(options.table.clone().unwrap_or_else(|| folder.path().join("table.gensync")))?;
    let address = listener.local_addr()?;

    let server = Server { listener, database, table, mask, die_before_bump: options.die_before_bump };
    let mut workers = HashMap::new();
    for _ in 0..options.workers {
        workers.insert(server.fork_worker()?, Instant::now());
    }
    // Until the workers accept, the kernel queues connections.
    println!("listening on http://{address}");
    io::stdout().flush()?;
    server.supervise(&signals, &mut workers)?;
    end(&signals, &mut workers)
}

/// What the workers inherit.
struct Server {
    listener: TcpListener,
    database: PathBuf,
    table: Table,
    /// The signals that were blocked at the start.
    mask: SigSet,
    die_before_bump: bool,
}

impl Server {
    fn fork_worker(&self) -> Outcome<Pid> {
        let parent = getpid();
        // SAFETY: this process has one thread.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(child),
            ForkResult::Child => {
                // Leaves by `exit` in any case, as only the parent may remove the folder.
                let work = || self.work(parent);
                std::process::exit(match std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)) {
                    Ok(Ok(())) => 0,
                    Ok(Err(error)) => {
                        eprintln!("worker {}: {error}", getpid());
                        1
                    }
                    Err(_) => 101,
                })
            }
        }
    }

    fn work(&self, parent: Pid) -> Outcome<()> {
        nix::sys::prctl::set_pdeathsig(Signal::SIGTERM)?;
        if getppid() != parent {
            return Ok(()); // It died before that.
        }
        self.mask.thread_set_mask()?;
        if self.die_before_bump {
            setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
        }
        worker::serve(&self.listener, &self.database, &self.table, self.die_before_bump)
    }

    /// Forks workers in place of those that die, until the server is to end.
    fn supervise(&self, signals: &SigSet, workers: &mut HashMap<Pid, Instant>) -> Outcome<()> {
        let mut failures = 0;
        loop {
            match signals.wait()? {
                Signal::SIGTERM | Signal::SIGINT => return Ok(()),
                _ => {
                    for (born, status) in reap(workers)? {
                        eprintln!("a worker ended, and is replaced: {status:?}");
                        failures = if born.elapsed() < AT_ONCE { failures + 1 } else { 0 };
                        if failures > FAILURES {
                            std::thread::sleep(PAUSE);
                        }
                        workers.insert(self.fork_worker()?, Instant::now());
                    }
                }
            }
        }
    }
}

/// Has all workers end, and waits for them.
fn end(signals: &SigSet, workers: &mut HashMap<Pid, Instant>) -> Outcome<()> {
    // Those that are dead already can still be signalled, as they have not been waited for.
    workers.keys().try_for_each(|worker| kill(*worker, Signal::SIGTERM))?;
    alarm::set(SECONDS_TO_END);
    while !workers.is_empty() {
        match signals.wait()? {
            Signal::SIGALRM => workers.keys().try_for_each(|worker| kill(*worker, Signal::SIGKILL))?,
            _ => drop(reap(workers)?),
        }
    }
    Ok(())
}

/// Removes the workers that have ended. As pending signals do not add up, one SIGCHLD may stand for several.
fn reap(workers: &mut HashMap<Pid, Instant>) -> Outcome<Vec<(Instant, WaitStatus)>> {
    let mut ended = Vec::new();
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(ended),
            Ok(status) => {
                let born = status.pid().and_then(|pid| workers.remove(&pid));
                ended.extend(born.map(|born| (born, status)));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

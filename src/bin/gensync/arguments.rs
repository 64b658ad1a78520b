//! The command line: commands, options and their help.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use gensync::CacheKey;

use crate::failure::Outcome;
use crate::keys::{Digests, KeyOptions, Keys, Selection};
use crate::target::Target;
use crate::time::parse_duration;

pub(crate) const STATUSES: &str = "\
Exit status:
  0  done; for wait: a key has changed
  1  a negative answer: no such key, nothing matches, timed out, a person is needed, not confirmed
  2  the command line is wrong
  3  the table, or something else that the command needs, cannot be used
exec ends with the status of its command: 128 + N if signal N killed it, 125 if gensync itself failed or refused to run it,
126 if it cannot be run, 127 if there is none.
watch --exec ends with the status of the last command that failed.

ls, get, stat, ps, top, doctor and metrics only read: they need no write permission, never create a table and never
change a byte of it. wait and watch mark in the table that there is a waiter, if they may; with --read-only they do not.";

/// Of the tool as a whole.
pub(crate) const EXAMPLES: &str = "\
export GENSYNC_TABLE=/run/shop/shop.gensync
gensync create siteconfig:1
gensync exec siteconfig:1 -- ./migrate --settings
gensync wait siteconfig:1 --timeout 30";

/// Shows the generations that processes share, and changes them
#[derive(Debug, Parser)]
#[command(name = "gensync", version, after_long_help = STATUSES, after_help = "See --help for the exit statuses.")]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub(crate) struct Arguments {
    /// Print JSON, one object a line
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) target: Target,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List keys
    #[command(after_long_help = "Examples:\n  gensync ls 'user:*'\n  gensync --json ls --sort updates")]
    Ls(Ls),
    /// Print the generations of keys
    #[command(after_long_help = "Examples:\n  gensync get siteconfig:1\n  gensync get siteconfig:1 prices")]
    Get(Get),
    /// Announce that the source behind keys was changed: every process loads it again
    #[command(
        after_long_help = "Examples:\n  gensync mark siteconfig:1\n  gensync mark 'user:*'\n  gensync mark --create siteconfig:1\n  gensync mark --generations 4096 url:http://x"
    )]
    Mark(Mark),
    /// Expire keys though nothing was changed: every process loads again
    #[command(after_long_help = "Examples:\n  gensync clear 'user:*'\n  gensync clear --all")]
    Clear(Clear),
    /// Create keys, and the table if there is none
    #[command(
        after_long_help = "Examples:\n  gensync create siteconfig:1 prices\n  gensync create --mode 660 --part user --part 7"
    )]
    Create(Create),
    /// Run a command that changes the source behind keys: every process loads again when it has ended, even if it is killed
    #[command(
        after_long_help = "Examples:\n  gensync exec siteconfig:1 -- ./migrate --settings\n  gensync exec 'user:*' -- ./import-users\n  gensync exec --must-exist prices -- ./import-prices"
    )]
    Exec(Exec),
    /// Wait until one of some keys changes
    #[command(
        after_long_help = "Examples:\n  gensync wait siteconfig:1 --timeout 30\n  gensync wait siteconfig:1 --seen \"$seen\" --timeout 2m"
    )]
    Wait(Wait),
    /// Print each change as it comes
    #[command(
        after_long_help = "Examples:\n  gensync watch 'user:*' --timeout 10s\n  gensync watch --exec './purge -- {key} {generation}'"
    )]
    Watch(Watch),
    /// List the processes that have the table mapped, with the time since when each has been running
    #[command(after_long_help = "Examples:\n  gensync ps")]
    Ps,
    /// Show keys by their rate of updates, live
    #[command(after_long_help = "Examples:\n  gensync top --interval 2\n  gensync --json top --count 1")]
    Top(Top),
    /// Show the table as a whole: size, occupancy, header
    #[command(after_long_help = "Examples:\n  gensync stat")]
    Stat,
    /// Check for everything that goes wrong in practice; exit status 1 if something needs a person
    #[command(after_long_help = "Examples:\n  gensync doctor")]
    Doctor,
    /// Begin the table anew: every process loads everything again, keys that no process uses are gone
    #[command(after_long_help = "Examples:\n  gensync reset --yes")]
    Reset(Confirmed),
    /// Remove the table; a process that uses it again makes a new one
    #[command(after_long_help = "Examples:\n  gensync rm --yes")]
    Rm(Confirmed),
    /// Replace a table of an older file format by one of the present: every process loads everything again, and processes of the
    /// older version must be restarted
    #[command(after_long_help = "Examples:\n  gensync upgrade\n  gensync upgrade --yes /run/shop/shop.gensync")]
    Upgrade(Upgrade),
    /// Print figures as OpenMetrics text, as for a node exporter's textfile collector
    #[command(after_long_help = "Examples:\n  gensync metrics --output /var/lib/node_exporter/textfile/shop.prom")]
    Metrics(Metrics),
    /// Measure what checks, updates and wakeups cost on this machine
    #[command(after_long_help = "Examples:\n  gensync bench --seconds 2")]
    Bench(Bench),
    #[command(hide = true)]
    BenchWorker(BenchWorker),
    #[command(hide = true)]
    Witness(WitnessOptions),
    /// Print a script that completes command lines
    #[command(after_long_help = "Examples:\n  gensync completions bash > /etc/bash_completion.d/gensync")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page, of the tool or of one command
    #[command(after_long_help = "Examples:\n  gensync man exec\n  gensync man --all /usr/local/share/man/man1")]
    Man {
        /// The command
        #[arg(conflicts_with = "all")]
        command: Option<String>,
        /// Write all pages, of the tool and of each command, to this folder
        #[arg(long, value_name = "DIR")]
        all: Option<PathBuf>,
    },
    /// List the tables that this user can see: in the default folder, /dev/shm, XDG_RUNTIME_DIR and mapped by processes
    #[command(after_long_help = "Examples:\n  gensync tables")]
    Tables,
    /// For the scripts that complete command lines: print what can be named
    #[command(name = "__complete", hide = true)]
    Complete { what: Completed },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Completed {
    Keys,
}

/// Whether a command line that could not be parsed is one of `exec`.
pub(crate) fn is_exec(words: impl IntoIterator<Item = std::ffi::OsString>) -> bool {
    let mut words = words.into_iter().skip(1);
    while let Some(word) = words.next() {
        match word.to_str() {
            Some("--table" | "-t" | "--app" | "-a" | "--allow-file-system") => _ = words.next(),
            Some(option) if option.starts_with('-') => {}
            word => return word == Some("exec"),
        }
    }
    false
}

#[derive(Args, Debug)]
pub(crate) struct Ls {
    /// Only keys that match, such as 'user:*' (*, ? and [...])
    pub(crate) glob: Option<glob::Pattern>,
    /// What to sort by; numbers begin with the greatest
    #[arg(long, value_enum, default_value_t)]
    pub(crate) sort: Order,
    /// Print keys as they are found, in no order: at once, and without memory for them, however many there are
    #[arg(long, conflicts_with = "sort")]
    pub(crate) unsorted: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Order {
    #[default]
    Key,
    Generation,
    Updates,
}

#[derive(Args, Debug)]
pub(crate) struct Get {
    /// The keys; with several, each line has the key as well
    #[arg(value_name = "KEY", required_unless_present_any = ["part", "digest"], conflicts_with = "part")]
    texts: Vec<String>,
    #[command(flatten)]
    digests: Digests,
    #[command(flatten)]
    options: KeyOptions,
}

impl Get {
    /// By name, and by digest.
    pub(crate) fn keys(&self) -> Outcome<(Vec<CacheKey>, &[u128])> {
        Ok((self.options.keys(&self.texts)?, &self.digests.digest))
    }

    /// As [`KeyOptions::advice`].
    pub(crate) fn advice(&self, key: &CacheKey) -> &'static str {
        self.options.advice(&self.texts, key)
    }
}

#[derive(Args, Debug)]
pub(crate) struct Mark {
    /// Create keys, and the table, that are missing, rather than fail
    #[arg(long, conflicts_with_all = ["all", "digest"])]
    pub(crate) create: bool,
    #[command(flatten)]
    pub(crate) selection: Selection,
}

#[derive(Args, Debug)]
pub(crate) struct Clear {
    /// Create keys, and the table, that are missing, rather than fail
    #[arg(long, conflicts_with_all = ["all", "digest"])]
    pub(crate) create: bool,
    #[command(flatten)]
    pub(crate) selection: Selection,
}

#[derive(Args, Debug)]
pub(crate) struct Create {
    /// Permissions of a new table, in octal; 600 unless given. A table that exists with other permissions is not used
    #[arg(long, value_parser = parse_mode)]
    pub(crate) mode: Option<u32>,
    /// How many keys the first segment of a new table has room for; 1024 unless given
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=33_554_432))]
    pub(crate) capacity: Option<u64>,
    #[command(flatten)]
    pub(crate) keys: Keys,
}

#[derive(Args, Debug)]
pub(crate) struct Exec {
    /// Create the table, if it is missing; missing keys are created in any case
    #[arg(long, conflicts_with = "must_exist")]
    pub(crate) create: bool,
    /// Do not run the command unless each key is there, and each glob matches one
    #[arg(long, visible_alias = "existing")]
    pub(crate) must_exist: bool,
    #[command(flatten)]
    pub(crate) selection: Selection,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<std::ffi::OsString>,
}

fn parse_generation(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| "expected a generation, a whole number as `gensync get` prints it".to_owned())
}

#[derive(Args, Debug)]
pub(crate) struct Wait {
    /// The generation that you have seen: if it is not the present one, the wait ends at once. With several keys, once for each,
    /// in their order
    #[arg(long, value_name = "GENERATION", value_parser = parse_generation)]
    pub(crate) seen: Vec<u64>,
    /// Wait no longer than this, such as 30 or 30s, 500ms, or 2m
    #[arg(long, value_parser = parse_duration)]
    pub(crate) timeout: Option<Duration>,
    /// Write nothing to the table: poll it 100 times a second instead of sleeping until a wakeup
    #[arg(long)]
    pub(crate) read_only: bool,
    #[command(flatten)]
    pub(crate) keys: Keys,
}

#[derive(Args, Debug)]
pub(crate) struct Watch {
    /// Only keys that match, such as 'user:*' (*, ? and [...])
    pub(crate) glob: Option<glob::Pattern>,
    /// Run this with sh for each change; {key} and {generation} become variables that are safe within quotes, too
    #[arg(long, value_name = "COMMAND")]
    pub(crate) exec: Option<String>,
    /// End after so many changes
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
    /// End after this time, such as 30 or 30s, 500ms, or 2m
    #[arg(long, value_parser = parse_duration)]
    pub(crate) timeout: Option<Duration>,
    /// Write nothing to the table: poll it 100 times a second instead of sleeping until a wakeup
    #[arg(long)]
    pub(crate) read_only: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Top {
    /// The time from one poll to the next, such as 2 or 500ms
    #[arg(long, default_value = "1s", value_parser = parse_interval)]
    pub(crate) interval: Duration,
    /// Print what the screen would show after one interval, as text, and end; no terminal is needed
    #[arg(long, conflicts_with = "count")]
    pub(crate) once: bool,
    /// With --json: end after so many polls
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
}

#[derive(Args, Debug)]
pub(crate) struct Metrics {
    /// Only keys that match, such as 'user:*'; the table's own figures are of all keys
    pub(crate) glob: Option<glob::Pattern>,
    /// No figures of single keys
    #[arg(long, conflicts_with = "glob")]
    pub(crate) no_keys: bool,
    /// Write to this file, which is replaced as a whole; a device or a named pipe is written to, and - is standard output
    #[arg(long, short, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(crate) struct Bench {
    /// How many seconds to measure in total
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) seconds: u64,
    /// How many processes contend; as many as there are processors unless given
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=256))]
    pub(crate) processes: Option<u64>,
}

#[derive(Args, Debug)]
pub(crate) struct BenchWorker {
    pub(crate) path: PathBuf,
    pub(crate) key: String,
    /// How long to mark the key. 0: wait for changes instead, and print when each was noticed.
    pub(crate) milliseconds: u64,
}

#[derive(Args, Debug)]
pub(crate) struct WitnessOptions {
    /// The process to watch, which is the parent of this one.
    #[arg(long)]
    pub(crate) of: i32,
    #[arg(long)]
    pub(crate) all: bool,
    #[arg(long)]
    pub(crate) glob: Vec<glob::Pattern>,
    #[command(flatten)]
    pub(crate) digests: Digests,
    /// The keys as the table has them, which are not normalized again.
    #[arg(last = true)]
    pub(crate) keys: Vec<String>,
}

#[derive(Args, Debug)]
pub(crate) struct Confirmed {
    /// Do not ask
    #[arg(long, short)]
    pub(crate) yes: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Upgrade {
    /// The table's file, instead of --table or --app
    #[arg(value_name = "TABLE", value_hint = clap::ValueHint::FilePath)]
    pub(crate) file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) confirmed: Confirmed,
}

fn parse_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 && mode & 0o600 == 0o600 => Ok(mode),
        _ => Err("expected octal permissions that let the owner read and write, such as 600 or 660".to_owned()),
    }
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    let interval = parse_duration(text)?;
    let range = Duration::from_millis(50)..=Duration::from_secs(3600);
    if range.contains(&interval) { Ok(interval) } else { Err("expected 50ms to 1h".to_owned()) }
}

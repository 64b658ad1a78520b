//! What a run is asked for, and how much of it.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use serde::Serialize;

/// The same job on gensync and on its alternatives, side by side, on this machine.
#[derive(Parser)]
#[command(name = "gensync-peers")]
pub(crate) struct Options {
    /// A run of half a minute, which says little
    #[arg(long)]
    pub(crate) short: bool,
    /// Peers to run besides gensync, by name (see the table); all without it
    #[arg(long, value_delimiter = ',')]
    pub(crate) only: Vec<String>,
    /// What to measure
    #[arg(long, value_delimiter = ',', default_value = "check,announce,notice,day,growth")]
    pub(crate) measure: Vec<Measure>,
    /// How often the peers take turns
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// Where the tables and plots go
    #[arg(long, default_value = "target/peers")]
    pub(crate) output: PathBuf,
    /// Run the original, Djblets over memcached, as well: needs djblets and pymemcache from PyPI
    #[arg(long)]
    pub(crate) djblets: bool,
    /// The Python that has them
    #[arg(long, default_value = "python3")]
    pub(crate) python: PathBuf,
    /// How many processes serve a server's day
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub(crate) workers: u32,
    /// How many keys a server's day has
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) keys: u32,
    /// How many updates a second a server's day has
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub(crate) updates: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Measure {
    Check,
    Announce,
    Notice,
    Day,
    Growth,
}

impl Options {
    pub(crate) fn asks_for(&self, measure: Measure) -> bool {
        self.measure.contains(&measure)
    }

    pub(crate) fn scale(&self) -> Scale {
        let milliseconds = Duration::from_millis;
        let mut scale = if self.short {
            Scale {
                rounds: 3,
                batch: milliseconds(5),
                notices: 100,
                polls: 30,
                day: milliseconds(100),
                growth_rounds: 1,
                growth_day: milliseconds(40),
                most_keys: 100_000,
                fill_budget: Duration::from_secs(1),
                most_processes: 8,
            }
        } else {
            Scale {
                rounds: 11,
                batch: milliseconds(25),
                notices: 3000,
                polls: 700,
                day: milliseconds(500),
                growth_rounds: 7,
                growth_day: milliseconds(100),
                most_keys: 10_000_000,
                fill_budget: Duration::from_secs(90),
                most_processes: 64,
            }
        };
        if let Some(rounds) = self.rounds {
            scale.rounds = rounds as usize;
            scale.growth_rounds = rounds as usize;
        }
        scale
    }
}

/// How much of everything.
#[derive(Clone, Copy, Serialize)]
pub(crate) struct Scale {
    pub(crate) rounds: usize,
    /// How long a peer repeats an operation in its turn.
    pub(crate) batch: Duration,
    /// How many changes are noticed, in all rounds together: of a peer that is woken, and of one that polls.
    pub(crate) notices: usize,
    pub(crate) polls: usize,
    /// How long a peer serves in its turn.
    pub(crate) day: Duration,
    pub(crate) growth_rounds: usize,
    pub(crate) growth_day: Duration,
    pub(crate) most_keys: usize,
    /// A peer is given no number of keys that would take it longer than this to create.
    pub(crate) fill_budget: Duration,
    pub(crate) most_processes: usize,
}

//! The same job on gensync and on what one would pick instead, side by side, in one run.

mod machine;
mod measure;
mod options;
mod peer;
mod peers;
mod plots;
mod report;
mod results;
mod server;
mod shared;
mod statistics;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser as _;

use measure::{day, growth, notice, turns};
use options::{Measure, Options};
use peer::Kind;
use results::Results;

pub(crate) type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gensync-peers: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Outcome<()> {
    let (peers, left_out) = peers::chosen(options)?;
    let scale = options.scale();
    let folder = tempfile::Builder::new().prefix("gensync-peers-").tempdir_in("/dev/shm")?;
    let mut results = Results::new(&peers, left_out, scale)?;
    let inside = |name: &str| subfolder(folder.path(), name);

    let mut kinds = Vec::new();
    if options.asks_for(Measure::Check) {
        kinds.extend([Kind::Check, Kind::Read]);
    }
    if options.asks_for(Measure::Announce) {
        kinds.push(Kind::Announce);
    }
    if !kinds.is_empty() {
        eprintln!("check, read, announce: {} rounds", scale.rounds);
        results.turns = turns::measure(&peers, &inside("turns")?, scale, &kinds)?;
    }
    if options.asks_for(Measure::Notice) {
        eprintln!("notice");
        results.notices = notice::measure(&peers, &inside("notice")?, scale)?;
    }
    if options.asks_for(Measure::Day) {
        eprintln!("a server's day");
        let day = day::Day {
            workers: options.workers as usize,
            keys: options.keys as usize,
            updates: Some(options.updates),
            length: scale.day,
        };
        results.day = Some(day::measure(&peers, &inside("day")?, day, scale.rounds)?);
    }
    if options.asks_for(Measure::Growth) {
        eprintln!("growth of cost");
        results.growth = Some(growth::measure(&peers, &inside("growth")?, scale)?);
    }
    results.finish();

    let text = report::markdown(&results);
    println!("{text}");
    std::fs::create_dir_all(&options.output)?;
    std::fs::write(options.output.join("peers.md"), &text)?;
    std::fs::write(options.output.join("peers.json"), serde_json::to_vec_pretty(&results)?)?;
    plots::draw(&results, &options.output)?;
    println!("{}", options.output.display());
    Ok(())
}

/// A new folder in `folder`.
pub(crate) fn subfolder(folder: &Path, name: &str) -> Outcome<PathBuf> {
    let folder = folder.join(name.replace(' ', "-"));
    std::fs::create_dir(&folder)?;
    Ok(folder)
}

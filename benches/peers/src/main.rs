//! The same job on gensync and on its alternatives, side by side, in one run.

mod machine;
mod measure;
mod options;
mod peer;
mod peers;
mod plots;
mod report;
mod requests;
mod results;
mod server;
mod shared;
mod statistics;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser as _;
use nix::sys::statvfs::statvfs;
use tempfile::TempDir;

use measure::{day, growth, notice, turns};
use options::{Measure, Options, Scale};
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
    let (peers, mut notes) = peers::chosen(options)?;
    let scale = options.scale();
    let folder = folder(scale, &mut notes)?;
    let mut results = Results::new(&peers, notes, scale)?;
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

/// A folder of this run's own, in memory if that has room for all peers' keys at once.
fn folder(scale: Scale, notes: &mut Vec<String>) -> Outcome<TempDir> {
    const BYTES_A_KEY: u64 = 400;
    let memory = statvfs("/dev/shm").map_or(0, |shm| shm.blocks_available() * shm.fragment_size());
    let mut builder = tempfile::Builder::new();
    builder.prefix("gensync-peers-");
    if memory >= (64 << 20) + BYTES_A_KEY * scale.most_keys as u64 {
        return Ok(builder.tempdir_in("/dev/shm")?);
    }
    let folder = builder.tempdir()?;
    notes.push(
        "/dev/shm has too little room: files are in the temporary folder, and \"no disk\" below may be wrong".into(),
    );
    Ok(folder)
}

/// A new folder in `folder`.
pub(crate) fn subfolder(folder: &Path, name: &str) -> Outcome<PathBuf> {
    let folder = folder.join(name.replace(' ', "-"));
    std::fs::create_dir(&folder)?;
    Ok(folder)
}

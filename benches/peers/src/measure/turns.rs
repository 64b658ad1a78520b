//! What one operation on one key costs: all peers by turns, round by round.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::options::Scale;
use crate::peer::{Kind, Operation, Peer};
use crate::peers::GENSYNC;
use crate::statistics::{Spread, order};
use crate::{Outcome, subfolder};

/// One operation of one peer, in nanoseconds.
#[derive(Serialize)]
pub(crate) struct Row {
    pub(crate) peer: &'static str,
    pub(crate) operation: &'static str,
    pub(crate) nanoseconds: Spread,
    /// To gensync's, round by round.
    pub(crate) ratio: Spread,
}

/// Operations of the same kind, gensync's first.
#[derive(Serialize)]
pub(crate) struct Table {
    pub(crate) kind: Kind,
    pub(crate) rows: Vec<Row>,
}

/// Those of the kinds that are asked for.
pub(crate) fn measure(peers: &[Box<dyn Peer>], folder: &Path, scale: Scale, kinds: &[Kind]) -> Outcome<Vec<Table>> {
    let mut candidates = Vec::new();
    for peer in peers {
        let name = peer.about().name;
        for operation in peer.operations(&subfolder(folder, name)?)? {
            if kinds.iter().any(|&kind| counts_as(operation.kind, kind)) {
                candidates.push(Candidate::new(name, operation, scale.batch));
            }
        }
    }
    for round in 0..scale.rounds {
        for index in order(round, candidates.len()) {
            candidates[index].take_turn();
        }
    }
    kinds.iter().map(|&kind| table(&candidates, kind)).collect()
}

fn counts_as(operation: Kind, kind: Kind) -> bool {
    operation == kind || operation == Kind::CheckByReading && kind != Kind::Announce
}

fn table(candidates: &[Candidate], kind: Kind) -> Outcome<Table> {
    let mut candidates = candidates.iter().filter(|candidate| counts_as(candidate.operation.kind, kind)).peekable();
    let gensync = candidates.peek().filter(|first| first.peer == GENSYNC).ok_or("gensync is not first")?;
    let gensync = gensync.figures.clone();
    let row = |candidate: &Candidate| Row {
        peer: candidate.peer,
        operation: candidate.operation.name,
        nanoseconds: Spread::of(candidate.figures.iter().copied()),
        ratio: Spread::of_ratios(&candidate.figures, &gensync),
    };
    Ok(Table { kind, rows: candidates.map(row).collect() })
}

struct Candidate {
    peer: &'static str,
    operation: Operation,
    /// How often it is repeated in a turn.
    times: u64,
    /// Nanoseconds of one, a figure for each round.
    figures: Vec<f64>,
}

impl Candidate {
    fn new(peer: &'static str, mut operation: Operation, batch: Duration) -> Self {
        let mut times = 1;
        let elapsed = loop {
            let elapsed = time(&mut operation, times);
            if elapsed * 5 > batch {
                break elapsed;
            }
            times *= 2;
        };
        let times = (times as f64 * batch.as_secs_f64() / elapsed.as_secs_f64()).ceil() as u64;
        Self { peer, operation, times, figures: Vec::new() }
    }

    fn take_turn(&mut self) {
        let elapsed = time(&mut self.operation, self.times);
        self.figures.push(elapsed.as_nanos() as f64 / self.times as f64);
    }
}

fn time(operation: &mut Operation, times: u64) -> Duration {
    let start = Instant::now();
    (operation.run)(times);
    start.elapsed()
}

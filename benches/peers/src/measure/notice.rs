//! One process changes something, others notice: how long until the last of them has.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde::Serialize;

use crate::options::Scale;
use crate::peer::{Bell, Peer};
use crate::peers::GENSYNC;
use crate::shared::{Workers, now, words};
use crate::statistics::{Spread, order};
use crate::{Outcome, subfolder};

/// How many processes wait.
const LISTENERS: [usize; 3] = [1, 2, 4];

/// The least number of samples from which the time that one in a thousand exceeds can be known.
const FOR_P999: u64 = 2000;

/// One peer and one number of listeners, in nanoseconds.
#[derive(Serialize)]
pub(crate) struct Row {
    pub(crate) peer: &'static str,
    pub(crate) listeners: usize,
    pub(crate) samples: u64,
    pub(crate) p50: u64,
    pub(crate) p99: u64,
    /// `None` if there are too few samples.
    pub(crate) p999: Option<u64>,
    /// The rounds' own medians, and what they are to gensync's.
    pub(crate) medians: Spread,
    pub(crate) ratio: Spread,
    /// Changes that some listener had not noticed after a second.
    pub(crate) missed: u64,
}

pub(crate) fn measure(peers: &[Box<dyn Peer>], folder: &Path, scale: Scale) -> Outcome<Vec<Row>> {
    let mut stages = Vec::new();
    for peer in peers {
        let name = peer.about().name;
        if let Some(bell) = peer.bell(&subfolder(folder, name)?)? {
            let samples = if bell.polls() { scale.polls } else { scale.notices };
            stages.push((name, bell, samples.div_ceil(scale.rounds)));
        }
    }
    let mut rows = Vec::new();
    for listeners in LISTENERS {
        let mut tallies: Vec<_> = stages.iter().map(|_| Tally::new()).collect::<Outcome<_>>()?;
        for round in 0..scale.rounds {
            for index in order(round, stages.len()) {
                let (_, bell, samples) = &stages[index];
                tallies[index].add(ring(&**bell, listeners, *samples)?)?;
            }
        }
        let gensync = stages.iter().position(|stage| stage.0 == GENSYNC).ok_or("gensync is always there")?;
        let gensync = tallies[gensync].medians.clone();
        rows.extend(stages.iter().zip(tallies).map(|(stage, tally)| tally.row(stage.0, listeners, &gensync)));
    }
    Ok(rows)
}

struct Tally {
    histogram: Histogram<u64>,
    medians: Vec<f64>,
    missed: u64,
}

impl Tally {
    fn new() -> Outcome<Self> {
        Ok(Self { histogram: Histogram::new(3)?, medians: Vec::new(), missed: 0 })
    }

    fn add(&mut self, round: Round) -> Outcome<()> {
        for &latency in &round.latencies {
            self.histogram.record(latency)?;
        }
        self.medians.push(Spread::of(round.latencies.iter().map(|&latency| latency as f64)).median);
        self.missed += round.missed;
        Ok(())
    }

    fn row(self, peer: &'static str, listeners: usize, gensync: &[f64]) -> Row {
        let samples = self.histogram.len();
        let at = |quantile| self.histogram.value_at_quantile(quantile);
        Row {
            peer,
            listeners,
            samples,
            p50: at(0.5),
            p99: at(0.99),
            p999: (samples >= FOR_P999).then(|| at(0.999)),
            ratio: Spread::of_ratios(&self.medians, gensync),
            medians: Spread::of(self.medians),
            missed: self.missed,
        }
    }
}

struct Round {
    latencies: Vec<u64>,
    missed: u64,
}

/// Words at the start of what the processes of a round share; the listeners' and the latencies follow.
const READY: usize = 0;
const NUMBER: usize = 1;
const MISSED: usize = 2;
const ENDED: usize = 3;
const LISTENER: usize = 16;

/// The words of a listener: the last change that it has noticed, and when. A cache line each.
fn listener_words(board: &'static [AtomicU64], listener: usize) -> (&'static AtomicU64, &'static AtomicU64) {
    let first = LISTENER * (1 + listener);
    (&board[first], &board[first + 1])
}

fn ring(bell: &dyn Bell, listeners: usize, samples: usize) -> Outcome<Round> {
    let latencies = LISTENER * (1 + listeners);
    let board = words(latencies + samples)?;
    let mut workers = Workers::default();
    for listener in 0..listeners {
        workers.fork(|| {
            let mut ear = bell.listen()?;
            let (noticed, at) = listener_words(board, listener);
            board[READY].fetch_add(1, SeqCst);
            while board[ENDED].load(SeqCst) == 0 {
                ear.wait()?;
                let time = now();
                let number = board[NUMBER].load(SeqCst);
                if number > noticed.load(Relaxed) {
                    at.store(time, SeqCst);
                    noticed.store(number, SeqCst);
                }
            }
            Ok(())
        })?;
    }
    workers.fork(|| {
        let mut bell = bell.ringer()?;
        let mut random = StdRng::seed_from_u64(samples as u64);
        while board[READY].load(SeqCst) < listeners as u64 {
            std::thread::sleep(Duration::from_micros(100));
        }
        for sample in 0..samples {
            // Leaves listeners time to go to sleep again, and gives each change another phase relative to those that poll.
            std::thread::sleep(Duration::from_micros(random.random_range(200..1200)));
            let number = sample as u64 + 1;
            let start = now();
            board[NUMBER].store(number, SeqCst);
            bell()?;
            let last = last_to_notice(board, listeners, number);
            board[latencies + sample].store(last.map_or(0, |last| last.saturating_sub(start).max(1)), SeqCst);
            if last.is_none() {
                board[MISSED].fetch_add(1, SeqCst);
            }
        }
        board[ENDED].store(1, SeqCst);
        bell()
    })?;
    workers.join()?;
    let latencies = board[latencies..].iter().map(|word| word.load(SeqCst)).filter(|&latency| latency > 0).collect();
    Ok(Round { latencies, missed: board[MISSED].load(SeqCst) })
}

/// When the last of them noticed it; `None` if one has not after a second.
fn last_to_notice(board: &'static [AtomicU64], listeners: usize, number: u64) -> Option<u64> {
    let start = Instant::now();
    let mut last = 0;
    for listener in 0..listeners {
        let (noticed, at) = listener_words(board, listener);
        while noticed.load(SeqCst) < number {
            if start.elapsed() > Duration::from_secs(1) {
                return None;
            }
            std::thread::sleep(Duration::from_micros(20));
        }
        last = last.max(at.load(SeqCst));
    }
    Some(last)
}

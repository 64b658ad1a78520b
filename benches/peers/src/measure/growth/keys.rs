//! How cost grows with keys.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde::Serialize;

use super::super::day::{Place, proportional_memory};
use crate::options::Scale;
use crate::peer::{Peer, Role, Session, Source};
use crate::peers::GENSYNC;
use crate::shared::{Workers, words};
use crate::statistics::{Spread, number, order};
use crate::{Outcome, subfolder};

/// One peer with one number of keys.
#[derive(Serialize)]
pub(crate) struct Row {
    pub(crate) peer: &'static str,
    pub(crate) keys: usize,
    /// How long it took to create them, all together.
    pub(crate) fill_seconds: f64,
    /// Nanoseconds to attach to one of them, opening included, of a sample.
    pub(crate) attach: f64,
    /// Nanoseconds to get the value of one of the sample, at random.
    pub(crate) get: Spread,
    /// To gensync's, round by round, if gensync has come so far.
    pub(crate) ratio: Option<Spread>,
    /// Bytes in memory that all processes share, or that the server has.
    pub(crate) bytes: u64,
}

const SIZES: [usize; 6] = [10, 1000, 10_000, 100_000, 1_000_000, 10_000_000];

/// From few keys to many, each peer until it would take more than the time given.
pub(super) fn measure(peers: &[Box<dyn Peer>], folder: &Path, scale: Scale, growth: &mut super::Growth) -> Outcome<()> {
    let mut growing: Vec<_> = peers.iter().map(|peer| (peer, Vec::new())).collect();
    for keys in SIZES.into_iter().filter(|&keys| keys <= scale.most_keys) {
        let folder = subfolder(folder, &keys.to_string())?;
        let mut filled = Vec::new();
        let mut goes_on = Vec::new();
        for (peer, mut fills) in growing {
            let name = peer.about().name;
            let mut stop =
                |reason: &str| growth.stops.push(format!("{name} stops before {} keys: {reason}", number(keys as f64)));
            let expected = expected(&fills, keys).unwrap_or(0.0);
            if let Some(reason) = peer.too_many(keys) {
                stop(reason);
            } else if expected > scale.fill_budget.as_secs_f64() {
                stop(&format!("as it has grown, to create them would take {expected:.0} s"));
            } else {
                let start = Instant::now();
                let folder = subfolder(&folder, name)?;
                if let Some(place) = Place::all(&**peer, &folder, keys)?.into_iter().next() {
                    let seconds = start.elapsed().as_secs_f64();
                    fills.push((keys, seconds));
                    filled.push(Filled { place, folder, seconds });
                    goes_on.push((peer, fills));
                }
            }
        }
        growth.keys.extend(attach_and_get(&filled, keys, scale)?);
        drop(filled);
        std::fs::remove_dir_all(&folder)?;
        growing = goes_on;
    }
    Ok(())
}

struct Filled {
    place: Place,
    folder: PathBuf,
    seconds: f64,
}

/// How many seconds it will take to create `keys` keys: at least in proportion to the last time, and more if it has grown
/// by more before. Nothing is known of the first.
fn expected(fills: &[(usize, f64)], keys: usize) -> Option<f64> {
    let &(last, seconds) = fills.last().filter(|&&(last, _)| last >= 1000)?;
    let power = match fills[..fills.len() - 1].last() {
        Some(&(before, faster)) if before >= 1000 => {
            ((seconds / faster).ln() / (last as f64 / before as f64).ln()).max(1.0)
        }
        _ => 1.0,
    };
    Some(seconds * (keys as f64 / last as f64).powf(power))
}

/// How many of the keys a process attaches to.
const SAMPLE: usize = 10_000;

/// The peer that has the turn.
const NOBODY: u64 = 0;
const ATTACHING: u64 = u64::MAX;

/// A process for each peer attaches to a sample of the keys, then they get values by turns.
fn attach_and_get(filled: &[Filled], keys: usize, scale: Scale) -> Outcome<Vec<Row>> {
    // The peer that has the turn, counted from 1; then for each the nanoseconds to attach, and of each round those of a thousand gets.
    let board = words(1 + filled.len() * (1 + scale.rounds))?;
    let (turn, figures) = (&board[0], |index: usize| &board[1 + index * (1 + scale.rounds)..][..1 + scale.rounds]);
    let source = Source::new(keys)?;
    let batch = scale.batch.min(Duration::from_millis(10));
    let mut workers = Workers::default();
    for (index, one) in filled.iter().enumerate() {
        turn.store(ATTACHING, SeqCst);
        workers.fork(|| {
            let (mut session, sample) = attach(&one.place, keys, source, &figures(index)[0])?;
            turn.store(NOBODY, SeqCst);
            for figure in &figures(index)[1..] {
                await_turn(turn, index);
                figure.store(get_at_random(&mut *session, sample, batch), SeqCst);
                turn.store(NOBODY, SeqCst);
            }
            Ok(())
        })?;
        workers.await_value(turn, NOBODY)?;
    }
    for round in 0..scale.rounds {
        for index in order(round, filled.len()) {
            turn.store(index as u64 + 1, SeqCst);
            workers.await_value(turn, NOBODY)?;
        }
    }
    workers.join()?;
    let gets = |index: usize| -> Vec<_> {
        figures(index)[1..].iter().map(|figure| figure.load(SeqCst) as f64 / 1000.0).collect()
    };
    let gensync = filled.iter().position(|one| one.place.peer == GENSYNC);
    let row = |(index, one): (usize, &Filled)| {
        let site = one.place.site();
        let bytes = site.server().map_or_else(|| site.shared_bytes(&one.folder), |pid| Ok(proportional_memory(pid)))?;
        let get = gets(index);
        let ratio = gensync.map(|gensync| Spread::of_ratios(&get, &gets(gensync)));
        let attach = figures(index)[0].load(SeqCst) as f64;
        Ok(Row { peer: one.place.peer, keys, fill_seconds: one.seconds, attach, get: Spread::of(get), ratio, bytes })
    };
    filled.iter().enumerate().map(row).collect()
}

/// Attaches to a sample, returns the sample's size, and notes the nanoseconds for each key.
fn attach(place: &Place, keys: usize, source: Source, figure: &AtomicU64) -> Outcome<(Box<dyn Session>, usize)> {
    let mut random = StdRng::seed_from_u64(keys as u64);
    let sample: Vec<_> = match keys {
        0..=SAMPLE => (0..keys).collect(),
        _ => (0..SAMPLE).map(|_| random.random_range(0..keys)).collect(),
    };
    let start = Instant::now();
    let session = place.site().attach(&sample, Role::Reader, source)?;
    figure.store(start.elapsed().as_nanos() as u64 / sample.len() as u64, SeqCst);
    Ok((session, sample.len()))
}

/// The nanoseconds of a thousand gets.
fn get_at_random(session: &mut dyn Session, sample: usize, batch: Duration) -> u64 {
    let mut random = StdRng::seed_from_u64(sample as u64);
    let requests: Vec<_> = (0..SAMPLE).map(|_| random.random_range(0..sample) as u32).collect();
    let (start, mut count) = (Instant::now(), 0);
    // Slow peers do not reach the end of the list.
    for requests in requests.chunks(500).cycle() {
        session.get_all(requests);
        count += requests.len() as u64;
        if start.elapsed() >= batch {
            break;
        }
    }
    (start.elapsed().as_nanos() * 1000) as u64 / count
}

fn await_turn(turn: &AtomicU64, index: usize) {
    while turn.load(SeqCst) != index as u64 + 1 {
        std::thread::sleep(Duration::from_millis(4));
    }
}

#[cfg(test)]
mod tests {
    use super::expected;

    #[test]
    fn what_grows_with_the_square_is_expected_to_go_on_like_that() {
        assert_eq!(expected(&[(10, 1.0)], 1000), None);
        assert_eq!(expected(&[(10, 1.0), (1000, 2.0)], 10_000), Some(20.0));
        assert_eq!(expected(&[(1000, 2.0), (10_000, 3.0)], 100_000), Some(30.0));
        let seconds = expected(&[(1000, 1.0), (10_000, 100.0)], 100_000).unwrap();
        assert!((seconds - 10_000.0).abs() < 1e-6);
    }
}

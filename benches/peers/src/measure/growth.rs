//! How cost grows: with keys, with processes, with updates.

use std::path::Path;
use std::sync::atomic::Ordering::*;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde::Serialize;

use super::day::{Day, Demand, Place, proportional_memory};
use crate::options::Scale;
use crate::peer::{Peer, Role, Source};
use crate::shared::{Workers, words};
use crate::statistics::{Spread, order};
use crate::{Outcome, subfolder};

#[derive(Serialize)]
pub(crate) struct Growth {
    pub(crate) keys: Vec<KeysRow>,
    /// Why a peer is given no more keys.
    pub(crate) stops: Vec<String>,
    pub(crate) processes: Vec<DayRow>,
    pub(crate) updates: Vec<DayRow>,
}

/// One peer with one number of keys.
#[derive(Serialize)]
pub(crate) struct KeysRow {
    pub(crate) peer: &'static str,
    pub(crate) keys: usize,
    /// How long it took to create them, all together.
    pub(crate) fill_seconds: f64,
    /// Nanoseconds to attach to one of them, opening included, of a sample.
    pub(crate) attach: f64,
    /// Nanoseconds to get the value of one of the sample, at random.
    pub(crate) get: Spread,
    /// Bytes in memory that all processes share, or that the server has.
    pub(crate) bytes: u64,
}

/// One peer with one number of processes, or of updates asked for.
#[derive(Serialize)]
pub(crate) struct DayRow {
    pub(crate) peer: &'static str,
    pub(crate) processes: usize,
    /// A second; `None`: as many as it can.
    pub(crate) asked: Option<u32>,
    pub(crate) requests: Spread,
    pub(crate) updates: Spread,
    pub(crate) stale: u64,
}

pub(crate) fn measure(peers: &[Box<dyn Peer>], folder: &Path, scale: Scale) -> Outcome<Growth> {
    let mut growth = Growth { keys: Vec::new(), stops: Vec::new(), processes: Vec::new(), updates: Vec::new() };
    let keys = subfolder(folder, "keys")?;
    for peer in peers {
        grow_keys(&**peer, &subfolder(&keys, peer.about().name)?, scale, &mut growth)?;
    }

    const KEYS: usize = 100;
    let mut places = Vec::new();
    let days = subfolder(folder, "days")?;
    for peer in peers {
        // The first way is enough.
        places.extend(Place::all(&**peer, &subfolder(&days, peer.about().name)?, KEYS)?.into_iter().next());
    }
    let day = Day { workers: 1, keys: KEYS, updates: Some(50), length: scale.growth_day };
    let processes = (0..).map(|power| 1 << power).take_while(|&count| count <= scale.most_processes);
    let days = processes.map(|workers| Day { workers, ..day });
    growth.processes = rows(&places, days, scale)?;
    let rates = [Some(0), Some(100), Some(1000), Some(10_000), Some(100_000), None];
    growth.updates = rows(&places, rates.into_iter().map(|updates| Day { updates, ..day }), scale)?;
    Ok(growth)
}

fn rows(places: &[Place], days: impl Iterator<Item = Day>, scale: Scale) -> Outcome<Vec<DayRow>> {
    let mut rows = Vec::new();
    for day in days {
        let demand = Demand::new(day.keys)?;
        let mut figures = vec![Vec::new(); places.len()];
        for round in 0..scale.growth_rounds {
            for index in order(round, places.len()) {
                figures[index].push(places[index].serve(day, &demand)?);
            }
        }
        rows.extend(places.iter().zip(&figures).map(|(place, figures)| DayRow {
            peer: place.peer,
            processes: day.workers,
            asked: day.updates,
            requests: Spread::of(figures.iter().map(|figures| figures.requests)),
            updates: Spread::of(figures.iter().map(|figures| figures.updates)),
            stale: figures.iter().map(|figures| figures.stale as u64).sum(),
        }));
    }
    Ok(rows)
}

const SIZES: [usize; 6] = [10, 1000, 10_000, 100_000, 1_000_000, 10_000_000];

/// From few keys to many, as long as that is to be had in the time given.
fn grow_keys(peer: &dyn Peer, folder: &Path, scale: Scale, growth: &mut Growth) -> Outcome<()> {
    let name = peer.about().name;
    let mut fills: Vec<(usize, f64)> = Vec::new();
    for keys in SIZES.into_iter().filter(|&keys| keys <= scale.most_keys) {
        let text = |reason: &str| format!("{name} stops before {keys} keys: {reason}");
        if let Some(reason) = peer.too_many(keys) {
            growth.stops.push(text(reason));
            break;
        }
        if let Some(seconds) = expected(&fills, keys)
            && seconds > scale.fill_budget.as_secs_f64()
        {
            growth.stops.push(text(&format!("as it has grown, to create them would take {seconds:.0} s")));
            break;
        }
        let folder = subfolder(folder, &keys.to_string())?;
        let start = Instant::now();
        let Some(place) = Place::all(peer, &folder, keys)?.into_iter().next() else { break };
        let fill_seconds = start.elapsed().as_secs_f64();
        fills.push((keys, fill_seconds));
        let (attach, get) = attach_and_get(&place, keys, scale)?;
        let server = place.site().server();
        let bytes = server.map_or_else(|| place.site().shared_bytes(&folder), |pid| Ok(proportional_memory(pid)))?;
        growth.keys.push(KeysRow { peer: name, keys, fill_seconds, attach, get, bytes });
        drop(place);
        std::fs::remove_dir_all(&folder)?;
    }
    Ok(())
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

/// In a process of its own: nanoseconds to attach to a key, and to get one.
fn attach_and_get(place: &Place, keys: usize, scale: Scale) -> Outcome<(f64, Spread)> {
    const SAMPLE: usize = 10_000;
    let rounds = scale.rounds;
    let figures = words(1 + rounds)?;
    let source = Source::new(keys)?;
    let mut workers = Workers::default();
    workers.fork(|| {
        let mut random = StdRng::seed_from_u64(keys as u64);
        let sample: Vec<_> = match keys {
            0..=SAMPLE => (0..keys).collect(),
            _ => (0..SAMPLE).map(|_| random.random_range(0..keys)).collect(),
        };
        let start = Instant::now();
        let mut session = place.site().attach(&sample, Role::Reader, source)?;
        figures[0].store(start.elapsed().as_nanos() as u64 / sample.len() as u64, SeqCst);
        let requests: Vec<_> = (0..SAMPLE).map(|_| random.random_range(0..sample.len()) as u32).collect();
        let batch = scale.batch.min(Duration::from_millis(10));
        for figure in &figures[1..] {
            let (start, mut count) = (Instant::now(), 0);
            // Slow ones do not come to the end of the list.
            for requests in requests.chunks(500).cycle() {
                session.get_all(requests);
                count += requests.len() as u64;
                if start.elapsed() >= batch {
                    break;
                }
            }
            // In thousandths, as some take a few.
            figure.store((start.elapsed().as_nanos() * 1000) as u64 / count, SeqCst);
        }
        Ok(())
    })?;
    workers.join()?;
    let get = Spread::of(figures[1..].iter().map(|figure| figure.load(SeqCst) as f64 / 1000.0));
    Ok((figures[0].load(SeqCst) as f64, get))
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

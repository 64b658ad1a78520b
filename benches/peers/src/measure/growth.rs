//! How cost grows: with keys, with processes, with updates.

pub(crate) mod keys;

use std::path::Path;

use serde::Serialize;

use super::day::{Day, Figures, Place};
use crate::options::Scale;
use crate::peer::Peer;
use crate::requests::Demand;
use crate::statistics::{Spread, order};
use crate::{Outcome, subfolder};

#[derive(Serialize)]
pub(crate) struct Growth {
    pub(crate) keys: Vec<keys::Row>,
    /// Why a peer is given no more keys.
    pub(crate) stops: Vec<String>,
    pub(crate) processes: Vec<DayRow>,
    pub(crate) updates: Vec<DayRow>,
}

/// One peer with one number of processes, or of updates asked for.
#[derive(Serialize)]
pub(crate) struct DayRow {
    pub(crate) peer: &'static str,
    pub(crate) processes: usize,
    /// A second; `None`: as many as it can.
    pub(crate) asked: Option<u32>,
    pub(crate) requests: Spread,
    /// Of the requests to gensync's, round by round.
    pub(crate) ratio: Spread,
    pub(crate) updates: Spread,
    pub(crate) stale: u64,
}

pub(crate) fn measure(peers: &[Box<dyn Peer>], folder: &Path, scale: Scale) -> Outcome<Growth> {
    let mut growth = Growth { keys: Vec::new(), stops: Vec::new(), processes: Vec::new(), updates: Vec::new() };
    keys::measure(peers, &subfolder(folder, "keys")?, scale, &mut growth)?;

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
        let requests = |figures: &[Figures]| figures.iter().map(|figures| figures.requests).collect::<Vec<_>>();
        // The first place is gensync's.
        let gensync = requests(&figures[0]);
        rows.extend(places.iter().zip(&figures).map(|(place, figures)| DayRow {
            peer: place.peer,
            processes: day.workers,
            asked: day.updates,
            requests: Spread::of(requests(figures)),
            ratio: Spread::of_ratios(&requests(figures), &gensync),
            updates: Spread::of(figures.iter().map(|figures| figures.updates)),
            stale: figures.iter().map(|figures| figures.stale as u64).sum(),
        }));
    }
    Ok(rows)
}

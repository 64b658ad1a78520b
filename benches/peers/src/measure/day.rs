//! A server's day in small: forked processes answer requests for keys, some asked for more than others, while one process
//! updates them. An oracle outside the peers knows how old an answer may be.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::Pid;
use serde::Serialize;

use crate::peer::{Peer, Role, Session, Site, Source};
use crate::requests::{Demand, OPEN, Requests};
use crate::shared::{Workers, nanoseconds, words};
use crate::statistics::{Spread, order};
use crate::{Outcome, subfolder};

/// How a day goes.
#[derive(Clone, Copy, Serialize)]
pub(crate) struct Day {
    pub(crate) workers: usize,
    pub(crate) keys: usize,
    /// Updates a second; `None`: as many as the writer can make.
    pub(crate) updates: Option<u32>,
    pub(crate) length: Duration,
}

/// The figures of a day.
#[derive(Clone, Copy, Default)]
pub(crate) struct Figures {
    /// A second, of all workers together.
    pub(crate) requests: f64,
    /// Nanoseconds of processor for a request: the workers' and the server's.
    pub(crate) processor: f64,
    /// Bytes that the workers and the server have in memory, shared ones counted once.
    pub(crate) memory: f64,
    /// A second.
    pub(crate) updates: f64,
    pub(crate) stale: f64,
}

/// One peer's days.
#[derive(Serialize)]
pub(crate) struct Report {
    pub(crate) peer: &'static str,
    pub(crate) way: &'static str,
    pub(crate) requests: Spread,
    /// To gensync's, round by round.
    pub(crate) ratio: Spread,
    pub(crate) processor: Spread,
    pub(crate) memory: Spread,
    pub(crate) updates: Spread,
    /// In all rounds together.
    pub(crate) stale: u64,
}

#[derive(Serialize)]
pub(crate) struct Table {
    pub(crate) day: Day,
    pub(crate) rows: Vec<Report>,
}

/// The same day for all peers by turns, round by round.
pub(crate) fn measure(peers: &[Box<dyn Peer>], folder: &Path, day: Day, rounds: usize) -> Outcome<Table> {
    let demand = Demand::new(day.keys)?;
    let mut places = Vec::new();
    for peer in peers {
        places.extend(Place::all(&**peer, &subfolder(folder, peer.about().name)?, day.keys)?);
    }
    let mut days = vec![Vec::new(); places.len()];
    for round in 0..rounds {
        for index in order(round, places.len()) {
            days[index].push(places[index].serve(day, &demand)?);
        }
    }
    let of = |days: &[Figures], figure: fn(&Figures) -> f64| days.iter().map(figure).collect::<Vec<_>>();
    let gensync = of(&days[0], |figures| figures.requests);
    let rows = places.iter().zip(&days).map(|(place, days)| {
        let requests = of(days, |figures| figures.requests);
        Report {
            peer: place.peer,
            way: place.way,
            ratio: Spread::of_ratios(&requests, &gensync),
            requests: Spread::of(requests),
            processor: Spread::of(of(days, |figures| figures.processor)),
            memory: Spread::of(of(days, |figures| figures.memory)),
            updates: Spread::of(of(days, |figures| figures.updates)),
            stale: days.iter().map(|figures| figures.stale as u64).sum(),
        }
    });
    Ok(Table { day, rows: rows.collect() })
}

/// A peer's keys, and what all peers' keys have alike.
pub(crate) struct Place {
    pub(crate) peer: &'static str,
    pub(crate) way: &'static str,
    site: Box<dyn Site>,
    source: Source,
    /// For each key, the newest value that was announced completely.
    oracle: &'static [AtomicU64],
    keys: Vec<usize>,
}

impl Place {
    pub(crate) fn all(peer: &dyn Peer, folder: &Path, keys: usize) -> Outcome<Vec<Self>> {
        let place = |(way, site)| {
            Ok(Self {
                peer: peer.about().name,
                way,
                site,
                source: Source::new(keys)?,
                oracle: words(keys)?,
                keys: (0..keys).collect(),
            })
        };
        peer.sites(folder, keys)?.into_iter().map(place).collect()
    }

    pub(crate) fn site(&self) -> &dyn Site {
        &*self.site
    }

    pub(crate) fn serve(&self, day: Day, demand: &Demand) -> Outcome<Figures> {
        let board = Board { words: words(Board::length(day.workers))?, members: day.workers as u64 + 1 };
        let mut workers = Workers::default();
        for worker in 0..day.workers {
            workers.fork(|| self.work(&board, worker, demand))?;
        }
        workers.fork(|| self.update(&board, day, demand))?;
        let server = self.site.server();
        workers.await_value(&board.words[Board::ATTACHED], board.members)?;
        let (start, before) = (Instant::now(), processor(server));
        board.words[Board::PHASE].store(OPEN, SeqCst);
        std::thread::sleep(day.length);
        board.words[Board::PHASE].store(Board::CLOSED, SeqCst);
        let elapsed = start.elapsed().as_secs_f64();
        let served = processor(server) - before;
        workers.join()?;

        let sum =
            |figure: usize| (0..day.workers).map(|worker| board.row(worker)[figure].load(SeqCst)).sum::<u64>() as f64;
        let requests = sum(Row::REQUESTS);
        Ok(Figures {
            requests: requests / elapsed,
            processor: (sum(Row::PROCESSOR) + served as f64) / requests.max(1.0),
            memory: sum(Row::MEMORY) + server.map_or(0, proportional_memory) as f64,
            updates: board.words[Board::UPDATES].load(SeqCst) as f64 / elapsed,
            stale: sum(Row::STALE),
        })
    }

    fn work(&self, board: &Board, worker: usize, demand: &Demand) -> Outcome<()> {
        let mut session = self.site.attach(&self.keys, Role::Reader, self.source)?;
        let row = board.row(worker);
        board.meet(Board::ATTACHED);
        board.await_opening();
        let before = processor(Some(Pid::this()));
        // Each begins elsewhere, so that they do not ask for the same keys at the same time.
        let phase = &board.words[Board::PHASE];
        let first = worker * (Demand::LENGTH / 7);
        let mut requests = Requests { demand, oracle: self.oracle, phase, next: first, stale: 0 };
        session.serve(&mut requests);
        row[Row::REQUESTS].store((requests.next - first) as u64, SeqCst);
        row[Row::STALE].store(requests.stale, SeqCst);
        row[Row::PROCESSOR].store(processor(Some(Pid::this())) - before, SeqCst);
        // What is shared is counted by its share, so all must be there when it is counted.
        board.meet(Board::DONE);
        row[Row::MEMORY].store(proportional_memory(Pid::this()), SeqCst);
        board.meet(Board::COUNTED);
        Ok(())
    }

    fn update(&self, board: &Board, day: Day, demand: &Demand) -> Outcome<()> {
        let mut session = self.site.attach(&self.keys, Role::Writer, self.source)?;
        board.meet(Board::ATTACHED);
        board.await_opening();
        let start = Instant::now();
        let mut updates = 0;
        let phase = &board.words[Board::PHASE];
        while phase.load(Relaxed) == OPEN {
            if let Some(rate) = day.updates {
                let due = if rate == 0 { day.length } else { Duration::from_secs(1) * updates / rate };
                let early = due.saturating_sub(start.elapsed());
                if !early.is_zero() {
                    std::thread::sleep(early.min(Duration::from_millis(20)));
                    continue;
                }
            }
            self.update_one(&mut *session, demand.key(31 * updates as usize));
            updates += 1;
        }
        board.words[Board::UPDATES].store(updates.into(), SeqCst);
        board.meet(Board::DONE);
        board.meet(Board::COUNTED);
        Ok(())
    }

    fn update_one(&self, session: &mut dyn Session, key: usize) {
        let value = self.source.load(key) + 1;
        self.source.store(key, value);
        session.announce(key, value);
        // From here on, no answer may be what was there before.
        self.oracle[key].store(value, SeqCst);
    }
}

/// The words by which the processes of a day communicate.
struct Board {
    words: &'static [AtomicU64],
    /// The workers and the writer.
    members: u64,
}

impl Board {
    const PHASE: usize = 0;
    const ATTACHED: usize = 16;
    const DONE: usize = 17;
    const COUNTED: usize = 18;
    const UPDATES: usize = 19;
    const ROWS: usize = 32;

    /// The phase after the one of requests.
    const CLOSED: u64 = 2;

    fn length(workers: usize) -> usize {
        Self::ROWS + workers * Row::LENGTH
    }

    fn row(&self, worker: usize) -> &[AtomicU64] {
        &self.words[Self::ROWS + worker * Row::LENGTH..][..Row::LENGTH]
    }

    /// Waits until all have come here.
    fn meet(&self, place: usize) {
        self.words[place].fetch_add(1, SeqCst);
        while self.words[place].load(SeqCst) < self.members {
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn await_opening(&self) {
        while self.words[Self::PHASE].load(SeqCst) == 0 {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

/// What a worker did.
struct Row;

impl Row {
    const REQUESTS: usize = 0;
    const STALE: usize = 1;
    const PROCESSOR: usize = 2;
    const MEMORY: usize = 3;
    const LENGTH: usize = 16;
}

/// Nanoseconds of processor that a process has used.
fn processor(pid: Option<Pid>) -> u64 {
    pid.and_then(|pid| clock_getcpuclockid(pid).ok()).map_or(0, |clock: ClockId| nanoseconds(clock))
}

/// Bytes of memory, what it shares with others counted by its share.
pub(crate) fn proportional_memory(pid: Pid) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()).and_then(|number| number.parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peer::{Changes, Held};

    /// A peer that notices changes; a deaf one does not.
    struct Ear<'a> {
        generation: &'a AtomicU64,
        seen: u64,
        deaf: bool,
    }

    impl Changes for Ear<'static> {
        fn changed(&mut self, _key: usize) -> bool {
            // ORDERING: pairs with the release of `announce`, so that a session that sees the generation sees the source changed.
            let generation = self.generation.load(Acquire);
            !self.deaf && std::mem::replace(&mut self.seen, generation) != generation
        }

        fn announce(&mut self, _key: usize, _value: u64) {
            // ORDERING: pairs with the acquire in `changed`; the source was changed before.
            self.generation.fetch_add(1, AcqRel);
        }
    }

    struct Nowhere;

    impl Site for Nowhere {
        fn attach(&self, _keys: &[usize], _role: Role, _source: Source) -> Outcome<Box<dyn Session>> {
            Err("nobody attaches".into())
        }
    }

    /// How many answers the oracle finds stale of ten, with an update before each.
    fn stale_answers(deaf: bool) -> u64 {
        let keys = vec![0];
        let (source, oracle) = (Source::new(1).unwrap(), words(1).unwrap());
        let place = Place { peer: "ear", way: "hears", site: Box::new(Nowhere), source, oracle, keys };
        let generation: &'static AtomicU64 = Box::leak(Box::default());
        let session = |deaf| Held::boxed(Ear { generation, seen: 0, deaf }, &place.keys, source);
        let (mut reader, mut writer) = (session(deaf), session(true));
        let (demand, phase) = (Demand::new(1).unwrap(), AtomicU64::new(OPEN));
        let mut requests = Requests { demand: &demand, oracle, phase: &phase, next: 0, stale: 0 };
        for _ in 0..10 {
            place.update_one(&mut *writer, 0);
            let (key, newest) = requests.next().unwrap();
            let value = reader.get(key);
            requests.answer(value, newest);
        }
        requests.stale
    }

    #[test]
    fn the_oracle_finds_every_stale_answer_and_no_fresh_one() {
        assert_eq!(stale_answers(true), 10);
        assert_eq!(stale_answers(false), 0);
    }

    #[test]
    fn requests_end_soon_after_the_day() {
        let (demand, phase) = (Demand::new(100).unwrap(), AtomicU64::new(Board::CLOSED));
        let oracle = words(100).unwrap();
        let mut requests = Requests { demand: &demand, oracle, phase: &phase, next: 5, stale: 0 };
        assert!(std::iter::from_fn(|| requests.next()).take(100).count() < 16);
    }

    #[test]
    fn the_first_key_is_asked_for_most_and_the_last_one_too() {
        let demand = Demand::new(100).unwrap();
        let count = |key| demand.0.iter().filter(|&&other| other == key).count();
        assert!(count(0) > count(1) && count(1) > count(10) && count(99) > 0);
        assert!(demand.0.iter().all(|&key| key < 100));
    }
}

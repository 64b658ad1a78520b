//! A process of the storm, or a thread of one: does anything at random, and reports it to the oracle.

mod operations;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use gensync::{Cached, Error, ErrorKind, Generation, GenerationSynchronizer, Table, Ticket};
use nix::sys::signal::{Signal, raise};

pub(crate) use operations::OPERATIONS;

use crate::Storm;
use crate::oracle::{Count, Entry, KEYS, Oracle, PROCESSES, SURVIVORS};
use crate::support::{LIMIT, micros, next_random};

/// A holder of state of a key.
struct Holder {
    key: usize,
    sync: GenerationSynchronizer,
    state: u64,
    /// Of a load of its own, which what `sync` has seen since need not agree with.
    loaded: (Ticket, u64),
    is_read_only: bool,
}

impl Holder {
    fn new(table: &Table, key: usize, oracle: &Oracle) -> Result<Self, Error> {
        let sync = GenerationSynchronizer::new(table, name(key))?;
        // Attaching counts as having seen: so it comes before the load.
        let ticket = sync.ticket();
        let state = oracle.load(key);
        Ok(Self { key, sync, state, loaded: (ticket, state), is_read_only: false })
    }
}

pub(crate) fn name(key: usize) -> String {
    format!("key{key}")
}

pub(crate) struct Worker {
    storm: &'static Storm,
    random: u64,
    entry: Entry,
    /// Which survivor it is, if it is one.
    survivor: Option<usize>,
    /// Within another operation, or a thread: some operations are not for it.
    is_nested: bool,
    table: Table,
    holders: Vec<Holder>,
    values: Vec<(usize, Arc<Cached<u64>>)>,
    /// The highest generation of each key that it has seen.
    highest: [u64; KEYS],
}

/// Does what a survivor does until the storm is over.
pub(crate) fn survive(storm: &'static Storm, number: usize) {
    let entry = storm.oracle.entry(number);
    entry.beat.store(micros(), SeqCst);
    entry.process.store(std::process::id().into(), SeqCst);
    let mut worker = Worker::new(storm, entry, Some(number), storm.open());
    for key in 0..KEYS {
        worker.attach(key);
    }
    while worker.goes_on() {
        match storm.oracle.is_calm() {
            true => worker.settle(),
            false => worker.act(),
        }
    }
}

/// The life of a process that is killed sooner or later. In a forked child.
pub(crate) fn live(storm: &'static Storm, inherited: Option<&mut Worker>) {
    let Some(entry) = register(&storm.oracle) else { return };
    storm.oracle.tally.count(Count::Forks);
    let mut own;
    let worker = match inherited {
        Some(worker) => worker,
        None => {
            own = Worker::new(storm, entry, None, storm.open());
            &mut own
        }
    };
    (worker.entry, worker.is_nested, worker.random) = (entry, false, storm.oracle.lot(storm.seed));
    while worker.goes_on() && !storm.oracle.is_calm() {
        worker.act();
    }
}

fn register(oracle: &Oracle) -> Option<Entry> {
    let own = std::process::id().into();
    (SURVIVORS..PROCESSES).map(|index| oracle.entry(index)).find(|entry| {
        let is_free = entry.process.load(SeqCst) == 0;
        if is_free {
            entry.beat.store(micros(), SeqCst);
        }
        is_free && entry.process.compare_exchange(0, own, SeqCst, SeqCst).is_ok()
    })
}

impl Worker {
    fn new(storm: &'static Storm, entry: Entry, survivor: Option<usize>, table: Table) -> Self {
        let random = storm.oracle.lot(storm.seed);
        let (holders, values, highest) = (Vec::new(), Vec::new(), [0; KEYS]);
        Self { storm, random, entry, survivor, is_nested: false, table, holders, values, highest }
    }

    fn oracle(&self) -> &'static Oracle {
        &self.storm.oracle
    }

    /// From 0 to `limit` - 1.
    fn random(&mut self, limit: usize) -> usize {
        ((next_random(&mut self.random) >> 16) % limit as u64) as usize
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.random(count) == 0
    }

    /// Shows that it is alive; `false` when the storm is over.
    fn goes_on(&self) -> bool {
        let now = micros();
        self.entry.beat.store(now, SeqCst);
        now.saturating_sub(self.oracle().beat.load(SeqCst)) < LIMIT.as_micros() as u64
    }

    fn act(&mut self) {
        let all = OPERATIONS.iter().map(|(_, weight, _)| *weight as usize).sum();
        let mut lot = self.random(all) as u64;
        let (index, (_, _, operation)) = OPERATIONS
            .iter()
            .enumerate()
            .find(|(_, (_, weight, _))| {
                let is_hit = lot < *weight;
                lot = lot.saturating_sub(*weight);
                is_hit
            })
            .unwrap();
        match self.is_nested {
            true => self.entry.beat.store(micros(), SeqCst),
            false => self.entry.operation.store(index as u64, SeqCst),
        }
        self.oracle().tally.count_operation(index);
        operation(self);
    }

    /// Does a few other things in the middle of something.
    fn digress(&mut self, limit: usize) {
        let was_nested = std::mem::replace(&mut self.is_nested, true);
        for _ in 0..self.random(limit) {
            self.act();
        }
        self.is_nested = was_nested;
    }

    /// Is killed now and then, in the middle of an operation.
    fn risk_death(&mut self) {
        if self.survivor.is_none() && self.one_in(300) {
            raise(Signal::SIGKILL).unwrap();
        }
    }

    /// An operation may fail if an update of another process does not end: the process is stopped, or was killed and a child of it
    /// has what it locked.
    fn excuse(&self, error: &Error) {
        assert!(matches!(error.kind(), ErrorKind::Locked { .. }), "{error}");
        self.oracle().tally.count(Count::Refused);
    }

    fn unless_locked<T>(&self, result: Result<T, Error>) -> Option<T> {
        result.map_err(|error| self.excuse(&error)).ok()
    }

    /// A generation of `key` that is the present one, or was just now.
    fn come_upon(&mut self, key: usize, generation: Option<Generation>) {
        if let Some(generation) = generation {
            self.raise(key, generation, generation.get());
        }
    }

    /// An update of `key` gave this generation.
    fn come_to(&mut self, key: usize, generation: Generation) {
        self.oracle().give(key, generation);
        self.raise(key, generation, generation.get() - 1);
    }

    /// `generation` came after all that it has seen, and must be no higher than `most`.
    fn raise(&mut self, key: usize, generation: Generation, most: u64) {
        let highest = self.highest[key];
        if highest > most {
            let what = format_args!("key {key} was at generation {highest}, and is at {generation} now");
            self.oracle().accuse(Count::Backwards, what);
        }
        self.highest[key] = highest.max(generation.get());
    }
}

//! The data that is shown: the table's keys, and how fast each is updated.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use gensync::{SlotInfo, Table};

use crate::failure::{Failure, explain};
use crate::output::label;
use crate::processes::{Mapped, scan};
use crate::target::Target;

/// How many polls a history covers.
pub(super) const HISTORY: usize = 120;
/// How often processes are scanned, which takes longer than to read the table.
const PROCESSES_PAUSE: Duration = Duration::from_secs(2);

pub(super) struct Model {
    table: Table,
    keys: HashMap<u128, Key>,
    last: Option<Instant>,
    processes: Option<Instant>,
    pub(super) totals: Totals,
    pub(super) trouble: Option<String>,
}

#[derive(Default)]
pub(super) struct Totals {
    pub(super) keys: usize,
    pub(super) rate: f64,
    pub(super) awaited: usize,
    pub(super) pending: u64,
    /// `None` if it is unknown.
    pub(super) processes: Option<usize>,
    pub(super) stale: usize,
}

impl Totals {
    pub(super) fn text(&self) -> String {
        let Self { keys, rate, awaited, pending, .. } = self;
        let processes = self.processes.map_or_else(|| "?".to_owned(), |count| count.to_string());
        format!("keys {keys}   updates/s {rate:.1}   waited for {awaited}   pending {pending}   processes {processes}")
    }
}

struct Key {
    slot: SlotInfo,
    rate: f64,
    /// Updates in each interval, the latest at the end; empty until there is one.
    history: VecDeque<u64>,
}

/// One key.
pub(super) struct Row<'a> {
    pub(super) slot: &'a SlotInfo,
    pub(super) rate: f64,
    pub(super) history: &'a VecDeque<u64>,
    pub(super) label: String,
}

impl Model {
    pub(super) fn new(table: Table) -> Self {
        let (keys, totals) = (HashMap::new(), Totals::default());
        Self { table, keys, last: None, processes: None, totals, trouble: None }
    }

    pub(super) fn path(&self) -> String {
        self.table.path().map_or_else(String::new, |path| path.display().to_string())
    }

    /// Reads the table now, or the one that has replaced it.
    pub(super) fn poll(&mut self, target: &Target) {
        self.follow(target);
        let now = Instant::now();
        let passed = self.last.replace(now).map(|last| (now - last).as_secs_f64());
        let mut before = std::mem::take(&mut self.keys);
        self.totals = Totals { processes: self.totals.processes, stale: self.totals.stale, ..Totals::default() };
        for slot in self.table.slots() {
            let mut key = before.remove(&slot.digest()).unwrap_or_else(|| Key {
                slot: slot.clone(),
                rate: 0.0,
                history: VecDeque::new(),
            });
            let updates = slot.updates().saturating_sub(key.slot.updates());
            key.rate = passed.filter(|passed| *passed > 0.0).map_or(0.0, |passed| updates as f64 / passed);
            if updates > 0 || !key.history.is_empty() {
                key.history.push_back(updates);
            }
            if key.history.len() > HISTORY {
                key.history.pop_front();
            }
            self.totals.keys += 1;
            self.totals.rate += key.rate;
            self.totals.awaited += usize::from(slot.is_awaited());
            self.totals.pending += u64::from(slot.pending());
            key.slot = slot;
            self.keys.insert(key.slot.digest(), key);
        }
        if self.processes.is_none_or(|last| last.elapsed() >= PROCESSES_PAUSE) {
            let scan = scan(&self.table);
            self.totals.processes = scan.blind.is_none().then(|| scan.count(&[Mapped::Table]));
            self.totals.stale = scan.count(&[Mapped::Deleted, Mapped::Unknown]);
            self.processes = Some(now);
        }
    }

    /// Moves to the table that is at the path now, if that is another one.
    fn follow(&mut self, target: &Target) {
        self.trouble = match target.read() {
            Ok(table) => {
                if table.info().incarnation != self.table.info().incarnation {
                    self.table = table;
                }
                None
            }
            Err(Failure::Table(error)) => Some(explain(&error)),
            Err(_) => None,
        };
    }

    /// The keys with `filter` in their labels, sorted.
    pub(super) fn rows(&self, order: Order, filter: &str) -> Vec<Row<'_>> {
        let rows = self.keys.values().map(|Key { slot, rate, history }| Row {
            slot,
            rate: *rate,
            history,
            label: label(slot),
        });
        let mut rows: Vec<_> = rows.filter(|row| row.label.contains(filter)).collect();
        rows.sort_unstable_by(|one, other| {
            let by_label = || one.label.cmp(&other.label).then(one.slot.digest().cmp(&other.slot.digest()));
            match order {
                Order::Rate => other.rate.total_cmp(&one.rate).then_with(by_label),
                Order::Updates => other.slot.updates().cmp(&one.slot.updates()).then_with(by_label),
                Order::Generation => other.slot.generation().cmp(&one.slot.generation()).then_with(by_label),
                Order::Key => by_label(),
            }
        });
        rows
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Order {
    #[default]
    Rate,
    Updates,
    Generation,
    Key,
}

impl Order {
    pub(super) fn next(self) -> Self {
        match self {
            Self::Rate => Self::Updates,
            Self::Updates => Self::Generation,
            Self::Generation => Self::Key,
            Self::Key => Self::Rate,
        }
    }

    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::Updates => "updates",
            Self::Generation => "generation",
            Self::Key => "key",
        }
    }
}

//! What must be true, in words that all processes share and gensync knows nothing of.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use gensync::{Generation, SlotInfo};

use crate::support::{micros, shared_words};
use crate::worker::OPERATIONS;

/// Keys that the oracle knows the source of. The even ones are changed within an `update` alone.
pub(crate) const KEYS: usize = 32;
/// Those from here on are changed seldom, so that a waiter has time to fall asleep.
pub(crate) const QUIET: usize = 26;
/// Keys that only make the table grow.
pub(crate) const FILLERS: u64 = 3000;

pub(crate) const SURVIVORS: usize = 4;
/// Survivors and others.
pub(crate) const PROCESSES: usize = SURVIVORS + 14;

/// How many of the generations last given are remembered of each key.
const WINDOW: usize = 4096;

pub(crate) fn is_updated_only(key: usize) -> bool {
    key.is_multiple_of(2)
}

/// What a count is of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Count {
    Announcements,
    Checks,
    Kills,
    Forks,
    Rounds,
    Resets,
    Growths,
    Keys,
    Refused,
    Waits,
    Overslept,
    Stale,
    Lost,
    Doubled,
    Backwards,
}

const COUNTS: [(Count, &str); 15] = [
    (Count::Announcements, "changes announced"),
    (Count::Checks, "checks against the oracle"),
    (Count::Kills, "kills"),
    (Count::Forks, "forks"),
    (Count::Rounds, "rounds"),
    (Count::Resets, "resets"),
    (Count::Growths, "growths"),
    (Count::Keys, "keys"),
    (Count::Refused, "operations refused as updates did not end"),
    (Count::Waits, "waits"),
    (Count::Overslept, "overslept waits"),
    (Count::Stale, "stale reads"),
    (Count::Lost, "lost updates"),
    (Count::Doubled, "doubled keys"),
    (Count::Backwards, "generations that went back or came twice"),
];

/// What must be zero.
const CRIMES: [Count; 4] = [Count::Stale, Count::Lost, Count::Doubled, Count::Backwards];

/// How often what was done, and found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tally(&'static [AtomicU64]);

impl Tally {
    pub(crate) fn new() -> Self {
        Self(shared_words(COUNTS.len() + OPERATIONS.len()))
    }

    pub(crate) fn count(self, count: Count) {
        self.add(count, 1);
    }

    pub(crate) fn add(self, count: Count, amount: u64) {
        self.0[count as usize].fetch_add(amount, SeqCst);
    }

    pub(crate) fn count_operation(self, operation: usize) {
        self.0[COUNTS.len() + operation].fetch_add(1, SeqCst);
    }

    fn get(self, count: Count) -> u64 {
        self.0[count as usize].load(SeqCst)
    }

    pub(crate) fn assert_innocent(self) {
        for count in CRIMES {
            assert_eq!(self.get(count), 0, "{count:?}: see standard error");
        }
        for count in [Count::Checks, Count::Kills, Count::Resets, Count::Growths, Count::Waits] {
            assert!(self.get(count) > 0, "{count:?}: the storm was none");
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let operations = &self.0[COUNTS.len()..];
        write!(f, "{} operations (", operations.iter().map(|count| count.load(SeqCst)).sum::<u64>())?;
        for (index, (count, (name, ..))) in operations.iter().zip(&OPERATIONS).enumerate() {
            write!(f, "{}{} {name}", if index > 0 { ", " } else { "" }, count.load(SeqCst))?;
        }
        write!(f, ")")?;
        COUNTS.iter().try_for_each(|(count, name)| write!(f, ", {} {name}", self.get(*count)))
    }
}

/// A process of the storm, as the supervisor sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    /// 0: no process.
    pub(crate) process: &'static AtomicU64,
    /// When it last began an operation.
    pub(crate) beat: &'static AtomicU64,
    pub(crate) operation: &'static AtomicU64,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Oracle {
    pub(crate) tally: Tally,
    source: &'static [AtomicU64],
    announced: &'static [AtomicU64],
    /// When the last announcement returned.
    moments: &'static [AtomicU64],
    /// When a quiet key is to be changed next.
    due: &'static [AtomicU64],
    given: &'static [AtomicU64],
    /// What each survivor holds of each key.
    pub(crate) served: &'static [AtomicU64],
    /// How often each survivor has looked at all that it holds since the calm began.
    pub(crate) passes: &'static [AtomicU64],
    /// Three words for each process.
    entries: &'static [AtomicU64],
    /// Odd while it is calm.
    pub(crate) round: &'static AtomicU64,
    pub(crate) filler: &'static AtomicU64,
    lots: &'static AtomicU64,
    /// The supervisor's.
    pub(crate) beat: &'static AtomicU64,
}

impl Oracle {
    pub(crate) fn new(tally: Tally) -> Self {
        let word = || &shared_words(1)[0];
        Self {
            tally,
            source: shared_words(KEYS),
            announced: shared_words(KEYS),
            moments: shared_words(KEYS),
            due: shared_words(KEYS),
            given: shared_words(KEYS * WINDOW),
            served: shared_words(SURVIVORS * KEYS),
            passes: shared_words(SURVIVORS),
            entries: shared_words(3 * PROCESSES),
            round: word(),
            filler: word(),
            lots: word(),
            beat: word(),
        }
    }

    /// Where a random sequence begins, another one each time.
    pub(crate) fn lot(&self, seed: u64) -> u64 {
        let mixed = (seed ^ self.lots.fetch_add(1, SeqCst)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed ^ mixed >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
    }

    /// Changes the source of `key`, and returns what it is then.
    pub(crate) fn change(&self, key: usize) -> u64 {
        self.source[key].fetch_add(1, SeqCst) + 1
    }

    /// Loads the state of `key`.
    pub(crate) fn load(&self, key: usize) -> u64 {
        self.source[key].load(SeqCst)
    }

    /// To be called when the announcement that the source is `value` has returned.
    pub(crate) fn announce(&self, key: usize, value: u64) {
        // In this order, so that a process that finds the value finds a moment that is no earlier.
        self.moments[key].fetch_max(micros(), SeqCst);
        self.announced[key].fetch_max(value, SeqCst);
        self.tally.count(Count::Announcements);
    }

    /// What any state of `key` must be at least that is called fresh from now on.
    pub(crate) fn floor(&self, key: usize) -> u64 {
        self.announced[key].load(SeqCst)
    }

    pub(crate) fn last_moment(&self, key: usize) -> u64 {
        self.moments[key].load(SeqCst)
    }

    /// `state` was called fresh by a check that began after `floor` was read.
    pub(crate) fn judge(&self, key: usize, state: u64, floor: u64, what: &str) {
        self.tally.count(Count::Checks);
        if state < floor {
            let source = self.load(key);
            self.accuse(
                Count::Stale,
                format_args!("{what} of key {key}: {state} is fresh, {floor} announced, {source} there"),
            );
        }
    }

    /// An update of `key` was given this generation; no other one may be.
    pub(crate) fn give(&self, key: usize, generation: Generation) {
        let generation = generation.get();
        let cell = &self.given[key * WINDOW + generation as usize % WINDOW];
        if cell.swap(generation, SeqCst) == generation {
            self.accuse(Count::Backwards, format_args!("generation {generation} of key {key} was given twice"));
        }
    }

    /// No key may be there twice.
    pub(crate) fn judge_slots(&self, slots: impl Iterator<Item = SlotInfo>) -> Vec<SlotInfo> {
        let slots: Vec<_> = slots.collect();
        let mut digests: Vec<_> = slots.iter().map(SlotInfo::digest).collect();
        let mut labels: Vec<_> =
            slots.iter().map(|slot| slot.label_bytes()).filter(|label| !label.is_empty()).collect();
        let (all_digests, all_labels) = (digests.len(), labels.len());
        digests.sort_unstable();
        digests.dedup();
        labels.sort_unstable();
        labels.dedup();
        if (digests.len(), labels.len()) != (all_digests, all_labels) {
            self.accuse(Count::Doubled, format_args!("of {all_digests} keys, {} are different", digests.len()));
        }
        slots
    }

    pub(crate) fn accuse(&self, count: Count, what: fmt::Arguments<'_>) {
        self.tally.count(count);
        self.say(format_args!("{count:?}: {what}"));
    }

    pub(crate) fn say(&self, what: fmt::Arguments<'_>) {
        use std::io::Write as _;
        // Past the harness, and as one line.
        let _ = std::io::stderr().write_all(format!("storm, process {}: {what}\n", std::process::id()).as_bytes());
    }

    /// Whether the caller must change the quiet `key` now; after that, no process must for some time.
    pub(crate) fn is_due(&self, key: usize, pause: u64) -> bool {
        let (now, due) = (micros(), self.due[key].load(SeqCst));
        now >= due && self.due[key].compare_exchange(due, now + pause, SeqCst, SeqCst).is_ok()
    }

    pub(crate) fn is_calm(&self) -> bool {
        self.round.load(SeqCst) % 2 == 1
    }

    pub(crate) fn entry(&self, index: usize) -> Entry {
        let words = &self.entries[3 * index..];
        Entry { process: &words[0], beat: &words[1], operation: &words[2] }
    }
}

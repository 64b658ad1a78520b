//! What a worker does, each time another thing.

use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use gensync::{Cached, GenerationSynchronizer, UpdateError, WaitSet, update_all};
use nix::sys::signal::{Signal, raise};

use super::{Holder, Worker, live, name};
use crate::options;
use crate::oracle::{Count, FILLERS, KEYS, QUIET, is_updated_only};
use crate::support::{in_child, is_overslept, micros};

/// How many holders and values a process has at most.
const HOLDERS: usize = 64;
const VALUES: usize = 16;

/// The operation's name, its weight among all, and the function that does it.
type Operation = (&'static str, u64, fn(&mut Worker));

/// What a worker may do.
pub(crate) const OPERATIONS: [Operation; 23] = [
    ("checks", 400, Worker::check_any),
    ("gets", 200, Worker::get),
    ("marks", 100, Worker::mark),
    ("marks in a row", 20, Worker::mark_again_and_again),
    ("clears", 20, Worker::clear),
    ("updates", 40, Worker::update),
    ("updates of two keys", 10, Worker::update_two),
    ("long updates", 10, Worker::hold),
    ("values updated", 5, Worker::update_value),
    ("changes of quiet keys", 40, Worker::change_quietly),
    ("waits for one", 10, Worker::wait),
    ("waits for several", 10, Worker::wait_for_several),
    ("attachments", 30, Worker::attach_again),
    ("clones", 10, Worker::clone_holder),
    ("new keys", 20, Worker::grow),
    ("looks at the table", 5, Worker::look),
    ("watches", 3, Worker::watch),
    ("openings", 5, Worker::reopen),
    ("read-only openings", 5, Worker::read_only),
    ("children forked", 3, Worker::fork),
    ("threads", 3, Worker::threads),
    ("resets", 1, Worker::reset),
    // Of survivors, when it is calm.
    ("last looks", 0, Worker::settle),
];

impl Worker {
    // Holders.

    pub(super) fn attach(&mut self, key: usize) {
        let holder = Holder::new(&self.table, key, self.oracle()).unwrap();
        self.come_upon(key, holder.loaded.0.generation());
        self.keep(holder);
    }

    /// If there are too many, in the place of another one of its key, or of any key.
    fn keep(&mut self, holder: Holder) {
        if self.holders.len() < HOLDERS {
            return self.holders.push(holder);
        }
        let place =
            self.holders.iter().rposition(|other| other.key == holder.key).unwrap_or_else(|| self.random(HOLDERS));
        // A survivor is asked for all keys, and so has one of each at the head.
        if self.survivor.is_none() || self.holders[place].key == holder.key {
            self.holders[place] = holder;
        }
    }

    fn any_holder(&mut self) -> usize {
        if self.holders.is_empty() {
            let key = self.random(KEYS);
            self.attach(key);
        }
        self.random(self.holders.len())
    }

    fn any_writable_holder(&mut self) -> usize {
        for _ in 0..8 {
            let index = self.any_holder();
            if !self.holders[index].is_read_only && self.holders[index].key < QUIET {
                return index;
            }
        }
        let key = self.random(QUIET);
        let holder = Holder::new(&self.table, key, self.oracle()).unwrap();
        let place = self.holders.iter().position(|other| other.key == key);
        match place {
            Some(place) => self.holders[place] = holder,
            None => self.keep(holder),
        }
        self.holders.iter().position(|other| other.key == key && !other.is_read_only).unwrap_or_else(|| {
            // No holder of that key can be replaced: take the first one of any key that can.
            self.holders.iter().position(|other| !other.is_read_only && other.key < QUIET).unwrap()
        })
    }

    fn check_any(&mut self) {
        let index = self.any_holder();
        self.check(index);
    }

    /// Asks whether a state is fresh, and loads it if it is not, in one of the ways that are promised to be right.
    fn check(&mut self, index: usize) {
        let (oracle, way) = (self.oracle(), self.random(8));
        let holder = &mut self.holders[index];
        let key = holder.key;
        let floor = oracle.floor(key);
        if way == 0 {
            if !holder.sync.is_expired_since(holder.loaded.0) {
                oracle.judge(key, holder.loaded.1, floor, "a ticket");
            }
            return;
        }
        if !holder.sync.is_expired() {
            return oracle.judge(key, holder.state, floor, "a check");
        }
        let generation = match way {
            1 => holder.sync.refresh().ok().inspect(|_| holder.state = oracle.load(key)),
            2 | 3 => {
                holder.state = holder.sync.refresh_with(|| Ok::<_, Infallible>(oracle.load(key))).unwrap();
                None
            }
            // A load that fails leaves everything as it was.
            4 => {
                let _ = holder.sync.refresh_with(|| Err::<(), ()>(()));
                None
            }
            _ => {
                let ticket = holder.sync.ticket();
                let state = oracle.load(key);
                (holder.state, holder.loaded) = (state, (ticket, state));
                holder.sync.adopt(ticket);
                ticket.generation()
            }
        };
        self.come_upon(key, generation);
    }

    fn get(&mut self) {
        if self.values.is_empty() || self.one_in(100) {
            let (key, oracle) = (self.random(KEYS), self.oracle());
            let sync = GenerationSynchronizer::new(&self.table, name(key)).unwrap();
            let value = (key, Arc::new(Cached::new(sync, move || Ok::<_, Infallible>(oracle.load(key)))));
            match self.values.len() < VALUES {
                true => self.values.push(value),
                false => {
                    let place = self.random(VALUES);
                    self.values[place] = value;
                }
            }
        }
        let (index, way) = (self.random(self.values.len()), self.random(4));
        let (oracle, (key, value)) = (self.oracle(), &self.values[index]);
        let floor = oracle.floor(*key);
        let state = match way {
            0 => value.get_if_fresh(),
            1 => Some(value.snapshot().unwrap().value),
            _ => Some(value.get().unwrap()),
        };
        if let Some(state) = state {
            oracle.judge(*key, *state, floor, "a value");
        }
    }

    // Updates.

    fn mark(&mut self) {
        let index = self.any_writable_holder();
        match is_updated_only(self.holders[index].key) {
            true => self.update_by(index),
            false => self.mark_by(index),
        }
    }

    fn mark_by(&mut self, index: usize) {
        let (oracle, key) = (self.oracle(), self.holders[index].key);
        let value = oracle.change(key);
        self.risk_death();
        let holder = &mut self.holders[index];
        // State that is fresh after this was fresh before, and is what was just written.
        holder.state = value;
        let generation = holder.sync.mark_updated().unwrap();
        oracle.announce(key, value);
        self.come_to(key, generation);
    }

    /// Each update is looked at by another process before the next one could make up for it.
    fn mark_again_and_again(&mut self) {
        let index = self.any_writable_holder();
        let (oracle, key) = (self.oracle(), self.holders[index].key);
        if is_updated_only(key) {
            return self.update_by(index);
        }
        let witness = self.holders[index].sync.clone();
        let mut state = witness.refresh_with(|| Ok::<_, Infallible>(oracle.load(key))).unwrap();
        for _ in 0..self.random(200) {
            self.mark_by(index);
            let floor = oracle.floor(key);
            match witness.is_expired() {
                true => state = witness.refresh_with(|| Ok::<_, Infallible>(oracle.load(key))).unwrap(),
                false => oracle.judge(key, state, floor, "a check after each update"),
            }
        }
    }

    /// Announces by the update that its maker does not adopt; changes the source or does not.
    fn clear(&mut self) {
        let index = self.any_writable_holder();
        let (oracle, holder) = (self.oracle(), &self.holders[index]);
        let changed = (!is_updated_only(holder.key)).then(|| oracle.change(holder.key));
        holder.sync.clear().unwrap();
        if let Some(value) = changed {
            oracle.announce(holder.key, value);
        }
    }

    fn update(&mut self) {
        let index = self.any_writable_holder();
        self.update_by(index);
    }

    fn update_by(&mut self, index: usize) {
        self.update_by_all(&[index]);
    }

    fn update_two(&mut self) {
        let (one, other) = (self.any_writable_holder(), self.any_writable_holder());
        match one == other {
            true => self.update_by(one),
            false => self.update_by_all(&[one, other]),
        }
    }

    /// An update that succeeds, or fails, or panics; it is announced anyway.
    fn update_by_all(&mut self, indices: &[usize]) {
        let (oracle, end) = (self.oracle(), self.random(10));
        let (before, after) =
            (self.survivor.is_none() && self.one_in(300), self.survivor.is_none() && self.one_in(300));
        let syncs: Vec<_> = indices.iter().map(|index| &self.holders[*index].sync).collect();
        let mut values = Vec::new();
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            update_all(&syncs, || {
                if before {
                    raise(Signal::SIGKILL).unwrap();
                }
                values.extend(indices.iter().map(|index| oracle.change(self.holders[*index].key)));
                if after {
                    raise(Signal::SIGKILL).unwrap();
                }
                match end {
                    0 => resume_unwind(Box::new("of the commit's own")),
                    1 => Err(()),
                    _ => Ok(()),
                }
            })
        }));
        match outcome {
            Ok(Err(UpdateError::Begin(error))) => return self.excuse(&error),
            Ok(Err(UpdateError::Announce { error, .. })) => panic!("{error}"),
            Ok(Ok(()) | Err(_)) | Err(_) => {}
        }
        for (index, value) in indices.iter().zip(values) {
            let holder = &mut self.holders[*index];
            holder.state = value;
            oracle.announce(holder.key, value);
        }
    }

    /// An update in the midst of which other things happen; it may be given up before the source is changed.
    fn hold(&mut self) {
        if self.is_nested {
            return self.update();
        }
        let index = self.any_writable_holder();
        let (oracle, key) = (self.oracle(), self.holders[index].key);
        // Of its own, as the holders are needed meanwhile.
        let sync = self.holders[index].sync.clone();
        let Some(update) = self.unless_locked(sync.begin_update()) else { return };
        self.digress(6);
        self.risk_death();
        if self.one_in(4) {
            return update.abandon();
        }
        let value = oracle.change(key);
        self.risk_death();
        self.digress(6);
        match self.one_in(4) {
            true => drop(update),
            false => {
                let generation = update.finish().unwrap();
                self.come_to(key, generation);
            }
        }
        oracle.announce(key, value);
    }

    fn update_value(&mut self) {
        if self.values.is_empty() {
            return self.get();
        }
        let index = self.random(self.values.len());
        let (oracle, (key, value)) = (self.oracle(), &self.values[index]);
        match value.update(|| Ok::<_, Infallible>(oracle.change(*key))) {
            Ok(state) => oracle.announce(*key, state),
            Err(UpdateError::Begin(error)) => self.excuse(&error),
            Err(error) => panic!("{error}"),
        }
    }

    fn change_quietly(&mut self) {
        let key = QUIET + self.random(KEYS - QUIET);
        let pause = 50_000 + self.random(1_000_000) as u64;
        if !self.oracle().is_due(key, pause) {
            return;
        }
        // A survivor has one of each key at the head, which may be its only one.
        let place = self.holders.iter().position(|holder| holder.key == key && !holder.is_read_only);
        let index = place.unwrap_or_else(|| {
            let holder = Holder::new(&self.table, key, self.oracle()).unwrap();
            match self.holders.len() < HOLDERS {
                true => self.holders.push(holder),
                false => self.holders[HOLDERS - 1] = holder,
            }
            self.holders.len() - 1
        });
        match is_updated_only(key) {
            true => self.update_by(index),
            false => self.mark_by(index),
        }
    }

    // Waits.

    /// Waits for long only for what is changed seldom, and not while others wait for this to end.
    fn patience(&mut self, key: usize) -> Duration {
        match key >= QUIET && !self.is_nested && self.one_in(30) {
            true => Duration::from_millis(600),
            false => Duration::from_micros(self.random(3000) as u64),
        }
    }

    fn wait(&mut self) {
        let index = self.any_holder();
        let (oracle, key) = (self.oracle(), self.holders[index].key);
        let patience = self.patience(key);
        let (floor, start) = (oracle.floor(key), micros());
        let waited = self.holders[index].sync.wait_timeout(patience);
        self.judge_wait(index, floor, start, waited.is_changed());
    }

    fn wait_for_several(&mut self) {
        let mut indices: Vec<_> = (0..3).map(|_| self.any_holder()).collect();
        if self.one_in(4) {
            indices = (0..self.holders.len()).filter(|index| self.holders[*index].key >= QUIET).collect();
        }
        indices.truncate(32);
        let keys: Vec<_> = indices.iter().map(|index| self.holders[*index].key).collect();
        let Some(least) = keys.iter().copied().min() else { return };
        let (oracle, patience) = (self.oracle(), self.patience(least));
        let (floors, start): (Vec<_>, _) = (keys.iter().map(|key| oracle.floor(*key)).collect(), micros());
        let set: WaitSet<'_> = indices.iter().map(|index| &self.holders[*index].sync).collect();
        let changed = set.wait_timeout(patience);
        for (position, (index, floor)) in indices.into_iter().zip(floors).enumerate() {
            self.judge_wait(index, floor, start, changed.contains(&position));
        }
    }

    fn judge_wait(&mut self, index: usize, floor: u64, start: u64, is_changed: bool) {
        let (oracle, holder) = (self.oracle(), &self.holders[index]);
        oracle.tally.count(Count::Waits);
        if !is_changed {
            oracle.judge(holder.key, holder.state, floor, "a wait");
        } else if oracle.floor(holder.key) > holder.state && is_overslept(start, oracle.last_moment(holder.key)) {
            oracle.tally.count(Count::Overslept);
        }
    }

    // Keys and tables.

    fn attach_again(&mut self) {
        let key = self.random(KEYS);
        match self.survivor.is_none() && !self.holders.is_empty() && self.one_in(2) {
            // Dropped: nothing of it is left.
            true => {
                let index = self.random(self.holders.len());
                self.holders.swap_remove(index);
            }
            false => self.attach(key),
        }
    }

    fn clone_holder(&mut self) {
        let index = self.any_holder();
        let Holder { key, sync, state, loaded, is_read_only } = &self.holders[index];
        let clone =
            Holder { key: *key, sync: sync.clone(), state: *state, loaded: *loaded, is_read_only: *is_read_only };
        self.keep(clone);
    }

    fn grow(&mut self) {
        for _ in 0..self.random(20) {
            let key = self.oracle().filler.fetch_add(1, SeqCst) % FILLERS;
            let sync = GenerationSynchronizer::new(&self.table, format!("filler{key}")).unwrap();
            if self.one_in(4) {
                sync.mark_updated().unwrap();
            }
        }
    }

    fn look(&mut self) {
        let key = self.random(KEYS);
        let generation = self.table.generation(name(key)).unwrap();
        self.come_upon(key, generation);
        if self.one_in(4) {
            self.oracle().judge_slots(self.table.slots());
            let stats = self.table.stats();
            assert!(stats.keys <= stats.capacity, "{stats:?}");
        }
    }

    fn watch(&mut self) {
        let mut watch = self.table.watch();
        let mut reported = [0; KEYS];
        for _ in 0..self.random(20) {
            let Some(change) = watch.next_timeout(Duration::from_millis(1)) else { return };
            let Some(key) = change.label().strip_prefix("key").and_then(|key| key.parse::<usize>().ok()) else {
                continue;
            };
            let generation = change.generation().get();
            if generation <= reported[key] {
                let reported = reported[key];
                let what = format_args!("a watch reported {generation} of key {key} after {reported}");
                self.oracle().accuse(Count::Backwards, what);
            }
            reported[key] = generation;
        }
    }

    fn reopen(&mut self) {
        self.table = self.storm.open();
    }

    /// A holder that may not write only checks.
    fn read_only(&mut self) {
        let Some(path) = self.storm.place.path() else { return };
        // While the table is replaced, none can be opened, and the new one does not have every key yet.
        let Ok(table) = options().read_only(true).open(path) else { return };
        let key = self.random(KEYS);
        let Ok(holder) = Holder::new(&table, key, self.oracle()) else { return };
        self.come_upon(key, holder.loaded.0.generation());
        self.keep(Holder { is_read_only: true, ..holder });
    }

    fn reset(&mut self) {
        if !self.is_nested && self.unless_locked(self.table.reset()).is_some() {
            self.oracle().tally.count(Count::Resets);
        }
    }

    // Processes and threads.

    /// A child goes on with all that this one has, in the middle of an update perhaps, and lives on when this one is killed.
    fn fork(&mut self) {
        if self.survivor.is_none() {
            let storm = self.storm;
            // The supervisor sees to its end.
            std::mem::forget(in_child(|| live(storm, Some(self))));
        }
    }

    /// Threads share the table and the values, while this one goes on.
    fn threads(&mut self) {
        if self.is_nested {
            return;
        }
        std::thread::scope(|scope| {
            for _ in 0..2 {
                let values = self.values.iter().map(|(key, value)| (*key, Arc::clone(value))).collect();
                let thread = Self::new(self.storm, self.entry, self.survivor, self.table.clone());
                let mut thread = Self { values, is_nested: true, ..thread };
                scope.spawn(move || (0..30).for_each(|_| thread.act()));
            }
            self.digress(30);
        });
    }

    /// Checks all that it holds, and reports what it would serve.
    pub(super) fn settle(&mut self) {
        let (oracle, number) = (self.oracle(), self.survivor.unwrap());
        let mut served = [u64::MAX; KEYS];
        for index in 0..self.holders.len() {
            self.check(index);
            let Holder { key, sync, state, .. } = &self.holders[index];
            let state = if sync.is_expired() { 0 } else { *state };
            served[*key] = served[*key].min(state);
        }
        for (key, value) in &self.values {
            served[*key] = served[*key].min(*value.get().unwrap());
        }
        for (key, state) in served.into_iter().enumerate() {
            oracle.served[number * KEYS + key].store(state, SeqCst);
        }
        oracle.passes[number].fetch_add(1, SeqCst);
        std::thread::sleep(Duration::from_millis(1));
    }
}

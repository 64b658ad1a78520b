//! The process that forks the others of the storm, kills them, and checks in the end whether anything was lost.

use std::collections::HashSet;
use std::io::{PipeReader, PipeWriter};
use std::os::fd::AsFd as _;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use gensync::{SlotInfo, Table};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, alarm};

use crate::Storm;
use crate::oracle::{Count, KEYS, Oracle, PROCESSES, SURVIVORS, is_updated_only};
use crate::support::{LIMIT, in_child, micros, next_random};
use crate::worker::{self, OPERATIONS};

/// How many there are besides the survivors, without their own children.
const MORTALS: usize = 10;

struct Supervisor {
    storm: &'static Storm,
    table: Table,
    random: u64,
    /// Those that it forked itself.
    mortals: HashSet<Pid>,
    /// How many segments the table had at the last look.
    segments: u32,
    keys: u64,
}

/// Has the storm rage until `end`. In a process of its own, which has one thread and forks all others.
pub(crate) fn supervise(storm: &'static Storm, end: Instant) {
    // Processes become children of this one when their parents are killed.
    set_child_subreaper(true).unwrap();
    let (table, random) = (storm.open(), storm.oracle.lot(storm.seed));
    let mut supervisor = Supervisor { storm, table, random, mortals: HashSet::new(), segments: 1, keys: 0 };
    supervisor.beat();
    for number in 0..SURVIVORS {
        std::mem::forget(in_child(|| worker::survive(storm, number)));
    }
    while Instant::now() < end {
        supervisor.rage();
        supervisor.calm();
    }
    storm.oracle.tally.add(Count::Keys, supervisor.keys);
    (0..SURVIVORS).for_each(|number| supervisor.kill(number));
    while supervisor.reap() {
        std::thread::yield_now();
    }
}

impl Supervisor {
    fn oracle(&self) -> &'static Oracle {
        &self.storm.oracle
    }

    /// Shows the others that it is alive; if it does not for too long, they end.
    fn beat(&self) {
        self.oracle().beat.store(micros(), SeqCst);
        alarm::set(2 * LIMIT.as_secs() as u32);
    }

    fn random(&mut self, limit: u64) -> u64 {
        (next_random(&mut self.random) >> 16) % limit
    }

    /// One round, and the death of all that are mortal at its end.
    fn rage(&mut self) {
        let (ends, end) = std::io::pipe().unwrap();
        let start = Instant::now();
        let length = Duration::from_millis(300 + self.random(700));
        while start.elapsed() < length {
            self.beat();
            self.reap();
            while self.mortals.len() < MORTALS {
                let storm = self.storm;
                // All mortal processes have the writing end of the pipe.
                let child = in_child(|| worker::live(storm, None));
                self.mortals.insert(child.pid());
                std::mem::forget(child);
            }
            // Between two kills, and for the others to have the processor.
            std::thread::sleep(Duration::from_micros(self.random(8000)));
            let victim = SURVIVORS + self.random((PROCESSES - SURVIVORS) as u64) as usize;
            self.kill(victim);
            self.watch_beats();
            match self.random(100) {
                0 => self.reset(),
                1..20 => self.look(),
                _ => {}
            }
        }
        self.kill_all(ends, end);
    }

    fn process(&self, index: usize) -> Option<Pid> {
        let process = self.oracle().entry(index).process.load(SeqCst);
        (process > 0).then(|| Pid::from_raw(process as i32))
    }

    /// A process that has ended keeps its number until this one has reaped it, which it does before it strikes it off.
    fn kill(&self, index: usize) {
        if let Some(process) = self.process(index) {
            kill(process, Signal::SIGKILL).unwrap();
        }
    }

    fn kill_all(&mut self, ends: PipeReader, end: PipeWriter) {
        drop(end);
        (SURVIVORS..PROCESSES).for_each(|index| self.kill(index));
        // A process that was not on the list yet ends by itself.
        self.oracle().round.fetch_add(1, SeqCst);
        let start = Instant::now();
        // The pipe is at its end when no process is left that could write.
        while poll(&mut [PollFd::new(ends.as_fd(), PollFlags::POLLIN)], PollTimeout::from(5_u8)).unwrap() == 0 {
            self.beat();
            assert!(start.elapsed() < LIMIT, "a process cannot be killed");
            (SURVIVORS..PROCESSES).for_each(|index| self.kill(index));
            self.reap();
        }
        while (SURVIVORS..PROCESSES).any(|index| self.process(index).is_some()) {
            assert!(start.elapsed() < LIMIT, "a process has ended that is no child of any waiting process");
            self.reap();
        }
    }

    /// Strikes off the processes that have ended; `false` if there are no children at all.
    fn reap(&mut self) -> bool {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => return true,
                Err(Errno::ECHILD) => return false,
                Ok(status @ (WaitStatus::Exited(process, _) | WaitStatus::Signaled(process, ..))) => {
                    let is_killed = matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _));
                    assert!(is_killed || matches!(status, WaitStatus::Exited(_, 0)), "a process failed: {status:?}");
                    self.oracle().tally.add(Count::Kills, is_killed.into());
                    self.mortals.remove(&process);
                    for entry in (0..PROCESSES).map(|index| self.oracle().entry(index)) {
                        let _ = entry.process.compare_exchange(process.as_raw() as u64, 0, SeqCst, SeqCst);
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// No process hangs.
    fn watch_beats(&self) {
        for index in 0..PROCESSES {
            let (entry, process) = (self.oracle().entry(index), self.process(index));
            let Some(process) = process else { continue };
            let silence = micros().saturating_sub(entry.beat.load(SeqCst));
            if silence > LIMIT.as_micros() as u64 && !has_ended(process) {
                let operation = OPERATIONS[entry.operation.load(SeqCst) as usize].0;
                let system_call = std::fs::read_to_string(format!("/proc/{process}/syscall"));
                panic!("process {process} hangs for {silence} us in {operation}: {system_call:?}");
            }
        }
    }

    fn reset(&mut self) {
        // It fails if an update does not end.
        if self.table.reset().is_ok() {
            self.oracle().tally.count(Count::Resets);
        }
    }

    fn look(&mut self) {
        let stats = self.table.stats();
        let grown = stats.segments.checked_sub(self.segments).unwrap_or(stats.segments - 1);
        self.oracle().tally.add(Count::Growths, grown.into());
        self.segments = stats.segments;
        self.keys = self.keys.max(stats.keys);
        self.oracle().judge_slots(self.table.slots());
    }

    /// No process changes anything now: the survivors must come to hold what the source holds.
    fn calm(&mut self) {
        let oracle = self.oracle();
        let start = Instant::now();
        oracle.passes.iter().for_each(|passes| passes.store(0, SeqCst));
        // What a survivor was doing ends before its first pass.
        while oracle.passes.iter().any(|passes| passes.load(SeqCst) < 2)
            || self.unsettled().next().is_some()
            || self.pending().is_some()
        {
            self.beat();
            self.watch_beats();
            assert!(self.reap(), "the survivors have ended");
            if start.elapsed() > LIMIT {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        for (survivor, key) in self.unsettled() {
            let (served, source) = (oracle.served[survivor * KEYS + key].load(SeqCst), oracle.load(key));
            let what = format_args!("of key {key}: survivor {survivor} serves {served}, the source is {source}");
            oracle.accuse(Count::Lost, what);
        }
        if let Some(slot) = self.pending() {
            oracle.accuse(Count::Lost, format_args!("pending for good: {slot:?}"));
        }
        self.look_at_all_keys();
        oracle.tally.count(Count::Rounds);
        oracle.round.fetch_add(1, SeqCst);
    }

    /// The survivors, and the keys of which they serve what they must not.
    fn unsettled(&self) -> impl Iterator<Item = (usize, usize)> {
        let oracle = self.oracle();
        (0..SURVIVORS).flat_map(|survivor| (0..KEYS).map(move |key| (survivor, key))).filter(move |(survivor, key)| {
            let served = oracle.served[survivor * KEYS + key].load(SeqCst);
            let least = if is_updated_only(*key) { oracle.load(*key) } else { oracle.floor(*key) };
            !(least..=oracle.load(*key)).contains(&served)
        })
    }

    fn pending(&self) -> Option<SlotInfo> {
        // Looked at where it is now, which this process may not have seen yet.
        self.table.generation(worker::name(0)).unwrap();
        self.table.slots().find(|slot| slot.pending() > 0)
    }

    /// Each key is there once.
    fn look_at_all_keys(&mut self) {
        self.look();
        let oracle = self.oracle();
        let slots = oracle.judge_slots(self.table.slots());
        for key in 0..KEYS {
            let generation = self.table.generation(worker::name(key)).unwrap();
            let found: Vec<_> = slots.iter().filter(|slot| slot.label() == worker::name(key)).collect();
            if found.len() != 1 || Some(found[0].generation()) != generation {
                oracle.accuse(Count::Doubled, format_args!("key {key}, of generation {generation:?}: {found:?}"));
            }
        }
    }
}

/// Whether the process has ended and waits for its parent to reap it.
fn has_ended(process: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with('Z'))
}

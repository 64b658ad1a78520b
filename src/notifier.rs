//! The one thread of a process that waits for all descriptors and tasks of a table.
//!
//! It sleeps on the table's wake word, as a [`WaitSet`](crate::WaitSet) does, and looks at the keys of all who have registered
//! when it wakes. It begins with the first of them and ends with the last.
//!
//! Who registers need not wake it: he sets the waiting bit of his key himself, after he is on the list. If the thread is
//! asleep by then, its wake word is armed, and whoever updates the key wakes it; if it is not, it comes by the list before it
//! sleeps.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use nix::sys::eventfd::EventFd;
use nix::sys::signal::{SigSet, SigmaskHow};

use crate::error::Error;
use crate::handle::Table;
use crate::process::OfProcess;
use crate::synchronizer::GenerationSynchronizer;
#[cfg(feature = "async")]
use crate::synchronizer::Ticket;
use crate::wait::SLICE;

pub(crate) struct Notifier {
    process: u32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    is_running: bool,
    last: u64,
    entries: BTreeMap<u64, Entry>,
}

/// Somebody who is told when a key was updated.
struct Entry {
    /// Of his own: what it has seen is what he was told of.
    sync: GenerationSynchronizer,
    target: Target,
}

pub(crate) enum Target {
    Descriptor(Arc<EventFd>),
    /// None while it need not be told.
    #[cfg_attr(not(feature = "async"), expect(dead_code, reason = "descriptors are for all"))]
    Task(Option<Waker>),
}

impl Entry {
    /// Whether there is something to tell. If not, whoever makes it so wakes the thread, or it is one that only looks.
    fn is_due(&self) -> bool {
        !matches!(self.target, Target::Task(None)) && self.sync.await_news(self.sync.seen_ticket())
    }

    /// What is to be told. From here on, it has been.
    fn take_target(&mut self) -> Target {
        match &mut self.target {
            Target::Descriptor(descriptor) => {
                // Without a table, it stays expired, and is told again with the next attempt to attach.
                let _ = self.sync.refresh();
                Target::Descriptor(Arc::clone(descriptor))
            }
            Target::Task(waker) => Target::Task(waker.take()),
        }
    }
}

impl Target {
    fn tell(self) {
        match self {
            // It fails if nobody has read it for 2^64 - 2 times, and then it is readable.
            Self::Descriptor(descriptor) => _ = descriptor.write(1),
            // A runtime's panic must not end the thread, which others rely on.
            Self::Task(waker) => _ = catch_unwind(AssertUnwindSafe(|| waker.into_iter().for_each(Waker::wake))),
        }
    }
}

impl OfProcess for Notifier {
    fn new() -> Self {
        Self { process: std::process::id(), state: Mutex::default() }
    }

    fn is_inherited(&self) -> bool {
        self.process != std::process::id()
    }
}

impl Notifier {
    /// No code of the user's runs under the lock, so wakers are neither called nor dropped there.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(self: &Arc<Self>, table: &Table) -> Result<(), Error> {
        let (this, table) = (Arc::clone(self), table.clone());
        // Signals are for the program's own threads.
        let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK);
        let thread = std::thread::Builder::new().name("gensync".to_owned()).spawn(move || this.run(&table));
        if let Ok(mask) = mask {
            let _ = mask.thread_set_mask();
        }
        thread.map(drop).map_err(|error| Error::io("starting the thread that waits for updates", &error))
    }

    fn run(&self, table: &Table) {
        loop {
            let armed = table.arm();
            let due: Vec<Target> = {
                let mut state = self.lock();
                if state.entries.is_empty() {
                    state.is_running = false;
                    return;
                }
                state.entries.values_mut().filter(|entry| entry.is_due()).map(Entry::take_target).collect()
            };
            match due.is_empty() {
                true => table.sleep(armed, SLICE),
                false => due.into_iter().for_each(Target::tell),
            }
        }
    }
}

/// A place on the list, until it is dropped.
pub(crate) struct Registration {
    notifier: Arc<Notifier>,
    table: Table,
    id: u64,
}

impl Registration {
    /// Puts `target` on the list, to be told when the key is not what `sync` has seen.
    pub(crate) fn new(sync: GenerationSynchronizer, target: Target) -> Result<Self, Error> {
        let table = sync.table().clone();
        let notifier = table.notifier();
        let mut state = notifier.lock();
        state.last += 1;
        let id = state.last;
        let entry = state.entries.entry(id).or_insert(Entry { sync, target });
        let due = entry.is_due().then(|| entry.take_target());
        let started = if state.is_running { Ok(()) } else { notifier.start(&table) };
        state.is_running |= started.is_ok();
        drop(state);
        let this = Self { notifier, table, id };
        started.map_err(|error| this.table.explain(error))?;
        due.into_iter().for_each(Target::tell);
        Ok(this)
    }

    pub(crate) fn is_inherited(&self) -> bool {
        self.notifier.is_inherited()
    }

    /// Has `waker` called when the key is not what `ticket` saw.
    #[cfg(feature = "async")]
    pub(crate) fn set_waker(&self, waker: Waker, ticket: Ticket) {
        let mut target = Target::Task(Some(waker));
        let mut state = self.notifier.lock();
        if let Some(entry) = state.entries.get_mut(&self.id) {
            entry.sync.adopt(ticket);
            std::mem::swap(&mut entry.target, &mut target);
            // Sets the waiting bit; if there is news, the caller looks for himself.
            let _ = entry.is_due();
        }
        drop(state);
        drop(target);
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if self.is_inherited() {
            // In a forked child, the list may be in any state, and must not be dropped.
            std::mem::forget(Arc::clone(&self.notifier));
            return;
        }
        let mut state = self.notifier.lock();
        let entry = state.entries.remove(&self.id);
        let is_last = state.entries.is_empty();
        drop(state);
        drop(entry);
        if is_last {
            self.table.wake_sleepers();
        }
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration").field("id", &self.id).finish_non_exhaustive()
    }
}

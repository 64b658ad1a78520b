//! What a peer has to do, and what it says of itself.

use std::hint::black_box;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::*};

use nix::unistd::Pid;
use serde::Serialize;

use crate::Outcome;

/// A way of keeping state fresh.
pub(crate) trait Peer {
    fn about(&self) -> About;

    /// Why it cannot run here, if it cannot.
    fn missing(&self) -> Option<String> {
        None
    }

    /// What it does on one key.
    fn operations(&self, folder: &Path) -> Outcome<Vec<Operation>>;

    /// Its ways of serving `keys` keys to several processes; none if it works within one.
    fn sites(&self, _folder: &Path, _keys: usize) -> Outcome<Vec<(&'static str, Box<dyn Site>)>> {
        Ok(Vec::new())
    }

    /// Why it should not be given so many keys, whatever the time that would take.
    fn too_many(&self, _keys: usize) -> Option<&'static str> {
        None
    }

    /// Its way of waking processes, if it has one.
    fn bell(&self, _folder: &Path) -> Outcome<Option<Box<dyn Bell>>> {
        Ok(None)
    }
}

pub(crate) type Peers = Vec<Box<dyn Peer>>;

/// What it gives, and what it does not.
#[derive(Clone, Copy, Serialize)]
pub(crate) struct About {
    pub(crate) name: &'static str,
    pub(crate) several_writers: &'static str,
    pub(crate) keys_at_run_time: &'static str,
    pub(crate) writer_killed: &'static str,
    pub(crate) file_replaced: &'static str,
    pub(crate) without_server: &'static str,
    pub(crate) across_processes: &'static str,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// Reports whether the state that the caller has is stale.
    Check,
    /// Gives the value, and a fresh one.
    Read,
    /// Has to fetch the value to know whether it is stale: both of the above.
    CheckByReading,
    Announce,
}

/// Something on one key, which is to be repeated.
pub(crate) struct Operation {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    /// Does it so many times.
    pub(crate) run: Box<dyn FnMut(u64)>,
}

impl Operation {
    pub(crate) fn new<R>(name: &'static str, kind: Kind, mut once: impl FnMut() -> R + 'static) -> Self {
        let run = move |times| {
            for _ in 0..times {
                black_box(once());
            }
        };
        Self { name, kind, run: Box::new(run) }
    }
}

/// Keys that are set up, in the process that forks the others. Each is attached to by forked processes only.
pub(crate) trait Site {
    /// Attaches this process to some of the keys; a session's keys count from 0 in the order given.
    fn attach(&self, keys: &[usize], role: Role, source: Source) -> Outcome<Box<dyn Session>>;

    /// Bytes in memory that all its processes share: what is in its folder, unless it keeps them elsewhere.
    fn shared_bytes(&self, folder: &Path) -> Outcome<u64> {
        let blocks = |entry: std::io::Result<std::fs::DirEntry>| Ok(entry?.metadata()?.blocks() * 512);
        std::fs::read_dir(folder)?.map(blocks).sum()
    }

    /// The process that serves it.
    fn server(&self) -> Option<Pid> {
        None
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Reader,
    /// There is one.
    Writer,
}

/// What the values are loaded from, the same for all peers: a word for each key, in memory that all processes share.
#[derive(Clone, Copy)]
pub(crate) struct Source(&'static [AtomicU64]);

impl Source {
    pub(crate) fn new(keys: usize) -> Outcome<Self> {
        Ok(Self(crate::shared::words(keys)?))
    }

    pub(crate) fn load(self, key: usize) -> u64 {
        // ORDERING: pairs with the release in `store`: a worker that was informed of a change sees at least that value, as the writer
        // stores it before it announces it.
        self.0[key].load(Acquire)
    }

    pub(crate) fn store(self, key: usize, value: u64) {
        // ORDERING: pairs with the acquire in `load`. What the writer did before the store is seen by a worker that loads the value.
        self.0[key].store(value, Release);
    }
}

/// What a process holds of some keys.
pub(crate) trait Session {
    /// The value of the key: from this process, or from the source if it was changed.
    fn get(&mut self, key: usize) -> u64;

    /// Announces that the source has another value.
    fn announce(&mut self, key: usize, value: u64);

    /// Serves requests until there are no more. In every session, so that the calls to it are direct.
    fn serve(&mut self, requests: &mut crate::requests::Requests<'_>) {
        while let Some((key, oracle)) = requests.next() {
            let value = self.get(key);
            requests.answer(value, oracle);
        }
    }

    /// Gets the values of these keys.
    fn get_all(&mut self, keys: &[u32]) {
        for &key in keys {
            black_box(self.get(key as usize));
        }
    }
}

/// The freshness that a session is made of.
pub(crate) trait Changes {
    /// Whether the key was announced since this was last asked. The answer is for a load that comes after it.
    fn changed(&mut self, key: usize) -> bool;

    fn announce(&mut self, key: usize, value: u64);
}

/// A session that keeps the values by itself.
pub(crate) struct Held<C> {
    changes: C,
    values: Vec<u64>,
    keys: Vec<usize>,
    source: Source,
}

impl<C: Changes + 'static> Held<C> {
    /// Of changes that have been seen as they are now.
    pub(crate) fn boxed(changes: C, keys: &[usize], source: Source) -> Box<dyn Session> {
        let values = keys.iter().map(|&key| source.load(key)).collect();
        Box::new(Self { changes, values, keys: keys.to_vec(), source })
    }
}

impl<C: Changes> Session for Held<C> {
    #[inline]
    fn get(&mut self, key: usize) -> u64 {
        if self.changes.changed(key) {
            self.values[key] = self.source.load(self.keys[key]);
        }
        self.values[key]
    }

    fn announce(&mut self, key: usize, value: u64) {
        self.changes.announce(key, value);
    }
}

/// Wakes processes that wait.
pub(crate) trait Bell {
    /// Whether the listeners look by themselves, every millisecond.
    fn polls(&self) -> bool {
        false
    }

    /// In a forked process.
    fn listen(&self) -> Outcome<Box<dyn Listener>>;

    /// In a forked process.
    fn ringer(&self) -> Outcome<Box<dyn FnMut() -> Outcome<()>>>;
}

pub(crate) trait Listener {
    /// Returns when it has rung since it last returned, or since it began to listen.
    fn wait(&mut self) -> Outcome<()>;
}

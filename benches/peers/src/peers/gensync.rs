//! Gensync itself, in its forms: a synchronizer for state that the program keeps, a value that gensync keeps, and a thread's reader of that.

use std::hint::black_box;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::gensync::{Cached, CachedReader, GenerationSynchronizer, Table};

use crate::Outcome;
use crate::peer::{About, Bell, Changes, Held, Kind, Listener, Operation, Peer, Role, Session, Site, Source};

pub(crate) struct Gensync;

impl Peer for Gensync {
    fn about(&self) -> About {
        About {
            name: "gensync",
            several_writers: "yes",
            keys_at_run_time: "yes",
            writer_killed: "yes with `update`: the others expire; with `mark_updated` alone, stale if killed before it",
            file_replaced: "yes, at the first use a second later; or up to 64 uses after",
            without_server: "yes",
            across_processes: "yes",
        }
    }

    fn operations(&self, folder: &Path) -> Outcome<Vec<Operation>> {
        let table = Table::open(folder.join("table"))?;
        let sync = |key: &str| GenerationSynchronizer::new(&table, key);
        let (checked, held, marked, updated) = (sync("checked")?, sync("held")?, sync("marked")?, sync("updated")?);
        let cached = Arc::new(Cached::new(sync("cached")?, || Ok::<_, io::Error>(1u64)));
        let mut reader = CachedReader::new(Arc::clone(&cached));
        Ok(vec![
            Operation::new("is_expired", Kind::Check, move || black_box(&checked).is_expired()),
            Operation::new("Cached::get", Kind::Read, move || black_box(&cached).get().map_or(0, |value| *value)),
            Operation::new("CachedReader::get", Kind::Read, move || {
                black_box(&mut reader).get().map_or(0, |value| *value)
            }),
            // The cost for a program that keeps the value itself, in one thread.
            Operation::new("is_expired, the value held", Kind::Read, move || {
                if black_box(&held).is_expired() { 0 } else { black_box(1u64) }
            }),
            Operation::new("mark_updated", Kind::Announce, move || {
                black_box(&marked).mark_updated().map_or(0, |generation| generation.get())
            }),
            Operation::new("update, crash-safe", Kind::Announce, move || {
                black_box(&updated).update(|| Ok::<_, io::Error>(1)).unwrap_or(0)
            }),
        ])
    }

    fn sites(&self, folder: &Path, keys: usize) -> Outcome<Vec<(&'static str, Box<dyn Site>)>> {
        let path = folder.join("table");
        let table = Table::open(&path)?;
        for key in 0..keys {
            GenerationSynchronizer::new(&table, name(key))?;
        }
        Ok(vec![
            ("is_expired", Box::new(GensyncSite { path: path.clone(), way: Way::Check })),
            ("Cached::get", Box::new(GensyncSite { path: path.clone(), way: Way::Cached })),
            ("CachedReader::get", Box::new(GensyncSite { path, way: Way::Reader })),
        ])
    }

    fn bell(&self, folder: &Path) -> Outcome<Option<Box<dyn Bell>>> {
        let path = folder.join("table");
        Table::open(&path)?;
        Ok(Some(Box::new(GensyncBell { path })))
    }
}

fn name(key: usize) -> String {
    format!("key-{key}")
}

struct GensyncSite {
    path: PathBuf,
    way: Way,
}

/// How a server asks for a value.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Check,
    Cached,
    Reader,
}

impl Site for GensyncSite {
    fn attach(&self, keys: &[usize], _role: Role, source: Source) -> Outcome<Box<dyn Session>> {
        let table = Table::open(&self.path)?;
        let syncs =
            keys.iter().map(|&key| GenerationSynchronizer::new(&table, name(key))).collect::<Result<Vec<_>, _>>()?;
        let cached = |(sync, &key)| Cached::new(sync, move || Ok::<_, io::Error>(source.load(key)));
        let values = syncs.iter().cloned().zip(keys).map(cached);
        Ok(match self.way {
            Way::Check => Held::boxed(Syncs(syncs), keys, source),
            Way::Cached => Box::new(Values(values.collect())),
            Way::Reader => Box::new(Readers(values.map(|cached| CachedReader::new(Box::new(cached))).collect())),
        })
    }
}

struct Syncs(Vec<GenerationSynchronizer>);

impl Syncs {
    #[cold]
    fn refresh(&self, key: usize) {
        self.0[key].refresh().expect("a live table");
    }
}

impl Changes for Syncs {
    #[inline]
    fn changed(&mut self, key: usize) -> bool {
        let expired = self.0[key].is_expired();
        if expired {
            self.refresh(key);
        }
        expired
    }

    fn announce(&mut self, key: usize, _value: u64) {
        self.0[key].mark_updated().expect("a live table");
    }
}

struct Values(Vec<Cached<u64>>);

impl Session for Values {
    #[inline]
    fn get(&mut self, key: usize) -> u64 {
        *self.0[key].get().expect("a source that never fails")
    }

    fn announce(&mut self, key: usize, _value: u64) {
        self.0[key].synchronizer().mark_updated().expect("a live table");
    }
}

struct Readers(Vec<CachedReader<u64, Box<Cached<u64>>>>);

impl Session for Readers {
    #[inline]
    fn get(&mut self, key: usize) -> u64 {
        *self.0[key].get().expect("a source that never fails")
    }

    fn announce(&mut self, key: usize, _value: u64) {
        self.0[key].cached().synchronizer().mark_updated().expect("a live table");
    }
}

struct GensyncBell {
    path: PathBuf,
}

impl Bell for GensyncBell {
    fn listen(&self) -> Outcome<Box<dyn Listener>> {
        Ok(Box::new(Sleeper(GenerationSynchronizer::new(&Table::open(&self.path)?, "bell")?)))
    }

    fn ringer(&self) -> Outcome<Box<dyn FnMut() -> Outcome<()>>> {
        let sync = GenerationSynchronizer::new(&Table::open(&self.path)?, "bell")?;
        Ok(Box::new(move || {
            sync.mark_updated()?;
            Ok(())
        }))
    }
}

struct Sleeper(GenerationSynchronizer);

impl Listener for Sleeper {
    fn wait(&mut self) -> Outcome<()> {
        self.0.wait();
        self.0.refresh()?;
        Ok(())
    }
}

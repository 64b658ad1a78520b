//! Guards against an upgrade that is lost, or loses updates, when its process is killed at the worst moment: a table of version 1 is
//! replaced by a process that is killed at each of its steps, and then processes of both versions go on.
//!
//! Processes of version 1 are emulated. What can be tried without a kill at each step is in `tests/upgrade.rs`.

#[path = "../../tests/support/version_1.rs"]
mod version_1;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Instant;

use nix::sys::signal::{Signal, raise};

use crate::tests::kills::{kill_everywhere, support};
use crate::{GenerationSynchronizer, OwnerCheck, Table, TableOptions};
use support::{LIMIT, in_child, path, shared_words};
use version_1::{LIVE, RETIRING, Refused, Retired, SleepOn, native};

const PRESENT: u32 = 2;

fn replacing() -> TableOptions {
    Table::options().owner(OwnerCheck::Anyone).replace_older(true)
}

/// A table of version 1, one of its holders, and what the holder has loaded.
struct Stage {
    _folder: tempfile::TempDir,
    path: PathBuf,
    older: version_1::Key,
    source: &'static AtomicU64,
    loaded: u64,
}

impl Stage {
    fn new(older: impl FnOnce(&PathBuf) -> version_1::Key) -> Self {
        let (folder, path) = path();
        let (older, source) = (older(&path), &shared_words(1)[0]);
        Self { _folder: folder, path, older, source, loaded: 0 }
    }

    fn of_one_key() -> Self {
        Self::new(|path| version_1::Table::create(path, 4).attach("key").unwrap())
    }

    /// Of three segments, with updates that are pending and claims that are not complete.
    fn of_everything() -> Self {
        Self::new(|path| {
            let mut content = include_bytes!("../../tests/vectors/version-1-everything.gensync").to_vec();
            content[128..144].copy_from_slice(&version_1::boot_id());
            fs::write(path, content).unwrap();
            version_1::Table::open(path).unwrap().get("last").unwrap()
        })
    }

    /// With an update whose process was killed after it had changed the source.
    fn of_a_dead_update() -> Self {
        let stage = Self::of_one_key();
        let maker = in_child(|| {
            let key = version_1::Table::open(&stage.path).unwrap().attach("key").unwrap();
            let _update = key.begin_update().unwrap();
            stage.source.fetch_add(1, SeqCst);
            raise(Signal::SIGKILL).unwrap();
        });
        assert!(maker.ends_by_kill());
        stage
    }

    /// That another process has begun to retire, and was killed.
    fn of_a_retiring_table() -> Self {
        let stage = Self::of_one_key();
        let file = OpenOptions::new().write(true).open(&stage.path).unwrap();
        file.write_all_at(&native(RETIRING), 144).unwrap();
        stage
    }

    fn replace(&self) {
        drop(GenerationSynchronizer::new(&replacing().open(&self.path).unwrap(), "key").unwrap());
    }

    /// A process of version 1 goes on first, or not at all; then one of the present version.
    fn assert_whole(mut self, story: &str, is_older_first: bool) {
        let mut highest = self.older.generation();
        let mut successor = None;
        if is_older_first {
            // The update is announced in the table that it was begun in, or it fails before anything is changed.
            match self.older.update(|| self.source.fetch_add(1, SeqCst)) {
                Ok(_) => assert_eq!(self.older.table().state(), LIVE, "{story}"),
                Err(Retired) => {
                    // If the path still leads to the old table, this replaces it by another one of version 1.
                    successor = match self.older.table().successor() {
                        Ok(next) => Some(next.attach("key").unwrap()),
                        Err(refused) => {
                            assert_eq!(refused, Refused::Version(PRESENT), "{story}");
                            None
                        }
                    };
                    assert!(self.older.is_expired(), "{story}");
                }
            }
            if let Some(next) = &successor {
                next.update(|| self.source.fetch_add(1, SeqCst)).unwrap();
                assert!(next.generation() > highest, "{story}: a generation comes again");
            }
        }
        highest =
            [Some(&self.older), successor.as_ref()].into_iter().flatten().map(|key| key.generation()).max().unwrap();

        let table = replacing().open(&self.path).unwrap();
        let sync = GenerationSynchronizer::new(&table, "key").unwrap();
        assert!(sync.sync_gen().unwrap().get() > highest, "{story}: a generation comes again");
        self.loaded = sync.refresh_with(|| Ok::<_, ()>(self.source.load(SeqCst))).unwrap();
        assert_eq!(self.loaded, self.source.load(SeqCst), "{story}");
        for holder in [Some(&self.older), successor.as_ref()].into_iter().flatten() {
            assert!(holder.is_expired() && holder.is_retired(), "{story}: two tables where one should be");
            assert!(holder.wait(SleepOn::Key, LIMIT) && holder.wait(SleepOn::Table, LIMIT), "{story}");
            assert_eq!(holder.mark(), Err(Retired), "{story}");
            assert_eq!(holder.update(|| unreachable!("the source must not be changed")), Err(Retired), "{story}");
            assert_eq!(holder.table().successor().unwrap_err(), Refused::Version(PRESENT), "{story}");
        }

        // What comes now is seen by another process of the present version, and no process is in the way of another.
        let start = Instant::now();
        let fresh = Table::options().owner(OwnerCheck::Anyone).open(&self.path).unwrap();
        assert_eq!(fresh.info().incarnation, table.info().incarnation, "{story}: two tables where one should be");
        let other = GenerationSynchronizer::new(&fresh, "key").unwrap();
        other.update(|| Ok::<_, ()>(self.source.fetch_add(1, SeqCst))).unwrap();
        assert!(sync.is_expired(), "{story}");
        sync.mark_updated().unwrap();
        assert!(other.is_expired() && start.elapsed() < LIMIT, "{story}");
        fresh.reset().unwrap();
        assert!(sync.is_expired() && other.is_expired(), "{story}");
        let files = fs::read_dir(self.path.parent().unwrap()).unwrap().count();
        assert!(files <= 2, "{story}: unfinished files pile up");
    }
}

fn kill_while_replacing(what: &str, stage: impl Fn() -> Stage) {
    for is_older_first in [false, true] {
        let who = if is_older_first { "version 1 goes on first" } else { "version 1 comes last" };
        kill_everywhere(&format!("{what}; {who}"), &stage, Stage::replace, |stage, story| {
            stage.assert_whole(story, is_older_first);
        });
    }
}

#[test]
fn killed_while_replacing_an_older_table() {
    kill_while_replacing("replacement of an older table", Stage::of_one_key);
    kill_while_replacing("replacement of an older table of three segments", Stage::of_everything);
}

#[test]
fn killed_while_replacing_what_another_killed_process_has_left() {
    kill_while_replacing("replacement of an older table with a dead update", Stage::of_a_dead_update);
    kill_while_replacing("replacement of an older table that is retiring", Stage::of_a_retiring_table);
}

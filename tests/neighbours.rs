//! Guards against neighbours that mean harm: one that scribbles over the table while it is used, one that swaps its path, and
//! the caller of a set-uid program.

#[path = "support/exercise.rs"]
mod exercise;
mod support;

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use exercise::{exercise, options};
use gensync::{ErrorKind, GenerationSynchronizer, Table, WaitSet};
use memmap2::{MmapOptions, MmapRaw};
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Uid, alarm, getppid};
use support::place::{Kind, Place};
use support::{alone, in_child, next_random, path, shared_words};

/// How long each kind of table is scribbled over.
const TIME: Duration = Duration::from_secs(3);
/// How much of a table: its header and its first segments.
const REACH: u64 = 64 << 10;
/// What is not done after so many seconds counts as hanging.
const WATCHDOG: u32 = 120;

#[test]
fn a_file_that_is_scribbled_over_does_no_harm() {
    alone(|| survive(Kind::File));
}

#[test]
fn an_anonymous_table_that_is_scribbled_over_does_no_harm() {
    alone(|| survive(Kind::Anonymous));
}

#[test]
#[cfg(feature = "shm")]
fn a_named_table_that_is_scribbled_over_does_no_harm() {
    alone(|| survive(Kind::Named));
}

#[test]
fn an_anonymous_table_reaches_no_further_than_its_file() {
    in_child(|| {
        // Less than the greatest size of a table.
        setrlimit(Resource::RLIMIT_FSIZE, 1 << 20, getrlimit(Resource::RLIMIT_FSIZE).unwrap().1).unwrap();
        let table = options().capacity(16).anonymous().unwrap();
        let sync = GenerationSynchronizer::new(&table, "key").unwrap();
        let file = file_of(&table).unwrap();
        for segments in 2..40_u32 {
            file.write_all_at(&segments.to_le_bytes(), 148).unwrap();
            assert!(table.stats().bytes <= 1 << 20, "{:?}", table.stats());
            assert!(table.slots().count() > 0 && !sync.is_expired());
            let _ = (GenerationSynchronizer::new(&table, format!("{segments}")), table.watch());
        }
    })
    .succeeds();
}

/// Does everything with a table, in three threads of a child, while another process scribbles over it.
fn survive(kind: Kind) {
    let place = Place::new(kind);
    let counts = shared_words(4);
    let [stop, writes, rounds, others] = [0, 1, 2, 3].map(|index| &counts[index]);
    in_child(|| {
        // Ends the child if it does not end by itself.
        alarm::set(WATCHDOG);
        // A table that seems to be full grows: not until the disk is.
        setrlimit(Resource::RLIMIT_FSIZE, 8 << 20, getrlimit(Resource::RLIMIT_FSIZE).unwrap().1).unwrap();
        let table = place.open(options().capacity(16));
        let scribbler = in_child(|| scribble(&table, stop, writes));
        let start = Instant::now();
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while start.elapsed() < TIME {
                        exercise(&table, &mut || ());
                        rounds.fetch_add(1, SeqCst);
                        if let Some(path) = table.path() {
                            let _ = options().open(path).map(|table| table.stats());
                            let _ = options().read_only(true).open(path).map(|table| table.generation("a"));
                        }
                    }
                });
            }
            scope.spawn(|| wait_and_grow(&table, start, others));
        });
        stop.store(1, SeqCst);
        scribbler.succeeds();
    })
    .succeeds();
    let [writes, rounds, others] = [writes, rounds, others].map(|count| count.load(SeqCst));
    println!("{writes} writes, {rounds} rounds of every operation, {others} of waiting and growing");
    assert!(writes > 100_000 && rounds > 10 && others > 10, "{writes} {rounds} {others}");
}

/// New keys, and waits that last a little.
fn wait_and_grow(table: &Table, start: Instant, count: &AtomicU64) {
    let mut syncs = Vec::new();
    while start.elapsed() < TIME {
        let number = count.fetch_add(1, SeqCst);
        syncs.extend(GenerationSynchronizer::new(table, format!("key {number}")).ok());
        if syncs.len() > 100 {
            syncs.drain(..50);
        }
        let moment = Duration::from_micros(number % 2000);
        if let Some(sync) = syncs.last() {
            let _ = sync.wait_timeout(moment);
        }
        let set: WaitSet<'_> = syncs.iter().rev().take(5).collect();
        let _ = set.wait_timeout(moment);
        let _ = table.watch().next_timeout(moment);
    }
}

/// Writes to the table through a mapping of this process's own, until `stop` is set; follows the table to its successors.
fn scribble(table: &Table, stop: &AtomicU64, writes: &AtomicU64) {
    let (mut random, parent) = (0x9e37_79b9_7f4a_7c15, getppid());
    while stop.load(SeqCst) == 0 && getppid() == parent {
        let Some(map) = file_of(table).and_then(|file| map(&file)) else { continue };
        let prey = Prey { map };
        for _ in 0..20_000 {
            prey.write(&mut random);
        }
        writes.fetch_add(20_000, SeqCst);
    }
}

fn file_of(table: &Table) -> Option<File> {
    let path = match table.path() {
        Some(path) => path.to_owned(),
        // Inherited, and known by its name.
        None => fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path()).find(|link| {
            fs::read_link(link).is_ok_and(|target| target.to_string_lossy().starts_with("/memfd:gensync"))
        })?,
    };
    OpenOptions::new().read(true).write(true).open(path).ok()
}

fn map(file: &File) -> Option<MmapRaw> {
    let length = file.metadata().unwrap().len().min(REACH) as usize;
    MmapOptions::new().len(length).map_raw(file.as_raw_fd()).ok()
}

/// A table in memory, for a writer that keeps to no rule except that it does not change the file's size.
struct Prey {
    map: MmapRaw,
}

impl Prey {
    fn bytes(&self) -> &[AtomicU8] {
        // SAFETY: mapped as long as self lives, and within the file, which is never truncated. Every other user of it uses atomics.
        #[expect(unsafe_code, reason = "a mapping of the test's own")]
        unsafe {
            std::slice::from_raw_parts(self.map.as_ptr().cast(), self.map.len())
        }
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        // SAFETY: mapped as long as self lives, within the file, and used through atomics only; the map is aligned to a page, and the word
        // within it to its size.
        #[expect(unsafe_code, reason = "a mapping of the test's own")]
        unsafe {
            assert!(index < self.map.len() / 8);
            &*self.map.as_ptr().cast::<AtomicU64>().add(index)
        }
    }

    fn write(&self, random: &mut u64) {
        let mut next = || next_random(random) >> 3;
        let words = self.map.len() / 8;
        // Starts behind the fixed part: a change of that only makes opening the table fail.
        let index = match next() % 8 {
            0 => 16 + next() as usize % 17,
            1..6 => 512 + 16 * (next() as usize % (words / 16 - 32)) + next() as usize % 5,
            _ => 16 + next() as usize % (words - 16),
        };
        let now = 1_800_000_000_000_000 + next() % 1000;
        let value = match next() % 12 {
            0 => next() << 3 ^ next(),
            1 => u64::MAX,
            2 => 0,
            3 => self.word(512 + next() as usize % (words - 512)).load(Relaxed),
            4 => now,
            5 => now | 1 << 54,
            6 => now | 1 << 55,
            7 => now | next() << 56,
            8 => (1 << 54) - 1,
            9 => (next() % 5) | ((next() % 30) << 32),
            10 => next() << 32 | 1,
            _ => 1 | (next() % 6) << 32,
        };
        match next() % 4 {
            0 => self.bytes()[8 * index + next() as usize % 8].store(value as u8, Relaxed),
            _ => self.word(index).store(value, Relaxed),
        }
        // Little can be done with a table that is not live, or has too many segments: it is repaired, so that more can go wrong.
        if next() % 64 == 0 {
            let segments = 1 + next() % 3;
            self.word(18).store(1 | segments << 32, Relaxed);
        }
    }
}

/// Puts something else at `path` again and again.
fn swap(path: &Path, victim: &Path, stop: &AtomicU64, swaps: &AtomicU64) {
    let spare = path.with_extension("spare");
    let parent = getppid();
    for round in 0.. {
        if stop.load(SeqCst) == 1 || getppid() != parent {
            return;
        }
        let _ = fs::remove_dir(path);
        let _ = fs::remove_file(&spare);
        match round % 7 {
            0 | 3 => symlink(victim, &spare).unwrap(),
            1 => nix::unistd::mkfifo(&spare, nix::sys::stat::Mode::S_IRWXU).unwrap(),
            2 => drop(std::os::unix::net::UnixListener::bind(&spare).unwrap()),
            4 => fs::write(&spare, "something else").unwrap(),
            5 => drop(fs::remove_file(path).and_then(|()| fs::create_dir(path))),
            _ => drop(fs::remove_file(path)),
        }
        let _ = fs::rename(&spare, path);
        swaps.fetch_add(1, SeqCst);
    }
}

/// What the system answers to opening a socket, or a folder for writing.
fn is_of_opening(error: &gensync::Error) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<std::io::Error>());
    let errno = source.and_then(std::io::Error::raw_os_error).map(Errno::from_raw);
    matches!(errno, Some(Errno::ENXIO | Errno::EISDIR))
}

#[test]
fn a_path_that_is_swapped_while_it_is_opened_leads_nowhere_else() {
    let (folder, path) = path();
    let victim = folder.path().join("victim");
    let sync = GenerationSynchronizer::new(&Table::open(&victim).unwrap(), "victim").unwrap();
    let before = fs::read(&victim).unwrap();
    let (counts, mut outcomes) = (shared_words(2), std::collections::BTreeMap::<String, u32>::new());
    let swapper = in_child(|| swap(&path, &victim, &counts[0], &counts[1]));
    let opener = in_child(|| {
        alarm::set(WATCHDOG);
        for round in 0..20_000 {
            let outcome = match options().read_only(round % 3 == 0).open(&path) {
                Ok(table) => {
                    if let Ok(generation) = table.generation("victim") {
                        assert_eq!(generation, None, "the table of a link's target was opened");
                    }
                    if round % 10 == 1 {
                        let _ = table.reset();
                    }
                    "opened".to_owned()
                }
                Err(error) => {
                    assert_eq!(error.path(), Some(&*path));
                    match error.kind() {
                        ErrorKind::Symlink
                        | ErrorKind::NotFound
                        | ErrorKind::NotARegularFile { .. }
                        | ErrorKind::NotATable { .. }
                        // So often was something else there.
                        | ErrorKind::Retired => {}
                        // A socket, or a folder, between the look and the opening.
                        ErrorKind::System { .. } => assert!(is_of_opening(&error), "{error:?}"),
                        other => panic!("{other:?}: {error}"),
                    }
                    error.to_string().replace(&*path.to_string_lossy(), "")
                }
            };
            *outcomes.entry(outcome).or_default() += 1;
        }
        println!("{outcomes:#?}");
        assert!(outcomes.len() > 5, "{outcomes:?}");
    });
    opener.succeeds();
    counts[0].store(1, SeqCst);
    swapper.succeeds();
    println!("{} swaps", counts[1].load(SeqCst));
    assert!(fs::read(&victim).unwrap() == before && !sync.is_expired(), "a link's target was changed");
}

#[test]
fn a_set_uid_program_does_not_believe_its_callers_environment() {
    if !Uid::effective().is_root() {
        eprintln!("not root: owners cannot be changed");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (owner, caller) = (700_000 + std::process::id(), 1_700_000 + std::process::id());
    let runtime = folder.path().join("runtime");
    fs::create_dir(&runtime).unwrap();
    fs::set_permissions(&runtime, fs::Permissions::from_mode(0o777)).unwrap();
    let program = Program { folder: folder.path(), runtime: &runtime };
    let own = |user: u32| PathBuf::from(format!("/dev/shm/gensync-{user}"));
    let believed = runtime.join("gensync");
    // Owner, group and mode of the program, its capabilities, and the folder that it takes.
    for (user, group, mode, capabilities, expected) in [
        (0, 0, 0o755, None, believed.clone()),
        (owner, 0, 0o4755, None, own(owner)),
        (owner, 0, 0o4711, None, own(owner)),
        (0, owner, 0o2755, None, own(caller)),
        (0, 0, 0o4755, None, own(0)),
        (0, 0, 0o755, Some("cap_net_bind_service=ep"), own(caller)),
        // To be executed without being read makes a process one that cannot read its vector; and no more.
        (0, 0, 0o711, None, believed.clone()),
    ] {
        if capabilities.is_some() && Command::new("setcap").arg("-h").output().is_err() {
            eprintln!("skipped: capabilities, as there is no setcap here, which Debian has in libcap2-bin");
            continue;
        }
        let existed = expected.exists();
        let found = program.run(caller, user, group, mode, capabilities);
        assert_eq!(found, Some(expected.join("set-uid-test")), "{user} {group} {mode:o} {capabilities:?}");
        let owner = fs::metadata(&expected).unwrap().uid();
        assert_eq!(owner, if mode & 0o4000 != 0 { user } else { caller });
        match existed {
            true => fs::remove_file(expected.join("set-uid-test")).unwrap(),
            false => fs::remove_dir_all(&expected).unwrap(),
        }
    }
    assert_eq!(fs::read_dir(&runtime).unwrap().count(), 0);
}

/// Copies of this test's program.
struct Program<'a> {
    folder: &'a Path,
    runtime: &'a Path,
}

impl Program<'_> {
    /// Which table a copy with that owner, mode and capabilities takes for the default one, executed by `caller`.
    fn run(&self, caller: u32, user: u32, group: u32, mode: u32, capabilities: Option<&str>) -> Option<PathBuf> {
        let copy = self.folder.join("program");
        let _ = fs::remove_file(&copy);
        // By another process: a child that is forked here meanwhile would have it open for writing.
        let original = std::env::current_exe().unwrap();
        assert!(Command::new("cp").args([&original, &copy]).status().unwrap().success());
        std::os::unix::fs::chown(&copy, Some(user), Some(group)).unwrap();
        fs::set_permissions(&copy, fs::Permissions::from_mode(mode)).unwrap();
        if let Some(capabilities) = capabilities {
            assert!(Command::new("setcap").arg(capabilities).arg(&copy).status().unwrap().success());
        }
        let output = Command::new(&copy)
            .args(["--exact", "the_default_table_is_named", "--ignored", "--nocapture"])
            .env("XDG_RUNTIME_DIR", self.runtime)
            .current_dir("/")
            .uid(caller)
            .gid(caller)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let path =
            text.lines().find_map(|line| line.split_once("the default is ").map(|(_, path)| PathBuf::from(path)));
        assert!(path.is_some(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        path
    }
}

#[test]
#[ignore = "run by a_set_uid_program_does_not_believe_its_callers_environment, with other rights"]
fn the_default_table_is_named() {
    let table = Table::open_default("set-uid-test").unwrap();
    println!("the default is {}", table.path().unwrap().display());
}

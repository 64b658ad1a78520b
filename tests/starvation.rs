//! Guards against want: no room, no inode, no descriptor, no address space, no thread, a file system that goes away. Each
//! ends in an error that names the path, with a table that works on, and is forgotten when there is enough again.

mod support;

use std::error::Error as _;
use std::fs::{self, File};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use gensync::{Cached, Error, ErrorKind, GenerationSynchronizer, Table, UpdateError, WaitSet, update_all};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::statvfs::statvfs;
use nix::unistd::{Uid, dup};
use support::place::{KINDS, Place};
use support::{await_value, in_child, path, shared_words};

/// Nobody's, so that limits of a user and permissions count.
const STRANGER: u32 = 54_321;

fn attach(table: &Table, key: impl Into<gensync::CacheKey>) -> Result<GenerationSynchronizer, Error> {
    GenerationSynchronizer::new(table, key)
}

fn is_full(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::TableFull { .. })
}

/// The soft limit from now on.
fn limit(resource: Resource, value: u64) {
    setrlimit(resource, value, getrlimit(resource).unwrap().1).unwrap();
}

/// A file system of its own, unmounted with the test.
struct Mount(tempfile::TempDir);

impl Mount {
    fn tmpfs(options: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        match mount(Some("tmpfs"), folder.path(), Some("tmpfs"), MsFlags::empty(), Some(options)) {
            Ok(()) => Some(Self(folder)),
            Err(error) => {
                eprintln!("skipped, as a file system cannot be mounted here: {error}");
                None
            }
        }
    }

    /// One on a disk, of as many bytes, in a file that is deleted at once.
    fn ext4(size: u64) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(size).unwrap();
        let run = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
        // Nothing is set aside for root.
        let is_there = run(Command::new("mkfs.ext4").args(["-q", "-m", "0", "-b", "4096"]).arg(image.path()))
            && run(Command::new("mount").args(["-o", "loop"]).arg(image.path()).arg(folder.path()));
        if !is_there {
            eprintln!("skipped, as a disk cannot be mounted here");
        }
        is_there.then_some(Self(folder))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn remount(&self, flags: MsFlags, options: &str) -> nix::Result<()> {
        mount(None::<&str>, self.0.path(), None::<&str>, MsFlags::MS_REMOUNT | flags, Some(options))
    }

    /// In bytes.
    fn free(&self) -> u64 {
        let stat = statvfs(self.0.path()).unwrap();
        stat.blocks_available() * stat.fragment_size()
    }

    /// Leaves so many bytes free, by a file that is there as long as what is returned.
    fn fill(&self, leave: u64) -> Ballast {
        let path = self.path("ballast");
        let file = File::create(&path).unwrap();
        let mut size = 0;
        // In ever smaller pieces, as a disk takes some for its own purposes.
        for piece in (12..26).rev().map(|power| 1 << power) {
            while self.free() >= leave + piece && fallocate(&file, FallocateFlags::empty(), size, piece as i64).is_ok()
            {
                size += piece as i64;
            }
        }
        assert!(self.free().saturating_sub(leave) < 8192, "{} bytes are free, not {leave}", self.free());
        Ballast(path)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

struct Ballast(PathBuf);

impl Drop for Ballast {
    fn drop(&mut self) {
        // Emptied first: another test's child may have inherited it.
        let _ = File::create(&self.0);
        let _ = fs::remove_file(&self.0);
    }
}

/// Attaches to new keys until one of them finds no room.
fn attach_all(table: &Table, syncs: &mut Vec<GenerationSynchronizer>) -> Error {
    loop {
        match attach(table, format!("{}", syncs.len())) {
            Ok(sync) => syncs.push(sync),
            Err(error) => return error,
        }
    }
}

/// Attaches to new keys until the table has so many segments.
fn grow(table: &Table, segments: u32, syncs: &mut Vec<GenerationSynchronizer>) {
    while table.stats().segments < segments {
        (0..1 + syncs.len() / 8).for_each(|_| syncs.push(attach(table, format!("{}", syncs.len())).unwrap()));
    }
}

/// All that can be done with existing keys can be done, in this process and in another one.
fn assert_works(table: &Table, syncs: &[GenerationSynchronizer]) {
    let work = || {
        let sync = syncs.last().unwrap();
        sync.refresh().unwrap();
        let same = attach(table, sync.cache_key().clone()).unwrap();
        let generation = sync.mark_updated().unwrap();
        assert!(same.is_expired() && !sync.is_expired());
        assert_eq!(same.refresh().unwrap(), generation);
        assert!(!same.is_expired());
        same.update(|| Ok::<_, Error>(())).unwrap();
        assert!(sync.is_expired());
        sync.refresh().unwrap();
        sync.clear().unwrap();
        assert!(same.is_expired() && sync.is_expired());
        for sync in syncs {
            sync.mark_updated().unwrap();
            sync.refresh().unwrap();
            assert!(!sync.is_expired());
        }
        assert!(table.slots().all(|slot| slot.pending() == 0));
    };
    work();
    in_child(work).succeeds();
    syncs.iter().for_each(|sync| _ = sync.refresh().unwrap());
}

/// Everything works, what needs room as well.
fn assert_recovered(table: &Table, syncs: &[GenerationSynchronizer]) {
    assert_works(table, syncs);
    let segments = table.stats().segments;
    for i in 0.. {
        attach(table, format!("late{i}")).unwrap();
        if table.stats().segments > segments {
            break;
        }
    }
    table.reset().unwrap();
    assert!(syncs.iter().all(GenerationSynchronizer::is_expired));
    assert_works(table, syncs);
}

fn names(folder: &Path) -> Vec<std::ffi::OsString> {
    let mut names: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    names
}

// Room.

#[test]
fn a_full_disk_is_an_error_and_existing_keys_go_on_working() {
    let Some(disk) = Mount::tmpfs("size=512k") else { return };
    let path = disk.path("table");
    let table = Table::options().capacity(16).open(&path).unwrap();
    let mut syncs = Vec::new();
    let error = attach_all(&table, &mut syncs);
    assert!(is_full(&error), "{error}");
    assert_eq!(error.path(), Some(&*path));
    assert!(error.key().is_some() && error.source().is_some());
    assert!(syncs.len() > 1000);
    assert_works(&table, &syncs);
    // A reset needs room for a second file first: either it works, or nothing has changed.
    fs::write(disk.path("ballast"), vec![0; 1 << 20]).unwrap_err();
    let error = table.reset().unwrap_err();
    assert!(is_full(&error), "{error}");
    assert!(syncs.iter().all(|sync| !sync.is_expired()), "a reset that failed has changed something");
    // A second table does not fit; with room again, all goes on.
    assert!(Table::open(disk.path("second")).is_err());
    fs::remove_file(disk.path("ballast")).unwrap();
    disk.remount(MsFlags::empty(), "size=8m").unwrap();
    assert_recovered(&table, &syncs);
}

/// Lets the disk be full when each of the segments up to `last` is to be appended: but for nothing, for half of what it
/// takes, and for one page less than that.
fn full_at_each_growth(disk: &Mount, last: u32) {
    let path = disk.path("table");
    let table = Table::options().capacity(1).open(&path).unwrap();
    let other = Table::open(&path).unwrap();
    let mut syncs = vec![attach(&table, "0").unwrap()];
    let mut failures = 0;
    for segment in 1..=last {
        grow(&table, segment, &mut syncs);
        let bytes = (128 << segment) + (1_u64 << segment).next_multiple_of(128);
        // The last page of the present segments may hold the beginning of it.
        let pages = bytes.div_ceil(4096) - 1;
        // A disk may keep what was reserved before it was full.
        let mut taken = 0;
        for pages in [0, pages / 2, pages.saturating_sub(1)] {
            let _ballast = disk.fill((pages * 4096_u64).saturating_sub(taken));
            let free = disk.free();
            let error = loop {
                match attach(&table, format!("{}", syncs.len())) {
                    Err(error) => break Some(error),
                    Ok(sync) => syncs.push(sync),
                }
                if table.stats().segments > segment {
                    break None;
                }
            };
            taken += free - disk.free();
            let Some(error) = error else {
                assert!(bytes < 2 * 4096, "segment {segment} was appended to a full disk");
                break;
            };
            failures += 1;
            assert!(is_full(&error), "{error}");
            let key = format!("{}", syncs.len());
            assert_eq!((error.path(), error.key()), (Some(&*path), Some(&*key)));
            assert_eq!((table.stats().segments, table.stats().keys), (segment, syncs.len() as u64));
            // Whoever else comes finds the same.
            assert!(is_full(&attach(&other, key).unwrap_err()));
            assert_works(&table, &syncs);
        }
    }
    assert!(failures >= 2 * last, "only {failures} failures");
    assert_recovered(&table, &syncs);
}

#[test]
fn a_memory_disk_may_be_full_at_every_growth() {
    let Some(disk) = Mount::tmpfs("size=8m") else { return };
    full_at_each_growth(&disk, 12);
}

#[test]
fn a_disk_may_be_full_at_every_growth() {
    let Some(disk) = Mount::ext4(24 << 20) else { return };
    full_at_each_growth(&disk, 12);
}

#[test]
fn a_disk_may_be_full_between_the_pieces_of_a_great_segment() {
    let Some(disk) = Mount::tmpfs("size=80m") else { return };
    let table = Table::options().capacity(1 << 17).open(disk.path("table")).unwrap();
    let mut syncs = Vec::new();
    let ballast = disk.fill(20 << 20);
    let error = attach_all(&table, &mut syncs);
    assert!(is_full(&error) && table.stats().segments == 1, "{error}");
    // The first piece is taken, and stays so.
    assert!(disk.free() < 5 << 20);
    assert_works(&table, &syncs[..100]);
    drop(ballast);
    let key = format!("{}", syncs.len());
    attach(&table, &*key).unwrap();
    assert_eq!(table.stats().segments, 2);
    table.reset().unwrap();
    assert!(syncs.iter().all(GenerationSynchronizer::is_expired));
}

/// Runs `attempt` with nothing free, a page, two pages, and so on until it succeeds, and returns how often it failed.
fn until_there_is_room(disk: &Mount, attempt: impl Fn() -> Result<(), Error>) -> u64 {
    for pages in 0..20 {
        let _ballast = disk.fill(pages * 4096);
        let (names_before, free) = (names(disk.0.path()), disk.free());
        match attempt() {
            Ok(()) => return pages,
            Err(error) => assert!(is_full(&error) && error.path().is_some(), "{error}"),
        }
        assert_eq!((names(disk.0.path()), disk.free()), (names_before, free), "it left something behind");
    }
    panic!("there is no room for a small table");
}

#[test]
fn a_table_is_created_whole_or_not_at_all() {
    let Some(disk) = Mount::tmpfs("size=1m") else { return };
    let failures = until_there_is_room(&disk, || Table::options().capacity(64).open(disk.path("table")).map(drop));
    assert_eq!(failures, 4, "the header and 64 slots take four pages");
    let table = Table::options().create(false).open(disk.path("table")).unwrap();
    assert_recovered(&table, &[attach(&table, "key").unwrap()]);
}

#[test]
fn a_reset_is_made_whole_or_not_at_all() {
    let disks = [Mount::tmpfs("size=1m"), Mount::ext4(4 << 20)];
    for disk in disks.into_iter().flatten() {
        let table = Table::options().capacity(64).open(disk.path("table")).unwrap();
        let other = Table::open(disk.path("table")).unwrap();
        let syncs = [attach(&table, "one").unwrap(), attach(&table, "two").unwrap()];
        let elsewhere = attach(&other, "two").unwrap();
        let failures = until_there_is_room(&disk, || {
            assert!(syncs.iter().chain([&elsewhere]).all(|sync| !sync.is_expired()), "it has changed something");
            assert_works(&table, &syncs);
            elsewhere.refresh().unwrap();
            table.reset()
        });
        assert!(failures >= 4, "{failures}");
        assert!(syncs.iter().chain([&elsewhere]).all(GenerationSynchronizer::is_expired));
        assert_recovered(&table, &syncs);
    }
}

#[test]
fn a_table_on_a_full_disk_can_be_written_to_for_ever() {
    let Some(disk) = Mount::ext4(8 << 20) else { return };
    let table = Table::options().capacity(64).open(disk.path("table")).unwrap();
    let mut syncs = Vec::new();
    grow(&table, 5, &mut syncs);
    let _ballast = disk.fill(0);
    for _ in 0..20 {
        assert_works(&table, &syncs);
        // What was written goes to the disk, and the next write begins anew.
        nix::unistd::syncfs(File::open(disk.0.path()).unwrap().as_fd()).unwrap();
    }
    assert!(is_full(&attach_all(&table, &mut syncs)));
}

#[test]
fn without_an_inode_nothing_can_be_created_and_nothing_is_changed() {
    let Some(disk) = Mount::tmpfs("size=8m,nr_inodes=4") else { return };
    // The folder itself takes one.
    let table = Table::options().capacity(16).open(disk.path("table")).unwrap();
    let mut syncs = vec![attach(&table, "0").unwrap()];
    let fillers: Vec<_> = (0..).map_while(|i| File::create(disk.path(&format!("{i}"))).ok().map(|_| i)).collect();
    assert!(!fillers.is_empty());
    for error in [Table::open(disk.path("new")).unwrap_err(), table.reset().unwrap_err()] {
        assert!(is_full(&error) && error.path().is_some() && error.to_string().contains("inode"), "{error}");
    }
    assert!(!disk.path("new").exists() && !syncs[0].is_expired());
    // Growing takes none.
    grow(&table, 4, &mut syncs);
    assert_works(&table, &syncs);
    fs::remove_file(disk.path("0")).unwrap();
    assert_recovered(&table, &syncs);
}

/// A process that was killed after it had begun to reset the table leaves it like this.
fn begin_to_retire(path: &Path) {
    // In the byte order of the machine.
    let state = if cfg!(target_endian = "little") { [2, 0, 0, 0] } else { [0, 0, 0, 2] };
    File::options().write(true).open(path).unwrap().write_all_at(&state, 144).unwrap();
}

#[test]
fn a_retired_table_that_finds_no_room_for_its_successor_expires_everything_until_there_is_room() {
    let Some(disk) = Mount::tmpfs("size=1m") else { return };
    let path = disk.path("table");
    let table = Table::options().capacity(64).open(&path).unwrap();
    let other = Table::open(&path).unwrap();
    let (sync, elsewhere) = (attach(&table, "key").unwrap(), attach(&other, "key").unwrap());
    let source = &shared_words(1)[0];
    let cached = Cached::new(attach(&table, "key").unwrap(), || Ok::<_, Error>(source.load(SeqCst)));
    assert_eq!(*cached.get().unwrap(), 0);
    let before = sync.sync_gen().unwrap();
    let ballast = disk.fill(0);
    begin_to_retire(&path);
    assert!(is_full(&attach(&other, "new").unwrap_err()));
    let used = 100;
    for i in 1..=used {
        source.store(i, SeqCst);
        assert!(sync.is_expired() && elsewhere.is_expired());
        assert_eq!(*cached.get().unwrap(), i, "not what the source says");
        assert_eq!(sync.ticket().generation(), None);
        // An update is not lost without a word.
        assert!(is_full(&sync.mark_updated().unwrap_err()));
        assert!(is_full(&sync.refresh().unwrap_err()));
        let error = sync.update(|| -> Result<(), Error> { unreachable!() }).unwrap_err();
        assert!(matches!(&error, UpdateError::Begin(error) if is_full(error)), "{error}");
        for error in [attach(&table, "key").unwrap_err(), Table::open(&path).unwrap_err(), table.reset().unwrap_err()] {
            assert!(is_full(&error) && error.path() == Some(&path), "{error}");
        }
    }
    assert_eq!(cached.counters().reloads, 1 + used, "one load for each use, and no more");
    assert_eq!(names(disk.0.path()).len(), 2, "unfinished files pile up");
    drop(ballast);
    // What is announced now reaches those who have not noticed yet that there is room.
    let announced = sync.mark_updated().unwrap();
    assert!(announced > before, "a generation has come again");
    assert!(elsewhere.is_expired());
    while elsewhere.ticket().generation().is_none() {}
    assert!(elsewhere.is_expired());
    assert_eq!(elsewhere.refresh().unwrap(), announced);
    source.store(7, SeqCst);
    sync.mark_updated().unwrap();
    assert_eq!(*cached.get().unwrap(), 7);
    assert!(elsewhere.is_expired());
    cached.get().unwrap();
    assert!(!cached.synchronizer().is_expired(), "a storm of loads");
    sync.refresh().unwrap();
    assert_recovered(&table, &[sync, elsewhere]);
}

// Descriptors.

/// All descriptors that this process may have, but those that it was told to leave.
struct Hoard(#[expect(dead_code, reason = "holds them")] Vec<OwnedFd>);

fn free_descriptors() -> Vec<OwnedFd> {
    std::iter::from_fn(|| dup(std::io::stderr()).ok()).collect()
}

impl Hoard {
    fn leaving(free: usize) -> Self {
        limit(Resource::RLIMIT_NOFILE, 400);
        let mut all = free_descriptors();
        all.truncate(all.len() - free);
        Self(all)
    }
}

/// What an operation finds, in a process that has few descriptors.
struct Poor {
    path: PathBuf,
    table: Table,
    sync: GenerationSynchronizer,
    cached: Cached<u64>,
    /// Another table's key.
    foreign: GenerationSynchronizer,
    /// As another process has it.
    elsewhere: Table,
    anonymous: GenerationSynchronizer,
}

impl Poor {
    fn new(path: &Path) -> Self {
        let open = |name| Table::options().capacity(4).open(path.with_file_name(name)).unwrap();
        let table = Table::options().capacity(4).open(path).unwrap();
        Self {
            path: path.to_owned(),
            sync: attach(&table, "0").unwrap(),
            cached: Cached::new(attach(&table, "0").unwrap(), || Ok::<_, Error>(7)),
            foreign: attach(&open("foreign"), "0").unwrap(),
            elsewhere: Table::open(path).unwrap(),
            anonymous: attach(&Table::options().anonymous().unwrap(), "0").unwrap(),
            table,
        }
    }
}

struct Operation {
    name: &'static str,
    /// How many descriptors it needs, for a time.
    needs: usize,
    before: fn(&Poor),
    run: fn(&Poor) -> Result<(), Error>,
}

const fn operation(name: &'static str, needs: usize, run: fn(&Poor) -> Result<(), Error>) -> Operation {
    Operation { name, needs, before: |_| (), run }
}

fn begun<T>(result: Result<T, UpdateError<Error>>) -> Result<(), Error> {
    match result {
        Ok(_) => Ok(()),
        Err(UpdateError::Begin(error)) => Err(error),
        Err(error) => panic!("an update that had begun needed more: {error}"),
    }
}

const OPERATIONS: &[Operation] = &[
    operation("open", 3, |poor| Table::open(&poor.path).map(drop)),
    operation("open to read", 2, |poor| Table::options().read_only(true).open(&poor.path).map(drop)),
    operation("create", 3, |poor| Table::open(poor.path.with_file_name("new")).map(drop)),
    operation("anonymous", 1, |_| Table::options().anonymous().map(drop)),
    operation("attach", 0, |poor| attach(&poor.table, "0").map(drop)),
    operation("grow", 0, |poor| (0..200).try_for_each(|i| attach(&poor.table, format!("new{i}")).map(drop))),
    operation("mark_updated", 0, |poor| poor.sync.mark_updated().map(drop)),
    operation("clear", 0, |poor| poor.sync.clear()),
    operation("check", 0, |poor| {
        poor.cached.synchronizer().mark_updated()?;
        assert!(poor.sync.is_expired());
        poor.sync.refresh()?;
        assert!((0..1000).all(|_| !poor.sync.is_expired()));
        Ok(())
    }),
    operation("generation", 0, |poor| poor.table.generation("0").map(drop)),
    operation("stats", 0, |poor| {
        assert_eq!((poor.table.stats().keys, poor.table.slots().count()), (1, 1));
        Ok(())
    }),
    operation("Cached::get", 0, |poor| {
        poor.sync.mark_updated()?;
        poor.cached.get().map(|value| assert_eq!(*value, 7))
    }),
    operation("update", 1, |poor| begun(poor.sync.update(|| Ok(())))),
    operation("update of an anonymous table", 1, |poor| begun(poor.anonymous.update(|| Ok(())))),
    operation("Cached::update", 1, |poor| begun(poor.cached.update(|| Ok(())))),
    operation("begin_update, abandon", 1, |poor| poor.sync.begin_update().map(|update| update.abandon())),
    operation("begin_update, finish", 1, |poor| poor.sync.begin_update()?.finish().map(drop)),
    operation("update_all", 3, |poor| {
        let other = attach(&poor.table, "other")?;
        let before = (poor.sync.sync_gen(), other.sync_gen());
        let result = begun(update_all(&[&poor.sync, &poor.foreign, &other], || Ok(())));
        let after = (attach(&poor.table, "0")?.sync_gen(), attach(&poor.table, "other")?.sync_gen());
        assert_eq!(before == after, result.is_err(), "some were announced, others not");
        result
    }),
    operation("reset", 4, |poor| {
        let result = poor.table.reset();
        assert_eq!(poor.sync.is_expired(), result.is_ok(), "{result:?}");
        result
    }),
    operation("reset of an anonymous table", 0, |poor| poor.anonymous.table().reset()),
    operation("wait", 0, |poor| {
        let soon = Duration::from_millis(1);
        assert!(!poor.sync.wait_timeout(soon).is_changed());
        assert!(WaitSet::from_iter([&poor.sync, &poor.foreign]).wait_timeout(soon).is_empty());
        poor.cached.synchronizer().mark_updated()?;
        poor.sync.wait();
        assert_eq!(WaitSet::from_iter([&poor.foreign, &poor.sync]).wait(), [1]);
        Ok(())
    }),
    operation("watch", 0, |poor| {
        let mut watch = poor.table.watch();
        poor.sync.mark_updated()?;
        assert_eq!(watch.next().unwrap().label(), "0");
        Ok(())
    }),
    operation("pollable", 1, |poor| poor.sync.pollable().map(drop)),
    Operation {
        name: "attach to a successor",
        needs: 3,
        before: |poor| poor.elsewhere.reset().unwrap(),
        run: |poor| {
            assert!(poor.sync.is_expired());
            poor.sync.refresh().map(drop)
        },
    },
    Operation {
        name: "mark_updated in a successor",
        needs: 3,
        before: |poor| poor.elsewhere.reset().unwrap(),
        run: |poor| poor.sync.mark_updated().map(drop),
    },
];

#[test]
fn each_operation_succeeds_or_fails_whole_however_few_descriptors_are_left() {
    for Operation { name, needs, before, run } in OPERATIONS {
        for free in 0..=*needs {
            let (_folder, path) = path();
            in_child(|| {
                let poor = Poor::new(&path);
                before(&poor);
                let hoard = Hoard::leaving(free);
                let result = run(&poor);
                let left = free_descriptors().len();
                drop(hoard);
                limit(Resource::RLIMIT_NOFILE, 1000);
                match result {
                    Ok(()) => assert_eq!(free, *needs, "{name} is content with fewer"),
                    Err(error) => {
                        assert!(free < *needs, "{name} with {free}: {error}");
                        assert!(matches!(error.kind(), ErrorKind::System { .. }), "{name}: {error:?}");
                        let cause = error.source().unwrap().to_string();
                        assert!(cause.contains("Too many open files"), "{name}: {error:?}");
                        assert_eq!(error.path().is_none(), *name == "anonymous", "{name}: {error:?}");
                    }
                }
                assert_eq!(left, free, "{name} leaks descriptors");
                for table in [&poor.table, poor.foreign.table(), poor.anonymous.table()] {
                    assert!(table.slots().all(|slot| slot.pending() == 0), "{name} leaves an update pending");
                }
                assert_recovered(&poor.table, &[poor.sync]);
                assert_works(poor.anonymous.table(), &[attach(poor.anonymous.table(), "0").unwrap()]);
            })
            .succeeds();
        }
    }
}

/// Waits until `sync` is expired. Checks it as a busy program does.
fn await_expiry(sync: &GenerationSynchronizer) -> Duration {
    let start = Instant::now();
    while !sync.is_expired() {
        assert!(start.elapsed() < support::LIMIT, "never noticed");
        std::thread::yield_now();
    }
    start.elapsed()
}

#[test]
fn a_deleted_file_is_noticed_by_who_can_open_nothing() {
    let privileges_dropped = || nix::unistd::setuid(Uid::from_raw(STRANGER)).unwrap();
    let descriptors_gone = || std::mem::forget(Hoard::leaving(0));
    let ways: [&dyn Fn(); 2] = [&descriptors_gone, &privileges_dropped];
    for (way, poverty) in ways.into_iter().enumerate() {
        if way == 1 && !Uid::effective().is_root() {
            eprintln!("not root: no privileges to drop");
            continue;
        }
        let (_folder, path) = path();
        let table = Table::open(&path).unwrap();
        let sync = attach(&table, "key").unwrap();
        let words = shared_words(2);
        let (ready, deleted) = (&words[0], &words[1]);
        let child = in_child(|| {
            poverty();
            ready.store(1, SeqCst);
            await_value(deleted, 1);
            await_expiry(&sync);
            assert!(sync.refresh().is_err() && sync.is_expired());
        });
        await_value(ready, 1);
        fs::remove_file(&path).unwrap();
        let new = attach(&Table::open(&path).unwrap(), "key").unwrap();
        new.mark_updated().unwrap();
        deleted.store(1, SeqCst);
        child.succeeds();
        await_expiry(&sync);
        assert_eq!(sync.refresh().unwrap(), attach(new.table(), "key").unwrap().sync_gen().unwrap());
    }
}

// Sizes.

/// Runs `test` with each kind of table.
fn kinds(capacity: u64, mut test: impl FnMut(Table)) {
    KINDS.iter().for_each(|kind| test(Place::new(*kind).open(Table::options().capacity(capacity))));
}

/// The sizes of a table with one segment, two, and so on.
fn sizes(capacity: u64, count: u32) -> Vec<u64> {
    let table = Table::options().capacity(capacity).anonymous().unwrap();
    let mut syncs = Vec::new();
    (1..=count)
        .map(|segments| {
            grow(&table, segments, &mut syncs);
            table.stats().bytes
        })
        .collect()
}

#[test]
fn no_signal_ends_a_process_that_would_exceed_its_file_size() {
    let sizes = sizes(16, 8);
    // With the signal's default action.
    let allow = |size| limit(Resource::RLIMIT_FSIZE, size);
    in_child(|| {
        let folder = tempfile::tempdir().unwrap();
        for size in [0, 1, 4095, 4096, sizes[0] - 1] {
            allow(size);
            for made in [
                Table::options().capacity(16).open(folder.path().join("table")),
                Table::options().capacity(16).anonymous(),
            ] {
                let error = made.unwrap_err();
                assert!(is_full(&error) && error.to_string().contains("ulimit -f"), "{error}");
            }
            assert_eq!(names(folder.path()).len(), 0);
        }
        for (segments, size) in (1..).zip(&sizes[1..7]) {
            allow(size - 1);
            kinds(16, |table| {
                let mut syncs = Vec::new();
                let error = attach_all(&table, &mut syncs);
                assert!(is_full(&error) && error.to_string().contains("ulimit"), "{error}");
                assert_eq!((error.path(), table.stats().segments), (table.path(), segments));
                assert_works(&table, &syncs);
                if table.path().is_some() {
                    // A successor begins small.
                    table.reset().unwrap();
                    assert_works(&table, &syncs[..1]);
                    syncs.clear();
                    attach_all(&table, &mut syncs);
                }
                // Others are as long as they will ever be.
                let may_grow = table.path().is_some_and(|path| !path.starts_with("/dev/shm"));
                allow(*size);
                assert!(is_full(&attach_all(&table, &mut syncs)));
                assert_eq!(table.stats().segments, segments + u32::from(may_grow));
                assert_works(&table, &syncs);
                allow(size - 1);
            });
        }
    })
    .succeeds();
}

#[test]
fn a_file_size_limit_that_came_after_the_table_is_an_error_at_its_growth() {
    let sizes = sizes(16, 8);
    for (segments, size) in (1..).zip(&sizes[1..7]) {
        kinds(16, |table| {
            let mut syncs = vec![attach(&table, "0").unwrap()];
            in_child(|| {
                limit(Resource::RLIMIT_FSIZE, size - 1);
                let error = attach_all(&table, &mut syncs);
                assert!(is_full(&error) && error.to_string().contains("ulimit"), "{error}");
                assert_eq!(table.stats().segments, segments);
                assert_works(&table, &syncs);
            })
            .succeeds();
            grow(&table, segments + 1, &mut syncs);
            assert_works(&table, &syncs);
        });
    }
}

#[cfg(feature = "shm")]
#[test]
fn a_named_table_is_opened_under_any_file_size_limit() {
    let sizes = sizes(1024, 1);
    let name = format!("gensync-limited-{}", std::process::id());
    let path = Path::new("/dev/shm").join(&name);
    for limited in [20_000, sizes[0] - 1, sizes[0], sizes[0] + 1, 2 * sizes[0], u64::from(u32::MAX)] {
        // Made by its path, it is as long as its segments; opened by its name, it is made longer.
        let table = Table::open(&path).unwrap();
        let sync = attach(&table, "0").unwrap();
        in_child(|| {
            limit(Resource::RLIMIT_FSIZE, limited);
            let named = Table::options().named(&name).unwrap();
            attach(&named, "0").unwrap().mark_updated().unwrap();
            let error = (0..10_000).find_map(|i| attach(&named, format!("{i}")).err());
            assert!(error.as_ref().is_none_or(is_full), "{error:?}");
            assert_eq!(error.is_some(), limited < 10 * sizes[0]);
        })
        .succeeds();
        assert!(sync.is_expired());
        fs::remove_file(&path).unwrap();
        in_child(|| {
            limit(Resource::RLIMIT_FSIZE, limited);
            let made = Table::options().named(&name);
            assert_eq!(made.is_ok(), limited >= sizes[0], "{made:?}");
            assert!(made.is_ok() || is_full(&made.unwrap_err()));
        })
        .succeeds();
        let _ = fs::remove_file(&path);
    }
}

// Address space.

/// No more than `bytes` of address space are to be had from now on.
fn spare_address_space(bytes: u64) {
    let pages: u64 = fs::read_to_string("/proc/self/statm").unwrap().split(' ').next().unwrap().parse().unwrap();
    limit(Resource::RLIMIT_AS, pages * 4096 + bytes);
}

/// Opens with no more than `bytes` of address space to spare.
fn open_in(bytes: u64, path: &Path) -> Result<Table, Error> {
    spare_address_space(bytes);
    let table = Table::options().capacity(16).open(path);
    limit(Resource::RLIMIT_AS, getrlimit(Resource::RLIMIT_AS).unwrap().1);
    table
}

#[test]
fn with_little_address_space_a_table_grows_less_and_works() {
    for power in 12..24 {
        let (_folder, path) = path();
        in_child(|| {
            let table = match open_in(1 << power, &path) {
                Ok(table) => table,
                Err(error) => {
                    assert!(power < 14 && matches!(error.kind(), ErrorKind::System { .. }), "{power}: {error:?}");
                    assert_eq!(error.path(), Some(&*path));
                    Table::options().capacity(16).open(&path).unwrap();
                    return;
                }
            };
            let mut syncs = Vec::new();
            let error = attach_all(&table, &mut syncs);
            assert!(is_full(&error) && error.to_string().contains("ulimit -v"), "{error}");
            assert!(table.stats().bytes <= 1 << power);
            assert_works(&table, &syncs[..syncs.len().min(100)]);
            // Who has more lets it grow: then new keys may stand where this process cannot see them.
            let great = Table::open(&path).unwrap();
            grow(&great, table.stats().segments + 1, &mut syncs);
            let error = attach(&table, "one more").unwrap_err();
            assert!(error.to_string().contains("ulimit -v") && error.path() == Some(&path), "{error}");
            assert!(attach(&great, "0").unwrap().mark_updated().is_ok() && syncs[0].is_expired());
            // What cannot be swept is not begun to be retired.
            assert!(table.reset().unwrap_err().to_string().contains("ulimit -v"));
            syncs.iter().for_each(|sync| _ = sync.refresh().unwrap());
            drop(Table::open(&path).unwrap());
            assert!(syncs.iter().all(|sync| !sync.is_expired()), "a reset that failed has changed something");
            great.reset().unwrap();
            assert!(syncs.iter().all(GenerationSynchronizer::is_expired));
            assert_works(&table, &syncs[..1]);
        })
        .succeeds();
    }
}

#[test]
fn who_cannot_map_all_of_a_table_notices_that_it_is_deleted() {
    let (_folder, path) = path();
    in_child(|| {
        let table = open_in(1 << 16, &path).unwrap();
        let sync = attach(&table, "0").unwrap();
        let great = Table::open(&path).unwrap();
        grow(&great, 10, &mut Vec::new());
        drop(great);
        fs::remove_file(&path).unwrap();
        let new = attach(&Table::open(&path).unwrap(), "0").unwrap();
        await_expiry(&sync);
        sync.refresh().unwrap();
        new.mark_updated().unwrap();
        assert!(sync.is_expired());
    })
    .succeeds();
}

#[test]
fn tables_are_opened_until_there_is_no_address_space_left() {
    let (_folder, path) = path();
    let sync = attach(&Table::open(&path).unwrap(), "key").unwrap();
    in_child(|| {
        spare_address_space((8 << 30) + (300 << 20));
        let tables: Vec<_> = std::iter::from_fn(|| Table::open(&path).ok()).take(50).collect();
        assert!(tables.len() > 3, "less room for growth, not none");
        assert!(tables.iter().all(|table| attach(table, "key").is_ok()));
        assert!(tables.iter().all(|table| attach(table, "key").unwrap().mark_updated().is_ok()));
    })
    .succeeds();
    assert!(sync.is_expired());
}

// Threads.

#[test]
fn without_a_thread_there_is_an_error_and_later_a_thread() {
    if !Uid::effective().is_root() {
        eprintln!("not root: the limit of another user cannot be reached");
        return;
    }
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let (sync, writer) = (attach(&table, "key").unwrap(), attach(&table, "key").unwrap());
    in_child(|| {
        nix::unistd::setuid(Uid::from_raw(STRANGER)).unwrap();
        // This process is the one.
        limit(Resource::RLIMIT_NPROC, 1);
        for _ in 0..100 {
            let error = sync.pollable().unwrap_err();
            assert!(error.to_string().contains("thread"), "{error}");
            assert_eq!(error.path(), Some(&*path));
            assert!(error.source().unwrap().to_string().contains("temporarily unavailable"), "{error:?}");
            #[cfg(feature = "tokio")]
            {
                let error = poll(sync.changed()).map(Result::unwrap_err);
                assert!(
                    matches!(&error, std::task::Poll::Ready(error) if error.to_string().contains("thread")),
                    "{error:?}"
                );
                let mut changes = sync.changes();
                let item = poll(std::future::poll_fn(|context| {
                    tokio_stream::Stream::poll_next(std::pin::Pin::new(&mut changes), context)
                }));
                assert!(matches!(item, std::task::Poll::Ready(Some(Err(_)))), "{item:?}");
            }
        }
        assert!(!sync.is_expired() && !sync.wait_timeout(Duration::from_millis(1)).is_changed());
        limit(Resource::RLIMIT_NPROC, getrlimit(Resource::RLIMIT_NPROC).unwrap().1);
        let pollable = sync.pollable().unwrap();
        writer.mark_updated().unwrap();
        while !pollable.acknowledge() {
            std::thread::yield_now();
        }
        // News needs no thread.
        limit(Resource::RLIMIT_NPROC, 1);
        drop(pollable);
        #[cfg(feature = "tokio")]
        assert!(matches!(poll(sync.changed()), std::task::Poll::Ready(Ok(()))));
    })
    .succeeds();
}

#[cfg(feature = "tokio")]
fn poll<T>(future: impl Future<Output = T>) -> std::task::Poll<T> {
    std::pin::pin!(future).poll(&mut std::task::Context::from_waker(std::task::Waker::noop()))
}

// Memory.

/// A group whose processes may use so much memory, together with what they put into files that are kept in memory.
struct MemoryGroup(PathBuf);

impl MemoryGroup {
    fn new(name: &str, bytes: u64) -> Option<Self> {
        let folder = Path::new("/sys/fs/cgroup/memory");
        if !Uid::effective().is_root() || !folder.join("memory.limit_in_bytes").exists() {
            eprintln!("skipped, as memory groups (of version 1) cannot be had here");
            return None;
        }
        let group = Self(folder.join(format!("gensync-test-{}-{name}", std::process::id())));
        fs::create_dir(&group.0).unwrap();
        fs::write(group.0.join("memory.limit_in_bytes"), bytes.to_string()).unwrap();
        Some(group)
    }

    fn join(&self) {
        fs::write(self.0.join("cgroup.procs"), std::process::id().to_string()).unwrap();
    }

    fn kill_nobody(&self) {
        fs::write(self.0.join("memory.oom_control"), "1").unwrap();
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_process_that_is_killed_for_want_of_memory_as_it_grows_a_table_leaves_it_whole() {
    let Some(disk) = Mount::tmpfs("size=256m") else { return };
    for megabytes in [3, 4, 5] {
        let path = disk.path(&format!("{megabytes}"));
        let table = Table::options().capacity(64).open(&path).unwrap();
        let survivor = attach(&table, "0").unwrap();
        let Some(group) = MemoryGroup::new(&format!("killed-{megabytes}"), megabytes << 20) else { return };
        let child = in_child(|| {
            group.join();
            for i in 0..1_000_000 {
                attach(&table, format!("{i}")).unwrap().mark_updated().unwrap();
            }
        });
        assert!(child.ends_by_kill());
        let stats = table.stats();
        assert!(stats.keys > 1000 && stats.bytes < (megabytes << 20) + (1 << 20), "{stats:?}");
        assert!(survivor.is_expired());
        survivor.refresh().unwrap();
        assert_recovered(&table, &[survivor]);
    }
}

#[test]
fn growth_beyond_the_memory_of_a_group_that_kills_nobody_is_an_error() {
    let Some(disk) = Mount::tmpfs("size=256m") else { return };
    let path = disk.path("table");
    let table = Table::options().capacity(64).open(&path).unwrap();
    let survivor = attach(&table, "0").unwrap();
    let Some(group) = MemoryGroup::new("refused", 5 << 20) else { return };
    group.kill_nobody();
    in_child(|| {
        group.join();
        let error = (0..1_000_000).find_map(|i| attach(&table, format!("{i}")).err()).unwrap();
        assert!(error.path() == Some(&path) && error.key().is_some(), "{error}");
        assert!(error.source().unwrap().to_string().contains("memory"), "{error:?}");
        assert!(matches!(error.kind(), ErrorKind::System { .. }), "{error:?}");
        survivor.mark_updated().unwrap();
    })
    .succeeds();
    assert!(survivor.is_expired());
    survivor.refresh().unwrap();
    assert_recovered(&table, &[survivor]);
}

// File systems that change, or go away.

/// Whether `error` says that the table is on a disk that cannot be written to.
fn is_read_only(error: &Error) -> bool {
    *error.kind() == ErrorKind::ReadOnlyFileSystem
}

#[test]
fn a_read_only_mount_is_told() {
    let Some(disk) = Mount::tmpfs("size=1m") else { return };
    let path = disk.path("table");
    let table = Table::options().capacity(16).open(&path).unwrap();
    let sync = attach(&table, "key").unwrap();
    // Nobody can make it read-only while a table there is open for writing.
    assert_eq!(disk.remount(MsFlags::MS_RDONLY, ""), Err(nix::errno::Errno::EBUSY));
    assert_recovered(&table, &[sync]);
    drop(table);
    disk.remount(MsFlags::MS_RDONLY, "").unwrap();
    for error in [Table::open(&path).unwrap_err(), Table::open(disk.path("new")).unwrap_err()] {
        assert!(is_read_only(&error) && error.path().is_some(), "{error}");
    }
    let table = Table::options().read_only(true).open(&path).unwrap();
    let sync = attach(&table, "key").unwrap();
    assert!(!sync.is_expired() && !sync.wait_timeout(Duration::from_millis(1)).is_changed());
    disk.remount(MsFlags::empty(), "").unwrap();
    let writer = Table::open(&path).unwrap();
    attach(&writer, "key").unwrap().mark_updated().unwrap();
    assert!(sync.is_expired());
    assert_recovered(&writer, &[attach(&writer, "key").unwrap()]);
}

/// A disk that reported an error is made read-only, whoever has files open there.
#[test]
fn a_disk_that_failed_under_a_table_is_an_error_for_what_needs_the_disk() {
    let Some(disk) = Mount::ext4(8 << 20) else { return };
    let path = disk.path("table");
    let table = Table::options().capacity(16).open(&path).unwrap();
    let mut syncs = Vec::new();
    grow(&table, 2, &mut syncs);
    // What was written goes to the disk, and the next write begins anew.
    nix::unistd::syncfs(File::open(disk.0.path()).unwrap().as_fd()).unwrap();
    if disk.remount(MsFlags::empty(), "abort").is_err() {
        eprintln!("skipped, as the disk cannot be told to fail");
        return;
    }
    in_child(|| {
        let error = attach_all(&table, &mut syncs);
        assert!(is_read_only(&error) && error.path() == Some(&path), "{error:?}");
        for error in
            [table.reset().unwrap_err(), Table::open(&path).unwrap_err(), Table::open(disk.path("new")).unwrap_err()]
        {
            assert!(is_read_only(&error) && error.path().is_some(), "{error:?}");
        }
        assert!(syncs.iter().all(|sync| !sync.is_expired()), "a reset that failed has changed something");
        for sync in &syncs {
            sync.mark_updated().unwrap();
            assert!(!sync.is_expired());
        }
        let error = syncs[0].update(|| -> Result<(), Error> { unreachable!() }).unwrap_err();
        assert!(matches!(&error, UpdateError::Begin(error) if is_read_only(error)), "{error:?}");
        let reader = Table::options().read_only(true).open(&path).unwrap();
        assert_eq!(attach(&reader, "0").unwrap().sync_gen(), syncs[0].sync_gen());
    })
    .succeeds();
}

#[test]
fn a_folder_that_is_removed_under_a_table_expires_everything_until_it_is_back() {
    let (folder, _) = path();
    let home = folder.path().join("home");
    let path = home.join("table");
    fs::create_dir(&home).unwrap();
    let table = Table::open(&path).unwrap();
    let other = Table::open(&path).unwrap();
    let (sync, elsewhere) = (attach(&table, "key").unwrap(), attach(&other, "key").unwrap());
    let cached = Cached::new(attach(&table, "key").unwrap(), || Ok::<_, Error>(()));
    cached.get().unwrap();
    let before = sync.sync_gen().unwrap();
    fs::remove_dir_all(&home).unwrap();
    await_expiry(&sync);
    for i in 1..=20 {
        assert!(sync.is_expired() && elsewhere.is_expired());
        cached.get().unwrap();
        assert_eq!(cached.counters().reloads, 1 + i);
        for error in [sync.mark_updated(), sync.refresh()].map(Result::unwrap_err) {
            assert!(*error.kind() == ErrorKind::NotFound && error.path() == Some(&path), "{error}");
        }
        for error in [attach(&table, "new").unwrap_err(), table.reset().unwrap_err(), Table::open(&path).unwrap_err()] {
            assert!(*error.kind() == ErrorKind::NotFound && error.path() == Some(&path), "{error}");
        }
    }
    fs::create_dir(&home).unwrap();
    let announced = sync.mark_updated().unwrap();
    assert!(announced > before, "a generation has come again");
    assert!(elsewhere.is_expired());
    assert_eq!(elsewhere.refresh().unwrap(), announced);
    assert_recovered(&table, &[sync]);
}

#[test]
fn a_folder_that_is_closed_to_the_process_changes_nothing_for_what_is_open() {
    if !Uid::effective().is_root() {
        eprintln!("not root: no privileges to drop");
        return;
    }
    for mode in [0o555, 0o111, 0o000] {
        let (folder, path) = path();
        let table = Table::options().capacity(4).mode(0o666).open(&path).unwrap();
        let mut syncs = vec![attach(&table, "0").unwrap()];
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(mode)).unwrap();
        in_child(|| {
            nix::unistd::setuid(Uid::from_raw(STRANGER)).unwrap();
            grow(&table, 5, &mut syncs);
            assert_works(&table, &syncs);
            let error = table.reset().unwrap_err();
            assert!(*error.kind() == ErrorKind::Permission && error.path() == Some(&path), "{error}");
            assert!(syncs.iter().all(|sync| !sync.is_expired()), "a reset that failed has changed something");
            // A file that cannot be seen is not taken for gone.
            let end = Instant::now() + Duration::from_millis(1100);
            while Instant::now() < end {
                assert!(!syncs[0].is_expired());
            }
        })
        .succeeds();
        // Seen by who may.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
        assert!(syncs[0].is_expired());
        assert_recovered(&table, &syncs);
    }
}

#[test]
fn a_table_whose_file_system_is_unmounted_under_it_goes_on_until_that_is_mounted_again() {
    let Some(disk) = Mount::tmpfs("size=2m") else { return };
    let path = disk.path("table");
    let table = Table::options().capacity(4).open(&path).unwrap();
    let other = Table::open(&path).unwrap();
    let mut syncs = vec![attach(&table, "0").unwrap()];
    let elsewhere = attach(&other, "0").unwrap();
    umount2(disk.0.path(), MntFlags::MNT_DETACH).unwrap();
    let end = Instant::now() + Duration::from_millis(1100);
    while Instant::now() < end {
        assert!(!syncs[0].is_expired() && !elsewhere.is_expired());
    }
    grow(&table, 5, &mut syncs);
    assert_works(&table, &syncs);
    assert!(elsewhere.is_expired());
    elsewhere.refresh().unwrap();
    // There is nothing at the path to replace.
    let error = table.reset().unwrap_err();
    assert!(*error.kind() == ErrorKind::NotFound && error.path() == Some(&path), "{error}");
    assert!(syncs.iter().all(|sync| !sync.is_expired()), "a reset that failed has changed something");
    // Whoever comes now makes another table, which is not this one.
    let stranger = attach(&Table::open(&path).unwrap(), "0").unwrap();
    stranger.mark_updated().unwrap();
    assert!(!syncs[0].is_expired());
    fs::remove_file(&path).unwrap();
}

// Places that are not there.

/// Runs `work` in a process without /proc, and without /dev/shm.
fn in_bare_system(work: impl FnOnce()) {
    if !Uid::effective().is_root() {
        eprintln!("not root: nothing can be unmounted");
        return;
    }
    in_child(|| {
        support::keep_mounts_apart();
        for place in ["/proc", "/dev/shm"] {
            // Several may lie over one another.
            while umount2(place, MntFlags::MNT_DETACH).is_ok() {}
        }
        assert!(!Path::new("/proc/self").exists());
        work();
    })
    .succeeds();
}

#[test]
fn without_proc_all_works_but_updates_of_anonymous_tables() {
    let (folder, path) = path();
    let inherited = Table::options().anonymous().unwrap();
    in_bare_system(|| {
        let table = Table::options().capacity(4).open(&path).unwrap();
        assert_recovered(&table, &[attach(&table, "0").unwrap()]);
        assert_eq!(names(folder.path()), ["table.gensync"], "unfinished files are left behind");
        for table in [&inherited, &Table::options().capacity(4).anonymous().unwrap()] {
            let mut syncs = vec![attach(table, "0").unwrap()];
            let error = syncs[0].update(|| -> Result<(), Error> { unreachable!() }).unwrap_err();
            let UpdateError::Begin(error) = error else { panic!("{error:?}") };
            assert!(error.to_string().contains("/proc"), "{error}");
            grow(table, 2, &mut syncs);
            syncs.iter().for_each(|sync| _ = sync.mark_updated().unwrap());
            assert!(syncs.iter().all(|sync| !sync.is_expired()));
            assert!(table.slots().all(|slot| slot.pending() == 0));
            table.reset().unwrap();
            assert!(syncs.iter().all(GenerationSynchronizer::is_expired));
        }
        #[cfg(feature = "shm")]
        if let Err(error) = Table::options().named("gensync-bare") {
            assert_eq!((error.kind(), error.path()), (&ErrorKind::NotFound, Some(Path::new("/dev/shm/gensync-bare"))));
        } else {
            // There is a folder below what was mounted there.
            fs::remove_file("/dev/shm/gensync-bare").unwrap();
        }
    });
    let table = Table::options().create(false).open(&path).unwrap();
    assert_recovered(&table, &[attach(&table, "0").unwrap()]);
}

//! Guards against a table that is retired and cannot be replaced: by processes without the right to, where a file stays what it is,
//! and by other processes that put things into its folder.

mod support;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use gensync::{ErrorKind, GenerationSynchronizer, OwnerCheck, Table};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use nix::sys::statvfs::statvfs;
use nix::unistd::{Uid, mkfifo, setuid};
use support::{await_value, in_child, keep_all_files, lock_for_replacing, path, shared_words};

const STRANGER: u32 = 54_321;

fn attach(table: &Table) -> GenerationSynchronizer {
    GenerationSynchronizer::new(table, "key").unwrap()
}

fn is_root() -> bool {
    let is_root = Uid::effective().is_root();
    if !is_root {
        eprintln!("skipped, as only root may become another user, or mount");
    }
    is_root
}

fn stranger(work: impl FnOnce()) -> support::Child {
    in_child(|| {
        setuid(Uid::from_raw(STRANGER)).unwrap();
        work();
    })
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// A table that every user may write, in a folder with that mode.
fn public_table(mode: u32) -> (tempfile::TempDir, PathBuf) {
    let (folder, path) = path();
    set_mode(folder.path(), mode);
    drop(attach(&Table::options().mode(0o666).open(&path).unwrap()));
    (folder, path)
}

fn open(path: &Path) -> Table {
    Table::options().owner(OwnerCheck::Anyone).open(path).unwrap()
}

/// Asserts that the table at `path` can only be expired in place, and that the error gives `reason`.
fn assert_stays(path: &Path, reason: &str) {
    let (table, other) = (open(path), open(path));
    let (sync, watcher) = (attach(&table), attach(&other));
    let before = (table.info().incarnation, fs::metadata(path).unwrap().ino());
    let errors = [table.replaceable().unwrap_err(), table.remove().unwrap_err()];
    for error in errors {
        assert!(matches!(error.kind(), ErrorKind::NotReplaceable { .. }), "{error}");
        assert!(error.to_string().contains(reason) && error.path() == Some(path), "{error}");
    }
    assert!(!sync.is_expired() && !watcher.is_expired(), "a refused removal has changed something");
    sync.mark_updated().unwrap();
    assert!(watcher.is_expired(), "the table is no longer live");
    watcher.refresh().unwrap();
    let seen = sync.sync_gen();
    table.reset().unwrap();
    assert!(sync.is_expired() && watcher.is_expired());
    assert!(sync.refresh().ok() > seen);
    watcher.update(|| Ok::<_, ()>(())).unwrap();
    assert!(sync.is_expired());
    assert_eq!(
        (table.info().incarnation, fs::metadata(path).unwrap().ino()),
        before,
        "reported as another incarnation"
    );
    assert_eq!(names(path.parent().unwrap()).iter().filter(|name| name.starts_with(".gensync-")).count(), 0);
}

fn assert_is_replaced(path: &Path) {
    let table = open(path);
    let (sync, before) = (attach(&table), table.info().incarnation);
    table.replaceable().unwrap();
    table.reset().unwrap();
    assert!(sync.is_expired() && table.info().incarnation != before);
    sync.refresh().unwrap();
    assert!(!sync.is_expired());
}

fn names(folder: &Path) -> BTreeSet<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn without_a_right_to_the_folder_a_process_can_only_expire_the_table() {
    if !is_root() {
        return;
    }
    let (_folder, path) = public_table(0o755);
    stranger(|| assert_stays(&path, "may not write to the folder")).succeeds();
    let (_folder, path) = public_table(0o1777);
    stranger(|| assert_stays(&path, "is sticky")).succeeds();
    assert_is_replaced(&path);
    // It could be replaced, but the successor could not be given to the table's owner: then nothing is changed.
    let (_folder, path) = public_table(0o777);
    stranger(|| {
        let table = open(&path);
        let sync = attach(&table);
        assert!(table.replaceable().unwrap_err().to_string().contains("belongs to user 0"));
        assert_eq!(*table.reset().unwrap_err().kind(), ErrorKind::Permission);
        assert!(!sync.is_expired());
    })
    .succeeds();
}

#[test]
fn a_retiring_table_stays_as_it_is_for_a_process_that_cannot_replace_it() {
    if !is_root() {
        return;
    }
    let (_folder, path) = public_table(0o755);
    File::options().write(true).open(&path).unwrap().write_all_at(&2_u32.to_le_bytes(), 144).unwrap();
    let before = fs::read(&path).unwrap();
    stranger(|| {
        let error = Table::options().owner(OwnerCheck::Anyone).open(&path).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::NotReplaceable { .. }), "{error}");
    })
    .succeeds();
    assert!(fs::read(&path).unwrap() == before, "it was made worse");
    assert_is_replaced(&path);
}

#[test]
fn a_name_as_long_as_names_may_be_can_be_reset_and_removed() {
    let (folder, _) = path();
    let path = folder.path().join("n".repeat(255));
    assert_is_replaced(&path);
    open(&path).remove().unwrap();
    assert!(names(folder.path()).is_empty());
    // A name need not be text.
    assert_is_replaced(&folder.path().join(OsString::from_vec(vec![0xff; 255])));
}

#[test]
fn a_file_that_is_a_mount_point_is_used_and_expired_in_place() {
    if !is_root() {
        return;
    }
    let (folder, path) = path();
    let origin = folder.path().join("origin");
    drop(attach(&Table::open(&origin).unwrap()));
    fs::write(&path, "").unwrap();
    in_child(|| {
        let none = None::<&str>;
        let mounted = unshare(CloneFlags::CLONE_NEWNS)
            .and_then(|()| mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none))
            .and_then(|()| mount(Some(&origin), &path, none, MsFlags::MS_BIND, none));
        if let Err(error) = mounted {
            eprintln!("skipped, as nothing can be mounted here: {error}");
            return;
        }
        assert_stays(&path, "is a mount point");
        // Outside of the mount it is a file like any other; and the mount still shows what was there.
        assert_is_replaced(&origin);
        let error = Table::open(&path).unwrap_err();
        assert!(error.to_string().contains("is a mount point"), "{error}");
    })
    .succeeds();
}

#[test]
fn what_is_immutable_is_expired_in_place() {
    let (folder, path) = path();
    drop(attach(&Table::open(&path).unwrap()));
    for (flag, what) in [("i", folder.path()), ("a", folder.path())] {
        let chattr = |sign: &str| {
            let done = Command::new("chattr").arg(format!("{sign}{flag}")).arg(what).output();
            done.is_ok_and(|output| output.status.success())
        };
        if !chattr("+") {
            eprintln!("skipped, as this file system has no attribute {flag}");
            continue;
        }
        let result = std::panic::catch_unwind(|| assert_stays(&path, "immutable or append-only"));
        assert!(chattr("-"));
        result.unwrap();
    }
    assert_is_replaced(&path);
}

#[test]
fn what_a_sandbox_keeps_is_expired_in_place() {
    let (_folder, path) = path();
    drop(attach(&Table::open(&path).unwrap()));
    in_child(|| match keep_all_files() {
        true => assert_stays(&path, "sandbox"),
        false => eprintln!("skipped, as this kernel has no Landlock"),
    })
    .succeeds();
    assert_is_replaced(&path);
}

#[test]
fn nothing_that_a_neighbour_puts_into_the_folder_is_followed_removed_or_in_the_way() {
    if !is_root() {
        return;
    }
    let (folder, path) = public_table(0o1777);
    let folder = folder.path();
    let victim = folder.join("victim");
    drop(attach(&Table::open(&victim).unwrap()));
    let before = fs::read(&victim).unwrap();
    let hidden = |number: u32| folder.join(format!(".gensync-{number:016x}"));
    stranger(|| {
        for name in [".table.gensync.successor", ".table.gensync.0123456789abcdef", ".gensync-"] {
            fs::write(folder.join(name), "mine").unwrap();
        }
        symlink(&victim, hidden(1)).unwrap();
        mkfifo(&hidden(2), Mode::S_IRWXU).unwrap();
        fs::create_dir(hidden(3)).unwrap();
        fs::write(hidden(4), "gensync\0").unwrap();
        drop(Table::open(hidden(5)).unwrap());
        fs::hard_link(hidden(5), hidden(6)).unwrap();
    })
    .succeeds();
    let theirs = names(folder);
    assert_is_replaced(&path);
    assert_eq!(names(folder), theirs, "something was left, or removed");
    // What a killed process of this user has left there is removed, unless a process is still at work on it.
    let [left, used, text] = [7, 8, 9].map(hidden);
    drop(Table::open(&left).unwrap());
    drop(Table::open(&used).unwrap());
    fs::write(&text, "no table").unwrap();
    let at_work = File::options().write(true).open(&used).unwrap();
    lock_for_replacing(&at_work);
    assert_is_replaced(&path);
    assert!(!left.exists() && used.exists() && text.exists());
    drop(at_work);
    open(&path).remove().unwrap();
    assert!(!path.exists() && !used.exists());
    assert!(fs::read(&victim).unwrap() == before, "the target of a neighbour's link was changed");
}

/// A tmpfs of so many MiB in this process's own view.
fn small_disk(folder: &Path, size: u32) -> bool {
    let mounted = mount(Some("tmpfs"), folder, Some("tmpfs"), MsFlags::empty(), Some(&*format!("size={size}m")));
    if let Err(error) = mounted {
        eprintln!("skipped, as nothing can be mounted here: {error}");
    }
    mounted.is_ok()
}

#[test]
fn many_processes_that_check_during_a_reset_do_not_each_make_a_successor() {
    const CHECKERS: u64 = 6;
    const ROUNDS: u64 = 8;
    let folder = tempfile::tempdir().unwrap();
    // Room for a table of 17 MiB and one successor, and for half of another.
    if !small_disk(folder.path(), 42) {
        return;
    }
    let path = folder.path().join("table");
    // In a child, as those of other tests would inherit what is mapped here, and keep it; and mapped after the others were forked.
    let child = in_child(|| {
        drop(Table::options().capacity(1 << 17).open(&path).unwrap());
        let words = shared_words(3);
        let checkers: Vec<_> = (0..CHECKERS)
            .map(|_| {
                in_child(|| {
                    let table = Table::open(&path).unwrap();
                    let sync = attach(&table);
                    words[0].fetch_add(1, SeqCst);
                    for round in 1..=ROUNDS {
                        let before = table.info().incarnation;
                        // Until it has moved on, and unmapped the old table. Other processes that do so may expire the key in the new one.
                        while table.info().incarnation == before {
                            if sync.is_expired()
                                && let Err(error) = sync.refresh()
                                && *error.kind() != ErrorKind::Retired
                            {
                                words[2].fetch_add(1, SeqCst);
                            }
                        }
                        words[0].fetch_add(1, SeqCst);
                        await_value(&words[1], round);
                    }
                })
            })
            .collect();
        let table = Table::open(&path).unwrap();
        let sync = attach(&table);
        for round in 0..ROUNDS {
            await_value(&words[0], (round + 1) * CHECKERS);
            words[1].store(round, SeqCst);
            let before = table.info().incarnation;
            table.reset().unwrap_or_else(|error| panic!("round {round}: {error}, as others took the room"));
            assert_ne!(table.info().incarnation, before);
            sync.refresh().unwrap();
        }
        await_value(&words[0], (ROUNDS + 1) * CHECKERS);
        words[1].store(ROUNDS, SeqCst);
        checkers.into_iter().for_each(support::Child::succeeds);
        assert_eq!(words[2].load(SeqCst), 0, "checks found no room for successors of their own");
        let used =
            statvfs(folder.path()).map(|disk| (disk.blocks() - disk.blocks_free()) * disk.fragment_size()).unwrap();
        assert!(used < 20 << 20, "{used} bytes are used by one table");
    });
    let is_killed = child.ends_by_kill();
    umount2(folder.path(), MntFlags::MNT_DETACH).unwrap();
    assert!(!is_killed);
}

#[test]
fn a_holder_of_a_table_that_is_being_replaced_makes_no_successor_until_the_replacer_must_be_stopped() {
    let (folder, path) = path();
    let table = Table::open(&path).unwrap();
    let sync = attach(&table);
    let updater = attach(&table);
    // As a process that is stopped in a reset leaves it, with the lock.
    let file = File::options().write(true).open(&path).unwrap();
    lock_for_replacing(&file);
    file.write_all_at(&2_u32.to_le_bytes(), 144).unwrap();
    let before = (names(folder.path()), fs::metadata(&path).unwrap().ino());
    for _ in 0..3 {
        let error = GenerationSynchronizer::new(&table, "new").unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::Retired);
        // Until its key is retired, it is updated where it is.
        updater.mark_updated().unwrap();
        assert!(sync.is_expired(), "an update was not seen");
        sync.refresh().unwrap();
        assert_eq!((names(folder.path()), fs::metadata(&path).unwrap().ino()), before, "a successor was made");
    }
    let start = support::micros();
    while GenerationSynchronizer::new(&table, "new").is_err() {
        assert!(support::micros() - start < support::LIMIT.as_micros() as u64, "stuck for good");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(fs::metadata(&path).unwrap().ino() != before.1);
    while sync.refresh().is_err() {}
    assert!(!sync.is_expired());
}

/// A table that is being retired, as if a reset had missed the update that the child has in flight; the source, and the child.
fn retiring_under_an_update(path: &Path) -> (Table, GenerationSynchronizer, &'static AtomicU64, support::Child) {
    let table = Table::options().pending_limit(Duration::from_secs(5)).open(path).unwrap();
    let sync = attach(&table);
    let words = shared_words(3);
    let maker = in_child(|| {
        let sync = attach(&table);
        let _update = sync.begin_update().unwrap();
        words[1].store(1, SeqCst);
        await_value(&words[2], 1);
    });
    await_value(&words[1], 1);
    File::options().write(true).open(path).unwrap().write_all_at(&2_u32.to_le_bytes(), 144).unwrap();
    (table, sync, &words[0], maker)
}

#[test]
fn a_table_that_is_retired_under_an_update_is_not_replaced_before_that_has_ended() {
    let (_folder, path) = path();
    let (table, sync, source, maker) = retiring_under_an_update(&path);
    let before = fs::metadata(&path).unwrap().ino();
    let load = || Ok::<_, ()>(source.load(SeqCst));
    for _ in 0..3 {
        assert_eq!(*GenerationSynchronizer::new(&table, "new").unwrap_err().kind(), ErrorKind::Retired);
        assert_eq!(fs::metadata(&path).unwrap().ino(), before, "replaced under an update");
    }
    let early = sync.refresh_with(load).unwrap();
    source.store(1, SeqCst);
    maker.kill();
    while GenerationSynchronizer::new(&table, "new").is_err() {}
    assert!(fs::metadata(&path).unwrap().ino() != before);
    assert!(early == 1 || sync.is_expired(), "a maker that was killed after its commit was forgotten");
    // A process that opens the path anew waits for the maker, and no longer than the limit.
    fs::remove_file(&path).unwrap();
    let (_table, _sync, source, maker) = retiring_under_an_update(&path);
    let (there, loaded) = (&shared_words(1)[0], &shared_words(1)[0]);
    let opener = in_child(|| {
        there.store(1, SeqCst);
        drop(attach(&Table::open(&path).unwrap()));
        loaded.store(1 + source.load(SeqCst), SeqCst);
    });
    await_value(there, 1);
    std::thread::sleep(Duration::from_millis(50));
    source.store(1, SeqCst);
    maker.kill();
    opener.succeeds();
    assert_eq!(loaded.load(SeqCst), 2, "loaded through a successor that came before the maker's end");
    fs::remove_file(&path).unwrap();
    let (_table, _sync, _source, _maker) = retiring_under_an_update(&path);
    drop(attach(&Table::options().pending_limit(Duration::from_millis(100)).open(&path).unwrap()));
}

#[test]
fn a_reader_opens_a_table_that_is_reset_again_and_again() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let stop = &shared_words(1)[0];
    let resetter = in_child(|| {
        while stop.load(SeqCst) == 0 {
            table.reset().unwrap();
        }
    });
    for _ in 0..3000 {
        drop(Table::options().read_only(true).open(&path).unwrap());
    }
    stop.store(1, SeqCst);
    resetter.succeeds();
}

#[test]
fn generations_do_not_come_again_after_one_that_was_far_in_the_future() {
    let (_folder, path) = path();
    let table = Table::open(&path).unwrap();
    let sync = attach(&table);
    let present = sync.sync_gen().unwrap().get().to_le_bytes();
    let file = fs::read(&path).unwrap();
    let slot = file.chunks(8).position(|word| word == present).unwrap() as u64 * 8;
    // As a clock of the year 2300 makes them.
    let far = 10_413_792_000_000_000_u64;
    File::options().write(true).open(&path).unwrap().write_all_at(&far.to_le_bytes(), slot).unwrap();
    let mut seen = BTreeSet::new();
    for round in 0..20 {
        sync.mark_updated().unwrap();
        assert!(seen.insert(table.generation("key").unwrap().unwrap()), "round {round}: a generation came again");
        table.reset().unwrap();
        drop(attach(&table));
        let start = table.generation("key").unwrap().unwrap();
        assert!(seen.insert(start) && start.get() < 3 << 52, "round {round}: {start:?}");
    }
}

#[test]
fn the_error_of_a_first_attempt_says_what_is_wrong_with_the_path() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("no");
    for create in [true, false] {
        let error = Table::options().create(create).open(missing.join("such/folder/table")).unwrap_err();
        assert_eq!((error.kind(), error.missing_folder()), (&ErrorKind::NotFound, Some(&*missing)));
        assert!(error.to_string().contains(&format!("{} does not exist", missing.display())), "{error}");
    }
    fs::write(&missing, "").unwrap();
    let error = Table::open(missing.join("table")).unwrap_err();
    assert!(error.to_string().contains(&format!("{} is not a folder", missing.display())), "{error}");
    for (path, found) in [("", "empty"), ("/dev/shm/a\0b", "zero byte")] {
        let error = Table::open(path).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::InvalidInput { .. }), "{error}");
        assert!(error.to_string().contains(found) && !error.to_string().contains("Success"), "{error}");
    }
}

//! Guards against a process that may only read the table's file, and keeps others from writing by locks on it.

mod support;

use std::fs::{File, Permissions};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use gensync::{GenerationSynchronizer, Table};
use nix::libc;
use support::{Child, await_value, in_child, path, shared_words};

/// How a reader locks the file.
#[derive(Clone, Copy, Debug)]
enum How {
    /// As a backup may.
    Posix,
    Description,
    Flock,
}

fn sync(table: &Table) -> GenerationSynchronizer {
    GenerationSynchronizer::new(table, "key").unwrap()
}

/// Another user's process that locks all of the file, and stays.
fn reader(path: &Path, how: How) -> Child {
    let there = &shared_words(1)[0];
    let child = in_child(|| {
        nix::unistd::setgid(nix::unistd::Gid::from_raw(65_534)).unwrap();
        nix::unistd::setuid(nix::unistd::Uid::from_raw(65_534)).unwrap();
        assert!(File::options().write(true).open(path).is_err(), "this user may write");
        let file = File::open(path).unwrap();
        let lock =
            libc::flock { l_type: libc::F_RDLCK as _, l_whence: libc::SEEK_SET as _, l_start: 0, l_len: 0, l_pid: 0 };
        match how {
            How::Posix => _ = nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_SETLK(&lock)).unwrap(),
            How::Description => _ = nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).unwrap(),
            How::Flock => file.try_lock().unwrap(),
        }
        there.store(file.as_raw_fd() as u64, SeqCst);
        std::thread::sleep(Duration::MAX);
    });
    await_value(there, 1);
    child
}

#[test]
fn a_reader_holds_up_neither_an_update_nor_a_reset_nor_the_recovery_of_a_killed_maker() {
    if !nix::unistd::Uid::effective().is_root() {
        eprintln!("skipped: it takes root to be another user");
        return;
    }
    for how in [How::Posix, How::Description, How::Flock] {
        let (folder, path) = path();
        std::fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        let table = Table::options().mode(0o644).open(&path).unwrap();
        let (writer, other) = (sync(&table), sync(&table));
        let _reader = reader(&path, how);

        // It waits for nothing: no time is left for that.
        writer.try_begin_update().unwrap_or_else(|error| panic!("{how:?}: {error}")).finish().unwrap();
        assert!(other.is_expired());
        other.refresh().unwrap();

        let there = &shared_words(1)[0];
        let maker = in_child(|| {
            let sync = sync(&table);
            let _update = sync.begin_update().unwrap();
            there.store(1, SeqCst);
            std::thread::sleep(Duration::MAX);
        });
        await_value(there, 1);
        std::thread::sleep(Duration::from_millis(2));
        assert!(!other.is_expired(), "{how:?}: a living maker was taken for a dead one");
        maker.kill();
        let start = Instant::now();
        while !other.is_expired() {
            // The pending limit is 30 seconds.
            assert!(start.elapsed() < Duration::from_secs(15), "{how:?}: a killed maker is not noticed");
        }
        other.refresh().unwrap();
        assert!(!other.is_expired());

        // An update in flight is still waited for.
        let update = writer.begin_update().unwrap();
        let hasty = Table::options().pending_limit(Duration::from_millis(300)).open(&path).unwrap();
        hasty.reset().expect_err("a table was replaced under an update");
        update.finish().unwrap();
        let start = Instant::now();
        table.reset().unwrap_or_else(|error| panic!("{how:?}: {error}"));
        assert!(other.is_expired());
        assert!(start.elapsed() < Duration::from_secs(15), "{how:?}: it has waited for a reader");
    }
}

#[test]
fn a_reader_does_not_hide_that_the_file_was_deleted() {
    if !nix::unistd::Uid::effective().is_root() {
        eprintln!("skipped: it takes root to be another user");
        return;
    }
    for how in [How::Posix, How::Description] {
        let (folder, path) = path();
        std::fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        let table = Table::options().mode(0o644).open(&path).unwrap();
        let holder = sync(&table);
        let _reader = reader(&path, how);
        std::fs::remove_file(&path).unwrap();
        let start = Instant::now();
        while !holder.is_expired() {
            assert!(start.elapsed() < Duration::from_secs(15), "{how:?}: the deletion is not noticed");
        }
    }
}

#[test]
fn a_killed_maker_does_not_keep_a_reset_from_going_on_beside_a_reader() {
    if !nix::unistd::Uid::effective().is_root() {
        eprintln!("skipped: it takes root to be another user");
        return;
    }
    for how in [How::Posix, How::Description, How::Flock] {
        let (folder, path) = path();
        std::fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        let table = Table::options().mode(0o644).open(&path).unwrap();
        let reader_process = reader(&path, how);
        let there = &shared_words(1)[0];
        let maker = in_child(|| {
            let sync = sync(&table);
            let _update = sync.begin_update().unwrap();
            there.store(1, SeqCst);
            std::thread::sleep(Duration::MAX);
        });
        await_value(there, 1);
        maker.kill();
        let start = Instant::now();
        table.reset().unwrap_or_else(|error| panic!("{how:?}: {error}"));
        assert!(start.elapsed() < Duration::from_secs(15), "{how:?}: it has waited for a reader");
        reader_process.kill();
    }
}

//! Guards against an update in flight that is taken for a dead one, because the kernel's list of locks was read while other locks
//! came and went: it is given out in pieces, and a lock that ends between two of them lets another one slip through.

mod support;

use std::fs::File;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use gensync::{ErrorKind, GenerationSynchronizer, Table};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use support::{Child, in_child, path, shared_words};

fn lock(file: &File, kind: libc::c_int, start: i64, length: i64) {
    let (l_type, l_whence) = (kind as libc::c_short, libc::SEEK_SET as libc::c_short);
    let lock = libc::flock { l_type, l_whence, l_start: start, l_len: length, l_pid: 0 };
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
}

#[test]
fn an_update_in_flight_is_not_overlooked_among_locks_that_come_and_go() {
    // How many locks each of two processes has at a time: a list of one piece, and one of many.
    for count in [5, 300] {
        let (folder, path) = path();
        let table = Table::open(&path).unwrap();
        let (writer, reader) = [(); 2].map(|()| GenerationSynchronizer::new(&table, "key").unwrap()).into();
        let stop = &shared_words(1)[0];
        let others = [0, 1].map(|number| {
            let other = folder.path().join(format!("other {number}"));
            in_child(move || {
                let file = File::options().create(true).read(true).write(true).truncate(false).open(&other).unwrap();
                while stop.load(SeqCst) == 0 {
                    (0..count).for_each(|i| lock(&file, libc::F_RDLCK, 2 * i, 1));
                    (0..count).for_each(|i| lock(&file, libc::F_UNLCK, 2 * i, 1));
                }
            })
        });
        // A process that may only read the file, as a backup: only the list says what there is beside its lock.
        let backup = File::open(&path).unwrap();
        lock(&backup, libc::F_RDLCK, 0, 0);
        let end = Instant::now() + Duration::from_secs(5);
        while Instant::now() < end {
            reader.refresh().unwrap();
            let update = writer.begin_update().unwrap();
            for _ in 0..20 {
                assert!(!reader.is_expired(), "{count} locks: an update in flight was taken for a dead one");
                std::thread::sleep(Duration::from_millis(2));
            }
            update.abandon();
        }
        let update = writer.begin_update().unwrap();
        let impatient = Table::options().pending_limit(Duration::from_secs(1)).open(&path).unwrap();
        let error = impatient.reset().expect_err("reset under an update in flight");
        assert!(matches!(error.kind(), ErrorKind::Locked { .. }), "{error}");
        assert!(!reader.is_expired(), "{count} locks: reset under an update in flight");
        update.finish().unwrap();
        stop.store(1, SeqCst);
        others.into_iter().for_each(Child::succeeds);
    }
}

//! Guards against a reboot that was none: containers of one boot with boot ids of their own, or without any, must not expire
//! each other's state, nor end each other's updates.

mod support;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use gensync::{Generation, GenerationSynchronizer, Table};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use support::{Child, await_value, in_child, path, shared_words};

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What a process sees of the boot's id.
#[derive(Clone, Copy, Debug)]
enum BootView {
    /// A different id for each number.
    Id(u8),
    /// A /proc that shows processes only, as under systemd's ProcSubset=pid.
    ProcessesOnly,
    /// A /proc that hides other users' processes.
    OwnProcessesOnly,
    /// No /proc at all.
    Nothing,
}

const NOTHING_KNOWN: [BootView; 2] = [BootView::ProcessesOnly, BootView::Nothing];

/// Shows this process a boot id of its own, if the kernel lets it.
fn see(folder: &Path, view: BootView) -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    match view {
        BootView::Id(number) => {
            let file = folder.join(format!("boot-{number}"));
            fs::write(&file, format!("{number:08x}-0000-4000-8000-000000000000\n")).unwrap();
            mount(Some(&file), BOOT_ID, none, MsFlags::MS_BIND, none)
        }
        BootView::ProcessesOnly => mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), Some("subset=pid")),
        BootView::OwnProcessesOnly => mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), Some("hidepid=2")),
        BootView::Nothing => mount(Some("tmpfs"), "/proc", Some("tmpfs"), MsFlags::empty(), none),
    }
}

/// Whether each of these can be seen here.
fn can_see(folder: &Path, views: &[BootView]) -> bool {
    views.iter().all(|&view| {
        let answer = &shared_words(1)[0];
        in_child(|| answer.store(u64::from(see(folder, view).is_ok()), SeqCst)).succeeds();
        let can = answer.load(SeqCst) == 1;
        if !can {
            eprintln!("skipped, as the kernel does not let this process see {view:?}");
        }
        can
    })
}

fn container(folder: &Path, view: BootView, work: impl FnOnce()) -> Child {
    in_child(|| {
        see(folder, view).unwrap();
        work();
    })
}

fn attach(path: &Path) -> GenerationSynchronizer {
    GenerationSynchronizer::new(&Table::open(path).unwrap(), "key").unwrap()
}

/// The key's generation, as it is for a process that opens the table in a container of that kind.
fn generation(folder: &Path, view: BootView, path: &Path) -> u64 {
    let answer = &shared_words(1)[0];
    container(folder, view, || answer.store(attach(path).sync_gen().map_or(0, Generation::get), SeqCst)).succeeds();
    answer.load(SeqCst)
}

#[test]
fn an_update_of_another_container_that_is_killed_after_its_commit_is_not_lost() {
    let (folder, path) = path();
    let folder = folder.path();
    for (maker, reader) in [
        (BootView::Id(1), BootView::Id(2)),
        (BootView::Nothing, BootView::Id(2)),
        (BootView::Id(1), BootView::Nothing),
        (BootView::ProcessesOnly, BootView::Id(2)),
        (BootView::OwnProcessesOnly, BootView::Nothing),
        (BootView::Id(1), BootView::OwnProcessesOnly),
    ] {
        if !can_see(folder, &[maker, reader]) {
            continue;
        }
        let words = shared_words(3);
        let [source, maker_step, reader_step]: [&AtomicU64; 3] = [&words[0], &words[1], &words[2]];
        let maker_child = container(folder, maker, || {
            let sync = attach(&path);
            let _update = sync.begin_update().unwrap();
            maker_step.store(1, SeqCst);
            await_value(reader_step, 1);
            source.store(1, SeqCst);
            maker_step.store(2, SeqCst);
            await_value(reader_step, u64::MAX);
        });
        await_value(maker_step, 1);
        let reader_child = container(folder, reader, || {
            let sync = attach(&path);
            let seen = sync.refresh_with(|| Ok::<_, ()>(source.load(SeqCst))).unwrap();
            assert!(seen == 0 && !sync.is_expired(), "{maker:?}, {reader:?}: the update is in flight");
            reader_step.store(1, SeqCst);
            await_value(maker_step, 3);
            let start = support::micros();
            while !sync.is_expired() {
                assert!(support::micros() - start < support::LIMIT.as_micros() as u64, "{maker:?}, {reader:?}: stale");
            }
        });
        await_value(maker_step, 2);
        maker_child.kill();
        maker_step.store(3, SeqCst);
        reader_child.succeeds();
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_table_is_renewed_if_nobody_has_it_open_and_once_for_each_boot() {
    let (folder, path) = path();
    let folder = folder.path();
    if !can_see(folder, &[BootView::Id(1), BootView::Id(2)]) {
        return;
    }
    let first = generation(folder, BootView::Id(1), &path);
    assert_eq!(generation(folder, BootView::Id(1), &path), first);
    let second = generation(folder, BootView::Id(2), &path);
    assert!(second > first, "another boot's table was not renewed");
    assert_eq!(generation(folder, BootView::Id(2), &path), second);
    // Held in any way: by a process that only reads, or by a child of the process that opened it.
    for holds_read_only in [true, false] {
        let words = shared_words(2);
        let holder = container(folder, BootView::Id(2), || {
            let table = Table::options().read_only(holds_read_only).open(&path).unwrap();
            let sync = GenerationSynchronizer::new(&table, "key").unwrap();
            in_child(|| {
                words[0].store(1, SeqCst);
                await_value(&words[1], 1);
                assert!(!sync.is_expired());
            })
            .succeeds();
        });
        await_value(&words[0], 1);
        for view in [BootView::Id(1), BootView::Id(3), BootView::Id(2)] {
            assert_eq!(generation(folder, view, &path), second, "{view:?}: renewed while a process has it open");
        }
        words[1].store(1, SeqCst);
        holder.succeeds();
    }
    assert!(generation(folder, BootView::Id(3), &path) > second);
}

#[test]
fn processes_that_cannot_read_the_boot_id_do_not_expire_what_others_hold() {
    let (folder, path) = path();
    let folder = folder.path();
    for view in NOTHING_KNOWN.into_iter().filter(|view| can_see(folder, &[*view, BootView::Id(1)])) {
        let created = generation(folder, view, &path);
        // Its creator knew no boot id: the first process that knows one renews the table, the next ones find that done.
        let known = generation(folder, BootView::Id(1), &path);
        assert!(known >= created);
        assert_eq!(generation(folder, BootView::Id(1), &path), known, "{view:?}: expired again and again");
        let sync = attach(&path);
        let held = sync.sync_gen().unwrap().get();
        for _ in 0..3 {
            assert_eq!(generation(folder, view, &path), held);
            assert!(!sync.is_expired(), "{view:?}: expired by one that knows no boot");
        }
        drop(sync);
        // And the other way round: held by a process that knows no boot id.
        let words = shared_words(2);
        let holder = container(folder, view, || {
            let sync = attach(&path);
            words[0].store(1, SeqCst);
            await_value(&words[1], 1);
            assert!(!sync.is_expired(), "{view:?}: expired by one that knows a boot");
        });
        await_value(&words[0], 1);
        for id in [1, 2, 1] {
            generation(folder, BootView::Id(id), &path);
        }
        words[1].store(1, SeqCst);
        holder.succeeds();
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn updates_in_flight_are_left_alone_though_all_descriptors_were_closed() {
    let (folder, path) = path();
    // Memory that was mapped through a descriptor keeps its locks.
    leaves_updates_alone(folder.path(), &path, || Table::open(&path).unwrap());
    #[cfg(feature = "shm")]
    {
        // That of a named one was mapped through another.
        let name = format!("gensync-boots-{}", std::process::id());
        let path = Path::new("/dev/shm").join(&name);
        leaves_updates_alone(folder.path(), &path, || Table::options().named(&name).unwrap());
        fs::remove_file(path).unwrap();
    }
}

fn leaves_updates_alone(folder: &Path, path: &Path, open: impl Fn() -> Table) {
    if !can_see(folder, &[BootView::Id(1), BootView::Id(2)]) {
        return;
    }
    let words = shared_words(2);
    let maker = container(folder, BootView::Id(1), || {
        let sync = GenerationSynchronizer::new(&open(), "key").unwrap();
        // As a daemon does.
        for number in 3..1024 {
            let _ = nix::unistd::close(number);
        }
        let update = sync.begin_update().unwrap();
        words[0].store(sync.sync_gen().unwrap().get(), SeqCst);
        await_value(&words[1], 1);
        drop(update);
    });
    await_value(&words[0], 1);
    assert_eq!(generation(folder, BootView::Id(2), path), words[0].load(SeqCst), "renewed under an update");
    words[1].store(1, SeqCst);
    maker.succeeds();
}

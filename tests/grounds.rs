//! Guards against file systems and namespaces where a file is not what it seems: overlayfs, user ids that are not mapped, and
//! unknown file systems.

mod support;

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::Path;

use gensync::{ErrorKind, GenerationSynchronizer, OwnerCheck, Table, TableOptions};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Uid, setuid};
use support::in_child;

const STRANGER: u32 = 54_321;

fn attach(table: &Table) -> GenerationSynchronizer {
    GenerationSynchronizer::new(table, "key").unwrap()
}

fn reader() -> TableOptions {
    Table::options().read_only(true).owner(OwnerCheck::Anyone)
}

fn mount_at(kind: &str, folder: &Path, options: &str) -> bool {
    let mounted = mount(Some(kind), folder, Some(kind), MsFlags::empty(), Some(options));
    if let Err(error) = mounted {
        eprintln!("skipped, as {kind} cannot be mounted here: {error}");
    }
    mounted.is_ok()
}

/// Runs `test` with a folder on overlayfs; `prepare` prepares its lower layer.
fn with_overlay(prepare: impl FnOnce(&Path), test: impl FnOnce(&Path) + std::panic::UnwindSafe) {
    let base = tempfile::tempdir().unwrap();
    fs::set_permissions(base.path(), Permissions::from_mode(0o755)).unwrap();
    if !mount_at("tmpfs", base.path(), "size=64m") {
        return;
    }
    let [lower, upper, work, merged] = ["lower", "upper", "work", "merged"].map(|name| base.path().join(name));
    [&lower, &upper, &work, &merged].into_iter().for_each(|folder| fs::create_dir(folder).unwrap());
    prepare(&lower);
    let options = format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
    if mount_at("overlay", &merged, &options) {
        let result = std::panic::catch_unwind(|| test(&merged));
        umount2(&merged, MntFlags::MNT_DETACH).unwrap();
        umount2(base.path(), MntFlags::MNT_DETACH).unwrap();
        result.unwrap();
    } else {
        umount2(base.path(), MntFlags::MNT_DETACH).unwrap();
    }
}

#[test]
fn a_reader_on_overlayfs_sees_the_file_that_writers_use() {
    let prepare = |lower: &Path| drop(attach(&Table::options().mode(0o644).open(lower.join("table")).unwrap()));
    with_overlay(prepare, |merged| {
        let path = merged.join("table");
        let before = fs::read(&path).unwrap();
        let reading = reader().open(&path).unwrap();
        let sync = attach(&reading);
        assert!(!sync.is_expired() && fs::read(&path).unwrap() == before, "a reader has changed what is in the file");
        let writing = Table::open(&path).unwrap();
        for _ in 0..3 {
            attach(&writing).mark_updated().unwrap();
            assert!(sync.is_expired(), "the reader stays on the lower file");
            sync.refresh().unwrap();
            assert!(!sync.is_expired());
        }
        writing.reset().unwrap();
        let writer = attach(&writing);
        assert!(sync.is_expired());
        while sync.refresh().is_err() {}
        assert!(!sync.is_expired());
        writer.mark_updated().unwrap();
        assert!(sync.is_expired());
    });
}

#[test]
fn a_reader_on_overlayfs_that_may_not_write_is_refused_with_the_reason() {
    let prepare = |lower: &Path| drop(attach(&Table::options().mode(0o644).open(lower.join("table")).unwrap()));
    with_overlay(prepare, |merged| {
        let path = merged.join("table");
        in_child(|| {
            setuid(Uid::from_raw(STRANGER)).unwrap();
            let error = reader().open(&path).unwrap_err();
            assert_eq!((error.kind(), error.path()), (&ErrorKind::ReadOnlyOverlay, Some(&*path)));
            assert!(error.to_string().contains("overlayfs"), "{error}");
        })
        .succeeds();
    });
}

#[test]
fn a_table_on_overlayfs_of_two_file_systems_is_found_to_be_gone() {
    // There, files have other device numbers than folders.
    let [lower, upper, merged] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    in_child(|| {
        if !Uid::effective().is_root() {
            eprintln!("skipped, as only root may mount");
            return;
        }
        support::keep_mounts_apart();
        if ![&lower, &upper].into_iter().all(|folder| mount_at("tmpfs", folder.path(), "size=8m")) {
            return;
        }
        let [changes, work] = ["changes", "work"].map(|name| upper.path().join(name));
        [&changes, &work].into_iter().for_each(|folder| fs::create_dir(folder).unwrap());
        drop(attach(&Table::open(lower.path().join("old")).unwrap()));
        let layers = format!(
            "xino=off,lowerdir={},upperdir={},workdir={}",
            lower.path().display(),
            changes.display(),
            work.display()
        );
        if !mount_at("overlay", merged.path(), &layers) {
            return;
        }
        for name in ["old", "new"] {
            let path = merged.path().join(name);
            let importer = attach(&Table::open(&path).unwrap());
            let reader = attach(&Table::options().read_only(true).open(&path).unwrap());
            fs::rename(&path, merged.path().join("elsewhere")).unwrap();
            let worker = attach(&Table::open(&path).unwrap());
            importer.update(|| Ok::<_, ()>(())).unwrap();
            assert!(worker.is_expired() && reader.is_expired(), "{name}: the update reached no other process");
            for holder in [&worker, &reader] {
                holder.refresh().unwrap();
            }
            importer.mark_updated().unwrap();
            assert!(worker.is_expired() && reader.is_expired(), "{name}: they have files of their own");
        }
    })
    .succeeds();
}

#[test]
fn a_table_that_its_maker_would_refuse_is_not_made() {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o777)).unwrap();
    let path = folder.path().join("table");
    let error = Table::options().owner(OwnerCheck::User(STRANGER)).open(&path).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::WrongOwner { .. }) && error.path() == Some(&path), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "it is left behind");
    in_child(|| {
        // As a user that is not mapped: its files show as another's.
        let apart = setuid(Uid::from_raw(STRANGER)).and_then(|()| unshare(CloneFlags::CLONE_NEWUSER));
        if let Err(error) = apart {
            eprintln!("skipped, as no user namespace can be made here: {error}");
            return;
        }
        let error = Table::open(&path).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::WrongOwner { .. }), "{error}");
        if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
            let home = Path::new("/dev/shm").join(format!("gensync-{}", Uid::effective()));
            let existed = home.exists();
            let error = Table::open_default("table").unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::UnsafeFolder { .. }), "{error}");
            assert_eq!(home.exists(), existed, "a folder is left behind that is in another user's way");
        }
    })
    .succeeds();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "it is left behind");
}

#[test]
fn nobody_is_taken_for_the_owner_where_he_is_not_mapped() {
    if !Uid::effective().is_root() {
        eprintln!("skipped, as only root may give files away");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o777)).unwrap();
    let path = folder.path().join("table");
    drop(attach(&Table::options().mode(0o666).open(&path).unwrap()));
    chown(&path, Some(STRANGER), Some(STRANGER)).unwrap();
    let overflow: u32 = fs::read_to_string("/proc/sys/kernel/overflowuid").unwrap().trim().parse().unwrap();
    let default = Path::new("/dev/shm").join(format!("gensync-{overflow}"));
    let has_default = std::env::var_os("XDG_RUNTIME_DIR").is_none() && fs::create_dir(&default).is_ok();
    if has_default {
        fs::set_permissions(&default, Permissions::from_mode(0o755)).unwrap();
        chown(&default, Some(STRANGER), Some(STRANGER)).unwrap();
    }
    let child = in_child(|| {
        setuid(Uid::from_raw(STRANGER + 1)).unwrap();
        if let Err(error) = unshare(CloneFlags::CLONE_NEWUSER) {
            eprintln!("skipped, as no user namespace can be made here: {error}");
            return;
        }
        assert_eq!(Uid::effective().as_raw(), overflow, "shown as the user nobody, as no user is mapped");
        for owner in [OwnerCheck::CurrentUserOrRoot, OwnerCheck::User(overflow)] {
            let error = Table::options().owner(owner).open(&path).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::WrongOwner { found, .. } if *found == overflow), "{error}");
            assert!(error.to_string().contains("user namespace"), "{error}");
        }
        drop(Table::options().owner(OwnerCheck::Anyone).open(&path).unwrap());
        if has_default {
            let error = Table::options().create(false).open_default("table").unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::UnsafeFolder { .. }), "{error}");
            assert!(error.to_string().contains("user namespace"), "{error}");
        }
    });
    child.succeeds();
    if has_default {
        fs::remove_dir_all(&default).unwrap();
    }
    // Where the number is that of a user, that user is the owner.
    chown(&path, Some(overflow), Some(overflow)).unwrap();
    in_child(|| {
        setuid(Uid::from_raw(overflow)).unwrap();
        drop(Table::open(&path).unwrap());
    })
    .succeeds();
}

#[test]
fn a_file_system_that_nobody_knows_is_refused_by_its_number_and_local_ones_are_accepted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table");
    if mount_at("hugetlbfs", folder.path(), "") {
        let result = std::panic::catch_unwind(|| {
            let error = Table::open(&path).unwrap_err();
            assert_eq!(error.to_string().matches("0x958458f6").count(), 2, "{error}");
            assert!(matches!(error.kind(), ErrorKind::UnknownFileSystem { magic: 0x9584_58f6, .. }), "{error}");
            assert!(error.to_string().contains("allow_file_system"), "{error}");
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "a refused table has left something");
            // Whatever comes then, it is not refused for its file system.
            if let Err(error) = Table::options().allow_file_system(0x9584_58f6).open(&path) {
                assert!(!matches!(error.kind(), ErrorKind::UnknownFileSystem { .. }), "{error}");
            }
        });
        umount2(folder.path(), MntFlags::MNT_DETACH).unwrap();
        result.unwrap();
    }
    if mount_at("tmpfs", folder.path(), "size=4m") {
        drop(attach(&Table::open(&path).unwrap()));
        umount2(folder.path(), MntFlags::MNT_DETACH).unwrap();
    }
}

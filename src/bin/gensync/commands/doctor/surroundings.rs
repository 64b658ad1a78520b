//! Checks of the table's surroundings: the file system, permissions, room, other files.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::unistd::Uid;

use super::Finding;
use crate::extents::written_elsewhere;
use crate::filesystem::{self, bytes, folder};
use crate::printable::printable;
use crate::processes::name_of;

/// `size` is that of the table, in bytes.
pub(super) fn checks(path: &Path, size: u64) -> Vec<Finding> {
    let mut findings = vec![file_system(path), permissions(path), folder_permissions(path), room(path, size)];
    findings.extend(leftovers(path));
    findings
}

fn show(path: &Path) -> String {
    printable(path.display().to_string().as_bytes())
}

fn file_system(path: &Path) -> Finding {
    const CHECK: &str = "file system";
    let kind = filesystem::kind(path);
    if let Some(reason) = written_elsewhere(path, &kind) {
        let found =
            format!("{kind}: the table {reason}, so that an update kills its process (SIGBUS) when the disk is full");
        let advice = "`gensync reset` makes it anew; better put it in memory, such as /dev/shm or /run, or where no \
                      snapshots are made";
        return Finding::problem(CHECK, found, advice);
    }
    match &*kind {
        kind if filesystem::is_memory(kind) => Finding::good(CHECK, kind),
        "overlayfs" => Finding::problem(
            CHECK,
            "overlayfs: a container's own files, which no other container sees",
            "put the table on a volume in memory that all containers mount, or into /dev/shm for processes of one container",
        ),
        _ => Finding::note(
            CHECK,
            format!("{kind}: the kernel writes the table to a disk again and again, for nothing"),
            "a table need not outlive a reboot: put it in memory, such as /dev/shm or /run",
        ),
    }
}

fn permissions(path: &Path) -> Finding {
    const CHECK: &str = "permissions";
    let Ok(metadata) = fs::metadata(path) else {
        return Finding::problem(CHECK, "the file cannot be inspected", "see whether it is being replaced; try again");
    };
    let ((mode, others), owner) = (filesystem::mode(&metadata), metadata.uid());
    let found = format!("mode {mode}, of {}", name_of(owner));
    if others {
        let advice = format!("any user can forge generations: chmod o-w {}", show(path));
        return Finding::problem(CHECK, found, advice);
    }
    if metadata.mode() & 0o600 != 0o600 {
        let advice = format!("its own user cannot open it: chmod u+rw {}", show(path));
        return Finding::problem(CHECK, found, advice);
    }
    let user = Uid::effective().as_raw();
    if owner != 0 && owner != user && user != 0 {
        let advice = "processes of other users accept it only if they name that owner: TableOptions::owner";
        return Finding::note(CHECK, found, advice);
    }
    Finding::good(CHECK, found)
}

fn folder_permissions(path: &Path) -> Finding {
    const CHECK: &str = "folder";
    let folder = folder(path);
    let Ok(metadata) = fs::metadata(&folder) else {
        return Finding::problem(CHECK, "it cannot be inspected", format!("see what {} is", show(&folder)));
    };
    let (mode, others) = filesystem::mode(&metadata);
    let found = format!("{}, mode {mode}, of {}", show(&folder), name_of(metadata.uid()));
    let is_sticky = metadata.mode() & 0o1000 != 0;
    match others && !is_sticky {
        true => Finding::problem(CHECK, found, "any user can replace the table: chmod o-w, or chmod +t"),
        false => Finding::good(CHECK, found),
    }
}

fn room(path: &Path, size: u64) -> Finding {
    /// A file system with so much left is not full, however large it is.
    const PLENTY: u64 = 64 << 20;
    const CHECK: &str = "room";
    let Some(room) = filesystem::room(path) else { return Finding::good(CHECK, "no limit") };
    let found = format!("{} of {} are free", bytes(room.available), bytes(room.total));
    // The next segment is as large as all present ones together; a reset makes a second file.
    let needed = size.saturating_mul(2);
    if !room.has_inodes {
        return Finding::problem(CHECK, "no more files can be made", "remove some: a reset needs one more");
    }
    if room.available < needed || room.available < PLENTY && room.available < room.total / 20 {
        return Finding::problem(
            CHECK,
            found,
            format!(
                "new keys will be refused and a reset will fail, existing keys go on: free some room in {}{}",
                show(&folder(path)),
                if filesystem::is_memory(&filesystem::kind(path)) { ", or mount it with a greater size" } else { "" }
            ),
        );
    }
    Finding::good(CHECK, found)
}

/// Temporary files that killed processes have left beside the table.
fn leftovers(path: &Path) -> Option<Finding> {
    let prefix = format!(".{}.", path.file_name()?.to_str()?);
    let is_random = |rest: &str| rest.len() == 16 && rest.bytes().all(|byte| byte.is_ascii_hexdigit());
    let is_leftover = |name: &str| {
        name.strip_prefix(&prefix).is_some_and(|rest| rest == "successor" || is_random(rest))
            || name.strip_prefix(".gensync-").is_some_and(is_random)
    };
    let names = fs::read_dir(folder(path)).ok()?.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let names: Vec<_> = names.filter(|name| is_leftover(name)).map(|name| printable(name.as_bytes())).collect();
    let found = format!("left by killed processes, unless a reset is under way now: {}", names.join(", "));
    (!names.is_empty()).then(|| Finding::note("leftovers", found, "if they are still there in a minute, remove them"))
}

/// Other tables with the same name, where an application that asks for its default table may find them.
///
/// A login session has XDG_RUNTIME_DIR and a cron job has not, so that each of the two uses a table of its own.
pub(super) fn twins(path: &Path) -> Finding {
    const CHECK: &str = "twins";
    let Some(name) = path.file_name() else { return Finding::good(CHECK, "none") };
    let user = Uid::effective();
    let mut places = vec![format!("/run/user/{user}/gensync"), format!("/dev/shm/gensync-{user}")];
    places.extend(std::env::var("XDG_RUNTIME_DIR").ok().map(|folder| format!("{folder}/gensync")));
    for (parent, under) in [("/run/user", "gensync"), ("/dev/shm", "")] {
        let names = fs::read_dir(parent).into_iter().flatten().flatten();
        let paths = names.filter_map(|entry| entry.path().join(under).into_os_string().into_string().ok());
        places.extend(paths.filter(|path| !under.is_empty() || path.starts_with("/dev/shm/gensync-")));
    }
    let identity = |path: &Path| fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
    let (own, own_folder) = (identity(path), identity(&folder(path)));
    let mut places: Vec<PathBuf> = places.into_iter().map(PathBuf::from).collect();
    // Only the table of an application has twins there.
    let is_of_application = folder(path).file_name().is_some_and(|name| name.to_string_lossy().starts_with("gensync"));
    places.retain(|place| is_of_application && identity(place) != own_folder);
    places.sort();
    places.dedup_by_key(|place| identity(place));
    let twins = places.into_iter().map(|place| place.join(name)).filter(|twin| {
        let there = identity(twin);
        there.is_some() && there != own
    });
    let twins: Vec<_> = twins.map(|twin| show(&twin)).collect();
    match twins.is_empty() {
        true => Finding::good(CHECK, "no other table of that name where applications look"),
        false => Finding::problem(
            CHECK,
            format!("the same application has other tables: {}", twins.join(", ")),
            "processes with and without XDG_RUNTIME_DIR, or of several users, hear nothing of each other: set it alike (cron \
             and systemd units have none), or have all of them open one path; `gensync ps` for each table shows which processes use it",
        ),
    }
}

//! `ps`: who has the table mapped, who still has a deleted one, and who has another of the same name.

use std::fs;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, raise};
use nix::unistd::Uid;

use crate::support::{Child, in_child};
use crate::tool::{Place, eventually};

/// A process that has opened the table, and is stopped.
fn holder(place: &Place, before: impl FnOnce()) -> Child {
    let child = in_child(|| {
        before();
        let _table = place.table();
        raise(Signal::SIGSTOP).unwrap();
    });
    let path = format!("/proc/{}/stat", child.pid());
    eventually("waiting for a process to stop", || fs::read_to_string(&path).unwrap().contains(") T "));
    child
}

fn pids(place: &Place) -> Vec<u64> {
    place.objects(&["ps"]).iter().map(|process| process["pid"].as_u64().unwrap()).collect()
}

fn number(child: &Child) -> u64 {
    child.pid().as_raw() as u64
}

#[test]
fn processes_that_have_the_table_mapped_are_listed() {
    let place = Place::with_keys(["a"]);
    assert!(pids(&place).is_empty());
    let child = holder(&place, || {});
    let process = place.object(&["ps"]);
    assert_eq!(process["pid"], number(&child));
    assert_eq!((&process["deleted"], &process["elsewhere"]), (&false.into(), &false.into()));
    let command = fs::read_to_string("/proc/self/cmdline").unwrap().replace('\0', " ");
    assert_eq!(process["command"], command.trim());
    let age = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    let age = age - process["since"].as_f64().unwrap();
    assert!((-2.0..120.0).contains(&age), "{age}");
    if Uid::effective().is_root() {
        assert_eq!(process["user"], "root");
    }
    let text = place.run(&["ps"]);
    assert_eq!(text.status, 0);
    assert!(text.out.starts_with("  PID  ") || text.out.contains("PID  USER"), "{text:?}");
    assert!(text.out.lines().nth(1).unwrap().contains(&format!("{}  ", child.pid())));
    child.kill();
    assert!(pids(&place).is_empty());
}

#[test]
fn processes_that_are_left_with_a_deleted_file_are_marked() {
    let place = Place::with_keys(["a"]);
    let old = holder(&place, || {});
    fs::remove_file(&place.path).unwrap();
    // Nothing is there, but that process.
    let process = place.object(&["ps"]);
    assert_eq!((&process["pid"], &process["deleted"]), (&number(&old).into(), &true.into()));
    place.sync("a");
    let new = holder(&place, || {});
    let processes = place.objects(&["ps"]);
    let deleted = |child: &Child| {
        processes.iter().find(|process| process["pid"] == number(child)).unwrap()["deleted"].as_bool().unwrap()
    };
    assert!(processes.len() == 2 && deleted(&old) && !deleted(&new));
    assert!(place.run(&["ps"]).out.contains("  (deleted)  "));
    let doctor = place.run(&["doctor"]);
    assert_eq!(doctor.status, 1);
    let stale = format!("still have a file mapped that was deleted from here: {} (", old.pid());
    assert!(doctor.out.contains(&stale) && doctor.out.contains("restart those"), "{doctor:?}");
    // A table that was reset is left in the same way, until its process looks.
    old.kill();
    place.succeed(&["reset", "--yes"]);
    assert!(place.object(&["ps"])["deleted"].as_bool().unwrap());
    new.kill();
    assert_eq!(place.run(&["doctor"]).status, 0);
}

#[test]
fn a_process_that_sees_another_file_at_the_same_path_is_told_of() {
    if !Uid::effective().is_root() {
        return;
    }
    let place = Place::with_keys(["a"]);
    let child = holder(&place, || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(Some("tmpfs"), place.folder.path(), Some("tmpfs"), MsFlags::empty(), none).unwrap();
    });
    let processes = place.objects(&["ps"]);
    // Its path may be shown from the root of its own mount.
    if let [process] = &*processes {
        assert_eq!((&process["pid"], &process["elsewhere"]), (&number(&child).into(), &true.into()));
        let doctor = place.run(&["doctor"]);
        assert!(doctor.status == 1 && doctor.out.contains("another file at the same path"), "{doctor:?}");
    }
    assert!(processes.len() <= 1, "{processes:?}");
}

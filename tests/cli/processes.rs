//! Guards `ps`: which processes have the table mapped, still have a deleted one, or have another one of the same name.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, raise};
use nix::unistd::Uid;

use crate::support::{Child, in_child};
use crate::tool::{Place, Said, eventually, said};

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

/// Forked children of other tests have what this process had mapped at that moment, until they end.
fn await_users(place: &Place, count: usize) {
    eventually("waiting for forks of other tests to end", || pids(place).len() == count);
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
    await_users(&place, 0);
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
    await_users(&place, 0);
    let old = holder(&place, || {});
    fs::remove_file(&place.path).unwrap();
    // There is no file at the path, but the process is still listed.
    let process = place.object(&["ps"]);
    assert_eq!((&process["pid"], &process["deleted"]), (&number(&old).into(), &true.into()));
    place.sync("a");
    await_users(&place, 1);
    let new = holder(&place, || {});
    let processes = place.objects(&["ps"]);
    let deleted = |child: &Child| {
        processes.iter().find(|process| process["pid"] == number(child)).unwrap()["deleted"].as_bool().unwrap()
    };
    assert!(processes.len() == 2 && deleted(&old) && !deleted(&new));
    assert!(place.run(&["ps"]).out.contains("  (deleted)  "));
    let doctor = place.run(&["doctor"]);
    assert_eq!(doctor.status, 1);
    let stale = format!("clean-up, without being retired: {} (", old.pid());
    assert!(doctor.out.contains(&stale) && doctor.out.contains("restart those"), "{doctor:?}");
    assert!(place.succeed(&["metrics"]).lines().any(|line| line.contains("file=\"deleted\"") && line.ends_with(" 1")));
    // A process still has a table that was reset in the same way, until it checks a key.
    old.kill();
    place.succeed(&["reset", "--yes"]);
    let process = place.object(&["ps"]);
    assert_eq!((&process["deleted"], &process["retired"]), (&true.into(), &true.into()));
    assert!(place.run(&["ps"]).out.contains("  (reset)  "));
    // That needs no attention: it is neither a problem for the doctor nor counted by the alarm's figure.
    let doctor = place.run(&["doctor"]);
    assert!(doctor.status == 0 && doctor.out.contains("a table mapped that was reset or removed"), "{doctor:?}");
    let metrics = place.succeed(&["metrics"]);
    for (file, count) in [("deleted", 0), ("reset", 1)] {
        let line = metrics.lines().find(|line| line.contains(&format!("file=\"{file}\""))).unwrap();
        assert!(line.ends_with(&format!(" {count}")), "{line}");
    }
    new.kill();
    assert_eq!(place.run(&["doctor"]).status, 0);
}

#[test]
fn a_process_that_sees_another_file_at_the_same_path_is_reported() {
    if !crate::tool::can_mount() {
        return;
    }
    let place = Place::with_keys(["a"]);
    await_users(&place, 0);
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

/// Every command says the same of processes that cannot be seen.
fn assert_blind(place: &Place, run: impl Fn(&[&str]) -> Said, reason: &str) {
    for look in [&["ps"][..], &["doctor"], &["--json", "doctor"]] {
        let said = run(look);
        let text = [&*said.out, &*said.err].concat();
        assert!(
            text.contains("cannot be told") && text.contains(reason) && !text.contains("0 have it"),
            "{look:?}: {said:?}"
        );
        assert_ne!(said.status, 0, "{look:?}: {said:?}");
    }
    let metrics = run(&["metrics", "--no-keys"]);
    assert_eq!(metrics.status, 0, "{metrics:?}");
    let visible = format!("gensync_table_processes_visible{{table=\"{}\"}} 0", place.path.display());
    assert!(metrics.out.lines().any(|line| line == visible), "{metrics:?}");
}

#[test]
fn processes_that_cannot_be_seen_are_not_reported_as_none() {
    if !crate::tool::can_mount() || !crate::tool::can_be_first() {
        return;
    }
    let place = Place::with_keys(["a"]);
    let tool = place.folder.path().join("gensync");
    assert!(Command::new("cp").arg(env!("CARGO_BIN_EXE_gensync")).arg(&tool).status().unwrap().success());
    fs::set_permissions(place.folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&place.path, fs::Permissions::from_mode(0o644)).unwrap();
    let run = |user: Option<u32>, arguments: &[&str]| {
        let mut command = Command::new(&tool);
        command.env_clear().env("GENSYNC_TABLE", &place.path).args(arguments).stdin(Stdio::null());
        if let Some(user) = user {
            command.uid(user).gid(user);
        }
        said(command.output().unwrap())
    };
    let none = None::<&str>;
    in_child(|| {
        // Only its children are in the new namespace.
        unshare(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS).unwrap();
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        in_child(|| {
            for option in ["hidepid=2", "hidepid=4"] {
                match mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), Some(option)) {
                    Ok(()) => {}
                    Err(nix::errno::Errno::EINVAL) if option == "hidepid=4" => {
                        eprintln!("skipped: this kernel has no {option}");
                        continue;
                    }
                    result => result.unwrap(),
                }
                assert_blind(&place, |arguments| run(Some(65_534), arguments), "hidepid=");
                // Root sees all.
                assert_eq!(run(None, &["doctor"]).status, 0);
                let visible = format!("gensync_table_processes_visible{{table=\"{}\"}} 1\n", place.path.display());
                assert!(run(None, &["metrics"]).out.contains(&visible));
                assert_eq!(run(None, &["ps"]).status, 0);
            }
            mount(Some("tmpfs"), "/proc", Some("tmpfs"), MsFlags::empty(), none).unwrap();
            assert_blind(&place, |arguments| run(None, arguments), "there is no /proc here");
            let metrics = run(None, &["metrics"]).out;
            assert!(!metrics.contains("gensync_table_processes{"), "an unknown number is not printed: {metrics}");
        })
        .succeeds();
    })
    .succeeds();
}

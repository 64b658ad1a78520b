//! Guards `upgrade`, and what the other commands say of a table of an older file format: nothing is replaced by accident, no update
//! is lost, and an operator learns which processes must be restarted.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};

use gensync::Table;
use nix::fcntl::{FcntlArg, fcntl};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, raise};

use crate::support::{Child, in_child, keep_mounts_apart};
use crate::terminal::Terminal;
use crate::tool::{Place, bytes, eventually, with_btrfs};

/// A table of version 1, in which two updates of "pending" are in flight.
const OLDER: &[u8] = include_bytes!("../vectors/version-1-everything.gensync");
/// The greatest generation in it.
const HIGHEST: u64 = 1_795_575_983_794_528;

/// In memory, so that `doctor` reports nothing about the file system.
fn older() -> Place {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("table");
    fs::write(&path, OLDER).unwrap();
    Place { folder, path }
}

/// A process that has the table open as version 1 has it: mapped, and with its lock on the boot id. If it is `updating`, it also
/// has the lock of an update of "pending". It is stopped.
fn older_process(place: &Place, updating: bool) -> Child {
    let child = in_child(|| {
        let file = File::options().read(true).write(true).open(&place.path).unwrap();
        let _mapped = memmap2::MmapOptions::new().map_raw(&file).unwrap();
        let lock = |start: i64, length: i64| {
            let (kind, whence) = (nix::libc::F_RDLCK as i16, nix::libc::SEEK_SET as i16);
            let lock = nix::libc::flock { l_type: kind, l_whence: whence, l_start: start, l_len: length, l_pid: 0 };
            fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
        };
        lock(128, 16);
        if updating {
            // A slot has 128 bytes, with the label behind the words.
            let label = OLDER.windows(8).position(|window| window == b"pending\0").unwrap();
            lock((label - label % 128) as i64, 128);
        }
        raise(Signal::SIGSTOP).unwrap();
    });
    let path = format!("/proc/{}/stat", child.pid());
    eventually("waiting for a process to stop", || fs::read_to_string(&path).unwrap().contains(") T "));
    child
}

#[test]
fn a_table_is_upgraded_once() {
    let place = older();
    let path = place.path.to_str().unwrap();
    let said = place.succeed(&["upgrade", "--yes"]);
    let stat = place.object(&["stat"]);
    assert_eq!(stat["layout_version"], 2);
    let incarnation = stat["incarnation"].as_str().unwrap().to_owned();
    assert_eq!(said, format!("{path}: version 1 is replaced by version 2, as incarnation {incarnation}\n"));
    assert_eq!(fs::read_dir(place.folder.path()).unwrap().count(), 1);
    let sync = place.sync("pending");
    assert!(sync.sync_gen().unwrap().get() > HIGHEST, "a generation came again");
    // Once more, it is left as it is, and needs no yes.
    let before = bytes(&place.path);
    let again = place.succeed(&["upgrade"]);
    assert_eq!(again, format!("{path} is of version 2 already: nothing was changed\n"));
    let object = place.object(&["upgrade"]);
    assert_eq!((&object["from_version"], &object["to_version"]), (&2.into(), &2.into()));
    assert_eq!((&object["upgraded"], &object["incarnation"]), (&false.into(), &(&*incarnation).into()));
    assert_eq!(bytes(&place.path), before);
    assert!(!sync.is_expired());

    // The table may be named without an option.
    let other = older();
    let object = place.object(&["upgrade", "-y", other.path.to_str().unwrap()]);
    assert_eq!((&object["table"], &object["upgraded"]), (&other.path.to_str().unwrap().into(), &true.into()));
    assert_eq!((&object["from_version"], &object["to_version"]), (&1.into(), &2.into()));
    assert_eq!(object["incarnation"], other.object(&["stat"])["incarnation"]);
    assert_eq!(object["processes"], 0);
    assert_eq!(bytes(&place.path), before);
    // So may one whose reset was broken off, under the older version.
    fs::write(&other.path, include_bytes!("../vectors/version-1-retired.gensync")).unwrap();
    assert_eq!(other.object(&["upgrade", "--yes"])["upgraded"], true);
}

#[test]
fn it_asks_first() {
    let place = older();
    place.fail(2, "there is no terminal to ask on; give --yes", &["upgrade"]);
    let mut terminal = Terminal::start(&mut place.command(&["upgrade"]));
    terminal.await_text("Processes that have it mapped: ");
    assert!(terminal.text().replace('\n', "").contains("of version 1, by a table of version 2"), "{}", terminal.text());
    terminal.press("n\n");
    assert_eq!(terminal.await_end(), 1);
    terminal.await_text("nothing was changed");
    assert_eq!(bytes(&place.path), OLDER);
    let mut terminal = Terminal::start(&mut place.command(&["upgrade"]));
    terminal.await_text("[y/N]");
    terminal.press("y\n");
    assert_eq!(terminal.await_end(), 0);
    assert_eq!(place.object(&["stat"])["layout_version"], 2);
}

#[test]
fn what_cannot_be_upgraded_is_left_alone() {
    let place = older();
    let mut newer = OLDER.to_vec();
    newer[8] = 3;
    for (content, expected) in [
        (&newer[..], "layout version 3, expected 2: made by another version of gensync; use the same version here"),
        (b"hello", "not a gensync table"),
        (&OLDER[..4200], "truncated table"),
    ] {
        fs::write(&place.path, content).unwrap();
        place.fail(3, expected, &["upgrade", "--yes"]);
        assert_eq!(bytes(&place.path), content);
    }
    fs::write(&place.path, OLDER).unwrap();
    Place::empty().fail(3, "no such table", &["upgrade", "--yes"]);
    if !crate::tool::can_mount() {
        return;
    }
    in_child(|| {
        keep_mounts_apart();
        mount(Some(&place.path), &place.path, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        place.fail(3, "cannot be replaced or removed: it is a mount point itself", &["upgrade", "--yes"]);
        let doctor = place.run(&["doctor"]);
        assert!(doctor.out.contains("replacement  the file is a mount point of its own"), "{doctor:?}");
    })
    .succeeds();
    assert_eq!(bytes(&place.path), OLDER);
}

#[test]
fn an_operator_learns_what_there_is_and_what_to_do() {
    let place = older();
    let process = older_process(&place, true);
    let pid = process.pid().as_raw();
    // Forked children of other tests have nothing of this table.
    let ps = place.run(&["--json", "ps"]);
    let object: serde_json::Value = serde_json::from_str(ps.out.trim()).unwrap();
    assert_eq!((&object["pid"], &object["deleted"], &object["elsewhere"]), (&pid.into(), &false.into(), &false.into()));
    assert!(ps.status == 0 && ps.err.contains("layout version 1, expected 2"), "{ps:?}");
    let doctor = place.run(&["doctor"]);
    assert_eq!(doctor.status, 1);
    for part in [
        "problem  layout       version 1, expected 2: made by an older version of gensync",
        &format!("upgrade it with `gensync upgrade {}`", place.path.display()),
        "their updates fail; `gensync ps` lists them",
        &format!("note     updates      in flight; made by {pid} ("),
        "ok       room",
        "ok       processes    1 have it mapped",
    ] {
        assert!(doctor.out.contains(part), "{part} is not in {doctor:?}");
    }
    let problems = place.objects(&["doctor"]).iter().filter(|finding| finding["verdict"] == "problem").count();
    assert_eq!(problems, 1);
    let tables = place.objects(&["tables"]);
    let found = tables.iter().find(|table| table["table"] == place.path.to_str().unwrap()).unwrap();
    assert_eq!((&found["layout_version"], &found["processes"]), (&1.into(), &1.into()));
    assert!(found["state"].is_null() && found["keys"].is_null());
    let text = place.succeed(&["tables"]);
    let line = text.lines().find(|line| line.starts_with(place.path.to_str().unwrap())).unwrap();
    assert!(line.contains("  version 1 ") && line.trim_end().ends_with("?          1"), "{line}");
    place.fail(3, "gensync upgrade", &["stat"]);
    place.fail(3, "gensync upgrade", &["mark", "a"]);
    assert_eq!(bytes(&place.path), OLDER);
}

#[test]
fn it_waits_for_updates_of_the_older_version_and_names_the_processes_to_restart() {
    let place = older();
    let [updating, idle] = [true, false].map(|updating| older_process(&place, updating));
    let mut upgrade = place.start(&["upgrade", "--yes"]);
    let mut stderr = BufReader::new(upgrade.child().stderr.take().unwrap());
    let mut line = String::new();
    stderr.read_line(&mut line).unwrap();
    assert!(line.contains("waiting for updates in flight to end, for 30 s at most"), "{line}");
    assert!(line.contains(&format!("{} (", updating.pid())), "{line}");
    assert!(!line.contains(&format!("{} (", idle.pid())), "{line}");
    assert_eq!(bytes(&place.path)[8], 1, "replaced under an update");
    updating.kill();
    line.clear();
    stderr.read_line(&mut line).unwrap();
    assert!(line.contains("processes that had the table mapped: 2; restart those of the older version"), "{line}");
    assert_eq!(upgrade.status().code(), Some(0));
    assert_eq!(bytes(&place.path)[8], 2);

    // The other process is left with the old file, and cannot move on.
    let process = place.object(&["ps"]);
    assert_eq!(process["pid"], idle.pid().as_raw());
    assert_eq!((&process["older_version"], &process["retired"]), (&true.into(), &true.into()));
    assert!(place.succeed(&["ps"]).contains("  (older version)  "));
    let doctor = place.run(&["doctor"]);
    assert_eq!(doctor.status, 1);
    let found = format!("still have a table of an older version mapped, which was upgraded since: {} (", idle.pid());
    assert!(doctor.out.contains(&found) && doctor.out.contains("restart them"), "{doctor:?}");
    let metrics = place.succeed(&["metrics"]);
    for (file, count) in [("older", 1), ("reset", 0), ("deleted", 0)] {
        let line = metrics.lines().find(|line| line.contains(&format!("file=\"{file}\""))).unwrap();
        assert!(line.ends_with(&format!(" {count}")), "{line}");
    }
    // When it was restarted, all is well.
    idle.kill();
    assert_eq!(place.run(&["doctor"]).status, 0);
    let table = Table::open(&place.path).unwrap();
    assert_eq!(table.stats().keys, 0);
}

#[test]
fn a_process_is_known_by_its_mounts_where_its_file_is_not() {
    // On btrfs, the numbers of a file in /proc/PID/maps are not those of `stat`.
    with_btrfs(|folder| {
        let place = Place { path: folder.join("table"), folder: tempfile::tempdir().unwrap() };
        fs::write(&place.path, OLDER).unwrap();
        let process = older_process(&place, false);
        let ps = place.run(&["--json", "ps"]);
        let object: serde_json::Value = serde_json::from_str(ps.out.trim()).unwrap();
        assert_eq!((&object["pid"], &object["elsewhere"]), (&process.pid().as_raw().into(), &false.into()));
        let doctor = place.run(&["doctor"]);
        assert!(doctor.out.contains("ok       processes    1 have it mapped"), "{doctor:?}");
    });
}

#[test]
fn two_upgrades_at_once_make_one_table() {
    for _ in 0..5 {
        let place = older();
        let upgrades: Vec<_> = (0..4).map(|_| place.start(&["--json", "upgrade", "--yes"])).collect();
        let said: Vec<_> = upgrades.into_iter().map(crate::tool::Running::said).collect();
        let incarnation = place.object(&["stat"])["incarnation"].clone();
        for said in said {
            assert_eq!(said.status, 0, "{said:?}");
            assert_eq!(crate::tool::objects(&said.out)[0]["incarnation"], incarnation, "{said:?}");
        }
        assert_eq!(fs::read_dir(place.folder.path()).unwrap().count(), 1);
    }
}

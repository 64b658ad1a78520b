//! Guards against commands for reading that need write permission, create something, or change a byte.

use std::fs;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use nix::unistd::Uid;

use crate::tool::{Place, bytes, program, said};

const NOBODY: u32 = 65_534;

/// Each command that only reads, with arguments by which it finds something.
const LOOKS: [&[&str]; 13] = [
    &["ls"],
    &["ls", "user:*"],
    &["ls", "--json"],
    &["ls", "--unsorted"],
    &["top", "--once", "--interval", "50ms"],
    &["get", "user:1"],
    &["stat"],
    &["--json", "stat"],
    &["ps"],
    &["doctor"],
    &["metrics"],
    &["--json", "metrics"],
    &["--json", "top", "--count", "1", "--interval", "50ms"],
];

#[test]
fn no_byte_is_changed() {
    let place = Place::with_keys(["user:1", "label"]);
    // Like a table of the last boot, with the pending update of a killed process.
    let sync = place.sync("user:1");
    let child = crate::support::in_child(|| {
        let _update = sync.begin_update().unwrap();
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGSTOP).unwrap();
    });
    crate::tool::eventually("waiting for an update", || place.object(&["get", "user:1"])["pending"] == 1);
    child.kill();
    fs::File::options().write(true).open(&place.path).unwrap().write_all_at(&[9; 16], 128).unwrap();
    let before = bytes(&place.path);
    for look in LOOKS {
        let said = place.run(look);
        assert!(said.status <= 1, "{look:?}: {said:?}");
        assert!(!said.out.is_empty() && (look[0] == "ps" || said.err.is_empty()), "{look:?}: {said:?}");
        assert_eq!(bytes(&place.path), before, "{look:?} has changed the table");
    }
    for look in [&["wait", "user:1"][..], &["watch"]] {
        // A wait may report the update of the killed process, but does not finish it in the table.
        assert!(place.run(&[look, &["--read-only", "--timeout", "30ms"]].concat()).status <= 1);
        assert_eq!(bytes(&place.path), before, "{look:?} has changed the table");
    }
    assert!(place.object(&["ls", "user:1"])["abandoned"].as_bool().unwrap());
}

#[test]
fn write_permission_is_not_needed() {
    let place = Place::with_keys(["user:1"]);
    let tool = place.folder.path().join("gensync");
    // Another process copies the program: if this one did, children that other tests fork meanwhile would have the copy open for
    // writing, and it could not be executed.
    assert!(Command::new("cp").arg(env!("CARGO_BIN_EXE_gensync")).arg(&tool).status().unwrap().success());
    fs::set_permissions(place.folder.path(), fs::Permissions::from_mode(0o555)).unwrap();
    fs::set_permissions(&place.path, fs::Permissions::from_mode(0o444)).unwrap();
    let run = |arguments: &[&str]| {
        let mut command = Command::new(&tool);
        command.env_clear().env("GENSYNC_TABLE", &place.path).args(arguments).stdin(Stdio::null());
        if Uid::effective().is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        said(command.output().unwrap())
    };
    for look in LOOKS {
        let said = run(look);
        // For `doctor`, a table that its own user cannot write to is a problem.
        assert_eq!(said.status, i32::from(look[0] == "doctor"), "{look:?}: {said:?}");
    }
    let said = run(&["wait", "user:1", "--timeout", "30ms"]);
    assert!(said.status == 1 && said.err.contains("timed out"), "{said:?}");
    assert!(run(&["watch", "--timeout", "30ms"]).err.contains("timed out"));
    for change in
        [&["mark", "user:1"][..], &["clear", "--all"], &["create", "x"], &["reset", "--yes"], &["rm", "--yes"]]
    {
        let said = run(change);
        assert_eq!((said.status, &*said.out), (3, ""), "{change:?}: {said:?}");
        assert!(said.err.contains("permission denied") && said.err.contains("as root"), "{said:?}");
        assert!(said.err.contains(place.path.to_str().unwrap()));
    }
    fs::set_permissions(place.folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn nothing_is_created() {
    let place = Place::empty();
    for look in LOOKS.into_iter().chain([&["wait", "a"][..], &["watch"], &["reset", "--yes"], &["rm", "--yes"]]) {
        let said = place.run(look);
        assert_eq!(said.status, if look[0] == "doctor" { 1 } else { 3 }, "{look:?}: {said:?}");
        let text = [&*said.out, &*said.err].concat();
        assert!(text.contains("no such table") && text.contains("`gensync create KEY`"), "{look:?}: {said:?}");
        let said = said_of_app(&place, look);
        assert_eq!(said.status, if look[0] == "doctor" { 1 } else { 3 }, "{look:?}: {said:?}");
        assert_eq!(fs::read_dir(place.folder.path()).unwrap().count(), 0, "{look:?} has made something");
    }
    // A command that creates the table does so where the library opens it.
    let created = said_of_app(&place, &["create", "a"]);
    assert_eq!(created.status, 0, "{created:?}");
    assert!(place.folder.path().join("gensync/shop").exists());
    assert_eq!(said_of_app(&place, &["get", "a"]).status, 0);
}

fn said_of_app(place: &Place, arguments: &[&str]) -> crate::tool::Said {
    let mut command = program();
    command.env("XDG_RUNTIME_DIR", place.folder.path()).args(["--app", "shop"]).args(arguments);
    said(command.stdin(Stdio::null()).output().unwrap())
}

#[test]
fn a_list_may_come_as_it_is_found() {
    let place = Place::empty();
    let table = place.table();
    let keys: Vec<_> = (0..3000).map(|i| format!("key:{i}")).collect();
    for key in &keys {
        gensync::GenerationSynchronizer::new(&table, &**key).unwrap().mark_updated().unwrap();
    }
    let first = |line: &str| line.split("  ").next().unwrap().to_owned();
    for list in [&["ls", "--unsorted"][..], &["ls"]] {
        let text = place.succeed(list);
        assert!(text.starts_with("KEY "), "{text}");
        let mut found: Vec<_> = text.lines().skip(1).map(first).collect();
        found.sort();
        let mut expected = keys.clone();
        expected.sort();
        assert_eq!(found, expected);
    }
    assert_eq!(place.objects(&["ls", "--unsorted"]).len(), keys.len());
    assert_eq!(place.objects(&["ls", "--unsorted", "key:1?"]).len(), 10);
    place.fail(2, "cannot be used with", &["ls", "--unsorted", "--sort", "key"]);
    let said = place.run(&["ls", "--unsorted", "nothing*"]);
    assert!(said.status == 1 && said.err.contains("no key matches"), "{said:?}");
}

#[test]
fn a_file_that_is_not_a_table_ends_with_status_3_and_is_left_alone() {
    let place = Place::empty();
    let mut other_version = {
        let table = Place::with_keys(["a"]);
        bytes(&table.path)
    };
    other_version[8] = 3;
    for (content, expected) in [
        (&b"hello"[..], "not a gensync table"),
        (&other_version, "layout version 3, expected 2: made by another version of gensync"),
        (include_bytes!("../vectors/version-1.gensync"), "version 1, expected 2: made by an older version of gensync"),
    ] {
        fs::write(&place.path, content).unwrap();
        for look in LOOKS.into_iter().chain([
            &["mark", "a"][..],
            &["create", "a"],
            &["rm", "--yes"],
            &["exec", "a", "--", "true"],
        ]) {
            let said = place.run(look);
            let status = match look[0] {
                "doctor" => 1,
                "exec" => 125,
                _ => 3,
            };
            assert_eq!(said.status, status, "{look:?}: {said:?}");
            let text = [&*said.out, &*said.err].concat();
            assert!(text.contains(expected), "{look:?}: {said:?}");
            // A table of a newer version is not to be replaced.
            assert_eq!(text.contains("gensync upgrade"), expected.contains("older"), "{look:?}: {said:?}");
            assert_eq!(
                text.contains("processes of the older version") || text.contains("those of the older version"),
                expected.contains("older")
            );
            assert_eq!(bytes(&place.path), content);
        }
    }
}

#[test]
fn a_retired_table_is_shown_as_such() {
    let place = Place::with_keys(["a"]);
    // In either byte order, only the byte of the state that says "live" is not zero.
    let live = (144..148).find(|byte| bytes(&place.path)[*byte] == 1).unwrap();
    fs::File::options().write(true).open(&place.path).unwrap().write_all_at(&[2], live as u64).unwrap();
    let before = bytes(&place.path);
    assert_eq!(place.object(&["stat"])["state"], "retiring");
    assert!(place.succeed(&["stat"]).contains("retiring"));
    let doctor = place.run(&["doctor"]);
    assert_eq!(doctor.status, 1);
    assert!(
        doctor.out.contains("a reset was broken off") && doctor.out.contains("`gensync reset --yes`"),
        "{doctor:?}"
    );
    place.fail(3, "the table was reset", &["ls"]);
    assert_eq!(bytes(&place.path), before);
    place.succeed(&["reset", "--yes"]);
    assert_eq!(place.run(&["doctor"]).status, 0);
}

#[test]
fn a_table_is_shown_as_a_whole() {
    let place = Place::empty();
    place.succeed(&["create", "--capacity", "4", "key"]);
    (0..40).for_each(|i| drop(place.sync(&format!("{i}"))));
    let (stats, info) = (place.table().stats(), place.table().info());
    let object = place.object(&["stat"]);
    assert_eq!((&object["keys"], &object["bytes"]), (&41.into(), &fs::metadata(&place.path).unwrap().len().into()));
    assert_eq!(object["incarnation"], format!("{:032x}", info.incarnation));
    assert_eq!(object["longest_probe"], stats.longest_probe);
    assert_eq!(
        (&object["state"], &object["layout_version"], &object["earlier_boot"]),
        (&"live".into(), &2.into(), &false.into())
    );
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    assert_eq!(object["boot"], boot.trim());
    let segments = object["occupancy"].as_array().unwrap();
    assert_eq!(segments.iter().map(|segment| segment["keys"].as_u64().unwrap()).sum::<u64>(), 41);
    assert_eq!((&segments[0]["slots"], segments.len()), (&16.into(), stats.segments as usize));
    // Each key is of two characters at most, except "key": a record is 16 bytes.
    assert_eq!(
        (&object["text_bytes"], &object["lost_bytes"], &object["spare_bytes"]),
        (&656.into(), &0.into(), &0.into())
    );
    let text = place.succeed(&["stat"]);
    for part in
        [boot.trim(), "segment 0  ████", "41 of ", "mode 0600", "version 2", " of 16 slots\ntexts ", "656 bytes"]
    {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    let before = object["incarnation"].clone();
    place.succeed(&["reset", "--yes"]);
    let after = place.object(&["stat"]);
    assert!(after["incarnation"] != before && after["keys"] == 0 && after["floor"].as_u64() > Some(0));
}

//! Guards `doctor`: each thing that goes wrong is made to go wrong, and is found and reported with advice.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, raise};
use nix::unistd::Uid;
use serde_json::Value;

use crate::support::in_child;
use crate::tool::{Place, eventually, objects, program, said, with_btrfs};

/// What one check found.
fn check<'a>(findings: &'a [Value], check: &str) -> &'a Value {
    let matching: Vec<_> = findings.iter().filter(|finding| finding["check"] == check).collect();
    assert_eq!(matching.len(), 1, "{check}: {findings:?}");
    matching[0]
}

/// Asserts that the check `name` finds a problem, with `found` and `advice` in its texts, and that no other check does.
fn assert_problem(place: &Place, name: &str, found: &str, advice: &str) {
    let findings = place.objects(&["doctor"]);
    let finding = check(&findings, name);
    assert_eq!(finding["verdict"], "problem", "{finding}");
    assert!(finding["found"].as_str().unwrap().contains(found), "{finding}");
    assert!(finding["advice"].as_str().unwrap().contains(advice), "{finding}");
    assert!(findings.iter().all(|other| other["check"] == name || other["verdict"] != "problem"), "{findings:?}");
    let text = place.run(&["doctor"]);
    assert_eq!(text.status, 1);
    assert!(text.out.contains("problem  ") && text.out.contains(found) && text.out.contains(advice), "{text:?}");
}

/// A table in memory, so that `doctor` reports nothing about the file system.
fn place() -> Place {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("table");
    let place = Place { folder, path };
    place.sync("a");
    place
}

#[test]
fn all_is_well() {
    let place = place();
    let findings = place.objects(&["doctor"]);
    let checks: Vec<_> = findings.iter().map(|finding| finding["check"].as_str().unwrap()).collect();
    assert_eq!(
        checks,
        ["layout", "state", "updates", "file system", "permissions", "folder", "room", "twins", "processes"]
    );
    let said = place.run(&["doctor"]);
    assert_eq!((said.status, &*said.err), (0, ""));
    assert!(said.out.lines().next().unwrap().starts_with("ok       layout"), "{said:?}");
    assert!(
        findings.iter().filter(|finding| finding["check"] != "processes").all(|finding| finding["verdict"] == "ok")
    );
}

#[test]
fn any_user_could_forge_generations() {
    let place = place();
    fs::set_permissions(&place.path, fs::Permissions::from_mode(0o666)).unwrap();
    assert_problem(&place, "permissions", "mode 0666", "chmod o-w ");
    fs::set_permissions(&place.path, fs::Permissions::from_mode(0o440)).unwrap();
    assert_problem(&place, "permissions", "mode 0440", "chmod u+rw ");
    fs::set_permissions(&place.path, fs::Permissions::from_mode(0o660)).unwrap();
    fs::set_permissions(place.folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    assert_problem(&place, "folder", "mode 0777", "any user can replace the table");
    fs::set_permissions(place.folder.path(), fs::Permissions::from_mode(0o1777)).unwrap();
    assert_eq!(place.run(&["doctor"]).status, 0);
}

#[test]
fn an_update_whose_maker_is_dead() {
    let place = place();
    let sync = place.sync("a");
    let child = in_child(|| {
        let _update = sync.begin_update().unwrap();
        raise(Signal::SIGSTOP).unwrap();
    });
    eventually("waiting for an update", || place.object(&["get", "a"])["pending"] == 1);
    // While the maker lives, there is nothing to do.
    let findings = place.objects(&["doctor"]);
    let finding = check(&findings, "updates");
    assert_eq!(finding["verdict"], "note");
    let found = finding["found"].as_str().unwrap();
    assert!(found.contains(&format!("in flight: a; made by {} (", child.pid())), "{found}");
    child.kill();
    assert_problem(&place, "updates", "pending, but their makers are dead: a", "`gensync mark KEY`");
    place.succeed(&["mark", "a"]);
    assert_eq!(place.run(&["doctor"]).status, 0);
    assert!(sync.is_expired());
}

#[test]
fn the_file_system_is_nearly_full() {
    if !crate::tool::can_mount() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    mount(Some("tmpfs"), folder.path(), Some("tmpfs"), MsFlags::empty(), Some("size=1m")).unwrap();
    let place = Place { path: folder.path().join("table"), folder };
    place.sync("a");
    assert_eq!(place.run(&["doctor"]).status, 0);
    fs::write(place.folder.path().join("other"), vec![7; 900 << 10]).unwrap();
    assert_problem(&place, "room", "are free", "free some room in ");
    assert!(place.run(&["doctor"]).out.contains("mount it with a greater size"));
    umount2(place.folder.path(), MntFlags::MNT_DETACH).unwrap();
}

#[test]
fn no_more_files_can_be_made() {
    if !crate::tool::can_mount() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    mount(Some("tmpfs"), folder.path(), Some("tmpfs"), MsFlags::empty(), Some("nr_inodes=2")).unwrap();
    let place = Place { path: folder.path().join("table"), folder };
    place.sync("a");
    assert_problem(&place, "room", "no more files can be made", "remove some");
    umount2(place.folder.path(), MntFlags::MNT_DETACH).unwrap();
}

#[test]
fn a_file_system_on_a_disk_is_noted() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let place = Place { path: folder.path().join("table"), folder };
    place.sync("a");
    let findings = place.objects(&["doctor"]);
    let finding = check(&findings, "file system");
    // Wherever the tests are built.
    let found = finding["found"].as_str().unwrap();
    match found {
        "tmpfs" => assert_eq!(finding["verdict"], "ok"),
        _ if found.starts_with("overlayfs") => assert_eq!(finding["verdict"], "problem"),
        _ => assert_eq!(finding["verdict"], "note"),
    }
}

#[test]
fn a_table_that_is_not_rewritten_in_place_is_found_and_a_reset_cures_it() {
    with_btrfs(|folder| {
        let run = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
        let made = Place { path: folder.join("table"), folder: tempfile::tempdir().unwrap() };
        made.sync("a");
        assert_eq!(check(&made.objects(&["doctor"]), "file system")["verdict"], "note");
        assert!(run(Command::new("sync").arg("-f").arg(&made.path)));
        let snapshot = folder.join("snapshot");
        let mut btrfs = Command::new("btrfs");
        assert!(run(btrfs.args(["subvolume", "snapshot"]).args([folder, &snapshot])));
        assert_problem(&made, "file system", "shares extents", "gensync reset");
        assert_eq!(made.run(&["reset", "--yes"]).status, 0);
        assert_eq!(check(&made.objects(&["doctor"]), "file system")["verdict"], "note");
        let copied = Place { path: folder.join("copy"), folder: tempfile::tempdir().unwrap() };
        assert!(run(Command::new("cp").args(["--reflink=never"]).args([&made.path, &copied.path])));
        assert_problem(&copied, "file system", "is not rewritten in place", "gensync reset");
    });
}

#[test]
fn an_application_with_and_without_a_runtime_folder_has_two_tables() {
    let folder = tempfile::tempdir().unwrap();
    let name = format!("gensync-test-twins-{}", std::process::id());
    let run = |with: bool, arguments: &[&str]| {
        let mut command = program();
        if with {
            command.env("XDG_RUNTIME_DIR", folder.path());
        }
        said(command.args(["--json", "--app", &name]).args(arguments).stdin(Stdio::null()).output().unwrap())
    };
    assert_eq!(run(true, &["create", "a"]).status, 0);
    let findings = objects(&run(true, &["doctor"]).out);
    assert_eq!(check(&findings, "twins")["verdict"], "ok");
    assert_eq!(run(false, &["create", "a"]).status, 0);
    let said = run(true, &["doctor"]);
    let findings = objects(&said.out);
    let finding = check(&findings, "twins");
    let other = format!("/dev/shm/gensync-{}/{name}", Uid::effective());
    let removed = run(false, &["rm", "--yes"]);
    assert_eq!((said.status, &finding["verdict"]), (1, &"problem".into()));
    assert!(finding["found"].as_str().unwrap().contains(&other), "{finding}");
    assert!(finding["advice"].as_str().unwrap().contains("XDG_RUNTIME_DIR"));
    assert_eq!(removed.status, 0);
    assert_eq!(check(&objects(&run(true, &["doctor"]).out), "twins")["verdict"], "ok");
}

#[test]
fn a_folder_of_another_user_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("gensync")).unwrap();
    fs::set_permissions(folder.path().join("gensync"), fs::Permissions::from_mode(0o777)).unwrap();
    let run = |command: &str| {
        let mut program = program();
        program.env("XDG_RUNTIME_DIR", folder.path()).args(["--app", "shop", command]);
        said(program.output().unwrap())
    };
    let doctor = run("doctor");
    assert!(doctor.status == 1 && doctor.out.contains("unsafe folder: others may write to it"), "{doctor:?}");
    assert_eq!(run("ls").status, 3);
}

#[test]
fn a_table_of_an_earlier_boot_and_leftovers_are_noted() {
    use std::os::unix::fs::FileExt as _;
    let place = place();
    fs::File::options().write(true).open(&place.path).unwrap().write_all_at(&[9; 16], 128).unwrap();
    fs::write(place.folder.path().join(".table.successor"), "").unwrap();
    fs::write(place.folder.path().join(".table.0123456789abcdef"), "").unwrap();
    fs::write(place.folder.path().join(".table.swp"), "").unwrap();
    let findings = place.objects(&["doctor"]);
    assert_eq!(check(&findings, "boot")["verdict"], "note");
    let leftovers = check(&findings, "leftovers");
    let found = leftovers["found"].as_str().unwrap();
    assert!(found.contains(".table.successor") && found.contains(".table.0123456789abcdef") && !found.contains("swp"));
    assert_eq!(place.run(&["doctor"]).status, 0, "a note needs no attention");
}

#[test]
fn a_table_that_another_container_uses_is_not_called_unused() {
    let place = place();
    let _user = place.sync("a");
    let id = place.folder.path().join("id");
    fs::write(&id, "11111111-2222-3333-4444-555555555555\n").unwrap();
    // Another boot id, as some container runtimes give each container its own.
    let script = format!(
        "mount --bind {} /proc/sys/kernel/random/boot_id || exit 77; exec {} --table {} --json doctor",
        id.display(),
        env!("CARGO_BIN_EXE_gensync"),
        place.path.display()
    );
    let said = said(Command::new("unshare").args(["--mount", "sh", "-c", &script]).output().unwrap());
    if !Uid::effective().is_root() || said.status == 77 {
        eprintln!("skipped: nothing can be mounted here: {said:?}");
        return;
    }
    let findings = objects(&said.out);
    let finding = check(&findings, "boot");
    assert_eq!(finding["verdict"], "note");
    let text = finding.to_string();
    assert!(text.contains("container") && !text.contains("nobody has opened"), "{text}");
}

/// Writes into the file what gensync would never write.
#[expect(clippy::host_endian_bytes, reason = "the words of a table are in the machine's byte order")]
fn forge(place: &Place, offset: u64, word: u64) {
    place.write(offset, &word.to_ne_bytes());
}

#[test]
fn damaged_keys_are_reported_everywhere_and_a_reset_cures_them() {
    let end = (1_u64 << 54) - 1;
    for (generation, first) in
        [(end, None), (end - 3, None), (1 << 20, None), (end - 3, Some(end - 5)), (1 << 51, Some(0))]
    {
        let place = place();
        let sync = place.sync("b");
        let spot = place.spot("b");
        forge(&place, spot.lanes[0].start, generation);
        if let Some(first) = first {
            // The first generation stands before the text.
            forge(&place, spot.text - 8, first);
        }
        assert!(place.object(&["ls", "b"])["damaged"].as_bool().unwrap(), "{generation}, {first:?}");
        assert!(!place.object(&["ls", "a"])["damaged"].as_bool().unwrap());
        let list = place.succeed(&["ls"]);
        assert!(list.lines().any(|line| line.starts_with("b ") && line.contains(" damaged ")), "{list}");
        assert_problem(&place, "damage", "without a text: b", "`gensync reset --yes` cures that");
        let metrics = place.succeed(&["metrics"]);
        assert!(metrics.lines().any(|line| line.starts_with("gensync_table_keys_damaged{") && line.ends_with(" 1")));
        assert!(!metrics.lines().any(|line| line.starts_with("gensync_key_updates_total{") && line.contains("\"b\"")));
        place.succeed(&["reset", "--yes"]);
        assert_eq!(place.run(&["doctor"]).status, 0);
        let fresh = place.sync("b");
        fresh.mark_updated().unwrap();
        let info = place.table().slot("b").unwrap().unwrap();
        assert!(!info.is_damaged() && info.updates() == 1, "{info:?}");
        let _ = sync.is_expired();
        assert!(sync.mark_updated().is_ok());
    }
}

#[test]
fn a_table_that_cannot_be_replaced_is_reported_and_no_advice_fails_for_that() {
    if !crate::tool::can_mount() {
        return;
    }
    let place = place();
    in_child(|| {
        crate::support::keep_mounts_apart();
        let none = None::<&str>;
        mount(Some(&place.path), &place.path, none, MsFlags::MS_BIND, none).unwrap();
        assert_problem(&place, "replacement", "is a mount point of its own", "mount the folder that it is in");
        forge(&place, place.spot("a").lanes[0].start, 1 << 20);
        let findings = place.objects(&["doctor"]);
        let advice = check(&findings, "damage")["advice"].as_str().unwrap();
        assert!(!advice.contains("`gensync reset") && advice.contains("see 'replacement'"), "{advice}");
    })
    .succeeds();
}

/// Where the count of bytes of the first segment of texts is, behind the first segment of slots.
fn count_of_texts(place: &Place) -> u64 {
    (8192 + 33 * place.table().info().capacity).next_multiple_of(4096)
}

#[test]
fn texts_that_belong_to_no_key_are_noted_where_they_take_much_room() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let place = Place { path: folder.path().join("table"), folder };
    let table = gensync::Table::options().capacity(1 << 16).open(&place.path).unwrap();
    // Keys of 1008 bytes: 1016 for each record.
    let keys = |count: u64| (0..count).map(|i| format!("{i:01008}"));
    keys(100).for_each(|key| drop(gensync::GenerationSynchronizer::new(&table, gensync::CacheKey::raw(key)).unwrap()));
    let used = 100 * 1016;
    assert_eq!(
        (&place.object(&["stat"])["text_bytes"], &place.object(&["stat"])["lost_bytes"]),
        (&used.into(), &0.into())
    );
    // Processes take room for a record before they write it; this is what those leave that are killed then.
    for (lost, is_noted) in [(8, false), (64 << 10, false), ((64 << 10) + 8, true), (256 << 10, true)] {
        forge(&place, count_of_texts(&place), used + lost);
        let stat = place.object(&["stat"]);
        assert_eq!((&stat["text_bytes"], &stat["lost_bytes"]), (&(used + lost).into(), &lost.into()));
        let text = place.succeed(&["stat"]);
        assert!(text.contains("of them belong to no key, and a reset frees them"), "{text}");
        let metrics = place.succeed(&["metrics", "--no-keys"]);
        let line = metrics.lines().find(|line| line.starts_with("gensync_table_lost_bytes{")).unwrap();
        assert!(line.ends_with(&format!("}} {lost}")), "{line}");
        let findings = place.objects(&["doctor"]);
        assert_eq!(findings.iter().any(|finding| finding["check"] == "texts"), is_noted, "{lost}: {findings:?}");
        if is_noted {
            let finding = check(&findings, "texts");
            assert_eq!(finding["verdict"], "note");
            assert!(finding["advice"].as_str().unwrap().contains("`gensync reset --yes`"), "{finding}");
        }
    }
    place.succeed(&["reset", "--yes"]);
    assert_eq!(place.object(&["stat"])["lost_bytes"], 0);
    assert!(!place.succeed(&["stat"]).contains("belong to no key"));
    // Less than a tenth, however much it is.
    let table = place.table();
    keys(800).for_each(|key| drop(gensync::GenerationSynchronizer::new(&table, gensync::CacheKey::raw(key)).unwrap()));
    forge(&place, count_of_texts(&place), 800 * 1016 + (66 << 10));
    assert_eq!(place.object(&["stat"])["lost_bytes"], 66 << 10);
    assert!(place.objects(&["doctor"]).iter().all(|finding| finding["check"] != "texts"));
}

#[test]
fn room_that_a_killed_process_has_made_is_shown_and_is_no_alarm() {
    let place = place();
    let stat = place.object(&["stat"]);
    assert_eq!(stat["spare_bytes"], 0);
    assert!(!place.succeed(&["stat"]).contains("more than that"));
    let file = fs::File::options().write(true).open(&place.path).unwrap();
    file.set_len(stat["bytes"].as_u64().unwrap() + (64 << 10)).unwrap();
    assert_eq!(place.object(&["stat"])["spare_bytes"], 64 << 10);
    assert_eq!(place.object(&["stat"])["bytes"], stat["bytes"]);
    assert!(place.succeed(&["stat"]).contains("64.0 KiB more than that"));
    let findings = place.objects(&["doctor"]);
    assert!(
        findings.iter().all(|finding| finding["verdict"] == "ok" || finding["check"] == "processes"),
        "{findings:?}"
    );
    // The next growth uses it.
    let table = place.table();
    (0..3000).for_each(|i| drop(gensync::GenerationSynchronizer::new(&table, format!("key:{i}")).unwrap()));
    assert_eq!(place.object(&["stat"])["spare_bytes"], 0);
    // An anonymous table is sparse, and has no such room.
    let table = gensync::Table::options().anonymous().unwrap();
    let _sync = gensync::GenerationSynchronizer::new(&table, "of-spare-room").unwrap();
    let all = objects(&said(program().args(["--json", "tables"]).output().unwrap()).out);
    let own = format!("/proc/{}/fd/", std::process::id());
    let paths = all.iter().filter_map(|object| object["table"].as_str()).filter(|path| path.starts_with(&own));
    let stats: Vec<_> = paths
        .map(|path| objects(&said(program().args(["--json", "-t", path, "stat"]).output().unwrap()).out))
        .collect();
    assert!(stats.iter().flatten().all(|stat| stat["spare_bytes"] == 0), "{stats:?}");
    assert!(stats.iter().flatten().count() > 0);
}

//! Guards against a `reset` or `rm` by accident, and against processes that do not notice one.

use std::fs;
use std::io::{BufRead as _, BufReader};

use gensync::{ErrorKind, Table};
use nix::mount::{MsFlags, mount};
use nix::unistd::Uid;

use crate::support::{in_child, keep_mounts_apart};
use crate::tool::Place;

#[test]
fn without_a_terminal_it_takes_a_yes() {
    let place = Place::with_keys(["a"]);
    let sync = place.sync("a");
    for command in ["reset", "rm"] {
        place.fail(2, "give --yes", &[command]);
        assert!(!sync.is_expired() && place.path.exists());
    }
}

#[test]
fn a_reset_expires_every_process_and_they_go_on_together() {
    let place = Place::with_keys(["a", "nobody's"]);
    let [one, other] = ["a", "a"].map(|key| place.sync(key));
    let said = place.succeed(&["reset", "--yes"]);
    let incarnation = place.object(&["stat"])["incarnation"].as_str().unwrap().to_owned();
    assert_eq!(said, format!("{} has begun anew, as incarnation {incarnation}\n", place.path.display()));
    assert!(one.is_expired() && other.is_expired());
    one.refresh().unwrap();
    other.refresh().unwrap();
    one.mark_updated().unwrap();
    assert!(other.is_expired());
    assert_eq!(place.objects(&["ls"]).len(), 1);
    let object = place.object(&["reset", "-y"]);
    assert_eq!(object["table"], place.path.to_str().unwrap());
    assert_ne!(object["incarnation"], *incarnation);
}

#[test]
fn a_table_that_stays_where_it_is_is_not_said_to_be_another_one() {
    if !Uid::effective().is_root() {
        eprintln!("skipped, as only root may mount");
        return;
    }
    let place = Place::with_keys(["a"]);
    in_child(|| {
        keep_mounts_apart();
        mount(Some(&place.path), &place.path, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        let said = place.run(&["create", "b"]);
        assert!(said.status == 0 && said.err.contains("is a mount point of its own"), "{said:?}");
        let before = place.object(&["stat"])["incarnation"].clone();
        for arguments in [["reset", "--yes", "--json"], ["rm", "--yes", "--json"]] {
            let sync = place.sync("a");
            let said = place.run(&arguments);
            assert_eq!(sync.is_expired(), arguments[0] == "reset", "{said:?}");
            assert_eq!(said.status == 0, arguments[0] == "reset", "{said:?}");
        }
        let said = place.succeed(&["reset", "--yes"]);
        assert!(
            said.contains("every key has expired, and stays, as the file cannot be replaced: it is a mount"),
            "{said}"
        );
        let object = place.object(&["reset", "--yes"]);
        assert_eq!((&object["in_place"], &object["incarnation"]), (&true.into(), &before));
        assert_eq!(place.objects(&["ls"]).len(), 2);
    })
    .succeeds();
    assert_eq!(place.object(&["reset", "--yes"])["in_place"], false);
}

#[test]
fn a_removed_table_is_gone_until_it_is_used_again() {
    let place = Place::with_keys(["a"]);
    let frozen = Table::options().create(false).open(&place.path).unwrap();
    let frozen = gensync::GenerationSynchronizer::new(&frozen, "a").unwrap();
    let said = place.run(&["rm", "--yes"]);
    assert_eq!((said.status, said.out), (0, format!("{} is removed\n", place.path.display())));
    assert_eq!(fs::read_dir(place.folder.path()).unwrap().count(), 0);
    // A process that may not make a table has none.
    assert!(frozen.is_expired());
    assert!(matches!(frozen.refresh().unwrap_err().kind(), ErrorKind::NotFound));
    place.fail(3, "no such table", &["rm", "--yes"]);
    // A process that may, makes one.
    let sync = place.sync("a");
    let object = place.object(&["rm", "--yes"]);
    assert_eq!(object["removed"], true);
    assert!(sync.is_expired() && place.path.exists());
    sync.refresh().unwrap();
    assert_eq!(place.objects(&["ls"]).len(), 1);
}

#[test]
fn processes_that_use_it_are_counted() {
    let place = Place::with_keys(["a"]);
    let child = crate::support::in_child(|| {
        let _sync = place.sync("a");
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGSTOP).unwrap();
    });
    crate::tool::eventually("waiting for a process", || !place.objects(&["ps"]).is_empty());
    let said = place.run(&["rm", "--yes"]);
    assert_eq!(said.status, 0);
    assert!(said.err.contains("processes that had the table mapped: 1;"), "{said:?}");
    drop(child);
}

#[test]
fn a_reset_that_others_finish_is_a_success() {
    let place = Place::with_keys(["a"]);
    for _ in 0..5 {
        let sync = place.sync("a");
        let resets: Vec<_> = (0..6).map(|_| place.start(&["reset", "--yes"])).collect();
        for reset in resets {
            let said = reset.said();
            assert_eq!((said.status, &*said.err), (0, ""), "{said:?}");
            assert!(said.out.contains("has begun anew"), "{said:?}");
        }
        assert!(sync.is_expired());
    }
}

#[test]
fn what_a_reset_waits_for_is_reported() {
    let place = Place::with_keys(["a"]);
    let sync = place.sync("a");
    let update = sync.begin_update().unwrap();
    let mut reset = place.start(&["reset", "--yes"]);
    let mut line = String::new();
    BufReader::new(reset.child().stderr.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("waiting for updates in flight to end, for 30 s at most"), "{line}");
    assert!(line.contains(&std::process::id().to_string()), "{line}");
    update.finish().unwrap();
    assert_eq!(reset.status().code(), Some(0));
}

#[test]
fn a_key_that_went_with_a_reset_is_distinguished_from_one_that_never_was() {
    let place = Place::with_keys(["a"]);
    let never = place.run(&["mark", "b"]);
    assert!(never.status == 1 && !never.err.contains("began anew"), "{never:?}");
    place.succeed(&["reset", "--yes"]);
    for arguments in [&["mark", "a"][..], &["clear", "a"], &["get", "a"], &["wait", "a"], &["mark", "a*"]] {
        place.fail(1, "the table began anew at 20", arguments);
        place.fail(1, "`mark --create`", arguments);
    }
    for command in ["mark", "clear"] {
        place.succeed(&[command, "--create", "a"]);
    }
    assert_eq!(place.object(&["get", "a"])["updates"], 2);
}

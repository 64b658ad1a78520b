//! Guards against a command that announces a key in another generation than the one that processes share for it, or in none.

use std::num::NonZeroU32;

use gensync::{CacheKey, GenerationSynchronizer, KeyNormalizer};

use crate::support::LIMIT;
use crate::tool::{Place, Said, eventually, said};

/// Of this process, as an application's: in one of `count` generations.
fn sync(place: &Place, key: impl Into<CacheKey>, count: u32) -> GenerationSynchronizer {
    let count = NonZeroU32::new(count).unwrap();
    GenerationSynchronizer::new(&place.table(), key.into().in_generations(count)).unwrap()
}

/// Asserts that `command` of `arguments` announces exactly what `sync` is for, once, and says its label.
fn assert_announces(place: &Place, sync: &GenerationSynchronizer, command: &str, arguments: &[&str]) {
    let seen = sync.refresh().unwrap().get();
    let updates: u64 = place.table().slots().map(|slot| slot.updates()).sum();
    let behind: &[&str] = if command == "exec" { &["--", "true"] } else { &[] };
    let objects = place.objects(&[&[command], arguments, behind].concat());
    assert!(sync.is_expired(), "{command} {arguments:?} announced {objects:?}, not {}", sync.cache_key());
    assert_eq!(objects.len(), 1);
    assert_eq!(
        (&objects[0]["key"], &objects[0]["generation"]),
        (&sync.cache_key().as_str().into(), &(seen + 1).into())
    );
    assert_eq!(place.table().slots().map(|slot| slot.updates()).sum::<u64>(), updates + 1);
}

#[test]
fn a_shell_announces_a_key_to_the_processes_that_share_its_generation() {
    let place = Place::empty();
    let sync = sync(&place, "url:http://a", 4096);
    let other = place.sync("url:http://a");
    let label = sync.cache_key().as_str().to_owned();
    assert!(label.starts_with("url:%/4096/"), "{label}");
    let script = r#""$0" mark --generations 4096 url:http://a"#;
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", script, env!("CARGO_BIN_EXE_gensync")]).env("GENSYNC_TABLE", &place.path);
    let said = said(shell.output().unwrap());
    assert!(sync.is_expired() && !other.is_expired());
    let generation = sync.refresh().unwrap();
    assert_eq!((said.status, said.out, &*said.err), (0, format!("{label}  {generation}\n"), ""));
    // `get` prints the generation alone, and `create` finds what is there.
    assert_eq!(place.succeed(&["get", "--generations", "4096", "url:http://a"]), format!("{generation}\n"));
    assert_eq!(place.succeed(&["create", "--generations", "4096", "url:http://a"]), format!("{label}  {generation}\n"));
    for command in ["mark", "clear", "exec"] {
        assert_announces(&place, &sync, command, &["--generations", "4096", "url:http://a"]);
        // What `ls` shows is a key, too.
        assert_announces(&place, &sync, command, &[&label]);
    }
    assert!(!other.is_expired());
    assert_eq!(place.table().stats().keys, 2);
}

#[test]
fn each_way_to_name_a_key_leads_to_the_generation_that_it_shares() {
    let place = Place::empty();
    let django = KeyNormalizer::new().domain("example.com").site_root("/r/");
    let long = "url:http://x/?q=".to_owned() + &"x".repeat(300);
    for (key, arguments) in [
        (CacheKey::from("url:http://x/?a[]=1"), &["url:http://x/?a[]=1"][..]),
        (CacheKey::from(&long), &[&long]),
        (CacheKey::from("a b"), &["a b"]),
        (CacheKey::from("a*b"), &["--part", "a*b"]),
        (CacheKey::from(["url", "http://x"]), &["--part", "url", "--part", "http://x"]),
        (CacheKey::raw("a b*"), &["--raw", "a b*"]),
        (django.normalize("url:http://x"), &["--domain", "example.com", "--site-root", "/r/", "url:http://x"]),
        (
            django.normalize(["u", "1"]),
            &["--domain", "example.com", "--site-root", "/r/", "--part", "u", "--part", "1"],
        ),
    ] {
        let sync = sync(&place, key, 4096);
        for command in ["mark", "clear", "exec"] {
            assert_announces(&place, &sync, command, &[&["--generations", "4096"], arguments].concat());
        }
        let generation = place.succeed(&[&["get", "--generations=4096"], arguments].concat());
        assert_eq!(generation, format!("{}\n", sync.refresh().unwrap()));
    }
    assert_eq!(place.table().stats().keys, 8);
}

/// The text of an escaped part is not what a user types: in one string, it is another key.
#[test]
fn a_key_of_parts_that_are_escaped_is_found_by_its_parts_and_the_tool_says_so() {
    let place = Place::empty();
    let parts = ["--part", "url", "--part", "http://x"];
    let alone = GenerationSynchronizer::new(&place.table(), ["url", "http://x"]).unwrap();
    let shared = sync(&place, ["url", "http://x"], 8);
    assert_eq!(alone.cache_key().as_str(), "url:http%3A//x");
    // With generations, the one string is not missing where processes use its generation, but it is the wrong one.
    let wrong = sync(&place, "url:http://x", 8);
    assert_ne!(wrong.cache_key(), shared.cache_key());
    assert_announces(&place, &wrong, "mark", &["--generations", "8", "url:http://x"]);
    assert!(!shared.is_expired());
    for command in ["mark", "clear", "exec"] {
        assert_announces(&place, &shared, command, &[&["--generations", "8"], &parts[..]].concat());
        assert_announces(&place, &alone, command, &parts);
        // What `ls` shows of a key with a generation of its own is the key. Its text has the same shared generation, too.
        assert_announces(&place, &alone, command, &["url:http%3A//x"]);
        assert_announces(&place, &shared, command, &["--generations", "8", "url:http%3A//x"]);
    }
    let keys = place.table().stats().keys;
    let advice = "by --part for each part";
    for given in [&["url:http://x"][..], &["50%:a"], &["--generations", "4096", "url:http://x"], &["a:b", "a:b:c"]] {
        for command in ["mark", "clear", "get", "wait"] {
            place.fail(1, advice, &[&[command], given].concat());
        }
        place.fail(125, advice, &[&["exec", "--must-exist"], given, &["--", "true"]].concat());
    }
    for given in
        [&["url:x"][..], &["--raw", "url:http://x"], &["--part", "a", "--part", "b:c"], &["--generations", "7", "u:1"]]
    {
        let said = place.run(&[&["get"], given].concat());
        assert!(said.status == 1 && said.err.contains("no such key") && !said.err.contains("--part"), "{said:?}");
    }
    assert_eq!(place.table().stats().keys, keys);
    // A command that is run all the same, and creates the key, gives the advice as well.
    alone.refresh().unwrap();
    let said = place.run(&["exec", "url:http://x", "--", "true"]);
    assert!(said.status == 0 && said.err.contains(advice), "{said:?}");
    assert!(!alone.is_expired());
}

#[test]
fn a_generation_that_no_process_uses_is_created_on_demand_only() {
    let place = Place::with_keys(["url:http://a"]);
    let label =
        KeyNormalizer::new().normalize(CacheKey::from("url:http://a").in_generations(NonZeroU32::new(4096).unwrap()));
    let generations = ["--generations", "4096", "url:http://a"];
    for command in ["mark", "clear", "get", "wait"] {
        place.fail(1, &format!("no such key: {label}\n"), &[&[command], &generations[..]].concat());
    }
    let trailing = [&generations[..], &["--", "false"]].concat();
    place.fail(125, &format!("no such key: {label}\n"), &[&["exec", "--must-exist"], &trailing[..]].concat());
    place.fail(125, "looks like a glob", &["exec", "--generations", "4096", "url:*", "--", "false"]);
    assert_eq!(place.table().stats().keys, 1);
    place.fail(1, &format!("{label}: created"), &[&["exec"], &trailing[..]].concat());
    assert_eq!(place.object(&["get", label.as_str()])["updates"], 1);
    let empty = Place::empty();
    empty.succeed(&[&["mark", "--create"], &generations[..]].concat());
    let keys: Vec<_> = empty.table().slots().map(|slot| slot.label().into_owned()).collect();
    assert_eq!(keys, [label.as_str()]);
}

#[test]
fn two_keys_of_one_generation_are_announced_once_and_both_are_waited_for() {
    let place = Place::empty();
    let syncs = ["u:0", "u:1", "u:2", "u:3"].map(|key| sync(&place, key, 2));
    // Two of them share a generation, and one has the other.
    let place_of = |index: usize| syncs.iter().position(|sync| sync.cache_key().as_str() == format!("u:%/2/{index}"));
    let [zero, one] = [place_of(0).unwrap(), place_of(1).unwrap()];
    let twin = (0..4).find(|i| *i != zero && *i != one).unwrap();
    let (same, alone) = if syncs[twin].cache_key() == syncs[zero].cache_key() { (zero, one) } else { (one, zero) };
    let [twin_key, same_key, alone_key] = [twin, same, alone].map(|i| format!("u:{i}"));
    for command in ["mark", "clear", "exec"] {
        assert_announces(&place, &syncs[same], command, &["--generations", "2", &twin_key, &same_key]);
        assert!(syncs[twin].is_expired() && !syncs[alone].is_expired());
    }
    // Each key that is given has its line and its place in the order, whichever of them share a generation.
    let keys = ["--generations", "2", &twin_key, &same_key, &alone_key];
    let lines = place.succeed(&[&["get"], &keys[..]].concat());
    let seen: Vec<_> = lines.lines().map(|line| line.split_whitespace().last().unwrap()).collect();
    assert!(seen.len() == 3 && seen[0] == seen[1], "{lines}");
    let seen_each = ["--seen", seen[0], "--seen", seen[1], "--seen", seen[2]];
    let wait = [&["wait"], &keys[..], &seen_each].concat();
    place.fail(1, "timed out", &[&wait[..], &["--timeout", "10ms"]].concat());
    let waiter = place.start(&[&["--json"], &wait[..]].concat());
    let slot = || place.table().slot(syncs[twin].cache_key()).unwrap().unwrap();
    eventually("waiting for a waiter", || slot().is_awaited());
    let generation = syncs[twin].mark_updated().unwrap().get();
    let Said { status, out, .. } = waiter.said();
    let objects = crate::tool::objects(&out);
    assert_eq!((status, objects.len()), (0, 2), "{objects:?}");
    for object in &objects {
        assert_eq!((&object["key"], &object["generation"]), (&slot().label().into(), &generation.into()));
    }
}

#[test]
fn a_glob_announces_each_generation_in_which_a_matching_key_may_be() {
    let place = Place::empty();
    let families = ["url:http://a", "user:1", "bare", "example.com:/:url:1"].map(|key| sync(&place, key, 4096));
    // Of a family that is too long to be kept.
    let long = "f".repeat(250) + ":1";
    let long = sync(&place, CacheKey::raw(&long), 17);
    let ordinary = place.sync("url:%/4096/x");
    for (glob, expected) in [
        ("url:*", [true, false, false, false, false]),
        ("url:http://a/*", [true, false, false, false, false]),
        ("url:?", [true, false, false, false, false]),
        ("ur*", [true, false, true, false, true]),
        ("u*", [true, true, true, false, true]),
        ("*:name", [true; 5]),
        ("example.com:/:url:*", [false, false, false, true, false]),
        ("b?re", [false, false, true, false, true]),
        ("other:*", [false; 5]),
        (&*("f".repeat(250) + ":*"), [false, false, true, false, true]),
    ] {
        for (command, behind) in [("mark", &[][..]), ("clear", &[]), ("exec", &["--", "true"])] {
            let said = place.run(&[&[command, glob], behind].concat());
            let expired = families.iter().chain([&long]).map(GenerationSynchronizer::is_expired);
            assert!(expired.eq(expected), "{command} {glob}: {said:?}");
            assert_eq!(ordinary.is_expired(), ["url:*", "ur*", "u*"].contains(&glob), "{command} {glob}");
            families.iter().chain([&long, &ordinary]).for_each(|sync| _ = sync.refresh().unwrap());
        }
    }
    // What is only shown is not widened.
    place.fail(1, "no key matches", &["ls", "url:http://a/*"]);
}

#[test]
fn a_killed_exec_announces_the_shared_generation() {
    use nix::sys::signal::{Signal, kill};
    let place = Place::empty();
    let sync = sync(&place, "url:http://a", 4096);
    let begun = place.folder.path().join("begun");
    let script = format!("> {}; exec sleep 60", begun.display());
    let tool = place.start(&["exec", "--generations", "4096", "url:http://a", "--", "sh", "-c", &script]);
    eventually("waiting for the command to begin", || begun.exists());
    assert!(!sync.is_expired());
    let command = crate::tool::child_of(tool.pid(), "sleep");
    tool.signal(Signal::SIGKILL);
    assert!(sync.wait_timeout(LIMIT).is_changed());
    kill(command, Signal::SIGKILL).unwrap();
    assert_eq!(place.table().stats().keys, 1);
}

#[test]
fn help_and_completions_have_the_option() {
    let place = Place::empty();
    for command in ["mark", "clear", "get", "create", "exec", "wait"] {
        assert!(place.succeed(&[command, "--help"]).contains("--generations <N>"), "{command}");
        assert!(place.succeed(&["man", command]).contains("\\-\\-generations"), "{command}");
        let help = place.succeed(&[command, "--help"]).split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(help.contains("give a key of parts by --part"), "{command}: {help}");
    }
    for shell in ["bash", "zsh", "fish"] {
        assert!(place.succeed(&["completions", shell]).contains("generations"), "{shell}");
    }
}

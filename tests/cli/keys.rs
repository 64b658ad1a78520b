//! Guards `ls`, `get`, `mark`, `clear` and `create` against taking one key for another, and against keys that are hostile, long,
//! not text, or many.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use gensync::{CacheKey, GenerationSynchronizer, KeyNormalizer, Table};

use crate::tool::Place;

#[test]
fn keys_are_listed_sorted_and_aligned_with_what_is_known_of_each() {
    let place = Place::with_keys(["b", "a longer key", "c"]);
    let [b, c] = ["b", "c"].map(|key| place.sync(key));
    (0..12).for_each(|_| _ = b.mark_updated().unwrap());
    let update = c.begin_update().unwrap();
    let generation = b.refresh().unwrap().get();
    let out = place.succeed(&["ls"]);
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(lines.len(), 4);
    let words: Vec<Vec<_>> = lines.iter().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(words[0], ["KEY", "GENERATION", "UPDATES", "WAITERS", "PENDING"]);
    assert!(lines[1].starts_with("a longer key  ") && lines[1].ends_with("    0  -        -"), "{out}");
    assert_eq!(words[2], ["b", &generation.to_string(), "12", "-", "-"]);
    assert_eq!(words[3][2..], ["0", "-", "1"]);
    // The numbers end where their headings end.
    let end = lines[0].find("GENERATION").unwrap() + "GENERATION".len();
    assert!(lines[1..].iter().all(|line| line.as_bytes()[end] == b' ' && line.as_bytes()[end - 1].is_ascii_digit()));
    update.finish().unwrap();

    assert!(place.succeed(&["ls", "--sort", "updates"]).lines().nth(1).unwrap().starts_with("b "));
    c.mark_updated().unwrap();
    place.sync("newest");
    assert!(place.succeed(&["ls", "--sort", "generation"]).lines().nth(1).unwrap().starts_with("newest "));
}

#[test]
fn an_object_per_line_says_the_same() {
    let place = Place::with_keys(["a", "b"]);
    let sync = place.sync("b");
    sync.mark_updated().unwrap();
    let objects = place.objects(&["ls"]);
    assert_eq!(objects.len(), 2);
    let b = &objects[1];
    assert_eq!((&b["key"], &b["updates"], &b["pending"]), (&"b".into(), &1.into(), &0.into()));
    assert_eq!(b["generation"], sync.refresh().unwrap().get());
    assert_eq!((&b["waiters"], &b["truncated"], &b["abandoned"]), (&false.into(), &false.into(), &false.into()));
    // `--json` may stand before or behind the command.
    assert_eq!(place.succeed(&["ls", "--json"]), place.succeed(&["--json", "ls"]));
}

#[test]
fn a_glob_chooses_keys() {
    let place = Place::with_keys(["user:1", "user:22", "users/all", "routes"]);
    let keys = |glob: &str| place.objects(&["ls", glob]).iter().map(|key| key["key"].clone()).collect::<Vec<_>>();
    assert_eq!(keys("user:*"), ["user:1", "user:22"]);
    assert_eq!(keys("user:?"), ["user:1"]);
    assert_eq!(keys("*s*"), ["routes", "user:1", "user:22", "users/all"]);
    assert_eq!(keys("user[:s]*"), ["user:1", "user:22", "users/all"]);
    assert_eq!(keys("user[!s]2*"), ["user:22"]);
    assert_eq!(keys("routes"), ["routes"]);
    place.fail(1, "no key matches 'route'", &["ls", "route"]);
    place.fail(2, "invalid value '[' for '[GLOB]'", &["ls", "["]);
    // Without a glob, an empty list is no failure.
    assert_eq!(Place::with_keys([]).succeed(&["ls"]).lines().count(), 1);
}

#[test]
fn a_generation_is_printed_alone_for_scripts() {
    let place = Place::with_keys(["a"]);
    let generation = place.sync("a").sync_gen().unwrap().get();
    assert_eq!(place.succeed(&["get", "a"]), format!("{generation}\n"));
    assert_eq!(place.object(&["get", "a"])["generation"], generation);
    place.fail(1, "no such key: b", &["get", "b"]);
    place.fail(1, "`gensync create` makes one", &["--json", "get", "b"]);
}

#[test]
fn keys_are_made_as_the_library_makes_them() {
    let place = Place::empty();
    let table = place.table();
    let normalizer = KeyNormalizer::new().domain("example.com").site_root("/r/");
    for (arguments, key) in [
        (&["a b"][..], KeyNormalizer::new().normalize("a b")),
        (&["--part", "tenant", "--part", "a:b%"], KeyNormalizer::new().normalize(["tenant", "a:b%"])),
        (&["--part", "-x"], KeyNormalizer::new().normalize("-x")),
        (&["--part", "a*b"], KeyNormalizer::new().normalize("a*b")),
        (&["--raw", "a b"], CacheKey::raw("a b")),
        (&["--domain", "example.com", "--site-root", "/r/", "user 1"], normalizer.normalize("user 1")),
        (
            &["--domain", "example.com", "--site-root", "/r/", "--part", "u", "--part", "1"],
            normalizer.normalize(["u", "1"]),
        ),
        (&[&"long".repeat(100)], KeyNormalizer::new().normalize("long".repeat(100))),
    ] {
        assert_eq!(table.generation(&key).unwrap(), None);
        let created = place.succeed(&[&["create"], arguments].concat());
        let slot = table.slot(&key).unwrap().unwrap_or_else(|| panic!("{key} was not made"));
        assert!(created.trim_end().ends_with(&slot.generation().to_string()), "{created}");
        // Creating it again changes nothing.
        assert_eq!(place.succeed(&[&["create"], arguments].concat()), created);
        assert_eq!(place.object(&[&["get"], arguments].concat())["key"], key.as_str());
        for command in ["mark", "clear"] {
            let before = table.generation(&key).unwrap().unwrap().get();
            assert_eq!(place.object(&[&[command], arguments].concat())["generation"], before + 1);
            assert_eq!(table.generation(&key).unwrap().unwrap().get(), before + 1);
        }
    }
    assert_eq!(table.stats().keys, 8);
}

#[test]
fn create_makes_the_table_with_its_options() {
    let place = Place::empty();
    place.succeed(&["create", "--mode", "660", "--capacity", "9", "a"]);
    assert_eq!(fs::metadata(&place.path).unwrap().permissions().mode() & 0o7777, 0o660);
    assert_eq!(place.object(&["stat"])["capacity"], 16);
    assert!(!place.sync("a").is_expired());
    for argument in [["--mode", "888"], ["--mode", "0"], ["--mode", "7777"], ["--capacity", "0"], ["--capacity", "x"]] {
        place.fail(2, argument[0], &["create", argument[0], argument[1], "a"]);
    }
}

#[test]
fn a_table_that_is_there_is_not_taken_for_the_one_that_was_asked_for() {
    let place = Place::with_keys(["a"]);
    fs::set_permissions(&place.path, fs::Permissions::from_mode(0o666)).unwrap();
    place.fail(3, "its mode is 0666, expected mode 0600", &["create", "--mode", "600", "b"]);
    assert_eq!(place.table().stats().keys, 1);
    place.succeed(&["create", "--mode", "666", "b"]);
    assert!(place.run(&["create", "--capacity", "4096", "b"]).err.contains("--capacity is for a new one"));
    if std::os::unix::fs::chown(&place.path, Some(1000), None).is_err() {
        return eprintln!("skipped: only root can give a file to another user");
    }
    place.fail(3, "its mode is 0666 and belongs to", &["create", "--mode", "600", "c"]);
    let said = place.run(&["create", "c"]);
    assert!(said.status == 0 && said.err.contains("can forge generations"), "{said:?}");
}

#[test]
fn a_missing_folder_is_named() {
    let place = Place::empty();
    let path = place.folder.path().join("missing/deeper/table");
    let missing = place.folder.path().join("missing");
    let text = format!("no such folder: {} does not exist", missing.display());
    for command in ["create", "get", "mark"] {
        place.fail(3, &text, &["--table", path.to_str().unwrap(), command, "a"]);
    }
}

#[test]
fn several_keys_are_created_and_printed_and_one_is_found_by_its_digest() {
    let place = Place::empty();
    let long = "x".repeat(150);
    assert_eq!(place.succeed(&["create", "a", "b", "a", &long]).lines().count(), 3);
    let lines = place.succeed(&["get", "a", "b"]);
    assert!(lines.starts_with("a  ") && lines.contains("\nb  "), "{lines}");
    let said = place.run(&["get", "a", "c", "b"]);
    assert_eq!((said.status, said.out.lines().count()), (1, 2), "{said:?}");
    // Every key that is listed can be named.
    for key in place.objects(&["ls"]) {
        let digest = key["digest"].as_str().unwrap();
        let generation = key["generation"].as_u64().unwrap();
        assert_eq!(place.succeed(&["get", "--digest", digest]), format!("{generation}\n"));
        assert_eq!(place.object(&["mark", "--digest", digest])["generation"], generation + 1);
        assert_eq!(place.object(&["clear", "--digest", digest])["generation"], generation + 2);
    }
    place.fail(1, "no key has the digest", &["mark", "--digest", &"0".repeat(32)]);
    place.fail(1, "no key has the digest", &["get", "--digest", &"0".repeat(32)]);
    place.fail(2, "32 hexadecimal digits", &["get", "--digest", "12"]);
    place.fail(2, "cannot be used with", &["mark", "--create", "--digest", &"0".repeat(32)]);
}

#[test]
fn marked_and_cleared_keys_expire_in_every_process_and_others_do_not() {
    for command in ["mark", "clear"] {
        let place = Place::with_keys(["user:1", "user:2", "routes", "groups"]);
        let syncs = ["user:1", "user:2", "routes", "groups"].map(|key| place.sync(key));
        let expired = || syncs.each_ref().map(GenerationSynchronizer::is_expired);
        let generation = syncs[0].sync_gen().unwrap().get();
        assert_eq!(place.succeed(&[command, "user:1"]), format!("user:1  {}\n", generation + 1));
        assert_eq!(expired(), [true, false, false, false]);
        place.succeed(&[command, "routes", "user:*"]);
        assert_eq!(expired(), [true, true, true, false]);
        syncs.iter().for_each(|sync| _ = sync.refresh().unwrap());
        assert_eq!(place.succeed(&[command, "--all"]).lines().count(), 4);
        assert_eq!(expired(), [true; 4]);
        assert_eq!(place.objects(&[command, "--all"]).len(), 4);
    }
}

#[test]
fn a_typing_error_creates_nothing_and_keeps_nothing_else_from_being_done() {
    let place = Place::with_keys(["a", "c"]);
    let [a, c] = ["a", "c"].map(|key| place.sync(key));
    let said = place.run(&["mark", "a", "b", "c", "x*", "y"]);
    assert_eq!(said.status, 1);
    assert!(a.is_expired() && c.is_expired());
    for text in ["no such key: b", "no such key: y", "no key matches 'x*'"] {
        assert!(said.err.contains(text), "{said:?}");
    }
    assert_eq!(place.table().stats().keys, 2);
    place.fail(1, "no such key: a*", &["mark", "--raw", "a*"]);
    place.fail(1, "no such key: a*", &["mark", "--part", "a*"]);
    place.fail(2, "'a[' is not a glob", &["mark", "a["]);
    // With `--create`, the key is created.
    place.succeed(&["mark", "--create", "b"]);
    assert_eq!(place.table().stats().keys, 3);
    let empty = Place::empty();
    empty.fail(3, "no such table", &["mark", "b"]);
    empty.fail(3, "no such table", &["clear", "--all"]);
    assert!(!empty.path.exists());
    empty.succeed(&["mark", "--create", "b"]);
    assert_eq!(empty.table().stats().keys, 1);
}

#[test]
fn long_keys_are_listed_and_matched_whole() {
    let long = "user:".to_owned() + &"x".repeat(30_000) + ":name";
    let place = Place::with_keys([&long, "user:1"]);
    let sync = place.sync(&long);
    let objects = place.objects(&["ls", "user:x*:name"]);
    assert_eq!((&objects[0]["key"], &objects[0]["truncated"]), (&(&*long).into(), &false.into()));
    assert_eq!(objects[0]["key_length"], long.len());
    let out = place.succeed(&["ls"]);
    assert!(out.contains(&format!("{long}  ")) && !out.contains('…'));
    assert!(
        out.lines().any(|line| line.starts_with("user:1 ") && line.len() < 200),
        "one key moves the others far away"
    );
    assert_eq!(place.object(&["get", "--raw", &long])["key"], *long);
    place.fail(1, "no such key", &["get", &long[..88]]);
    for command in ["mark", "clear"] {
        for glob in ["user:x*:name", "*:name", "*[mn]ame"] {
            assert_eq!(place.objects(&[command, glob]).len(), 1, "{glob}");
            assert!(sync.is_expired());
            sync.refresh().unwrap();
        }
        place.fail(1, "no key matches", &[command, "*:names"]);
        assert!(!sync.is_expired());
        place.succeed(&[command, "--raw", &long]);
        assert!(sync.is_expired());
        sync.refresh().unwrap();
    }
}

#[test]
fn a_key_that_the_table_cannot_keep_whole_is_shown_as_cut_and_never_left_out() {
    // Its last kept byte is the first of a character.
    let kept = "user:".to_owned() + &"x".repeat(65_530);
    let long = kept.clone() + "é:name";
    let place = Place::with_keys([&long, "user:1"]);
    let sync = place.sync(&long);
    let object = place.objects(&["ls", "user:x*"]).remove(0);
    assert_eq!((&object["truncated"], &object["key_length"]), (&true.into(), &long.len().into()));
    assert_eq!((&object["key"], object["key_hex"].is_string()), (&format!("{kept}\\xc3").into(), true));
    assert!(place.succeed(&["ls"]).contains(&format!("{kept}\\xc3…  ")));
    assert_eq!(place.object(&["get", "--raw", &long])["generation"], sync.sync_gen().unwrap().get());
    for (command, behind) in [("mark", &[][..]), ("clear", &[]), ("exec", &["--", "true"])] {
        // Any glob may match what was cut off.
        for choice in ["*:name", "routes*"] {
            assert_eq!(place.run(&[&[command, choice], behind].concat()).status, 0);
            assert!(sync.is_expired(), "{command} {choice}");
            sync.refresh().unwrap();
        }
        place.succeed(&[&[command, "--raw", &long], behind].concat());
        assert!(sync.is_expired());
        sync.refresh().unwrap();
    }
    let digest = object["digest"].as_str().unwrap();
    place.succeed(&["mark", "--digest", digest]);
    assert!(sync.is_expired());
    // Neither a shell nor a person can complete it.
    assert_eq!(place.succeed(&["__complete", "keys"]), "user:1\n");
    assert_eq!(place.table().stats().keys, 2, "what is kept of it is not taken for another key");
}

/// Overwrites the text of the key "label" by `text`, of at most 8 bytes.
#[expect(clippy::host_endian_bytes, reason = "the words of a table are in the machine's byte order")]
fn write_text(place: &Place, text: &[u8]) {
    let spot = place.spot("label");
    let mut padded = [0; 8];
    padded[..text.len()].copy_from_slice(text);
    place.write(spot.text, &padded);
    place.write(spot.lanes[2].start, &((spot.text - 8) | ((text.len() as u64) << 34)).to_ne_bytes());
}

#[test]
fn labels_that_are_not_text_are_escaped_and_printed_byte_by_byte() {
    let place = Place::with_keys(["label", "zzz"]);
    write_text(&place, b"caf\xc3\xa9\xff\xc3");
    let out = place.succeed(&["ls"]);
    assert!(out.contains("café\\xff\\xc3 "), "{out}");
    let key = &place.objects(&["ls"])[0];
    assert_eq!((&key["key"], &key["key_hex"]), (&"café\\xff\\xc3".into(), &"636166c3a9ffc3".into()));
    assert_eq!(place.objects(&["ls", "caf?*"]).len(), 1);
    let sync = place.sync("label");
    place.succeed(&["mark", "caf*"]);
    assert!(sync.is_expired(), "it is found by its digest, whatever its label says");
    for command in [&["stat"][..], &["doctor"], &["metrics"], &["--json", "metrics"], &["ps"]] {
        assert!(place.run(command).status <= 1);
    }
    // A record word of zero, or one that leads to an empty text, is none of gensync's.
    for word in [0, place.spot("zzz").text - 8] {
        let place = Place::with_keys(["zzz", "a"]);
        place.write(place.spot("zzz").lanes[2].start, &word.to_le_bytes());
        let key = &place.objects(&["ls"])[0];
        assert_eq!((&key["key"], &key["key_length"], &key["damaged"]), (&"".into(), &0.into(), &true.into()));
        assert!(place.succeed(&["ls"]).lines().nth(1).unwrap().starts_with("(no text) "));
        assert_eq!(place.succeed(&["__complete", "keys"]), "a\n");
        let doctor = place.run(&["doctor"]);
        assert!(doctor.status == 1 && doctor.out.contains("keys without a text: (no text)"), "{doctor:?}");
        for command in [&["stat"][..], &["metrics"], &["exec", "--all", "--", "true"], &["mark", "--all"]] {
            assert_eq!(place.run(command).status, 0, "{command:?}");
        }
    }
}

#[test]
fn nothing_that_a_key_contains_gets_to_the_terminal_raw() {
    let hostile = "a\u{1b}[31m\u{7}\r\n\u{7f}\u{9b}2J\u{202e}\u{200b}\0é'\"\\";
    let place = Place::with_keys([hostile]);
    let harmless = |text: &str| {
        let is_harmless =
            |character: char| character == '\n' || !character.is_control() && !"\u{202e}\u{200b}".contains(character);
        assert!(text.chars().all(is_harmless), "{text:?}");
    };
    for arguments in
        [&["ls"][..], &["--json", "ls"], &["mark", "--all"], &["metrics"], &["--json", "mark", "--raw", "a\u{9b}"]]
    {
        let said = place.run(arguments);
        harmless(&said.out);
        harmless(&said.err);
    }
    assert_eq!(place.objects(&["ls"])[0]["key"], hostile, "programs get it as it is");
    assert_eq!(place.succeed(&["ls"]).lines().count(), 2);
}

#[test]
fn a_hundred_thousand_keys() {
    let place = Place::empty();
    let table = Table::options().capacity(1 << 17).open(&place.path).unwrap();
    for i in 0..100_000 {
        GenerationSynchronizer::new(&table, format!("key:{i:05}")).unwrap();
    }
    let out = place.succeed(&["ls"]);
    assert_eq!(out.lines().count(), 100_001);
    assert!(out.lines().skip(1).zip(0..).all(|(line, i)| line.starts_with(&format!("key:{i:05}  "))));
    assert_eq!(place.objects(&["ls", "key:9999?"]).len(), 10);
    assert_eq!(place.succeed(&["--json", "ls"]).lines().count(), 100_000);
    assert_eq!(place.object(&["stat"])["keys"], 100_000);
    assert!(place.succeed(&["metrics"]).ends_with("# EOF\n"));
    // A command that streams needs no memory for so many keys. Those that sort fail here, which shows that the limit holds.
    for (arguments, streams) in [
        (&["ls", "--unsorted"][..], true),
        (&["--json", "ls", "--unsorted"], true),
        (&["metrics"], true),
        (&["ls"], false),
    ] {
        let mut limited = std::process::Command::new("prlimit");
        limited.args(["--data=4000000", "--core=0", env!("CARGO_BIN_EXE_gensync"), "--table"]);
        let output = limited.arg(&place.path).args(arguments).output().unwrap();
        assert_eq!(output.status.success(), streams, "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        let lines = output.stdout.split(|byte| *byte == b'\n').count();
        assert_eq!(lines > 100_000, streams, "{arguments:?}: {lines} lines");
    }
    assert_eq!(place.succeed(&["clear", "--all"]).lines().count(), 100_000);
}

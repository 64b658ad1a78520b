//! Guards against invalid OpenMetrics text and files that are written in part. A parser reads the text back that was written from
//! the standard, not from the program.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use crate::tool::{Lanes, Place, bytes};

/// Samples by name and labels.
type Samples = BTreeMap<(String, BTreeMap<String, String>), f64>;

/// Reads OpenMetrics text, and panics where it breaks a rule.
fn parse(text: &str) -> Samples {
    let body = text.strip_suffix("# EOF\n").expect("ends with # EOF and one line feed");
    let (mut samples, mut families) = (Samples::new(), BTreeSet::new());
    let mut family: Option<(String, String)> = None;
    for line in body.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(["gauge", "counter"].contains(&kind), "a node exporter does not know {kind}");
            assert!(families.insert(name.to_owned()), "{name} is described twice, or not in one piece");
            assert!(!name.ends_with("_total"), "{name}: the name of a family has no suffix");
            family = Some((name.to_owned(), kind.to_owned()));
            continue;
        }
        let (name, kind) = family.as_ref().expect("a type comes first");
        if let Some(rest) = line.strip_prefix("# HELP ") {
            assert_eq!(rest.split_once(' ').unwrap().0, name);
            continue;
        }
        assert!(!line.starts_with('#') && !line.is_empty(), "{line}");
        let (sample, rest) = line.split_once('{').unwrap();
        let expected = if kind == "counter" { format!("{name}_total") } else { name.clone() };
        assert_eq!(sample, expected);
        let (labels, value) = labels(rest);
        let value: f64 = value.strip_prefix(' ').unwrap().parse().unwrap();
        assert!(value.is_finite() && value >= 0.0);
        assert!(samples.insert((sample.to_owned(), labels), value).is_none(), "{line} is there twice");
    }
    samples
}

/// The labels up to the closing brace, and what comes after it.
fn labels(mut text: &str) -> (BTreeMap<String, String>, &str) {
    let mut labels = BTreeMap::new();
    loop {
        let (name, rest) = text.split_once("=\"").unwrap();
        assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{name}");
        let (mut value, mut end) = (String::new(), None);
        let mut characters = rest.char_indices();
        while let Some((at, character)) = characters.next() {
            match character {
                '"' => {
                    end = Some(at + 1);
                    break;
                }
                '\\' => value.push(match characters.next().unwrap().1 {
                    'n' => '\n',
                    escaped @ ('\\' | '"') => escaped,
                    other => panic!("\\{other} is no escape"),
                }),
                _ => value.push(character),
            }
        }
        assert!(labels.insert(name.to_owned(), value).is_none(), "{name} is there twice");
        let rest = &rest[end.unwrap()..];
        match rest.strip_prefix(',') {
            Some(next) => text = next,
            None => return (labels, rest.strip_prefix('}').unwrap()),
        }
    }
}

/// The only value of that name that has these labels.
fn value(samples: &Samples, name: &str, labels: &[(&str, &str)]) -> f64 {
    let matching = samples.iter().filter(|((found, has), _)| {
        found == name && labels.iter().all(|(name, value)| has.get(*name).is_some_and(|has| has == value))
    });
    let matching: Vec<_> = matching.collect();
    assert_eq!(matching.len(), 1, "{name} {labels:?}: {matching:?}");
    *matching[0].1
}

#[test]
fn figures_of_the_table_and_of_each_key_are_printed() {
    let place = Place::with_keys(["a", "b"]);
    let [a, b] = ["a", "b"].map(|key| place.sync(key));
    (0..3).for_each(|_| _ = a.mark_updated().unwrap());
    let update = b.begin_update().unwrap();
    let samples = parse(&place.succeed(&["metrics"]));
    let table = [("table", place.path.to_str().unwrap())];
    for (name, expected) in [
        ("gensync_table_keys", 2.0),
        ("gensync_table_slots", 1024.0),
        ("gensync_table_updates_total", 3.0),
        ("gensync_table_updates_pending", 1.0),
        ("gensync_table_keys_abandoned", 0.0),
        ("gensync_table_keys_awaited", 0.0),
        ("gensync_table_size_bytes", fs::metadata(&place.path).unwrap().len() as f64),
        // Two records, each of 8 bytes and a key that is filled up to 8.
        ("gensync_table_text_bytes", 32.0),
        ("gensync_table_lost_bytes", 0.0),
        ("gensync_table_longest_probe", 1.0),
        ("gensync_table", 1.0),
    ] {
        assert_eq!(value(&samples, name, &table), expected, "{name}");
    }
    assert_eq!(value(&samples, "gensync_key_updates_total", &[table[0], ("key", "a")]), 3.0);
    assert_eq!(value(&samples, "gensync_key_updates_pending", &[("key", "b")]), 1.0);
    assert_eq!(value(&samples, "gensync_key_generation", &[("key", "a")]), a.refresh().unwrap().get() as f64);
    // The process that has the table mapped is this test's own.
    assert_eq!(value(&samples, "gensync_table_processes", &[("file", "table")]), 1.0);
    for file in ["deleted", "reset", "older", "elsewhere"] {
        assert_eq!(value(&samples, "gensync_table_processes", &[("file", file)]), 0.0);
    }
    assert_eq!(value(&samples, "gensync_table_keys_damaged", &table), 0.0);
    update.finish().unwrap();

    let names = |arguments: &[&str]| {
        let samples = parse(&place.succeed(&[&["metrics"], arguments].concat()));
        samples.into_keys().filter_map(|(_, mut labels)| labels.remove("key")).collect::<BTreeSet<_>>()
    };
    assert!(names(&["b*"]).into_iter().eq(["b"]));
    assert!(names(&["x*"]).is_empty() && names(&["--no-keys"]).is_empty());
    place.fail(2, "cannot be used with", &["metrics", "--no-keys", "a"]);
    let objects = place.objects(&["metrics"]);
    assert!(
        objects.iter().any(|object| object["name"] == "gensync_key_updates_total" && object["labels"]["key"] == "a")
    );
}

#[test]
fn labels_are_escaped_and_never_the_same_for_two_keys() {
    let long = "l".repeat(65_537);
    let keys = [
        "q\"uote",
        "back\\slash",
        "new\nline",
        "new\\nline",
        "\u{1b}[31m",
        &long,
        &(long.clone() + "x"),
        "é,}=\" {",
        "\\",
    ];
    let place = Place::with_keys(keys);
    let samples = parse(&place.succeed(&["metrics"]));
    let names: Vec<_> = samples.keys().filter(|(name, _)| name == "gensync_key_updates_total").collect();
    assert_eq!(names.len(), keys.len());
    for key in ["q\"uote", "back\\slash", "é,}=\" {", "\\"] {
        value(&samples, "gensync_key_awaited", &[("key", key)]);
    }
    let with_digest = names.iter().filter(|(_, labels)| labels.contains_key("digest")).count();
    assert_eq!(with_digest, 4, "what is not printable, or too long");
    assert!(!names.iter().any(|(_, labels)| labels["key"].contains('\u{1b}')));
}

#[test]
fn a_file_is_replaced_as_a_whole() {
    let place = Place::with_keys(["a"]);
    let file = place.folder.path().join("gensync.prom");
    let name = file.to_str().unwrap();
    assert_eq!(place.succeed(&["metrics", "--output", name]), "");
    parse(&fs::read_to_string(&file).unwrap());
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o7777, 0o644);
    // A reader that has the old file open goes on reading it.
    let before = fs::File::open(&file).unwrap();
    place.sync("a").mark_updated().unwrap();
    place.succeed(&["metrics", "-o", name]);
    assert_ne!(before.metadata().unwrap().ino(), fs::metadata(&file).unwrap().ino());
    assert!(parse(&std::io::read_to_string(&before).unwrap()) != parse(&fs::read_to_string(&file).unwrap()));
    // A failure leaves the old file, and no temporary file beside it.
    let text = fs::read_to_string(&file).unwrap();
    let missing = place.folder.path().join("missing");
    let mut command = place.command(&["-t", missing.to_str().unwrap(), "metrics", "-o", name]);
    assert_eq!(command.output().unwrap().status.code(), Some(3));
    place.fail(3, "cannot be written", &["metrics", "-o", "/proc/nothing/here.prom"]);
    place.fail(2, "a value is required", &["metrics", "-o", ""]);
    assert_eq!(fs::read_to_string(&file).unwrap(), text);
    assert_eq!(fs::read_dir(place.folder.path()).unwrap().count(), 2);
}

#[test]
fn a_reader_never_finds_a_part_of_a_file() {
    let place = Place::with_keys([]);
    (0..200).for_each(|i| drop(place.sync(&format!("key:{i}"))));
    let file = place.folder.path().join("gensync.prom");
    let name = file.to_str().unwrap();
    place.succeed(&["metrics", "-o", name]);
    let mut killed = 0;
    for round in 0..60 {
        let writer = place.start(&["metrics", "-o", name]);
        let mut random = 1 + round;
        crate::support::dawdle(&mut random, 20_000);
        parse(&fs::read_to_string(&file).unwrap());
        writer.signal(nix::sys::signal::Signal::SIGKILL);
        killed += u32::from(writer.status().code().is_none());
        parse(&fs::read_to_string(&file).unwrap());
    }
    assert!(killed > 0, "none was killed on the way");
}

#[test]
fn slots_with_one_label_have_labels_of_their_own() {
    let long = "l".repeat(70_000);
    let place = Place::with_keys(["a", "b", "c", &long]);
    let spots = ["a", "b", &long].map(|key| place.spot(key));
    let content = bytes(&place.path);
    let copy = |from: &Range<u64>, to: &Range<u64>| {
        place.write(to.start, &content[from.start as usize..from.end as usize]);
    };
    // Three forgeries: the text of another key; a copy of another key's slot; a copy of a long key's slot.
    copy(&spots[0].lanes[2], &spots[1].lanes[2]);
    let is_free = |slot: &&Lanes| content[slot[1].start as usize..slot[1].end as usize] == [0; 16];
    let free: Vec<_> = spots[0].slots.iter().filter(is_free).take(2).collect();
    for (from, to) in [&spots[0], &spots[2]].into_iter().zip(free) {
        from.lanes.iter().zip(to).for_each(|(from, to)| copy(from, to));
    }
    let samples = parse(&place.succeed(&["metrics"]));
    let series = samples.keys().filter(|(name, labels)| name == "gensync_key_generation" && labels["key"] == "a");
    let with_digest: Vec<_> = series.map(|(_, labels)| labels.contains_key("digest")).collect();
    assert_eq!((with_digest.len(), with_digest.iter().filter(|has| !**has).count()), (3, 1));
}

#[test]
fn only_regular_files_are_replaced() {
    use std::os::unix::fs::{FileTypeExt as _, symlink};
    let place = Place::with_keys(["a"]);
    let at = |name: &str| place.folder.path().join(name);
    let name = |name: &str| at(name).to_str().unwrap().to_owned();

    parse(&place.succeed(&["metrics", "--output", "-"]));
    assert!(!at("-").exists());
    // If it were replaced, root would lose the device.
    let null = fs::metadata("/dev/null").unwrap();
    assert_eq!(place.succeed(&["metrics", "--output", "/dev/null"]), "");
    let now = fs::symlink_metadata("/dev/null").unwrap();
    assert!(now.file_type().is_char_device() && (now.ino(), now.mode()) == (null.ino(), null.mode()));
    let link = fs::read_link("/dev/stdout").unwrap();
    parse(&place.succeed(&["metrics", "--output", "/dev/stdout"]));
    parse(&place.succeed(&["metrics", "--output", "/proc/self/fd/1"]));
    assert_eq!(fs::read_link("/dev/stdout").unwrap(), link);
    let output = fs::File::create(at("output")).unwrap();
    let inode = output.metadata().unwrap().ino();
    let mut command = place.command(&["metrics", "--output", "/dev/stdout"]);
    assert!(command.stdout(output).status().unwrap().success());
    parse(&fs::read_to_string(at("output")).unwrap());
    assert_eq!(fs::metadata(at("output")).unwrap().ino(), inode);

    nix::unistd::mkfifo(&at("pipe"), nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let writer = place.start(&["metrics", "--output", &name("pipe")]);
    parse(&fs::read_to_string(at("pipe")).unwrap());
    assert_eq!(writer.said().status, 0);
    assert!(fs::symlink_metadata(at("pipe")).unwrap().file_type().is_fifo());

    // A link stays, and leads to the new file.
    fs::write(at("real"), "before").unwrap();
    symlink(at("real"), at("link")).unwrap();
    place.succeed(&["metrics", "--output", &name("link")]);
    assert!(fs::symlink_metadata(at("link")).unwrap().is_symlink());
    parse(&fs::read_to_string(at("real")).unwrap());
    symlink(at("nothing"), at("dangling")).unwrap();
    place.fail(3, "cannot be written", &["metrics", "--output", &name("dangling")]);
    place.fail(3, "it is a folder", &["metrics", "--output", place.folder.path().to_str().unwrap()]);
    if nix::unistd::Uid::effective().is_root() {
        std::os::unix::fs::lchown(at("link"), Some(65_534), None).unwrap();
        place.fail(3, "a symbolic link of another user's", &["metrics", "--output", &name("link")]);
    }
}

//! Guards against keys that mean harm: of any length and any characters, and a million that are made to crowd. And against shared
//! generations that another program would not find.

mod support;

use std::collections::HashSet;
use std::io::Write as _;
use std::num::NonZeroU32;
use std::process::{Command, Stdio};
use std::thread;

use gensync::{CacheKey, ErrorKind, GenerationSynchronizer, KeyNormalizer, Stats, Table, update_all};
use proptest::prelude::*;
use sha2::block_api::compress256;

fn anonymous() -> Table {
    Table::options().anonymous().unwrap()
}

/// Every kind of text that is known to have been taken for something other than text.
fn nasty() -> Vec<String> {
    let mut texts: Vec<String> = [
        " ",
        "%",
        "%%",
        "%25",
        "%2525",
        ":",
        "::",
        ":::",
        "a:",
        ":a",
        "a::b",
        "%3A",
        "%3a",
        "\\x00",
        "\\",
        "\"",
        "'",
        "/",
        "..",
        "\u{0}a",
        "a\u{0}",
        "a\u{0}b",
        "\u{feff}",
        "\u{200b}",
        "\u{202e}abc",
        "e\u{301}",
        "\u{e9}",
        "\u{fffd}",
        "\u{d7ff}",
        "\u{e000}",
        "\u{ffff}",
        "\u{10ffff}",
        "\u{1f468}\u{200d}\u{1f469}",
        "\r\n",
        "\u{1b}[2J",
        "\u{7f}",
        "\u{80}",
        "\u{a0}",
        "\u{2028}",
        "SELECT",
        "${jndi}",
        "{0}",
        "%s%n",
    ]
    .map(str::to_owned)
    .to_vec();
    texts.extend((0..=0xff).map(|code| char::from(code).to_string()));
    // Characters of every length, cut by the end of what is kept at every place.
    for character in ["a", "\u{e4}", "\u{20ac}", "\u{1f511}"] {
        texts.extend((65_532..=65_537).map(|length| "k".repeat(length) + character));
        texts.extend([7, 8, 30, 239, 1000].map(|count| character.repeat(count)));
    }
    texts.push("m".repeat(1 << 20));
    texts.push("\u{0}".repeat(1 << 20));
    let mut seen = HashSet::new();
    texts.retain(|text| seen.insert(text.clone()));
    texts
}

#[test]
fn any_text_but_the_empty_one_is_a_key_of_its_own() {
    let table = anonymous();
    let keys = nasty();
    let syncs: Vec<_> =
        keys.iter().map(|key| GenerationSynchronizer::new(&table, CacheKey::raw(key.as_str())).unwrap()).collect();
    assert_eq!(table.stats().keys, keys.len() as u64);
    for (key, sync) in keys.iter().zip(&syncs) {
        assert_eq!(sync.cache_key().as_str(), key);
        let generation = sync.mark_updated().unwrap();
        assert_eq!(table.generation(CacheKey::raw(key.as_str())).unwrap(), Some(generation));
        let others = syncs.iter().filter(|other| other.is_expired());
        assert_eq!(others.count(), 0, "another key than {:?} was updated", key.chars().take(100).collect::<String>());
    }
    let slots: Vec<_> = table.slots().collect();
    for key in &keys {
        let head = &key.as_bytes()[..key.len().min(65_536)];
        let is_listed = |slot: &&gensync::SlotInfo| {
            slot.label_bytes() == head && slot.key_length() == key.len() && slot.is_truncated() == (key.len() > 65_536)
        };
        let slot = slots.iter().find(is_listed).unwrap();
        // Cut within a character, it is still text for people.
        assert_eq!(slot.label(), String::from_utf8_lossy(head));
    }
}

#[test]
fn normalized_keys_are_short_and_without_what_memcached_refuses() {
    let normalizers = [
        KeyNormalizer::new(),
        KeyNormalizer::new().domain("example.com").site_root("/r/"),
        KeyNormalizer::new().domain("").site_root(""),
        KeyNormalizer::new().domain("a b\u{0}%:\u{e4}"),
        KeyNormalizer::new().domain("d".repeat(300)),
        KeyNormalizer::new().hmac_key(b""),
        KeyNormalizer::new().hmac_key(&[0xff; 1000]),
        KeyNormalizer::strict(),
        KeyNormalizer::strict().domain("a b\u{0}%:|\u{e4}").site_root("d".repeat(300)),
        KeyNormalizer::strict().hmac_key(b"key"),
    ];
    for normalizer in normalizers {
        let table = Table::options().normalizer(normalizer.clone()).anonymous().unwrap();
        for text in nasty() {
            let key = normalizer.normalize(text.as_str());
            let refused = key.as_str().bytes().find(|byte| *byte <= b' ' || *byte == 0x7f);
            assert_eq!(refused, None, "{:?}", key.as_str());
            assert!(key.as_str().chars().count() <= 240);
            assert_eq!(normalizer.normalize(&key), key, "what is normalized is left alone");
            let sync = GenerationSynchronizer::new(&table, text.as_str()).unwrap();
            assert_eq!(*sync.cache_key(), key);
            assert_eq!(table.generation(text.as_str()).unwrap(), sync.sync_gen());
        }
        let error = GenerationSynchronizer::new(&table, "").unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::EmptyKey);
        assert_eq!(error.to_string(), "the cache key is empty; give at least one character");
    }
}

#[test]
fn no_parts_make_the_key_of_other_parts() {
    let parts = ["", "%", ":", "%25", "%3A", "a", "a:", ":a", "%2", "5", "\u{e4}", "\u{0}"];
    let mut seen = HashSet::new();
    let mut tried = 0;
    let mut is_new = |parts: &[&str]| {
        tried += 1;
        seen.insert(CacheKey::from(parts).as_str().to_owned())
    };
    for one in parts {
        for two in parts {
            assert!(is_new(&[one, two]), "{one:?} {two:?}");
            for three in parts {
                assert!(is_new(&[one, two, three]), "{one:?} {two:?} {three:?}");
            }
        }
    }
    assert_eq!(tried, 12 * 12 + 12 * 12 * 12);
    // Several empty parts are no empty key; one is, and so are none.
    assert!(GenerationSynchronizer::new(&anonymous(), ["", ""]).is_ok());
    for key in [CacheKey::from([""]), CacheKey::from(Vec::<String>::new())] {
        assert_eq!(*GenerationSynchronizer::new(&anonymous(), key).unwrap_err().kind(), ErrorKind::EmptyKey);
    }
}

/// What makes a key: parts, a domain, a site root, and whether there is an HMAC key.
type Made = (Vec<String>, String, String, bool);

fn strictly((parts, domain, root, is_hashed): &Made) -> CacheKey {
    let mut normalizer = KeyNormalizer::strict().domain(domain).site_root(root);
    if *is_hashed {
        normalizer = normalizer.hmac_key(b"key");
    }
    normalizer.normalize(parts)
}

/// Of the characters that mean something to some normalizer, and the digits that could follow them.
fn text() -> impl Strategy<Value = String> {
    "[%:|~#/\\\\ \u{0}\u{e4}\u{10ffff}x0237ACac]{0,4}"
}

fn made() -> impl Strategy<Value = Made> {
    (prop::collection::vec(text(), 1..4), text(), text(), any::<bool>())
}

#[test]
fn what_djblets_takes_for_one_key_is_several_to_the_strict_normalizer() {
    let (djblets, strict) = (KeyNormalizer::new, KeyNormalizer::strict);
    for (one, other) in [
        (CacheKey::from("a:b"), CacheKey::from(["a", "b"])),
        (CacheKey::from(["a:b"]), CacheKey::from(["a", "b"])),
        (CacheKey::from("a b"), CacheKey::from("a\\x20b")),
        (CacheKey::from("a%3Ab:c"), CacheKey::from(["a:b", "c"])),
        (CacheKey::from("k".repeat(241)), djblets().normalize("k".repeat(241)).as_str().into()),
    ] {
        assert_eq!(djblets().normalize(&one), djblets().normalize(&other));
        assert_ne!(strict().normalize(&one), strict().normalize(&other));
        assert_ne!(one, other, "a map of keys would take them for one");
        let table = Table::options().normalizer(strict()).anonymous().unwrap();
        let [one, other] = [one, other].map(|key| GenerationSynchronizer::new(&table, key).unwrap());
        one.mark_updated().unwrap();
        assert!(!other.is_expired());
    }
    let both = |normalizer: fn() -> KeyNormalizer| {
        (normalizer().domain("a").normalize("b:c"), normalizer().domain("a:b").normalize("c"))
    };
    let (one, other) = both(djblets);
    assert_eq!(one, other);
    let (one, other) = both(strict);
    assert_ne!(one, other);
    // One part is a string to both, and an empty domain is none.
    assert_eq!(strict().normalize(["a:b"]), strict().normalize("a:b"));
    assert_eq!(strict().domain("").normalize("a"), strict().normalize("a"));
    // A shortened key cannot be forged by a key that is short already.
    let long = strict().normalize("k".repeat(241));
    assert_eq!(long.as_str().len(), 240);
    assert_ne!(strict().normalize(long.as_str()), long);
}

#[test]
fn the_strict_normalizer_makes_one_key_of_few_characters_each() {
    // All texts of up to two characters that could be taken for others, alone and in pairs, in each place.
    let characters = ["%", ":", "|", " ", "a", "2", "0", "5"];
    let mut texts = vec![String::new()];
    texts.extend(characters.map(str::to_owned));
    texts.extend(characters.iter().flat_map(|one| characters.map(|two| format!("{one}{two}"))));
    let mut seen = HashSet::new();
    for one in &texts {
        let made: Made = (vec![one.clone()], String::new(), String::new(), false);
        assert!(seen.insert(strictly(&made)), "{made:?}");
        for two in &texts {
            let mut all = vec![(vec![one.clone(), two.clone()], String::new(), String::new(), false)];
            if !two.is_empty() {
                all.push((vec![one.clone()], two.clone(), String::new(), false));
                all.push((vec![one.clone()], String::new(), two.clone(), false));
                all.push((vec![one.clone()], two.clone(), one.clone() + "r", false));
            }
            for made in all {
                assert!(seen.insert(strictly(&made)), "{made:?}");
            }
        }
    }
}

proptest! {
    #[test]
    fn the_strict_normalizer_makes_different_keys_of_what_differs(one in made(), other in made()) {
        prop_assert_eq!(one == other, strictly(&one) == strictly(&other));
    }

    #[test]
    fn the_strict_normalizer_makes_no_key_of_a_shared_generation_in_another_way(
        mut made in made(), times in 1..200_usize, of in 1..u32::MAX
    ) {
        // Many are shortened.
        made.0[0] = made.0[0].repeat(times);
        let key = strictly(&made);
        prop_assert!(!key.as_str().contains("%/"), "{}", key);
        let shared = shared(&KeyNormalizer::strict(), &key, of);
        prop_assert_eq!(shared.matches("%/").count(), 1, "{}", shared);
    }

    #[test]
    fn the_strict_normalizer_keeps_neighbours_apart(made in made(), place in 0..6_usize, by in text()) {
        let mut other = made.clone();
        let (parts, domain, root, is_hashed) = &mut other;
        match place {
            0 => parts.push(by),
            1 => *parts = vec![parts.join(":")],
            2 => domain.push_str(&by),
            3 => std::mem::swap(domain, root),
            4 => parts[0] += &by.repeat(100),
            _ => *is_hashed = !*is_hashed,
        }
        prop_assert_eq!(made == other, strictly(&made) == strictly(&other));
    }
}

fn count(count: u32) -> NonZeroU32 {
    NonZeroU32::new(count).unwrap()
}

/// The text of the shared key that `normalizer` makes.
fn shared(normalizer: &KeyNormalizer, key: impl Into<CacheKey>, of: u32) -> String {
    normalizer.normalize(key.into().in_generations(count(of))).as_str().to_owned()
}

#[test]
fn a_shared_generation_has_the_key_that_other_programs_compute() {
    let (djblets, strict) = (KeyNormalizer::new, KeyNormalizer::strict);
    let with_domain = |normalizer: KeyNormalizer| normalizer.domain("example.com").site_root("/r/");
    let parts = || CacheKey::from(["url", "http://x"]);
    // The numbers come from a program in Python that makes keys with hashlib and hmac alone.
    for (normalizer, key, of, expected) in [
        (djblets(), "url:http://x".into(), 4096, "url:%/4096/3699"),
        (djblets(), "url:http://x".into(), 1, "url:%/1/0"),
        (djblets(), "url:http://x".into(), u32::MAX, "url:%/4294967295/1946162030"),
        (djblets(), "prices".into(), 4096, "%/4096/3528"),
        (djblets(), ":a".into(), 4096, ":%/4096/2154"),
        (djblets(), "user:a b".into(), 4096, "user:%/4096/3211"),
        (djblets(), ["tenant", "a:b"].into(), 4096, "tenant:%/4096/1518"),
        (djblets(), "größe:日本語\u{1f511}".into(), 4096, "größe:%/4096/1896"),
        // Shortened first.
        (djblets(), ("url:http://".to_owned() + &"x".repeat(300)).into(), 4096, "url:%/4096/300"),
        (djblets(), ("url:".to_owned() + &"\u{1f511}".repeat(300)).into(), 4096, "url:%/4096/1316"),
        (with_domain(djblets()), "url:http://x".into(), 4096, "example.com:%/4096/3221"),
        (djblets().hmac_key(b"key"), "url:http://x".into(), 4096, "%/4096/2623"),
        (strict(), "url:http://x".into(), 4096, "%/4096/3426"),
        (strict(), parts(), 4096, "url:%/4096/2388"),
        (with_domain(strict()), parts(), 4096, "example.com|/r/|url:%/4096/4002"),
        (strict(), ["url".to_owned(), "x".repeat(300)].into(), 4096, "url:%/4096/1375"),
        (strict().hmac_key(b"key"), parts(), 4096, "%/4096/1690"),
        (strict(), CacheKey::raw("a b:c"), 4096, "a b:%/4096/696"),
        // A family of 200 bytes, and of 201, in as few characters as there can be.
        (djblets(), CacheKey::raw("ä".repeat(99) + "f:x"), 4096, &("ä".repeat(99) + "f:%/4096/660")),
        (djblets(), CacheKey::raw("ä".repeat(100) + ":x"), 4096, "%/4096/4093"),
        (djblets(), CacheKey::raw("k".repeat(1000)), u32::MAX, "%/4294967295/4152340792"),
        // What looks like a shared key is a key like any other.
        (djblets(), "url:%/4096/3699".into(), 4096, "url:%/4096/3879"),
    ] {
        assert_eq!(shared(&normalizer, &key, of), expected, "{normalizer:?} {key:?}");
        // It does not matter when the key is normalized.
        assert_eq!(shared(&normalizer, normalizer.normalize(&key), of), expected);
        let table = Table::options().normalizer(normalizer).anonymous().unwrap();
        let sync = GenerationSynchronizer::new(&table, key.in_generations(count(7)).in_generations(count(of))).unwrap();
        assert_eq!(*sync.cache_key(), CacheKey::raw(expected));
    }
}

#[test]
fn the_python_of_the_documentation_finds_every_shared_generation() {
    let chapter = include_str!("../docs/for-operators.md");
    let (_, python) = chapter.split_once("```python\n").unwrap();
    let (python, _) = python.split_once("```").unwrap();
    let run = format!(
        "{python}\nimport json, sys\nfor line in sys.stdin: print(json.dumps(shared_key(*json.loads(line))))\n"
    );
    let mut command = Command::new("python3");
    command.args(["-I", "-S", "-B", "-c", &run]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut program = command.spawn().expect("this test runs the documentation's Python: it needs python3 in PATH");
    let mut input = program.stdin.take().unwrap();
    let cases: Vec<_> = nasty()
        .into_iter()
        .filter(|text| text.len() < 1000)
        .flat_map(|text| ["", "url:", ":", "a b%", &"ä".repeat(99)].map(|start| start.to_owned() + &text))
        .zip([1, 2, 3, 4096, 1_000_003, u32::MAX].into_iter().cycle())
        .collect();
    let lines: String = cases.iter().map(|case| serde_json::to_string(case).unwrap() + "\n").collect();
    let writer = thread::spawn(move || input.write_all(lines.as_bytes()).unwrap());
    let output = program.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(output.status.success());
    let computed: Vec<String> =
        str::from_utf8(&output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(computed.len(), cases.len());
    for ((text, of), computed) in cases.iter().zip(computed) {
        let start: String = text.chars().take(100).collect();
        assert_eq!(shared(&KeyNormalizer::new(), CacheKey::raw(text), *of), computed, "{start:?} of {of}");
    }
}

#[test]
fn any_number_of_keys_takes_no_more_slots_than_there_are_generations() {
    let table = anonymous();
    let sync =
        |key: String| GenerationSynchronizer::new(&table, CacheKey::from(key).in_generations(count(16))).unwrap();
    let syncs: Vec<_> = (0..5000).map(|number| sync(format!("url:http://x/{number}"))).collect();
    assert_eq!(table.stats().keys, 16, "all of them are in use, and no other");
    // An update expires all keys of its generation, and none besides.
    let updated = syncs[0].cache_key().clone();
    syncs[0].mark_updated().unwrap();
    for sync in &syncs[1..] {
        assert_eq!(sync.is_expired(), *sync.cache_key() == updated, "{}", sync.cache_key());
    }
    let expired = syncs[1..].iter().filter(|sync| sync.is_expired()).count();
    assert!((200..450).contains(&expired), "{expired} of 4999 share one of 16 generations");
    // Another family, another count, and a key of its own are others.
    for key in ["user:1".into(), "url:http://x/0".into(), CacheKey::from("url:http://x/0").in_generations(count(17))] {
        assert!(table.generation(&key).unwrap().is_none(), "{key:?}");
    }
    assert_eq!(
        table.generation(CacheKey::from("url:http://x/0").in_generations(count(16))).unwrap(),
        syncs[0].sync_gen()
    );
    assert_eq!(table.clear_matching(|slot| slot.label().starts_with("url:")).unwrap().len(), 16);
    let empty = CacheKey::raw("").in_generations(count(16));
    assert_eq!(*GenerationSynchronizer::new(&table, empty).unwrap_err().kind(), ErrorKind::EmptyKey);
}

#[test]
fn updates_of_keys_that_share_a_generation_overlap_and_expire_each_other() {
    support::tables(|table| {
        let sync =
            |key: &str| GenerationSynchronizer::new(table, CacheKey::from(key).in_generations(count(1))).unwrap();
        let [one, other] = ["session:1", "session:2"].map(sync);
        let watcher = sync("session:3");
        let refresh = || [&one, &other, &watcher].map(|sync| sync.refresh().unwrap());
        let expired = || [&one, &other, &watcher].map(GenerationSynchronizer::is_expired);
        let [before, ..] = refresh();
        // The process that updates one key has not loaded the other one anew.
        one.update(|| Ok::<_, ()>(())).unwrap();
        assert_eq!(expired(), [false, true, true]);
        refresh();
        one.update(|| other.update(|| Ok::<_, ()>(())).map_err(drop)).unwrap();
        assert!(other.is_expired() && watcher.is_expired());
        refresh();
        update_all(&[&one, &other], || Ok::<_, ()>(())).unwrap();
        assert!(watcher.is_expired());
        assert_eq!(watcher.refresh().unwrap().get(), before.get() + 5);
        assert_eq!(table.slot(watcher.cache_key()).unwrap().unwrap().pending(), 0);
    });
}

#[test]
fn shared_keys_are_short_and_are_those_of_one_family_count_and_index_only() {
    for normalizer in [
        KeyNormalizer::new(),
        KeyNormalizer::new().domain("d".repeat(198)),
        KeyNormalizer::new().domain("\u{10ffff}".repeat(50)).site_root(""),
        KeyNormalizer::strict().domain("d".repeat(238)).site_root(":"),
    ] {
        for text in nasty().into_iter().filter(|text| text.len() < 1 << 17) {
            for key in [CacheKey::from(&text), [text.as_str(), "b"].into(), [text.as_str(); 9].into()] {
                let (whole, key) = (normalizer.normalize(&key), shared(&normalizer, key, u32::MAX));
                assert!(key.len() <= 223, "{key}");
                assert_eq!(key.bytes().find(|byte| *byte <= b' ' || *byte == 0x7f), None, "{key:?}");
                // It can be taken apart again.
                let at = key.rfind(':').map_or(0, |colon| colon + 1);
                let (family, rest) = key.split_at(at);
                assert!(whole.as_str().starts_with(family) && family.matches(':').count() <= 1, "{key}");
                let index: u32 = rest.strip_prefix("%/4294967295/").unwrap().parse().unwrap();
                assert!(index < u32::MAX);
            }
        }
    }
}

#[test]
fn keys_come_from_any_text_and_can_be_sorted() {
    use std::borrow::Cow;
    let key = CacheKey::from("a b");
    assert_eq!("a b".parse::<CacheKey>().unwrap(), key);
    assert_eq!(CacheKey::from(Cow::Borrowed("a b")), key);
    assert_eq!(CacheKey::from(Cow::<str>::Owned("a b".to_owned())), key);
    let sorted = std::collections::BTreeSet::from(["b", "a", "c", "a"].map(CacheKey::from));
    assert_eq!(sorted.iter().map(CacheKey::as_str).collect::<Vec<_>>(), ["a", "b", "c"]);
    // Keys that are not equal are not equal in the order either.
    assert_ne!(CacheKey::raw("a"), CacheKey::from("a"));
    assert_ne!(CacheKey::raw("a").cmp(&CacheKey::from("a")), std::cmp::Ordering::Equal);
}

const FLOOD: usize = 1_000_000;
/// How many of the low bits of a place the flood's keys have in common, by the hash without the salt.
const BITS: u64 = (1 << 5) - 1;

/// Whether the first word of the key's bare SHA-256 ends in zeros. The key is at most 8 bytes long, and so is one block.
///
/// By the compression function alone, as a debug build has to get through many.
fn is_of_the_flood(key: [u8; 8]) -> bool {
    let mut block = [0; 64];
    block[..8].copy_from_slice(&key);
    block[8] = 0x80;
    block[63] = 64;
    let mut state =
        [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];
    compress256(&mut state, &[block]);
    u64::from(state[0].swap_bytes()) & BITS == 0
}

/// Eight characters, others for each number: one for four of its bits.
fn key(number: u32) -> [u8; 8] {
    let mut spread = u64::from(number);
    for (shift, mask) in [(16, 0x0000_ffff_0000_ffff), (8, 0x00ff_00ff_00ff_00ff), (4, 0x0f0f_0f0f_0f0f_0f0f)] {
        spread = (spread | spread << shift) & mask;
    }
    (spread | u64::from_le_bytes([b'@'; 8])).to_le_bytes()
}

/// Some of the keys that an attacker would choose that knows how keys are placed, but not the salt.
fn crowding(count: usize) -> Vec<[u8; 8]> {
    let half = |start: u32| (start..).step_by(2).map(key).filter(|key| is_of_the_flood(*key)).take(count / 2);
    thread::scope(|scope| {
        let halves = [0, 1].map(|start| scope.spawn(move || half(start).collect::<Vec<_>>()));
        halves.into_iter().flat_map(|half| half.join().unwrap()).collect()
    })
}

fn filled(capacity: u64, keys: &[[u8; 8]]) -> Stats {
    let table = Table::options().capacity(capacity).anonymous().unwrap();
    let attach = |keys: &[[u8; 8]]| {
        for key in keys {
            GenerationSynchronizer::new(&table, str::from_utf8(key).unwrap()).unwrap();
        }
    };
    let (one, other) = keys.split_at(keys.len() / 2);
    thread::scope(|scope| {
        scope.spawn(|| attach(one));
        attach(other);
    });
    table.stats()
}

#[test]
fn a_million_keys_that_are_chosen_to_crowd_take_no_more_room_than_any_others() {
    use sha2::{Digest as _, Sha256};
    let keys = crowding(FLOOD);
    let bare = Sha256::digest(keys[FLOOD / 3]);
    assert_eq!(u64::from_le_bytes(bare[..8].try_into().unwrap()) & BITS, 0, "the keys are not what they should be");
    // Where there is room for twice as many: other keys than these need 16 to 22.
    let flood = filled(1 << 21, &keys);
    println!("{flood:?}");
    assert!(flood.keys == FLOOD as u64 && flood.segments == 1 && flood.longest_probe < 32, "{flood:?}");
    // In a table that grows.
    let ordinary: Vec<_> = (0..40_000_u32).map(|number| key(number.wrapping_mul(0x9e37_79b1))).collect();
    let (flood, ordinary) = (filled(16, &keys[..40_000]), filled(16, &ordinary));
    println!("{flood:?}\n{ordinary:?}");
    assert_eq!((flood.keys, flood.segments, flood.bytes), (40_000, ordinary.segments, ordinary.bytes));
    assert!(flood.longest_probe <= 64 && ordinary.longest_probe <= 64);
}

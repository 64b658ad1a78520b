//! Guards the documented behaviour, that of Djblets' own test suite among it.

mod support;

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use gensync::{CacheKey, ErrorKind, Generation, GenerationSynchronizer, KeyNormalizer, Table};

fn anonymous() -> Table {
    Table::options().anonymous().unwrap()
}

fn two() -> (GenerationSynchronizer, GenerationSynchronizer) {
    let table = anonymous();
    let new = || GenerationSynchronizer::new(&table, "test-synchronizer").unwrap();
    (new(), new())
}

// The eight cases of Djblets' synchronizer tests.

#[test]
fn initial_state() {
    let (sync, _) = two();
    assert!(sync.sync_gen().is_some());
    assert_eq!(sync.cache_key().as_str(), "test-synchronizer");
    assert!(!sync.is_expired());
}

#[test]
fn expired_when_another_updated() {
    let (sync, other) = two();
    other.mark_updated().unwrap();
    assert!(sync.is_expired());
}

#[test]
fn not_expired_when_nobody_updated() {
    let (sync, other) = two();
    assert!(!sync.is_expired() && !other.is_expired());
}

#[test]
fn an_error_counts_as_expired() {
    let (folder, path) = support::path();
    let table = Table::options().outage_ttl(Duration::from_millis(50)).open(&path).unwrap();
    let sync = GenerationSynchronizer::new(&table, "key").unwrap();
    let other = GenerationSynchronizer::new(&table, "other").unwrap();
    // A directory in the table's place: the table is gone, and no other can be made.
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    while !sync.is_expired() {}
    for _ in 0..1000 {
        assert!(sync.is_expired() && other.is_expired(), "freshness cannot be known");
    }
    assert!(sync.refresh().is_err() && sync.mark_updated().is_err() && sync.clear().is_err());
    assert_eq!(sync.refresh_with(|| Ok::<_, ()>(7)), Ok(7), "the state can be loaded all the same");
    while !sync.is_expired() {}
    assert!(other.is_expired(), "what was not loaded in the outage does not become fresh");
    // As soon as a table can be made again, one is.
    std::fs::remove_dir(&path).unwrap();
    sync.refresh().unwrap();
    assert!(!sync.is_expired());
    drop(folder);
}

#[test]
fn refresh_adopts_the_present_generation() {
    let (sync, other) = two();
    let generation = other.mark_updated().unwrap();
    assert_eq!(sync.refresh().unwrap(), generation);
    assert_eq!(sync.sync_gen(), Some(generation));
    assert!(!sync.is_expired());
}

#[test]
fn clear_expires_everybody() {
    let (sync, other) = two();
    sync.clear().unwrap();
    assert!(sync.is_expired() && other.is_expired());
}

#[test]
fn mark_updated_keeps_its_caller_fresh() {
    let (sync, other) = two();
    let before = sync.sync_gen().unwrap();
    let generation = sync.mark_updated().unwrap();
    assert_eq!(generation.get(), before.get() + 1);
    assert_eq!(sync.sync_gen(), Some(generation));
    assert!(!sync.is_expired() && other.is_expired());
}

#[test]
fn a_key_may_be_a_sequence() {
    let table = anonymous();
    let sync = GenerationSynchronizer::new(&table, ["test", "synchronizer"]).unwrap();
    assert_eq!(sync.cache_key().as_str(), "test:synchronizer");
    let same = GenerationSynchronizer::new(&table, "test:synchronizer").unwrap();
    same.mark_updated().unwrap();
    assert!(sync.is_expired());
}

// Beyond Djblets.

#[test]
fn a_loaders_error_passes_through_and_nothing_is_adopted() {
    let (sync, other) = two();
    other.mark_updated().unwrap();
    assert_eq!(sync.refresh_with(|| Err::<(), _>("no database")), Err("no database"));
    assert!(sync.is_expired());
    assert_eq!(sync.refresh_with(|| Ok::<_, ()>(1)), Ok(1));
    assert!(!sync.is_expired());
}

#[test]
fn keys_are_made_as_djblets_makes_them() {
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Key {
        Text(String),
        Parts(Vec<String>),
    }
    #[derive(serde::Deserialize)]
    struct Case {
        key: Key,
        domain: Option<String>,
        site_root: Option<String>,
        hmac_key: Option<String>,
        expect: String,
    }
    let cases: Vec<Case> = serde_json::from_str(include_str!("vectors/cache_keys.json")).unwrap();
    assert_eq!(cases.len(), 206);
    for case in cases {
        let mut normalizer = KeyNormalizer::new();
        if let Some(domain) = case.domain {
            normalizer = normalizer.domain(domain);
        }
        if let Some(site_root) = case.site_root {
            normalizer = normalizer.site_root(site_root);
        }
        if let Some(key) = case.hmac_key {
            normalizer = normalizer.hmac_key(&hex::decode(key).unwrap());
        }
        let key = match case.key {
            Key::Text(text) => CacheKey::from(text),
            Key::Parts(parts) => CacheKey::from(parts),
        };
        assert_eq!(normalizer.normalize(key).as_str(), case.expect);
    }
}

#[test]
fn a_table_normalizes_keys_but_raw_ones() {
    let table = Table::options().normalizer(KeyNormalizer::new().domain("example.com")).anonymous().unwrap();
    let key = |key: CacheKey| GenerationSynchronizer::new(&table, key).unwrap().cache_key().to_string();
    assert_eq!(key("a b".into()), "example.com:a\\x20b");
    assert_eq!(key(CacheKey::raw("a b")), "a b");
    assert_eq!(key(["a", "b:c"].into()), "example.com:a:b%3Ac");
}

#[test]
fn an_empty_key_is_refused_before_anything_is_put_in_front() {
    let table = Table::options().normalizer(KeyNormalizer::new().domain("example.com")).anonymous().unwrap();
    for key in ["".into(), CacheKey::raw(""), CacheKey::from([""]), CacheKey::from(Vec::<String>::new())] {
        let error = GenerationSynchronizer::new(&table, key).unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::EmptyKey);
    }
    assert_eq!(table.stats().keys, 0);
}

#[test]
fn peeking_creates_nothing() {
    let table = anonymous();
    assert_eq!(table.generation("key").unwrap(), None);
    assert_eq!(table.stats().keys, 0);
    let sync = GenerationSynchronizer::new(&table, "key").unwrap();
    assert_eq!(table.generation("key").unwrap(), sync.sync_gen());
    let generation = sync.mark_updated().unwrap();
    assert_eq!(table.generation("key").unwrap(), Some(generation));
}

#[test]
fn slots_show_labels_generations_and_updates() {
    let table = anonymous();
    let long = "k".repeat(200);
    let sync = GenerationSynchronizer::new(&table, "short").unwrap();
    sync.mark_updated().unwrap();
    sync.clear().unwrap();
    GenerationSynchronizer::new(&table, long.as_str()).unwrap();
    let mut slots: Vec<_> = table.slots().collect();
    slots.sort_by_key(gensync::SlotInfo::updates);
    assert_eq!(slots.len(), 2);
    // Whole, up to a length.
    assert_eq!((slots[0].label().as_ref(), slots[0].key_length()), (&*long, 200));
    assert!(!slots[0].is_truncated() && !slots[1].is_truncated());
    assert_eq!((slots[1].label().as_ref(), slots[1].updates()), ("short", 2));
    assert_eq!(Some(slots[1].generation()), table.generation("short").unwrap());
    assert_ne!(slots[0].digest(), slots[1].digest());
}

#[test]
fn the_text_of_a_key_is_kept_up_to_65536_bytes_and_it_is_known_what_is_missing() {
    let table = anonymous();
    for length in [1, 7, 8, 9, 240, 4095, 65_535, 65_536, 65_537, 200_000] {
        // Its last character is of two bytes, so the text may end within it.
        let key = format!("{}{}", "k".repeat(length - length.min(2)), if length > 1 { "\u{e4}" } else { "k" });
        GenerationSynchronizer::new(&table, CacheKey::raw(&*key)).unwrap().mark_updated().unwrap();
        let slot = table.slot(CacheKey::raw(&*key)).unwrap().unwrap();
        assert_eq!(slot.label_bytes(), &key.as_bytes()[..length.min(65_536)]);
        assert_eq!((slot.key_length(), slot.is_truncated(), slot.updates()), (length, length > 65_536, 1));
        assert_eq!(
            table.clear_matching(|slot| slot.label_bytes() == &key.as_bytes()[..length.min(65_536)]).unwrap().len(),
            1
        );
    }
    assert_eq!(table.stats().lost_bytes, 0);
}

#[test]
fn a_table_grows_by_itself_and_no_key_is_moved() {
    let table = Table::options().capacity(4).anonymous().unwrap();
    assert_eq!((table.stats().capacity, table.info().capacity), (16, 16), "the least there is");
    let syncs: Vec<_> = (0..5000).map(|i| GenerationSynchronizer::new(&table, format!("key {i}")).unwrap()).collect();
    let stats = table.stats();
    assert_eq!(stats.keys, 5000);
    assert!(stats.segments > 5 && stats.capacity >= 5000 && (1..=16).contains(&stats.longest_probe), "{stats:?}");
    for (i, sync) in syncs.iter().enumerate() {
        assert!(!sync.is_expired());
        let generation = GenerationSynchronizer::new(&table, format!("key {i}")).unwrap().mark_updated().unwrap();
        assert!(sync.is_expired());
        assert_eq!(sync.refresh().unwrap(), generation);
    }
}

#[test]
fn capacity_out_of_range_is_refused() {
    for capacity in [0, 33_554_433, u64::MAX] {
        let error = Table::options().capacity(capacity).anonymous().unwrap_err();
        assert!(error.to_string().contains(&capacity.to_string()), "{error}");
    }
}

#[test]
fn files_stay_small() {
    let (_folder, path) = support::path();
    let table = Table::open(&path).unwrap();
    for i in 0..800 {
        GenerationSynchronizer::new(&table, format!("key {i}")).unwrap();
    }
    assert_eq!(table.stats().bytes, std::fs::metadata(&path).unwrap().len());
    assert!(table.stats().bytes <= 128 * 1024);
    for i in 800..100_000 {
        GenerationSynchronizer::new(&table, format!("key {i}")).unwrap();
        if i > 10_000 && i % 1000 == 0 {
            assert!(table.stats().bytes <= 144 * i, "{:?}", table.stats());
        }
    }
}

#[test]
fn modes_are_exact_and_0600_unless_set() {
    let (folder, path) = support::path();
    let mode = |path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    Table::open(&path).unwrap();
    assert_eq!(mode(&path), 0o600);
    let path = folder.path().join("group");
    let table = Table::options().mode(0o666).open(&path).unwrap();
    assert_eq!(mode(&path), 0o666, "whatever the umask");
    // A reset by a process with other options keeps it.
    drop(table);
    Table::open(&path).unwrap().reset().unwrap();
    assert_eq!(mode(&path), 0o666);
}

#[test]
fn the_default_path_is_in_a_folder_of_the_users_own() {
    // In a process of its own, as the environment is the whole process's.
    let (folder, _) = support::path();
    let status = std::process::Command::new("/proc/self/exe")
        .args(["--exact", "default_path_in_a_runtime_folder", "--ignored"])
        .env("XDG_RUNTIME_DIR", folder.path())
        .status();
    assert!(status.unwrap().success());
    let own = folder.path().join("gensync");
    assert_eq!(std::fs::metadata(&own).unwrap().permissions().mode() & 0o777, 0o700);
    assert!(own.join("shop").is_file());
}

#[test]
#[ignore = "run by the_default_path_is_in_a_folder_of_the_users_own, with an environment of its own"]
fn default_path_in_a_runtime_folder() {
    let table = Table::open_default("shop").unwrap();
    GenerationSynchronizer::new(&table, "key").unwrap();
    for app in ["", ".", "..", "a/b", "a\0b"] {
        assert!(matches!(Table::open_default(app).unwrap_err().kind(), ErrorKind::InvalidInput { .. }), "{app:?}");
    }
    let folder = table.path().unwrap().parent().unwrap();
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o770)).unwrap();
    let error = Table::open_default("shop").unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::UnsafeFolder { .. }) && error.to_string().contains("0770"), "{error}");
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700)).unwrap();
    // Only root can give a folder away.
    if std::os::unix::fs::chown(folder, Some(12345), None).is_ok() {
        let error = Table::open_default("shop").unwrap_err();
        assert!(error.to_string().contains("12345"), "{error}");
        std::os::unix::fs::chown(folder, Some(0), None).unwrap();
    }
}

#[test]
fn handles_go_between_threads() {
    fn check<T: Send + Sync>() {}
    check::<Table>();
    check::<GenerationSynchronizer>();
    check::<gensync::Error>();
    let (sync, other) = two();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| (0..10_000).for_each(|_| _ = other.mark_updated().unwrap()));
        }
    });
    assert!(sync.is_expired());
    assert_eq!(sync.table().slots().next().unwrap().updates(), 20_000);
}

#[test]
fn dropping_changes_nothing_shared() {
    let (folder, path) = support::path();
    let sync = GenerationSynchronizer::new(&Table::open(&path).unwrap(), "key").unwrap();
    let generation = sync.mark_updated().unwrap();
    drop(sync);
    assert_eq!(Table::open(&path).unwrap().generation("key").unwrap(), Some(generation));
    drop(folder);
}

#[test]
fn read_only_tables_check_and_refresh_and_refuse_the_rest() {
    let (folder, path) = support::path();
    let error = Table::options().read_only(true).open(&path).unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::NotFound, "reading creates nothing");
    let writer = GenerationSynchronizer::new(&Table::open(&path).unwrap(), "key").unwrap();
    let table = Table::options().read_only(true).open(&path).unwrap();
    let sync = GenerationSynchronizer::new(&table, "key").unwrap();
    assert!(!sync.is_expired());
    let generation = writer.mark_updated().unwrap();
    assert!(sync.is_expired());
    assert_eq!(sync.refresh().unwrap(), generation);
    assert!(!sync.is_expired());
    let error = sync.mark_updated().unwrap_err();
    assert_eq!((error.kind(), error.path(), error.key()), (&ErrorKind::ReadOnly, Some(&*path), Some("key")));
    assert_eq!(*sync.clear().unwrap_err().kind(), ErrorKind::ReadOnly);
    assert_eq!(*table.reset().unwrap_err().kind(), ErrorKind::ReadOnly);
    assert_eq!(*GenerationSynchronizer::new(&table, "new").unwrap_err().kind(), ErrorKind::KeyNotFound);
    assert_eq!(table.generation("key").unwrap(), Some(generation));
    assert_eq!(table.stats().keys, 1);
    // It follows a reset made by another.
    writer.table().reset().unwrap();
    assert!(sync.is_expired());
    let generation = writer.refresh().unwrap();
    assert_eq!(sync.refresh().unwrap(), generation);
    drop(folder);
}

#[test]
fn generations_are_numbers_with_an_order() {
    let (sync, _) = two();
    let first: Generation = sync.sync_gen().unwrap();
    let second = sync.mark_updated().unwrap();
    assert!(second > first);
    assert_eq!(second.to_string(), second.get().to_string());
    assert_eq!(std::collections::HashSet::from([first, second]).len(), 2);
    #[cfg(feature = "serde")]
    {
        let text = serde_json::to_string(&second).unwrap();
        assert_eq!(text, second.to_string());
        assert_eq!(serde_json::from_str::<Generation>(&text).unwrap(), second);
        assert!(serde_json::from_str::<Generation>("0").is_err());
    }
}

#[test]
fn a_generation_is_never_a_number_that_none_can_be() {
    let (sync, _) = two();
    let real = sync.sync_gen().unwrap();
    assert_eq!(Generation::try_from(real.get()).unwrap(), real);
    assert_eq!(u64::from(real), real.get());
    for number in [1 << 40, (1 << 54) - 2] {
        assert_eq!(Generation::try_from(number).unwrap().get(), number);
    }
    for number in [0, 1, (1 << 40) - 1, (1 << 54) - 1, 1 << 54, u64::MAX] {
        let error = Generation::try_from(number).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::InvalidInput { .. }));
        assert!(error.to_string().starts_with(&format!("the generation is {number}, expected ")), "{error}");
        #[cfg(feature = "serde")]
        {
            let error = serde_json::from_str::<Generation>(&number.to_string()).unwrap_err();
            assert!(error.to_string().contains("the generation is"), "{error}");
        }
    }
}

#[test]
fn an_error_can_be_cloned_and_becomes_one_of_io() {
    use std::error::Error as _;
    use std::io;
    let io_error = |path: &str| -> io::Error { Table::options().create(false).open(path).unwrap_err().into() };
    let (folder, path) = support::path();
    let error = io_error(path.to_str().unwrap());
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    let whole = error.get_ref().unwrap().downcast_ref::<gensync::Error>().unwrap();
    assert_eq!((whole.kind(), whole.path()), (&ErrorKind::NotFound, Some(&*path)));
    assert_eq!(error.to_string(), whole.to_string(), "nothing of the text is lost");

    std::fs::write(&path, "something else").unwrap();
    assert_eq!(io_error(path.to_str().unwrap()).kind(), io::ErrorKind::InvalidData);
    assert_eq!(io_error(folder.path().to_str().unwrap()).kind(), io::ErrorKind::InvalidInput);
    let empty = GenerationSynchronizer::new(&anonymous(), "").unwrap_err();
    assert_eq!(io::Error::from(empty).kind(), io::ErrorKind::InvalidInput);

    // With a cause, which both the clone and the `io::Error` keep.
    let error = Table::open(folder.path().join("n".repeat(300))).unwrap_err();
    let clone = error.clone();
    assert_eq!((clone.kind(), clone.path(), clone.to_string()), (error.kind(), error.path(), error.to_string()));
    let cause = |error: &gensync::Error| error.source().map(ToString::to_string);
    assert!(cause(&error).is_some());
    assert_eq!(cause(&clone), cause(&error));
    let error = io::Error::from(error);
    assert_eq!(error.source().map(ToString::to_string), cause(&clone), "{error:?}");
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);

    // A loader's own.
    let sync = GenerationSynchronizer::new(&anonymous(), "key").unwrap();
    let refused = || Err::<(), _>(io::Error::from(io::ErrorKind::ConnectionRefused));
    let error = gensync::Cached::new(sync, refused).get().unwrap_err();
    assert_eq!(io::Error::from(error).kind(), io::ErrorKind::ConnectionRefused);
}

#[test]
fn a_panic_that_is_caught_leaves_them_whole() {
    use std::panic::{AssertUnwindSafe, RefUnwindSafe, UnwindSafe, catch_unwind};
    fn check<T: UnwindSafe + RefUnwindSafe>() {}
    check::<Table>();
    check::<gensync::Error>();
    check::<ErrorKind>();
    check::<CacheKey>();
    check::<KeyNormalizer>();
    check::<Generation>();
    check::<gensync::TableOptions>();
    check::<gensync::SlotInfo>();
    check::<GenerationSynchronizer>();
    let (sync, other) = two();
    other.mark_updated().unwrap();
    let caught = catch_unwind(AssertUnwindSafe(|| sync.refresh_with(|| -> Result<(), ()> { panic!("in the loader") })));
    assert!(caught.is_err() && sync.is_expired(), "what was not loaded is not fresh");
    sync.refresh().unwrap();
    assert!(!sync.is_expired());
}

#[test]
#[cfg(feature = "shm")]
fn a_named_table_is_shared_by_its_name() {
    let name = format!("gensync-test-{}", std::process::id());
    let table = Table::options().capacity(8).named(&name).unwrap();
    let sync = GenerationSynchronizer::new(&table, "key").unwrap();
    let same = Table::options().named(&format!("/{name}")).unwrap();
    let other = GenerationSynchronizer::new(&same, "key").unwrap();
    other.mark_updated().unwrap();
    assert!(sync.is_expired());
    for i in 0..1000 {
        GenerationSynchronizer::new(&same, format!("key {i}")).unwrap();
    }
    assert_eq!(table.stats().keys, 1001);
    sync.refresh().unwrap();
    table.reset().unwrap();
    assert!(sync.is_expired() && other.is_expired());
    assert_eq!(sync.refresh().unwrap(), other.refresh().unwrap());
    for bad in ["", "a/b", ".."] {
        assert!(Table::options().named(bad).is_err());
    }
    std::fs::remove_file(table.path().unwrap()).unwrap();
}

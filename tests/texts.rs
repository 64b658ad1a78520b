//! Guards against changes by accident of what people read and write: the texts of errors, what is printed for debugging, and conversions
//! that nothing else needs.

mod support;

use std::time::{Duration, Instant};

use gensync::{CacheKey, Cached, ErrorKind, GenerationSynchronizer, Table, UpdateError, WaitSet};
use support::path;

fn sync() -> GenerationSynchronizer {
    GenerationSynchronizer::new(&Table::options().anonymous().unwrap(), "key").unwrap()
}

#[test]
fn an_update_error_says_what_it_means_for_the_source() {
    let (_folder, path) = path();
    drop(GenerationSynchronizer::new(&Table::open(&path).unwrap(), "key").unwrap());
    let reader = GenerationSynchronizer::new(&Table::options().read_only(true).open(&path).unwrap(), "key").unwrap();
    let begin = reader.update(|| Ok::<_, String>(())).unwrap_err();
    assert!(begin.to_string().starts_with("the update could not begin, and nothing was changed: "), "{begin}");
    let commit = sync().update(|| Err::<(), _>("no room".to_owned())).unwrap_err();
    assert_eq!(commit.to_string(), "the commit failed, and was announced all the same: no room");
    let UpdateError::Begin(error) = begin else { panic!("{begin:?}") };
    assert_eq!(*error.kind(), ErrorKind::ReadOnly);
}

#[test]
fn an_update_that_cannot_be_announced_says_so() {
    for fails in [false, true] {
        let (folder, path) = path();
        let table = Table::options().pending_limit(Duration::from_millis(1)).open(&path).unwrap();
        let sync = GenerationSynchronizer::new(&table, "key").unwrap();
        let other = GenerationSynchronizer::new(&table, "key").unwrap();
        let error = sync
            .update(|| {
                // The table goes, its folder too, and a process notices while the update is in flight.
                std::fs::remove_dir_all(folder.path()).unwrap();
                while other.sync_gen().is_some() {
                    let _ = other.is_expired();
                }
                if fails { Err("no room") } else { Ok(()) }
            })
            .unwrap_err();
        let text = error.to_string();
        let expected = if fails { "the commit failed (no room), which" } else { "the source was changed, which" };
        assert!(text.starts_with(expected) && text.contains("call mark_updated: "), "{text}");
    }
}

#[test]
fn everything_can_be_printed_for_debugging() {
    let sync = sync();
    let builder = Cached::builder(sync.clone(), || Ok::<_, std::io::Error>(1));
    let printed = [
        format!("{builder:?}"),
        format!("{:?}", Cached::new(sync.clone(), || Ok::<_, std::io::Error>(1))),
        format!("{:?}", sync.table()),
        format!("{:?}", sync.pollable().unwrap()),
        format!("{sync:?}"),
    ];
    for (text, name) in printed.iter().zip(["CachedBuilder", "Cached", "Table", "Pollable", "GenerationSynchronizer"]) {
        assert!(text.starts_with(name), "{text}");
    }
}

#[test]
fn keys_are_made_of_whatever_holds_parts() {
    let parts = vec!["tenant".to_owned(), "a:b".to_owned()];
    let expected = CacheKey::from(["tenant", "a:b"]);
    assert_eq!(expected.as_ref(), "tenant:a%3Ab");
    assert_eq!(CacheKey::from(&["tenant", "a:b"]), expected);
    assert_eq!(CacheKey::from(&parts), expected);
    assert_eq!(CacheKey::from(parts), expected);
}

#[test]
fn sets_and_watches_are_used_as_their_kind_is() {
    let [one, other] = [sync(), sync()];
    let mut set = WaitSet::new();
    set.extend([&one, &other]);
    assert_eq!(set.members().len(), 2);
    let mut watch = one.table().watch();
    assert!(watch.next_deadline(Instant::now()).is_none());
    one.mark_updated().unwrap();
    assert_eq!(watch.next_deadline(Instant::now() + support::LIMIT).unwrap().label(), "key");
    one.mark_updated().unwrap();
    assert_eq!(watch.next().unwrap().updates(), 2);
}

#[test]
fn a_local_file_system_needs_no_leave_to_be_used_like_fuse() {
    let (_folder, path) = path();
    drop(Table::options().allow_fuse(true).open(path).unwrap());
}

#[test]
fn each_path_that_leads_to_no_table_is_reported_with_what_is_wrong_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let within = |name: &str| folder.path().join(name).into_os_string().into_string().unwrap();
    std::fs::write(within("file"), "hello").unwrap();
    std::os::unix::fs::symlink("nowhere", within("dangling")).unwrap();
    std::os::unix::fs::symlink("loop", within("loop")).unwrap();
    let cases = [
        (String::new(), "empty"),
        ("/".to_owned(), "is a folder"),
        (within(""), "is a folder"),
        (within(".."), "is a folder"),
        (within("a\0b"), "zero byte"),
        (within(&"n".repeat(300)), "255"),
        (within(&"deep/".repeat(1000)), "4095"),
        (within("loop/table"), "lead back to themselves"),
        (within("dangling"), "symbolic link"),
        (within("missing/table"), "missing does not exist"),
        (within("file/table"), "file is not a folder"),
        (within("file"), "starts with \"hello\""),
    ];
    for (path, expected) in cases {
        let options = Table::options();
        for options in [options.clone(), options.clone().create(false), options.read_only(true)] {
            let text = options.open(&path).unwrap_err().to_string();
            assert!(text.contains(expected), "{text}");
        }
    }
}

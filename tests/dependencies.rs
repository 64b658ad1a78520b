//! Guards against a value that stays fresh when something that its loader has read is changed, or too old, or out of reach; and against
//! one that expires with what it does not depend on any more.

#[path = "support/layout.rs"]
mod layout;
#[path = "support/map.rs"]
mod map;
mod support;

use std::error::Error as _;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use gensync::{Cached, CachedMap, CachedReader, ErrorKind, GenerationSynchronizer, Table, depend_on};
use map::{Database, key, must_end};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::time::{ClockId, clock_gettime};
use support::source::{HOUR, anonymous};
use support::{in_child, is_recursion, path};

const TIME: Duration = Duration::from_millis(100);

fn attach(table: &Table, key: &str) -> GenerationSynchronizer {
    GenerationSynchronizer::new(table, key).unwrap()
}

/// A value that counts its loads, and calls `read` at each.
fn reading(
    table: &Table,
    key: &str,
    read: impl Fn() -> Result<(), gensync::Error> + Send + Sync + 'static,
) -> Arc<Cached<u64>> {
    let loads = AtomicU64::new(0);
    Arc::new(Cached::new(attach(table, key), move || {
        read()?;
        Ok::<_, gensync::Error>(loads.fetch_add(1, SeqCst) + 1)
    }))
}

#[test]
fn a_value_expires_with_each_key_that_its_loader_has_named() {
    let (table, elsewhere) = (anonymous(), anonymous());
    let tags = Arc::new([attach(&table, "tag:1"), attach(&table, "tag:2"), attach(&elsewhere, "tag:1")]);
    let named = Arc::clone(&tags);
    let page = reading(&table, "page", move || {
        named.iter().chain(&named[..1]).for_each(depend_on);
        Ok(())
    });
    let mut reader = CachedReader::new(Arc::clone(&page));
    for load in 1..=6 {
        assert_eq!((*page.get().unwrap(), *page.get().unwrap(), *reader.get().unwrap()), (load, load, load));
        assert!(page.get_if_fresh().is_some() && page.peek().is_fresh());
        let tag = &tags[load as usize % 3];
        // By another process; the value's own synchronizer does not notice.
        in_child(|| _ = tag.mark_updated().unwrap()).succeeds();
        assert!(page.get_if_fresh().is_none() && !page.peek().is_fresh());
        assert_eq!(*reader.get().unwrap(), load + 1, "a reader");
    }
    attach(&table, "tag:3").mark_updated().unwrap();
    attach(&elsewhere, "tag:2").mark_updated().unwrap();
    assert!(page.get_if_fresh().is_some(), "these were not named");
    // Everything that waits for the value notices as well; a descriptor, if it was made when the value was in place.
    let known = page.get().unwrap();
    let pollable = page.pollable().unwrap();
    thread::scope(|scope| {
        let waiter = scope.spawn(|| page.wait_past(&known).unwrap());
        tags[1].mark_updated().unwrap();
        assert_eq!(*waiter.join().unwrap(), *known + 1);
    });
    let mut descriptors = [PollFd::new(pollable.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut descriptors, PollTimeout::from(10_000_u16)).unwrap(), 1, "never readable");
}

#[test]
fn a_reader_notices_that_its_value_has_found_dependencies_at_a_later_load() {
    let table = anonymous();
    let (tag, loads) = (attach(&table, "tag"), Arc::new(AtomicU64::new(0)));
    let (named, count) = (tag.clone(), Arc::clone(&loads));
    let page = reading(&table, "page", move || {
        // Not at the first one.
        if count.fetch_add(1, SeqCst) > 0 {
            depend_on(&named);
        }
        Ok(())
    });
    let mut reader = CachedReader::new(&*page);
    assert_eq!(*reader.get().unwrap(), 1);
    // The key's generation stays as it is.
    page.invalidate();
    (0..100).for_each(|_| _ = reader.get().unwrap());
    assert_eq!(*reader.get().unwrap(), 2);
    for load in 3..6 {
        tag.mark_updated().unwrap();
        assert_eq!(*reader.get().unwrap(), load);
        (0..100).for_each(|_| assert_eq!(*reader.get().unwrap(), load));
    }
}

#[test]
fn what_a_value_depends_on_is_found_anew_at_each_load() {
    let table = anonymous();
    let tags: Arc<Vec<_>> = Arc::new((0..4).map(|i| attach(&table, &format!("tag:{i}"))).collect());
    let (named, present) = (Arc::clone(&tags), Arc::new(AtomicU64::new(0)));
    let which = Arc::clone(&present);
    let page = reading(&table, "page", move || {
        depend_on(&named[which.load(SeqCst) as usize]);
        Ok(())
    });
    let database = Database::default();
    let (named, which, source) = (Arc::clone(&tags), Arc::clone(&present), database.clone());
    let map = CachedMap::builder(&table, key, move |id: &u64| {
        depend_on(&named[which.load(SeqCst) as usize]);
        source.load(id)
    })
    .build();
    for round in 0..8 {
        present.store(round % 4, SeqCst);
        (0..2).for_each(|id| map.invalidate(&id).unwrap());
        page.invalidate();
        page.get().unwrap();
        (0..2).for_each(|id| drop(map.get(&id).unwrap()));
        for tag in (0..4).filter(|tag| *tag != round % 4) {
            tags[tag as usize].mark_updated().unwrap();
            assert!(page.get_if_fresh().is_some() && map.get_if_fresh(&1).is_some(), "it was read by an earlier load");
        }
        tags[round as usize % 4].mark_updated().unwrap();
        assert!(page.get_if_fresh().is_none() && (0..2).all(|id| map.get_if_fresh(&id).is_none()));
    }
}

#[test]
fn chains_of_values_expire_from_the_link_that_changed() {
    let table = anonymous();
    let tag = attach(&table, "tag");
    // Tag, setting (a value alone), articles and pages (maps), site (a value alone), each of which reads the one before.
    let named = tag.clone();
    let setting = reading(&table, "setting", move || {
        depend_on(&named);
        Ok(())
    });
    let articles = {
        let setting = Arc::clone(&setting);
        let load = move |id: &u64| setting.tracked().get().map(|value| 100 * id + *value);
        Arc::new(CachedMap::builder(&table, |id: &u64| ["article", &id.to_string()].into(), load).build())
    };
    let pages = {
        let articles = Arc::clone(&articles);
        let load = move |page: &u64| (3 * page..3 * page + 3).map(|id| Ok(*articles.tracked().get(&id)?)).collect();
        let load = move |page: &u64| -> Result<Vec<u64>, gensync::Error> { load(page) };
        Arc::new(CachedMap::builder(&table, |page: &u64| ["page", &page.to_string()].into(), load).build())
    };
    let read = Arc::clone(&pages);
    let site = reading(&table, "site", move || (0..2).try_for_each(|page| read.tracked().get(&page).map(drop)));
    let fresh = || {
        let articles: Vec<_> = (0..6).map(|id| articles.get_if_fresh(&id).is_some()).collect();
        let pages: Vec<_> = (0..2).map(|page| pages.get_if_fresh(&page).is_some()).collect();
        (setting.get_if_fresh().is_some(), articles, pages, site.get_if_fresh().is_some())
    };
    let all = (true, vec![true; 6], vec![true; 2], true);
    let nothing = (false, vec![false; 6], vec![false; 2], false);
    let without = |id: usize, page: usize| {
        let mut expected = all.clone();
        (expected.1[id], expected.2[page], expected.3) = (false, false, false);
        expected
    };
    for _ in 0..3 {
        site.get().unwrap();
        assert_eq!(fresh(), all);
        articles.mark_updated(&4).unwrap();
        assert_eq!(fresh(), without(4, 1));
        site.get().unwrap();
        assert_eq!(fresh(), all);
        pages.mark_updated(&0).unwrap();
        assert_eq!(fresh(), (true, vec![true; 6], vec![false, true], false));
        site.get().unwrap();
        tag.mark_updated().unwrap();
        assert_eq!(fresh(), nothing);
        site.get().unwrap();
        assert_eq!(fresh(), all);
        setting.mark_updated().unwrap();
        assert_eq!(fresh(), nothing);
        site.get().unwrap();
        // An entry that is gone has not changed.
        articles.remove_all();
        pages.remove_all();
        assert!(site.get_if_fresh().is_some());
        articles.mark_updated(&1).unwrap();
        assert!(site.get_if_fresh().is_none());
        // For this process alone: what was read is what was read.
        site.get().unwrap();
        articles.invalidate(&2).unwrap();
        assert!(site.get_if_fresh().is_some() && articles.get_if_fresh(&2).is_none());
        (0..6).for_each(|id| drop(articles.get(&id).unwrap()));
    }
}

#[test]
fn a_value_depends_on_each_of_the_values_that_it_has_read_at_once() {
    let (table, database) = (anonymous(), Database::default());
    let load_many = |ids: &[u64]| Ok::<_, io::Error>(ids.iter().map(|id| (*id, *id)).collect::<Vec<_>>());
    for articles in [database.map(&table).build(), database.map(&table).bulk_loader(load_many).build()] {
        let articles = Arc::new(articles);
        let read = Arc::clone(&articles);
        let page = reading(&table, "page", move || {
            read.tracked().get_with(&9, || Ok::<_, io::Error>(9))?;
            read.tracked().get_many(&[1, 2, 3, 1]).map(|values| assert_eq!(values.len(), 4))
        });
        // Some of them are fresh already.
        articles.get(&2).unwrap();
        for id in [1, 2, 3, 9] {
            page.get().unwrap();
            assert!(page.get_if_fresh().is_some());
            articles.mark_updated(&id).unwrap();
            assert!(page.get_if_fresh().is_none(), "it has read {id}");
        }
        page.get().unwrap();
        articles.mark_updated(&4).unwrap();
        assert!(page.get_if_fresh().is_some());
    }
}

#[test]
fn a_value_is_no_older_than_what_it_was_made_of() {
    let (table, database) = (anonymous(), Database::default());
    let mortal = Arc::new(database.map(&table).time_to_live(TIME).build());
    let album = reading(&table, "album", move || mortal.tracked().get(&1).map(drop));
    album.get().unwrap();
    thread::sleep(TIME * 3 / 2);
    assert!(album.get_if_fresh().is_none(), "what it was made of is not served any more");

    let ageing = Arc::new(database.map(&table).max_age(TIME).build());
    let read = Arc::clone(&ageing);
    let page = reading(&table, "page", move || read.tracked().get(&1).map(drop));
    let read = Arc::clone(&page);
    let site = reading(&table, "site", move || read.tracked().get().map(drop));
    ageing.get(&1).unwrap();
    let start = Instant::now();
    thread::sleep(TIME / 2);
    site.get().unwrap();
    assert!(site.get_if_fresh().is_some() && page.get_if_fresh().is_some() || start.elapsed() > TIME);
    thread::sleep(TIME * 2 / 3);
    assert!(page.get_if_fresh().is_none() && site.get_if_fresh().is_none(), "the age counts from its own load");
    // A wait ends with the age.
    let known = site.get().unwrap();
    assert_ne!(*site.wait_past(&known).unwrap(), *known);
    // The shorter one of two ages counts.
    let loads = AtomicU64::new(0);
    let read = Arc::clone(&ageing);
    let hourly =
        Cached::builder(attach(&table, "hourly"), move || read.tracked().get(&1).map(|_| loads.fetch_add(1, SeqCst)));
    let hourly = hourly.max_age(HOUR).build().unwrap();
    hourly.get().unwrap();
    thread::sleep(TIME * 3 / 2);
    assert!(hourly.get_if_fresh().is_none());
}

#[test]
fn a_value_that_was_made_of_an_old_one_is_expired_from_the_start() {
    let (table, database) = (anonymous(), Database::default());
    let articles = Arc::new(database.map(&table).fail_safe(HOUR).retry_pause(HOUR).stale_while_reloading().build());
    let read = Arc::clone(&articles);
    let page = reading(&table, "page", move || read.tracked().get(&1).map(drop));
    page.get().unwrap();
    database.set(1, Err("down"));
    articles.mark_updated(&1).unwrap();
    for load in 2..5 {
        assert_eq!(*page.get().unwrap(), load, "from an old article");
        assert!(page.get_if_fresh().is_none());
    }
    database.set(1, Ok(5));
    articles.invalidate(&1).unwrap();
    assert_eq!((*page.get().unwrap(), *page.get().unwrap()), (5, 5));
    // While another thread reloads it.
    articles.mark_updated(&1).unwrap();
    let before = database.loads();
    database.hold_up();
    thread::scope(|scope| {
        let leader = scope.spawn(|| articles.get(&1).unwrap());
        database.await_loads(before + 1);
        assert_eq!(*page.get().unwrap(), 6);
        assert!(page.get_if_fresh().is_none(), "made of what is being replaced");
        database.allow_all();
        leader.join().unwrap();
    });
    assert_eq!((*page.get().unwrap(), *page.get().unwrap()), (7, 7));
}

#[test]
fn an_update_of_what_was_read_during_the_load_leaves_the_value_expired() {
    let (table, database) = (anonymous(), Database::default());
    let articles = Arc::new(database.map(&table).build());
    let tag = attach(&table, "tag");
    for what in ["article", "tag", "article before it is read", "nothing"] {
        let (read, named, updates) = (Arc::clone(&articles), tag.clone(), AtomicU64::new(1));
        let page = reading(&table, what, move || {
            let is_first = updates.swap(0, SeqCst) == 1;
            let update = |this: &str| is_first && what == this;
            if update("article before it is read") {
                read.mark_updated(&1)?;
            }
            depend_on(&named);
            read.tracked().get(&1)?;
            if update("article") {
                read.mark_updated(&1)?;
            }
            if update("tag") {
                named.mark_updated()?;
            }
            // Once more: the first of two tickets counts.
            depend_on(&named);
            read.tracked().get(&1).map(drop)
        });
        page.get().unwrap();
        let is_overtaken = ["article", "tag"].contains(&what);
        assert_eq!(page.get_if_fresh().is_none(), is_overtaken, "{what}");
        assert_eq!(page.counters().overtaken, u64::from(is_overtaken), "{what}");
        page.get().unwrap();
        assert!(page.get_if_fresh().is_some(), "{what}");
    }
}

#[test]
fn outside_of_the_thread_that_loads_naming_a_key_does_nothing() {
    let (table, database) = (anonymous(), Database::default());
    let tag = attach(&table, "tag");
    let articles = Arc::new(database.map(&table).build());
    depend_on(&tag);
    assert_eq!(*articles.tracked().get(&1).unwrap(), 0);
    let (read, named) = (Arc::clone(&articles), tag.clone());
    let page = reading(&table, "page", move || {
        thread::scope(|scope| {
            scope.spawn(|| {
                depend_on(&named);
                read.tracked().get(&1).unwrap();
            });
        });
        // Nor does reading without tracking.
        read.get(&2).map(drop)
    });
    page.get().unwrap();
    // What a callback names is no part of the load.
    let named = tag.clone();
    let loads = AtomicU64::new(0);
    let called = Cached::builder(attach(&table, "called"), move || Ok::<_, io::Error>(loads.fetch_add(1, SeqCst)));
    let called = called.on_reload(move |_, _| depend_on(&named)).build().unwrap();
    for _ in 0..2 {
        called.invalidate();
        called.get().unwrap();
    }
    tag.mark_updated().unwrap();
    (1..=2).for_each(|id| _ = articles.mark_updated(&id).unwrap());
    assert!(page.get_if_fresh().is_some() && called.get_if_fresh().is_some());
    // The innermost load is the one that depends on it; the outer one does so through tracking alone.
    let named = tag.clone();
    let inner = reading(&table, "inner", move || {
        depend_on(&named);
        Ok(())
    });
    let (by_get, by_tracking) = (Arc::clone(&inner), Arc::clone(&inner));
    let by_get = reading(&table, "by get", move || by_get.get().map(drop));
    let by_tracking = reading(&table, "by tracking", move || by_tracking.tracked().get().map(drop));
    by_get.get().unwrap();
    by_tracking.get().unwrap();
    tag.mark_updated().unwrap();
    assert!(inner.get_if_fresh().is_none() && by_get.get_if_fresh().is_some() && by_tracking.get_if_fresh().is_none());
}

#[test]
fn what_a_load_that_failed_or_panicked_has_named_is_forgotten() {
    let table = anonymous();
    let tags: Arc<Vec<_>> = Arc::new((0..3).map(|i| attach(&table, &format!("tag:{i}"))).collect());
    let (named, loads) = (Arc::clone(&tags), AtomicU64::new(0));
    let page = reading(&table, "page", move || {
        let load = loads.fetch_add(1, SeqCst);
        depend_on(&named[load as usize]);
        match load {
            0 => Err(attach_error()),
            1 => panic!("on purpose"),
            _ => Ok(()),
        }
    });
    assert!(page.get().is_err());
    assert!(std::panic::catch_unwind(|| page.get()).is_err());
    page.get().unwrap();
    tags[..2].iter().for_each(|tag| _ = tag.mark_updated().unwrap());
    assert!(page.get_if_fresh().is_some());
    tags[2].mark_updated().unwrap();
    assert!(page.get_if_fresh().is_none());
}

fn attach_error() -> gensync::Error {
    GenerationSynchronizer::new(&anonymous(), "").unwrap_err()
}

#[test]
fn values_that_read_each_other_get_an_error() {
    let errors = must_end(|| {
        let table = anonymous();
        let errors = Arc::new(Mutex::new(Vec::new()));
        let map = Arc::new_cyclic(|itself: &std::sync::Weak<CachedMap<u64, u64>>| {
            let (itself, errors) = (itself.clone(), Arc::clone(&errors));
            CachedMap::builder(&table, key, move |id: &u64| {
                let read = itself.upgrade().unwrap().tracked().get(&((id + 1) % 3)).map(|value| *value);
                read.inspect_err(|error| errors.lock().unwrap().push(error.kind().clone()))
            })
            .build()
        });
        assert!((0..3).all(|id| is_recursion(&map.get(&id).unwrap_err())));
        thread::scope(|scope| {
            for id in 0..3 {
                let map = &map;
                scope.spawn(move || assert!(is_recursion(&map.get(&id).unwrap_err())));
            }
        });
        std::mem::take(&mut *errors.lock().unwrap())
    });
    assert!(errors.contains(&ErrorKind::Recursion));
}

#[test]
fn a_value_may_depend_on_ten_thousand_keys_and_not_on_any_number() {
    const MOST: u64 = 16_384;
    let (table, database) = (anonymous(), Database::default());
    let articles = Arc::new(database.map(&table).max_entries(100_000).build());
    let tags: Arc<Vec<_>> = Arc::new((0..MOST + 1).map(|i| attach(&table, &format!("tag:{i}"))).collect());
    let count = Arc::new(AtomicU64::new(10_000));
    let (read, many) = (Arc::clone(&articles), Arc::clone(&count));
    let by_map =
        reading(&table, "by map", move || (0..many.load(SeqCst)).try_for_each(|id| read.tracked().get(&id).map(drop)));
    let (named, many) = (Arc::clone(&tags), Arc::clone(&count));
    let by_name = reading(&table, "by name", move || {
        // Each twice, which counts as one.
        (0..2).for_each(|_| named[..many.load(SeqCst) as usize].iter().for_each(depend_on));
        Ok(())
    });
    by_map.get().unwrap();
    by_name.get().unwrap();
    for id in (0..10_000).step_by(997).chain([9999]) {
        articles.mark_updated(&id).unwrap();
        tags[id as usize].mark_updated().unwrap();
        assert!(by_map.get_if_fresh().is_none() && by_name.get_if_fresh().is_none(), "{id}");
        by_map.get().unwrap();
        by_name.get().unwrap();
        assert!(by_map.get_if_fresh().is_some() && by_name.get_if_fresh().is_some(), "{id}");
    }
    count.store(MOST, SeqCst);
    by_name.invalidate();
    by_name.get().unwrap();
    tags[MOST as usize - 1].mark_updated().unwrap();
    assert!(by_name.get_if_fresh().is_none());
    // Of one that depends on so many, the next one depends on one more.
    let read = Arc::clone(&by_name);
    let next = reading(&table, "next", move || read.tracked().get().map(drop));
    count.store(MOST + 1, SeqCst);
    for error in [by_name.get().unwrap_err(), {
        count.store(MOST, SeqCst);
        next.get().unwrap_err()
    }] {
        let cause = error.source().unwrap().downcast_ref::<gensync::Error>().unwrap();
        assert!(
            matches!(cause.kind(), ErrorKind::InvalidInput { .. }) && cause.to_string().contains("16,384"),
            "{cause}"
        );
        assert!(cause.to_string().contains("tag"), "it does not say what to do: {cause}");
    }
    count.store(10, SeqCst);
    by_name.invalidate();
    next.get().unwrap();
    tags[9].mark_updated().unwrap();
    assert!(by_name.get_if_fresh().is_none() && next.get_if_fresh().is_none());
}

#[test]
fn one_key_counts_as_one_however_often_it_is_read_and_whatever_is_known_of_it() {
    let (_folder, path) = path();
    let owner = Table::open(&path).unwrap();
    let table = Table::options().read_only(true).open(&path).unwrap();
    let database = Database::default();
    // Keys that are missing there.
    let articles = Arc::new(database.map(&table).build());
    let read = Arc::clone(&articles);
    let page = reading(&anonymous(), "page", move || {
        (0..20_000).try_for_each(|turn| read.tracked().get(&(turn % 2)).map(drop))
    });
    for load in 1..3 {
        assert_eq!((*page.get().unwrap(), *page.get().unwrap()), (load, load));
        attach(&owner, &format!("user:{}", load - 1)).mark_updated().unwrap();
        assert!(page.get_if_fresh().is_none());
    }
    assert_eq!(*page.get().unwrap(), 3);
}

#[test]
fn tables_that_are_reset_or_deleted_expire_what_depends_on_them() {
    let ((_folder, path), (_other_folder, other_path)) = (path(), path());
    let (table, other) = (Table::open(&path).unwrap(), Table::open(&other_path).unwrap());
    let database = Database::default();
    let articles = Arc::new(database.map(&other).build());
    let read = Arc::clone(&articles);
    let page = reading(&table, "page", move || read.tracked().get(&1).map(drop));
    page.get().unwrap();
    other.reset().unwrap();
    assert!(page.get_if_fresh().is_none());
    assert_eq!((*page.get().unwrap(), *page.get().unwrap()), (2, 2));
    std::fs::remove_file(&other_path).unwrap();
    attach(&Table::open(&other_path).unwrap(), "user:1").mark_updated().unwrap();
    let start = Instant::now();
    while page.get_if_fresh().is_some() {
        assert!(start.elapsed() < support::LIMIT, "never noticed");
    }
    assert_eq!((*page.get().unwrap(), *page.get().unwrap()), (3, 3));
    drop((articles, other));
    table.reset().unwrap();
    assert_eq!((*page.get().unwrap(), *page.get().unwrap()), (4, 4));
}

#[test]
fn an_update_that_is_in_flight_leaves_what_depends_on_it_as_it_is_until_it_ends() {
    let (table, database) = (anonymous(), Database::default());
    let articles = Arc::new(database.map(&table).build());
    let read = Arc::clone(&articles);
    let page = reading(&table, "page", move || read.tracked().get(&1).map(drop));
    page.get().unwrap();
    let writer = articles.synchronizer(&1).unwrap();
    let update = writer.begin_update().unwrap();
    assert!((0..100).all(|_| *page.get().unwrap() == 1));
    update.finish().unwrap();
    assert!(page.get_if_fresh().is_none());
    page.get().unwrap();
    // One that is loaded meanwhile is fresh if the update comes to nothing, and expired if it ends.
    for is_abandoned in [true, false] {
        let update = writer.begin_update().unwrap();
        page.invalidate();
        page.get().unwrap();
        assert!(page.get_if_fresh().is_some());
        if is_abandoned {
            update.abandon()
        } else {
            _ = update.finish().unwrap()
        }
        assert_eq!(page.get_if_fresh().is_some(), is_abandoned);
    }
}

#[test]
fn a_value_that_was_made_of_one_that_a_lost_update_has_expired_is_expired_from_the_start() {
    let (table, database) = (Table::options().pending_limit(TIME).anonymous().unwrap(), Database::default());
    let articles = Arc::new(database.map(&table).fail_safe(HOUR).retry_pause(HOUR).build());
    let read = Arc::clone(&articles);
    let page = reading(&table, "page", move || read.tracked().get(&1).map(drop));
    articles.get(&1).unwrap();
    let writer = articles.synchronizer(&1).unwrap();
    let update = writer.begin_update().unwrap();
    assert!(articles.get_if_fresh(&1).is_some(), "an update is pending");
    database.set(1, Err("down"));
    thread::sleep(TIME * 2);
    // The update has been pending for longer than the limit, and the source is down.
    assert!(articles.get_if_fresh(&1).is_none());
    for load in 1..4 {
        assert_eq!(*page.get().unwrap(), load, "of an old article");
        assert!(page.get_if_fresh().is_none(), "fresh, though made of an article that is not");
    }
    update.finish().unwrap();
}

#[test]
fn a_wait_for_a_value_that_depends_on_a_damaged_key_does_not_keep_the_processor_busy() {
    let (_folder, path) = path();
    let (table, database) = (Table::options().outage_ttl(HOUR).open(&path).unwrap(), Database::default());
    let articles = Arc::new(database.map(&table).build());
    let text = articles.synchronizer(&1).unwrap().cache_key().as_str().to_owned();
    let file = fs::read(&path).unwrap();
    let word = layout::place_of(&file, &text).unwrap().generation;
    let damaged = layout::word(&file, word) | 1 << 54;
    File::options().write(true).open(&path).unwrap().write_all_at(&damaged.to_le_bytes(), word as u64).unwrap();
    let read = Arc::clone(&articles);
    let page = reading(&table, "page", move || read.tracked().get(&1).map(drop));
    page.get().unwrap();
    assert!(page.get_if_fresh().is_some(), "as in an outage");
    let spent = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap());
    let (before, limit) = (spent(), TIME * 5);
    assert!(page.wait_timeout(limit).unwrap().is_none());
    let spent = spent() - before;
    assert!(spent < limit / 10, "{spent:?} of {limit:?}");
}

//! Everything that can be done with a table, done once, for tables with any words in them: shared with the fuzzer.

#![allow(dead_code, reason = "each test file, and the fuzzer, uses a part of it")]

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use gensync::{
    CacheKey, Cached, Error, GenerationSynchronizer, OwnerCheck, Table, TableOptions, UpdateError, WaitSet, update_all,
};
use layout::{DIRECTORY, SEGMENTS};

#[path = "layout.rs"]
pub(crate) mod layout;

pub(crate) use layout::seal;

/// Keys of which some are in the golden files, or were begun there, and some are not.
pub(crate) const KEYS: [&str; 7] = ["a", "b:%25", "tenant:a%3Ab", "half", "unbegun", "recorded", "\u{1f511}"];

/// Options with which nothing waits long for a process that holds a lock.
pub(crate) fn options() -> TableOptions {
    Table::options().owner(OwnerCheck::Anyone).pending_limit(Duration::from_millis(1))
}

/// An outcome may be an error, which names the table that it came from.
fn checked<T>(table: &Table, outcome: Result<T, Error>) -> Option<T> {
    let error = match outcome {
        Ok(value) => return Some(value),
        Err(error) => error,
    };
    assert_eq!(error.path(), table.path(), "{error}");
    assert!(!error.to_string().is_empty() && !format!("{error:?}").is_empty());
    None
}

fn checked_update<T>(table: &Table, outcome: Result<T, UpdateError<Error>>) {
    match outcome {
        Ok(_) | Err(UpdateError::Commit(_)) => {}
        Err(UpdateError::Begin(error) | UpdateError::Announce { error, .. }) => drop(checked::<T>(table, Err(error))),
        Err(other) => panic!("an update gave {other}"),
    }
}

/// Every operation on `table`, each followed by `between`. A reset replaces its file.
pub(crate) fn exercise(table: &Table, between: &mut dyn FnMut()) {
    look(table, between);
    let _ = table.info();
    let syncs: Vec<_> =
        KEYS.iter().filter_map(|key| checked(table, GenerationSynchronizer::new(table, *key))).collect();
    between();
    // What is pending is seen and recovered here, before an update changes the word.
    for sync in &syncs {
        let _ = sync.is_expired();
        between();
        let _ = (sync.wait_timeout(Duration::ZERO), sync.wait_deadline(Instant::now()));
        between();
    }
    // So many that the table grows, its texts as well.
    for i in 0..20 {
        checked(table, GenerationSynchronizer::new(table, format!("new {i}")));
    }
    checked(table, GenerationSynchronizer::new(table, CacheKey::raw("longer ".repeat(1000))));
    between();
    checked(table, table.clear_matching(|slot| slot.updates() % 2 == 0 && slot.label().len() < 10));
    between();
    let mut watch = table.watch();
    for sync in &syncs {
        single(sync, between);
    }
    several(table, &syncs, between);
    for _ in 0..2 * KEYS.len() {
        let _ = watch.next_timeout(Duration::ZERO).map(|slot| slot.label().into_owned());
    }
    between();
    for sync in &syncs {
        cached(sync, between);
    }
    checked(table, table.reset());
    between();
    for sync in &syncs {
        let _ = sync.is_expired();
        checked(table, sync.mark_updated());
        between();
    }
    let _ = watch.next_timeout(Duration::ZERO);
    look(table, between);
}

fn look(table: &Table, between: &mut dyn FnMut()) {
    for key in KEYS {
        checked(table, table.generation(key));
        let _ = checked(table, table.slot(key));
    }
    between();
    let count = table.slots().map(|slot| {
        assert!(slot.label_bytes().len() <= 65_536 && slot.updates() < 1 << 54 && slot.generation().get() < 1 << 54);
        (slot.label().len(), slot.is_truncated(), slot.digest(), slot.pending(), slot.is_awaited())
    });
    let _ = count.count();
    between();
    let stats = table.stats();
    assert!(stats.segments > 0 && stats.longest_probe <= 16 && stats.keys <= stats.capacity, "{stats:?}");
    assert!(!format!("{table:?}").is_empty());
    between();
}

fn single(sync: &GenerationSynchronizer, between: &mut dyn FnMut()) {
    let table = sync.table();
    let ticket = sync.ticket();
    between();
    let _ = (sync.is_expired_since(ticket), sync.sync_gen(), ticket.generation());
    sync.adopt(ticket);
    let _ = sync.is_expired();
    between();
    checked(table, sync.refresh());
    between();
    checked(table, sync.refresh_with(|| Ok::<_, Error>(())));
    between();
    if let Some(generation) = checked(table, sync.mark_updated()) {
        assert!(generation.get() < 1 << 54);
    }
    between();
    checked(table, sync.clear());
    between();
    let commit = |between: &mut dyn FnMut()| {
        between();
        Ok(())
    };
    checked_update(table, sync.update(|| commit(between)));
    if let Some(update) = checked(table, sync.begin_update()) {
        between();
        update.abandon();
    }
    if let Some(update) = checked(table, sync.begin_update()) {
        between();
        let _ = sync.is_expired();
        checked(table, update.finish());
    }
    let other = sync.clone();
    checked(table, other.mark_updated());
    let _ = (sync.is_expired(), sync.wait_timeout(Duration::ZERO));
    between();
}

fn several(table: &Table, syncs: &[GenerationSynchronizer], between: &mut dyn FnMut()) {
    let all: Vec<_> = syncs.iter().collect();
    checked_update(table, update_all(&all, || Ok(7)));
    let set: WaitSet<'_> = syncs.iter().collect();
    let changed = set.wait_timeout(Duration::ZERO);
    assert!(changed.iter().all(|position| *position < syncs.len()));
    between();
    // One is enough: each begins a thread.
    if let Some(pollable) = syncs.first().and_then(|sync| checked(table, sync.pollable())) {
        between();
        pollable.acknowledge();
    }
}

fn cached(sync: &GenerationSynchronizer, between: &mut dyn FnMut()) {
    let cached = Cached::builder(sync.clone(), || Ok::<_, Error>(7)).depends_on(sync).build().unwrap();
    for _ in 0..2 {
        assert_eq!(*cached.get().unwrap(), 7);
        between();
    }
    let (stale, snapshot) = (cached.get_stale_ok().unwrap(), cached.snapshot().unwrap());
    assert_eq!((*stale, *snapshot.value, cached.get_if_fresh().is_none_or(|value| *value == 7)), (7, 7, true));
    checked_update(sync.table(), cached.update(|| Ok(())));
    between();
    let _ = cached.wait_timeout(Duration::ZERO).unwrap();
    assert!(cached.counters().reloads > 0);
}

/// Makes a file of what `input` describes, and does everything with it that can be done.
///
/// The first byte has flags; the second says how often the file is changed while it is in use, and these changes follow, of ten
/// bytes each: a place, and a word to write there. With the flag [`RAW`], the rest is the file; otherwise it has the changes that are
/// made of a good file before it is opened.
pub(crate) fn replay(input: &[u8]) {
    let (Some(&flags), Some(&changes)) = (input.first(), input.get(1)) else { return };
    let (changes, rest) = input[2..].split_at((usize::from(changes % 32) * 10).min(input.len() - 2));
    let content = if flags & RAW != 0 { rest.to_vec() } else { patched(flags, rest) };
    // In memory, as the fuzzer writes thousands a second; in a folder of its own, as a thread that waits for updates of the
    // table ends later than this, and would take the next one for a successor.
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = &folder.path().join("table");
    fs::write(path, &content).unwrap();
    if let Some(table) = opened(path, options().read_only(true)) {
        exercise(&table, &mut || ());
        drop(table);
    }
    assert!(fs::read(path).unwrap() == content, "a table that is open read-only was changed");
    let mut changes = changes.chunks_exact(10);
    let mut change = || {
        let Some((place, word)) = changes.next().and_then(|change| change.split_at_checked(2)) else { return };
        let offset = offset_of(flags, place) as u64;
        if let Ok(file) = fs::OpenOptions::new().write(true).open(path)
            && offset + 8 <= file.metadata().unwrap().len()
        {
            file.write_all_at(word, offset).unwrap();
        }
    };
    match opened(path, options().create(flags & NAMELESS == 0)) {
        Some(table) => exercise(&table, &mut change),
        None => assert!(fs::read(path).unwrap() == content, "a refused file was changed"),
    }
}

fn opened(path: &Path, options: TableOptions) -> Option<Table> {
    match options.open(path) {
        Ok(table) => Some(table),
        Err(error) => {
            assert_eq!(error.path(), Some(path), "{error}");
            None
        }
    }
}

const RAW: u8 = 1;
/// The checksum is corrected.
const SEALED: u8 = 2;
/// The file says that it is of this boot.
const BOOT_REPAIRED: u8 = 4;
/// A small file, not one with everything.
const SMALL: u8 = 8;
const NAMELESS: u8 = 16;
/// Places are counted among all words of the file, not among those that mean much.
const ANYWHERE: u8 = 32;

/// Good files, the second of which has all that can be in one.
pub(crate) const SMALL_FILE: &[u8] = include_bytes!("../vectors/version-2.gensync");
pub(crate) const EVERYTHING: &[u8] = include_bytes!("../vectors/version-2-everything.gensync");

fn patched(flags: u8, patches: &[u8]) -> Vec<u8> {
    let mut content = if flags & SMALL != 0 { SMALL_FILE.to_vec() } else { EVERYTHING.to_vec() };
    if flags & BOOT_REPAIRED != 0 {
        content[128..144].copy_from_slice(&new_header()[128..144]);
    }
    for patch in patches.chunks_exact(10) {
        let (place, word) = patch.split_at(2);
        let offset = offset_of(flags, place);
        content[offset..offset + 8].copy_from_slice(word);
    }
    if flags & SEALED != 0 {
        seal(&mut content);
    }
    content
}

/// The word of a file that two bytes name.
fn offset_of(flags: u8, place: &[u8]) -> usize {
    let (place, small) = (usize::from(u16::from_le_bytes([place[0], place[1]])), flags & SMALL != 0);
    if flags & ANYWHERE != 0 {
        return place * 8 % if small { SMALL_FILE.len() } else { EVERYTHING.len() };
    }
    static TELLING: LazyLock<[Vec<usize>; 2]> = LazyLock::new(|| [EVERYTHING, SMALL_FILE].map(telling));
    let telling = &TELLING[usize::from(small)];
    telling[place % telling.len()]
}

/// Where in a good file those words are that mean much: the header, the directory, all slots that are claimed and some that are not,
/// and the beginnings of the texts.
pub(crate) fn telling(file: &[u8]) -> Vec<usize> {
    let header = (0..152).chain([192, 200, 256]).step_by(8);
    let directory = (0..12).chain([254, 255]).map(|index| DIRECTORY + 8 * index);
    let slots = layout::claimed(file)
        .into_iter()
        .chain(layout::places(file).into_iter().step_by(5))
        .flat_map(|place| [place.generation, place.digest, place.digest + 8, place.record, place.tag & !7]);
    let texts = layout::of_kind(file, 2).into_iter().flat_map(|texts| {
        let words = (0..40).map(|index| 8 * index).chain([texts.bytes - 16, texts.bytes - 8]);
        words.map(move |offset| texts.start + offset).collect::<Vec<_>>()
    });
    let mut all: Vec<_> = header.chain(directory).chain(slots).chain([4096, 4160]).chain(texts).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// The header of a new table.
pub(crate) fn new_header() -> &'static [u8] {
    static NEW: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new");
        Table::options().capacity(16).open(&path).unwrap();
        let mut content = fs::read(path).unwrap();
        content.truncate(SEGMENTS);
        content
    });
    &NEW
}

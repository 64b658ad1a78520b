//! Everything that can be done with a table, done once, for tables with any words in them: shared with the fuzzer.

#![allow(dead_code, reason = "each test file, and the fuzzer, uses a part of it")]

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use gensync::{
    Cached, Error, GenerationSynchronizer, OwnerCheck, Table, TableOptions, UpdateError, WaitSet, update_all,
};
use sha2::{Digest as _, Sha256};

/// A key that is in no table, one that is longer than a label, and some more.
pub(crate) const KEYS: [&str; 4] = [
    "a",
    "b:%25",
    "a key that is longer than the label of its slot, which holds its first eighty-eight bytes, and no more",
    "\u{1f511}",
];

const HEADER: usize = 4096;
const SLOT: usize = 128;

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
    }
    between();
    let count = table.slots().map(|slot| {
        assert!(slot.label_bytes().len() <= 88 && slot.updates() < 1 << 54 && slot.generation().get() < 1 << 54);
        (slot.label().len(), slot.is_truncated(), slot.digest(), slot.pending(), slot.is_awaited())
    });
    let _ = count.count();
    between();
    let stats = table.stats();
    assert!(stats.segments > 0 && stats.longest_probe <= 64 && stats.keys <= stats.capacity, "{stats:?}");
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
/// The first byte says what is repaired, so that what comes behind that is reached; the second, how often the file is changed
/// while it is in use, and the changes follow, of ten bytes each. The rest is the file.
pub(crate) fn replay(input: &[u8]) {
    let (Some(&repairs), Some(&changes)) = (input.first(), input.get(1)) else { return };
    let (changes, content) = input[2..].split_at((usize::from(changes % 32) * 10).min(input.len() - 2));
    let content = repaired(repairs, content);
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
        let Some((offset, word)) = changes.next().and_then(|change| change.split_at_checked(2)) else { return };
        let offset = u64::from(u16::from_le_bytes([offset[0], offset[1]]));
        if let Ok(file) = fs::OpenOptions::new().write(true).open(path)
            && offset + 8 <= file.metadata().unwrap().len()
        {
            file.write_all_at(word, offset).unwrap();
        }
    };
    match opened(path, options().create(repairs & NAMELESS == 0)) {
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

const HEADER_REPAIRED: u8 = 1;
const WORDS_REPAIRED: u8 = 2;
const BOOT_REPAIRED: u8 = 4;
const KEYS_PLANTED: u8 = 8;
const NAMELESS: u8 = 16;

fn repaired(repairs: u8, content: &[u8]) -> Vec<u8> {
    let mut content = content.to_vec();
    if repairs & HEADER_REPAIRED == 0 {
        return content;
    }
    content.resize(content.len().max(HEADER), 0);
    let capacity = 1 << (content[24] % 6);
    content[..24].copy_from_slice(&new_header()[..24]);
    content[24..32].copy_from_slice(&u64::to_le_bytes(capacity));
    content[79] = 0; // a floor in the range
    let mut segments = 1;
    if repairs & WORDS_REPAIRED != 0 {
        let state = u32::from(content[144]) % 3 + 1;
        segments = u32::from(content[148]) % 4 + 1;
        content[144..148].copy_from_slice(&state.to_le_bytes());
        content[148..152].copy_from_slice(&segments.to_le_bytes());
        let size = HEADER + (0..segments).map(|segment| segment_size(capacity, segment)).sum::<usize>();
        content.resize(content.len().max(size), 0);
    }
    if repairs & BOOT_REPAIRED != 0 {
        content[128..144].copy_from_slice(&new_header()[128..144]);
    }
    if repairs & KEYS_PLANTED != 0 {
        (0..segments).for_each(|segment| plant(&mut content, capacity, segment));
    }
    seal(&mut content);
    content
}

/// Corrects the checksum of a header.
pub(crate) fn seal(content: &mut [u8]) {
    let sum = Sha256::digest(&content[..80]);
    content[80..88].copy_from_slice(&sum[..8]);
}

/// The header of a new table.
pub(crate) fn new_header() -> &'static [u8] {
    static NEW: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new");
        Table::options().capacity(1).open(&path).unwrap();
        let mut content = fs::read(path).unwrap();
        content.truncate(HEADER);
        content
    });
    &NEW
}

fn segment_size(capacity: u64, segment: u32) -> usize {
    let slots = (capacity as usize) << segment;
    slots * SLOT + slots.next_multiple_of(SLOT)
}

/// Slots with a word A of 1 to 4 become those of the keys, as far as they were claimed.
fn plant(content: &mut [u8], capacity: u64, segment: u32) {
    let start = HEADER + (0..segment).map(|segment| segment_size(capacity, segment)).sum::<usize>();
    let count = (capacity as usize) << segment;
    let salt: [u8; 16] = content[32..48].try_into().unwrap();
    let Some(slots) = content.get_mut(start..start + count * SLOT) else { return };
    for slot in slots.chunks_exact_mut(SLOT) {
        let marker = u64::from_le_bytes(slot[8..16].try_into().unwrap());
        let Some(key) = marker.checked_sub(1).and_then(|index| KEYS.get(usize::try_from(index).ok()?)) else {
            continue;
        };
        let digest = Sha256::new().chain_update(salt).chain_update(key).finalize();
        slot[8..16].copy_from_slice(&digest[..8]);
        if slot[16] == 1 {
            slot[16..24].copy_from_slice(&digest[8..16]);
        }
    }
}

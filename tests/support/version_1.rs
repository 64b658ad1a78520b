//! A process of file format version 1, as the last crate that wrote that format behaved, for tests of the upgrade from it.
//!
//! It shares no code with the crate: an upgrade that was tested against the crate's own idea of version 1 would be tested against
//! whatever that idea has become.
//!
//! What it leaves out: named and anonymous tables, the renewal after a reboot, and the look at the path twice a second. Waiters
//! sleep without a break, where the crate's look for themselves twice a second: so a wakeup that is lost here is seen.
//!
//! To be used by one process per table, or by forked children that open the table themselves: a child has copies of its
//! parent's locks, and the crate's measures against that are left out as well.

#![allow(dead_code, reason = "each test file uses a part of it")]
#![expect(unsafe_code, reason = "accesses mapped words, and sleeps on futexes")]

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::Read as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst, fence};
use std::time::{Duration, Instant, SystemTime};

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, fcntl, posix_fallocate};
use nix::libc;
use sha2::{Digest as _, Sha256};

pub(crate) const HEADER: usize = 4096;
pub(crate) const SLOT: usize = 128;
const LABEL: usize = 88;

const STATE: usize = 144;
const SEGMENTS: usize = 148;
const TABLE_WAKE: usize = 256;
pub(crate) const LIVE: u32 = 1;
pub(crate) const RETIRING: u32 = 2;
pub(crate) const RETIRED: u32 = 3;

// Fields of a slot.
const DIGEST_A: usize = 8;
const DIGEST_B: usize = 16;
const WAKE: usize = 24;
const KEY_LENGTH: usize = 28;
const FIRST: usize = 32;
const TEXT: usize = 40;

const GENERATION: u64 = (1 << 54) - 1;
const RETIRED_BIT: u64 = 1 << 54;
const WAITING_BIT: u64 = 1 << 55;
const ONE_PENDING: u64 = 1 << 56;
const PENDING: u64 = 255 << 56;
const LOWEST: u64 = 1 << 40;
const HIGHEST_FLOOR: u64 = 1 << 53;

/// The bytes that are locked: start and length.
pub(crate) type Range = (u64, u64);
pub(crate) const REPLACEMENT: Range = (0, 128);
pub(crate) const BOOT: Range = (128, 16);
pub(crate) const GATE: Range = (144, 4);
/// To the end of the file.
pub(crate) const SLOTS: Range = (4096, 0);

/// For how long an update lets a process that is about to retire the table go first.
const COURTESY: Duration = Duration::from_millis(50);
/// Longer than any lock is held, unless something fails.
const LIMIT: Duration = Duration::from_secs(30);

/// By how many segments a table may grow while it is open here: their room is mapped beforehand.
const GROWTH: u32 = 10;

/// Why a file is not opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    Missing,
    NotATable,
    /// The process of version 1 reports this version until it is restarted.
    Version(u32),
    Truncated,
    Damaged(&'static str),
    /// It would have to be renewed, which is not emulated.
    OtherBoot,
}

/// The table or the key is retired: the process opens the path next, see [`Table::successor`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Retired;

/// A table that this process has open.
#[derive(Clone, Debug)]
pub(crate) struct Table(Arc<Open>);

#[derive(Debug)]
struct Open {
    path: PathBuf,
    file: File,
    map: MmapRaw,
    read_only: bool,
    capacity: u64,
    salt: [u8; 16],
    floor: u64,
}

impl Drop for Open {
    fn drop(&mut self) {
        // In case that a child of another test has a copy of the descriptor.
        lock(&self.file, BOOT, libc::F_UNLCK);
    }
}

impl Table {
    /// Creates a table of one segment, and opens it.
    pub(crate) fn create(path: &Path, capacity: u64) -> Self {
        let new = NewTable::prepare(path, capacity, 0);
        fs::hard_link(&new.name, path).unwrap();
        fs::remove_file(&new.name).unwrap();
        drop(new);
        Self::open(path).unwrap()
    }

    pub(crate) fn open(path: &Path) -> Result<Self, Refused> {
        Self::open_for(path, false)
    }

    pub(crate) fn open_read_only(path: &Path) -> Result<Self, Refused> {
        Self::open_for(path, true)
    }

    fn open_for(path: &Path, read_only: bool) -> Result<Self, Refused> {
        let mut options = OpenOptions::new();
        let file = match options.read(true).write(!read_only).custom_flags(libc::O_NOFOLLOW).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(Refused::Missing),
            Err(error) => panic!("{}: {error}", path.display()),
        };
        let mut page = [0; HEADER];
        if file.read_exact_at(&mut page, 0).is_err() {
            return Err(Refused::Truncated);
        }
        let (capacity, segments) = check(&page, file.metadata().unwrap().len())?;
        if !read_only && page[128..144] != boot_id() {
            return Err(Refused::OtherBoot);
        }
        let mut options = MmapOptions::new();
        options.len(segment_offset(capacity, (segments + GROWTH).min(26)));
        let map = if read_only { options.map_raw_read_only(&file) } else { options.map_raw(&file) }.unwrap();
        // What each opener shares for as long as it has the table open.
        let start = Instant::now();
        while !lock(&file, BOOT, libc::F_RDLCK) {
            assert!(start.elapsed() < LIMIT, "a process has the table for itself");
            std::thread::sleep(Duration::from_millis(1));
        }
        let (salt, floor) = (array_at(&page, 32), u64_at(&page, 72));
        let path = path.to_owned();
        Ok(Self(Arc::new(Open { path, file, map, read_only, capacity, salt, floor })))
    }

    /// The key's slot, which is claimed if there is none. What is there now counts as seen.
    pub(crate) fn attach(&self, key: &str) -> Result<Key, Retired> {
        assert!(!self.0.read_only, "a reader claims nothing");
        let digest @ [_, b] = self.digest(key);
        let (slot, tag) = self.find(digest).unwrap_or_else(|| self.claim(digest));
        let _ = self.tag(tag).compare_exchange(0, tag_of(b), SeqCst, SeqCst);
        let start = self.start();
        let first =
            self.word(slot + FIRST).compare_exchange(0, start, SeqCst, SeqCst).map_or_else(|first| first, |_| start);
        let _ = self.word(slot).compare_exchange(0, first, SeqCst, SeqCst);
        let is_new = self.half(slot + KEY_LENGTH).load(Relaxed) == 0;
        if is_new {
            for (index, chunk) in key.as_bytes().chunks(8).take(LABEL / 8).enumerate() {
                let mut text = [0; 8];
                text[..chunk.len()].copy_from_slice(chunk);
                self.word(slot + TEXT + 8 * index).store(u64::from_le_bytes(text).to_le(), SeqCst);
            }
            self.half(slot + KEY_LENGTH).store(key.len() as u32, SeqCst);
        }
        fence(SeqCst);
        let is_live = self.state() == LIVE;
        if is_new {
            self.wake(TABLE_WAKE);
        }
        if is_live { Ok(Key::new(self, slot)) } else { Err(Retired) }
    }

    /// The key's slot, if it has begun; in a retired table, too.
    pub(crate) fn get(&self, key: &str) -> Option<Key> {
        let (slot, _) = self.find(self.digest(key))?;
        (self.load(slot) & GENERATION != 0).then(|| Key::new(self, slot))
    }

    pub(crate) fn state(&self) -> u32 {
        self.half(STATE).load(Relaxed)
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.0.capacity
    }

    /// Whether another process holds up updates that are about to begin.
    pub(crate) fn is_held_up(&self) -> bool {
        conflict(&self.0.file, GATE, libc::F_RDLCK) == Some(libc::F_WRLCK)
    }

    /// Whether another process keeps updates from beginning.
    pub(crate) fn are_updates_excluded(&self) -> bool {
        conflict(&self.0.file, SLOTS, libc::F_RDLCK) == Some(libc::F_WRLCK)
    }

    /// Whether the path still leads to this file.
    pub(crate) fn is_in_place(&self) -> bool {
        let own = self.0.file.metadata().unwrap();
        fs::symlink_metadata(&self.0.path).is_ok_and(|there| (there.dev(), there.ino()) == (own.dev(), own.ino()))
    }

    /// The table in which a process goes on when this one is retired: the live one of version 1 at the path. If that is still
    /// this table, or another retired one, because the process that retired it was killed, it is replaced by a new one *of version
    /// 1*; if nothing is at the path, a new one is created there.
    pub(crate) fn successor(&self) -> Result<Self, Refused> {
        let is_unfinished = || self.state() != RETIRED;
        if is_unfinished() && !self.is_in_place() {
            self.retire();
        }
        let next = loop {
            match Self::open(&self.0.path) {
                Ok(next) if next.state() == LIVE => break next,
                Ok(retiring) => retiring.replace(),
                Err(Refused::Missing) => {
                    let new = NewTable::prepare(&self.0.path, self.0.capacity, self.floor_of_successor());
                    let _ = fs::hard_link(&new.name, &self.0.path);
                    fs::remove_file(&new.name).unwrap();
                }
                Err(refused) => return Err(refused),
            }
        };
        if is_unfinished() {
            self.retire();
            next.change_all(|word| (word & GENERATION != 0).then_some(word + 1));
            self.half(STATE).store(RETIRED, SeqCst);
        }
        Ok(next)
    }

    fn replace(&self) {
        let Some(_lock) = self.lock(REPLACEMENT, libc::F_WRLCK, LIMIT).filter(|_| self.is_in_place()) else { return };
        let new = NewTable::prepare(&self.0.path, self.0.capacity, 0);
        let stat = self.0.file.metadata().unwrap();
        fchown(&new.file, Some(stat.uid()), Some(stat.gid())).unwrap();
        new.file.set_permissions(stat.permissions()).unwrap();
        self.retire();
        new.write_header(self.0.capacity, self.floor_of_successor());
        fs::rename(&new.name, &self.0.path).unwrap();
        self.half(STATE).store(RETIRED, SeqCst);
    }

    /// The sweep. Each process that finds the table retiring may do it.
    fn retire(&self) {
        let _ = self.half(STATE).compare_exchange(LIVE, RETIRING, SeqCst, SeqCst);
        self.change_all(|word| (word & RETIRED_BIT == 0).then_some((word + 1) | RETIRED_BIT));
        self.wake(TABLE_WAKE);
    }

    fn change_all(&self, step: impl Fn(u64) -> Option<u64>) {
        for slot in self.claimed() {
            let before = self.change(slot, &step);
            self.announce(slot, before);
        }
    }

    fn floor_of_successor(&self) -> u64 {
        let highest = self.claimed().map(|slot| self.load(slot) & GENERATION).max().unwrap_or(0);
        (highest.max(self.0.floor) + 1).min(HIGHEST_FLOOR)
    }

    fn claimed(&self) -> impl Iterator<Item = usize> {
        let slots = (0..self.segments()).flat_map(|segment| {
            let (start, slots) = (segment_offset(self.0.capacity, segment), (self.0.capacity << segment) as usize);
            (0..slots).map(move |index| start + SLOT * index)
        });
        slots.filter(|slot| self.load(slot + DIGEST_A) != 0)
    }

    fn digest(&self, key: &str) -> [u64; 2] {
        let digest = Sha256::new().chain_update(self.0.salt).chain_update(key).finalize();
        [u64_at(&digest, 0).max(1), u64_at(&digest, 8).max(1)]
    }

    /// Where keys that are new now begin.
    fn start(&self) -> u64 {
        // The clock is set, and the floor is not at its end: other starts, which are random, are not emulated.
        let start = now().max(self.0.floor);
        assert!((1 << 50..HIGHEST_FLOOR).contains(&start));
        start
    }

    /// The slots where a key may stand in `segment`, each with its tag, without those that are other keys' by their tags.
    fn probe(&self, segment: u32, [a, b]: [u64; 2]) -> impl Iterator<Item = (usize, usize)> {
        let (slots, start) = (self.0.capacity << segment, segment_offset(self.0.capacity, segment));
        let limit = if segment == 0 { 64 } else { 16 };
        let places = (0..slots.min(limit)).map(move |i| {
            let place = a.wrapping_add(b.wrapping_mul(u64::from(segment))).wrapping_add(i * (i + 1) / 2);
            let index = (place % slots) as usize;
            (start + SLOT * index, start + SLOT * slots as usize + index)
        });
        places.filter(move |&(_, tag)| [0, tag_of(b)].contains(&self.tag(tag).load(Relaxed)))
    }

    fn find(&self, [a, b]: [u64; 2]) -> Option<(usize, usize)> {
        for segment in (0..self.segments()).rev() {
            for (slot, tag) in self.probe(segment, [a, b]) {
                match [self.load(slot + DIGEST_A), self.load(slot + DIGEST_B)] {
                    [0, _] => break,
                    found if found == [a, b] => return Some((slot, tag)),
                    _ => {}
                }
            }
        }
        None
    }

    /// The key's slot, claimed where there is room for it first; if there is none, the table grows.
    fn claim(&self, digest @ [a, b]: [u64; 2]) -> (usize, usize) {
        for segment in 0.. {
            if segment >= self.segments() {
                self.grow(segment);
            }
            let is_taken = |slot: usize| self.take(slot + DIGEST_A, a) && self.take(slot + DIGEST_B, b);
            if let Some(place) = self.probe(segment, digest).find(|&(slot, _)| is_taken(slot)) {
                return place;
            }
        }
        unreachable!("a table that is full is not emulated")
    }

    fn grow(&self, segment: u32) {
        let [start, end] = [segment, segment + 1].map(|segment| segment_offset(self.0.capacity, segment) as i64);
        posix_fallocate(&self.0.file, start, end - start).unwrap();
        self.half(SEGMENTS).fetch_max(segment + 1, SeqCst);
    }

    pub(crate) fn segments(&self) -> u32 {
        let segments = self.half(SEGMENTS).load(Relaxed);
        fence(SeqCst);
        segments
    }

    /// Claims a word that is zero; whether it is `mine` then.
    fn take(&self, offset: usize, mine: u64) -> bool {
        self.word(offset).compare_exchange(0, mine, SeqCst, SeqCst).map_or_else(|there| there == mine, |_| true)
    }

    /// Changes the generation word at `slot` by `step`, unless it returns nothing. Returns the word before.
    fn change(&self, slot: usize, step: impl Fn(u64) -> Option<u64>) -> u64 {
        self.word(slot).fetch_update(SeqCst, SeqCst, step).unwrap_or_else(|word| word)
    }

    /// Wakes those who wait for the key, if there are any by the word before the change.
    fn announce(&self, slot: usize, before: u64) {
        if before & WAITING_BIT != 0 {
            self.word(slot).fetch_and(!WAITING_BIT, SeqCst);
            self.wake(slot + WAKE);
            self.wake(TABLE_WAKE);
        }
    }

    fn wake(&self, offset: usize) {
        fence(SeqCst);
        let word = self.half(offset);
        if word.fetch_update(SeqCst, SeqCst, |word| (word & 1 != 0).then(|| word.wrapping_add(1))).is_ok() {
            // SAFETY: the word is mapped as long as `self` is there.
            unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
        }
    }

    /// Takes a lock through a description of its own.
    fn lock(&self, range: Range, kind: libc::c_int, patience: Duration) -> Option<Lock> {
        let again = format!("/proc/self/fd/{}", self.0.file.as_raw_fd());
        let file = OpenOptions::new().read(true).write(true).open(again).unwrap();
        let start = Instant::now();
        while !lock(&file, range, kind) {
            if start.elapsed() >= patience {
                return None;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Some(Lock { file, range })
    }

    fn load(&self, offset: usize) -> u64 {
        // Relaxed, as only that is defined on memory that is mapped read-only.
        let word = self.word(offset).load(Relaxed);
        fence(SeqCst);
        word
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: `at` gives room for it in the mapping, which lives as long as `self`; all access is atomic.
        unsafe { &*self.at(offset, 8).cast() }
    }

    fn half(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as in `word`.
        unsafe { &*self.at(offset, 4).cast() }
    }

    fn tag(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: as in `word`.
        unsafe { &*self.at(offset, 1).cast() }
    }

    fn at(&self, offset: usize, size: usize) -> *mut u8 {
        assert!(offset.is_multiple_of(size) && offset + size <= self.0.map.len(), "outside of the mapping: {offset}");
        self.0.map.as_mut_ptr().wrapping_add(offset)
    }
}

/// One holder's view of a key.
#[derive(Debug)]
pub(crate) struct Key {
    table: Table,
    slot: usize,
    /// The generation that its state was loaded with.
    seen: AtomicU64,
}

/// Which wake word a waiter sleeps on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SleepOn {
    /// As a waiter for one key does.
    Key,
    /// As a waiter for several keys does, or one that watches the whole table.
    Table,
}

impl Key {
    fn new(table: &Table, slot: usize) -> Self {
        let seen = AtomicU64::new(table.load(slot) & GENERATION);
        Self { table: table.clone(), slot, seen }
    }

    pub(crate) fn table(&self) -> &Table {
        &self.table
    }

    /// Where the slot is in the file.
    pub(crate) fn offset(&self) -> usize {
        self.slot
    }

    /// The present generation word.
    pub(crate) fn word(&self) -> u64 {
        self.table.load(self.slot)
    }

    pub(crate) fn generation(&self) -> u64 {
        self.word() & GENERATION
    }

    pub(crate) fn updates(&self) -> u64 {
        self.generation() - self.table.load(self.slot + FIRST)
    }

    pub(crate) fn pending(&self) -> u8 {
        (self.word() >> 56) as u8
    }

    pub(crate) fn is_awaited(&self) -> bool {
        self.word() & WAITING_BIT != 0
    }

    pub(crate) fn is_retired(&self) -> bool {
        self.word() & RETIRED_BIT != 0
    }

    /// The plain update, after the source was changed. Returns the new generation.
    pub(crate) fn mark(&self) -> Result<u64, Retired> {
        let before = self.table.word(self.slot).fetch_add(1, SeqCst);
        self.announced(before)
    }

    fn announced(&self, before: u64) -> Result<u64, Retired> {
        if !is_live(before) {
            return Err(Retired);
        }
        self.table.announce(self.slot, before);
        Ok((before & GENERATION) + 1)
    }

    /// What is adopted when the state has been loaded: to be taken before the load.
    pub(crate) fn ticket(&self) -> Result<u64, Retired> {
        let word = self.word();
        if is_live(word) { Ok(word & GENERATION) } else { Err(Retired) }
    }

    pub(crate) fn adopt(&self, ticket: u64) {
        self.seen.store(ticket, SeqCst);
    }

    /// Takes a ticket, loads, and adopts.
    pub(crate) fn refresh_with<R>(&self, load: impl FnOnce() -> R) -> Result<R, Retired> {
        let ticket = self.ticket()?;
        let state = load();
        self.adopt(ticket);
        Ok(state)
    }

    /// Whether the state must be loaded again: always if the table is retired. Updates whose process was killed are announced.
    pub(crate) fn is_expired(&self) -> bool {
        let seen = self.seen.load(SeqCst);
        loop {
            let word = self.word();
            if word & !WAITING_BIT == seen {
                return false;
            }
            if !is_before_updates_of(seen, word) {
                return true;
            }
            match conflict(&self.table.0.file, self.range(), libc::F_WRLCK) {
                Some(libc::F_RDLCK) => return false,
                // Another process recovers it, or retires the table.
                Some(_) => std::thread::yield_now(),
                // Unless the update has just ended, it is lost.
                None if self.table.0.read_only => return self.word() & !WAITING_BIT != seen,
                None => self.recover(),
            }
        }
    }

    fn recover(&self) {
        if let Some(_lock) = self.table.lock(self.range(), libc::F_WRLCK, Duration::ZERO) {
            let once = |word: u64| (word & PENDING != 0).then_some((word & !PENDING) + 1);
            let before = self.table.change(self.slot, once);
            self.table.announce(self.slot, before);
        }
    }

    /// The crash-safe update.
    pub(crate) fn update<R>(&self, commit: impl FnOnce() -> R) -> Result<R, Retired> {
        let update = self.begin_update()?;
        let state = commit();
        update.finish().map(|_| state)
    }

    /// The first half of an update. A process that is killed before it has [finished](Update::finish) leaves it pending.
    pub(crate) fn begin_update(&self) -> Result<Update<'_>, Retired> {
        self.lock_for_update().count_in()
    }

    /// The first step of an update: waits for processes that retire the table or recover an update, and takes the lock.
    pub(crate) fn lock_for_update(&self) -> Locked<'_> {
        let start = Instant::now();
        while self.table.is_held_up() && start.elapsed() < COURTESY {
            std::thread::sleep(Duration::from_millis(1));
        }
        let lock = self.table.lock(self.range(), libc::F_RDLCK, LIMIT);
        Locked { key: self, lock: lock.expect("a process retires the table, or recovers an update, without end") }
    }

    fn range(&self) -> Range {
        (self.slot as u64, SLOT as u64)
    }

    /// Sleeps until the state is expired; `false` if no wakeup comes within `limit`.
    pub(crate) fn wait(&self, sleep_on: SleepOn, limit: Duration) -> bool {
        let start = Instant::now();
        let seen = self.seen.load(SeqCst);
        let offset = if sleep_on == SleepOn::Key { self.slot + WAKE } else { TABLE_WAKE };
        loop {
            if self.is_expired() {
                return true;
            }
            let left = limit.saturating_sub(start.elapsed());
            let wake = self.table.half(offset);
            let armed = wake.fetch_or(1, SeqCst) | 1;
            fence(SeqCst);
            let word = self.table.word(self.slot).fetch_or(WAITING_BIT, SeqCst);
            let may_sleep = word & !WAITING_BIT == seen || is_before_updates_of(seen, word);
            // Not looked at again after the limit, as that would hide a wakeup that did not come.
            if may_sleep && !sleep_on_word(wake, armed, left) {
                return false;
            }
        }
    }
}

/// An update that has its lock and is not counted in yet.
#[derive(Debug)]
pub(crate) struct Locked<'a> {
    key: &'a Key,
    lock: Lock,
}

impl<'a> Locked<'a> {
    pub(crate) fn count_in(self) -> Result<Update<'a>, Retired> {
        let Self { key, lock } = self;
        // With the lock, the process looks at the path, the header and the slot.
        if !key.table.is_in_place() || key.table.state() != LIVE {
            return Err(Retired);
        }
        let count = |word: u64| is_live(word).then(|| if word < PENDING { word + ONE_PENDING } else { word });
        if !is_live(key.table.change(key.slot, count)) {
            return Err(Retired);
        }
        Ok(Update { key, _lock: lock })
    }
}

/// An update that is pending. It must be finished or abandoned.
#[derive(Debug)]
#[must_use]
pub(crate) struct Update<'a> {
    key: &'a Key,
    _lock: Lock,
}

impl Update<'_> {
    /// Counts the update out and announces it, in one step, before the lock is released. Returns the new generation.
    pub(crate) fn finish(self) -> Result<u64, Retired> {
        self.key.announced(self.key.table.change(self.key.slot, |word| Some(counted_out(word).wrapping_add(1))))
    }

    pub(crate) fn abandon(self) {
        self.key.table.change(self.key.slot, |word| Some(counted_out(word)));
    }
}

fn counted_out(word: u64) -> u64 {
    if (ONE_PENDING..PENDING).contains(&word) { word - ONE_PENDING } else { word }
}

fn is_live(word: u64) -> bool {
    (LOWEST..GENERATION).contains(&(word & (RETIRED_BIT | GENERATION)))
}

fn is_before_updates_of(seen: u64, word: u64) -> bool {
    word & PENDING != 0 && word & (RETIRED_BIT | GENERATION) == seen
}

/// `false` if no wakeup has come within the limit.
fn sleep_on_word(word: &AtomicU32, value: u32, limit: Duration) -> bool {
    let limit = libc::timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
    // SAFETY: the word is borrowed, and the kernel reads one timespec.
    let result = unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, value, &raw const limit) };
    result == 0 || nix::errno::Errno::last() != nix::errno::Errno::ETIMEDOUT
}

/// A lock that is released when it is dropped, or when its process ends.
#[derive(Debug)]
pub(crate) struct Lock {
    file: File,
    range: Range,
}

impl Drop for Lock {
    fn drop(&mut self) {
        lock(&self.file, self.range, libc::F_UNLCK);
    }
}

fn describe((start, length): Range, kind: libc::c_int) -> libc::flock {
    let (l_type, l_whence) = (kind as libc::c_short, libc::SEEK_SET as libc::c_short);
    libc::flock { l_type, l_whence, l_start: start as i64, l_len: length as i64, l_pid: 0 }
}

/// Changes the lock of `file`'s own description; `false` while there is another that conflicts.
fn lock(file: &File, range: Range, kind: libc::c_int) -> bool {
    match fcntl(file, FcntlArg::F_OFD_SETLK(&describe(range, kind))) {
        Ok(_) => true,
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => false,
        Err(errno) => panic!("locking: {errno}"),
    }
}

/// What kind of lock on a part of the range conflicts with one of that kind, if any.
fn conflict(file: &File, range: Range, kind: libc::c_int) -> Option<libc::c_int> {
    let mut answer = describe(range, kind);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut answer)).unwrap();
    Some(libc::c_int::from(answer.l_type)).filter(|&kind| kind != libc::F_UNLCK)
}

/// A new table, complete except for its name. It is locked, which says that it is in use.
#[derive(Debug)]
struct NewTable {
    file: File,
    name: PathBuf,
}

impl NewTable {
    fn prepare(path: &Path, capacity: u64, floor: u64) -> Self {
        let name = OsString::from(format!(".gensync-{:016x}", u64::from_le_bytes(random())));
        let name = path.with_file_name(name);
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&name).unwrap();
        let new = Self { file, name };
        assert!(lock(&new.file, REPLACEMENT, libc::F_WRLCK));
        // Written, not left sparse, so that it has its room.
        new.file.write_all_at(&vec![0; segment_offset(capacity, 1)], 0).unwrap();
        new.file.set_permissions(fs::Permissions::from_mode(0o600)).unwrap();
        new.write_header(capacity, floor);
        new
    }

    fn write_header(&self, capacity: u64, floor: u64) {
        self.file.write_all_at(&header(capacity, floor), 0).unwrap();
    }
}

impl Drop for NewTable {
    fn drop(&mut self) {
        lock(&self.file, REPLACEMENT, libc::F_UNLCK);
    }
}

fn header(capacity: u64, floor: u64) -> [u8; HEADER] {
    assert!(capacity.is_power_of_two());
    let mut page = [0; HEADER];
    page[..8].copy_from_slice(b"gensync\0");
    page[8..12].copy_from_slice(&1_u32.to_le_bytes());
    page[12..16].copy_from_slice(&BYTE_ORDER.to_le_bytes());
    page[16..20].copy_from_slice(&(SLOT as u32).to_le_bytes());
    page[20..24].copy_from_slice(&(HEADER as u32).to_le_bytes());
    page[24..32].copy_from_slice(&capacity.to_le_bytes());
    page[32..64].copy_from_slice(&random::<32>());
    page[64..72].copy_from_slice(&now().to_le_bytes());
    page[72..80].copy_from_slice(&floor.to_le_bytes());
    page[128..144].copy_from_slice(&boot_id());
    page[STATE..STATE + 4].copy_from_slice(&native(LIVE));
    page[SEGMENTS..SEGMENTS + 4].copy_from_slice(&native(1));
    seal(&mut page);
    page
}

/// Corrects the checksum of a header that was changed.
pub(crate) fn seal(header: &mut [u8]) {
    let sum = Sha256::digest(&header[..80]);
    header[80..88].copy_from_slice(&sum[..8]);
}

/// The capacity and the number of segments of a file of `size` bytes that begins with this page.
fn check(page: &[u8], size: u64) -> Result<(u64, u32), Refused> {
    if !page.starts_with(b"gensync\0") {
        return Err(Refused::NotATable);
    }
    let half = |offset| u32::from_le_bytes(array_at(page, offset));
    let native_half = |offset| if cfg!(target_endian = "little") { half(offset) } else { half(offset).swap_bytes() };
    if half(8) != 1 {
        return Err(Refused::Version(half(8)));
    }
    let (capacity, segments) = (u64_at(page, 24), native_half(SEGMENTS));
    let conditions = [
        ("byte order", half(12) == BYTE_ORDER),
        ("checksum", page[80..88] == Sha256::digest(&page[..80])[..8]),
        ("slot size", half(16) == SLOT as u32),
        ("header size", half(20) == HEADER as u32),
        ("capacity", capacity.is_power_of_two() && capacity <= 1 << 25),
        ("floor", u64_at(page, 72) <= HIGHEST_FLOOR),
        ("state", (LIVE..=RETIRED).contains(&native_half(STATE))),
        ("segments", (1..=26).contains(&segments)),
    ];
    match conditions.iter().find(|(_, is_met)| !is_met) {
        Some((field, _)) => Err(Refused::Damaged(field)),
        None if size < segment_offset(capacity, segments) as u64 => Err(Refused::Truncated),
        None => Ok((capacity, segments)),
    }
}

/// Where `segment` begins: behind the slots and tags of those before it.
pub(crate) fn segment_offset(capacity: u64, segment: u32) -> usize {
    let sizes = (0..segment).map(|segment| {
        let slots = (capacity << segment) as usize;
        slots * SLOT + slots.next_multiple_of(SLOT)
    });
    HEADER + sizes.sum::<usize>()
}

const BYTE_ORDER: u32 = if cfg!(target_endian = "little") { 1 } else { 2 };

pub(crate) fn native(value: u32) -> [u8; 4] {
    if cfg!(target_endian = "little") { value.to_le_bytes() } else { value.to_be_bytes() }
}

fn tag_of(b: u64) -> u8 {
    ((b >> 56) as u8).max(1)
}

/// The id of this boot, as it stands in a header: two words.
pub(crate) fn boot_id() -> [u8; 16] {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let number = u128::from_str_radix(&id.trim().replace('-', ""), 16).unwrap();
    let word = |word: u64| if cfg!(target_endian = "little") { word.to_le_bytes() } else { word.to_be_bytes() };
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&word((number >> 64) as u64));
    bytes[8..].copy_from_slice(&word(number as u64));
    bytes
}

/// Microseconds since the epoch.
fn now() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().unwrap().as_micros() as u64
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
    bytes
}

fn array_at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[offset + i])
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, offset))
}

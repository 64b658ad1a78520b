//! The edge to the operating system's memory: map a table's file, extend it, unmap it.
//!
//! Only what exists is mapped: the header together with the segments that exist when the table is opened, and each later
//! segment by itself, when this process first needs it. No part ever moves, so a reference to a word is good as long as its
//! mapping. No address space is reserved for growth: limits on address space, locked memory and core dumps see the table as
//! large as it is.

#![expect(unsafe_code, reason = "maps files; each block states the fact relied on")]

mod chain;
mod closable;
mod descriptor;
mod list;
mod memory;
mod part;

use std::fs::File;
#[cfg(feature = "shm")]
use std::mem::ManuallyDrop;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::ptr::NonNull;

#[cfg(feature = "shm")]
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::{FileStat, fstat};

use self::chain::Published;
use self::closable::ClosableMax;
use self::part::Part;
#[cfg(feature = "shm")]
use self::part::address_size;
#[cfg(feature = "shm")]
use crate::error::ErrorKind;
use crate::error::{Error, damaged};
use crate::os::identity::Identity;
use crate::os::lock::{self, Held, Range, RangeLock, UpdateLocks, held, is_held_by_writer};
use crate::protocol::directory::{Extent, Kind, Outline, SEGMENTS};
use crate::protocol::fixed_header::FixedHeader;
use crate::protocol::generation_word::GenerationWord;
use crate::protocol::layout::{HEADER_WORDS_OFFSET, MAX_SIZE, STATE_OFFSET};
#[cfg(feature = "map")]
use crate::protocol::segment::SlotSegment;
use crate::protocol::slots::Memory;
use crate::protocol::version_1;
pub(crate) use chain::{Chain, Places, SlotRef};
pub(crate) use descriptor::DESCRIPTORS;
use descriptor::FileRef;
use list::List;

/// The header's boot id, on which each holder of the table shares a lock.
pub(crate) const BOOT: Range = Range { start: HEADER_WORDS_OFFSET as u64, length: 16 };
/// The header's state. A lock on it says that the state is about to change, and holds new updates up.
const GATE: Range = Range { start: STATE_OFFSET as u64, length: 4 };

/// A table's file in memory.
#[derive(Debug)]
pub(crate) struct Mapping {
    /// The header, and the segments that existed when the table was opened.
    first: Part,
    owner: Owner,
    /// Each segment that may ever exist: null until this process has mapped it.
    segments: List<Segment>,
    /// Those with slots, by their numbers.
    slots: List<Segment>,
    /// Those with texts, by their numbers.
    texts: List<Segment>,
    /// How many segments lie in the first part.
    opened: u32,
    capacity: u64,
    is_of_version_1: bool,
    /// Before the first segment.
    empty: Outline,
    /// How large the file may become, in bytes.
    most: u64,
    /// How many segments, from the first on, this process has mapped and the file is known to hold.
    known: ClosableMax,
    read_only: bool,
    file: FileRef,
}

/// A segment that this process has mapped. Its extent does not change, whatever is written to the file.
#[derive(Debug)]
struct Segment {
    /// Null after it was unmapped, which happens only to a segment that was not counted.
    base: Published<u8>,
    extent: Extent,
    /// The segments up to this one.
    outline: Outline,
}

impl Segment {
    fn base(&self) -> Option<NonNull<u8>> {
        NonNull::new(self.base.get())
    }

    fn part(&self) -> Option<Part> {
        Some(Part { base: self.base()?, length: self.extent.bytes as usize })
    }

    /// The part, for the one caller that is to unmap it.
    fn take_part(&self) -> Option<Part> {
        self.part().filter(|part| self.base.replace(part.base.as_ptr(), std::ptr::null_mut()))
    }
}

/// What unmaps the first part.
enum Owner {
    Own,
    #[cfg(feature = "shm")]
    Named(ManuallyDrop<shared_memory::Shmem>),
}

impl std::fmt::Debug for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Own => "Own",
            #[cfg(feature = "shm")]
            Self::Named(_) => "Named",
        })
    }
}

// SAFETY: the range stays mapped until the value is dropped, whichever thread does it, and all access to it goes
// through atomics.
unsafe impl Send for Mapping {}
// SAFETY: the range stays mapped as long as the value lives, and shared references to it give out shared references to atomics
// only.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `file`, whose header was checked and says where its segments are.
    pub(crate) fn of_file(
        file: File,
        path: Option<&Path>,
        fixed: &FixedHeader,
        extents: &[Extent],
        read_only: bool,
    ) -> Result<Self, Error> {
        let most = match path {
            Some(_) => MAX_SIZE,
            // An anonymous file has its final size, which may be less than the maximum: no header may claim segments beyond its
            // end.
            None => file.metadata().map_err(|error| Error::io("looking at the table's file", &error))?.len(),
        };
        let first = Part::map(file.as_fd(), 0, end(fixed, extents), read_only)?;
        let file = FileRef::new(file, path).inspect_err(|_| {
            // SAFETY: it was mapped just now, and no reference to it was given out.
            unsafe { first.unmap() }
        })?;
        Ok(Self::new(first, Owner::Own, file, fixed, extents, most, read_only))
    }

    /// Maps the named POSIX segment that `file` is, whose header was checked and says where its segments are. `None` if the name
    /// leads to another file by now.
    #[cfg(feature = "shm")]
    pub(crate) fn of_named(
        file: File,
        path: &Path,
        name: &str,
        fixed: &FixedHeader,
        extents: &[Extent],
    ) -> Result<Option<Self>, Error> {
        use shared_memory::{ShmemConf, ShmemError};
        let file = FileRef::new(file, Some(path))?;
        let shmem = ShmemConf::new().os_id(name).open().map_err(|error| {
            file.place(match error {
                ShmemError::MapOpenFailed(errno) => {
                    Error::system("mapping the named segment", Errno::from_raw(errno as i32))
                }
                _ => ErrorKind::System { action: "mapping the named segment" }.into(),
            })
        })?;
        // shared_memory maps the whole file as it is then: the file is created as long as its segments, and only grows.
        let (base, size) = (shmem.as_ptr(), shmem.len());
        // The name led to this file before, and `file` keeps its inode from being used again. So if the name still leads to
        // that inode now, that file is what was mapped.
        if !nix::sys::stat::lstat(path).is_ok_and(|stat| Identity::of(&stat) == file.identity) {
            return Ok(None);
        }
        let least = end(fixed, extents);
        if (size as u64) < least {
            return Err(file.error(ErrorKind::Truncated { found: size as u64, expected: least }));
        }
        let first = Part::new(base, address_size(least)?)?;
        let owner = Owner::Named(ManuallyDrop::new(shmem));
        Ok(Some(Self::new(first, owner, file, fixed, extents, MAX_SIZE, false)))
    }

    fn new(
        first: Part,
        owner: Owner,
        file: FileRef,
        fixed: &FixedHeader,
        extents: &[Extent],
        most: u64,
        read_only: bool,
    ) -> Self {
        let mapping = Self {
            first,
            owner,
            segments: List::new(),
            slots: List::new(),
            texts: List::new(),
            opened: extents.len() as u32,
            capacity: fixed.capacity,
            is_of_version_1: fixed.is_of_version_1(),
            empty: fixed.outline(),
            most,
            known: ClosableMax::new(extents.len() as u32),
            read_only,
            file,
        };
        let mut outline = mapping.empty;
        for extent in extents {
            // SAFETY: the first part holds all of these segments.
            let base = unsafe { first.base.add(extent.offset as usize) };
            mapping.publish(&outline, extent, base);
            mapping.sort_in(outline.segments);
            outline = outline.with(extent);
        }
        mapping
    }

    /// Segment `index`, if this process has mapped it.
    fn segment(&self, index: u32) -> Option<&Segment> {
        // SAFETY: null, or a segment that was complete before it was published, and that only `drop` frees.
        unsafe { self.segments.get(index).as_ref() }
    }

    /// The parts behind the first one: each of `segments` that this process has mapped.
    fn later_parts(&self, segments: std::ops::Range<u32>) -> impl Iterator<Item = Part> {
        segments.filter_map(|index| self.segment(index)?.part())
    }

    /// The segments that this process has mapped and the file is known to hold.
    fn mapped(&self) -> Outline {
        match self.known.get().checked_sub(1) {
            Some(last) => self.segment(last).expect("a segment that is counted is mapped").outline,
            None => self.empty,
        }
    }

    /// Maps the segment behind those of `outline`, unless this process has mapped it already. Returns the segments up to this one.
    fn map_segment(&self, outline: &Outline, extent: &Extent) -> Result<Outline, Error> {
        if self.segment(outline.segments).is_none() {
            let part = self.map_part(extent)?;
            if !self.publish(outline, extent, part.base) {
                // SAFETY: another thread published its own mapping first, so no reference to this one was given out.
                unsafe { part.unmap() };
            }
        }
        self.sort_in(outline.segments);
        // That of the segment which is mapped, not `extent`: where other code writes to the directory, another thread of this
        // process may have read another word there.
        Ok(self.segment(outline.segments).expect("it was published").outline)
    }

    /// Shows the other threads of this process that the segment behind those of `outline` is mapped at `base`; `false` if one
    /// of them was faster.
    fn publish(&self, outline: &Outline, extent: &Extent, base: NonNull<u8>) -> bool {
        let base = Published::new(base.as_ptr());
        let segment = Box::into_raw(Box::new(Segment { base, extent: *extent, outline: outline.with(extent) }));
        let is_first = self.segments.entry(outline.segments).replace(std::ptr::null_mut(), segment);
        if !is_first {
            // SAFETY: it was made just now, and not published.
            drop(unsafe { Box::from_raw(segment) });
        } else if self.known.is_closed() {
            self.discard_unknown();
        }
        is_first
    }

    /// Enters segment `index`, which was published, among those of its kind. To be called, by whichever thread, before it is
    /// counted.
    fn sort_in(&self, index: u32) {
        let Some(segment) = self.segment(index) else { return };
        let kind = match segment.extent.kind {
            Kind::Slots | Kind::SlotsOfVersion1 => &self.slots,
            Kind::Texts => &self.texts,
            Kind::Participants => return,
        };
        kind.entry(segment.extent.number).set(self.segments.get(index));
    }

    fn map_part(&self, extent: &Extent) -> Result<Part, Error> {
        let (from, to) = (extent.offset, extent.end());
        let access = if self.read_only { OFlag::O_RDONLY } else { OFlag::O_RDWR };
        match self.file.path {
            Some(_) => self.file.with(access, |file| Part::map(file, from, to, self.read_only)),
            None => self
                .file
                .with_own(|file| Part::map(file, from, to, self.read_only))
                .unwrap_or_else(|| self.first.map_more(from, to)),
        }
    }

    /// Unmaps the segments beyond those that `known` counted when it was closed: no reference to them was given out.
    fn discard_unknown(&self) {
        for segment in (self.known.get()..SEGMENTS as u32).filter_map(|index| self.segment(index)) {
            if let Some(part) = segment.take_part() {
                // SAFETY: no reference to it was given out, nor will be, as it is beyond `known`; and only the thread that took
                // the part unmaps it.
                unsafe { part.unmap() };
            }
        }
    }

    /// The segment behind those of `outline`, if there is one.
    ///
    /// # Errors
    ///
    /// The file says that there is one, but it cannot be.
    fn next_extent(&self, outline: &Outline) -> Result<Option<Extent>, Error> {
        if self.is_of_version_1 {
            let segments = self.header().segments_of_version_1();
            if segments <= outline.segments {
                return Ok(None);
            }
            let extent = version_1::extent(self.capacity, outline.segments);
            return extent.map(Some).ok_or_else(|| {
                let found = u64::from(segments);
                self.file.error(damaged("number of segments", found, "at least 1, of at most 8 GiB together"))
            });
        }
        match self.directory().get(outline.segments) {
            0 => Ok(None),
            word => outline.next(self.capacity, word).map(Some).map_err(|kind| self.file.error(kind)),
        }
    }

    pub(crate) fn identity(&self) -> Identity {
        self.file.identity
    }

    /// How many names the file has; `None` if other code has closed its descriptor.
    pub(crate) fn link_count(&self) -> Option<nix::libc::nlink_t> {
        self.file.with_own(|file| fstat(file).ok().map(|stat| stat.st_nlink)).flatten()
    }

    /// The file's status, from the system.
    pub(crate) fn stat(&self) -> Result<FileStat, Error> {
        self.file.with(OFlag::O_RDONLY, |file| {
            fstat(file).map_err(|errno| Error::system("looking at the table's file", errno))
        })
    }

    /// How long the file is.
    fn size(&self) -> Result<u64, Error> {
        match self.file.path {
            Some(_) => Ok(self.stat()?.st_size as u64),
            // A table without a path may be another process's, opened by its descriptor, and grow. Where the descriptor is gone, it
            // is this process's own, which has its final size from the beginning, and is sealed against truncation.
            None => {
                let size = self.file.with_own(|file| fstat(file).ok().map(|stat| stat.st_size as u64)).flatten();
                Ok(size.unwrap_or(self.most))
            }
        }
    }

    /// Whether `word` is in this mapping.
    pub(crate) fn contains(&self, word: &GenerationWord) -> bool {
        self.find(word).is_some()
    }

    /// The generation word at `address`, at which one was found in this mapping or in another one of this process. `None` if it is
    /// not in this mapping.
    #[inline]
    #[cfg(feature = "map")]
    pub(crate) fn generation_at(&self, address: usize) -> Option<&GenerationWord> {
        let within = address.wrapping_sub(self.first.base.addr().get());
        if within < self.first.length && address.is_multiple_of(size_of::<GenerationWord>()) {
            // SAFETY: an aligned word, which begins within the first part, and so ends there, as the length of a part is a
            // multiple of its size. It stays mapped as long as self lives, and is accessed by atomics only.
            return Some(unsafe { self.first.base.add(within).cast::<GenerationWord>().as_ref() });
        }
        self.generation_behind(address)
    }

    /// As [`generation_at`](Self::generation_at), in the segments that were mapped later.
    #[cold]
    #[cfg(feature = "map")]
    fn generation_behind(&self, address: usize) -> Option<&GenerationWord> {
        let (segment, within) = self.find_address(address)?;
        match self.slots(segment.extent.number) {
            SlotSegment::Lanes(lanes) if within.is_multiple_of(8) => lanes.generations.get(within as usize / 8),
            _ => None,
        }
    }

    /// Where in the file `word` is.
    pub(crate) fn offset_of(&self, word: &GenerationWord) -> u64 {
        let (segment, within) = self.find(word).expect("the word is in a segment");
        segment.extent.offset + within
    }

    /// The segment that `word` is in, and at which offset there.
    fn find(&self, word: &GenerationWord) -> Option<(&Segment, u64)> {
        self.find_address(std::ptr::from_ref(word).addr())
    }

    /// The segment that has `address`, and at which offset there.
    fn find_address(&self, address: usize) -> Option<(&Segment, u64)> {
        // From the last on, as half of all words are in the last one.
        (0..self.mapped().slots).rev().find_map(|number| {
            let segment = self.of_kind(&self.slots, number);
            let within = address.checked_sub(segment.base()?.addr().get())? as u64;
            (within < segment.extent.bytes).then_some((segment, within))
        })
    }

    /// Segment `number` of its kind, which `known` has counted.
    fn of_kind<'a>(&'a self, kind: &'a List<Segment>, number: u32) -> &'a Segment {
        // SAFETY: null, or a segment of this mapping, that only `drop` frees.
        let segment = unsafe { kind.get(number).as_ref() };
        segment.expect("a segment beyond the mapping was asked for")
    }

    /// Where the locks of updates are.
    fn update_locks(&self) -> UpdateLocks {
        UpdateLocks::of(self.is_of_version_1)
    }

    /// Which bytes an update of the key with this word locks.
    fn range_of(&self, word: &GenerationWord) -> Range {
        self.update_locks().one(self.offset_of(word))
    }

    /// Takes the lock of an update of the key with this word; `None` while another holder has a lock that conflicts with it.
    pub(crate) fn try_lock(&self, word: &GenerationWord, kind: lock::Kind) -> Result<Option<RangeLock>, Error> {
        self.try_lock_range(self.range_of(word), kind)
    }

    /// Keeps updates from beginning; `None` while one is in flight.
    pub(crate) fn try_exclude_updates(&self) -> Result<Option<RangeLock>, Error> {
        self.try_lock_range(self.update_locks().all(), lock::Kind::Exclusive)
    }

    /// Holds up updates that are about to begin; `None` while another process does so.
    pub(crate) fn try_hold_updates_up(&self) -> Result<Option<RangeLock>, Error> {
        self.try_lock_range(GATE, lock::Kind::Exclusive)
    }

    fn try_lock_range(&self, range: Range, kind: lock::Kind) -> Result<Option<RangeLock>, Error> {
        RangeLock::try_new(|| self.file.open_again(), range, kind).map_err(|error| self.file.place(error))
    }

    /// How many slots each segment with slots has, of those in `outline`.
    pub(crate) fn capacities(&self, outline: &Outline) -> impl Iterator<Item = u64> {
        (0..outline.slots).map(|number| self.of_kind(&self.slots, number).extent.slots)
    }

    /// Which lock others hold on the key with this word; `None` also if that cannot be found out.
    pub(crate) fn held(&self, word: &GenerationWord) -> Option<Held> {
        self.held_range(self.range_of(word))
    }

    /// Whether an update of any key is in flight; `false` also if that cannot be found out.
    pub(crate) fn has_updates_in_flight(&self) -> bool {
        matches!(self.held_range(self.update_locks().all()), Some(Held::Update | Held::Unknown))
    }

    /// Whether another process has [excluded updates](Self::try_exclude_updates).
    pub(crate) fn are_updates_excluded(&self) -> bool {
        self.is_held_by_writer(self.update_locks().all())
    }

    /// Whether another process [holds updates up](Self::try_hold_updates_up). A shared lock, which takes no right to write,
    /// does not count.
    pub(crate) fn is_held_up(&self) -> bool {
        self.is_held_by_writer(GATE)
    }

    fn is_held_by_writer(&self, range: Range) -> bool {
        self.file.with_any(|file| is_held_by_writer(file, range).unwrap_or(false)).unwrap_or(false)
    }

    /// One system call, unless there is a lock that is not gensync's. Whether the descriptor still leads to the file is not
    /// checked first, so a caller cannot rely on the answer that there is no lock.
    fn held_range(&self, range: Range) -> Option<Held> {
        self.file.with_any(|file| held(file, self.file.identity, range, self.update_locks()).ok()).flatten().flatten()
    }

    /// Gives the memory and the descriptor of a table that was replaced back to the system, while threads may still use its
    /// words.
    ///
    /// What was given out stays mapped, to zeros, which a reader takes for a retired table.
    pub(crate) fn detach(&self) {
        let Some(segments) = self.known.close() else { return };
        for part in std::iter::once(self.first).chain(self.later_parts(self.opened..segments)) {
            // SAFETY: the range belongs to this value, and was given out as atomics only, which any process may change.
            unsafe { part.zero(self.read_only) };
        }
        self.discard_unknown();
        self.file.close();
    }

    /// Whether it was [detached](Self::detach), or is about to be.
    pub(crate) fn is_detached(&self) -> bool {
        self.known.is_closed()
    }

    /// Gives back the memory that late threads have written to since the table was [detached](Self::detach).
    pub(crate) fn detach_again(&self) {
        if !self.known.is_closed() {
            return;
        }
        for part in std::iter::once(self.first).chain(self.later_parts(self.opened..self.known.get())) {
            // SAFETY: `detach` was called before; the part belongs to this value, and was given out as atomics only.
            unsafe { part.forget() };
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        for part in self.later_parts(self.opened..SEGMENTS as u32) {
            // SAFETY: whatever borrowed from the mapping is gone, and the part belongs to this value.
            unsafe { part.unmap() };
        }
        for segment in (0..SEGMENTS as u32).map(|index| self.segments.get(index)).filter(|segment| !segment.is_null()) {
            // SAFETY: it came from a Box, stands there once, and whatever borrowed from it is gone.
            drop(unsafe { Box::from_raw(segment) });
        }
        match &mut self.owner {
            // SAFETY: whatever borrowed from the mapping is gone, and the first part belongs to this value.
            Owner::Own => unsafe { self.first.unmap() },
            // shared_memory closes its descriptor by a number that it does not reveal. If no number except ours leads to the
            // file any more, that descriptor was closed by other code, and closing its number again could close another file:
            // keep the range mapped instead.
            #[cfg(feature = "shm")]
            Owner::Named(shmem) if self.file.open_elsewhere() => {
                // SAFETY: dropped here, once.
                unsafe { ManuallyDrop::drop(shmem) }
            }
            #[cfg(feature = "shm")]
            Owner::Named(_) => {}
        }
    }
}

/// Where the last of `extents` ends.
fn end(fixed: &FixedHeader, extents: &[Extent]) -> u64 {
    extents.last().map_or(fixed.outline().end, Extent::end)
}

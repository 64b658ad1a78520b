//! The edge to the operating system's memory: map a table's file, extend it, unmap it.
//!
//! Only what exists is mapped: the header together with the segments that exist when the table is opened, and each later
//! segment by itself, when this process first needs it. No part ever moves, so a reference to a slot is good as long as its
//! mapping. No address space is reserved for growth: limits on address space, locked memory and core dumps see the table as
//! large as it is.

#![expect(unsafe_code, reason = "maps files; each block states the fact relied on")]

mod chain;
mod closable;
mod descriptor;
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
use crate::error::{Error, ErrorKind};
use crate::os::allocation::{allocate, no_room};
use crate::os::identity::Identity;
use crate::os::lock::{Held, Kind, Range, RangeLock, held, is_held_by_writer};
use crate::protocol::layout::{
    FixedHeader, HEADER_SIZE, HEADER_WORDS_OFFSET, Header, MAX_SIZE, STATE_OFFSET, Slot, Tag, segment_offset,
    segment_slots, segments_within,
};
use crate::protocol::slots::Memory;
pub(crate) use chain::{Chain, Places, SlotRef};
pub(crate) use descriptor::DESCRIPTORS;
use descriptor::FileRef;

/// All slots, however many there will be.
pub(crate) const SLOTS: Range = Range { start: HEADER_SIZE as u64, length: 0 };
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
    /// Where each segment that may ever exist begins: null until this process has mapped it.
    segments: Box<[Published<u8>]>,
    /// How many of them lie in the first part.
    opened: u32,
    capacity: u64,
    /// How many segments, from the first on, this process has mapped and the file is known to hold.
    known: ClosableMax,
    read_only: bool,
    file: FileRef,
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
    /// Maps `file`, whose header was checked and says `capacity` and `segments`.
    pub(crate) fn of_file(
        file: File,
        path: Option<&Path>,
        fixed: &FixedHeader,
        segments: u32,
        read_only: bool,
    ) -> Result<Self, Error> {
        let most = match path {
            Some(_) => MAX_SIZE,
            // An anonymous file has its final size, which may be less than the maximum: no header may claim segments beyond its
            // end.
            None => file.metadata().map_err(|error| Error::io("looking at the table's file", &error))?.len(),
        };
        let first = Part::map(file.as_fd(), 0, segment_offset(fixed.capacity, segments), read_only)?;
        let file = FileRef::new(file, path).inspect_err(|_| {
            // SAFETY: it was mapped just now, and no reference to it was given out.
            unsafe { first.unmap() }
        })?;
        Ok(Self::new(first, Owner::Own, file, fixed.capacity, segments, most, read_only))
    }

    /// Maps the named POSIX segment that `file` is, whose header was checked and says `capacity` and `segments`. `None` if the
    /// name leads to another file by now.
    #[cfg(feature = "shm")]
    pub(crate) fn of_named(
        file: File,
        path: &Path,
        name: &str,
        fixed: &FixedHeader,
        segments: u32,
    ) -> Result<Option<Self>, Error> {
        let capacity = fixed.capacity;
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
        let least = segment_offset(capacity, segments);
        if (size as u64) < least {
            return Err(file.error(ErrorKind::Truncated { found: size as u64, expected: least }));
        }
        let first = Part::new(base, address_size(least)?)?;
        let owner = Owner::Named(ManuallyDrop::new(shmem));
        Ok(Some(Self::new(first, owner, file, capacity, segments, MAX_SIZE, false)))
    }

    fn new(first: Part, owner: Owner, file: FileRef, capacity: u64, opened: u32, most: u64, read_only: bool) -> Self {
        let start = |segment| match segment < opened {
            // SAFETY: the first part holds the first `opened` segments.
            true => unsafe { first.base.add(segment_offset(capacity, segment) as usize).as_ptr() },
            false => std::ptr::null_mut(),
        };
        let segments = (0..segments_within(capacity, most)).map(|segment| Published::new(start(segment))).collect();
        Self { first, owner, segments, opened, capacity, known: ClosableMax::new(opened), read_only, file }
    }

    /// How many segments there may ever be.
    fn limit(&self) -> u32 {
        self.segments.len() as u32
    }

    /// Where `segment` begins, if this process has mapped it.
    fn start(&self, segment: u32) -> Option<NonNull<u8>> {
        NonNull::new(self.segments[segment as usize].get())
    }

    /// What is mapped of `segment`, which does not lie in the first part.
    fn part(&self, segment: u32, base: NonNull<u8>) -> Part {
        let (from, to) = self.bytes_of(segment);
        Part { base, length: (to - from) as usize }
    }

    /// Which bytes of the file `segment` occupies.
    fn bytes_of(&self, segment: u32) -> (u64, u64) {
        (segment_offset(self.capacity, segment), segment_offset(self.capacity, segment + 1))
    }

    /// The parts behind the first one: each of `segments` that this process has mapped.
    fn later_parts(&self, segments: std::ops::Range<u32>) -> impl Iterator<Item = Part> {
        segments.filter_map(|segment| Some(self.part(segment, self.start(segment)?)))
    }

    /// Maps `segment`, unless this process has mapped it already.
    fn map_segment(&self, segment: u32) -> Result<(), Error> {
        if self.start(segment).is_some() {
            return Ok(());
        }
        let part = self.map_part(segment)?;
        if !self.publish(segment, part) {
            // SAFETY: another thread published its own mapping first, so no reference to this one was given out.
            unsafe { part.unmap() };
        }
        Ok(())
    }

    fn publish(&self, segment: u32, part: Part) -> bool {
        let is_first = self.segments[segment as usize].replace(std::ptr::null_mut(), part.base.as_ptr());
        if is_first && self.known.is_closed() {
            self.discard_unknown();
        }
        is_first
    }

    fn map_part(&self, segment: u32) -> Result<Part, Error> {
        let (from, to) = self.bytes_of(segment);
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
        for segment in self.known.get()..self.limit() {
            if let Some(base) = self.start(segment)
                && self.segments[segment as usize].replace(base.as_ptr(), std::ptr::null_mut())
            {
                // SAFETY: no reference to it was given out, nor will be, as it is beyond `known`; and the thread that took the
                // pointer out is the only one that unmaps it.
                unsafe { self.part(segment, base).unmap() };
            }
        }
    }

    pub(crate) fn identity(&self) -> Identity {
        self.file.identity
    }

    /// How many names the file has; `None` if other code has closed its descriptor.
    pub(crate) fn link_count(&self) -> Option<nix::libc::nlink_t> {
        self.file.with_own(|file| fstat(file).ok().map(|stat| stat.st_nlink)).flatten()
    }

    /// How many segments this process can reach, whatever the header says.
    pub(crate) fn reachable(&self) -> u32 {
        self.segments().unwrap_or_else(|_| self.known.get())
    }

    /// The file's status, from the system.
    pub(crate) fn stat(&self) -> Result<FileStat, Error> {
        self.file.with(OFlag::O_RDONLY, |file| {
            fstat(file).map_err(|errno| Error::system("looking at the table's file", errno))
        })
    }

    /// Whether `slot` is in this mapping.
    pub(crate) fn contains(&self, slot: &Slot) -> bool {
        self.find_offset(slot).is_some()
    }

    /// Where in the file `slot` is.
    pub(crate) fn offset_of(&self, slot: &Slot) -> u64 {
        self.find_offset(slot).expect("the slot is in a segment")
    }

    fn find_offset(&self, slot: &Slot) -> Option<u64> {
        (0..self.known.get()).find_map(|segment| {
            let within = std::ptr::from_ref(slot).addr().checked_sub(self.start(segment)?.addr().get())? as u64;
            let (from, to) = self.bytes_of(segment);
            (within < to - from).then_some(from + within)
        })
    }

    /// Which bytes of the file `slot` occupies.
    fn range_of(&self, slot: &Slot) -> Range {
        Range { start: self.offset_of(slot), length: size_of::<Slot>() as u64 }
    }

    /// Takes a lock on the bytes of `slot` in the file; `None` while another holder has a lock that conflicts with it.
    pub(crate) fn try_lock(&self, slot: &Slot, kind: Kind) -> Result<Option<RangeLock>, Error> {
        self.try_lock_range(self.range_of(slot), kind)
    }

    /// Keeps updates from beginning; `None` while one is in flight.
    pub(crate) fn try_exclude_updates(&self) -> Result<Option<RangeLock>, Error> {
        self.try_lock_range(SLOTS, Kind::Exclusive)
    }

    /// Holds up updates that are about to begin; `None` while another process does so.
    pub(crate) fn try_hold_updates_up(&self) -> Result<Option<RangeLock>, Error> {
        self.try_lock_range(GATE, Kind::Exclusive)
    }

    fn try_lock_range(&self, range: Range, kind: Kind) -> Result<Option<RangeLock>, Error> {
        RangeLock::try_new(|| self.file.open_again(), range, kind).map_err(|error| self.file.place(error))
    }

    /// Which lock others hold on the bytes of `slot`; `None` also if that cannot be found out.
    pub(crate) fn held(&self, slot: &Slot) -> Option<Held> {
        self.held_range(self.range_of(slot))
    }

    /// Whether an update of any key is in flight; `false` also if that cannot be found out.
    pub(crate) fn has_updates_in_flight(&self) -> bool {
        matches!(self.held_range(SLOTS), Some(Held::Update | Held::Unknown))
    }

    /// Whether another process has [excluded updates](Self::try_exclude_updates).
    pub(crate) fn are_updates_excluded(&self) -> bool {
        self.is_held_by_writer(SLOTS)
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
        self.file.with_any(|file| held(file, self.file.identity, range).ok()).flatten().flatten()
    }

    /// Gives the memory and the descriptor of a table that was replaced back to the system, while threads may still use its
    /// slots.
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
        for part in self.later_parts(self.opened..self.limit()) {
            // SAFETY: whatever borrowed from the mapping is gone, and the part belongs to this value.
            unsafe { part.unmap() };
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

impl Memory for Mapping {
    fn header(&self) -> &Header {
        // SAFETY: the offset is within the header page, which is mapped as long as self lives (checked in `decode`,
        // file size included), and aligned, as the base is aligned to a page. All fields are atomics.
        unsafe { self.first.base.add(HEADER_WORDS_OFFSET).cast::<Header>().as_ref() }
    }

    fn segments(&self) -> Result<u32, Error> {
        let claimed = self.header().segments();
        let known = self.known.get();
        if claimed <= known {
            return Ok(known);
        }
        if claimed > self.limit() {
            return Err(self.file.error(ErrorKind::Damaged {
                field: "number of segments",
                found: u64::from(claimed),
                expected: "at most what fits into 8 GiB, and into an anonymous table's size",
            }));
        }
        let expected = segment_offset(self.capacity, claimed);
        // An anonymous file has its final size from the beginning, and is sealed against truncation.
        if self.file.path.is_some() {
            let found = self.stat()?.st_size as u64;
            if found < expected {
                return Err(self.file.error(ErrorKind::Truncated { found, expected }));
            }
        }
        for segment in known..claimed {
            self.map_segment(segment).map_err(|error| self.file.place(error))?;
        }
        // If that fails, `known` was closed meanwhile, by a thread of this process that has moved on to the successor.
        if self.known.raise(claimed) { Ok(claimed) } else { Err(self.file.error(ErrorKind::Retired)) }
    }

    fn segment(&self, segment: u32) -> (&[Slot], &[Tag]) {
        let base = self.start(segment).filter(|_| segment < self.known.get());
        let base = base.expect("a segment beyond the mapping was asked for");
        let count = segment_slots(self.capacity, segment) as usize;
        // SAFETY: the segment is below `known`, so it is mapped, and lies within the file, whose size was checked; it is
        // aligned to a slot, as its offset is. All fields are atomics, so shared references to memory that other processes
        // change are sound. A file that is truncated later causes a SIGBUS, which is documented.
        unsafe {
            let tags = base.add(count * size_of::<Slot>());
            let slots = std::slice::from_raw_parts(base.cast().as_ptr(), count);
            (slots, std::slice::from_raw_parts(tags.cast().as_ptr(), count))
        }
    }

    fn extend(&self, segment: u32) -> Result<(), Error> {
        if segment >= self.limit() {
            let size = segment_offset(self.capacity, self.limit());
            return Err(self.file.error(ErrorKind::TableFull {
                reason: format!("it would outgrow the {size} bytes that it may have"),
                advice: "reset it to be rid of old keys; an anonymous table may have more if it is made under a higher limit on \
                         file size (ulimit -f)",
            }));
        }
        let (start, end) = self.bytes_of(segment);
        // Mapped first, as a mapping can be undone; published when the file has room behind it.
        let part = match self.start(segment) {
            None => Some(self.map_part(segment).map_err(|error| self.file.place(no_room(error, end - start)))?),
            Some(_) => None,
        };
        let room = match self.file.path {
            Some(_) => self.file.with(OFlag::O_RDWR, |file| allocate(file, start, end)),
            // An anonymous table whose descriptor was closed gets its memory when it is touched: there is no disk that could be
            // full.
            None => self.file.with_own(|file| allocate(file, start, end)).unwrap_or(Ok(())),
        };
        if let Some(part) = part
            && (room.is_err() || !self.publish(segment, part))
        {
            // SAFETY: the part was not published, so no reference to it was given out.
            unsafe { part.unmap() };
        }
        room
    }
}

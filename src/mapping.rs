//! The edge to the operating system's memory: map a table's file, extend it, let go of it. `unsafe` lives here.
//!
//! A mapping sets aside address space for the greatest table and never moves, so a segment that another process
//! appends needs no call here but one that asks for the file's size.

#![expect(unsafe_code, reason = "maps files; each block states the fact relied on")]

mod chain;
mod descriptor;

use std::fs::File;
use std::mem::ManuallyDrop;
use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::ptr::NonNull;

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FallocateFlags, OFlag, fallocate};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::sys::stat::{FileStat, fstat};
use nix::unistd::{SysconfVar, sysconf};

use crate::error::{Error, ErrorKind};
use crate::layout::{
    Facts, HEADER_SIZE, HEADER_WORDS_OFFSET, Header, MAX_SIZE, STATE_OFFSET, Slot, Tag, segment_offset, segment_slots,
    segments_within,
};
use crate::lock::{Kind, Range, RangeLock, held};
use crate::slot::HighWater;
use crate::table::Memory;

pub(crate) use chain::{Chain, Places, SlotRef};
use descriptor::FileRef;
pub(crate) use descriptor::{DESCRIPTORS, Identity};

/// All slots, however many there will be.
const SLOTS: Range = Range { start: HEADER_SIZE as u64, length: 0 };
/// The header's state, whose lock says that it is about to change.
const GATE: Range = Range { start: STATE_OFFSET as u64, length: 4 };

/// A table's file in memory.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    /// Bytes of address space set aside.
    size: u64,
    owner: Owner,
    capacity: u64,
    /// How many segments the address range holds.
    limit: u32,
    /// How many segments the file is known to hold.
    known: HighWater,
    file: FileRef,
}

/// What mapped the range.
enum Owner {
    /// Never dropped: `drop` unmaps as much as `empty` has left.
    MemMap(#[expect(dead_code, reason = "says whose range it is")] ManuallyDrop<MmapRaw>),
    #[cfg(feature = "shm")]
    Named(ManuallyDrop<shared_memory::Shmem>),
}

impl std::fmt::Debug for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::MemMap(_) => "MemMap",
            #[cfg(feature = "shm")]
            Self::Named(_) => "Named",
        })
    }
}

// SAFETY: the range stays mapped until the value is dropped, whichever thread does it, and all access to it goes
// through atomics.
unsafe impl Send for Mapping {}
// SAFETY: as for Send; shared references give out shared references to atomics only.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `file`, whose header was checked and says `capacity` and `segments`.
    pub(crate) fn of_file(
        file: File,
        path: Option<&Path>,
        facts: &Facts,
        segments: u32,
        read_only: bool,
    ) -> Result<Self, Error> {
        let size = match path {
            Some(_) => MAX_SIZE,
            // As large as it will ever be, which may be less: nobody may say that there are segments behind its end.
            None => file.metadata().map_err(|error| Error::io("looking at the table's file", &error))?.len(),
        };
        let file = FileRef::new(file, path)?;
        let capacity = facts.capacity;
        // A limit on address space leaves less room for growth, not none: halve until it fits.
        let least = segment_offset(capacity, segments);
        let mut size = size.max(least);
        let map = loop {
            let mut options = MmapOptions::new();
            options.len(size as usize);
            let raw = file.number;
            match if read_only { options.map_raw_read_only(raw) } else { options.map_raw(raw) } {
                Ok(map) => break map,
                Err(_) if size / 2 >= least => size /= 2,
                Err(error) => return Err(file.place(Error::io("mapping the table", &error))),
            }
        };
        let base = map.as_mut_ptr();
        Self::new(base, size, Owner::MemMap(ManuallyDrop::new(map)), file, capacity, segments)
    }

    /// Maps the named POSIX segment that `file` is, whose header was checked and says `capacity` and `segments`.
    /// `None` if another file has the name by now.
    #[cfg(feature = "shm")]
    pub(crate) fn of_named(
        file: File,
        path: &Path,
        name: &str,
        facts: &Facts,
        segments: u32,
    ) -> Result<Option<Self>, Error> {
        let capacity = facts.capacity;
        use shared_memory::{ShmemConf, ShmemError};
        let file = FileRef::new(file, Some(path))?;
        let shmem = ShmemConf::new().os_id(name).open().map_err(|error| {
            file.place(match error {
                ShmemError::MapOpenFailed(errno) => {
                    Error::system("mapping the named segment", nix::errno::Errno::from_raw(errno as i32))
                }
                _ => ErrorKind::System { action: "mapping the named segment" }.into(),
            })
        })?;
        let (base, size) = (shmem.as_ptr(), shmem.len() as u64);
        // The name led to this file before, `file` keeps its inode from being used again, and if it leads to it now,
        // then that is what was mapped.
        if !nix::sys::stat::lstat(path).is_ok_and(|stat| Identity::of(&stat) == file.identity) {
            return Ok(None);
        }
        let least = segment_offset(capacity, segments);
        if size < least {
            return Err(file.error(ErrorKind::Truncated { found: size, expected: least }));
        }
        Self::new(base, size, Owner::Named(ManuallyDrop::new(shmem)), file, capacity, segments).map(Some)
    }

    fn new(base: *mut u8, size: u64, owner: Owner, file: FileRef, capacity: u64, segments: u32) -> Result<Self, Error> {
        let base = NonNull::new(base).ok_or(ErrorKind::System { action: "mapping the table" })?;
        // SAFETY: the range was mapped just now. The advice keeps a core dump from being as large as the range.
        let _ = unsafe { madvise(base.cast(), size as usize, MmapAdvise::MADV_DONTDUMP) };
        let (limit, known) = (segments_within(capacity, size), HighWater::new(segments));
        Ok(Self { base, size, owner, capacity, limit, known, file })
    }

    pub(crate) fn identity(&self) -> Identity {
        self.file.identity
    }

    /// How many names the file has; `None` if its descriptor was closed by somebody else.
    pub(crate) fn link_count(&self) -> Option<nix::libc::nlink_t> {
        self.file.with_own(|file| fstat(file).ok().map(|stat| stat.st_nlink)).flatten()
    }

    /// How many segments can be reached, whatever the header says.
    pub(crate) fn reachable(&self) -> u32 {
        self.segments().unwrap_or_else(|_| self.known.get())
    }

    /// What the system says of the file.
    pub(crate) fn stat(&self) -> Result<FileStat, Error> {
        self.file.with(OFlag::O_RDONLY, |file| {
            fstat(file).map_err(|errno| Error::system("looking at the table's file", errno))
        })
    }

    /// Which bytes of the file `slot` is.
    fn range_of(&self, slot: &Slot) -> Range {
        let start = std::ptr::from_ref(slot).addr() - self.base.as_ptr().addr();
        Range { start: start as u64, length: size_of::<Slot>() as u64 }
    }

    /// Where in the file `slot` is.
    pub(crate) fn offset_of(&self, slot: &Slot) -> u64 {
        self.range_of(slot).start
    }

    /// Takes a lock on the bytes of `slot` in the file; `None` while somebody holds one against it.
    pub(crate) fn try_lock(&self, slot: &Slot, kind: Kind) -> Result<Option<RangeLock>, Error> {
        self.try_lock_range(self.range_of(slot), kind)
    }

    /// Keeps updates from beginning; `None` while one is in flight.
    pub(crate) fn try_exclude_updates(&self) -> Result<Option<RangeLock>, Error> {
        self.try_lock_range(SLOTS, Kind::Exclusive)
    }

    /// Asks those who are about to begin an update to wait; `None` while somebody else does.
    pub(crate) fn try_hold_updates_up(&self) -> Result<Option<RangeLock>, Error> {
        self.try_lock_range(GATE, Kind::Exclusive)
    }

    fn try_lock_range(&self, range: Range, kind: Kind) -> Result<Option<RangeLock>, Error> {
        let file = self.file.open_again()?;
        RangeLock::try_new(file, self.file.identity, range, kind).map_err(|error| self.file.place(error))
    }

    /// What kind of lock somebody holds on the bytes of `slot`; `None` also where that cannot be told.
    pub(crate) fn held(&self, slot: &Slot) -> Option<Kind> {
        self.held_range(self.range_of(slot))
    }

    /// Whether an update of some key is in flight; `false` also where that cannot be told.
    pub(crate) fn has_updates_in_flight(&self) -> bool {
        self.held_range(SLOTS) == Some(Kind::Shared)
    }

    /// Whether somebody [holds updates up](Self::try_hold_updates_up).
    pub(crate) fn is_held_up(&self) -> bool {
        self.held_range(GATE).is_some()
    }

    /// One system call. The descriptor is not asked first whether it still leads to the file, so who is told that nobody
    /// holds a lock cannot rely on it.
    fn held_range(&self, range: Range) -> Option<Kind> {
        self.file.with_any(|file| held(file, range).ok()).flatten().flatten()
    }

    /// Gives the memory and the descriptor of a table that was replaced back to the system, while threads may still
    /// look at its slots.
    ///
    /// What was used stays mapped, to zeros, which a reader takes for a retired table.
    pub(crate) fn empty(&self) {
        let Some(segments) = self.known.close() else { return };
        let used = segment_offset(self.capacity, segments);
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED | MapFlags::MAP_NORESERVE;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let (address, length) = (NonZeroUsize::new(self.base.as_ptr() as usize), NonZeroUsize::new(used as usize));
        if let (Some(address), Some(length)) = (address, length) {
            // SAFETY: the range lies within this value's own mapping, and stays mapped, readable and writable where
            // slots were given out. Its words are atomics, for which any value may appear at any time.
            let _ = unsafe { mmap_anonymous(Some(address), length, protection, flags) };
        }
        match self.owner {
            // SAFETY: nothing beyond `used` was given out, and nothing is from now on, as `known` is closed.
            Owner::MemMap(_) => unsafe { unmap(self.base, used, self.size) },
            // Dropping it unmaps the whole range, so nobody else may get a part of it before.
            #[cfg(feature = "shm")]
            Owner::Named(_) => {}
        }
        self.file.close();
    }
}

/// # Safety
///
/// Nobody uses the bytes `from..to` behind `base`, which belong to the caller.
unsafe fn unmap(base: NonNull<u8>, from: u64, to: u64) {
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten().map_or(65_536, |page| page as u64);
    let from = from.next_multiple_of(page);
    if from < to {
        // SAFETY: as the caller says. It cannot fail but for want of kernel memory, and then the range stays mapped.
        let _ = unsafe { munmap(base.add(from as usize).cast(), (to - from) as usize) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let rest = match self.known.close() {
            Some(_) => self.size,
            // `empty` was here.
            None => segment_offset(self.capacity, self.known.get()),
        };
        match &mut self.owner {
            // SAFETY: what borrows from the mapping is gone, and the range is this value's own up to where `empty` cut it.
            Owner::MemMap(_) => unsafe { unmap(self.base, 0, rest) },
            // shared_memory closes its descriptor by a number that it does not tell. If no number but ours leads to the
            // file any more, somebody closed it, and closing it again could hit a stranger: keep the range instead.
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
        unsafe { self.base.add(HEADER_WORDS_OFFSET).cast::<Header>().as_ref() }
    }

    fn segments(&self) -> Result<u32, Error> {
        let claimed = self.header().segments();
        let known = self.known.get();
        if claimed <= known {
            return Ok(known);
        }
        if claimed > self.limit {
            let size = segment_offset(self.capacity, self.limit);
            return Err(self.file.error(ErrorKind::Damaged {
                field: "number of segments",
                found: u64::from(claimed),
                expected: if size * 2 < MAX_SIZE {
                    "fewer, as this process may map no more (ulimit -v)"
                } else {
                    "at most what fits into 8 GiB"
                },
            }));
        }
        let expected = segment_offset(self.capacity, claimed);
        // An anonymous file has its greatest size from the beginning, and is sealed; no more of it is mapped.
        if self.file.path.is_some() {
            let found = self.stat()?.st_size as u64;
            if found < expected {
                return Err(self.file.error(ErrorKind::Truncated { found, expected }));
            }
        }
        // Closed meanwhile: by a thread of this process that has attached to the successor.
        if self.known.raise(claimed) { Ok(claimed) } else { Err(self.file.error(ErrorKind::Retired)) }
    }

    fn segment(&self, segment: u32) -> (&[Slot], &[Tag]) {
        assert!(segment < self.known.get(), "a segment beyond the mapping was asked for");
        let offset = segment_offset(self.capacity, segment) as usize;
        let count = segment_slots(self.capacity, segment) as usize;
        // SAFETY: the segment is below `known`, so it lies within the mapping (`limit`) and within the file, whose size
        // was asked for; offset and base are aligned to a slot. All fields are atomics, so shared references to memory
        // that other processes change are sound. A file that somebody truncates gives a SIGBUS: documented.
        unsafe {
            let slots = self.base.add(offset);
            let tags = slots.add(count * size_of::<Slot>());
            let slots = std::slice::from_raw_parts(slots.cast().as_ptr(), count);
            (slots, std::slice::from_raw_parts(tags.cast().as_ptr(), count))
        }
    }

    fn extend(&self, segment: u32) -> Result<(), Error> {
        if segment >= self.limit {
            let size = segment_offset(self.capacity, self.limit);
            return Err(self.file.error(ErrorKind::TableFull {
                reason: format!("it would outgrow the {size} bytes that this process has set aside for it"),
                advice: "reset it to be rid of old keys, or raise the limits on address space and file size (ulimit -v, -f)",
            }));
        }
        let (start, end) = (segment_offset(self.capacity, segment), segment_offset(self.capacity, segment + 1));
        match self.file.path {
            Some(_) => self.file.with(OFlag::O_RDWR, |file| allocate(file, start, end)),
            // Without its descriptor, the memory is taken when it is touched: there is no disk that could be full.
            None => self.file.with_own(|file| allocate(file, start, end)).unwrap_or(Ok(())),
        }
    }
}

/// Refuses a file size over the process's limit, for which the kernel would send SIGXFSZ, which kills.
pub(crate) fn check_size_limit(size: u64) -> Result<(), Error> {
    match getrlimit(Resource::RLIMIT_FSIZE) {
        Ok((limit, _)) if limit != RLIM_INFINITY && size > limit => Err(ErrorKind::TableFull {
            reason: format!("the file would grow to {size} bytes, over the process's file size limit of {limit}"),
            advice: "raise the limit (ulimit -f)",
        }
        .into()),
        _ => Ok(()),
    }
}

/// Reserves the bytes from `start` to `end` on the disk, so that writing there cannot fail later.
///
/// Raw fallocate: it never shrinks the file, leaves what is there, and writes nothing.
pub(crate) fn allocate(file: BorrowedFd<'_>, start: u64, end: u64) -> Result<(), Error> {
    check_size_limit(end)?;
    // In pieces, so that a process which gets a signal again and again still comes to an end.
    const PIECE: u64 = 16 << 20;
    let mut from = start;
    while from < end {
        let length = PIECE.min(end - from);
        match fallocate(file, FallocateFlags::empty(), from as i64, length as i64) {
            Ok(()) => from += length,
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(Error::system("reserving room for the table", errno)),
        }
    }
    Ok(())
}

//! The edge to the operating system's memory: map a table's file, extend it, let go of it. `unsafe` lives here.
//!
//! A mapping sets aside address space for the greatest table and never moves, so a segment that another process
//! appends needs no call here but one that asks for the file's size. It keeps a descriptor of its file for extending
//! it, but does not trust the number: a program that closes "all" descriptors to become a daemon may have given it
//! to another file. Before each use, closing included, the number must still lead to the file's device and inode.

#![expect(unsafe_code, reason = "maps files; each block states the fact relied on")]

use std::fs::File;
use std::mem::ManuallyDrop;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, IntoRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FallocateFlags, OFlag, fallocate};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::sys::stat::{FileStat, Mode, fstat};
use nix::unistd::{SysconfVar, sysconf};

use crate::error::{Error, ErrorKind};
use crate::layout::{
    Facts, HEADER_SIZE, HEADER_WORDS_OFFSET, Header, MAX_SIZE, Slot, Tag, segment_offset, segment_slots,
    segments_within,
};
use crate::lock::{Kind, Range, RangeLock, is_shared};
use crate::slot::{HighWater, Published, Users};
use crate::table::Memory;

/// Which file it is, whatever it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

impl Identity {
    pub(crate) fn of(stat: &FileStat) -> Self {
        Self { device: stat.st_dev, inode: stat.st_ino }
    }
}

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
    read_only: bool,
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
        let file = FileRef::new(file, path)?;
        let capacity = facts.capacity;
        // A limit on address space leaves less room for growth, not none: halve until it fits.
        let least = segment_offset(capacity, segments);
        let mut size = MAX_SIZE.max(least);
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
        Self::new(base, size, Owner::MemMap(ManuallyDrop::new(map)), file, capacity, segments, read_only)
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
        Self::new(base, size, Owner::Named(ManuallyDrop::new(shmem)), file, capacity, segments, false).map(Some)
    }

    fn new(
        base: *mut u8,
        size: u64,
        owner: Owner,
        file: FileRef,
        capacity: u64,
        segments: u32,
        read_only: bool,
    ) -> Result<Self, Error> {
        let base = NonNull::new(base).ok_or(ErrorKind::System { action: "mapping the table" })?;
        // SAFETY: the range was mapped just now. The advice keeps a core dump from being as large as the range.
        let _ = unsafe { madvise(base.cast(), size as usize, MmapAdvise::MADV_DONTDUMP) };
        let (limit, known) = (segments_within(capacity, size), HighWater::new(segments));
        Ok(Self { base, size, owner, capacity, limit, known, read_only, file })
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

    /// Takes a lock on the bytes of `slot` in the file; `None` while somebody holds one against it.
    pub(crate) fn try_lock(&self, slot: &Slot, kind: Kind) -> Result<Option<RangeLock>, Error> {
        self.try_lock_range(self.range_of(slot), kind)
    }

    /// Keeps updates from beginning; `None` while one is in flight.
    pub(crate) fn try_exclude_updates(&self) -> Result<Option<RangeLock>, Error> {
        self.try_lock_range(Range { start: HEADER_SIZE as u64, length: 0 }, Kind::Exclusive)
    }

    fn try_lock_range(&self, range: Range, kind: Kind) -> Result<Option<RangeLock>, Error> {
        let file = self.file.open_again()?;
        RangeLock::try_new(file, range, kind).map_err(|error| self.file.place(error))
    }

    /// Whether somebody shares a lock on the bytes of `slot`; `false` where that cannot be told.
    ///
    /// One system call. The descriptor is not asked first whether it still leads to the file, so who is told that nobody
    /// does must make sure of it.
    pub(crate) fn is_shared(&self, slot: &Slot) -> bool {
        let range = self.range_of(slot);
        self.file.with_any(|file| is_shared(file, range).ok()).flatten().unwrap_or(false)
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
        // An anonymous file has its greatest size from the beginning, and is sealed.
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
        if self.read_only {
            return Err(self.file.error(ErrorKind::ReadOnly));
        }
        if segment >= self.limit {
            let size = segment_offset(self.capacity, self.limit);
            return Err(self.file.error(ErrorKind::TableFull {
                reason: format!("it would outgrow the {size} bytes that this process has set aside for it"),
                advice: "reset it to be rid of old keys, or raise the limit on address space (ulimit -v)",
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

/// Where a process finds its own descriptors by their numbers.
pub(crate) const DESCRIPTORS: &str = "/proc/self/fd";

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

/// A file, by a descriptor that may be closed or reused behind our back, and by a path that may be out of reach.
#[derive(Debug)]
struct FileRef {
    number: RawFd,
    users: Users,
    identity: Identity,
    path: Option<PathBuf>,
}

impl FileRef {
    fn new(file: File, path: Option<&Path>) -> Result<Self, Error> {
        let stat = fstat(&file).map_err(|errno| Error::system("looking at the table's file", errno))?;
        let identity = Identity::of(&stat);
        Ok(Self { number: file.into_raw_fd(), users: Users::none(), identity, path: path.map(Path::to_owned) })
    }

    /// Runs `action` with the descriptor, if it still leads to the file.
    fn with_own<R>(&self, action: impl FnOnce(BorrowedFd<'_>) -> R) -> Option<R> {
        self.with_any(|file| self.leads_to_file(file).then(|| action(file))).flatten()
    }

    /// Runs `action`, which must do no harm to any file, with whatever the descriptor leads to.
    fn with_any<R>(&self, action: impl FnOnce(BorrowedFd<'_>) -> R) -> Option<R> {
        if !self.users.enter() {
            return None;
        }
        // SAFETY: the number is not -1, and is only asked about until it was found to lead to the file.
        let result = action(unsafe { BorrowedFd::borrow_raw(self.number) });
        if self.users.leave() {
            self.release();
        }
        Some(result)
    }

    fn leads_to_file(&self, file: BorrowedFd<'_>) -> bool {
        fstat(file).is_ok_and(|stat| Identity::of(&stat) == self.identity)
    }

    /// Closes the descriptor as soon as nobody uses it.
    fn close(&self) {
        if self.users.close() {
            self.release();
        }
    }

    fn release(&self) {
        // SAFETY: as in `with_own`.
        if self.leads_to_file(unsafe { BorrowedFd::borrow_raw(self.number) }) {
            let _ = nix::unistd::close(self.number);
        }
    }

    /// Runs `action` with the file, opened anew if the descriptor is gone.
    fn with<R>(&self, access: OFlag, action: impl Fn(BorrowedFd<'_>) -> Result<R, Error>) -> Result<R, Error> {
        if let Some(result) = self.with_own(&action) {
            return result.map_err(|error| self.place(error));
        }
        let path = self.path.as_deref().ok_or_else(|| self.lost())?;
        let file = self.open(path, access | OFlag::O_NOFOLLOW)?.ok_or_else(|| self.lost())?;
        action(file.as_fd()).map_err(|error| self.place(error))
    }

    /// Opens `path`; `None` if that is not the file.
    fn open(&self, path: &Path, access: OFlag) -> Result<Option<File>, Error> {
        let file = nix::fcntl::open(path, access | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK, Mode::empty())
            .map_err(|errno| self.place(Error::system("opening the table's file again", errno)))?;
        Ok(self.leads_to_file(file.as_fd()).then(|| file.into()))
    }

    /// Another description of the file, for writing.
    fn open_again(&self) -> Result<File, Error> {
        if let Some(path) = &self.path
            && let Ok(Some(file)) = self.open(path, OFlag::O_RDWR | OFlag::O_NOFOLLOW)
        {
            return Ok(file);
        }
        // Without a name, or out of reach: what the descriptor leads to is still there.
        let link = Path::new(DESCRIPTORS).join(self.number.to_string());
        self.open(&link, OFlag::O_RDWR)?.ok_or_else(|| self.lost())
    }

    fn lost(&self) -> Error {
        self.error(ErrorKind::System {
            action: "finding the table's file, whose descriptor was closed by this program,",
        })
    }

    fn error(&self, kind: ErrorKind) -> Error {
        self.place(kind.into())
    }

    fn place(&self, error: Error) -> Error {
        match &self.path {
            Some(path) => error.at(path),
            None => error,
        }
    }

    /// Whether a number other than ours leads to the file.
    #[cfg(feature = "shm")]
    fn open_elsewhere(&self) -> bool {
        let numbers = std::fs::read_dir(DESCRIPTORS).into_iter().flatten().flatten();
        numbers.filter_map(|entry| entry.file_name().to_str()?.parse::<RawFd>().ok()).any(|number| {
            // SAFETY: only asked by fstat, which any number may be.
            number != self.number && self.leads_to_file(unsafe { BorrowedFd::borrow_raw(number) })
        })
    }
}

impl Drop for FileRef {
    fn drop(&mut self) {
        self.close();
    }
}

/// A slot, together with what keeps it mapped.
#[derive(Debug)]
pub(crate) struct SlotRef<O> {
    slot: NonNull<Slot>,
    owner: Arc<O>,
}

// SAFETY: a shared reference to atomics and an Arc, each of which may go to another thread if the owner may.
unsafe impl<O: Send + Sync> Send for SlotRef<O> {}
// SAFETY: as for Send.
unsafe impl<O: Send + Sync> Sync for SlotRef<O> {}

impl<O> SlotRef<O> {
    /// The slot that `pick` finds in `owner`, if any.
    pub(crate) fn pick<E>(
        owner: &Arc<O>,
        pick: impl for<'a> FnOnce(&'a O) -> Result<Option<&'a Slot>, E>,
    ) -> Result<Option<Self>, E> {
        Ok(pick(owner)?.map(|slot| Self { slot: NonNull::from(slot), owner: Arc::clone(owner) }))
    }

    pub(crate) fn owner(&self) -> &Arc<O> {
        &self.owner
    }
}

impl<O> Clone for SlotRef<O> {
    fn clone(&self) -> Self {
        Self { slot: self.slot, owner: Arc::clone(&self.owner) }
    }
}

impl<O> std::ops::Deref for SlotRef<O> {
    type Target = Slot;

    #[inline]
    fn deref(&self) -> &Slot {
        // SAFETY: `pick` borrowed the slot from the owner, which this value keeps alive, in place and unchanged but for
        // its atomics.
        unsafe { self.slot.as_ref() }
    }
}

/// The slots that a key has had, one in each incarnation of its table.
#[derive(Debug)]
pub(crate) struct Places<O> {
    /// The slot of the latest place, at hand: a check is one load shorter.
    slot: Published<Slot>,
    places: Chain<SlotRef<O>>,
}

impl<O> Places<O> {
    pub(crate) fn new(place: SlotRef<O>) -> Self {
        Self { slot: Published::new(place.slot.as_ptr()), places: Chain::new(place) }
    }

    #[inline]
    pub(crate) fn slot(&self) -> &Slot {
        // SAFETY: it belongs to a place of the chain, which keeps it mapped as long as self lives.
        unsafe { &*self.slot.get() }
    }

    /// The latest place: a little slower than [`slot`](Self::slot).
    pub(crate) fn latest(&self) -> &SlotRef<O> {
        self.places.latest()
    }

    pub(crate) fn append(&self, place: SlotRef<O>) {
        self.places.append(place);
        loop {
            let latest = self.places.latest().slot;
            self.slot.set(latest.as_ptr());
            // Two threads may append at once: the later of them, seen here or by the other one, has the last word.
            if self.places.latest().slot == latest {
                return;
            }
        }
    }
}

/// The latest of a growing row of values, read with one load. Every value lives as long as the chain, so a reader may
/// go on with the one it has while another thread appends; no lock is taken, so a fork at any time is harmless.
#[derive(Debug)]
pub(crate) struct Chain<T> {
    head: Published<Link<T>>,
    _owns: std::marker::PhantomData<Box<Link<T>>>,
}

#[derive(Debug)]
struct Link<T> {
    value: T,
    previous: *mut Link<T>,
}

// SAFETY: the chain owns its values and gives out shared references to them.
unsafe impl<T: Send + Sync> Send for Chain<T> {}
// SAFETY: as for Send; appending from several threads moves values between them, which Send allows.
unsafe impl<T: Send + Sync> Sync for Chain<T> {}

impl<T> Chain<T> {
    pub(crate) fn new(value: T) -> Self {
        let link = Box::into_raw(Box::new(Link { value, previous: std::ptr::null_mut() }));
        Self { head: Published::new(link), _owns: std::marker::PhantomData }
    }

    #[inline]
    pub(crate) fn latest(&self) -> &T {
        // SAFETY: the head is never null, its target complete before it was published, and freed by `drop` alone.
        unsafe { &(*self.head.get()).value }
    }

    pub(crate) fn append(&self, value: T) {
        let link = Box::into_raw(Box::new(Link { value, previous: std::ptr::null_mut() }));
        loop {
            let head = self.head.get();
            // SAFETY: the link is this thread's own until it is published.
            unsafe { (*link).previous = head };
            if self.head.replace(head, link) {
                return;
            }
        }
    }
}

impl<T> Drop for Chain<T> {
    fn drop(&mut self) {
        let mut link = self.head.get();
        while !link.is_null() {
            // SAFETY: every link came from a Box, is in the chain once, and nobody borrows from a chain being dropped.
            let owned = unsafe { Box::from_raw(link) };
            link = owned.previous;
        }
    }
}

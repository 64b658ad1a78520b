//! A mapped range of memory: what the system's calls need to know of it.

#![expect(unsafe_code, reason = "maps and unmaps memory; each block states the fact relied on")]

use std::mem::ManuallyDrop;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::ptr::NonNull;

use memmap2::MmapOptions;
use nix::sys::mman::{MRemapFlags, MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, mremap, munlock, munmap};
use nix::unistd::{SysconfVar, sysconf};

use crate::error::{Error, ErrorKind};

/// A range of memory. It need not begin or end at a page boundary; what is mapped is the pages that it touches.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) base: NonNull<u8>,
    pub(super) length: usize,
}

impl Part {
    /// Maps the bytes `from..to` of `file`.
    pub(super) fn map(file: BorrowedFd<'_>, from: u64, to: u64, read_only: bool) -> Result<Self, Error> {
        let length = address_size(to - from)?;
        let mut options = MmapOptions::new();
        options.offset(from).len(length);
        let raw = file.as_raw_fd();
        let map = if read_only { options.map_raw_read_only(raw) } else { options.map_raw(raw) };
        // Never dropped: from here on the range is unmapped by `unmap`.
        let map = ManuallyDrop::new(map.map_err(|error| Error::io(MAPPING, &error))?);
        Self::new(map.as_mut_ptr(), length)
    }

    /// Maps the bytes `from..to` of the file whose beginning is mapped at `self`, without a descriptor of it.
    pub(super) fn map_more(self, from: u64, to: u64) -> Result<Self, Error> {
        let (from, to) = (address_size(from)?, address_size(to)?);
        // SAFETY: for a shared mapping, an old size of zero leaves the old range as it is, and maps the same file once more.
        let base = unsafe { mremap(self.base.cast(), 0, to, MRemapFlags::MREMAP_MAYMOVE, None) }
            .map_err(|errno| Error::system(MAPPING, errno))?;
        let page = page_size();
        // SAFETY: the new range belongs to this call alone, and reaches to `to`, which is behind `from`.
        let (base, unused) =
            unsafe { (base.cast::<u8>().add(from), Self { base: base.cast(), length: from / page * page }) };
        if unused.length > 0 {
            // SAFETY: these pages were mapped just now, and no reference to them was given out.
            unsafe { unused.unmap() };
        }
        Self::new(base.as_ptr(), to - from)
    }

    pub(super) fn new(base: *mut u8, length: usize) -> Result<Self, Error> {
        let base = NonNull::new(base).ok_or(ErrorKind::System { action: MAPPING })?;
        let part = Self { base, length };
        let (start, length) = part.pages();
        // SAFETY: the range was mapped just now. The contents of a table are of no use in a core dump.
        let _ = unsafe { madvise(start.cast(), length.get(), MmapAdvise::MADV_DONTDUMP) };
        Ok(part)
    }

    /// The pages that it touches.
    fn pages(self) -> (NonNull<u8>, NonZeroUsize) {
        let page = page_size();
        let before = self.base.as_ptr().addr() % page;
        // SAFETY: the part begins in a page that is mapped whole, so the page's beginning is in the same mapping.
        let start = unsafe { self.base.sub(before) };
        (start, NonZeroUsize::new((before + self.length).next_multiple_of(page)).unwrap_or(NonZeroUsize::MIN))
    }

    /// Replaces it with zeros, at once and for all threads.
    ///
    /// # Safety
    ///
    /// The range belongs to the caller, and is used through atomics only, whose values may change at any time.
    pub(super) unsafe fn zero(self, read_only: bool) {
        let (start, length) = self.pages();
        // A process that may not write to the table does not: then the zeros never become memory of this process, and are not
        // counted as such.
        let write = if read_only { ProtFlags::empty() } else { ProtFlags::PROT_WRITE };
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED | MapFlags::MAP_NORESERVE;
        let address = Some(NonZeroUsize::from(start.addr()));
        // SAFETY: the caller owns the range and uses it through atomics only; it stays mapped, and readable, and writable if it
        // was.
        if unsafe { mmap_anonymous(address, length, ProtFlags::PROT_READ | write, flags) }.is_ok() {
            // SAFETY: the range was mapped just above, and belongs to the caller. After `mlockall` the zeros would take locked
            // memory.
            let _ = unsafe { munlock(start.cast(), length.get()) };
            // SAFETY: `zero` was called, and the caller uses the range through atomics whose values may change at any time:
            // what is written there may vanish.
            unsafe { self.forget() };
        }
    }

    /// Gives back the memory of what was written after [`zero`](Self::zero).
    ///
    /// # Safety
    ///
    /// As for `zero`, which was called before.
    pub(super) unsafe fn forget(self) {
        let (start, length) = self.pages();
        // SAFETY: the range is private zeros, which belong to the caller; its atomics may become zero at any time.
        let _ = unsafe { madvise(start.cast(), length.get(), MmapAdvise::MADV_DONTNEED) };
    }

    /// # Safety
    ///
    /// The range belongs to the caller, and nothing uses it any more.
    pub(super) unsafe fn unmap(self) {
        let (start, length) = self.pages();
        // SAFETY: the range belongs to the caller, and nothing uses it any more. The call fails only for lack of kernel memory;
        // then the range stays mapped.
        let _ = unsafe { munmap(start.cast(), length.get()) };
    }
}

pub(super) const MAPPING: &str =
    "mapping the table, within the limits on address space and locked memory (ulimit -v, -l),";

pub(super) fn page_size() -> usize {
    sysconf(SysconfVar::PAGE_SIZE).ok().flatten().map_or(65_536, |page| page as usize)
}

/// `bytes` as a size in memory.
pub(super) fn address_size(bytes: u64) -> Result<usize, Error> {
    // Distances between pointers are signed, so no range may be larger than isize::MAX.
    match isize::try_from(bytes) {
        Ok(size) => Ok(size.unsigned_abs()),
        Err(_) => Err(ErrorKind::System { action: "fitting the table into the address space" }.into()),
    }
}

//! What a forked child must not take for its own: descriptors, and values that a thread of its parent may have been changing.
//!
//! A process id does not distinguish a child from its parent for certain: numbers are used again, and the first process of each
//! namespace has the same one. So a process is known by a token that no fork can keep.

#![expect(unsafe_code, reason = "wipes a page on fork, and closes descriptors in a forked child")]

#[cfg(feature = "map")]
mod carried;

use std::any::Any;
use std::fs::File;
use std::mem::ManuallyDrop;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, RawFd};
use std::panic::RefUnwindSafe;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwapOption;
use nix::libc;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
use nix::sys::stat::fstat;

use crate::error::Error;
use crate::os::identity::Identity;
#[cfg(feature = "map")]
pub(crate) use carried::ForkCarried;

/// A number that differs from those of all processes that this one descends from by forks.
///
/// # Progress
///
/// Lock-free: two loads; the first call in a process makes a few system calls.
#[inline]
pub(crate) fn token() -> u64 {
    // ORDERING: acquire pairs with the release in `find_word`: the page was mapped, and marked to be wiped, before its address
    // was stored.
    let word = WORD.load(Ordering::Acquire);
    let word = if word.is_null() { find_word() } else { word };
    // SAFETY: it points to a static, or to a page that is never unmapped once `WORD` has it; the word is an atomic.
    let word = unsafe { &*word };
    // ORDERING: relaxed, as are the addition and the exchange below: tokens are only compared, and guard no other memory. All
    // threads of a process agree on one token, because only one exchange finds zero.
    match word.load(Ordering::Relaxed) {
        0 => take_token(word),
        token => token,
    }
}

#[cold]
fn take_token(word: &AtomicU64) -> u64 {
    // `LAST` is inherited by copy, and is never less than a token in use here or in an ancestor: so the next number
    // differs from all of them.
    let next = LAST.fetch_add(1, Ordering::Relaxed) + 1;
    match word.compare_exchange(0, next, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => next,
        Err(another_thread) => another_thread,
    }
}

/// The last token that was given out, here or in an ancestor.
static LAST: AtomicU64 = AtomicU64::new(0);
/// The word that holds the token, which is zero in a child that was forked just now.
static WORD: AtomicPtr<AtomicU64> = AtomicPtr::new(null_mut());
/// The word that is used if the kernel wipes no page (before Linux 4.14).
static WIPED_BY_HANDLER: AtomicU64 = AtomicU64::new(0);

/// Without a lock, which a child could inherit: threads that overlap each make a word, and one of the words is used.
#[cold]
fn find_word() -> *mut AtomicU64 {
    let page = page_that_is_wiped();
    let word = page.map_or_else(wiped_by_handler, NonNull::as_ptr);
    // ORDERING: release pairs with the acquire in `token`, and with the acquire on failure here: the page was mapped, and
    // marked to be wiped, before its address is found. Nothing is found on success, so acquire is of no use there.
    match WORD.compare_exchange(null_mut(), word, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => word,
        Err(winner) => {
            if let Some(page) = page {
                // SAFETY: the page was mapped by this call, and its address was given to no other code.
                let _ = unsafe { munmap(page.cast(), PAGE.get()) };
            }
            winner
        }
    }
}

/// The kernel rounds it up to whole pages.
const PAGE: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

fn page_that_is_wiped() -> Option<NonNull<AtomicU64>> {
    let flags = MapFlags::MAP_PRIVATE;
    // SAFETY: a new mapping of zeros, which are a valid atomic.
    let page = unsafe { mmap_anonymous(None, PAGE, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags) }.ok()?;
    // SAFETY: the page was mapped just now.
    if unsafe { madvise(page, PAGE.get(), MmapAdvise::MADV_WIPEONFORK) }.is_err() {
        // SAFETY: the page was mapped just now, and its address was given to no other code.
        let _ = unsafe { munmap(page, PAGE.get()) };
        return None;
    }
    Some(page.cast())
}

extern "C" fn wipe() {
    // ORDERING: relaxed: the child has one thread, whose own loads in `token` follow this store.
    WIPED_BY_HANDLER.store(0, Ordering::Relaxed);
}

fn wiped_by_handler() -> *mut AtomicU64 {
    // SAFETY: the handler only stores to an atomic. If it cannot be registered, for lack of memory, children are taken for
    // their parent.
    let _ = unsafe { libc::pthread_atfork(None, None, Some(wipe)) };
    (&raw const WIPED_BY_HANDLER).cast_mut()
}

/// Something that a forked child must not use, as another thread of its parent may have been changing it at the fork.
pub(crate) trait OfOneProcess {
    fn new() -> Self;

    /// Whether this is a forked child's copy of its parent's.
    fn is_inherited(&self) -> bool;
}

/// A value of which each process makes its own instance at the first use, without a lock, as a child could inherit a lock that is
/// held.
pub(crate) struct ForkLocal<T: OfOneProcess>(ArcSwapOption<T>);

impl<T: OfOneProcess> ForkLocal<T> {
    pub(crate) const fn new() -> Self {
        Self(ArcSwapOption::const_empty())
    }

    /// The value of this process.
    pub(crate) fn get(&self) -> Arc<T> {
        loop {
            let stale = match self.0.load_full() {
                Some(present) if !present.is_inherited() => return present,
                stale => stale,
            };
            self.0.compare_and_swap(&stale, Some(Arc::new(T::new())));
            // Never dropped: a thread of the parent may have been changing it at the fork, so it may be in any state.
            std::mem::forget(stale);
        }
    }
}

impl<T: OfOneProcess> Drop for ForkLocal<T> {
    fn drop(&mut self) {
        let present = self.0.load_full();
        if present.as_ref().is_some_and(|present| present.is_inherited()) {
            std::mem::forget(present);
        }
    }
}

impl<T: OfOneProcess> std::fmt::Debug for ForkLocal<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ForkLocal").finish_non_exhaustive()
    }
}

/// One value of a layer above for each value of a layer below. The layer below carries it and does not know its type.
pub(crate) struct Companion {
    process: u64,
    value: OnceLock<Arc<dyn Any + Send + Sync + RefUnwindSafe>>,
}

impl Companion {
    /// The companion, which is created by the first call.
    ///
    /// # Panics
    ///
    /// It is requested as another type than before.
    pub(crate) fn get<T: Default + Send + Sync + RefUnwindSafe + 'static>(&self) -> Arc<T> {
        let value: Arc<dyn Any + Send + Sync> = self.value.get_or_init(|| Arc::new(T::default())).clone();
        value.downcast().unwrap_or_else(|_| unreachable!("a companion of another type"))
    }
}

impl OfOneProcess for Companion {
    fn new() -> Self {
        Self { process: token(), value: OnceLock::new() }
    }

    fn is_inherited(&self) -> bool {
        self.process != token()
    }
}

/// How many descriptors are closed in a child at most. Those beyond are inherited, like any other descriptor.
const PLACES: usize = 1024;
/// Descriptors that a child must not keep. The array has a fixed size, as a child may not allocate.
static KEPT_BACK: [Entry; PLACES] = [const { Entry::empty() }; PLACES];

/// How many forks have begun, and how many have ended. The counts differ while a fork is under way.
static BEGUN: AtomicU64 = AtomicU64::new(0);
static ENDED: AtomicU64 = AtomicU64::new(0);

struct Entry {
    /// The descriptor's number plus one in the lower half; zero if there is none. The upper half holds the token of the process
    /// that made the entry, as a child may get the same number for a descriptor of its own.
    name: AtomicU64,
    /// What the number leads to: a program that closes "all" descriptors may have given it to another file.
    device: AtomicU64,
    inode: AtomicU64,
}

// ORDERING: sequentially consistent throughout: the stores that make an entry must come before the second load of `BEGUN` in
// `KeptBack::open`, in the one order that `before_fork` is part of as well. `device` and `inode` are stored before `name`, so
// the child's handler, which reads `name` first, finds them complete. These operations are rare, so weaker ones would gain
// nothing.
impl Entry {
    /// The name of an entry that is being made. It is no descriptor's.
    const UNNAMED: u64 = u32::MAX as u64;

    const fn empty() -> Self {
        Self { name: AtomicU64::new(0), device: AtomicU64::new(0), inode: AtomicU64::new(0) }
    }

    fn number(&self) -> Option<RawFd> {
        (self.name.load(Ordering::SeqCst) as u32).checked_sub(1).and_then(|number| number.try_into().ok())
    }

    fn take(&self, name: u64, identity: Identity) -> bool {
        let is_taken = self.name.compare_exchange(0, Self::UNNAMED, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        if is_taken {
            self.device.store(identity.device, Ordering::SeqCst);
            self.inode.store(identity.inode, Ordering::SeqCst);
            self.name.store(name, Ordering::SeqCst);
        }
        is_taken
    }

    fn identity(&self) -> Identity {
        Identity { device: self.device.load(Ordering::SeqCst), inode: self.inode.load(Ordering::SeqCst) }
    }
}

fn name(token: u64, number: RawFd) -> u64 {
    token << 32 | (number as u64 + 1)
}

// ORDERING: sequentially consistent, here and in `after_fork` and `in_child`: pairs with the loads of both counts in
// `KeptBack::open`, whose argument takes all of them to be in one order.
extern "C" fn before_fork() {
    BEGUN.fetch_add(1, Ordering::SeqCst);
}

extern "C" fn after_fork() {
    ENDED.fetch_add(1, Ordering::SeqCst);
}

/// Async-signal-safe, as everything must be that a forked child of a process with threads runs: it uses atomics and system
/// calls only.
extern "C" fn in_child() {
    ENDED.store(BEGUN.load(Ordering::SeqCst), Ordering::SeqCst);
    for entry in &KEPT_BACK {
        let Some(number) = entry.number() else { continue };
        // SAFETY: F_GETFD only asks about the number, and accepts any.
        let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
        // A descriptor that an `exec` would not close is meant to be passed on.
        if flags < 0 || flags & libc::FD_CLOEXEC == 0 || !leads_to(number, entry.identity()) {
            continue;
        }
        // SAFETY: this is the child's copy of a descriptor that a `KeptBack` of the parent owns, and the entry says from here on
        // that there is no such copy.
        unsafe { libc::close(number) };
        entry.name.store(0, Ordering::SeqCst);
    }
}

fn leads_to(number: RawFd, identity: Identity) -> bool {
    // SAFETY: the number is not -1, and fstat, which only asks about it, accepts any other.
    fstat(unsafe { BorrowedFd::borrow_raw(number) }).is_ok_and(|stat| Identity::of(&stat) == identity)
}

/// An open file of which a forked child keeps no copy.
///
/// There are three exceptions: a child that is forked by a bare system call, which runs no handlers; a file whose close-on-exec
/// flag was cleared because it is to be passed on; and files beyond 1024 that are open at once.
#[derive(Debug)]
pub(crate) struct KeptBack {
    file: ManuallyDrop<File>,
    identity: Identity,
    token: u64,
    /// `None` if there was no free entry.
    entry: Option<&'static Entry>,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entry").field("number", &self.number()).finish_non_exhaustive()
    }
}

impl KeptBack {
    /// A child that is forked after the file was opened and before the entry was made has a copy of the descriptor. In that
    /// case the file is opened again, so that no child holds what is locked through it.
    pub(crate) fn open(open: impl Fn() -> Result<File, Error>) -> Result<Self, Error> {
        /// How often the file is opened before a copy in a child is put up with: a program that forks without end must not keep
        /// the caller from making progress.
        const ATTEMPTS: usize = 100;
        static HAS_HANDLERS: AtomicBool = AtomicBool::new(false);
        // Two threads may both register the handlers, which does no harm: each fork is then counted twice, at both ends.
        // ORDERING: acquire pairs with the release of the store below: the handlers were registered before the flag was set, so
        // they run at every fork that begins after this load finds it set.
        if !HAS_HANDLERS.load(Ordering::Acquire) {
            // SAFETY: the handlers are async-signal-safe.
            let _ = unsafe { libc::pthread_atfork(Some(before_fork), Some(after_fork), Some(in_child)) };
            HAS_HANDLERS.store(true, Ordering::Release);
        }
        let mut attempts = 0;
        loop {
            attempts += 1;
            // ORDERING: sequentially consistent, as are the changes of the counts in `before_fork`, `after_fork` and
            // `in_child`, and the stores that make the entry. A fork that copies the descriptor but not the entry has begun
            // before the entry was made, so before the second load of `BEGUN`; and it ends after the file was opened, so after
            // the load of `ENDED`. If it began before the first load of `BEGUN`, that load finds more forks begun than had
            // ended; if it began later, the two loads of `BEGUN` differ. Either way, the file is opened again.
            let ended = ENDED.load(Ordering::SeqCst);
            let begun = BEGUN.load(Ordering::SeqCst);
            let this = Self::enter(open()?)?;
            if begun == ended && BEGUN.load(Ordering::SeqCst) == begun || attempts == ATTEMPTS {
                return Ok(this);
            }
            drop(this);
            std::thread::yield_now();
        }
    }

    fn enter(file: File) -> Result<Self, Error> {
        let stat = fstat(&file).map_err(|errno| Error::system("looking at the table's file", errno))?;
        let (identity, name) = (Identity::of(&stat), name(token(), file.as_raw_fd()));
        let entry = KEPT_BACK.iter().find(|entry| entry.take(name, identity));
        Ok(Self { file: ManuallyDrop::new(file), identity, token: token(), entry })
    }

    /// Whether this is a forked child's copy of its parent's.
    pub(crate) fn is_inherited(&self) -> bool {
        self.token != token()
    }

    /// Whether the number still is this descriptor: a child may have closed it, and a program that closes "all" descriptors to
    /// become a daemon may have given the number to another file.
    pub(crate) fn is_open(&self) -> bool {
        self.has_entry() && leads_to(self.file.as_raw_fd(), self.identity)
    }

    fn name(&self) -> u64 {
        name(self.token, self.file.as_raw_fd())
    }

    fn has_entry(&self) -> bool {
        // ORDERING: sequentially consistent, like all accesses of entries. In a child, the store that it must not miss is that of
        // `in_child`, which the same thread made before.
        self.entry.is_none_or(|entry| entry.name.load(Ordering::SeqCst) == self.name())
    }
}

impl AsFd for KeptBack {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for KeptBack {
    fn drop(&mut self) {
        let is_open = self.is_open();
        if let Some(entry) = self.entry {
            // Before it is closed, as from then on the number may be another file's.
            // ORDERING: sequentially consistent, like all accesses of entries. The exchange fails if the entry is no longer this
            // descriptor's: a child's handler has cleared it, and another descriptor may have taken it.
            let _ = entry.name.compare_exchange(self.name(), 0, Ordering::SeqCst, Ordering::SeqCst);
        }
        if is_open {
            let _ = nix::unistd::close(self.file.as_raw_fd());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::kills::support::{in_child, shared_words};

    /// The tokens of a process, of a child that `fork` makes, and of that child's own child.
    fn three_generations(fork: impl Fn() -> i32) -> [u64; 3] {
        let words = shared_words(3);
        let step = |index: usize| words[index].store(token(), Ordering::SeqCst);
        in_child(|| {
            step(0);
            let child = fork();
            if child == 0 {
                step(1);
                let grandchild = fork();
                if grandchild == 0 {
                    step(2);
                }
                // SAFETY: the calls wait for a child, or for none, and end the process.
                unsafe {
                    libc::waitpid(grandchild, null_mut(), 0);
                    libc::_exit(0);
                }
            }
            // SAFETY: the call waits for a child, and stores no status.
            assert_eq!(unsafe { libc::waitpid(child, null_mut(), 0) }, child);
        })
        .succeeds();
        std::array::from_fn(|index| words[index].load(Ordering::SeqCst))
    }

    fn assert_all_differ(tokens: [u64; 3]) {
        let [first, second, third] = tokens;
        assert!(first != 0 && first != second && first != third && second != third, "{tokens:?}");
    }

    #[test]
    fn no_descendant_has_an_ancestors_token() {
        // SAFETY: the children only store to shared words, fork, wait and exit.
        assert_all_differ(three_generations(|| unsafe { libc::fork() }));
    }

    #[test]
    fn no_descendant_has_an_ancestors_token_when_forked_by_a_bare_system_call() {
        // SAFETY: the children only store to shared words, fork, wait and exit. Without a stack or flags, the call is a fork
        // that runs no handlers.
        let clone = || unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) } as i32;
        assert_all_differ(three_generations(clone));
    }

    #[test]
    fn no_descendant_has_an_ancestors_token_where_the_kernel_wipes_no_page() {
        in_child(|| {
            WORD.store(wiped_by_handler(), Ordering::Release);
            // SAFETY: the children only store to shared words, fork, wait and exit.
            assert_all_differ(three_generations(|| unsafe { libc::fork() }));
        })
        .succeeds();
    }
}

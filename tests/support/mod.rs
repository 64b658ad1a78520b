//! What the tests share: folders, forked children, words in a shared page.

#![allow(dead_code, reason = "each test file uses a part of it")]
#![expect(unsafe_code, reason = "forks, and shares a page between processes")]

pub(crate) mod place;
pub(crate) mod source;

use std::io::Write as _;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use gensync::Table;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::ptrace;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, raise, sigaction};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{ForkResult, Pid, fork};
use place::Place;

/// Longer than anything takes, unless it fails.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// A folder of the test's own, and a path in it.
pub(crate) fn path() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table.gensync");
    (folder, path)
}

/// Runs `test` with every kind of table there is.
pub(crate) fn tables(test: impl Fn(&Table)) {
    place::KINDS.iter().for_each(|kind| test(&Place::new(*kind).open(Table::options())));
}

/// A forked child; killed if the test ends before it does.
#[derive(Debug)]
pub(crate) struct Child(Option<Pid>);

/// Runs `work` in a forked child, which ends with status 0 unless `work` panics.
///
/// The harness has threads: `work` must not need a lock that one of them may hold, except those of the allocator, which
/// glibc keeps usable. The standard library has such a lock, which starting and ending threads take: a test in which `work`
/// starts threads is run [`alone`].
pub(crate) fn in_child(work: impl FnOnce()) -> Child {
    // Set before the fork: a thread of the harness that panics at the fork holds the hook's lock.
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let (harness, hook) = (std::process::id(), std::panic::take_hook());
        std::panic::set_hook(Box::new(move |panic| match std::process::id() == harness {
            true => hook(panic),
            // Past the harness, which would keep what is printed.
            false => _ = writeln!(std::io::stderr(), "in a child: {panic}"),
        }));
    });
    // SAFETY: `work` needs no lock that a thread of the harness may hold at the fork, as the documentation asks.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => Child(Some(child)),
        ForkResult::Child => {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            // Not `exit`, which would run the handlers of the harness; these are for the parent.
            // SAFETY: ends the process.
            unsafe { nix::libc::_exit(if result.is_ok() { 0 } else { 1 }) }
        }
    }
}

/// Forks, and goes on in both: the child's id in the parent. To be called within [`in_child`], which ends both.
pub(crate) fn fork_here() -> Option<Pid> {
    // SAFETY: called in a child of `in_child`, in which no thread of the harness runs; both go on without a lock that a thread of the
    // test may hold at the fork.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => Some(child),
        ForkResult::Child => None,
    }
}

impl Child {
    pub(crate) fn pid(&self) -> Pid {
        self.0.unwrap()
    }

    /// Waits until it sleeps in a system call.
    pub(crate) fn await_sleep(&self) {
        let path = format!("/proc/{}/stat", self.pid());
        loop {
            let stat = std::fs::read_to_string(&path).unwrap();
            // The state stands after the name, which is in parentheses.
            let (_, state) = stat.rsplit_once(") ").unwrap();
            match state.as_bytes()[0] {
                b'S' => return,
                b'Z' => panic!("a child has ended instead of sleeping"),
                _ => std::thread::yield_now(),
            }
        }
    }

    pub(crate) fn succeeds(self) {
        assert!(!self.ends_by_kill(), "a child was killed");
    }

    /// Whether it is killed before it succeeds.
    pub(crate) fn ends_by_kill(mut self) -> bool {
        match waitpid(self.0.take().unwrap(), None).unwrap() {
            WaitStatus::Signaled(_, Signal::SIGKILL, _) => true,
            WaitStatus::Exited(_, 0) => false,
            status => panic!("a child failed: {status:?}"),
        }
    }

    pub(crate) fn kill(mut self) {
        let pid = self.0.take().unwrap();
        kill(pid, Signal::SIGKILL).unwrap();
        waitpid(pid, None).unwrap();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if let Some(pid) = self.0.take() {
            let _ = kill(pid, Signal::SIGKILL);
            let _ = waitpid(pid, None);
        }
    }
}

/// Runs `test`, which is a whole one, in a process in which no other test starts and ends threads.
pub(crate) fn alone(test: impl FnOnce()) {
    const ALONE: &str = "GENSYNC_TEST_ALONE";
    let thread = std::thread::current();
    let name = thread.name().expect("the harness names a test's thread after the test");
    // With one thread for all tests, they run in the main one.
    if std::env::var_os(ALONE).is_some() || name == "main" {
        return test();
    }
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(ALONE, "1");
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{}:\n{text}\n{errors}", output.status);
    println!("{text}");
}

/// Words of zero that this process shares with its children.
pub(crate) fn shared_words(count: usize) -> &'static [AtomicU64] {
    let size = NonZeroUsize::new(count * 8).unwrap();
    // SAFETY: a new mapping, of zeros, which are valid atomics; it is never unmapped.
    unsafe {
        let base = mmap_anonymous(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED);
        std::slice::from_raw_parts(base.unwrap().cast().as_ptr(), count)
    }
}

/// Waits until `word` is at least `value`.
pub(crate) fn await_value(word: &AtomicU64, value: u64) {
    while word.load(SeqCst) < value {
        std::thread::yield_now();
    }
}

/// Microseconds of a clock that all processes share.
pub(crate) fn micros() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
    time.tv_sec() as u64 * 1_000_000 + time.tv_nsec() as u64 / 1000
}

/// Whether a wait that began at `start` and ends now was not ended by the change that was made at `change`, but by the
/// waiter's own check, which is every half second: its wakeup was lost.
pub(crate) fn is_overslept(start: u64, change: u64) -> bool {
    let end = micros();
    end - start >= 400_000 && end.saturating_sub(change) >= 300_000
}

/// The next random number, of low quality (xorshift).
pub(crate) fn next_random(random: &mut u64) -> u64 {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    *random
}

/// Spins for some time from nothing to `most`, which differs each time.
pub(crate) fn dawdle(random: &mut u64, most: u64) {
    let end = micros() + next_random(random) % (most + 1);
    while micros() < end {}
}

static INTERRUPTIONS: AtomicU64 = AtomicU64::new(0);

extern "C" fn interrupt(_signal: nix::libc::c_int) {
    INTERRUPTIONS.fetch_add(1, SeqCst);
}

/// From now on SIGUSR1 interrupts this process's system calls, which are not begun again.
pub(crate) fn be_interrupted() {
    let action = SigAction::new(SigHandler::Handler(interrupt), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing but add to an atomic.
    unsafe { sigaction(Signal::SIGUSR1, &action) }.unwrap();
}

/// How often SIGUSR1 came.
pub(crate) fn interruptions() -> u64 {
    INTERRUPTIONS.load(SeqCst)
}

/// A forked child that stops as each system call begins, and as it ends.
#[derive(Debug)]
pub(crate) struct Traced(Child);

impl Traced {
    pub(crate) fn new(work: impl FnOnce()) -> Self {
        let child = in_child(|| {
            ptrace::traceme().unwrap();
            raise(Signal::SIGSTOP).unwrap();
            work();
        });
        waitpid(child.pid(), None).unwrap();
        ptrace::setoptions(child.pid(), ptrace::Options::PTRACE_O_TRACESYSGOOD).unwrap();
        Self(child)
    }

    /// Goes on to the next stop; `false` if it has succeeded instead.
    pub(crate) fn goes_on(&mut self) -> bool {
        ptrace::syscall(self.0.pid(), None).unwrap();
        match waitpid(self.0.pid(), None).unwrap() {
            WaitStatus::PtraceSyscall(_) => return true,
            WaitStatus::Exited(_, 0) => {}
            status => panic!("a child failed: {status:?}"),
        }
        self.0.0 = None;
        false
    }
}

/// How many system calls `work` makes, which runs in a forked child; some few that are not its own among them.
pub(crate) fn system_calls(work: impl FnOnce()) -> u64 {
    let (mut traced, mut stops) = (Traced::new(work), 0);
    while traced.goes_on() {
        stops += 1;
    }
    stops / 2
}

/// Locks the table's file for replacing it, as a process does that is at work on that, until the file is closed.
pub(crate) fn lock_for_replacing(file: &std::fs::File) {
    use nix::fcntl::{FcntlArg, fcntl};
    use nix::libc;
    let (kind, whence) = (libc::F_WRLCK as libc::c_short, libc::SEEK_SET as libc::c_short);
    let lock = libc::flock { l_type: kind, l_whence: whence, l_start: 0, l_len: 128, l_pid: 0 };
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
}

/// From now on, what this process mounts and unmounts is seen by itself and its children only.
pub(crate) fn keep_mounts_apart() {
    use nix::mount::{MsFlags, mount};
    // SAFETY: changes how this process sees the file systems, and nothing else.
    assert_eq!(unsafe { nix::libc::unshare(nix::libc::CLONE_NEWNS) }, 0, "{}", std::io::Error::last_os_error());
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
}

/// From now on, this process can remove and rename no file, nor can its children, as in a sandbox (Landlock). `false` where the
/// kernel has none.
pub(crate) fn keep_all_files() -> bool {
    use nix::libc;
    const REMOVE_FILE: u64 = 1 << 5;
    // SAFETY: the kernel reads the one word that it is given, and restricts this process.
    unsafe {
        let handled = REMOVE_FILE;
        let rules = libc::syscall(libc::SYS_landlock_create_ruleset, &raw const handled, size_of::<u64>(), 0);
        rules >= 0
            && libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::syscall(libc::SYS_landlock_restrict_self, rules, 0) == 0
    }
}

/// Runs `work` in a process with a monotonic clock that was set back by ten minutes at its fork, as when a checkpoint is restored;
/// `false` if the kernel refuses.
pub(crate) fn after_the_clock_was_set_back(work: impl FnOnce()) -> bool {
    use nix::sched::{CloneFlags, unshare};
    let refused = &shared_words(1)[0];
    in_child(|| {
        let offset = || std::fs::write("/proc/self/timens_offsets", "monotonic -600 0\n");
        // The flag for time namespaces, which nix has no name for. The process itself stays outside.
        let new_time = CloneFlags::from_bits_retain(0x80);
        match unshare(new_time).map_err(std::io::Error::from).and_then(|()| offset()) {
            Ok(()) => in_child(work).succeeds(),
            Err(error) => {
                eprintln!("skipped: no time namespace can be made: {error}");
                refused.store(1, SeqCst);
            }
        }
    })
    .succeeds();
    refused.load(SeqCst) == 0
}

/// Whether a load that waits for itself is among the causes of `error`.
pub(crate) fn is_recursion(error: &gensync::Error) -> bool {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(cause) = next {
        if cause.downcast_ref::<gensync::Error>().is_some_and(|error| *error.kind() == gensync::ErrorKind::Recursion) {
            return true;
        }
        next = cause.source();
    }
    false
}

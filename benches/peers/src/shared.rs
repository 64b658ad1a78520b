//! Memory that forked processes share, and the processes.

#![expect(unsafe_code, reason = "maps memory and forks")]

use std::io::Write as _;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{ForkResult, Pid, fork};

use crate::Outcome;

/// Words that this process and those that it forks share, zero at first. They stay mapped for good.
pub(crate) fn words(count: usize) -> Outcome<&'static [AtomicU64]> {
    let size = NonZeroUsize::new(count * size_of::<AtomicU64>()).ok_or("nothing to share")?;
    // SAFETY: a new mapping, of zeros, which are valid atomics; it is never unmapped.
    Ok(unsafe {
        let base = mmap_anonymous(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED)?;
        std::slice::from_raw_parts(base.cast().as_ptr(), count)
    })
}

/// Nanoseconds of the clock that all processes have in common.
pub(crate) fn now() -> u64 {
    nanoseconds(ClockId::CLOCK_MONOTONIC)
}

/// Nanoseconds of a clock; 0 if there is no such clock.
pub(crate) fn nanoseconds(clock: ClockId) -> u64 {
    clock_gettime(clock).map_or(0, |time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}

/// Forked processes, which die with this one.
#[derive(Default)]
pub(crate) struct Workers(Vec<Pid>);

impl Workers {
    pub(crate) fn fork(&mut self, work: impl FnOnce() -> Outcome<()>) -> Outcome<()> {
        std::io::stdout().flush()?;
        if std::fs::read_dir("/proc/self/task")?.count() != 1 {
            return Err("this process has threads, and so must not fork".into());
        }
        let parent = Pid::this();
        // SAFETY: this process has one thread, so the child finds every lock as it would find it without a fork.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => self.0.push(child),
            ForkResult::Child => {
                let work = || {
                    set_pdeathsig(Signal::SIGKILL)?;
                    if Pid::parent() != parent { Err("the parent is gone".into()) } else { work() }
                };
                // Leaves by `exit` whatever happens: folders and servers are the parent's to end.
                std::process::exit(match catch_unwind(AssertUnwindSafe(work)) {
                    Ok(Ok(())) => 0,
                    Ok(Err(error)) => {
                        eprintln!("a worker: {error}");
                        1
                    }
                    Err(_) => 101,
                })
            }
        }
        Ok(())
    }

    /// Waits until a word has this value.
    pub(crate) fn await_value(&mut self, word: &AtomicU64, value: u64) -> Outcome<()> {
        while word.load(SeqCst) != value {
            if self.0.is_empty() {
                return Err("the workers are gone".into());
            }
            self.pause()?;
        }
        Ok(())
    }

    /// Waits for all of them; ends them all if one ended badly, as the others may wait for it.
    pub(crate) fn join(mut self) -> Outcome<()> {
        while !self.0.is_empty() {
            self.pause()?;
        }
        Ok(())
    }

    /// Sleeps for a moment, then looks which processes have ended.
    fn pause(&mut self) -> Outcome<()> {
        std::thread::sleep(Duration::from_micros(200));
        for index in (0..self.0.len()).rev() {
            match waitpid(self.0[index], Some(WaitPidFlag::WNOHANG))? {
                WaitStatus::StillAlive => continue,
                WaitStatus::Exited(_, 0) => _ = self.0.swap_remove(index),
                status => {
                    self.0.swap_remove(index);
                    return Err(format!("a worker ended badly: {status:?}").into());
                }
            }
        }
        Ok(())
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for &pid in &self.0 {
            // It may have ended by itself.
            let _ = kill(pid, Signal::SIGKILL).and_then(|()| waitpid(pid, None));
        }
    }
}

//! A child process that stands in for this one: it gets the signals that this one is sent, and this one waits for its end.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{Id, WaitPidFlag, waitid, waitpid};
use nix::unistd::{Pid, getpgrp, getpid, getsid, tcgetpgrp};

/// In milliseconds: after this, the child is looked at though no signal came.
const LONGEST_SLEEP: u16 = 500;
/// What the child gets as well.
const PASSED_ON: [Signal; 6] =
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2];
/// The kernel itself has sent the signal: to the whole group of processes that the terminal talks to.
const FROM_THE_KERNEL: i32 = 0x80;

/// Another process of this program, even if its file was replaced since it was started.
pub(crate) fn this_program() -> io::Result<Command> {
    let path = std::env::current_exe()?;
    let mut command = Command::new(if path.exists() { &path } else { Path::new("/proc/self/exe") });
    command.arg0("gensync");
    Ok(command)
}

/// Starts `command`, and gives its status when it has ended; `None` if that is not known.
///
/// # Errors
///
/// It cannot be started.
pub(crate) fn run(command: &mut Command) -> io::Result<Option<ExitStatus>> {
    let ignored = ignored();
    let signals: Vec<_> = PASSED_ON.into_iter().filter(|signal| ignored & (1 << (*signal as u32 - 1)) == 0).collect();
    // Handled, not blocked, while the child is started: it inherits what is blocked, but no handler. What is ignored, as by
    // nohup, stays so for both. SIGCHLD must not be, or how a child ends is not told.
    let flags = signals.iter().copied().chain([Signal::SIGCHLD]).map(|signal| {
        let flag = Arc::new(AtomicBool::new(false));
        let _ = signal_hook::flag::register(signal as i32, Arc::clone(&flag));
        (signal, flag)
    });
    let caught: Vec<_> = flags.collect();
    let child = command.spawn()?;
    let blocked: SigSet = caught.iter().map(|(signal, _)| *signal).collect();
    let _ = blocked.thread_block();
    for (signal, _) in caught.into_iter().filter(|(_, flag)| flag.load(Relaxed)) {
        // Who has sent it is not known here.
        let is_typed = matches!(signal, Signal::SIGINT | Signal::SIGQUIT) && is_in_foreground();
        if signal != Signal::SIGCHLD && !is_typed {
            pass_on(signal, &child);
        }
    }
    Ok(wait_for(child, &blocked))
}

/// Whether the signals that are typed at the terminal come to this process, and to its child.
fn is_in_foreground() -> bool {
    File::open("/dev/tty").is_ok_and(|terminal| tcgetpgrp(terminal) == Ok(getpgrp()))
}

/// Whether this process leads its session, as the command of `ssh -t` or the first process of a container does.
fn is_leader() -> bool {
    getsid(None) == Ok(getpid())
}

fn wait_for(mut child: Child, signals: &SigSet) -> Option<ExitStatus> {
    let Ok(descriptor) = SignalFd::with_flags(signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK) else {
        return child.wait().ok();
    };
    loop {
        let ended = child.try_wait();
        if matches!(ended, Ok(None)) {
            reap_others(&child);
        }
        match ended {
            Ok(Some(status)) => return Some(status),
            Ok(None) => {}
            Err(_) => return None,
        }
        // A signal may have been taken by another thread of this process, or come before it was blocked.
        let _ = poll(&mut [PollFd::new(descriptor.as_fd(), PollFlags::POLLIN)], LONGEST_SLEEP);
        let Ok(Some(signal)) = descriptor.read_signal() else { continue };
        let is_from_the_kernel = signal.ssi_code == FROM_THE_KERNEL;
        let Ok(signal) = Signal::try_from(signal.ssi_signo as i32) else { continue };
        // The terminal's signals have come to the child as well; but that it is gone, only to the session's leader.
        let is_told = is_from_the_kernel && !(signal == Signal::SIGHUP && is_leader());
        if signal != Signal::SIGCHLD && !is_told {
            pass_on(signal, &child);
        }
    }
}

/// As the first process of a container: lets go of those whose parents are gone, which the kernel has made its children.
fn reap_others(child: &Child) {
    if !is_first() {
        return;
    }
    let peek = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    while let Ok(status) = waitid(Id::All, peek) {
        // Its status is for `try_wait` to take, which is asked again as its end comes with a signal.
        let Some(pid) = status.pid().filter(|pid| pid.as_raw() != child.id() as i32) else { return };
        let _ = waitpid(pid, None);
    }
}

/// Whether this is the first process of a process namespace, which gets no signal that it does not handle, and which is to take
/// care of all that lose their parents.
pub(crate) fn is_first() -> bool {
    getpid().as_raw() == 1
}

/// As the first process: runs the command in a child, and does what a first process is for.
///
/// # Errors
///
/// There can be no child.
pub(crate) fn run_as_first() -> io::Result<u8> {
    let mut command = this_program()?;
    command.args(std::env::args_os().skip(1));
    Ok(status_of(run(&mut command)?))
}

fn pass_on(signal: Signal, child: &Child) {
    let _ = kill(Pid::from_raw(child.id() as i32), signal);
}

/// The signals that this process ignores, as bits.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.unwrap_or(0)
}

/// The exit status that tells how a process ended, as shells give it; 1 where that is not known.
pub(crate) fn status_of(status: Option<ExitStatus>) -> u8 {
    status.map_or(1, |status| status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)) as u8)
}

//! A child process that stands in for this one: this process forwards the signals that it receives, and
//! waits for the child's end.

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

/// In milliseconds: after this time, the child's state is checked even if no signal came.
const LONGEST_SLEEP: u16 = 500;
/// The signals that are forwarded to the child.
const PASSED_ON: [Signal; 6] =
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2];
/// `si_code` of a signal that the kernel itself has sent (SI_KERNEL), as it does to the whole foreground
/// process group of a terminal.
const FROM_THE_KERNEL: i32 = 0x80;

/// A command that starts this program again, even if its file was replaced since this process started.
pub(crate) fn this_program() -> io::Result<Command> {
    let path = std::env::current_exe()?;
    let mut command = Command::new(if path.exists() { &path } else { Path::new("/proc/self/exe") });
    command.arg0("gensync");
    Ok(command)
}

/// Starts `command`, and returns its status when it has ended; `None` if that is not known.
///
/// # Errors
///
/// It cannot be started.
pub(crate) fn run(command: &mut Command) -> io::Result<Option<ExitStatus>> {
    let ignored = ignored();
    let signals: Vec<_> = PASSED_ON.into_iter().filter(|signal| ignored & (1 << (*signal as u32 - 1)) == 0).collect();
    // The signals are handled, not blocked, while the child is started: a child inherits blocked signals, but no handlers. A
    // signal that is ignored, as by nohup, stays ignored in both processes. SIGCHLD must not be ignored: the kernel then discards
    // the child's status.
    let flags = signals.iter().copied().chain([Signal::SIGCHLD]).map(|signal| {
        let flag = Arc::new(AtomicBool::new(false));
        let _ = signal_hook::flag::register(signal as i32, Arc::clone(&flag));
        (signal, flag)
    });
    let caught: Vec<_> = flags.collect();
    let child = command.spawn()?;
    let blocked: SigSet = caught.iter().map(|(signal, _)| *signal).collect();
    let _ = blocked.thread_block();
    // ORDERING: Relaxed. Pairs with the store in signal_hook's handler. The flag itself is the whole message, and no other memory
    // is read because of it. A handler that ran on this thread ran before the signals were blocked above, so it is sequenced
    // before this load.
    for (signal, _) in caught.into_iter().filter(|(_, flag)| flag.load(Relaxed)) {
        // The flag does not say which process sent the signal, so it may have been typed at the terminal.
        let is_typed = matches!(signal, Signal::SIGINT | Signal::SIGQUIT) && is_in_foreground();
        if signal != Signal::SIGCHLD && !is_typed {
            pass_on(signal, &child);
        }
    }
    Ok(wait_for(child, &blocked))
}

/// Whether signals that are typed at the terminal reach this process, and so its child as well.
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
        // The sleep has a limit, as another thread may have taken the signal, or it may have come before it was blocked.
        let _ = poll(&mut [PollFd::new(descriptor.as_fd(), PollFlags::POLLIN)], LONGEST_SLEEP);
        let Ok(Some(signal)) = descriptor.read_signal() else { continue };
        let is_from_the_kernel = signal.ssi_code == FROM_THE_KERNEL;
        let Ok(signal) = Signal::try_from(signal.ssi_signo as i32) else { continue };
        // The child has received the terminal's signals as well, except the SIGHUP of a terminal that is gone, which the kernel
        // sends to the session's leader only.
        let has_received = is_from_the_kernel && !(signal == Signal::SIGHUP && is_leader());
        if signal != Signal::SIGCHLD && !has_received {
            pass_on(signal, &child);
        }
    }
}

/// As the first process of a container: reaps orphans that have ended, which the kernel has made children of this process.
fn reap_others(child: &Child) {
    if !is_first() {
        return;
    }
    let peek = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    while let Ok(status) = waitid(Id::All, peek) {
        // The status of `child` is left for `try_wait`, which runs again because the child's end also raises SIGCHLD.
        let Some(pid) = status.pid().filter(|pid| pid.as_raw() != child.id() as i32) else { return };
        let _ = waitpid(pid, None);
    }
}

/// Whether this is the first process of a process namespace. It receives no signal that it does not handle, and it has to reap
/// every process that loses its parent.
pub(crate) fn is_first() -> bool {
    getpid().as_raw() == 1
}

/// As the first process: runs the command in a child, forwards signals to it, and reaps orphans.
///
/// # Errors
///
/// No child can be started.
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

/// The exit status that says how a process ended, as shells give it; 1 where that is not known.
pub(crate) fn status_of(status: Option<ExitStatus>) -> u8 {
    status.map_or(1, |status| status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)) as u8)
}

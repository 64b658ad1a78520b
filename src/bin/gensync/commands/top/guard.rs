//! Restores the screen and ends the program, whichever of its two processes is killed, and if the terminal or the process that
//! started it goes away.
//!
//! A process cannot react to SIGKILL. So there are two: the child draws, and its parent, the guard, waits for its end. If the
//! child is killed, the guard restores the terminal. If the guard is killed, the child receives a signal, and ends as if asked
//! to. Only if both are killed at once, or stopped, the terminal stays as it is, until `reset` is typed.
//!
//! The process that draws may be stopped, or may hang in a write to a terminal that takes nothing. So the guard is the one that
//! watches for the end of the terminal and of the process that started it, and no step of the guard takes longer than `GRACE`.

use std::fs::File;
use std::io::{stdin, stdout};
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::{Child, ExitStatus};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{SetArg, tcgetattr, tcsetattr};
use nix::unistd::{Pid, getppid};
use ratatui::crossterm::cursor::Show;
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::LeaveAlternateScreen;

use crate::child::{status_of, this_program};

/// Holds the process id of the guard, in the environment of the child that is to draw.
const VARIABLE: &str = "GENSYNC_TOP_GUARD";
/// The signals that end both processes.
pub(super) const ENDING: [Signal; 4] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM];
/// How long a process that was asked to end may take to restore the terminal.
pub(super) const GRACE: Duration = Duration::from_secs(1);

/// Runs another process of this program to draw, and returns its status; `None` in that process, and where none can be started.
pub(super) fn run_guarded() -> Option<u8> {
    if std::env::var(VARIABLE).is_ok_and(|guard| guard == getppid().to_string()) {
        let _ = set_pdeathsig(Signal::SIGTERM);
        // If the guard died before the call above, no signal comes: the parent is another process by now.
        return (std::env::var(VARIABLE) != Ok(getppid().to_string())).then_some(0);
    }
    let before = tcgetattr(stdout()).ok()?;
    let mut command = this_program().ok()?;
    command.args(std::env::args_os().skip(1)).env(VARIABLE, std::process::id().to_string());
    let starter = starter();
    // The child inherits the blocked signals, and unblocks them once it has handlers.
    let signals: SigSet = ENDING.into_iter().chain([Signal::SIGCHLD]).collect();
    signals.thread_block().ok()?;
    let started = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .ok()
        .and_then(|descriptor| Some((descriptor, command.spawn().ok()?)));
    let Some((descriptor, mut child)) = started else {
        let _ = signals.thread_unblock();
        return None;
    };
    let status = attend(&mut child, &descriptor, starter.as_ref());
    if status.is_none_or(|status| status.code().is_none()) {
        // The child was killed. If it has restored the terminal itself, doing it again does no harm.
        let _ = tcsetattr(stdout(), SetArg::TCSANOW, &before);
        // A write hangs if the terminal's other end is stopped, which must not keep this process from ending.
        let (done, is_done) = channel();
        std::thread::spawn(move || {
            // The standard library's stdout is not used: its lock would be held while the write hangs.
            if let Ok(output) = stdout().as_fd().try_clone_to_owned() {
                let mut output = File::from(output);
                let _ = execute!(output, LeaveAlternateScreen, Show);
            }
            let _ = done.send(());
        });
        let _ = is_done.recv_timeout(GRACE);
    }
    Some(status_of(status))
}

/// A descriptor of the process that has started this one, which polls as readable when that process ends. `None` where there can
/// be none: the process is in another process namespace, or the kernel is too old.
fn starter() -> Option<OwnedFd> {
    let starter = rustix::process::Pid::from_raw(getppid().as_raw()).filter(|starter| !starter.is_init())?;
    rustix::process::pidfd_open(starter, rustix::process::PidfdFlags::empty()).ok()
}

/// Waits for the child's end. Asks the child to end if a signal comes, or if the terminal or the process that started this one is
/// gone. `None` if it is not known how the child ended.
fn attend(child: &mut Child, signals: &SignalFd, starter: Option<&OwnedFd>) -> Option<ExitStatus> {
    /// How often the child's state is checked, in case SIGCHLD is ignored and so does not come.
    const LOOK: Duration = Duration::from_secs(1);
    let pid = Pid::from_raw(child.id() as i32);
    let mut asked: Option<Instant> = None;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) => {}
            Err(_) => return None,
        }
        let input = stdin();
        let mut watched = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        if asked.is_none() {
            watched.push(PollFd::new(input.as_fd(), PollFlags::empty()));
            watched.extend(starter.map(|starter| PollFd::new(starter.as_fd(), PollFlags::POLLIN)));
        }
        let limit = asked.map_or(LOOK, |asked| (2 * GRACE).saturating_sub(asked.elapsed()));
        let _ = poll(&mut watched, limit.as_millis() as u16 + 1);
        let is_alone = watched.iter().skip(1).any(|watched| watched.any() == Some(true));
        let mut signal = is_alone.then_some(Signal::SIGHUP);
        while let Ok(Some(read)) = signals.read_signal() {
            signal = Signal::try_from(read.ssi_signo as i32).ok().filter(|read| *read != Signal::SIGCHLD).or(signal);
        }
        if let Some(signal) = signal {
            let _ = kill(pid, signal);
            // A stopped child does not handle the signal until it continues.
            let _ = kill(pid, Signal::SIGCONT);
            asked.get_or_insert_with(Instant::now);
        }
        // Twice `GRACE`, as the child itself waits that long for a write that hangs.
        if asked.is_some_and(|asked| asked.elapsed() >= 2 * GRACE) {
            let _ = child.kill();
        }
    }
}

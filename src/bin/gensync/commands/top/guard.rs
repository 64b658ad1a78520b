//! A screen that is restored, and a program that ends, whichever of two processes is killed and whatever goes away.
//!
//! Nothing can be done by a process that gets SIGKILL. So there are two: one draws, and the other has started it and waits for
//! its end. If the first is killed, the second restores the terminal; if the second is killed, the first gets a signal, and ends
//! as if asked to. Only when both are killed at once, or stopped, does the terminal stay as it is, until `reset` is typed.
//!
//! A process that draws may hang in a write to a terminal that takes nothing, or be stopped. So the guard is also the one that
//! watches for the end of the terminal and of the process that started it, and nothing that it does takes longer than `GRACE`.

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

/// Says whose child it is that is to draw.
const VARIABLE: &str = "GENSYNC_TOP_GUARD";
/// What ends both processes.
pub(super) const ENDING: [Signal; 4] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM];
/// How long a process that was asked to end has for restoring the terminal.
pub(super) const GRACE: Duration = Duration::from_secs(1);

/// Runs another process of this program to draw, and gives its status; `None` in that process, and where there can be none.
pub(super) fn run_guarded() -> Option<u8> {
    if std::env::var(VARIABLE).is_ok_and(|guard| guard == getppid().to_string()) {
        let _ = set_pdeathsig(Signal::SIGTERM);
        // Or the guard is dead already.
        return (std::env::var(VARIABLE) != Ok(getppid().to_string())).then_some(0);
    }
    let before = tcgetattr(stdout()).ok()?;
    let mut command = this_program().ok()?;
    command.args(std::env::args_os().skip(1)).env(VARIABLE, std::process::id().to_string());
    let starter = starter();
    // The child inherits that they are blocked, and lets them through once it has handlers.
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
        // Killed. If it could restore the terminal itself, once more does no harm.
        let _ = tcsetattr(stdout(), SetArg::TCSANOW, &before);
        // A terminal that takes nothing, as its other end is stopped, must not keep this process.
        let (done, is_done) = channel();
        std::thread::spawn(move || {
            // Not by the standard library's stdout, whose lock would be held while the write hangs.
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

/// The process that has started this one, as a descriptor that tells when it ends. `None` where it cannot be had: it is in
/// another process namespace, or the kernel is too old.
fn starter() -> Option<OwnedFd> {
    let starter = rustix::process::Pid::from_raw(getppid().as_raw()).filter(|starter| !starter.is_init())?;
    rustix::process::pidfd_open(starter, rustix::process::PidfdFlags::empty()).ok()
}

/// Waits for the child's end, and asks for it when a signal says so, or the terminal or the process that started this one is
/// gone; `None` if how it ended is not known.
fn attend(child: &mut Child, signals: &SignalFd, starter: Option<&OwnedFd>) -> Option<ExitStatus> {
    /// In case SIGCHLD is ignored, and so does not come.
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
            // It may be stopped.
            let _ = kill(pid, Signal::SIGCONT);
            asked.get_or_insert_with(Instant::now);
        }
        // Twice, as the child itself gives a write that hangs as long.
        if asked.is_some_and(|asked| asked.elapsed() >= 2 * GRACE) {
            let _ = child.kill();
        }
    }
}

//! A screen that is restored whoever is killed.
//!
//! Nothing can be done by a process that gets SIGKILL. So there are two: one draws, and the other has started it and waits for
//! its end. Is the first killed, the second restores the terminal; is the second killed, the first is told, and ends as if
//! asked to. Only when both are killed at once, or stopped, does the terminal stay as it is, until `reset` is typed.

use std::io::{Write as _, stdout};

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::sys::termios::{SetArg, tcgetattr, tcsetattr};
use nix::unistd::getppid;
use ratatui::crossterm::cursor::Show;
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::LeaveAlternateScreen;

use crate::child::{self, status_of, this_program};

/// Says whose child it is that is to draw.
const VARIABLE: &str = "GENSYNC_TOP_GUARD";

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
    let status = child::run(&mut command).ok()?;
    if status.is_none_or(|status| status.code().is_none()) {
        // Killed. If it could restore the terminal itself, once more does no harm.
        let _ = execute!(stdout(), LeaveAlternateScreen, Show);
        let _ = tcsetattr(stdout(), SetArg::TCSANOW, &before);
        let _ = stdout().flush();
    }
    Some(status_of(status))
}

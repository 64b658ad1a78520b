//! A pseudo-terminal, and the program in it.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use nix::poll::{PollFd, PollFlags, poll};
use nix::pty::Winsize;
use nix::sys::termios::{FlowArg, LocalFlags, Termios, tcflow, tcgetattr};
use vt100::{Parser, Screen};

use crate::tool::{Running, eventually, pty};

/// A terminal of 100 columns and 30 lines, unless it is asked for otherwise.
pub(crate) struct Terminal {
    master: File,
    /// Kept open, so that the terminal outlives the program.
    slave: OwnedFd,
    parser: Parser,
    /// All that was written.
    pub(crate) raw: Vec<u8>,
    before: Termios,
    pub(crate) program: Running,
}

impl Terminal {
    pub(crate) fn start(command: &mut Command) -> Self {
        Self::start_sized(command, 30, 100)
    }

    pub(crate) fn start_sized(command: &mut Command, rows: u16, columns: u16) -> Self {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let pair = pty();
        let (master, slave) = (File::from(pair.master), pair.slave);
        #[expect(unsafe_code, reason = "no library has this call")]
        // SAFETY: the descriptor is open and a terminal's, and the call only reads the one Winsize that the pointer refers to.
        let set = unsafe { nix::libc::ioctl(slave.as_raw_fd(), nix::libc::TIOCSWINSZ, &raw const size) };
        assert_eq!(set, 0);
        let before = tcgetattr(&slave).unwrap();
        let end = || slave.try_clone().unwrap();
        command.env("TERM", "xterm-256color").stdin(end()).stdout(end()).stderr(end());
        #[expect(unsafe_code, reason = "runs between fork and exec")]
        // SAFETY: between the fork and the exec, the closure makes only two system calls, which are async-signal-safe, and
        // does not allocate.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                // Its standard input is its terminal from now on: what is typed there may be a signal.
                match nix::libc::ioctl(0, nix::libc::TIOCSCTTY, 0) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            });
        }
        let program = Running::start(command);
        // The command keeps its ends of the terminal.
        command
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null());
        Self {
            master,
            slave,
            parser: Parser::new(rows.try_into().unwrap(), columns.try_into().unwrap(), 0),
            raw: Vec::new(),
            before,
            program,
        }
    }

    pub(crate) fn press(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    fn take_what_there_is(&mut self) {
        let mut descriptors = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
        if poll(&mut descriptors, 10u8).unwrap() == 0 || descriptors[0].revents() != Some(PollFlags::POLLIN) {
            return;
        }
        let mut bytes = [0; 4096];
        let count = self.master.read(&mut bytes).unwrap();
        self.raw.extend(&bytes[..count]);
        self.parser.process(&bytes[..count]);
    }

    pub(crate) fn screen(&self) -> &Screen {
        self.parser.screen()
    }

    pub(crate) fn text(&self) -> String {
        self.screen().contents()
    }

    /// Reads until the screen fulfils the condition.
    pub(crate) fn await_screen(&mut self, what: &str, is_so: impl Fn(&Screen) -> bool) {
        let mut last = String::new();
        eventually(what, || {
            self.take_what_there_is();
            if self.text() != last && std::env::var_os("SHOW_SCREENS").is_some() {
                eprintln!("--\n{}", self.text());
            }
            last = self.text();
            is_so(self.screen())
        });
    }

    pub(crate) fn await_text(&mut self, text: &str) {
        self.await_screen(&format!("waiting for \"{text}\""), |screen| screen.contents().contains(text));
    }

    /// Reads until the program has ended, and gives its status as shells do.
    pub(crate) fn await_end(&mut self) -> i32 {
        use std::os::unix::process::ExitStatusExt as _;
        let mut status = None;
        eventually("waiting for the end", || {
            self.take_what_there_is();
            status = self.program.child().try_wait().unwrap();
            status.is_some()
        });
        while {
            let before = self.raw.len();
            self.take_what_there_is();
            self.raw.len() > before
        } {}
        let status = status.unwrap();
        status.code().unwrap_or_else(|| 128 + status.signal().unwrap())
    }

    /// The terminal goes away, as when a connection ends; what was in it is left.
    pub(crate) fn hang_up(self) -> Running {
        self.program
    }

    /// From now on, every write to the terminal hangs, as when the program that shows it is stopped.
    pub(crate) fn take_nothing(&self) {
        tcflow(&self.slave, FlowArg::TCOOFF).unwrap();
    }

    pub(crate) fn take_again(&self) {
        tcflow(&self.slave, FlowArg::TCOON).unwrap();
    }

    /// Prints to the terminal as another process would.
    pub(crate) fn print(&self, text: &str) {
        File::from(self.slave.try_clone().unwrap()).write_all(text.as_bytes()).unwrap();
    }

    pub(crate) fn is_raw(&self) -> bool {
        !tcgetattr(&self.slave).unwrap().local_flags.contains(LocalFlags::ICANON)
    }

    /// Whether the terminal is as it was before the program took it.
    pub(crate) fn is_restored(&self) -> bool {
        let now = tcgetattr(&self.slave).unwrap();
        !self.screen().alternate_screen()
            && !self.screen().hide_cursor()
            && (now.local_flags, now.input_flags, now.output_flags, now.control_flags)
                == (
                    self.before.local_flags,
                    self.before.input_flags,
                    self.before.output_flags,
                    self.before.control_flags,
                )
    }
}

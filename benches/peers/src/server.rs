//! Servers of Debian's packages, started in a folder of ours, reached by a unix socket only, and stopped with this process.

#![expect(unsafe_code, reason = "has a server die with its starter")]

use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Outcome;

/// Where a program is, if it is installed.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// The first line that a program says of itself.
pub(crate) fn version(name: &str, argument: &str) -> Option<String> {
    let output = Command::new(program(name)?).arg(argument).output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).lines().next()?.to_owned())
}

pub(crate) struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    pub(crate) fn memcached(folder: &Path) -> Outcome<Self> {
        // Room for every key that it is given: nothing is to be evicted.
        Self::start("memcached", folder, &["-u", "root", "-m", "8192", "-c", "1024", "-s"])
    }

    pub(crate) fn redis(folder: &Path) -> Outcome<Self> {
        let arguments = ["--port", "0", "--save", "", "--appendonly", "no", "--daemonize", "no", "--unixsocket"];
        Self::start("redis-server", folder, &arguments)
    }

    /// The last argument is followed by the socket.
    fn start(name: &str, folder: &Path, arguments: &[&str]) -> Outcome<Self> {
        let program = program(name).ok_or_else(|| format!("{name} is not installed"))?;
        let socket = folder.join("socket");
        let mut command = Command::new(program);
        command.current_dir(folder).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.args(arguments).arg(&socket);
        // SAFETY: between fork and exec it makes one system call, and allocates nothing.
        unsafe { command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?)) };
        let mut server = Self { child: command.spawn()?, socket };
        let start = Instant::now();
        while UnixStream::connect(&server.socket).is_err() {
            if let Some(status) = server.child.try_wait()? {
                return Err(format!("{name} ended at once: {status}").into());
            }
            if start.elapsed() > Duration::from_secs(10) {
                return Err(format!("{name} does not answer").into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = kill(self.pid(), Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

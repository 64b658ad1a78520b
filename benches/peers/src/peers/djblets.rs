//! The original: Djblets over memcached, in Python.

use std::cell::RefCell;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::rc::Rc;

use crate::Outcome;
use crate::peer::{About, Kind, Operation, Peer};
use crate::server::{Server, program};

pub(crate) struct Djblets {
    python: PathBuf,
}

impl Djblets {
    pub(crate) fn new(python: &Path) -> Self {
        Self { python: python.to_owned() }
    }
}

impl Peer for Djblets {
    fn about(&self) -> About {
        About {
            name: "Djblets",
            several_writers: "yes; after an eviction, two updates may become one",
            keys_at_run_time: "yes; may be evicted",
            writer_killed: "no: stale if killed before the announcement",
            file_replaced: "does not apply; a restarted server has lost all keys",
            without_server: "no",
            across_processes: "yes, and machines",
        }
    }

    fn missing(&self) -> Option<String> {
        if program("memcached").is_none() {
            return Some("memcached is not installed (a package of Debian's)".to_owned());
        }
        let has = Command::new(&self.python)
            .args(["-c", "import djblets, pymemcache"])
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success());
        (!has).then(|| format!("{} has no djblets and pymemcache (from PyPI)", self.python.display()))
    }

    fn operations(&self, folder: &Path) -> Outcome<Vec<Operation>> {
        let process = Rc::new(RefCell::new(Process::start(&self.python, folder)?));
        let operation = |name, kind, command: &'static str| {
            let process = process.clone();
            let run = move |times| process.borrow_mut().run(command, times).expect("a live process");
            Operation { name, kind, run: Box::new(run) }
        };
        Ok(vec![
            operation("is_expired, in Python", Kind::Check, "check"),
            operation("mark_updated, in Python", Kind::Announce, "announce"),
        ])
    }
}

struct Process {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    _memcached: Server,
}

impl Process {
    fn start(python: &Path, folder: &Path) -> Outcome<Self> {
        let memcached = Server::memcached(folder)?;
        let mut child = Command::new(python)
            .args(["-c", include_str!("djblets.py")])
            .arg(memcached.socket())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take().ok_or("no input")?;
        let output = BufReader::new(child.stdout.take().ok_or("no output")?);
        let mut process = Self { child, input, output, _memcached: memcached };
        process.answer()?;
        Ok(process)
    }

    /// One message each way for the whole batch.
    fn run(&mut self, command: &str, times: u64) -> Outcome<()> {
        writeln!(self.input, "{command} {times}")?;
        self.answer()
    }

    fn answer(&mut self) -> Outcome<()> {
        match self.output.read_line(&mut String::new())? {
            0 => Err("Python has ended".into()),
            _ => Ok(()),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! The program, and a table for it.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Instant;

use gensync::{CacheKey, GenerationSynchronizer, Table};
use nix::fcntl::OFlag;
use nix::pty::{OpenptyResult, grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::support::LIMIT;

/// A folder with room for one table, which each run of the program names.
pub(crate) struct Place {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) path: PathBuf,
}

/// Where segments begin.
const SEGMENTS: u64 = 8192;

/// The bytes of a slot: generation word, digest, record word and tag.
pub(crate) type Lanes = [std::ops::Range<u64>; 4];

/// Where in a table's file a key is.
pub(crate) struct Spot {
    pub(crate) lanes: Lanes,
    /// Where its text begins, behind its first generation.
    pub(crate) text: u64,
    /// All slots of the segment, the last one first.
    pub(crate) slots: Vec<Lanes>,
}

/// What the program said, and how it ended.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) status: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Place {
    /// Without a table.
    pub(crate) fn empty() -> Self {
        let (folder, path) = crate::support::path();
        Self { folder, path }
    }

    pub(crate) fn with_keys<const COUNT: usize>(keys: [&str; COUNT]) -> Self {
        let place = Self::empty();
        let table = Table::open(&place.path).unwrap();
        keys.iter().for_each(|key| drop(GenerationSynchronizer::new(&table, CacheKey::raw(*key)).unwrap()));
        place
    }

    pub(crate) fn table(&self) -> Table {
        Table::open(&self.path).unwrap()
    }

    pub(crate) fn sync(&self, key: &str) -> GenerationSynchronizer {
        GenerationSynchronizer::new(&self.table(), CacheKey::raw(key)).unwrap()
    }

    /// The program with these arguments, about this table.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = program();
        command.env("GENSYNC_TABLE", &self.path).args(arguments);
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Said {
        said(self.command(arguments).stdin(Stdio::null()).output().unwrap())
    }

    /// Runs it, asserts status 0 and an empty stderr, and returns what it printed.
    pub(crate) fn succeed(&self, arguments: &[&str]) -> String {
        let said = self.run(arguments);
        assert_eq!((said.status, &*said.err), (0, ""), "{arguments:?}: {said:?}");
        said.out
    }

    /// Runs it, and asserts that it ends with `status`, prints nothing, and has `text` on stderr.
    pub(crate) fn fail(&self, status: i32, text: &str, arguments: &[&str]) {
        let said = self.run(arguments);
        assert_eq!((said.status, &*said.out), (status, ""), "{arguments:?}: {said:?}");
        assert!(said.err.contains(text), "{arguments:?}: \"{text}\" is not in {said:?}");
    }

    /// The objects that it prints.
    pub(crate) fn objects(&self, arguments: &[&str]) -> Vec<Value> {
        let said = self.run(&[&["--json"], arguments].concat());
        assert!(said.status <= 1, "{said:?}");
        objects(&said.out)
    }

    /// The one object that it prints.
    pub(crate) fn object(&self, arguments: &[&str]) -> Value {
        let mut objects = self.objects(arguments);
        assert_eq!(objects.len(), 1, "{objects:?}");
        objects.remove(0)
    }

    /// Where in the file what belongs to `key` is, which must be in the first segment of slots.
    #[expect(clippy::host_endian_bytes, reason = "the words of a table are in the machine's byte order")]
    pub(crate) fn spot(&self, key: &str) -> Spot {
        let table = self.table();
        let (slot, slots) = (table.slot(CacheKey::raw(key)).unwrap().unwrap().offset(), table.info().capacity);
        let index = (slot - SEGMENTS) / 8;
        assert!(index < slots);
        let at = |index: u64| {
            let lanes = [(0, 8), (8, 16), (24, 8), (32, 1)];
            lanes.map(|(begin, size)| {
                (SEGMENTS + begin * slots + size * index)..(SEGMENTS + begin * slots + size * (index + 1))
            })
        };
        let lanes = at(index);
        let word = bytes(&self.path)[lanes[2].start as usize..][..8].try_into().unwrap();
        let text = (u64::from_ne_bytes(word) & ((1 << 34) - 1)) + 8;
        // From the last slot on, of those that are free.
        let spare = (0..slots).rev().map(at).collect();
        Spot { lanes, text, slots: spare }
    }

    /// Overwrites a part of the file.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        use std::os::unix::fs::FileExt as _;
        File::options().write(true).open(&self.path).unwrap().write_all_at(bytes, offset).unwrap();
    }

    pub(crate) fn start(&self, arguments: &[&str]) -> Running {
        Running::start(self.command(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()))
    }
}

/// Each line must be an object.
pub(crate) fn objects(text: &str) -> Vec<Value> {
    let objects: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    assert!(objects.iter().all(Value::is_object));
    objects
}

/// The program, in an environment without the variables that it reads.
pub(crate) fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gensync"));
    for variable in ["GENSYNC_TABLE", "XDG_RUNTIME_DIR", "NO_COLOR", "TERM"] {
        command.env_remove(variable);
    }
    command.env("TZ", "UTC");
    command
}

pub(crate) fn said(output: Output) -> Said {
    let status = output.status.code().unwrap_or(-1);
    let [out, err] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    Said { status, out, err }
}

/// The program, running; killed if the test ends before it does.
pub(crate) struct Running(Option<Child>);

impl Running {
    pub(crate) fn start(command: &mut Command) -> Self {
        Self(Some(command.spawn().unwrap()))
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.0.as_ref().unwrap().id() as i32)
    }

    pub(crate) fn child(&mut self) -> &mut Child {
        self.0.as_mut().unwrap()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    pub(crate) fn said(mut self) -> Said {
        said(self.0.take().unwrap().wait_with_output().unwrap())
    }

    pub(crate) fn status(mut self) -> ExitStatus {
        self.0.take().unwrap().wait().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Repeats the check until it holds.
pub(crate) fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < LIMIT, "{what}, in vain");
        std::thread::yield_now();
    }
}

/// The child of a process that has `text` in its command line, once there is one.
pub(crate) fn child_of(pid: Pid, text: &str) -> Pid {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let is_meant = |child: &&str| {
        let command = std::fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&command).contains(text)
    };
    let mut found = None;
    eventually("waiting for a child", || {
        let children = std::fs::read_to_string(&path).unwrap();
        found = children.split_whitespace().find(is_meant).map(|child| Pid::from_raw(child.parse().unwrap()));
        found.is_some()
    });
    found.unwrap()
}

/// Whether the process is there, and has not ended.
pub(crate) fn lives(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with(['Z', 'X']))
}

pub(crate) fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

/// A pseudo-terminal with ends that no program inherits, not even one that another test starts at this moment: a program that has
/// one keeps the terminal from going away.
pub(crate) fn pty() -> OpenptyResult {
    let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let slave =
        File::options().read(true).write(true).custom_flags(nix::libc::O_NOCTTY).open(ptsname_r(&master).unwrap());
    OpenptyResult { master: master.as_fd().try_clone_to_owned().unwrap(), slave: slave.unwrap().into() }
}

/// Whether this user may create a process namespace; prints why not.
pub(crate) fn can_be_first() -> bool {
    can_unshare(&["--pid", "--fork"], "a process namespace")
}

/// Whether this user may mount file systems, which even root may not in most containers; prints why not.
pub(crate) fn can_mount() -> bool {
    can_unshare(&["--mount"], "a mount namespace, and so mounts")
}

fn can_unshare(options: &[&str], what: &str) -> bool {
    let status = Command::new("unshare").args(options).arg("true").status();
    let is_possible = status.is_ok_and(|status| status.success());
    if !is_possible {
        eprintln!("skipped: the kernel refuses {what}");
    }
    is_possible
}

/// The program as the first process of a namespace: the process that started the namespace, and the program itself.
pub(crate) fn start_first(place: &Place, arguments: &[&str]) -> (Running, Pid) {
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", env!("CARGO_BIN_EXE_gensync")]).args(arguments);
    command.env("GENSYNC_TABLE", &place.path).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let outer = Running::start(&mut command);
    let first = child_of(outer.pid(), arguments[0]);
    (outer, first)
}

/// Runs `test` in a folder on a disk with btrfs, if one can be made here.
pub(crate) fn with_btrfs(test: impl FnOnce(&Path) + std::panic::UnwindSafe) {
    let folder = tempfile::tempdir().unwrap();
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(256 << 20).unwrap();
    let run = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
    let mounted = run(Command::new("mkfs.btrfs").arg("-q").arg(image.path()))
        && run(Command::new("mount").args(["-t", "btrfs", "-o", "loop"]).arg(image.path()).arg(folder.path()));
    if !mounted {
        return eprintln!("skipped: a disk with btrfs cannot be made and mounted here");
    }
    let result = std::panic::catch_unwind(|| test(folder.path()));
    nix::mount::umount2(folder.path(), nix::mount::MntFlags::MNT_DETACH).unwrap();
    result.unwrap();
}

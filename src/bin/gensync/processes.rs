//! Which processes have a table mapped, from /proc.
//!
//! Another process may have mapped the table itself, a file that was deleted from the table's path, or, in a mount namespace of
//! its own, another file at the same path.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use gensync::Table;
use nix::fcntl::OFlag;
use nix::unistd::{SysconfVar, Uid, User, sysconf};

use crate::printable::printable;

/// What a process has mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapped {
    /// The table.
    Table,
    /// A file that had the table's path before it was deleted or replaced, and was not retired.
    Deleted,
    /// A deleted file, of which this process cannot find out whether it was retired.
    Unknown,
    /// A table that a `reset` or `rm` has retired: the process moves on when it next checks a key, and misses nothing until then.
    Retired,
    /// A retired table of an older file format: its process cannot use the one that has taken its place.
    Older,
    /// Another file at the table's path, as that process sees the path.
    Elsewhere,
}

impl Mapped {
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::Table => "mapped",
            Self::Deleted => "(deleted)",
            Self::Unknown => "(deleted?)",
            Self::Retired => "(reset)",
            Self::Older => "(older version)",
            Self::Elsewhere => "(another file)",
        }
    }
}

#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) user: String,
    pub(crate) command: String,
    /// When it was started.
    pub(crate) since: Option<SystemTime>,
    pub(crate) mapped: Mapped,
}

/// The offsets of the version and the state in a table's header, which the file format fixes, and the state of a retired table.
const VERSION: usize = 8;
const STATE: usize = 144;
const HEADER: usize = STATE + 4;
const RETIRED: u8 = 3;

#[derive(Debug, Default)]
pub(crate) struct Scan {
    pub(crate) processes: Vec<Process>,
    /// How many processes could not be inspected.
    pub(crate) hidden: usize,
    /// Whether this process may inspect every process that has no more privileges than itself. The hidden ones then belong to
    /// the machinery, such as that of a sandbox.
    pub(crate) may_look: bool,
    /// Why there may be processes that are not even counted as hidden.
    pub(crate) blind: Option<Blind>,
}

impl Scan {
    pub(crate) fn count(&self, mapped: &[Mapped]) -> usize {
        self.processes.iter().filter(|process| mapped.contains(&process.mapped)).count()
    }

    /// How many processes have the table mapped, or had it, as far as this process can see.
    pub(crate) fn text(&self) -> String {
        match (self.processes.len(), self.is_complete()) {
            (count, true) => count.to_string(),
            (0, false) => "unknown".to_owned(),
            (count, false) => format!("{count} or more"),
        }
    }

    /// Whether every process was inspected.
    pub(crate) fn is_complete(&self) -> bool {
        self.blind.is_none() && (self.hidden == 0 || self.may_look)
    }
}

/// Why processes cannot be seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Blind {
    /// No process can be seen.
    NoProc,
    /// Processes of other users cannot be seen, as /proc is mounted with this option.
    Hidden(String),
}

impl Blind {
    /// What is wrong, and what to do.
    pub(crate) fn text(&self) -> (String, &'static str) {
        match self {
            Self::NoProc => (
                "which processes have the table mapped cannot be told: there is no /proc here".to_owned(),
                "mount /proc, or run this where it is mounted",
            ),
            Self::Hidden(option) => (
                format!(
                    "which processes have the table mapped cannot be told: /proc is mounted with {option}, so that those of \
                     other users are not seen"
                ),
                "run this as root, or in the group that the mount option gid= of /proc names",
            ),
        }
    }

    /// What prevents this process from seeing that other processes exist.
    fn find(may_look: bool) -> Option<Self> {
        if fs::read_link("/proc/self").is_err() {
            return Some(Self::NoProc);
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        // ID PARENT DEVICE ROOT PLACE OPTIONS [FIELDS] - TYPE SOURCE OPTIONS; the last one is on top.
        let options = mounts.lines().rev().find_map(|line| {
            let (place, kind) = line.split_once(" - ")?;
            let (kind, options) = (kind.split(' ').next()?, kind.split(' ').nth(2)?);
            (place.split(' ').nth(4)? == "/proc" && kind == "proc").then_some(options)
        })?;
        let value = |name| options.split(',').find_map(|option| option.strip_prefix(name)?.strip_prefix('='));
        let hide = value("hidepid").filter(|hide| matches!(*hide, "2" | "4" | "invisible" | "ptraceable"))?;
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let field = |name| status.lines().find_map(|line| line.strip_prefix(name));
        let is_member = !matches!(hide, "4" | "ptraceable")
            && value("gid").is_some_and(|gid| {
                let groups = [field("Gid:"), field("Groups:")].into_iter().flatten();
                groups.flat_map(str::split_whitespace).any(|group| group == gid)
            });
        (!may_look && !is_member).then(|| Self::Hidden(format!("hidepid={hide}")))
    }
}

/// A file as /proc/PID/maps names it, which differs from what `stat` says on some file systems.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Name {
    device: Vec<u8>,
    inode: Vec<u8>,
}

/// All processes that have `table` mapped, except this one.
pub(crate) fn scan(table: &Table) -> Scan {
    table.path().map_or_else(Scan::default, |path| scan_for(path, Some(table.info().layout_version)))
}

/// All processes that have mapped the file at `path`, which cannot be opened as a table, or one that used to be there.
pub(crate) fn scan_path(path: &Path) -> Scan {
    scan_for(path, None)
}

/// The path as the kernel shows it.
fn real(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let folder = absolute.parent().and_then(|folder| fs::canonicalize(folder).ok());
    match (folder, absolute.file_name()) {
        (Some(folder), Some(name)) => folder.join(name),
        _ => absolute,
    }
}

/// The file's name as this process's own maps have it, as the table is mapped here, too.
fn own_name(path: &Path) -> Option<Name> {
    let maps = fs::read("/proc/self/maps").unwrap_or_default();
    let own = lines(&maps).find(|line| line.path == escaped(path)).map(|line| line.name);
    own.or_else(|| {
        let metadata = fs::metadata(path).ok()?;
        let (major, minor) = (nix::sys::stat::major(metadata.dev()), nix::sys::stat::minor(metadata.dev()));
        let (device, inode) = (format!("{major:02x}:{minor:02x}"), metadata.ino().to_string());
        Some(Name { device: device.into(), inode: inode.into() })
    })
}

struct Line<'a> {
    /// START-END
    addresses: &'a [u8],
    name: Name,
    path: &'a [u8],
}

/// The lines of a process's maps that are of files.
fn lines(maps: &[u8]) -> impl Iterator<Item = Line<'_>> {
    maps.split(|byte| *byte == b'\n').filter_map(|line| {
        // ADDRESSES PERMISSIONS OFFSET DEVICE INODE      PATH
        let mut fields = line.splitn(6, |byte| *byte == b' ');
        let (addresses, device, inode) = (fields.next()?, fields.nth(2)?, fields.next()?);
        let path = fields.next()?.trim_ascii_start();
        let name = || Name { device: device.to_owned(), inode: inode.to_owned() };
        (inode != b"0").then(|| Line { addresses, name: name(), path })
    })
}

/// A path as /proc/PID/maps has it.
fn escaped(path: &Path) -> Vec<u8> {
    let bytes = path.as_os_str().as_bytes();
    bytes.iter().flat_map(|byte| if *byte == b'\n' { br"\012".to_vec() } else { vec![*byte] }).collect()
}

/// `version` is that of the table at `path`, if it can be opened.
fn scan_for(path: &Path, version: Option<u32>) -> Scan {
    let path = real(path);
    let (own, path) = (own_name(&path), escaped(&path));
    let deleted = [&path, &b" (deleted)"[..]].concat();
    let may_look = may_look();
    let mut scan = Scan { may_look, blind: Blind::find(may_look), ..Scan::default() };
    let mut users = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        if pid == std::process::id() {
            continue;
        }
        let maps = match fs::read(entry.path().join("maps")) {
            Ok(maps) => maps,
            Err(error) => {
                scan.hidden += usize::from(error.kind() == std::io::ErrorKind::PermissionDenied);
                continue;
            }
        };
        let kinds = lines(&maps).filter_map(|line| match line.path {
            _ if Some(&line.name) == own.as_ref() => Some(Mapped::Table),
            path_there if path_there == deleted => Some(of_deleted(&entry.path(), &line, version)),
            path_there if path_there == path && version.is_none() && has_our_mounts(&entry.path()) => {
                Some(Mapped::Table)
            }
            path_there if path_there == path => Some(Mapped::Elsewhere),
            _ => None,
        });
        let mut kinds: Vec<_> = kinds.collect();
        kinds.dedup();
        scan.processes.extend(kinds.into_iter().map(|mapped| describe(pid, &entry.path(), mapped, &mut users)));
    }
    scan.processes.sort_by_key(|process| process.pid);
    scan
}

/// Whether a process sees the same files as this one. It tells whether a path leads both to one file where that is not mapped here,
/// as on some file systems nothing else does.
fn has_our_mounts(process: &Path) -> bool {
    let mounts = |process: &Path| fs::read_link(process.join("ns/mnt")).ok();
    mounts(process).is_some_and(|there| Some(there) == mounts(Path::new("/proc/self")))
}

/// Whether this process may inspect processes of every user. Root may, but usually not in a container.
fn may_look() -> bool {
    const CAP_SYS_PTRACE: u32 = 19;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let set = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
    set.is_some_and(|set| set & (1 << CAP_SYS_PTRACE) != 0)
}

/// What a process with a deleted file has mapped: the file's header says whether it was retired before. `version` is that of the
/// table which is there now.
fn of_deleted(folder: &Path, line: &Line<'_>, version: Option<u32>) -> Mapped {
    let what = |file: PathBuf| {
        let inode = String::from_utf8_lossy(&line.name.inode);
        // Checked before it is opened, as opening alone has effects on devices and pipes.
        let is_it = |metadata: Metadata| metadata.is_file() && metadata.ino().to_string() == inode;
        fs::metadata(&file).ok().filter(|metadata| is_it(metadata.clone()))?;
        let file = File::options().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(file).ok()?;
        file.metadata().ok().filter(|metadata| is_it(metadata.clone()))?;
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0).ok()?;
        let word = |offset: usize| -> Option<[u8; 4]> { header[offset..offset + 4].try_into().ok() };
        let (version_there, state) = (u32::from_le_bytes(word(VERSION)?), word(STATE)?);
        // The state is in the byte order of the machine.
        let is_retired =
            header.starts_with(b"gensync\0") && (state == [RETIRED, 0, 0, 0] || state == [0, 0, 0, RETIRED]);
        Some(match is_retired {
            true if version.is_some_and(|version| version_there < version) => Mapped::Older,
            true => Mapped::Retired,
            false => Mapped::Deleted,
        })
    };
    let mapped = folder.join("map_files").join(OsStr::from_bytes(line.addresses));
    let answer = what(mapped).or_else(|| {
        // Only a privileged process may open `map_files`. Every process that may inspect that one may open its `fd`.
        let entries = fs::read_dir(folder.join("fd")).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).find_map(what)
    });
    answer.unwrap_or(Mapped::Unknown)
}

/// The processes that hold locks on parts of `file`, which are those with an update in flight. The command of a `gensync exec`
/// holds one without having the table mapped.
pub(crate) fn holders(file: &Metadata) -> Vec<String> {
    let (major, minor) = (nix::sys::stat::major(file.dev()), nix::sys::stat::minor(file.dev()));
    let name = format!(" {major:02x}:{minor:02x}:{} ", file.ino());
    let holds = |folder: &Path| {
        let descriptors = fs::read_dir(folder.join("fdinfo")).into_iter().flatten().flatten();
        descriptors.filter_map(|entry| fs::read_to_string(entry.path()).ok()).any(|text| {
            // Every process that has the table open holds the lock on bytes 128 to 143, the boot id, which is no update's.
            let is_of_update =
                |line: &str| line.contains("OFDLCK") && line.contains(&name) && !line.ends_with(" 128 143");
            text.lines().any(|line| line.starts_with("lock:") && is_of_update(line))
        })
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| Some((entry.file_name().to_str()?.parse::<u32>().ok()?, entry.path())));
    let mut pids: Vec<_> = pids
        .filter(|(_, folder)| holds(folder))
        .map(|(pid, folder)| format!("{pid} ({})", command_of(&folder)))
        .collect();
    pids.sort();
    pids
}

fn command_of(folder: &Path) -> String {
    let mut command = fs::read(folder.join("cmdline")).unwrap_or_default();
    while command.pop_if(|byte| *byte == 0).is_some() {}
    if command.is_empty() {
        command = fs::read(folder.join("comm")).unwrap_or_default().trim_ascii_end().to_owned();
    }
    command.iter_mut().filter(|byte| **byte == 0).for_each(|byte| *byte = b' ');
    printable(&command)
}

fn describe(pid: u32, folder: &Path, mapped: Mapped, users: &mut HashMap<u32, String>) -> Process {
    let status = fs::read_to_string(folder.join("status")).unwrap_or_default();
    // Real, effective, saved and file system's.
    let user = status.lines().find_map(|line| line.strip_prefix("Uid:")?.split_whitespace().nth(1)?.parse().ok());
    let user = user.map_or_else(|| "?".to_owned(), |user| users.entry(user).or_insert_with(|| name_of(user)).clone());
    Process { pid, user, command: command_of(folder), since: start_of(folder), mapped }
}

pub(crate) fn name_of(user: u32) -> String {
    let known = User::from_uid(Uid::from_raw(user)).ok().flatten();
    known.map_or_else(|| user.to_string(), |known| printable(known.name.as_bytes()))
}

fn start_of(folder: &Path) -> Option<SystemTime> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let boot: u64 = stat.lines().find_map(|line| line.strip_prefix("btime ")?.parse().ok())?;
    let own = String::from_utf8_lossy(&fs::read(folder.join("stat")).ok()?).into_owned();
    // The 22nd field; the second one, in parentheses, may have spaces in it.
    let ticks: u64 = own.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()?;
    let rate = sysconf(SysconfVar::CLK_TCK).ok().flatten()? as f64;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs_f64(boot as f64 + ticks as f64 / rate))
}

//! Which processes have a table mapped, from /proc; and `ps`.
//!
//! Another process may have mapped the table itself; a file that was deleted from its path; or, in a mount namespace of its
//! own, another file at the same path.

use std::collections::HashMap;
use std::fs::{self, Metadata};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use gensync::Table;
use nix::unistd::{SysconfVar, Uid, User, sysconf};
use serde_json::json;

use crate::failure::{DONE, Failure, Outcome, complain};
use crate::output::{ATTENTION, BAD, Cell, Output, PLAIN, left, printable, right};
use crate::target::Target;
use crate::time::{local, seconds};

/// What a process has mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapped {
    /// The table.
    Table,
    /// A file that had the table's path before it was deleted or replaced.
    Deleted,
    /// Another file that is called so, where that process looks.
    Elsewhere,
}

impl Mapped {
    fn text(self) -> &'static str {
        match self {
            Self::Table => "mapped",
            Self::Deleted => "(deleted)",
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
    since: Option<SystemTime>,
    pub(crate) mapped: Mapped,
}

#[derive(Debug, Default)]
pub(crate) struct Scan {
    pub(crate) processes: Vec<Process>,
    /// How many processes did not let themselves be looked at.
    pub(crate) hidden: usize,
}

/// A file as /proc/PID/maps names it, which differs from what `stat` says on some file systems.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Name {
    device: Vec<u8>,
    inode: Vec<u8>,
}

/// All processes but this one that have `table` mapped.
pub(crate) fn scan(table: &Table) -> Scan {
    let Some(path) = table.path().map(real) else { return Scan::default() };
    scan_for(&path, own_name(&path))
}

/// All processes that have mapped what used to be at `path`, where nothing is now.
pub(crate) fn scan_path(path: &Path) -> Scan {
    scan_for(&real(path), None)
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

/// The file's name in this process's own maps, where the table is mapped, too.
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
    name: Name,
    path: &'a [u8],
}

/// The lines of a process's maps that are of files.
fn lines(maps: &[u8]) -> impl Iterator<Item = Line<'_>> {
    maps.split(|byte| *byte == b'\n').filter_map(|line| {
        // ADDRESSES PERMISSIONS OFFSET DEVICE INODE      PATH
        let mut fields = line.splitn(6, |byte| *byte == b' ');
        let (device, inode) = (fields.nth(3)?, fields.next()?);
        let path = fields.next()?.trim_ascii_start();
        (inode != b"0").then(|| Line { name: Name { device: device.to_owned(), inode: inode.to_owned() }, path })
    })
}

/// A path as maps have it.
fn escaped(path: &Path) -> Vec<u8> {
    let bytes = path.as_os_str().as_bytes();
    bytes.iter().flat_map(|byte| if *byte == b'\n' { br"\012".to_vec() } else { vec![*byte] }).collect()
}

fn scan_for(path: &Path, own: Option<Name>) -> Scan {
    let path = escaped(path);
    let deleted = [&path, &b" (deleted)"[..]].concat();
    let mut scan = Scan::default();
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
            path_there if path_there == deleted => Some(Mapped::Deleted),
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

/// The processes that hold locks on parts of `file`, which are those with an update in flight; the command of a `gensync exec`
/// does without having the table mapped.
pub(crate) fn holders(file: &Metadata) -> Vec<String> {
    let (major, minor) = (nix::sys::stat::major(file.dev()), nix::sys::stat::minor(file.dev()));
    let name = format!(" {major:02x}:{minor:02x}:{} ", file.ino());
    let holds = |folder: &Path| {
        let descriptors = fs::read_dir(folder.join("fdinfo")).into_iter().flatten().flatten();
        descriptors.filter_map(|entry| fs::read_to_string(entry.path()).ok()).any(|text| {
            // On the boot id, whoever has the table open has one.
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

pub(crate) fn ps(target: &Target, output: &mut Output) -> Outcome {
    // Also of a table that is gone, there may be processes that have not noticed.
    let scan = match target.inspect() {
        Ok(table) => scan(&table),
        Err(failure @ (Failure::Usage(_) | Failure::Output(_))) => return Err(failure),
        Err(failure) => {
            let scan = scan_path(&target.path()?);
            if scan.processes.is_empty() {
                return Err(failure);
            }
            scan
        }
    };
    if output.is_json() {
        for process in &scan.processes {
            output.object(&json!({
                "pid": process.pid,
                "user": process.user,
                "command": process.command,
                "since": process.since.map(seconds),
                "deleted": process.mapped == Mapped::Deleted,
                "elsewhere": process.mapped == Mapped::Elsewhere,
            }))?;
        }
    } else {
        let rows: Vec<_> = scan.processes.iter().map(row).collect();
        output.table(&[right("PID"), left("USER"), left("SINCE"), left("TABLE"), left("COMMAND")], &rows)?;
    }
    output.flush()?;
    // What hides from root is the sandbox's own.
    if scan.hidden > 0 && !Uid::effective().is_root() {
        complain(&format!(
            "the processes of other users, {} in number, cannot be looked at; root sees all",
            scan.hidden
        ));
    }
    Ok(DONE)
}

fn row(process: &Process) -> Vec<Cell> {
    let style = match process.mapped {
        Mapped::Table => PLAIN,
        Mapped::Deleted => BAD,
        Mapped::Elsewhere => ATTENTION,
    };
    let since = process.since.map_or_else(|| "?".to_owned(), local);
    vec![
        Cell::new(process.pid),
        Cell::new(&process.user),
        Cell::new(since),
        Cell::styled(style, process.mapped.text()),
        Cell::new(&process.command),
    ]
}

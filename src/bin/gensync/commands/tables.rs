//! `tables`: the tables that this user can see.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use gensync::ErrorKind;
use nix::unistd::Uid;
use serde_json::json;

use crate::commands::stat::state;
use crate::failure::{DONE, Outcome};
use crate::output::{Cell, Output, left, right};
use crate::printable::printable;
use crate::processes::{scan, scan_path};
use crate::target::Target;

/// How many files of a folder are examined. A folder with more of them holds other data.
const MOST: usize = 10_000;

pub(crate) fn tables(target: &Target, output: &mut Output) -> Outcome {
    let mut rows = Vec::new();
    let mut seen = BTreeSet::new();
    for path in candidates(target) {
        // A table that several processes have a descriptor of is listed once.
        let identity = fs::metadata(&path).map(|metadata| (metadata.dev(), metadata.ino())).ok();
        if identity.is_none_or(|identity| !seen.insert(identity)) {
            continue;
        }
        let options = target.options().read_only(true).accept_retired(true);
        let (version, state, keys, scan) = match options.open(&path) {
            Ok(table) => {
                let info = table.info();
                (info.layout_version, Some(state(info.state)), Some(table.stats().keys), scan(&table))
            }
            // Of another version; it is here, although nothing more is known.
            Err(error) => match *error.kind() {
                ErrorKind::LayoutVersion { found, .. } => (found, None, None, scan_path(&path)),
                // Files that are not tables are skipped.
                _ => continue,
            },
        };
        let processes = scan.is_complete().then_some(scan.processes.len());
        let shown = printable(path.as_os_str().as_encoded_bytes());
        if output.is_json() {
            output.object(&json!({
                "table": shown,
                "layout_version": version,
                "state": state,
                "keys": keys,
                "processes": processes,
            }))?;
        }
        let state = state.map_or_else(|| format!("version {version}"), str::to_owned);
        let keys = keys.map_or_else(|| "?".to_owned(), |keys| keys.to_string());
        rows.push(vec![Cell::new(shown), Cell::new(state), Cell::new(keys), Cell::new(scan.text())]);
    }
    if !output.is_json() {
        output.table(&[left("TABLE"), left("STATE"), right("KEYS"), right("PROCESSES")], rows.iter().cloned())?;
    }
    Ok(DONE)
}

/// Files that may be tables, each once.
fn candidates(target: &Target) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    found.extend(target.path().ok().and_then(|path| std::path::absolute(path).ok()));
    let shm = Path::new("/dev/shm");
    scan_folder(shm, &mut found);
    scan_folder(&shm.join(format!("gensync-{}", Uid::effective())), &mut found);
    if let Some(runtime) = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute()) {
        scan_folder(&runtime, &mut found);
        scan_folder(&runtime.join("gensync"), &mut found);
    }
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let is_process = entry.file_name().to_str().is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
        if is_process && entry.file_name() != std::process::id().to_string().as_str() {
            from_process(&entry.path(), &mut found);
        }
    }
    found
}

fn scan_folder(folder: &Path, found: &mut BTreeSet<PathBuf>) {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    found.extend(
        files.take(MOST).filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file())).map(|entry| entry.path()),
    );
}

/// Files that a process has mapped shared: by their paths, and anonymous ones by its descriptors.
fn from_process(process: &Path, found: &mut BTreeSet<PathBuf>) {
    for entry in fs::read_dir(process.join("fd")).into_iter().flatten().flatten() {
        // An anonymous table has no other name.
        if fs::read_link(entry.path()).is_ok_and(|target| target.as_os_str().as_encoded_bytes().starts_with(b"/memfd:"))
        {
            found.insert(entry.path());
        }
    }
    let maps = fs::read_to_string(process.join("maps")).unwrap_or_default();
    for line in maps.lines().filter(|line| line.split(' ').nth(1).is_some_and(|mode| mode.ends_with('s'))) {
        let path = line.splitn(6, ' ').nth(5).unwrap_or_default().trim_start();
        if path.starts_with('/') && !path.starts_with("/dev/zero") && !path.starts_with("/memfd:") {
            found.insert(PathBuf::from(path));
        }
    }
}

//! Commands that change a table: `mark`, `clear`, `create`, `reset`, `rm`.

use std::io::{self, BufRead as _, IsTerminal as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use gensync::{CacheKey, Error, ErrorKind, GenerationSynchronizer, SlotInfo, Table, TableState};
use nix::unistd::Uid;
use serde_json::json;

use crate::arguments::{Clear, Confirmed, Create, Mark};
use crate::commands::doctor::is_mount_point;
use crate::failure::{DONE, Failure, Outcome, complain};
use crate::keys::{Selection, by_label, no_such_key};
use crate::notice::{LIMIT, while_waiting};
use crate::output::{Output, label, object};
use crate::printable::printable;
use crate::processes::{holders, name_of};
use crate::target::Target;

/// Mode and capacity of a new table, unless the command line gives others.
const MODE: u32 = 0o600;
const CAPACITY: u64 = 1024;

pub(crate) fn mark(target: &Target, options: &Mark, output: &mut Output) -> Outcome {
    change(target, &options.selection, options.create, output)
}

/// The same as `mark`: the two differ in what the calling process keeps of its own state, and this process has none.
pub(crate) fn clear(target: &Target, options: &Clear, output: &mut Output) -> Outcome {
    change(target, &options.selection, options.create, output)
}

fn change(target: &Target, selection: &Selection, create: bool, output: &mut Output) -> Outcome {
    let (keys, choices) = (selection.keys()?, selection.choices()?);
    let table =
        while_waiting(reset_in_the_way, || if create { target.create(|options| options) } else { target.write() })?;
    let (mut changed, mut failures) = (Vec::new(), Vec::new());
    for key in keys {
        if !create && table.generation(&key)?.is_none() {
            failures.push(no_such_key(&table, key.as_str()));
            continue;
        }
        changed.extend(mark_key(&table, &key)?);
    }
    for choice in &choices {
        let mut matching = table.clear_matching(|slot| choice.matches(slot))?;
        matching.sort_unstable_by(by_label);
        if matching.is_empty() {
            failures.extend(choice.nothing(&table));
        }
        changed.append(&mut matching);
    }
    // Everything is announced before the first line is printed, so that a failing output leaves nothing undone.
    changed.iter().try_for_each(|slot| print(slot, output))?;
    output.flush()?;
    Failure::all(failures)
}

/// Announces a change of `key`, which is created if it is missing.
pub(crate) fn mark_key(table: &Table, key: &CacheKey) -> Outcome<Option<SlotInfo>> {
    let sync = GenerationSynchronizer::new(table, key)?;
    sync.mark_updated()?;
    // The check ends updates that dead processes have left pending.
    let _ = sync.is_expired();
    Ok(table.slot(key)?)
}

fn print(slot: &SlotInfo, output: &mut Output) -> Outcome<()> {
    match output.is_json() {
        true => output.object(&object(slot)),
        false => output.line(&format!("{}  {}", label(slot), slot.generation())),
    }
}

pub(crate) fn create(target: &Target, options: &Create, output: &mut Output) -> Outcome {
    let keys = options.keys.keys()?;
    let (mode, capacity) = (options.mode.unwrap_or(MODE), options.capacity.unwrap_or(CAPACITY));
    let table = while_waiting(reset_in_the_way, || target.create(|table| table.mode(mode).capacity(capacity)))?;
    if let Some(path) = table.path()
        && let Ok(metadata) = std::fs::metadata(path)
    {
        let shown = printable(path.as_os_str().as_encoded_bytes());
        let (found, owner) = (metadata.mode() & 0o7777, metadata.uid());
        let belongs = if owner == Uid::effective().as_raw() {
            String::new()
        } else {
            format!(" and belongs to {}", name_of(owner))
        };
        if options.mode.is_some_and(|mode| mode != found) {
            return Err(Failure::Unusable(format!(
                "{shown}: the table was there already: its mode is {found:04o}{belongs}, expected mode {mode:04o}; no key was \
                 created\n  --mode is for a new table: omit it to use this one as it is, or have its owner change the mode \
                 (chmod) if no other user has written to it"
            )));
        }
        if !belongs.is_empty() {
            complain(&format!(
                "{shown}: the table was there already: its mode is {found:04o}{belongs}; any user that may write to it can forge generations"
            ));
        }
        if is_mount_point(path) {
            complain(&format!(
                "{shown}: the file is a mount point of its own: a reset here expires it in place, a removal fails, and a table \
                 that is made outside is never seen here; mount the folder that it is in instead"
            ));
        }
        let slots = table.info().capacity;
        if options.capacity.is_some_and(|capacity| capacity.next_power_of_two() != slots) {
            complain(&format!(
                "{shown}: the table was there already, with room for {slots} keys in its first segment; --capacity is for a new one"
            ));
        }
    }
    for key in &keys {
        GenerationSynchronizer::new(&table, key)?;
        table.slot(key)?.iter().try_for_each(|slot| print(slot, output))?;
    }
    Ok(DONE)
}

/// The message of a command that announces something, while it waits for a reset.
pub(crate) fn reset_in_the_way() -> String {
    format!("waiting for a reset of the table to end, for {LIMIT} at most")
}

/// The message of `reset` and `rm`, while they wait for updates in flight.
fn updates_in_the_way(path: &Path) -> String {
    let holders = std::fs::metadata(path).map(|metadata| holders(&metadata)).unwrap_or_default();
    let own = format!("{} (", std::process::id());
    let holders: Vec<_> = holders.into_iter().filter(|holder| !holder.starts_with(&own)).collect();
    let named = if holders.is_empty() { "none that can be seen".to_owned() } else { holders.join(", ") };
    format!("waiting for updates in flight to end, for {LIMIT} at most; processes that have one: {named}")
}

pub(crate) fn reset(target: &Target, options: &Confirmed, output: &mut Output) -> Outcome {
    let file = target.path()?;
    let table = while_waiting(reset_in_the_way, || target.write())?;
    let path = printable(file.as_os_str().as_encoded_bytes());
    confirm(options, &format!("Begin {path} anew, so that every process loads everything again?"))?;
    let before = table.info().incarnation;
    let result = while_waiting(|| updates_in_the_way(&file), || table.reset());
    let (incarnation, by) = match result {
        Ok(()) => (table.info().incarnation, ""),
        // Another process's reset that ended after this one had begun has done all that was asked for.
        Err(error) => match target.read().map(|table| table.info()) {
            Ok(info) if info.incarnation != before && info.state == TableState::Live => {
                (info.incarnation, ": another process has finished the reset")
            }
            _ => return Err(error.into()),
        },
    };
    let in_place = incarnation == before;
    let incarnation = format!("{incarnation:032x}");
    let said = match table.replaceable() {
        Err(error) if in_place => format!("{path}: every key has expired, and stays, as {}", reason(&error)),
        _ => format!("{path} has begun anew, as incarnation {incarnation}{by}"),
    };
    match output.is_json() {
        true => output.object(&json!({
            "table": path,
            "incarnation": incarnation,
            "by_another": !by.is_empty(),
            "in_place": in_place,
        }))?,
        false => output.line(&said)?,
    }
    Ok(DONE)
}

/// Why a table cannot be replaced.
fn reason(error: &Error) -> String {
    match error.kind() {
        ErrorKind::NotReplaceable { reason, .. } => {
            format!("the file cannot be replaced: {}", printable(reason.as_bytes()))
        }
        _ => printable(error.to_string().as_bytes()),
    }
}

pub(crate) fn rm(target: &Target, options: &Confirmed, output: &mut Output) -> Outcome {
    let file = target.path()?;
    let table = while_waiting(reset_in_the_way, || target.write())?;
    let path = printable(file.as_os_str().as_encoded_bytes());
    let scan = crate::processes::scan(&table);
    let users = scan.text();
    confirm(options, &format!("Remove {path}? Processes that have it mapped: {users}."))?;
    while_waiting(|| updates_in_the_way(&file), || table.remove())?;
    if !scan.processes.is_empty() || scan.blind.is_some() {
        complain(&format!(
            "processes that had the table mapped: {users}; those that use it again make a new one, if they may"
        ));
    }
    match output.is_json() {
        true => output.object(&json!({ "table": path, "removed": true, "processes": scan.processes.len() }))?,
        false => output.line(&format!("{path} is removed"))?,
    }
    Ok(DONE)
}

fn confirm(options: &Confirmed, question: &str) -> Outcome<()> {
    if options.yes {
        return Ok(());
    }
    if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
        return Err(Failure::Usage("there is no terminal to ask on; give --yes to do it without asking".to_owned()));
    }
    let _ = write!(io::stderr(), "{question} [y/N] ");
    let mut answer = String::new();
    let _ = io::stdin().lock().read_line(&mut answer);
    match answer.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(Failure::Negative("nothing was changed".to_owned())),
    }
}

//! `exec`: a command that changes the source, within an update.
//!
//! Other processes see by a lock on a descriptor whether the maker of an update lives. The command inherits the descriptor, so
//! there are two makers, and the update is in flight until both have ended. For each process that may be killed:
//!
//! - the command: this process finishes the update;
//! - this process: the [witness](crate::commands::witness) announces the update at once. The command may still change the
//!   source, so the update stays in flight: the lock goes with the command, and the process that checks the key next announces it
//!   again;
//! - both, or all three: the process that checks the key next announces it.
//!
//! A daemon that the command leaves behind holds the lock as well. When the command ends, this process releases the lock for all
//! of them. If this process was killed, the daemon keeps it, and the other processes load again after their `pending_limit`.

use std::collections::HashSet;
use std::process::{Command, ExitStatus};

use gensync::{CacheKey, GenerationSynchronizer, Table, Update};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::json;

use crate::arguments::Exec;
use crate::child::{self, status_of};
use crate::commands::witness::Witness;
use crate::failure::{DONE, EXEC_FAILED, Failure, Outcome, complain};
use crate::keys::{Choice, no_such_key};
use crate::notice::{reset_in_the_way, while_waiting};
use crate::output::{Output, object};
use crate::printable::printable;
use crate::target::Target;

pub(crate) const CANNOT_RUN: u8 = 126;
const NO_SUCH_COMMAND: u8 = 127;

/// Returns the command's status, or one that says that the command has none.
pub(crate) fn execute(target: &Target, options: &Exec, output: &mut Output) -> Outcome {
    run(target, options, output).or_else(|failure| {
        failure.report();
        complain("the command was not run");
        Ok(EXEC_FAILED)
    })
}

fn run(target: &Target, options: &Exec, output: &mut Output) -> Outcome {
    let (named, choices) = (options.selection.keys()?, options.selection.choices()?);
    let table = while_waiting(reset_in_the_way, || {
        if options.create { target.create(|options| options) } else { target.write() }
    })?;
    let mut missing = Vec::new();
    for key in &named {
        if table.generation(key)?.is_none() {
            let advice = options.selection.advice(key);
            missing.push((
                format!("{}: created, as no process has used it", printable(key.as_str().as_bytes())),
                advice,
                no_such_key(&table, key, advice),
            ));
        }
    }
    for choice in &choices {
        if !table.slots().any(|slot| choice.matches(&slot))
            && let Some(failure) = choice.nothing(&table)
        {
            let text = match &failure {
                Failure::Negative(text) => text.lines().next().unwrap_or_default().to_owned(),
                _ => String::new(),
            };
            missing.push((text, "", failure));
        }
    }
    if options.must_exist {
        Failure::all(missing.into_iter().map(|(_, _, failure)| failure).collect())?;
    } else {
        // A deploy step is not left out because no process uses the key that it changes. As the key may be misspelt, say so.
        for (text, advice, _) in missing {
            complain(&format!("{text}; the command is run (--must-exist refuses){advice}"));
        }
    }
    let keys = each(named.clone(), &choices, &table)?;
    let syncs = keys.iter().map(|key| GenerationSynchronizer::new(&table, key)).collect::<Result<Vec<_>, _>>()?;
    // The witness is kept until the updates are finished. It is started before they begin, as it must not inherit their
    // descriptors: the updates would count as in flight while it lives.
    let _witness = Witness::start(target, &named, &choices)?;
    let updates = while_waiting(reset_in_the_way, || begin(&syncs))?;
    let mut command = Command::new(&options.command[0]);
    command.args(&options.command[1..]);
    let status = match child::run(&mut command) {
        Ok(status) => status,
        Err(error) => {
            updates.into_iter().for_each(Update::abandon);
            let command = printable(options.command[0].as_encoded_bytes());
            complain(&format!("{command} cannot be run: {error}; nothing was announced"));
            return Ok(if error.kind() == std::io::ErrorKind::NotFound { NO_SUCH_COMMAND } else { CANNOT_RUN });
        }
    };
    finish(&table, &keys, updates, &choices, status, output)
}

/// The keys that are named, and the chosen ones, as far as the table has them whole, which an update needs. A chosen key of more
/// than 65,536 bytes, or with a damaged text, is announced when the command has ended.
fn each(mut keys: Vec<CacheKey>, choices: &[Choice], table: &Table) -> Outcome<Vec<CacheKey>> {
    let mut seen = HashSet::new();
    for key in &keys {
        seen.extend(table.slot(key)?.map(|slot| slot.digest()));
    }
    for slot in table.slots().filter(|slot| choices.iter().any(|choice| choice.matches(slot))) {
        let Ok(label) = str::from_utf8(slot.label_bytes()) else { continue };
        if label.is_empty() || seen.contains(&slot.digest()) {
            continue;
        }
        let key = CacheKey::raw(label);
        // A text that is cut or damaged would name another key, which must not be created.
        if table.slot(&key)?.is_some_and(|found| found.digest() == slot.digest()) {
            seen.insert(slot.digest());
            keys.push(key);
        }
    }
    // Each update takes a descriptor, and the process needs some others.
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let needed = keys.len() as u64 + 64;
        if soft < needed && needed <= hard {
            let _ = setrlimit(Resource::RLIMIT_NOFILE, needed, hard);
        }
    }
    Ok(keys)
}

/// Begins an update of each key, or of none. The command is to inherit the updates' descriptors.
fn begin(syncs: &[GenerationSynchronizer]) -> Outcome<Vec<Update<'_>>> {
    let mut updates = Vec::with_capacity(syncs.len());
    for sync in syncs {
        let begun = sync.begin_update().map_err(Failure::from).and_then(|update| {
            match fcntl(&update, FcntlArg::F_SETFD(FdFlag::empty())) {
                Ok(_) => Ok(update),
                Err(errno) => {
                    update.abandon();
                    Err(Failure::Unusable(format!("the command cannot be given the update's descriptor: {errno}")))
                }
            }
        });
        match begun {
            Ok(update) => updates.push(update),
            Err(failure) => {
                updates.into_iter().for_each(Update::abandon);
                return Err(failure);
            }
        }
    }
    Ok(updates)
}

/// Announces the updates, and all other keys that are chosen by now; returns the command's status.
fn finish(
    table: &Table,
    keys: &[CacheKey],
    updates: Vec<Update<'_>>,
    choices: &[Choice],
    status: Option<ExitStatus>,
    output: &mut Output,
) -> Outcome {
    if status.is_none() {
        complain("how the command ended is not known");
    }
    let status = status_of(status);
    let (mut announced, mut objects, mut digests) = (DONE, Vec::new(), HashSet::new());
    let mut failed = |error: &gensync::Error| {
        complain(&format!(
            "{}\n  the command has run, but that could not be announced: repeat `gensync mark` until it succeeds",
            crate::failure::explain(error)
        ));
        announced = EXEC_FAILED;
    };
    for (key, update) in keys.iter().zip(updates) {
        match update.finish() {
            Ok(generation) => {
                digests.extend(table.slot(key).ok().flatten().map(|slot| slot.digest()));
                objects.push(json!({ "key": key.as_str(), "generation": generation.get(), "status": status }));
            }
            Err(error) => failed(&error),
        }
    }
    if !choices.is_empty() {
        // Also the keys that a process has begun to use while the command ran: what it loaded then may be stale.
        let is_left = |slot: &gensync::SlotInfo| {
            !digests.contains(&slot.digest()) && choices.iter().any(|choice| choice.matches(slot))
        };
        match table.clear_matching(is_left) {
            Ok(slots) => objects.extend(slots.iter().map(|slot| {
                let mut object = object(slot);
                object["status"] = status.into();
                object
            })),
            Err(error) => failed(&error),
        }
    }
    if output.is_json() {
        // An error of the output is reported, but does not replace the command's status, which is worth more.
        let printed = objects.iter().try_for_each(|object| output.object(object)).and_then(|()| output.flush());
        let _ = printed.map_err(|failure| failure.report());
    }
    Ok(if status == DONE { announced } else { status })
}

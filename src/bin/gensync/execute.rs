//! `exec`: a command that changes the source, within an update.
//!
//! The kernel tells the others whether the update's maker lives by a lock on a descriptor. The command inherits it, so there
//! are two makers, and the update is in flight until both have ended. Whatever is killed:
//!
//! - the command: this process finishes the update;
//! - this process: the [witness](crate::witness) announces the update at once. The command may still change the source, so
//!   the update stays in flight: the lock goes with the command, and whoever checks the key next announces it again;
//! - both, or all: whoever checks the key next announces it.
//!
//! A daemon that the command leaves behind has the lock as well, which this process lets go of for all when the command ends.
//! If this process was killed, the daemon keeps it, and the others load again after their `pending_limit`.

use std::process::{Command, ExitStatus};

use gensync::{CacheKey, GenerationSynchronizer, Update};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde_json::json;

use crate::arguments::Exec;
use crate::child::{self, status_of};
use crate::failure::{DONE, Failure, Outcome, UNUSABLE, complain};
use crate::list::no_such_key;
use crate::output::Output;
use crate::target::Target;
use crate::witness::Witness;

const CANNOT_RUN: u8 = 126;
const NO_SUCH_COMMAND: u8 = 127;

pub(crate) fn execute(target: &Target, options: &Exec, output: &mut Output) -> Outcome {
    let keys = options.options.keys(&options.keys)?;
    let table = if options.create { target.create(|options| options)? } else { target.write()? };
    if !options.create {
        for key in &keys {
            table.generation(key)?.ok_or_else(|| no_such_key(key.as_str())).map_err(not_run)?;
        }
    }
    let syncs = keys.iter().map(|key| GenerationSynchronizer::new(&table, key)).collect::<Result<Vec<_>, _>>()?;
    // Kept until the updates are finished; begun before they are, as it is not to inherit their descriptors.
    let _witness = Witness::start(target, &keys)?;
    let updates = begin(&syncs)?;
    let mut command = Command::new(&options.command[0]);
    command.args(&options.command[1..]);
    let status = match child::run(&mut command) {
        Ok(status) => status,
        Err(error) => {
            updates.into_iter().for_each(Update::abandon);
            complain(&format!("{} cannot be run: {error}; nothing was announced", options.command[0].display()));
            return Ok(if error.kind() == std::io::ErrorKind::NotFound { NO_SUCH_COMMAND } else { CANNOT_RUN });
        }
    };
    finish(&keys, updates, status, output)
}

fn not_run(failure: Failure) -> Failure {
    match failure {
        Failure::Negative(text) => Failure::Negative(format!(
            "{text}\n  the command was not run; with --create, missing keys are created first"
        )),
        other => other,
    }
}

/// Begins an update of each key, whose descriptors the command is to inherit; or of none.
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

/// Announces the update, and gives the command's status.
fn finish(keys: &[CacheKey], updates: Vec<Update<'_>>, status: Option<ExitStatus>, output: &mut Output) -> Outcome {
    if status.is_none() {
        complain("how the command ended is not known");
    }
    let status = status_of(status);
    let mut announced = DONE;
    for (key, update) in keys.iter().zip(updates) {
        match update.finish() {
            Ok(generation) if output.is_json() => {
                let object = json!({ "key": key.as_str(), "generation": generation.get(), "status": status });
                // The command's status says more than that this could not be told.
                let _ = output.object(&object).and_then(|()| output.flush()).map_err(|failure| failure.report());
            }
            Ok(_) => {}
            Err(error) => {
                complain(&format!(
                    "{}\n  the command has run, but that could not be announced: repeat \
                                   `gensync mark` until it succeeds",
                    crate::failure::explain(&error)
                ));
                announced = UNUSABLE;
            }
        }
    }
    Ok(if status == DONE { announced } else { status })
}

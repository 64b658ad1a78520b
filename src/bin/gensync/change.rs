//! Commands that change a table: `mark`, `clear`, `create`, `reset`, `rm`.

use std::io::{self, BufRead as _, IsTerminal as _, Write as _};

use gensync::{CacheKey, GenerationSynchronizer, SlotInfo, Table};
use serde_json::json;

use crate::arguments::{Clear, Confirmed, Create, Mark};
use crate::failure::{DONE, Failure, Outcome, complain};
use crate::keys::{Selection, by_label, matches};
use crate::list::no_such_key;
use crate::output::{Output, label, object, printable};
use crate::target::Target;

pub(crate) fn mark(target: &Target, options: &Mark, output: &mut Output) -> Outcome {
    change(target, &options.selection, options.create, output)
}

/// The same as `mark`: this process has no state that it could keep.
pub(crate) fn clear(target: &Target, options: &Clear, output: &mut Output) -> Outcome {
    change(target, &options.selection, false, output)
}

fn change(target: &Target, selection: &Selection, create: bool, output: &mut Output) -> Outcome {
    let (keys, globs) = (selection.keys()?, selection.globs()?);
    let table = if create { target.create(|options| options)? } else { target.write()? };
    let (mut changed, mut failures) = (Vec::new(), Vec::new());
    for key in keys {
        if !create && table.generation(&key)?.is_none() {
            failures.push(no_such_key(key.as_str()));
            continue;
        }
        changed.extend(mark_key(&table, &key)?);
    }
    for glob in &globs {
        let mut matching = table.clear_matching(|slot| matches(glob, slot))?;
        matching.sort_unstable_by(by_label);
        if matching.is_empty() && !selection.is_all() {
            failures.push(Failure::Negative(format!("no key matches '{}'", printable(glob.as_str().as_bytes()))));
        }
        changed.append(&mut matching);
    }
    // Whether it can be told or not, everything has been done by now.
    changed.iter().try_for_each(|slot| tell(slot, output))?;
    output.flush()?;
    match failures.pop() {
        None => Ok(DONE),
        Some(last) => {
            failures.iter().for_each(|failure| _ = failure.report());
            Err(last)
        }
    }
}

/// Announces a change of `key`, which is created if it is missing.
pub(crate) fn mark_key(table: &Table, key: &CacheKey) -> Outcome<Option<SlotInfo>> {
    let sync = GenerationSynchronizer::new(table, key)?;
    sync.mark_updated()?;
    // The check ends updates whose makers are dead.
    let _ = sync.is_expired();
    Ok(table.slot(key)?)
}

fn tell(slot: &SlotInfo, output: &mut Output) -> Outcome<()> {
    match output.is_json() {
        true => output.object(&object(slot)),
        false => output.line(&format!("{}  {}", label(slot), slot.generation())),
    }
}

pub(crate) fn create(target: &Target, options: &Create, output: &mut Output) -> Outcome {
    let key = options.key.key()?;
    let table = target.create(|table| table.mode(options.mode).capacity(options.capacity))?;
    GenerationSynchronizer::new(&table, &key)?;
    table.slot(&key)?.iter().try_for_each(|slot| tell(slot, output))?;
    Ok(DONE)
}

pub(crate) fn reset(target: &Target, options: &Confirmed, output: &mut Output) -> Outcome {
    let (table, path) = (target.write()?, target.path()?.display().to_string());
    let path = printable(path.as_bytes());
    confirm(options, &format!("Begin {path} anew, so that every process loads everything again?"))?;
    table.reset()?;
    let incarnation = format!("{:032x}", table.info().incarnation);
    match output.is_json() {
        true => output.object(&json!({ "table": path, "incarnation": incarnation }))?,
        false => output.line(&format!("{path} has begun anew, as incarnation {incarnation}"))?,
    }
    Ok(DONE)
}

pub(crate) fn rm(target: &Target, options: &Confirmed, output: &mut Output) -> Outcome {
    let (table, path) = (target.write()?, target.path()?.display().to_string());
    let path = printable(path.as_bytes());
    let scan = crate::processes::scan(&table);
    let users = scan.text();
    confirm(options, &format!("Remove {path}? Processes that have it mapped: {users}."))?;
    table.remove()?;
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

//! `ls` and `get`: keys as they are.

use std::cmp::Reverse;

use gensync::SlotInfo;

use crate::arguments::{Get, Ls, Order};
use crate::failure::{DONE, Failure, Outcome};
use crate::keys::chosen;
use crate::output::{ATTENTION, BAD, Cell, FAINT, GOOD, Output, label, left, object, right};
use crate::target::Target;

pub(crate) fn ls(target: &Target, options: &Ls, output: &mut Output) -> Outcome {
    let mut slots = chosen(&target.read()?, options.glob.as_ref());
    match options.sort {
        Order::Key => {}
        Order::Generation => slots.sort_by_key(|slot| Reverse(slot.generation())),
        Order::Updates => slots.sort_by_key(|slot| Reverse(slot.updates())),
    }
    if let Some(glob) = options.glob.as_ref().filter(|_| slots.is_empty()) {
        return Err(Failure::Negative(format!("no key matches '{glob}'")));
    }
    if output.is_json() {
        slots.iter().try_for_each(|slot| output.object(&object(slot)))?;
    } else {
        let rows: Vec<_> = slots.iter().map(row).collect();
        let columns = [left("KEY"), right("GENERATION"), right("UPDATES"), left("WAITERS"), left("PENDING")];
        output.table(&columns, &rows)?;
    }
    Ok(DONE)
}

fn row(slot: &SlotInfo) -> Vec<Cell> {
    let waiters = if slot.is_awaited() { Cell::styled(GOOD, "yes") } else { Cell::styled(FAINT, "-") };
    let pending = match slot.pending() {
        0 => Cell::styled(FAINT, "-"),
        count if slot.is_abandoned() => Cell::styled(BAD, format!("{count} abandoned")),
        count => Cell::styled(ATTENTION, count),
    };
    vec![Cell::new(label(slot)), Cell::new(slot.generation()), Cell::new(slot.updates()), waiters, pending]
}

pub(crate) fn get(target: &Target, options: &Get, output: &mut Output) -> Outcome {
    let key = options.key.key()?;
    let slot = target.read()?.slot(&key)?.ok_or_else(|| no_such_key(key.as_str()))?;
    if output.is_json() {
        let mut object = object(&slot);
        // The whole of it is known here.
        object["key"] = key.as_str().into();
        object["truncated"] = false.into();
        output.object(&object)?;
    } else {
        output.line(&slot.generation().to_string())?;
    }
    Ok(DONE)
}

/// What is said of a key that nobody has attached to.
pub(crate) fn no_such_key(key: &str) -> Failure {
    let key = crate::output::printable(key.as_bytes());
    Failure::Negative(format!(
        "no such key: {key}\n  no process has attached to it since the table was made; `gensync ls` shows the keys that there \
         are (other processes may put a domain in front), `gensync create` makes one"
    ))
}

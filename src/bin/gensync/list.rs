//! `ls` and `get`: keys as they are.

use std::cmp::Reverse;

use gensync::SlotInfo;

use crate::arguments::{Get, Ls, Order};
use crate::failure::{DONE, Failure, Outcome};
use crate::keys::{Choice, chosen, no_such_key};
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
    let (keys, digests) = options.keys()?;
    let table = target.read()?;
    let (mut found, mut failures) = (Vec::new(), Vec::new());
    for key in &keys {
        match table.slot(key)? {
            Some(slot) => found.push((Some(key), slot)),
            None => failures.push(no_such_key(&table, key.as_str())),
        }
    }
    for digest in digests {
        match table.slots().find(|slot| slot.digest() == *digest) {
            Some(slot) => found.push((None, slot)),
            None => failures.extend(Choice::Digest(*digest).nothing(&table)),
        }
    }
    for (key, slot) in &found {
        if output.is_json() {
            let mut object = object(slot);
            if let Some(key) = key {
                // The whole of it is known here.
                object["key"] = key.as_str().into();
                object["truncated"] = false.into();
            }
            output.object(&object)?;
        } else if keys.len() + digests.len() == 1 {
            output.line(&slot.generation().to_string())?;
        } else {
            output.line(&format!("{}  {}", label(slot), slot.generation()))?;
        }
    }
    output.flush()?;
    Failure::all(failures)
}

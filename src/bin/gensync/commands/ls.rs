//! `ls`: all keys as they are.

use std::cmp::Ordering;

use gensync::SlotInfo;

use crate::arguments::{Ls, Order};
use crate::failure::{DONE, Failure, Outcome};
use crate::keys::{by_label, chosen};
use crate::output::{ATTENTION, BAD, Cell, FAINT, GOOD, Output, label, left, object, right};
use crate::target::Target;

/// The widths of the columns where the list is printed as it is found, so that most cells fit.
const WIDTHS: [usize; 5] = [40, 16, 12, 7, 7];

pub(crate) fn ls(target: &Target, options: &Ls, output: &mut Output) -> Outcome {
    let table = target.read()?;
    let found = chosen(&table, options.glob.as_ref());
    let columns = [left("KEY"), right("GENERATION"), right("UPDATES"), left("WAITERS"), left("PENDING")];
    let mut count: u64 = 0;
    if options.unsorted {
        let is_json = output.is_json();
        if !is_json {
            output.heading(&columns, &WIDTHS)?;
        }
        for slot in found {
            match is_json {
                true => output.object(&object(&slot))?,
                false => output.row(&columns, &WIDTHS, &row(&slot))?,
            }
            count += 1;
            if count == 1 {
                // The rest may take a while.
                output.flush()?;
            }
        }
    } else {
        let mut slots: Vec<_> = found.collect();
        slots.sort_unstable_by(|one, other| {
            let order = match options.sort {
                Order::Key => Ordering::Equal,
                Order::Generation => other.generation().cmp(&one.generation()),
                Order::Updates => other.updates().cmp(&one.updates()),
            };
            order.then_with(|| by_label(one, other))
        });
        count = slots.len() as u64;
        match output.is_json() {
            true => slots.iter().try_for_each(|slot| output.object(&object(slot)))?,
            false if slots.is_empty() && options.glob.is_some() => {}
            false => output.table(&columns, slots.iter().map(row))?,
        }
    }
    match &options.glob {
        Some(glob) if count == 0 => Err(Failure::Negative(format!("no key matches '{glob}'"))),
        _ => Ok(DONE),
    }
}

fn row(slot: &SlotInfo) -> Vec<Cell> {
    let waiters = if slot.is_awaited() { Cell::styled(GOOD, "yes") } else { Cell::styled(FAINT, "-") };
    let pending = match slot.pending() {
        0 => Cell::styled(FAINT, "-"),
        count if slot.is_abandoned() => Cell::styled(BAD, format!("{count} abandoned")),
        count => Cell::styled(ATTENTION, count),
    };
    // The number of updates of a damaged key means nothing.
    let updates = if slot.is_damaged() { Cell::styled(BAD, "damaged") } else { Cell::new(slot.updates()) };
    vec![Cell::new(label(slot)), Cell::new(slot.generation()), updates, waiters, pending]
}

//! `mark` and `clear`, which are one: they differ in what the calling process keeps of its own state, and this process has none.

use gensync::{CacheKey, GenerationSynchronizer, SlotInfo, Table};

use crate::arguments::{Clear, Mark};
use crate::failure::{Failure, Outcome};
use crate::keys::{Selection, by_label, no_such_key};
use crate::notice::{reset_in_the_way, while_waiting};
use crate::output::Output;
use crate::target::Target;

pub(crate) fn mark(target: &Target, options: &Mark, output: &mut Output) -> Outcome {
    change(target, &options.selection, options.create, output)
}

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
            failures.push(no_such_key(&table, &key, selection.advice(&key)));
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
    changed.iter().try_for_each(|slot| output.generation(slot))?;
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

//! `create`: a table and its keys.

use std::os::unix::fs::MetadataExt as _;

use gensync::GenerationSynchronizer;
use nix::unistd::Uid;

use crate::arguments::Create;
use crate::commands::doctor::is_mount_point;
use crate::failure::{DONE, Failure, Outcome, complain};
use crate::notice::{reset_in_the_way, while_waiting};
use crate::output::Output;
use crate::printable::printable;
use crate::processes::name_of;
use crate::target::Target;

/// Mode and capacity of a new table, unless the command line gives others.
const MODE: u32 = 0o600;
const CAPACITY: u64 = 1024;
/// What the library makes of less.
const LEAST_CAPACITY: u64 = 16;

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
        if options.capacity.is_some_and(|capacity| capacity.next_power_of_two().max(LEAST_CAPACITY) != slots) {
            complain(&format!(
                "{shown}: the table was there already, with room for {slots} keys in its first segment; --capacity is for a new one"
            ));
        }
    }
    for key in &keys {
        GenerationSynchronizer::new(&table, key)?;
        table.slot(key)?.iter().try_for_each(|slot| output.generation(slot))?;
    }
    Ok(DONE)
}

//! `wait`: until one key changes.

use gensync::{ErrorKind, GenerationSynchronizer};
use serde_json::json;

use crate::arguments::Wait;
use crate::failure::{DONE, Failure, Outcome};
use crate::list::no_such_key;
use crate::output::{Output, printable};
use crate::target::Target;

pub(crate) fn wait(target: &Target, options: &Wait, output: &mut Output) -> Outcome {
    let key = options.key.key()?;
    let table = target.write_or_read(options.read_only)?;
    table.generation(&key)?.ok_or_else(|| no_such_key(key.as_str()))?;
    let sync = GenerationSynchronizer::new(&table, &key)?;
    let present = sync.sync_gen().map(|generation| generation.get());
    let is_old = options.seen.is_some_and(|seen| Some(seen) != present);
    let is_changed = is_old
        || match options.timeout {
            Some(limit) => sync.wait_timeout(limit).is_changed(),
            None => {
                sync.wait();
                true
            }
        };
    if !is_changed {
        let key = printable(key.as_str().as_bytes());
        let generation = present.map_or_else(String::new, |generation| format!(", and is still at {generation}"));
        return Err(Failure::Negative(format!("timed out: {key} has not changed{generation}")));
    }
    let generation = match sync.refresh() {
        Ok(generation) => Some(generation.get()),
        // Changed all the same: the table was begun anew, and nobody has attached to the key there yet.
        Err(error) if matches!(error.kind(), ErrorKind::KeyNotFound) => None,
        Err(error) => return Err(error.into()),
    };
    if output.is_json() {
        output.object(&json!({ "key": key.as_str(), "generation": generation, "changed": true }))?;
    } else if let Some(generation) = generation {
        output.line(&generation.to_string())?;
    }
    Ok(DONE)
}

//! `wait`: until one of some keys changes.

use gensync::{CacheKey, ErrorKind, GenerationSynchronizer, WaitSet};
use serde_json::json;

use crate::arguments::Wait;
use crate::failure::{DONE, Failure, NEGATIVE, Outcome};
use crate::hangup::{busy, end_with_the_listener};
use crate::keys::no_such_key;
use crate::output::Output;
use crate::printable::printable;
use crate::target::Target;

pub(crate) fn wait(target: &Target, options: &Wait, output: &mut Output) -> Outcome {
    // Each has its place in the order of --seen, also if it shares a generation with another one.
    let keys = options.keys.in_order()?;
    if !options.seen.is_empty() && options.seen.len() != keys.len() {
        return Err(Failure::Usage(format!(
            "--seen is given {} times for {} keys; give it once for each, in their order",
            options.seen.len(),
            keys.len()
        )));
    }
    let table = target.write_or_read(options.read_only)?;
    let mut missing = Vec::new();
    for key in &keys {
        if table.generation(key)?.is_none() {
            missing.push(no_such_key(&table, key, options.keys.advice(key)));
        }
    }
    Failure::all(missing)?;
    let syncs = keys.iter().map(|key| GenerationSynchronizer::new(&table, key)).collect::<Result<Vec<_>, _>>()?;
    let present: Vec<_> = syncs.iter().map(|sync| sync.sync_gen().map(|generation| generation.get())).collect();
    let mut changed: Vec<_> = (0..options.seen.len()).filter(|i| Some(options.seen[*i]) != present[*i]).collect();
    if changed.is_empty() {
        // If the listener goes away, nothing has changed, and there is no reader for an answer.
        end_with_the_listener(NEGATIVE);
        let set: WaitSet<'_> = syncs.iter().collect();
        changed = match (options.timeout, &syncs[..]) {
            // A wait for one key is not woken by updates of others.
            (Some(limit), [one]) => one.wait_timeout(limit).is_changed().then_some(0).into_iter().collect(),
            (None, [one]) => {
                one.wait();
                vec![0]
            }
            (Some(limit), _) => set.wait_timeout(limit),
            (None, _) => set.wait(),
        };
    }
    let _busy = busy();
    if changed.is_empty() {
        return timed_out(&keys, &present, output);
    }
    for i in changed {
        let generation = match syncs[i].refresh() {
            Ok(generation) => Some(generation.get()),
            // This is a change, too: the table was begun anew, and no process has attached to the key there yet.
            Err(error) if matches!(error.kind(), ErrorKind::KeyNotFound) => None,
            Err(error) => return Err(error.into()),
        };
        if output.is_json() {
            output.object(&object(&keys[i], generation, true))?;
        } else if keys.len() > 1 {
            let generation = generation.map_or_else(|| "-".to_owned(), |generation| generation.to_string());
            output.line(&format!("{}  {generation}", printable(keys[i].as_str().as_bytes())))?;
        } else if let Some(generation) = generation {
            output.line(&generation.to_string())?;
        }
    }
    output.flush()?;
    Ok(DONE)
}

fn timed_out(keys: &[CacheKey], present: &[Option<u64>], output: &mut Output) -> Outcome {
    if output.is_json() {
        keys.iter().zip(present).try_for_each(|(key, generation)| output.object(&object(key, *generation, false)))?;
        output.flush()?;
    }
    let texts = keys.iter().zip(present).map(|(key, generation)| {
        let generation = generation.map_or_else(String::new, |generation| format!(", and is still at {generation}"));
        format!("timed out: {} has not changed{generation}", printable(key.as_str().as_bytes()))
    });
    Err(Failure::Negative(texts.collect::<Vec<_>>().join("\n  ")))
}

fn object(key: &CacheKey, generation: Option<u64>, changed: bool) -> serde_json::Value {
    json!({ "key": key.as_str(), "generation": generation, "changed": changed, "timed_out": !changed })
}

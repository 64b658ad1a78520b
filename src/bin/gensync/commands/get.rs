//! `get`: some keys as they are.

use crate::arguments::Get;
use crate::failure::{Failure, Outcome};
use crate::keys::{Choice, no_such_key};
use crate::output::{Output, object};
use crate::target::Target;

pub(crate) fn get(target: &Target, options: &Get, output: &mut Output) -> Outcome {
    let (keys, digests) = options.keys()?;
    let table = target.read()?;
    let (mut found, mut failures) = (Vec::new(), Vec::new());
    for key in &keys {
        match table.slot(key)? {
            Some(slot) => found.push(slot),
            None => failures.push(no_such_key(&table, key, options.advice(key))),
        }
    }
    for digest in digests {
        match table.slots().find(|slot| slot.digest() == *digest) {
            Some(slot) => found.push(slot),
            None => failures.extend(Choice::Digest(*digest).nothing(&table)),
        }
    }
    for slot in &found {
        if output.is_json() {
            output.object(&object(slot))?;
        } else if keys.len() + digests.len() == 1 {
            output.line(&slot.generation().to_string())?;
        } else {
            output.generation(slot)?;
        }
    }
    output.flush()?;
    Failure::all(failures)
}

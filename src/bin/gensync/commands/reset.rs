//! `reset`: a table begins anew.

use gensync::{Error, ErrorKind, TableState};
use serde_json::json;

use crate::arguments::Confirmed;
use crate::confirm::confirm;
use crate::failure::{DONE, Outcome};
use crate::notice::{reset_in_the_way, updates_in_the_way, while_waiting};
use crate::output::Output;
use crate::printable::printable;
use crate::target::Target;

pub(crate) fn reset(target: &Target, options: &Confirmed, output: &mut Output) -> Outcome {
    let file = target.path()?;
    let table = while_waiting(reset_in_the_way, || target.write())?;
    let path = printable(file.as_os_str().as_encoded_bytes());
    confirm(options, &format!("Begin {path} anew, so that every process loads everything again?"))?;
    let before = table.info().incarnation;
    let result = while_waiting(|| updates_in_the_way(&file), || table.reset());
    let (incarnation, by) = match result {
        Ok(()) => (table.info().incarnation, ""),
        // Another process's reset that ended after this one had begun has done all that was asked for.
        Err(error) => match target.read().map(|table| table.info()) {
            Ok(info) if info.incarnation != before && info.state == TableState::Live => {
                (info.incarnation, ": another process has finished the reset")
            }
            _ => return Err(error.into()),
        },
    };
    let in_place = incarnation == before;
    let incarnation = format!("{incarnation:032x}");
    let said = match table.replaceable() {
        Err(error) if in_place => format!("{path}: every key has expired, and stays, as {}", reason(&error)),
        _ => format!("{path} has begun anew, as incarnation {incarnation}{by}"),
    };
    match output.is_json() {
        true => output.object(&json!({
            "table": path,
            "incarnation": incarnation,
            "by_another": !by.is_empty(),
            "in_place": in_place,
        }))?,
        false => output.line(&said)?,
    }
    Ok(DONE)
}

/// Why a table cannot be replaced.
fn reason(error: &Error) -> String {
    match error.kind() {
        ErrorKind::NotReplaceable { reason, .. } => {
            format!("the file cannot be replaced: {}", printable(reason.as_bytes()))
        }
        _ => printable(error.to_string().as_bytes()),
    }
}

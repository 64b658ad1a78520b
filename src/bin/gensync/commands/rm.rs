//! `rm`: removes a table.

use serde_json::json;

use crate::arguments::Confirmed;
use crate::confirm::confirm;
use crate::failure::{DONE, Outcome, complain};
use crate::notice::{reset_in_the_way, updates_in_the_way, while_waiting};
use crate::output::Output;
use crate::printable::printable;
use crate::target::Target;

pub(crate) fn rm(target: &Target, options: &Confirmed, output: &mut Output) -> Outcome {
    let file = target.path()?;
    let table = while_waiting(reset_in_the_way, || target.write())?;
    let path = printable(file.as_os_str().as_encoded_bytes());
    let scan = crate::processes::scan(&table);
    let users = scan.text();
    confirm(options, &format!("Remove {path}? Processes that have it mapped: {users}."))?;
    while_waiting(|| updates_in_the_way(&file), || table.remove())?;
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

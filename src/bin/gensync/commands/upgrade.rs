//! `upgrade`: replaces a table of an older file format by one of the present.

use std::path::Path;

use gensync::Table;
use serde_json::json;

use crate::arguments::{Confirmed, Upgrade};
use crate::confirm::confirm;
use crate::failure::{DONE, Failure, Outcome, complain, older_format};
use crate::notice::{updates_in_the_way, while_waiting};
use crate::output::Output;
use crate::printable::printable;
use crate::processes::{Scan, scan_path};
use crate::target::Target;

pub(crate) fn upgrade(target: &Target, options: &Upgrade, output: &mut Output) -> Outcome {
    let target = &target.or_at(options.file.as_deref())?;
    let file = target.path()?;
    let path = printable(file.as_os_str().as_encoded_bytes());
    let found = target.inspect();
    let older = match &found {
        Err(Failure::Table(error)) => older_format(error),
        _ => None,
    };
    let (table, replaced) = match older {
        Some((from, to)) => {
            let scan = scan_path(&file);
            let question = format!(
                "Replace {path}, of version {from}, by a table of version {to}, so that every process loads everything again? \
                 Those of the older version must be restarted. Processes that have it mapped: {}.",
                scan.text()
            );
            (replace(target, &file, &options.confirmed, &question)?, Some((from, scan)))
        }
        None => (found?, None),
    };
    let info = table.info();
    let (to, incarnation) = (info.layout_version, format!("{:032x}", info.incarnation));
    if let Some((_, scan)) = &replaced
        && (!scan.processes.is_empty() || !scan.is_complete())
    {
        complain(&format!(
            "processes that had the table mapped: {}; restart those of the older version: for them everything is expired, and \
             their updates fail; `gensync ps` shows those that are left",
            scan.text()
        ));
    }
    if output.is_json() {
        let from = replaced.as_ref().map_or(to, |(from, _)| *from);
        let processes = replaced.as_ref().map(|(_, scan): &(u32, Scan)| scan.processes.len());
        output.object(&json!({
            "table": path,
            "from_version": from,
            "to_version": to,
            "upgraded": replaced.is_some(),
            "incarnation": incarnation,
            "processes": processes,
        }))?;
    } else {
        output.line(&match replaced {
            Some((from, _)) => {
                format!("{path}: version {from} is replaced by version {to}, as incarnation {incarnation}")
            }
            None => format!("{path} is of version {to} already: nothing was changed"),
        })?;
    }
    Ok(DONE)
}

/// The table that has taken the place of the older one in `file`. Another process may have replaced it meanwhile, which is as good.
fn replace(target: &Target, file: &Path, confirmed: &Confirmed, question: &str) -> Outcome<Table> {
    confirm(confirmed, question)?;
    let replace = || target.options().replace_older(true).open(file);
    Ok(while_waiting(|| updates_in_the_way(file), replace)?)
}

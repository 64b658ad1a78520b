//! `ps`: which processes have a table mapped.

use gensync::ErrorKind;
use serde_json::json;

use crate::failure::{DONE, Failure, NEGATIVE, Outcome, complain};
use crate::output::{ATTENTION, BAD, Cell, Output, PLAIN, left, right};
use crate::processes::{Blind, Mapped, Process, scan, scan_path};
use crate::target::Target;
use crate::time::{local, seconds};

pub(crate) fn ps(target: &Target, output: &mut Output) -> Outcome {
    // Even if the table is gone, or is one of another version, there may be processes that have it mapped.
    let scan = match target.inspect() {
        Ok(table) => scan(&table),
        Err(failure @ (Failure::Usage(_) | Failure::Output(_))) => return Err(failure),
        Err(failure) => {
            let scan = scan_path(&target.path()?);
            if scan.processes.is_empty() && scan.blind.is_none() {
                return Err(failure);
            }
            if matches!(&failure, Failure::Table(error) if matches!(error.kind(), ErrorKind::LayoutVersion { .. })) {
                failure.report();
            }
            scan
        }
    };
    if output.is_json() {
        for process in &scan.processes {
            output.object(&json!({
                "pid": process.pid,
                "user": process.user,
                "command": process.command,
                "since": process.since.map(seconds),
                "deleted": !matches!(process.mapped, Mapped::Table | Mapped::Elsewhere),
                "retired": match process.mapped {
                    Mapped::Unknown => None,
                    mapped => Some(matches!(mapped, Mapped::Retired | Mapped::Older)),
                },
                "older_version": process.mapped == Mapped::Older,
                "elsewhere": process.mapped == Mapped::Elsewhere,
            }))?;
        }
    } else if scan.blind != Some(Blind::NoProc) {
        let columns = [right("PID"), left("USER"), left("SINCE"), left("TABLE"), left("COMMAND")];
        output.table(&columns, scan.processes.iter().map(row))?;
    }
    output.flush()?;
    if let Some(blind) = &scan.blind {
        let (found, advice) = blind.text();
        let text = format!("{found}\n  {advice}");
        return match blind {
            Blind::NoProc => Err(Failure::Unusable(text)),
            Blind::Hidden(_) => {
                complain(&text);
                Ok(NEGATIVE)
            }
        };
    }
    if !scan.is_complete() {
        complain(&format!(
            "the processes of other users, {} in number, cannot be inspected; root sees all (in a container, with CAP_SYS_PTRACE)",
            scan.hidden
        ));
    }
    Ok(DONE)
}

fn row(process: &Process) -> Vec<Cell> {
    let style = match process.mapped {
        Mapped::Table | Mapped::Retired => PLAIN,
        Mapped::Deleted | Mapped::Unknown | Mapped::Older => BAD,
        Mapped::Elsewhere => ATTENTION,
    };
    let since = process.since.map_or_else(|| "?".to_owned(), local);
    vec![
        Cell::new(process.pid),
        Cell::new(&process.user),
        Cell::new(since),
        Cell::styled(style, process.mapped.text()),
        Cell::new(&process.command),
    ]
}

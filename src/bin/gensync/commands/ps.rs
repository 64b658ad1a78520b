//! `ps`: which processes have a table mapped.

use serde_json::json;

use crate::failure::{DONE, Failure, NEGATIVE, Outcome, complain};
use crate::output::{ATTENTION, BAD, Cell, Output, PLAIN, left, right};
use crate::processes::{Blind, Mapped, Process, scan, scan_path};
use crate::target::Target;
use crate::time::{local, seconds};

pub(crate) fn ps(target: &Target, output: &mut Output) -> Outcome {
    // Even if the table is gone, there may be processes that have not noticed it.
    let scan = match target.inspect() {
        Ok(table) => scan(&table),
        Err(failure @ (Failure::Usage(_) | Failure::Output(_))) => return Err(failure),
        Err(failure) => {
            let scan = scan_path(&target.path()?);
            if scan.processes.is_empty() && scan.blind.is_none() {
                return Err(failure);
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
                "deleted": matches!(process.mapped, Mapped::Deleted | Mapped::Unknown | Mapped::Retired),
                "retired": match process.mapped {
                    Mapped::Unknown => None,
                    mapped => Some(mapped == Mapped::Retired),
                },
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
        Mapped::Deleted | Mapped::Unknown => BAD,
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

//! `doctor`: checks for everything that goes wrong in practice, each with advice.

mod replaceable;
mod surroundings;
mod table;

use gensync::ErrorKind;
pub(crate) use replaceable::is_mount_point;
use serde_json::json;

use crate::failure::{DONE, Failure, NEGATIVE, Outcome, explain};
use crate::output::{ATTENTION, BAD, FAINT, GOOD, Output};
use crate::printable::printable;
use crate::processes::{Mapped, Scan, scan, scan_path};
use crate::target::Target;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Good,
    /// Worth knowing.
    Note,
    /// Needs a person.
    Problem,
}

/// What one check found.
#[derive(Debug)]
struct Finding {
    check: &'static str,
    verdict: Verdict,
    found: String,
    advice: Option<String>,
}

/// How many names are listed at most.
const NAMED: usize = 10;

/// The first few of names that may be a million, and the number of the others.
fn few(names: impl IntoIterator<Item = String>) -> String {
    let mut names = names.into_iter();
    let first: Vec<_> = names.by_ref().take(NAMED).collect();
    match names.count() {
        0 => first.join(", "),
        more => format!("{}, and {more} more", first.join(", ")),
    }
}

impl Finding {
    fn good(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Good, found: found.into(), advice: None }
    }

    fn note(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Note, found: found.into(), advice: Some(advice.into()) }
    }

    fn problem(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Problem, found: found.into(), advice: Some(advice.into()) }
    }
}

pub(crate) fn doctor(target: &Target, output: &mut Output) -> Outcome {
    let path = match target.path() {
        Ok(path) => path,
        // The folder that --app leads to cannot be used safely.
        Err(Failure::Table(error)) if !matches!(error.kind(), ErrorKind::InvalidInput { .. }) => {
            let found = printable(error.to_string().as_bytes());
            let advice = "in a folder of another user, others could forge generations";
            return report(&[Finding::problem("folder", found, advice)], output);
        }
        Err(failure) => return Err(failure),
    };
    let mut findings = Vec::new();
    let scan = match target.inspect() {
        Ok(table) => {
            let scan = scan(&table);
            let replaceable = replaceable::check(&table, &path);
            findings.extend(table::checks(&table, replaceable.as_ref()));
            findings.extend(replaceable);
            findings.extend(surroundings::checks(&path, table.stats().bytes));
            scan
        }
        // Its processes may use it, although this program cannot: what is around it is checked nevertheless.
        Err(Failure::Table(error)) if matches!(error.kind(), ErrorKind::LayoutVersion { .. }) => {
            findings.push(table::of_other_version(&error, &path));
            findings.extend(table::updates_elsewhere(&path));
            findings.extend(replaceable::check_mount(&path));
            let size = std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
            findings.extend(surroundings::checks(&path, size));
            scan_path(&path)
        }
        Err(Failure::Table(error)) => {
            let text = explain(&error);
            let (found, advice) = text.split_once('\n').unwrap_or((&text, "correct that, then ask again"));
            findings.push(Finding::problem("table", found, advice.trim()));
            scan_path(&path)
        }
        Err(failure) => return Err(failure),
    };
    findings.push(surroundings::twins(&path));
    findings.extend(processes(&scan));
    report(&findings, output)
}

fn processes(scan: &Scan) -> Vec<Finding> {
    const CHECK: &str = "processes";
    let named = |mapped: Mapped| {
        let names = scan.processes.iter().filter(|process| process.mapped == mapped);
        names.map(|process| format!("{} ({}, {})", process.pid, process.user, process.command)).collect::<Vec<_>>()
    };
    let (deleted, unknown) = (named(Mapped::Deleted), named(Mapped::Unknown));
    let (retired, older, elsewhere) = (named(Mapped::Retired), named(Mapped::Older), named(Mapped::Elsewhere));
    let mut findings = Vec::new();
    if !deleted.is_empty() {
        findings.push(Finding::problem(
            CHECK,
            format!(
                "still have a file mapped that was deleted from here, by hand or by a clean-up, without being retired: {}",
                deleted.join("; ")
            ),
            "they and the users of the file that is here now do not hear of each other: each moves on within about a second once \
             it checks a key; restart those that stay. Find out what deletes the file (a unit's RuntimeDirectory, RemoveIPC, \
             tmpfiles), and use `gensync reset` or `gensync rm` rather than deleting it",
        ));
    }
    if !unknown.is_empty() {
        findings.push(Finding::problem(
            CHECK,
            format!(
                "still have a file mapped that was here before; whether a reset has retired it cannot be told: {}",
                unknown.join("; ")
            ),
            "run this as root, which can find out; if it was deleted instead, restart those that stay",
        ));
    }
    if !retired.is_empty() {
        findings.push(Finding::note(
            CHECK,
            format!("still have a table mapped that was reset or removed: {}", retired.join("; ")),
            "nothing to do: each moves on when it next checks a key, and one that never does, such as the parent of the \
             processes that do the work, needs none",
        ));
    }
    if !older.is_empty() {
        findings.push(Finding::problem(
            CHECK,
            format!("still have a table of an older version mapped, which was upgraded since: {}", older.join("; ")),
            "restart them with the version of gensync that the others have: they take everything for expired, and their updates \
             fail",
        ));
    }
    if !elsewhere.is_empty() {
        findings.push(Finding::problem(
            CHECK,
            format!("have another file at the same path: {}", elsewhere.join("; ")),
            "they see another /dev/shm or /tmp (a container, PrivateTmp, PrivateMounts) and hear nothing of the others: give \
             all of them one folder",
        ));
    }
    if let Some(blind) = &scan.blind {
        let (found, advice) = blind.text();
        findings.push(Finding::problem(CHECK, found, advice));
        return findings;
    }
    let mapped = match (scan.count(&[Mapped::Table]), scan.is_complete()) {
        (count, true) => format!("{count} have it mapped"),
        (0, false) => "which have it mapped cannot be told".to_owned(),
        (count, false) => format!("at least {count} have it mapped"),
    };
    findings.push(match scan.hidden {
        0 => Finding::good(CHECK, mapped),
        hidden if scan.may_look => Finding::good(CHECK, format!("{mapped}; {hidden} cannot be inspected")),
        hidden => {
            let found = format!("{mapped}; {hidden} of other users cannot be inspected");
            Finding::note(CHECK, found, "run this as root to see all; in a container, with CAP_SYS_PTRACE")
        }
    });
    findings
}

fn report(findings: &[Finding], output: &mut Output) -> Outcome {
    for Finding { check, verdict, found, advice } in findings {
        let (word, style) = match verdict {
            Verdict::Good => ("ok", GOOD),
            Verdict::Note => ("note", ATTENTION),
            Verdict::Problem => ("problem", BAD),
        };
        if output.is_json() {
            output.object(&json!({ "check": check, "verdict": word, "found": found, "advice": advice }))?;
            continue;
        }
        let word = output.styled(style, &format!("{word:<7}"));
        output.line(&format!("{word}  {check:<11}  {found}"))?;
        if let Some(advice) = advice {
            let advice = output.styled(FAINT, advice);
            output.line(&format!("{:22}{advice}", ""))?;
        }
    }
    let needs_person = findings.iter().any(|finding| finding.verdict == Verdict::Problem);
    Ok(if needs_person { NEGATIVE } else { DONE })
}

//! Checks of the table itself: its format, its state, its updates.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use gensync::{Error, SlotInfo, Stats, Table, TableState};

use super::{Finding, few};
use crate::failure::older_format;
use crate::filesystem::bytes;
use crate::output::short_label;
use crate::printable::printable;
use crate::processes::holders;

/// How long to wait before the second look. An update that was just abandoned on purpose, or finished, looks like one of a dead
/// process for less time than this.
const SECOND_LOOK: Duration = Duration::from_millis(20);

const LAYOUT: &str = "layout";
const UPDATES: &str = "updates";

/// `obstacle` is what prevents the table from being reset from here, if anything does.
pub(super) fn checks(table: &Table, obstacle: Option<&Finding>) -> Vec<Finding> {
    let info = table.info();
    let mut findings = vec![Finding::good(LAYOUT, format!("version {}", info.layout_version))];
    findings.push(match info.state {
        TableState::Live => Finding::good("state", "live"),
        _ => Finding::problem(
            "state",
            "a reset was broken off: the table is retired, and nothing has taken its place",
            match obstacle {
                None => "its processes finish that when they next use it; `gensync reset --yes` does it now",
                Some(_) => {
                    "its processes finish that when they next use it, if they may replace the file; see 'replacement'"
                }
            },
        ),
    });
    if info.is_of_earlier_boot {
        findings.push(Finding::note(
            "boot",
            "last opened for writing in another boot, or where another boot id is seen, as in another container",
            "nothing to do: a process that opens it for writing while no other has it open moves all keys on",
        ));
    }
    findings.push(updates(table));
    findings.extend(lost_texts(&table.stats(), obstacle));
    findings.extend(damage(table, obstacle));
    findings
}

/// What is known of a table whose file format this version does not have.
pub(super) fn of_other_version(error: &Error, path: &Path) -> Finding {
    let path = printable(path.as_os_str().as_encoded_bytes());
    match older_format(error) {
        Some((found, expected)) => Finding::problem(
            LAYOUT,
            format!("version {found}, expected {expected}: made by an older version of gensync"),
            format!(
                "upgrade it with `gensync upgrade {path}`, as soon as its processes can be restarted: from then on, everything is \
                 expired for those of the older version, and their updates fail; `gensync ps` lists them"
            ),
        ),
        None => Finding::problem(
            LAYOUT,
            printable(error.kind().to_string().as_bytes()),
            "look at it with a gensync of the version that its processes have",
        ),
    }
}

/// Texts that belong to no key, where they take much of the room.
fn lost_texts(stats: &Stats, obstacle: Option<&Finding>) -> Option<Finding> {
    /// What is not worth a note, however small the table.
    const LITTLE: u64 = 64 << 10;
    let Stats { text_bytes, lost_bytes, .. } = *stats;
    (lost_bytes > LITTLE && lost_bytes > text_bytes / 10).then(|| {
        Finding::note(
            "texts",
            format!(
                "{} of {} of the keys' texts belong to no key: processes have left them that were killed while they created \
                 keys, or created them at the same time as others",
                bytes(lost_bytes),
                bytes(text_bytes)
            ),
            match obstacle {
                None => "`gensync reset --yes` frees them, at a quiet time: every process then loads everything again",
                Some(_) => "a reset frees them, where it can be made (see 'replacement')",
            },
        )
    })
}

/// Keys with a generation that gensync did not write, or without a text.
fn damage(table: &Table, obstacle: Option<&Finding>) -> Option<Finding> {
    let damaged = few(table.slots().filter(SlotInfo::is_damaged).map(|slot| short_label(&slot)));
    let advice = match obstacle {
        None => "`gensync reset --yes` cures that; check which users may write to the file",
        Some(_) => {
            "a reset cures that, where it can be made (see 'replacement'); check which users may write to the file"
        }
    };
    (!damaged.is_empty()).then(|| {
        Finding::problem(
            "damage",
            format!("generations that cannot have been reached by updates, or keys without a text: {damaged}"),
            advice,
        )
    })
}

/// Updates in flight in a table of another version, as far as their locks tell.
pub(super) fn updates_elsewhere(path: &Path) -> Option<Finding> {
    let makers = holders(&fs::metadata(path).ok()?);
    let found = || format!("in flight; made by {}", makers.join("; "));
    (!makers.is_empty()).then(|| Finding::note(UPDATES, found(), "an upgrade waits until they have ended"))
}

fn updates(table: &Table) -> Finding {
    let abandoned = || table.slots().filter(SlotInfo::is_abandoned).map(|slot| (slot.digest(), short_label(&slot)));
    let mut suspects: Vec<_> = abandoned().collect();
    if !suspects.is_empty() {
        sleep(SECOND_LOOK);
        let still: HashSet<_> = abandoned().map(|(digest, _)| digest).collect();
        suspects.retain(|(digest, _)| still.contains(digest));
    }
    if !suspects.is_empty() {
        let keys = few(suspects.into_iter().map(|(_, label)| label));
        return Finding::problem(
            UPDATES,
            format!("pending, but their makers are dead: {keys}"),
            "a process that may write announces them at its next check; no such process seems to check: \
             `gensync mark KEY` announces them now",
        );
    }
    let pending = few(table.slots().filter(|slot| slot.pending() > 0).map(|slot| short_label(&slot)));
    if pending.is_empty() {
        return Finding::good(UPDATES, "none pending");
    }
    let inode = table.path().and_then(|path| fs::metadata(path).ok());
    let makers: Vec<_> = inode.map(|file| holders(&file)).unwrap_or_default();
    let makers = if makers.is_empty() { "processes that cannot be seen".to_owned() } else { makers.join("; ") };
    Finding::note(
        UPDATES,
        format!("in flight: {pending}; made by {makers}"),
        "one that takes longer than half a minute has the others load again and again: see whether its process hangs",
    )
}

//! Checks of the table itself: its format, its state, its updates.

use std::collections::HashSet;
use std::fs;
use std::thread::sleep;
use std::time::Duration;

use gensync::{SlotInfo, Table, TableState};

use super::{Finding, few};
use crate::output::label;
use crate::processes::holders;

/// How long to wait before the second look. An update that was just abandoned on purpose, or finished, looks like one of a dead
/// process for less time than this.
const SECOND_LOOK: Duration = Duration::from_millis(20);

/// `obstacle` is what prevents the table from being reset from here, if anything does.
pub(super) fn checks(table: &Table, obstacle: Option<&Finding>) -> Vec<Finding> {
    let info = table.info();
    let mut findings = vec![Finding::good("layout", format!("version {}", info.layout_version))];
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
    findings.extend(damage(table, obstacle));
    findings
}

/// Keys with a generation that gensync did not write.
fn damage(table: &Table, obstacle: Option<&Finding>) -> Option<Finding> {
    let damaged = few(table.slots().filter(SlotInfo::is_damaged).map(|slot| label(&slot)));
    let advice = match obstacle {
        None => "`gensync reset --yes` cures that; check which users may write to the file",
        Some(_) => {
            "a reset cures that, where it can be made (see 'replacement'); check which users may write to the file"
        }
    };
    (!damaged.is_empty()).then(|| {
        Finding::problem("damage", format!("generations that cannot have been reached by updates: {damaged}"), advice)
    })
}

fn updates(table: &Table) -> Finding {
    const CHECK: &str = "updates";
    let abandoned = || table.slots().filter(SlotInfo::is_abandoned).map(|slot| (slot.digest(), label(&slot)));
    let mut suspects: Vec<_> = abandoned().collect();
    if !suspects.is_empty() {
        sleep(SECOND_LOOK);
        let still: HashSet<_> = abandoned().map(|(digest, _)| digest).collect();
        suspects.retain(|(digest, _)| still.contains(digest));
    }
    if !suspects.is_empty() {
        let keys = few(suspects.into_iter().map(|(_, label)| label));
        return Finding::problem(
            CHECK,
            format!("pending, but their makers are dead: {keys}"),
            "a process that may write announces them at its next check; no such process seems to check: \
             `gensync mark KEY` announces them now",
        );
    }
    let pending = few(table.slots().filter(|slot| slot.pending() > 0).map(|slot| label(&slot)));
    if pending.is_empty() {
        return Finding::good(CHECK, "none pending");
    }
    let inode = table.path().and_then(|path| fs::metadata(path).ok());
    let makers: Vec<_> = inode.map(|file| holders(&file)).unwrap_or_default();
    let makers = if makers.is_empty() { "processes that cannot be seen".to_owned() } else { makers.join("; ") };
    Finding::note(
        CHECK,
        format!("in flight: {pending}; made by {makers}"),
        "one that takes longer than half a minute has the others load again and again: see whether its process hangs",
    )
}

//! Checks of the table itself: its format, its state, its updates.

use std::collections::HashSet;
use std::fs;
use std::thread::sleep;
use std::time::Duration;

use gensync::{SlotInfo, Table, TableState};

use super::Finding;
use crate::output::label;
use crate::processes::holders;

/// More than an update that was just given up, or made, takes to be told from an abandoned one.
const SECOND_LOOK: Duration = Duration::from_millis(20);

pub(super) fn checks(table: &Table) -> Vec<Finding> {
    let info = table.info();
    let mut findings = vec![Finding::good("layout", format!("version {}", info.layout_version))];
    findings.push(match info.state {
        TableState::Live => Finding::good("state", "live"),
        _ => Finding::problem(
            "state",
            "a reset was broken off: the table is retired, and nothing has taken its place",
            "its processes finish that when they next use it; `gensync reset --yes` does it now",
        ),
    });
    if info.is_of_earlier_boot {
        findings.push(Finding::note(
            "boot",
            "nobody has opened the table for writing since the machine was started",
            "nothing to do: whoever does moves all keys on",
        ));
    }
    findings.push(updates(table));
    findings
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
        let keys: Vec<_> = suspects.into_iter().map(|(_, label)| label).collect();
        return Finding::problem(
            CHECK,
            format!("pending, but their makers are dead: {}", keys.join(", ")),
            "a process that may write announces them at its next check; no such process seems to check: \
             `gensync mark KEY` announces them now",
        );
    }
    let pending: Vec<_> = table.slots().filter(|slot| slot.pending() > 0).map(|slot| label(&slot)).collect();
    if pending.is_empty() {
        return Finding::good(CHECK, "none pending");
    }
    let inode = table.path().and_then(|path| fs::metadata(path).ok());
    let makers: Vec<_> = inode.map(|file| holders(&file)).unwrap_or_default();
    let makers = if makers.is_empty() { "processes that cannot be seen".to_owned() } else { makers.join("; ") };
    Finding::note(
        CHECK,
        format!("in flight: {}; made by {makers}", pending.join(", ")),
        "one that takes longer than half a minute has the others load again and again: see whether its process hangs",
    )
}

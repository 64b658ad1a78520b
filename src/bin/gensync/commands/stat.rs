//! `stat`: a table as a whole.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use gensync::{Stats, TableInfo, TableState};
use serde_json::json;

use crate::failure::{DONE, Outcome};
use crate::filesystem;
use crate::output::{BAD, HEADING, Output, PLAIN};
use crate::printable::printable;
use crate::processes::name_of;
use crate::target::Target;
use crate::time::{local, seconds};

/// How wide a full segment's bar is.
const BAR: usize = 20;

pub(crate) fn stat(target: &Target, output: &mut Output) -> Outcome {
    let (path, table) = (target.path()?, target.inspect()?);
    let (stats, info, kind) = (table.stats(), table.info(), filesystem::kind(&path));
    let (pending, waiters) = table.slots().fold((0, 0), |(pending, waiters), slot| {
        (pending + u64::from(slot.pending() > 0), waiters + u64::from(slot.is_awaited()))
    });
    let spare = spare(&path, &stats);
    if output.is_json() {
        let occupancy: Vec<_> =
            stats.occupancy.iter().map(|segment| json!({ "slots": segment.slots, "keys": segment.keys })).collect();
        output.object(&json!({
            "table": path.display().to_string(),
            "file_system": kind,
            "state": state(info.state),
            "layout_version": info.layout_version,
            "incarnation": format!("{:032x}", info.incarnation),
            "created": seconds(info.created),
            "floor": info.floor,
            "boot": boot(info.boot),
            "earlier_boot": info.is_of_earlier_boot,
            "bytes": stats.bytes,
            "spare_bytes": spare,
            "text_bytes": stats.text_bytes,
            "lost_bytes": stats.lost_bytes,
            "keys": stats.keys,
            "capacity": stats.capacity,
            "segments": stats.segments,
            "occupancy": occupancy,
            "longest_probe": stats.longest_probe,
            "keys_pending": pending,
            "keys_waiting": waiters,
        }))?;
        return Ok(DONE);
    }
    let mut line =
        |name: &str, text: &str| output.line(&format!("{}  {text}", output.styled(HEADING, &format!("{name:<14}"))));
    line("table", &printable(path.display().to_string().as_bytes()))?;
    if let Ok(metadata) = std::fs::metadata(&path) {
        let user = name_of(metadata.uid());
        line("file", &format!("{kind}, mode {}, of {user}", filesystem::mode(&metadata).0))?;
    }
    line("size", &format!("{} ({} bytes)", filesystem::bytes(stats.bytes), stats.bytes))?;
    if spare > 0 {
        let spare = filesystem::bytes(spare);
        line(
            "",
            &format!("the file has {spare} more than that: room for a growth that was begun, which the next one uses"),
        )?;
    }
    line("layout", &format!("version {}", info.layout_version))?;
    line("incarnation", &format!("{:032x}", info.incarnation))?;
    line("created", &local(info.created))?;
    line("boot", &boot_text(&info))?;
    line("floor", &info.floor.to_string())?;
    line(
        "keys",
        &format!("{} of {} slots; {pending} with pending updates, {waiters} waited for", stats.keys, stats.capacity),
    )?;
    for text in segments(&stats) {
        line("", &text)?;
    }
    let groups = if stats.longest_probe == 1 { "group" } else { "groups" };
    line("longest probe", &format!("{} {groups} of 16 slots", stats.longest_probe))?;
    let lost = match stats.lost_bytes {
        0 => String::new(),
        lost => format!("; {} of them belong to no key, and a reset frees them", filesystem::bytes(lost)),
    };
    line("texts", &format!("{}{lost}", filesystem::bytes(stats.text_bytes)))?;
    let style = if info.state == TableState::Live { PLAIN } else { BAD };
    let text = output.styled(style, state(info.state));
    output.line(&format!("{}  {text}", output.styled(HEADING, &format!("{:<14}", "state"))))?;
    Ok(DONE)
}

/// How much longer the file is than the table. A process that makes the table grow makes room there first; if it is killed then, the
/// next one uses the room.
fn spare(path: &Path, stats: &Stats) -> u64 {
    let file = std::fs::metadata(path).ok();
    // An anonymous table, which has no name, is sparse up to its greatest size.
    file.filter(|file| file.nlink() > 0).map_or(0, |file| file.len().saturating_sub(stats.bytes))
}

pub(crate) fn state(state: TableState) -> &'static str {
    match state {
        TableState::Live => "live",
        TableState::Retiring => "retiring",
        _ => "retired",
    }
}

/// The boot id as the kernel writes it.
fn boot(boot: u128) -> String {
    let hex = format!("{boot:032x}");
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

fn boot_text(info: &TableInfo) -> String {
    let which = if info.is_of_earlier_boot { "an earlier one, or another container's" } else { "this one" };
    format!("{} ({which})", boot(info.boot))
}

fn segments(stats: &Stats) -> impl Iterator<Item = String> {
    stats.occupancy.iter().enumerate().map(|(number, segment)| {
        let filled = (segment.keys as usize * BAR).div_ceil(segment.slots.max(1) as usize).min(BAR);
        let (full, empty) = ("█".repeat(filled), "░".repeat(BAR - filled));
        let percent = segment.keys * 100 / segment.slots.max(1);
        format!("segment {number}  {full}{empty}  {} of {} slots, {percent} %", segment.keys, segment.slots)
    })
}

//! `stat`: a table as a whole.

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
        let user = name_of(std::os::unix::fs::MetadataExt::uid(&metadata));
        line("file", &format!("{kind}, mode {}, of {user}", filesystem::mode(&metadata).0))?;
    }
    line("size", &format!("{} ({} bytes)", filesystem::bytes(stats.bytes), stats.bytes))?;
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
    line("longest probe", &format!("{} slots", stats.longest_probe))?;
    let style = if info.state == TableState::Live { PLAIN } else { BAD };
    let text = output.styled(style, state(info.state));
    output.line(&format!("{}  {text}", output.styled(HEADING, &format!("{:<14}", "state"))))?;
    Ok(DONE)
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

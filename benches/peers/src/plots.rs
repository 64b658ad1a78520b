//! The plots: on logarithmic scales, in colours that are readable on light and on dark, with nothing behind them.

mod canvas;

use std::path::Path;

use plotters::style::RGBColor;

use crate::Outcome;
use crate::measure::growth::DayRow;
use crate::measure::growth::keys::Row as KeysRow;
use crate::peer::Kind;
use crate::peers::GENSYNC;
use crate::results::Results;
use canvas::{Bar, Line, bars, lines};

/// Of middling lightness, so that they stand out from white as well as from black.
const OURS: RGBColor = RGBColor(0x2f, 0x81, 0xf7);
const THEIRS: RGBColor = RGBColor(0x8b, 0x94, 0x9e);
const ROUNDS: &str = "bar: median; line: least to greatest of the rounds";
const COLOURS: [RGBColor; 10] = [
    RGBColor(0xd2, 0x69, 0x1e),
    RGBColor(0x2d, 0xa4, 0x4e),
    RGBColor(0xa3, 0x71, 0xf7),
    RGBColor(0xe5, 0x53, 0x4b),
    RGBColor(0x1f, 0x9e, 0x9e),
    RGBColor(0xd6, 0x40, 0x9f),
    RGBColor(0x9a, 0x8b, 0x00),
    RGBColor(0xb0, 0x80, 0x50),
    RGBColor(0x6e, 0x8f, 0x3c),
    RGBColor(0x7d, 0x8d, 0xb0),
];

pub(crate) fn draw(results: &Results, folder: &Path) -> Outcome<()> {
    for table in &results.turns {
        let (file, title, axis) = match table.kind {
            Kind::Check | Kind::CheckByReading => ("check.svg", "Is my state stale?", "nanoseconds a check"),
            Kind::Read => ("read.svg", "A fresh value", "nanoseconds a read"),
            Kind::Announce => ("announce.svg", "Announcing a change", "nanoseconds an announcement"),
        };
        let rows = table.rows.iter().map(|row| {
            let spread = row.nanoseconds;
            bar(row.peer, format!("{}: {}", row.peer, row.operation), (spread.min, spread.median, spread.max))
        });
        bars(&folder.join(file), (title, ROUNDS, axis), rows.collect())?;
    }
    let notices = results.notices.iter().map(|row| {
        let processes = if row.listeners == 1 { "process" } else { "processes" };
        let most = row.p999.unwrap_or(row.p99) as f64 / 1000.0;
        let median = row.p50 as f64 / 1000.0;
        bar(row.peer, format!("{}: {} {processes}", row.peer, row.listeners), (median, median, most))
    });
    let title = "One changes, others notice";
    let note = "bar: p50; line: to p99.9, of the touched file to p99";
    let axis = "microseconds until the last of them has noticed";
    bars(&folder.join("notice.svg"), (title, note, axis), notices.collect())?;
    if let Some(day) = &results.day {
        let rows = day.rows.iter().map(|row| {
            let spread = row.requests;
            bar(row.peer, format!("{}: {}", row.peer, row.way), (spread.min, spread.median, spread.max))
        });
        bars(&folder.join("day.svg"), ("A server's day", ROUNDS, "requests a second"), rows.collect())?;
    }
    if let Some(growth) = &results.growth {
        let keys = |figure: fn(&KeysRow) -> f64| {
            let points = growth.keys.iter().map(|row| (row.peer, row.keys as f64, figure(row)));
            by_peer(results, points.collect())
        };
        let file = |name: &str| folder.join(name);
        lines(&file("growth-get.svg"), ("Getting a fresh value", "keys", "nanoseconds"), keys(|row| row.get.median))?;
        lines(&file("growth-attach.svg"), ("Attaching to a key", "keys", "nanoseconds"), keys(|row| row.attach))?;
        lines(&file("growth-memory.svg"), ("Memory", "keys", "bytes"), keys(|row| row.bytes as f64))?;
        let days = |rows: &[DayRow], x: fn(&DayRow) -> f64| {
            by_peer(results, rows.iter().map(|row| (row.peer, x(row), row.requests.median)).collect())
        };
        let processes = days(&growth.processes, |row| row.processes as f64);
        let titles = ("All processes together", "processes", "gets a second");
        lines(&file("growth-processes.svg"), titles, processes)?;
        let updates = days(&growth.updates, |row| row.updates.median);
        let titles = ("One process", "updates a second that are made", "gets a second");
        lines(&file("growth-updates.svg"), titles, updates)?;
    }
    Ok(())
}

fn bar(peer: &str, label: String, (least, value, most): (f64, f64, f64)) -> Bar {
    Bar { label, least, value, most, colour: if peer == GENSYNC { OURS } else { THEIRS } }
}

/// A line for each peer. What is zero is not on a logarithmic scale.
fn by_peer(results: &Results, points: Vec<(&'static str, f64, f64)>) -> Vec<Line> {
    let mut colours = COLOURS.iter().cycle();
    let line = |peer: &'static str| {
        let colour = if peer == GENSYNC { OURS } else { *colours.next().unwrap_or(&THEIRS) };
        let own = points.iter().filter(|point| point.0 == peer && point.1 > 0.0 && point.2 > 0.0);
        let mut points: Vec<_> = own.map(|&(_, x, y)| (x, y)).collect();
        points.sort_by(|one, other| one.0.total_cmp(&other.0));
        Line { label: peer.to_owned(), points, colour }
    };
    results.peers.iter().map(|about| about.name).map(line).filter(|line| !line.points.is_empty()).collect()
}

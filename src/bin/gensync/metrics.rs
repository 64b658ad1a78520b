//! `metrics`: OpenMetrics text.
//!
//! Only counters and gauges, without times: what a node exporter's textfile collector reads, which knows the older format of
//! Prometheus alone, is valid OpenMetrics as well.

use std::fmt::Write as _;
use std::fs::{File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use gensync::{SlotInfo, Table};
use serde_json::{Map, Value, json};

use crate::arguments::Metrics;
use crate::failure::{DONE, Failure, Outcome};
use crate::filesystem::folder;
use crate::keys::chosen;
use crate::output::{Output, printable};
use crate::processes::{Mapped, scan};
use crate::stat::state;
use crate::target::Target;
use crate::time::seconds;

type Labels = Vec<(&'static str, String)>;

/// Samples of one name.
struct Family {
    name: &'static str,
    help: &'static str,
    is_counter: bool,
    samples: Vec<(Labels, f64)>,
}

pub(crate) fn metrics(target: &Target, options: &Metrics, output: &mut Output) -> Outcome {
    let table = target.read()?;
    let path = printable(target.path()?.display().to_string().as_bytes());
    let mut families = of_table(&table, &path);
    if !options.no_keys {
        families.extend(of_keys(&chosen(&table, options.glob.as_ref()), &path));
    }
    let text = if output.is_json() { objects(&families) } else { open_metrics(&families) };
    match &options.output {
        Some(file) => {
            replace(file, text.as_bytes()).map_err(|error| {
                Failure::Unusable(format!(
                    "{} cannot be written: {error}",
                    printable(file.display().to_string().as_bytes())
                ))
            })?;
        }
        None => output.bytes(text.as_bytes())?,
    }
    Ok(DONE)
}

fn of_table(table: &Table, path: &str) -> Vec<Family> {
    let (stats, info, scan) = (table.stats(), table.info(), scan(table));
    let labels = || vec![("table", path.to_owned())];
    let gauge =
        |name, help, value: u64| Family { name, help, is_counter: false, samples: vec![(labels(), value as f64)] };
    let (mut updates, mut pending, mut abandoned, mut awaited) = (0, 0, 0, 0);
    for slot in table.slots() {
        updates += slot.updates();
        pending += u64::from(slot.pending());
        abandoned += u64::from(slot.is_abandoned());
        awaited += u64::from(slot.is_awaited());
    }
    let mapped = |kind| scan.processes.iter().filter(|process| process.mapped == kind).count() as f64;
    let with = |name, value: &str| labels().into_iter().chain([(name, value.to_owned())]).collect::<Labels>();
    let incarnation = format!("{:032x}", info.incarnation);
    let facts = [
        ("incarnation", incarnation),
        ("layout_version", info.layout_version.to_string()),
        ("state", state(info.state).to_owned()),
    ];
    vec![
        Family {
            name: "gensync_table",
            help: "The table that the figures are of; always 1",
            is_counter: false,
            samples: vec![(labels().into_iter().chain(facts).collect(), 1.0)],
        },
        gauge("gensync_table_keys", "Keys of the table", stats.keys),
        gauge("gensync_table_slots", "Slots for keys, in all segments; the table grows by itself", stats.capacity),
        gauge("gensync_table_size_bytes", "Size of the table", stats.bytes),
        gauge("gensync_table_longest_probe", "Slots that finding a key looks at, at most", stats.longest_probe),
        Family {
            name: "gensync_table_start_time_seconds",
            help: "When this incarnation of the table was created, in seconds since the epoch",
            is_counter: false,
            samples: vec![(labels(), seconds(info.created))],
        },
        Family {
            name: "gensync_table_updates",
            help: "Updates of the keys that the table has now, since each was created",
            is_counter: true,
            samples: vec![(labels(), updates as f64)],
        },
        gauge("gensync_table_updates_pending", "Updates in flight, or left by killed processes", pending),
        gauge("gensync_table_keys_abandoned", "Keys with a pending update whose maker is dead", abandoned),
        gauge("gensync_table_keys_awaited", "Keys that somebody waits for", awaited),
        Family {
            name: "gensync_table_processes",
            help: "Processes that have the table mapped, a deleted file that was in its place, or another file at its path",
            is_counter: false,
            samples: vec![
                (with("file", "table"), mapped(Mapped::Table)),
                (with("file", "deleted"), mapped(Mapped::Deleted)),
                (with("file", "elsewhere"), mapped(Mapped::Elsewhere)),
            ],
        },
    ]
}

fn of_keys(slots: &[SlotInfo], path: &str) -> [Family; 4] {
    let family = |name, help, is_counter, value: fn(&SlotInfo) -> u64| Family {
        name,
        help,
        is_counter,
        samples: slots.iter().map(|slot| (labels_of(slot, path), value(slot) as f64)).collect(),
    };
    [
        family("gensync_key_updates", "Updates of the key since it was created", true, SlotInfo::updates),
        family("gensync_key_generation", "Generation of the key", false, |slot| slot.generation().get()),
        family("gensync_key_updates_pending", "Updates of the key in flight", false, |slot| slot.pending().into()),
        family("gensync_key_awaited", "Whether somebody waits for the key", false, |slot| slot.is_awaited().into()),
    ]
}

/// Two keys never have the same labels: what does not show a key in full has its digest beside it.
fn labels_of(slot: &SlotInfo, path: &str) -> Labels {
    let key = printable(slot.label_bytes());
    let is_whole = key.as_bytes() == slot.label_bytes() && !slot.is_truncated() && slot.key_length() > 0;
    let digest = (!is_whole).then(|| ("digest", format!("{:032x}", slot.digest())));
    [("table", path.to_owned()), ("key", key)].into_iter().chain(digest).collect()
}

fn open_metrics(families: &[Family]) -> String {
    let mut text = String::new();
    for Family { name, help, is_counter, samples } in families {
        let (kind, suffix) = if *is_counter { ("counter", "_total") } else { ("gauge", "") };
        let _ = writeln!(text, "# TYPE {name} {kind}\n# HELP {name} {help}");
        for (labels, value) in samples {
            let labels: Vec<_> = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escape(value))).collect();
            let _ = writeln!(text, "{name}{suffix}{{{}}} {value}", labels.join(","));
        }
    }
    text + "# EOF\n"
}

fn escape(value: &str) -> String {
    value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}

fn objects(families: &[Family]) -> String {
    let mut text = String::new();
    for Family { name, is_counter, samples, .. } in families {
        for (labels, value) in samples {
            let labels: Map<String, Value> =
                labels.iter().map(|(name, value)| ((*name).to_owned(), value.as_str().into())).collect();
            let name = if *is_counter { format!("{name}_total") } else { (*name).to_owned() };
            let _ = writeln!(text, "{}", json!({ "name": name, "labels": labels, "value": value }));
        }
    }
    text
}

/// Puts a file with `text` at `path`, so that a reader finds the old one or the new one, as a whole.
fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let folder = folder(path);
    let mut file = tempfile::NamedTempFile::new_in(&folder)?;
    file.write_all(text)?;
    // The collector is another user, as a rule.
    file.as_file().set_permissions(Permissions::from_mode(0o644))?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    File::open(folder)?.sync_all()
}

//! `metrics`: OpenMetrics text.
//!
//! Only counters and gauges, without times: what a node exporter's textfile collector reads, which knows the older format of
//! Prometheus alone, is valid OpenMetrics as well.

//!
//! Samples are written as they are found, family after family, so that no table is too large.

use std::fs::{self, File, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use gensync::{CacheKey, SlotInfo, Table};
use glob::Pattern;
use nix::fcntl::OFlag;
use nix::unistd::Uid;
use serde_json::{Map, Value, json};

use crate::arguments::Metrics;
use crate::commands::stat::state;
use crate::failure::{DONE, Failure, Outcome};
use crate::filesystem::folder;
use crate::keys::chosen;
use crate::output::Output;
use crate::printable::printable;
use crate::processes::{Blind, Mapped, scan};
use crate::target::Target;
use crate::time::seconds;

type Labels = Vec<(&'static str, String)>;

pub(crate) fn metrics(target: &Target, options: &Metrics, output: &mut Output) -> Outcome {
    let table = target.read()?;
    let path = printable(target.path()?.display().to_string().as_bytes());
    let is_json = output.is_json();
    let write = |writer: &mut dyn Write| {
        let mut samples = Samples { writer, is_json, name: "", is_counter: false };
        of_table(&table, &path, &mut samples)?;
        if !options.no_keys {
            of_keys(&table, options.glob.as_ref(), &path, &mut samples)?;
        }
        samples.end()
    };
    match &options.output {
        Some(file) if file != Path::new("-") => match destination(file).and_then(|destination| destination.fill(write))
        {
            Ok(()) => {}
            Err(error) => {
                let file = printable(file.display().to_string().as_bytes());
                return Err(Failure::Unusable(format!("{file} cannot be written: {error}")));
            }
        },
        _ => write(output.writer())?,
    }
    Ok(DONE)
}

/// Writes families of samples.
struct Samples<'a> {
    writer: &'a mut dyn Write,
    is_json: bool,
    name: &'static str,
    is_counter: bool,
}

impl Samples<'_> {
    /// Begins samples of one name.
    fn family(&mut self, name: &'static str, help: &str, is_counter: bool) -> io::Result<()> {
        (self.name, self.is_counter) = (name, is_counter);
        if self.is_json {
            return Ok(());
        }
        let kind = if is_counter { "counter" } else { "gauge" };
        writeln!(self.writer, "# TYPE {name} {kind}\n# HELP {name} {help}")
    }

    fn sample(&mut self, labels: &Labels, value: f64) -> io::Result<()> {
        let Self { writer, name, is_counter, .. } = self;
        let suffix = if *is_counter { "_total" } else { "" };
        if self.is_json {
            let labels: Map<String, Value> =
                labels.iter().map(|(name, value)| ((*name).to_owned(), value.as_str().into())).collect();
            let name = format!("{name}{suffix}");
            return writeln!(writer, "{}", json!({ "name": name, "labels": labels, "value": value }));
        }
        write!(writer, "{name}{suffix}{{")?;
        for (i, (name, value)) in labels.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(writer, "{comma}{name}=\"{}\"", escape(value))?;
        }
        writeln!(writer, "}} {value}")
    }

    fn end(&mut self) -> io::Result<()> {
        if self.is_json { Ok(()) } else { self.writer.write_all(b"# EOF\n") }
    }
}

fn escape(value: &str) -> String {
    value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}

fn of_table(table: &Table, path: &str, samples: &mut Samples<'_>) -> io::Result<()> {
    let info = table.info();
    let labels = || vec![("table", path.to_owned())];
    let with = |name, value: &str| labels().into_iter().chain([(name, value.to_owned())]).collect::<Labels>();
    // The samples that need no scan of all slots come first, and at once.
    let facts = [
        ("incarnation", format!("{:032x}", info.incarnation)),
        ("layout_version", info.layout_version.to_string()),
        ("state", state(info.state).to_owned()),
    ];
    samples.family("gensync_table", "The table that the figures are of; always 1", false)?;
    samples.sample(&labels().into_iter().chain(facts).collect(), 1.0)?;
    samples.writer.flush()?;
    let (stats, scan) = (table.stats(), scan(table));
    let (mut updates, mut pending, mut abandoned, mut awaited, mut damaged) = (0, 0, 0, 0, 0);
    for slot in table.slots() {
        // The number of updates of a damaged key means nothing.
        updates += if slot.is_damaged() { 0 } else { slot.updates() };
        pending += u64::from(slot.pending());
        abandoned += u64::from(slot.is_abandoned());
        awaited += u64::from(slot.is_awaited());
        damaged += u64::from(slot.is_damaged());
    }
    let mut gauge = |name, help, value: f64| {
        samples.family(name, help, false)?;
        samples.sample(&labels(), value)
    };
    gauge("gensync_table_keys", "Keys of the table", stats.keys as f64)?;
    gauge("gensync_table_slots", "Slots for keys, in all segments; the table grows by itself", stats.capacity as f64)?;
    gauge("gensync_table_size_bytes", "Size of the table", stats.bytes as f64)?;
    gauge(
        "gensync_table_text_bytes",
        "Bytes of the texts of keys, those that are lost included",
        stats.text_bytes as f64,
    )?;
    gauge(
        "gensync_table_lost_bytes",
        "Bytes of texts that belong to no key, as their makers were killed or lost a race; a reset frees them",
        stats.lost_bytes as f64,
    )?;
    gauge(
        "gensync_table_longest_probe",
        "Groups of 16 slots of a segment that finding a key looks at, at most",
        stats.longest_probe as f64,
    )?;
    gauge(
        "gensync_table_start_time_seconds",
        "When this incarnation of the table was created, in seconds since the epoch",
        seconds(info.created),
    )?;
    gauge("gensync_table_updates_pending", "Updates in flight, or left by killed processes", pending as f64)?;
    gauge("gensync_table_keys_abandoned", "Keys with a pending update of a process that is dead", abandoned as f64)?;
    gauge("gensync_table_keys_awaited", "Keys that have waiters", awaited as f64)?;
    gauge("gensync_table_keys_damaged", "Keys with a generation that gensync did not write", damaged as f64)?;
    gauge(
        "gensync_table_processes_visible",
        "Whether all processes could be inspected: at 0, their numbers are too low, or missing",
        f64::from(u8::from(scan.is_complete())),
    )?;
    samples.family(
        "gensync_table_updates",
        "Updates of the keys that the table has now, since each was created",
        true,
    )?;
    samples.sample(&labels(), updates as f64)?;
    if scan.blind == Some(Blind::NoProc) {
        return Ok(());
    }
    samples.family(
        "gensync_table_processes",
        "Processes that have the table mapped, a file that was deleted in its place, one that was reset, one of an older \
         version that was upgraded, or another file at its path",
        false,
    )?;
    let mut count = |file, mapped: &[Mapped]| samples.sample(&with("file", file), scan.count(mapped) as f64);
    count("table", &[Mapped::Table])?;
    // Where it is unknown whether the file was retired, a person may be needed, so it counts as deleted.
    count("deleted", &[Mapped::Deleted, Mapped::Unknown])?;
    count("reset", &[Mapped::Retired])?;
    count("older", &[Mapped::Older])?;
    count("elsewhere", &[Mapped::Elsewhere])
}

fn of_keys(table: &Table, glob: Option<&Pattern>, path: &str, samples: &mut Samples<'_>) -> io::Result<()> {
    let mut family = |name, help, is_counter, value: fn(&SlotInfo) -> Option<u64>| {
        samples.family(name, help, is_counter)?;
        for slot in chosen(table, glob) {
            if let Some(value) = value(&slot) {
                samples.sample(&labels_of(table, &slot, path), value as f64)?;
            }
        }
        Ok::<_, io::Error>(())
    };
    family("gensync_key_updates", "Updates of the key since it was created", true, |slot| {
        (!slot.is_damaged()).then(|| slot.updates())
    })?;
    family("gensync_key_generation", "Generation of the key", false, |slot| Some(slot.generation().get()))?;
    family("gensync_key_updates_pending", "Updates of the key in flight", false, |slot| Some(slot.pending().into()))?;
    family("gensync_key_awaited", "Whether the key has waiters", false, |slot| Some(slot.is_awaited().into()))
}

/// Two slots never have the same labels. A slot that is not the one where the key is found that it shows has its digest and its
/// offset as further labels: the key is not printable, or too long, or another program has written into the file.
fn labels_of(table: &Table, slot: &SlotInfo, path: &str) -> Labels {
    let key = printable(slot.label_bytes());
    let is_printed = key.as_bytes() == slot.label_bytes();
    let is_found = || {
        let found = table.slot(CacheKey::raw(&*key)).ok().flatten();
        found.is_some_and(|found| found.offset() == slot.offset())
    };
    let further = if is_printed && is_found() {
        None
    } else {
        Some([("digest", format!("{:032x}", slot.digest())), ("offset", slot.offset().to_string())])
    };
    [("table", path.to_owned()), ("key", key)].into_iter().chain(further.into_iter().flatten()).collect()
}

/// Where the text is written to.
enum Destination {
    /// A regular file, or none yet, which is replaced as a whole.
    Replaced(PathBuf),
    /// A device or a named pipe, which is written to.
    Written(File),
}

/// Decides what to do with `path`, depending on what is there. Only a regular file is ever replaced; a symbolic link is followed,
/// so that it stays.
fn destination(path: &Path) -> io::Result<Destination> {
    let refuse = |text: &str| Err(io::Error::other(text.to_owned()));
    let path = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Destination::Replaced(path.to_owned())),
        Err(error) => return Err(error),
        Ok(link) if link.is_symlink() => {
            // In a folder like /tmp, any user may have made the link. This is the kernel's rule for such folders, applied to all.
            if ![0, Uid::effective().as_raw()].contains(&link.uid()) {
                return refuse("it is a symbolic link of another user's; name its target");
            }
            let target = fs::metadata(path)?;
            // The file may be the output of this very process, as with /dev/stdout: it is appended to, not replaced.
            let is_own = |number: &str| {
                fs::metadata(format!("/proc/self/fd/{number}"))
                    .is_ok_and(|own| (own.dev(), own.ino()) == (target.dev(), target.ino()))
            };
            if target.is_file() && ["1", "2"].into_iter().any(is_own) {
                return Ok(Destination::Written(File::options().append(true).open(path)?));
            }
            // A pipe or a terminal has no path except the link.
            if target.is_file() { fs::canonicalize(path)? } else { path.to_owned() }
        }
        Ok(_) => path.to_owned(),
    };
    let kind = fs::metadata(&path)?.file_type();
    if kind.is_file() {
        return Ok(Destination::Replaced(path));
    }
    if kind.is_dir() || kind.is_socket() || kind.is_block_device() {
        return refuse(
            "it is a folder, a socket or a disk, expected a file, a device such as /dev/null, or a named pipe",
        );
    }
    let file = File::options().write(true).custom_flags(OFlag::O_NOCTTY.bits()).open(&path)?;
    match file.metadata()?.file_type() == kind {
        true => Ok(Destination::Written(file)),
        false => refuse("it was replaced meanwhile; try again"),
    }
}

impl Destination {
    /// Has `write` write to it. A reader of a file finds the whole old file or the whole new one.
    fn fill(self, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
        let path = match self {
            Self::Written(file) => {
                let mut writer = BufWriter::new(file);
                write(&mut writer)?;
                return writer.flush();
            }
            Self::Replaced(path) => path,
        };
        let folder = folder(&path);
        let mut writer = BufWriter::new(tempfile::NamedTempFile::new_in(&folder)?);
        write(&mut writer)?;
        let file = writer.into_inner().map_err(io::IntoInnerError::into_error)?;
        // The collector usually runs as another user.
        file.as_file().set_permissions(Permissions::from_mode(0o644))?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        File::open(folder)?.sync_all()
    }
}

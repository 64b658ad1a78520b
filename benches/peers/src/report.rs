//! The tables, in Markdown.

use std::fmt::Write as _;

use crate::measure::growth::keys::Row as KeysRow;
use crate::measure::growth::{DayRow, Growth};
use crate::measure::{day, notice, turns};
use crate::peer::{About, Kind};
use crate::peers::GENSYNC;
use crate::results::Results;
use crate::statistics::{Spread, number};

pub(crate) fn markdown(results: &Results) -> String {
    let mut text = String::new();
    let report = Report { results, text: &mut text };
    // Writing to a string does not fail.
    report.write().expect("room for a few tables");
    text
}

struct Report<'a> {
    results: &'a Results,
    text: &'a mut String,
}

impl Report<'_> {
    fn write(mut self) -> std::fmt::Result {
        let results = self.results;
        let machine = &results.machine;
        writeln!(
            self.text,
            "# The run\n\n`{}`, {:.0} s on {} cores of {}, Linux {}, {}, load before it {}.\n\n{}.\n",
            results.command,
            results.seconds,
            machine.cores,
            machine.processor,
            machine.kernel,
            machine.rust,
            machine.load_before,
            machine.versions.join(", ")
        )?;
        for reason in &results.notes {
            writeln!(self.text, "{reason}.\n")?;
        }
        self.gives()?;
        for table in &results.turns {
            self.turns(table)?;
        }
        if !results.notices.is_empty() {
            self.notices(&results.notices)?;
        }
        if let Some(table) = &results.day {
            self.day(table)?;
        }
        if let Some(growth) = &results.growth {
            self.growth(growth)?;
        }
        Ok(())
    }

    fn gives(&mut self) -> std::fmt::Result {
        writeln!(self.text, "## What each gives\n")?;
        let rows = self.results.peers.iter().map(|about| {
            let texts = [
                about.name,
                about.several_writers,
                about.keys_at_run_time,
                about.writer_killed,
                about.file_replaced,
                about.without_server,
                about.across_processes,
            ];
            texts.map(str::to_owned).to_vec()
        });
        let heads = [
            "",
            "W: several writers",
            "K: keys at run time",
            "C: fresh although a writer was killed in the middle",
            "F: notices a replaced file",
            "S: without a server",
            "P: across processes",
        ];
        write_table(self.text, &heads, rows)?;
        writeln!(
            self.text,
            "The letters stand in the tables below for what a peer gives, in brackets for what it gives in part.\n"
        )
    }

    fn marks(&self, peer: &str) -> String {
        self.results.peers.iter().find(|about| about.name == peer).map_or(String::new(), marks)
    }

    fn turns(&mut self, table: &turns::Table) -> std::fmt::Result {
        let (title, what) = match table.kind {
            Kind::Check | Kind::CheckByReading => ("Check whether my state is stale", "nothing has changed"),
            Kind::Read => ("Get a fresh value", "nothing has changed"),
            Kind::Announce => ("Announce a change", "nobody waits"),
        };
        let rounds = self.results.scale.rounds;
        writeln!(
            self.text,
            "## {title}\n\nNanoseconds, {what}; all by turns, {rounds} rounds: median (least to greatest). The ratio is to \
             gensync's in the first line, round by round.\n"
        )?;
        let rows: Vec<_> = table
            .rows
            .iter()
            .map(|row| {
                let operation = row.operation.to_owned();
                vec![row.peer.into(), operation, row.nanoseconds.text(), row.ratio.text(), self.marks(row.peer)]
            })
            .collect();
        write_table(self.text, &["", "operation", "nanoseconds", "ratio to gensync", "gives"], rows)?;
        let first = table.rows[0].operation;
        let faster = table.rows[1..].iter().filter(|row| row.ratio.median < 1.0).map(|row| {
            let always = if row.ratio.max < 1.0 { "in every round" } else { "in most rounds" };
            let Spread { median, min, max } = row.ratio;
            let times = format!("{}, {} to {}", number(median), number(min), number(max));
            format!("{} `{}` ({times}, {always})", row.peer, row.operation)
        });
        self.loses(&format!("gensync's `{first}`"), faster.collect())?;
        for own in table.rows[1..].iter().filter(|row| row.peer == GENSYNC) {
            let less = |row: &&turns::Row| row.peer != GENSYNC && row.nanoseconds.median < own.nanoseconds.median;
            let faster = table.rows.iter().filter(less).map(|row| format!("{} `{}`", row.peer, row.operation));
            self.loses(&format!("gensync's `{}`", own.operation), faster.collect())?;
        }
        Ok(())
    }

    /// Says plainly where gensync is not the best.
    fn loses(&mut self, what: &str, faster: Vec<String>) -> std::fmt::Result {
        let faster = if faster.is_empty() { "nothing here".to_owned() } else { faster.join("; ") };
        writeln!(self.text, "**{what} is slower than:** {faster}.\n")
    }

    fn notices(&mut self, rows: &[notice::Row]) -> std::fmt::Result {
        writeln!(
            self.text,
            "## One changes, others notice\n\nMicroseconds from before the change until the last of the processes that \
             wait has noticed it. The ratio is of the rounds' medians to gensync's. The file is looked at every \
             millisecond; what one in a thousand exceeds is given from 2000 samples on.\n"
        )?;
        let micros = |nanoseconds: u64| number(nanoseconds as f64 / 1000.0);
        let lines: Vec<_> = rows
            .iter()
            .map(|row| {
                vec![
                    row.peer.to_owned(),
                    row.listeners.to_string(),
                    micros(row.p50),
                    micros(row.p99),
                    row.p999.map_or("too few samples".to_owned(), micros),
                    row.ratio.text(),
                    number_of(row.samples as usize),
                    row.missed.to_string(),
                    self.marks(row.peer),
                ]
            })
            .collect();
        let heads = ["", "processes", "p50", "p99", "p99.9", "ratio to gensync", "samples", "missed", "gives"];
        write_table(self.text, &heads, lines)?;
        let faster = rows.iter().filter(|row| row.ratio.median < 1.0);
        let faster = faster.map(|row| format!("{}, processes: {} ({})", row.peer, row.listeners, row.ratio.text()));
        self.loses("gensync's `wait`", faster.collect())?;
        let own = |other: &notice::Row| {
            rows.iter().find(|row| row.peer == GENSYNC && row.listeners == other.listeners).and_then(|row| row.p999)
        };
        let less = |row: &&notice::Row| row.p999.zip(own(row)).is_some_and(|(theirs, ours)| theirs < ours);
        let steadier = rows.iter().filter(less).map(|row| format!("{}, processes: {}", row.peer, row.listeners));
        self.loses("gensync's `wait`, at p99.9,", steadier.collect())
    }

    fn day(&mut self, table: &day::Table) -> std::fmt::Result {
        let day = &table.day;
        writeln!(
            self.text,
            "## A server's day\n\n{} forked processes serve {} keys, asked for by Zipf's law, for {} ms a round, while one \
             process makes {} updates a second. Values come from the same shared memory for all, which a process looks \
             at when its peer says that the key was changed. An answer is stale if it is older than a change that was \
             announced before the request; an oracle outside the peers decides that. Gensync's writer calls `mark_updated`. Processor time is the workers' and the \
             server's; memory is theirs too, shared pages counted once.\n",
            day.workers,
            number(day.keys as f64),
            day.length.as_millis(),
            day.updates.map_or("as many as it can".to_owned(), |updates| updates.to_string())
        )?;
        let rows: Vec<_> = table
            .rows
            .iter()
            .map(|row| {
                vec![
                    row.peer.to_owned(),
                    row.way.to_owned(),
                    number(row.requests.median / 1e3),
                    row.ratio.text(),
                    row.processor.text(),
                    number(row.memory.median / 1e6),
                    number_of(row.stale as usize),
                    self.marks(row.peer),
                ]
            })
            .collect();
        let heads = [
            "",
            "check",
            "thousand requests/s",
            "ratio to gensync",
            "processor, ns a request",
            "memory, MB",
            "stale answers",
            "gives",
        ];
        write_table(self.text, &heads, rows)?;
        let first = &table.rows[0];
        for own in table.rows.iter().filter(|row| row.peer == GENSYNC) {
            let more = |row: &&day::Report| row.peer != GENSYNC && row.requests.median > own.requests.median;
            let faster = table.rows.iter().filter(more).map(|row| format!("{} `{}`", row.peer, row.way));
            self.loses(&format!("a server on gensync's `{}`", own.way), faster.collect())?;
        }
        let less = |row: &&day::Report| row.peer != GENSYNC && row.memory.median < first.memory.median;
        let smaller: Vec<_> = table.rows.iter().filter(less).map(|row| row.peer).collect();
        let smaller = if smaller.is_empty() { "nothing here".to_owned() } else { smaller.join(", ") };
        writeln!(self.text, "**gensync takes more memory than:** {smaller}.\n")
    }

    fn growth(&mut self, growth: &Growth) -> std::fmt::Result {
        writeln!(
            self.text,
            "## Growth with keys\n\nOne process gets the values of keys at random, of a sample of 10,000; attaching is \
             to these, opening included. Memory is what all processes share, or the server's; the kernel's inodes, \
             which a file for each key takes, are not in it. {} rounds by turns; their ratios to \
             gensync's are in peers.json.\n",
            self.results.scale.rounds
        )?;
        let nanoseconds = |row: &KeysRow| row.get.text();
        self.grid("Nanoseconds to get a fresh value, by keys", &growth.keys, |row| row.keys, nanoseconds)?;
        self.grid("Nanoseconds to attach to a key, by keys", &growth.keys, |row| row.keys, |row| number(row.attach))?;
        let megabytes = |row: &KeysRow| number(row.bytes as f64 / 1e6);
        self.grid("Megabytes, by keys", &growth.keys, |row| row.keys, megabytes)?;
        let seconds = |row: &KeysRow| number(row.fill_seconds);
        self.grid("Seconds to create them, by keys", &growth.keys, |row| row.keys, seconds)?;
        for stop in &growth.stops {
            writeln!(self.text, "- {stop}.")?;
        }
        writeln!(self.text)?;
        let keys = |row: &KeysRow| row.keys;
        self.worse("gensync is slower to get a value than", "keys", &growth.keys, keys, |row| row.get.median)?;
        self.worse("gensync is slower to attach than", "keys", &growth.keys, keys, |row| row.attach)?;
        self.worse("gensync takes more memory than", "keys", &growth.keys, keys, |row| row.bytes as f64)?;
        self.worse("gensync is slower to create keys than", "keys", &growth.keys, keys, |row| row.fill_seconds)?;

        writeln!(
            self.text,
            "## Growth with processes and updates\n\nThousand gets a second of all processes together, of 100 keys, \
             beside 50 updates a second. Medians of {} rounds by turns; least, greatest and the ratios to gensync's \
             are in peers.json.\n",
            self.results.scale.growth_rounds
        )?;
        let thousands = |row: &DayRow| number(row.requests.median / 1e3);
        self.grid("Thousand gets a second, by processes", &growth.processes, |row| row.processes, thousands)?;
        let asked = |row: &DayRow| row.asked.map_or(usize::MAX, |asked| asked as usize);
        self.grid("Thousand gets a second of one process, by updates a second", &growth.updates, asked, thousands)?;
        let made = |row: &DayRow| number(row.updates.median);
        self.grid("Updates a second that were made", &growth.updates, asked, made)?;
        let (processes, slowness) = (|row: &DayRow| row.processes, |row: &DayRow| 1.0 / row.requests.median);
        self.worse("gensync serves fewer gets than", "processes", &growth.processes, processes, slowness)?;
        self.worse("gensync serves fewer gets than", "updates a second", &growth.updates, asked, slowness)?;
        let stale: u64 = growth.processes.iter().chain(&growth.updates).map(|row| row.stale).sum();
        writeln!(self.text, "Stale answers in all of these together: {stale}.\n")
    }

    /// A line for each peer, a column for each size.
    fn grid<R: OfPeer>(
        &mut self,
        title: &str,
        rows: &[R],
        size: impl Fn(&R) -> usize,
        cell: impl Fn(&R) -> String,
    ) -> std::fmt::Result {
        let mut sizes: Vec<_> = rows.iter().map(&size).collect();
        sizes.sort_unstable();
        sizes.dedup();
        let mut heads = vec![title.to_owned()];
        heads.extend(sizes.iter().copied().map(size_text));
        heads.push("gives".to_owned());
        let lines: Vec<_> = self
            .results
            .peers
            .iter()
            .filter(|about| rows.iter().any(|row| row.peer() == about.name))
            .map(|about| {
                let of = |&at: &usize| rows.iter().find(|row| row.peer() == about.name && size(row) == at);
                let mut line = vec![about.name.to_owned()];
                line.extend(sizes.iter().map(|size| of(size).map_or(String::new(), &cell)));
                line.push(marks(about));
                line
            })
            .collect();
        let heads: Vec<_> = heads.iter().map(String::as_str).collect();
        write_table(self.text, &heads, lines)
    }

    /// The peers that need less than gensync, and at which sizes.
    fn worse<R: OfPeer>(
        &mut self,
        what: &str,
        unit: &str,
        rows: &[R],
        size: impl Fn(&R) -> usize,
        cost: impl Fn(&R) -> f64,
    ) -> std::fmt::Result {
        let own = |other: &R| rows.iter().find(|row| row.peer() == GENSYNC && size(row) == size(other));
        let beaten = |other: &&R| own(other).is_some_and(|own| cost(own) > cost(other));
        let mut better = Vec::new();
        for about in self.results.peers.iter().filter(|about| about.name != GENSYNC) {
            let all = rows.iter().filter(|row| row.peer() == about.name);
            let sizes: Vec<_> = all.clone().filter(beaten).map(|row| size_text(size(row))).collect();
            let name = about.name;
            if !sizes.is_empty() && sizes.len() == all.count() {
                better.push(format!("{name} at every number of {unit}"));
            } else if !sizes.is_empty() {
                better.push(format!("{name} at {} {unit}", sizes.join(", ")));
            }
        }
        let better = if better.is_empty() { "nobody here".to_owned() } else { better.join("; ") };
        writeln!(self.text, "**{what}:** {better}.\n")
    }
}

fn size_text(size: usize) -> String {
    if size == usize::MAX { "all it can".to_owned() } else { number_of(size) }
}

fn number_of(size: usize) -> String {
    if size < 100 { size.to_string() } else { number(size as f64) }
}

/// What can stand in a grid.
trait OfPeer {
    fn peer(&self) -> &str;
}

impl OfPeer for KeysRow {
    fn peer(&self) -> &str {
        self.peer
    }
}

impl OfPeer for DayRow {
    fn peer(&self) -> &str {
        self.peer
    }
}

/// A letter for each thing that is given.
fn marks(about: &About) -> String {
    let things = [
        ('W', about.several_writers),
        ('K', about.keys_at_run_time),
        ('C', about.writer_killed),
        ('F', about.file_replaced),
        ('S', about.without_server),
        ('P', about.across_processes),
    ];
    let mark = |(letter, text): (char, &str)| match text {
        _ if text.starts_with("yes") => letter.to_string(),
        _ if text.starts_with("partly") => format!("({letter})"),
        _ => "-".to_owned(),
    };
    things.map(mark).join(" ")
}

/// In columns that line up, to be readable as plain text.
fn write_table(text: &mut String, heads: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> std::fmt::Result {
    let rows: Vec<_> = rows.into_iter().collect();
    let longest = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = heads.iter().enumerate().map(|(i, head)| longest(i).max(head.chars().count())).collect();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        for (cell, &width) in cells.zip(&widths) {
            write!(text, "| {cell:<width$} ")?;
        }
        writeln!(text, "|")
    };
    line(&mut heads.iter().copied())?;
    line(&mut heads.iter().map(|_| "---"))?;
    for row in &rows {
        line(&mut row.iter().map(String::as_str))?;
    }
    writeln!(text)
}

//! What is printed: text for people, aligned and coloured on a terminal; JSON, one object a line, for programs.
//!
//! Keys come from other processes. Whatever they contain, only printable characters reach a terminal.

use std::fmt::Write as _;
use std::io::{self, BufWriter, IsTerminal as _, Stdout, Write as _};

use anstyle::{AnsiColor, Style};
use gensync::SlotInfo;
use serde_json::{Value, json};
use unicode_width::UnicodeWidthStr as _;

use crate::failure::Outcome;
use crate::printable::printable;

pub(crate) const PLAIN: Style = Style::new();
pub(crate) const HEADING: Style = Style::new().bold();
pub(crate) const FAINT: Style = Style::new().dimmed();
pub(crate) const GOOD: Style = AnsiColor::Green.on_default();
pub(crate) const ATTENTION: Style = AnsiColor::Yellow.on_default();
pub(crate) const BAD: Style = AnsiColor::Red.on_default().bold();

/// Spaces between two columns.
const GAP: usize = 2;
/// How wide a column becomes for the sake of its cells. A key may have thousands of characters, which are printed, but do not
/// move all other lines to the right.
const WIDEST: usize = 100;

/// Standard output.
#[derive(Debug)]
pub(crate) struct Output {
    json: bool,
    colour: bool,
    out: BufWriter<Stdout>,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let is_dumb = std::env::var_os("TERM").is_some_and(|terminal| terminal == "dumb");
        let colour = io::stdout().is_terminal() && !is_set("NO_COLOR") && !is_dumb;
        Self { json, colour, out: BufWriter::new(io::stdout()) }
    }

    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// Prints a line of text.
    pub(crate) fn line(&mut self, text: &str) -> Outcome<()> {
        Ok(writeln!(self.out, "{text}")?)
    }

    /// Prints a key's present generation.
    pub(crate) fn generation(&mut self, slot: &SlotInfo) -> Outcome<()> {
        match self.json {
            true => self.object(&object(slot)),
            false => self.line(&format!("{}  {}", label(slot), slot.generation())),
        }
    }

    /// Prints text as it is.
    pub(crate) fn bytes(&mut self, text: &[u8]) -> Outcome<()> {
        Ok(self.out.write_all(text)?)
    }

    /// Prints an object.
    pub(crate) fn object(&mut self, object: &Value) -> Outcome<()> {
        let text = ascii_or_printable(&object.to_string());
        self.line(&text)
    }

    /// `text` in a style, on a terminal that has colours.
    pub(crate) fn styled(&self, style: Style, text: &str) -> String {
        if self.colour && style != PLAIN { format!("{style}{text}{style:#}") } else { text.to_owned() }
    }

    /// Prints cells in columns, under a heading. The rows are made twice, once for the widths, so that they need not be kept.
    pub(crate) fn table(&mut self, columns: &[Column], rows: impl Iterator<Item = Vec<Cell>> + Clone) -> Outcome<()> {
        let mut widths: Vec<_> = columns.iter().map(|column| column.name.len()).collect();
        for row in rows.clone() {
            for (width, cell) in widths.iter_mut().zip(&row) {
                *width = (*width).max(cell.width().min(WIDEST));
            }
        }
        self.heading(columns, &widths)?;
        for row in rows {
            self.row(columns, &widths, &row)?;
        }
        Ok(())
    }

    pub(crate) fn heading(&mut self, columns: &[Column], widths: &[usize]) -> Outcome<()> {
        let heading: Vec<_> = columns.iter().map(|column| Cell::styled(HEADING, column.name)).collect();
        self.row(columns, widths, &heading)
    }

    /// Prints cells in columns of these widths; a wider cell moves the rest of its line to the right.
    pub(crate) fn row(&mut self, columns: &[Column], widths: &[usize], row: &[Cell]) -> Outcome<()> {
        let mut line = String::new();
        for (i, (cell, column)) in row.iter().zip(columns).enumerate() {
            let (gap, padding) = (if i == 0 { 0 } else { GAP }, widths[i].saturating_sub(cell.width()));
            line.extend(std::iter::repeat_n(' ', if column.right { gap + padding } else { gap }));
            match self.colour && cell.style != PLAIN {
                true => _ = write!(line, "{}{}{:#}", cell.style, cell.text, cell.style),
                false => line.push_str(&cell.text),
            }
            if !column.right && i + 1 < columns.len() {
                line.extend(std::iter::repeat_n(' ', padding));
            }
        }
        self.line(&line)
    }

    /// The stream that all of this is written to.
    pub(crate) fn writer(&mut self) -> &mut impl io::Write {
        &mut self.out
    }

    pub(crate) fn flush(&mut self) -> Outcome<()> {
        Ok(self.out.flush()?)
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Column {
    name: &'static str,
    right: bool,
}

pub(crate) const fn left(name: &'static str) -> Column {
    Column { name, right: false }
}

pub(crate) const fn right(name: &'static str) -> Column {
    Column { name, right: true }
}

#[derive(Clone, Debug)]
pub(crate) struct Cell {
    text: String,
    style: Style,
}

impl Cell {
    pub(crate) fn new(text: impl ToString) -> Self {
        Self::styled(PLAIN, text)
    }

    pub(crate) fn styled(style: Style, text: impl ToString) -> Self {
        Self { text: text.to_string(), style }
    }

    /// How many columns it takes.
    fn width(&self) -> usize {
        if self.text.is_ascii() { self.text.len() } else { self.text.width() }
    }
}

/// JSON that a terminal prints as it is. The characters that must be escaped occur only within its strings.
fn ascii_or_printable(json: &str) -> String {
    if json.is_ascii() && !json.contains('\u{7f}') {
        return json.to_owned();
    }
    let mut text = String::with_capacity(json.len());
    for character in json.chars() {
        if character == '\u{7f}' || !character.is_ascii() && character.escape_debug().len() > 1 {
            for unit in character.encode_utf16(&mut [0; 2]) {
                let _ = write!(text, "\\u{unit:04x}");
            }
        } else {
            text.push(character);
        }
    }
    text
}

/// A key for people: `…` says that it is longer than what the table keeps.
pub(crate) fn label(slot: &SlotInfo) -> String {
    let mut text = printable(slot.label_bytes());
    if slot.is_truncated() {
        text.push('…');
    }
    if text.is_empty() {
        text.push_str("(no text)");
    }
    text
}

/// A key within a sentence: no more of it than fits.
pub(crate) fn short_label(slot: &SlotInfo) -> String {
    let text = label(slot);
    match text.char_indices().nth(WIDEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// A key for programs. `key` is the whole key unless it is `truncated`, as it has more than 65,536 bytes, or there is a `key_hex`.
pub(crate) fn object(slot: &SlotInfo) -> Value {
    let mut object = json!({
        "key": slot.label(),
        "truncated": slot.is_truncated(),
        "key_length": slot.key_length(),
        "digest": format!("{:032x}", slot.digest()),
        "generation": slot.generation().get(),
        "updates": slot.updates(),
        "waiters": slot.is_awaited(),
        "pending": slot.pending(),
        "abandoned": slot.is_abandoned(),
        "damaged": slot.is_damaged(),
    });
    if std::str::from_utf8(slot.label_bytes()).is_err() {
        object["key"] = printable(slot.label_bytes()).into();
        let hex: String = slot.label_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        object["key_hex"] = hex.into();
    }
    object
}

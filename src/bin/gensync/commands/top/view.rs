//! How the data is drawn, and what each key of the keyboard does.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize as _};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Cell, Clear, Paragraph, Row as TableRow, Sparkline, Table, TableState};

use super::keyboard::Key;
use super::model::{Model, Order, Row};
use crate::printable::printable;

/// How many polls a key's trend shows.
const TREND: usize = 24;

/// What `?` shows.
const HELP: [&str; 11] = [
    "q, Ctrl-C      quit",
    "Esc            end the filter; without one, quit",
    "p, Space       pause, and go on",
    "s              sort by rate, updates, generation, key",
    "/              show only keys that contain what is typed; Enter keeps it",
    "Down, j        select the next key; the chart below shows its updates",
    "Up, k          select the one before",
    "PageDown       a screen further",
    "PageUp         a screen back",
    "Home, End      the first key, the last key",
    "?              these keys; any key ends it",
];

/// What is to be done after a key was pressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Quit,
    Draw,
}

#[derive(Default)]
pub(super) struct View {
    order: Order,
    filter: String,
    /// The filter is being typed.
    is_typing: bool,
    /// The keys of the keyboard are shown.
    is_helping: bool,
    pub(super) is_paused: bool,
    /// The digest of the selected key; the first one unless it is there.
    selected: Option<u128>,
    /// How many keys fit on the screen.
    page: usize,
}

impl View {
    pub(super) fn obey(&mut self, key: Key, model: &Model) -> Asked {
        if key == Key::Interrupt {
            return Asked::Quit;
        }
        if self.is_typing {
            match key {
                Key::Enter => self.is_typing = false,
                Key::Escape => (self.is_typing, self.filter) = (false, String::new()),
                Key::Backspace => _ = self.filter.pop(),
                Key::Character(character) => self.filter.push(character),
                _ => {}
            }
            return Asked::Draw;
        }
        // Any key ends the help; q and the keys that move the selection also have their usual effect.
        let was_helping = std::mem::take(&mut self.is_helping);
        match key {
            Key::Character('q') => return Asked::Quit,
            Key::Escape | Key::Character('?') if was_helping => {}
            Key::Character('?') => self.is_helping = true,
            // If there is a filter, Escape removes it first.
            Key::Escape if self.filter.is_empty() => return Asked::Quit,
            Key::Escape => self.filter.clear(),
            Key::Character('p' | ' ') => self.is_paused = !self.is_paused,
            Key::Character('s') => self.order = self.order.next(),
            Key::Character('/') => self.is_typing = true,
            Key::Down | Key::Character('j') => self.select(model, 1),
            Key::Up | Key::Character('k') => self.select(model, -1),
            Key::PageDown => self.select(model, self.page.max(1) as isize),
            Key::PageUp => self.select(model, -(self.page.max(1) as isize)),
            Key::Home => self.select(model, isize::MIN / 2),
            Key::End => self.select(model, isize::MAX / 2),
            _ => {}
        }
        Asked::Draw
    }

    fn select(&mut self, model: &Model, step: isize) {
        let rows = model.rows(self.order, &self.filter);
        let last = rows.len().saturating_sub(1) as isize;
        let next = (self.position(&rows) as isize + step).clamp(0, last) as usize;
        self.selected = rows.get(next).map(|row| row.slot.digest());
    }

    fn position(&self, rows: &[Row<'_>]) -> usize {
        rows.iter().position(|row| Some(row.slot.digest()) == self.selected).unwrap_or(0)
    }

    pub(super) fn draw(&mut self, frame: &mut Frame<'_>, model: &Model) {
        let rows = model.rows(self.order, &self.filter);
        let position = self.position(&rows);
        let chart = if frame.area().height >= 16 { 5 } else { 0 };
        let areas = Layout::vertical([
            Constraint::Length(2),
            Constraint::Min(2),
            Constraint::Length(chart),
            Constraint::Length(1),
        ]);
        let [head, keys, bottom, foot] = areas.areas(frame.area());
        frame.render_widget(self.head(model), head);
        self.page = keys.height.saturating_sub(1).into();
        self.draw_keys(frame, keys, &rows, position);
        if let Some(row) = rows.get(position).filter(|_| chart > 0) {
            let data: Vec<u64> = row.history.iter().rev().take(bottom.width.into()).rev().copied().collect();
            let block = Block::new().title(Line::from(format!(" {}: updates at each poll ", row.label)).bold());
            frame.render_widget(Sparkline::default().block(block).data(&data).style(Color::Green), bottom);
        }
        frame.render_widget(self.foot(), foot);
        if self.is_helping {
            // It replaces the list, so that a small screen shows as much of it as fits.
            let area = keys.union(bottom);
            frame.render_widget(Clear, area);
            frame.render_widget(Paragraph::new(HELP.map(Line::from).to_vec()), area);
        }
    }

    fn head(&self, model: &Model) -> Paragraph<'static> {
        let totals = &model.totals;
        let mut figures = vec![Span::from(totals.text())];
        if totals.stale > 0 {
            figures.push(Span::from(format!("   on a deleted file {}", totals.stale)).red().bold());
        }
        if self.is_paused {
            figures.push(Span::from("   PAUSED").yellow().bold());
        }
        let title = match &model.trouble {
            Some(trouble) => Line::from(trouble.lines().next().unwrap_or_default().to_owned()).red().bold(),
            None => Line::from(format!("gensync top  {}", printable(model.path().as_bytes()))).bold(),
        };
        Paragraph::new(vec![title, Line::from(figures)])
    }

    fn draw_keys(&mut self, frame: &mut Frame<'_>, area: Rect, rows: &[Row<'_>], position: usize) {
        // Of a large table, only the rows on the screen are made.
        let first = (position + 1).saturating_sub(self.page.max(1));
        let shown = rows.iter().skip(first).take(self.page.max(1)).map(line);
        let widths = [
            Constraint::Fill(1),
            Constraint::Length(11),
            Constraint::Length(TREND as u16),
            Constraint::Length(12),
            Constraint::Length(7),
            Constraint::Length(7),
        ];
        let names = ["KEY", "UPDATES/S", "TREND", "UPDATES", "WAITERS", "PENDING"];
        let heading = TableRow::new(names.map(|name| Cell::from(Line::from(name).bold())));
        let table = Table::new(shown, widths).header(heading).row_highlight_style(Style::new().reversed());
        let mut state = TableState::new().with_selected((!rows.is_empty()).then(|| position - first));
        frame.render_stateful_widget(table, area, &mut state);
    }

    fn foot(&self) -> Line<'static> {
        if self.is_typing {
            return Line::from(format!("filter: {}▏  Enter keep  Esc clear", printable(self.filter.as_bytes())))
                .yellow();
        }
        let filter = match &*self.filter {
            "" => String::new(),
            filter => format!(" ({})", printable(filter.as_bytes())),
        };
        let order = self.order.text();
        Line::from(format!("q quit  p pause  s sort ({order})  / filter{filter}  ↑↓ select  ? keys")).dim()
    }
}

fn line(row: &Row<'_>) -> TableRow<'static> {
    let slot = row.slot;
    let trend: Vec<u64> = row.history.iter().rev().take(TREND).rev().copied().collect();
    let waiters = if slot.is_awaited() { Span::from("yes").green() } else { Span::from("-").dim() };
    let pending = match slot.pending() {
        0 => Span::from("-").dim(),
        count if slot.is_abandoned() => Span::from(format!("{count}!")).red().bold(),
        count => Span::from(count.to_string()).yellow(),
    };
    TableRow::new(vec![
        Cell::from(row.label.clone()),
        Cell::from(format!("{:.1}", row.rate)),
        Cell::from(Span::from(bars(&trend)).green()),
        Cell::from(slot.updates().to_string()),
        Cell::from(waiters),
        Cell::from(pending),
    ])
}

/// A line of bars; the greatest number has the highest bar.
fn bars(numbers: &[u64]) -> String {
    const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let greatest = numbers.iter().max().copied().unwrap_or(0).max(1);
    let bar = |number: &u64| BARS[(u128::from(*number) * 8).div_ceil(greatest.into()) as usize];
    numbers.iter().map(bar).collect()
}

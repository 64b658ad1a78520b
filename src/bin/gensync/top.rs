//! `top`: keys by their rate of updates, live.

mod guard;
mod model;
mod view;

use std::io::{self, IsTerminal as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use gensync::Table;
use ratatui::crossterm::event::{self, Event};
use serde_json::json;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

use crate::arguments::Top;
use crate::failure::{DONE, Failure, Outcome, complain};
use crate::output::{Output, object};
use crate::target::Target;
use crate::time::precise;

use model::Model;
use view::{Asked, View};

/// How soon a signal is noticed.
const PATIENCE: Duration = Duration::from_millis(50);
/// How many keys each look tells of in JSON.
const TOLD: usize = 20;

pub(crate) fn top(target: &Target, options: &Top, output: &mut Output) -> Outcome {
    // What is wrong with the table is told before the screen is taken.
    let table = target.read()?;
    if output.is_json() {
        return print(target, table, options, output);
    }
    // Who only guards the screen is no user of the table.
    drop(table);
    if options.count.is_some() {
        return Err(Failure::Usage("--count is for --json; the screen stays until q is pressed".to_owned()));
    }
    if !(io::stdout().is_terminal() && io::stdin().is_terminal()) {
        return Err(Failure::Usage("top needs a terminal; try top --json, ls or watch".to_owned()));
    }
    if let Some(status) = guard::run_guarded() {
        return Ok(status);
    }
    let table = target.read()?;
    let signal = Arc::new(AtomicUsize::new(0));
    for number in [SIGHUP, SIGINT, SIGQUIT, SIGTERM] {
        signal_hook::flag::register_usize(number, Arc::clone(&signal), number as usize)
            .map_err(|error| Failure::Unusable(format!("signals cannot be heard of: {error}")))?;
    }
    // Restores the screen if there is a panic, too.
    let mut terminal = ratatui::try_init().map_err(cannot_draw)?;
    let result = show(target, table, options, &signal, &mut terminal);
    // Shows the cursor; and before the signal, which ends the process here.
    drop(terminal);
    ratatui::restore();
    match signal.load(Relaxed) {
        0 => {}
        number => _ = signal_hook::low_level::emulate_default_handler(number as i32),
    }
    result.map_err(cannot_draw)?;
    Ok(DONE)
}

fn cannot_draw(error: io::Error) -> Failure {
    Failure::Unusable(format!("the terminal cannot be drawn on: {error}"))
}

fn show(
    target: &Target,
    table: Table,
    options: &Top,
    signal: &AtomicUsize,
    terminal: &mut ratatui::DefaultTerminal,
) -> io::Result<()> {
    let (mut model, mut view) = (Model::new(table), View::default());
    let mut next = Instant::now();
    while signal.load(Relaxed) == 0 {
        if !view.is_paused && Instant::now() >= next {
            model.look(target);
            next = Instant::now() + options.interval;
        }
        terminal.draw(|frame| view.draw(frame, &model))?;
        // Until there is something new to draw.
        while signal.load(Relaxed) == 0 && (view.is_paused || Instant::now() < next) {
            let left = next.saturating_duration_since(Instant::now());
            let limit = if view.is_paused { PATIENCE } else { left.min(PATIENCE) };
            if !event::poll(limit)? {
                continue;
            }
            match event::read()? {
                Event::Key(key) if key.is_press() => match view.obey(key, &model) {
                    Asked::Quit => return Ok(()),
                    Asked::Draw => break,
                },
                Event::Resize(..) => break,
                _ => {}
            }
        }
    }
    Ok(())
}

/// One object for each look.
fn print(target: &Target, table: Table, options: &Top, output: &mut Output) -> Outcome {
    let mut model = Model::new(table);
    model.look(target);
    for _ in 0..options.count.unwrap_or(u64::MAX) {
        std::thread::sleep(options.interval);
        model.look(target);
        if let Some(trouble) = &model.trouble {
            complain(trouble);
        }
        let keys: Vec<_> = model.rows(view::Order::Rate, "").into_iter().take(TOLD).collect();
        let keys: Vec<_> = keys
            .into_iter()
            .map(|row| {
                let mut object = object(row.slot);
                object["updates_per_second"] = row.rate.into();
                object
            })
            .collect();
        let totals = &model.totals;
        output.object(&json!({
            "time": precise(std::time::SystemTime::now()),
            "keys": totals.keys,
            "updates_per_second": totals.rate,
            "waiting": totals.awaited,
            "pending": totals.pending,
            "processes": totals.processes,
            "processes_on_deleted_file": totals.stale,
            "top": keys,
        }))?;
        output.flush()?;
    }
    Ok(DONE)
}

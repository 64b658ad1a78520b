//! `top`: keys by their rate of updates, live.

mod guard;
mod keyboard;
mod model;
mod view;

use std::io::{self, IsTerminal as _, stdout};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use gensync::Table;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::SigSet;
use ratatui::crossterm::cursor::Hide;
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{Clear, ClearType, EnterAlternateScreen, disable_raw_mode, enable_raw_mode};
use serde_json::json;
use signal_hook::consts::{SIGCONT, SIGHUP, SIGWINCH};

use crate::arguments::Top;
use crate::failure::{DONE, Failure, Outcome, complain};
use crate::output::{BAD, Cell, Output, left, object, right};
use crate::printable::printable;
use crate::target::Target;
use crate::time::precise;

use guard::{ENDING, GRACE};
use keyboard::Keyboard;
use model::Model;
use view::{Asked, View};

/// How long it may take until a signal is noticed.
const PATIENCE: Duration = Duration::from_millis(50);
/// How many keys each poll prints where there is no screen.
const PRINTED: usize = 20;

pub(crate) fn top(target: &Target, options: &Top, output: &mut Output) -> Outcome {
    // An error of the table is reported before the screen is taken.
    let table = target.read()?;
    if output.is_json() {
        return print(target, table, options, output);
    }
    if options.once {
        return print_once(target, table, options, output);
    }
    // The process that only guards the screen does not keep the table mapped.
    drop(table);
    if options.count.is_some() {
        return Err(Failure::Usage(
            "--count is for --json; the screen stays until q is pressed, --once prints it as text".to_owned(),
        ));
    }
    if !(io::stdout().is_terminal() && io::stdin().is_terminal()) {
        return Err(Failure::Usage("top needs a terminal; try top --once, top --json, ls or watch".to_owned()));
    }
    if let Some(status) = guard::run_guarded() {
        return Ok(status);
    }
    let table = target.read()?;
    let signals = Signals::new()?;
    // This also restores the screen after a panic.
    let mut terminal = ratatui::try_init().map_err(cannot_draw)?;
    let result = show(target, table, options, &signals, &mut terminal);
    if result.as_ref().is_err_and(is_gone) {
        // There is no terminal to restore, or to print an error on.
        std::mem::forget(terminal);
        let _ = signal_hook::low_level::emulate_default_handler(SIGHUP);
        return Ok(DONE);
    }
    // This shows the cursor. It must come before the signal, which ends the process here.
    drop(terminal);
    let restored = ratatui::try_restore();
    match signals.ending.load(Relaxed) {
        0 => {}
        number => _ = signal_hook::low_level::emulate_default_handler(number as i32),
    }
    result.and(restored).map_err(cannot_draw)?;
    Ok(DONE)
}

fn cannot_draw(error: io::Error) -> Failure {
    Failure::Unusable(format!("the terminal cannot be drawn on: {error}"))
}

/// Whether the error says that the terminal is gone.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::UnexpectedEof || error.raw_os_error() == Some(Errno::EIO as i32)
}

/// The signals that came.
///
/// ORDERING: Relaxed throughout. Each load and swap of a field pairs with the store in signal_hook's handler, which may run on
/// any thread. The flag or number is the whole message, and no other memory is read because of it; the loops read it again within
/// `PATIENCE`.
struct Signals {
    /// The number of the one that ends the program.
    ending: Arc<AtomicUsize>,
    /// The size of the terminal has changed.
    resized: Arc<AtomicBool>,
    /// The program was stopped and continued: other programs may have used the terminal meanwhile.
    continued: Arc<AtomicBool>,
}

impl Signals {
    fn new() -> Outcome<Self> {
        let (ending, [resized, continued]) = (Arc::new(AtomicUsize::new(0)), <[Arc<AtomicBool>; 2]>::default());
        let register = || {
            for signal in ENDING {
                signal_hook::flag::register_usize(signal as i32, Arc::clone(&ending), signal as usize)?;
            }
            signal_hook::flag::register(SIGWINCH, Arc::clone(&resized))?;
            signal_hook::flag::register(SIGCONT, Arc::clone(&continued))
        };
        register().map_err(|error| Failure::Unusable(format!("signals cannot be handled: {error}")))?;
        // The guard has blocked them, so that none is lost before there are handlers.
        let _ = ENDING.into_iter().collect::<SigSet>().thread_unblock();
        // A write hangs if the terminal's other end is stopped, and the loop that draws then notices no signal. This thread ends
        // the process nevertheless.
        let asked = Arc::clone(&ending);
        std::thread::spawn(move || {
            while asked.load(Relaxed) == 0 {
                std::thread::sleep(PATIENCE);
            }
            std::thread::sleep(GRACE);
            let _ = signal_hook::low_level::emulate_default_handler(asked.load(Relaxed) as i32);
        });
        Ok(Self { ending, resized, continued })
    }
}

fn show(
    target: &Target,
    table: Table,
    options: &Top,
    signals: &Signals,
    terminal: &mut ratatui::DefaultTerminal,
) -> io::Result<()> {
    let is_over = || signals.ending.load(Relaxed) != 0;
    let (mut model, mut view, mut keyboard) = (Model::new(table), View::default(), Keyboard::default());
    let mut next = Instant::now();
    while !is_over() {
        if signals.continued.swap(false, Relaxed) {
            disable_raw_mode()?;
            enable_raw_mode()?;
            execute!(stdout(), EnterAlternateScreen, Clear(ClearType::All), Hide)?;
            // This makes ratatui draw everything again. `clear` would ask the terminal for its cursor, and the answer may never
            // come.
            terminal.swap_buffers();
        }
        if !view.is_paused && Instant::now() >= next {
            model.poll(target);
            next = Instant::now() + options.interval;
        }
        terminal.draw(|frame| view.draw(frame, &model))?;
        // Until there is something new to draw.
        let mut is_new = false;
        while !is_new && !is_over() && (view.is_paused || Instant::now() < next) {
            let left = next.saturating_duration_since(Instant::now());
            for key in keyboard.keys(if view.is_paused { PATIENCE } else { left.min(PATIENCE) })? {
                match view.obey(key, &model) {
                    Asked::Quit => return Ok(()),
                    Asked::Draw => is_new = true,
                }
            }
            is_new |= signals.resized.swap(false, Relaxed) || signals.continued.load(Relaxed);
        }
    }
    Ok(())
}

/// Waits until the next poll; fails if the reader of the output goes away meanwhile.
fn rest(interval: Duration) -> Outcome<()> {
    let end = Instant::now() + interval;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        let output = stdout();
        let mut watched = [PollFd::new(output.as_fd(), PollFlags::empty())];
        let limit = u16::try_from(left.as_millis() + 1).unwrap_or(u16::MAX);
        if poll(&mut watched, limit).is_ok_and(|count| count > 0) {
            return Err(io::Error::from(io::ErrorKind::BrokenPipe).into());
        }
    }
}

/// Prints what a screen shows, as text: the busiest keys of one interval.
fn print_once(target: &Target, table: Table, options: &Top, output: &mut Output) -> Outcome {
    let mut model = Model::new(table);
    model.poll(target);
    rest(options.interval)?;
    model.poll(target);
    if let Some(trouble) = &model.trouble {
        return Err(Failure::Unusable(trouble.clone()));
    }
    output.line(&printable(model.path().as_bytes()))?;
    output.line(&model.totals.text())?;
    let rows: Vec<_> = model.rows(model::Order::Rate, "").into_iter().take(PRINTED).collect();
    let row = |row: &model::Row<'_>| {
        let (slot, dash) = (row.slot, || Cell::new("-"));
        let pending = match slot.pending() {
            0 => dash(),
            count if slot.is_abandoned() => Cell::styled(BAD, format!("{count}!")),
            count => Cell::new(count),
        };
        let waiters = if slot.is_awaited() { Cell::new("yes") } else { dash() };
        vec![Cell::new(&row.label), Cell::new(format!("{:.1}", row.rate)), Cell::new(slot.updates()), waiters, pending]
    };
    let columns = [left("KEY"), right("UPDATES/S"), right("UPDATES"), left("WAITERS"), left("PENDING")];
    output.table(&columns, rows.iter().map(row))?;
    Ok(DONE)
}

/// Prints one object for each poll.
fn print(target: &Target, table: Table, options: &Top, output: &mut Output) -> Outcome {
    let mut model = Model::new(table);
    model.poll(target);
    let count = if options.once { 1 } else { options.count.unwrap_or(u64::MAX) };
    for _ in 0..count {
        rest(options.interval)?;
        model.poll(target);
        if let Some(trouble) = &model.trouble {
            complain(trouble);
        }
        let keys: Vec<_> = model.rows(model::Order::Rate, "").into_iter().take(PRINTED).collect();
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

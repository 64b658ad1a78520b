//! Guards `top` in a terminal: it draws, obeys keys, and leaves the terminal as it was, whichever process is killed. Colours,
//! and questions.

use gensync::{GenerationSynchronizer, Table};
use nix::sys::signal::{Signal, kill};

use crate::terminal::Terminal;
use crate::tool::{Place, child_of, eventually, lives};

fn top(place: &Place) -> Terminal {
    let mut terminal = Terminal::start(&mut place.command(&["top", "--interval", "50ms"]));
    terminal.await_text("q quit");
    terminal
}

/// The keys on the screen, from the top.
fn keys(terminal: &Terminal) -> Vec<String> {
    let text = terminal.text();
    let lines = text.lines().skip_while(|line| !line.starts_with("KEY ")).skip(1);
    let lines = lines.take_while(|line| !line.trim().is_empty() && !line.contains(": updates at each poll"));
    lines.map(|line| line.split("  ").next().unwrap().trim().to_owned()).collect()
}

#[test]
fn keys_are_drawn_with_their_rates_and_the_table_with_its_figures() {
    let place = Place::with_keys(["slow", "fast", "still"]);
    let [slow, fast] = ["slow", "fast"].map(|key| place.sync(key));
    let mut terminal = top(&place);
    assert!(terminal.screen().alternate_screen() && terminal.is_raw());
    let text = terminal.text();
    for part in ["keys 3", "pending 0", "UPDATES/S", "TREND", "WAITERS", "q quit  p pause  s sort (rate)  / filter"] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    // The busiest comes first, with a line of bars, and a chart below.
    eventually("waiting for the busiest key to come first", || {
        (0..50).for_each(|_| _ = fast.mark_updated().unwrap());
        slow.mark_updated().unwrap();
        terminal.await_screen("drawing", |_| true);
        let is_charted = terminal.text().contains("fast: updates at each poll");
        keys(&terminal) == ["fast", "slow", "still"] && terminal.text().contains('█') && is_charted
    });
    let waiter = place.start(&["wait", "still"]);
    let update = slow.begin_update().unwrap();
    terminal.await_text("waited for 1   pending 1   processes ");
    assert_eq!(terminal.text().matches(" yes ").count(), 1);
    // This test has the table mapped, and the waiter; the tool's own two processes do not count.
    terminal.await_screen("waiting for processes", |screen| screen.contents().contains("processes 2"));
    let guard = i64::from(terminal.program.pid().as_raw());
    assert!(
        place.objects(&["ps"]).iter().all(|process| process["pid"] != guard),
        "a process that only guards does not count"
    );
    update.finish().unwrap();
    drop(waiter);
    terminal.press("q");
    assert_eq!(terminal.await_end(), 0);
    assert!(terminal.is_restored());
}

#[test]
fn keys_are_obeyed() {
    let place = Place::with_keys(["a", "b", "c", "bb"]);
    let b = place.sync("b");
    b.mark_updated().unwrap();
    let newest = place.sync("newest");
    let mut terminal = top(&place);
    assert_eq!(keys(&terminal), ["a", "b", "bb", "c", "newest"]);
    terminal.press("s");
    terminal.await_text("sort (updates)");
    assert_eq!(keys(&terminal)[0], "b");
    terminal.press("s");
    terminal.await_text("sort (generation)");
    assert_eq!(keys(&terminal)[0], "newest");
    terminal.press("s");
    terminal.await_text("sort (key)");
    terminal.press("/");
    terminal.await_text("filter: ▏");
    terminal.press("bx\u{7f}q");
    terminal.await_text("filter: bq▏");
    terminal.press("\u{7f}b\r");
    terminal.await_text("filter (bb)");
    assert_eq!(keys(&terminal), ["bb"]);
    // Escape ends the filter, not the program.
    terminal.press("\u{1b}");
    terminal.await_screen("waiting for all keys", |screen| screen.contents().contains("\nnewest "));
    terminal.await_text("a: updates at each poll");
    terminal.press("j\u{1b}[B");
    terminal.await_text("bb: updates at each poll");
    terminal.press("k");
    terminal.await_text(" b: updates at each poll");
    terminal.press("p");
    terminal.await_text("PAUSED");
    let before = b.mark_updated().unwrap();
    newest.mark_updated().unwrap();
    terminal.press("s");
    terminal.await_text("sort (rate)");
    assert!(terminal.text().contains("updates/s 0.0"), "it has looked in spite of the pause");
    terminal.press(" ");
    terminal.await_screen("waiting for the pause to end", |screen| !screen.contents().contains("PAUSED"));
    assert_eq!(b.refresh().unwrap(), before, "the tool has changed the table");
    for end in ["q", "\u{3}", "\u{1b}"] {
        let mut terminal = top(&place);
        terminal.press(end);
        assert_eq!(terminal.await_end(), 0);
        assert!(terminal.is_restored(), "after {end:?}");
    }
}

#[test]
fn the_terminal_is_restored_whichever_process_is_killed() {
    let place = Place::with_keys(["a"]);
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGKILL] {
        for is_child in [false, true] {
            let mut terminal = top(&place);
            assert!(terminal.screen().alternate_screen() && terminal.is_raw());
            let pid = terminal.program.pid();
            kill(if is_child { child_of(pid, "top") } else { pid }, signal).unwrap();
            assert_eq!(terminal.await_end(), 128 + signal as i32, "{signal}, child: {is_child}");
            // The process that is left restores the terminal, perhaps after the other one has ended.
            let is_left = |screen: &vt100::Screen| !screen.alternate_screen() && !screen.hide_cursor();
            terminal.await_screen("waiting for the screen to be left", is_left);
            eventually("waiting for the terminal to be restored", || terminal.is_restored());
        }
    }
}

#[test]
fn a_terminal_that_goes_away_ends_both_processes() {
    let place = Place::with_keys(["a"]);
    for stopped in [[false, false], [true, false], [false, true], [true, true]] {
        let terminal = top(&place);
        let guard = terminal.program.pid();
        let drawing = child_of(guard, "top");
        for (pid, _) in [guard, drawing].into_iter().zip(stopped).filter(|(_, is_stopped)| *is_stopped) {
            kill(pid, Signal::SIGSTOP).unwrap();
        }
        let program = terminal.hang_up();
        eventually("waiting for both to end", || !lives(guard) && !lives(drawing));
        assert!(!program.status().success());
    }
    // In a session of its own, no signal reports it. Within an incomplete sequence of keys, a read does not report it either.
    for typed in ["", "\u{1b}["] {
        let mut command = place.command(&["top", "--interval", "50ms"]);
        let mut setsid = std::process::Command::new("setsid");
        setsid.arg("--wait").arg(command.get_program()).args(command.get_args());
        setsid.env("GENSYNC_TABLE", &place.path).env_remove("TERM");
        command = setsid;
        let mut terminal = Terminal::start(&mut command);
        terminal.await_text("q quit");
        // The first process has forked if it led a process group.
        let first = terminal.program.pid();
        let guard = child_of(first, "top");
        let drawing = child_of(guard, "top");
        kill(first, Signal::SIGSTOP).unwrap();
        terminal.press(typed);
        let program = terminal.hang_up();
        eventually("waiting for both to end", || !lives(guard) && !lives(drawing));
        drop(program);
    }
}

#[test]
fn a_signal_ends_both_processes_when_they_are_stopped_or_the_terminal_takes_nothing() {
    let place = Place::with_keys(["a"]);
    for signal in [Signal::SIGTERM, Signal::SIGHUP] {
        for is_child in [false, true] {
            let mut terminal = top(&place);
            let guard = terminal.program.pid();
            let drawing = child_of(guard, "top");
            terminal.take_nothing();
            place.sync("a").mark_updated().unwrap();
            kill(if is_child { drawing } else { guard }, signal).unwrap();
            eventually("waiting for both to end", || !lives(guard) && !lives(drawing));
            terminal.take_again();
            let status = terminal.await_end();
            assert!([128 + signal as i32, 128 + 9].contains(&status), "{signal}: {status}");
        }
        let mut terminal = top(&place);
        let drawing = child_of(terminal.program.pid(), "top");
        kill(drawing, Signal::SIGSTOP).unwrap();
        terminal.program.signal(signal);
        assert_eq!(terminal.await_end(), 128 + signal as i32);
        assert!(!lives(drawing) && terminal.is_restored());
    }
}

#[test]
fn the_end_of_the_process_that_started_it_ends_both() {
    let place = Place::with_keys(["a"]);
    let tool = env!("CARGO_BIN_EXE_gensync");
    let script = format!("sh -c '{tool} top --interval 50ms; :'; sleep 60");
    let mut command = std::process::Command::new("sh");
    command.args(["-c", &script]).env("GENSYNC_TABLE", &place.path);
    let mut terminal = Terminal::start(&mut command);
    terminal.await_text("q quit");
    let starter = child_of(terminal.program.pid(), "top");
    let guard = child_of(starter, "top");
    let drawing = child_of(guard, "top");
    kill(starter, Signal::SIGKILL).unwrap();
    eventually("waiting for both to end", || !lives(guard) && !lives(drawing));
    terminal.await_screen("waiting for the screen to be left", |screen| !screen.alternate_screen());
    eventually("waiting for the terminal to be restored", || terminal.is_restored());
}

#[test]
fn a_process_that_was_stopped_draws_all_again() {
    let place = Place::with_keys(["a"]);
    let mut terminal = top(&place);
    let drawing = child_of(terminal.program.pid(), "top");
    kill(drawing, Signal::SIGSTOP).unwrap();
    terminal.print("\u{1b}[2J\u{1b}[?1049lsomething else");
    terminal.await_text("something else");
    kill(drawing, Signal::SIGCONT).unwrap();
    terminal.await_text("q quit");
    assert!(terminal.screen().alternate_screen() && !terminal.text().contains("something else"));
    terminal.press("q");
    assert_eq!(terminal.await_end(), 0);
    assert!(terminal.is_restored());
}

#[test]
fn a_question_mark_shows_the_keys() {
    let place = Place::with_keys(["a"]);
    let mut terminal = top(&place);
    terminal.press("?");
    terminal.await_text("a screen further");
    terminal.press("?");
    terminal.await_screen("waiting for the list", |screen| !screen.contents().contains("a screen further"));
    terminal.press("?");
    terminal.await_text("a screen further");
    terminal.press("q");
    assert_eq!(terminal.await_end(), 0);
}

#[test]
fn once_is_a_screen_as_text() {
    let place = Place::with_keys(["still", "busy"]);
    let sync = place.sync("busy");
    let mut once = place.start(&["top", "--once", "--interval", "200ms"]);
    eventually("waiting for the end", || {
        sync.mark_updated().unwrap();
        once.child().try_wait().unwrap().is_some()
    });
    let said = once.said();
    assert_eq!((said.status, &*said.err), (0, ""));
    let lines: Vec<_> = said.out.lines().collect();
    assert_eq!(lines[0], place.path.to_str().unwrap());
    assert!(lines[1].starts_with("keys 2   updates/s ") && lines[2].starts_with("KEY "), "{lines:?}");
    assert!(lines[3].starts_with("busy ") && lines[4].starts_with("still "), "{lines:?}");
    assert!(!said.out.contains('\u{1b}'));
    assert_eq!(place.objects(&["top", "--once", "--interval", "50ms"]).len(), 1);
}

#[test]
fn polls_end_when_their_reader_is_gone() {
    let place = Place::with_keys(["a"]);
    let mut looks = place.start(&["--json", "top", "--interval", "1h"]);
    // The end comes long before the first poll.
    drop(looks.child().stdout.take());
    eventually("waiting for the end", || looks.child().try_wait().unwrap().is_some());
    assert_eq!(looks.said().status, 0);
}

#[test]
fn a_small_screen_and_no_keys_will_do() {
    let place = Place::with_keys([]);
    for (rows, columns) in [(1, 1), (2, 5), (3, 20), (5, 40), (60, 300)] {
        let mut terminal = Terminal::start_sized(&mut place.command(&["top", "--interval", "50ms"]), rows, columns);
        terminal.await_screen("waiting for the screen", |screen| screen.alternate_screen());
        terminal.press("jk/a\r\u{1b}[6~\u{1b}[5~q");
        assert_eq!(terminal.await_end(), 0, "{rows} lines of {columns}");
        assert!(terminal.is_restored());
    }
}

#[test]
fn more_keys_than_lines_are_scrolled_through() {
    let place = Place::empty();
    let table = Table::open(&place.path).unwrap();
    (0..500).for_each(|i| drop(GenerationSynchronizer::new(&table, format!("key:{i:03}")).unwrap()));
    let mut terminal = top(&place);
    assert_eq!(keys(&terminal)[0], "key:000");
    terminal.press("\u{1b}[F");
    terminal.await_text("key:499: updates");
    assert_eq!(keys(&terminal).last().unwrap(), "key:499");
    terminal.press("\u{1b}[H");
    terminal.await_text("key:000: updates");
    terminal.press("\u{1b}[6~");
    terminal.await_screen("waiting for another key", |screen| !screen.contents().contains("key:000: updates"));
    terminal.press("q");
    assert_eq!(terminal.await_end(), 0);
}

#[test]
fn the_table_may_be_replaced_and_removed_meanwhile() {
    let place = Place::with_keys(["before"]);
    let mut terminal = top(&place);
    place.table().reset().unwrap();
    place.sync("after");
    terminal.await_screen("waiting for the new table", |screen| screen.contents().contains("\nafter "));
    std::fs::remove_file(&place.path).unwrap();
    terminal.await_text("no such table");
    place.sync("again");
    terminal.await_screen("waiting for the third table", |screen| screen.contents().contains("\nagain "));
    terminal.press("q");
    assert_eq!(terminal.await_end(), 0);
}

#[test]
fn without_a_terminal_there_is_no_screen() {
    let place = Place::with_keys(["a"]);
    place.fail(2, "top needs a terminal", &["top"]);
    place.fail(2, "--interval", &["top", "--interval", "1ms"]);
    place.fail(2, "--interval", &["top", "--interval", "x"]);
    place.fail(2, "--count", &["top", "--count", "2"]);
    let sync = place.sync("a");
    let mut looks = place.start(&["--json", "top", "--count", "2", "--interval", "50ms"]);
    eventually("waiting for the end", || {
        sync.mark_updated().unwrap();
        looks.child().try_wait().unwrap().is_some()
    });
    let looks = crate::tool::objects(&looks.said().out);
    assert_eq!((looks.len(), &looks[1]["keys"]), (2, &1.into()));
    assert!(looks[1]["updates_per_second"].as_f64().unwrap() > 0.0);
    assert_eq!(looks[1]["top"][0]["key"], "a");
}

#[test]
fn colours_are_for_terminals_that_want_them() {
    let place = Place::with_keys(["a"]);
    let list = |set: &[(&str, &str)]| {
        let mut command = place.command(&["ls"]);
        command.envs(set.iter().copied());
        let mut terminal = Terminal::start(&mut command);
        assert_eq!(terminal.await_end(), 0);
        assert!(terminal.text().contains("GENERATION"));
        terminal.raw.contains(&0x1b)
    };
    assert!(list(&[]));
    assert!(list(&[("NO_COLOR", "")]), "an empty variable counts as none");
    assert!(!list(&[("NO_COLOR", "1")]));
    assert!(!place.succeed(&["ls"]).contains('\u{1b}'));
    let mut json = Terminal::start(&mut place.command(&["--json", "ls"]));
    json.await_end();
    assert!(!json.raw.contains(&0x1b));
}

#[test]
fn a_question_is_asked_on_a_terminal() {
    for (command, question) in [("reset", "Begin "), ("rm", "Remove ")] {
        let place = Place::with_keys(["a"]);
        let sync = place.sync("a");
        for answer in ["n\r", "\r", "\u{4}"] {
            let mut terminal = Terminal::start(&mut place.command(&[command]));
            terminal.await_text("[y/N]");
            assert!(terminal.text().contains(question));
            terminal.press(answer);
            assert_eq!(terminal.await_end(), 1, "{answer:?}");
            assert!(terminal.text().contains("nothing was changed"));
            assert!(!sync.is_expired());
        }
        let mut terminal = Terminal::start(&mut place.command(&[command]));
        terminal.await_text("[y/N]");
        terminal.press("y\r");
        assert_eq!(terminal.await_end(), 0);
        assert!(sync.is_expired());
    }
}

#[test]
fn a_signal_from_the_terminal_is_not_passed_on_as_the_command_has_it_already() {
    let place = Place::with_keys(["a"]);
    // The shell has a trap: without one, a shell that is about to start a program keeps the signal for later, and waits first.
    let script = "trap 'exit 130' INT; echo ready; while true; do sleep 0.01; done";
    let mut terminal = Terminal::start(&mut place.command(&["exec", "a", "--", "sh", "-c", script]));
    terminal.await_text("ready");
    terminal.press("\u{3}");
    assert_eq!(terminal.await_end(), 130);
    // A command in a session of its own does not get the signal from the terminal, so it would show a signal from the tool.
    let script =
        "trap 'echo interrupted' INT; trap 'echo over; exit 5' USR1; echo ready; while true; do sleep 0.01; done";
    let mut terminal = Terminal::start(&mut place.command(&["exec", "a", "--", "setsid", "sh", "-c", script]));
    terminal.await_text("ready");
    terminal.press("\u{3}");
    // The echo shows that it was sent. The tool takes it before the next one, which has a higher number.
    terminal.await_text("^C");
    terminal.program.signal(Signal::SIGUSR1);
    assert_eq!(terminal.await_end(), 5);
    assert!(terminal.text().contains("over") && !terminal.text().contains("interrupted"), "{}", terminal.text());
}

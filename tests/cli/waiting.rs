//! Guards `wait` and `watch`: which changes end a wait, when, and what is printed.

use std::fs;
use std::io::{BufRead as _, BufReader};

use gensync::{CacheKey, GenerationSynchronizer, Table};

use nix::sys::signal::Signal;

use crate::tool::{Place, Running, eventually};

/// Waits until the key has a waiter.
fn await_waiter(place: &Place, key: &str) {
    let table = place.table();
    eventually("waiting for a waiter", || table.slot(CacheKey::raw(key)).unwrap().unwrap().is_awaited());
}

/// Waits until the program sleeps on a futex: a watch has then seen all keys, and reports each change.
fn await_sleep(program: &Running) {
    let path = format!("/proc/{}/syscall", program.pid());
    let (one, several) = (nix::libc::SYS_futex, nix::libc::SYS_futex_waitv);
    eventually("waiting for a watch", || {
        let call = fs::read_to_string(&path).unwrap_or_default();
        let number = call.split(' ').next().and_then(|number| number.parse().ok());
        number == Some(one) || number == Some(several)
    });
}

#[test]
fn a_wait_ends_with_the_change_and_prints_the_new_generation() {
    let place = Place::with_keys(["a"]);
    let waiter = place.start(&["wait", "a"]);
    await_waiter(&place, "a");
    assert_eq!(place.object(&["get", "a"])["waiters"], true);
    let generation = place.sync("a").mark_updated().unwrap();
    let said = waiter.said();
    assert_eq!((said.status, &*said.out), (0, &*format!("{generation}\n")));

    let waiter = place.start(&["--json", "wait", "a", "--timeout", "60s"]);
    await_waiter(&place, "a");
    place.succeed(&["clear", "a"]);
    let said = waiter.said();
    let object = &crate::tool::objects(&said.out)[0];
    assert_eq!((&object["changed"], &object["generation"]), (&true.into(), &(generation.get() + 1).into()));
}

#[test]
fn a_wait_times_out_with_status_1() {
    let place = Place::with_keys(["a"]);
    for timeout in ["50ms", "0s", "0.01s", "1ms 1us", "0", "0.05"] {
        place.fail(1, "timed out: a has not changed", &["wait", "a", "--timeout", timeout]);
    }
    place.fail(1, "timed out", &["wait", "a", "--read-only", "--timeout", "50ms"]);
    for timeout in ["5.5.5", "x", "inf", "1e400", "", "-5s", "5 parsecs"] {
        place.fail(2, "--timeout", &["wait", "a", &format!("--timeout={timeout}")]);
    }
    place.fail(1, "no such key: b", &["wait", "b", "--timeout", "1ms"]);
}

#[test]
fn a_change_that_came_before_the_wait_is_found_by_the_generation_that_was_seen() {
    let place = Place::with_keys(["a"]);
    let seen = place.succeed(&["get", "a"]).trim().to_owned();
    place.fail(1, "timed out", &["wait", "a", "--seen", &seen, "--timeout", "10ms"]);
    place.succeed(&["mark", "a"]);
    assert_eq!(place.succeed(&["wait", "a", "--seen", &seen]), place.succeed(&["get", "a"]));
    assert_eq!(place.succeed(&["wait", "a", "--seen", "0", "--read-only"]), place.succeed(&["get", "a"]));
    place.fail(2, "expected a generation", &["wait", "a", "--seen", "x"]);
    place.fail(2, "--seen", &["wait", "a", "--seen=-1"]);
}

#[test]
fn one_wait_is_for_several_keys() {
    let place = Place::with_keys(["a", "b", "c"]);
    let waiter = place.start(&["--json", "wait", "a", "b", "--timeout", "60"]);
    await_waiter(&place, "b");
    place.succeed(&["mark", "c"]);
    let generation = place.sync("b").mark_updated().unwrap().get();
    let said = waiter.said();
    let objects = crate::tool::objects(&said.out);
    assert_eq!((said.status, objects.len()), (0, 1));
    assert_eq!((&objects[0]["key"], &objects[0]["generation"]), (&"b".into(), &generation.into()));
    let text = place.succeed(&["wait", "a", "b", "--seen", "0", "--seen", &generation.to_string()]);
    assert!(text.starts_with("a  ") && text.lines().count() == 1, "{text}");
    place.fail(2, "once for each", &["wait", "a", "b", "--seen", "1"]);
    // JSON also says that the wait timed out.
    let objects = place.objects(&["wait", "a", "b", "--timeout", "10ms"]);
    assert!(
        objects.len() == 2 && objects.iter().all(|object| object["timed_out"] == true && object["changed"] == false)
    );
}

#[test]
fn no_command_waits_for_a_listener_that_is_gone() {
    for (arguments, status) in [(&["wait", "a"][..], 1), (&["wait", "a", "--read-only"], 1), (&["watch"], 0)] {
        // A pipe.
        let place = Place::with_keys(["a"]);
        let mut waiter = place.start(arguments);
        eventually("waiting for the tool", || !place.objects(&["ps"]).is_empty());
        drop(waiter.child().stdout.take());
        assert_eq!(waiter.status().code(), Some(status), "{arguments:?}");
        // A terminal that is not its own, so that no signal comes.
        let pair = crate::tool::pty();
        let mut command = place.command(arguments);
        command.stdin(std::process::Stdio::null()).stdout(pair.slave).stderr(std::process::Stdio::null());
        let waiter = Running::start(&mut command);
        eventually("waiting for the tool", || !place.objects(&["ps"]).is_empty());
        drop((command, pair.master));
        assert_eq!(waiter.status().code(), Some(status), "{arguments:?}");
        place.sync("a").mark_updated().unwrap();
    }
}

#[test]
fn the_first_process_of_a_container_ends_when_it_is_signalled() {
    if !crate::tool::can_be_first() {
        return;
    }
    for (arguments, signal) in
        [(["wait", "a"], Signal::SIGTERM), (["watch", "*"], Signal::SIGTERM), (["watch", "*"], Signal::SIGINT)]
    {
        let place = Place::with_keys(["a"]);
        let (outer, first) = crate::tool::start_first(&place, &arguments);
        eventually("waiting for the tool", || !place.objects(&["ps"]).is_empty());
        nix::sys::signal::kill(first, signal).unwrap();
        assert_eq!(outer.status().code(), Some(128 + signal as i32), "{arguments:?}");
    }
}

#[test]
fn a_wait_ends_when_the_table_begins_anew() {
    for read_only in [false, true] {
        let place = Place::with_keys(["a"]);
        let flag = if read_only { &["--read-only"][..] } else { &[] };
        let waiter = place.start(&[&["wait", "a", "--timeout", "60s"], flag].concat());
        if read_only {
            // It leaves no mark; once it has the table mapped, it has also seen the key, or finds no such key.
            eventually("waiting for the tool", || !place.objects(&["ps"]).is_empty());
        } else {
            await_waiter(&place, "a");
        }
        place.table().reset().unwrap();
        place.sync("a");
        assert!(waiter.said().status <= i32::from(read_only));
    }
}

#[test]
fn a_wait_ends_when_the_maker_of_an_update_is_killed() {
    let place = Place::with_keys(["a"]);
    let sync = place.sync("a");
    let child = crate::support::in_child(|| {
        let _update = sync.begin_update().unwrap();
        nix::unistd::pause();
    });
    eventually("waiting for the update", || place.table().slots().next().unwrap().pending() == 1);
    let waiter = place.start(&["wait", "a", "--timeout", "60s"]);
    await_waiter(&place, "a");
    child.kill();
    assert_eq!(waiter.said().status, 0);
}

#[test]
fn each_change_is_a_line_with_its_time() {
    let place = Place::with_keys(["user:1", "routes"]);
    let mut watch = place.start(&["watch", "user:*", "--count", "3"]);
    await_sleep(&watch);
    let mut lines = BufReader::new(watch.child().stdout.take().unwrap()).lines().map(Result::unwrap);
    let user = place.sync("user:1");
    place.succeed(&["mark", "routes"]);
    for _ in 0..2 {
        let generation = user.mark_updated().unwrap();
        let line = lines.next().unwrap();
        let words: Vec<_> = line.split_whitespace().collect();
        assert_eq!(words[1..], ["user:1", &generation.to_string()]);
        let time: clock::Time = words[0].parse().unwrap();
        assert!(time.is_now(), "{line}");
    }
    place.succeed(&["create", "user:2"]);
    assert!(lines.next().unwrap().contains("  user:2  "));
    assert_eq!(lines.next(), None);
    assert_eq!(watch.status().code(), Some(0));
}

/// Parses times as the program writes them, without the code of the program.
mod clock {
    use std::time::{Duration, SystemTime, UNIX_EPOCH};

    #[derive(Debug)]
    pub(super) struct Time(SystemTime);

    impl std::str::FromStr for Time {
        type Err = String;

        fn from_str(text: &str) -> Result<Self, String> {
            // 2026-11-25T02:10:02.123+00:00
            let field = |from: usize, to: usize| text.get(from..to).and_then(|field| field.parse::<u64>().ok());
            let fields =
                || Some((field(0, 4)?, field(5, 7)?, field(8, 10)?, field(11, 13)?, field(14, 16)?, field(17, 19)?));
            let (year, month, day, hour, minute, second) = fields().ok_or(text)?;
            let millisecond = field(20, 23).ok_or(text)?;
            if !text.ends_with("+00:00") || text.len() != 29 {
                return Err(text.to_owned());
            }
            // The days before a date, in years that begin in March, so that a leap day is the last day of its year.
            let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
            let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 1 - 719_468;
            let seconds = days * 86_400 + hour * 3600 + minute * 60 + second;
            Ok(Self(UNIX_EPOCH + Duration::from_millis(seconds * 1000 + millisecond)))
        }
    }

    impl Time {
        pub(super) fn is_now(&self) -> bool {
            SystemTime::now().duration_since(self.0).is_ok_and(|age| age < Duration::from_secs(60))
        }
    }
}

#[test]
fn a_watch_ends_after_its_time_and_says_whether_anything_changed() {
    let place = Place::with_keys(["a"]);
    place.fail(1, "timed out after 0 changes", &["watch", "--timeout", "50ms"]);
    place.fail(2, "--timeout", &["watch", "--timeout", "soon"]);
    place.fail(2, "--count", &["watch", "--count", "0"]);
    place.fail(2, "GLOB", &["watch", "[z-"]);
    let watch = place.start(&["--json", "watch", "--timeout", "3s"]);
    await_sleep(&watch);
    place.succeed(&["mark", "a"]);
    let said = watch.said();
    let changes = crate::tool::objects(&said.out);
    assert_eq!((said.status, changes.len()), (0, 1));
    assert!(changes[0]["time"].as_str().unwrap().parse::<clock::Time>().unwrap().is_now());
    assert_eq!(changes[0]["key"], "a");
}

#[test]
fn a_watch_without_write_permission_says_nothing_in_the_table() {
    let place = Place::with_keys(["a"]);
    let watch = place.start(&["watch", "--read-only", "--count", "1"]);
    eventually("waiting for the tool", || !place.objects(&["ps"]).is_empty());
    assert!(!place.table().slots().next().unwrap().is_awaited());
    // It may not have begun to watch yet.
    let sync = place.sync("a");
    let mut watch = watch;
    eventually("waiting for the watch", || {
        sync.mark_updated().unwrap();
        watch.child().try_wait().unwrap().is_some()
    });
    assert!(watch.said().out.contains("  a  "));
}

/// Runs a watch that executes `script` for a change of `key`, and waits for its end.
fn watch_once(key: &str, script: &str) -> (Place, crate::tool::Said, u64) {
    let place = Place::empty();
    let sync = GenerationSynchronizer::new(&Table::open(&place.path).unwrap(), CacheKey::raw(key)).unwrap();
    let mut command = place.command(&["watch", "--count", "1", "--exec", script]);
    command.current_dir(place.folder.path()).stdin(std::process::Stdio::null());
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let watch = Running::start(&mut command);
    await_sleep(&watch);
    let generation = sync.mark_updated().unwrap().get();
    (place, watch.said(), generation)
}

#[test]
fn a_command_is_run_for_each_change() {
    let (place, said, generation) =
        watch_once("a b", "printf '%s|%s|' {key} {generation} \"<{key}>\" > out; gensync=1");
    assert_eq!(said.status, 0, "{said:?}");
    let out = fs::read_to_string(place.folder.path().join("out")).unwrap();
    assert_eq!(out, format!("a b|{generation}|<a b>||"));
}

#[test]
fn the_status_of_the_last_command_that_failed_is_passed_on() {
    let (_place, said, _) = watch_once("a", "exit 9");
    assert_eq!(said.status, 9);
    assert!(said.err.contains("the command for a ended with exit status: 9"));
    let (_place, said, _) = watch_once("a", "kill -TERM $$");
    assert_eq!(said.status, 143);
}

#[test]
fn a_hostile_key_runs_no_command_in_whatever_quotes_it_is_put() {
    let keys = [
        "$(touch pwned)",
        "`touch pwned`",
        "; touch pwned;",
        "'; touch pwned; '",
        "\"; touch pwned; \"",
        "\n touch pwned \n",
        "| touch pwned",
        "& touch pwned &",
        "${IFS}",
        "\\\"; touch pwned #",
        "a\0b",
        "{generation}",
        "{key}",
        "é\u{202e}*",
    ];
    for key in keys {
        for script in [
            "printf %s {key} > out",
            "printf %s \"{key}\" > out",
            "sh -c 'printf %s \"{key}\"' > out",
            "x={key}; printf %s \"$x\" > out",
            "printf %s \"$(printf %s {key})\" > out",
        ] {
            let (place, said, _) = watch_once(key, script);
            assert!(!place.folder.path().join("pwned").exists(), "{key:?} ran a command in {script}");
            assert_eq!(said.status, 0, "{said:?}");
            let out = fs::read_to_string(place.folder.path().join("out")).unwrap();
            let is_split = script.contains("$(printf") || key.contains('\0');
            assert!(is_split || out == key, "{script} got {out:?} for {key:?}");
        }
    }
}

#[test]
fn a_key_that_is_too_long_for_a_variable_does_not_end_the_watch() {
    // As a variable cannot contain a NUL, these are escaped, which makes twice as many bytes.
    let long = "\0".repeat(65_536);
    let place = Place::with_keys([&long, "a"]);
    let mut watch = place.start(&["watch", "--count", "2", "--exec", "echo ran for {key}"]);
    let mut lines = BufReader::new(watch.child().stdout.take().unwrap()).lines();
    await_sleep(&watch);
    place.sync(&long).mark_updated().unwrap();
    assert!(lines.next().unwrap().unwrap().contains("\\0\\0"));
    place.sync("a").mark_updated().unwrap();
    assert!(lines.next().unwrap().unwrap().contains("  a  "));
    assert_eq!(lines.next().unwrap().unwrap(), "ran for a");
    let said = watch.said();
    assert_eq!(said.status, 126, "{said:?}");
    assert!(said.err.contains("\\0… cannot be run: ") && said.err.len() < 300, "{said:?}");
}

#[test]
fn the_command_knows_the_table() {
    let tool = env!("CARGO_BIN_EXE_gensync");
    let (place, said, generation) = watch_once("a", &format!("{tool} get {{key}} > out"));
    assert_eq!(said.status, 0, "{said:?}");
    assert_eq!(fs::read_to_string(place.folder.path().join("out")).unwrap(), format!("{generation}\n"));
}

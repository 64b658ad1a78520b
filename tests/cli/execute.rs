//! Guards `exec`: whichever process is killed, every process loads again when the change can be complete, neither before that nor
//! never.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;

use gensync::GenerationSynchronizer;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::LIMIT;
use crate::tool::{Place, Running, child_of, eventually, lives};

/// A command that says that it has begun, and goes on when it is released.
struct Held {
    place: Place,
    sync: GenerationSynchronizer,
    /// The pipe that releases the command. It is open from the beginning: a shell keeps an interrupt that comes while it opens a
    /// file for later, and would wait for the other end first.
    go: fs::File,
    path: PathBuf,
    tool: Option<Running>,
    command: Pid,
}

impl Held {
    /// Starts the tool with a command that runs `script` once it is released.
    fn start(script: &str) -> Self {
        let place = Place::with_keys(["key"]);
        let sync = place.sync("key");
        let path = place.folder.path().join("go");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let script = format!("read line < {}; {script}", path.display());
        let tool = place.start(&["exec", "key", "--", "sh", "-c", &script]);
        let mut options = fs::File::options();
        let options = options.write(true).custom_flags(nix::libc::O_NONBLOCK);
        let mut go = None;
        eventually("waiting for the command to begin", || {
            go = options.open(&path).ok();
            go.is_some()
        });
        let command = child_of(tool.pid(), path.to_str().unwrap());
        Self { place, sync, go: go.unwrap(), path, tool: Some(tool), command }
    }

    fn tool(&self) -> &Running {
        self.tool.as_ref().unwrap()
    }

    fn assert_in_flight(&self) {
        for _ in 0..100 {
            assert!(!self.sync.is_expired(), "announced before the command has made the change");
        }
        let key = self.place.object(&["get", "key"]);
        assert_eq!((&key["pending"], &key["abandoned"]), (&1.into(), &false.into()));
    }

    fn let_go(&self) {
        (&self.go).write_all(b"go\n").unwrap();
    }

    /// Kills the tool, and asserts that the key expires at once, and once only: the command has not ended yet.
    fn kill_tool(&mut self) {
        let seen = self.sync.sync_gen().unwrap().get();
        self.tool().signal(Signal::SIGKILL);
        assert_eq!(self.tool.take().unwrap().status().signal(), Some(9));
        assert!(self.sync.wait_timeout(LIMIT).is_changed());
        assert_eq!(self.sync.refresh().unwrap().get(), seen + 1);
    }

    fn is_command_alive(&self) -> bool {
        let command = fs::read(format!("/proc/{}/cmdline", self.command)).unwrap_or_default();
        String::from_utf8_lossy(&command).contains(self.path.to_str().unwrap())
    }

    fn assert_announced(&self) {
        assert!(self.sync.wait_timeout(LIMIT).is_changed());
        self.sync.refresh().unwrap();
        assert_eq!(self.place.object(&["get", "key"])["pending"], 0);
        assert!(!self.sync.is_expired(), "announced twice");
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.is_command_alive() {
            let _ = kill(self.command, Signal::SIGKILL);
        }
    }
}

#[test]
fn every_process_is_expired_when_the_command_has_ended_and_its_status_is_passed_on() {
    let mut held = Held::start("echo out; echo err >&2; exit 7");
    held.assert_in_flight();
    held.let_go();
    let said = held.tool.take().unwrap().said();
    assert_eq!((said.status, &*said.out, &*said.err), (7, "out\n", "err\n"));
    held.assert_announced();
}

#[test]
fn the_command_is_killed() {
    for signal in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGSEGV] {
        let mut held = Held::start("true");
        held.assert_in_flight();
        kill(held.command, signal).unwrap();
        assert_eq!(held.tool.take().unwrap().status().code(), Some(128 + signal as i32));
        held.assert_announced();
    }
}

#[test]
fn the_tool_is_killed_and_the_command_goes_on() {
    let mut held = Held::start("true");
    held.kill_tool();
    held.assert_in_flight();
    held.let_go();
    held.assert_announced();
}

#[test]
fn the_tool_the_witness_and_the_command_are_killed_at_once() {
    let mut held = Held::start("true");
    let tool = held.tool().pid();
    let witness = child_of(tool, "witness");
    assert!(nix::unistd::getpgid(Some(witness)) == Ok(witness), "what is typed at the terminal would kill it");
    kill(witness, Signal::SIGKILL).unwrap();
    held.assert_in_flight();
    held.tool().signal(Signal::SIGSTOP);
    kill(held.command, Signal::SIGKILL).unwrap();
    held.tool().signal(Signal::SIGKILL);
    held.tool = None;
    held.assert_announced();
}

#[test]
fn the_tool_is_killed_and_then_the_command() {
    let mut held = Held::start("true");
    held.kill_tool();
    held.assert_in_flight();
    kill(held.command, Signal::SIGKILL).unwrap();
    held.assert_announced();
}

#[test]
fn the_command_is_killed_while_the_tool_is_stopped_and_then_the_tool() {
    let held = Held::start("true");
    held.tool().signal(Signal::SIGSTOP);
    kill(held.command, Signal::SIGKILL).unwrap();
    eventually("waiting for the command to end", || !lives(held.command));
    // The tool alone holds the lock now.
    held.assert_in_flight();
    let seen = held.sync.sync_gen().unwrap().get();
    held.tool().signal(Signal::SIGKILL);
    // The witness announces the change, and again as it finds that no maker of the update lives.
    eventually("waiting for both announcements", || {
        let key = held.place.object(&["get", "key"]);
        (&key["generation"], &key["pending"]) == (&(seen + 2).into(), &0.into())
    });
}

#[test]
fn a_daemon_that_the_command_leaves_behind_keeps_nothing_in_flight() {
    let mut held = Held::start("sleep 60 > /dev/null 2>&1 & echo $!");
    held.let_go();
    let said = held.tool.take().unwrap().said();
    held.assert_announced();
    let daemon = Pid::from_raw(said.out.trim().parse().unwrap());
    kill(daemon, Signal::SIGKILL).expect("the daemon lives on");
}

#[test]
fn what_the_tool_is_sent_is_passed_on() {
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1] {
        let mut held = Held::start("true");
        held.tool().signal(signal);
        assert_eq!(held.tool.take().unwrap().status().code(), Some(128 + signal as i32));
        held.assert_announced();
    }
}

#[test]
fn a_command_that_handles_a_signal_ends_as_it_likes() {
    let place = Place::with_keys(["key"]);
    let sync = place.sync("key");
    let ready = place.folder.path().join("ready");
    let script = format!("trap 'exit 42' TERM; > {}; while true; do sleep 0.01; done", ready.display());
    let tool = place.start(&["exec", "key", "--", "sh", "-c", &script]);
    eventually("waiting for the command", || ready.exists());
    assert!(!sync.is_expired());
    tool.signal(Signal::SIGTERM);
    assert_eq!(tool.status().code(), Some(42));
    assert!(sync.is_expired());
}

#[test]
fn a_command_that_cannot_be_run_announces_nothing() {
    let place = Place::with_keys(["key"]);
    let sync = place.sync("key");
    place.fail(127, "no-such-command cannot be run: No such file", &["exec", "key", "--", "no-such-command"]);
    place.fail(126, "cannot be run: Permission denied", &["exec", "key", "--", "/dev/null"]);
    assert!(!sync.is_expired());
    assert_eq!(place.object(&["get", "key"])["pending"], 0);
}

#[test]
fn a_missing_key_skips_no_step_unless_that_is_asked_for() {
    let place = Place::with_keys(["key"]);
    let trace = place.folder.path().join("trace");
    let touch = ["--", "touch", trace.to_str().unwrap()];
    place.fail(125, "the command was not run", &[&["exec", "--must-exist", "key", "other"][..], &touch].concat());
    place.fail(125, "no key matches 'x*'", &[&["exec", "--existing", "x*"][..], &touch].concat());
    place.fail(125, "the key is empty", &[&["exec", ""][..], &touch].concat());
    place.fail(125, "required", &["exec", "key"]);
    place.fail(125, "required", &["--table", "exec", "exec", "key"]);
    place.fail(125, "required", &[&["exec"][..], &touch].concat());
    let empty = Place::empty();
    empty.fail(125, "no such table", &[&["exec", "key"][..], &touch].concat());
    assert!(!trace.exists() && !empty.path.exists());
    assert_eq!(place.table().stats().keys, 1);
    place.fail(0, "no key matches 'x*'", &[&["exec", "x*"][..], &touch].concat());
    fs::remove_file(&trace).unwrap();
    place.fail(0, "other: created", &[&["exec", "key", "other"][..], &touch].concat());
    assert!(trace.exists());
    assert_eq!(place.object(&["get", "other"])["updates"], 1);
    place.succeed(&["reset", "--yes"]);
    place.fail(0, "key: created", &["exec", "key", "--", "true"]);
    empty.run(&[&["exec", "--create", "key"][..], &touch].concat());
    assert_eq!(empty.object(&["get", "key"])["updates"], 1);
    // A command's own 1, 2 and 3 differ from the status of a refusal.
    for status in ["1", "2", "3"] {
        let said = place.run(&["exec", "key", "--", "sh", "-c", &format!("exit {status}")]);
        assert_eq!(said.status.to_string(), status);
    }
}

#[test]
fn globs_and_all_choose_keys_also_those_that_come_while_the_command_runs() {
    let long = "user:".to_owned() + &"x".repeat(150);
    let place = Place::with_keys(["user:1", "user:2", "routes", &long]);
    let syncs = ["user:1", "user:2", &long, "routes"].map(|key| place.sync(key));
    let expired = || syncs.each_ref().map(GenerationSynchronizer::is_expired);
    place.succeed(&["exec", "user:*", "--", "true"]);
    assert_eq!(expired(), [true, true, true, false]);
    assert_eq!(place.objects(&["exec", "user:*", "user:1", "--", "true"]).len(), 3, "each once");
    let digest = place.object(&["get", "routes"])["digest"].as_str().unwrap().to_owned();
    place.succeed(&["exec", "--digest", &digest, "--", "true"]);
    assert_eq!(expired(), [true; 4]);
    syncs.iter().for_each(|sync| _ = sync.refresh().unwrap());
    let tool = env!("CARGO_BIN_EXE_gensync");
    let script = format!("{tool} --json ls user:1 | grep -q '\"pending\":1' && {tool} create later > /dev/null");
    place.succeed(&["exec", "--all", "--", "sh", "-c", &script]);
    assert_eq!(expired(), [true; 4]);
    assert_eq!(place.object(&["get", "later"])["updates"], 1);
}

#[test]
fn a_long_key_is_announced_if_all_of_it_matches() {
    let long = "user:".to_owned() + &"ä".repeat(60) + ":name";
    let place = Place::with_keys(["user:1", &long]);
    let sync = place.sync(&long);
    let matching = ["user:*:name", "*:name", "*[mn]ame", "user:ä*", "us?r:*"];
    for command in [&["mark"][..], &["clear"], &["exec"]] {
        for glob in matching.iter().chain(&["user:?", "users:*", "user:a*", "[!u]*:name", "ä*", "*:nam", "user:*ä"]) {
            let behind: &[&str] = if command == ["exec"] { &["--", "true"] } else { &[] };
            let said = place.run(&[command, &[glob], behind].concat());
            assert_eq!(sync.is_expired(), matching.contains(glob), "{command:?} {glob}: {said:?}");
            sync.refresh().unwrap();
        }
    }
}

#[test]
fn more_keys_than_descriptors() {
    let place = Place::empty();
    let table = place.table();
    (0..300).for_each(|i| drop(GenerationSynchronizer::new(&table, format!("key:{i}")).unwrap()));
    let script = r#"ulimit -Sn 100; exec "$0" exec --all -- true"#;
    let mut shell = std::process::Command::new("sh");
    shell.env("GENSYNC_TABLE", &place.path).args(["-c", script, env!("CARGO_BIN_EXE_gensync")]);
    let said = crate::tool::said(shell.output().unwrap());
    assert_eq!((said.status, &*said.err), (0, ""));
    assert!(table.slots().all(|slot| slot.updates() == 1 && slot.pending() == 0));
}

#[test]
fn a_killed_tool_announces_what_globs_chose() {
    let long = "user:".to_owned() + &"x".repeat(150);
    let place = Place::with_keys(["user:1", &long]);
    let syncs = ["user:1", &long].map(|key| place.sync(key));
    let begun = place.folder.path().join("begun");
    let script = format!("> {}; exec sleep 60", begun.display());
    let tool = place.start(&["exec", "user:*", "--", "sh", "-c", &script]);
    eventually("waiting for the command to begin", || begun.exists());
    let command = child_of(tool.pid(), "sleep");
    tool.signal(Signal::SIGKILL);
    for sync in &syncs {
        assert!(sync.wait_timeout(LIMIT).is_changed());
    }
    kill(command, Signal::SIGKILL).unwrap();
}

#[test]
fn what_keeps_an_update_from_beginning_is_reported() {
    let place = Place::with_keys(["key"]);
    let file = fs::File::options().read(true).write(true).open(&place.path).unwrap();
    let lock = |kind| {
        let range = nix::libc::flock { l_type: kind as i16, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
        // Waits for the lock: a program that another test has just forked has inherited the descriptor of the table that was
        // closed here, and with it a lock, until it executes.
        nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLKW(&range)).unwrap();
    };
    // The lock as a process that resets the table holds it.
    lock(nix::libc::F_WRLCK);
    let mut tool = place.start(&["exec", "key", "--", "true"]);
    let mut line = String::new();
    BufReader::new(tool.child().stderr.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "gensync: waiting for a reset of the table to end, for 30 s at most\n");
    lock(nix::libc::F_UNLCK);
    assert_eq!(tool.status().code(), Some(0));
}

#[test]
fn a_closed_terminal_is_signalled_to_the_command_by_the_leader_of_the_session() {
    let place = Place::with_keys(["key"]);
    let ready = place.folder.path().join("ready");
    let pair = crate::tool::pty();
    let end = || pair.slave.try_clone().unwrap();
    let script = format!("> {}; exec sleep 60", ready.display());
    let mut command = std::process::Command::new("setsid");
    command.args(["--ctty", env!("CARGO_BIN_EXE_gensync"), "exec", "key", "--", "sh", "-c", &script]);
    command.env("GENSYNC_TABLE", &place.path).stdin(end()).stdout(end()).stderr(end());
    let tool = Running::start(&mut command);
    eventually("waiting for the command", || ready.exists());
    drop(command);
    drop(pair);
    assert_eq!(tool.status().code(), Some(128 + 1));
}

#[test]
fn the_first_process_of_a_container_passes_signals_on_and_leaves_no_zombies() {
    if !crate::tool::can_be_first() {
        return;
    }
    let place = Place::with_keys(["key"]);
    let go = place.folder.path().join("go");
    nix::unistd::mkfifo(&go, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let script = format!("(sh -c 'read line < {0}; : orphan' &); exec sleep 60", go.display());
    let (outer, first) = crate::tool::start_first(&place, &["exec", "key", "--", "sh", "-c", &script]);
    let command = child_of(first, "exec");
    eventually("waiting for the command", || {
        fs::read_to_string(format!("/proc/{command}/task/{command}/children")).is_ok_and(|text| !text.is_empty())
    });
    let orphan = child_of(first, "sh\0-c\0read");
    fs::write(&go, "go\n").unwrap();
    eventually("waiting for the orphan's end", || !std::path::Path::new(&format!("/proc/{orphan}")).exists());
    kill(first, Signal::SIGTERM).unwrap();
    assert_eq!(outer.status().code(), Some(143));
    assert_eq!(place.object(&["get", "key"])["updates"], 1);
}

#[test]
fn one_command_changes_several_keys_and_keys_of_parts() {
    let place = Place::with_keys(["a", "b", "c", "u:1"]);
    let syncs = ["a", "b", "c", "u:1"].map(|key| place.sync(key));
    let expired = || syncs.each_ref().map(GenerationSynchronizer::is_expired);
    let objects = place.objects(&["exec", "a", "b", "--", "true"]);
    assert_eq!(expired(), [true, true, false, false]);
    assert_eq!((&objects[1]["key"], &objects[1]["status"]), (&"b".into(), &0.into()));
    assert_eq!(objects[0]["generation"], syncs[0].refresh().unwrap().get());
    place.succeed(&["exec", "--part", "u", "--part", "1", "--", "true"]);
    assert_eq!(expired(), [false, true, false, true]);
}

#[test]
fn the_command_has_the_tools_input_and_no_blocked_signals() {
    let place = Place::with_keys(["key"]);
    let mut command = place.command(&["exec", "key", "--", "sh", "-c", "cat; grep SigBlk /proc/self/status"]);
    fs::write(place.folder.path().join("input"), "text\n").unwrap();
    let input = fs::File::open(place.folder.path().join("input")).unwrap();
    let said = crate::tool::said(command.stdin(input).output().unwrap());
    assert_eq!((said.status, &*said.out), (0, "text\nSigBlk:\t0000000000000000\n"));
}

#[test]
fn what_is_ignored_stays_ignored() {
    let place = Place::with_keys(["key"]);
    let tool = env!("CARGO_BIN_EXE_gensync");
    let script = format!("trap '' HUP CHLD; exec {tool} exec key -- sh -c 'grep SigIgn /proc/self/status; exit 3'");
    let mut shell = std::process::Command::new("sh");
    let said = crate::tool::said(shell.env("GENSYNC_TABLE", &place.path).args(["-c", &script]).output().unwrap());
    assert_eq!((said.status, &*said.err), (3, ""), "how the command ended is known in spite of SIGCHLD");
    let ignored = u64::from_str_radix(said.out.trim().strip_prefix("SigIgn:").unwrap().trim(), 16).unwrap();
    assert_eq!(ignored & 1, 1, "{}", said.out);
}

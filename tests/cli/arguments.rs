//! The command line: bad input of each argument, help, exit statuses, and output that goes nowhere.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::os::unix::ffi::OsStrExt as _;
use std::process::Stdio;

use gensync::{GenerationSynchronizer, Table};

use crate::tool::{Place, Running, program, said};

const COMMANDS: [&str; 18] = [
    "ls",
    "get",
    "mark",
    "clear",
    "create",
    "exec",
    "wait",
    "watch",
    "top",
    "ps",
    "stat",
    "doctor",
    "reset",
    "rm",
    "metrics",
    "bench",
    "completions",
    "man",
];

#[test]
fn each_command_tells_how_it_is_used() {
    let place = Place::empty();
    let help = place.succeed(&["--help"]);
    for command in COMMANDS {
        assert!(help.contains(&format!("\n  {command} ")), "{command}");
        let own = place.succeed(&[command, "--help"]);
        assert!(own.contains(&format!("Usage: gensync {command}")), "{own}");
        let page = place.succeed(&["man", command]);
        assert!(page.contains(".SH NAME") && page.contains(&format!("gensync\\-{command}")), "{page}");
    }
    assert!(!help.contains("bench-worker"));
    for status in ["0  done", "1  a negative answer", "2  the command line is wrong", "3  the table"] {
        assert!(help.contains(status));
    }
    assert!(place.succeed(&["--version"]).starts_with("gensync 0."));
    assert!(place.succeed(&["man"]).contains("Exit status"));
    place.fail(2, "there is no command 'x'", &["man", "x"]);
    for (shell, part) in [
        ("bash", "complete -F"),
        ("zsh", "#compdef gensync"),
        ("fish", "complete -c gensync"),
        ("elvish", "edit:completion"),
    ] {
        assert!(place.succeed(&["completions", shell]).contains(part));
    }
    place.fail(2, "invalid value 'x'", &["completions", "x"]);
}

#[test]
fn what_is_wrong_on_the_command_line_is_named_with_status_2() {
    let place = Place::with_keys(["a"]);
    let before = crate::tool::bytes(&place.path);
    for (arguments, told) in [
        (&[][..], "Usage:"),
        (&["list"], "unrecognized subcommand 'list'"),
        (&["ls", "a", "b"], "unexpected argument 'b'"),
        (&["ls", "--sort", "size"], "invalid value 'size'"),
        (&["ls", "***"], "invalid value '***'"),
        (&["get"], "required"),
        (&["get", ""], "the key is empty"),
        (&["get", "a", "--part", "b"], "cannot be used with"),
        (&["get", "--part", ""], "the key is empty"),
        (&["get", "--raw", "--domain", "x", "a"], "cannot be used with"),
        (&["get", "--raw", "--part", "x"], "cannot be used with"),
        (&["mark"], "required"),
        (&["mark", "--all", "a"], "cannot be used with"),
        (&["mark", "--all", "--create"], "cannot be used with"),
        (&["clear", "--all", "--part", "x"], "cannot be used with"),
        (&["clear", "[a"], "is no glob"),
        (&["create"], "required"),
        (&["exec", "--", "true"], "required"),
        (&["exec", "a", "true"], "required"),
        (&["wait"], "required"),
        (&["watch", "--exec"], "a value is required"),
        (&["reset", "--no"], "unexpected argument '--no'"),
        (&["--table", "", "ls"], "a value is required"),
        (&["--app", "", "ls"], "the application's name is \"\""),
        (&["--app", "../x", "ls"], "the application's name is \"../x\""),
        (&["--table", "x", "--app", "y", "ls"], "name two tables"),
        (&["--table", "x", "ls", "--app", "y"], "name two tables"),
        (&["ls", "--table"], "a value is required"),
    ] {
        let said = place.run(arguments);
        assert_eq!((said.status, &*said.out), (2, ""), "{arguments:?}: {said:?}");
        assert!(said.err.contains(told), "{arguments:?}: \"{told}\" is not in {said:?}");
    }
    let no_text = OsStr::from_bytes(b"\xff");
    for command in ["ls", "get", "mark", "create", "wait", "watch", "man"] {
        let said = said(place.command(&[command]).arg(no_text).output().unwrap());
        assert!(said.status == 2 && said.err.contains("invalid UTF-8"), "{command}: {said:?}");
    }
    assert_eq!(crate::tool::bytes(&place.path), before);
}

#[test]
fn a_table_is_named_in_three_ways_and_must_be() {
    let [one, other] = [["one"], ["other"]].map(Place::with_keys);
    let keys = |arguments: &[&str]| {
        let said = one.run(&[arguments, &["--json", "ls"]].concat());
        crate::tool::objects(&said.out)[0]["key"].as_str().unwrap().to_owned()
    };
    let path = other.path.to_str().unwrap();
    assert_eq!(keys(&[]), "one");
    assert_eq!((keys(&["--table", path]), keys(&["-t", path])), ("other".to_owned(), "other".to_owned()));
    for value in [None, Some("")] {
        let mut command = program();
        command.arg("ls").envs(value.map(|value| ("GENSYNC_TABLE", value)));
        let said = said(command.output().unwrap());
        assert!(
            said.status == 2 && said.err.contains("give --table PATH or --app NAME, or set GENSYNC_TABLE"),
            "{said:?}"
        );
    }
    // A path that is no text is as good as another.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(OsStr::from_bytes(b"\xff.gensync"));
    let run = |argument| said(program().arg("--table").arg(&path).args(argument).output().unwrap());
    assert_eq!(run(["create", "a"]).status, 0);
    assert_eq!(run(["get", "a"]).status, 0);
}

#[test]
fn whoever_reads_the_output_may_stop() {
    let place = Place::empty();
    let table = Table::open(&place.path).unwrap();
    // More than a pipe takes.
    (0..5000).for_each(|i| drop(GenerationSynchronizer::new(&table, format!("key:{i}")).unwrap()));
    for arguments in [&["ls"][..], &["--json", "ls"], &["metrics"], &["clear", "--all"]] {
        let mut running =
            Running::start(place.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null()));
        let mut line = String::new();
        BufReader::with_capacity(64, running.child().stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(!line.is_empty());
        let said = running.said();
        assert_eq!((said.status, &*said.err), (0, ""), "{arguments:?}");
    }
    // Whatever was asked for is done all the same.
    let syncs = ["key:0", "key:4999"].map(|key| place.sync(key));
    let mut running = Running::start(place.command(&["mark", "key:1*", "key:*"]).stdout(Stdio::piped()));
    drop(running.child().stdout.take());
    assert_eq!(running.status().code(), Some(0));
    assert!(syncs.iter().all(GenerationSynchronizer::is_expired));
    // From the beginning.
    for arguments in
        [&["ls"][..], &["get", "key:1"], &["stat"], &["doctor"], &["man"], &["completions", "zsh"], &["--help"]]
    {
        let mut running =
            Running::start(place.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null()));
        drop(running.child().stdout.take());
        let said = running.said();
        assert!(said.status <= 1 && !said.err.contains("panicked"), "{arguments:?}: {said:?}");
    }
}

#[test]
fn output_that_cannot_be_written_is_told() {
    let place = Place::with_keys(["a"]);
    for arguments in [&["ls"][..], &["get", "a"], &["stat"], &["metrics"], &["--json", "doctor"]] {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let said = said(place.command(arguments).stdout(full).stderr(Stdio::piped()).output().unwrap());
        assert_eq!(said.status, 3, "{arguments:?}: {said:?}");
        assert!(said.err.contains("the output cannot be written"), "{said:?}");
    }
    // A mark is made whether it can be told or not.
    let sync = place.sync("a");
    let full = File::options().write(true).open("/dev/full").unwrap();
    assert_eq!(said(place.command(&["mark", "a"]).stdout(full).output().unwrap()).status, 3);
    assert!(sync.is_expired());
}

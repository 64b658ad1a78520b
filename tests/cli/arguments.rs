//! Guards against bad input that is accepted, missing help, wrong exit statuses, and changes that are lost because the output
//! cannot be written.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::os::unix::ffi::OsStrExt as _;
use std::process::Stdio;

use gensync::{GenerationSynchronizer, Table};

use crate::tool::{Place, Running, eventually, program, said};

const COMMANDS: [&str; 20] = [
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
    "upgrade",
    "rm",
    "metrics",
    "bench",
    "completions",
    "man",
    "tables",
];

#[test]
fn each_command_says_how_it_is_used() {
    let place = Place::empty();
    let help = place.succeed(&["--help"]);
    for command in COMMANDS {
        assert!(help.contains(&format!("\n  {command} ")), "{command}");
        let own = place.succeed(&[command, "--help"]);
        assert!(own.contains(&format!("Usage: gensync {command}")), "{own}");
        let page = place.succeed(&["man", command]);
        for section in ["ENVIRONMENT", "FILES", "\"EXAMPLES\"", "\"EXIT STATUS\""] {
            assert!(page.contains(&format!(".SH {section}\n")), "{section}: {page}");
        }
        assert!(own.contains("Examples:\n  gensync "), "{own}");
        assert!(page.contains(".SH NAME") && page.contains(&format!("gensync\\-{command}")), "{page}");
    }
    for hidden in ["bench-worker", "witness", "__complete"] {
        assert!(!help.contains(hidden));
        place.fail(2, "there is no command", &["man", hidden]);
        for shell in ["bash", "zsh", "fish", "elvish"] {
            // The scripts call it, but do not offer it.
            let script = place
                .succeed(&["completions", shell])
                .replace("gensync __complete keys", "")
                .replace(r#""${table[@]}" __complete"#, "")
                .replace("gensync $table __complete keys", "");
            assert!(
                !script.contains(hidden) && !script.contains(&hidden.replace('-', "__subcmd__")),
                "{shell}: {hidden}"
            );
        }
    }
    for status in ["0  done", "1  a negative answer", "2  the command line is wrong", "3  the table"] {
        assert!(help.contains(status));
    }
    assert!(place.succeed(&["--version"]).starts_with("gensync 0."));
    assert!(place.succeed(&["man"]).contains(".SH \"EXIT STATUS\""));
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
    const DIGEST: &str = "00000000000000000000000000000000";
    for (arguments, expected) in [
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
        (&["clear", "[a"], "is not a glob"),
        (&["mark", "--generations", "0", "a"], "expected the number of generations"),
        (&["mark", "--generations=-1", "a"], "expected the number of generations"),
        (&["get", "--generations", "4294967296", "a"], "for such keys, 1 to 4294967295"),
        (&["mark", "--generations", "4096"], "required"),
        (&["mark", "--generations", "4096", "--all"], "leave it out with --all and --digest"),
        (&["get", "--generations", "4096", "--digest", DIGEST], "leave it out with --all and --digest"),
        (&["mark", "--generations", "4096", "a", "u*"], "'u*' looks like a glob"),
        (&["create", "--generations", "4096", "u*"], "use --part if the * belongs to the key"),
        (&["wait", "--generations", "4096", ""], "the key is empty"),
        (&["watch", "--generations", "4096", "a"], "unexpected argument '--generations'"),
        (&["create"], "required"),
        (&["wait"], "required"),
        (&["watch", "--exec"], "a value is required"),
        (&["upgrade", "--table", "x", "y"], "two tables are named"),
        (&["--app", "x", "upgrade", "y"], "two tables are named"),
        (&["upgrade", ""], "a value is required"),
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
        assert!(said.err.contains(expected), "{arguments:?}: \"{expected}\" is not in {said:?}");
    }
    let no_text = OsStr::from_bytes(b"\xff");
    for command in ["ls", "get", "mark", "create", "wait", "watch", "man"] {
        let said = said(place.command(&[command]).arg(no_text).output().unwrap());
        assert!(said.status == 2 && said.err.contains("invalid UTF-8"), "{command}: {said:?}");
    }
    assert_eq!(crate::tool::bytes(&place.path), before);
}

#[test]
fn all_pages_are_written_that_the_main_page_refers_to() {
    let place = Place::empty();
    let folder = place.folder.path().join("share/man1");
    place.succeed(&["man", "--all", folder.to_str().unwrap()]);
    let main = std::fs::read_to_string(folder.join("gensync.1")).unwrap();
    let mut pages: Vec<_> =
        std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    pages.sort();
    assert_eq!(pages.len(), COMMANDS.len() + 2);
    for command in COMMANDS.iter().chain([&"help"]) {
        assert!(pages.contains(&format!("gensync-{command}.1")), "{command}: {pages:?}");
        assert!(main.contains(&format!("gensync\\-{command}(1)")), "{command}: {main}");
    }
    place.fail(3, "cannot be written", &["man", "--all", "/proc/no-such"]);
}

#[test]
fn keys_are_completed() {
    let place = Place::with_keys(["user:1", "users", "a b", "line\nbreak"]);
    let mut keys: Vec<_> = place.succeed(&["__complete", "keys"]).lines().map(str::to_owned).collect();
    keys.sort();
    assert_eq!(keys, ["a b", "user:1", "users"]);
    assert_eq!(Place::empty().succeed(&["__complete", "keys"]), "");
    std::fs::write(place.folder.path().join("script"), place.succeed(&["completions", "bash"])).unwrap();
    let tool = std::path::Path::new(env!("CARGO_BIN_EXE_gensync")).parent().unwrap();
    let script = "PATH=$1:$PATH; . \"$2/script\"; COMP_WORDS=(gensync get us); COMP_CWORD=2; \
                  _gensync_keys gensync us get; printf '%s\\n' \"${COMPREPLY[@]}\"";
    let mut bash = std::process::Command::new("bash");
    bash.args(["-c", script, "bash"]).arg(tool).arg(place.folder.path()).env("GENSYNC_TABLE", &place.path);
    let said = said(bash.output().unwrap());
    assert!(said.out.contains("user:1\n") && said.out.contains("users\n") && !said.out.contains("a\\ b"), "{said:?}");
    // Arguments as readline gives them: its words end at colons.
    let script = "PATH=$1:$PATH; . \"$2/script\"; COMP_WORDS=(gensync get user :); COMP_CWORD=3; COMP_LINE='gensync get user:'; \
                  COMP_POINT=17; COMP_WORDBREAKS=' :='; _gensync_keys gensync '' :; printf '<%s>' \"${COMPREPLY[@]}\"";
    let mut bash = std::process::Command::new("bash");
    bash.args(["-c", script, "bash"]).arg(tool).arg(place.folder.path()).env("GENSYNC_TABLE", &place.path);
    let said = crate::tool::said(bash.output().unwrap());
    assert!(said.out.contains("<1>") && !said.out.contains("users"), "{said:?}");
}

#[test]
fn keys_are_completed_by_zsh() {
    let place = Place::with_keys(["user:1", "routes"]);
    let functions = place.folder.path().join("functions");
    std::fs::create_dir(&functions).unwrap();
    std::fs::write(functions.join("_gensync"), place.succeed(&["completions", "zsh"])).unwrap();
    // Types into a shell in a terminal of its own; a tab completes the line.
    let script = r#"
        zmodload zsh/zpty
        zpty shell zsh -f -i
        zpty -w shell "PS1=; path=($1 \$path); fpath=($2 \$fpath); autoload -U compinit; compinit -u -D; bindkey '^I' complete-word"
        zpty -w shell "print re''ady"
        zpty -r shell out '*ready*'
        zpty -w -n shell $'print found: gensync > /dev/null; gensync --json --table '$3$' get us\t\n'
        zpty -w shell "print en''ded"
        zpty -r shell out '*ended*'
        print -r -- $out
    "#;
    let tool = std::path::Path::new(env!("CARGO_BIN_EXE_gensync")).parent().unwrap();
    let mut zsh = std::process::Command::new("zsh");
    zsh.args(["-f", "-c", script, "zsh"]).args([tool, &functions, &place.path]).env_remove("GENSYNC_TABLE");
    let Ok(output) = zsh.output() else { return eprintln!("skipped: there is no zsh") };
    let said = said(output);
    assert!(said.out.contains(r#""key":"user:1""#), "{said:?}");
}

#[test]
fn a_file_system_that_is_refused_can_be_allowed_by_its_number() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    let place = Place::empty();
    let folder = place.folder.path();
    if let Err(errno) = mount(Some("hugetlbfs"), folder, Some("hugetlbfs"), MsFlags::empty(), None::<&str>) {
        return eprintln!("skipped: the kernel refuses the mount: {errno}");
    }
    let advice = "\n  here, --allow-file-system=0x958458f6 accepts it\n";
    let refused =
        [&["create", "a"][..], &["exec", "--create", "a", "--", "true"], &["ls"]].map(|words| place.run(words));
    // It may still be refused for other reasons, but not as an unknown file system.
    let [hex, decimal] =
        ["0x958458f6", "2508478710"].map(|number| place.run(&["--allow-file-system", number, "create", "a"]));
    umount2(folder, MntFlags::MNT_DETACH).unwrap();
    assert!(refused[..2].iter().all(|said| said.err.contains(advice)), "{refused:?}");
    assert_eq!(refused.each_ref().map(|said| said.status), [3, 125, 3]);
    assert!(!hex.err.contains("none of those known") && !decimal.err.contains("none of those known"), "{hex:?}");
    place.fail(2, "expected the file system's number", &["--allow-file-system", "ext9", "ls"]);
    // The number is not taken for the name of the command.
    place.fail(125, "required", &["--allow-file-system", "1", "exec", "a"]);
    place.succeed(&["--allow-file-system=1", "create", "a"]);
    place.succeed(&["--allow-file-system=1", "exec", "a", "--", "true"]);
}

#[test]
fn tables_that_can_be_seen_are_listed_and_anonymous_ones_looked_at() {
    let place = Place::with_keys(["a"]);
    let row = |objects: Vec<serde_json::Value>| {
        objects.into_iter().find(|object| object["table"] == place.path.to_str().unwrap()).unwrap()
    };
    let mapped = |count| {
        eventually("waiting for forks of other tests to end", || row(place.objects(&["tables"]))["processes"] == count)
    };
    mapped(0);
    let found = row(place.objects(&["tables"]));
    assert_eq!((&found["state"], &found["keys"], &found["processes"]), (&"live".into(), &1.into(), &0.into()));
    // A table that a process has mapped is found without being named.
    let table = place.table();
    let found = row(crate::tool::objects(&said(program().args(["--json", "tables"]).output().unwrap()).out));
    // Children of this process that another test has just forked may have it mapped, too.
    assert!(found["processes"].as_u64().unwrap() >= 1, "{found}");
    mapped(1);
    drop(table);
    let table = Table::options().anonymous().unwrap();
    let sync = GenerationSynchronizer::new(&table, "of-nobody-else").unwrap();
    let all = crate::tool::objects(&said(program().args(["--json", "tables"]).output().unwrap()).out);
    let own = format!("/proc/{}/fd/", std::process::id());
    let paths: Vec<_> =
        all.iter().filter_map(|object| object["table"].as_str()).filter(|path| path.starts_with(&own)).collect();
    // Other tests of this process have anonymous tables, too.
    let said_of = |path: &&str| said(program().args(["--table", path, "ls"]).output().unwrap());
    assert!(paths.iter().map(said_of).any(|said| said.status == 0 && said.out.contains("of-nobody-else")), "{all:?}");
    let said = said(program().args(["--table", paths[0], "mark", "x"]).output().unwrap());
    assert_eq!(said.status, 3, "{said:?}");
    assert!(!sync.is_expired());
}

#[test]
fn a_runtime_folder_of_another_user_is_not_used() {
    let folder = tempfile::tempdir().unwrap();
    if std::os::unix::fs::chown(folder.path(), Some(1000), None).is_err() {
        return eprintln!("skipped: only root can give a folder to another user");
    }
    for command in ["create", "ls", "get"] {
        let arguments = ["--app", "shop", command, "a"];
        let said = said(program().env("XDG_RUNTIME_DIR", folder.path()).args(arguments).output().unwrap());
        assert_eq!(said.status, 3, "{said:?}");
        assert!(said.err.contains("XDG_RUNTIME_DIR belongs to user 1000"), "{said:?}");
    }
    assert!(!folder.path().join("gensync").exists());
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
    // A path need not be valid UTF-8.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(OsStr::from_bytes(b"\xff.gensync"));
    let run = |argument| said(program().arg("--table").arg(&path).args(argument).output().unwrap());
    assert_eq!(run(["create", "a"]).status, 0);
    assert_eq!(run(["get", "a"]).status, 0);
}

#[test]
fn the_reader_of_the_output_may_stop() {
    let place = Place::empty();
    let table = Table::open(&place.path).unwrap();
    // More than a pipe holds.
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
    // The command is carried out nevertheless.
    let syncs = ["key:0", "key:4999"].map(|key| place.sync(key));
    let mut running = Running::start(place.command(&["mark", "key:1*", "key:*"]).stdout(Stdio::piped()));
    drop(running.child().stdout.take());
    assert_eq!(running.status().code(), Some(0));
    assert!(syncs.iter().all(GenerationSynchronizer::is_expired));
    // The output is closed before the first byte is written.
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
fn output_that_cannot_be_written_is_reported() {
    let place = Place::with_keys(["a"]);
    for arguments in [&["ls"][..], &["get", "a"], &["stat"], &["metrics"], &["--json", "doctor"]] {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let said = said(place.command(arguments).stdout(full).stderr(Stdio::piped()).output().unwrap());
        assert_eq!(said.status, 3, "{arguments:?}: {said:?}");
        assert!(said.err.contains("the output cannot be written"), "{said:?}");
    }
    // A mark is made even if it cannot be printed.
    let sync = place.sync("a");
    let full = File::options().write(true).open("/dev/full").unwrap();
    assert_eq!(said(place.command(&["mark", "a"]).stdout(full).output().unwrap()).status, 3);
    assert!(sync.is_expired());
}

//! Guards `bench`: it measures, prints the figures, and leaves nothing behind.

use crate::tool::{Place, objects, program, said};

#[test]
fn five_things_are_measured_beside_bare_ones() {
    let folder = tempfile::tempdir().unwrap();
    let processes = || {
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let command =
            |entry: std::fs::DirEntry| std::fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
        entries.map(command).filter(|command| command.contains("bench-worker")).count()
    };
    let output = program().args(["--json", "bench", "--seconds", "1", "--processes", "2"]).output().unwrap();
    let said_json = said(output);
    assert_eq!((said_json.status, &*said_json.err), (0, ""));
    let measured = objects(&said_json.out);
    assert_eq!(measured.len(), 5);
    for one in &measured {
        assert!(one["gensync"].as_f64().unwrap() > 0.0 && one["bare"].as_f64().unwrap() > 0.0, "{one}");
    }
    assert!(measured[3]["name"].as_str().unwrap().contains("2 processes mark one key"));
    assert_eq!(processes(), 0, "workers are left");

    let text = said(program().args(["bench", "--seconds", "1"]).env("TMPDIR", folder.path()).output().unwrap());
    assert_eq!(text.status, 0, "{text:?}");
    assert_eq!(text.out.matches("  gensync  █").count() + text.out.matches("  bare     █").count(), 10);
    assert!(text.out.lines().any(|line| line.matches('█').count() == 40), "the greater one fills its line");
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let place = Place::empty();
    for arguments in
        [["--seconds", "0"], ["--seconds", "x"], ["--seconds", "3601"], ["--processes", "0"], ["--processes", "999"]]
    {
        place.fail(2, arguments[0], &[&["bench"][..], &arguments].concat());
    }
}

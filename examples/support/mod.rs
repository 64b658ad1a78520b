//! What the tests of servers share: building the server, a client, patience.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;
use std::thread::sleep;
use std::time::{Duration, Instant};

use ureq::Agent;

/// A limit for what takes much less time: a test fails after it rather than hangs.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);
/// More than the millisecond after a look at the lock of an update in which a process need not look again.
pub(crate) const NOTICED: Duration = Duration::from_millis(2);

/// The example of that name, which is in a package of its own; built once, as `cargo test --test` does not.
pub(crate) fn program(name: &'static str) -> PathBuf {
    static PROGRAMS: Mutex<BTreeMap<&str, PathBuf>> = Mutex::new(BTreeMap::new());
    let mut programs = PROGRAMS.lock().unwrap();
    let program = programs.entry(name).or_insert_with(|| {
        let test = std::env::current_exe().unwrap();
        let profile = test.parent().unwrap().parent().unwrap();
        let package = format!("gensync-{}", name.replace('_', "-"));
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(env!("CARGO_MANIFEST_DIR")).args([
            "build",
            "--quiet",
            "--package",
            &package,
            "--example",
            name,
        ]);
        cargo.arg("--target-dir").arg(profile.parent().unwrap());
        if profile.ends_with("release") {
            cargo.arg("--release");
        }
        assert!(cargo.status().unwrap().success(), "the example does not build");
        profile.join("examples").join(name)
    });
    program.clone()
}

/// A client with no connection yet, which keeps the one it makes.
pub(crate) fn client() -> Agent {
    let config = Agent::config_builder().proxy(None).http_status_as_error(false).timeout_global(Some(LIMIT));
    config.build().new_agent()
}

pub(crate) fn eventually<T>(otherwise: &str, mut find: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + LIMIT;
    loop {
        if let Some(found) = find() {
            return found;
        }
        assert!(Instant::now() < end, "{otherwise}");
        sleep(Duration::from_millis(1));
    }
}

//! Guards against what nobody thought of: many processes do everything at once and at random, are killed wherever they
//! are, and forked again, while the table grows and is reset; and words outside of gensync know what must be true.
//!
//! `GENSYNC_STORM_SECONDS=300 cargo test --release --test storm -- --nocapture` has it last longer for each kind of table
//! and print what was done; `GENSYNC_STORM_SEED` sets the seed. Timing differs all the same, and so does what happens.
//!
//! A storm is made of rounds. At the end of each, everybody is killed but the supervisor and a few survivors, who have
//! been in the midst of it all the time. They change nothing from then on, and must come to hold what the source holds.

mod support;

#[path = "storm/oracle.rs"]
mod oracle;
#[path = "storm/supervisor.rs"]
mod supervisor;
#[path = "storm/worker.rs"]
mod worker;

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use gensync::{Table, TableOptions};
use oracle::{Oracle, Tally};

/// What is left of an update whose maker was killed when a child of his lives on.
const PENDING_LIMIT: Duration = Duration::from_millis(300);

/// How long a table is used. Then there is another one, which grows from the beginning.
const STINT: Duration = Duration::from_secs(15);

#[derive(Debug)]
enum Kind {
    File(PathBuf),
    Anonymous(Table),
    #[cfg(feature = "shm")]
    Named(String),
}

impl Kind {
    /// As small as can be, so that it grows.
    fn options() -> TableOptions {
        Table::options().capacity(1).pending_limit(PENDING_LIMIT)
    }

    /// The table, opened once more if that can be.
    fn open(&self) -> Table {
        match self {
            Self::File(path) => Self::options().open(path).unwrap(),
            Self::Anonymous(table) => table.clone(),
            #[cfg(feature = "shm")]
            Self::Named(name) => Self::options().named(name).unwrap(),
        }
    }

    /// Where the table can be opened read-only.
    fn path(&self) -> Option<PathBuf> {
        match self {
            Self::File(path) => Some(path.clone()),
            Self::Anonymous(_) => None,
            #[cfg(feature = "shm")]
            Self::Named(name) => Some(PathBuf::from("/dev/shm").join(name)),
        }
    }
}

/// What all processes of a storm know. It lives as long as they do.
#[derive(Debug)]
struct Storm {
    kind: Kind,
    oracle: Oracle,
    seed: u64,
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("a number"))
}

fn endure(name: &str, kind: impl Fn(u64) -> Kind) {
    // One after the other, or each would have half of the processors.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let seed = number("GENSYNC_STORM_SEED");
    let seed = seed.unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as u64);
    let length = Duration::from_millis(number("GENSYNC_STORM_SECONDS").map_or(4000, |seconds| seconds * 1000));
    println!("{name}: seed {seed}");
    let tally = Tally::new();
    let (start, mut stint) = (Instant::now(), 0);
    while let Some(left) = length.checked_sub(start.elapsed()).filter(|left| !left.is_zero()) {
        let oracle = Oracle::new(tally);
        let storm = Box::leak(Box::new(Storm { kind: kind(stint), oracle, seed: seed.wrapping_add(stint << 32) }));
        let end = Instant::now() + left.min(STINT);
        support::in_child(|| supervisor::supervise(storm, end)).succeeds();
        stint += 1;
    }
    println!("{name}, {} s: {tally}", start.elapsed().as_secs());
    tally.assert_innocent();
}

#[test]
fn a_storm_over_a_file() {
    let (_folder, path) = support::path();
    endure("file", |stint| Kind::File(path.with_extension(stint.to_string())));
}

#[test]
fn a_storm_over_an_anonymous_table() {
    endure("anonymous", |_| Kind::Anonymous(Kind::options().anonymous().unwrap()));
}

#[cfg(feature = "shm")]
#[test]
fn a_storm_over_a_named_table() {
    let name = |stint| format!("gensync-storm-{}-{stint}", std::process::id());
    endure("named", |stint| Kind::Named(name(stint)));
    // Of the tables, and of successors whose maker was killed.
    for entry in std::fs::read_dir("/dev/shm").unwrap().map(Result::unwrap) {
        if entry.file_name().to_string_lossy().contains(&format!("gensync-storm-{}-", std::process::id())) {
            std::fs::remove_file(entry.path()).unwrap();
        }
    }
}

//! Guards against hazards that no other test thought of: many processes do everything at once and at random, are killed wherever they
//! are, and forked again, while the table grows and is reset; and words outside of gensync know what must be true.
//!
//! `GENSYNC_STORM_SECONDS=300 cargo test --release --test storm -- --nocapture` has it last longer for each kind of table
//! and print what was done; `GENSYNC_STORM_SEED` sets the seed. Timing differs all the same, and so does what happens.
//!
//! A storm is made of rounds. At the end of each, all processes are killed except the supervisor and a few survivors, which
//! have taken part all the time. They change nothing from then on, and must come to hold what the source holds.

mod support;

#[path = "storm/oracle.rs"]
mod oracle;
#[path = "storm/supervisor.rs"]
mod supervisor;
#[path = "storm/worker.rs"]
mod worker;

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use gensync::{Table, TableOptions};
use oracle::{Oracle, Tally};
use support::place::{Kind, Place};

/// How long an update stays pending when its maker was killed and a child of the maker lives on.
const PENDING_LIMIT: Duration = Duration::from_millis(300);

/// How long a table is used. Then there is another one, which grows from the beginning.
const STINT: Duration = Duration::from_secs(15);

/// As small as can be, so that it grows.
fn options() -> TableOptions {
    Table::options().capacity(1).pending_limit(PENDING_LIMIT)
}

/// What all processes of a storm know. It lives as long as they do.
#[derive(Debug)]
struct Storm {
    place: Place,
    oracle: Oracle,
    seed: u64,
}

impl Storm {
    fn open(&self) -> Table {
        self.place.open(options())
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("a number"))
}

fn endure(kind: Kind) {
    let name = format!("{kind:?}").to_lowercase();
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
        let storm = Storm { place: Place::new(kind), oracle, seed: seed.wrapping_add(stint << 32) };
        let storm = Box::leak(Box::new(storm));
        let end = Instant::now() + left.min(STINT);
        support::in_child(|| supervisor::supervise(storm, end)).succeeds();
        storm.place.remove();
        stint += 1;
    }
    println!("{name}, {} s: {tally}", start.elapsed().as_secs());
    tally.assert_innocent();
}

#[test]
fn a_storm_over_a_file() {
    endure(Kind::File);
}

#[test]
fn a_storm_over_an_anonymous_table() {
    endure(Kind::Anonymous);
}

#[cfg(feature = "shm")]
#[test]
fn a_storm_over_a_named_table() {
    endure(Kind::Named);
}

//! What the benchmarks share.

use nix::sys::statvfs::statvfs;
use serde::Serialize;
use tempfile::TempDir;

/// Whether to run for a few seconds only: asked for by GENSYNC_BENCH_SHORT, or run as a test (`--test`, `cargo test`).
pub(crate) fn short() -> bool {
    let given = |name: &str| std::env::args().any(|argument| argument == name);
    std::env::var_os("GENSYNC_BENCH_SHORT").is_some() || given("--test") || !given("--bench")
}

/// A folder of this run's own, in shared memory if that has room for the tables of both benchmarks.
pub(crate) fn folder() -> std::io::Result<TempDir> {
    const ROOM: u64 = 2 << 30;
    let room = statvfs("/dev/shm").map_or(0, |shm| shm.blocks_available() * shm.fragment_size());
    if room >= ROOM { tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()) } else { tempfile::tempdir() }
}

/// Of figures that were taken round by round.
#[derive(Clone, Copy, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// Of one figure at least.
    pub(crate) fn of(figures: impl IntoIterator<Item = f64>) -> Self {
        let mut figures: Vec<_> = figures.into_iter().collect();
        figures.sort_by(f64::total_cmp);
        Self { median: figures[figures.len() / 2], min: figures[0], max: figures[figures.len() - 1] }
    }

    /// The median, and in brackets the least and the greatest, to three digits of the median at least.
    pub(crate) fn text(self) -> String {
        let Self { median, min, max } = self;
        let decimals = if median < 10.0 { 2 } else { usize::from(median < 100.0) };
        format!("{median:.decimals$} ({min:.decimals$}–{max:.decimals$})")
    }
}

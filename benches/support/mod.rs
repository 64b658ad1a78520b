//! What the benchmarks share.

mod spread;

use nix::sys::statvfs::statvfs;
use tempfile::TempDir;

pub(crate) use spread::Spread;

/// Whether to run for a few seconds only: asked for by GENSYNC_BENCH_SHORT, or run as a test (`--test`, `cargo test`).
pub(crate) fn short() -> bool {
    let given = |name: &str| std::env::args().any(|argument| argument == name);
    std::env::var_os("GENSYNC_BENCH_SHORT").is_some() || given("--test") || !given("--bench")
}

/// A folder of this run's own, in shared memory if that has room for the tables of both benchmarks.
pub(crate) fn folder() -> std::io::Result<TempDir> {
    const ROOM: u64 = 4 << 30;
    let room = statvfs("/dev/shm").map_or(0, |shm| shm.blocks_available() * shm.fragment_size());
    if room >= ROOM { tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()) } else { tempfile::tempdir() }
}

impl Spread {
    /// The median, and in brackets the least and the greatest, to three digits of the median at least.
    pub(crate) fn text(self) -> String {
        let Self { median, min, max } = self;
        let decimals = if median < 10.0 { 2 } else { usize::from(median < 100.0) };
        format!("{median:.decimals$} ({min:.decimals$}–{max:.decimals$})")
    }
}

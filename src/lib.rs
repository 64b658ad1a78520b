//! Keeps the processes of one machine fresh: a generation number for each piece of shared state, in shared memory.
//!
//! ```
//! use std::sync::Arc;
//!
//! use gensync::{Cached, GenerationSynchronizer, Table};
//!
//! # fn load_settings() -> std::io::Result<String> { Ok(String::new()) }
//! # fn save_settings() -> std::io::Result<()> { Ok(()) }
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("shop.gensync");
//! let table = Table::open(&path)?; // such as /dev/shm/shop.gensync, in every process
//! let settings = Cached::new(GenerationSynchronizer::new(&table, "siteconfig:1")?, load_settings);
//!
//! let now: Arc<String> = settings.get()?; // from memory, unless a process has changed them
//! settings.update(|| save_settings())?; // changes them, and all processes notice
//! # drop(now);
//! # Ok(()) }
//! ```
//!
//! [`Cached`] keeps a value; [`GenerationSynchronizer`], which it is made of, tells when any other state is expired, and can
//! [wait](GenerationSynchronizer::wait) until it is. See [which call to use](guide::which_call), and
//! [what can go wrong](guide::what_can_go_wrong).
//!
//! # Guarantees
//!
//! - An update that returned is seen by every check that begins after it, in every process that has the table open.
//! - No two normalized keys share a generation, two of 2<sup>128</sup> digests aside (see [`KeyNormalizer`] for which keys are
//!   one when normalized, and for one that keeps all apart), and a generation of a key never repeats: not
//!   after [`clear`](GenerationSynchronizer::clear), [`reset`](Table::reset), a reboot or a crash; nor after deletion of
//!   the file, unless the key was updated more than a million times a second all its life, or the clock was set back. Where
//!   the clock was never set, or was once far in the future, a table starts at random: then it repeats by chance only, one of
//!   2<sup>49</sup> or more.
//! - What is changed within an [`update`](GenerationSynchronizer::update) is announced, wherever its maker is killed.
//! - A [`Cached`] value and its generation are one: an update during the load leaves the value expired.
//! - Checks, [`mark_updated`](GenerationSynchronizer::mark_updated) and [`Cached::get`] of a fresh value never block, never
//!   allocate and make no system call on their fast path. While an update is pending, a check asks the kernel at most once
//!   a millisecond.
//! - Who waits is woken by each change that comes after the generation he has seen, without polling; an update calls the
//!   system to wake only if somebody waits for its key, or was killed while he did: that costs one call, once.
//! - A child may be forked at any time, and uses what it inherits: no lock stands in its way that a thread of the parent
//!   held. No thread is started, but one for a table whose [descriptors](GenerationSynchronizer::pollable) or tasks are
//!   asked for, which ends with the last of them.
//! - Where freshness cannot be known, the answer is "expired"; state that is loaded meanwhile serves for the
//!   [`outage_ttl`](TableOptions::outage_ttl), a second unless set, so that no use becomes a load each.
//! - What another process writes into the file causes wrong answers at worst: no undefined behaviour and no panic.
//!   (Truncating the file, or punching a hole into it while its disk is full, is the exception: a SIGBUS. Anonymous tables
//!   are sealed against truncation.)
//! - A file that is not a table of this version is left untouched.
//!
//! What a call may do besides computing stands under "Progress"; one that has nothing there neither sleeps nor touches files.
//!
//! # Memory ordering
//!
//! An update is a release and a check an acquire operation on the same word. So whatever a process wrote before
//! [`mark_updated`](GenerationSynchronizer::mark_updated), to memory or to files, is there for whoever finds the state
//! expired because of it, and loads it then. A [`ticket`](GenerationSynchronizer::ticket) is an acquire operation as
//! well, so that no part of the load can come before it.
//!
//! # Crash safety
//!
//! | killed | leaves | repaired by |
//! |---|---|---|
//! | while creating a table | nothing: the file is named when it is whole; a hidden file, where there are none without a name | the next reset of a table in that folder by the same user |
//! | while claiming a key's slot | half a claim | whoever attaches to that key, or needs the slot |
//! | between claim and first generation | a slot without one | whoever attaches to that key |
//! | while growing | a file longer than needed | whoever grows it next |
//! | while updating | the update, or none: it is one instruction | |
//! | within `update`, before or after the commit | a pending update without a lock | whoever checks the key next, within a millisecond of its last look, when no other update of the key is in flight |
//! | between an update and waking those who wait | sleepers | they themselves, within half a second |
//! | while waiting | a mark that somebody waits | the next update of the key, by one system call |
//! | between changing the source and `mark_updated` | a change that nobody was told of | the application: mark it again, or better use `update` |
//! | while resetting, removing or replacing | a retiring table, and at most one hidden file beside it | whoever uses the table next |
//!
//! # Trade-offs and limits
//!
//! - One machine, with 64-bit pointers: the crate does not compile for other targets. File systems that are shared between
//!   machines are refused.
//! - A table grows to 8 GiB at most, and gives nothing back: keys are removed by a
//!   [`reset`](Table::reset) alone. An open table takes as much address space as it is long, and grows while the process's
//!   limits (`ulimit -v`, after `mlockall` `-l`) leave room.
//! - Best kept in memory: in `/dev/shm`, or on another tmpfs. Room that is reserved on a disk is of use only where the file is
//!   rewritten in place. Btrfs is asked to do so when a table is made there; where extents are shared (a snapshot, or
//!   `cp --reflink`, on btrfs, XFS and others), an update on a full disk is a SIGBUS.
//! - A file that was deleted or replaced is noticed by the first use that comes a second later, of any kind; a holder whose
//!   rate of use suddenly falls may make up to 64 uses more. An [`update`](GenerationSynchronizer::update) looks at once, and
//!   never goes to the old file alone. What [`mark_updated`](GenerationSynchronizer::mark_updated) announces there is announced
//!   again when a process that has the old file notices; if all of them end before, it is lost. Prefer `reset`.
//! - A process that cannot see the table's path any more (another root, no permission) goes by the file's link count: it
//!   notices that the file was deleted or replaced, but not that something was mounted over its folder.
//! - Threads that share one synchronizer share one state; see [`GenerationSynchronizer`].
//! - A child that is forked by a bare system call in the middle of an `update` or a `reset`, not by `fork` of the C library,
//!   keeps its parent's locks: if it outlives the parent, others notice after [`pending_limit`](TableOptions::pending_limit). So
//!   does each child when more than 1024 updates of its parent were in flight.
//! - A forked child can use all of this. But Rust's standard library may hang where a child starts a thread, if another thread of
//!   its parent was starting or ending one at the fork; and tasks, streams and descriptors that wait take a thread of each
//!   process. Fork before there are threads that come and go.
//! - An `update` opens the table's file once more: it takes a free descriptor, and permission. An anonymous table's is
//!   opened through /proc.
//! - A process with a read-only table cannot recover a killed one's update for all: it loads its own state again, once in
//!   the [`pending_limit`](TableOptions::pending_limit).
//! - An update that is in flight for longer than that in a file that was deleted, and whose maker is killed then, is announced
//!   to nobody. A [`reset`](Table::reset) fails rather than that.

#![cfg_attr(loom, allow(dead_code, reason = "the edge to the operating system is not modelled"))]

#[cfg(not(target_pointer_width = "64"))]
compile_error!(
    "gensync needs a target with 64-bit pointers: a table may have 8 GiB, which do not fit into a smaller address space, and \
     sizes, offsets and counts are tested with 64 bits only"
);

// For what tests/ and the tests in here share.
#[cfg(all(test, not(loom)))]
extern crate self as gensync;

#[cfg(not(loom))]
mod cached;
#[cfg(not(loom))]
mod count;
mod error;
mod generation;
#[cfg(not(loom))]
pub mod guide;
#[cfg(not(loom))]
mod key;
#[cfg(not(loom))]
mod os;
mod protocol;
#[cfg(not(loom))]
mod synchronizer;
#[cfg(not(loom))]
mod table;
#[cfg(all(test, not(loom)))]
mod tests;
#[cfg(not(loom))]
mod wait;

pub use error::{Error, ErrorKind};
pub use generation::Generation;
#[cfg(all(feature = "async", not(loom)))]
pub use {
    cached::CachedChanged,
    wait::{Changed, Changes},
};
#[cfg(not(loom))]
pub use {
    cached::{Cached, CachedBuilder, CachedProjection, CachedReader, Counters, Part, Peek, Snapshot},
    key::{CacheKey, KeyNormalizer},
    synchronizer::{GenerationSynchronizer, Ticket, Update, UpdateError, update_all},
    table::{Occupancy, OwnerCheck, SlotInfo, Stats, Table, TableInfo, TableOptions, TableState},
    wait::{Pollable, WaitSet, Waited, Watch},
};

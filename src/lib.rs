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
//! [`Cached`] keeps a value; [`GenerationSynchronizer`], which it is built on, reports when any other state is expired, and can
//! [wait](GenerationSynchronizer::wait) until it is. With the feature `map`, `CachedMap` is a bounded cache of the values of many
//! keys: users, tenants, pages. With the feature `future`, `future::Cached` and `future::CachedMap` do the same for tasks, and their
//! loaders return futures. See [which call to use](guide::which_call), and [what can go wrong](guide::what_can_go_wrong).
//!
//! # Guarantees
//!
//! - An update that returned is seen by every check that begins after it, in every process that has the table open.
//! - No two normalized keys share a generation, unless their digests of 128 bits collide (see [`KeyNormalizer`] for which keys
//!   are one when normalized, and for a normalizer that keeps all keys apart). A generation of a key never repeats: not after
//!   [`clear`](GenerationSynchronizer::clear), [`reset`](Table::reset), a reboot or a crash; nor after deletion of the file,
//!   unless the key was updated more than a million times a second all its life, or the clock was set back. Where the clock was
//!   never set, or was once far in the future, a table starts at a random generation: then a generation repeats by chance only,
//!   with a probability of at most one in 2<sup>49</sup>.
//! - A change that is made within an [`update`](GenerationSynchronizer::update) is announced, wherever the process that makes
//!   it is killed.
//! - A [`Cached`] value and its generation belong together: an update during the load leaves the value expired.
//! - Checks, [`mark_updated`](GenerationSynchronizer::mark_updated) and [`Cached::get`] of a fresh value never block, never
//!   allocate and make no system call on their fast path. While an update is pending, a check asks the kernel at most once
//!   a millisecond.
//! - A waiter is woken by each change that comes after the generation it has seen, without polling. An update makes a system
//!   call for the wakeup only if there is a waiter for its key, or if a waiter was killed: that costs one call, once.
//! - A child may be forked at any time, and may use what it inherits: no lock that a thread of the parent held stands in its
//!   way. No thread is started, except one for each table that has [descriptors](GenerationSynchronizer::pollable), or tasks that
//!   wait for an update or for a time, in this process; it ends with the last of them. A task that waits for the load of another
//!   one needs none.
//! - Where freshness cannot be known, the answer is "expired"; state that is loaded meanwhile counts as fresh for the
//!   [`outage_ttl`](TableOptions::outage_ttl), a second unless set, so that not every use becomes a load.
//! - Whatever another process writes into the file, it causes wrong answers at worst: no undefined behaviour and no panic. (The
//!   exceptions are truncating the file, and punching a hole into it while its disk is full: they cause a SIGBUS. Anonymous
//!   tables are sealed against truncation.)
//! - A file that is not a table of this version is left untouched.
//!
//! The section "Progress" of a call says what it may do besides computing. A call without that section neither sleeps nor
//! touches files.
//!
//! # Features
//!
//! None is on unless asked for.
//!
//! - `map`: `CachedMap`, a bounded cache of the values of many keys.
//! - `async`: futures and streams that wait for updates, in any runtime.
//! - `future`: `async`, and the module `future`: cached values with asynchronous loaders, and updates in tasks. With `map` as well,
//!   `future::CachedMap`.
//! - `serde`: [`Generation`] and [`Counters`] in formats of your own.
//! - `shm`: named POSIX segments as tables.
//! - `cli`: the program `gensync`.
//!
//! # Memory ordering
//!
//! An update is a release operation, and a check is an acquire operation, on the same word. So whatever a process wrote before
//! [`mark_updated`](GenerationSynchronizer::mark_updated), to memory or to files, is visible to every process that finds the
//! state expired because of it, and then loads it. A [`ticket`](GenerationSynchronizer::ticket) is an acquire operation as
//! well, so that no part of the load can be ordered before it.
//!
//! # Crash safety
//!
//! | killed | leaves | repaired by |
//! |---|---|---|
//! | while creating a table | nothing: the file gets its name when it is complete; a hidden file, if the file system has no files without a name | the next reset of a table in that folder by the same user |
//! | while claiming a key's slot | half a claim | the next process that attaches to that key, or to one with the same first word |
//! | between claim and first generation | a slot without a generation, and perhaps some bytes of text that belong to no key | the next process that attaches to that key; the bytes are lost until a reset |
//! | while growing | a file longer than needed | the next process that grows it |
//! | in `mark_updated` or `clear` | the update, or none: it is one instruction | |
//! | within `update`, before or after the commit | a pending update without a lock | the next check of the key that asks the kernel, as checks do once a millisecond, when no other update of the key is in flight |
//! | between an update and its wakeup | sleeping waiters | the waiters themselves, within half a second |
//! | while waiting | the mark of a waiter | the next update of the key, by one system call |
//! | between changing the source and `mark_updated` | a change that was not announced | the application: call `mark_updated` again, or better use `update` |
//! | while resetting, removing or replacing | a retiring table, and at most one hidden file beside it | the next process that uses the table |
//!
//! # Trade-offs and limits
//!
//! - One machine, with 64-bit pointers: the crate does not compile for other targets. File systems that are shared between
//!   machines are refused.
//! - A table grows to 8 GiB at most, and gives no room back: only a [`reset`](Table::reset) removes keys. An open table takes
//!   as much address space as its file is long, and grows while the process's limits (`ulimit -v`, after `mlockall` `-l`) leave
//!   room.
//! - A table is best kept in memory: in `/dev/shm`, or on another tmpfs. Room that is reserved on a disk is of use only where
//!   the file system rewrites the file in place. Btrfs is asked to do so when a table is created there; where extents are
//!   shared (a snapshot, or `cp --reflink`, on btrfs, XFS and others), an update on a full disk is a SIGBUS.
//! - That a file was deleted or replaced is noticed by the first use, of any kind, that comes a second later; a holder whose
//!   rate of use suddenly falls may need up to 64 uses more. An [`update`](GenerationSynchronizer::update) checks the path at
//!   once, and never goes to the old file alone. What [`mark_updated`](GenerationSynchronizer::mark_updated) announces in the
//!   old file is announced again when a process that has the old file open notices; if all such processes end first, it is
//!   lost. Prefer `reset`.
//! - A process that can no longer see the table's path (another root, no permission) relies on the file's link count: it
//!   notices that the file was deleted or replaced, but not that something was mounted over its folder.
//! - Threads that share one synchronizer share one state; see [`GenerationSynchronizer`].
//! - A child that is forked by a bare system call in the middle of an `update` or a `reset`, not by `fork` of the C library,
//!   keeps its parent's locks: if it outlives the parent, others take such an update for lost only after the
//!   [`pending_limit`](TableOptions::pending_limit). The same holds for each child that is forked while more than 1024 updates
//!   of its parent are in flight.
//! - A forked child can use the whole crate. But Rust's standard library may hang where a child starts a thread, if another
//!   thread of its parent was starting or ending one at the fork; and tasks, streams and descriptors that wait take a thread in
//!   each process. Fork before there are threads that come and go.
//! - An `update` opens the table's file once more: that takes a free descriptor, and permission. An anonymous table's is opened
//!   through /proc.
//! - A process with a read-only table cannot end the pending update of a killed process for all: it loads its own state again,
//!   once per [`pending_limit`](TableOptions::pending_limit).
//! - An update in a deleted file is never announced if it is in flight for longer than the `pending_limit` and the process that
//!   makes it is killed after that. A [`reset`](Table::reset) fails rather than let this happen.

#![cfg_attr(loom, allow(dead_code, reason = "the edge to the operating system is not modelled"))]

#[cfg(not(target_pointer_width = "64"))]
compile_error!(
    "gensync needs a target with 64-bit pointers: a table may have 8 GiB, which does not fit into a smaller address space, and \
     sizes, offsets and counts are tested with 64 bits only"
);

// The support code in tests/, which the tests of this crate share, names the crate as its users do.
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

#[cfg(all(feature = "future", not(loom)))]
pub use cached::future;
#[cfg(all(feature = "map", not(loom)))]
pub use cached::{CachedMap, CachedMapBuilder};
pub use error::{Error, ErrorKind};
pub use generation::Generation;
#[cfg(all(feature = "async", not(loom)))]
pub use {
    cached::CachedChanged,
    wait::{Changed, Changes},
};
#[cfg(not(loom))]
pub use {
    cached::{
        Cached, CachedBuilder, CachedProjection, CachedReader, Counters, Part, Peek, Snapshot, Tracked, depend_on,
    },
    key::{CacheKey, KeyNormalizer},
    synchronizer::{GenerationSynchronizer, Ticket, Update, UpdateError, update_all},
    table::{Occupancy, OwnerCheck, SlotInfo, Stats, Table, TableInfo, TableOptions, TableState},
    wait::{Pollable, WaitSet, Waited, Watch},
};

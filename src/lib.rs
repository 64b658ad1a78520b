//! Keeps processes of one machine fresh.

#![cfg_attr(loom, allow(dead_code, reason = "the edge to the operating system is not modelled"))]

mod error;
#[cfg(not(loom))]
mod file;
mod generation;
#[cfg(not(loom))]
mod handle;
#[cfg(not(loom))]
mod incarnation;
#[cfg(not(loom))]
mod key;
mod layout;
#[cfg(not(loom))]
mod mapping;
#[cfg(test)]
mod models;
#[cfg(not(loom))]
mod options;
mod slot;
mod sync;
#[cfg(not(loom))]
mod synchronizer;
mod table;

pub use error::{Error, ErrorKind};
pub use generation::Generation;
#[cfg(not(loom))]
pub use {
    handle::{SlotInfo, Stats, Table},
    key::{CacheKey, KeyNormalizer},
    options::{OwnerCheck, TableOptions},
    synchronizer::{GenerationSynchronizer, Ticket},
};

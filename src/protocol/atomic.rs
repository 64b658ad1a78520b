//! The protocol's atomics: those of std, or a model checker's in their place. Outside of this module, no file of the protocol
//! names either.
//!
//! Built with `--cfg loom`, the protocol in this folder runs under loom's model checker instead; with
//! `--cfg loom --cfg shuttle`, under shuttle's schedulers.

#[cfg(all(test, not(loom)))]
pub(crate) mod steps;

#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicPtr, Ordering, fence};
#[cfg(all(not(loom), not(test)))]
pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64};
#[cfg(all(not(loom), test))]
pub(crate) use steps::{AtomicU32, AtomicU64};

#[cfg(all(loom, not(shuttle)))]
use loom as checker;
#[cfg(all(loom, shuttle))]
use shuttle as checker;

#[cfg(loom)]
pub(crate) use checker::sync::{
    Condvar, Mutex,
    atomic::{AtomicU32, AtomicU64, Ordering, fence},
};

#[cfg(all(test, loom))]
pub(crate) use checker::{sync::Arc, thread};
#[cfg(all(test, not(loom)))]
pub(crate) use std::{sync::Arc, thread};

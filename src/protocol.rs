//! The algorithm, over any memory: what stands in a table, and each step that a process takes there.
//!
//! Nothing here knows of files, processes or the clock. All of it is compiled by the model checkers.

pub(crate) mod atomic;
pub(crate) mod futex;
mod header;
pub(crate) mod layout;
#[cfg(test)]
mod models;
pub(crate) mod observed;
pub(crate) mod slot;
pub(crate) mod slots;
pub(crate) mod wake;
pub(crate) mod word;

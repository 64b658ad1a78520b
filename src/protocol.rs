//! The algorithm, over any memory: what a table contains, and each step that a process takes there.
//!
//! Nothing here depends on files, processes or the clock, so all of it runs under the model checkers. [`slots`] begins with a
//! description of the whole protocol; [`layout`] is the file format.

pub(crate) mod atomic;
pub(crate) mod directory;
pub(crate) mod fixed_header;
pub(crate) mod futex;
pub(crate) mod generation_word;
mod header;
pub(crate) mod layout;
#[cfg(test)]
mod models;
pub(crate) mod observed;
pub(crate) mod record;
pub(crate) mod segment;
pub(crate) mod slot_digest;
pub(crate) mod slots;
pub(crate) mod version_1;
pub(crate) mod wake;
pub(crate) mod word;

//! Tests that need a build of the crate with parts that no release has: atomics that count their steps, and a next layout
//! version.

pub(crate) mod kills;
mod upgrades;

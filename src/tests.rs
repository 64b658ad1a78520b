//! Tests that need a build of the crate that users do not get: atomics that count their steps, and a next version.

pub(crate) mod kills;
mod upgrades;

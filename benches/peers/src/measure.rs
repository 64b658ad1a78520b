//! What is measured, a file for each.

pub(crate) mod day;
pub(crate) mod growth;
pub(crate) mod notice;
pub(crate) mod turns;

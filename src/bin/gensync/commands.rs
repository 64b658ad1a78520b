//! The commands.

pub(crate) mod bench;
pub(crate) mod change;
pub(crate) mod doctor;
pub(crate) mod execute;
pub(crate) mod list;
pub(crate) mod metrics;
pub(crate) mod pages;
pub(crate) mod stat;
pub(crate) mod tables;
pub(crate) mod top;
pub(crate) mod wait;
pub(crate) mod watch;
pub(crate) mod witness;

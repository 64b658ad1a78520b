//! The edge to the operating system: files, mappings, locks and forks.

pub(crate) mod clock;
pub(crate) mod file;
pub(crate) mod fork;
pub(crate) mod identity;
pub(crate) mod lock;
pub(crate) mod mapping;
pub(crate) mod owner;
pub(crate) mod pause;
pub(crate) mod privilege;

//! The edge to the operating system: files, mappings, locks and forks.

pub(crate) mod allocation;
pub(crate) mod boot;
pub(crate) mod clock;
pub(crate) mod file;
pub(crate) mod file_system;
pub(crate) mod fork;
pub(crate) mod identity;
pub(crate) mod lock;
pub(crate) mod mapping;
pub(crate) mod new_table;
pub(crate) mod owner;
pub(crate) mod path;
pub(crate) mod pause;
pub(crate) mod privilege;
pub(crate) mod replaceable;
pub(crate) mod view;

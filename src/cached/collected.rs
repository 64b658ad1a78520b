//! What a loader finds that its value depends on.

use std::collections::HashSet;
use std::sync::Arc;

use super::dependency::Dependency;
use super::period::Period;
use super::value::Freshness;
use crate::error::{Error, ErrorKind};
use crate::key::CacheKey;
use crate::synchronizer::{GenerationSynchronizer, Ticket};

/// How many keys a value may depend on, besides its own.
pub(super) const MOST: usize = 16_384;

/// What a loader has found that its value depends on.
#[derive(Clone, Default)]
pub(super) struct Collected {
    dependencies: Vec<Dependency>,
    known: HashSet<Ticket>,
    /// Those whose tickets have no generation: the ticket, what its table was then, and the key.
    unknown: HashSet<(Ticket, usize, CacheKey)>,
    /// The period that ends first, of those after which something that was read is too old.
    age: Option<Period>,
    is_full: bool,
}

impl Collected {
    /// Adds a key, of which `ticket` was taken before what is behind it was read.
    pub(super) fn add(&mut self, sync: impl FnOnce() -> Arc<GenerationSynchronizer>, ticket: Ticket) {
        // Tickets of one key that differ are both kept: at least one of them is expired.
        if ticket.generation().is_some() && !self.known.insert(ticket) {
            return;
        }
        let sync = sync();
        // Tickets without a generation may be equal though they are of several keys.
        let table = Arc::as_ptr(sync.table().latest()).addr();
        if ticket.generation().is_none() && !self.unknown.insert((ticket, table, sync.cache_key().clone())) {
            return;
        }
        self.is_full |= self.dependencies.len() >= MOST;
        if !self.is_full {
            self.dependencies.push(Dependency::new(sync, ticket));
        }
    }

    /// Adds all that another value depends on, whose own key is that of `sync`.
    pub(super) fn add_value(&mut self, sync: impl FnOnce() -> Arc<GenerationSynchronizer>, freshness: &Freshness) {
        self.add(sync, freshness.ticket);
        if let Some(conditions) = &freshness.conditions {
            for Dependency { sync, ticket, .. } in &conditions.dependencies {
                self.add(|| Arc::clone(sync), *ticket);
            }
            self.age = Period::first_to_end(self.age, Some(conditions.age));
            #[cfg(feature = "map")]
            if let Some(residence) = &conditions.residence {
                self.age = Period::first_to_end(self.age, Some(residence.life));
            }
        }
    }

    /// What was found. `None` if there is too much of it.
    pub(super) fn take(&mut self) -> Option<(Vec<Dependency>, Option<Period>)> {
        (self.known, self.unknown) = Default::default();
        let dependencies = std::mem::take(&mut self.dependencies);
        (!self.is_full).then_some((dependencies, self.age))
    }
}

/// Why a load fails whose loader has found too many keys.
pub(super) fn too_many() -> Error {
    let (what, found) = ("the number of keys that a value depends on", "more than 16,384".to_owned());
    let expected = "no more; let the value depend on a tag, a key that is marked whenever one of them is";
    ErrorKind::InvalidInput { what, found, expected }.into()
}

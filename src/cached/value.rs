//! A value, and the tickets that it was loaded with.

use std::iter;
use std::sync::Arc;
#[cfg(feature = "map")]
use std::sync::atomic::AtomicU64;

use super::dependency::Dependency;
use super::period::Period;
use crate::generation::Generation;
use crate::os::clock::coarse_now;
use crate::synchronizer::{GenerationSynchronizer, Ticket};

/// A value and what decides whether it is fresh. It is never changed, only replaced as a whole.
// An alignment of its own, which would keep it out of two cache lines for sure, makes each allocation larger, and costs more than
// it saves where there are many.
pub(super) struct Entry<T: ?Sized> {
    pub(super) freshness: Freshness,
    pub(super) value: Arc<T>,
}

/// What decides whether a value is fresh.
#[derive(Clone)]
pub(super) struct Freshness {
    /// Taken of the value's own key, before the load.
    pub(super) ticket: Ticket,
    /// `None` if the ticket alone decides, and nothing else happens at a hit.
    pub(super) conditions: Option<Arc<Conditions>>,
}

/// What must hold for a value to be fresh, besides the generation of its own key.
pub(super) struct Conditions {
    /// The keys that the value depends on. Those of the policy come first.
    pub(super) dependencies: Box<[Dependency]>,
    /// The period after which the value is too old.
    pub(super) age: Period,
    /// How long it may stay in a map.
    #[cfg(feature = "map")]
    pub(super) residence: Option<Residence>,
}

/// What decides how long a value stays in a map, whether it is fresh or not. Times are milliseconds of the coarse clock.
#[cfg(feature = "map")]
pub(super) struct Residence {
    pub(super) weight: u64,
    pub(super) life: Period,
    /// When it was last used.
    pub(super) used: AtomicU64,
}

impl Conditions {
    /// Whether they hold. The caller has checked the value's own key just now.
    pub(super) fn hold(&self) -> bool {
        self.dependencies.iter().all(Dependency::holds) && (self.age.is_endless() || !self.age.is_over(coarse_now()))
    }
}

impl Freshness {
    /// As it was, but expired.
    pub(super) fn voided(&self) -> Self {
        Self { ticket: Ticket::VOID, ..self.clone() }
    }

    /// The keys that expire the value, each with its ticket; `sync` is the synchronizer of the value's own key.
    pub(super) fn tickets<'a>(
        &'a self,
        sync: &'a GenerationSynchronizer,
    ) -> impl Iterator<Item = (&'a GenerationSynchronizer, Ticket)> {
        let dependencies = self.conditions.iter().flat_map(|conditions| &conditions.dependencies);
        iter::once((sync, self.ticket)).chain(dependencies.map(|dependency| (&*dependency.sync, dependency.ticket)))
    }

    /// The period after which the value is too old.
    pub(super) fn age(&self) -> Period {
        self.conditions.as_ref().map_or(Period::ENDLESS, |conditions| conditions.age)
    }

    pub(super) fn is_fresh(&self, sync: &GenerationSynchronizer) -> bool {
        !sync.is_expired_since(self.ticket) && self.conditions.as_ref().is_none_or(|conditions| conditions.hold())
    }

    /// Whether one of the keys was updated since the load began.
    pub(super) fn is_overtaken(&self, sync: &GenerationSynchronizer) -> bool {
        let mut tickets = self.tickets(sync);
        tickets.any(|(sync, ticket)| ticket.generation().is_some() && sync.is_expired_since(ticket))
    }
}

/// A value, and the generation that it was loaded at. Returned by [`Cached::snapshot`](crate::Cached::snapshot).
///
/// Every announced update of the key changes the generation. The generation does not identify the value, as an `ETag` must, if
/// anything else expires the value as well: with [`depends_on`](crate::CachedBuilder::depends_on),
/// [`max_age`](crate::CachedBuilder::max_age) or [`verify`](crate::CachedBuilder::verify), several values may have one
/// generation.
#[derive(Debug)]
#[non_exhaustive]
pub struct Snapshot<T: ?Sized> {
    /// The value.
    pub value: Arc<T>,
    /// The generation of the key when the load of the value began; `None` if no table could be attached to, or if the value was
    /// [invalidated](crate::Cached::invalidate).
    pub generation: Option<Generation>,
}

impl<T: ?Sized> Clone for Snapshot<T> {
    /// Another snapshot of the same value; the value itself is not cloned.
    fn clone(&self) -> Self {
        Self { value: Arc::clone(&self.value), generation: self.generation }
    }
}

/// What is in place in a [`Cached`](crate::Cached). Returned by [`Cached::peek`](crate::Cached::peek).
#[derive(Debug)]
#[non_exhaustive]
pub enum Peek<T: ?Sized> {
    /// No value has been loaded yet.
    Nothing,
    /// An expired value, which the next [`get`](crate::Cached::get) loads again.
    Expired(Snapshot<T>),
    /// A fresh value, which `get` would return as it is.
    Fresh(Snapshot<T>),
}

impl<T: ?Sized> Peek<T> {
    /// The value, fresh or not.
    #[must_use]
    pub fn value(&self) -> Option<&Arc<T>> {
        self.snapshot().map(|snapshot| &snapshot.value)
    }

    /// The value with its generation, fresh or not.
    #[must_use]
    pub fn snapshot(&self) -> Option<&Snapshot<T>> {
        match self {
            Self::Nothing => None,
            Self::Expired(snapshot) | Self::Fresh(snapshot) => Some(snapshot),
        }
    }

    /// Whether there is a value that is fresh.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        matches!(self, Self::Fresh(_))
    }
}

impl<T: ?Sized> Clone for Peek<T> {
    fn clone(&self) -> Self {
        match self {
            Self::Nothing => Self::Nothing,
            Self::Expired(snapshot) => Self::Expired(snapshot.clone()),
            Self::Fresh(snapshot) => Self::Fresh(snapshot.clone()),
        }
    }
}

impl<T: ?Sized> Clone for Entry<T> {
    fn clone(&self) -> Self {
        Self { freshness: self.freshness.clone(), value: self.value() }
    }
}

impl<T: ?Sized> Entry<T> {
    pub(super) fn value(&self) -> Arc<T> {
        Arc::clone(&self.value)
    }

    pub(super) fn snapshot(&self) -> Snapshot<T> {
        Snapshot { value: self.value(), generation: self.freshness.ticket.generation() }
    }
}

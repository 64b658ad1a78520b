//! A value, and what it was loaded at.

use std::sync::Arc;

use super::period::Period;
use crate::generation::Generation;
use crate::synchronizer::Ticket;

/// A value and what it was loaded at, never changed.
pub(crate) struct Entry<T: ?Sized> {
    pub(super) value: Arc<T>,
    pub(super) ticket: Ticket,
    /// As many as the policy has dependencies.
    pub(super) dependencies: Box<[Ticket]>,
    /// For how long it is not too old.
    pub(super) age: Period,
}

/// A value, and the generation that it was loaded at. From [`Cached::snapshot`](crate::Cached::snapshot).
///
/// Every announced update of the key makes the generation another one. It does not name the value, as an `ETag` must, if
/// other things expire the value too: [`depends_on`](crate::CachedBuilder::depends_on), [`max_age`](crate::CachedBuilder::max_age) and
/// [`verify`](crate::CachedBuilder::verify) give several values of one generation.
#[derive(Debug)]
#[non_exhaustive]
pub struct Snapshot<T: ?Sized> {
    /// The value.
    pub value: Arc<T>,
    /// The generation of the key when the load of the value began; `None` if no table could be attached to, or the value was
    /// [invalidated](crate::Cached::invalidate).
    pub generation: Option<Generation>,
}

impl<T: ?Sized> Clone for Snapshot<T> {
    /// The same value, which is not cloned itself.
    fn clone(&self) -> Self {
        Self { value: Arc::clone(&self.value), generation: self.generation }
    }
}

/// What is in place in a [`Cached`](crate::Cached), from [`Cached::peek`](crate::Cached::peek).
#[derive(Debug)]
#[non_exhaustive]
pub enum Peek<T: ?Sized> {
    /// No value: none was loaded yet.
    Nothing,
    /// A value that the next [`get`](crate::Cached::get) loads again.
    Expired(Snapshot<T>),
    /// A value that `get` would give as it is.
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

// A loader or a callback that panics leaves the value that was in place, whole, and lets the next thread load; see
// `Flight`. What a closure of the user's keeps for itself is not seen through a `Cached`.

impl<T: ?Sized> Entry<T> {
    pub(super) fn value(&self) -> Arc<T> {
        Arc::clone(&self.value)
    }

    pub(super) fn snapshot(&self) -> Snapshot<T> {
        Snapshot { value: self.value(), generation: self.ticket.generation() }
    }
}

//! A value, and the tickets that it was loaded with.

use std::sync::Arc;

use super::period::Period;
use crate::generation::Generation;
use crate::synchronizer::Ticket;

/// A value and the tickets that it was loaded with. It is never changed, only replaced as a whole.
// What a use of a fresh value reads stands first and together. An alignment of its own, which would keep it out of two cache lines
// for sure, makes each allocation larger, and costs more than it saves where there are many.
#[repr(C)]
pub(crate) struct Entry<T: ?Sized> {
    pub(super) ticket: Ticket,
    pub(super) value: Arc<T>,
    /// One for each dependency of the policy, in the same order.
    pub(super) dependencies: Box<[Ticket]>,
    /// The period after which it is too old.
    pub(super) age: Period,
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

impl<T: ?Sized> Entry<T> {
    pub(super) fn value(&self) -> Arc<T> {
        Arc::clone(&self.value)
    }

    pub(super) fn snapshot(&self) -> Snapshot<T> {
        Snapshot { value: self.value(), generation: self.ticket.generation() }
    }
}

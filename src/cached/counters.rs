//! What has been done, in figures.

use std::time::Duration;

use crate::count::Count;

#[derive(Default)]
pub(super) struct Metrics {
    pub(super) reloads: Count,
    pub(super) errors: Count,
    pub(super) stale: Count,
    pub(super) overtaken: Count,
    pub(super) unconfirmed: Count,
    /// Those in a row up to the last load.
    pub(super) outage: Count,
    pub(super) longest: Count,
}

/// What a [`Cached`](crate::Cached) has done in this process; a forked child goes on from its parent's figures.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Counters {
    /// Calls that were answered with a fresh value, and did not load it themselves. Threads that call at the same moment
    /// may count as one, as an exact count would make a call a fifth slower.
    pub hits: u64,
    /// Loads that succeeded, the first one included.
    pub reloads: u64,
    /// Loads that failed, or lasted longer than [`fail_safe`](crate::CachedBuilder::fail_safe) allows; each once.
    pub errors: u64,
    /// Calls that were answered with an expired value: during a load, in a callback, or because loading failed.
    pub stale_answers: u64,
    /// Loads that were overtaken by an update before they ended, so that what they loaded was expired from the start. If
    /// nearly all are, the loader may be making that update itself.
    pub overtaken: u64,
    /// Loads whose freshness cannot be known, as the table could not be attached to or confirmed when they began: each serves
    /// for the [`outage_ttl`](crate::TableOptions::outage_ttl).
    pub unconfirmed: u64,
    /// How long the longest load took, failed ones included; in microseconds' resolution.
    pub longest_load: Duration,
}

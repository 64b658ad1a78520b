//! Counters of what a `Cached` has done.

use std::time::Duration;

use crate::count::Count;

#[derive(Default)]
pub(super) struct Metrics {
    pub(super) reloads: Count,
    pub(super) errors: Count,
    pub(super) stale: Count,
    pub(super) overtaken: Count,
    pub(super) unconfirmed: Count,
    /// The unconfirmed loads in a row, up to the last load.
    pub(super) outage: Count,
    pub(super) longest: Count,
    pub(super) too_heavy: Count,
}

impl Metrics {
    pub(super) fn read(&self, hits: u64) -> Counters {
        let Self { reloads, errors, stale, overtaken, unconfirmed, outage: _, longest, too_heavy } = self;
        Counters {
            hits,
            reloads: reloads.get(),
            errors: errors.get(),
            stale_answers: stale.get(),
            overtaken: overtaken.get(),
            unconfirmed: unconfirmed.get(),
            longest_load: Duration::from_micros(longest.get()),
            too_heavy: too_heavy.get(),
        }
    }
}

/// Counts of what a [`Cached`](crate::Cached) has done in this process. A forked child continues from its parent's counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Counters {
    /// Calls that returned a fresh value and did not load it themselves, including those that waited for another call's load. Calls
    /// of several threads at the same moment may count as one, as an exact count would make each call a fifth slower.
    pub hits: u64,
    /// Loads that succeeded, including the first one.
    pub reloads: u64,
    /// Loads that failed, or lasted longer than [`fail_safe`](crate::CachedBuilder::fail_safe) allows. Each load counts once.
    pub errors: u64,
    /// Calls that returned an expired value: during a load, in a callback, or because a load failed.
    pub stale_answers: u64,
    /// Loads that were overtaken: the key, or one that the value depends on, was updated before the load ended, so that the value
    /// was expired from the start. If nearly all loads are overtaken, the loader may be making the update itself.
    pub overtaken: u64,
    /// Loads of values of unknown freshness, as the table could not be attached to or confirmed when the load began. Such a value
    /// counts as fresh for the [`outage_ttl`](crate::TableOptions::outage_ttl).
    pub unconfirmed: u64,
    /// The duration of the longest load, including loads that failed, to the microsecond.
    pub longest_load: Duration,
    /// Values that a map did not keep, as they weigh more than a quarter of what it has room for. Each use loads such a value.
    pub too_heavy: u64,
}

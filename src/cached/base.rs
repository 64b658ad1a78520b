//! What a value that stands alone is made of in both faces, the blocking one and the asynchronous one: everything but its loader.

use std::sync::Arc;

use arc_swap::ArcSwapOption;

use super::cell::{self, Cell, Replaced};
use super::counters::{Counters, Metrics};
use super::load::{Call, GetOptions};
#[cfg(feature = "async")]
use super::period::Report;
use super::policy::{Policy, Verification};
use super::single_flight::SingleFlight;
use super::value::{Entry, Peek};
use crate::count::Count;
use crate::os::fork::ForkLocal;
use crate::synchronizer::GenerationSynchronizer;

// What a use of a fresh value reads and writes here stands first, in one cache line: each face puts this first, and is aligned
// to a cache line.
#[repr(C)]
pub(super) struct Base<T: ?Sized> {
    pub(super) sync: GenerationSynchronizer,
    pub(super) current: ArcSwapOption<Entry<T>>,
    pub(super) hits: Count,
    // The fields from here on are used when a value is not fresh.
    pub(super) policy: Policy<T>,
    pub(super) single_flight: ForkLocal<SingleFlight>,
    metrics: Metrics,
    /// The last report to tasks.
    #[cfg(feature = "async")]
    pub(super) reported: ArcSwapOption<Report>,
}

const _: () = assert!(std::mem::offset_of!(Base<()>, hits) + size_of::<Count>() <= 64);

impl<T: ?Sized> Base<T> {
    pub(super) fn new(sync: GenerationSynchronizer, policy: Policy<T>) -> Self {
        Self {
            sync: sync.without_following(),
            current: ArcSwapOption::empty(),
            hits: Count::default(),
            policy,
            single_flight: ForkLocal::new(),
            metrics: Metrics::default(),
            #[cfg(feature = "async")]
            reported: ArcSwapOption::empty(),
        }
    }

    pub(super) fn options(&self) -> GetOptions {
        GetOptions::of(&self.policy)
    }

    /// A call with the options of the policy that found no fresh value.
    pub(super) fn call(&self) -> Call<'_, Self> {
        Call::new(self, self.options())
    }

    /// What `pick` returns for the entry in place, if the entry is fresh. A call that may load gives `verify`, which is called
    /// when the entry is to be verified, and returns the entry that it has loaded, if any.
    #[inline]
    pub(super) fn fresh<R>(
        &self,
        verify: Option<impl FnOnce(&Arc<Entry<T>>) -> Option<Arc<Entry<T>>>>,
        pick: impl Fn(&Arc<Entry<T>>) -> R,
    ) -> Option<R> {
        let current = self.current.load();
        let entry = current.as_ref()?;
        if entry.freshness.conditions.is_some() || !self.sync.is_unchanged(entry.freshness.ticket) {
            return self.fresh_slow(entry, verify, pick);
        }
        if !self.sync.spend() && !self.is_confirmed(entry) {
            return None;
        }
        self.hits.add_one_or_so();
        Some(pick(entry))
    }

    #[cold]
    fn is_confirmed(&self, entry: &Entry<T>) -> bool {
        self.sync.revalidate();
        self.sync.confirms(entry.freshness.ticket)
    }

    #[cold]
    fn fresh_slow<R>(
        &self,
        entry: &Arc<Entry<T>>,
        verify: Option<impl FnOnce(&Arc<Entry<T>>) -> Option<Arc<Entry<T>>>>,
        pick: impl Fn(&Arc<Entry<T>>) -> R,
    ) -> Option<R> {
        if !self.is_fresh(entry) {
            return None;
        }
        self.hits.add_one();
        let is_due = || self.policy.verification.as_ref().is_some_and(Verification::is_due);
        let loaded = verify.filter(|_| is_due()).and_then(|verify| verify(entry));
        Some(pick(loaded.as_ref().unwrap_or(entry)))
    }

    pub(super) fn is_fresh(&self, entry: &Entry<T>) -> bool {
        entry.freshness.is_fresh(&self.sync)
    }

    #[inline]
    pub(super) fn get_if_fresh(&self) -> Option<Arc<T>> {
        self.fresh(None::<fn(&Arc<Entry<T>>) -> Option<Arc<Entry<T>>>>, |entry| entry.value())
    }

    pub(super) fn peek(&self) -> Peek<T> {
        match &*self.current.load() {
            None => Peek::Nothing,
            Some(entry) if self.is_fresh(entry) => Peek::Fresh(entry.snapshot()),
            Some(entry) => Peek::Expired(entry.snapshot()),
        }
    }

    /// Expires the value in this process, and notifies descriptors and tasks.
    pub(super) fn invalidate(&self) {
        cell::invalidate(self);
        self.ring_alarms();
    }

    pub(super) fn counters(&self) -> Counters {
        self.metrics.read(self.hits.get())
    }
}

impl<T: ?Sized> Cell for Base<T> {
    type Value = T;
    type Key = ();

    fn key(&self) -> &() {
        &()
    }

    fn sync(&self) -> &GenerationSynchronizer {
        &self.sync
    }

    fn policy(&self) -> &Policy<T> {
        &self.policy
    }

    fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    fn single_flight(&self) -> Arc<SingleFlight> {
        self.single_flight.get()
    }

    fn current(&self) -> Option<Arc<Entry<T>>> {
        self.current.load_full()
    }

    fn replace(&self, entry: Arc<Entry<T>>) -> Replaced<T> {
        Replaced { old: self.current.swap(Some(entry)), evicted: Vec::new() }
    }

    fn count_hit(&self) {
        self.hits.add_one();
    }
}

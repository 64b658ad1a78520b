//! What workers are asked for.

use std::sync::atomic::{AtomicU64, Ordering::*};

use rand::SeedableRng as _;
use rand::rngs::StdRng;
use rand_distr::{Distribution as _, Zipf};

use crate::Outcome;

/// The phase in which there are requests.
pub(crate) const OPEN: u64 = 1;

/// The keys that are asked for, drawn beforehand: the draw takes longer than the fastest peers.
pub(crate) struct Demand(pub(crate) Vec<u32>);

impl Demand {
    pub(crate) const LENGTH: usize = 1 << 16;

    pub(crate) fn new(keys: usize) -> Outcome<Self> {
        let mut random = StdRng::seed_from_u64(keys as u64);
        let zipf = Zipf::new(keys as f64, 1.0)?;
        Ok(Self((0..Self::LENGTH).map(|_| (zipf.sample(&mut random) as u32 - 1).min(keys as u32 - 1)).collect()))
    }

    pub(crate) fn key(&self, request: usize) -> usize {
        self.0[request % Self::LENGTH] as usize
    }
}

/// The requests of one worker.
pub(crate) struct Requests<'a> {
    pub(crate) demand: &'a Demand,
    pub(crate) oracle: &'a [AtomicU64],
    pub(crate) phase: &'a AtomicU64,
    pub(crate) next: usize,
    pub(crate) stale: u64,
}

impl Requests<'_> {
    /// The key of the next request, and the value that the answer may not be older than.
    #[inline]
    pub(crate) fn next(&mut self) -> Option<(usize, u64)> {
        if self.next.is_multiple_of(16) && self.phase.load(Relaxed) != OPEN {
            return None;
        }
        let key = self.demand.key(self.next);
        self.next += 1;
        Some((key, self.oracle[key].load(SeqCst)))
    }

    #[inline]
    pub(crate) fn answer(&mut self, value: u64, oracle: u64) {
        self.stale += u64::from(value < oracle);
    }
}

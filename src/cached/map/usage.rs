//! What each use of a map counts, apart for threads that use it at the same time.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::count::Count;
use crate::os::clock::coarse_now;
use crate::synchronizer::{CheckBudget, LastGrant};
use crate::table::Table;

/// How many threads count apart. Further ones share with these.
const STRIPES: usize = 16;

/// Each use writes to its own stripe, as threads that write to one cache line would slow each other down.
pub(super) struct Usage(Box<[Stripe; STRIPES]>);

#[repr(align(64))]
pub(super) struct Stripe {
    budget: CheckBudget,
    grant: LastGrant,
    hits: Count,
}

impl Usage {
    pub(super) fn new() -> Self {
        let stripe = || Stripe { budget: CheckBudget::new(), grant: LastGrant::new(), hits: Count::default() };
        Self(Box::new(std::array::from_fn(|_| stripe())))
    }

    /// The stripe of this thread.
    #[inline]
    pub(super) fn stripe(&self) -> &Stripe {
        thread_local! {
            static NUMBER: Cell<usize> = const { Cell::new(usize::MAX) };
        }
        let number = match NUMBER.get() {
            usize::MAX => {
                static NEXT: AtomicUsize = AtomicUsize::new(0);
                // ORDERING: relaxed: the number only spreads the threads.
                NUMBER.set(NEXT.fetch_add(1, Ordering::Relaxed) % STRIPES);
                NUMBER.get()
            }
            number => number,
        };
        &self.0[number % STRIPES]
    }

    /// Uses that found a fresh value.
    pub(super) fn hits(&self) -> u64 {
        self.0.iter().map(|stripe| stripe.hits.get() + u64::from(stripe.grant.spent(&stripe.budget))).sum()
    }
}

impl Stripe {
    /// Spends one use of the budget; `false` if none was left: then the value is a hit only if it is still fresh after
    /// [`revalidate`](Self::revalidate).
    #[inline]
    pub(super) fn spend(&self) -> bool {
        self.budget.spend()
    }

    /// Renews the budget, and checks the table's path if it is time.
    #[cold]
    pub(super) fn revalidate(&self, table: &Table) {
        // What is spent of a budget are hits.
        self.hits.add(u64::from(self.grant.spent(&self.budget)));
        let now = coarse_now();
        self.grant.renew(&self.budget, now);
        table.revalidate_if_due(now);
    }

    pub(super) fn count_hit(&self) {
        self.hits.add_one();
    }
}

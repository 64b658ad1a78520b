//! The loads that a thread is running, one within another: which load a loader or a callback belongs to.
//!
//! A loader that asks for another value may run the load of that value, whose loader may ask for a third one. Each load has a
//! *scope*, which its thread is in while it runs the loader or the callbacks of the load. The task of a load is in the scope
//! during each `poll` of the loader's future.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::slice;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::collected::Collected;

thread_local! {
    static SCOPES: RefCell<Vec<Arc<Scope>>> = const { RefCell::new(Vec::new()) };
}

/// The thread is in no scope when its locals have been dropped already, as when a runtime that is one of them drops its tasks.
fn with_scopes<R: Default>(action: impl FnOnce(&mut Vec<Arc<Scope>>) -> R) -> R {
    SCOPES.try_with(|scopes| action(&mut scopes.borrow_mut())).unwrap_or_default()
}

/// The scope of one load.
pub(super) struct Scope {
    number: ScopeNumber,
    collected: Mutex<Collected>,
}

/// Names the scope of a load in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct ScopeNumber(u64);

impl Scope {
    pub(super) fn new() -> Arc<Self> {
        static LAST: AtomicU64 = AtomicU64::new(0);
        // ORDERING: relaxed: the number is only compared. A forked child continues from its parent's numbers.
        let number = ScopeNumber(LAST.fetch_add(1, Ordering::Relaxed));
        Arc::new(Self { number, collected: Mutex::default() })
    }

    pub(super) fn number(&self) -> ScopeNumber {
        self.number
    }

    /// Enters the scope, until what is returned is dropped.
    pub(super) fn enter(self: &Arc<Self>) -> Entered {
        Self::enter_all(slice::from_ref(self))
    }

    /// Enters several scopes, the last one innermost.
    pub(super) fn enter_all(several: &[Arc<Self>]) -> Entered {
        with_scopes(|scopes| scopes.extend_from_slice(several));
        Entered { count: several.len(), _in_this_thread: PhantomData }
    }

    /// The innermost scope that this thread is in.
    pub(super) fn innermost() -> Option<Arc<Self>> {
        with_scopes(|scopes| scopes.last().cloned())
    }

    /// All scopes that this thread is in.
    pub(super) fn all() -> Vec<ScopeNumber> {
        with_scopes(|scopes| scopes.iter().map(|scope| scope.number).collect())
    }

    /// Changes what the loader has collected.
    pub(super) fn collect<R>(&self, change: impl FnOnce(&mut Collected) -> R) -> R {
        change(&mut self.collected.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl ScopeNumber {
    /// Whether this thread is in the scope.
    pub(super) fn is_entered(self) -> bool {
        with_scopes(|scopes| scopes.iter().any(|scope| scope.number == self))
    }
}

/// Leaves the scopes that were entered when it is dropped.
pub(super) struct Entered {
    count: usize,
    _in_this_thread: PhantomData<*const ()>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        for _ in 0..self.count {
            let left = with_scopes(Vec::pop);
            // Not while the list is borrowed: this may drop the last reference to what the loader has collected.
            drop(left);
        }
    }
}

//! What each process has for itself, though it is forked.

use std::sync::Arc;

use arc_swap::ArcSwap;

/// Something that a forked child must not use, as another thread of its parent may have been changing it at the fork.
pub(crate) trait OfProcess {
    fn new() -> Self;

    /// Whether this is a forked child's copy of its parent's.
    fn is_inherited(&self) -> bool;
}

/// A value of which a forked child makes its own.
pub(crate) struct PerProcess<T: OfProcess>(ArcSwap<T>);

impl<T: OfProcess> PerProcess<T> {
    pub(crate) fn new() -> Self {
        Self(ArcSwap::from_pointee(T::new()))
    }

    /// This process's.
    pub(crate) fn get(&self) -> Arc<T> {
        loop {
            let present = self.0.load_full();
            if !present.is_inherited() {
                return present;
            }
            self.0.compare_and_swap(&present, Arc::new(T::new()));
            // Never dropped, as it may be in any state.
            std::mem::forget(present);
        }
    }
}

impl<T: OfProcess> Drop for PerProcess<T> {
    fn drop(&mut self) {
        let present = self.0.load_full();
        if present.is_inherited() {
            std::mem::forget(present);
        }
    }
}

impl<T: OfProcess> std::fmt::Debug for PerProcess<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PerProcess").finish_non_exhaustive()
    }
}

//! The generation number.

use std::fmt;
use std::num::NonZeroU64;

/// A key's generation: never zero, below 2<sup>54</sup>, and never the same twice for one key.
///
/// It starts at the microseconds since the epoch at which the key was created and grows by one with each update, so a
/// greater one of the same key is a later one; the difference says nothing about time.
///
/// ```
/// # use gensync::{GenerationSynchronizer, Table};
/// # fn main() -> Result<(), gensync::Error> {
/// let sync = GenerationSynchronizer::new(&Table::options().anonymous()?, "settings")?;
/// let before = sync.sync_gen().expect("a new synchronizer has seen the present generation");
/// assert_eq!(sync.mark_updated()?.get(), before.get() + 1);
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(transparent))]
pub struct Generation(NonZeroU64);

impl Generation {
    #[inline]
    pub(crate) fn new(number: u64) -> Option<Self> {
        NonZeroU64::new(number).map(Self)
    }

    /// The number.
    #[inline]
    #[must_use]
    pub fn get(self) -> u64 {
        self.0.get()
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

//! The generation number.

use std::fmt;
use std::num::NonZeroU64;

use crate::error::{Error, ErrorKind};

/// All the bits that a generation may have.
pub(crate) const GENERATION: u64 = (1 << 54) - 1;

/// The lowest generation, whatever the clock says: 2^40 microseconds are the 13th of January 1970.
pub(crate) const LOWEST: u64 = 1 << 40;

/// A key's generation: at least 2<sup>40</sup>, below 2<sup>54</sup>, and never the same twice for one key.
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
///
/// A number that was kept elsewhere becomes a generation again by `try_from`, and with the feature `serde` by deserializing:
/// both refuse a number that no generation can be. (A number in a damaged table is reported as it is, and may be one of those.)
///
/// ```
/// # use gensync::Generation;
/// let kept = 1_795_577_010_727_662;
/// assert_eq!(Generation::try_from(kept)?.get(), kept);
/// assert!(Generation::try_from(7).is_err());
/// # Ok::<_, gensync::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(try_from = "u64", into = "u64"))]
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

/// # Errors
///
/// [`ErrorKind::InvalidInput`] for a number that no key's generation can be.
impl TryFrom<u64> for Generation {
    type Error = Error;

    fn try_from(number: u64) -> Result<Self, Error> {
        // The greatest number of 54 bits is no generation either, as there would be no next one.
        Self::new(number).filter(|_| (LOWEST..GENERATION).contains(&number)).ok_or_else(|| {
            Error::new(ErrorKind::InvalidInput {
                what: "the generation",
                found: number.to_string(),
                expected: "a number that gensync has given, from 2^40 to 2^54 - 2",
            })
        })
    }
}

impl From<Generation> for u64 {
    fn from(generation: Generation) -> Self {
        generation.get()
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

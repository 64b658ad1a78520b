//! Building a `Cached`: its options and its callbacks.

use std::fmt;

use super::policy::{Policy, Verification, policy_methods};
use super::{Cached, Loader};
use crate::error::Error;
use crate::synchronizer::GenerationSynchronizer;

/// Builds a [`Cached`]; made by [`Cached::builder`].
///
/// ```
/// use std::time::Duration;
///
/// use gensync::{Cached, GenerationSynchronizer, Table};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # fn load_routes() -> std::io::Result<Vec<String>> { Ok(Vec::new()) }
/// let table = Table::options().anonymous()?;
/// let plugins = GenerationSynchronizer::new(&table, "plugins")?;
/// let routes = Cached::builder(GenerationSynchronizer::new(&table, "routes")?, load_routes)
///     .depends_on(&plugins)
///     .stale_while_reloading()
///     .fail_safe(Duration::from_secs(300))
///     .on_error(|error| eprintln!("{error}"))
///     .build()?;
/// let now = routes.get()?; // an error only if there is nothing to serve, or for too long
/// plugins.mark_updated()?; // expires the routes, too
/// # drop(now);
/// # Ok(()) }
/// ```
///
/// # Callbacks
///
/// [`on_reload`](Self::on_reload), [`on_error`](Self::on_error) and the report of [`verify`](Self::verify) run in the thread
/// that loaded, when its load has ended and the new value is in place, while no lock is held. No other load of the value
/// begins before they return: they never overlap, and run in the order of the loads. Meanwhile other threads get the value that
/// was loaded, and wait only if it is expired again.
///
/// A callback that asks for the value gets the value in place, expired or not, or the error of the load that failed: it never
/// loads, whichever method it calls. It must not wait for another thread that asks for the value.
///
/// If a callback panics, so does the call that loaded; the next call works as usual.
#[must_use = "a builder does nothing until `build` is called"]
pub struct CachedBuilder<T: ?Sized> {
    sync: GenerationSynchronizer,
    loader: Loader<T>,
    policy: Policy<T>,
}

impl<T: ?Sized> CachedBuilder<T> {
    pub(super) fn new(sync: GenerationSynchronizer, loader: Loader<T>) -> Self {
        Self { sync, loader, policy: Policy::new() }
    }

    policy_methods!(policy);

    /// Sets a callback that is called with the old value and the new one after each load except the first.
    ///
    /// For what the callback may do, see [Callbacks](Self#callbacks).
    pub fn on_reload(mut self, callback: impl Fn(&T, &T) + Send + Sync + 'static) -> Self {
        self.policy.on_reload = Some(Box::new(move |_, old, new| callback(old, new)));
        self
    }

    /// For development: at each `every`-th hit of a call that may load, loads the value although it is fresh. If the cached value
    /// and the loaded one differ, `report` is called with both: the source was then changed without being marked updated.
    ///
    /// A change that is committed and not yet marked by `mark_updated` is reported as well. A change in an
    /// [`update`](GenerationSynchronizer::update) of this key, or of a key that the value depends on, is not reported. If the
    /// load fails, [`on_error`](Self::on_error) is called, and the call returns the cached value.
    ///
    /// For what `report` may do, see [Callbacks](Self#callbacks).
    pub fn verify(mut self, every: u64, report: impl Fn(&T, &T) + Send + Sync + 'static) -> Self
    where
        T: PartialEq,
    {
        let report = move |_: &(), cached: &T, loaded: &T| report(cached, loaded);
        self.policy.verification = Some(Verification::new(every, report));
        self
    }

    /// Builds the `Cached`. Nothing is loaded before the first use.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) if the jitter is not from 0 to 1 or is given without a
    /// [`max_age`](Self::max_age), or if the `every` of [`verify`](Self::verify) is 0.
    pub fn build(self) -> Result<Cached<T>, Error> {
        self.policy.check()?;
        Ok(Cached::assemble(self.sync, self.loader, self.policy))
    }
}

impl<T: ?Sized> fmt::Debug for CachedBuilder<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CachedBuilder").field("sync", &self.sync).finish_non_exhaustive()
    }
}

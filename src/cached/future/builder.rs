//! Building a `future::Cached`: its options and its callbacks.

use std::fmt;

use super::{Cached, Loader};
use crate::cached::policy::{Policy, Verification, policy_methods};
use crate::error::Error;
use crate::synchronizer::GenerationSynchronizer;

/// Builds a [`Cached`]; made by [`Cached::builder`]. The options are those of [`gensync::CachedBuilder`](crate::CachedBuilder);
/// where they speak of threads, here they mean tasks.
///
/// ```
/// use std::time::Duration;
///
/// use gensync::{GenerationSynchronizer, Table, future::Cached};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # async fn load_routes() -> std::io::Result<Vec<String>> { Ok(Vec::new()) }
/// let table = Table::options().anonymous()?;
/// let plugins = GenerationSynchronizer::new(&table, "plugins")?;
/// let routes = Cached::builder(GenerationSynchronizer::new(&table, "routes")?, load_routes)
///     .depends_on(&plugins)
///     .stale_while_reloading()
///     .fail_safe(Duration::from_secs(300))
///     .on_error(|error| eprintln!("{error}"))
///     .build()?;
/// let now = routes.get().await?; // an error only if there is nothing to serve, or for too long
/// plugins.mark_updated()?; // expires the routes, too
/// # drop(now);
/// # Ok(()) }
/// ```
///
/// # Callbacks
///
/// [`on_reload`](Self::on_reload), [`on_error`](Self::on_error) and the report of [`verify`](Self::verify) are functions, not
/// futures: they run in the task that loaded, within one `poll`, and must not block. Otherwise they are those of
/// [`gensync::CachedBuilder`](crate::CachedBuilder#callbacks). A load whose task is dropped has no outcome, and calls none of
/// them.
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

    /// For development: at each `every`-th hit of a call that may load, loads the value although it is fresh, and calls `report`
    /// if the cached value and the loaded one differ. See [`gensync::CachedBuilder::verify`](crate::CachedBuilder::verify).
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
    /// As [`gensync::CachedBuilder::build`](crate::CachedBuilder::build).
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

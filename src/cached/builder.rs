//! Building a `Cached`: its loader, its options and its callbacks.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::cached::Cached;
use crate::count::Count;
use crate::error::{Error, ErrorKind, Source};
use crate::synchronizer::GenerationSynchronizer;

type OnError = Box<dyn Fn(&Error) + Send + Sync>;
/// Called with an old value and a new one.
type OnPair<T> = Box<dyn Fn(&T, &T) + Send + Sync>;

/// The loader, the options and the callbacks of a `Cached`.
pub(crate) struct Policy<T: ?Sized> {
    pub(crate) loader: Box<dyn Fn() -> Result<Arc<T>, Source> + Send + Sync>,
    pub(crate) dependencies: Vec<GenerationSynchronizer>,
    pub(crate) max_age: Option<Duration>,
    pub(crate) jitter: f64,
    pub(crate) stale_while_reloading: bool,
    pub(crate) max_staleness: Option<Duration>,
    pub(crate) retry_pause: Duration,
    pub(crate) on_error: Option<OnError>,
    pub(crate) on_reload: Option<OnPair<T>>,
    pub(crate) verification: Option<Verification<T>>,
}

pub(crate) struct Verification<T: ?Sized> {
    every: u64,
    /// The hits of calls that may load.
    hits: Count,
    /// Reports two values if they differ.
    pub(crate) compare: OnPair<T>,
}

impl<T: ?Sized> Verification<T> {
    /// Whether this hit is to be verified. To be called once at each hit of a call that may load.
    pub(crate) fn is_due(&self) -> bool {
        self.hits.add_one().is_multiple_of(self.every)
    }
}

impl<T> Policy<T> {
    pub(crate) fn new<E>(loader: impl Fn() -> Result<T, E> + Send + Sync + 'static) -> Self
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        Self::shared(move || loader().map(Arc::new))
    }
}

impl<T: ?Sized> Policy<T> {
    pub(crate) fn shared<A: Into<Arc<T>>, E>(loader: impl Fn() -> Result<A, E> + Send + Sync + 'static) -> Self
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        Self {
            loader: Box::new(move || match loader() {
                Ok(value) => Ok(value.into()),
                Err(error) => Err(Source::from(error.into())),
            }),
            dependencies: Vec::new(),
            max_age: None,
            jitter: 0.0,
            stale_while_reloading: false,
            max_staleness: None,
            retry_pause: Duration::from_secs(1),
            on_error: None,
            on_reload: None,
            verification: None,
        }
    }

    /// Whether the generation of its key alone decides whether a value is fresh, and nothing else happens at a hit.
    pub(crate) fn is_plain(&self) -> bool {
        self.dependencies.is_empty() && self.max_age.is_none() && self.verification.is_none()
    }

    /// The age at which the next value expires.
    pub(crate) fn next_age(&self) -> Duration {
        match self.max_age {
            None | Some(Duration::MAX) => Duration::MAX,
            Some(age) if self.jitter > 0.0 => {
                let shorter = age.as_secs_f64() * (1.0 - self.jitter * random_fraction());
                Duration::try_from_secs_f64(shorter).unwrap_or(age)
            }
            Some(age) => age,
        }
    }

    /// How long `get` and its like do not load again after a load that failed. Without an old value to serve, they load at once.
    pub(crate) fn pause_of_calls(&self) -> Duration {
        if self.max_staleness.is_some() { self.retry_pause } else { Duration::ZERO }
    }
}

/// A random number from 0 to 1. It comes from the system, as forked children would share the state of any generator in memory.
fn random_fraction() -> f64 {
    f64::from(getrandom::u32().unwrap_or(0)) / f64::from(u32::MAX)
}

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
    policy: Policy<T>,
}

impl<T: ?Sized> CachedBuilder<T> {
    pub(crate) fn new(sync: GenerationSynchronizer, policy: Policy<T>) -> Self {
        Self { sync, policy }
    }

    /// While one thread loads an expired value, the others get the old one instead of waiting.
    ///
    /// An update is then seen only by calls that begin after the update *and* after the load of it. If a load hangs, the other
    /// threads get the old value for as long as it hangs, without an error, unless [`fail_safe`](Self::fail_safe) limits this
    /// time.
    pub fn stale_while_reloading(mut self) -> Self {
        self.policy.stale_while_reloading = true;
        self
    }

    /// If a load fails, the old value is served for at most `max_staleness`, counted from the beginning of the first load
    /// that failed; only after that do calls return the error.
    ///
    /// A load that lasts longer than `max_staleness` counts as failed for calls that wait for it or take the old value meanwhile:
    /// they return [`ErrorKind::Overdue`]. No other load begins before this load ends, and its outcome counts then. This does not
    /// apply to calls with a limit of their own ([`get_fresh`](Cached::get_fresh), [waits](Cached::wait)), nor while there is no
    /// old value: the duration of a first load is not limited. Zero serves no old value after a failure, and limits no load.
    ///
    /// The [`retry_pause`](Self::retry_pause) passes between two attempts, whatever the calls return meanwhile. If the clock is
    /// set back, as when a checkpoint is restored, both times count as over.
    pub fn fail_safe(mut self, max_staleness: Duration) -> Self {
        self.policy.max_staleness = Some(max_staleness);
        self
    }

    /// The pause between a load that failed and the next one, so that a broken source is not flooded with loads; one second
    /// unless set. It applies only with [`fail_safe`](Self::fail_safe) and to [waits](Cached::wait), and is exact to the clock's
    /// tick, some milliseconds. Without `fail_safe`, each call to [`get`](Cached::get) tries again at once.
    pub fn retry_pause(mut self, pause: Duration) -> Self {
        self.policy.retry_pause = pause;
        self
    }

    /// Sets a callback for every load that fails, called when the load has ended. It is also called after every eight loads in a
    /// row during which the value was updated ([`ErrorKind::Overtaken`]), as happens if the loader marks its own key updated, or
    /// a key that the value depends on; and for the first load of each outage of the table.
    ///
    /// For what the callback may do, see [Callbacks](Self#callbacks).
    pub fn on_error(mut self, callback: impl Fn(&Error) + Send + Sync + 'static) -> Self {
        self.policy.on_error = Some(Box::new(callback));
        self
    }

    /// A value is expired when it is older than this, whatever its generation: a backstop for a source that is also changed by
    /// programs that do not use gensync.
    ///
    /// The age is exact to the clock's tick, some milliseconds. Reading the clock costs a few nanoseconds at each use. If the
    /// clock is set back, the value is expired.
    pub fn max_age(mut self, age: Duration) -> Self {
        self.policy.max_age = Some(age);
        self
    }

    /// Shortens the [`max_age`](Self::max_age) of each value by a random part of it, at most this fraction (0 to 1), so that
    /// processes that loaded at the same time do not all load again at the same time.
    pub fn jitter(mut self, fraction: f64) -> Self {
        self.policy.jitter = fraction;
        self
    }

    /// The value depends on the state of another key as well, and is expired when that key is updated. May be called for several
    /// keys, of any tables.
    pub fn depends_on(mut self, sync: &GenerationSynchronizer) -> Self {
        self.policy.dependencies.push(sync.clone());
        self
    }

    /// Sets a callback that is called with the old value and the new one after each load except the first.
    ///
    /// For what the callback may do, see [Callbacks](Self#callbacks).
    pub fn on_reload(mut self, callback: impl Fn(&T, &T) + Send + Sync + 'static) -> Self {
        self.policy.on_reload = Some(Box::new(callback));
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
        let compare = move |cached: &T, loaded: &T| {
            if cached != loaded {
                report(cached, loaded);
            }
        };
        self.policy.verification = Some(Verification { every, hits: Count::default(), compare: Box::new(compare) });
        self
    }

    /// Builds the `Cached`. Nothing is loaded before the first use.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`] if the jitter is not from 0 to 1 or is given without a [`max_age`](Self::max_age), or if the
    /// `every` of [`verify`](Self::verify) is 0.
    pub fn build(self) -> Result<Cached<T>, Error> {
        let policy = &self.policy;
        let invalid = |what, found: String, expected| Err(ErrorKind::InvalidInput { what, found, expected }.into());
        if !(0.0..=1.0).contains(&policy.jitter) {
            return invalid("the jitter", policy.jitter.to_string(), "a fraction, 0 to 1");
        }
        if policy.jitter > 0.0 && policy.max_age.is_none() {
            return invalid("the jitter", policy.jitter.to_string(), "a max_age with it, which it shortens");
        }
        if policy.verification.as_ref().is_some_and(|verification| verification.every == 0) {
            return invalid("the number of hits between verifications", "0".to_owned(), "1 or more");
        }
        Ok(Cached::assemble(self.sync, self.policy))
    }
}

impl<T: ?Sized> fmt::Debug for CachedBuilder<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CachedBuilder").field("sync", &self.sync).finish_non_exhaustive()
    }
}

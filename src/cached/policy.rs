//! The options and callbacks that decide when a value is loaded, and what is served meanwhile.

use std::sync::Arc;
use std::time::Duration;

use crate::count::Count;
use crate::error::{Error, ErrorKind};
use crate::synchronizer::GenerationSynchronizer;

type OnError = Box<dyn Fn(&Error) + Send + Sync>;
/// Called with the key in a map, an old value and a new one.
type OnPair<T, K> = Box<dyn Fn(&K, &T, &T) + Send + Sync>;

/// The options and the callbacks of a `Cached`, or of all values of a map.
pub(super) struct Policy<T: ?Sized, K: ?Sized = ()> {
    pub(super) dependencies: Vec<Arc<GenerationSynchronizer>>,
    pub(super) max_age: Option<Duration>,
    pub(super) jitter: f64,
    pub(super) stale_while_reloading: bool,
    pub(super) max_staleness: Option<Duration>,
    pub(super) retry_pause: Duration,
    pub(super) on_error: Option<OnError>,
    pub(super) on_reload: Option<OnPair<T, K>>,
    pub(super) verification: Option<Verification<T, K>>,
}

pub(super) struct Verification<T: ?Sized, K: ?Sized> {
    every: u64,
    /// The hits of calls that may load.
    hits: Count,
    /// Reports two values if they differ.
    pub(super) compare: OnPair<T, K>,
}

impl<T: ?Sized, K: ?Sized> Verification<T, K> {
    pub(super) fn new(every: u64, report: impl Fn(&K, &T, &T) + Send + Sync + 'static) -> Self
    where
        T: PartialEq,
    {
        let compare = move |key: &K, cached: &T, loaded: &T| {
            if cached != loaded {
                report(key, cached, loaded);
            }
        };
        Self { every, hits: Count::default(), compare: Box::new(compare) }
    }

    /// Whether this hit is to be verified. To be called once at each hit of a call that may load.
    pub(super) fn is_due(&self) -> bool {
        self.hits.add_one().is_multiple_of(self.every)
    }
}

impl<T: ?Sized, K: ?Sized> Policy<T, K> {
    pub(super) fn new() -> Self {
        Self {
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

    pub(super) fn check(&self) -> Result<(), Error> {
        let invalid = |what, found: String, expected| Err(ErrorKind::InvalidInput { what, found, expected }.into());
        if !(0.0..=1.0).contains(&self.jitter) {
            return invalid("the jitter", self.jitter.to_string(), "a fraction, 0 to 1");
        }
        if self.jitter > 0.0 && self.max_age.is_none() {
            return invalid("the jitter", self.jitter.to_string(), "a max_age with it, which it shortens");
        }
        if self.verification.as_ref().is_some_and(|verification| verification.every == 0) {
            return invalid("the number of hits between verifications", "0".to_owned(), "1 or more");
        }
        Ok(())
    }

    /// Whether a value whose loader has found no dependencies is fresh by the generation of its key alone, and nothing else happens
    /// at a hit.
    pub(super) fn is_plain(&self) -> bool {
        self.dependencies.is_empty() && self.max_age.is_none() && self.verification.is_none()
    }

    /// The age at which the next value expires.
    pub(super) fn next_age(&self) -> Duration {
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
    pub(super) fn pause_of_calls(&self) -> Duration {
        if self.max_staleness.is_some() { self.retry_pause } else { Duration::ZERO }
    }
}

/// A random number from 0 to 1. It comes from the system, as forked children would share the state of any generator in memory.
fn random_fraction() -> f64 {
    f64::from(getrandom::u32().unwrap_or(0)) / f64::from(u32::MAX)
}

/// The methods by which a builder sets its policy, which all kinds of caches have.
macro_rules! policy_methods {
    ($($policy:ident).+) => {
        /// While one thread loads an expired value, the others get the old one instead of waiting.
        ///
        /// An update is then seen only by calls that begin after the update *and* after the load of it. If a load hangs, the other
        /// threads get the old value for as long as it hangs, without an error, unless [`fail_safe`](Self::fail_safe) limits this
        /// time.
        pub fn stale_while_reloading(mut self) -> Self {
            self.$($policy).+.stale_while_reloading = true;
            self
        }

        /// If a load fails, the old value is served for at most `max_staleness`, counted from the beginning of the first load
        /// that failed; only after that do calls return the error.
        ///
        /// A load that lasts longer than `max_staleness` counts as failed for calls that wait for it or take the old value
        /// meanwhile: they return [`ErrorKind::Overdue`](crate::ErrorKind::Overdue). No other load begins before this load ends,
        /// and its outcome counts then. This does not apply to calls with a limit of their own
        /// ([`get_fresh`](crate::Cached::get_fresh), [waits](crate::Cached::wait)), nor while there is no old value: the duration
        /// of a first load is not limited. Zero serves no old value after a failure, and limits no load.
        ///
        /// The [`retry_pause`](Self::retry_pause) passes between two attempts, whatever the calls return meanwhile. If the clock is
        /// set back, as when a checkpoint is restored, both times count as over.
        pub fn fail_safe(mut self, max_staleness: std::time::Duration) -> Self {
            self.$($policy).+.max_staleness = Some(max_staleness);
            self
        }

        /// The pause between a load that failed and the next one, so that a broken source is not flooded with loads; one second
        /// unless set. It applies only with [`fail_safe`](Self::fail_safe) and to [waits](crate::Cached::wait), and is exact to
        /// the clock's tick, some milliseconds. Without `fail_safe`, each call to [`get`](crate::Cached::get) tries again at
        /// once.
        pub fn retry_pause(mut self, pause: std::time::Duration) -> Self {
            self.$($policy).+.retry_pause = pause;
            self
        }

        /// Sets a callback for every load that fails, called when the load has ended. It is also called after every eight loads
        /// in a row during which the value was updated ([`ErrorKind::Overtaken`](crate::ErrorKind::Overtaken)), as happens if the
        /// loader marks its own key updated, or a key that the value depends on; and for the first load of each outage of the
        /// table.
        ///
        /// For what the callback may do, see [Callbacks](Self#callbacks).
        pub fn on_error(mut self, callback: impl Fn(&$crate::Error) + Send + Sync + 'static) -> Self {
            self.$($policy).+.on_error = Some(Box::new(callback));
            self
        }

        /// A value is expired when it is older than this, whatever its generation: a backstop for a source that is also changed by
        /// programs that do not use gensync.
        ///
        /// The age is exact to the clock's tick, some milliseconds. Reading the clock costs a few nanoseconds at each use. If the
        /// clock is set back, the value is expired.
        pub fn max_age(mut self, age: std::time::Duration) -> Self {
            self.$($policy).+.max_age = Some(age);
            self
        }

        /// Shortens the [`max_age`](Self::max_age) of each value by a random part of it, at most this fraction (0 to 1), so that
        /// processes that loaded at the same time do not all load again at the same time.
        pub fn jitter(mut self, fraction: f64) -> Self {
            self.$($policy).+.jitter = fraction;
            self
        }

        /// The value depends on the state of another key as well, and is expired when that key is updated. May be called for
        /// several keys, of any tables.
        pub fn depends_on(mut self, sync: &$crate::GenerationSynchronizer) -> Self {
            self.$($policy).+.dependencies.push(std::sync::Arc::new(sync.clone()));
            self
        }
    };
}
pub(super) use policy_methods;

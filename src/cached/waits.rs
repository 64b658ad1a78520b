//! Records which load waits for which other load, to detect loads that wait for each other in a circle and would never end.
//!
//! A load waits for another one if its loader, or a callback, asks for a value that is being loaded elsewhere. Before it waits, it
//! follows the waits from there: to the leader of that load, to the loads which that leader waits for, and so on. If a path leads
//! back to the load itself, the call fails instead of waiting; otherwise it records its wait. All this is done under one lock, so
//! the last load of a circle finds the waits of the others. No load finds a circle where there is none: the wait of a call that
//! was woken stays on record for a moment, but the load that it waited for has ended, which ends the path.
//!
//! A load within another load holds that one up as well, so a wait is recorded for all scopes that the thread is in. A call
//! outside of any load is waited for by no load, and needs no record.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::iter;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::scope::{Scope, ScopeNumber};
use crate::os::fork::{ForkLocal, OfOneProcess, token};

pub(super) struct Waits {
    process: u64,
    /// The waits of each load. A task may wait for several loads at once.
    scopes: Mutex<HashMap<ScopeNumber, Vec<Arc<Wait>>>>,
}

struct Wait {
    /// Returns the leader of the load; `None` when the load has ended.
    leader: Box<dyn Fn() -> Option<ScopeNumber> + Send + Sync>,
    /// The key of the value, for the error's text.
    key: String,
}

/// The keys of loads that wait for each other, each for the next one, and the last one for the first.
#[derive(Debug)]
pub(super) struct Circle(Vec<String>);

impl fmt::Display for Circle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the loads wait for each other: ")?;
        self.0.iter().try_for_each(|key| write!(f, "\"{}\" for ", key.escape_debug()))?;
        write!(f, "\"{}\"", self.0.first().map_or("", String::as_str).escape_debug())
    }
}

impl std::error::Error for Circle {}

impl OfOneProcess for Waits {
    fn new() -> Self {
        Self { process: token(), scopes: Mutex::default() }
    }

    fn is_inherited(&self) -> bool {
        self.process != token()
    }
}

impl Waits {
    /// The waits of this process.
    fn get() -> Arc<Self> {
        static WAITS: ForkLocal<Waits> = ForkLocal::new();
        WAITS.get()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ScopeNumber, Vec<Arc<Wait>>>> {
        self.scopes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The keys of the waits that lead from `leader` back to one of the `own` scopes, the last one first.
///
/// Not recursive, as thousands of tasks may wait in a row.
fn circle(
    scopes: &HashMap<ScopeNumber, Vec<Arc<Wait>>>,
    leader: ScopeNumber,
    own: &[ScopeNumber],
) -> Option<Vec<String>> {
    // How each load was reached: from which one, and by which of its waits.
    let mut reached: HashMap<ScopeNumber, Option<(ScopeNumber, &Arc<Wait>)>> = HashMap::from([(leader, None)]);
    let mut unread = vec![leader];
    while let Some(scope) = unread.pop() {
        if own.contains(&scope) {
            let way = iter::successors(reached[&scope], |(from, _)| reached[from]);
            return Some(way.map(|(_, wait)| wait.key.clone()).collect());
        }
        for wait in scopes.get(&scope).into_iter().flatten() {
            if let Some(next) = (wait.leader)()
                && let Entry::Vacant(place) = reached.entry(next)
            {
                place.insert(Some((scope, wait)));
                unread.push(next);
            }
        }
    }
    None
}

/// Keeps a wait on record until it is dropped.
pub(super) struct Waiting {
    waits: Arc<Waits>,
    scopes: Vec<ScopeNumber>,
    wait: Arc<Wait>,
}

impl Waiting {
    /// Records a wait for the load that `leader` returns, until it returns `None`. There is no record if this thread is in no
    /// scope.
    pub(super) fn new(
        leader: impl Fn() -> Option<ScopeNumber> + Send + Sync + 'static,
        key: &str,
    ) -> Result<Option<Self>, Circle> {
        let scopes = Scope::all();
        if scopes.is_empty() {
            return Ok(None);
        }
        let waits = Waits::get();
        let wait = Arc::new(Wait { leader: Box::new(leader), key: key.to_owned() });
        let mut records = waits.lock();
        let found = (wait.leader)().and_then(|leader| circle(&records, leader, &scopes));
        if let Some(mut keys) = found {
            keys.push(wait.key.clone());
            keys.reverse();
            return Err(Circle(keys));
        }
        for scope in &scopes {
            records.entry(*scope).or_default().push(Arc::clone(&wait));
        }
        drop(records);
        Ok(Some(Self { waits, scopes, wait }))
    }

    /// Whether this thread is in the scopes that the wait is recorded for: a future may be polled by another load than before.
    #[cfg(feature = "future")]
    pub(super) fn is_of(this: Option<&Self>) -> bool {
        this.map_or(&[][..], |this| &this.scopes) == Scope::all()
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // In a forked child, the mutex may be held by a thread that does not exist there.
        if self.waits.is_inherited() {
            return;
        }
        let mut records = self.waits.lock();
        for scope in &self.scopes {
            if let Some(waits) = records.get_mut(scope) {
                waits.retain(|wait| !Arc::ptr_eq(wait, &self.wait));
                if waits.is_empty() {
                    records.remove(scope);
                }
            }
        }
        // The wait itself is dropped when the lock is not held: this may drop the last reference to a `SingleFlight`, and with it
        // an error of the user.
    }
}

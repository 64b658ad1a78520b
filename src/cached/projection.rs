//! Views of a part of a `Cached` value.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Instant;

use super::Cached;
use crate::error::Error;

/// A view of one part of a [`Cached`] value, for code that need not know the rest.
///
/// It keeps no value of its own: loads, freshness and counters are those of the `Cached`, and an update expires the whole value.
///
/// ```
/// use gensync::{Cached, GenerationSynchronizer, Table};
///
/// struct Settings { routes: Vec<String> }
/// # fn load_settings() -> std::io::Result<Settings> { Ok(Settings { routes: vec!["/".to_owned()] }) }
/// # fn main() -> Result<(), gensync::Error> {
/// # let table = Table::options().anonymous()?;
/// let settings = Cached::new(GenerationSynchronizer::new(&table, "settings")?, load_settings);
/// let routes = settings.map(|settings| &settings.routes);
/// assert_eq!(*routes.get()?, ["/"]);
/// # Ok(()) }
/// ```
pub struct CachedProjection<T: ?Sized, U: ?Sized, C: Deref<Target = Cached<T>>, F: Fn(&T) -> &U + Clone> {
    cached: C,
    project: F,
    part: PhantomData<fn(&T) -> &U>,
}

impl<T: ?Sized, U: ?Sized, C: Deref<Target = Cached<T>>, F: Fn(&T) -> &U + Clone> CachedProjection<T, U, C, F> {
    /// A view of a `Cached`, given as a reference (as by [`Cached::map`]) or as an `Arc`. `project` runs whenever the part is
    /// used.
    pub fn new(cached: C, project: F) -> Self {
        Self { cached, project, part: PhantomData }
    }

    /// The part of the value that [`Cached::get`] returns.
    ///
    /// # Errors
    ///
    /// As [`Cached::get`].
    ///
    /// # Progress
    ///
    /// As [`Cached::get`].
    pub fn get(&self) -> Result<Part<T, U, F>, Error> {
        self.cached.get().map(|value| self.part(value))
    }

    /// The part of the value that [`Cached::get_stale_ok`] returns.
    ///
    /// # Errors
    ///
    /// As [`Cached::get_stale_ok`].
    ///
    /// # Progress
    ///
    /// As [`Cached::get_stale_ok`].
    pub fn get_stale_ok(&self) -> Result<Part<T, U, F>, Error> {
        self.cached.get_stale_ok().map(|value| self.part(value))
    }

    /// The part of the value that [`Cached::get_fresh`] returns.
    ///
    /// # Errors
    ///
    /// As [`Cached::get_fresh`].
    ///
    /// # Progress
    ///
    /// As [`Cached::get_fresh`].
    pub fn get_fresh(&self, deadline: Instant) -> Result<Part<T, U, F>, Error> {
        self.cached.get_fresh(deadline).map(|value| self.part(value))
    }

    /// The part of the value that [`Cached::get_if_fresh`] returns.
    ///
    /// # Progress
    ///
    /// As [`Cached::get_if_fresh`].
    #[must_use]
    pub fn get_if_fresh(&self) -> Option<Part<T, U, F>> {
        self.cached.get_if_fresh().map(|value| self.part(value))
    }

    /// The `Cached` that this is a view of.
    #[must_use]
    pub fn cached(&self) -> &Cached<T> {
        &self.cached
    }

    fn part(&self, value: Arc<T>) -> Part<T, U, F> {
        Part { value, project: self.project.clone(), part: PhantomData }
    }
}

impl<T: ?Sized, U: ?Sized, C: Deref<Target = Cached<T>>, F: Fn(&T) -> &U + Clone> fmt::Debug
    for CachedProjection<T, U, C, F>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CachedProjection").field("cached", &*self.cached).finish_non_exhaustive()
    }
}

/// A part of a value, from a [`CachedProjection`]. It keeps the whole value alive.
pub struct Part<T: ?Sized, U: ?Sized, F: Fn(&T) -> &U> {
    value: Arc<T>,
    project: F,
    part: PhantomData<fn(&T) -> &U>,
}

impl<T: ?Sized, U: ?Sized, F: Fn(&T) -> &U> Part<T, U, F> {
    /// The value that this is a part of.
    pub fn whole(part: &Self) -> &Arc<T> {
        &part.value
    }
}

impl<T: ?Sized, U: ?Sized, F: Fn(&T) -> &U + Clone> Clone for Part<T, U, F> {
    /// The same part, which is not cloned itself.
    fn clone(&self) -> Self {
        Self { value: Arc::clone(&self.value), project: self.project.clone(), part: PhantomData }
    }
}

impl<T: ?Sized, U: ?Sized, F: Fn(&T) -> &U> Deref for Part<T, U, F> {
    type Target = U;

    fn deref(&self) -> &U {
        (self.project)(&self.value)
    }
}

impl<T: ?Sized, U: fmt::Debug + ?Sized, F: Fn(&T) -> &U> fmt::Debug for Part<T, U, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        U::fmt(self, f)
    }
}

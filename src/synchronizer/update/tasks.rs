//! Updates in tasks, which must not sleep while they wait for other processes.

use std::time::{Duration, Instant};

use super::beginning::{Beginning, COURTESY};
use super::{Update, UpdateError, commit_all};
use crate::error::Error;
use crate::synchronizer::GenerationSynchronizer;
use crate::wait::notifier::Timer;

impl GenerationSynchronizer {
    /// [`update`](Self::update) for tasks: changes the source by the future that `commit` returns, and announces the update,
    /// whatever happens in between.
    ///
    /// If the future that this returns is dropped while the commit is under way, the update is announced then, as a part of the
    /// source may have been changed. If it is dropped before, nothing was changed.
    ///
    /// What the commit has begun elsewhere, such as a statement that a database carries out or a closure for a thread that may block,
    /// is not stopped by the drop: it may change the source later, unannounced. So where the caller may be dropped, as in a request
    /// whose client goes away, let a task of its own make the update, which is never dropped.
    ///
    /// ```
    /// # use gensync::{GenerationSynchronizer, Table};
    /// # struct Database;
    /// # impl Database { async fn save(&self, settings: &str) -> std::io::Result<()> { Ok(()) } }
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let database = Database;
    /// # let sync = GenerationSynchronizer::new(&Table::options().anonymous()?, "settings")?;
    /// sync.update_async(async || database.save("hello").await).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`update`](Self::update), and [`UpdateError::Begin`] if it has to wait for another process and no thread can be started
    /// for that.
    ///
    /// # Progress
    ///
    /// As [`update`](Self::update), but awaits where that sleeps.
    pub async fn update_async<T, E>(&self, commit: impl AsyncFnOnce() -> Result<T, E>) -> Result<T, UpdateError<E>> {
        let begun = self.begin_update_async().await.map_err(UpdateError::Begin)?;
        commit_begun(begun, commit).await
    }

    /// [`begin_update`](Self::begin_update) for tasks. The [`Update`] may be held while the task awaits something, as the change of
    /// the source, also in a task that moves between threads.
    ///
    /// # Cancel safety
    ///
    /// Cancel-safe: if the future is dropped before it is ready, no update has begun.
    ///
    /// # Errors
    ///
    /// As [`update_async`](Self::update_async).
    ///
    /// # Progress
    ///
    /// As [`update_async`](Self::update_async).
    pub async fn begin_update_async(&self) -> Result<Update<'_>, Error> {
        self.begin_async_within(COURTESY, self.table().pending_limit()).await
    }

    pub(crate) async fn update_async_deadline<T, E>(
        &self,
        deadline: Instant,
        commit: impl AsyncFnOnce() -> Result<T, E>,
    ) -> Result<T, UpdateError<E>> {
        let left = deadline.saturating_duration_since(Instant::now());
        let begun = self.begin_async_within(left.min(COURTESY), left.min(self.table().pending_limit()));
        commit_begun(begun.await.map_err(UpdateError::Begin)?, commit).await
    }

    async fn begin_async_within(&self, courtesy: Duration, limit: Duration) -> Result<Update<'_>, Error> {
        let mut beginning = Beginning::new(self, courtesy, limit)?;
        let mut timer = Timer::new(self.table());
        loop {
            if let Some(update) = beginning.attempt()? {
                return Ok(update);
            }
            timer.sleep(1).await.map_err(|error| self.explain(error))?;
        }
    }
}

async fn commit_begun<T, E>(
    begun: Update<'_>,
    commit: impl AsyncFnOnce() -> Result<T, E>,
) -> Result<T, UpdateError<E>> {
    // If it panics, or this future is dropped meanwhile, the update is dropped after it, which announces it.
    let outcome = commit().await;
    commit_all(vec![begun], || outcome)
}

//! Waiting in tasks: a future that is ready, and a stream that goes on, when a key was updated.
//!
//! Nothing here is tokio's own: they work in any runtime.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_core::Stream;

use crate::error::Error;
use crate::generation::Generation;
use crate::notifier::{Registration, Target};
use crate::synchronizer::GenerationSynchronizer;

impl GenerationSynchronizer {
    /// Is ready when the generation is not the one seen, that is when [`is_expired`](Self::is_expired) is `true`:
    /// [`wait`](Self::wait) for tasks.
    ///
    /// All descriptors and tasks of a [`Table`](crate::Table) in one process share one thread, which begins with the first and
    /// ends with the last.
    ///
    /// ```
    /// # use gensync::{GenerationSynchronizer, Table};
    /// # async fn load_routes() -> Result<(), gensync::Error> { Ok(()) }
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), gensync::Error> {
    /// # let table = Table::options().anonymous()?;
    /// let sync = GenerationSynchronizer::new(&table, "routes")?;
    /// # GenerationSynchronizer::new(&table, "routes")?.mark_updated()?;
    /// loop {
    ///     sync.changed().await?;
    ///     let ticket = sync.ticket();
    ///     load_routes().await?;
    ///     sync.adopt(ticket);
    /// #   break;
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// Cancel-safe: nothing is lost if the future is dropped before it is ready, as in another branch of a `select!`. What it
    /// waits for is kept by the synchronizer, and the next call is ready at once if there was an update meanwhile.
    ///
    /// # Errors
    ///
    /// No thread can be started.
    ///
    /// # Progress
    ///
    /// Polling it does not wait for updates, but is not wait-free: it takes a lock that all tasks and descriptors of the table
    /// share in this process, for the time of a look at a key, while the thread may hold it for a look at each key that is waited
    /// for. It allocates; the first poll may start the thread. A look makes the system calls that
    /// [`is_expired`](Self::is_expired) may make. Dropping the future takes the lock as well, and wakes the thread if it was the
    /// last.
    pub fn changed(&self) -> Changed<'_> {
        Changed { sync: self, registration: None }
    }

    /// The updates of the key, as a stream of the generations that they gave, beginning with the first one that this
    /// synchronizer has not seen now. Several updates may be told as one, by the last one's generation.
    ///
    /// The stream keeps what it has seen for itself.
    ///
    /// # Cancel safety
    ///
    /// Cancel-safe: `next` of the stream may be dropped before it is ready, and nothing is lost.
    ///
    /// # Errors
    ///
    /// An item is an error if the table was replaced and its successor cannot be attached to, twice a second as long as that
    /// lasts; or if no thread can be started. The stream may be polled again.
    ///
    /// # Progress
    ///
    /// As [`changed`](Self::changed).
    pub fn changes(&self) -> Changes {
        Changes { sync: self.clone(), registration: None }
    }

    fn poll_news(&self, context: &Context<'_>, registration: &mut Option<Registration>) -> Poll<Result<(), Error>> {
        let ticket = self.seen_ticket();
        if self.is_news(ticket) {
            return Poll::Ready(Ok(()));
        }
        let waker = context.waker().clone();
        match registration {
            Some(registration) if !registration.is_inherited() => registration.set_waker(waker, ticket),
            _ => match Registration::new(self.clone(), Target::Task(Some(waker))) {
                Ok(new) => *registration = Some(new),
                Err(error) => return Poll::Ready(Err(error)),
            },
        }
        // There may have been an update just before it was registered.
        if self.is_news(ticket) { Poll::Ready(Ok(())) } else { Poll::Pending }
    }
}

/// The future of [`GenerationSynchronizer::changed`].
#[derive(Debug)]
#[must_use = "futures do nothing unless they are polled"]
pub struct Changed<'a> {
    sync: &'a GenerationSynchronizer,
    registration: Option<Registration>,
}

impl Future for Changed<'_> {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        this.sync.poll_news(context, &mut this.registration)
    }
}

/// The stream of [`GenerationSynchronizer::changes`]. It never ends.
#[derive(Debug)]
#[must_use = "streams do nothing unless they are polled"]
pub struct Changes {
    sync: GenerationSynchronizer,
    registration: Option<Registration>,
}

impl Stream for Changes {
    type Item = Result<Generation, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        this.sync.poll_news(context, &mut this.registration).map(|news| Some(news.and_then(|()| this.sync.refresh())))
    }
}

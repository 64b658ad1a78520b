//! Waiting in tasks: a future and a stream that are ready when a key was updated.
//!
//! They do not depend on tokio: they work in any runtime.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::thread::sleep;
use std::time::Duration;

use futures_core::Stream;

use crate::error::Error;
use crate::generation::Generation;
use crate::os::clock::coarse_now;
use crate::synchronizer::{GenerationSynchronizer, Ticket};
use crate::wait::notifier::{Registration, Target};

/// How long a poll blocks if it fails as the poll before it did.
const MOMENT: Duration = Duration::from_millis(1);

impl GenerationSynchronizer {
    /// A future that is ready when the generation is not the one seen, that is, when [`is_expired`](Self::is_expired) is `true`:
    /// [`wait`](Self::wait) for tasks.
    ///
    /// All descriptors and tasks of a [`Table`](crate::Table) in one process share one thread, which starts with the first of
    /// them and ends with the last.
    ///
    /// A change is reported until it is adopted. So that a loop of loads that fail neither keeps the processor busy nor keeps
    /// other tasks from running, there is a pause before the same change is reported again: 10 milliseconds the first time, and
    /// twice as long each further time, up to a second; and the task yields once. Another change ends the pause at once.
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
    ///     match load_routes().await {
    ///         Ok(()) => sync.adopt(ticket),
    ///         Err(error) => eprintln!("will be tried again: {error}"), // after a pause, which grows
    ///     }
    /// #   break;
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// Cancel-safe: no update is lost if the future is dropped before it is ready, as when another branch of a `select!` is
    /// taken. The synchronizer keeps what it has seen, and the next call is ready at once if there was an update meanwhile.
    ///
    /// # Errors
    ///
    /// No thread can be started.
    ///
    /// # Progress
    ///
    /// This call does nothing. A `poll` of the future never sleeps to wait for a change. It reads a clock, and up to twice a
    /// second it checks the file's path. If there is no change, it takes a lock that is shared by the threads of this process
    /// only; the shared thread holds this lock while it reads one word of each key that has waiters. The first such `poll` of a
    /// future allocates, and may start the thread. During the pause before a repeated report, it may make one system call to wake
    /// the thread. If the table was replaced, `poll` attaches to the successor: opening, mapping and retiring files. If no thread
    /// can be started in two polls in a row, the second one blocks for a millisecond, since nothing else would slow a loop down;
    /// each 128th yields. Dropping the future takes the same lock; dropping the last one wakes the thread, by one system call.
    pub fn changed(&self) -> Changed<'_> {
        Changed { sync: self, registration: None }
    }

    /// The updates of the key as a stream of their generations, beginning with the first update that this synchronizer has not
    /// seen at the time of this call. Several updates may be reported as one, by the generation of the last one.
    ///
    /// The stream keeps its own record of what it has seen.
    ///
    /// # Cancel safety
    ///
    /// Cancel-safe: if `next` of the stream is dropped before it is ready, no update is lost.
    ///
    /// # Errors
    ///
    /// An item is an error if the table was replaced and its successor cannot be attached to (twice a second for as long as that
    /// lasts), or if no thread can be started. The stream may be polled again.
    ///
    /// # Progress
    ///
    /// This call allocates. For the stream's `poll_next`, and for dropping the stream, see the future of
    /// [`changed`](Self::changed).
    pub fn changes(&self) -> Changes {
        Changes { sync: self.clone(), registration: None }
    }

    fn poll_news(&self, context: &Context<'_>, registration: &mut Option<Registration>) -> Poll<Result<(), Error>> {
        let ticket = self.seen_ticket();
        // A change that was reported before is news again when its pause is over, or when there is a further change.
        let repeat = self.repeat(ticket);
        let (awaited, pause) = repeat.map_or((ticket, None), |(pause, present)| (present, Some(pause)));
        if pause == Some(0) || self.is_news(awaited) {
            return self.report(context, ticket, pause.is_some());
        }
        let waker = context.waker().clone();
        if registration.as_ref().is_none_or(Registration::is_inherited) {
            match Registration::new(self, awaited, Target::Task(None)) {
                Ok(new) => *registration = Some(new),
                Err(error) => return self.fail(context, error),
            }
        }
        if let Some(registration) = registration {
            registration.set_waker(waker, awaited, pause.map(|pause| coarse_now() + pause));
        }
        // An update just before the registration wakes no one, so it must be found here.
        if self.is_news(awaited) {
            return self.report(context, ticket, pause.is_some());
        }
        self.pace().end_row();
        Poll::Pending
    }

    fn report(&self, context: &Context<'_>, ticket: Ticket, is_repeated: bool) -> Poll<Result<(), Error>> {
        if self.pace().yields(is_repeated) {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.pace().continue_row();
        self.note_report(ticket);
        Poll::Ready(Ok(()))
    }

    /// Fails at once: without the thread, nothing could wake the task later.
    pub(crate) fn fail(&self, context: &Context<'_>, error: Error) -> Poll<Result<(), Error>> {
        if self.pace().yields(false) {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        if self.pace().continue_row() {
            sleep(MOMENT);
        }
        Poll::Ready(Err(error))
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

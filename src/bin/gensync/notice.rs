//! A message while something takes long, so that silence does not look like a hang.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use crate::failure::complain;

/// What takes less time than this needs no message.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long the library waits for other processes at most, with this tool's options: the default
/// of `TableOptions::pending_limit`.
pub(crate) const LIMIT: &str = "30 s";

/// Runs `action`; prints `text` on stderr if it has not ended after a second.
pub(crate) fn while_waiting<R>(text: impl FnOnce() -> String + Send, action: impl FnOnce() -> R) -> R {
    thread::scope(|scope| {
        let (end, ended) = channel::<()>();
        let _ = thread::Builder::new().spawn_scoped(scope, move || {
            if ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                complain(&text());
            }
        });
        let result = action();
        drop(end);
        result
    })
}

//! A message while something takes long, so that silence does not look like a hang.

use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use crate::failure::complain;
use crate::processes::holders;

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

/// The message of a command that announces something, while it waits for a reset.
pub(crate) fn reset_in_the_way() -> String {
    format!("waiting for a reset of the table to end, for {LIMIT} at most")
}

/// The message of `reset` and `rm`, while they wait for updates in flight.
pub(crate) fn updates_in_the_way(path: &Path) -> String {
    let holders = std::fs::metadata(path).map(|metadata| holders(&metadata)).unwrap_or_default();
    let own = format!("{} (", std::process::id());
    let holders: Vec<_> = holders.into_iter().filter(|holder| !holder.starts_with(&own)).collect();
    let named = if holders.is_empty() { "none that can be seen".to_owned() } else { holders.join(", ") };
    format!("waiting for updates in flight to end, for {LIMIT} at most; processes that have one: {named}")
}

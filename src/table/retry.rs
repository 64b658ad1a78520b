//! Trying again, as a table may be replaced at any time.

use crate::error::{Error, ErrorKind};

/// How often an operation starts again because the table was replaced meanwhile, before it gives up.
const ATTEMPTS: u32 = 100;

/// Repeats `attempt` until it returns something, as the table may be replaced during each attempt.
///
/// # Errors
///
/// [`ErrorKind::Retired`] if it returns nothing a hundred times.
pub(crate) fn retry<R>(mut attempt: impl FnMut() -> Result<Option<R>, Error>) -> Result<R, Error> {
    for _ in 0..ATTEMPTS {
        if let Some(result) = attempt()? {
            return Ok(result);
        }
    }
    Err(ErrorKind::Retired.into())
}

//! How a command fails: its message, and its exit status.

use std::io;

use gensync::{Error, ErrorKind};

/// The exit status of a command that was carried out, or the failure to report.
pub(crate) type Outcome<T = u8> = Result<T, Failure>;

pub(crate) const DONE: u8 = 0;
pub(crate) const NEGATIVE: u8 = 1;
pub(crate) const USAGE: u8 = 2;
pub(crate) const UNUSABLE: u8 = 3;
/// `exec` itself failed, or refused to run the command: as `env` and `timeout` have it.
pub(crate) const EXEC_FAILED: u8 = 125;

#[derive(Debug)]
pub(crate) enum Failure {
    /// A negative answer, with what to do.
    Negative(String),
    /// The command line is wrong in a way that only the command itself finds out.
    Usage(String),
    /// The table cannot be used.
    Table(Error),
    /// The output cannot be written.
    Output(io::Error),
    /// Something else that the command needs cannot be used.
    Unusable(String),
}

impl Failure {
    /// Success if there is no failure. Otherwise reports all but the last, which is for the caller to report.
    pub(crate) fn all(mut failures: Vec<Self>) -> Outcome {
        let Some(last) = failures.pop() else { return Ok(DONE) };
        failures.iter().for_each(|failure| _ = failure.report());
        Err(last)
    }

    /// Reports it on stderr, and returns the exit status.
    pub(crate) fn report(&self) -> u8 {
        let (status, text) = match self {
            // The reader of the output has closed it, as `head` does when it has enough.
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => return DONE,
            Self::Output(error) => (UNUSABLE, format!("the output cannot be written: {error}")),
            Self::Negative(text) => (NEGATIVE, text.clone()),
            Self::Usage(text) => (USAGE, format!("{text}\n\nFor more information, try '--help'.")),
            Self::Unusable(text) => (UNUSABLE, text.clone()),
            Self::Table(error) => (status_of(error), explain(error)),
        };
        complain(&text);
        status
    }
}

/// Prints a message on stderr, which may be closed.
pub(crate) fn complain(text: &str) {
    let _ = io::Write::write_all(&mut io::stderr(), format!("gensync: {text}\n").as_bytes());
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Table(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

fn status_of(error: &Error) -> u8 {
    match error.kind() {
        ErrorKind::EmptyKey | ErrorKind::InvalidInput { .. } => USAGE,
        _ => UNUSABLE,
    }
}

/// The versions that were found and expected, if the table is one of an older file format, which can be upgraded.
pub(crate) fn older_format(error: &Error) -> Option<(u32, u32)> {
    match *error.kind() {
        ErrorKind::LayoutVersion { found, expected, .. } => (1..expected).contains(&found).then_some((found, expected)),
        _ => None,
    }
}

/// The error, its cause, and what to do with this tool where the library's advice is for programs.
pub(crate) fn explain(error: &Error) -> String {
    let mut text = crate::printable::printable(error.to_string().as_bytes());
    if let Some(cause) = std::error::Error::source(error) {
        text += &format!(" ({cause})");
    }
    let advice = match error.kind() {
        // The error itself says which one.
        ErrorKind::NotFound if error.missing_folder().is_some() => return text,
        ErrorKind::NotFound => {
            let Some(path) = error.path() else { return text };
            let shown = crate::printable::printable(path.as_os_str().as_encoded_bytes());
            // Name the topmost folder that is missing, not the table alone.
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            if let Some(missing) = folder.and_then(|folder| folder.ancestors().filter(|one| !one.exists()).last()) {
                let missing = crate::printable::printable(missing.as_os_str().as_encoded_bytes());
                text = format!("{shown}: no such table, as the folder {missing} does not exist");
                "make the folder, as the user that the processes run as; or check that --table, --app or \
                 GENSYNC_TABLE names the right one (--app also depends on XDG_RUNTIME_DIR)"
            } else {
                text = format!("{shown}: no such table");
                "`gensync create KEY` makes one; but if processes use one, check that --table, --app or GENSYNC_TABLE names \
                 theirs (--app also depends on XDG_RUNTIME_DIR)"
            }
        }
        ErrorKind::Permission => "run this as the table's owner or as root",
        ErrorKind::NetworkFileSystem { found: "FUSE", .. } => "here, --allow-fuse accepts it",
        ErrorKind::NetworkFileSystem { magic, .. } | ErrorKind::UnknownFileSystem { magic, .. } => {
            &format!("here, --allow-file-system={magic:#x} accepts it")
        }
        ErrorKind::LayoutVersion { .. } if older_format(error).is_some() => {
            let Some(path) = error.path() else { return text };
            &format!("here: gensync upgrade {}", crate::printable::printable(path.as_os_str().as_encoded_bytes()))
        }
        ErrorKind::Retired => {
            "`gensync doctor` says more; any command that writes, such as `gensync create KEY`, replaces it"
        }
        ErrorKind::Locked { .. } => "`gensync doctor` names the processes, if it may see them",
        _ => return text,
    };
    format!("{text}\n  {advice}")
}

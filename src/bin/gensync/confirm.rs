//! Asking before something that cannot be taken back.

use std::io::{self, BufRead as _, IsTerminal as _, Write as _};

use crate::arguments::Confirmed;
use crate::failure::{Failure, Outcome};

/// Success if the answer is yes, or was given on the command line.
pub(crate) fn confirm(options: &Confirmed, question: &str) -> Outcome<()> {
    if options.yes {
        return Ok(());
    }
    if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
        return Err(Failure::Usage("there is no terminal to ask on; give --yes to do it without asking".to_owned()));
    }
    let _ = write!(io::stderr(), "{question} [y/N] ");
    let mut answer = String::new();
    let _ = io::stdin().lock().read_line(&mut answer);
    match answer.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(Failure::Negative("nothing was changed".to_owned())),
    }
}

//! Another process of this program, which announces the update of an `exec` that was killed.

use std::io::Read as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::Duration;

use gensync::CacheKey;
use nix::unistd::getppid;

use crate::arguments::WitnessOptions;
use crate::child::this_program;
use crate::commands::mark::mark_key;
use crate::failure::{DONE, Outcome, complain};
use crate::keys::Choice;
use crate::target::Target;

/// The witness, as the watched process holds it. Dropping it ends the witness.
#[derive(Debug)]
pub(crate) struct Witness(Child);

impl Witness {
    /// `None` if no further process can be started: the command runs nevertheless.
    pub(crate) fn start(target: &Target, keys: &[CacheKey], choices: &[Choice]) -> Outcome<Option<Self>> {
        let table = target.arguments()?;
        let start = || {
            let mut command = this_program()?;
            command
                .args(table)
                .args(["witness", "--of"])
                .arg(std::process::id().to_string())
                .args(choices.iter().flat_map(Choice::arguments));
            command.arg("--").args(keys.iter().map(CacheKey::as_str));
            // In a process group of its own, it does not receive the signals that are typed at the terminal. Without the output's
            // descriptors, it does not keep a reader of the output waiting for the end.
            command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()
        };
        Ok(match start() {
            Ok(child) => Some(Self(child)),
            Err(error) => {
                complain(&format!(
                    "no second process can be started ({error}): if this one is killed, the change is not announced before the \
                     command has ended"
                ));
                None
            }
        })
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Reads from a pipe that is never written to. The read ends when the watched process, which has the other end, is dead.
pub(crate) fn witness(target: &Target, options: &WitnessOptions) -> Outcome {
    let _ = std::io::stdin().lock().read_to_end(&mut Vec::new());
    // The kernel closes a killed process's descriptors in no fixed order: the lock of its update may still be held, and the
    // update would count as one of a live process. The kernel gives its children another parent only after it has
    // closed all of them.
    while getppid().as_raw() == options.of {
        sleep(Duration::from_millis(1));
    }
    let table = target.write()?;
    for key in &options.keys {
        mark_key(&table, &CacheKey::raw(key))?;
    }
    let WitnessOptions { all, glob, digests, .. } = options;
    table.clear_matching(|slot| {
        *all || glob.iter().any(|glob| Choice::Glob(glob.clone()).matches(slot))
            || digests.digest.contains(&slot.digest())
    })?;
    Ok(DONE)
}

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
use crate::commands::change::mark_key;
use crate::failure::{DONE, Outcome, complain};
use crate::keys::Choice;
use crate::target::Target;

/// The witness, as the process has it that is to be watched; which is over with when this is dropped.
#[derive(Debug)]
pub(crate) struct Witness(Child);

impl Witness {
    /// `None` if there can be no further process: that keeps nothing from being done.
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
            // It does not get what is typed at the terminal, and keeps nobody waiting for the end of the output.
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

/// Reads what nobody writes, until whoever could write is dead.
pub(crate) fn witness(target: &Target, options: &WitnessOptions) -> Outcome {
    let _ = std::io::stdin().lock().read_to_end(&mut Vec::new());
    // What a killed process has open is closed in no order: its lock may be held still, and it would count as alive. It has
    // lost its children only when it has lost the lock.
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

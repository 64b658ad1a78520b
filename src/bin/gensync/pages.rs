//! What shells and `man` are given.

use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::arguments::Arguments;
use crate::failure::{DONE, Failure, Outcome};
use crate::output::Output;

pub(crate) fn completions(shell: Shell, output: &mut Output) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "gensync", &mut script);
    output.bytes(&script)?;
    Ok(DONE)
}

pub(crate) fn man(name: Option<&str>, output: &mut Output) -> Outcome {
    let mut command = Arguments::command();
    // Gives each of its commands the options that are for all.
    command.build();
    if let Some(name) = name {
        let found = command.find_subcommand(name).filter(|command| !command.is_hide_set()).cloned();
        command = found.ok_or_else(|| Failure::Usage(format!("there is no command '{}'", name.escape_debug())))?;
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(command).render(&mut page)?;
    output.bytes(&page)?;
    Ok(DONE)
}

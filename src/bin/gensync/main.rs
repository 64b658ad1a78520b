//! `gensync`, the operator's tool: shows tables of generations, and changes them, from a terminal or a script.

mod arguments;
mod child;
mod commands;
mod confirm;
mod extents;
mod failure;
mod filesystem;
mod hangup;
mod keys;
mod notice;
mod output;
mod printable;
mod processes;
mod target;
mod time;

use std::process::ExitCode;

use clap::Parser as _;

use arguments::{Arguments, Command};
use commands::{
    bench, create, doctor, exec, get, ls, mark, metrics, pages, ps, reset, rm, stat, tables, top, upgrade, wait, watch,
    witness,
};
use failure::EXEC_FAILED;
use output::Output;

fn main() -> ExitCode {
    if child::is_first()
        && let Ok(status) = child::run_as_first()
    {
        return ExitCode::from(status);
    }
    let arguments = Arguments::try_parse().unwrap_or_else(|error| {
        let _ = error.print();
        // For `exec`, 2 may be the status of its command.
        let is_refusal = error.use_stderr() && arguments::is_exec(std::env::args_os());
        std::process::exit(if is_refusal { EXEC_FAILED.into() } else { error.exit_code() })
    });
    let mut output = Output::new(arguments.json);
    let outcome = run(&arguments, &mut output).and_then(|status| output.flush().map(|()| status));
    ExitCode::from(outcome.unwrap_or_else(|failure| failure.report()))
}

fn run(arguments: &Arguments, output: &mut Output) -> failure::Outcome {
    let target = &arguments.target;
    match &arguments.command {
        Command::Ls(options) => ls::ls(target, options, output),
        Command::Get(options) => get::get(target, options, output),
        Command::Mark(options) => mark::mark(target, options, output),
        Command::Clear(options) => mark::clear(target, options, output),
        Command::Create(options) => create::create(target, options, output),
        Command::Reset(options) => reset::reset(target, options, output),
        Command::Rm(options) => rm::rm(target, options, output),
        Command::Upgrade(options) => upgrade::upgrade(target, options, output),
        Command::Exec(options) => exec::execute(target, options, output),
        Command::Wait(options) => wait::wait(target, options, output),
        Command::Stat => stat::stat(target, output),
        Command::Doctor => doctor::doctor(target, output),
        Command::Metrics(options) => metrics::metrics(target, options, output),
        Command::Top(options) => top::top(target, options, output),
        Command::Bench(options) => bench::bench(options, output),
        Command::BenchWorker(options) => bench::worker(options),
        Command::Witness(options) => witness::witness(target, options),
        Command::Completions { shell } => pages::completions(*shell, output),
        Command::Man { command, all } => pages::man(command.as_deref(), all.as_deref(), output),
        Command::Tables => tables::tables(target, output),
        Command::Complete { what } => pages::complete(*what, target, output),
        Command::Ps => ps::ps(target, output),
        Command::Watch(options) => watch::watch(target, options, output),
    }
}

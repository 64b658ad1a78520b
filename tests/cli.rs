//! Guards the command line as people and scripts use it: what it prints, how it ends, what it leaves alone.
//!
//! Everything runs the real program, as a process of its own.

#[path = "cli/arguments.rs"]
mod arguments;
#[path = "cli/bench.rs"]
mod bench;
#[path = "cli/doctor.rs"]
mod doctor;
#[path = "cli/execute.rs"]
mod execute;
#[path = "cli/generations.rs"]
mod generations;
#[path = "cli/keys.rs"]
mod keys;
#[path = "cli/looking.rs"]
mod looking;
#[path = "cli/metrics.rs"]
mod metrics;
#[path = "cli/processes.rs"]
mod processes;
#[path = "cli/removal.rs"]
mod removal;
#[path = "cli/screen.rs"]
mod screen;
mod support;
#[path = "cli/terminal.rs"]
mod terminal;
#[path = "cli/tool.rs"]
mod tool;
#[path = "cli/upgrade.rs"]
mod upgrade;
#[path = "cli/waiting.rs"]
mod waiting;

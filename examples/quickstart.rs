//! The code on the README's first screen.

use std::{fs, sync::Arc};

use gensync::{Cached, GenerationSynchronizer, Table};

const SOURCE: &str = "/dev/shm/quickstart.txt"; // any source of yours: a database, a file, a service

fn main() -> Result<(), Box<dyn std::error::Error>> {
    fs::write(SOURCE, "hello")?;
    let table = Table::open("/dev/shm/quickstart.gensync")?; // shared by all processes that open this path
    let greeting = Cached::new(GenerationSynchronizer::new(&table, "greeting")?, || fs::read_to_string(SOURCE));

    let now: Arc<String> = greeting.get()?; // at each use: from memory, until some process has changed it
    println!("{now}");

    greeting.update(|| fs::write(SOURCE, "good morning"))?; // in any process: all of them notice, even if it is killed
    println!("{}", greeting.get()?);
    Ok(())
}

//! The code on the README's first screen.

use gensync::{GenerationSynchronizer, Table};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let table = Table::open("/dev/shm/quickstart.gensync")?; // shared by all processes that open this path
    let worker = GenerationSynchronizer::new(&table, "siteconfig:1")?;
    let admin = GenerationSynchronizer::new(&table, "siteconfig:1")?; // would be another process

    let mut settings = worker.refresh_with(|| std::fs::read_to_string("Cargo.toml"))?; // any source of yours
    admin.mark_updated()?; // after the source was changed
    if worker.is_expired() {
        settings = worker.refresh_with(|| std::fs::read_to_string("Cargo.toml"))?;
    }
    println!("{} bytes of settings at generation {}", settings.len(), worker.sync_gen().ok_or("unseen")?);
    Ok(())
}

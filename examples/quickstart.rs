use gensync::{GenerationSynchronizer, Table};

fn main() -> Result<(), gensync::Error> {
    let table = Table::open("/dev/shm/a.gensync")?;
    let sync = GenerationSynchronizer::new(&table, "siteconfig:1")?;
    println!("{} {:?}", sync.is_expired(), sync.sync_gen());
    println!("{:?}", sync.mark_updated()?);
    println!("{}", sync.is_expired());
    sync.clear()?;
    println!("{}", sync.is_expired());
    println!("{:?}", table.stats());
    println!("{:?}", table.slots().collect::<Vec<_>>());
    table.reset()?;
    println!("{} {:?}", sync.is_expired(), sync.sync_gen());
    println!("{:?}", sync.refresh()?);
    println!("{}", sync.is_expired());
    std::fs::remove_file("/dev/shm/a.gensync").unwrap();
    let mut n = 0;
    let t = std::time::Instant::now();
    while !sync.is_expired() {
        n += 1;
    }
    println!("{n} {:?}", t.elapsed());
    println!("{:?}", sync.refresh()?);
    println!("{:?}", table.slots().collect::<Vec<_>>());
    let t = std::time::Instant::now();
    for i in 0..1_000_000u32 {
        GenerationSynchronizer::new(&table, format!("key{i}"))?;
    }
    println!("million {:?} {:?}", t.elapsed(), table.stats());
    let t = std::time::Instant::now();
    for i in 0..1_000_000u32 {
        GenerationSynchronizer::new(&table, format!("key{i}"))?;
    }
    println!("million again {:?}", t.elapsed());
    Ok(())
}

//! Sources to load a `Cached` from.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use gensync::{Cached, GenerationSynchronizer, Table};

pub(crate) const HOUR: Duration = Duration::from_secs(3600);

pub(crate) fn anonymous() -> Table {
    Table::options().anonymous().unwrap()
}

pub(crate) fn sync(table: &Table) -> GenerationSynchronizer {
    GenerationSynchronizer::new(table, "key").unwrap()
}

pub(crate) type Source = Arc<Mutex<Result<u64, String>>>;

/// A source that can be changed and broken, and counts how often it is loaded.
pub(crate) fn source() -> (Source, Arc<AtomicU64>, impl Fn() -> Result<u64, String> + Send + Sync + 'static) {
    let (source, loads) = (Arc::new(Mutex::new(Ok(1))), Arc::new(AtomicU64::new(0)));
    let loader = {
        let (source, loads) = (source.clone(), loads.clone());
        move || {
            loads.fetch_add(1, SeqCst);
            source.lock().unwrap().clone()
        }
    };
    (source, loads, loader)
}

pub(crate) fn set(source: &Source, value: Result<u64, &str>) {
    *source.lock().unwrap() = value.map_err(str::to_owned);
}

pub(crate) fn change(source: &Source, value: u64) -> io::Result<()> {
    set(source, Ok(value));
    Ok(())
}

/// A loader that waits, from its second load on, for a message before it goes on; and the sender of that. `begun` counts its loads.
pub(crate) fn gated(
    begun: &Arc<AtomicU64>,
) -> (mpsc::Sender<()>, impl Fn() -> io::Result<u64> + Send + Sync + 'static) {
    let (open, gate) = mpsc::channel();
    let (gate, begun) = (Mutex::new(gate), begun.clone());
    let loader = move || {
        let load = begun.fetch_add(1, SeqCst) + 1;
        if load > 1 {
            gate.lock().unwrap().recv().map_err(io::Error::other)?;
        }
        Ok(load)
    };
    (open, loader)
}

/// Whether another thread gets the value, which is made to expire, or its error while this thread does nothing.
pub(crate) fn others_can_get<T: Send + Sync + 'static>(cached: Arc<Cached<T>>) -> bool {
    cached.synchronizer().mark_updated().unwrap();
    let (answer, answered) = mpsc::channel();
    thread::spawn(move || answer.send(cached.get().is_ok()));
    answered.recv_timeout(Duration::from_secs(10)).is_ok()
}

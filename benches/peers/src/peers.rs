//! The peers, a file each.

mod arc_swap;
mod bare;
mod djblets;
mod gensync;
mod iceoryx2;
mod lmdb;
mod memcached;
mod mmap_sync;
mod redis;
mod sqlite;
mod touched_file;
mod watch;

use crate::Outcome;
use crate::options::Options;
use crate::peer::Peers;

/// The name of the one that all others are compared with, and that is always there.
pub(crate) const GENSYNC: &str = "gensync";

/// Those that are asked for, gensync first, and why others are left out.
pub(crate) fn chosen(options: &Options) -> Outcome<(Peers, Vec<String>)> {
    let mut peers: Peers = vec![
        Box::new(gensync::Gensync),
        Box::new(bare::Bare),
        Box::new(iceoryx2::Iceoryx2::new()),
        Box::new(mmap_sync::MmapSync),
        Box::new(watch::Watch),
        Box::new(arc_swap::ArcSwapPeer),
        Box::new(lmdb::Lmdb),
        Box::new(sqlite::Sqlite),
        Box::new(touched_file::TouchedFile),
        Box::new(memcached::Memcached),
        Box::new(redis::Redis),
    ];
    if options.djblets {
        peers.push(Box::new(djblets::Djblets::new(&options.python)));
    }
    let names: Vec<_> = peers.iter().map(|peer| peer.about().name).collect();
    if let Some(unknown) = options.only.iter().find(|name| !names.contains(&name.as_str())) {
        return Err(format!("no peer is called {unknown:?}; there are: {}", names.join(", ")).into());
    }
    let mut notes = Vec::new();
    peers.retain(|peer| {
        let name = peer.about().name;
        if name != GENSYNC && !options.only.is_empty() && !options.only.iter().any(|only| only == name) {
            return false;
        }
        let missing = peer.missing();
        notes.extend(missing.iter().map(|reason| format!("{name} is left out: {reason}")));
        missing.is_none()
    });
    Ok((peers, notes))
}

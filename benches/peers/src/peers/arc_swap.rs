//! arc-swap, for scale: within one process.

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;

use ::arc_swap::{ArcSwap, Cache};

use crate::Outcome;
use crate::peer::{About, Kind, Operation, Peer};

pub(crate) struct ArcSwapPeer;

impl Peer for ArcSwapPeer {
    fn about(&self) -> About {
        About {
            name: "arc-swap",
            several_writers: "yes",
            keys_at_run_time: "yes, one each",
            writer_killed: "does not apply",
            file_replaced: "does not apply",
            without_server: "yes",
            across_processes: "no",
        }
    }

    fn operations(&self, _folder: &Path) -> Outcome<Vec<Operation>> {
        let new = || Arc::new(ArcSwap::from_pointee(1u64));
        let (checked, loaded, stored) = (new(), new(), new());
        let seen = checked.load_full();
        let mut cache = Cache::new(new());
        let mut number = 0;
        Ok(vec![
            Operation::new("load and compare", Kind::Check, move || {
                Arc::ptr_eq(&black_box(&checked).load(), black_box(&seen))
            }),
            Operation::new("load", Kind::Read, move || **black_box(&loaded).load()),
            Operation::new("Cache::load", Kind::Read, move || **black_box(&mut cache).load()),
            Operation::new("store", Kind::Announce, move || {
                number += 1;
                black_box(&stored).store(Arc::new(number));
            }),
        ])
    }
}

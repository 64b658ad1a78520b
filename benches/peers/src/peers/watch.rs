//! tokio's watch channel, for scale: within one process.

use std::hint::black_box;
use std::path::Path;

use tokio::sync::watch;

use crate::Outcome;
use crate::peer::{About, Kind, Operation, Peer};

pub(crate) struct Watch;

impl Peer for Watch {
    fn about(&self) -> About {
        About {
            name: "tokio watch",
            several_writers: "yes",
            keys_at_run_time: "yes, a channel each",
            writer_killed: "does not apply",
            file_replaced: "does not apply",
            without_server: "yes",
            across_processes: "no",
        }
    }

    fn operations(&self, _folder: &Path) -> Outcome<Vec<Operation>> {
        let (sender, receiver) = watch::channel(1u64);
        let (announcer, other) = watch::channel(1u64);
        let reader = receiver.clone();
        let (mut number, keep) = (0, sender.clone());
        Ok(vec![
            Operation::new("has_changed", Kind::Check, move || {
                let _lives = &sender;
                black_box(&receiver).has_changed().unwrap_or(true)
            }),
            Operation::new("borrow", Kind::Read, move || {
                let _lives = &keep;
                *black_box(&reader).borrow()
            }),
            Operation::new("send", Kind::Announce, move || {
                let _lives = &other;
                number += 1;
                black_box(&announcer).send(number).is_ok()
            }),
        ])
    }
}

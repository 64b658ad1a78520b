//! All that a run has found.

use std::time::Instant;

use serde::Serialize;

use crate::Outcome;
use crate::machine::Machine;
use crate::measure::{day, growth, notice, turns};
use crate::options::Scale;
use crate::peer::{About, Peer};

#[derive(Serialize)]
pub(crate) struct Results {
    pub(crate) command: String,
    pub(crate) machine: Machine,
    pub(crate) scale: Scale,
    pub(crate) seconds: f64,
    pub(crate) peers: Vec<About>,
    pub(crate) notes: Vec<String>,
    pub(crate) turns: Vec<turns::Table>,
    pub(crate) notices: Vec<notice::Row>,
    pub(crate) day: Option<day::Table>,
    pub(crate) growth: Option<growth::Growth>,
    #[serde(skip)]
    start: Instant,
}

impl Results {
    pub(crate) fn new(peers: &[Box<dyn Peer>], notes: Vec<String>, scale: Scale) -> Outcome<Self> {
        let arguments: Vec<_> = std::env::args().skip(1).collect();
        let separator = if arguments.is_empty() { "" } else { " -- " };
        Ok(Self {
            command: format!("cargo run --release -p gensync-peers{separator}{}", arguments.join(" ")),
            machine: Machine::this(),
            scale,
            seconds: 0.0,
            peers: peers.iter().map(|peer| peer.about()).collect(),
            notes,
            turns: Vec::new(),
            notices: Vec::new(),
            day: None,
            growth: None,
            start: Instant::now(),
        })
    }

    pub(crate) fn finish(&mut self) {
        self.seconds = self.start.elapsed().as_secs_f64();
    }
}

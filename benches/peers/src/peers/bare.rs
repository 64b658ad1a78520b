//! An atomic word in a mapping: the lower limit of the cost, which gives nothing else.

use std::hint::black_box;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::*};

use crate::Outcome;
use crate::peer::{About, Changes, Held, Kind, Operation, Peer, Role, Session, Site, Source};
use crate::shared;

pub(crate) struct Bare;

impl Peer for Bare {
    fn about(&self) -> About {
        About {
            name: "bare atomic",
            several_writers: "yes",
            keys_at_run_time: "no: you number the words",
            writer_killed: "no: stale if killed before the announcement",
            file_replaced: "no",
            without_server: "yes",
            across_processes: "yes",
        }
    }

    fn operations(&self, _folder: &Path) -> Outcome<Vec<Operation>> {
        // A cache line each, and the next one, which processors fetch along with it.
        let words = shared::words(64)?;
        let (checked, read, added) = (&words[0], &words[16], &words[32]);
        // In memory that the compiler must assume to change, as a reader's own copy is.
        let (seen, value): (&AtomicU64, &AtomicU64) = (Box::leak(Box::default()), Box::leak(Box::default()));
        // ORDERING: an acquire check and an AcqRel update, as of a generation, so that the bare operation promises what gensync's does: a
        // reader that sees an update's number sees what its maker wrote before. `seen` and `value` are the reader's own, so relaxed.
        Ok(vec![
            Operation::new("load and compare", Kind::Check, move || {
                black_box(checked).load(Acquire) != black_box(seen).load(Relaxed)
            }),
            Operation::new("load, compare, load the value", Kind::Read, move || {
                let is_stale = black_box(read).load(Acquire) != black_box(seen).load(Relaxed);
                if is_stale { 0 } else { black_box(value).load(Relaxed) }
            }),
            Operation::new("fetch_add", Kind::Announce, move || black_box(added).fetch_add(1, AcqRel)),
        ])
    }

    fn sites(&self, _folder: &Path, keys: usize) -> Outcome<Vec<(&'static str, Box<dyn Site>)>> {
        let words = shared::words(keys)?;
        // Written once, so that the pages are in memory, as those of a table are.
        words.iter().for_each(|word| word.store(1, Relaxed));
        Ok(vec![("load and compare", Box::new(BareSite(words)))])
    }
}

struct BareSite(&'static [AtomicU64]);

impl Site for BareSite {
    fn attach(&self, keys: &[usize], _role: Role, source: Source) -> Outcome<Box<dyn Session>> {
        let words = keys.iter().map(|&key| (&self.0[key], self.0[key].load(Acquire))).collect();
        Ok(Held::boxed(Words(words), keys, source))
    }

    fn shared_bytes(&self, _folder: &Path) -> Outcome<u64> {
        Ok(size_of_val(self.0) as u64)
    }
}

struct Words(Vec<(&'static AtomicU64, u64)>);

impl Changes for Words {
    #[inline]
    fn changed(&mut self, key: usize) -> bool {
        let (word, seen) = &mut self.0[key];
        // ORDERING: pairs with the release of `announce`: a session that sees the new generation loads the new value from the source.
        let generation = word.load(Acquire);
        std::mem::replace(seen, generation) != generation
    }

    fn announce(&mut self, key: usize, _value: u64) {
        // ORDERING: pairs with the acquire in `changed`: the source was changed before, and is seen changed by a session that sees this.
        self.0[key].0.fetch_add(1, AcqRel);
    }
}

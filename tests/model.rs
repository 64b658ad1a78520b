//! Guards against any sequence of operations that behaves otherwise than a plain map of counters.

mod support;

use std::collections::HashMap;

use gensync::{GenerationSynchronizer, Table};
use proptest::prelude::*;

/// Keys and holders are few, so that operations meet.
const KEYS: usize = 4;
const HOLDERS: usize = 3;

#[derive(Clone, Debug)]
enum Operation {
    Attach(usize, usize),
    MarkUpdated(usize, usize),
    Clear(usize, usize),
    Refresh(usize, usize),
    /// A load, during which another holder may update.
    Load(usize, usize, Option<usize>),
    FailingLoad(usize, usize),
    Reset,
    Reopen(usize),
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    use Operation::*;
    let pair = || (0..HOLDERS, 0..KEYS);
    let operation = prop_oneof![
        2 => pair().prop_map(|(holder, key)| Attach(holder, key)),
        4 => pair().prop_map(|(holder, key)| MarkUpdated(holder, key)),
        1 => pair().prop_map(|(holder, key)| Clear(holder, key)),
        2 => pair().prop_map(|(holder, key)| Refresh(holder, key)),
        2 => (pair(), proptest::option::of(0..HOLDERS)).prop_map(|((holder, key), other)| Load(holder, key, other)),
        1 => pair().prop_map(|(holder, key)| FailingLoad(holder, key)),
        1 => Just(Reset),
        1 => (0..HOLDERS).prop_map(Reopen),
    ];
    proptest::collection::vec(operation, 1..60)
}

proptest! {
    #[test]
    fn any_sequence_of_operations(operations in operations(), capacity in 1u64..8) {
        let (_folder, path) = support::path();
        let open = || Table::options().capacity(capacity).open(&path).unwrap();
        let mut tables: Vec<_> = (0..HOLDERS).map(|_| open()).collect();
        let mut syncs = HashMap::new();
        // The model: how often each key was updated, and at which count each holder is; none: surely expired.
        let mut updates = [0u64; KEYS];
        let mut seen: HashMap<(usize, usize), Option<u64>> = HashMap::new();
        for operation in operations {
            match operation {
                Operation::Attach(holder, key) => {
                    syncs.insert((holder, key), GenerationSynchronizer::new(&tables[holder], ["key", &key.to_string()]).unwrap());
                    seen.insert((holder, key), Some(updates[key]));
                }
                Operation::Reopen(holder) => {
                    tables[holder] = open();
                    syncs.retain(|&(other, _), _| other != holder);
                    seen.retain(|&(other, _), _| other != holder);
                }
                Operation::Reset => {
                    tables[0].reset().unwrap();
                    updates.iter_mut().for_each(|count| *count += 1);
                }
                Operation::MarkUpdated(holder, key) => {
                    let Some(sync) = syncs.get(&(holder, key)) else { continue };
                    let moved = sync.sync_gen().is_some() && !sync.is_expired();
                    sync.mark_updated().unwrap();
                    updates[key] += 1;
                    if moved {
                        seen.insert((holder, key), Some(updates[key]));
                    }
                }
                Operation::Clear(holder, key) => {
                    let Some(sync) = syncs.get(&(holder, key)) else { continue };
                    sync.clear().unwrap();
                    updates[key] += 1;
                }
                Operation::Refresh(holder, key) => {
                    let Some(sync) = syncs.get(&(holder, key)) else { continue };
                    sync.refresh().unwrap();
                    seen.insert((holder, key), Some(updates[key]));
                }
                Operation::Load(holder, key, other) => {
                    let Some(sync) = syncs.get(&(holder, key)) else { continue };
                    let before = updates[key];
                    sync.refresh_with(|| {
                        if let Some(other) = other.and_then(|other| syncs.get(&(other, key))) {
                            other.clear().unwrap();
                            updates[key] += 1;
                        }
                        Ok::<_, ()>(())
                    }).unwrap();
                    seen.insert((holder, key), Some(before));
                }
                Operation::FailingLoad(holder, key) => {
                    let Some(sync) = syncs.get(&(holder, key)) else { continue };
                    prop_assert!(sync.refresh_with(|| Err::<(), _>(())).is_err());
                }
            }
            for (place, sync) in &syncs {
                let fresh = seen[place] == Some(updates[place.1]);
                prop_assert_eq!(sync.is_expired(), !fresh, "holder {} of key {}", place.0, place.1);
            }
        }
    }
}

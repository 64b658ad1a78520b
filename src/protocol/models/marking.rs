//! Updates by one instruction, beside loads of the state.

use super::{Boxed, START, both, model, table_with_key};
use crate::protocol::atomic::{Arc, AtomicU64, Ordering};
use crate::protocol::observed::{LastObserved, Observed};
use crate::protocol::slots::Slots;

// ORDERING: the source and the state are accessed relaxed, and pair with nothing, so that the protocol's updates and checks alone
// order them.

#[test]
fn an_update_during_a_load_leaves_the_state_expired() {
    model(|| {
        let shared = Arc::new((table_with_key(1, 1), AtomicU64::new(1)));
        let ((state, seen), _) = both(
            &shared,
            |(table, source)| {
                let ticket = Observed::of(table.word());
                let state = source.load(Ordering::Relaxed);
                let seen = LastObserved::new(Observed::NOTHING);
                seen.adopt(ticket);
                (state, seen)
            },
            |(table, source)| {
                source.store(2, Ordering::Relaxed);
                table.slot().bump()
            },
        );
        let fresh = seen.get().is(shared.0.word());
        assert!(!fresh || state == 2, "an old state passes for a fresh one");
    });
}

#[test]
fn no_update_is_lost_and_none_is_mistaken_for_another() {
    model(|| {
        let table = table_with_key(1, 1);
        let update = |table: &Slots<Boxed>, seen: LastObserved| {
            let before = table.slot().bump();
            seen.follow(before);
            (before.updated().unwrap(), seen)
        };
        let seen = || LastObserved::new(Observed::of(table.word()));
        let (first, second) = (seen(), seen());
        let ((one, first), (other, second)) =
            both(&table, move |table| update(table, first), move |table| update(table, second));
        assert_ne!(one, other, "two updates have one generation");
        let word = table.word();
        assert_eq!(word.generation().unwrap().get(), START + 2);
        assert!(!first.get().is(word) && !second.get().is(word), "each has not seen the other's update");
    });
}

#[test]
fn a_thread_that_finds_the_state_fresh_sees_the_state_that_another_loaded() {
    model(|| {
        let shared = Arc::new((table_with_key(1, 1), AtomicU64::new(1), LastObserved::new(Observed::NOTHING)));
        both(
            &shared,
            |(table, state, seen)| {
                let ticket = Observed::of(table.word());
                state.store(2, Ordering::Relaxed);
                seen.adopt(ticket);
            },
            |(table, state, seen)| {
                if seen.get().is(table.word()) {
                    assert_eq!(state.load(Ordering::Relaxed), 2, "a state passes for fresh before it is there");
                }
            },
        );
    });
}

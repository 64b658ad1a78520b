//! Updates by one instruction, beside those who load the state.

use super::{Boxed, START, both, model, slots};
use crate::slot::{Digest, Seen, Sight};
use crate::sync::{Arc, AtomicU64, Ordering};
use crate::table::Slots;

#[test]
fn an_update_during_a_load_leaves_the_state_expired() {
    model(|| {
        let table = slots(1, 1);
        let key = Digest::new(6, 7);
        table.attached(key).unwrap();
        let source = Arc::new(AtomicU64::new(1));
        let ((state, seen), _) = both(
            {
                let (table, source) = (table.clone(), source.clone());
                move || {
                    let ticket = Sight::of(table.find(key).unwrap().unwrap().word());
                    let state = source.load(Ordering::Relaxed);
                    let seen = Seen::new(Sight::NOTHING);
                    seen.adopt(ticket);
                    (state, seen)
                }
            },
            || {
                source.store(2, Ordering::Relaxed);
                table.find(key).unwrap().unwrap().bump()
            },
        );
        let fresh = seen.get().is(table.find(key).unwrap().unwrap().word());
        assert!(!fresh || state == 2, "an old state passes for a fresh one");
    });
}

#[test]
fn no_update_is_lost_and_none_is_mistaken_for_another() {
    model(|| {
        let table = slots(1, 1);
        let key = Digest::new(6, 7);
        table.attached(key).unwrap();
        let update = move |table: &Slots<Boxed>, seen: &Seen| {
            let before = table.find(key).unwrap().unwrap().bump();
            seen.follow(before);
            before.updated().unwrap()
        };
        let seen = || Seen::new(Sight::of(table.find(key).unwrap().unwrap().word()));
        let (first, second) = (seen(), seen());
        let ((one, first), (other, second)) = both(
            {
                let table = table.clone();
                move || (update(&table, &first), first)
            },
            || (update(&table, &second), second),
        );
        assert_ne!(one, other, "two updates have one generation");
        let word = table.find(key).unwrap().unwrap().word();
        assert_eq!(word.generation().unwrap().get(), START + 2);
        assert!(!first.get().is(word) && !second.get().is(word), "each has not seen the other's update");
    });
}

#[test]
fn a_thread_that_finds_the_state_fresh_sees_the_state_that_another_loaded() {
    model(|| {
        let table = slots(1, 1);
        let key = Digest::new(6, 7);
        table.attached(key).unwrap();
        let (state, seen) = (Arc::new(AtomicU64::new(1)), Arc::new(Seen::new(Sight::NOTHING)));
        both(
            {
                let (table, state, seen) = (table.clone(), state.clone(), seen.clone());
                move || {
                    let ticket = Sight::of(table.find(key).unwrap().unwrap().word());
                    state.store(2, Ordering::Relaxed);
                    seen.adopt(ticket);
                }
            },
            || {
                if seen.get().is(table.find(key).unwrap().unwrap().word()) {
                    assert_eq!(state.load(Ordering::Relaxed), 2, "a state passes for fresh before it is there");
                }
            },
        );
    });
}

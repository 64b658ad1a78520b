//! Atomics for tests that stop a thread, or kill its process, before any access of an atomic.
//!
//! In the crate's own test build (not in that of its users, nor of the files in tests/), each access of an integer atomic is a
//! *step* of its thread, and a test says what is to happen after how many steps.

use std::cell::Cell;
use std::ops::Deref;

use super::Ordering;

/// How many steps are left, and what comes then.
#[derive(Clone, Copy)]
struct Allowance(u64, fn());

thread_local! {
    static LEFT: Cell<Option<Allowance>> = const { Cell::new(None) };
}

/// Lets this thread take `steps` steps. Before the next one, it calls `end`, once.
pub(crate) fn allow(steps: u64, end: fn()) {
    LEFT.set(Some(Allowance(steps, end)));
}

/// Lets this thread take any number of steps.
pub(crate) fn allow_all() {
    LEFT.set(None);
}

fn step() {
    match LEFT.get() {
        None => {}
        Some(Allowance(0, end)) => {
            LEFT.set(None);
            end();
        }
        Some(Allowance(left, end)) => LEFT.set(Some(Allowance(left - 1, end))),
    }
}

macro_rules! one_step_each {
    ($($method:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => {$(
        pub(crate) fn $method(&self, $($argument: $type),*) -> $result {
            step();
            self.0.$method($($argument),*)
        }
    )*};
}

macro_rules! stepping {
    ($name:ident, $value:ty) => {
        #[derive(Debug, Default)]
        #[repr(transparent)]
        pub(crate) struct $name(std::sync::atomic::$name);

        #[allow(dead_code, reason = "not every width needs every method")]
        impl $name {
            pub(crate) const fn new(value: $value) -> Self {
                Self(std::sync::atomic::$name::new(value))
            }

            one_step_each! {
                load(order: Ordering) -> $value;
                store(value: $value, order: Ordering) -> ();
                swap(value: $value, order: Ordering) -> $value;
                compare_exchange(old: $value, new: $value, success: Ordering, failure: Ordering) -> Result<$value, $value>;
                compare_exchange_weak(old: $value, new: $value, success: Ordering, failure: Ordering) -> Result<$value, $value>;
                fetch_add(value: $value, order: Ordering) -> $value;
                fetch_sub(value: $value, order: Ordering) -> $value;
                fetch_and(value: $value, order: Ordering) -> $value;
                fetch_or(value: $value, order: Ordering) -> $value;
                fetch_max(value: $value, order: Ordering) -> $value;
            }

            /// Written out, as each access in it must be a step of its own.
            pub(crate) fn fetch_update(
                &self,
                success: Ordering,
                failure: Ordering,
                next: impl Fn($value) -> Option<$value>,
            ) -> Result<$value, $value> {
                let mut present = self.load(failure);
                while let Some(value) = next(present) {
                    match self.compare_exchange_weak(present, value, success, failure) {
                        Ok(_) => return Ok(present),
                        Err(other) => present = other,
                    }
                }
                Err(present)
            }
        }

        /// For the address, by which the kernel knows a futex.
        impl Deref for $name {
            type Target = std::sync::atomic::$name;

            fn deref(&self) -> &Self::Target {
                &self.0
            }
        }
    };
}

stepping!(AtomicU32, u32);
stepping!(AtomicU64, u64);

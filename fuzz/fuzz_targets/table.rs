//! Opens whatever the fuzzer makes, and does everything with it.

#![no_main]

#[path = "../../tests/support/exercise.rs"]
mod exercise;

libfuzzer_sys::fuzz_target!(|input: &[u8]| exercise::replay(input));

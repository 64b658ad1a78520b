//! Guards against allocations, system calls and threads where none may be: in checks, loads of what is fresh, and updates of
//! keys without a waiter.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use gensync::{Cached, CachedReader, GenerationSynchronizer, Table, WaitSet};
use support::{in_child, path, system_calls};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

#[expect(unsafe_code, reason = "counts what goes through to the system's allocator")]
// SAFETY: every call is passed on to the system's allocator, which keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps the contract of `GlobalAlloc`, which is the same for `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `GlobalAlloc`, which is the same for `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const TIMES: u32 = 100_000;

/// Nothing is allocated, and no system call is made except for looking at the table's file now and then.
fn assert_fast(table: &Table, what: &str, operation: impl Fn()) {
    // The first time may come upon something that is new.
    operation();
    let before = ALLOCATIONS.get();
    (0..60).for_each(|_| operation());
    assert_eq!(ALLOCATIONS.get(), before, "{what} allocates");
    let base = system_calls(|| ());
    let calls = system_calls(|| (0..TIMES).for_each(|_| operation())) - base;
    match table.path() {
        // Twice a second, some calls; under a tracer, on a busy machine, some seconds.
        Some(_) => assert!(calls < 1000, "{what}: {calls} system calls in {TIMES}"),
        None => assert_eq!(calls, 0, "{what}: system calls in {TIMES}"),
    }
}

#[test]
fn what_is_done_at_each_use_allocates_nothing_and_calls_no_system() {
    let (_folder, path) = path();
    for table in [Table::options().anonymous().unwrap(), Table::open(&path).unwrap()] {
        let [sync, other] = [(); 2].map(|()| GenerationSynchronizer::new(&table, "key").unwrap());
        let cached = Cached::new(other.clone(), || Ok::<_, std::convert::Infallible>(1));
        let update = || _ = other.mark_updated().unwrap();
        assert_fast(&table, "a check", || assert!(!sync.is_expired()));
        assert_fast(&table, "a ticket", || sync.adopt(sync.ticket()));
        assert_fast(&table, "refresh", || _ = sync.refresh().unwrap());
        let reader = std::cell::RefCell::new(CachedReader::new(&cached));
        assert_fast(&table, "a value", || _ = cached.get().unwrap());
        assert_fast(&table, "a value of one thread's own", || _ = reader.borrow_mut().get().unwrap());
        assert_fast(&table, "mark_updated", update);
        assert_fast(&table, "clear", || other.clear().unwrap());
        assert_fast(&table, "an update and a check that finds it", || {
            update();
            assert!(sync.is_expired());
            sync.refresh_with(|| Ok::<_, ()>(())).unwrap();
        });
    }
}

#[test]
fn no_thread_is_started_that_nobody_asked_for() {
    in_child(|| {
        let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
        let before = threads();
        let (_folder, path) = path();
        let table = Table::open(&path).unwrap();
        let sync = GenerationSynchronizer::new(&table, "key").unwrap();
        let cached = Cached::new(sync.clone(), || Ok::<_, std::convert::Infallible>(1));
        cached.get().unwrap();
        cached.update(|| Ok::<_, ()>(())).unwrap();
        sync.mark_updated().unwrap();
        let _ =
            (sync.wait_timeout(std::time::Duration::from_millis(1)), table.watch().next_timeout(Default::default()));
        let _ = std::iter::once(&sync).collect::<WaitSet<'_>>().wait_timeout(std::time::Duration::from_millis(1));
        table.reset().unwrap();
        sync.refresh().unwrap();
        let pollable = sync.pollable().unwrap();
        assert_eq!(threads(), before + 1, "one is asked for");
        drop(pollable);
    })
    .succeeds();
}

//! Guards against a table that takes more of a process than it is long: after `mlockall`, under limits on address space and
//! locked memory, in core dumps, with thousands of tables, and after thousands of resets.

#![expect(unsafe_code, reason = "locks memory")]

#[path = "support/layout.rs"]
mod layout;
mod support;

use std::fs;
use std::path::Path;

use gensync::{Error, ErrorKind, GenerationSynchronizer, Table};
use nix::libc::{MCL_CURRENT, MCL_FUTURE, mlockall};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use support::place::{KINDS, Place};
use support::{alone, in_child, path};

fn attach(table: &Table, key: impl Into<gensync::CacheKey>) -> Result<GenerationSynchronizer, Error> {
    GenerationSynchronizer::new(table, key)
}

/// A number of bytes from this process's `/proc/self/status`.
fn status(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

fn lock_all() {
    // SAFETY: changes no memory.
    assert_eq!(unsafe { mlockall(MCL_CURRENT | MCL_FUTURE) }, 0, "{}", std::io::Error::last_os_error());
}

fn limit(resource: Resource, value: u64) {
    setrlimit(resource, value, value.max(getrlimit(resource).unwrap().1)).unwrap();
}

/// From now on, this process can have no more than `bytes` of address space.
fn spare_address_space(bytes: u64) {
    limit(Resource::RLIMIT_AS, status("VmSize") + bytes);
}

/// Attaches to new keys until there are so many segments.
fn grow(table: &Table, segments: u32) -> Result<(), Error> {
    for i in 0.. {
        attach(table, format!("{i}"))?;
        if table.stats().segments >= segments {
            break;
        }
    }
    Ok(())
}

fn assert_works(table: &Table) {
    for key in ["0", "7", "100"] {
        let (sync, other) = (attach(table, key).unwrap(), attach(table, key).unwrap());
        sync.refresh().unwrap();
        other.update(|| Ok::<_, Error>(())).unwrap();
        assert!(sync.is_expired());
        sync.refresh().unwrap();
        other.mark_updated().unwrap();
        assert!(sync.is_expired());
    }
}

const SPARE: u64 = 16 << 20;

#[test]
fn a_process_that_locks_its_memory_locks_no_more_than_the_table_has() {
    for kind in KINDS {
        for locked_before in [true, false] {
            in_child(|| {
                let place = Place::new(*kind);
                if locked_before {
                    lock_all();
                }
                let before = (status("VmSize"), status("VmRSS"));
                let table = place.open(Table::options().capacity(16));
                if !locked_before {
                    lock_all();
                }
                grow(&table, 6).unwrap();
                assert_works(&table);
                assert!(status("VmSize") < before.0 + SPARE, "{kind:?}: {} bytes", status("VmSize") - before.0);
                assert!(status("VmRSS") < before.1 + SPARE || !locked_before, "{kind:?}");
                assert!(status("VmLck") <= status("VmSize"));
                if table.path().is_some() {
                    let before = status("VmLck");
                    for _ in 0..20 {
                        table.reset().unwrap();
                        grow(&table, 6).unwrap();
                        assert_works(&table);
                    }
                    assert!(status("VmLck") < before + (1 << 20), "what was replaced stays locked");
                }
                place.remove();
            })
            .succeeds();
        }
    }
}

#[test]
fn growth_beyond_the_limit_on_locked_memory_is_an_error_and_the_table_works_on() {
    for kind in KINDS {
        in_child(|| {
            let place = Place::new(*kind);
            let table = place.open(Table::options().capacity(16));
            // SAFETY: changes no memory.
            assert_eq!(unsafe { mlockall(MCL_FUTURE) }, 0, "{}", std::io::Error::last_os_error());
            setrlimit(Resource::RLIMIT_MEMLOCK, status("VmLck") + (256 << 10), status("VmLck") + (256 << 10)).unwrap();
            drop_capability();
            let error = (0..).find_map(|i| attach(&table, format!("{i}")).err()).unwrap();
            assert!(matches!(error.kind(), ErrorKind::TableFull { .. }), "{error}");
            assert!(error.to_string().contains("ulimit -v, -l"), "{error}");
            assert_eq!(error.path(), table.path());
            assert_works(&table);
            place.remove();
        })
        .succeeds();
    }
}

/// This process may no longer lock more memory than its limit.
fn drop_capability() {
    const CAP_IPC_LOCK: u32 = 14;
    #[repr(C)]
    struct Header(u32, i32);
    let (header, mut data) = (Header(0x2008_0522, 0), [0_u32; 6]);
    // SAFETY: reads and writes the two values, which are what the calls expect.
    unsafe {
        assert_eq!(nix::libc::syscall(nix::libc::SYS_capget, &raw const header, &raw mut data), 0);
        data[0] &= !(1 << CAP_IPC_LOCK);
        assert_eq!(nix::libc::syscall(nix::libc::SYS_capset, &raw const header, &raw const data), 0);
    }
}

#[test]
fn a_table_leaves_the_program_the_address_space_that_it_does_not_use() {
    alone(|| {
        for kind in KINDS {
            in_child(|| {
                let place = Place::new(*kind);
                spare_address_space(300 << 20);
                let table = place.open(Table::options().capacity(16));
                grow(&table, 6).unwrap();
                let mut own = Vec::<u8>::new();
                own.try_reserve_exact(200 << 20).unwrap();
                assert_works(&table);
                std::thread::Builder::new().stack_size(8 << 20).spawn(|| {}).unwrap().join().unwrap();
                place.remove();
            })
            .succeeds();
        }
    });
}

#[test]
fn twenty_thousand_tables_leave_room_for_threads() {
    alone(|| {
        const TABLES: usize = 20_000;
        let (_folder, path) = path();
        let sync = attach(&Table::options().capacity(16).open(&path).unwrap(), "key").unwrap();
        in_child(|| {
            let most = getrlimit(Resource::RLIMIT_NOFILE).unwrap().1;
            limit(Resource::RLIMIT_NOFILE, most);
            let count = TABLES.min(most as usize - 100);
            let tables: Vec<_> = (0..count).map(|_| Table::open(&path).unwrap()).collect();
            std::thread::spawn(|| {}).join().unwrap();
            attach(tables.last().unwrap(), "key").unwrap().mark_updated().unwrap();
        })
        .succeeds();
        assert!(sync.is_expired());
    });
}

#[test]
fn a_core_dump_does_not_hold_the_table() {
    let (_folder, path) = path();
    let table = Table::options().capacity(16).open(&path).unwrap();
    grow(&table, 4).unwrap();
    let maps = fs::read_to_string("/proc/self/smaps").unwrap();
    let mut parts = 0;
    let mut is_own = false;
    for line in maps.lines() {
        match line.strip_prefix("VmFlags:") {
            Some(flags) if is_own => {
                assert!(flags.split_whitespace().any(|flag| flag == "dd"), "would be dumped: {flags}");
                parts += 1;
            }
            // The line that begins a mapping has its addresses first, the others a name.
            None if !line.split(' ').next().unwrap().ends_with(':') => is_own = line.ends_with(path.to_str().unwrap()),
            _ => {}
        }
    }
    assert_eq!(parts, 4, "the first segment with the header, and each later one by itself");
}

#[test]
fn any_way_to_count_memory_that_was_promised_leaves_tables_as_they_are() {
    const SETTING: &str = "/proc/sys/vm/overcommit_memory";
    struct Restore(String);
    impl Drop for Restore {
        fn drop(&mut self) {
            fs::write(SETTING, self.0.trim()).unwrap();
        }
    }
    let before = Restore(fs::read_to_string(SETTING).unwrap());
    for mode in ["0", "1", "2"] {
        if let Err(error) = fs::write(SETTING, mode) {
            eprintln!("skipped, as the system's setting cannot be changed here: {error}");
            return;
        }
        for kind in KINDS {
            in_child(|| {
                let place = Place::new(*kind);
                let table = place.open(Table::options().capacity(16));
                grow(&table, 6).unwrap();
                assert_works(&table);
                if table.path().is_some() {
                    table.reset().unwrap();
                    assert_works(&table);
                }
                place.remove();
            })
            .succeeds();
        }
    }
    drop(before);
}

#[test]
fn threads_that_need_a_new_segment_at_once_map_it_once() {
    let (_folder, path) = path();
    let great = Table::options().capacity(1).open(&path).unwrap();
    let small = Table::open(&path).unwrap();
    for round in 0..10 {
        grow(&great, 2 + round).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let small = &small;
                scope.spawn(move || attach(small, format!("{thread} of {round}")).unwrap().mark_updated().unwrap());
            }
        });
    }
    assert_works(&small);
    let mapped = |path: &Path| {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().filter(|line| line.ends_with(path.to_str().unwrap())).count()
    };
    let segments = layout::segments(&fs::read(&path).unwrap()).len();
    let both = mapped(&path);
    assert!(both <= 2 * segments, "{both} parts of {segments} segments");
    drop((great, small));
    assert_eq!(mapped(&path), 0);
}

#[test]
fn an_anonymous_table_grows_without_its_descriptor() {
    in_child(|| {
        let table = Table::options().capacity(16).anonymous().unwrap();
        // SAFETY: a program that becomes a daemon does so; nothing in this child needs them.
        assert_eq!(unsafe { nix::libc::syscall(nix::libc::SYS_close_range, 3, u32::MAX, 0) }, 0);
        let syncs: Vec<_> = (0..500).map(|i| attach(&table, format!("{i}")).unwrap()).collect();
        let again: Vec<_> = (0..500).map(|i| attach(&table, format!("{i}")).unwrap()).collect();
        assert!(table.stats().segments > 4);
        for (sync, again) in syncs.iter().zip(&again) {
            again.refresh().unwrap();
            sync.mark_updated().unwrap();
            assert!(again.is_expired());
        }
    })
    .succeeds();
}

#[test]
fn what_a_reset_leaves_behind_is_small() {
    let (_folder, path) = path();
    in_child(|| {
        let table = Table::options().capacity(16).open(&path).unwrap();
        let sync = attach(&table, "key").unwrap();
        let reset = || {
            for _ in 0..1000 {
                table.reset().unwrap();
                sync.mark_updated().unwrap();
                assert!(sync.refresh().is_ok() && !sync.is_expired());
            }
        };
        reset();
        let before = (status("VmRSS"), status("VmPTE"));
        reset();
        reset();
        let (memory, pages) = ((status("VmRSS") - before.0) / 2000, status("VmPTE").saturating_sub(before.1) / 2000);
        assert!(memory + pages < 1500, "{memory} bytes of memory and {pages} of page tables for each reset");
        eprintln!("{memory} bytes of memory and {pages} of page tables for each reset");
    })
    .succeeds();
}

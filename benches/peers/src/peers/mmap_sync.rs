//! mmap-sync: one value behind two mapped files and a third that says which of them is current. A key is one of these.

#![expect(unsafe_code, reason = "reads in place, which mmap-sync leaves the caller to answer for")]

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ::mmap_sync::instance::InstanceVersion;
use ::mmap_sync::synchronizer::Synchronizer;

use crate::Outcome;
use crate::peer::{About, Changes, Held, Kind, Operation, Peer, Role, Session, Site, Source};

pub(crate) struct MmapSync;

/// How long a writer waits for readers of the file that it writes next.
const GRACE: Duration = Duration::from_secs(1);

impl Peer for MmapSync {
    fn about(&self) -> About {
        About {
            name: "mmap-sync",
            several_writers: "no: one writer",
            keys_at_run_time: "yes, three files each",
            writer_killed: "partly: if the value itself is kept there, readers have the old or the new one",
            file_replaced: "no",
            without_server: "yes",
            across_processes: "yes",
        }
    }

    fn operations(&self, folder: &Path) -> Outcome<Vec<Operation>> {
        let (checked, written) = (path(folder, 0), path(folder, 1));
        write(&mut Synchronizer::new(checked.as_os_str()), 1)?;
        let mut checker = Synchronizer::new(checked.as_os_str());
        let mut reader = Synchronizer::new(checked.as_os_str());
        let mut holder = Synchronizer::new(checked.as_os_str());
        let mut writer = Synchronizer::new(written.as_os_str());
        let seen = checker.version()?;
        let mut number = 0;
        Ok(vec![
            Operation::new("version", Kind::Check, move || checker.version().is_ok_and(|version| version == seen)),
            Operation::new("read", Kind::Read, move || {
                // SAFETY: it holds a u64, written by this program, and the guard is dropped long before a second is over.
                unsafe { reader.read::<u64>(false) }.map_or(0, |value| *value)
            }),
            Operation::new("version, the copy held", Kind::Read, move || {
                if holder.version().is_ok_and(|version| version == seen) { black_box(1u64) } else { 0 }
            }),
            Operation::new("write", Kind::Announce, move || {
                number += 1;
                write(&mut writer, number).is_ok()
            }),
        ])
    }

    fn too_many(&self, keys: usize) -> Option<&'static str> {
        (keys > 10_000).then_some(
            "a process needs a mapping at least for each key that it attaches to, and may have 65,530 by default",
        )
    }

    fn sites(&self, folder: &Path, keys: usize) -> Outcome<Vec<(&'static str, Box<dyn Site>)>> {
        for key in 0..keys {
            write(&mut Synchronizer::new(path(folder, key).as_os_str()), 0)?;
        }
        Ok(vec![("version", Box::new(Files(folder.to_owned())))])
    }
}

fn path(folder: &Path, key: usize) -> PathBuf {
    folder.join(format!("key-{key}"))
}

fn write(synchronizer: &mut Synchronizer, value: u64) -> Outcome<()> {
    synchronizer.write(&value, GRACE)?;
    Ok(())
}

struct Files(PathBuf);

impl Site for Files {
    fn attach(&self, keys: &[usize], _role: Role, source: Source) -> Outcome<Box<dyn Session>> {
        let open = |&key: &usize| {
            let mut synchronizer = Synchronizer::new(path(&self.0, key).as_os_str());
            let version = synchronizer.version()?;
            Ok((synchronizer, version))
        };
        Ok(Held::boxed(Versions(keys.iter().map(open).collect::<Outcome<_>>()?), keys, source))
    }
}

struct Versions(Vec<(Synchronizer, InstanceVersion)>);

impl Changes for Versions {
    #[inline]
    fn changed(&mut self, key: usize) -> bool {
        let (synchronizer, seen) = &mut self.0[key];
        let version = synchronizer.version().expect("a version that was written");
        std::mem::replace(seen, version) != version
    }

    fn announce(&mut self, key: usize, value: u64) {
        write(&mut self.0[key].0, value).expect("room for a word");
    }
}

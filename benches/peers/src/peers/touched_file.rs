//! A file for each key: a writer touches it after a change, and the others look at its time.

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;

use crate::Outcome;
use crate::peer::{About, Bell, Changes, Held, Kind, Listener, Operation, Peer, Role, Session, Site, Source};

pub(crate) struct TouchedFile;

impl Peer for TouchedFile {
    fn about(&self) -> About {
        About {
            name: "touched file",
            several_writers: "yes",
            keys_at_run_time: "yes, a file each",
            writer_killed: "partly: if the file itself is the value",
            file_replaced: "yes",
            without_server: "yes",
            across_processes: "yes",
        }
    }

    fn operations(&self, folder: &Path) -> Outcome<Vec<Operation>> {
        let (checked, touched) = (path(folder, 0), path(folder, 1));
        File::create(&checked)?;
        File::create(&touched)?;
        let seen = stamp(&checked)?;
        Ok(vec![
            Operation::new("stat", Kind::Check, move || stamp(&checked).is_ok_and(|stamp| stamp == seen)),
            Operation::new("touch", Kind::Announce, move || touch(&touched).is_ok()),
        ])
    }

    fn too_many(&self, keys: usize) -> Option<&'static str> {
        (keys > 1_000_000).then_some("a file for each key: more inodes than a file system is likely to have")
    }

    fn sites(&self, folder: &Path, keys: usize) -> Outcome<Vec<(&'static str, Box<dyn Site>)>> {
        for key in 0..keys {
            File::create(path(folder, key))?;
        }
        Ok(vec![("stat", Box::new(Folder(folder.to_owned())))])
    }

    fn bell(&self, folder: &Path) -> Outcome<Option<Box<dyn Bell>>> {
        let path = path(folder, 0);
        File::create(&path)?;
        Ok(Some(Box::new(Polled(path))))
    }
}

fn path(folder: &Path, key: usize) -> PathBuf {
    folder.join(format!("key-{key}"))
}

/// What changes when a file changes: its identity, and the time at which it was touched.
type Stamp = (u64, i64, i64);

fn stamp(path: &Path) -> Outcome<Stamp> {
    let metadata = std::fs::metadata(path)?;
    Ok((metadata.ino(), metadata.mtime(), metadata.mtime_nsec()))
}

fn touch(path: &Path) -> Outcome<()> {
    let now = TimeSpec::UTIME_NOW;
    Ok(utimensat(AT_FDCWD, path, &now, &now, UtimensatFlags::FollowSymlink)?)
}

struct Folder(PathBuf);

impl Site for Folder {
    fn attach(&self, keys: &[usize], _role: Role, source: Source) -> Outcome<Box<dyn Session>> {
        let file = |&key: &usize| {
            let path = path(&self.0, key);
            let stamp = stamp(&path)?;
            Ok((path, stamp))
        };
        Ok(Held::boxed(Files(keys.iter().map(file).collect::<Outcome<_>>()?), keys, source))
    }
}

struct Files(Vec<(PathBuf, Stamp)>);

impl Changes for Files {
    #[inline]
    fn changed(&mut self, key: usize) -> bool {
        let (path, seen) = &mut self.0[key];
        let stamp = stamp(path).expect("a file");
        std::mem::replace(seen, stamp) != stamp
    }

    fn announce(&mut self, key: usize, _value: u64) {
        touch(&self.0[key].0).expect("a file");
    }
}

struct Polled(PathBuf);

impl Bell for Polled {
    fn polls(&self) -> bool {
        true
    }

    fn listen(&self) -> Outcome<Box<dyn Listener>> {
        Ok(Box::new(Poller { path: self.0.clone(), seen: stamp(&self.0)? }))
    }

    fn ringer(&self) -> Outcome<Box<dyn FnMut() -> Outcome<()>>> {
        let path = self.0.clone();
        Ok(Box::new(move || touch(&path)))
    }
}

struct Poller {
    path: PathBuf,
    seen: Stamp,
}

impl Listener for Poller {
    fn wait(&mut self) -> Outcome<()> {
        loop {
            let stamp = stamp(&self.path)?;
            if std::mem::replace(&mut self.seen, stamp) != stamp {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

//! Where a table is, of whatever kind.

use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use gensync::{Table, TableOptions};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Anonymous,
    #[cfg(feature = "shm")]
    Named,
}

pub(crate) const KINDS: &[Kind] = &[
    Kind::File,
    Kind::Anonymous,
    #[cfg(feature = "shm")]
    Kind::Named,
];

/// A place of the test's own for one table, which is removed with it.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) kind: Kind,
    folder: tempfile::TempDir,
    name: String,
    anonymous: OnceLock<Table>,
}

impl Place {
    pub(crate) fn new(kind: Kind) -> Self {
        static PLACES: AtomicU64 = AtomicU64::new(0);
        let name = format!("gensync-test-{}-{}", std::process::id(), PLACES.fetch_add(1, SeqCst));
        Self { kind, folder: tempfile::tempdir().unwrap(), name, anonymous: OnceLock::new() }
    }

    /// The table; once more, if it can be opened once more.
    pub(crate) fn open(&self, options: TableOptions) -> Table {
        match self.kind {
            Kind::File => options.open(self.folder.path().join(&self.name)).unwrap(),
            Kind::Anonymous => self.anonymous.get_or_init(|| options.anonymous().unwrap()).clone(),
            #[cfg(feature = "shm")]
            Kind::Named => options.named(&self.name).unwrap(),
        }
    }

    /// Where the table can be opened read-only.
    pub(crate) fn path(&self) -> Option<PathBuf> {
        match self.kind {
            Kind::File => Some(self.folder.path().join(&self.name)),
            Kind::Anonymous => None,
            #[cfg(feature = "shm")]
            Kind::Named => Some(std::path::Path::new("/dev/shm").join(&self.name)),
        }
    }

    /// All files that have been made.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let Some(path) = self.path() else { return Vec::new() };
        let entries = fs::read_dir(path.parent().unwrap()).into_iter().flatten();
        let files = entries.map(|entry| entry.unwrap().path());
        // In a folder of its own, an unfinished file is this table's.
        let is_unfinished = |path: &str| self.kind == Kind::File && path.contains("/.gensync-");
        files
            .filter(|path| path.to_str().is_some_and(|path| path.contains(&self.name) || is_unfinished(path)))
            .collect()
    }

    /// To be called when it was leaked, and so is not dropped.
    pub(crate) fn remove(&self) {
        self.files().into_iter().for_each(|path| _ = fs::remove_file(path));
        let _ = fs::remove_dir_all(self.folder.path());
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.remove();
    }
}

//! Removing a table for good.

use std::path::Path;

use super::{ATTEMPTS, Table, exclude_updates, with_the_lock};
use crate::error::{Error, ErrorKind};
use crate::file::{TableFile, remove};
use crate::incarnation::Incarnation;
use crate::mapping::Identity;

impl Table {
    /// Removes the table's file. Every key's state is expired in every process that has it open, and no update is lost,
    /// whoever makes it meanwhile.
    ///
    /// A process that has the table open, may create one, and uses it again, makes a new one; so end them first, if the file
    /// is to stay away. So does this `Table`, unless it was opened with [`create(false)`](crate::TableOptions::create).
    ///
    /// Waits for updates in flight as [`reset`](Self::reset) does. Killed on the way, it leaves the table, or one that is
    /// retiring, which the next process to open it for writing replaces.
    ///
    /// ```
    /// # use gensync::Table;
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("shop.gensync");
    /// Table::open(&path)?.remove()?;
    /// assert!(!path.exists());
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`reset`](Self::reset); also [`ErrorKind::InvalidInput`] for an anonymous table, which has no file.
    pub fn remove(&self) -> Result<(), Error> {
        if self.is_read_only() {
            return Err(self.error(ErrorKind::ReadOnly));
        }
        let Some(path) = self.path() else {
            let (found, expected) =
                ("an anonymous one".to_owned(), "one that has a file; an anonymous one ends with its users");
            return Err(ErrorKind::InvalidInput { what: "the table to remove", found, expected }.into());
        };
        self.remove_at(path).map_err(|error| self.explain(error))
    }

    fn remove_at(&self, path: &Path) -> Result<(), Error> {
        for _ in 0..ATTEMPTS {
            let current = self.current()?;
            let excluded = exclude_updates(current, self.pending_limit());
            if !self.is_latest(current) {
                continue;
            }
            let _excluded = excluded?;
            match TableFile::open(path, &self.0.options)? {
                Some(file) if Identity::of(&file.stat()?) == current.mapping().identity() => {
                    if retire_and_remove(path, &file, current)? {
                        return Ok(());
                    }
                    // Somebody was faster: what he has put there is what is to be removed.
                    self.succeed(current)?;
                }
                _ if current.is_gone() => self.succeed(current)?,
                Some(_) | None => return Err(ErrorKind::NotFound.into()),
            }
        }
        Err(ErrorKind::Retired.into())
    }
}

/// Retires `table`, which `file` at `path` is, and removes the file; `false` if the path is another one's by now.
fn retire_and_remove(path: &Path, file: &TableFile, table: &Incarnation) -> Result<bool, Error> {
    // Unlike a successor, which may be put there by whoever finds the table retired, nothing is to come after it: so the lock
    // comes first.
    with_the_lock(path, file, table, || {
        table.slots().retire()?;
        remove(path)?;
        table.slots().header().end_retiring();
        Ok(())
    })
}

//! Ending an incarnation of a table, with or without a successor.

use std::path::Path;
use std::sync::Arc;

use super::Table;
use super::open::succeeding;
use super::replace::{exclude_updates, replace, retire_and_remove};
use crate::error::{Error, ErrorKind};
use crate::os::file::TableFile;
use crate::os::identity::Identity;
use crate::os::new_table::UnlinkedTable;
use crate::os::replaceable::{check_owner_can_be_given, check_replaceable};
use crate::table::incarnation::Incarnation;
use crate::table::retry::retry;

impl Table {
    /// Ends this incarnation of the table and begins another: every key's state is expired in every process, and keys that no
    /// process attaches to again are gone. No update that any process makes meanwhile is lost.
    ///
    /// Waits for [updates](crate::GenerationSynchronizer::update) in flight, and holds up others meanwhile, but for no longer
    /// than the [`pending_limit`](crate::TableOptions::pending_limit). So it must not be called within an update.
    ///
    /// The new file has the capacity, mode and owner of the old one. An anonymous table cannot be replaced, nor one that is not
    /// [replaceable](Self::replaceable): there, every key gets a new generation, all keys stay, and the
    /// [incarnation](crate::TableInfo::incarnation) stays the same, which distinguishes the two cases.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ReadOnly`]; [`ErrorKind::Locked`] if an update does not end; or a new file cannot be created, for lack of
    /// room or of the right to give it to the table's owner. Then nothing has changed.
    ///
    /// # Progress
    ///
    /// Blocking: makes system calls, creates a file as large as the table, sweeps over all keys, and sleeps while updates are
    /// in flight or another process replaces the table.
    pub fn reset(&self) -> Result<(), Error> {
        if self.is_read_only() {
            return Err(self.error(ErrorKind::ReadOnly));
        }
        let reset = || match self.path() {
            Some(path) => self.replace_or_remove(
                path,
                |file| match check_replaceable(file, path) {
                    Ok(()) => succeeding(file, &self.0.options)?.prepare(path)?.stand_by(path).map(Some),
                    Err(error) if matches!(error.kind(), ErrorKind::NotReplaceable { .. }) => Ok(None),
                    Err(error) => Err(error),
                },
                |current, file, unlinked| match unlinked {
                    Some(unlinked) => self.begin_successor(path, current, file, unlinked),
                    None => self.expire_in_place(current),
                },
            ),
            None => self.latest().slots().expire_all(),
        };
        reset().map_err(|error| self.explain(error))
    }

    /// Removes the table's file. Every key's state is expired in every process that has it open, and no update that any process
    /// makes meanwhile is lost.
    ///
    /// A process that has the table open, and may create one, creates a new table at its next use; so end all such processes
    /// first if the file is to stay away. This `Table` does so as well, unless it was opened with
    /// [`create(false)`](crate::TableOptions::create).
    ///
    /// Waits for updates in flight as [`reset`](Self::reset) does. If the process is killed on the way, it leaves the table as
    /// it was, or one that is retiring, which the next process that opens it for writing replaces.
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
    /// As [`reset`](Self::reset); also [`ErrorKind::NotReplaceable`] if this process cannot remove the file, and
    /// [`ErrorKind::InvalidInput`] for an anonymous table, which has no file. Then nothing has changed.
    ///
    /// # Progress
    ///
    /// As [`reset`](Self::reset), without creating a file.
    pub fn remove(&self) -> Result<(), Error> {
        if self.is_read_only() {
            return Err(self.error(ErrorKind::ReadOnly));
        }
        let Some(path) = self.path() else {
            let (found, expected) =
                ("an anonymous one".to_owned(), "one that has a file; an anonymous one ends with its users");
            return Err(ErrorKind::InvalidInput { what: "the table to remove", found, expected }.into());
        };
        self.replace_or_remove(
            path,
            |file| check_replaceable(file, path),
            |current, file, ()| self.end_for_good(path, current, &file),
        )
        .map_err(|error| self.explain(error))
    }

    /// Whether this process can put another file in the place of the table's, as [`reset`](Self::reset) does, or
    /// [remove](Self::remove) it. Changes nothing, and may be called on a read-only table too.
    ///
    /// ```
    /// # use gensync::Table;
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("shop.gensync");
    /// Table::open(&path)?.replaceable()?;
    /// assert!(Table::options().anonymous()?.replaceable().is_err());
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotReplaceable`] says why not: the file is a mount point itself, this process may not write to the folder,
    /// the folder is sticky and the file belongs to another user, one of them is immutable or append-only, a sandbox keeps this
    /// process from renaming the file, or the new file could not be given to the owner of the old one. Another kind of error if
    /// that cannot be found out.
    ///
    /// # Progress
    ///
    /// Some system calls, none of which sleeps.
    pub fn replaceable(&self) -> Result<(), Error> {
        let Some(path) = self.path() else {
            let reason = "it is anonymous, and has no name; a reset gives every key a new generation".to_owned();
            return Err(ErrorKind::NotReplaceable { reason }.into());
        };
        let check = || {
            let file = TableFile::open(path, &self.0.options.file)?.ok_or(ErrorKind::NotFound)?;
            check_replaceable(&file, path)?;
            check_owner_can_be_given(&file)
        };
        check().map_err(|error| self.explain(error))
    }

    /// Runs `end` on the latest incarnation and its file while no update is in flight, until `end` says that it is done.
    /// Whatever can fail, or takes long, belongs in `prepare`, which runs before.
    fn replace_or_remove<P>(
        &self,
        path: &Path,
        prepare: impl Fn(&TableFile) -> Result<P, Error>,
        end: impl Fn(&Arc<Incarnation>, TableFile, P) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        retry(|| {
            let Some(current) = self.try_current()? else { return Ok(None) };
            let file = match TableFile::open(path, &self.0.options.file)? {
                Some(file) if Identity::of(&file.stat()?) == current.mapping().identity() => file,
                // Another process has replaced the file: the one that is there now is to be ended.
                _ if current.is_gone() => {
                    self.succeed(current)?;
                    return Ok(None);
                }
                Some(_) | None => return Err(ErrorKind::NotFound.into()),
            };
            let unlinked = prepare(&file)?;
            let excluded = exclude_updates(current, self.pending_limit());
            let Some(_excluded) = self.while_latest(current, excluded)? else { return Ok(None) };
            Ok(end(current, file, unlinked)?.then_some(()))
        })
    }

    fn begin_successor(
        &self,
        path: &Path,
        current: &Arc<Incarnation>,
        file: TableFile,
        unlinked: UnlinkedTable,
    ) -> Result<bool, Error> {
        let replaced =
            self.while_latest(current, replace(path, &file, current, None, self.pending_limit(), || Ok(unlinked)))?;
        drop(file);
        match self.succeed(current) {
            // The table was replaced, and the next use of it tries to open the successor again.
            Err(_) if replaced == Some(true) && current.slots().header().is_retired() => Ok(true),
            result => result.map(|()| replaced == Some(true)),
        }
    }

    fn expire_in_place(&self, current: &Arc<Incarnation>) -> Result<bool, Error> {
        let is_done = self.while_latest(current, current.slots().expire_all())?;
        // Another process, with more rights, may have replaced it meanwhile.
        Ok(is_done.is_some() && current.slots().header().is_live())
    }

    fn end_for_good(&self, path: &Path, current: &Arc<Incarnation>, file: &TableFile) -> Result<bool, Error> {
        let is_done = self.while_latest(current, retire_and_remove(path, file, current, self.pending_limit()))?;
        if is_done == Some(false) {
            // Another process was faster: the table that it has put there is to be removed.
            self.succeed(current)?;
        }
        Ok(is_done == Some(true))
    }
}

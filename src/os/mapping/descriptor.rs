//! The descriptor of a table's file, whose number is not trusted.
//!
//! A program that closes "all" descriptors to become a daemon may have given the number to another file. Before each use,
//! closing included, the number must still lead to the file's device and inode.

use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd, IntoRawFd as _, RawFd};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, fstat};

use super::closable::ClosableCount;
use crate::error::{Error, ErrorKind};
use crate::os::identity::Identity;

/// Where a process finds its own descriptors by their numbers.
pub(crate) const DESCRIPTORS: &str = "/proc/self/fd";

/// A file, by a descriptor that other code may close or reuse, and by a path that may be out of reach.
#[derive(Debug)]
pub(super) struct FileRef {
    pub(super) number: RawFd,
    users: ClosableCount,
    pub(super) identity: Identity,
    pub(super) path: Option<PathBuf>,
}

impl FileRef {
    pub(super) fn new(file: File, path: Option<&Path>) -> Result<Self, Error> {
        let stat = fstat(&file).map_err(|errno| Error::system("looking at the table's file", errno))?;
        let identity = Identity::of(&stat);
        Ok(Self { number: file.into_raw_fd(), users: ClosableCount::none(), identity, path: path.map(Path::to_owned) })
    }

    /// Runs `action` with the descriptor, if it still leads to the file.
    pub(super) fn with_own<R>(&self, action: impl FnOnce(BorrowedFd<'_>) -> R) -> Option<R> {
        self.with_any(|file| self.leads_to_file(file).then(|| action(file))).flatten()
    }

    /// Runs `action`, which must do no harm to any file, with whatever the descriptor leads to.
    pub(super) fn with_any<R>(&self, action: impl FnOnce(BorrowedFd<'_>) -> R) -> Option<R> {
        if !self.users.enter() {
            return None;
        }
        // SAFETY: the number is not -1, and nothing but questions about it is asked until it was found to lead to the file.
        let result = action(unsafe { BorrowedFd::borrow_raw(self.number) });
        if self.users.leave() {
            self.release();
        }
        Some(result)
    }

    fn leads_to_file(&self, file: BorrowedFd<'_>) -> bool {
        fstat(file).is_ok_and(|stat| Identity::of(&stat) == self.identity)
    }

    /// Closes the descriptor as soon as no thread uses it.
    pub(super) fn close(&self) {
        if self.users.close() {
            self.release();
        }
    }

    fn release(&self) {
        // SAFETY: the number is not -1, and is closed only if it leads to the file.
        if self.leads_to_file(unsafe { BorrowedFd::borrow_raw(self.number) }) {
            let _ = nix::unistd::close(self.number);
        }
    }

    /// Runs `action` with the file, opened anew if the descriptor is gone.
    pub(super) fn with<R>(
        &self,
        access: OFlag,
        action: impl Fn(BorrowedFd<'_>) -> Result<R, Error>,
    ) -> Result<R, Error> {
        if let Some(result) = self.with_own(&action) {
            return result.map_err(|error| self.place(error));
        }
        let path = self.path.as_deref().ok_or_else(|| self.lost())?;
        let file = self.open(path, access | OFlag::O_NOFOLLOW)?.ok_or_else(|| self.lost())?;
        action(file.as_fd()).map_err(|error| self.place(error))
    }

    /// Opens `path`; `None` if that is not the file.
    fn open(&self, path: &Path, access: OFlag) -> Result<Option<File>, Error> {
        let file = nix::fcntl::open(path, access | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK, Mode::empty())
            .map_err(|errno| self.place(Error::system("opening the table's file again", errno)).at(path))?;
        Ok(self.leads_to_file(file.as_fd()).then(|| file.into()))
    }

    /// Another description of the file, for writing.
    pub(super) fn open_again(&self) -> Result<File, Error> {
        if let Some(path) = &self.path
            && let Ok(Some(file)) = self.open(path, OFlag::O_RDWR | OFlag::O_NOFOLLOW)
        {
            return Ok(file);
        }
        // The file has no name, or its path is out of reach; the descriptor still leads to it.
        let link = Path::new(DESCRIPTORS).join(self.number.to_string());
        self.open(&link, OFlag::O_RDWR)?.ok_or_else(|| self.lost())
    }

    fn lost(&self) -> Error {
        self.error(ErrorKind::System {
            action: "finding the table's file, whose descriptor was closed by this program,",
        })
    }

    pub(super) fn error(&self, kind: ErrorKind) -> Error {
        self.place(kind.into())
    }

    pub(super) fn place(&self, error: Error) -> Error {
        match &self.path {
            Some(path) => error.at(path),
            None => error,
        }
    }

    /// Whether a number other than ours leads to the file.
    #[cfg(feature = "shm")]
    pub(super) fn open_elsewhere(&self) -> bool {
        let numbers = std::fs::read_dir(DESCRIPTORS).into_iter().flatten().flatten();
        numbers.filter_map(|entry| entry.file_name().to_str()?.parse::<RawFd>().ok()).any(|number| {
            // SAFETY: the number is only passed to fstat, which accepts any number.
            number != self.number && self.leads_to_file(unsafe { BorrowedFd::borrow_raw(number) })
        })
    }
}

impl Drop for FileRef {
    fn drop(&mut self) {
        self.close();
    }
}

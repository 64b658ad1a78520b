//! Which table is meant, and how it is opened.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Args;
use gensync::{ErrorKind, OwnerCheck, Table, TableOptions};

use crate::failure::{Failure, Outcome};

const VARIABLE: &str = "GENSYNC_TABLE";

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Table")]
pub(crate) struct Target {
    /// The table's file; $GENSYNC_TABLE unless given
    #[arg(long, short, value_name = "PATH", global = true)]
    table: Option<PathBuf>,
    /// The application that the table belongs to; the path is that of Table::open_default
    #[arg(long, short, value_name = "NAME", global = true)]
    app: Option<String>,
    /// Accept a table on a FUSE file system, if no other machine has it mounted
    #[arg(long, global = true)]
    allow_fuse: bool,
    /// Accept a table on the file system with this number, which the refusal names, if no other machine has it mounted
    #[arg(long, value_name = "NUMBER", global = true, value_parser = parse_number)]
    allow_file_system: Vec<u64>,
}

/// A file system's number in hexadecimal, as the refusal names it, or in decimal.
fn parse_number(text: &str) -> Result<u64, String> {
    let number = text.strip_prefix("0x").map_or_else(|| text.parse(), |digits| u64::from_str_radix(digits, 16));
    number.map_err(|_| "expected the file system's number, such as 0x786f4256".to_owned())
}

impl Target {
    /// The same, but the table at `path` if there is one.
    pub(crate) fn or_at(&self, path: Option<&Path>) -> Outcome<Self> {
        match path {
            Some(_) if self.table.is_some() || self.app.is_some() => {
                Err(Failure::Usage("two tables are named; give one of TABLE, --table and --app".to_owned()))
            }
            Some(path) => Ok(Self { table: Some(path.to_owned()), ..self.clone() }),
            None => Ok(self.clone()),
        }
    }

    /// The table's path. Nothing is created.
    pub(crate) fn path(&self) -> Outcome<PathBuf> {
        match (&self.table, &self.app) {
            // The parser does not see a conflict if one stands before the command and the other one behind it.
            (Some(_), Some(_)) => Err(Failure::Usage("--table and --app name two tables; give one of them".to_owned())),
            (Some(path), None) => Ok(path.clone()),
            (None, Some(app)) => Ok(Table::default_path(app)?),
            (None, None) => {
                let variable = std::env::var_os(VARIABLE).filter(|path| !path.is_empty());
                variable.map(PathBuf::from).ok_or_else(|| {
                    Failure::Usage(format!("no table is named: give --table PATH or --app NAME, or set {VARIABLE}"))
                })
            }
        }
    }

    /// Arguments for another process of this program, so that it uses the same table.
    pub(crate) fn arguments(&self) -> Outcome<Vec<OsString>> {
        let allow_fuse = self.allow_fuse.then(|| "--allow-fuse".into());
        let allowed = self.allow_file_system.iter().map(|number| format!("--allow-file-system={number:#x}").into());
        Ok(["--table".into(), self.path()?.into_os_string()].into_iter().chain(allow_fuse).chain(allowed).collect())
    }

    /// Opens the table for reading: without write permission, and without a change.
    pub(crate) fn read(&self) -> Outcome<Table> {
        Ok(self.options().read_only(true).open(self.path()?)?)
    }

    /// As [`read`](Self::read), but also opens a retired table.
    pub(crate) fn inspect(&self) -> Outcome<Table> {
        Ok(self.options().read_only(true).accept_retired(true).open(self.path()?)?)
    }

    /// Opens the table for writing, if it exists.
    pub(crate) fn write(&self) -> Outcome<Table> {
        Ok(self.options().open(self.path()?)?)
    }

    /// Opens the table for writing if this process may, otherwise for reading.
    pub(crate) fn write_or_read(&self, read_only: bool) -> Outcome<Table> {
        if read_only {
            return self.read();
        }
        match self.write() {
            Err(Failure::Table(error))
                if matches!(error.kind(), ErrorKind::Permission | ErrorKind::ReadOnlyFileSystem) =>
            {
                self.read()
            }
            // A descriptor of another process's anonymous table, which is opened for reading only.
            Err(Failure::Table(error))
                if matches!(error.kind(), ErrorKind::Symlink)
                    && error.path().is_some_and(|path| path.starts_with("/proc")) =>
            {
                self.read()
            }
            result => result,
        }
    }

    /// Opens the table for writing; creates it with these options if it does not exist.
    pub(crate) fn create(&self, set: impl FnOnce(TableOptions) -> TableOptions) -> Outcome<Table> {
        let options = set(self.options().create(true));
        match (&self.table, &self.app) {
            (None, Some(app)) => Ok(options.open_default(app)?),
            _ => Ok(options.open(self.path()?)?),
        }
    }

    pub(crate) fn options(&self) -> TableOptions {
        // Any owner is accepted, as only the table's users know which one is right: `doctor` reports the owner.
        let options = Table::options().create(false).owner(OwnerCheck::Anyone).allow_fuse(self.allow_fuse);
        self.allow_file_system.iter().fold(options, |options, number| options.allow_file_system(*number))
    }
}

//! The source: two tables of an SQLite database.

use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{Signal, raise};
use rusqlite::{Connection, OptionalExtension as _, Result};

pub(crate) struct User {
    pub(crate) name: String,
}

pub(crate) struct Settings {
    pub(crate) greeting: String,
}

/// A connection, which threads cannot share.
pub(crate) struct Store {
    connection: Connection,
    die_before_bump: bool,
}

impl Store {
    pub(crate) fn open(database: &Path, die_before_bump: bool) -> Result<Self> {
        let connection = Connection::open(database)?;
        connection.busy_timeout(Duration::from_secs(5))?;
        // With WAL, loads never wait for changes, and a commit survives the death of processes; that of the machine may cost the
        // last ones.
        connection.execute_batch(
            "PRAGMA journal_mode = WAL;
            PRAGMA synchronous = NORMAL;
            CREATE TABLE IF NOT EXISTS users (id INTEGER PRIMARY KEY, name TEXT NOT NULL) STRICT;
            CREATE TABLE IF NOT EXISTS settings (id INTEGER PRIMARY KEY CHECK (id = 1), greeting TEXT NOT NULL) STRICT;
            INSERT OR IGNORE INTO settings VALUES (1, 'Hello');",
        )?;
        Ok(Self { connection, die_before_bump })
    }

    pub(crate) fn user(&self, id: i64) -> Result<Option<User>> {
        let mut statement = self.connection.prepare_cached("SELECT name FROM users WHERE id = ?1")?;
        statement.query_row([id], |row| Ok(User { name: row.get(0)? })).optional()
    }

    pub(crate) fn save_user(&self, id: i64, name: &str) -> Result<()> {
        self.change("INSERT INTO users VALUES (?1, ?2) ON CONFLICT DO UPDATE SET name = ?2", (id, name))
    }

    pub(crate) fn delete_user(&self, id: i64) -> Result<()> {
        self.change("DELETE FROM users WHERE id = ?1", [id])
    }

    pub(crate) fn settings(&self) -> Result<Settings> {
        self.connection.query_row("SELECT greeting FROM settings", [], |row| Ok(Settings { greeting: row.get(0)? }))
    }

    pub(crate) fn save_settings(&self, greeting: &str) -> Result<()> {
        self.change("UPDATE settings SET greeting = ?1", [greeting])
    }

    /// A transaction of one statement.
    fn change(&self, statement: &str, parameters: impl rusqlite::Params) -> Result<()> {
        self.connection.execute(statement, parameters)?;
        if self.die_before_bump {
            raise(Signal::SIGKILL).expect("a process may kill itself");
        }
        Ok(())
    }
}

//! The source: a row of an SQLite database.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, TransactionBehavior};
use serde::Serialize;

#[derive(Debug, Serialize)]
pub(crate) struct Settings {
    pub(crate) version: i64,
    pub(crate) greeting: String,
}

/// A connection, which threads take in turn.
pub(crate) struct Store(Mutex<Connection>);

impl Store {
    pub(crate) fn create(database: &Path) -> rusqlite::Result<Self> {
        let store = Self::open(database)?;
        store.connection().execute_batch(
            "PRAGMA journal_mode = WAL;
            CREATE TABLE IF NOT EXISTS settings (
                id INTEGER PRIMARY KEY CHECK (id = 1), version INTEGER NOT NULL, greeting TEXT NOT NULL
            ) STRICT;
            INSERT OR IGNORE INTO settings VALUES (1, 1, 'Hello');",
        )?;
        Ok(store)
    }

    pub(crate) fn open(database: &Path) -> rusqlite::Result<Self> {
        let connection = Connection::open(database)?;
        connection.busy_timeout(Duration::from_secs(5))?;
        // With WAL, a commit survives the death of processes; that of the machine may cost the last ones.
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        Ok(Self(Mutex::new(connection)))
    }

    pub(crate) fn load(&self) -> rusqlite::Result<Settings> {
        load(&self.connection())
    }

    pub(crate) fn save(&self, greeting: String) -> rusqlite::Result<Settings> {
        let mut connection = self.connection();
        // Immediate, as what it reads must be the newest when it writes.
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let version = load(&transaction)?.version + 1;
        transaction.execute("UPDATE settings SET version = ?1, greeting = ?2", (version, &greeting))?;
        transaction.commit()?;
        Ok(Settings { version, greeting })
    }

    fn connection(&self) -> MutexGuard<'_, Connection> {
        // A thread that panics rolls its transaction back.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn load(connection: &Connection) -> rusqlite::Result<Settings> {
    connection.query_row("SELECT version, greeting FROM settings", [], |row| {
        Ok(Settings { version: row.get(0)?, greeting: row.get(1)? })
    })
}

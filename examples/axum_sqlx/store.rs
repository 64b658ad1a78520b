//! The source: two tables of an SQLite database.

use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{Signal, raise};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{Result, SqlitePool};

pub(crate) struct User {
    pub(crate) name: String,
}

pub(crate) struct Settings {
    pub(crate) greeting: String,
}

/// A pool of connections, which its clones share.
#[derive(Clone)]
pub(crate) struct Store {
    pool: SqlitePool,
    die_before_bump: bool,
}

impl Store {
    pub(crate) async fn open(database: &Path, connections: u32, die_before_bump: bool) -> Result<Self> {
        // With WAL, loads never wait for changes, and a commit survives the death of processes; that of the machine may cost the
        // last ones.
        let options = SqliteConnectOptions::new()
            .filename(database)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Normal)
            .busy_timeout(Duration::from_secs(5));
        let pool = SqlitePoolOptions::new().max_connections(connections).connect_with(options).await?;
        let tables = "CREATE TABLE IF NOT EXISTS users (id INTEGER PRIMARY KEY, name TEXT NOT NULL) STRICT;
            CREATE TABLE IF NOT EXISTS settings (id INTEGER PRIMARY KEY CHECK (id = 1), greeting TEXT NOT NULL) STRICT;
            INSERT OR IGNORE INTO settings VALUES (1, 'Hello');";
        sqlx::raw_sql(tables).execute(&pool).await?;
        Ok(Self { pool, die_before_bump })
    }

    /// Closes the connections, of which the last one tidies the database up.
    pub(crate) async fn close(&self) {
        self.pool.close().await;
    }

    pub(crate) async fn user(&self, id: i64) -> Result<Option<User>> {
        let name =
            sqlx::query_scalar("SELECT name FROM users WHERE id = ?1").bind(id).fetch_optional(&self.pool).await?;
        Ok(name.map(|name| User { name }))
    }

    pub(crate) async fn save_user(&self, id: i64, name: &str) -> Result<()> {
        let upsert = "INSERT INTO users VALUES (?1, ?2) ON CONFLICT DO UPDATE SET name = ?2";
        sqlx::query(upsert).bind(id).bind(name).execute(&self.pool).await?;
        self.committed();
        Ok(())
    }

    pub(crate) async fn delete_user(&self, id: i64) -> Result<()> {
        sqlx::query("DELETE FROM users WHERE id = ?1").bind(id).execute(&self.pool).await?;
        self.committed();
        Ok(())
    }

    pub(crate) async fn settings(&self) -> Result<Settings> {
        let greeting = sqlx::query_scalar("SELECT greeting FROM settings").fetch_one(&self.pool).await?;
        Ok(Settings { greeting })
    }

    pub(crate) async fn save_settings(&self, greeting: &str) -> Result<()> {
        sqlx::query("UPDATE settings SET greeting = ?1").bind(greeting).execute(&self.pool).await?;
        self.committed();
        Ok(())
    }

    fn committed(&self) {
        if self.die_before_bump {
            raise(Signal::SIGKILL).expect("a process may kill itself");
        }
    }
}

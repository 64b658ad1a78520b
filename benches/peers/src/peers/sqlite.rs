//! SQLite: a database reports to each connection whether another one has changed it, as a whole.

use std::path::{Path, PathBuf};

use rusqlite::{Connection, Statement};

use crate::Outcome;
use crate::peer::{About, Changes, Held, Kind, Operation, Peer, Role, Session, Site, Source};

pub(crate) struct Sqlite;

impl Peer for Sqlite {
    fn about(&self) -> About {
        About {
            name: "SQLite",
            several_writers: "yes, one at a time",
            keys_at_run_time: "no: `data_version` is of the whole database",
            writer_killed: "partly: if the value itself is kept there, one transaction changes both",
            file_replaced: "no",
            without_server: "yes",
            across_processes: "yes",
        }
    }

    fn operations(&self, folder: &Path) -> Outcome<Vec<Operation>> {
        let (checked, written) = (folder.join("checked"), folder.join("written"));
        create(&checked, 2)?;
        create(&written, 2)?;
        let (mut version, mut select) = (statement(&checked, VERSION)?, statement(&checked, SELECT)?);
        let mut update = statement(&written, UPDATE)?;
        let seen = data_version(&mut version);
        let mut number = 0;
        Ok(vec![
            Operation::new("PRAGMA data_version, of the whole database", Kind::Check, move || {
                data_version(&mut version) == seen
            }),
            Operation::new("SELECT of a row", Kind::CheckByReading, move || {
                select.query_row([0], |row| row.get::<_, i64>(0)).expect("a row")
            }),
            Operation::new("UPDATE, commit, no disk", Kind::Announce, move || {
                number += 1;
                update.execute((number, 1)).expect("a sound database with room")
            }),
        ])
    }

    fn too_many(&self, keys: usize) -> Option<&'static str> {
        (keys > 10).then_some("`data_version` does not know keys")
    }

    fn sites(&self, folder: &Path, keys: usize) -> Outcome<Vec<(&'static str, Box<dyn Site>)>> {
        let path = folder.join("database");
        create(&path, keys)?;
        Ok(vec![("PRAGMA data_version", Box::new(File(path)))])
    }
}

const VERSION: &str = "PRAGMA data_version";
const SELECT: &str = "SELECT generation FROM generations WHERE key = ?";
const UPDATE: &str = "UPDATE generations SET generation = ? WHERE key = ?";

fn create(path: &Path, keys: usize) -> Outcome<()> {
    let mut connection = Connection::open(path)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    let transaction = connection.transaction()?;
    transaction.execute_batch("CREATE TABLE generations (key INTEGER PRIMARY KEY, generation INTEGER NOT NULL)")?;
    {
        let mut insert = transaction.prepare("INSERT INTO generations VALUES (?, 0)")?;
        for key in 0..keys {
            insert.execute([key as i64])?;
        }
    }
    transaction.commit()?;
    Ok(())
}

/// A statement on a connection of its own, which stays open for good, as the statement borrows it.
fn statement(path: &Path, sql: &str) -> Outcome<Statement<'static>> {
    let connection = Box::leak(Box::new(Connection::open(path)?));
    connection.busy_timeout(std::time::Duration::from_secs(10))?;
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    Ok(connection.prepare(sql)?)
}

fn data_version(statement: &mut Statement<'_>) -> i64 {
    statement.query_row([], |row| row.get(0)).expect("a sound database")
}

struct File(PathBuf);

impl Site for File {
    fn attach(&self, keys: &[usize], _role: Role, source: Source) -> Outcome<Box<dyn Session>> {
        let (mut version, update) = (statement(&self.0, VERSION)?, statement(&self.0, UPDATE)?);
        let seen = data_version(&mut version);
        let keys_seen = keys.iter().map(|&key| (key as i64, seen)).collect();
        Ok(Held::boxed(Versions { version, update, seen: keys_seen }, keys, source))
    }
}

struct Versions {
    version: Statement<'static>,
    update: Statement<'static>,
    seen: Vec<(i64, i64)>,
}

impl Changes for Versions {
    /// After any change, every key must be loaded again.
    #[inline]
    fn changed(&mut self, key: usize) -> bool {
        let version = data_version(&mut self.version);
        std::mem::replace(&mut self.seen[key].1, version) != version
    }

    fn announce(&mut self, key: usize, value: u64) {
        self.update.execute((value as i64, self.seen[key].0)).expect("a sound database with room");
    }
}

//! LMDB through heed: a generation for each key in a database that all processes map.

#![expect(unsafe_code, reason = "opens a database, and no other program may change its file")]

use std::path::{Path, PathBuf};

use heed::byteorder::BE;
use heed::types::U64;
use heed::{CommitOrAbort, Database, Env, EnvOpenOptions, WithoutTls};

use crate::Outcome;
use crate::peer::{About, Changes, Held, Kind, Operation, Peer, Role, Session, Site, Source};

pub(crate) struct Lmdb;

/// Keys that sort in the order in which they are added.
type Generations = Database<'static, U64<BE>, U64<BE>>;

impl Peer for Lmdb {
    fn about(&self) -> About {
        About {
            name: "LMDB",
            several_writers: "yes, one at a time",
            keys_at_run_time: "yes",
            writer_killed: "partly: if the value itself is kept there, one transaction changes both",
            file_replaced: "no",
            without_server: "yes",
            across_processes: "yes",
        }
    }

    fn operations(&self, folder: &Path) -> Outcome<Vec<Operation>> {
        let (env, generations) = create(folder, 2)?;
        let (informed, reader, seen) = (env.clone(), env.clone(), env.info().last_txn_id);
        let mut number = 0;
        // Two environments, or the first would not be as it was seen.
        let other = folder.join("other");
        std::fs::create_dir(&other)?;
        let (writer, written) = create(&other, 2)?;
        Ok(vec![
            Operation::new("last_txn_id, of the whole database", Kind::Check, move || {
                informed.info().last_txn_id == seen
            }),
            Operation::new("read_txn, get", Kind::CheckByReading, move || {
                let transaction = reader.read_txn().expect("a reader's slot");
                generations.get(&transaction, &0).expect("a sound database")
            }),
            Operation::new("put, commit, no disk", Kind::Announce, move || {
                number += 1;
                put(&writer, written, 1, number)
            }),
        ])
    }

    fn sites(&self, folder: &Path, keys: usize) -> Outcome<Vec<(&'static str, Box<dyn Site>)>> {
        // Closed again before the fork: an environment must not be carried into another process.
        let (env, _) = create(folder, keys)?;
        env.prepare_for_closing().wait();
        Ok(vec![("read_txn, get", Box::new(Folder(folder.to_owned())))])
    }
}

fn open(folder: &Path) -> Outcome<Env<WithoutTls>> {
    let mut options = EnvOpenOptions::new().read_txn_without_tls();
    options.map_size(4 << 30).max_readers(256);
    // SAFETY: the folder is of this program alone, which changes its files through LMDB only.
    Ok(unsafe { options.open(folder) }?)
}

fn create(folder: &Path, keys: usize) -> Outcome<(Env<WithoutTls>, Generations)> {
    let env = open(folder)?;
    let created = env.create_databases_and_commit(env.write_txn()?, |opener, transaction| {
        opener.create_database(transaction, None).map(CommitOrAbort::<_, ()>::Commit)
    })?;
    let generations: Generations = created.unwrap_commit();
    let mut transaction = env.write_txn()?;
    for key in 0..keys as u64 {
        generations.put(&mut transaction, &key, &0)?;
    }
    transaction.commit()?;
    Ok((env, generations))
}

fn put(env: &Env<WithoutTls>, generations: Generations, key: u64, generation: u64) {
    let put = || {
        let mut transaction = env.write_txn()?;
        generations.put(&mut transaction, &key, &generation)?;
        transaction.commit()
    };
    put().expect("a sound database with room");
}

struct Folder(PathBuf);

impl Site for Folder {
    fn attach(&self, keys: &[usize], _role: Role, source: Source) -> Outcome<Box<dyn Session>> {
        let env = open(&self.0)?;
        let opened = env.open_databases_and_commit(env.read_txn()?, |opener, transaction| {
            opener.open_database(transaction, None).map(CommitOrAbort::<_, ()>::Commit)
        })?;
        let generations: Generations = opened.unwrap_commit().ok_or("the database is gone")?;
        let transaction = env.read_txn()?;
        let mut seen = Vec::new();
        for &key in keys {
            let generation = generations.get(&transaction, &(key as u64))?.ok_or("a key is gone")?;
            seen.push((key as u64, generation));
        }
        drop(transaction);
        Ok(Held::boxed(Entries { env, generations, seen }, keys, source))
    }
}

struct Entries {
    env: Env<WithoutTls>,
    generations: Generations,
    seen: Vec<(u64, u64)>,
}

impl Changes for Entries {
    #[inline]
    fn changed(&mut self, key: usize) -> bool {
        let (key, seen) = &mut self.seen[key];
        let transaction = self.env.read_txn().expect("a reader's slot");
        let generation = self.generations.get(&transaction, key).expect("a sound database").expect("a key");
        std::mem::replace(seen, generation) != generation
    }

    fn announce(&mut self, key: usize, value: u64) {
        put(&self.env, self.generations, self.seen[key].0, value);
    }
}

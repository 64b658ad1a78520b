//! memcached over a unix socket, a generation for each key. Spoken to directly: the client crates keep pools of
//! connections with threads of their own, and a process that has threads must not fork.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::rc::Rc;

use nix::unistd::Pid;

use crate::Outcome;
use crate::peer::{About, Changes, Held, Kind, Operation, Peer, Role, Session, Site, Source};
use crate::server::{Server, program};

pub(crate) struct Memcached;

impl Peer for Memcached {
    fn about(&self) -> About {
        About {
            name: "memcached",
            several_writers: "yes",
            keys_at_run_time: "yes; may be evicted",
            writer_killed: "partly: if the value itself is kept there",
            file_replaced: "does not apply; a restarted server has lost all keys",
            without_server: "no",
            across_processes: "yes, and machines",
        }
    }

    fn missing(&self) -> Option<String> {
        program("memcached").is_none().then(|| "memcached is not installed (a package of Debian's)".to_owned())
    }

    fn operations(&self, folder: &Path) -> Outcome<Vec<Operation>> {
        let server = Rc::new(Server::memcached(folder)?);
        let connect = || Connection::new(server.socket());
        connect()?.create(2)?;
        let (mut getter, mut incrementer, server_2) = (connect()?, connect()?, server.clone());
        Ok(vec![
            Operation::new("get", Kind::CheckByReading, move || {
                let _lives = &server;
                getter.get("0").expect("a key")
            }),
            Operation::new("incr", Kind::Announce, move || {
                let _lives = &server_2;
                incrementer.increment("1").expect("a key")
            }),
        ])
    }

    fn sites(&self, folder: &Path, keys: usize) -> Outcome<Vec<(&'static str, Box<dyn Site>)>> {
        let server = Server::memcached(folder)?;
        Connection::new(server.socket())?.create(keys)?;
        Ok(vec![("get", Box::new(Served { server }))])
    }
}

struct Connection {
    stream: BufReader<UnixStream>,
    line: String,
}

impl Connection {
    fn new(socket: &Path) -> Outcome<Self> {
        Ok(Self { stream: BufReader::new(UnixStream::connect(socket)?), line: String::new() })
    }

    /// The keys, each with a generation, without waiting for an answer to each.
    fn create(&mut self, keys: usize) -> Outcome<()> {
        let mut commands = Vec::new();
        for key in 0..keys {
            write!(commands, "set {key} 0 0 1 noreply\r\n1\r\n")?;
            if commands.len() > 60_000 || key + 1 == keys {
                self.stream.get_mut().write_all(&commands)?;
                commands.clear();
            }
        }
        // Answered when all before it are done.
        self.stream.get_mut().write_all(b"version\r\n")?;
        self.read_line()?;
        Ok(())
    }

    fn read_line(&mut self) -> Outcome<&str> {
        self.line.clear();
        if self.stream.read_line(&mut self.line)? == 0 {
            return Err("memcached has hung up".into());
        }
        Ok(self.line.trim_end())
    }

    fn get(&mut self, key: &str) -> Outcome<u64> {
        let command = ["get ", key, "\r\n"].concat();
        self.stream.get_mut().write_all(command.as_bytes())?;
        if !self.read_line()?.starts_with("VALUE ") {
            return Err(format!("memcached does not have the key {key}").into());
        }
        // Counters that shrank have spaces behind them.
        let value = self.read_line()?.trim_end().parse()?;
        self.read_line()?;
        Ok(value)
    }

    fn increment(&mut self, key: &str) -> Outcome<u64> {
        let command = ["incr ", key, " 1\r\n"].concat();
        self.stream.get_mut().write_all(command.as_bytes())?;
        Ok(self.read_line()?.parse()?)
    }
}

struct Served {
    server: Server,
}

impl Site for Served {
    fn attach(&self, keys: &[usize], _role: Role, source: Source) -> Outcome<Box<dyn Session>> {
        let mut connection = Connection::new(self.server.socket())?;
        let mut seen = Vec::new();
        for key in keys {
            let key = key.to_string();
            let generation = connection.get(&key)?;
            seen.push((key, generation));
        }
        Ok(Held::boxed(Generations { connection, seen }, keys, source))
    }

    fn server(&self) -> Option<Pid> {
        Some(self.server.pid())
    }
}

struct Generations {
    connection: Connection,
    seen: Vec<(String, u64)>,
}

impl Changes for Generations {
    #[inline]
    fn changed(&mut self, key: usize) -> bool {
        let (key, seen) = &mut self.seen[key];
        let generation = self.connection.get(key).expect("a key");
        std::mem::replace(seen, generation) != generation
    }

    fn announce(&mut self, key: usize, _value: u64) {
        self.connection.increment(&self.seen[key].0).expect("a key");
    }
}

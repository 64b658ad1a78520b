//! Redis over a unix socket: a generation for each key, and messages to the subscribers.

use std::path::Path;
use std::rc::Rc;

use ::redis::{Client, Connection, PubSub, cmd};
use nix::unistd::Pid;

use crate::Outcome;
use crate::peer::{About, Bell, Changes, Held, Kind, Listener, Operation, Peer, Role, Session, Site, Source};
use crate::server::{Server, program};

pub(crate) struct Redis;

impl Peer for Redis {
    fn about(&self) -> About {
        About {
            name: "Redis",
            several_writers: "yes",
            keys_at_run_time: "yes",
            writer_killed: "partly: if the value itself is kept there",
            file_replaced: "does not apply; a restarted server has the keys of its last snapshot, if any",
            without_server: "no",
            across_processes: "yes, and machines",
        }
    }

    fn missing(&self) -> Option<String> {
        program("redis-server").is_none().then(|| "redis-server is not installed (a package of Debian's)".to_owned())
    }

    fn operations(&self, folder: &Path) -> Outcome<Vec<Operation>> {
        let server = Rc::new(Server::redis(folder)?);
        create(&mut connect(&server)?, 2)?;
        let (mut getter, mut incrementer, mut publisher) = (connect(&server)?, connect(&server)?, connect(&server)?);
        let (server_2, server_3) = (server.clone(), server.clone());
        Ok(vec![
            Operation::new("GET", Kind::CheckByReading, move || {
                let _lives = &server;
                get(&mut getter, 0)
            }),
            Operation::new("INCR", Kind::Announce, move || {
                let _lives = &server_2;
                increment(&mut incrementer, 1)
            }),
            Operation::new("PUBLISH, to nobody", Kind::Announce, move || {
                let _lives = &server_3;
                publish(&mut publisher)
            }),
        ])
    }

    fn sites(&self, folder: &Path, keys: usize) -> Outcome<Vec<(&'static str, Box<dyn Site>)>> {
        let server = Server::redis(folder)?;
        create(&mut connect(&server)?, keys)?;
        Ok(vec![("GET", Box::new(Served(server)))])
    }

    fn bell(&self, folder: &Path) -> Outcome<Option<Box<dyn Bell>>> {
        Ok(Some(Box::new(Channel(Server::redis(folder)?))))
    }
}

fn connect(server: &Server) -> Outcome<Connection> {
    Ok(Client::open(format!("redis+unix://{}", server.socket().display()))?.get_connection()?)
}

/// The keys, each with a generation, many at once.
fn create(connection: &mut Connection, keys: usize) -> Outcome<()> {
    for first in (0..keys).step_by(1000) {
        let mut set = cmd("MSET");
        for key in first..(first + 1000).min(keys) {
            set.arg(key).arg(1);
        }
        set.exec(connection)?;
    }
    Ok(())
}

fn get(connection: &mut Connection, key: usize) -> u64 {
    cmd("GET").arg(key).query(connection).expect("a key")
}

fn increment(connection: &mut Connection, key: usize) -> u64 {
    cmd("INCR").arg(key).query(connection).expect("a key")
}

fn publish(connection: &mut Connection) -> u64 {
    cmd("PUBLISH").arg("bell").arg(1).query(connection).expect("a live server")
}

struct Served(Server);

impl Site for Served {
    fn attach(&self, keys: &[usize], _role: Role, source: Source) -> Outcome<Box<dyn Session>> {
        let mut connection = connect(&self.0)?;
        let seen = keys.iter().map(|&key| (key, get(&mut connection, key))).collect();
        Ok(Held::boxed(Generations { connection, seen }, keys, source))
    }

    fn server(&self) -> Option<Pid> {
        Some(self.0.pid())
    }
}

struct Generations {
    connection: Connection,
    seen: Vec<(usize, u64)>,
}

impl Changes for Generations {
    #[inline]
    fn changed(&mut self, key: usize) -> bool {
        let (key, seen) = &mut self.seen[key];
        let generation = get(&mut self.connection, *key);
        std::mem::replace(seen, generation) != generation
    }

    fn announce(&mut self, key: usize, _value: u64) {
        increment(&mut self.connection, self.seen[key].0);
    }
}

struct Channel(Server);

impl Bell for Channel {
    fn listen(&self) -> Outcome<Box<dyn Listener>> {
        // For good, as the subscription borrows it.
        let mut subscription = Box::leak(Box::new(connect(&self.0)?)).as_pubsub();
        subscription.subscribe("bell")?;
        Ok(Box::new(Subscriber(subscription)))
    }

    fn ringer(&self) -> Outcome<Box<dyn FnMut() -> Outcome<()>>> {
        let mut connection = connect(&self.0)?;
        Ok(Box::new(move || {
            publish(&mut connection);
            Ok(())
        }))
    }
}

struct Subscriber(PubSub<'static>);

impl Listener for Subscriber {
    fn wait(&mut self) -> Outcome<()> {
        self.0.get_message()?;
        Ok(())
    }
}

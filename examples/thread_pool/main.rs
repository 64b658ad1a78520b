//! A blocking HTTP server: a pool of threads answers from a `CachedMap` of users and a `Cached` of settings, which are in an SQLite
//! database. Several such processes share the database and a table, and each shows at once what another one has changed.
//!
//! Each thread has a connection of its own, which a loader cannot own. So the caches are made without a loader, and each request
//! lends the connection of its thread: `users.get_with(&id, || store.user(id))`.
//!
//! ```text
//! $ cargo run --example thread_pool -- --table /dev/shm/users.gensync --database users.db --port 8080
//! listening on http://127.0.0.1:8080
//! $ cargo run --example thread_pool -- --table /dev/shm/users.gensync --database users.db --port 8081   # in another terminal
//! listening on http://127.0.0.1:8081
//! ```
//!
//! And in a third one:
//!
//! ```text
//! $ curl localhost:8081/users/1
//! there is no user 1
//! $ curl -X PUT -d Ada localhost:8080/users/1
//! $ curl localhost:8081/users/1
//! Hello, Ada!
//! $ curl -X PUT -d 'Good morning' localhost:8080/settings
//! $ curl localhost:8081/users/1
//! Good morning, Ada!
//! $ curl -X DELETE localhost:8080/users/1
//! $ curl localhost:8081/counters
//! {"settings":{"hits":1,"loads":2},"users":{"hits":1,"loads":2}}
//! ```
//!
//! A server with `--die-before-bump` kills itself between its first commit and the announcement. The others show what it has
//! changed nevertheless. SIGTERM and SIGINT end a server when its threads have answered the requests that they have begun.

mod store;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use gensync::{Cached, CachedMap, GenerationSynchronizer, Table};
use nix::sys::signal::{SigSet, Signal};
use serde_json::json;
use tiny_http::{Method, Request, Response, Server};

use store::{Settings, Store, User};

/// An HTTP server with a pool of threads that share a cache, which gensync keeps fresh.
#[derive(Parser)]
#[command(name = "thread_pool")]
struct Options {
    /// The gensync table, created if there is none
    #[arg(long)]
    table: PathBuf,
    /// The SQLite database, created if there is none
    #[arg(long)]
    database: PathBuf,
    /// The port of 127.0.0.1 to listen on; 0 for any that is free
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// How many threads answer requests
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: u16,
    /// Kills itself when it has committed a change, before it can announce it
    #[arg(long)]
    die_before_bump: bool,
}

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("thread_pool: {}", with_causes(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Outcome<()> {
    // Blocked in all threads, as they inherit it, the signals wait until this thread asks for them.
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block()?;

    let table = Table::open(&options.table)?;
    let service = Service {
        users: CachedMap::builder_without_loader(&table, |id: &i64| ["user", &id.to_string()].into()).build(),
        settings: Cached::without_loader(GenerationSynchronizer::new(&table, "settings")?),
    };
    let open = |_| Store::open(&options.database, options.die_before_bump);
    let stores = (0..options.threads).map(open).collect::<Result<Vec<_>, _>>();
    let stores = stores.map_err(|error| format!("the database {}: {error}", options.database.display()))?;
    let address = format!("127.0.0.1:{}", options.port);
    let server = Server::http(&address).map_err(|error| format!("cannot listen on {address}: {error}"))?;

    println!("listening on http://{}", server.server_addr());
    std::thread::scope(|scope| {
        for store in stores {
            scope.spawn(|| service.serve(&server, store));
        }
        let waited = signals.wait();
        (0..options.threads).for_each(|_| server.unblock()); // each ends the loop of one thread
        waited
    })?;
    Ok(())
}

/// What the threads share.
struct Service {
    /// `None` for users that do not exist, so that these are not asked for again and again either.
    users: CachedMap<i64, Option<User>>,
    settings: Cached<Settings>,
}

impl Service {
    /// What each thread does, with a connection of its own.
    fn serve(&self, server: &Server, store: Store) {
        for mut request in server.incoming_requests() {
            let (status, text) = self.answer(&store, &mut request).unwrap_or_else(|error| (500, with_causes(&*error)));
            // A client that has gone needs no answer.
            let _ = request.respond(Response::from_string(text + "\n").with_status_code(status));
        }
    }

    fn answer(&self, store: &Store, request: &mut Request) -> Outcome<(u16, String)> {
        let mut body = String::new();
        if let Err(error) = request.as_reader().read_to_string(&mut body) {
            return Ok((400, format!("the body is not a text: {error}")));
        }
        let id = request.url().strip_prefix("/users/").and_then(|id| id.parse::<i64>().ok());
        match (request.method(), request.url(), id) {
            (Method::Get, _, Some(id)) => {
                let settings = self.settings.get_with(|| store.settings())?;
                let user = self.users.get_with(&id, || store.user(id))?;
                return Ok(match &*user {
                    Some(user) => (200, format!("{}, {}!", settings.greeting, user.name)),
                    None => (404, format!("there is no user {id}")),
                });
            }
            // The server `prefork_server` shows what can be done about an update that could not be announced.
            (Method::Put, _, Some(id)) => self.users.update(&id, || store.save_user(id, &body))?,
            (Method::Delete, _, Some(id)) => self.users.update(&id, || store.delete_user(id))?,
            (Method::Put, "/settings", _) => self.settings.update(|| store.save_settings(&body))?,
            (Method::Get, "/counters", _) => {
                let (users, settings) = (self.users.counters(), self.settings.counters());
                let [users, settings] = [users, settings].map(|it| json!({ "hits": it.hits, "loads": it.reloads }));
                return Ok((200, json!({ "users": users, "settings": settings }).to_string()));
            }
            (method, url, _) => return Ok((404, format!("{method} {url} is not served here"))),
        }
        Ok((204, String::new()))
    }
}

/// An error with what caused it.
fn with_causes(error: &(dyn Error + 'static)) -> String {
    std::iter::successors(Some(error), |&error| error.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

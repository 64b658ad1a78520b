//! An HTTP server of tasks: axum on tokio answers from a `CachedMap` of users and a `Cached` of settings, which SQLx loads from an
//! SQLite database. Several such processes share the database and a table, and each shows at once what another one has changed.
//!
//! It serves what the example `thread_pool` serves, to which it can be a peer: both may share a table and a database.
//!
//! ```text
//! $ cargo run --package gensync-axum-sqlx --example axum_sqlx -- --table /dev/shm/users.gensync --database users.db --port 8080
//! listening on http://127.0.0.1:8080
//! ```
//!
//! And, with another one on port 8081:
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
//! changed nevertheless. SIGTERM and SIGINT end a server when it has answered the requests that it has begun.

mod service;
mod store;

use std::error::Error;
use std::future::IntoFuture as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use gensync::Table;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use service::Service;
use store::Store;

/// An HTTP server of tasks that share a cache, which gensync keeps fresh.
#[derive(Parser)]
#[command(name = "axum_sqlx")]
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
    /// How many threads the runtime has, and how many connections to the database
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: u16,
    /// Kills itself when it has committed a change, before it can announce it
    #[arg(long)]
    die_before_bump: bool,
}

type Outcome<T> = Result<T, Box<dyn Error>>;

/// How long a server that is to end waits for its connections.
const GRACE: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let options = Options::parse();
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(options.threads.into()).enable_all().build();
    match runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(run(&options))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("axum_sqlx: {}", with_causes(&*error));
            ExitCode::FAILURE
        }
    }
}

async fn run(options: &Options) -> Outcome<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let store = Store::open(&options.database, options.threads.into(), options.die_before_bump).await;
    let store = store.map_err(|error| format!("the database {}: {error}", options.database.display()))?;
    let table = Table::open(&options.table)?;
    let service = Service::new(&table, store.clone())?;
    let address = format!("127.0.0.1:{}", options.port);
    let listener = TcpListener::bind(&address).await.map_err(|error| format!("cannot listen on {address}: {error}"))?;
    println!("listening on http://{}", listener.local_addr()?);
    let (end, asked_to_end) = oneshot::channel::<()>();
    let server = axum::serve(listener, service.router()).with_graceful_shutdown(async { drop(asked_to_end.await) });
    let server = tokio::spawn(server.into_future());
    tokio::select! {
        _ = terminate.recv() => (),
        _ = interrupt.recv() => (),
    }
    drop(end);
    // No longer than this, as a client may keep a connection open.
    let ended = tokio::time::timeout(GRACE, server).await;
    store.close().await;
    if let Ok(ended) = ended {
        ended??;
    }
    Ok(())
}

/// An error with what caused it.
fn with_causes(error: &(dyn Error + 'static)) -> String {
    std::iter::successors(Some(error), |&error| error.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

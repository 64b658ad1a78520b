//! What a worker does: HTTP in front of a `Cached`.

use std::future::IntoFuture as _;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::middleware::map_response;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use gensync::{Cached, GenerationSynchronizer, Table, UpdateError};
use serde::Deserialize;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::Outcome;
use crate::store::{Settings, Store};

/// How long a worker that is to end waits for its connections.
const GRACE: Duration = Duration::from_secs(3);
const ANNOUNCE_TRIES: u32 = 100;
const ANNOUNCE_PAUSE: Duration = Duration::from_millis(10);

struct Worker {
    settings: Cached<Settings>,
    /// The connection for changes. The loader has a connection of its own: it runs on the thread that serves all requests,
    /// where it must not wait for a change that waits for another worker's. With WAL, readers never wait for writers.
    store: Store,
    die_before_bump: bool,
}

/// Serves until a signal asks it to end. To be called in the forked child: the runtime, the connections and the `Cached`
/// are the worker's own.
pub(crate) fn serve(listener: &TcpListener, database: &Path, table: &Table, die_before_bump: bool) -> Outcome<()> {
    let reader = Store::open(database)?;
    let synchronizer = GenerationSynchronizer::new(table, "settings")?;
    let settings = Cached::new(synchronizer, move || reader.load());
    let worker = Arc::new(Worker { settings, store: Store::open(database)?, die_before_bump });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(run(listener.try_clone()?, worker))
}

async fn run(listener: TcpListener, worker: Arc<Worker>) -> Outcome<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (ending, has_begun_to_end) = oneshot::channel();
    let asked_to_end = async move {
        tokio::select! {
            _ = terminate.recv() => (),
            _ = interrupt.recv() => (),
        }
        let _ = ending.send(());
    };
    let too_long = async move {
        let _ = has_begun_to_end.await;
        tokio::time::sleep(GRACE).await;
    };
    let router = Router::new()
        .route("/settings", get(get_settings).put(put_settings))
        .route("/healthz", get(healthz))
        .layer(map_response(name_worker))
        .with_state(worker);
    let server = axum::serve(tokio::net::TcpListener::from_std(listener)?, router).with_graceful_shutdown(asked_to_end);
    tokio::select! {
        result = server.into_future() => result?,
        // A client keeps a connection open.
        () = too_long => (),
    }
    Ok(())
}

/// Answers from memory, which takes so little time that it runs on this thread. A load, which reads one row, is rare.
async fn get_settings(State(worker): State<Arc<Worker>>) -> Response {
    match worker.settings.snapshot() {
        Ok(snapshot) => {
            let generation = snapshot.generation.map_or(0, |generation| generation.get());
            ([("x-generation", generation.to_string())], Json(&*snapshot.value)).into_response()
        }
        Err(error) => failed(StatusCode::INTERNAL_SERVER_ERROR, &error),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    greeting: String,
}

/// Waits for other writers, in a thread that may wait.
async fn put_settings(State(worker): State<Arc<Worker>>, Json(change): Json<Change>) -> Response {
    tokio::task::spawn_blocking(move || worker.change(change))
        .await
        .unwrap_or_else(|error| failed(StatusCode::INTERNAL_SERVER_ERROR, &error))
}

impl Worker {
    fn change(&self, change: Change) -> Response {
        let changed = self.settings.update(|| {
            let settings = self.store.save(change.greeting)?;
            if self.die_before_bump {
                std::process::abort();
            }
            Ok::<_, rusqlite::Error>(settings)
        });
        match changed {
            Ok(settings) => Json(settings).into_response(),
            // Nothing was changed, and another attempt may succeed.
            Err(error @ UpdateError::Begin(_)) => failed(StatusCode::SERVICE_UNAVAILABLE, &error),
            Err(error @ UpdateError::Announce { .. }) => {
                self.announce();
                // It is not known here whether anything was saved. The next request shows it.
                failed(StatusCode::INTERNAL_SERVER_ERROR, &error)
            }
            Err(error) => failed(StatusCode::INTERNAL_SERVER_ERROR, &error),
        }
    }

    /// Makes up for an announcement that failed. If this fails too, the others find out by being restarted.
    fn announce(&self) {
        for _ in 0..ANNOUNCE_TRIES {
            match self.settings.synchronizer().mark_updated() {
                Ok(_) => return,
                Err(_) => std::thread::sleep(ANNOUNCE_PAUSE),
            }
        }
        eprintln!("worker {}: a change is not announced: restart the server", std::process::id());
    }
}

async fn healthz(State(worker): State<Arc<Worker>>) -> Response {
    let counters = worker.settings.counters();
    Json(json!({
        "worker": std::process::id(),
        "generation": worker.settings.synchronizer().ticket().generation().map(|generation| generation.get()),
        "counters": {
            "hits": counters.hits,
            "reloads": counters.reloads,
            "errors": counters.errors,
            "stale_answers": counters.stale_answers,
            "overtaken": counters.overtaken,
            "longest_load_us": counters.longest_load.as_micros() as u64,
        },
    }))
    .into_response()
}

async fn name_worker(mut response: Response) -> Response {
    response.headers_mut().insert("x-worker", std::process::id().into());
    response
}

fn failed(status: StatusCode, error: &dyn std::error::Error) -> Response {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    (status, text + "\n").into_response()
}

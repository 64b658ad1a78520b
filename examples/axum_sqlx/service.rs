//! What the server answers, from its caches.

use std::error::Error;
use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use axum::{Json, Router};
use gensync::future::{Cached, CachedMap};
use gensync::{GenerationSynchronizer, Table};
use serde_json::{Value, json};

use crate::store::{Settings, Store, User};
use crate::with_causes;

/// What the requests share.
pub(crate) struct Service {
    store: Store,
    /// `None` for users that do not exist, so that these are not asked for again and again either.
    users: CachedMap<i64, Option<User>>,
    settings: Cached<Settings>,
}

type Shared = State<Arc<Service>>;

impl Service {
    pub(crate) fn new(table: &Table, store: Store) -> Result<Self, gensync::Error> {
        let users = CachedMap::builder(table, |id: &i64| ["user", &id.to_string()].into(), {
            // The future of a stored loader borrows nothing. A clone of the store is one more reference to the same pool.
            let store = store.clone();
            move |id| {
                let store = store.clone();
                async move { store.user(id).await }
            }
        })
        .build();
        let settings = Cached::without_loader(GenerationSynchronizer::new(table, "settings")?);
        Ok(Self { store, users, settings })
    }

    pub(crate) fn router(self) -> Router {
        Router::new()
            .route("/users/{id}", get(show_user).put(save_user).delete(delete_user))
            .route("/settings", put(save_settings))
            .route("/counters", get(show_counters))
            .with_state(Arc::new(self))
    }
}

async fn show_user(State(service): Shared, Path(id): Path<i64>) -> Result<(StatusCode, String), Failure> {
    // A loader that is given at the call may borrow.
    let settings = service.settings.get_with(async || service.store.settings().await).await?;
    Ok(match &*service.users.get(&id).await? {
        Some(user) => (StatusCode::OK, format!("{}, {}!\n", settings.greeting, user.name)),
        None => (StatusCode::NOT_FOUND, format!("there is no user {id}\n")),
    })
}

async fn save_user(State(service): Shared, Path(id): Path<i64>, name: String) -> Result<StatusCode, Failure> {
    to_the_end(async move { service.users.update(&id, async || service.store.save_user(id, &name).await).await }).await
}

async fn delete_user(State(service): Shared, Path(id): Path<i64>) -> Result<StatusCode, Failure> {
    to_the_end(async move { service.users.update(&id, async || service.store.delete_user(id).await).await }).await
}

async fn save_settings(State(service): Shared, greeting: String) -> Result<StatusCode, Failure> {
    to_the_end(async move { service.settings.update(async || service.store.save_settings(&greeting).await).await })
        .await
}

/// Runs an update in a task of its own. If the client goes away, the future of its request is dropped. An update in it would be
/// announced then, but the statement that SQLite has begun goes on, and would be committed after the announcement.
///
/// The server `prefork_server` shows what can be done about an update that could not be announced.
async fn to_the_end<E>(update: impl Future<Output = Result<(), E>> + Send + 'static) -> Result<StatusCode, Failure>
where
    E: Error + Send + 'static,
{
    tokio::spawn(update).await??;
    Ok(StatusCode::NO_CONTENT)
}

async fn show_counters(State(service): Shared) -> Json<Value> {
    let (users, settings) = (service.users.counters(), service.settings.counters());
    let [users, settings] = [users, settings].map(|it| json!({ "hits": it.hits, "loads": it.reloads }));
    Json(json!({ "users": users, "settings": settings }))
}

/// Any error, as an answer.
struct Failure(Box<dyn Error>);

impl<E: Error + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (StatusCode::INTERNAL_SERVER_ERROR, with_causes(&*self.0) + "\n").into_response()
    }
}

//! Guards against stale answers of servers that share a table and a database, each with a cache of users and settings of its own;
//! against keys that a server loads more than once; and against servers that do not end, or do not say what is wrong.
//!
//! The examples `thread_pool` and `axum_sqlx` serve the same, one with threads and one with tasks, so that both are tested by this.

#[path = "../../support/mod.rs"]
mod support;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use support::{NOTICED, client, eventually, program};
use ureq::Agent;

const EXAMPLE: &str = env!("CARGO_CRATE_NAME");

/// What servers share.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn table(&self) -> PathBuf {
        self.0.path().join("table.gensync")
    }

    fn database(&self) -> PathBuf {
        self.0.path().join("users.db")
    }

    fn command(&self, example: &'static str, options: &[&str]) -> Command {
        let mut command = Command::new(program(example));
        command.arg("--table").arg(self.table()).arg("--database").arg(self.database()).args(options);
        command
    }

    fn start(&self, options: &[&str]) -> Server {
        self.start_example(EXAMPLE, options)
    }

    fn start_example(&self, example: &'static str, options: &[&str]) -> Server {
        let mut process = self.command(example, options).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim_end().strip_prefix("listening on http://").unwrap_or_default().to_owned();
        let server = Server { process, address, client: client() };
        assert!(!server.address.is_empty(), "the server did not start");
        server
    }
}

/// The example, running; killed if the test ends before it does.
struct Server {
    process: Child,
    address: String,
    client: Agent,
}

impl Server {
    fn request(&self, client: &Agent, method: &str, path: &str, body: &str) -> Result<(u16, String), ureq::Error> {
        let request = ureq::http::Request::builder().method(method).uri(format!("http://{}{path}", self.address));
        let mut response = client.run(request.body(body).unwrap())?;
        let text = response.body_mut().read_to_string()?;
        Ok((response.status().as_u16(), text.trim_end().to_owned()))
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        self.request(&self.client, method, path, body).unwrap()
    }

    fn change(&self, method: &str, path: &str, body: &str) {
        assert_eq!(self.ask(method, path, body), (204, String::new()), "{method} {path} {body:?}");
    }

    /// The name of a user who exists, without the greeting.
    fn name(&self, client: &Agent, id: u64) -> String {
        let (status, text) = self.request(client, "GET", &format!("/users/{id}"), "").unwrap();
        assert_eq!(status, 200, "{text}");
        text.strip_prefix("Hello, ").and_then(|name| name.strip_suffix('!')).expect("a greeting").to_owned()
    }

    /// How often users and settings were loaded.
    fn loads(&self) -> Value {
        let counters: Value = serde_json::from_str(&self.ask("GET", "/counters", "").1).unwrap();
        json!([counters["users"]["loads"], counters["settings"]["loads"]])
    }

    fn await_end(&mut self) -> ExitStatus {
        eventually("the server does not end", || self.process.try_wait().unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn ok(text: &str) -> (u16, String) {
    (200, text.to_owned())
}

fn absent(id: u64) -> (u16, String) {
    (404, format!("there is no user {id}"))
}

#[test]
fn a_change_at_one_server_is_seen_at_the_next_request_to_another() {
    let place = Place::new();
    // Whether they run threads or tasks.
    let servers = [place.start(&[]), place.start(&[]), place.start_example("thread_pool", &[])];
    let all_show = |path: &str, expected: (u16, String)| {
        servers.iter().for_each(|server| assert_eq!(server.ask("GET", path, ""), expected));
    };
    all_show("/users/7", absent(7));
    for (round, server) in servers.iter().cycle().take(50).enumerate() {
        server.change("PUT", "/users/7", &format!("Ada {round}"));
        all_show("/users/7", ok(&format!("Hello, Ada {round}!")));
    }
    servers[0].change("PUT", "/settings", "Good morning");
    all_show("/users/7", ok("Good morning, Ada 49!"));
    servers[1].change("DELETE", "/users/7", "");
    all_show("/users/7", absent(7));
    all_show("/users/8", absent(8));
    // One user's change is not another one's.
    servers[2].change("PUT", "/users/8", "\u{1F600} \" ' \\ ;");
    all_show("/users/7", absent(7));
    all_show("/users/8", ok("Good morning, \u{1F600} \" ' \\ ;!"));
}

#[test]
fn each_server_loads_a_key_once_however_many_ask_for_it() {
    const USERS: u64 = 40;
    const CLIENTS: usize = 8;
    let place = Place::new();
    let servers = [place.start(&["--threads", "8"]), place.start(&["--threads", "8"])];
    // Every other one exists.
    (0..USERS).step_by(2).for_each(|id| servers[0].change("PUT", &format!("/users/{id}"), &id.to_string()));
    for server in &servers {
        scope(|scope| {
            for _ in 0..CLIENTS {
                scope.spawn(|| {
                    let client = client();
                    for id in (0..USERS).chain(0..USERS) {
                        let answer = server.request(&client, "GET", &format!("/users/{id}"), "").unwrap();
                        assert_eq!(answer, if id % 2 == 0 { ok(&format!("Hello, {id}!")) } else { absent(id) });
                    }
                });
            }
        });
        assert_eq!(server.loads(), json!([USERS, 1]));
    }
    servers[0].change("PUT", "/users/1", "1");
    for server in &servers {
        (0..USERS).for_each(|id| _ = server.ask("GET", &format!("/users/{id}"), ""));
        assert_eq!(server.loads(), json!([USERS + 1, 1]), "a change of one user");
    }
    servers[1].change("PUT", "/settings", "Good morning");
    for server in &servers {
        (0..USERS).for_each(|id| _ = server.ask("GET", &format!("/users/{id}"), ""));
        assert_eq!(server.loads(), json!([USERS + 1, 2]), "a change of the settings");
    }
}

#[test]
fn a_change_is_seen_although_its_maker_was_killed_before_the_announcement() {
    let place = Place::new();
    let survivor = place.start(&[]);
    survivor.change("PUT", "/users/1", "Ada");
    let changes = [
        ("PUT", "/users/1", "Grace", ok("Hello, Grace!")),
        ("PUT", "/settings", "Good morning", ok("Good morning, Grace!")),
        ("DELETE", "/users/1", "", absent(1)),
    ];
    let mut before = ok("Hello, Ada!");
    for (method, path, body, after) in changes {
        let mut maker = place.start(&["--die-before-bump"]);
        for server in [&survivor, &maker] {
            assert_eq!(server.ask("GET", "/users/1", ""), before);
        }
        let loads = survivor.loads();
        maker.request(&maker.client, method, path, body).expect_err("the server should have died");
        assert_eq!(maker.await_end().signal(), Some(Signal::SIGKILL as i32));
        sleep(NOTICED);
        assert_eq!(survivor.ask("GET", "/users/1", ""), after);
        assert_ne!(survivor.loads(), loads);
        before = after;
    }
}

#[test]
fn a_change_is_seen_although_its_client_has_gone() {
    // More than a server needs that gives the update up with the request, and announces it before it is committed.
    const GIVEN_UP: Duration = Duration::from_millis(200);
    let place = Place::new();
    let servers = [place.start(&[]), place.start(&[])];
    servers[0].change("PUT", "/users/1", "Ada");
    let all_show = |name: &str| servers.iter().for_each(|server| assert_eq!(server.name(&server.client, 1), name));
    all_show("Ada");

    // Another program's transaction delays the change.
    let database = rusqlite::Connection::open(place.database()).unwrap();
    database.execute_batch("BEGIN IMMEDIATE").unwrap();
    let table = gensync::Table::open(place.table()).unwrap();
    let is_pending = || table.slot(["user", "1"]).unwrap().expect("a key in use").pending() > 0;
    let mut client = TcpStream::connect(&servers[0].address).unwrap();
    write!(client, "PUT /users/1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nGrace").unwrap();
    eventually("no update begins", || is_pending().then_some(()));
    drop(client);
    let end = Instant::now() + GIVEN_UP;
    while is_pending() && Instant::now() < end {
        sleep(Duration::from_millis(1));
    }
    all_show("Ada");
    database.execute_batch("ROLLBACK").unwrap();
    eventually("the change is not made", || {
        let name = database.query_row("SELECT name FROM users WHERE id = 1", [], |row| row.get::<_, String>(0));
        (name.unwrap() == "Grace").then_some(())
    });
    eventually("the update does not end", || (!is_pending()).then_some(()));
    all_show("Grace");
}

/// Ends the other threads when one of them ends, or fails.
///
/// ORDERING: SeqCst, for simplicity. The store pairs with the loads in the loops of the other threads; the flag is the whole
/// message.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

#[test]
fn no_answer_is_older_than_a_change_that_was_answered() {
    const USERS: usize = 3;
    const CHANGES: u64 = 200;
    let place = Place::new();
    let servers = [place.start(&["--threads", "1"]), place.start(&[])];
    // The newest number of each user that a `PUT` was answered with.
    //
    // ORDERING: SeqCst, for simplicity. The load before a `GET` pairs with the store after a `PUT` was answered: what it returns was
    // answered before the `GET` began.
    let completed = [const { AtomicU64::new(0) }; USERS];
    (0..USERS).for_each(|id| servers[0].change("PUT", &format!("/users/{id}"), "0"));
    let stop = AtomicBool::new(false);
    let gets = AtomicU64::new(0);
    scope(|scope| {
        for server in &servers {
            for _ in 0..2 {
                scope.spawn(|| {
                    let (_stop, client) = (Stop(&stop), client());
                    for id in (0..USERS).cycle().take_while(|_| !stop.load(SeqCst)) {
                        let newest = completed[id].load(SeqCst);
                        let shown: u64 = server.name(&client, id as u64).parse().unwrap();
                        assert!(shown >= newest, "user {id} is shown as of {shown} after {newest}");
                        gets.fetch_add(1, SeqCst);
                    }
                });
            }
        }
        let writers: Vec<_> = (0..USERS)
            .map(|id| {
                let (servers, completed, stop) = (&servers, &completed, &stop);
                scope.spawn(move || {
                    let clients = [client(), client()];
                    for (number, index) in (1..=CHANGES).zip([0, 1].into_iter().cycle()) {
                        if stop.load(SeqCst) {
                            break;
                        }
                        let (path, body) = (format!("/users/{id}"), number.to_string());
                        let answer = servers[index].request(&clients[index], "PUT", &path, &body).unwrap();
                        assert_eq!(answer.0, 204, "{answer:?}");
                        completed[id].store(number, SeqCst);
                    }
                })
            })
            .collect();
        let _stop = Stop(&stop);
        writers.into_iter().for_each(|writer| writer.join().unwrap());
    });
    assert!(completed.into_iter().all(|newest| newest.into_inner() == CHANGES));
    assert!(gets.into_inner() > 0);
}

#[test]
fn sigterm_and_sigint_end_it_and_the_next_server_goes_on() {
    let place = Place::new();
    for (round, signal) in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGTERM].into_iter().enumerate() {
        let mut server = place.start(&["--threads", "2"]);
        if round > 0 {
            assert_eq!(server.ask("GET", "/users/1", ""), ok(&format!("Hello, {}!", round - 1)));
        }
        server.change("PUT", "/users/1", &round.to_string());
        // One that says nothing, beside the client's idle connection.
        let silent = TcpStream::connect(&server.address).unwrap();
        kill(Pid::from_raw(server.process.id() as i32), signal).unwrap();
        assert_eq!(server.await_end().code(), Some(0), "{signal}");
        drop(silent);
        let mut left: Vec<_> =
            std::fs::read_dir(place.0.path()).unwrap().map(|file| file.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(
            left,
            ["table.gensync", "users.db"],
            "{signal}: not a journal, which a server that was killed leaves"
        );
    }
}

#[test]
fn a_failing_database_and_bad_requests_are_reported_and_change_nothing() {
    let place = Place::new();
    let server = place.start(&[]);
    server.change("PUT", "/users/1", "Ada");
    for (method, path) in
        [("GET", "/"), ("GET", "/users/one"), ("DELETE", "/users/1/2"), ("POST", "/users/1"), ("PUT", "/")]
    {
        let answer = server.ask(method, path, "");
        assert!((400..500).contains(&answer.0), "{method} {path}: {answer:?}");
    }
    let bytes = ureq::http::Request::put(format!("http://{}/users/1", server.address)).body(&b"\xFF"[..]).unwrap();
    assert_eq!(server.client.run(bytes).unwrap().status(), 400);
    assert_eq!(server.ask("GET", "/users/1", ""), ok("Hello, Ada!"));

    let database = rusqlite::Connection::open(place.database()).unwrap();
    database.execute_batch("ALTER TABLE users RENAME TO elsewhere").unwrap();
    for (method, path) in [("PUT", "/users/1"), ("GET", "/users/1"), ("GET", "/users/2")] {
        let (status, text) = server.ask(method, path, "Grace");
        assert_eq!(status, 500, "{method} {path}: {text}");
        assert!(text.contains("no such table"), "{text}");
    }
    database.execute_batch("ALTER TABLE elsewhere RENAME TO users").unwrap();
    assert_eq!(server.ask("GET", "/users/1", ""), ok("Hello, Ada!"));
    assert_eq!(server.ask("GET", "/users/2", ""), absent(2));
}

#[test]
fn what_keeps_it_from_starting_is_said() {
    let place = Place::new();
    let fails = |command: &mut Command, status: i32, expected: &[&str]| {
        let mut process = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let ended = eventually("the server runs", || process.try_wait().unwrap());
        let mut text = String::new();
        process.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(ended.code(), Some(status), "{text}");
        expected.iter().for_each(|expected| assert!(text.contains(expected), "{expected:?} is not in {text:?}"));
    };
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    fails(&mut place.command(EXAMPLE, &["--port", &port]), 1, &[EXAMPLE, &format!("127.0.0.1:{port}"), "in use"]);
    fails(&mut place.command(EXAMPLE, &["--threads", "0"]), 2, &["--threads"]);
    let options = |table: &str, database: &str| {
        let mut command = Command::new(program(EXAMPLE));
        command.arg("--table").arg(place.0.path().join(table)).arg("--database").arg(place.0.path().join(database));
        command
    };
    fails(&mut options("nowhere/table", "users.db"), 1, &["nowhere/table", "no such folder"]);
    fails(&mut options("table", "nowhere/users.db"), 1, &["nowhere/users.db", "unable to open"]);
    fails(&mut Command::new(program(EXAMPLE)), 2, &["--table", "--database"]);
}

//! Guards against stale answers of the `prefork_server` example: over HTTP, from several workers, which are killed; and
//! against a server that does not end, or leaves something behind.

#[path = "../../support/mod.rs"]
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::SeqCst};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use support::{LIMIT, NOTICED, client, eventually, program};
use ureq::Agent;
use ureq::http::StatusCode;

const WORKERS: usize = 4;

/// The example, running; killed if the test ends before it does.
struct Server {
    process: Child,
    address: String,
    /// Where it makes its temporary folder.
    folder: tempfile::TempDir,
}

impl Server {
    fn start(options: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut process = Command::new(program("prefork_server"))
            .env("TMPDIR", folder.path())
            .args(["--workers", &WORKERS.to_string()])
            .args(options)
            .stdout(Stdio::piped())
            .stderr(Stdio::null()) // It reports workers that ended.
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim_end().strip_prefix("listening on http://").unwrap_or_default().to_owned();
        let server = Self { process, address, folder };
        assert!(!server.address.is_empty(), "the server did not start");
        server
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.process.id() as i32)
    }

    fn workers(&self) -> Vec<Pid> {
        let pid = self.pid();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        children.split_whitespace().map(|worker| Pid::from_raw(worker.parse().unwrap())).collect()
    }

    fn request(&self, client: &Agent, method: &str, path: &str, body: &str) -> Result<Answer, ureq::Error> {
        let request = ureq::http::Request::builder().method(method).uri(format!("http://{}{path}", self.address));
        let mut response = client.run(request.header("content-type", "application/json").body(body).unwrap())?;
        let text = response.body_mut().read_to_string()?;
        let worker = response.headers()["x-worker"].to_str().unwrap().parse().unwrap();
        let generation = response.headers().get("x-generation").map(|number| number.to_str().unwrap().parse().unwrap());
        Ok(Answer { status: response.status(), worker, generation, text })
    }

    fn get(&self, client: &Agent) -> Result<Answer, ureq::Error> {
        self.request(client, "GET", "/settings", "")
    }

    fn put(&self, client: &Agent, greeting: &str) -> Result<Answer, ureq::Error> {
        self.request(client, "PUT", "/settings", &json!({ "greeting": greeting }).to_string())
    }

    /// A client for each worker, with a connection to it, and what it got there.
    fn client_of_each(&self) -> BTreeMap<u32, (Agent, Answer)> {
        let end = Instant::now() + LIMIT;
        let mut clients = BTreeMap::new();
        while clients.len() < WORKERS {
            assert!(Instant::now() < end, "only {:?} answer", clients.keys());
            let client = client();
            let answer = self.get(&client).unwrap();
            clients.entry(answer.worker).or_insert((client, answer));
        }
        clients
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The workers end when their parent does.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[derive(Debug)]
struct Answer {
    status: StatusCode,
    worker: u32,
    generation: Option<u64>,
    text: String,
}

impl Answer {
    fn version(&self) -> i64 {
        assert_eq!(self.status, StatusCode::OK, "{self:?}");
        let settings: Value = serde_json::from_str(&self.text).unwrap();
        settings["version"].as_i64().unwrap()
    }
}

/// What the clients know of the server: the newest version that a `PUT` was answered with.
///
/// ORDERING: SeqCst, for simplicity. The load of `completed` before a `GET` pairs with the `fetch_max` after a `PUT` was
/// answered: what the load returns was answered before the `GET` began. `lost` is only counted.
struct Oracle<'a> {
    server: &'a Server,
    completed: AtomicI64,
    lost: AtomicU64,
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

impl<'a> Oracle<'a> {
    fn new(server: &'a Server) -> Self {
        Self { server, completed: AtomicI64::new(1), lost: AtomicU64::new(0) }
    }

    /// Gets, over a new connection, until it is answered.
    fn get(&self) -> u32 {
        loop {
            let newest = self.completed.load(SeqCst);
            match self.server.get(&client()) {
                Ok(answer) => {
                    let version = answer.version();
                    assert!(version >= newest, "worker {} shows {version} after {newest}", answer.worker);
                    return answer.worker;
                }
                Err(_) => self.lost.fetch_add(1, SeqCst),
            };
        }
    }

    /// Puts, over a new connection. One that is lost is not put again: it may have been saved.
    fn put(&self) -> Option<(u32, i64)> {
        let Ok(answer) = self.server.put(&client(), "Good morning") else {
            self.lost.fetch_add(1, SeqCst);
            return None;
        };
        let version = answer.version();
        self.completed.fetch_max(version, SeqCst);
        Some((answer.worker, version))
    }
}

#[test]
fn no_worker_shows_an_old_value_after_a_put_was_answered() {
    const READERS: usize = 4;
    const WRITERS: usize = 2;
    const GETS: usize = 1000;
    let server = Server::start(&[]);
    let oracle = Oracle::new(&server);
    let stop = AtomicBool::new(false);
    let (readers, writers) = scope(|scope| {
        let writers = [(); WRITERS].map(|()| {
            scope.spawn(|| {
                let _stop = Stop(&stop);
                let mut puts = Vec::new();
                while !stop.load(SeqCst) {
                    puts.push(oracle.put().expect("a lost connection"));
                }
                puts
            })
        });
        let readers = [(); READERS].map(|()| {
            scope.spawn(|| {
                let _stop = Stop(&stop);
                (0..GETS).map(|_| oracle.get()).collect::<BTreeSet<_>>()
            })
        });
        let readers = readers.map(|reader| reader.join().unwrap());
        (readers, writers.map(|writer| writer.join().unwrap()))
    });
    assert_eq!(oracle.lost.into_inner(), 0);
    assert_eq!(readers.into_iter().flatten().collect::<BTreeSet<_>>().len(), WORKERS, "not all workers were asked");
    let puts = writers.concat();
    assert_eq!(puts.iter().map(|put| put.0).collect::<BTreeSet<_>>().len(), WORKERS, "not all workers were changed");
    let versions: BTreeSet<_> = puts.iter().map(|put| put.1).collect();
    assert!(versions.into_iter().eq(2..=puts.len() as i64 + 1), "a change was lost");
}

#[test]
fn a_change_is_seen_although_its_maker_died_before_the_announcement() {
    let server = Server::start(&["--die-before-bump"]);
    let mut dead = BTreeSet::new();
    for version in 1..=10 {
        let clients = server.client_of_each();
        assert!(clients.values().all(|(_, answer)| answer.version() == version), "{clients:?}");
        assert!(clients.keys().all(|worker| !dead.contains(worker)), "{dead:?} are dead: {clients:?}");

        server.put(&client(), "Good morning").expect_err("the worker should have died");
        let maker = eventually("no worker has ended", || clients.keys().copied().find(|worker| has_ended(*worker)));
        dead.insert(maker);
        sleep(NOTICED);
        for (worker, (client, _)) in clients.iter().filter(|client| *client.0 != maker) {
            let answer = server.get(client).unwrap();
            assert_eq!((answer.worker, answer.version()), (*worker, version + 1));
            assert!(answer.generation > clients[worker].1.generation, "{answer:?}");
        }
    }
}

/// Whether the process is gone, or as good as gone: its files are closed.
fn has_ended(pid: u32) -> bool {
    // After the name, which is in parentheses, comes the state.
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .map_or(true, |stat| stat.rsplit(')').next().unwrap().trim_start().starts_with(['Z', 'X']))
}

fn await_end(pid: u32) {
    eventually("a worker that was killed lives", || has_ended(pid).then_some(()));
}

#[test]
fn no_answer_is_stale_while_workers_are_killed() {
    const KILLS: u32 = 40;
    let server = Server::start(&[]);
    let oracle = Oracle::new(&server);
    let stop = AtomicBool::new(false);
    let (gets, puts) = (AtomicU64::new(0), AtomicU64::new(0));
    let killed = scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let _stop = Stop(&stop);
                while !stop.load(SeqCst) {
                    oracle.get();
                    gets.fetch_add(1, SeqCst);
                }
            });
        }
        for _ in 0..2 {
            scope.spawn(|| {
                let _stop = Stop(&stop);
                while !stop.load(SeqCst) {
                    puts.fetch_add(u64::from(oracle.put().is_some()), SeqCst);
                }
            });
        }
        let _stop = Stop(&stop);
        let mut random = std::process::id() as usize;
        let mut killed = BTreeSet::new();
        for _ in 0..KILLS {
            sleep(Duration::from_millis(40));
            let workers = server.workers();
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            if !workers.is_empty() {
                let worker = workers[(random >> 33) % workers.len()];
                kill(worker, Signal::SIGKILL).unwrap();
                killed.insert(worker.as_raw() as u32);
            }
        }
        killed
    });
    killed.into_iter().for_each(await_end);
    sleep(NOTICED);
    // Also what was saved by one that could not answer any more.
    let clients = server.client_of_each();
    let versions: BTreeSet<_> = clients.values().map(|(_, answer)| answer.version()).collect();
    assert!(versions.len() == 1 && versions.first() >= Some(&oracle.completed.load(SeqCst)), "{clients:?}");
    let (gets, puts, lost) = (gets.into_inner(), puts.into_inner(), oracle.lost.into_inner());
    assert!(gets > 0 && puts > 0 && lost > 0, "{gets} gets, {puts} puts, {lost} connections lost");
}

fn ends_cleanly(signal: Signal) {
    let mut server = Server::start(&[]);
    let mut clients = server.client_of_each();
    assert_eq!(server.put(&client(), "Good morning").unwrap().version(), 2);
    let workers = server.workers();
    assert_eq!(workers.len(), WORKERS);
    // One that says nothing, beside the clients' idle connections.
    let silent = TcpStream::connect(&server.address).unwrap();
    kill(server.pid(), signal).unwrap();
    let status = eventually("the server does not end", || server.process.try_wait().unwrap());
    assert_eq!(status.code(), Some(0));
    for worker in workers {
        assert!(kill(worker, None).is_err(), "{worker} lives");
    }
    assert_eq!(std::fs::read_dir(server.folder.path()).unwrap().count(), 0, "something is left");
    drop((clients.pop_first(), silent));
}

#[test]
fn sigterm_ends_it_and_leaves_nothing() {
    ends_cleanly(Signal::SIGTERM);
}

#[test]
fn sigint_ends_it_and_leaves_nothing() {
    ends_cleanly(Signal::SIGINT);
}

#[test]
fn bad_input_changes_nothing_and_a_failing_database_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("settings.db");
    let server = Server::start(&["--database", path.to_str().unwrap()]);
    let client = client();
    let ask = |method, path, body| server.request(&client, method, path, body).unwrap();
    for body in ["", "{", "[]", "{}", r#"{"greeting": 1}"#, r#"{"greeting": "", "version": 7}"#, "\0"] {
        assert!(ask("PUT", "/settings", body).status.is_client_error(), "{body}");
    }
    assert_eq!(ask("POST", "/settings", r#"{"greeting": ""}"#).status, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(ask("GET", "/elsewhere", "").status, StatusCode::NOT_FOUND);
    let answer = ask("GET", "/settings", "");
    assert_eq!(answer.text, r#"{"version":1,"greeting":"Hello"}"#);
    let health: Value = serde_json::from_str(&ask("GET", "/healthz", "").text).unwrap();
    assert_eq!(health["worker"], answer.worker);
    assert!(health["generation"].is_u64() && health["counters"]["reloads"] == 1, "{health}");

    let database = rusqlite::Connection::open(&path).unwrap();
    database.execute_batch("ALTER TABLE settings RENAME TO elsewhere").unwrap();
    for answer in [server.put(&client, "Good morning"), server.get(&client)] {
        let answer = answer.unwrap();
        assert_eq!(answer.status, StatusCode::INTERNAL_SERVER_ERROR);
        assert!(answer.text.contains("no such table"), "{answer:?}");
    }
    database.execute_batch("ALTER TABLE elsewhere RENAME TO settings").unwrap();
    assert_eq!(server.get(&client).unwrap().version(), 1);
    let odd = "\u{1F600} \" ' \\ \n";
    assert_eq!(server.put(&client, odd).unwrap().version(), 2);
    let settings: Value = serde_json::from_str(&server.get(&client).unwrap().text).unwrap();
    assert_eq!(settings, json!({ "version": 2, "greeting": odd }));
}

//! iceoryx2: its blackboard, a set of values in shared memory, and its events.

use std::fs;
use std::hint::black_box;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering::*};

use iceoryx2::port::reader::{BlackboardValue, EntryHandle};
use iceoryx2::port::writer::EntryHandleMut;
use iceoryx2::prelude::{
    Config, FileName, LogLevel, Node, NodeBuilder, Path as IceoryxPath, SemanticString as _, ServiceName,
    SignalHandlingMode, ipc, set_log_level,
};
use iceoryx2::service::port_factory::blackboard::PortFactory;
use iceoryx2::service::port_factory::event::PortFactory as EventFactory;

use crate::Outcome;
use crate::peer::{About, Bell, Changes, Held, Kind, Listener, Operation, Peer, Role, Session, Site, Source};

pub(crate) struct Iceoryx2;

impl Iceoryx2 {
    pub(crate) fn new() -> Self {
        set_log_level(LogLevel::Fatal);
        Self
    }
}

impl Drop for Iceoryx2 {
    /// It leaves a file for each prefix.
    fn drop(&mut self) {
        files(&format!("{PREFIX}{}_", std::process::id())).for_each(|file| {
            // It may be gone by itself.
            let _ = fs::remove_file(file.path());
        });
    }
}

/// What is in shared memory under names that begin like this.
fn files(prefix: &str) -> impl Iterator<Item = fs::DirEntry> {
    let entries = fs::read_dir("/dev/shm").into_iter().flatten().flatten();
    entries.filter(move |entry| entry.file_name().to_string_lossy().starts_with(prefix))
}

/// More processes than any measure forks.
const NODES: usize = 128;

impl Peer for Iceoryx2 {
    fn about(&self) -> About {
        About {
            name: "iceoryx2",
            several_writers: "no: one writer",
            keys_at_run_time: "no: given at creation",
            writer_killed: "partly: if the value itself is kept there, readers have the old or the new one; but once its writer was killed, no process can write a key until the blackboard is new",
            file_replaced: "no",
            without_server: "yes",
            across_processes: "yes",
        }
    }

    fn operations(&self, folder: &Path) -> Outcome<Vec<Operation>> {
        let (node, board) = create(&config(folder)?, 2)?;
        let (reader, writer) = (board.reader_builder().create()?, board.writer_builder().create()?);
        let entry = || reader.entry::<u64>(&0);
        let (checked, read, copied) = (entry()?, entry()?, entry()?);
        let (value, copy) = (checked.get(), copied.get());
        let written = writer.entry::<u64>(&1)?;
        let mut number = 0;
        // The service lives as long as its node, and that as long as the last of these.
        let (node, board) = (Rc::new(node), Rc::new(board));
        let (node_2, board_2, node_3, board_3) = (node.clone(), board.clone(), node.clone(), board.clone());
        let (node_4, board_4) = (node.clone(), board.clone());
        Ok(vec![
            Operation::new("is_up_to_date", Kind::Check, move || {
                let _lives = (&node, &board);
                black_box(&checked).is_up_to_date(black_box(&value))
            }),
            Operation::new("get", Kind::Read, move || {
                let _lives = (&node_2, &board_2);
                *black_box(&read).get()
            }),
            Operation::new("is_up_to_date, the copy held", Kind::Read, move || {
                let _lives = (&node_4, &board_4);
                let copy = black_box(&copy);
                if black_box(&copied).is_up_to_date(copy) { **copy } else { 0 }
            }),
            Operation::new("update_with_copy", Kind::Announce, move || {
                let _lives = (&node_3, &board_3);
                number += 1;
                black_box(&written).update_with_copy(number);
            }),
        ])
    }

    fn sites(&self, folder: &Path, keys: usize) -> Outcome<Vec<(&'static str, Box<dyn Site>)>> {
        let config = config(folder)?;
        let (_node, _board) = create(&config, keys)?;
        Ok(vec![("is_up_to_date", Box::new(Blackboard { config, _node, _board }))])
    }

    fn bell(&self, folder: &Path) -> Outcome<Option<Box<dyn Bell>>> {
        let config = config(folder)?;
        let node = node(&config)?;
        let _event = node.service_builder(&name()?).event().max_nodes(NODES).max_listeners(16).create()?;
        Ok(Some(Box::new(Event { config, _node: node, _event })))
    }
}

fn name() -> Outcome<ServiceName> {
    Ok("peers".try_into()?)
}

/// Its files in our folder; its shared memory has to have names of its own.
fn config(folder: &Path) -> Outcome<Config> {
    static SITES: AtomicU64 = AtomicU64::new(0);
    let mut config = Config::default();
    config.global.set_root_path(&IceoryxPath::new(folder.to_str().ok_or("a folder with an odd name")?.as_bytes())?);
    let prefix = format!("{PREFIX}{}_{}_", std::process::id(), SITES.fetch_add(1, Relaxed));
    config.global.prefix = FileName::new(prefix.as_bytes())?;
    Ok(config)
}

/// Of the names in shared memory.
const PREFIX: &str = "gensync_peers_";

fn node(config: &Config) -> Outcome<Node<ipc::Service>> {
    Ok(NodeBuilder::new().config(config).signal_handling_mode(SignalHandlingMode::Disabled).create()?)
}

type Board = PortFactory<ipc::Service, u64>;

fn create(config: &Config, keys: usize) -> Outcome<(Node<ipc::Service>, Board)> {
    let node = node(config)?;
    let mut builder = node.service_builder(&name()?).blackboard_creator::<u64>().max_nodes(NODES).max_readers(NODES);
    for key in 0..keys as u64 {
        builder = builder.add::<u64>(key, 0);
    }
    let board = builder.create()?;
    Ok((node, board))
}

struct Blackboard {
    config: Config,
    _board: Board,
    _node: Node<ipc::Service>,
}

impl Site for Blackboard {
    fn attach(&self, keys: &[usize], role: Role, source: Source) -> Outcome<Box<dyn Session>> {
        let node = node(&self.config)?;
        let board = node.service_builder(&name()?).blackboard_opener::<u64>().open()?;
        let (mut handles, mut writers) = (Vec::new(), Vec::new());
        if role == Role::Writer {
            let writer = board.writer_builder().create()?;
            for &key in keys {
                writers.push(writer.entry::<u64>(&(key as u64))?);
            }
        } else {
            let reader = board.reader_builder().create()?;
            for &key in keys {
                let handle = reader.entry::<u64>(&(key as u64))?;
                let value = handle.get();
                handles.push((handle, value));
            }
        }
        Ok(Held::boxed(Entries { handles, writers, _board: board, _node: node }, keys, source))
    }

    fn shared_bytes(&self, _folder: &Path) -> Outcome<u64> {
        let prefix = self.config.global.prefix.to_string();
        files(&prefix).map(|file| Ok(file.metadata()?.blocks() * 512)).sum()
    }
}

struct Entries {
    handles: Vec<(EntryHandle<ipc::Service, u64, u64>, BlackboardValue<u64>)>,
    writers: Vec<EntryHandleMut<ipc::Service, u64, u64>>,
    _board: Board,
    _node: Node<ipc::Service>,
}

impl Changes for Entries {
    #[inline]
    fn changed(&mut self, key: usize) -> bool {
        let (handle, value) = &mut self.handles[key];
        let changed = !handle.is_up_to_date(value);
        if changed {
            *value = handle.get();
        }
        changed
    }

    fn announce(&mut self, key: usize, value: u64) {
        self.writers[key].update_with_copy(value);
    }
}

struct Event {
    config: Config,
    _event: EventFactory<ipc::Service>,
    _node: Node<ipc::Service>,
}

impl Bell for Event {
    fn listen(&self) -> Outcome<Box<dyn Listener>> {
        let node = node(&self.config)?;
        let event = node.service_builder(&name()?).event().open()?;
        let listener = event.listener_builder().create()?;
        Ok(Box::new(Ear { listener, _event: event, _node: node }))
    }

    fn ringer(&self) -> Outcome<Box<dyn FnMut() -> Outcome<()>>> {
        let node = node(&self.config)?;
        let event = node.service_builder(&name()?).event().open()?;
        let notifier = event.notifier_builder().create()?;
        Ok(Box::new(move || {
            let _lives = (&node, &event);
            notifier.notify()?;
            Ok(())
        }))
    }
}

struct Ear {
    listener: iceoryx2::port::listener::Listener<ipc::Service>,
    _event: EventFactory<ipc::Service>,
    _node: Node<ipc::Service>,
}

impl Listener for Ear {
    fn wait(&mut self) -> Outcome<()> {
        self.listener.blocking_wait(|_| ())?;
        Ok(())
    }
}

//! What the figures were taken on, and of what.

use serde::Serialize;

use crate::server::version;

#[derive(Serialize)]
pub(crate) struct Machine {
    pub(crate) processor: String,
    pub(crate) cores: usize,
    pub(crate) kernel: String,
    pub(crate) rust: String,
    pub(crate) load_before: String,
    pub(crate) versions: Vec<String>,
}

impl Machine {
    pub(crate) fn this() -> Self {
        let information = read("/proc/cpuinfo");
        let model = information.lines().find_map(|line| line.strip_prefix("model name"));
        let processor = model.and_then(|model| model.split_once(':')).map_or("unknown", |(_, model)| model.trim());
        let mut versions: Vec<_> = CRATES.iter().filter_map(|name| locked(name)).collect();
        versions.extend(version("memcached", "-V"));
        versions
            .extend(version("redis-server", "--version").map(|text| text.split(" sha=").next().unwrap_or("").into()));
        Self {
            processor: processor.to_owned(),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            kernel: read("/proc/sys/kernel/osrelease"),
            rust: version("rustc", "-V").unwrap_or_else(|| "unknown".to_owned()),
            load_before: read("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(" "),
            versions,
        }
    }
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim_end().to_owned()
}

const CRATES: [&str; 8] = ["gensync", "iceoryx2", "mmap-sync", "tokio", "arc-swap", "heed", "rusqlite", "redis"];

/// The version that this program was built with.
fn locked(name: &str) -> Option<String> {
    let lock = include_str!("../../../Cargo.lock");
    let (_, entry) = lock.split_once(&format!("name = \"{name}\"\nversion = \""))?;
    Some(format!("{name} {}", entry.split('"').next()?))
}

//! What the functions of a benchmark's module `counted` cost: the benchmark runs itself under valgrind's callgrind, and reads the profile.

use std::collections::HashMap;
use std::fs;
use std::process::Command;

/// What a call costs on average, callees included, by callgrind's names of the events.
pub(crate) type Costs = HashMap<String, f64>;

/// Each operation as a function of its own, as the costs are those of whole functions. To be used in a module `counted`.
macro_rules! counted {
    ($($name:ident($($argument:ident: $type:ty),+) -> $result:ty = $operation:expr;)+) => {
        $(#[inline(never)] pub(super) fn $name($($argument: $type),+) -> $result { $operation })+
    };
}
pub(crate) use counted;

/// Runs this program with `arguments` under callgrind with `options`; what each function of `counted` cost, by its name.
pub(crate) fn profile(options: &[&str], arguments: &[&str]) -> Result<HashMap<String, Costs>, String> {
    let folder = tempfile::tempdir().map_err(|error| format!("no folder for the counts: {error}"))?;
    let profile = folder.path().join("profile");
    let this = std::env::current_exe().map_err(|error| format!("this program cannot find itself: {error}"))?;
    let run = Command::new("valgrind")
        .args(["--tool=callgrind", "--compress-strings=no"])
        .arg(format!("--callgrind-out-file={}", profile.display()))
        .args(options)
        .arg(this)
        .args(arguments)
        .output()
        .map_err(|error| format!("valgrind cannot be run ({error}): install it, as by apt-get install valgrind"))?;
    if !run.status.success() {
        return Err(format!("valgrind failed: {}", String::from_utf8_lossy(&run.stderr)));
    }
    let profile = fs::read_to_string(profile).map_err(|error| format!("no profile: {error}"))?;
    Ok(per_call(&profile))
}

/// Why `name` has no costs.
pub(crate) fn not_counted(name: &str) -> String {
    format!("{name} was not counted: the compiler has merged it with its caller or its like")
}

/// Reads callgrind's profile, which names its events first (`events: name name`), and where a call takes three lines: the callee
/// (`cfn=name`), how often (`calls=count position`), and what it cost, callees included (`position cost cost`, without the last
/// costs that are zero).
fn per_call(profile: &str) -> HashMap<String, Costs> {
    let mut totals: HashMap<String, (f64, Vec<f64>)> = HashMap::new();
    let mut lines = profile.lines();
    let events = lines.find_map(|line| line.strip_prefix("events:")).unwrap_or_default();
    let events: Vec<_> = events.split_whitespace().collect();
    while let Some(line) = lines.next() {
        let Some((_, name)) = line.strip_prefix("cfn=").and_then(|name| name.split_once("::counted::")) else {
            continue;
        };
        // Positions come after the one and before the other; they may be relative, as `+3` or `*`.
        let mut numbers = |prefix: &str, first: usize| -> Option<Vec<f64>> {
            let line = lines.find(|line| line.starts_with(prefix))?;
            Some(line[prefix.len()..].split_whitespace().skip(first).map_while(|number| number.parse().ok()).collect())
        };
        if let (Some(calls), Some(costs)) = (numbers("calls=", 0), numbers("", 1)) {
            let (count, sums) = totals.entry(name.to_owned()).or_insert_with(|| (0.0, vec![0.0; events.len()]));
            *count += calls[0];
            sums.iter_mut().zip(costs).for_each(|(sum, cost)| *sum += cost);
        }
    }
    let average = |(count, sums): (f64, Vec<f64>)| {
        events.iter().zip(sums).map(|(&event, sum)| (event.to_owned(), sum / count)).collect()
    };
    totals.into_iter().map(|(name, total)| (name, average(total))).collect()
}

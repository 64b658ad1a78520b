//! `watch`: a line, or a command, for each change.
//!
//! Keys come from other processes, and must not be able to run commands. So the shell gets them not as a part of its script, but
//! as variables. It never takes the contents of a variable for commands, whatever quotes the placeholder stands in.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStringExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Instant, SystemTime};

use gensync::SlotInfo;

use crate::arguments::Watch;
use crate::child::status_of;
use crate::commands::exec::CANNOT_RUN;
use crate::failure::{DONE, Failure, Outcome, complain};
use crate::hangup::{busy, end_with_the_listener};
use crate::keys::matches;
use crate::output::{FAINT, Output, label, object, short_label};
use crate::printable::printable;
use crate::target::Target;
use crate::time::precise;

pub(crate) fn watch(target: &Target, options: &Watch, output: &mut Output) -> Outcome {
    let table = target.write_or_read(options.read_only)?;
    let path = target.path()?;
    let script = options.exec.as_deref().map(script);
    let deadline = options.timeout.and_then(|limit| Instant::now().checked_add(limit));
    let mut changes = table.watch();
    end_with_the_listener(DONE);
    let (mut count, mut status) = (0, DONE);
    loop {
        let change = match deadline {
            Some(deadline) => changes.next_deadline(deadline),
            None => changes.next(),
        };
        let Some(change) = change else { break };
        if options.glob.as_ref().is_some_and(|glob| !matches(glob, &change)) {
            continue;
        }
        // A hangup does not end the process between the line of a change and the command for it.
        let _busy = busy();
        print(&change, output)?;
        if let Some(script) = &script {
            match run(script, &path, &change)? {
                DONE => {}
                failed => status = failed,
            }
        }
        count += 1;
        if options.count == Some(count) {
            return Ok(status);
        }
    }
    match status {
        DONE if count == 0 || options.count.is_some() => {
            Err(Failure::Negative(format!("timed out after {count} changes")))
        }
        status => Ok(status),
    }
}

fn print(change: &SlotInfo, output: &mut Output) -> Outcome<()> {
    let time = precise(SystemTime::now());
    if output.is_json() {
        let mut object = object(change);
        object["time"] = time.into();
        output.object(&object)?;
    } else {
        let time = output.styled(FAINT, &time);
        output.line(&format!("{time}  {}  {}", label(change), change.generation()))?;
    }
    output.flush()
}

/// The script for the shell: the placeholders become variables.
fn script(template: &str) -> String {
    let (mut script, mut rest) = (String::new(), template);
    // The quotes that the rest begins within. If this takes them for others than the shell does, a variable may be split into
    // words, but is still not run.
    let mut quote = None;
    while let Some(character) = rest.chars().next() {
        let found = [("{key}", "${GENSYNC_KEY}"), ("{generation}", "${GENSYNC_GENERATION}")]
            .into_iter()
            .find_map(|(placeholder, variable)| Some((rest.strip_prefix(placeholder)?, variable)));
        if let Some((after, variable)) = found {
            let quotes = if quote.is_none() { "\"" } else { "" };
            script.extend([quotes, variable, quotes]);
            rest = after;
            continue;
        }
        let length = match character {
            '\\' if quote != Some('\'') => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            _ => character.len_utf8(),
        };
        match quote {
            None if matches!(character, '\'' | '"') => quote = Some(character),
            Some(open) if open == character => quote = None,
            _ => {}
        }
        script.push_str(&rest[..length]);
        rest = &rest[length..];
    }
    script
}

/// Runs the script for one change, and returns its status.
fn run(script: &str, table: &Path, change: &SlotInfo) -> Outcome {
    let key = match change.label_bytes() {
        // A variable cannot contain a NUL.
        bytes if bytes.contains(&0) => printable(bytes).into(),
        bytes => OsString::from_vec(bytes.to_owned()),
    };
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(script).stdin(Stdio::null());
    shell
        .env("GENSYNC_KEY", key)
        .env("GENSYNC_GENERATION", change.generation().to_string())
        .env("GENSYNC_TABLE", table);
    let status = match shell.status() {
        // A key may be longer than the system allows for a variable. Other keys are not.
        Err(error) if error.kind() == ErrorKind::ArgumentListTooLong => {
            complain(&format!("the command for {} cannot be run: {error}", short_label(change)));
            return Ok(CANNOT_RUN);
        }
        result => result.map_err(|error| Failure::Unusable(format!("/bin/sh cannot be run: {error}")))?,
    };
    if !status.success() {
        complain(&format!("the command for {} ended with {status}", short_label(change)));
    }
    Ok(status_of(Some(status)))
}

#[cfg(test)]
mod tests {
    use super::script;

    #[test]
    fn placeholders_become_variables_in_any_quotes() {
        for (template, expected) in [
            ("echo {key} {generation}", r#"echo "${GENSYNC_KEY}" "${GENSYNC_GENERATION}""#),
            (r#"echo "a {key}" b"#, r#"echo "a ${GENSYNC_KEY}" b"#),
            ("sh -c 'echo {key}' {key}", r#"sh -c 'echo ${GENSYNC_KEY}' "${GENSYNC_KEY}""#),
            (r#"echo \"{key} \' "\"{key}""#, r#"echo \""${GENSYNC_KEY}" \' "\"${GENSYNC_KEY}""#),
            (r"echo '\'{key}", r#"echo '\'"${GENSYNC_KEY}""#),
            ("{keys} {} ü\\", "{keys} {} ü\\"),
        ] {
            assert_eq!(script(template), expected);
        }
    }
}

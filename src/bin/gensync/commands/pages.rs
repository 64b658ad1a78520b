//! Scripts for shells, and pages for `man`.

use std::path::Path;

use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::arguments::{Arguments, Completed};
use crate::failure::{DONE, Failure, Outcome};
use crate::output::Output;
use crate::target::Target;

/// The commands that take keys.
const OF_KEYS: &str = "get mark clear create exec wait ls watch metrics";

const SECTIONS: &str = r#".SH ENVIRONMENT
.TP
\fBGENSYNC_TABLE\fR
The path of the table, unless \-\-table or \-\-app names one.
.TP
\fBXDG_RUNTIME_DIR\fR
Where \-\-app looks for the application's table, if it is an absolute path.
.TP
\fBNO_COLOR\fR, \fBTERM\fR
No colours if the first is set, or if the second is "dumb".
.SH FILES
.TP
\fI$XDG_RUNTIME_DIR/gensync/APP\fR
The table of \-\-app APP.
.TP
\fI/dev/shm/gensync\-UID/APP\fR
The same, where XDG_RUNTIME_DIR is not set. UID is the effective user.
"#;

/// Completes keys in zsh. It takes the words from the line itself, as `words` no longer has those before the command.
const ZSH_KEYS: &str = r#"
_gensync_keys() {
    local -a line table keys
    local -i i
    line=("${(z)LBUFFER}")
    if (( ${line[(I)--]} )); then
        _default
        return
    fi
    for ((i = 2; i <= $#line; i++)); do
        case $line[i] in
            -t|--table|-a|--app) table=($line[i] "${(Q)line[i + 1]}") ;;
            --table=*|--app=*) table=("${(Q)line[i]}") ;;
        esac
    done
    keys=("${(@f)$(gensync $table __complete keys 2>/dev/null)}")
    compadd -a keys
}
"#;

pub(crate) fn completions(shell: Shell, output: &mut Output) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut visible(Arguments::command()), "gensync", &mut script);
    let of_keys = match shell {
        // Keys are those of the table that the line names, or GENSYNC_TABLE; no keys after `--`, or for commands that take none.
        Shell::Bash => format!(
            r#"
_gensync_keys() {{
    _gensync "$@"
    local word command= cut= current=$2 i
    # A key may have colons, at which readline ends words: what stands before the last one is compared, but not replaced.
    if [[ -n $COMP_LINE ]]; then
        current=${{COMP_LINE:0:COMP_POINT}}
        current=${{current##*[[:space:]]}}
        [[ $COMP_WORDBREAKS == *:* ]] && cut=${{current%"${{current##*:}}"}}
    fi
    local -a table=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${{COMP_WORDS[i]}}
        case "$word" in
            --) return ;;
            -t|--table|-a|--app) table=("$word" "${{COMP_WORDS[i + 1]}}"); ((i++)) ;;
            --allow-file-system) ((i++)) ;;
            -*) ;;
            *) [[ -n $command ]] || command=$word ;;
        esac
    done
    [[ -n $command && " {OF_KEYS} " == *" $command "* && $2 != -* ]] || return
    while IFS= read -r word; do
        [[ $word == "$current"* ]] && COMPREPLY+=("$(printf %q "${{word#"$cut"}}")")
    done < <(gensync "${{table[@]}}" __complete keys 2>/dev/null)
}}
complete -F _gensync_keys -o nosort -o bashdefault -o default gensync 2>/dev/null || complete -F _gensync_keys gensync
"#
        ),
        // Keys take the place of files, as in bash.
        Shell::Zsh => {
            let text = String::from_utf8_lossy(&script);
            let is_of_keys = |line: &&str| line.starts_with("'*::texts -- ") || line.starts_with("'::glob -- ");
            let lines = text.lines().map(|line| match Some(line).filter(is_of_keys) {
                Some(line) => line.replace(":_default'", ":_gensync_keys'"),
                None => line.to_owned(),
            });
            let lines: Vec<_> = lines.collect();
            script =
                lines.join("\n").replacen("\n_gensync() {\n", &format!("{ZSH_KEYS}\n_gensync() {{\n"), 1).into_bytes();
            script.push(b'\n');
            String::new()
        }
        Shell::Fish => format!(
            "\ncomplete -c gensync -n '__fish_seen_subcommand_from {OF_KEYS}' -f -a '(gensync __complete keys 2>/dev/null)'\n"
        ),
        _ => String::new(),
    };
    script.extend(of_keys.into_bytes());
    output.bytes(&script)?;
    Ok(DONE)
}

/// Prints the keys for completion, one per line. Left out are keys with control characters, which could end a line, and those that
/// cannot be named by their texts: longer ones than the table keeps, and damaged ones.
pub(crate) fn complete(what: Completed, target: &Target, output: &mut Output) -> Outcome {
    let Completed::Keys = what;
    let Ok(table) = target.read() else { return Ok(DONE) };
    for slot in table.slots().filter(|slot| !slot.is_truncated()) {
        if let Ok(label) = str::from_utf8(slot.label_bytes())
            && !label.is_empty()
            && !label.contains(char::is_control)
        {
            output.line(label)?;
        }
    }
    Ok(DONE)
}

/// The command without its hidden parts, and with the global options.
fn visible(command: clap::Command) -> clap::Command {
    let hidden: Vec<_> = command.get_subcommands().filter(|command| command.is_hide_set()).cloned().collect();
    if hidden.is_empty() {
        return command;
    }
    let shown: Vec<_> = command.get_subcommands().filter(|command| !command.is_hide_set()).cloned().collect();
    let mut bare = clap::Command::new("gensync")
        .version(env!("CARGO_PKG_VERSION"))
        .subcommand_required(true)
        .arg_required_else_help(true)
        .args(command.get_arguments())
        .subcommands(shown);
    if let Some(about) = command.get_about() {
        bare = bare.about(about.clone());
    }
    bare
}

pub(crate) fn man(name: Option<&str>, folder: Option<&Path>, output: &mut Output) -> Outcome {
    let mut command = visible(Arguments::command());
    // Gives each subcommand the global options.
    command.build();
    if let Some(folder) = folder {
        std::fs::create_dir_all(folder).map_err(|error| unwritable(folder, &error))?;
        let own = std::iter::once(&command);
        for one in own.chain(command.get_subcommands()) {
            let name =
                if std::ptr::eq(one, &command) { "gensync".to_owned() } else { format!("gensync-{}", one.get_name()) };
            let path = folder.join(name + ".1");
            std::fs::write(&path, page(one.clone())?).map_err(|error| unwritable(&path, &error))?;
        }
        return Ok(DONE);
    }
    if let Some(name) = name {
        let found = command.find_subcommand(name).cloned();
        command = found.ok_or_else(|| Failure::Usage(format!("there is no command '{}'", name.escape_debug())))?;
    }
    output.bytes(&page(command)?)?;
    Ok(DONE)
}

fn unwritable(path: &Path, error: &std::io::Error) -> Failure {
    let path = crate::printable::printable(path.as_os_str().as_encoded_bytes());
    Failure::Unusable(format!("{path}: the page cannot be written: {error}"))
}

fn page(command: clap::Command) -> Outcome<Vec<u8>> {
    let examples = command.get_after_long_help().map(ToString::to_string).unwrap_or_default();
    let command = command.after_help(None::<&str>).after_long_help(None::<&str>);
    let mut page = Vec::new();
    clap_mangen::Man::new(command).render(&mut page)?;
    let mut text = String::from_utf8_lossy(&page).into_owned();
    let mut more = SECTIONS.to_owned();
    let examples = examples.strip_prefix("Examples:\n").unwrap_or_default();
    let own = if examples.is_empty() { crate::arguments::EXAMPLES } else { examples };
    for (heading, body) in [("EXAMPLES", own), ("EXIT STATUS", crate::arguments::STATUSES)] {
        more += &format!(".SH \"{heading}\"\n.nf\n");
        for line in body.trim_start_matches("Exit status:\n").lines() {
            let line = line.replace('\\', "\\e").replace('-', "\\-");
            more += &format!("\\&{line}\n");
        }
        more += ".fi\n";
    }
    // They go before the version, which stands at the end.
    match text.find(".SH VERSION") {
        Some(at) => text.insert_str(at, &more),
        None => text += &more,
    }
    Ok(text.into_bytes())
}

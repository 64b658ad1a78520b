//! Which keys the command line means.

use std::cmp::Ordering;
use std::num::NonZeroU32;
use std::time::SystemTime;

use clap::Args;
use gensync::{CacheKey, KeyNormalizer, SlotInfo, Table};
use glob::Pattern;

use crate::failure::{Failure, Outcome};
use crate::printable::printable;
use crate::time::{local, rough};

/// What makes a text a glob.
const GLOB: [char; 3] = ['*', '?', '['];

/// How keys are made from the command line.
#[derive(Args, Debug)]
#[command(next_help_heading = "Keys")]
pub(crate) struct KeyOptions {
    /// A part of the key, instead of KEY: once for each part. Needed where the application makes the key of parts, and one of these
    /// contains ':' or '%', which are escaped in parts, but not in KEY
    #[arg(long, value_name = "PART", allow_hyphen_values = true)]
    part: Vec<String>,
    /// Take KEY literally: it is not normalized, and is not a glob
    #[arg(long, conflicts_with_all = ["part", "domain", "site_root"])]
    raw: bool,
    /// Put the site's domain in front of the key, as its processes do
    #[arg(long)]
    domain: Option<String>,
    /// Put the site root behind the domain, as its processes do
    #[arg(long)]
    site_root: Option<String>,
    /// Use the generation, one of N, that the key shares with others, where the application keeps its keys in N generations; KEY is
    /// not a glob then. It must be the application's key exactly, as any text has a generation, and no error shows that it is
    /// another key's: give a key of parts by --part
    #[arg(long, value_name = "N", value_parser = parse_generations)]
    generations: Option<NonZeroU32>,
}

fn parse_generations(text: &str) -> Result<NonZeroU32, String> {
    text.parse().map_err(|_| {
        format!("expected the number of generations that the application has for such keys, 1 to {}", u32::MAX)
    })
}

impl KeyOptions {
    /// The keys that `texts`, or the parts, name.
    pub(crate) fn keys<'a>(&self, texts: impl IntoIterator<Item = &'a String>) -> Outcome<Vec<CacheKey>> {
        let keys = texts.into_iter().map(|text| {
            // Of many keys, one generation would be announced.
            if self.generations.is_some() && !self.raw && text.contains('*') {
                return Err(Failure::Usage(format!(
                    "'{text}' looks like a glob, and --generations is for keys; choose by a glob without --generations, or \
                     use --part if the * belongs to the key"
                )));
            }
            Ok(if self.raw { CacheKey::raw(text) } else { CacheKey::from(text) })
        });
        let parts = (!self.part.is_empty()).then(|| Ok(CacheKey::from(&self.part)));
        let keys: Vec<_> = keys.chain(parts).map(|key| self.normalize(key?)).collect::<Outcome<_>>()?;
        if self.generations.is_some() && keys.is_empty() {
            return Err(Failure::Usage(
                "--generations is for keys that are given by KEY or --part; leave it out with --all and --digest, which choose \
                 shared generations like all others"
                    .to_owned(),
            ));
        }
        Ok(keys)
    }

    fn normalize(&self, key: CacheKey) -> Outcome<CacheKey> {
        if key.as_str().is_empty() {
            return Err(Failure::Usage("the key is empty; give at least one character".to_owned()));
        }
        let mut normalizer = KeyNormalizer::new();
        if let Some(domain) = &self.domain {
            normalizer = normalizer.domain(domain);
        }
        if let Some(root) = &self.site_root {
            normalizer = normalizer.site_root(root);
        }
        Ok(normalizer.normalize(match self.generations {
            Some(count) => key.in_generations(count),
            None => key,
        }))
    }

    /// Advice if `key` is missing, which is one of those that `texts` name: it may be a key of parts, which none of these makes.
    pub(crate) fn advice(&self, texts: &[String], key: &CacheKey) -> &'static str {
        let is_given =
            |text: &String| !self.raw && self.normalize(CacheKey::from(text)).is_ok_and(|given| given == *key);
        // A colon may join two parts; what is escaped in parts tells the text from them.
        let may_be_parts = |text: &String| text.contains('%') || text.matches(':').count() > 1;
        if texts.iter().any(|text| may_be_parts(text) && is_given(text)) {
            "\n  a key of parts, one of which contains ':' or '%', is given by --part for each part: the application escapes these \
             in parts, and so it makes another key than KEY is"
        } else {
            ""
        }
    }

    /// Whether `text` is a glob rather than a key.
    fn is_glob(&self, text: &str) -> bool {
        // Where generations are shared, keys are URLs and the like, which may have a query.
        !self.raw && self.generations.is_none() && text.contains(GLOB)
    }
}

/// One key or several, each by its name.
#[derive(Args, Debug)]
pub(crate) struct Keys {
    /// The keys
    #[arg(value_name = "KEY", required_unless_present = "part", conflicts_with = "part")]
    texts: Vec<String>,
    #[command(flatten)]
    options: KeyOptions,
}

impl Keys {
    /// At least one; each once.
    pub(crate) fn keys(&self) -> Outcome<Vec<CacheKey>> {
        self.in_order().map(each_once)
    }

    /// At least one; as many as are given, in their order. Two that share a generation are one key, twice.
    pub(crate) fn in_order(&self) -> Outcome<Vec<CacheKey>> {
        self.options.keys(&self.texts)
    }

    /// As [`KeyOptions::advice`].
    pub(crate) fn advice(&self, key: &CacheKey) -> &'static str {
        self.options.advice(&self.texts, key)
    }
}

/// Keys by name, by glob, by digest, or all.
#[derive(Args, Debug)]
pub(crate) struct Selection {
    /// Keys, or globs (*, ? and [...]) of keys as `gensync ls` shows them
    #[arg(value_name = "KEY", required_unless_present_any = ["part", "all", "digest"], conflicts_with_all = ["part", "all"])]
    texts: Vec<String>,
    /// All keys of the table
    #[arg(long, conflicts_with_all = ["part", "digest"])]
    all: bool,
    #[command(flatten)]
    digests: Digests,
    #[command(flatten)]
    options: KeyOptions,
}

/// Keys by their digests.
#[derive(Args, Debug)]
pub(crate) struct Digests {
    /// The key with this digest, as `gensync ls --json` prints it, also if it is too long to be named, or its text is damaged
    #[arg(long, value_name = "HEX", value_parser = parse_digest, help_heading = "Keys")]
    pub(crate) digest: Vec<u128>,
}

fn parse_digest(text: &str) -> Result<u128, String> {
    let number = Some(text).filter(|text| text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit()));
    number
        .and_then(|text| u128::from_str_radix(text, 16).ok())
        .ok_or_else(|| "expected the 32 hexadecimal digits of \"digest\" in `gensync ls --json`".to_owned())
}

/// What chooses several keys at once, or one key of which only the digest is known.
#[derive(Clone, Debug)]
pub(crate) enum Choice {
    All,
    Glob(Pattern),
    Digest(u128),
}

impl Choice {
    pub(crate) fn matches(&self, slot: &SlotInfo) -> bool {
        match self {
            Self::All => true,
            // A key that the table does not have whole may match, as may one that shares the generation: announced once too often
            // is safe, not at all is not.
            Self::Glob(glob) => slot.is_truncated() || matches(glob, slot) || may_share_generation(glob, &slot.label()),
            Self::Digest(digest) => slot.digest() == *digest,
        }
    }

    /// As arguments that choose the same.
    pub(crate) fn arguments(&self) -> Vec<String> {
        match self {
            Self::All => vec!["--all".to_owned()],
            Self::Glob(glob) => vec!["--glob".to_owned(), glob.as_str().to_owned()],
            Self::Digest(digest) => vec!["--digest".to_owned(), format!("{digest:032x}")],
        }
    }

    /// The failure to report if no key matches; `None` if that is no failure.
    pub(crate) fn nothing(&self, table: &Table) -> Option<Failure> {
        let what = match self {
            Self::All => return None,
            Self::Glob(glob) => format!("no key matches '{}'", printable(glob.as_str().as_bytes())),
            Self::Digest(digest) => {
                format!("no key has the digest {digest:032x}; each incarnation of a table has digests of its own")
            }
        };
        Some(Failure::Negative(what + &anew(table)))
    }
}

impl Selection {
    /// The keys that are named.
    pub(crate) fn keys(&self) -> Outcome<Vec<CacheKey>> {
        self.options.keys(self.texts.iter().filter(|text| !self.options.is_glob(text))).map(each_once)
    }

    /// As [`KeyOptions::advice`].
    pub(crate) fn advice(&self, key: &CacheKey) -> &'static str {
        self.options.advice(&self.texts, key)
    }

    /// The globs, digests and `--all` that choose further keys.
    pub(crate) fn choices(&self) -> Outcome<Vec<Choice>> {
        let texts = self.texts.iter().filter(|text| self.options.is_glob(text));
        let globs = texts.map(|text| {
            Pattern::new(text).map(Choice::Glob).map_err(|error| {
                Failure::Usage(format!("'{text}' is not a glob: {error}; with --raw or --part it is taken for a key"))
            })
        });
        let digests = self.digests.digest.iter().map(|digest| Ok(Choice::Digest(*digest)));
        globs.chain(self.all.then_some(Ok(Choice::All))).chain(digests).collect()
    }
}

/// Whether a key that matches may share the generation with this label, if it is one that keys share.
fn may_share_generation(glob: &Pattern, label: &str) -> bool {
    let is_number = |text: &str| text.parse::<u32>().is_ok();
    let Some((family, _)) = label
        .rsplit_once("%/")
        .filter(|(_, rest)| rest.split_once('/').is_some_and(|(count, index)| is_number(count) && is_number(index)))
    else {
        return false;
    };
    // What each key that matches begins with.
    let start = glob.as_str().split(GLOB).next().unwrap_or_default();
    if !start.contains(':') {
        return family.is_empty() || family.starts_with(start);
    }
    // It has their family in it.
    let shared = KeyNormalizer::new().normalize(CacheKey::raw(start).in_generations(NonZeroU32::MIN));
    shared.as_str().strip_suffix("%/1/0") == Some(family)
}

fn each_once(keys: Vec<CacheKey>) -> Vec<CacheKey> {
    let mut seen = std::collections::HashSet::new();
    keys.into_iter().filter(|key| seen.insert(key.as_str().to_owned())).collect()
}

/// The failure to report for a key that no process has attached to, with [advice](KeyOptions::advice).
pub(crate) fn no_such_key(table: &Table, key: &CacheKey, advice: &str) -> Failure {
    let key = printable(key.as_str().as_bytes());
    Failure::Negative(format!(
        "no such key: {key}\n  no process has attached to it since the table was made; `gensync ls` shows the keys that there \
         are (other processes may put a domain in front), `gensync create` makes one{advice}{}",
        anew(table)
    ))
}

/// Advice that distinguishes a key that went with a reset from one that never existed.
pub(crate) fn anew(table: &Table) -> String {
    let info = table.info();
    if info.floor == 0 {
        return String::new();
    }
    let age = SystemTime::now().duration_since(info.created).unwrap_or_default();
    format!(
        "\n  the table began anew at {} ({} ago), by a reset or as its file was replaced: keys that no process has used since \
         are gone, though they are spelt right, and a process that uses one again loads it then. `mark --create` announces a change in \
         either case",
        local(info.created),
        rough(age)
    )
}

/// The table's keys that match, or all, in no order.
pub(crate) fn chosen(table: &Table, glob: Option<&Pattern>) -> impl Iterator<Item = SlotInfo> {
    table.slots().filter(move |slot| glob.is_none_or(|glob| matches(glob, slot)))
}

/// The order of the labels. Keys with equal labels, which are cut or damaged, are ordered by digest, so that the order is always
/// the same.
pub(crate) fn by_label(one: &SlotInfo, other: &SlotInfo) -> Ordering {
    one.label_bytes().cmp(other.label_bytes()).then_with(|| one.digest().cmp(&other.digest()))
}

/// Whether the key matches.
pub(crate) fn matches(glob: &Pattern, slot: &SlotInfo) -> bool {
    glob.matches(&slot.label())
}

//! Which keys are meant.

use std::cmp::Ordering;

use clap::Args;
use gensync::{CacheKey, KeyNormalizer, SlotInfo, Table};
use glob::Pattern;

use crate::arguments::OneKey;
use crate::failure::{Failure, Outcome};

/// How keys are made.
#[derive(Args, Debug)]
#[command(next_help_heading = "Keys")]
pub(crate) struct KeyOptions {
    /// A part of the key, instead of KEY: once for each part
    #[arg(long, value_name = "PART", allow_hyphen_values = true)]
    part: Vec<String>,
    /// Take KEY to the letter: it is not normalized, and no glob
    #[arg(long, conflicts_with_all = ["part", "domain", "site_root"])]
    raw: bool,
    /// Put the site's domain in front of the key, as its processes do
    #[arg(long)]
    domain: Option<String>,
    /// Put the site root behind the domain, as its processes do
    #[arg(long)]
    site_root: Option<String>,
}

impl KeyOptions {
    /// The keys that `texts`, or the parts, name.
    pub(crate) fn keys<'a>(&self, texts: impl IntoIterator<Item = &'a String>) -> Outcome<Vec<CacheKey>> {
        let keys = texts.into_iter().map(|text| if self.raw { CacheKey::raw(text) } else { CacheKey::from(text) });
        keys.chain((!self.part.is_empty()).then(|| CacheKey::from(&self.part))).map(|key| self.normalize(key)).collect()
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
        Ok(normalizer.normalize(key))
    }

    /// Whether `text` is a glob rather than a key.
    fn is_glob(&self, text: &str) -> bool {
        !self.raw && text.contains(['*', '?', '['])
    }
}

impl OneKey {
    pub(crate) fn key(&self) -> Outcome<CacheKey> {
        // Either is required.
        self.options.keys(&self.key).map(|keys| keys.into_iter().next().expect("a key or a part was given"))
    }
}

/// Keys by name, by glob, or all.
#[derive(Args, Debug)]
pub(crate) struct Selection {
    /// Keys, or globs (*, ? and [...]) of keys as `gensync ls` shows them
    #[arg(value_name = "KEY", required_unless_present_any = ["part", "all"], conflicts_with_all = ["part", "all"])]
    texts: Vec<String>,
    /// All keys of the table
    #[arg(long, conflicts_with = "part")]
    all: bool,
    #[command(flatten)]
    options: KeyOptions,
}

impl Selection {
    pub(crate) fn keys(&self) -> Outcome<Vec<CacheKey>> {
        self.options.keys(self.texts.iter().filter(|text| !self.options.is_glob(text)))
    }

    pub(crate) fn globs(&self) -> Outcome<Vec<Pattern>> {
        let texts = self.texts.iter().filter(|text| self.options.is_glob(text));
        let globs = texts.map(|text| {
            Pattern::new(text).map_err(|error| {
                Failure::Usage(format!("'{text}' is no glob: {error}; with --raw or --part it is taken for a key"))
            })
        });
        globs.chain(self.all.then(|| Ok(everything()))).collect()
    }

    pub(crate) fn is_all(&self) -> bool {
        self.all
    }
}

fn everything() -> Pattern {
    Pattern::new("*").expect("a star is a glob")
}

/// The table's keys that match, or all, in no order.
pub(crate) fn chosen(table: &Table, glob: Option<&Pattern>) -> impl Iterator<Item = SlotInfo> {
    table.slots().filter(move |slot| glob.is_none_or(|glob| matches(glob, slot)))
}

/// The order of the labels; of those that begin alike, always the same.
pub(crate) fn by_label(one: &SlotInfo, other: &SlotInfo) -> Ordering {
    one.label_bytes().cmp(other.label_bytes()).then_with(|| one.digest().cmp(&other.digest()))
}

/// Whether the key's label matches.
pub(crate) fn matches(glob: &Pattern, slot: &SlotInfo) -> bool {
    glob.matches(&slot.label())
}

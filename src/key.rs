//! Cache keys, normalized exactly as by Djblets' `make_cache_key`, or so that different keys stay different.

use std::borrow::Cow;
use std::convert::Infallible;
use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::{Digest as _, Sha256};

/// The longest key that normalizing does not shorten, in characters: memcached's limit minus a margin.
const MAX_KEY_CHARACTERS: usize = 240;

/// The longest family that a shared generation's key keeps, in bytes of UTF-8. At most 23 more follow, `%/4294967295/4294967294`.
const MAX_FAMILY_BYTES: usize = 200;

/// Names one piece of shared state.
///
/// A key is made from a string, or from parts. Parts are escaped (`%`, then `:`) and joined with `:`, so that no two lists of two
/// parts or more make the same key. A single part is left as it is, as in Djblets, and so is a string: under
/// [`KeyNormalizer::new`], the string `"a:b"` and the parts `["a", "b"]` are one key. Under [`KeyNormalizer::strict`] they
/// are two keys. `==` also takes them for two: keys are equal only if they are equal under every normalizer.
///
/// ```
/// use gensync::CacheKey;
///
/// assert_eq!(CacheKey::from(["tenant", "a:b"]).as_str(), "tenant:a%3Ab");
/// assert_eq!(CacheKey::from("siteconfig:1").as_str(), "siteconfig:1");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CacheKey {
    text: String,
    form: Form,
    /// How many generations there are for it and others, unless it has one of its own.
    generations: Option<NonZeroU32>,
}

/// How a key's text was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Form {
    /// One part, exactly as given.
    Text,
    /// Several parts, escaped and joined.
    Parts,
    /// Normalized already: no normalizer changes it.
    Normalized,
}

impl CacheKey {
    /// A key that is used exactly as given: no normalizer changes it (`normalize_cache_key=False` in Djblets).
    pub fn raw(key: impl Into<String>) -> Self {
        Self { text: key.into(), form: Form::Normalized, generations: None }
    }

    /// The key, but with a generation that it shares with others: one of `count`.
    ///
    /// For keys without bound, such as URLs and sessions: a table gives no room back, and would grow with each of them. Any number
    /// of keys of one family takes `count` slots at most. An update of one of them expires all that share its generation: on
    /// average, one in `count` of the others. That costs reloads, but never leaves a key fresh that was updated.
    ///
    /// ```
    /// use std::num::NonZeroU32;
    ///
    /// use gensync::{CacheKey, GenerationSynchronizer, Table};
    ///
    /// const GENERATIONS: NonZeroU32 = NonZeroU32::new(4096).unwrap();
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("shop.gensync");
    /// let table = Table::open(&path)?;
    /// let key = CacheKey::from("url:http://x").in_generations(GENERATIONS);
    /// let sync = GenerationSynchronizer::new(&table, key)?;
    /// assert_eq!(sync.cache_key().as_str(), "url:%/4096/3699");
    /// # Ok(()) }
    /// ```
    ///
    /// On the command line, that is `gensync mark --generations 4096 url:http://x`. A key of parts is given there by its parts: the
    /// escaped text of one that contains `:` or `%` is not the text that a user would type, and has another generation.
    ///
    /// ```
    /// # use std::num::NonZeroU32;
    /// # use gensync::{CacheKey, KeyNormalizer};
    /// # const GENERATIONS: NonZeroU32 = NonZeroU32::new(4096).unwrap();
    /// let key = CacheKey::from(["url", "http://x"]); // gensync mark --generations 4096 --part url --part http://x
    /// assert_eq!(key.as_str(), "url:http%3A//x");
    /// # let normalize = |key: CacheKey| KeyNormalizer::new().normalize(key.in_generations(GENERATIONS));
    /// # assert_eq!(normalize(key).as_str(), "url:%/4096/2388");
    /// ```
    ///
    /// All that update or check a key must do so with one count. With another count, or without one, it is another key, and
    /// updates of one do not expire the other: where programs with a new count replace those with an old one, a
    /// [`reset`](crate::Table::reset) after the last of these has ended expires everything once. Keys of one family and count share
    /// generations wherever they come from, two maps of one process included. As the hash has no salt, a key can be chosen so that
    /// it shares a given generation; an [HMAC key](KeyNormalizer::hmac_key) prevents that.
    ///
    /// The state of each key needs a [`GenerationSynchronizer`](crate::GenerationSynchronizer) of its own, as ever, though their
    /// generation is one: a synchronizer takes what it updates itself for known.
    ///
    /// # The shared key
    ///
    /// It is a function of the *normalized* key's text and of `count`, and other languages can compute it. A normalizer makes the
    /// text that it would make without this call, and then FAMILY`%/`COUNT`/`INDEX of it:
    ///
    /// - FAMILY is the text up to and including its first `:`, if these are at most 200 bytes of UTF-8; otherwise, and where there
    ///   is no `:`, it is empty.
    /// - COUNT and INDEX are decimal, without leading zeros.
    /// - INDEX is a remainder, divided by COUNT: that of the first 8 bytes of the SHA-256 of the whole text (its UTF-8), taken as a
    ///   big-endian number.
    ///
    /// The chapter [for operators](crate::guide::for_operators) has this in Python. Different families, counts or indices make
    /// different keys, of at most 223 bytes.
    ///
    /// A glob of the whole family, such as `url:*`, also matches its shared keys. A narrower one, such as `url:http:*`, does not,
    /// though keys that it matches may share any of them. `gensync mark`, `clear` and `exec` announce them all then; the closure of
    /// [`clear_matching`](crate::Table::clear_matching) has to choose them itself.
    ///
    /// The normalizer decides what the family is. With a domain, it is the domain alone under [`KeyNormalizer::new`]. Under
    /// [`KeyNormalizer::strict`] it is the first of several parts, behind the domain and the site root; a key of one part has none
    /// there. Nor has one that is hashed with an HMAC key, under either.
    ///
    /// Until it is normalized, the key keeps its own text. If this is called again before that, the last count applies.
    #[must_use]
    pub fn in_generations(self, count: NonZeroU32) -> Self {
        Self { generations: Some(count), ..self }
    }

    /// The key's text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    fn from_parts<S: AsRef<str>>(parts: &[S]) -> Self {
        match parts {
            [] => Self::from(""),
            [part] => Self::from(part.as_ref()),
            _ => {
                let escaped: Vec<_> =
                    parts.iter().map(|part| part.as_ref().replace('%', "%25").replace(':', "%3A")).collect();
                Self { text: escaped.join(":"), form: Form::Parts, generations: None }
            }
        }
    }
}

impl fmt::Display for CacheKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl AsRef<str> for CacheKey {
    fn as_ref(&self) -> &str {
        &self.text
    }
}

impl From<&str> for CacheKey {
    fn from(key: &str) -> Self {
        Self::from(key.to_owned())
    }
}

impl From<String> for CacheKey {
    fn from(text: String) -> Self {
        Self { text, form: Form::Text, generations: None }
    }
}

impl From<Cow<'_, str>> for CacheKey {
    fn from(key: Cow<'_, str>) -> Self {
        Self::from(key.into_owned())
    }
}

impl FromStr for CacheKey {
    type Err = Infallible;

    fn from_str(key: &str) -> Result<Self, Infallible> {
        Ok(Self::from(key))
    }
}

impl From<&String> for CacheKey {
    fn from(key: &String) -> Self {
        Self::from(key.as_str())
    }
}

impl From<&CacheKey> for CacheKey {
    fn from(key: &CacheKey) -> Self {
        key.clone()
    }
}

impl<S: AsRef<str>, const N: usize> From<[S; N]> for CacheKey {
    fn from(parts: [S; N]) -> Self {
        Self::from_parts(&parts)
    }
}

impl<S: AsRef<str>, const N: usize> From<&[S; N]> for CacheKey {
    fn from(parts: &[S; N]) -> Self {
        Self::from_parts(parts)
    }
}

impl<S: AsRef<str>> From<&[S]> for CacheKey {
    fn from(parts: &[S]) -> Self {
        Self::from_parts(parts)
    }
}

impl<S: AsRef<str>> From<Vec<S>> for CacheKey {
    fn from(parts: Vec<S>) -> Self {
        Self::from_parts(&parts)
    }
}

impl<S: AsRef<str>> From<&Vec<S>> for CacheKey {
    fn from(parts: &Vec<S>) -> Self {
        Self::from_parts(parts)
    }
}

/// Turns keys into the ones that Django workers use, as Djblets' `make_cache_key` does.
///
/// Without a domain, a site root and an HMAC key, it only replaces characters that memcached refuses, and shortens keys of more
/// than 240 characters.
///
/// The keys of Djblets are not always distinct. These pairs make one key each: `"a b"` and `"a\\x20b"`; `"a:b"` and
/// `["a", "b"]`; and `"b:c"` in the domain `a` and `"c"` in the domain `a:b`. If no Django worker shares the table, or if keys
/// contain text that users have typed, use [`strict`](Self::strict), which keeps them apart.
///
/// ```
/// use gensync::KeyNormalizer;
///
/// let normalizer = KeyNormalizer::new().domain("example.com").site_root("/r/");
/// assert_eq!(normalizer.normalize("site config").as_str(), "example.com:/r/:site\\x20config");
/// ```
#[derive(Clone, Default)]
pub struct KeyNormalizer {
    domain: Option<String>,
    site_root: Option<String>,
    hmac_key: Option<Vec<u8>>,
    is_strict: bool,
}

impl KeyNormalizer {
    /// A normalizer with neither domain, site root nor HMAC key.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A normalizer that makes different keys of all inputs that differ: in the string or the list of parts, the domain, the site
    /// root, or in whether there is an HMAC key. (The only exceptions are a collision of two of 2<sup>256</sup> digests, where keys
    /// are shortened or hashed, and keys that are to [share generations](CacheKey::in_generations).) The keys differ from those of
    /// Djblets: all processes that share a table must use the same normalizer.
    ///
    /// A string makes the same key as a list of that one part. An empty domain counts as none, as does an empty site root. A
    /// [raw](CacheKey::raw) key is used exactly as given here too, so it may be equal to any other key.
    ///
    /// Within each part, `%`, `:`, `|`, spaces and ASCII control characters become `%` and two hexadecimal digits. Parts are
    /// joined by `:`; a domain and a site root come first, as in `domain|root|key`. A key of more than 240 characters is cut off
    /// and ends in `%~` and the SHA-256 of the whole; an HMAC follows `%#`. [`%/`](CacheKey::in_generations) stands only in the
    /// keys of shared generations, so that none of these is the key of anything else.
    ///
    /// ```
    /// use gensync::KeyNormalizer;
    ///
    /// let strict = KeyNormalizer::strict();
    /// assert_eq!(strict.normalize("a:b").as_str(), "a%3Ab");
    /// assert_eq!(strict.normalize(["a", "b"]).as_str(), "a:b");
    /// assert_eq!(strict.normalize("a b").as_str(), "a%20b");
    /// assert_eq!(strict.domain("example.com").normalize("a").as_str(), "example.com||a");
    /// ```
    #[must_use]
    pub fn strict() -> Self {
        Self { is_strict: true, ..Self::default() }
    }

    /// Puts the site's domain in front of each key (Django's `Site.domain`).
    #[must_use]
    pub fn domain(mut self, domain: impl Into<String>) -> Self {
        self.domain = Some(domain.into());
        self
    }

    /// Puts the site root after the domain (Django's `SITE_ROOT`); an empty one counts as none.
    #[must_use]
    pub fn site_root(mut self, site_root: impl Into<String>) -> Self {
        self.site_root = Some(site_root.into()).filter(|root| !root.is_empty());
        self
    }

    /// Replaces each key by its HMAC-SHA-256 in hexadecimal, so that it reveals nothing about what it was made from.
    #[must_use]
    pub fn hmac_key(mut self, key: &[u8]) -> Self {
        self.hmac_key = Some(key.to_owned());
        self
    }

    /// The normalized key. A key that was normalized before, or made by [`CacheKey::raw`], is returned as it is, unless it is to
    /// [share a generation](CacheKey::in_generations).
    pub fn normalize(&self, key: impl Into<CacheKey>) -> CacheKey {
        let key = key.into();
        let generations = key.generations;
        let text = match key.form {
            Form::Normalized => key.text,
            _ if self.is_strict => self.strictly(&key),
            _ => self.as_djblets(key.text),
        };
        CacheKey::raw(match generations {
            Some(count) => shared(&text, count),
            None => text,
        })
    }

    fn as_djblets(&self, mut text: String) -> String {
        let prefix: Vec<_> = [&self.domain, &self.site_root].into_iter().flatten().map(String::as_str).collect();
        if !prefix.is_empty() {
            text = format!("{}:{text}", prefix.join(":"));
        }
        self.hmac(&text).unwrap_or_else(|| shorten(escape(text), ""))
    }

    /// Keys of different inputs differ, as a part never contains a `|`, nor a `%` that is not followed by two hexadecimal digits:
    /// these are used as marks, as which `%/` is taken, by [`shared`].
    fn strictly(&self, key: &CacheKey) -> String {
        let [domain, root] = [&self.domain, &self.site_root].map(|part| part.as_deref().unwrap_or_default());
        let parts = percent(&key.text, key.form == Form::Parts);
        let text = if domain.is_empty() && root.is_empty() {
            parts
        } else {
            format!("{}|{}|{parts}", percent(domain, false), percent(root, false))
        };
        self.hmac(&text).map_or_else(|| shorten(text, "%~"), |hmac| format!("%#{hmac}"))
    }

    fn hmac(&self, text: &str) -> Option<String> {
        let mut mac = Hmac::<Sha256>::new_from_slice(self.hmac_key.as_ref()?).expect("HMAC takes a key of any length");
        mac.update(text.as_bytes());
        Some(hex::encode(mac.finalize().into_bytes()))
    }
}

impl fmt::Debug for KeyNormalizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyNormalizer")
            .field("domain", &self.domain)
            .field("site_root", &self.site_root)
            .field("hmac_key", &self.hmac_key.as_ref().map(|_| "secret"))
            .field("is_strict", &self.is_strict)
            .finish()
    }
}

/// Whether memcached refuses the byte in a key.
fn is_refused(byte: u8) -> bool {
    byte <= b' ' || byte == 0x7f
}

fn escape(text: String) -> String {
    if !text.bytes().any(is_refused) {
        return text;
    }
    replace(&text, is_refused, |byte| format!("\\x{byte:02x}"))
}

/// Escapes `text` as `strict` does. In several parts that were joined, `%` and `:` are escaped already.
fn percent(text: &str, are_parts: bool) -> String {
    let is_escaped = |byte| is_refused(byte) || byte == b'|' || !are_parts && (byte == b'%' || byte == b':');
    replace(text, is_escaped, |byte| format!("%{byte:02X}"))
}

/// Replaces ASCII characters; other characters stay as they are.
fn replace(text: &str, is_replaced: impl Fn(u8) -> bool, by: impl Fn(u8) -> String) -> String {
    let mut replaced = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        match u8::try_from(character) {
            Ok(byte) if byte.is_ascii() && is_replaced(byte) => replaced.push_str(&by(byte)),
            _ => replaced.push(character),
        }
    }
    replaced
}

fn shorten(text: String, mark: &str) -> String {
    if text.len() <= MAX_KEY_CHARACTERS || text.chars().count() <= MAX_KEY_CHARACTERS {
        return text;
    }
    let end = format!("{mark}{}", hex::encode(Sha256::digest(text.as_bytes())));
    let head = text.char_indices().nth(MAX_KEY_CHARACTERS - end.len()).map_or(text.len(), |(offset, _)| offset);
    format!("{}{end}", &text[..head])
}

/// The key of the generation, one of `count`, that the key with this normalized `text` shares. See
/// [`in_generations`](CacheKey::in_generations), which other languages follow: it can never change.
///
/// It can be taken apart again, as only the family has a `:`, at its end.
fn shared(text: &str, count: NonZeroU32) -> String {
    let family = text.find(':').map_or("", |colon| &text[..=colon]);
    let family = if family.len() <= MAX_FAMILY_BYTES { family } else { "" };
    let digest = Sha256::digest(text.as_bytes());
    let number = digest[..8].iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
    format!("{family}%/{count}/{}", number % u64::from(count.get()))
}

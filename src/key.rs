//! Cache keys, made exactly as Djblets' `make_cache_key` makes them.

use std::fmt;

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::{Digest as _, Sha256};

/// The longest key that normalizing leaves as it is, in characters: memcached's limit, less a margin.
const MAX_KEY_CHARACTERS: usize = 240;

/// Names one piece of shared state.
///
/// Made from a string, or from parts, which are escaped (`%`, then `:`) and joined with `:`, so that no part can forge
/// another key. One part alone is left as it is, as in Djblets.
///
/// ```
/// use gensync::CacheKey;
///
/// assert_eq!(CacheKey::from(["tenant", "a:b"]).as_str(), "tenant:a%3Ab");
/// assert_eq!(CacheKey::from("siteconfig:1").as_str(), "siteconfig:1");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CacheKey {
    text: String,
    normalized: bool,
}

impl CacheKey {
    /// A key that is used to the letter: no normalizer touches it (`normalize_cache_key=False` in Djblets).
    pub fn raw(key: impl Into<String>) -> Self {
        Self { text: key.into(), normalized: true }
    }

    /// The key's text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    fn from_parts<S: AsRef<str>>(parts: &[S]) -> Self {
        let text = match parts {
            [part] => part.as_ref().to_owned(),
            _ => {
                let escaped: Vec<_> =
                    parts.iter().map(|part| part.as_ref().replace('%', "%25").replace(':', "%3A")).collect();
                escaped.join(":")
            }
        };
        Self { text, normalized: false }
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
        Self { text: key.to_owned(), normalized: false }
    }
}

impl From<String> for CacheKey {
    fn from(text: String) -> Self {
        Self { text, normalized: false }
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
/// Without a domain, a site root and an HMAC key it only replaces characters that memcached refuses and shortens what
/// is over 240 characters.
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
}

impl KeyNormalizer {
    /// A normalizer with neither domain, site root nor HMAC key.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts the site's domain in front of each key (Django's `Site.domain`).
    #[must_use]
    pub fn domain(mut self, domain: impl Into<String>) -> Self {
        self.domain = Some(domain.into());
        self
    }

    /// Puts the site root behind the domain (Django's `SITE_ROOT`); an empty one counts as none.
    #[must_use]
    pub fn site_root(mut self, site_root: impl Into<String>) -> Self {
        self.site_root = Some(site_root.into()).filter(|root| !root.is_empty());
        self
    }

    /// Replaces each key by its HMAC-SHA-256 in hexadecimal, so that it says nothing about what it was made from.
    #[must_use]
    pub fn hmac_key(mut self, key: &[u8]) -> Self {
        self.hmac_key = Some(key.to_owned());
        self
    }

    /// The normalized key. One that was normalized before, or made by [`CacheKey::raw`], comes back as it is.
    pub fn normalize(&self, key: impl Into<CacheKey>) -> CacheKey {
        let key = key.into();
        if key.normalized {
            return key;
        }
        let mut text = key.text;
        let prefix: Vec<_> = [&self.domain, &self.site_root].into_iter().flatten().map(String::as_str).collect();
        if !prefix.is_empty() {
            text = format!("{}:{text}", prefix.join(":"));
        }
        CacheKey::raw(match &self.hmac_key {
            Some(hmac_key) => {
                let mut mac = Hmac::<Sha256>::new_from_slice(hmac_key).expect("HMAC takes a key of any length");
                mac.update(text.as_bytes());
                hex::encode(mac.finalize().into_bytes())
            }
            None => shorten(escape(text)),
        })
    }
}

impl fmt::Debug for KeyNormalizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyNormalizer")
            .field("domain", &self.domain)
            .field("site_root", &self.site_root)
            .field("hmac_key", &self.hmac_key.as_ref().map(|_| "secret"))
            .finish()
    }
}

fn escape(text: String) -> String {
    let refused = |byte: u8| byte <= b' ' || byte == 0x7f;
    if !text.bytes().any(refused) {
        return text;
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        match u8::try_from(character) {
            Ok(byte) if refused(byte) => escaped.push_str(&format!("\\x{byte:02x}")),
            _ => escaped.push(character),
        }
    }
    escaped
}

fn shorten(text: String) -> String {
    if text.len() <= MAX_KEY_CHARACTERS || text.chars().count() <= MAX_KEY_CHARACTERS {
        return text;
    }
    let digest = hex::encode(Sha256::digest(text.as_bytes()));
    let head = text.char_indices().nth(MAX_KEY_CHARACTERS - digest.len()).map_or(text.len(), |(offset, _)| offset);
    format!("{}{digest}", &text[..head])
}

//! Text that a terminal prints as it is.

use std::fmt::Write as _;

/// `bytes` as text that a terminal prints: unprintable characters, and bytes that are not UTF-8, are escaped.
pub(crate) fn printable(bytes: &[u8]) -> String {
    // The fast path: nearly every key is plain ASCII, and this halves the time that the list of a large table takes.
    if bytes.is_ascii()
        && !bytes.iter().any(u8::is_ascii_control)
        && let Ok(text) = str::from_utf8(bytes)
    {
        return text.to_owned();
    }
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            match character {
                '\\' | '"' | '\'' => text.push(character),
                _ => text.extend(character.escape_debug()),
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

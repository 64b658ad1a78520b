//! Keys that are typed, read from the terminal itself, so that its end is noticed.

use std::io::{self, stdin};
use std::os::fd::AsFd as _;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::unistd::read;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    Character(char),
    /// Control-C, which raises no signal while the terminal is in raw mode.
    Interrupt,
    Enter,
    Escape,
    Backspace,
    Up,
    Down,
    PageUp,
    PageDown,
    Home,
    End,
    Other,
}

/// The bytes that were read and are not a whole key yet.
#[derive(Debug, Default)]
pub(super) struct Keyboard(Vec<u8>);

impl Keyboard {
    /// The keys that were typed, once there are any, or `limit` has passed, or a signal came.
    ///
    /// # Errors
    ///
    /// The terminal is gone.
    pub(super) fn keys(&mut self, limit: Duration) -> io::Result<Vec<Key>> {
        let input = stdin();
        let mut watched = [PollFd::new(input.as_fd(), PollFlags::POLLIN)];
        match poll(&mut watched, limit.as_millis().min(1000) as u16) {
            Ok(0) | Err(Errno::EINTR) => return Ok(Vec::new()),
            result => result?,
        };
        let gone = PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL;
        if watched[0].revents().is_none_or(|events| events.intersects(gone)) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut bytes = [0; 1024];
        match read(&input, &mut bytes) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                self.0.extend(&bytes[..count]);
                Ok(std::iter::from_fn(|| self.next()).collect())
            }
            Err(Errno::EINTR | Errno::EAGAIN) => Ok(Vec::new()),
            // EIO: the terminal belongs to another session, or this process group is orphaned and in the background.
            Err(errno) => Err(errno.into()),
        }
    }

    /// The first key of what was read, if it is a whole one.
    fn next(&mut self) -> Option<Key> {
        let (key, length) = match &*self.0 {
            [] => return None,
            [0x1b, b'[' | b'O', sequence @ ..] => {
                let Some(end) = sequence.iter().position(|byte| (0x40..=0x7e).contains(byte)) else {
                    // No key has so long a sequence.
                    if sequence.len() > 32 {
                        self.0.clear();
                    }
                    return None;
                };
                let key = match &sequence[..=end] {
                    b"A" => Key::Up,
                    b"B" => Key::Down,
                    b"H" | b"1~" | b"7~" => Key::Home,
                    b"F" | b"4~" | b"8~" => Key::End,
                    b"5~" => Key::PageUp,
                    b"6~" => Key::PageDown,
                    _ => Key::Other,
                };
                (key, end + 3)
            }
            [0x1b, ..] => (Key::Escape, 1),
            [3, ..] => (Key::Interrupt, 1),
            [b'\r' | b'\n', ..] => (Key::Enter, 1),
            [8 | 0x7f, ..] => (Key::Backspace, 1),
            [byte, ..] if *byte < b' ' => (Key::Other, 1),
            bytes => {
                let chunk = bytes.utf8_chunks().next()?;
                match chunk.valid().chars().next() {
                    Some(character) => (Key::Character(character), character.len_utf8()),
                    // The beginning of a character, if the rest may still come; otherwise bytes that are not UTF-8.
                    None if chunk.invalid().len() == bytes.len() && bytes.len() < 4 && bytes[0] >= 0xc2 => return None,
                    None => (Key::Other, chunk.invalid().len()),
                }
            }
        };
        self.0.drain(..length);
        Some(key)
    }
}

#[cfg(test)]
mod tests {
    use super::{Key, Keyboard};

    fn typed(parts: &[&[u8]]) -> Vec<Key> {
        let mut keyboard = Keyboard::default();
        let keys = parts.iter().flat_map(|part| {
            keyboard.0.extend(*part);
            std::iter::from_fn(|| keyboard.next()).collect::<Vec<_>>()
        });
        keys.collect()
    }

    #[test]
    fn keys_are_recognized_however_their_bytes_arrive() {
        use Key::*;
        assert_eq!(typed(&[b"q\x1b"]), [Character('q'), Escape]);
        assert_eq!(typed(&[b"\x1b[", b"A\x1b[5", b"~"]), [Up, PageUp]);
        assert_eq!(typed(&[b"\x1bOF\x1b[1;5C\r\x7f\x03\x02"]), [End, Other, Enter, Backspace, Interrupt, Other]);
        assert_eq!(typed(&["é".as_bytes()]), [Character('é')]);
        assert_eq!(typed(&[&[0xc3], &[0xa9, b'x']]), [Character('é'), Character('x')]);
        assert_eq!(typed(&[&[0xff, b'a']]), [Other, Character('a')]);
        assert!(typed(&[b"\x1b[", &[b'1'; 40]]).is_empty());
    }
}

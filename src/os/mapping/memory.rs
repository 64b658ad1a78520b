//! A mapped file as the memory of the protocol.

#![expect(unsafe_code, reason = "gives out the words of a mapping; each block states the fact relied on")]

use nix::fcntl::OFlag;

use super::{Mapping, SEGMENTS};
use crate::error::{Error, ErrorKind};
use crate::os::allocation::{allocate, no_room};
use crate::protocol::directory::{Directory, Extent, Outline};
use crate::protocol::generation_word::GenerationWord;
use crate::protocol::layout::{
    DIRECTORY_OFFSET, HEADER_WORDS_OFFSET, Header, VERSION, WAKE_WORDS, WAKE_WORDS_OFFSET, WakeLine,
};
use crate::protocol::record::TextSegment;
use crate::protocol::segment::{Lanes, SlotSegment};
use crate::protocol::slot_digest::TAGS;
use crate::protocol::slots::Memory;
use crate::protocol::version_1;
use crate::protocol::wake::WakeWord;

impl Memory for Mapping {
    fn header(&self) -> &Header {
        // SAFETY: the offset is within the header page, which is mapped as long as self lives (checked in `decode`,
        // file size included), and aligned, as the base is aligned to a page. All fields are atomics.
        unsafe { self.first.base.add(HEADER_WORDS_OFFSET).cast::<Header>().as_ref() }
    }

    fn directory(&self) -> &Directory {
        // SAFETY: as for the header.
        unsafe { self.first.base.add(DIRECTORY_OFFSET).cast::<Directory>().as_ref() }
    }

    fn wake_word(&self, generation: &GenerationWord) -> &WakeWord {
        let address = std::ptr::from_ref(generation).addr();
        if self.is_of_version_1 {
            let (segment, within) = self.find(generation).expect("the word is in a segment");
            let SlotSegment::Version1(slots) = self.slots(segment.extent.number) else {
                unreachable!("a segment of version 1")
            };
            return &slots[within as usize / version_1::SLOT_SIZE].wake;
        }
        // SAFETY: the page of the wake words comes before the first segment, so it is mapped as long as self lives; it is aligned
        // as the base is. All fields are atomics.
        let words = unsafe { self.first.base.add(WAKE_WORDS_OFFSET).cast::<[WakeLine; WAKE_WORDS]>().as_ref() };
        // A segment begins at a multiple of 4096 in the file, and in memory, so the address says the same as the offset.
        &words[address / size_of::<GenerationWord>() % WAKE_WORDS].word
    }

    fn outline(&self) -> Result<Outline, Error> {
        let known = self.mapped();
        let Some(mut extent) = self.next_extent(&known)? else { return Ok(known) };
        let mut outline = known;
        let size = self.size()?;
        loop {
            let expected = extent.end();
            if size < expected {
                return Err(self.file.error(ErrorKind::Truncated { found: size, expected }));
            }
            outline = self.map_segment(&outline, &extent).map_err(|error| self.file.place(error))?;
            match self.next_extent(&outline)? {
                Some(next) if next.end() <= size => extent = next,
                // One that was added after the size was found is for the next call.
                _ => break,
            }
        }
        // If that fails, `known` was closed meanwhile, by a thread of this process that has moved on to the successor.
        if self.known.raise(outline.segments) { Ok(outline) } else { Err(self.file.error(ErrorKind::Retired)) }
    }

    fn reachable(&self) -> Outline {
        self.outline().unwrap_or_else(|_| self.mapped())
    }

    fn slots(&self, number: u32) -> SlotSegment<'_> {
        let segment = self.of_kind(&self.slots, number);
        let base = segment.base().expect("a segment that is counted is mapped");
        let count = segment.extent.slots as usize;
        // SAFETY: the segment is counted, so it is mapped, and lies within the file, whose size was checked; the extent has room
        // for as many slots as it says. It begins at a multiple of 4096 (in version 1, of 128), and with 16 slots at least
        // each lane is aligned to its words. All words are atomics, so shared references to memory that other processes change are
        // sound. A file that is truncated later causes a SIGBUS, which is documented.
        unsafe {
            if self.is_of_version_1 {
                return SlotSegment::Version1(std::slice::from_raw_parts(base.cast().as_ptr(), count));
            }
            SlotSegment::Lanes(Lanes {
                generations: std::slice::from_raw_parts(base.cast().as_ptr(), count),
                digests: std::slice::from_raw_parts(base.add(8 * count).cast().as_ptr(), count),
                records: std::slice::from_raw_parts(base.add(24 * count).cast().as_ptr(), count),
                tags: std::slice::from_raw_parts(base.add(32 * count).cast().as_ptr(), count / TAGS),
            })
        }
    }

    fn texts(&self, number: u32) -> TextSegment<'_> {
        let segment = self.of_kind(&self.texts, number);
        let base = segment.base().expect("a segment that is counted is mapped");
        let Extent { offset, bytes, .. } = segment.extent;
        // SAFETY: as for the slots: mapped, within the file, aligned, and nothing but atomics.
        TextSegment::new(offset, unsafe { std::slice::from_raw_parts(base.cast().as_ptr(), bytes as usize / 8) })
    }

    fn extend(&self, outline: &Outline, word: u64) -> Result<(), Error> {
        if self.is_of_version_1 {
            return Err(self.file.error(ErrorKind::LayoutVersion { found: version_1::VERSION, expected: VERSION }));
        }
        let full = |reason| {
            let advice = "reset it to be rid of old keys; an anonymous table may have more if it is made under a higher limit on \
                          file size (ulimit -f)";
            Err(self.file.error(ErrorKind::TableFull { reason, advice }))
        };
        if outline.segments as usize >= SEGMENTS {
            return full(format!("it has {SEGMENTS} segments, and cannot have more"));
        }
        let extent = match outline.next(self.capacity, word) {
            Ok(extent) if extent.end() <= self.most => extent,
            _ => return full(format!("it would outgrow the {} bytes that it may have", self.most)),
        };
        let (start, end) = (extent.offset, extent.end());
        // Mapped before there is room, as that can be undone, unlike a segment in the directory that cannot be mapped. It is
        // unmapped again, as another process may yet put a segment of another kind there.
        let part = self.map_part(&extent).map_err(|error| self.file.place(no_room(error, end - start)))?;
        let room = match self.file.path {
            Some(_) => self.file.with(OFlag::O_RDWR, |file| allocate(file, start, end)),
            // An anonymous table whose descriptor was closed gets its memory when it is touched: there is no disk that could be
            // full.
            None => self.file.with_own(|file| allocate(file, start, end)).unwrap_or(Ok(())),
        };
        // SAFETY: the part was not published, so no reference to it was given out.
        unsafe { part.unmap() };
        room
    }
}

#!/usr/bin/env python3
"""Reads a gensync table. Written from the documentation of src/protocol/layout.rs alone, which it shows to be enough.

    read_table.py PATH            prints every key, one JSON object a line
    read_table.py PATH KEY...     prints these keys, each found by its digest

Exit status: 0 done; 1 the table has no such key; 2 this is no table of this version, as a line on standard error says.

The file is only read, and other processes may write to it meanwhile. So each word is loaded once, and a word before what it
leads to.
"""

import hashlib
import json
import mmap
import os
import struct
import sys

PAGE = 4096
DIRECTORY, ENTRIES = 1024, 256
FIRST_SEGMENT = 8192
SLOTS, TEXTS, PARTICIPANTS = 1, 2, 3
CAPACITIES = [2**i for i in range(4, 26)]
LONGEST_TEXT = 65536
LOWEST_GENERATION = 2**40


class NotATable(Exception):
    pass


class Table:
    def __init__(self, path):
        if not os.path.isfile(path):
            raise NotATable("not a regular file" if os.path.exists(path) else "no such file")
        self.file = open(path, "rb")
        # The fixed part of the header, which is little-endian in every file.
        header = self.file.read(88)
        expect("the magic", header[:8], b"gensync\0")
        if os.fstat(self.file.fileno()).st_size < FIRST_SEGMENT:
            raise NotATable(f"the file is shorter than {FIRST_SEGMENT} bytes, where segments begin")
        version, mark, slot_bytes, first_segment, self.capacity = struct.unpack_from("<IIIIQ", header, 8)
        self.salt = header[32:48]
        expect("the layout version", version, 2)
        expect("the checksum", header[80:].hex(), hashlib.sha256(header[:80]).digest()[:8].hex())
        if mark not in (1, 2):
            raise NotATable(f"the byte-order mark is {mark}, not 1 or 2")
        expect("the bytes of a slot", slot_bytes, 33)
        expect("the beginning of the segments", first_segment, FIRST_SEGMENT)
        if self.capacity not in CAPACITIES:
            raise NotATable(f"the capacity is {self.capacity}, not a power of two from 16 to 2^25")

        # CPython loads an aligned word of its machine's byte order at once. A file of another order has no writers here.
        self.order = struct.Struct("<Q" if mark == 1 else ">Q")
        self.map_whole_file()

    def map_whole_file(self):
        self.map = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)

    def bytes(self, offset, count):
        self.reach(offset + count)
        return self.map[offset : offset + count]

    def byte(self, offset):
        return self.bytes(offset, 1)[0]

    def word(self, offset):
        self.reach(offset + 8)
        return self.order.unpack_from(self.map, offset)[0]

    def reach(self, end):
        """Maps the file anew if it has grown."""
        if end > len(self.map):
            self.map_whole_file()
            if end > len(self.map):
                raise NotATable(f"the file has {len(self.map)} bytes, but should have {end} or more")

    def segments(self):
        """The kind, beginning and end of each segment."""
        begin = FIRST_SEGMENT
        for i in range(ENTRIES):
            entry = self.word(DIRECTORY + 8 * i)
            if entry == 0:
                break
            kind, pages = entry & 0xFF, entry >> 8
            if kind not in (SLOTS, TEXTS, PARTICIPANTS):
                raise NotATable(f"segment {i} is of the unknown kind {kind}")
            end = begin + PAGE * pages
            self.reach(end)
            yield kind, begin, end
            begin = end

    def lanes(self):
        """The segments of slots."""
        slots = 0
        for kind, begin, end in self.segments():
            if kind == SLOTS:
                # 16, 16, 32, 64, ...: each segment doubles the table.
                lanes = Lanes(begin, self.capacity if slots == 0 else slots)
                slots += lanes.slots
                if lanes.end() > end:
                    raise NotATable(f"the segment at {begin} has no room for {lanes.slots} slots")
                yield lanes

    def is_text(self, begin, end):
        return any(kind == TEXTS and begin >= low + 64 and end <= high for kind, low, high in self.segments())

    def keys(self):
        """Every key that has begun."""
        for lanes in self.lanes():
            for slot in range(lanes.slots):
                key = self.key(lanes, slot)
                if key:
                    yield key

    def find(self, text):
        """The key with this text."""
        a, b = digest = self.digest(text)
        tag = b >> 56 or 1
        for number, lanes in enumerate(self.lanes()):
            for slot in lanes.search((a + number * b) % 2**64):
                if self.byte(lanes.tag(slot)) not in (0, tag):
                    continue
                found = self.digest_of(lanes, slot)
                if found == digest:
                    return self.key(lanes, slot)
                if found[0] == 0:
                    return None
        return None

    def digest(self, text):
        """The words A and B of a key."""
        a, b = struct.unpack_from("<QQ", hashlib.sha256(self.salt + text).digest())
        return a or 1, b or 1

    def digest_of(self, lanes, slot):
        return self.word(lanes.digest(slot)), self.word(lanes.digest(slot) + 8)

    def key(self, lanes, slot):
        word = self.word(lanes.generation(slot))
        generation = word % 2**54
        if generation < LOWEST_GENERATION:
            return None
        record = self.word(lanes.record(slot))
        offset, length = record % 2**34, record >> 34
        end = offset + 8 + min(length, LONGEST_TEXT)
        if offset % 8 or not self.is_text(offset, end):
            raise NotATable(f"the key at {lanes.generation(slot)} has its record at {offset}, where there are no texts")
        first = self.word(offset)
        text = self.bytes(offset + 8, end - offset - 8)
        a, b = self.digest_of(lanes, slot)
        return {
            # The text of a longer key may end within a character.
            "key": text.decode(errors="replace"),
            "key_hex": text.hex(),
            "key_length": length,
            "digest": f"{a:016x}{b:016x}",
            "generation": generation,
            "updates": (generation - first) % 2**54,
            "pending": word >> 56,
            "waiting": bool(word >> 55 & 1),
            "retired": bool(word >> 54 & 1),
            "offset": lanes.generation(slot),
        }


class Lanes:
    """Where a segment of slots has what."""

    def __init__(self, begin, slots):
        self.begin, self.slots = begin, slots

    def generation(self, slot):
        return self.begin + 8 * slot

    def digest(self, slot):
        return self.begin + 8 * self.slots + 16 * slot

    def record(self, slot):
        return self.begin + 24 * self.slots + 8 * slot

    def tag(self, slot):
        return self.begin + 32 * self.slots + slot

    def end(self):
        return self.begin + 33 * self.slots

    def search(self, place):
        """The slots where a key may stand, in the order of a search."""
        size = min(self.slots, 64)
        line = place % (self.slots // size) * size
        groups = size // 16
        for i in range(groups):
            group = line + 16 * ((place // 2**60 + i) % groups)
            yield from range(group, group + 16)


def expect(what, found, expected):
    if found != expected:
        raise NotATable(f"{what} is {found}, not {expected}")


def main():
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    path, *texts = sys.argv[1:]
    missing = False
    try:
        table = Table(path)
        keys = (table.find(os.fsencode(text)) for text in texts) if texts else table.keys()
        for key in keys:
            if key:
                print(json.dumps(key))
            else:
                missing = True
    except (NotATable, OSError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 2
    return int(missing)


if __name__ == "__main__":
    sys.exit(main())

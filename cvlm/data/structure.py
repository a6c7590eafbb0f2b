"""Whether a JPEG or PNG file is whole, told from its structure alone, in a small part of the time that decoding takes.

Only files that leave no doubt pass. Whatever is damaged or merely unusual is left to the decoder, so nothing that
decodes is ever refused here; what cannot be seen this way are wrong pixels inside compressed data that is complete.
"""

import re
import struct
import zlib
from functools import lru_cache
from typing import NamedTuple

Found = tuple[str, tuple[int, int]]

_ENTROPY_END = re.compile(rb"\xff[^\x00\xd0-\xd7]")
"""The first marker behind compressed data: neither a stuffed zero nor a restart marker (JPEG, ITU T.81, B.1.1)."""

_EOI, _SOS, _DQT, _DHT, _DRI, _COMMENT = 0xD9, 0xDA, 0xDB, 0xC4, 0xDD, 0xFE
_PROGRESSIVE = 0xC2
_FRAMES = (0xC0, 0xC1, _PROGRESSIVE)  # baseline, extended sequential; all with Huffman codes

_MPF = b"MPF\0"
"""How the segment begins that announces several pictures in one file."""

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS = frozenset(
    {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"bKGD", b"sBIT", b"tIME"}
)
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def whole(data: bytes) -> Found | None:
    """Return member suffix and (width, height) of a JPEG or PNG that is surely whole, else None."""
    try:
        if data.startswith(b"\xff\xd8"):
            size = _jpeg(data)
            return ("jpg", size) if size is not None else None
        if data.startswith(_PNG):
            size = _png(data)
            return ("png", size) if size is not None else None
    except (IndexError, struct.error):  # the data ends inside a header
        return None
    return None


def _jpeg(data: bytes) -> tuple[int, int] | None:
    """Walk from SOI to EOI: every segment within the file, one frame, tables before their use, no empty scan."""
    position, scans = 2, 0
    frame: _Frame | None = None
    quantisers, codes = set[int](), set[int]()
    while data[position] == 0xFF:
        marker = data[position + 1]
        if marker == _EOI:
            return frame.size if frame is not None and scans else None
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4])
        if not position + 4 <= end <= len(data):
            return None
        body = data[position + 4 : end]
        if marker == _SOS:
            if frame is None or not _scan_fits(body, frame, codes) or not frame.quantisers <= quantisers:
                return None
            found = _ENTROPY_END.search(data, end)
            if found is None or found.start() == end:
                return None
            scans, end = scans + 1, found.start()
        elif marker in (_DHT, _DQT):
            tables = _huffman_tables(body) if marker == _DHT else _quantisers(body)
            if not tables:
                return None
            (codes if marker == _DHT else quantisers).update(tables)
        elif marker in _FRAMES:
            if frame is not None:
                return None
            frame = _frame(body, marker == _PROGRESSIVE)
            if frame is None:
                return None
        elif marker == _DRI:
            if len(body) != 2:
                return None
        elif not (marker == _COMMENT or 0xE0 <= marker <= 0xEF) or body.startswith(_MPF):
            return None
        position = end
    return None


class _Frame(NamedTuple):
    """What a frame header states; `components` are the identifiers of the colour components."""

    size: tuple[int, int]
    progressive: bool
    components: frozenset[int]
    quantisers: frozenset[int]


@lru_cache(maxsize=1024)
def _frame(body: bytes, progressive: bool) -> _Frame | None:
    precision, height, width, count = struct.unpack_from(">BHHB", body)
    components = frozenset(body[6::3])
    if precision != 8 or not height or not width or count not in (1, 3, 4) or len(body) != 6 + 3 * count:
        return None
    if len(components) < count or any(not 1 <= n <= 4 for both in body[7::3] for n in (both >> 4, both & 15)):
        return None
    return _Frame((width, height), progressive, components, frozenset(body[8::3]))


def _scan_fits(body: bytes, frame: _Frame, codes: set[int]) -> bool:
    """Whether a scan header is complete and names components and tables that are there (T.81, B.2.3 and G.1.1.1)."""
    count, first, last = body[0], body[-3], body[-2]
    chosen = body[1:-3]
    if not 1 <= count <= 4 or len(chosen) != 2 * count or not frame.components.issuperset(chosen[::2]):
        return False
    tables = chosen[1::2]
    if not frame.progressive:
        used = {number for both in tables for number in (both >> 4, 0x10 | both & 15)}
        return used <= codes and (first, last, body[-1]) == (0, 63, 0)
    if first == 0:
        return last == 0 and (body[-1] >> 4 > 0 or all(both >> 4 in codes for both in tables))
    return first <= last <= 63 and count == 1 and 0x10 | tables[0] & 15 in codes


@lru_cache(maxsize=1024)
def _huffman_tables(body: bytes) -> frozenset[int]:
    """Return the numbers of the tables of a DHT segment (AC tables from 16 on), none if it is damaged.

    Most files carry one of a few sets of tables, hence the cache.
    """
    found, position = set(), 0
    while position < len(body):
        counts = body[position + 1 : position + 17]
        room = 1 << 16
        for length, count in enumerate(counts, start=1):
            room -= count << 16 - length
        symbols = body[position + 17 : position + 17 + sum(counts)]
        if len(counts) < 16 or room < 0 or not 0 < sum(counts) <= 256:
            return frozenset()
        if body[position] < 0x10 and max(symbols, default=0) > 15:  # a DC code counts bits of a difference
            return frozenset()
        found.add(body[position])
        position += 17 + sum(counts)
    return frozenset(found) if position == len(body) and all(n & 0xEF < 4 for n in found) else frozenset()


@lru_cache(maxsize=1024)
def _quantisers(body: bytes) -> frozenset[int]:
    """Return the numbers of the tables of a DQT segment, none if it is damaged."""
    found, position = set(), 0
    while position < len(body):
        found.add(body[position] & 15)
        position += 129 if body[position] >> 4 else 65
    return frozenset(found) if position == len(body) and all(n < 4 for n in found) else frozenset()


def _png(data: bytes) -> tuple[int, int] | None:
    """Walk from IHDR to IEND: known chunks only, each within the file and with the right CRC."""
    view, position, kinds = memoryview(data), len(_PNG), list[bytes]()
    width, height, depth, colour, compression, filters, interlace = struct.unpack_from(">IIBBBBB", data, position + 8)
    while True:
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data) or kind not in _PNG_CHUNKS:
            return None
        if zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
            return None
        kinds.append(kind)
        position = end
        if kind == b"IEND":
            break
    if kinds[0] != b"IHDR" or kinds.count(b"IHDR") > 1 or b"IDAT" not in kinds or not width or not height:
        return None
    if depth not in _PNG_DEPTHS.get(colour, ()) or (compression, filters) != (0, 0) or interlace > 1:
        return None
    return (width, height) if colour != 3 or b"PLTE" in kinds else None

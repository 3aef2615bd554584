"""Jane Austen's six novels out of Debian's package r-cran-janeaustenr (public domain).

The package keeps them as R objects in a "lazy load" file: for each object its length (4 bytes, big end
first), a letter for the compression and the compressed R serialization. What is wanted of it are the
character vectors: every string in it has a header of two big-endian words, flags (type 9) and length.

Paragraphs become lines and are put together to documents of about 8 kB; every seventh is for testing.
"""

from __future__ import annotations

import bz2
import html
import lzma
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

_STRING = 9
_ENCODINGS = (0, 4)  # the upper half of the flags: UTF-8 or native, ASCII
_LONGEST_LINE = 2000
_NOVEL_PARAGRAPHS = 300
_DOCUMENT_CHARACTERS = 8000


def documents(rdb: Path) -> tuple[list[str], list[str]]:
    """Calibration and test documents."""
    found = [text for novel in _novels(rdb.read_bytes()) for text in _cut(novel)]
    found = [text for text in found if len(text) > 200]
    return [t for i, t in enumerate(found) if i % 7 != 6], [t for i, t in enumerate(found) if i % 7 == 6]


def _novels(content: bytes) -> Iterator[list[str]]:
    """The paragraphs of each object that is long enough to be a novel."""
    while content:
        body, content = _decompress(content)
        paragraphs = re.split(r"\n\s*\n", "\n".join(_strings(body)))
        if len(paragraphs) > _NOVEL_PARAGRAPHS:
            yield [paragraph.replace("\n", " ") for paragraph in paragraphs]


def _decompress(content: bytes) -> tuple[bytes, bytes]:
    """The first object, and what follows it."""
    kind, start = content[4:5], 5
    if kind == b"Z":
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
        decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=filters)
    elif kind == b"2":
        decoder = bz2.BZ2Decompressor()
    else:
        decoder, start = zlib.decompressobj(), 4
    body = decoder.decompress(content[start:])
    return body, decoder.unused_data


def _strings(body: bytes) -> Iterator[str]:
    position = 0
    while position + 8 <= len(body):
        flags, length = struct.unpack_from(">Ii", body, position)
        text = body[position + 8 : position + 8 + length] if 0 <= length < _LONGEST_LINE else b""
        if flags & 0xFF == _STRING and flags >> 16 in _ENCODINGS and len(text) == length:
            yield text.decode("utf-8", errors="replace")
            position += 8 + length
        else:
            position += 1


def _cut(paragraphs: list[str]) -> Iterator[str]:
    kept: list[str] = []
    size = 0
    for paragraph in paragraphs:
        kept.append(paragraph.strip())
        size += len(paragraph)
        if size > _DOCUMENT_CHARACTERS:
            yield _spaces("\n".join(kept))
            kept, size = [], 0


def _spaces(text: str) -> str:
    text = html.unescape(text).replace("\xa0", " ").replace("\u200b", "")
    text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()

"""PNGs with 256 colours: a screenshot of a page needs no more, and is a third as large."""

import struct
import zlib
from collections import Counter
from typing import Final

COLOURS: Final = 256

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_RGB: Final = 2
_INDEXED: Final = 3

Colour = tuple[int, int, int]


def quantize(png: bytes) -> bytes:
    """Return the same image with its most frequent colours; others become the nearest of them.

    `png` must be as browsers write it: RGB, 8 bits a channel, not interlaced.
    """
    width, height, rows = _rows(png)
    pixels = [
        (row[place], row[place + 1], row[place + 2])
        for row in rows
        for place in range(0, 3 * width, 3)
    ]
    counts = Counter(pixels)
    palette = [colour for colour, _ in counts.most_common(COLOURS)]
    index = {colour: _nearest(colour, palette) for colour in counts}
    scanlines = bytearray()
    for start in range(0, width * height, width):
        scanlines.append(0)  # no filter
        scanlines.extend(index[pixel] for pixel in pixels[start : start + width])
    head = struct.pack(">IIBBBBB", width, height, 8, _INDEXED, 0, 0, 0)
    return b"".join(
        (
            _SIGNATURE,
            _chunk(b"IHDR", head),
            _chunk(b"PLTE", b"".join(bytes(colour) for colour in palette)),
            _chunk(b"IDAT", zlib.compress(bytes(scanlines), 9)),
            _chunk(b"IEND", b""),
        )
    )


def _nearest(colour: Colour, palette: list[Colour]) -> int:
    return min(
        range(len(palette)),
        key=lambda place: sum((a - b) ** 2 for a, b in zip(colour, palette[place], strict=True)),
    )


def _rows(png: bytes) -> tuple[int, int, list[bytearray]]:
    """Undo the filters of a PNG (its specification, section 9)."""
    chunks = _chunks(png)
    width, height, depth, kind, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    if (depth, kind, interlaced) != (8, _RGB, 0):
        raise ValueError(f"not a screenshot of a browser: {depth} bits, kind {kind}")
    data, size = zlib.decompress(chunks[b"IDAT"]), 3 * width
    rows: list[bytearray] = []
    above = bytearray(size)
    for start in range(0, height * (size + 1), size + 1):
        row = bytearray(data[start + 1 : start + 1 + size])
        match data[start]:
            case 1:
                for place in range(3, size):
                    row[place] = (row[place] + row[place - 3]) & 255
            case 2:
                row = bytearray((a + b) & 255 for a, b in zip(row, above, strict=True))
            case 3:
                for place in range(size):
                    left = row[place - 3] if place > 2 else 0
                    row[place] = (row[place] + (left + above[place]) // 2) & 255
            case 4:
                for place in range(size):
                    left, corner = (row[place - 3], above[place - 3]) if place > 2 else (0, 0)
                    row[place] = (row[place] + _paeth(left, above[place], corner)) & 255
        rows.append(row)
        above = row
    return width, height, rows


def _paeth(left: int, above: int, corner: int) -> int:
    guess = left + above - corner
    return min((left, above, corner), key=lambda value: abs(guess - value))


def _chunks(png: bytes) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    place = len(_SIGNATURE)
    while place < len(png):
        length, name = struct.unpack_from(">I4s", png, place)
        found[name] = found.get(name, b"") + png[place + 8 : place + 8 + length]
        place += length + 12
    return found


def _chunk(name: bytes, body: bytes) -> bytes:
    check = zlib.crc32(body, zlib.crc32(name))
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", check)

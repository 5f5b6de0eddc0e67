"""A user's attributes: a flat JSON object carried on an event (age group, country, device, ...), as a few stable hashes.

Never required and never unbounded: at most MOST attributes of a user are kept, 32 bits each, and the head sees them through signed
feature hashing (Weinberger et al. 2009, arXiv 0902.2206), a sum over the attributes whose collisions cancel in expectation. The head's
first linear layer on it is their embedding.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from model.hashing import hash_of_bytes

MOST = 8
LONGEST = 64
"""Bytes of a key, and of a value, that count."""
WIDTH = 32
"""Size of the vector that the head sees."""
NONE = bytes(4 * MOST)
"""The hashes of nobody's attributes."""

_pack = struct.Struct(f"<{MOST}I").pack
_decode = msgspec.json.Decoder(dict[str, Any] | None).decode


def hashes_of(raw: bytes) -> bytes:
    """MOST little-endian 32-bit hashes of "key=value" of a JSON object: the first by key, then 0 where there are no more.

    Values are texts, numbers or booleans; null and nested values are ignored. 30, 30.0 and "30" are one value, true and "true" another,
    because a table of one's own (a CSV file) does not tell them apart. `null` in the object's place is no attributes.

    Raises ValueError for what is no JSON object.
    """
    try:
        found = _decode(raw) or {}
    except Exception as error:  # whatever a hostile byte string provokes
        raise ValueError(f"attributes are no JSON object: {error}") from None
    texts = [(key, text) for key in sorted(found) if (text := _text(found[key])) is not None][:MOST]
    hashes = [hash_of_bytes(key.encode()[:LONGEST] + b"=" + text.encode()[:LONGEST]) for key, text in texts]
    return _pack(*hashes, *[0] * (MOST - len(hashes)))


def _text(value: object) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, str | int | float) else None


class AttributeTable(dict[bytes, bytes]):
    """`hashes_of`, remembered by the JSON's own bytes: users come with few combinations, written by few programs. Raises its errors."""

    LIMIT = 65_536
    LONGEST_KEPT = 512
    """Bytes of JSON that are worth remembering: with LIMIT it bounds the table's memory."""

    def __missing__(self, raw: bytes) -> bytes:
        hashes = hashes_of(raw)
        if len(raw) <= self.LONGEST_KEPT:
            if len(self) >= self.LIMIT:
                self.clear()
            self[raw] = hashes
        return hashes


def as_rows(hashes: list[bytes]) -> NDArray[np.uint32]:
    """(N, MOST) of the hashes of N events."""
    return np.frombuffer(b"".join(hashes), "<u4").reshape(-1, MOST)


def vector(attributes: NDArray[np.uint32]) -> NDArray[np.float32]:
    """(N, WIDTH) signed feature hashing of (N, MOST) hashes: each adds 1 or -1 to one place; zeros for who has none."""
    if not attributes[:, 0].any():
        return np.zeros((len(attributes), WIDTH), np.float32)
    mixed = attributes * np.uint32(2_654_435_761)  # Knuth's multiplicative hash: CRC-32 is linear, and its low bits alone mix badly
    place = (mixed >> np.uint32(27)).astype(np.int64) + WIDTH * np.arange(len(attributes))[:, None]
    sign = np.where(attributes == 0, 0, np.where((mixed >> np.uint32(26)) & np.uint32(1), 1, -1))
    summed = np.bincount(place.ravel(), weights=sign.ravel(), minlength=len(attributes) * WIDTH)
    return summed.reshape(len(attributes), WIDTH).astype(np.float32)

"""The hash by which texts become numbers, the same in the trainer and in every worker."""

from __future__ import annotations

import zlib


def stable_hash(text: str) -> int:
    """A 32-bit hash that is the same in every process, and never 0 (0 is "missing"). Source: CRC-32, as zlib has it."""
    return hash_of_bytes(text.encode())


def hash_of_bytes(data: bytes) -> int:
    """The same of a text's UTF-8 bytes."""
    return zlib.crc32(data) or 1

"""Batches: users' streams cut into chunks, in random order, laid out so that no step is spent on padding.

Users are packed at random and never sorted by length: a batch would then depend on its users' future (DESIGN 6a). Only within a batch
are the chunks laid out time-major and longest first, as `PackedSequence` has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Batch:
    """Chunks of several users, laid out for `PackedSequence`.

    events: (N,) event of each packed position; sizes: (T,) chunks that have a t-th event; landmarks: (L,) rows of the material;
    place: (L,) packed position of each landmark's event.
    """

    events: NDArray[np.int64]
    sizes: NDArray[np.int64]
    landmarks: NDArray[np.int64]
    place: NDArray[np.int64]


def chunks(first: NDArray[np.int64], size: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut every user's events into pieces of `size`, the first one shorter by a random amount: (begins, ends), in random order.

    Where to cut must not depend on how many events a user will have: a stream seen whole would tell that few are to come.
    """
    count = np.diff(first)
    shift = rng.integers(0, size, len(count))
    pieces = np.ceil((count + shift) / size).astype(np.int64)
    user = np.repeat(np.arange(len(count)), pieces)
    piece = np.arange(len(user)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begins = first[user] + np.maximum(piece * size - shift[user], 0)
    ends = np.minimum(first[user] + (piece + 1) * size - shift[user], first[user + 1])
    order = rng.permutation(len(begins))
    return begins[order], ends[order]


def pack(begins: NDArray[np.int64], ends: NDArray[np.int64], landmark_event: NDArray[np.int64], landmark_first: NDArray[np.int64]) -> Batch:
    """One batch of some chunks. landmark_event: (L,) sorted; landmark_first: (E + 1,) first landmark of each event."""
    order = np.argsort(begins - ends, kind="stable")
    begins, ends = begins[order], ends[order]
    length = ends - begins
    steps = np.arange(length.max(initial=0))
    sizes = np.searchsorted(-length, -steps, side="left")
    starts = np.cumsum(sizes) - sizes
    step = np.repeat(steps, sizes)
    row = np.arange(len(step)) - starts[step]
    low, high = landmark_first[begins], landmark_first[ends]
    chunk = np.repeat(np.arange(len(begins)), high - low)
    landmarks = np.arange(len(chunk)) - np.repeat(np.cumsum(high - low) - (high - low), high - low) + low[chunk]
    place = starts[landmark_event[landmarks] - begins[chunk]] + chunk
    return Batch(begins[row] + step, sizes, landmarks, place)


class Packer:
    """The batches of one pass over some users' streams, each of about `batch_events`, packed when it is asked for.

    first, landmark_event: where each user's events begin, and each landmark's event, as `pack` takes them.
    """

    def __init__(
        self, first: NDArray[np.int64], landmark_event: NDArray[np.int64], chunk_events: int, batch_events: int, rng: np.random.Generator
    ) -> None:
        self._event, self._first = landmark_event, np.searchsorted(landmark_event, np.arange(first[-1] + 1))
        begins, ends = chunks(first, chunk_events, rng)
        asked = self._first[ends] > self._first[begins]  # chunks before the window only lead up to it
        self._begins, self._ends = begins[asked], ends[asked]
        events = np.cumsum(self._ends - self._begins)
        self._cuts = np.flatnonzero(np.diff(events // batch_events)) + 1
        self._count = len(self._cuts) + (len(events) > 0)

    def in_batches(self, count: int) -> None:
        """Deal the same chunks out to so many batches of about the same size instead: the last ones may be empty."""
        if count != self._count:
            events = np.cumsum(self._ends - self._begins)
            self._cuts = np.searchsorted(events, events[-1:].sum() * np.arange(1, count) / count)
            self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Batch]:
        spans = zip(np.split(self._begins, self._cuts), np.split(self._ends, self._cuts), strict=True)
        return (pack(begins, ends, self._event, self._first) for (begins, ends), _ in zip(spans, range(self._count), strict=False))

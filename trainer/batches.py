"""Batches: users' streams cut into chunks, in random order, laid out so that no step is spent on padding.

The rule: what a network sees at a moment (where its stream begins, in which batch, with which weight) is a function of what came before
the moment and of the seed, and of nothing else. What is broken by a look ahead:

1. Every stream is cut at a place drawn by the seed alone. If only long streams were cut, a stream shown from its first event would tell
   that few events are to come, and churn would be overstated for everybody whom a worker has stepped from the first event.
2. A batch is so many chunks, drawn at random: not so many events, and never chunks of like length. Either would let a user's future
   choose the others in the batch.
3. A moment's weight in a step is its own, over the mean weight of a batch: not over the batch's own weight, part of which is to come.

A chunk goes on from the state in which the one before it ended (in the pass before; `Carried`), so a network is trained on states of whole
streams, as a worker has them. Gradients end where a chunk begins (truncated backpropagation: Williams & Peng 1990).
Only within a batch are the chunks laid out time-major and longest first, as `PackedSequence` has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Batch:
    """C chunks of several users, laid out for `PackedSequence`.

    events: (N,) event of each packed position; sizes: (T,) chunks that have a t-th event; landmarks: (L,) rows of the material;
    place: (L,) packed position of each landmark's event. chunk: (C,) which chunk each row of the first step is.
    """

    events: NDArray[np.int64]
    sizes: NDArray[np.int64]
    landmarks: NDArray[np.int64]
    place: NDArray[np.int64]
    chunk: NDArray[np.int64]


def chunks(first: NDArray[np.int64], size: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut every user's events into pieces of `size`, the first one shorter by a random amount: (begins, ends), in order."""
    count = np.diff(first)
    shift = rng.integers(0, size, len(count))
    pieces = np.ceil((count + shift) / size).astype(np.int64)
    user = np.repeat(np.arange(len(count)), pieces)
    piece = np.arange(len(user)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begins = first[user] + np.maximum(piece * size - shift[user], 0)
    ends = np.minimum(first[user] + (piece + 1) * size - shift[user], first[user + 1])
    return begins, ends


def pack(begins: NDArray[np.int64], ends: NDArray[np.int64], landmark_event: NDArray[np.int64], landmark_first: NDArray[np.int64]) -> Batch:
    """One batch of some chunks; its `chunk` says which of these. landmark_event: (L,) sorted; landmark_first: (E + 1,) first landmark of
    each event."""
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
    return Batch(begins[row] + step, sizes, landmarks, place, order)


class Packer:
    """The batches of one pass over some users' streams, packed when asked for.

    first, landmark_event: where each user's events begin, and each landmark's event, as `pack` takes them. The cuts stay from pass to pass,
    so that a chunk can go on from where the one before it ended.
    """

    def __init__(self, first: NDArray[np.int64], landmark_event: NDArray[np.int64], chunk_events: int, rng: np.random.Generator) -> None:
        self._event, self._events = landmark_event, np.arange(first[-1] + 1)
        self._begins, self._ends = chunks(first, chunk_events, rng)
        self.continues = ~np.isin(self._begins, first[:-1])
        """(C,) whether a chunk goes on from the one before it; the others begin with a user's first event."""

    def count(self, batch_events: int) -> int:
        """Batches of about so many events each."""
        return max(1, round(int((self._ends - self._begins).sum()) / batch_events)) if len(self._begins) else 0

    def batches(self, count: int, rng: np.random.Generator, share: float = 1.0) -> Iterator[Batch]:
        """All chunks in random order, in so many batches of as many chunks each, or one more; some are empty where there are too few.

        share: of the landmarks that are asked, drawn anew in each pass.
        """
        asked = np.arange(len(self._event)) if share >= 1 else np.flatnonzero(rng.random(len(self._event)) < share)
        event = self._event[asked]
        first = np.searchsorted(event, self._events)
        for some in np.array_split(rng.permutation(len(self._begins)), count):
            batch = pack(self._begins[some], self._ends[some], event, first)
            yield Batch(batch.events, batch.sizes, asked[batch.landmarks], batch.place, some[batch.chunk])


class Carried:
    """(C, Z) the state in which each chunk ended when it was last stepped: where the next one of the same user goes on.

    In the first pass they are zeros. Later they are those of weights that were a pass younger; as the step size falls, these become those
    that a worker would have.
    """

    def __init__(self, continues: NDArray[np.bool_], size: int) -> None:
        nobody = len(continues)  # a row of zeros
        self.size = size
        self._before = torch.from_numpy(np.where(continues, np.arange(nobody) - 1, nobody))
        self._state = torch.zeros(nobody + 1, size)

    def before(self, chunk: NDArray[np.int64]) -> torch.Tensor:
        """(C, Z) states from which these chunks begin."""
        return self._state[self._before[torch.from_numpy(chunk)]]

    def keep(self, chunk: NDArray[np.int64], ended_CZ: torch.Tensor) -> None:
        """Keep the states in which these chunks ended."""
        self._state[torch.from_numpy(chunk)] = ended_CZ.detach().to("cpu")

"""Per-event features of the encoder: what it is told of one event and of the step from the user's previous one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.events import stable_hash
from model.hazards import DAY_MS, HOUR_MS
from model.statistics import SLOTS, signed_log1p

ITEM_BUCKETS = 1024
CATEGORY_BUCKETS = 256
SESSION_GAP_MS = HOUR_MS // 2
"""A longer silence begins a new session, whatever the events' session_id says."""
GAP_SCALES_MS = (HOUR_MS, DAY_MS, 7 * DAY_MS, 30 * DAY_MS)
NUMERIC = 12 + len(GAP_SCALES_MS)


@dataclass(frozen=True, slots=True)
class Scaling:
    """How values are standardised: robust centre and spread of the training data's signed log1p(value), which no absurd price moves."""

    value_centre: float = 0.0
    value_spread: float = 1.0


class Vocabulary:
    """Event types with a slot of their own: type i of `types` has slot i + 1, every other type has slot 0."""

    def __init__(self, types: Sequence[str]) -> None:
        if len(types) > SLOTS - 1:
            raise ValueError(f"a vocabulary has at most {SLOTS - 1} event types, not {len(types)}")
        self.types = tuple(types)
        hashes = np.array([stable_hash(t) for t in types], np.uint32)
        self._order = np.argsort(hashes)
        self._hashes = hashes[self._order]

    @property
    def used(self) -> int:
        """Slots that an event can have."""
        return len(self.types) + 1

    def slots(self, type_hash: NDArray[np.uint32]) -> NDArray[np.int64]:
        """(N,) slot of each type hash."""
        if not self.types:
            return np.zeros(len(type_hash), np.int64)
        place = np.minimum(np.searchsorted(self._hashes, type_hash), len(self._hashes) - 1)
        return np.where(self._hashes[place] == type_hash, self._order[place] + 1, 0)


@dataclass(slots=True)
class StepFeatures:
    """Inputs of N events. slot, item, category: (N,) int64 indices of embeddings; numeric: (N, NUMERIC) float32; gap_ms: (N,) int64, the
    time since the user's previous event, 0 where there is none; time_ms: (N,) when the event is taken to have been."""

    slot: NDArray[np.int64]
    item: NDArray[np.int64]
    category: NDArray[np.int64]
    numeric: NDArray[np.float32]
    gap_ms: NDArray[np.int64]
    time_ms: NDArray[np.int64]


@dataclass(slots=True)
class Previous:
    """What the features need of each event's predecessor, all (N,). seen: False for a user's first event (the rest is ignored)."""

    seen: NDArray[np.bool_]
    time_ms: NDArray[np.int64]
    type_hash: NDArray[np.uint32]
    item_hash: NDArray[np.uint32]
    category_hash: NDArray[np.uint32]
    session_hash: NDArray[np.uint32]


def bucket(hashes: NDArray[np.uint32], buckets: int) -> NDArray[np.int64]:
    """(N,) embedding index of a hash: 0 for a missing field, else 1 to `buckets`."""
    return np.where(hashes == 0, 0, hashes % buckets + 1).astype(np.int64)


def step_features(
    vocabulary: Vocabulary,
    scaling: Scaling,
    previous: Previous,
    time_ms: NDArray[np.int64],
    type_hash: NDArray[np.uint32],
    item_hash: NDArray[np.uint32],
    category_hash: NDArray[np.uint32],
    session_hash: NDArray[np.uint32],
    value: NDArray[np.float32],
) -> StepFeatures:
    """Features of N events, each with its predecessor. A late event is taken at its predecessor's time.

    A session begins with a user's first event, after SESSION_GAP_MS of silence, and where two events name different sessions.
    """
    seen = previous.seen
    now_ms = np.where(seen, np.maximum(time_ms, previous.time_ms), time_ms)
    gap_ms = np.where(seen, now_ms - previous.time_ms, 0).astype(np.int64)
    other_session = (session_hash != 0) & (previous.session_hash != 0) & (session_hash != previous.session_hash)
    has_value = ~np.isnan(value)
    log_value = (signed_log1p(np.where(has_value, value, 0)) - scaling.value_centre) / scaling.value_spread
    day = (now_ms % DAY_MS) * (2 * np.pi / DAY_MS)
    week = (now_ms % (7 * DAY_MS)) * (2 * np.pi / (7 * DAY_MS))
    numeric = np.empty((len(time_ms), NUMERIC), np.float32)
    for i, column in enumerate(
        (
            np.log1p(gap_ms / 1000) / 8,
            ~seen,
            has_value,
            # wide enough that a purchase does not saturate (DESIGN 6d), narrow enough that one absurd price does no harm
            np.where(has_value, np.clip(log_value, -6, 6), 0),
            np.sin(day),
            np.cos(day),
            np.sin(week),
            np.cos(week),
            seen & (type_hash == previous.type_hash),
            seen & (item_hash != 0) & (item_hash == previous.item_hash),
            seen & (category_hash != 0) & (category_hash == previous.category_hash),
            ~seen | (gap_ms > SESSION_GAP_MS) | other_session,
            *(seen * np.exp(gap_ms / -scale_ms) for scale_ms in GAP_SCALES_MS),  # 1: just now; 0: long ago, or never
        )
    ):
        numeric[:, i] = column
    return StepFeatures(
        vocabulary.slots(type_hash), bucket(item_hash, ITEM_BUCKETS), bucket(category_hash, CATEGORY_BUCKETS), numeric, gap_ms, now_ms
    )

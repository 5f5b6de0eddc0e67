"""Recurrent statistics: the part of a user's state with a fixed definition. O(1) an event, and they outlive a change of encoder.

Exponentially decayed counts per event type, recency per type, visits and their pace per type, visits by weekday, moments of the gaps,
decayed and mean log value, tenure. Events come in bursts (the lines of one basket): a visit is an event after VISIT_GAP_MS without one
of its type, so that a large basket does not look like a loyal customer. `update` is
numpy, in place, on the at-rest layout; `readout` is torch, because it belongs to the head and runs where the head runs.

A late event (older than the user's last) is taken as if it happened at the user's last event: time does not run backwards for a user.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from model import attributes as hashed
from model.hazards import DAY_MS, HOUR_MS

SLOTS = 12  # event types with counts of their own; slot 0 is every other type
SCALES_MS = (HOUR_MS, DAY_MS, 7 * DAY_MS, 30 * DAY_MS)  # and a fifth scale that never forgets
VISIT_GAP_MS = HOUR_MS // 2  # as the web's session: half an hour without an event of the type ends a visit
VISIT_SCALES_MS = (7 * DAY_MS, 30 * DAY_MS, 90 * DAY_MS)  # and a fourth scale that never forgets
PACE_WEIGHT = 0.2  # of the newest gap between visits in their moving moments
_VALUE_SCALE_MS = 30 * DAY_MS
_GAP_WEIGHT = 0.1  # of the newest gap in the moving moments
EPOCH_2000_MS = 946_684_800_000
MAX_TENURE_MS = 365 * DAY_MS  # tenure is capped: beyond it a longer log must not look like another kind of user
MAX_COUNT = 1000

STATISTICS = np.dtype(
    [
        ("first_ms", "<i8"),
        ("last_ms", "<i8"),
        ("counts", "<f4", (SLOTS, len(SCALES_MS) + 1)),
        ("last_seconds", "<u4", (SLOTS,)),  # since 2000-01-01; 0: never
        ("count", "<u4"),
        ("gap_mean", "<f4"),  # of log1p(seconds)
        ("gap_square", "<f4"),
        ("value_sum", "<f4"),  # of signed log1p, decayed over 30 days
        ("value_weight", "<f4"),
        ("value_total", "<f4"),
        ("value_count", "<f4"),
        ("visits", "<f4", (SLOTS, len(VISIT_SCALES_MS) + 1)),
        ("pace_mean", "<f4", (SLOTS,)),  # of log1p(seconds) between two visits of a type; 0 before the second
        ("pace_square", "<f4", (SLOTS,)),
        ("weekdays", "<f4", (7,)),  # visits that began on this day of the week (UTC, from Thursday), decayed over 90 days
        ("attributes", "<u4", (hashed.MOST,)),  # of the newest event that carried any; see `model.attributes`
    ]
)
"""One user's statistics. `count == 0` is a user never seen; all zero bytes are a valid, empty record."""

BY_SLOT = ("counts", "last_seconds", "visits", "pace_mean", "pace_square")
"""Those that depend on the vocabulary."""

_DECAY_PER_MS = np.array([1 / s for s in SCALES_MS] + [0.0])
_VISIT_DECAY_PER_MS = np.array([1 / s for s in VISIT_SCALES_MS] + [0.0])


def signed_log1p(value: NDArray[np.float32]) -> NDArray[np.float32]:
    """log1p of the magnitude with the sign kept: refunds are negative."""
    return np.sign(value) * np.log1p(np.abs(value))


def update(
    stats: NDArray[np.void],
    slot: NDArray[np.int64],
    time_ms: NDArray[np.int64],
    value: NDArray[np.float32],
    attributes: NDArray[np.uint32] | None = None,
    slots: int = SLOTS,
) -> None:
    """Take one event of each of N distinct users into `stats` (N,) of dtype STATISTICS, in place.

    slot: (N,) the event type's slot in [0, SLOTS); time_ms: (N,); value: (N,), NaN where the event has none;
    attributes: (N, 8) hashes, zeros where the event carries none (None: nobody does). They are replaced together.
    slots: how many of them the vocabulary uses; the others are empty and stay so.
    """
    n = len(stats)
    row = np.arange(n)
    new = stats["count"] == 0
    last_ms = np.where(new, time_ms, stats["last_ms"])
    now_ms = np.maximum(time_ms, last_ms)
    elapsed_ms = (now_ms - last_ms).astype(np.float64)
    counts = stats["counts"][:, :slots]
    counts *= np.exp(-elapsed_ms[:, None] * _DECAY_PER_MS).astype(np.float32)[:, None, :]
    counts[row, slot] += 1
    now_seconds = np.maximum((now_ms - EPOCH_2000_MS) // 1000, 1)
    _visit(stats, row, slot, now_ms, now_seconds, elapsed_ms, slots)
    stats["last_seconds"][row, slot] = now_seconds
    gap = np.log1p(elapsed_ms / 1000).astype(np.float32)
    weight = np.where(stats["count"] > 1, _GAP_WEIGHT, 1.0).astype(np.float32)  # the first gap is the mean of one gap
    weight[new] = 0
    stats["gap_mean"] += weight * (gap - stats["gap_mean"])
    stats["gap_square"] += weight * (gap * gap - stats["gap_square"])
    has_value = ~np.isnan(value)
    log_value = np.where(has_value, signed_log1p(np.where(has_value, value, 0)), 0).astype(np.float32)
    decay = np.exp(-elapsed_ms / _VALUE_SCALE_MS).astype(np.float32)
    stats["value_sum"] = stats["value_sum"] * decay + log_value
    stats["value_weight"] = stats["value_weight"] * decay + has_value
    stats["value_total"] += log_value
    stats["value_count"] += has_value
    stats["first_ms"] = np.where(new, now_ms, stats["first_ms"])
    stats["last_ms"] = now_ms
    stats["count"] += 1
    if attributes is not None:
        carries = attributes[:, 0] != 0
        stats["attributes"][carries] = attributes[carries]


def _visit(
    stats: NDArray[np.void],
    row: NDArray[np.int64],
    slot: NDArray[np.int64],
    now_ms: NDArray[np.int64],
    now_seconds: NDArray[np.int64],
    elapsed_ms: NDArray[np.float64],
    slots: int,
) -> None:
    """Visits, their pace and their weekdays; `stats` still has the recency from before this event."""
    decay = np.exp(-elapsed_ms[:, None] * _VISIT_DECAY_PER_MS).astype(np.float32)
    visits, weekdays = stats["visits"][:, :slots], stats["weekdays"]
    visits *= decay[:, None, :]
    weekdays *= decay[:, -2, None]
    last_seconds = stats["last_seconds"][row, slot].astype(np.int64)
    returns = (last_seconds > 0) & (now_seconds - last_seconds > VISIT_GAP_MS // 1000)
    begins = returns | (last_seconds == 0)
    gap = np.log1p(np.where(returns, now_seconds - last_seconds, 0)).astype(np.float32)
    weight = np.where(returns, np.where(visits[row, slot, -1] > 1, PACE_WEIGHT, 1), 0).astype(np.float32)
    changed = np.flatnonzero(begins)  # most events begin no visit
    row, slot, gap, weight = row[changed], slot[changed], gap[changed], weight[changed]
    mean, square = stats["pace_mean"], stats["pace_square"]
    mean[row, slot] += weight * (gap - mean[row, slot])
    square[row, slot] += weight * (gap * gap - square[row, slot])
    visits[row, slot] += 1
    weekdays[row, now_ms[changed] // DAY_MS % 7] += 1


SILENCE_MS = (3 * HOUR_MS, 12 * HOUR_MS, 2 * DAY_MS, 8 * DAY_MS, 30 * DAY_MS)
"""Scales of the silent age: hazards fall a hundredfold along it, more than one logarithm of it lets a small head follow."""
_EACH_SLOT = (len(SCALES_MS), 1, 1, len(VISIT_SCALES_MS), 1, 1, 1, 1)  # numbers a slot in the parts of the readout that are by slot
READOUT_SIZE = SLOTS * sum(_EACH_SLOT) + 7 + 12 + len(SILENCE_MS) + hashed.WIDTH


def readout_columns(slots: int) -> NDArray[np.int64]:
    """Columns of the readout that say something where only the first `slots` are used. The others are the same for everybody."""
    ends = np.cumsum(_EACH_SLOT) * SLOTS
    parts = [np.arange(end - SLOTS * width, end - (SLOTS - slots) * width) for end, width in zip(ends, _EACH_SLOT, strict=True)]
    return np.concatenate([*parts, np.arange(ends[-1], READOUT_SIZE)])


def readout(stats: NDArray[np.void], at_ms: NDArray[np.int64], device: torch.device | str = "cpu", slots: int = SLOTS) -> torch.Tensor:
    """(N, READOUT_SIZE) float32: what the head sees of the statistics and the calendar at the moment asked.

    at_ms: (N,) not before the user's last event (an earlier moment is taken as that event's). slots: of fewer, `readout_columns` alone.
    """
    silent_ms = np.maximum(at_ms - stats["last_ms"], 0)
    asked_ms = stats["last_ms"] + silent_ms
    whole_tenure_ms = asked_ms - stats["first_ms"]
    tenure_ms = np.minimum(whole_tenure_ms, MAX_TENURE_MS)
    decay = np.exp(-silent_ms[:, None] * _DECAY_PER_MS).astype(np.float32)
    last_seconds = stats["last_seconds"][:, :slots]
    since_type = np.where(
        last_seconds > 0,
        (asked_ms[:, None] - EPOCH_2000_MS) // 1000 - last_seconds.astype(np.int64),
        MAX_TENURE_MS // 1000,
    )
    day = (asked_ms % DAY_MS).astype(np.float64) * (2 * np.pi / DAY_MS)
    week = (asked_ms % (7 * DAY_MS)).astype(np.float64) * (2 * np.pi / (7 * DAY_MS))
    gap_mean = stats["gap_mean"]
    log_silent = np.log1p(silent_ms / 1000)
    scalars = np.stack(
        [
            *(np.exp(-silent_ms / scale) for scale in SILENCE_MS),
            log_silent / 15,
            (log_silent - gap_mean) / 5,
            gap_mean / 15,
            np.sqrt(np.maximum(stats["gap_square"] - gap_mean * gap_mean, 0)) / 5,
            stats["value_sum"] / (stats["value_weight"] + 1) / 5,
            stats["value_total"] / (stats["value_count"] + 1) / 5,
            np.log1p(tenure_ms / HOUR_MS) / 9,
            np.log1p(np.minimum(stats["count"], MAX_COUNT)) / 7,
            np.sin(day),
            np.cos(day),
            np.sin(week),
            np.cos(week),
        ],
        axis=1,
    ).astype(np.float32)

    def tensor(array: NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    counts_NVS = tensor(stats["counts"][:, :slots]) * tensor(decay).unsqueeze(1)
    # The count that never forgets is given as a rate: a total says how long the log is, not how the user behaves.
    per_day_N1 = tensor((1 / (whole_tenure_ms / DAY_MS + 1)).astype(np.float32)).unsqueeze(1)
    log_since = torch.log1p(tensor(np.clip(since_type, 0, MAX_TENURE_MS // 1000).astype(np.float32)))
    visit_decay = np.exp(-silent_ms[:, None] * _VISIT_DECAY_PER_MS).astype(np.float32)
    visits_NVS = tensor(stats["visits"][:, :slots]) * tensor(visit_decay).unsqueeze(1)
    # What a steady user of this tenure would have gathered, as a share of what one of long standing has.
    exposure = -np.expm1(-(whole_tenure_ms[:, None] + DAY_MS) * _VISIT_DECAY_PER_MS[:-1]).astype(np.float32)[:, None, :]
    pace_NV = tensor(stats["pace_mean"][:, :slots])
    # From the weekday asked on, so that "today" and "tomorrow" stand at the same place whatever the day.
    ahead = (asked_ms[:, None] // DAY_MS + np.arange(7)) % 7
    weekdays = np.take_along_axis(stats["weekdays"], ahead, 1) * visit_decay[:, -2, None]
    parts = [
        torch.log1p(counts_NVS[:, :, :-1]).flatten(1),
        torch.log1p(counts_NVS[:, :, -1] * per_day_N1),
        log_since / 15,
        torch.log1p(visits_NVS[:, :, :-1] / tensor(exposure)).flatten(1),
        torch.log1p(visits_NVS[:, :, -1] * per_day_N1),
        (log_since - pace_NV) / 5,
        pace_NV / 15,
        torch.sqrt(torch.clamp(tensor(stats["pace_square"][:, :slots]) - pace_NV * pace_NV, min=0)) / 5,
        tensor(weekdays / (weekdays.sum(1, keepdims=True) + 1)),
        tensor(scalars),
        tensor(hashed.vector(stats["attributes"])),
    ]
    return torch.cat(parts, dim=1)

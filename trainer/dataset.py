"""Training material: which moments are asked about, what was known then, and what came after. No Kafka here, and no network.

A landmark is a moment asked: right after an event (silent age 0), at an age in the silence that follows it, or when a calendar says so. A
worker asks of every event, and again as the silence passes fixed ages, so silent ages are drawn log-uniformly, and a draw counts if the
user still was silent then. Nothing but that depends on what came next: not how many are drawn, nor where, nor their weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.events import stable_hash
from model.features import Previous, Scaling, StepFeatures, Vocabulary, step_features
from model.hazards import DAY_MS, HOUR_MS
from model.rhythm import Visits
from model.statistics import SLOTS, STATISTICS, signed_log1p, update
from model.targets import ANY
from trainer.history import History

YOUNGEST_MS, OLDEST_MS = HOUR_MS // 2, 60 * DAY_MS
"""Silent ages that are asked about."""
ASKS = 8
"""Moments asked in a silence that lasts through all these ages, for one right after the event."""
DRAWS = 3
"""Landmarks that stand for them."""
SCHEDULED = (4, 24)
"""Moments that a schedule asks of a user in the mean, at least and at most."""
MOST_SCHEDULED = 500_000
"""Moments that a schedule asks in all, about: a long list of users gets fewer each."""
AFTER_MS = 1
"""From an event to the moment right after it: whoever comes every seven days comes within seven days from then on."""
NEVER_MS = np.int64(1) << 61


@dataclass(slots=True)
class Landmarks:
    """L moments asked, sorted by event. K event sets.

    event: (L,) the last event before the moment (index into the history). at_ms: (L,). weight: (L,) above 0.
    wait_ms: (L, K) to the next event of each set after the moment, NEVER_MS or so if none was seen. observed_ms: (L,) until the end.
    """

    event: NDArray[np.int64]
    at_ms: NDArray[np.int64]
    weight: NDArray[np.float32]
    wait_ms: NDArray[np.int64]
    observed_ms: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.event)

    def where(self, keep: NDArray[np.bool_] | NDArray[np.int64]) -> Landmarks:
        return Landmarks(self.event[keep], self.at_ms[keep], self.weight[keep], self.wait_ms[keep], self.observed_ms[keep])


def landmarks(
    history: History, sets: Sequence[Sequence[str]], begin_ms: int, end_ms: int, rng: np.random.Generator, draws: int = DRAWS
) -> Landmarks:
    """Moments in [begin, end) and what came after them, censored at `end`: events from `end` on are not looked at."""
    time_ms = history.time_ms
    inside = time_ms < end_ms
    last = ~np.append(history.has_previous[1:], False)  # no event of the same user follows
    next_ms = np.append(time_ms[1:], end_ms)
    silence_end_ms = np.where(last, end_ms, np.minimum(next_ms, end_ms))
    over = last | (next_ms > time_ms)  # of several events at one time, the last: until then the moment is not over
    asked = np.flatnonzero((time_ms + AFTER_MS < end_ms) & (time_ms >= begin_ms) & over)

    # Stratified: the draws of one event share the ages out between them.
    source = np.repeat(np.flatnonzero(inside & (time_ms + OLDEST_MS > begin_ms)), draws)
    place = (np.arange(len(source)) % draws + rng.random(len(source))) / draws
    age_ms = (YOUNGEST_MS * (OLDEST_MS / YOUNGEST_MS) ** place).astype(np.int64)
    still = (time_ms[source] + age_ms >= begin_ms) & (time_ms[source] + age_ms < silence_end_ms[source])
    source, age_ms = source[still], age_ms[still]

    event = np.concatenate([asked, source])
    at_ms = np.concatenate([time_ms[asked] + AFTER_MS, time_ms[source] + age_ms])
    weight = np.concatenate([np.ones(len(asked)), np.full(len(source), ASKS / draws)]).astype(np.float32)
    order = np.lexsort((at_ms, event))
    event, at_ms, weight = event[order], at_ms[order], weight[order]

    return _outcomes(history, sets, event, at_ms, weight, end_ms)


def scheduled(
    history: History, sets: Sequence[Sequence[str]], begin_ms: int, end_ms: int, rng: np.random.Generator, each: int | None = None
) -> Landmarks:
    """Moments in [begin, end) that the calendar sets, not the user: a list of everybody known, scored on some day, as for a campaign.

    Drawn uniformly from all days of all users since they became known, so every day counts alike, and a user by the time known, not by the
    events: the landmarks after events speak mostly of those who come most. each: moments a user, in the mean. Weights of 1.
    """
    known_ms = np.maximum(history.time_ms[history.first[:-1]] + 1, begin_ms)
    users = np.flatnonzero(known_ms < end_ms)
    span_ms = (end_ms - known_ms[users]).astype(np.float64)
    if each is None:
        each = int(np.clip(MOST_SCHEDULED // max(len(users), 1), *SCHEDULED))
    count = np.floor(span_ms * (each * len(users) / max(span_ms.sum(), 1.0)) + rng.random(len(users))).astype(np.int64)
    user = np.repeat(users, count)
    # Stratified, as the silent ages are: a user's draws share the days out between them.
    stratum = np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count)
    place = (stratum + rng.random(len(user))) / np.repeat(count, count)
    at_ms = known_ms[user] + (place * (end_ms - known_ms[user])).astype(np.int64)
    # Events of one user are in order of time, and users follow each other: one sort gives each moment's last event strictly before it.
    order = np.lexsort(
        (np.append(np.ones(len(history)), np.zeros(len(user))), np.append(history.time_ms, at_ms), np.append(history.user, user))
    )
    is_event = order < len(history)
    event = (np.cumsum(is_event) - 1)[~is_event]
    return _outcomes(history, sets, event, at_ms[order[~is_event] - len(history)], np.ones(len(user), np.float32), end_ms)


def to_learn_from(history: History, sets: Sequence[Sequence[str]], begin_ms: int, end_ms: int, rng: np.random.Generator) -> Landmarks:
    """What a model is fitted on: moments as a worker asks them, and as a schedule does."""
    return together(landmarks(history, sets, begin_ms, end_ms, rng), scheduled(history, sets, begin_ms, end_ms, rng))


def together(asked: Landmarks, on_schedule: Landmarks) -> Landmarks:
    """Both kinds of moments, each kind with half of the weight."""
    share = float(asked.weight.sum()) / max(float(on_schedule.weight.sum()), 1.0)
    event, at_ms = np.append(asked.event, on_schedule.event), np.append(asked.at_ms, on_schedule.at_ms)
    weight = np.append(asked.weight, on_schedule.weight * np.float32(share))
    wait_ms = np.concatenate([asked.wait_ms, on_schedule.wait_ms])
    observed_ms = np.append(asked.observed_ms, on_schedule.observed_ms)
    return Landmarks(event, at_ms, weight, wait_ms, observed_ms).where(np.lexsort((at_ms, event)))


def _outcomes(
    history: History,
    sets: Sequence[Sequence[str]],
    event: NDArray[np.int64],
    at_ms: NDArray[np.int64],
    weight: NDArray[np.float32],
    end_ms: int,
) -> Landmarks:
    """The landmarks of these moments: what came after each, up to `end`."""
    n, time_ms = len(history), history.time_ms
    inside = time_ms < end_ms
    wait_ms = np.empty((len(event), len(sets)), np.int64)
    for k, types in enumerate(sets):
        member = np.flatnonzero(inside & of_types(history, types))
        place = np.searchsorted(member, event, side="right")  # in log order: an event as late as the moment itself may follow it
        following = np.append(member, n)[place]
        same_user = np.append(history.user, -1)[following] == history.user[event]
        wait_ms[:, k] = np.where(same_user, np.append(time_ms, 0)[following] - at_ms, NEVER_MS)
    return Landmarks(event, at_ms, weight, wait_ms, end_ms - at_ms)


def thinned(moments: Landmarks, rng: np.random.Generator, at_most: int) -> Landmarks:
    """Moments of weight 1, as a worker asks them: each kept with its weight as the chance; at most so many."""
    kept = np.flatnonzero(rng.random(len(moments)) < moments.weight)
    if len(kept) > at_most:
        kept = np.sort(rng.choice(kept, at_most, replace=False))
    out = moments.where(kept)
    out.weight = np.ones(len(out), np.float32)
    return out


def features(history: History, vocabulary: Vocabulary, scaling: Scaling) -> StepFeatures:
    """Encoder inputs of every event."""

    def shifted(column: NDArray[np.generic]) -> NDArray[np.generic]:
        return np.concatenate([column[:1], column[:-1]])

    hashes = (history.type_hash, history.item_hash, history.category_hash, history.session_hash)
    previous = Previous(
        history.has_previous,
        *map(shifted, (history.time_ms, *hashes)),  # type: ignore[arg-type]
    )
    return step_features(vocabulary, scaling, previous, history.time_ms, *hashes, history.value)


def by_rank(first: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """How to step all users together, whose events begin at `first` (U + 1,): (users by falling count of events, their first events, how
    many of them have an event of rank r)."""
    count = np.diff(first)
    users = np.argsort(-count, kind="stable")
    active = np.searchsorted(-count[users], -np.arange(count.max(initial=0)), side="left")
    return users, first[users], active


def statistics_after(history: History, slot: NDArray[np.int64]) -> NDArray[np.void]:
    """(E,) of dtype STATISTICS: each user's statistics right after each event. slot: (E,) of the events' types."""
    users, first, active = by_rank(history.first)
    state = np.zeros(len(users), STATISTICS)
    out = np.empty(len(history), STATISTICS)
    for rank, n in enumerate(active):
        rows = first[:n] + rank
        attributes = None if history.attributes is None else history.attributes[rows]
        update(state[:n], slot[rows], history.time_ms[rows], history.value[rows], attributes)
        out[rows] = state[:n]
    return out


def gaps_ended(visits: Visits, history: History, slot: NDArray[np.int64], after: NDArray[np.void]) -> NDArray[np.int64]:
    """(E, K) `Visits.gaps` of each event. after: the statistics after each."""
    before = np.zeros(len(history), STATISTICS)
    later = np.flatnonzero(history.has_previous)
    before[later] = after[later - 1]
    return visits.gaps(before, slot, history.time_ms)


def choose_vocabulary(types: dict[str, int], sets: Sequence[Sequence[str]], champion: Sequence[str] = ()) -> list[str]:
    """The champion's types first, in their order, so that statistics and embeddings stay valid; the targets' types; the most frequent."""
    wanted = [t for members in sets for t in members if t != ANY]
    frequent = sorted(types, key=lambda t: (-types[t], t))
    chosen = list(dict.fromkeys([*champion, *wanted]))
    if len(chosen) > SLOTS - 1:
        raise ValueError(f"the targets name {len(set(wanted))} event types; a model has room for {SLOTS - 1} with those it already knows")
    return list(dict.fromkeys([*chosen, *frequent]))[: SLOTS - 1]


def fit_scaling(value: NDArray[np.float32]) -> Scaling:
    """Median and interquartile range (as a deviation: a normal law's is 1.349) of signed log1p of the values there are.

    Where half of them are one and the same, the range is 0 and their plain deviation stands in for it.
    """
    logs = signed_log1p(value[~np.isnan(value)])
    if not len(logs):
        return Scaling()
    low, median, high = np.percentile(logs.astype(np.float64), (25, 50, 75))
    spread = (high - low) / 1.349
    return Scaling(float(median), float(spread if spread > 1e-3 else max(logs.std(), 1e-3)))


def of_types(history: History, types: Sequence[str]) -> NDArray[np.bool_]:
    """(E,) which events are of one of the types."""
    if ANY in types:
        return np.ones(len(history), bool)
    return np.isin(history.type_hash, np.array([stable_hash(t) for t in types], np.uint32))

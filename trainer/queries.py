"""Queries about users at moments of one's own choosing: read from a file, answered by a model from the events before each moment alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from model.artifact import Model
from model.statistics import STATISTICS
from model.targets import Target
from trainer.history import History, read_table
from trainer.inputs import duration_ms, time_ms
from trainer.material import states_along

BLOCK_EVENTS = 200_000
"""Events stepped over at once (about 1 kB each), whole users at a time."""
BLOCK_ASKED = 65_536
COLUMNS = ("query", "task", "user_id", "at", "horizon")


@dataclass(slots=True)
class Queries:
    """Q queries. query: the file's own column; user_id, task: (Q,) texts; at_ms, horizon_ms: (Q,)."""

    query: pa.ChunkedArray
    task: list[str]
    user_id: list[str]
    at_ms: NDArray[np.int64]
    horizon_ms: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.task)


def read_queries(path: Path) -> Queries:
    """The queries of a CSV, JSONL or Parquet file. Raises ValueError that names the row, or OSError."""
    table = read_table(path, "queries", ("query", "task", "user_id", "at", "horizon"))
    if missing := [c for c in COLUMNS if c not in table.column_names]:
        raise ValueError(f"{path} has no column {', '.join(missing)}; queries have: {', '.join(COLUMNS)}")
    if not len(table):
        raise ValueError(f"{path} holds no queries")
    for name in COLUMNS:
        if table[name].null_count:
            row = int(np.flatnonzero(table[name].is_null().to_numpy())[0])
            raise ValueError(f"{path}: query {row + 1} has no {name}")
    query = table["query"]
    if len(query.unique()) < len(query):
        raise ValueError(f"{path}: two queries have one number (column query)")
    return Queries(
        query,
        table["task"].cast(pa.string()).to_pylist(),
        table["user_id"].cast(pa.string()).to_pylist(),
        _numbers(table["at"], time_ms, f"{path}: at"),
        _numbers(table["horizon"], duration_ms, f"{path}: horizon"),
    )


def _numbers(column: pa.ChunkedArray, parse: Callable[[str], int], where: str) -> NDArray[np.int64]:
    """(N,) milliseconds of a column of numbers, timestamps, durations or texts."""
    kind = column.type
    if pa.types.is_timestamp(kind):
        column = column.cast(pa.timestamp("ms", tz=kind.tz), safe=False).cast(pa.int64())
    if pa.types.is_duration(kind):
        column = column.cast(pa.duration("ms"), safe=False).cast(pa.int64())
    encoded = column.combine_chunks().dictionary_encode()
    try:
        values = [parse(str(v)) for v in encoded.dictionary.to_pylist()]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    numbers: NDArray[np.int64] = np.array(values, np.int64)[encoded.indices.to_numpy(zero_copy_only=False)]
    return numbers


def predict(
    model: Model, history: History, queries: Queries, progress: Callable[[float, str], None], *, where: str = "the queries"
) -> NDArray[np.float64]:
    """(Q,) probability of each query's task within its horizon. Raises ValueError where a task is no target of the model."""
    targets = {t.name: t for t in model.manifest.targets}
    if unknown := sorted(set(queries.task) - set(targets)):
        raise ValueError(f"{where} ask for task {', '.join(unknown)}; the model's targets are {', '.join(map(str, targets.values()))}")
    codes = {u: i for i, u in enumerate(history.user_ids)}
    user = np.fromiter((codes.get(u, -1) for u in queries.user_id), np.int64, len(queries))
    event = last_before(history, user, queries.at_ms)
    kinds: dict[tuple[str, int], int] = {}
    kind = np.array([kinds.setdefault(key, len(kinds)) for key in zip(queries.task, queries.horizon_ms.tolist(), strict=True)], np.int64)
    asked = [targets[task].model_copy(update={"horizon_ms": horizon}) for task, horizon in kinds]
    return answers(model, history, event, queries.at_ms, kind, asked, progress)


def last_before(history: History, user: NDArray[np.int64], at_ms: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N,) the user's last event strictly before the moment, as an index into the history; -1 where there is none."""
    place = Places(history).before(user, at_ms) - 1
    known = np.append(history.first, 0)[user]
    return np.where((user >= 0) & (place >= known), place, -1)


class Places:
    """Where moments fall among users' events: one sorted key of (user, time), in which times count by their rank."""

    def __init__(self, history: History) -> None:
        self._times, rank = np.unique(history.time_ms, return_inverse=True)
        self._key = history.user * (len(self._times) + 1) + rank

    def before(self, user: NDArray[np.int64], at_ms: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) index of the user's first event at or after the moment, or of where it would be."""
        rank = np.searchsorted(self._times, at_ms)
        places: NDArray[np.int64] = np.searchsorted(self._key, user * (len(self._times) + 1) + rank)
        return places


def answers(
    model: Model,
    history: History,
    event: NDArray[np.int64],
    at_ms: NDArray[np.int64],
    kind: NDArray[np.int64],
    asked: Sequence[Target],
    progress: Callable[[float, str], None],
) -> NDArray[np.float64]:
    """(N,) probability of `asked[kind]` at `at_ms`, with `event` the last one before (-1: a stranger, who gets the base rate)."""
    out = np.empty(len(event))
    scorers = [model.scorer([t]) for t in asked]
    nobody = np.zeros((1, model.network.state_size), np.float32), np.zeros(1, STATISTICS), np.zeros(1, np.int64)
    base = np.array([float(scorer(*nobody)[0, 0]) for scorer in scorers])
    out[event < 0] = base[kind[event < 0]]
    done = 0
    for rows, hidden_NH, stats in _states(model, history, event):
        within = np.argsort(kind[rows], kind="stable")
        order = rows[within]
        cuts = np.flatnonzero(np.diff(kind[order])) + 1
        for some, inner in zip(np.split(order, cuts), np.split(within, cuts), strict=True):
            for i in range(0, len(some), BLOCK_ASKED):
                row, place = some[i : i + BLOCK_ASKED], inner[i : i + BLOCK_ASKED]
                out[row] = scorers[kind[row[0]]](hidden_NH[torch.from_numpy(place)], stats[place], at_ms[row])[:, 0]
        done += len(rows)
        progress(done / len(event), f"{done:,} of {len(event):,} answered")
    return np.clip(out, 0.0, 1.0)


def _states(model: Model, history: History, event: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], torch.Tensor, NDArray[np.void]]]:
    """(rows, their hidden states, their statistics) of those with an event, in blocks of users; events after the last one needed are
    not stepped over. Users of a block have about as many events: a step then advances many of them."""
    needed = np.zeros(history.users, np.int64)
    asked = np.flatnonzero(event >= 0)
    np.maximum.at(needed, history.user[event[asked]], event[asked] - history.first[history.user[event[asked]]] + 1)
    by_count = np.argsort(needed, kind="stable")
    by_count = by_count[needed[by_count] > 0]
    cuts = np.flatnonzero(np.diff(np.cumsum(needed[by_count]) // BLOCK_EVENTS)) + 1
    rank = history.rank
    asked = asked[np.argsort(history.user[event[asked]], kind="stable")]
    first_asked = np.searchsorted(history.user[event[asked]], np.arange(history.users + 1))
    for users in np.split(by_count, cuts) if len(by_count) else []:
        users = np.sort(users)
        keep = np.zeros(history.users, np.int64)
        keep[users] = needed[users]
        chosen = rank < keep[history.user]
        part = history.where(chosen)
        place = np.cumsum(chosen) - 1
        rows = np.concatenate([asked[first_asked[u] : first_asked[u + 1]] for u in users])
        hidden_EH, stats = states_along(model, part)
        local = place[event[rows]]
        yield rows, hidden_EH[torch.from_numpy(local)], stats[local]


def write_predictions(path: Path, query: pa.ChunkedArray, probability: NDArray[np.float64]) -> None:
    """query,probability as CSV, or as .jsonl or .parquet where `path` ends so."""
    import json

    import pyarrow.csv
    import pyarrow.parquet

    table = pa.table({"query": query, "probability": probability})
    match path.suffix.lower():
        case ".parquet" | ".pq":
            pyarrow.parquet.write_table(table, path)
        case ".jsonl" | ".ndjson":
            path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
        case _:
            pyarrow.csv.write_csv(table, path, pyarrow.csv.WriteOptions(quoting_style="needed"))

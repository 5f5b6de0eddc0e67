"""python -m bench training: how fast the trainer fits, against a plain padded nn.GRU loop over the same data.

Both train on the demo's shop: the same chunks of users, the same landmarks, readouts, labels and likelihood, hidden units and optimizer.
The plain loop is the code that a good engineer writes first: a batch is the whole streams of some random users, padded to the longest,
through nn.GRU, and the head on the states at the landmarks. `chunked` is the same on the trainer's own chunks of streams, so that little
is padding: what is left is the trainer's recurrence, packing and head. Ours carries the belief cell's inputs, which the plain loops do not.
Events a second are those of training steps alone, by CPU time, because other programs may be running. The full fit is what `trainer fit`
does with events in memory: preparing, the belief cell, all passes, validation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from bench.laws.shop import START_MS, stream_of
from demo.shop import shop_law, simulate
from model.features import Vocabulary
from model.hazards import DAY_MS, grid
from model.memory import keep_freed_memory
from model.network import Network, Shape, members
from model.rhythm import Visits
from model.targets import event_sets
from trainer.batches import chunks
from trainer.challenger import shape_of
from trainer.dataset import choose_vocabulary, fit_scaling, landmarks, scheduled, together
from trainer.fit import fit
from trainer.history import History, from_table
from trainer.material import Material, negative_log_likelihood, prepare
from trainer.offline import fit_model
from trainer.settings import TrainerSettings

DAYS = 120
END_MS = START_MS + DAYS * DAY_MS
SAMPLE_USERS = 2000
"""Of a small shop, which says how many events a user has."""
SPEED_EVENTS = 250_000
"""That loops are compared on."""


def shop_table(events: int, seed: int) -> pa.Table:
    """About so many events of the shop over DAYS."""
    law = shop_law()
    a_user = len(simulate(law, users=SAMPLE_USERS, start_ms=START_MS, days=DAYS, seed=seed).time_ms) / SAMPLE_USERS
    shop = simulate(law, users=max(round(events / a_user), 10), start_ms=START_MS, days=DAYS, seed=seed)
    return stream_of(shop).table()


def material_of(history: History, settings: TrainerSettings) -> Material:
    """What `trainer.challenger` makes of a window without validation days."""
    sets, edges_ms = event_sets(settings.targets), grid(settings.targets)
    vocabulary = Vocabulary(choose_vocabulary(history.types, sets))
    rng = np.random.default_rng(settings.seed)
    moments = together(landmarks(history, sets, START_MS, END_MS, rng), scheduled(history, sets, START_MS, END_MS, rng))
    visits = Visits(members(sets, vocabulary))
    return prepare(history, moments, vocabulary, fit_scaling(history.value), edges_ms, visits=visits)


def plain_batches(
    material: Material, settings: TrainerSettings, chunked: bool, rng: np.random.Generator
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(begins, ends) of the streams, or of the trainer's chunks of them, of one batch after the other, for ever."""
    first = material.history.first
    while True:
        if chunked:
            begins, ends = chunks(first, settings.chunk_events, rng)
            order = rng.permutation(len(begins))
            begins, ends = begins[order], ends[order]
        else:
            order = rng.permutation(len(first) - 1)
            begins, ends = first[order], first[order + 1]
        a_batch = max(1, round(settings.batch_events * len(begins) / (ends - begins).sum()))
        for i in range(0, len(begins), a_batch):
            yield begins[i : i + a_batch], ends[i : i + a_batch]


def plain(material: Material, settings: TrainerSettings, *, chunked: bool, seconds: float) -> float:
    """Events that the plain loop trains on in a second of CPU time, measured for so long."""
    _, sets, bins = material.mask_LKB.shape
    torch.manual_seed(settings.seed)
    network = Network(Shape(settings.hidden, settings.head, sets, bins, settings.dropout))
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps, moments = material.steps, material.moments
    columns = [torch.from_numpy(np.ascontiguousarray(c)) for c in (steps.slot, steps.item, steps.category, steps.numeric)]
    weight_L = torch.from_numpy(moments.weight)
    landmark_first = np.searchsorted(moments.event, np.arange(len(material.history) + 1))
    batches = plain_batches(material, settings, chunked, np.random.default_rng(settings.seed))
    events = 0
    begin = time.process_time()
    while time.process_time() - begin < seconds:
        begins, ends = next(batches)
        padded = [pad_sequence([c[b:e] for b, e in zip(begins, ends, strict=True)], batch_first=True) for c in columns]
        hidden_UTH, _ = network.encoder.rnn(network.encoder.inputs(*padded))
        spans = list(zip(landmark_first[begins], landmark_first[ends], strict=True))
        rows = np.concatenate([np.arange(low, high) for low, high in spans])
        user = np.repeat(np.arange(len(begins)), [high - low for low, high in spans])
        rows_L = torch.from_numpy(rows)
        hidden_LH = hidden_UTH[torch.from_numpy(user), torch.from_numpy(moments.event[rows] - begins[user])]
        no_cells = hidden_LH.new_empty(len(rows), 0), hidden_LH.new_empty(len(rows), 0, 0)
        logits = network.answer(hidden_LH, *no_cells, material.readout_LR[rows_L])
        terms = negative_log_likelihood(logits, material.event_LKB[rows_L], material.mask_LKB[rows_L])
        loss = terms @ weight_L[rows_L] / weight_L[rows_L].sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), settings.gradient_norm)
        optimizer.step()
        events += int((ends - begins).sum())
    return events / (time.process_time() - begin)


def ours(material: Material, settings: TrainerSettings) -> float:
    """Events that `trainer.fit` trains on in a second of CPU time, the better of two passes."""
    _, sets, bins = material.mask_LKB.shape
    torch.manual_seed(settings.seed)
    network = Network(shape_of(settings, sets, bins))
    passes = settings.model_copy(update={"epochs": 2, "belief_steps": 1})
    return max(fit(network, material, material, passes, warm=False, clock=time.process_time).pass_speeds)


def run(events: int, seconds: float, settings: TrainerSettings, as_json: bool) -> int:
    """Print the figures; with `as_json`, one line of JSON after them. seconds: of each of the plain loops."""
    keep_freed_memory()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    known = shop_table(events, settings.seed)
    print(f"{len(known):,} events, {torch.get_num_threads()} torch threads", flush=True)
    material = material_of(from_table(known).where(np.arange(len(known)) < SPEED_EVENTS), settings)
    speed = {"ours": ours(material, settings)}
    speed |= {name: plain(material, settings, chunked=name == "chunked", seconds=seconds) for name in ("plain", "chunked")}
    del material
    for name, value in speed.items():
        times = "" if name == "ours" else f"    ours: {speed['ours'] / value:.1f} times that"
        print(f"{name:10}{value:>12,.0f} events in a second of CPU time{times}", flush=True)

    begin, begin_cpu = time.perf_counter(), time.process_time()
    now = datetime(2026, 1, 1, tzinfo=UTC)
    fitted = fit_model(known, END_MS, settings, now, lambda share, words: None).fitted
    full, full_cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    passes = len(fitted.pass_speeds)
    print(f"full fit: {full:.0f} s, {full_cpu:.0f} s of CPU; {passes} passes: {fitted.why}; validation loss {min(fitted.losses):.4f}")
    if as_json:
        facts = {
            "events": len(known),
            "threads": torch.get_num_threads(),
            **{f"{name}_events_per_cpu_s": round(value) for name, value in speed.items()},
            **{f"times_{name}": round(speed["ours"] / speed[name], 2) for name in ("plain", "chunked")},
            "fit_seconds": round(full, 1),
            "fit_cpu_seconds": round(full_cpu, 1),
            "passes": passes,
        }
        print(json.dumps(facts))
    return 0

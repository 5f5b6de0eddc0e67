"""The challenger: a network fitted on all but the newest part of the window. It starts from the champion's weights where they fit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any

import numpy as np
import torch

from model.artifact import SCHEMA_VERSION, Manifest, Model, Window
from model.clock import HOURS, Clock, pace_of
from model.features import Vocabulary
from model.hazards import grid
from model.network import Network, Shape, members
from model.registry import new_version
from model.rhythm import NO_VISITS, Visits
from model.targets import event_sets
from trainer import evaluate
from trainer.dataset import choose_vocabulary, fit_scaling, to_learn_from
from trainer.distributed import ALONE, Team
from trainer.fit import Fitted, fit
from trainer.history import History
from trainer.judges import held_out
from trainer.material import Material, prepare
from trainer.metrics import Metrics
from trainer.parts import Parts
from trainer.settings import TrainerSettings
from trainer.shards import Shards, in_memory
from trainer.stage import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Split:
    """The window's times: [begin, validation) trains, [validation, test) stops the fitting, [test, end) is for the gate."""

    begin_ms: int
    validation_ms: int
    test_ms: int
    end_ms: int


@dataclass(slots=True)
class Challenger:
    """A fitted model, and what its manifest needs."""

    model: Model
    hazard_KB: np.ndarray[Any, np.dtype[np.float64]]
    fitted: Fitted


def train(
    events: History | Shards,
    split: Split,
    champion: Model | None,
    settings: TrainerSettings,
    metrics: Metrics,
    now: datetime,
    rng: np.random.Generator,
    progress: Progress,
    stopping: Callable[[], bool],
    team: Team = ALONE,
) -> Challenger:
    """A network fitted on what was known before the test window; it starts from the champion's weights where they fit.

    team: the processes that fit it together. Each is given the same events, and takes its share of the users; all end with one network.
    """
    version = new_version(now)
    targets, sets = settings.targets, event_sets(settings.targets)
    shards = events if isinstance(events, Shards) else in_memory(events, settings.shard_events)
    shards = replace(shards, mine=(team.rank, team.size))
    known_before: dict[int, tuple[int, int]] = {}
    with metrics.timed("dataset"):
        first = shards[0]
        train_history = first.before(split.validation_ms)
        while team.most(not len(train_history)) and len(shards) > 1:
            shards = shards.fewer()  # there are hardly more users than shards
            first = shards[0]
            train_history = first.before(split.validation_ms)
        types = team.first_says(choose_vocabulary(train_history.types, sets, champion.manifest.vocabulary if champion else ()))
        vocabulary, edges_ms = Vocabulary(types), grid(targets)
        shape = shape_of(settings, len(sets), len(edges_ms))
        inherits = champion is not None and same_units(Shape(**champion.manifest.shape), shape)
        scaling = team.first_says(champion.scaling if champion and inherits else fit_scaling(train_history.value))
        pace_W = team.first_says(pace_of(train_history.user, train_history.time_ms)) if shape.belief else np.ones(HOURS)
        clock = champion.network.clock if champion and inherits else Clock(pace_W)
        visits = Visits(members(sets, vocabulary)) if shape.rhythm else NO_VISITS
        seeds = rng.integers(1 << 62, size=(2, len(shards), team.size))

        def material(known: History, begin_ms: int, end_ms: int, draws: np.random.Generator) -> Material:
            return prepare(known, to_learn_from(known, sets, begin_ms, end_ms, draws), vocabulary, scaling, edges_ms, clock, visits)

        def parts(end_ms: int, learners: bool) -> Parts:
            """Material of the moments up to `end`, by shards, of all users or of those who are not held out."""

            def make(number: int) -> Material:
                known = shards[number].before(split.test_ms)
                known_before[number] = known.users, len(known)
                known = (held_out(known, settings)[0] if learners else known).before(end_ms)
                return material(known, split.begin_ms, end_ms, np.random.default_rng([end_ms, *seeds[0, number]]))

            return Parts(make, len(shards))

        training, draws = parts(split.validation_ms, learners=True), np.random.default_rng(seeds[1, 0])
        newest = material(first.before(split.test_ms), split.validation_ms, split.test_ms, draws)
        of_others = material(held_out(train_history, settings)[1], split.begin_ms, split.validation_ms, draws)
        hazard_KB = evaluate.constant_hazards(training.first, edges_ms)
    torch.manual_seed(settings.seed)
    network = Network(shape)
    if network.encoder.belief is not None:
        network.encoder.belief.set_pace(torch.from_numpy(pace_W))
    start_at(network, hazard_KB)
    copied = inherit(network, champion, sets, edges_ms) if champion and inherits else 0
    network.ask(sets, edges_ms, vocabulary)
    logger.info(
        "fitting on %s events of %s users, %s moments%s; %s",
        f"{len(train_history):,}",
        f"{train_history.users:,}",
        f"{len(training.first.moments):,}",
        f", and {len(shards) - 1} times as many in other shards" if len(shards) > 1 else "",
        f"starting from {champion.manifest.version} ({copied} of {len(network.state_dict())} tensors)" if champion else "a first model",
    )
    del first, train_history
    network.to(settings.resolved_device)
    team.share_weights(network)
    network.refresh()
    warm = team.first_says(copied > 0)
    with metrics.timed("fit"):
        whole = partial(parts, split.test_ms, learners=False)
        fitted = fit(network, training, (newest, of_others), settings, whole, warm=warm, progress=progress, stopping=stopping, team=team)
    metrics.validation_loss.set(min(fitted.losses))
    logger.info("fitted in %.1f s, %d passes: %s", fitted.seconds, len(fitted.train_losses), fitted.why)
    users, known_events = (int(n) for n in team.total(*map(sum, zip(*known_before.values(), strict=True))))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        version=version,
        created_at=now,
        encoder=shape.encoder,
        shape=asdict(shape),
        vocabulary=types,
        scaling=asdict(scaling),
        edges_ms=list(edges_ms),
        targets=list(targets),
        encoder_id="",  # filled in when published
        lineage=champion.manifest.lineage if champion else version,
        weights_sha256="",
        base_hazards=hazard_KB.tolist(),
        window=Window(start_ms=split.begin_ms, end_ms=split.test_ms, users=users, events=known_events),
    )
    return Challenger(Model(network, manifest, vocabulary, scaling), hazard_KB, fitted)


def shape_of(settings: TrainerSettings, sets: int, bins: int) -> Shape:
    cells = {"belief": settings.belief_states, "rhythm": settings.rhythm_classes}
    return Shape(settings.hidden, settings.head, sets, bins, settings.dropout, settings.encoder, **cells)


def start_at(network: Network, hazard_KB: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    """Let the network begin as the constant hazard: it need not learn first how rare events are, and unseen bins are not made up.
    With a cell it begins as what that says."""
    if network.shape.cells:
        return
    final = network.head[-1]
    assert isinstance(final, torch.nn.Linear)
    with torch.no_grad():
        final.bias.copy_(torch.from_numpy(np.log(hazard_KB / (1 - hazard_KB)).reshape(-1)))


def same_units(one: Shape, other: Shape) -> bool:
    """Whether a state of the one is a state of the other."""
    return (one.encoder, one.hidden, one.belief, one.rhythm) == (other.encoder, other.hidden, other.belief, other.rhythm)


def inherit(network: Network, champion: Model, sets: tuple[tuple[str, ...], ...], edges_ms: tuple[int, ...]) -> int:
    """Copy the champion's tensors where they mean the same. Returns how many: the last layer, and whether it is added
    to what follows from the belief, only on the same sets and grid."""
    own, theirs = network.state_dict(), champion.network.state_dict()
    same_questions = champion.sets == sets and tuple(champion.manifest.edges_ms) == edges_ms
    last = (f"head.{len(network.head) - 1}.", "trust_JK")
    copied = {n: t for n, t in theirs.items() if n in own and own[n].shape == t.shape and (same_questions or not n.startswith(last))}
    network.load_state_dict({**own, **copied})
    return len(copied)

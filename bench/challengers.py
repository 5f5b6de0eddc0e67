"""Challengers whose worth is known: truly better ones, and sabotaged ones, on shops whose law is known. See `bench.gate`.

A shop has one window of events and its test window. Everything is trained by the trainer's own code; the exact filter of the law then
gives each model's expected log-loss on the moments that the gate judges, which tells better from worse without the noise of outcomes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import astuple, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from demo.attainable import Filter
from demo.shop import DAY_MS, Drift, Floats, shop_law, simulate
from demo.shop import History as Events
from model.artifact import ArtifactError, dump, load
from trainer import evaluate
from trainer.challenger import Challenger, Split, train
from trainer.fit import no_progress
from trainer.history import History, from_table
from trainer.metrics import Metrics
from trainer.rounds import split_by_time
from trainer.settings import TrainerSettings

START_MS = 1_760_000_000_000
NOW = datetime(2026, 1, 2, tzinfo=UTC)
DAYS = 60
DRIFT_DAY = 20
PROMOTION = 3.0
"""Factor of the planted drift."""


@dataclass(frozen=True)
class Size:
    """users: in a shop. epochs: of a good model. hidden: its units."""

    users: int
    epochs: int
    hidden: int


@dataclass(frozen=True)
class Bout:
    """One question to the gate. The gap is by how much the challenger's expected log-loss is worse, the mean over the targets."""

    name: str
    shop: Shop
    challenger: Challenger
    champion: Challenger

    @property
    def gap(self) -> float:
        """NaN where the challenger answers nothing."""
        return self.shop.expected_loss(self.challenger) - self.shop.expected_loss(self.champion)


def known_shop(seed: int, users: int, days: float, drift: Drift | None) -> tuple[Events, History]:
    """A simulated shop, and its events as the trainer reads them."""
    shop = simulate(shop_law(), users=users, start_ms=START_MS, days=days, seed=seed, drift=drift)
    columns = {
        "user_id": pa.array(shop.users).take(shop.user),
        "type": pa.array(shop.types).take(shop.type),
        "timestamp": shop.time_ms,
        "item_id": pa.array([None if i < 0 else f"i{i}" for i in shop.item], pa.string()),
        "category": pa.array([None if c < 0 else f"c{c}" for c in shop.category], pa.string()),
        "value": pa.array(shop.value, from_pandas=True),
    }
    return shop, from_table(pa.table(columns))


class Shop:
    """One simulated shop: its events as the trainer reads them, and the filter that knows its law."""

    def __init__(self, seed: int, size: Size, *, drifts: bool = False) -> None:
        drift = Drift(START_MS + DRIFT_DAY * DAY_MS, shop_law(PROMOTION)) if drifts else None
        shop, self.history = known_shop(seed, size.users, DAYS, drift)
        self.settings = TrainerSettings(
            belief_states=0,  # what is known of the law by construction cannot be sabotaged: the heads are to be all that answers
            hidden=size.hidden,
            head=32,
            epochs=size.epochs,
            test_share=0.3,
            seed=seed,
            log_directory=Path("unused"),
            device="cpu",
        )
        self.split = split_by_time(self.history, self.settings)
        self._filter = Filter(shop_law(), shop, drift)
        self._code = {name: i for i, name in enumerate(shop.users)}

    def fitted(self, history: History | None = None, split: Split | None = None, **changes: object) -> Challenger:
        """A model by the trainer's own code, on all of the window but the test part, or on what is given instead."""
        settings = self.settings.model_copy(update=changes)
        rng = np.random.default_rng(settings.seed)
        return train(history or self.history, split or self.split, None, settings, Metrics(), NOW, rng, no_progress, stopping=lambda: False)

    def until(self, day: float) -> Split:
        """A window that ends at a day, its last tenth for validation."""
        end_ms = START_MS + int(day * DAY_MS)
        return Split(self.split.begin_ms, end_ms - int(day * DAY_MS / 10), end_ms, end_ms)

    def share(self, share: float) -> History:
        """The history of some of the users."""
        return self.history.of_users(np.random.default_rng(0).random(self.history.users) < share)

    @cached_property
    def good(self) -> Challenger:
        return self.fitted()

    @cached_property
    def yesterdays(self) -> Challenger:
        """As good as `good`, but older by two days: any fresher challenger that does no harm may replace it."""
        return self.fitted(split=self.until((self.split.test_ms - START_MS) / DAY_MS - 2))

    @cached_property
    def _truth(self) -> tuple[evaluate.Exam, list[Floats]]:
        exam = evaluate.set_exam(
            self.history, self.settings.targets, self.split.test_ms, self.split.end_ms, np.random.default_rng(9), 10_000
        )
        user = np.array([self._code[self.history.user_ids[u]] for u in exam.users])
        asked = {t.name: ("*" if t.types == ("*",) else t.types, t.outcome, t.horizon_ms) for t in exam.asked}
        said = self._filter.probabilities(user, exam.moments.at_ms, asked)
        return exam, [said[t.name][rows] for t, rows in zip(exam.asked, exam.rows, strict=True)]

    def expected_loss(self, challenger: Challenger) -> float:
        """Mean over the targets of the log-loss that the law expects of a model, nats; NaN where it answers nothing."""
        exam, truths = self._truth
        try:
            model = load(*dump(challenger.model.manifest, challenger.model.network))
            said = [np.clip(p, 1e-7, 1 - 1e-7) for p in evaluate.answers(exam, model)]
        except ArtifactError:
            return float("nan")
        losses = [-(t * np.log(p) + (1 - t) * np.log1p(-p)).mean() for t, p in zip(truths, said, strict=True)]
        return float(np.mean(losses))


def better(seed: int, size: Size) -> Iterator[Bout]:
    """Four challengers that are truly better: more users, longer training, a longer window, and a drift followed."""
    shop = Shop(seed, size)
    yield Bout("more users", shop, shop.good, shop.fitted(shop.share(0.08)))
    yield Bout("longer training", shop, shop.good, shop.fitted(epochs=1, learning_rate=5e-4))
    yield Bout("a longer window", shop, shop.good, shop.fitted(split=shop.until(8)))
    drifted = Shop(seed + 1000, size, drifts=True)
    yield Bout("a drift followed", drifted, drifted.good, drifted.fitted(split=drifted.until(DRIFT_DAY)))


def sabotaged(seed: int, size: Size, names: tuple[str, ...] | None = None) -> Iterator[Bout]:
    """A challenger of each kind of sabotage, all but the leaked and the stale one fresher than the good champion that they meet."""
    shop = Shop(seed, size)
    for name, sabotage in SABOTAGES.items():
        if names is None or name in names:
            yield Bout(name, shop, sabotage(shop), shop.yesterdays)


def _shuffled(shop: Shop) -> Challenger:
    """Types permuted over all events: what is learned of purchases has nothing to do with their users."""
    order = np.random.default_rng(1).permutation(len(shop.history))
    return shop.fitted(replace(shop.history, type_hash=shop.history.type_hash[order]))


def _leaked(shop: Shop) -> Challenger:
    split = shop.split
    return shop.fitted(split=Split(split.begin_ms, split.end_ms - 2 * DAY_MS, split.end_ms, split.end_ms))


def _stale(shop: Shop) -> Challenger:
    return shop.fitted(split=shop.until(10))


def _truncated(shop: Shop) -> Challenger:
    return shop.fitted(epochs=1, learning_rate=2e-4)


def _starved(shop: Shop) -> Challenger:
    return shop.fitted(shop.share(0.02))


def _wrong_scaling(shop: Shop) -> Challenger:
    """Fitted on times in the wrong unit, a day taken for an hour. (Scaled values would not hurt: they tell nothing in this shop.)"""

    def scaled(time_ms: NDArray[np.int64]) -> NDArray[np.int64]:
        return START_MS + (time_ms - START_MS) // 24

    split = Split(*(int(scaled(np.int64(t))) for t in astuple(shop.split)))  # type: ignore[arg-type]
    challenger = shop.fitted(replace(shop.history, time_ms=scaled(shop.history.time_ms)), split)
    challenger.model.manifest.window = shop.good.model.manifest.window
    return challenger


def _altered(change: Callable[[Challenger], None]) -> Callable[[Shop], Challenger]:
    """The good model, spoilt after training."""

    def sabotage(shop: Shop) -> Challenger:
        challenger = deepcopy(shop.good)
        with torch.no_grad():
            change(challenger)
        return challenger

    return sabotage


def _last(challenger: Challenger) -> torch.nn.Linear:
    final = challenger.model.network.head[-1]
    assert isinstance(final, torch.nn.Linear)
    return final


def _nan(challenger: Challenger) -> None:
    _last(challenger).weight[0, 0] = torch.nan


def _too_high(challenger: Challenger) -> None:
    _last(challenger).bias.add_(0.7)


def _overconfident(challenger: Challenger) -> None:
    _last(challenger).weight.mul_(2)


def _constant(challenger: Challenger) -> None:
    _last(challenger).weight.zero_()


def _saturated(challenger: Challenger) -> None:
    _last(challenger).bias.fill_(-40)


def _swapped(challenger: Challenger) -> None:
    final, shape = _last(challenger), challenger.model.network.shape
    for tensor in (final.weight, final.bias):
        tensor.copy_(tensor.reshape(shape.sets, shape.bins, -1).flip(0).reshape(tensor.shape))


def _wrong_vocabulary(challenger: Challenger) -> None:
    challenger.model.manifest.vocabulary = challenger.model.manifest.vocabulary[::-1]


def _lacks_a_target(challenger: Challenger) -> None:
    challenger.model.manifest.targets = challenger.model.manifest.targets[:1]


def _forgetful(challenger: Challenger) -> None:
    challenger.model.network.head[0].weight[:, challenger.model.network.shape.hidden :] = 0  # type: ignore[operator]


def _noisy(challenger: Challenger) -> None:
    torch.manual_seed(2)
    for parameter in challenger.model.network.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))


def _untrained(challenger: Challenger) -> None:
    """An untrained head under a good encoder."""
    for module in challenger.model.network.head:
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.3)


SABOTAGES: dict[str, Callable[[Shop], Challenger]] = {
    "shuffled labels": _shuffled,
    "leaked future": _leaked,
    "stale data": _stale,
    "truncated training": _truncated,
    "few users": _starved,
    "wrong scaling": _wrong_scaling,
    "NaN weights": _altered(_nan),
    "too high": _altered(_too_high),
    "overconfident": _altered(_overconfident),
    "constant": _altered(_constant),
    "saturated": _altered(_saturated),
    "heads swapped": _altered(_swapped),
    "wrong vocabulary": _altered(_wrong_vocabulary),
    "a target missing": _altered(_lacks_a_target),
    "statistics unplugged": _altered(_forgetful),
    "noise on the weights": _altered(_noisy),
    "untrained head": _altered(_untrained),
}

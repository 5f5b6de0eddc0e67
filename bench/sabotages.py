"""Sabotages of a challenger that truly hurt it: by the exact filter of the law, each is worse than the champion. See `bench.gate`.

1. Of the training: labels, time, units, users, steps, the window; and of a refresh, which fits the heads alone.
2. Of the artifact after training, where a worker would load it: the tensors that are published, and the manifest.
3. Of the belief cell and the rhythm cell, by either way. The heads above them are good ones.

A model of another unit of values is one of a shop where they matter (`bench.challengers.WORTH`): elsewhere it would be no worse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import astuple, replace
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from bench.challengers import START_MS, Bout, Shop, Size
from demo.shop import DAY_MS
from model.belief import Belief
from model.rhythm import Rhythm
from trainer import batches, fit
from trainer.batches import Carried, chunks
from trainer.challenger import Challenger, Split
from trainer.cutoffs import occurred
from trainer.history import History

Sabotage = Callable[[Shop], Challenger]


def sabotaged(seed: int, size: Size, *, cell: bool, names: tuple[str, ...] | None = None) -> Iterator[Bout]:
    """A challenger of each kind of sabotage, most of them fresher than the good champion that they meet, which is two days older."""
    plain, priced = (SABOTAGES | OF_THE_CELL, OF_VALUES) if cell else (SABOTAGES | WITHOUT_A_CELL, OF_VALUES | OF_VALUES_WITHOUT_A_CELL)
    for sabotages, told_by_value in ((plain, False), (priced, True)):
        chosen = {name: sabotage for name, sabotage in sabotages.items() if names is None or name in names}
        if chosen:
            shop = Shop(seed + 1000 * told_by_value, size, cell=cell, told_by_value=told_by_value)
            for name, sabotage in chosen.items():
                yield Bout(name, shop, sabotage(shop), shop.yesterdays)


def _permuted_types(shop: Shop) -> History:
    """Types permuted over all events: what is learned of purchases has nothing to do with their users."""
    history = shop.sample
    return replace(history, type_hash=history.type_hash[np.random.default_rng(1).permutation(len(history))])


def _backwards(shop: Shop) -> History:
    """Each user's events before the test window in the opposite order."""
    known = shop.sample.before(shop.split.test_ms)
    mirrored = np.lexsort((-np.arange(len(known)), known.user))
    columns = {name: getattr(known, name)[mirrored] for name in ("type_hash", "item_hash", "category_hash", "session_hash", "value")}
    return replace(known, time_ms=shop.split.begin_ms + shop.split.test_ms - known.time_ms[mirrored], **columns)


def _told_ahead(shop: Shop) -> History:
    """Values that were filled in afterwards, where a purchase followed within a week, and nowhere else."""
    history = shop.sample
    follows = occurred(history, ("purchase",), history.user, history.time_ms + 1, 7 * DAY_MS)
    return replace(history, value=np.where(follows, np.nan_to_num(history.value, nan=30), np.nan).astype(np.float32))


def _tests_known(shop: Shop) -> Challenger:
    """Fitted on the test window itself, and on few users, until it knew them by heart."""
    end_ms = shop.split.end_ms
    split = Split(shop.split.test_ms, end_ms - DAY_MS // 2, end_ms, end_ms)
    return shop.fitted(shop.share(0.03), split, epochs=30, patience=30, dropout=0.0, weight_decay=0.0, learning_rate=1e-2)


def _hours_for_days(shop: Shop) -> Challenger:
    """Fitted on times in the wrong unit, a day taken for an hour."""

    def scaled(time_ms: NDArray[np.int64]) -> NDArray[np.int64]:
        return START_MS + (time_ms - START_MS) // 24

    split = Split(*(int(scaled(np.int64(t))) for t in astuple(shop.split)))  # type: ignore[arg-type]
    challenger = shop.fitted(replace(shop.sample, time_ms=scaled(shop.sample.time_ms)), split)
    challenger.model.manifest.window = shop.good.model.manifest.window
    return challenger


def _only_long_ones(first: NDArray[np.int64], size: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """As `trainer.batches.chunks`, but a stream of `size` events or fewer stays whole, and so tells that no more are to come."""
    begins, ends = chunks(first, size, rng)
    user = np.searchsorted(first, begins, side="right") - 1
    whole = np.diff(first) <= size
    kept = ~whole[user] | (begins == first[user])
    begins, user = begins[kept], user[kept]
    return begins, np.where(whole[user], first[user + 1], ends[kept])


def _cut_where_long(shop: Shop) -> Challenger:
    """Fitted on streams of which only those that turn out long are cut, each piece from nothing, under the heads that learnt from these.

    The streams of these shops are short, and so are the pieces. All users are learnt from, several times over in one pass: after several
    passes the validation days would choose a model that has not learnt it yet.
    """
    copies = _copies(shop.history, max(1, 400_000 // len(shop.history)))
    from_nothing = patch.object(Carried, "before", lambda carried, chunk: torch.zeros(len(chunk), carried.size))
    with patch.object(batches, "chunks", _only_long_ones), from_nothing, patch.object(fit, "fit_heads", lambda *_: None):
        return shop.fitted(copies, epochs=1, chunk_events=8, batch_events=128)


def _copies(history: History, count: int) -> History:
    """Each user so many times."""
    events, users = len(history), history.users
    names = ("time_ms", "type_hash", "item_hash", "category_hash", "session_hash", "value")
    copy = np.arange(count)[:, None]
    return replace(
        history,
        first=np.append(history.first[:-1] + events * copy, events * count),
        user=(history.user + users * copy).ravel(),
        types={name: n * count for name, n in history.types.items()},
        user_ids=history.user_ids * count,
        **{name: np.tile(getattr(history, name), count) for name in names},
    )


def _raised(challenger: Challenger) -> Challenger:
    """A refresh keeps weights that are no better from changing anything; a level that is wrong gets through to the gate."""
    with torch.no_grad():
        _last(challenger).bias.add_(0.7)
    return challenger


def _altered(change: Callable[[Challenger], object]) -> Sabotage:
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


def _swapped(challenger: Challenger) -> None:
    final, shape = _last(challenger), challenger.model.network.shape
    for tensor in (final.weight, final.bias):
        tensor.copy_(tensor.reshape(shape.sets, shape.bins, -1).flip(0).reshape(tensor.shape))


def _wrong_vocabulary(challenger: Challenger) -> None:
    challenger.model.manifest.vocabulary = challenger.model.manifest.vocabulary[::-1]


def _lacks_a_target(challenger: Challenger) -> None:
    challenger.model.manifest.targets = challenger.model.manifest.targets[:1]


def _forgetful(challenger: Challenger) -> None:
    """The heads see the recurrent units alone."""
    challenger.model.network.head[0].weight[:, challenger.model.network.shape.hidden :] = 0  # type: ignore[operator]


def _noisy(challenger: Challenger) -> None:
    torch.manual_seed(2)
    for parameter in challenger.model.network.parameters():
        parameter.add_(0.15 * torch.randn_like(parameter))


def _untrained(challenger: Challenger) -> None:
    """An untrained head under a good encoder."""
    for module in challenger.model.network.head:
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.3)


SABOTAGES: dict[str, Sabotage] = {
    "shuffled labels": lambda shop: shop.fitted(_permuted_types(shop)),
    "time reversed": lambda shop: shop.fitted(_backwards(shop)),
    "leaked future": lambda shop: shop.fitted(_told_ahead(shop)),
    "test window by heart": _tests_known,
    "stale data": lambda shop: shop.fitted(split=shop.until(10)),
    "truncated training": lambda shop: shop.fitted(epochs=1, learning_rate=2e-4, belief_steps=10, rhythm_classes=1),
    "few users": lambda shop: shop.fitted(shop.share(0.007)),
    "hours taken for days": _hours_for_days,
    "cut where long": _cut_where_long,
    "NaN weights": _altered(lambda c: _last(c).weight[0, 0].fill_(torch.nan)),
    "too high": _altered(lambda c: _last(c).bias.add_(0.7)),
    "saturated": _altered(lambda c: _last(c).bias.fill_(-40)),
    "wrong vocabulary": _altered(_wrong_vocabulary),
    "a target missing": _altered(_lacks_a_target),
    "noise on the weights": _altered(_noisy),
    "untrained head": _altered(_untrained),
    "refresh: a level too high": lambda shop: _raised(shop.refreshed(shop.yesterdays)),
    "refresh: time reversed": lambda shop: shop.refreshed(shop.yesterdays, _backwards(shop)),
}
"""Of any model."""

WITHOUT_A_CELL: dict[str, Sabotage] = {
    "overconfident": _altered(lambda c: _last(c).weight.mul_(2)),
    "constant": _altered(lambda c: _last(c).weight.zero_()),
    "heads swapped": _altered(_swapped),
    "statistics unplugged": _altered(_forgetful),
}
"""Where the heads are all that answers. Above a cell they are a correction, and it answers in their place."""


def _in_units_of(value: float) -> Sabotage:
    """Fitted on values in units of so much, and asked in units of one."""
    return lambda shop: shop.fitted(replace(shop.sample, value=shop.sample.value / np.float32(value)))


def _scaled_wrongly(challenger: Challenger) -> None:
    challenger.model.manifest.scaling["value_centre"] *= 1000


OF_VALUES: dict[str, Sabotage] = {
    "cents after units": _in_units_of(100),
    "millis after units": _in_units_of(1000),
}
"""Of any model, where values matter."""

OF_VALUES_WITHOUT_A_CELL: dict[str, Sabotage] = {
    "units after cents": _in_units_of(0.01),
    "value scaling off by 1000": _altered(_scaled_wrongly),
}
"""Above a cell, which sees no values, these hurt by a thousandth of a nat or by a hundredth, as it happens."""


def _cell(challenger: Challenger) -> Belief:
    belief = challenger.model.network.encoder.belief
    assert belief is not None
    return belief


def _rates_times(factor: float) -> Sabotage:
    def change(challenger: Challenger) -> None:
        for rates in (_cell(challenger).log_rate, _cell(challenger).log_move):
            rates.add_(np.log(factor))

    return _altered(change)


def _permuted_states(challenger: Challenger) -> None:
    """Each state is as lively as the one before it, and leads on as itself."""
    rates = _cell(challenger).log_rate
    rates.copy_(rates.roll(1, 0))


def _permuted_slots(challenger: Challenger) -> None:
    """The cell's types in the opposite order of the vocabulary's."""
    cell, used = _cell(challenger), slice(1, challenger.model.vocabulary.used)
    cell.log_rate[:, used] = cell.log_rate[:, used].flip(1)
    for tensor in (cell.lead, cell.first):
        tensor[used] = tensor[used].flip(0)


def _permuted_members(challenger: Challenger) -> None:
    """Purchases taken for all events, and the other way round."""
    members = challenger.model.network.members_KV
    members.copy_(members.flip(0))


def _rhythm(challenger: Challenger) -> Rhythm:
    rhythm = challenger.model.network.encoder.rhythm
    assert rhythm is not None
    return rhythm


def _later(levels: int) -> Callable[[Challenger], None]:
    """Every gap is taken for one that is so many levels longer."""

    def change(challenger: Challenger) -> None:
        survival = _rhythm(challenger).survival_KICG
        survival.copy_(torch.cat([torch.ones_like(survival[..., :levels]), survival[..., :-levels]], -1))

    return change


def _under_good_heads(other: Sabotage) -> Sabotage:
    """The cell of another model under the heads of the good one."""

    def sabotage(shop: Shop) -> Challenger:
        challenger, cell = deepcopy(shop.good), _cell(other(shop))
        _cell(challenger).load_state_dict(cell.state_dict())
        return challenger

    return sabotage


def _fitted_over(known: Callable[[Shop], History]) -> Sabotage:
    """A cell fitted on other streams, and heads fitted over it on the true ones."""

    def sabotage(shop: Shop) -> Challenger:
        beneath = deepcopy(shop.yesterdays)
        _cell(beneath).load_state_dict(_cell(shop.fitted(known(shop))).state_dict())
        beneath.model.network.refresh()
        return shop.refreshed(beneath)

    return sabotage


OF_THE_CELL: dict[str, Sabotage] = {
    "cell: NaN": _altered(lambda c: _cell(c).log_rate[0, 0].fill_(torch.nan)),
    "cell: hours for days": _rates_times(24),
    "cell: rates doubled": _rates_times(2),
    "cell: states permuted": _altered(_permuted_states),
    "cell: types permuted": _altered(_permuted_slots),
    "cell: sets permuted": _altered(_permuted_members),
    "cell: grid in hours": _altered(lambda c: c.model.network.edges_days.mul_(24)),
    "cell: states alike": _altered(lambda c: _cell(c).log_rate.copy_(_cell(c).log_rate.mean(0).expand_as(_cell(c).log_rate))),
    "cell: stale": _under_good_heads(lambda shop: shop.fitted(split=shop.until(10))),
    "cell: shuffled types": _under_good_heads(lambda shop: shop.fitted(_permuted_types(shop))),
    "rhythm: NaN": _altered(lambda c: _rhythm(c).survival_KICG.fill_(torch.nan)),
    "rhythm: nobody comes back": _altered(lambda c: _rhythm(c).survival_KICG.fill_(1)),
    "rhythm: gaps too long": _altered(_later(40)),
    "cell: fitting cut short": lambda shop: shop.fitted(belief_steps=3),
    "cell: shuffled, new heads": _fitted_over(_permuted_types),
    "cell: reversed, new heads": _fitted_over(_backwards),
}
"""Of a model with cells."""

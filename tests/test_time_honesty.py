"""Nothing that speaks of a moment knows what comes after it: another future, and all that was said before it is the same, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from support import fill
from trainer_support import NOW, START_MS, quick_settings, shop_table

from model.features import Scaling, Vocabulary
from model.hazards import DAY_MS, DEFAULT_EDGES_MS, HOUR_MS
from model.network import Network, Shape
from model.statistics import readout
from model.targets import DEFAULT_TARGETS, event_sets
from trainer.challenger import Challenger, Split, train
from trainer.dataset import features, gaps_ended, landmarks, statistics_after
from trainer.history import History, from_table
from trainer.material import hidden_along
from trainer.metrics import Metrics

T_MS = START_MS + 30 * DAY_MS
SETS = event_sets(DEFAULT_TARGETS)
VOCABULARY, SCALING = Vocabulary(["page_view", "purchase", "add_to_cart"]), Scaling(3.0, 1.0)


def table_of(users: int, days: float) -> pa.Table:
    """The shop's log in order of time, with sessions and attributes."""
    table = shop_table(users, days).sort_by("timestamp")
    rng = np.random.default_rng(0)
    attributes = [f'{{"country": "c{c}", "age": {a}}}' if a < 20 else None for c, a in rng.integers(0, 40, (len(table), 2))]
    session = [f"s{s}" for s in rng.integers(0, 3, len(table))]
    return table.append_column("session_id", pa.array(session)).append_column("attributes", pa.array(attributes))


def column(table: pa.Table, name: str, values: object) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values))


def with_new_users_and_types(later: pa.Table, rng: np.random.Generator) -> pa.Table:
    new = column(later, "user_id", [f"new{i}" for i in rng.integers(0, 50, len(later))])
    return pa.concat_tables([later, column(new, "type", [f"type{i}" for i in rng.integers(0, 3, len(later))])] * 3)


def with_other_contents(later: pa.Table, rng: np.random.Generator) -> pa.Table:
    others = later.take(rng.permutation(len(later)))  # whoever did whatever
    for name in ("type", "item_id", "category", "session_id", "attributes"):
        later = later.set_column(later.column_names.index(name), name, others[name])
    return column(later, "value", rng.normal(0, 1e6, len(later)))


FUTURES: dict[str, Callable[[pa.Table, np.random.Generator], pa.Table]] = {
    "none": lambda later, _: later.slice(0, 0),
    "half of it": lambda later, rng: later.filter(pa.array(rng.random(len(later)) < 0.5)),
    "later": lambda later, rng: column(later, "timestamp", later["timestamp"].to_numpy() + rng.integers(0, 9 * DAY_MS, len(later))),
    "all at once": lambda later, _: column(later, "timestamp", np.full(len(later), T_MS)),
    "other contents": with_other_contents,
    "new users and types": with_new_users_and_types,
}


def another(table: pa.Table, future: str) -> History:
    """The history of what was before T, and of another future."""
    is_past = table["timestamp"].to_numpy() < T_MS
    past, later = table.filter(pa.array(is_past)), table.filter(pa.array(~is_past))
    return from_table(pa.concat_tables([past, FUTURES[future](later, np.random.default_rng(1))]))


@pytest.fixture(scope="module")
def table() -> pa.Table:
    torch.set_num_threads(1)  # as the trainer does: with several, sums come in any order
    return table_of(250, 45)


def said_before(history: History) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    """All that is computed of moments before T, by someone who has the whole history."""
    known = history.time_ms < T_MS
    steps = features(history, VOCABULARY, SCALING)
    after = statistics_after(history, steps.slot)
    moments = landmarks(history, SETS, START_MS, T_MS, np.random.default_rng(0))
    torch.manual_seed(0)
    network = Network(Shape(hidden=8, head=8, belief=3, rhythm=3)).eval()
    fill(network.encoder.rhythm)
    network.ask(SETS, DEFAULT_EDGES_MS, VOCABULARY)
    gap_EK = gaps_ended(network.visits, history, steps.slot, after)
    return {
        "user": np.array(history.user_ids)[history.user[known]],
        "statistics": np.frombuffer(after[known].tobytes(), np.uint8),
        **{name: getattr(steps, name)[known] for name in ("slot", "item", "category", "numeric")},
        "moments' events": (np.cumsum(known) - 1)[moments.event],
        **{name: getattr(moments, name) for name in ("at_ms", "weight", "wait_ms", "observed_ms")},
        "readout": readout(after[moments.event], moments.at_ms).numpy(),
        "gaps": gap_EK[known],
        "silences": network.visits.silences(after[moments.event], moments.at_ms),
        "hidden states": hidden_along(network, steps, history, gap_EK)[torch.from_numpy(known)].numpy(),
    }


@pytest.mark.parametrize("future", FUTURES)
def test_another_future_changes_nothing_that_was_said_before_it(table: pa.Table, future: str) -> None:
    then, now = said_before(from_table(table)), said_before(another(table, future))
    for name, said in then.items():
        if name == "hidden states":  # products over more rows or fewer round differently in the last bit
            np.testing.assert_allclose(said, now[name], rtol=0, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(said, now[name], err_msg=name)
    assert then["wait_ms"].min() < T_MS - START_MS  # something was seen to happen


def fitted(history: History, folder: Path) -> Challenger:
    split = Split(START_MS, T_MS - 6 * DAY_MS, T_MS, T_MS + 15 * DAY_MS)
    settings = quick_settings(folder, epochs=1, hidden=8, head=8)
    return train(history, split, None, settings, Metrics(), NOW, np.random.default_rng(0), lambda *_: None, lambda: False)


@pytest.fixture(scope="module")
def model(table: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Challenger:
    return fitted(from_table(table), tmp_path_factory.mktemp("trainer"))


@pytest.mark.parametrize("future", FUTURES)
def test_another_future_gives_the_same_model(table: pa.Table, model: Challenger, future: str, tmp_path: Path) -> None:
    again = fitted(another(table, future), tmp_path)
    version = {"version": model.model.manifest.version, "lineage": model.model.manifest.lineage}  # drawn anew for every model
    assert again.model.manifest.model_copy(update=version) == model.model.manifest
    np.testing.assert_array_equal(again.hazard_KB, model.hazard_KB)
    assert again.fitted.losses == model.fitted.losses
    for name, tensor in model.model.network.state_dict().items():
        assert torch.equal(tensor, again.model.network.state_dict()[name]), name


def test_another_past_gives_another_model(table: pa.Table, model: Challenger, tmp_path: Path) -> None:
    """The tests above can fail."""
    last = table["timestamp"].to_numpy() >= T_MS - HOUR_MS
    again = fitted(from_table(table.filter(pa.array(~last))), tmp_path)
    assert again.model.manifest.window != model.model.manifest.window
    shorter = fitted(from_table(table.filter(pa.array(table["timestamp"].to_numpy() >= START_MS + DAY_MS))), tmp_path)
    assert any(not torch.equal(t, shorter.model.network.state_dict()[n]) for n, t in model.model.network.state_dict().items())


def test_a_late_event_that_speaks_of_the_past_is_not_known_in_the_past() -> None:
    """It comes after an event at T in the log, and is taken at that one's time."""
    rows = {"user_id": ["a", "a", "a"], "type": ["view"] * 3, "timestamp": [T_MS - HOUR_MS, T_MS, T_MS - 1]}
    nothing = {name: pa.nulls(3, kind) for name, kind in (("item_id", pa.string()), ("category", pa.string()), ("value", pa.float64()))}
    assert len(from_table(pa.table({**rows, **nothing})).before(T_MS)) == 1

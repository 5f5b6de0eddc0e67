"""Rounds on the simulated shop: a first model, a warm start, a rejection, a rollback; and what the model is worth against the law."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainer_support import NO_CELLS, NOW, START_MS, quick_settings, shop_history

from demo import attainable
from demo.shop import shop_law, simulate
from model.hazards import DAY_MS
from model.registry import Registry
from model.targets import DEFAULT_TARGETS, Target
from trainer import rounds
from trainer.dataset import ASKS, landmarks, thinned
from trainer.evaluate import Exam, answers
from trainer.gate import Decision
from trainer.history import History
from trainer.metrics import Metrics
from trainer.rounds import Outcome, run_round, shortage, split_by_time


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def hold(tmp_path: Path) -> Callable[..., Outcome]:
    """Hold the next round of one trainer, an hour after the last."""
    count = 0

    def hold(history: History, metrics: Metrics | None = None, **changes: Any) -> Outcome:
        nonlocal count
        count += 1
        promote = changes.pop("promote", True)
        settings = quick_settings(tmp_path, **changes)
        now = NOW + timedelta(hours=count)
        return run_round(history, Registry(settings.registry), settings, metrics or Metrics(), now=now, promote=promote)

    return hold


def crown(folder: Path, outcome: Outcome) -> str:
    """Promote whatever came of a round that was kept short."""
    assert outcome.version
    Registry(str(folder / "registry")).promote(outcome.version, reason="test", by="test")
    return outcome.version


def test_from_nothing_to_a_rollback(hold: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, metrics = Registry(str(tmp_path / "registry")), Metrics()
    history = shop_history(days=50)
    first = hold(history.before(START_MS + 40 * DAY_MS), metrics, epochs=2)
    assert first.kind == "promoted", first.reason
    assert first.reason.startswith("beats the constant hazard")
    pointer = registry.current()
    assert pointer
    assert pointer.version == first.version
    one = registry.load(pointer)
    assert one.manifest.lineage == first.version
    assert one.manifest.window.end_ms == pytest.approx(START_MS + 32 * DAY_MS, abs=DAY_MS)  # a fifth of the window is the test's

    # a warm start: same vocabulary, same lineage, and better at once than the first was at its start
    second = hold(history, metrics, epochs=2)
    assert second.version
    two = registry.load(second.version)
    assert two.manifest.lineage == one.manifest.lineage
    assert two.manifest.vocabulary == one.manifest.vocabulary
    assert two.scaling == one.scaling
    assert second.figures
    assert set(second.figures) == {"purchase", "churn"}

    # what the gate rejects is kept and recorded, but not promoted
    current = registry.current()
    monkeypatch.setattr(rounds.gate, "decide", lambda *_, **__: Decision(False, "purchase: AUC is worse", {}))
    third = hold(history, metrics, epochs=2)
    assert third.kind == "rejected"
    assert registry.current() == current
    decision = registry.decisions()[-1]
    assert (decision["version"], decision["action"], decision["reason"]) == (third.version, "rejected", "purchase: AUC is worse")
    assert third.version in [m.version for m in registry.versions()]
    assert metrics.registry.get_sample_value("streamscore_trainer_rejections_total") == 1 + (second.kind == "rejected")

    if second.kind == "promoted":
        assert registry.rollback(reason="test", by="test") == first.version
        assert registry.current() == pointer


def test_a_promotion_by_hand_in_the_middle_of_a_round_is_not_overwritten(
    hold: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, registry = shop_history(300, days=30), Registry(str(tmp_path / "registry"))
    first = crown(tmp_path, hold(history, epochs=1, **NO_CELLS))
    second = crown(tmp_path, hold(history, epochs=1, **NO_CELLS, promote=False))

    def meanwhile(*_: Any, **__: Any) -> Decision:
        registry.promote(first, reason="the new one misbehaves", by="somebody")
        return Decision(True, "better", {})

    monkeypatch.setattr(rounds.gate, "decide", meanwhile)
    outcome = hold(history, epochs=1, **NO_CELLS)
    assert outcome.kind == "outdated"
    assert outcome.reason == f"{first} is current now, and no longer {second}: {outcome.version} must be judged again (better)"
    pointer = registry.current()
    assert pointer
    assert pointer.version == first
    assert [(d["version"], d["action"], d["by"]) for d in registry.decisions()[-2:]] == [
        (first, "promoted", "somebody"),
        (outcome.version, "outdated", "trainer"),
    ]
    monkeypatch.setattr(rounds.gate, "decide", lambda *_, **__: Decision(True, "better", {}))
    assert hold(history, epochs=1, **NO_CELLS).kind == "promoted"


def test_published_without_promotion(hold: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = hold(shop_history(days=30), epochs=1, **NO_CELLS, promote=False)
    assert outcome.kind == "published"
    assert Registry(str(tmp_path / "registry")).current() is None


def test_old_versions_are_pruned(hold: Callable[..., Outcome], tmp_path: Path) -> None:
    history = shop_history(300, days=30)
    for _ in range(3):
        hold(history, epochs=1, **NO_CELLS, keep_versions=2, promote=False)
    assert len(Registry(str(tmp_path / "registry")).versions()) == 2


def test_new_targets_begin_with_the_champions_encoder(hold: Callable[..., Outcome], tmp_path: Path) -> None:
    history = shop_history(days=30)
    first = crown(tmp_path, hold(history, epochs=1))
    cart = Target.parse("cart=add_to_cart+purchase:occurs:3d")
    second = hold(history, epochs=1, learning_rate=1e-9, targets=(*DEFAULT_TARGETS, cart))
    registry = Registry(str(tmp_path / "registry"))
    assert second.version
    one, two = (registry.load(v) for v in (first, second.version))
    assert two.manifest.lineage == one.manifest.lineage
    assert two.sets == (("purchase",), ("*",), ("add_to_cart", "purchase"))
    assert torch.allclose(one.network.encoder.rnn.weight_hh_l0, two.network.encoder.rnn.weight_hh_l0, atol=1e-4)


def test_a_changed_size_begins_afresh_but_keeps_the_lineage(hold: Callable[..., Outcome], tmp_path: Path) -> None:
    history = shop_history(days=30)
    first = crown(tmp_path, hold(history, epochs=1, **NO_CELLS))
    second = hold(history, epochs=1, **NO_CELLS, hidden=24)
    assert second.version
    assert Registry(str(tmp_path / "registry")).load(second.version).manifest.lineage == first


def test_a_corrupt_champion_is_replaced(hold: Callable[..., Outcome], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    history = shop_history(days=30)
    first = crown(tmp_path, hold(history, epochs=1, **NO_CELLS))
    weights = tmp_path / "registry" / "versions" / first / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    second = hold(history, epochs=1, **NO_CELLS)
    assert f"model {first}: weights.safetensors does not have the sha256" in caplog.text
    assert Registry(str(tmp_path / "registry")).load(str(second.version)).manifest.lineage == second.version


def test_too_little_data_is_waited_for(tmp_path: Path) -> None:
    history = shop_history(150, days=8)
    settings = quick_settings(tmp_path, min_users=1000, min_events=100)
    lacking = shortage([history], split_by_time(history, settings), settings)
    assert lacking == "150 of 1,000 users seen, 7.9 of 14 days seen"


def test_the_window_slides_with_the_events(tmp_path: Path) -> None:
    settings = quick_settings(tmp_path, window_days=20)
    split = split_by_time(shop_history(days=50), settings)
    days = [(t - START_MS) / DAY_MS for t in (split.begin_ms, split.validation_ms, split.test_ms, split.end_ms)]
    assert days == pytest.approx([30, 44, 46, 50], abs=0.2)


@pytest.mark.parametrize(("users", "days", "within"), [(2000, 60, 0.04)])
def test_close_to_what_is_attainable(hold: Callable[..., Outcome], tmp_path: Path, users: int, days: int, within: float) -> None:
    """Trained on some days, asked in the next ten, after events and in silences, against the exact filter of the law."""
    horizon = 30
    shop = simulate(shop_law(), users=users * (days + 10 + horizon) // days, start_ms=START_MS, days=days + 10 + horizon, seed=3)
    whole = shop_history(users * (days + 10 + horizon) // days, days + 10 + horizon, seed=3)
    outcome = hold(whole.before(START_MS + days * DAY_MS), epochs=4, belief_steps=100, threads=1)
    assert outcome.kind == "promoted", outcome.reason
    model = Registry(str(tmp_path / "registry")).load(str(outcome.version))

    begin_ms, end_ms = START_MS + days * DAY_MS, START_MS + (days + 10) * DAY_MS
    rng = np.random.default_rng(0)
    moments = thinned(landmarks(whole, model.sets, begin_ms, end_ms, rng, draws=ASKS), rng, 10_000)
    every = np.arange(len(moments))
    said = answers(Exam(whole, moments, DEFAULT_TARGETS, (every, every), (), ()), model)
    code = {name: i for i, name in enumerate(shop.users)}
    user = np.array([code[whole.user_ids[u]] for u in whole.user[moments.event]])
    targets = {t.name: (t.types if t.types != ("*",) else "*", t.outcome, t.horizon_ms) for t in DEFAULT_TARGETS}
    best = attainable.probabilities(shop_law(), shop, user, moments.at_ms, targets)
    after_event = moments.at_ms <= whole.time_ms[moments.event] + 1  # a moment right after it is asked a millisecond later
    for (name, target), p in zip(targets.items(), said, strict=True):
        label = attainable.labels(shop, user, moments.at_ms, target)
        for rows in (after_event, ~after_event):
            got, possible = (attainable.auc(label[rows], x[rows]) for x in (p, best[name]))
            assert got > possible - within, (name, got, possible)

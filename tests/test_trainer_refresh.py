"""The quick rhythm: heads fitted anew under an encoder that stays, judged and promoted as in a round; and when to do which."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainer_support import NO_CELLS, NOW, START_MS, quick_settings, shop_history

from model.artifact import Model
from model.hazards import DAY_MS
from model.registry import Registry
from model.targets import DEFAULT_TARGETS, Target
from trainer.history import History
from trainer.judges import Role, roles
from trainer.metrics import Metrics
from trainer.refresh import refresh
from trainer.rhythms import RETRY_SECONDS, Rhythms
from trainer.rounds import Outcome, run_round, split_by_time
from trainer.stage import Stopped, no_progress


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def hold(folder: Path, history: History, rhythm: Any, hour: int, **changes: Any) -> Outcome:
    settings = quick_settings(folder, **{"gate_max_ece": 0.5, "gate_min_outcomes": 15, **changes})
    return run_round(history, Registry(settings.registry), settings, Metrics(), now=NOW + timedelta(hours=hour), rhythm=rhythm)


def champion_of(folder: Path) -> Model:
    registry = Registry(str(folder / "registry"))
    pointer = registry.current()
    assert pointer
    return registry.load(pointer)


def test_a_refresh_mends_the_heads_and_leaves_the_encoder_alone(tmp_path: Path) -> None:
    """The champion's heads have drifted away from what users do: a refresh is promoted over it, and stored states stay valid."""
    history, registry = shop_history(700, days=40), Registry(str(tmp_path / "registry"))
    hold(tmp_path, history.before(START_MS + 36 * DAY_MS), "round", 1, epochs=2, belief_steps=200)
    model = champion_of(tmp_path)
    with torch.no_grad():
        final = model.network.head[-1]
        assert isinstance(final, torch.nn.Linear)
        final.bias.add_(1.5)  # everything is said to be over four times as likely as it is
    model.manifest.version = "drifted"
    registry.publish(model.manifest, model.network)
    registry.promote("drifted", reason="test", by="test")

    outcome = hold(tmp_path, history, "refresh", 2)
    assert outcome.kind == "promoted", outcome.reason
    fresh = champion_of(tmp_path)
    assert fresh.manifest.version == outcome.version != "drifted"
    for name in ("encoder_id", "lineage", "vocabulary", "scaling", "shape", "edges_ms"):
        assert getattr(fresh.manifest, name) == getattr(model.manifest, name)
    for name, tensor in model.network.encoder.state_dict().items():
        assert fresh.network.encoder.state_dict()[name].equal(tensor)
    assert fresh.manifest.window.end_ms > model.manifest.window.end_ms
    assert not fresh.network.head.training
    assert outcome.figures
    for target in DEFAULT_TARGETS:
        figures = outcome.figures[target.name]
        assert figures["challenger"]["log_loss"] < figures["incumbent"]["log_loss"]

    # it has learnt up to the newest event, but for the judges'; a round that comes after it has, too
    assert fresh.manifest.window.end_ms == history.time_ms.max() + 1
    assert fresh.manifest.window.judges_end_ms == model.manifest.window.end_ms
    later = hold(tmp_path, history, "round", 3, epochs=1, report=False)
    window = registry.load(str(later.version)).manifest.window
    assert window.end_ms == history.time_ms.max() + 1
    assert window.judges_end_ms == later.learnt_until_ms < window.end_ms
    registry.promote(str(outcome.version), reason="test", by="test")

    # what is as good as it can be stays about as good
    before = fresh
    again = hold(tmp_path, history, "refresh", 4)
    assert again.figures
    for target in DEFAULT_TARGETS:
        figures = again.figures[target.name]
        assert figures["challenger"]["log_loss"] < figures["incumbent"]["log_loss"] + 0.01
    assert registry.load(str(again.version)).manifest.encoder_id == before.manifest.encoder_id


def test_what_cannot_be_refreshed_waits_for_a_round(tmp_path: Path) -> None:
    history = shop_history(300, days=30)
    assert hold(tmp_path, history, "refresh", 1) == Outcome("waiting", "there is no champion to refresh")
    first = hold(tmp_path, history, "round", 2, epochs=1, **NO_CELLS)
    if first.kind != "promoted":
        Registry(str(tmp_path / "registry")).promote(str(first.version), reason="test", by="test")
    cart = Target.parse("cart=add_to_cart+purchase:occurs:3d")
    outcome = hold(tmp_path, history, "refresh", 3, **NO_CELLS, targets=(*DEFAULT_TARGETS, cart))
    assert outcome == Outcome("waiting", "the targets are not those of the champion's heads")


def test_too_few_users_to_judge_and_to_learn_from_wait_for_a_round(tmp_path: Path) -> None:
    history = shop_history(300, days=30)
    first = hold(tmp_path, history, "round", 1, epochs=1, **NO_CELLS, report=False)
    Registry(str(tmp_path / "registry")).promote(str(first.version), reason="test", by="test")
    few = history.of_users(roles(history.user_ids, quick_settings(tmp_path)) != Role.judge)
    outcome = hold(tmp_path, few, "refresh", 2, min_users=1, **NO_CELLS)
    assert outcome == Outcome("waiting", f"{few.users} users are too few to be split into learners, stoppers and judges")


def test_the_judges_newest_events_teach_a_refresh_nothing(tmp_path: Path) -> None:
    """Whatever the judges do from the test window on, the heads come out the same; of a learner they do not."""
    history, settings = shop_history(300, days=30), quick_settings(tmp_path, epochs=1)
    first = hold(tmp_path, history, "round", 1, epochs=1, report=False)
    model = Registry(settings.registry).load(str(first.version))
    split = split_by_time(history, settings)
    role_E = roles(history.user_ids, settings)[history.user]

    def heads(role: Role | None) -> torch.Tensor:
        late = (role_E == role) & (history.time_ms >= split.test_ms) & (history.time_ms < split.end_ms - 1)
        known = history.where(~late) if role is not None else history
        rng = np.random.default_rng(0)
        made = refresh(known, split, model, settings, Metrics(), NOW, rng, no_progress, lambda: False)
        assert made.model.manifest.window.judges_end_ms == split.test_ms
        return torch.cat([p.flatten() for p in made.model.network.head.parameters()]).detach()

    assert heads(Role.judge).equal(heads(None))
    assert not heads(Role.learner).equal(heads(None))


def test_a_refresh_stops_when_told_to(tmp_path: Path) -> None:
    history = shop_history(300, days=30)
    first = hold(tmp_path, history, "round", 1, epochs=1, **NO_CELLS)
    Registry(str(tmp_path / "registry")).promote(str(first.version), reason="test", by="test")
    settings = quick_settings(tmp_path, **NO_CELLS)
    with pytest.raises(Stopped):
        run_round(history, Registry(settings.registry), settings, Metrics(), now=NOW, rhythm="refresh", stopping=lambda: True)


def test_refreshes_fill_the_time_between_rounds() -> None:
    rhythms, held = Rhythms(round_seconds=100, refresh_seconds=30, now=0), []
    for now in range(0, 300, 10):
        if rhythm := rhythms.due(now, rows=now):
            held.append((now, rhythm))
            rhythms.held(rhythm, "promoted", now, rows=now)
    assert held == [
        *((t, "round" if t % 100 == 0 else "refresh") for t in (0, 30, 60, 90, 100, 130, 160, 190, 200, 230, 260, 290)),
    ]


def test_no_refresh_where_it_is_switched_off() -> None:
    rhythms = Rhythms(round_seconds=100, refresh_seconds=0, now=0)
    rhythms.held("round", "promoted", 0, rows=1)
    assert [rhythms.due(now, rows=now + 2) for now in (50, 99, 100)] == [None, None, "round"]


def test_nothing_is_held_twice_on_the_same_data() -> None:
    rhythms = Rhythms(round_seconds=100, refresh_seconds=30, now=0)
    rhythms.held("round", "rejected", 0, rows=5)
    assert rhythms.due(40, rows=5) is None  # the round has fitted the heads on it, too
    assert rhythms.due(40, rows=6) == "refresh"
    rhythms.held("refresh", "rejected", 40, rows=6)
    assert rhythms.due(100, rows=6) == "round"


def test_what_failed_or_came_too_late_is_held_again_without_new_data() -> None:
    rhythms = Rhythms(round_seconds=100, refresh_seconds=30, now=0)
    rhythms.held("round", "failed", 0, rows=5)
    assert rhythms.due(RETRY_SECONDS - 1, rows=5) is None
    assert rhythms.due(RETRY_SECONDS, rows=5) == "round"
    rhythms.held("round", "outdated", 31, rows=5)
    assert rhythms.due(31, rows=5) == "round"


def test_a_round_that_waits_for_data_looks_as_soon_as_there_is_more_and_a_refresh_does_not() -> None:
    rhythms = Rhythms(round_seconds=100, refresh_seconds=30, now=0)
    rhythms.held("round", "waiting", 0, rows=5)
    assert rhythms.due(1, rows=5) is None
    assert rhythms.due(1, rows=6) == "round"
    rhythms.held("round", "waiting", 30, rows=7)
    assert rhythms.due(30, rows=7) == "refresh"
    rhythms.held("refresh", "waiting", 30, rows=7)
    assert rhythms.due(31, rows=7) is None

"""What a refresh adds to fitting: levels that follow the newest outcomes, users who judge, and when events arrived. Pure."""

from pathlib import Path

import numpy as np
import pytest
import torch
from trainer_support import START_MS, quick_settings, shop_history

from model.artifact import Window
from model.events import stable_hash
from model.features import Scaling, Vocabulary
from model.hazards import DAY_MS, DEFAULT_EDGES_MS
from model.network import Network, Shape
from model.targets import DEFAULT_TARGETS, event_sets
from trainer import levels
from trainer.arrivals import MOST, Arrivals
from trainer.challenger import start_at
from trainer.dataset import landmarks
from trainer.evaluate import constant_hazards
from trainer.judges import Role, of_role, roles, unseen_from
from trainer.material import hidden_along, prepare

SETTINGS = quick_settings(Path("unused"))


def outcomes(rate: float, users: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Logits that say 0.1 of one bin, and what came of it at `rate`; four moments a user, which share their outcome."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), 4)
    event = (rng.random(users) < rate)[user][:, None]
    return np.full((len(user), 1), np.log(0.1 / 0.9)), np.ones_like(event), event, np.ones(len(user)), user


def test_a_level_goes_where_the_outcomes_are() -> None:
    added, error = levels.shift(*outcomes(0.3, users=4000))
    assert added == pytest.approx(np.log(0.3 / 0.7) - np.log(0.1 / 0.9), abs=0.1)
    assert error == pytest.approx(1 / np.sqrt(4000 * 0.3 * 0.7), rel=0.1)  # of users: four moments of one tell no more than one does
    assert levels.beyond_noise(added, error) == pytest.approx(added, rel=0.01)


def test_a_level_within_its_noise_stays() -> None:
    kept = [levels.beyond_noise(*levels.shift(*outcomes(0.1, users=300, seed=seed))) for seed in range(40)]
    assert sum(k == 0 for k in kept) > 25
    assert np.abs(kept).max() < 0.7
    assert levels.beyond_noise(0.2, 0.2 / 1.4) == pytest.approx(0, abs=0.01)
    assert levels.beyond_noise(0.0, 0.1) == 0


def test_a_handful_of_users_moves_nothing() -> None:
    logits, mask, event, weight, user = outcomes(0.0, users=500)
    event[: 4 * (levels.LEAST_USERS - 1)] = True
    assert levels.shift(logits, mask, event, weight, user) == (0, 0)
    event[: 4 * levels.LEAST_USERS] = True
    assert levels.shift(logits, mask, event, weight, user)[1] > 0


def test_what_is_not_under_observation_does_not_count() -> None:
    logits, mask, event, weight, user = outcomes(0.3, users=500)
    rubbish = np.full_like(logits, 9.0)
    wider = np.hstack([logits, rubbish]), np.hstack([mask, ~mask]), np.hstack([event, ~event])
    assert levels.shift(*wider, weight, user)[0] == pytest.approx(levels.shift(logits, mask, event, weight, user)[0])


def test_the_newest_outcomes_move_the_levels() -> None:
    """A network that says the same of everybody, and expects a third of the purchases that come."""
    sets, end_ms = event_sets(DEFAULT_TARGETS), START_MS + 40 * DAY_MS
    history = shop_history(400, days=40)
    torch.manual_seed(0)
    network = Network(Shape(hidden=4, head=4, sets=len(sets), bins=len(DEFAULT_EDGES_MS), belief=0))
    vocabulary = Vocabulary([*history.types])
    network.ask(sets, DEFAULT_EDGES_MS, vocabulary)
    moments = landmarks(history, sets, START_MS, end_ms, np.random.default_rng(0))
    material = prepare(history, moments, vocabulary, Scaling(), DEFAULT_EDGES_MS)
    with torch.no_grad():
        network.head[-1].weight.zero_()
    hazard_KB = constant_hazards(material, DEFAULT_EDGES_MS)
    hazard_KB[0] /= 3
    start_at(network, hazard_KB)
    before = network.head[-1].bias.detach().clone().view(len(sets), -1)
    hidden = hidden_along(network, material.steps, history, material.gap_EK)
    shift_K = levels.follow(network, material, hidden, end_ms, levels.half_lives(START_MS, end_ms))
    assert shift_K[0] == pytest.approx(np.log(3), abs=0.4)
    assert abs(shift_K[1]) < 0.2
    moved = network.head[-1].bias.detach().view(len(sets), -1) - before
    assert torch.allclose(moved, torch.from_numpy(shift_K).float()[:, None], atol=1e-5)


def test_each_user_has_one_role_and_keeps_it() -> None:
    names = [f"u{i}" for i in range(5000)]
    drawn = roles(names, SETTINGS)
    shares = np.bincount(drawn) / len(names)
    assert shares == pytest.approx([SETTINGS.judge_share, SETTINGS.validation_share, 0.6], abs=0.03)
    assert (roles(names[::-1], SETTINGS)[::-1] == drawn).all()
    more = roles(names, SETTINGS.model_copy(update={"judge_share": 0.45}))
    assert (more[drawn == Role.judge] == Role.judge).all()
    sampled = np.array([stable_hash(f"sample/{n}") for n in names]) < 2**31  # `history.sample_users` draws by another hash
    assert np.bincount(drawn[sampled]) / sampled.sum() == pytest.approx(shares, abs=0.03)


def test_the_histories_of_the_roles_are_disjoint_and_whole() -> None:
    history = shop_history(200, days=10)
    parts = [of_role(history, SETTINGS, role) for role in Role]
    assert sum(map(len, parts)) == len(history)
    assert sorted(u for part in parts for u in part.user_ids) == sorted(history.user_ids)


def test_of_judges_a_model_knows_what_its_encoder_knows() -> None:
    assert unseen_from(Window(start_ms=1, end_ms=9, users=1, events=1)) == 9
    assert unseen_from(Window(start_ms=1, end_ms=9, users=1, events=1, judges_end_ms=5)) == 5


def test_arrivals_answer_by_the_events_own_time() -> None:
    arrivals = Arrivals()
    assert arrivals.newest_before(100) is None
    for event_ms, arrived_ms in ((10, 1000), (20, 2000), (15, 2500), (20, 2600), (30, 3000)):
        arrivals.note(event_ms, arrived_ms)
    assert [arrivals.newest_before(t) for t in (10, 11, 20, 21, 30, 31, 99)] == [None, 1000, 1000, 2000, 2000, 3000, 3000]


def test_arrivals_are_bounded_and_keep_both_ends() -> None:
    arrivals = Arrivals()
    for i in range(3 * MOST):
        arrivals.note(i, 2 * i)
    assert len(arrivals._event_ms) <= MOST
    assert arrivals.newest_before(1) == 0
    assert arrivals.newest_before(10 * MOST) == 2 * (3 * MOST - 1)
    middle = arrivals.newest_before(MOST)
    assert middle is not None
    assert 2 * MOST - 64 < middle < 2 * MOST

"""The trial of two ways to begin: what is judged is what will be asked, and a belief that misleads is only an input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from trainer_support import START_MS, quick_settings, shop_history

from model.features import Vocabulary
from model.hazards import DAY_MS
from model.network import Network, Shape
from model.targets import DEFAULT_TARGETS, event_sets
from trainer import trial
from trainer.challenger import grid
from trainer.dataset import choose_vocabulary, fit_scaling, landmarks
from trainer.distributed import ALONE
from trainer.evaluate import constant_hazards
from trainer.fit import fit
from trainer.material import Material, prepare

TARGETS = DEFAULT_TARGETS
SETS, EDGES_MS = event_sets(TARGETS), grid(TARGETS)
SPLIT_MS, END_MS = START_MS + 30 * DAY_MS, START_MS + 40 * DAY_MS


@pytest.fixture(scope="module")
def material() -> tuple[Material, Material]:
    history, rng = shop_history(300, 40), np.random.default_rng(0)
    vocabulary = Vocabulary(choose_vocabulary(history.types, SETS))
    torch.set_num_threads(1)
    made = []
    for begin_ms, end_ms in ((START_MS, SPLIT_MS), (SPLIT_MS, END_MS)):
        known = history.before(end_ms)
        made.append(prepare(known, landmarks(known, SETS, begin_ms, end_ms, rng), vocabulary, fit_scaling(known.value), EDGES_MS))
    return made[0], made[1]


def network(material: Material) -> Network:
    torch.manual_seed(0)
    net = Network(Shape(hidden=8, head=8, sets=len(SETS), bins=len(EDGES_MS), dropout=0.0, belief=4))
    net.ask(SETS, EDGES_MS, Vocabulary(choose_vocabulary(material.history.types, SETS)))
    return net


def test_what_is_judged_is_the_log_loss_at_horizons_that_the_days_can_judge(material: tuple[Material, Material]) -> None:
    """Of a network that says the same to everybody: both horizons become the five days that are half of ten."""
    train, validation = material
    net = network(train)
    hazard_KB = constant_hazards(train, EDGES_MS)
    trial.begin_without_belief(net, hazard_KB, ALONE)
    with torch.no_grad():
        net.head[-1].weight.zero_()
    horizon_ms = int(validation.moments.observed_ms.max()) // 2
    assert 4.9 * DAY_MS < horizon_ms <= 5 * DAY_MS
    whole = np.clip(horizon_ms / np.diff([0, *EDGES_MS]) - np.array([0, *EDGES_MS[:-1]]) / np.diff([0, *EDGES_MS]), 0, 1)
    known = validation.moments.observed_ms >= horizon_ms
    weight, expected = validation.moments.weight[known], []
    for k in range(2):
        occurs = validation.moments.wait_ms[known, k] <= horizon_ms
        absent = np.prod((1 - hazard_KB[k]) ** whole)
        expected.append(-np.log(np.where(occurs, 1 - absent, absent)) @ weight / weight.sum())
    assert trial.asked_loss(net, validation, TARGETS, ALONE) == pytest.approx(np.mean(expected), rel=1e-4)


def test_too_few_outcomes_have_no_say(material: tuple[Material, Material]) -> None:
    train, validation = material
    never = Material(*(getattr(validation, name) for name in Material.__slots__))
    never.moments = validation.moments.where(np.arange(20))
    never.readout_LR, never.level_L = validation.readout_LR[:20], validation.level_L[:20]
    assert trial.asked_loss(network(train), never, TARGETS, ALONE) == float("inf")


@pytest.mark.parametrize("misleads", [False, True])
def test_a_belief_that_misleads_is_only_an_input(material: tuple[Material, Material], tmp_path: Path, misleads: bool) -> None:
    train, validation = material
    net = network(train)
    if misleads:
        with torch.no_grad():
            net.encoder.belief.log_rate.add_(6.0)  # events by the hundred a day
        net.encoder.belief.requires_grad_(False)
        net.refresh()
    settings = quick_settings(tmp_path, epochs=3, belief_steps=150)
    fit(net, train, validation, settings, warm=False)
    assert float(net.trust) == (0.0 if misleads else 1.0)
    before = net.state_dict()["trust"].clone()
    fit(net, train, validation, settings, warm=True)
    assert torch.equal(net.trust, before)


def test_weights_without_a_trust_have_it_in_full(material: tuple[Material, Material]) -> None:
    net = network(material[0])
    older = {name: tensor for name, tensor in net.state_dict().items() if name != "trust"}
    net.trust.zero_()
    net.load_state_dict(older)
    assert float(net.trust) == 1

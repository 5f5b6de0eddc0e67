"""What a fitting averages and what it lets fade: weights over the newest steps, and moments of long ago."""

from pathlib import Path

import numpy as np
import pytest
import torch
from trainer_support import START_MS, quick_settings, shop_history

from model.features import Vocabulary
from model.hazards import DAY_MS, DEFAULT_EDGES_MS
from model.network import Network, Shape
from trainer.averaging import RunningMean
from trainer.dataset import choose_vocabulary, fit_scaling, landmarks
from trainer.fading import faded
from trainer.fit import fit
from trainer.material import loss_of, prepare

SETS = (("purchase",), ("*",))


def test_the_mean_is_of_all_steps_at_first_and_then_of_the_newest() -> None:
    parameter = torch.nn.Parameter(torch.tensor([7.0]))
    mean = RunningMean([parameter], steps=4)
    seen = []
    for value in (1.0, 2.0, 3.0, 4.0, 5.0):
        with torch.no_grad():
            parameter.fill_(value)
        mean.take()
        with mean.in_place():
            seen.append(parameter.item())
        assert parameter.item() == value  # its own again
    assert seen[:4] == pytest.approx([1.0, 1.5, 2.0, 2.5])  # not where the fitting began: 7
    assert seen[4] == pytest.approx(2.5 + (5 - 2.5) / 4)


def test_a_mean_of_one_step_is_the_last_weights() -> None:
    parameter = torch.nn.Parameter(torch.tensor([7.0]))
    mean = RunningMean([parameter], steps=0)
    mean.take()
    with torch.no_grad():
        parameter.fill_(3.0)
    mean.take()
    with mean.in_place():
        assert parameter.item() == 3.0


def test_the_averaged_weights_are_judged_and_kept(tmp_path: Path) -> None:
    """The loss told is that of the weights kept, and they are not the last ones."""
    history = shop_history(200, 30)
    vocabulary = Vocabulary(choose_vocabulary(history.types, SETS))
    rng, parts = np.random.default_rng(0), []
    for begin, end in ((0, 22), (22, 30)):
        known = history.before(START_MS + end * DAY_MS)
        moments = landmarks(known, SETS, START_MS + begin * DAY_MS, START_MS + end * DAY_MS, rng)
        parts.append(prepare(known, moments, vocabulary, fit_scaling(known.value), DEFAULT_EDGES_MS))
    kept = []
    for passes in (0.0, 2.0):
        torch.manual_seed(0)
        net = Network(Shape(hidden=8, head=8))
        fitted = fit(net, *parts, quick_settings(tmp_path, epochs=2, averaged_passes=passes), warm=False)
        weight = parts[1].moments.weight
        assert float(loss_of(net, parts[1]) @ weight / weight.sum()) == pytest.approx(min(fitted.losses), rel=1e-6)
        kept.append(net.head[-1].weight.detach())
    assert not torch.allclose(*kept)


def test_moments_fade_by_half_each_half_life() -> None:
    history = shop_history(50, 20)
    begin_ms, end_ms = START_MS, START_MS + 20 * DAY_MS
    moments = landmarks(history, SETS, begin_ms, end_ms, np.random.default_rng(0))
    before = moments.weight.copy()
    halves = (end_ms - moments.at_ms) / (5 * DAY_MS)
    assert faded(moments, begin_ms, end_ms, 0.25).weight == pytest.approx(before * 0.5**halves, rel=1e-5)
    assert (moments.weight == before).all()
    assert faded(moments, begin_ms, end_ms, 0).weight is moments.weight

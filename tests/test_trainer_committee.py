"""The committee: members see what they are said to see, a mixture of heads is one head, and the jury's figures are log-losses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import fill
from trainer_support import START_MS, quick_settings, shop_history

from model.clock import EVEN
from model.features import Vocabulary
from model.hazards import DAY_MS, grid
from model.network import Network, Shape, members
from model.rhythm import Visits
from model.targets import DEFAULT_TARGETS, event_sets
from trainer.committee import Committee, Member, members_of
from trainer.dataset import choose_vocabulary, fit_scaling, landmarks
from trainer.distributed import ALONE
from trainer.evaluate import constant_hazards
from trainer.jury import Jury
from trainer.material import Material, hidden_along, prepare
from trainer.parts import Parts
from trainer.served import Feed, Served
from trainer.stage import Run, no_progress
from trainer.standard import standardised

SETS, EDGES_MS = event_sets(DEFAULT_TARGETS), grid(DEFAULT_TARGETS)
SPLIT_MS, END_MS = START_MS + 30 * DAY_MS, START_MS + 40 * DAY_MS


@pytest.fixture(scope="module")
def material() -> tuple[Material, Material]:
    history, rng = shop_history(900, 40), np.random.default_rng(0)
    vocabulary = Vocabulary(choose_vocabulary(history.types, SETS))
    torch.set_num_threads(1)
    made = []
    for begin_ms, end_ms in ((START_MS, SPLIT_MS), (SPLIT_MS, END_MS)):
        known = history.before(end_ms)
        moments, visits = landmarks(known, SETS, begin_ms, end_ms, rng), Visits(members(SETS, vocabulary))
        made.append(prepare(known, moments, vocabulary, fit_scaling(known.value), EDGES_MS, EVEN, visits))
    return made[0], made[1]


def network(material: Material, encoder: str = "gru") -> Network:
    torch.manual_seed(0)
    shape = Shape(hidden=8, head=12, sets=len(SETS), bins=len(EDGES_MS), dropout=0.0, encoder=encoder, belief=4, rhythm=3)
    net = Network(shape).eval()
    fill(net.encoder.rhythm)
    net.ask(SETS, EDGES_MS, Vocabulary(choose_vocabulary(material.history.types, SETS)))
    return net


def running(folder: Path) -> Run:
    return Run(quick_settings(folder), False, np.random.default_rng(0), no_progress, lambda: False, lambda: 0.0, 0.0, ALONE)


def foreseen(material: Material) -> tuple[torch.Tensor, torch.Tensor]:
    """Made up: of 4 states, and of both cells."""
    moments, generator = len(material.moments), torch.Generator().manual_seed(1)
    believed_LS = torch.rand(moments, 4, generator=generator).softmax(1)
    return believed_LS, torch.randn(moments, 2, len(SETS) * len(EDGES_MS), generator=generator) - 3


def randomised(committee: Committee) -> Committee:
    for parameter in committee.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return committee.eval()


def test_a_mixture_of_heads_and_cells_is_one_head(material: tuple[Material, Material], tmp_path: Path) -> None:
    """Each event set has its own; a member may have no share of one."""
    train, _ = material
    net, parts = network(train), Parts.whole(train)
    parts.foresee = foreseen
    with standardised(net, train.readout_LR):
        feed = Feed(net, parts, running(tmp_path))
        chosen, units = members_of(net)[:3], [3, 5, 4]
        share_KM, cells_KJ = np.array([[0.25, 0.25, 0.4], [0.5, 0.0, 0.3]]), np.array([[0.1, 0.0], [0.0, 0.2]])
        assert [member.trust for member in chosen] == [0, None, 1]
        committee = randomised(Committee(net.shape, chosen, units, feed.scale(), constant_hazards(train, EDGES_MS)))
        asked = Served(net, parts[0])(torch.arange(0, 600, 3))
        with torch.inference_mode():
            said = committee(asked.inputs_LF, asked.base_LJX)
            of_cells = [base_LX.view(-1, len(SETS), len(EDGES_MS)) for base_LX in asked.base_LJX.unbind(1)]
            shares = torch.from_numpy(np.hstack([share_KM, cells_KJ])).float()
            expected = torch.einsum("kc,clkb->lkb", shares, torch.stack([*said, *of_cells]))
        committee.merge(net, share_KM, cells_KJ)
    hidden, (believed_LS, base_LJX) = asked.inputs_LF[:, :8], (x[torch.arange(0, 600, 3)] for x in foreseen(train))
    with torch.inference_mode():
        merged = net.answer(hidden, believed_LS, base_LJX, train.readout_LR[torch.arange(0, 600, 3)])
    assert torch.allclose(merged, expected, atol=2e-3, rtol=1e-3)
    assert net.trust_JK.numpy() == pytest.approx(np.array([[0.25 + 0.1, 0.5], [0.4, 0.3 + 0.2]]))


def test_members_see_their_own_inputs_alone(material: tuple[Material, Material], tmp_path: Path) -> None:
    net, parts = network(material[0]), Parts.whole(material[0])
    parts.foresee = foreseen
    with standardised(net, material[0].readout_LR):
        members = (Member(True, True, 1, 1.0), Member(False, True, None, 1.0), Member(False, False, None, 1.0))
        feed = Feed(net, parts, running(tmp_path))
        committee = randomised(Committee(net.shape, members, [4, 4, 4], feed.scale(), constant_hazards(material[0], EDGES_MS)))
        asked = Served(net, parts[0])(torch.arange(50))
    answers = len(SETS) * len(EDGES_MS)
    spans = {"units": slice(0, 8), "cells": slice(8, 12 + 2 * answers), "statistics": slice(12 + 2 * answers, None)}
    for name, span in spans.items():
        other = asked.inputs_LF.clone()
        other[:, span] += 1
        before, after = (committee(x, asked.base_LJX) for x in (asked.inputs_LF, other))
        changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert changed == [getattr(m, name, True) for m in members], name


@pytest.mark.parametrize("encoder", ["gru", "lstm", "rnn"])
def test_heads_are_fitted_on_the_states_that_a_worker_has(material: tuple[Material, Material], tmp_path: Path, encoder: str) -> None:
    train, _ = material
    net = network(train, encoder)
    with torch.no_grad():
        for parameter in net.encoder.rnn.parameters():
            parameter.mul_(2)
    parts = Parts.whole(train)
    parts.foresee = foreseen
    rows = torch.arange(0, len(train.moments), 7)
    served = Served(net, parts[0])(rows).inputs_LF[:, :8]
    stepped = hidden_along(net, train.steps, train.history, train.gap_EK)[torch.from_numpy(train.moments.event)[rows]][:, :8]
    assert torch.allclose(served, stepped, atol=1e-5)


def test_the_jury_takes_the_log_loss_at_horizons_that_its_days_can_judge(material: tuple[Material, Material], tmp_path: Path) -> None:
    """Of a head that says the same to everybody: both horizons become the five days that are half of ten."""
    train, validation = material
    net = network(train)
    jury = Jury(net, [validation], foreseen, running(tmp_path))
    logit = torch.linspace(-4, -3, len(SETS) * len(EDGES_MS)).view(len(SETS), -1)
    (said,) = jury.hear(lambda inputs_LF, base_LJX: [logit.expand(len(inputs_LF), -1, -1)])
    horizon_ms = int(validation.moments.observed_ms.max()) // 2
    assert 4.9 * DAY_MS < horizon_ms <= 5 * DAY_MS
    edges = np.array([0, *EDGES_MS])
    whole = np.clip((horizon_ms - edges[:-1]) / np.diff(edges), 0, 1)
    known = validation.moments.observed_ms >= horizon_ms
    weight, expected = validation.moments.weight[known], []
    for k in range(2):
        occurs = validation.moments.wait_ms[known, k] < horizon_ms
        survival = np.exp(-np.log1p(np.exp(logit[k].numpy())) @ whole)
        expected.append(-np.log(np.where(occurs, 1 - survival, survival)) @ weight / weight.sum())
    assert jury.losses(said) == pytest.approx(expected, rel=1e-4)


def test_the_jury_mixes_what_is_better_together(material: tuple[Material, Material], tmp_path: Path) -> None:
    jury = Jury(network(material[0]), material, foreseen, running(tmp_path))
    level = torch.full((len(SETS), len(EDGES_MS)), -4.0)
    said = jury.hear(lambda inputs_LF, base_LJX: [(level + shift).expand(len(inputs_LF), -1, -1) for shift in (3.0, -3.0, 30.0)])
    share_KC, loss_K = jury.mixtures(said)
    assert (loss_K < np.min([jury.losses(one) for one in said], axis=0)).all()
    assert share_KC.sum(1) == pytest.approx([1, 1])
    assert share_KC[:, :2].min() > 0
    assert (share_KC[:, 2] == 0).all()


def test_of_two_panels_the_first_does_not_judge_levels(material: tuple[Material, Material], tmp_path: Path) -> None:
    """A head that says the same to everybody is, on the newest days, as good as if it knew their level."""
    net, run = network(material[0]), running(tmp_path)
    both, others = Jury(net, [material[1], material[0]], foreseen, run), Jury(net, [material[0]], foreseen, run)
    horizon_ms, moments = int(material[1].moments.observed_ms.max()) // 2, material[1].moments
    known, entropy = moments.observed_ms >= horizon_ms, []
    for k in range(2):
        p = np.average(moments.wait_ms[known, k] < horizon_ms, weights=moments.weight[known])
        entropy.append(-p * np.log(p) - (1 - p) * np.log(1 - p))
    losses = []
    for level in (-3.5, -3.0, -2.5):
        said = [jury.hear(lambda x, _, level=level: [torch.full((len(x), len(SETS), len(EDGES_MS)), level)])[0] for jury in (both, others)]
        assert 2 * both.losses(said[0]) - others.losses(said[1]) == pytest.approx(np.array(entropy), rel=1e-3)
        losses.append(others.losses(said[1]).mean())
    assert max(losses) > 1.05 * min(losses)  # the other panel does judge them


def test_too_few_outcomes_are_judged_by_the_likelihood_of_the_waits(material: tuple[Material, Material], tmp_path: Path) -> None:
    _, validation = material
    some = {name: getattr(validation, name)[:5] for name in ("readout_LR", "silence", "mask_LKB", "event_LKB")}
    few = replace(validation, moments=validation.moments.where(np.arange(5)), **some)
    jury = Jury(network(material[0]), [few], foreseen, running(tmp_path))
    low, high = (jury.losses(s) for s in jury.hear(lambda x, _: [torch.full((len(x), 2, len(EDGES_MS)), z) for z in (-6.0, 6.0)]))
    assert np.isfinite([low, high]).all()
    assert (low < high).all()

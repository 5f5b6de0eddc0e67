"""The committee: members see what they are said to see, a mixture of heads is one head, and the jury's figures are log-losses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from trainer_support import START_MS, quick_settings, shop_history

from model.features import Vocabulary
from model.hazards import DAY_MS, grid
from model.network import Network, Shape
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
    history, rng = shop_history(300, 40), np.random.default_rng(0)
    vocabulary = Vocabulary(choose_vocabulary(history.types, SETS))
    torch.set_num_threads(1)
    made = []
    for begin_ms, end_ms in ((START_MS, SPLIT_MS), (SPLIT_MS, END_MS)):
        known = history.before(end_ms)
        made.append(prepare(known, landmarks(known, SETS, begin_ms, end_ms, rng), vocabulary, fit_scaling(known.value), EDGES_MS))
    return made[0], made[1]


def network(material: Material, encoder: str = "gru") -> Network:
    torch.manual_seed(0)
    net = Network(Shape(hidden=8, head=12, sets=len(SETS), bins=len(EDGES_MS), dropout=0.0, encoder=encoder, belief=4)).eval()
    net.ask(SETS, EDGES_MS, Vocabulary(choose_vocabulary(material.history.types, SETS)))
    return net


def running(folder: Path) -> Run:
    return Run(quick_settings(folder), False, np.random.default_rng(0), no_progress, lambda: False, lambda: 0.0, 0.0, ALONE)


def believed(material: Material) -> torch.Tensor:
    return torch.rand(len(material.moments), 4, generator=torch.Generator().manual_seed(1)).softmax(1)


def randomised(committee: Committee) -> Committee:
    for parameter in committee.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return committee.eval()


def test_a_mixture_of_heads_is_one_head(material: tuple[Material, Material], tmp_path: Path) -> None:
    train, _ = material
    net, parts = network(train), Parts.whole(train)
    parts.believe = believed
    with standardised(net, train.readout_LR):
        feed = Feed(net, parts, running(tmp_path))
        chosen, units, shares = members_of(net)[:3], [3, 5, 4], [0.25, 0.25, 0.5]
        committee = randomised(Committee(net.shape, chosen, units, feed.scale(), constant_hazards(train, EDGES_MS)))
        asked = Served(net, parts[0])(torch.arange(0, 600, 3))
        with torch.inference_mode():
            said = committee(asked.inputs_LF, asked.base_LX)
            expected = sum(share * logits for share, logits in zip(shares, said, strict=True))
        committee.merge(net, shares)
    hidden, state = asked.inputs_LF[:, :8], believed(train)[torch.arange(0, 600, 3)]
    with torch.inference_mode():
        merged = net.answer(hidden, state, train.readout_LR[torch.arange(0, 600, 3)])
    assert torch.allclose(merged, expected, atol=2e-3, rtol=1e-3)
    assert float(net.trust) == pytest.approx(sum(s * m.trust for s, m in zip(shares, chosen, strict=True)))


def test_members_see_their_own_inputs_alone(material: tuple[Material, Material], tmp_path: Path) -> None:
    net, parts = network(material[0]), Parts.whole(material[0])
    parts.believe = believed
    with standardised(net, material[0].readout_LR):
        members = (Member(True, True, True, 1.0), Member(False, True, False, 1.0), Member(False, False, False, 1.0))
        feed = Feed(net, parts, running(tmp_path))
        committee = randomised(Committee(net.shape, members, [4, 4, 4], feed.scale(), constant_hazards(material[0], EDGES_MS)))
        asked = Served(net, parts[0])(torch.arange(50))
    answers = len(SETS) * len(EDGES_MS)
    spans = {"units": slice(0, 8), "belief": slice(8, 12 + answers), "statistics": slice(12 + answers, None)}
    for name, span in spans.items():
        other = asked.inputs_LF.clone()
        other[:, span] += 1
        before, after = (committee(x, asked.base_LX) for x in (asked.inputs_LF, other))
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
    parts.believe = believed
    rows = torch.arange(0, len(train.moments), 7)
    served = Served(net, parts[0])(rows).inputs_LF[:, :8]
    stepped = hidden_along(net, train.steps, train.history)[torch.from_numpy(train.moments.event)[rows]][:, :8]
    assert torch.allclose(served, stepped, atol=1e-5)


def test_the_jury_takes_the_log_loss_at_horizons_that_its_days_can_judge(material: tuple[Material, Material], tmp_path: Path) -> None:
    """Of a head that says the same to everybody: both horizons become the five days that are half of ten."""
    train, validation = material
    net = network(train)
    jury = Jury(net, [validation], believed, running(tmp_path))
    logit = torch.linspace(-4, -3, len(SETS) * len(EDGES_MS)).view(len(SETS), -1)
    (said,) = jury.hear(lambda inputs_LF, base_LX: [logit.expand(len(inputs_LF), -1, -1)])
    horizon_ms = int(validation.moments.observed_ms.max()) // 2
    assert 4.9 * DAY_MS < horizon_ms <= 5 * DAY_MS
    edges = np.array([0, *EDGES_MS])
    whole = np.clip((horizon_ms - edges[:-1]) / np.diff(edges), 0, 1)
    known = validation.moments.observed_ms >= horizon_ms
    weight, expected = validation.moments.weight[known], []
    for k in range(2):
        occurs = validation.moments.wait_ms[known, k] <= horizon_ms
        survival = np.exp(-np.log1p(np.exp(logit[k].numpy())) @ whole)
        expected.append(-np.log(np.where(occurs, 1 - survival, survival)) @ weight / weight.sum())
    assert jury.loss(said) == pytest.approx(np.mean(expected), rel=1e-4)


def test_the_jury_mixes_what_is_better_together(material: tuple[Material, Material], tmp_path: Path) -> None:
    jury = Jury(network(material[0]), material, believed, running(tmp_path))
    level = torch.full((len(SETS), len(EDGES_MS)), -4.0)
    said = jury.hear(lambda inputs_LF, base_LX: [(level + shift).expand(len(inputs_LF), -1, -1) for shift in (3.0, -3.0, 30.0)])
    shares, loss = jury.mixture(said)
    assert loss < min(jury.loss(one) for one in said)
    assert shares.sum() == pytest.approx(1)
    assert shares[:2].min() > 0
    assert shares[2] == 0


def test_too_few_outcomes_are_judged_by_the_likelihood_of_the_waits(material: tuple[Material, Material], tmp_path: Path) -> None:
    _, validation = material
    few = Material(
        validation.history, validation.moments.where(np.arange(5)), validation.steps, *(
            getattr(validation, name)[:5] for name in ("readout_LR", "level_L", "mask_LKB", "event_LKB")
        ),
    )  # fmt: skip
    jury = Jury(network(material[0]), [few], lambda m: believed(m)[:5], running(tmp_path))
    low, high = (jury.loss(s) for s in jury.hear(lambda x, _: [torch.full((len(x), 2, len(EDGES_MS)), z) for z in (-6.0, 6.0)]))
    assert np.isfinite([low, high]).all()
    assert low < high

"""Fitting: the loss falls, the same seed gives the same weights, budgets and stops are kept, and training sees what a worker sees."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import PackedSequence
from trainer_support import START_MS, quick_settings, shop_history

from model.clock import EVEN
from model.features import StepFeatures, Vocabulary
from model.hazards import DAY_MS, DEFAULT_EDGES_MS
from model.network import Encoder, Network, Shape, members
from model.rhythm import Visits
from model.statistics import STATISTICS
from trainer.batches import chunks, pack
from trainer.dataset import choose_vocabulary, fit_scaling, landmarks, statistics_after
from trainer.evaluate import constant_hazards
from trainer.fit import fit
from trainer.foresight import foresight
from trainer.heads import answer, dropped
from trainer.material import Material, hidden_along, loss_of, prepare
from trainer.recurrence import hidden_states
from trainer.stage import Stopped
from trainer.standard import standardised

SETS = (("purchase",), ("*",))


@pytest.fixture(scope="module")
def material() -> tuple[Material, Material]:
    history = shop_history(300, 40)
    rng = np.random.default_rng(0)
    vocabulary = Vocabulary(choose_vocabulary(history.types, SETS))
    torch.set_num_threads(1)  # as the trainer does: with several, sums come in any order
    parts = []
    for begin, end in ((0, 30), (30, 40)):
        known = history.before(START_MS + end * DAY_MS)
        moments = landmarks(known, SETS, START_MS + begin * DAY_MS, START_MS + end * DAY_MS, rng)
        visits = Visits(members(SETS, vocabulary))
        parts.append(prepare(known, moments, vocabulary, fit_scaling(known.value), DEFAULT_EDGES_MS, EVEN, visits))
    return parts[0], parts[1]


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(Shape(hidden=16, head=16))


def test_loss_falls_and_the_best_weights_are_kept(material: tuple[Material, Material], tmp_path: Path) -> None:
    net = network()
    fitted = fit(net, *material, quick_settings(tmp_path, epochs=3), warm=False)
    assert fitted.losses[-1] < fitted.losses[1]
    weight = material[1].moments.weight
    assert float(loss_of(net, material[1]) @ weight / weight.sum()) < min(fitted.losses[1:]) + 0.02
    assert not net.training


def test_same_seed_same_weights(material: tuple[Material, Material], tmp_path: Path) -> None:
    one, two, other = network(), network(), network()
    for net, seed in ((one, 5), (two, 5), (other, 6)):
        fit(net, *material, quick_settings(tmp_path, epochs=1, seed=seed), warm=False)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_budget_is_kept(material: tuple[Material, Material], tmp_path: Path) -> None:
    ticks: Iterator[float] = iter(range(10**9))
    fitted = fit(network(), *material, quick_settings(tmp_path, round_budget_seconds=5), warm=False, clock=lambda: next(ticks))
    assert "budget of 5 s" in fitted.why
    assert len(fitted.losses) <= 3


def test_a_stop_is_heard_within_a_batch(material: tuple[Material, Material], tmp_path: Path) -> None:
    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        fit(network(), *material, quick_settings(tmp_path), warm=False, stopping=lambda: next(asked))


def test_a_warm_start_that_finds_nothing_better_keeps_the_units(material: tuple[Material, Material], tmp_path: Path) -> None:
    net = network()
    fit(net, *material, quick_settings(tmp_path, epochs=3), warm=False)
    before = {n: t.clone() for n, t in net.encoder.state_dict().items()}
    fitted = fit(net, *material, quick_settings(tmp_path, learning_rate=100.0, epochs=1), warm=True)
    assert min(fitted.losses) == fitted.losses[0]
    assert all(torch.equal(t, before[n]) for n, t in net.encoder.state_dict().items())


def test_the_gru_is_that_of_torch() -> None:
    """Value and every gradient."""
    torch.manual_seed(0)
    encoder = Encoder(Shape(hidden=8))
    sizes = [7, 5, 5, 2, 1]
    gradients, outputs = [], []
    for ours in (True, False):
        x = torch.linspace(-2, 2, sum(sizes) * encoder.rnn.input_size).reshape(sum(sizes), -1).requires_grad_()
        encoder.zero_grad()
        out = hidden_states(encoder, x, sizes)[0] if ours else encoder.rnn(PackedSequence(x, torch.tensor(sizes)))[0].data
        (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
        outputs.append(out.detach())
        gradients.append([x.grad, *(p.grad for p in encoder.rnn.parameters())])
    assert torch.allclose(*outputs, atol=1e-6)
    for a, b in zip(*gradients, strict=True):
        assert a is not None
        assert b is not None
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("encoder", ["gru", "lstm", "rnn"])
def test_every_encoder_is_fitted_on_what_a_worker_would_have(material: tuple[Material, Material], tmp_path: Path, encoder: str) -> None:
    """The loss falls, and packed training and the worker's steps, with states at rest in [-1, 1], give the same logits."""
    train, validation = material
    torch.manual_seed(0)
    net = Network(Shape(hidden=8, head=8, dropout=0.0, encoder=encoder, belief=4, rhythm=3))
    net.ask(SETS, DEFAULT_EDGES_MS, Vocabulary(choose_vocabulary(train.history.types, SETS)))
    before = float(loss_of(net, validation) @ validation.moments.weight)
    fit(net, train, validation, quick_settings(tmp_path, epochs=1, belief_steps=5), warm=False)
    assert float(loss_of(net, validation) @ validation.moments.weight) < before

    first = np.searchsorted(train.moments.event, np.arange(len(train.history) + 1))
    batch = pack(train.history.first[:40], train.history.first[1:41], train.moments.event, first)
    moments = torch.from_numpy(batch.landmarks)
    with torch.inference_mode():
        hidden, _ = hidden_states(net.encoder, net.inputs(train.steps, train.gap_EK)[0][batch.events], batch.sizes.tolist())
        foreseen = (x[moments] for x in foresight(net)(train))
        packed = net.answer(hidden[torch.from_numpy(batch.place)], *foreseen, train.readout_LR[moments])
        state = hidden_along(net, train.steps, train.history, train.gap_EK)
        stepped = net.logits(state[torch.from_numpy(train.moments.event)][moments], train.readout_LR[moments], train.silence[moments])
    assert state.abs().max() <= 1
    assert torch.allclose(packed, stepped, atol=1e-3)


def test_a_frozen_belief_stays_as_it_is(material: tuple[Material, Material], tmp_path: Path) -> None:
    net = Network(Shape(hidden=8, head=8, belief=4))
    net.encoder.belief.requires_grad_(False)
    before = {n: t.clone() for n, t in net.encoder.belief.state_dict().items()}
    fit(net, *material, quick_settings(tmp_path, epochs=1), warm=True)
    assert all(torch.equal(t, before[n]) for n, t in net.encoder.belief.state_dict().items())


def test_standardised_inputs_change_no_answer(material: tuple[Material, Material]) -> None:
    net = network().eval()
    hidden, readout = torch.randn(50, 16), material[0].readout_LR[:50]
    names, no_cells = set(net.state_dict()), (torch.empty(50, 0), torch.empty(50, 0, 0))
    before = net.answer(hidden, *no_cells, readout)
    with standardised(net, material[0].readout_LR):
        assert torch.allclose(net.answer(hidden, *no_cells, readout), before, atol=1e-4)
        seen = net.head[0](torch.cat([hidden, material[0].readout_LR[:50]], 1))[:, 16:]
        assert seen.abs().max() < 100
    assert torch.allclose(net.answer(hidden, *no_cells, readout), before, atol=1e-4)
    assert set(net.state_dict()) == names


def test_hidden_states_are_those_of_the_worker_step_by_step(material: tuple[Material, Material]) -> None:
    train, _ = material
    net, history, s = network().eval(), train.history, train.steps
    hidden, after = hidden_along(net, s, history, train.gap_EK), statistics_after(history, s.slot)
    for user in (0, 1, history.users - 1):
        state, stats = np.zeros((1, 16), np.float32), np.zeros(1, STATISTICS)
        for e in range(history.first[user], history.first[user + 1]):
            one = StepFeatures(*(c[e : e + 1] for c in (s.slot, s.item, s.category, s.numeric, s.gap_ms, s.time_ms)))
            state, stats = net.step(state, one, stats).numpy(), after[e : e + 1]
            assert np.allclose(state[0], hidden[e].numpy(), atol=1e-5)


def test_batches_hold_every_event_and_every_moment_once(material: tuple[Material, Material]) -> None:
    train, _ = material
    events, seen = [], []
    first = np.searchsorted(train.moments.event, np.arange(len(train.history) + 1))
    begins, ends = chunks(train.history.first, 7, np.random.default_rng(0))
    assert (ends - begins).max() <= 7
    assert (train.history.user[begins] == train.history.user[ends - 1]).all()
    for low, high in zip(np.array_split(begins, 9), np.array_split(ends, 9), strict=True):
        batch = pack(low, high, train.moments.event, first)
        assert np.array_equal(batch.events[batch.place], train.moments.event[batch.landmarks])
        assert (np.diff(batch.sizes) <= 0).all()
        events += batch.events.tolist()
        seen += batch.landmarks.tolist()
    assert sorted(events) == list(range(len(train.history)))
    assert sorted(seen) == list(range(len(train.moments)))


def test_constant_hazards_go_on_where_nothing_was_observed(material: tuple[Material, Material]) -> None:
    hazard = constant_hazards(material[0], DEFAULT_EDGES_MS)
    assert ((hazard > 0) & (hazard < 1)).all()
    rate = -np.log1p(-hazard[0]) / np.diff([0, *DEFAULT_EDGES_MS])
    unseen = np.flatnonzero(material[0].mask_LKB[:, 0].sum(0).numpy() == 0)
    assert len(unseen)
    assert rate[unseen] == pytest.approx(rate[unseen[0] - 1], rel=1e-3)


def test_heads_in_training_say_what_the_network_says(material: tuple[Material, Material]) -> None:
    """Logits and the gradients of every weight, with and without cells."""
    train, _ = material
    rows, place = torch.arange(0, 400, 4), torch.arange(100) // 3
    for belief, rhythm in ((0, 0), (4, 0), (0, 3), (4, 3)):
        torch.manual_seed(1)
        net = Network(Shape(hidden=8, head=8, dropout=0.0, belief=belief, rhythm=rhythm)).train()
        net.ask(SETS, DEFAULT_EDGES_MS, Vocabulary(choose_vocabulary(train.history.types, SETS)))
        torch.nn.init.normal_(net.head[-1].weight)
        if net.shape.cells:
            net.trust_JK.copy_(torch.tensor([[0.5, 0.1], [0.3, 0.7]])[: net.shape.cells])
        hidden = torch.randn(40, 8).requires_grad_()
        cells = torch.rand(100, belief).softmax(1), torch.randn(100, net.shape.cells, net.shape.sets * net.shape.bins)
        said, gradients = [], []
        with standardised(net, train.readout_LR):
            for ours in (True, False):
                net.zero_grad()
                hidden.grad = None
                readout = train.readout_LR[rows]
                logits = answer(net, hidden, place, *cells, readout) if ours else net.answer(hidden[place], *cells, readout)
                (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum().backward()
                said.append(logits.detach())
                gradients.append([hidden.grad, *(p.grad.clone() for p in net.head.parameters())])
        assert torch.allclose(*said, atol=1e-4)
        for a, b in zip(*gradients, strict=True):
            assert torch.allclose(a, b, atol=1e-3, rtol=1e-3)


def test_mixed_precision_fits_the_same(material: tuple[Material, Material], tmp_path: Path) -> None:
    losses = {}
    for mixed in ("off", "on"):
        settings = quick_settings(tmp_path, epochs=2, belief_steps=5, mixed_precision=mixed, device="cpu")
        torch.manual_seed(0)
        losses[mixed] = fit(Network(Shape(hidden=16, head=16, belief=4, rhythm=3)), *material, settings, warm=False).losses
    assert losses["on"] != losses["off"]
    assert losses["on"][1:] == pytest.approx(losses["off"][1:], rel=0.01)


def test_units_are_dropped_by_chance_and_keep_their_mean() -> None:
    torch.manual_seed(0)
    units = torch.ones(1000, 101)
    out = dropped(units, 0.2)
    assert float((out == 0).float().mean()) == pytest.approx(0.2, abs=0.005)
    assert float(out.mean()) == pytest.approx(1, abs=0.006)
    assert torch.equal(dropped(units, 0.0), units)

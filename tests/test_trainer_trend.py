"""The trend of the levels: a drift is followed to its end; a sale, noise and campaigns that come and go are not taken for one."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from trainer_support import START_MS, events_table

from model.features import Scaling, Vocabulary
from model.hazards import DAY_MS, DEFAULT_EDGES_MS
from model.network import Network, Shape
from trainer.challenger import start_at
from trainer.dataset import landmarks
from trainer.evaluate import constant_hazards
from trainer.foresight import nothing
from trainer.history import from_table
from trainer.levels import beyond_noise
from trainer.material import prepare
from trainer.parts import part_of
from trainer.trend import LEAST_BLOCKS, follow_trend, line_at_the_end

NOISE = 0.1
"""Of a block's shift; a block of a hundred outcomes has as much."""
SEEDS = 200


def ages(blocks: int) -> np.ndarray:
    """The newest first."""
    return (np.arange(blocks) + 0.5) / blocks


def kept(blocks: int, shifts: Callable[[np.random.Generator], np.ndarray]) -> np.ndarray:
    """(SEEDS,) what levels are moved by, where the blocks' shifts are these and noise. Heads fit the blocks together: the mean is 0."""
    out = []
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        shift_W = shifts(rng) + rng.normal(0, NOISE, blocks)
        out.append(beyond_noise(*line_at_the_end(ages(blocks), shift_W - shift_W.mean())))
    return np.array(out)


@pytest.mark.parametrize("blocks", [8, 20])
def test_a_drift_is_followed_to_its_end(blocks: int) -> None:
    for slope in (-1.2, 1.2):
        moved = kept(blocks, lambda rng, slope=slope: slope * ages(blocks))
        assert moved.mean() == pytest.approx(-slope / 2, abs=0.05)
        assert moved.std() < 1.2 * NOISE


def test_what_turned_lately_counts_more_than_what_was() -> None:
    """A level that fell through most of the window and rises at its end."""
    moved = kept(20, lambda rng: np.where(ages(20) < 0.4, 1.6 - 4 * ages(20), 0))
    assert moved.mean() > 0.6


@pytest.mark.parametrize("blocks", [8, 20])
def test_noise_leaves_levels_alone(blocks: int) -> None:
    moved = kept(blocks, lambda rng: np.zeros(blocks))
    assert (moved == 0).mean() > 0.65
    assert np.quantile(np.abs(moved), 0.95) < 1.5 * NOISE
    assert abs(moved.mean()) < 0.02


@pytest.mark.parametrize("when", [0, 1, 10])
def test_a_sale_of_a_block_is_no_trend(when: int) -> None:
    """Whether it is on at the end, has just ended or was long ago: of a blocks' size of 1 hardly anything becomes a level."""
    moved = kept(20, lambda rng: np.eye(20)[when])
    assert np.quantile(np.abs(moved), 0.9) < 0.15
    assert abs(moved.mean()) < 0.06


def test_seldom_campaigns_move_levels_by_little() -> None:
    moved = kept(20, lambda rng: (rng.random(20) < 0.1) * rng.exponential(0.7, 20))
    assert np.quantile(np.abs(moved), 0.9) < 0.25


def test_frequent_campaigns_leave_levels_alone() -> None:
    moved = kept(20, lambda rng: (rng.random(20) < 0.3) * rng.exponential(0.7, 20))
    assert (moved == 0).mean() > 0.65
    assert abs(moved.mean()) < 0.05


def test_too_few_blocks_make_no_line() -> None:
    few = LEAST_BLOCKS - 1
    assert line_at_the_end(ages(few), np.linspace(1, -1, few)) == (0, 0)
    assert line_at_the_end(ages(LEAST_BLOCKS), np.linspace(1, -1, LEAST_BLOCKS))[0] == pytest.approx(1.2)  # at age 0
    assert line_at_the_end(np.zeros(0), np.zeros(0)) == (0, 0)


DAYS, RATE = 210, 0.1
Rate = Callable[[np.ndarray], np.ndarray]


def followed(of_day: Rate, users: int = 300, seed: int = 0) -> tuple[float, float]:
    """(the shift, the rate a day that the heads then say of a week) where everybody comes at RATE times what is of each day."""
    rng, rows = np.random.default_rng(seed), []
    most = float(of_day(np.linspace(0, DAYS, 1000)).max())
    for u in range(users):
        day = np.sort(rng.uniform(0, DAYS, rng.poisson(RATE * most * DAYS)))
        day = np.append(0.0, day[rng.random(len(day)) < of_day(day) / most])
        rows += [(f"u{u}", "view", START_MS + int(d * DAY_MS)) for d in day]
    history, sets, end_ms = from_table(events_table(rows)), [("view",)], START_MS + DAYS * DAY_MS
    moments = landmarks(history, sets, START_MS, end_ms, rng)
    material = prepare(history, moments, Vocabulary(["view"]), Scaling(), DEFAULT_EDGES_MS)
    network = Network(Shape(hidden=4, head=4, sets=1, bins=len(DEFAULT_EDGES_MS), dropout=0.0)).eval()
    final = network.head[-1]
    with torch.no_grad():
        final.weight.zero_()
    start_at(network, constant_hazards(material, DEFAULT_EDGES_MS))
    before = final.bias.detach().clone()
    (shift,) = follow_trend(network, part_of(material, nothing), np.array(DEFAULT_EDGES_MS), rng)
    assert (final.bias.detach() - before).tolist() == pytest.approx([shift] * len(before), abs=1e-5)
    week = np.array(DEFAULT_EDGES_MS) <= 7 * DAY_MS
    hazard_B = torch.nn.functional.softplus(final.bias.detach().double()).numpy()
    return float(shift), float(hazard_B[week].sum() / np.array(DEFAULT_EDGES_MS)[week].max() * DAY_MS)


def test_heads_say_the_rate_of_the_end_of_a_drift() -> None:
    for grows in (1.0, -1.0):
        shift, rate = followed(lambda day, grows=grows: np.exp(grows * day / DAYS))
        assert np.sign(shift) == grows
        assert rate == pytest.approx(RATE * np.exp(grows), rel=0.1)


@pytest.mark.parametrize("begin", [100, DAYS - 5, None])
def test_a_sale_of_five_days_is_left_where_it_was(begin: int | None) -> None:
    shift, rate = followed(lambda day: np.where((day >= begin) & (day < begin + 5), 3.0, 1.0) if begin else np.ones_like(day))
    assert abs(shift) < 0.08
    assert rate == pytest.approx(RATE, rel=0.1)


def test_too_few_outcomes_and_no_moments_move_nothing() -> None:
    assert followed(lambda day: np.exp(day / DAYS), users=1)[0] == 0
    assert followed(lambda day: np.exp(day / DAYS), users=30)[0] != 0
    network = Network(Shape(hidden=4, head=4, sets=1, bins=len(DEFAULT_EDGES_MS)))
    history = from_table(events_table([("a", "view", START_MS)]))
    moments = landmarks(history, [("view",)], START_MS - DAY_MS, START_MS, np.random.default_rng(0))
    material = prepare(history, moments, Vocabulary(["view"]), Scaling(), DEFAULT_EDGES_MS)
    assert follow_trend(network, part_of(material, nothing), np.array(DEFAULT_EDGES_MS), np.random.default_rng(0)).tolist() == [0]

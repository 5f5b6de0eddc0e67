"""Sequence alternatives as they are usually built: the last 50 events, padded, through a network, to one sigmoid a target.

Trained by cross-entropy on the same landmarks as the others, the newest of which stop the fitting.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from model.features import CATEGORY_BUCKETS, NUMERIC, StepFeatures, Vocabulary
from model.hazards import HOUR_MS
from model.statistics import SLOTS
from trainer.baselines import Case, constant
from trainer.cutoffs import Probabilities, Questions
from trainer.dataset import choose_vocabulary, features, fit_scaling

LENGTH = 50
UNITS = 48
PASSES = 8
BATCH = 512
AT_MOST = 40_000
"""Landmarks trained on."""
ASKED = 3  # log of the silent age, and the time of the week


class _Sequence(nn.Module):
    """Events to one vector a user, and that to a logit a target. kind: cnn, conv_lstm, rnn, lstm or gru."""

    def __init__(self, kind: str, targets: int) -> None:
        super().__init__()
        self.type_embedding = nn.Embedding(SLOTS + 1, 12, padding_idx=SLOTS)
        self.category_embedding = nn.Embedding(CATEGORY_BUCKETS + 1, 8)
        width = 12 + 8 + NUMERIC + 1
        convolved = kind in ("cnn", "conv_lstm")
        self.convolution = (
            nn.Sequential(nn.Conv1d(width, UNITS, 5, padding=2), nn.ReLU(), nn.Conv1d(UNITS, UNITS, 3, padding=1), nn.ReLU())
            if convolved
            else None
        )
        cells: dict[str, Callable[..., nn.Module]] = {"conv_lstm": nn.LSTM, "lstm": nn.LSTM, "rnn": nn.RNN, "gru": nn.GRU}
        self.recurrence = cells[kind](UNITS if convolved else width, UNITS, batch_first=True) if kind in cells else None
        self.head = nn.Sequential(nn.Linear(UNITS + ASKED, UNITS), nn.ReLU(), nn.Dropout(0.2), nn.Linear(UNITS, targets))

    def forward(self, slot_NT: torch.Tensor, category_NT: torch.Tensor, numeric_NTF: torch.Tensor, asked_NA: torch.Tensor) -> torch.Tensor:
        """(N, targets) logits. Sequences are padded on the left, so that the last step is the newest event."""
        x = torch.cat([self.type_embedding(slot_NT), self.category_embedding(category_NT), numeric_NTF], dim=-1)
        if self.convolution is not None:
            x = self.convolution(x.transpose(1, 2)).transpose(1, 2)
        summary = x.amax(1) if self.recurrence is None else self.recurrence(x)[0][:, -1]
        out: torch.Tensor = self.head(torch.cat([summary, asked_NA], dim=-1))
        return out


def sequence_model(kind: str) -> Callable[[Case], Probabilities]:
    """The alternative of this kind."""

    def alternative(case: Case) -> Probabilities:
        torch.manual_seed(case.seed)
        rng = np.random.default_rng(case.seed)
        known = case.history.before(case.until_ms)
        seen = dict(zip(*_counted(case), strict=True))
        sets = tuple(t.types for t in case.targets)
        steps = features(case.history, Vocabulary(choose_vocabulary(seen, sets)), fit_scaling(known.value))
        learn = case.learn.where(np.sort(rng.permutation(len(case.learn))[:AT_MOST]))
        newest_ms = np.quantile(learn.at_ms, 0.9)
        network = _Sequence(kind, len(case.targets))
        _start_at(network, constant(case)[:1])
        _fit(network, case, steps, learn.where(learn.at_ms < newest_ms), learn.where(learn.at_ms >= newest_ms), rng)
        return _asked(network, case, steps, case.asked)

    return alternative


def _counted(case: Case) -> tuple[list[str], list[int]]:
    """Event types, and how often each occurred before `until`."""
    from model.events import stable_hash

    hashes, counts = np.unique(case.history.type_hash[case.history.time_ms < case.until_ms], return_counts=True)
    often = dict(zip(hashes.tolist(), counts.tolist(), strict=True))
    names = [t for t in case.history.types if stable_hash(t) in often]
    return names, [often[stable_hash(t)] for t in names]


def _start_at(network: _Sequence, rate_1T: Probabilities) -> None:
    final = network.head[-1]
    assert isinstance(final, nn.Linear)
    rate = np.clip(rate_1T[0], 1e-4, 1 - 1e-4)
    with torch.no_grad():
        final.bias.copy_(torch.from_numpy(np.log(rate / (1 - rate))))


def _inputs(case: Case, steps: StepFeatures, questions: Questions) -> tuple[torch.Tensor, ...]:
    """Slots, categories and numbers of the last LENGTH events of each question's user, and what is known of the moment."""
    place = questions.event[:, None] - np.arange(LENGTH - 1, -1, -1)
    there = place >= case.history.first[questions.user][:, None]
    place = np.maximum(place, 0)
    slot = np.where(there, steps.slot[place], SLOTS)
    category = np.where(there, steps.category[place], 0)
    age_ms = np.where(there, questions.at_ms[:, None] - case.history.time_ms[place], 0)
    age = np.log1p(age_ms / HOUR_MS).astype(np.float32) / 8
    numeric = np.concatenate([steps.numeric[place], age[:, :, None]], axis=2) * there[:, :, None]
    week = (questions.at_ms % (168 * HOUR_MS)) * (2 * np.pi / (168 * HOUR_MS))
    asked: NDArray[np.float32] = np.stack([age[:, -1], np.sin(week), np.cos(week)], axis=1).astype(np.float32)
    return torch.from_numpy(slot), torch.from_numpy(category), torch.from_numpy(numeric.astype(np.float32)), torch.from_numpy(asked)


def _loss(network: _Sequence, case: Case, steps: StepFeatures, questions: Questions) -> torch.Tensor:
    logits = network(*_inputs(case, steps, questions))
    closed = torch.from_numpy(questions.closed).float()
    terms = binary_cross_entropy_with_logits(logits, torch.from_numpy(questions.label).float(), reduction="none")
    return (terms * closed).sum() / closed.sum().clamp(min=1)


def _fit(network: _Sequence, case: Case, steps: StepFeatures, learn: Questions, stop: Questions, rng: np.random.Generator) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
    best, best_loss = copy.deepcopy(network.state_dict()), float("inf")
    for _ in range(PASSES):
        network.train()
        order = rng.permutation(len(learn))
        for i in range(0, len(order), BATCH):
            loss = _loss(network, case, steps, learn.where(order[i : i + BATCH]))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        network.eval()
        with torch.inference_mode():
            parts = [stop.where(np.arange(i, min(i + 4096, len(stop)))) for i in range(0, len(stop), 4096)]
            loss_now = float(np.mean([float(_loss(network, case, steps, p)) for p in parts])) if parts else float("inf")
        if loss_now < best_loss or not parts:
            best, best_loss = copy.deepcopy(network.state_dict()), loss_now
    network.load_state_dict(best)
    network.eval()


def _asked(network: _Sequence, case: Case, steps: StepFeatures, questions: Questions) -> Probabilities:
    with torch.inference_mode():
        blocks = [questions.where(np.arange(i, min(i + 4096, len(questions)))) for i in range(0, len(questions), 4096)]
        return np.concatenate([torch.sigmoid(network(*_inputs(case, steps, b))).numpy() for b in blocks]).astype(np.float64)

"""Fitting the heads: a committee of small ones that see different things, the best of which become one head.

The recurrent units stand still, and their states are those of whole streams, as a worker has them. A head then costs little to fit: many
moments, many steps. What it should look at differs from stream to stream. The units know the order of events, but a head on them errs where
users are few or habits change; a head on the statistics alone errs less there. Old moments help where nothing changes, and mislead where it
does. So several heads are fitted side by side, each on inputs and weights of its own, and a jury (`trainer.jury`) says after how many
passes each is best, and for each event set which mixture of them, and of what the cells foresee by themselves: members are added one by
one, with replacement, as long as the log-loss of what the targets ask falls (Caruana et al., "Ensemble selection from libraries of models",
ICML 2004). Logits are added, so a mixture of heads is one head: their units side by side, their last layers weighted. Those chosen are then
fitted anew on everything, the jury's moments too, with units dealt out by their shares.

Where the units' own heads do better than any mixture, they stay.

Axis letters: L moments, F inputs of a head, M members, U units, K event sets, B bins, X = K B, J cells, T targets.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from model.hazards import grid
from model.network import Network, Shape
from model.targets import event_sets
from trainer.heads import dropped
from trainer.jury import Jury
from trainer.material import Material
from trainer.objective import Objective
from trainer.parts import Parts
from trainer.served import Asked, Feed
from trainer.stage import Run, adam, learning_rate_share, set_step_size
from trainer.standard import Standardise
from trainer.trend import follow_trend

logger = logging.getLogger(__name__)

STEPS = 2500
"""Steps of a committee, about, unless that were fewer passes than LEAST_PASSES, or more than `epochs`."""
LEAST_PASSES, MOST_STEPS = 3, 3500
STEP_SIZE = 2e-3
UNITS = 24
"""Of each member, until it is chosen."""
TRIED_SHARE = 0.8
"""Of the time budget, at the end of which the mixture is chosen."""
TIMED_STEPS = 20
"""Steps after which it is clear how many the budget lasts for."""
LEAST_SHARE = 0.05
"""Of a mixture, below which a member is not worth its units."""


@dataclass(frozen=True, slots=True)
class Member:
    """What a head sees: the units' hidden state, what the cells believe and foresee, and always the statistics.

    trust: the cell whose hazards it corrects, by its number; None: it begins at those of everybody alike.
    asked: weight of what the targets ask in what it minimises (`objective`). half_life: age at which a moment counts half, as a share of
    the window; 0: all count alike.
    """

    units: bool
    cells: bool
    trust: int | None
    asked: float
    half_life: float = 0.0


def members_of(network: Network) -> tuple[Member, ...]:
    """Who is on the committee."""
    if not network.shape.cells:
        return (Member(True, False, None, 1.0), Member(False, False, None, 4.0), Member(False, False, None, 2.0, 0.25))
    first, last = 0, network.shape.cells - 1
    return (
        Member(True, True, first, 1.0),
        Member(True, True, None, 4.0),
        Member(False, True, last, 2.0),
        Member(False, False, None, 4.0),
        Member(False, True, first, 2.0, 0.25),
        Member(True, True, first, 1.0, 0.25),
    )


class Committee(nn.Module):
    """M heads side by side. scale: of their inputs. units_M: of each. hazard_KB: where those begin that trust no cell."""

    seen_UF: torch.Tensor

    def __init__(
        self, shape: Shape, members: Sequence[Member], units_M: Sequence[int], scale: Standardise, hazard_KB: NDArray[np.float64]
    ) -> None:
        super().__init__()
        self.members, self.scale, self.shape = tuple(members), scale, shape
        ends = np.cumsum(units_M)
        self.blocks = [slice(int(end - size), int(end)) for end, size in zip(ends, units_M, strict=True)]
        self.first = nn.Linear(len(scale.mean), int(ends[-1]))
        self.last = nn.ModuleList(nn.Linear(size, shape.sets * shape.bins) for size in units_M)
        self.register_buffer("seen_UF", torch.ones_like(self.first.weight))
        with torch.no_grad():
            for member, block, last in zip(members, self.blocks, self._last(), strict=True):
                self.seen_UF[block, : shape.hidden] *= member.units
                self.seen_UF[block, shape.hidden : shape.hidden + shape.foreseen] *= member.cells
                if member.trust is not None:
                    last.weight.zero_()
                    last.bias.zero_()
                else:
                    last.bias.copy_(torch.from_numpy(np.log(hazard_KB / (1 - hazard_KB)).reshape(-1)))

    def _last(self) -> Iterator[nn.Linear]:
        for last in self.last:
            assert isinstance(last, nn.Linear)
            yield last

    def forward(self, inputs_LF: torch.Tensor, base_LJX: torch.Tensor) -> list[torch.Tensor]:
        """(L, K, B) hazard logits of each member."""
        weight_UF, bias_U = self._first()
        units_LU = torch.relu(torch.addmm(bias_U, inputs_LF, weight_UF.t()))
        units_LU = dropped(units_LU, self.shape.dropout if self.training else 0.0)
        out = []
        for member, block, last in zip(self.members, self.blocks, self._last(), strict=True):
            logits_LX: torch.Tensor = last(units_LU[:, block])
            if member.trust is not None:
                logits_LX = logits_LX + base_LJX[:, member.trust]
            out.append(logits_LX.view(-1, self.shape.sets, self.shape.bins))
        return out

    def _first(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The first layer on inputs that are not scaled."""
        weight_UF = self.first.weight * self.seen_UF * self.scale.factor
        return weight_UF, self.first.bias - weight_UF @ self.scale.mean

    @torch.no_grad()
    def recall(self, states: Sequence[dict[str, torch.Tensor]]) -> None:
        """Give each member the weights that it has in the state of its number."""
        for m, (state, block, last) in enumerate(zip(states, self.blocks, self._last(), strict=True)):
            self.first.weight[block] = state["first.weight"][block]
            self.first.bias[block] = state["first.bias"][block]
            last.load_state_dict({name: state[f"last.{m}.{name}"] for name in ("weight", "bias")})

    @torch.no_grad()
    def merge(self, network: Network, share_KM: NDArray[np.float64], cells_KJ: NDArray[np.float64]) -> None:
        """Write a mixture of the members, and of what the cells foresee by themselves, into the network's head, whose inputs are
        standardised in another way, and its trust. Members of no share take no units; those that nobody takes are left without effect."""
        standardise, first, *_, final = network.head
        assert isinstance(standardise, Standardise)
        assert isinstance(first, nn.Linear)
        assert isinstance(final, nn.Linear)
        weight_UF, bias_U = self._first()
        for tensor in (first.weight, first.bias, final.weight, final.bias):
            tensor.zero_()
        bias_U = bias_U + weight_UF @ standardise.mean
        begin = 0
        if network.shape.cells:
            network.trust_JK.copy_(torch.from_numpy(cells_KJ.T))
        for share_K, member, block, last in zip(share_KM.T, self.members, self.blocks, self._last(), strict=True):
            if share_K.any():
                own = slice(begin, begin := begin + block.stop - block.start)
                first.weight[own] = weight_UF[block] / standardise.factor
                first.bias[own] = bias_U[block]
                share_X = torch.from_numpy(share_K.repeat(self.shape.bins)).to(final.weight)
                final.weight[:, own] = share_X[:, None] * last.weight
                final.bias.add_(share_X * last.bias)
                if member.trust is not None:
                    network.trust_JK[member.trust] += torch.from_numpy(share_K).to(network.trust_JK)


def fit_heads(
    network: Network,
    train: Parts,
    validation: Sequence[Material],
    whole: Callable[[], Parts] | None,
    run: Run,
    hazard_KB: NDArray[np.float64],
) -> None:
    """Choose a mixture of heads by `validation`, fit it on the `whole` window, and leave it in the network's head; unless that does better
    as it is.

    validation: what the jury looks at. whole: makes the material of all users and days; None: `train` has to do.
    hazard_KB: of everybody alike, where heads begin.
    """
    network.eval()
    jury = Jury(network, validation, train.foresee, run)
    (heard,) = jury.hear(lambda inputs_LF, base_LJX: [network.trusting(network.head(inputs_LF), base_LJX).view(-1, *hazard_KB.shape)])
    feed, members, size = Feed(network, train, run), members_of(network), min(UNITS, network.shape.head)
    committee = _committee(network, members, [size] * len(members), feed.scale(), hazard_KB, run)
    before_K, loss_M = jury.losses(heard), [jury.losses(logits).mean() for logits in jury.hear(committee)]
    best, best_pass = [copy.deepcopy(committee.state_dict())] * len(members), [0] * len(members)
    begun = run.spent
    for number in _trained(committee, feed, _passes(feed, run), TRIED_SHARE, "heads", run):
        for m, logits in enumerate(jury.hear(committee)):
            if (loss := jury.losses(logits).mean()) < loss_M[m]:
                loss_M[m], best[m], best_pass[m] = loss, copy.deepcopy(committee.state_dict()), number
    took = run.spent - begun
    committee.recall(best)
    share_KC, loss_K = jury.mixtures([*jury.hear(committee), *jury.hear(partial(_of_the_cells, network))])
    share_KM, cells_KJ = np.split(share_KC, [len(members)], axis=1)
    share_KM[~jury.told_K], cells_KJ[~jury.told_K] = 1 / len(members), 0  # so few outcomes choose nobody
    for types, share_C, loss, before in zip(event_sets(run.settings.targets), share_KC, loss_K, before_K, strict=True):
        shares = " ".join(f"{share:.2f}" for share in share_C)
        logger.info("heads: %s: log-loss %.4f of a mixture (%s), %.4f before", "+".join(types), loss, shares, before)
    logger.info("heads: best after passes %s", " ".join(map(str, best_pass)))
    if loss_K.mean() >= before_K.mean():
        return
    share_M = share_KM.mean(0)
    chosen = np.sort(np.argsort(-share_M, kind="stable")[: network.shape.head // size])
    chosen = chosen[share_M[chosen] > LEAST_SHARE]
    share_KM[:, np.setdiff1d(np.arange(len(members)), chosen)] = 0
    lost_K = share_KM.sum(1) + cells_KJ.sum(1) == 0  # sets whose members are not among those chosen
    share_KM[lost_K], cells_KJ[lost_K] = share_KM[~lost_K].mean(0), cells_KJ[~lost_K].mean(0)
    total_K1 = (share_KM.sum(1) + cells_KJ.sum(1))[:, None]
    share_KM, cells_KJ = share_KM / total_K1, cells_KJ / total_K1
    if not len(chosen) or not run.team.first_says(run.spent + took / 2 < 1):
        committee.merge(network, share_KM, cells_KJ)
    else:
        shares = share_M[chosen] / share_M[chosen].sum()
        passes = max(round(float(shares @ np.array(best_pass)[chosen])), 1)
        if whole is not None:
            foresee, train = train.foresee, whole()
            train.foresee = foresee
            feed = Feed(network, train, run)
        units = np.diff(np.round(np.cumsum([0, *shares]) * network.shape.head).astype(int)).tolist()
        committee = _committee(network, [members[m] for m in chosen], units, feed.scale(), hazard_KB, run)
        for _ in _trained(committee, feed, passes, math.inf, "chosen heads", run):
            pass
        committee.merge(network, share_KM[:, chosen], cells_KJ)
    shift_K = follow_trend(network, train[0], np.array(grid(run.settings.targets)), run.rng)
    run.team.share_weights(network.head)
    logger.info("heads: levels moved by the trend: %s", ", ".join(f"{shift:+.2f}" for shift in shift_K))


def _of_the_cells(network: Network, inputs_LF: torch.Tensor, base_LJX: torch.Tensor) -> list[torch.Tensor]:
    """(L, K, B) what each cell foresees by itself."""
    return [base_LX.view(-1, network.shape.sets, network.shape.bins) for base_LX in base_LJX.unbind(1)]


def _committee(
    network: Network, members: Sequence[Member], units: Sequence[int], scale: Standardise, hazard_KB: NDArray[np.float64], run: Run
) -> Committee:
    torch.manual_seed(run.settings.seed)
    committee = Committee(network.shape, members, units, scale, hazard_KB).to(network.device)
    run.team.share_weights(committee)
    torch.manual_seed(run.settings.seed + run.team.rank)
    return committee


def _passes(feed: Feed, run: Run) -> int:
    return min(run.settings.epochs, max(round(STEPS / feed.batches), LEAST_PASSES))


def _trained(committee: Committee, feed: Feed, passes: int, until: float, words: str, run: Run) -> Iterator[int]:
    """Train for so many passes; the number of each, when it is done, from 1. Fewer steps, where the first ones show that they do not last
    for this share of the time budget: the step size must come down in any case."""
    settings = run.settings
    objective = Objective(settings.targets, event_sets(settings.targets), grid(settings.targets))
    optimizer = adam([*committee.parameters()], settings.weight_decay, STEP_SIZE)
    taken = min(1.0, MOST_STEPS / max(passes * feed.batches, 1.0))
    begun, steps, planned = run.spent, 0, max(passes * feed.count(taken), 1)
    for number in range(passes):
        committee.train()
        for asked, batch_weight in feed.one_pass(taken):
            run.goes_on()
            if steps >= planned:
                break
            set_step_size(optimizer, STEP_SIZE * learning_rate_share(steps / planned))
            _step(committee, asked, objective, optimizer, batch_weight, feed.window_ms, run)
            steps += 1
            if steps == TIMED_STEPS:
                last = (until - run.spent) / max((run.spent - begun) / steps, 1e-9)
                planned = run.team.first_says(int(min(planned, steps + max(last, 0))))
        committee.eval()
        run.progress(steps / planned, f"{words}, pass {number + 1} of {passes}")
        yield number + 1
        if steps >= planned:
            return


def _step(
    committee: Committee,
    asked: Asked,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batch_weight: float,
    window_ms: int,
    run: Run,
) -> None:
    """All members at once, each by its own objective. batch_weight: of a batch's moments, in the mean."""
    optimizer.zero_grad(set_to_none=True)
    if len(asked):
        losses, outcomes = [], objective.outcomes(asked.event_LKB, asked.mask_LKB, asked.observed_L)
        for member, logits_LKB in zip(committee.members, committee(asked.inputs_LF, asked.base_LJX), strict=True):
            weight_L = asked.weight_L / batch_weight
            if member.half_life:  # what was observed of a moment is its age
                weight_L = weight_L * torch.exp2(-asked.observed_L / (member.half_life * window_ms))
            losses.append(objective(logits_LKB, outcomes, member.asked) @ weight_L)
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
    parameters = [*committee.parameters()]
    run.team.average_gradients(parameters, torch.tensor(batch_weight, device=committee.seen_UF.device))
    torch.nn.utils.clip_grad_norm_(parameters, run.settings.gradient_norm * len(committee.members))
    optimizer.step()

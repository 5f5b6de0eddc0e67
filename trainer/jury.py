"""The jury: moments of which the heads have seen nothing say which heads do best at what the targets ask.

There are two panels, and each has its half of the say:

1. the newest days, of everybody. What has changed shows here alone; but outcomes are known of short horizons only, so each is shortened to
   half of these days. Heads are not judged by their level there: it is moved to that of the newest days at last (`trainer.trend`);
2. users held out, on all days before. Here horizons close; but what is true of these days need not be of the next.

Axis letters as in `trainer.committee`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from model.hazards import grid, probabilities, target_tensors
from model.network import Network
from model.targets import event_sets
from trainer.foresight import Foresight
from trainer.material import BLOCK, Material
from trainer.objective import likelihood_terms
from trainer.parts import part_of
from trainer.served import Served
from trainer.stage import Run

MOMENTS = 60_000
"""Of the newest days that are looked at, at most."""
LEAST_USERS = 10
"""Users with, and users without, an outcome that a target takes to have a say: the moments of one user say one thing."""
LEVEL_STEPS = 6
ROUNDS = 12
"""Of adding a member to a mixture: its finest share is a twelfth."""

Says = Callable[[torch.Tensor, torch.Tensor], Sequence[torch.Tensor]]
"""(L, K, B) hazard logits of each member, from inputs_LF and base_LJX (`served.Asked`)."""


class Panel:
    """A sample of the moments of some material, the same for all. levels: whether heads are judged by their level, too."""

    def __init__(self, network: Network, material: Material, foresee: Foresight, run: Run, levels: bool) -> None:
        self._levels = levels
        moments, targets = material.moments, run.settings.targets
        chosen = np.sort(np.random.default_rng(run.settings.seed).permutation(len(moments))[: MOMENTS // run.team.size])
        self._team, sets = run.team, event_sets(targets)
        self._asked = Served(network, part_of(material, foresee))(torch.from_numpy(chosen))
        longest_ms = max(run.team.most(int(moments.observed_ms.max(initial=0))) // 2, 1)
        targets = tuple(t.model_copy(update={"horizon_ms": min(t.horizon_ms, longest_ms)}) for t in targets)
        self._targets = tuple(tensor.to(network.device) for tensor in target_tensors(targets, sets, grid(run.settings.targets)))
        self._closed_LT = np.stack([moments.observed_ms[chosen] >= t.horizon_ms for t in targets], 1)
        occurs = [moments.wait_ms[chosen, sets.index(t.types)] < t.horizon_ms for t in targets]
        self._outcome_LT = np.stack([o if t.outcome == "occurs" else ~o for o, t in zip(occurs, targets, strict=True)], 1)
        self._weight_L = moments.weight[chosen].astype(np.float64)
        user_L = material.history.user[moments.event[chosen]]
        users_T2 = [
            [len(np.unique(user_L[self._closed_LT[:, t] & (self._outcome_LT[:, t] == outcome)])) for outcome in (False, True)]
            for t in range(len(targets))
        ]
        told = np.array(run.team.total(*np.ravel(users_T2).tolist())).reshape(-1, 2)
        self._told_T = told.min(1) >= LEAST_USERS
        self.told_K = np.isin(np.arange(len(sets)), self._targets[1].cpu().numpy()[self._told_T])

    @torch.inference_mode()
    def hear(self, says: Says) -> list[torch.Tensor]:
        """(L, K, B) logits of each member at the panel's moments."""
        asked, rows = self._asked, torch.arange(len(self._asked))
        blocks = rows.split(BLOCK)  # type: ignore[no-untyped-call]
        parts = [says(asked.inputs_LF[some], asked.base_LJX[some]) for some in blocks]
        return [torch.cat(of_member) for of_member in zip(*parts, strict=True)]

    @torch.inference_mode()
    def losses(self, logits_LKB: torch.Tensor) -> NDArray[np.float64]:
        """(K,) of each event set, the mean over its targets of the log-loss at their horizons; NaN where none has outcomes enough."""
        p_LT = probabilities(logits_LKB, *self._targets).double().clamp(1e-6, 1 - 1e-6).cpu().numpy()
        weight_LT = self._weight_L[:, None] * self._closed_LT
        if not self._levels:
            p_LT = self._levelled(p_LT, weight_LT)
        loss_T = (-np.log(np.where(self._outcome_LT, p_LT, 1 - p_LT)) * weight_LT).sum(0)
        figures = np.stack([loss_T, weight_LT.sum(0)])
        loss_T, weight_T = np.array(self._team.total(*figures.ravel().tolist())).reshape(figures.shape)
        sets_T, out_K = self._targets[1].cpu().numpy(), np.full(logits_LKB.shape[1], np.nan)
        for k in np.flatnonzero(self.told_K):
            own_T = self._told_T & (sets_T == k)
            out_K[k] = np.mean(loss_T[own_T] / weight_T[own_T])
        return out_K

    def _levelled(self, p_LT: NDArray[np.float64], weight_LT: NDArray[np.float64]) -> NDArray[np.float64]:
        """The same, with each target's log-odds moved to its outcomes, by Newton's method."""
        odds_LT, shift_T = np.log(p_LT / (1 - p_LT)), np.zeros(p_LT.shape[1])
        for _ in range(LEVEL_STEPS):
            p_LT = 1 / (1 + np.exp(-(odds_LT + shift_T)))
            score = np.stack([weight_LT * (self._outcome_LT - p_LT), weight_LT * p_LT * (1 - p_LT)]).sum(1)
            score_T, curvature_T = np.array(self._team.total(*score.ravel().tolist())).reshape(score.shape)
            shift_T += np.clip(score_T / np.maximum(curvature_T, 1e-9), -1, 1)
        return (1 / (1 + np.exp(-(odds_LT + shift_T)))).clip(1e-6, 1 - 1e-6)

    @torch.inference_mode()
    def losses_of_waits(self, logits_LKB: torch.Tensor) -> NDArray[np.float64]:
        """(K,) by the likelihood of the waits, which few moments are enough for."""
        terms_LKB = likelihood_terms(logits_LKB, self._asked.event_LKB, self._asked.mask_LKB)
        loss_K = torch.einsum("lkb,l->k", terms_LKB, self._asked.weight_L)
        *sums, weight = self._team.total(*loss_K.tolist(), float(self._asked.weight_L.sum()))
        return np.array(sums) / max(weight, 1e-9)


Logits = tuple[torch.Tensor, ...]
"""What a member says to each panel."""


class Jury:
    """Panels of like weight, of which the first is the newest days', if there are two. One whose outcomes are too few has no say."""

    def __init__(self, network: Network, validation: Sequence[Material], foresee: Foresight, run: Run) -> None:
        newest = validation[0] if len(validation) > 1 else None
        self._panels = [Panel(network, material, foresee, run, levels=material is not newest) for material in validation]

    @property
    def told_K(self) -> NDArray[np.bool_]:
        """(K,) whether some panel has outcomes enough of an event set."""
        told_K: NDArray[np.bool_] = np.stack([panel.told_K for panel in self._panels]).any(0)
        return told_K

    def hear(self, says: Says) -> list[Logits]:
        """What each member says."""
        return list(zip(*(panel.hear(says) for panel in self._panels), strict=True))

    def losses(self, logits: Logits) -> NDArray[np.float64]:
        """(K,) of each event set, the mean over the panels; of the waits' likelihood, where none has outcomes enough."""
        losses_PK = np.stack([panel.losses(of_panel) for panel, of_panel in zip(self._panels, logits, strict=True)])
        untold_K = np.isnan(losses_PK).all(0)
        if untold_K.any():
            waits_PK = np.stack([panel.losses_of_waits(of_panel) for panel, of_panel in zip(self._panels, logits, strict=True)])
            losses_PK[:, untold_K] = waits_PK[:, untold_K]
        losses_K: NDArray[np.float64] = np.nanmean(losses_PK, axis=0)
        return losses_K

    def mixtures(self, said: Sequence[Logits]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(K, C) shares of the candidates in the mixture that does best for each event set, and (K,) its loss."""
        sets = said[0][0].shape[1]
        count_KC = np.zeros((sets, len(said)))
        best_KC, best_K = count_KC.copy(), np.full(sets, np.inf)
        mixed: Logits = tuple(torch.zeros_like(of_panel) for of_panel in said[0])
        for size in range(1, ROUNDS + 1):
            tried_CK = np.stack([self.losses(tuple((m + one) / size for m, one in zip(mixed, each, strict=True))) for each in said])
            added_K = tried_CK.argmin(0)
            count_KC[np.arange(sets), added_K] += 1
            for m, *of_candidates in zip(mixed, *said, strict=True):
                for k, c in enumerate(added_K):
                    m[:, k] += of_candidates[c][:, k]
            better_K = tried_CK.min(0) < best_K
            best_K = np.minimum(best_K, tried_CK.min(0))
            best_KC[better_K] = count_KC[better_K] / size
        return best_KC, best_K

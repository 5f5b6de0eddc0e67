"""The rhythm cell: gaps and silences as a slow count has them, a belief by Bayes, and fitting that tells kinds of users apart."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from support import fill, publish_model
from trainer_support import START_MS, events_table, shop_history

from model.features import Previous, Scaling, Vocabulary, step_features
from model.hazards import DAY_MS, HOUR_MS
from model.network import members
from model.rhythm import ENDS_MS, KINDS, LEAST_ODDS, LEVELS, NO_VISITS, Rhythm, Visits
from model.statistics import EPOCH_2000_MS, STATISTICS, VISIT_GAP_MS, update
from trainer import rhythm as fitting
from trainer.dataset import landmarks
from trainer.history import from_table
from trainer.material import Material, prepare, states_along
from trainer.rhythm import fit_rhythm

SETS = (("purchase",), ("view", "cart"), ("*",))
VOCABULARY = Vocabulary(["view", "purchase", "cart"])
VISITS = Visits(members(SETS, VOCABULARY))
SLOTS_OF = ({2}, {1, 3}, set(range(12)))


def level_of(seconds: int) -> int:
    """Looked for from the shortest on."""
    return next((i for i, end_ms in enumerate(ENDS_MS) if seconds * 1000 <= end_ms), len(ENDS_MS))


def silent(ms: list[int]) -> np.ndarray:
    """(N,) levels of silences, so long after a purchase."""
    stats = np.zeros(len(ms), STATISTICS)
    n, begin_ms = len(ms), np.full(len(ms), START_MS)
    update(stats, np.full(n, 2), begin_ms, np.full(n, np.nan, np.float32))
    return VISITS.silences(stats, begin_ms + ms)[:, 0] - LEVELS


def test_whole_days_are_ends_and_an_exact_gap_belongs_to_the_level_that_it_ends() -> None:
    assert (np.diff(ENDS_MS) > 0).all()
    assert set(range(1, 65)) <= set((ENDS_MS / DAY_MS).tolist())
    assert (ENDS_MS[ENDS_MS > 64 * DAY_MS] % DAY_MS == 0).all()
    days = [1, 7, 14, 64, int(ENDS_MS[-1] // DAY_MS)]
    level = silent([day * DAY_MS for day in days])
    assert ENDS_MS[level].tolist() == [day * DAY_MS for day in days]
    assert silent([day * DAY_MS + 1000 for day in days]).tolist() == (level + 1).tolist()
    assert silent([day * DAY_MS - HOUR_MS for day in days]).tolist() == level.tolist()
    assert silent([0, 1]).tolist() == [0, 0]
    assert silent([10_000 * DAY_MS]).tolist() == [LEVELS - 1]


def test_gaps_and_silences_are_those_of_a_slow_count() -> None:
    rng, users = np.random.default_rng(0), 80
    stats = np.zeros(users, STATISTICS)
    first: list[int | None] = [None] * users
    last: list[dict[int, int]] = [{} for _ in range(users)]
    now_ms = START_MS + rng.integers(0, DAY_MS, users)
    seen = np.zeros(3, np.int64)
    for _ in range(40):
        waits = [0, 500, 1000, VISIT_GAP_MS, VISIT_GAP_MS + 1000, DAY_MS, 7 * DAY_MS, -HOUR_MS]
        drawn = np.where(rng.random(users) < 0.4, rng.choice(waits, users), np.exp(rng.uniform(0, 22, users)).astype(np.int64))
        time_ms, slot = now_ms + drawn, rng.integers(0, 4, users)
        found = VISITS.gaps(stats, slot, time_ms)
        for u in range(users):
            seconds = (max(int(time_ms[u]), int(now_ms[u]) if first[u] is not None else 0) - EPOCH_2000_MS) // 1000
            for k, slots in enumerate(SLOTS_OF):
                expected = 0
                if slot[u] in slots and first[u] is not None:
                    if k not in last[u]:
                        expected = 1 + level_of(seconds - first[u])
                    elif seconds - last[u][k] > VISIT_GAP_MS // 1000:
                        expected = 1 + LEVELS + level_of(seconds - last[u][k])
                assert found[u, k] == expected
                seen[min(expected // LEVELS, 1) + (expected > 0)] += 1
                if slot[u] in slots:
                    last[u][k] = seconds
            first[u] = seconds if first[u] is None else first[u]
        update(stats, slot, time_ms, np.full(users, np.nan, np.float32))
        now_ms = stats["last_ms"].copy()
        at_ms = now_ms + rng.choice([-DAY_MS, 0, 1, 999, DAY_MS, 7 * DAY_MS, 3000 * DAY_MS], users) + rng.integers(0, 2, users) * HOUR_MS
        silences = VISITS.silences(stats, at_ms)
        for u, k in itertools.product(range(users), range(3)):
            at = (max(int(at_ms[u]), int(now_ms[u])) - EPOCH_2000_MS) // 1000
            assert silences[u, k] == (LEVELS + level_of(at - last[u][k]) if k in last[u] else level_of(at - first[u]))
    assert seen.min() > 50  # events that end nothing, first waits and gaps all came


def test_an_unknown_user_ends_no_gap_and_no_set_has_no_column() -> None:
    nobody, at_ms = np.zeros(2, STATISTICS), np.full(2, START_MS)
    assert not VISITS.gaps(nobody, np.array([1, 2]), at_ms).any()
    assert VISITS.silences(nobody, at_ms).max() < KINDS * LEVELS
    assert NO_VISITS.gaps(nobody, np.array([1, 2]), at_ms).shape == NO_VISITS.silences(nobody, at_ms).shape == (2, 0)


def small(sets: int = 2, classes: int = 3, seed: int = 0) -> Rhythm:
    """Classes that differ in their pace, none of which makes any gap next to impossible."""
    torch.manual_seed(seed)
    rhythm = Rhythm(sets, classes)
    fill(rhythm)
    hazard = torch.rand(rhythm.survival_KICG.shape) * torch.tensor([0.005, 0.02, 0.05])[:classes, None]
    rhythm.survival_KICG.copy_((1 - hazard).cumprod(3))
    rhythm.refresh()
    return rhythm


def lasts(rhythm: Rhythm, k: int, kind: int, c: int, ms: float) -> float:
    """P(gap > ms), straight between the levels' ends."""
    at_ends = np.concatenate([[1.0], rhythm.survival_KICG[k, kind, c].double().numpy()[:-1]])
    return float(np.interp(ms, np.concatenate([[0], ENDS_MS]), at_ends))


def belief(rhythm: Rhythm, users: int, seed: int = 1) -> torch.Tensor:
    """Roots of distributions."""
    torch.manual_seed(seed)
    return torch.randn(users, rhythm.sets, rhythm.classes).softmax(2).sqrt().flatten(1)


def test_a_step_is_bayes_and_now_and_then_a_change_of_class() -> None:
    rhythm, rng, users = small(), np.random.default_rng(0), 200
    root = belief(rhythm, users)
    gap_NK = rng.integers(0, 1 + KINDS * LEVELS, (users, 2)) * (rng.random((users, 2)) < 0.7)
    found = rhythm.step(root, torch.from_numpy(gap_NK)).view(users, 2, 3).double() ** 2
    for n, k in itertools.product(range(users), range(2)):
        w, prior = root.view(users, 2, 3)[n, k].double().numpy() ** 2, rhythm.prior_KC[k].double().numpy()
        if gap_NK[n, k]:
            kind, level = divmod(gap_NK[n, k] - 1, LEVELS)
            survival_GC = np.vstack([np.ones(3), rhythm.survival_KICG[k, kind].double().numpy().T])
            w = w * (survival_GC[level] - survival_GC[level + 1])
            w = w / w.sum()
            w = (1 - float(rhythm.switch_K[k])) * w + float(rhythm.switch_K[k]) * prior
        assert found[n, k].numpy() == pytest.approx(w, abs=2e-4)


def test_an_event_that_ends_no_gap_changes_nothing_and_an_empty_state_is_the_prior() -> None:
    rhythm = small()
    root, none = belief(rhythm, 5), torch.zeros(5, 2, dtype=torch.int64)
    assert torch.allclose(rhythm.step(root, none), root, atol=1e-6)
    prior = rhythm.prior_KC.sqrt().flatten().expand(5, -1)
    assert torch.allclose(rhythm.step(torch.zeros_like(root), none), prior, atol=1e-6)
    gap_NK, silence_NK, outlook = none + LEVELS + 100, none + LEVELS + 3, rhythm.outlook([DAY_MS])
    assert torch.allclose(rhythm.step(torch.zeros_like(root), gap_NK), rhythm.step(prior, gap_NK), atol=1e-6)
    assert torch.allclose(rhythm.base(torch.zeros_like(root), silence_NK, outlook), rhythm.base(prior, silence_NK, outlook), atol=1e-5)
    assert not torch.allclose(rhythm.step(root, none), prior, atol=0.1)


def test_nobody_is_asked_and_stepped_too() -> None:
    """A worker's batch may hold no question."""
    rhythm, nobody, none = small(), torch.zeros(0, 6), torch.zeros(0, 2, dtype=torch.int64)
    assert rhythm.base(nobody, none, rhythm.outlook([DAY_MS, 7 * DAY_MS])).shape == (0, 4)
    assert rhythm.step(nobody, none).shape == (0, 6)


def test_hazards_are_differences_of_what_the_classes_say_together() -> None:
    rhythm, rng, users = small(), np.random.default_rng(0), 300
    edges_ms = [HOUR_MS, DAY_MS, int(2.7 * DAY_MS), 7 * DAY_MS, 30 * DAY_MS]
    root, silence_NK = belief(rhythm, users), rng.integers(0, KINDS * LEVELS, (users, 2))
    silence_NK[:2] = [[0, LEVELS - 1], [LEVELS, KINDS * LEVELS - 1]]  # right after an event, and longer than all
    found = torch.sigmoid(rhythm.base(root, torch.from_numpy(silence_NK), rhythm.outlook(edges_ms)).view(users, 2, -1).double())
    ends_ms = [0, *ENDS_MS.tolist()]
    for n, k in itertools.product(range(users), range(2)):
        w = root.view(users, 2, 3)[n, k].double().numpy() ** 2
        kind, level = divmod(int(silence_NK[n, k]), LEVELS)
        since_ms = 0 if level == 0 else (ends_ms[level] + ends_ms[min(level + 1, len(ENDS_MS))]) // 2
        until = [sum(w[c] * lasts(rhythm, k, kind, c, since_ms + u) for c in range(3)) for u in [0, *edges_ms]]
        hazard = np.maximum(1 - np.array(until[1:]) / until[:-1], LEAST_ODDS)
        assert found[n, k].numpy() == pytest.approx(hazard, rel=1e-3, abs=2e-5)


def test_right_after_a_visit_the_chance_of_one_within_days_is_that_of_the_gaps() -> None:
    """Whole days are ends: nothing is rounded, neither by a level nor by what is asked a millisecond later."""
    rhythm = small(sets=1)
    root, silence = belief(rhythm, 1), torch.full((1, 1), LEVELS + int(silent([1])[0]))
    logits = rhythm.base(root, silence, rhythm.outlook([DAY_MS, 7 * DAY_MS]))
    none_within = float((1 - torch.sigmoid(logits)).prod())
    level = int(np.flatnonzero(ENDS_MS == 7 * DAY_MS)[0])
    assert none_within == pytest.approx(float((root[0] ** 2) @ rhythm.survival_KICG[0, 1, :, level]), abs=1e-5)


def test_what_no_class_thinks_possible_stays_finite() -> None:
    rhythm = Rhythm(1, 2)
    rhythm.survival_KICG.fill_(1.0)  # nobody ever comes
    rhythm.survival_KICG[:, :, 1] = 0.0  # or all at once
    rhythm.refresh()
    root = torch.zeros(1, 2)
    for gap in (1 + LEVELS + 50, 0, KINDS * LEVELS, 1 + LEVELS):
        root = rhythm.step(root, torch.tensor([[gap]]))
        assert float((root**2).sum()) == pytest.approx(1, abs=1e-5)
        for silence in (0, LEVELS, KINDS * LEVELS - 1):
            assert torch.isfinite(rhythm.base(root, torch.tensor([[silence]]), rhythm.outlook([DAY_MS, 90 * DAY_MS]))).all()


DAYS = 150
WITHIN_A_WEEK = {"weekly": 0.85, "random": 1 - np.exp(-0.7)}
"""Whoever comes weekly skips a week at times; the others come every ten days in the mean."""


def two_kinds(users: int, seed: int) -> Material:
    """Each user looks around first, and comes to buy some days later; half of them are weekly users."""
    rng, rows = np.random.default_rng(seed), []
    for u in range(users):
        at_ms = START_MS + int(rng.integers(0, 20 * DAY_MS))
        rows.append((f"u{u}", "view", at_ms))
        at_ms += HOUR_MS + int(rng.exponential(5 * DAY_MS))
        while at_ms < START_MS + DAYS * DAY_MS:
            rows.append((f"u{u}", "purchase", at_ms))
            at_ms += int(rng.geometric(0.85)) * 7 * DAY_MS if u % 2 else int(rng.exponential(10 * DAY_MS)) + HOUR_MS
    history, vocabulary = from_table(events_table(rows)), Vocabulary(["view", "purchase"])
    moments = landmarks(history, [("purchase",)], START_MS, START_MS + DAYS * DAY_MS, np.random.default_rng(0))
    visits = Visits(members([("purchase",)], vocabulary))
    return prepare(history, moments, vocabulary, Scaling(), [7 * DAY_MS], visits=visits)


def fitted(material: Material, classes: int) -> Rhythm:
    rhythm = Rhythm(1, classes)
    fit_rhythm(rhythm, Visits(members([("purchase",)], Vocabulary(["view", "purchase"]))), material, np.random.default_rng(0))
    return rhythm


def roots(rhythm: Rhythm, material: Material) -> torch.Tensor:
    """(E, Y) after each event."""
    first, out = material.history.first, torch.empty(len(material.history), rhythm.classes)
    for u in range(material.history.users):
        root = torch.zeros(1, rhythm.classes)
        for e in range(first[u], first[u + 1]):
            root = rhythm.step(root, torch.from_numpy(material.gap_EK[e : e + 1]))
            out[e] = root[0]
    return out


def loss_of_next(rhythm: Rhythm, material: Material) -> float:
    """Mean log-loss of the level of each gap between two visits, as the user's visits until then foretell it."""
    gap_E = material.gap_EK[:, 0]
    ends = np.flatnonzero(gap_E > LEVELS)
    w_NC = rhythm.believed(roots(rhythm, material)[ends - 1])[:, 0]
    return float(-(w_NC * rhythm.mass_KXC[0, gap_E[ends]]).sum(1).log().mean())


def loss_of_the_law(material: Material) -> float:
    """The same, by the law itself."""
    ends_ms = np.concatenate([ENDS_MS, [np.inf]])
    begin_ms = np.concatenate([[0], ENDS_MS])
    by_chance = np.exp(-np.maximum(begin_ms - HOUR_MS, 0) / (10 * DAY_MS)) - np.exp(-np.maximum(ends_ms - HOUR_MS, 0) / (10 * DAY_MS))
    weeks = np.arange(1, 30)
    weekly = np.bincount([level_of(int(n) * 7 * DAY_MS // 1000) for n in weeks], 0.85 * 0.15 ** (weeks - 1), LEVELS)
    mass_CG, losses, first = np.stack([weekly, by_chance]), [], material.history.first
    for u in range(material.history.users):
        w = np.array([0.5, 0.5])
        for gap in material.gap_EK[first[u] : first[u + 1], 0]:
            if gap > LEVELS:
                both = w * mass_CG[:, gap - 1 - LEVELS]
                losses.append(-np.log(both.sum()))
                w = both / both.sum()
    return float(np.mean(losses))


@pytest.fixture(scope="module")
def known() -> Material:
    return two_kinds(400, seed=1)


def test_fitting_tells_weekly_users_from_those_who_come_at_random(known: Material) -> None:
    rhythm, others = fitted(known, 4), two_kinds(100, seed=2)
    last = np.flatnonzero(others.gap_EK[:, 0] > 0)
    last = last[np.append(np.diff(others.history.user[last]) > 0, True)]  # each user's last visit of some
    last = last[(last - others.history.first[others.history.user[last]]) >= 6]
    silence = torch.full((len(last), 1), LEVELS)
    within = torch.sigmoid(rhythm.base(roots(rhythm, others)[last], silence, rhythm.outlook([7 * DAY_MS]))).squeeze(1).numpy()
    weekly = np.array([int(others.history.user_ids[u][1:]) % 2 for u in others.history.user[last]], bool)
    assert min(weekly.sum(), (~weekly).sum()) > 30
    assert within[weekly] == pytest.approx(WITHIN_A_WEEK["weekly"], abs=0.1)
    assert within[~weekly].mean() == pytest.approx(WITHIN_A_WEEK["random"], abs=0.06)


def test_a_mixture_foretells_the_next_visit_nearly_as_the_law_does(known: Material) -> None:
    others = two_kinds(100, seed=2)
    exact = loss_of_the_law(others)
    assert loss_of_next(fitted(known, 4), others) < exact + 0.15
    assert loss_of_next(fitted(known, 1), others) > exact + 0.4  # of one class, nothing can be learnt from a user's visits


def test_the_likelihood_rises_over_the_rounds(known: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of gaps and of the silence at the end, with changes of class; as the step has it."""
    likelihood = []
    for rounds in (1, 3, 10, 40):
        monkeypatch.setattr(fitting, "ROUNDS", rounds)
        rhythm = fitted(known, 4)
        gap_E, first = known.gap_EK[:, 0], known.history.first
        w_EC = rhythm.believed(roots(rhythm, known))[:, 0].double()
        ends = np.flatnonzero(gap_E)
        of_gaps = (w_EC[ends - 1] * rhythm.mass_KXC[0, gap_E[ends]]).sum(1).log().sum()
        silence = torch.from_numpy(end_silences(known))
        of_silences = (w_EC[first[1:] - 1] * rhythm.outlook([DAY_MS])[silence, :, 0]).sum(1).log().sum()
        likelihood.append(float(of_gaps + of_silences) / len(ends))
    assert min(np.diff(likelihood)) > -0.002  # what is smoothed may cost a little
    assert likelihood[-1] > likelihood[0] + 0.003


def end_silences(material: Material) -> np.ndarray:
    """(U,) of each user at the end of the window."""
    history, out = material.history, []
    for u in range(history.users):
        mine = slice(history.first[u], history.first[u + 1])
        bought = history.time_ms[mine][1:]
        since_ms, kind = (int(bought[-1]), 1) if len(bought) else (int(history.time_ms[mine][0]), 0)
        out.append(kind * LEVELS + level_of(material.end_ms // 1000 - since_ms // 1000))
    return np.array(out)


def test_no_gap_at_all_is_fitted_too() -> None:
    """Of somebody who came once: nothing is known but the silence."""
    history, vocabulary = from_table(events_table([("a", "view", START_MS)])), Vocabulary(["view", "purchase"])
    moments = landmarks(history, [("purchase",)], START_MS, START_MS + 30 * DAY_MS, np.random.default_rng(0))
    visits = Visits(members([("purchase",)], vocabulary))
    rhythm = fitted(prepare(history, moments, vocabulary, Scaling(), [7 * DAY_MS], visits=visits), 3)
    assert torch.isfinite(rhythm.survival_KICG).all()
    assert (rhythm.survival_KICG.diff(dim=3) <= 0).all()
    assert rhythm.prior_KC.sum().item() == pytest.approx(1, abs=1e-5)


def test_a_worker_and_a_trainer_step_to_the_same_states(tmp_path: Path) -> None:
    model, history = publish_model(tmp_path, "v1"), shop_history(40, 20)
    states, after = states_along(model, history)
    state = np.zeros((history.users, model.network.state_size), np.float32)
    stats, previous = np.zeros(history.users, STATISTICS), np.zeros(history.users, np.int64)
    hashes = (history.type_hash, history.item_hash, history.category_hash, history.session_hash)
    for rank in range(int(history.rank.max()) + 1):
        events = np.flatnonzero(history.rank == rank)
        users = history.user[events]
        own, before = stats[users], previous[users]
        seen = Previous(own["count"] > 0, own["last_ms"], *(column[before] for column in hashes))
        columns = (history.time_ms[events], *(column[events] for column in hashes), history.value[events])
        features = step_features(model.vocabulary, model.scaling, seen, *columns)
        state[users] = model.network.step(state[users], features, own).numpy()
        assert state[users] == pytest.approx(states[events].numpy(), abs=1e-4)
        update(own, features.slot, features.time_ms, history.value[events], None, model.vocabulary.used)
        stats[users], previous[users] = own, events
    rhythm = states[history.first[1:] - 1, -model.network.shape.sets * model.network.shape.rhythm :]
    assert len(np.unique(rhythm.numpy().round(3), axis=0)) > 10  # users differ in it
    assert np.array_equal(after[history.first[1:] - 1]["last_ms"], stats["last_ms"])

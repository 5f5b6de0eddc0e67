"""The quality benchmark is fair: the laws' exact answers are right and the best, and nothing sees a future."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from bench import rivals, scores
from bench.laws import LAWS, journey, markov, shop
from bench.laws.case import AFTER, KINDS, SCHEDULED, Case, Floats, Law, Stream
from bench.quality import main
from demo.attainable import Filter
from demo.shop import History as Shop
from demo.shop import shop_law
from model.hazards import DAY_MS
from trainer import baselines
from trainer.cutoffs import ask
from trainer.history import from_table

USERS = {"phases": 500, "bursts": 300, "rhythm": 1000, "rare": 3000, "single": 3000}
TINY = [f"--set={change}" for change in ("epochs=1", "belief_steps=5", "hidden=8", "head=8", "belief_states=2")]
EVERY = [name for name in LAWS if name != "few"]  # the shop again


def users(name: str) -> int:
    return USERS.get(name, 1500)


@cache
def case(name: str) -> Case:
    return LAWS[name].draw(users(name), seed=5)


def z(off: Floats, p: Floats, user: np.ndarray) -> float:
    """How many standard errors the sum of `off` lies from 0: users are drawn, and so are outcomes."""
    return float(off.sum() / np.sqrt(max((np.bincount(user, off) ** 2).sum(), (p * (1 - p)).sum())))


@pytest.mark.parametrize("name", EVERY)
def test_exact_answers_are_calibrated_and_nobody_beats_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "LEARNT", 4000)
    of = case(name)
    history = from_table(of.table)
    for kind in KINDS:
        compared = rivals.to_compare(of, history, kind, seed=0)
        asked, exact = compared.asked, of.asked[kind].exact
        assert exact is not None
        assert len(asked) > 100
        for i, target in enumerate(of.targets):
            y, p, where = asked.label[:, i], exact[:, i], f"{name}, {target.name}, {kind}"
            assert abs(z(y - p, p, asked.user)) < 4, where
            third = np.searchsorted(np.quantile(p, (1 / 3, 2 / 3)), p)
            for g in range(3):
                rows = third == g
                assert abs(z((y - p)[rows], p[rows], asked.user[rows])) < 4, f"{where}, third {g}"
            for alternative in (baselines.constant, baselines.logistic):
                worse = scores.losses(y, alternative(compared)[:, i]) - scores.losses(y, p)
                assert worse.mean() > -3 * scores.clustered(worse, asked.user), where
                if kind == SCHEDULED and alternative is baselines.constant:
                    assert worse.mean() > 3 * scores.clustered(worse, asked.user), where


def exchanged(stream: Stream, until_ms: int) -> Stream:
    """Another future: what came from `until` on came to other users, as other types."""
    later = stream.time_ms >= until_ms
    user = np.where(later, stream.users - 1 - stream.user, stream.user)
    kind = np.where(later, len(stream.types) - 1 - stream.type, stream.type)
    order = np.lexsort((stream.time_ms, user))
    return replace(replace(stream, user=user, type=kind).where(order), users=stream.users)


@pytest.mark.parametrize("name", EVERY)
def test_questions_see_no_future(name: str) -> None:
    law = LAWS[name]
    stream = law.simulate(min(users(name), 300), 7)
    other = exchanged(stream, law.until_ms)
    assert not np.array_equal(stream.user, other.user)
    user = np.unique(stream.user[stream.time_ms < law.until_ms])
    at_ms = np.full(len(user), law.until_ms)
    np.testing.assert_allclose(law.answers(stream, user, at_ms), law.answers(other, user, at_ms), rtol=0, atol=1e-9)
    tables = []
    for s in (stream, other):
        history = from_table(s.table())
        asked = ask(history, law.targets, [law.until_ms], law.until_ms)
        tables.append(baselines.features(history, asked, law.targets, law.until_ms))
    np.testing.assert_array_equal(*tables)
    assert len(np.unique(tables[0], axis=0)) > len(tables[0]) / 2


@pytest.mark.parametrize("name", LAWS)
def test_questions_lie_between_until_and_the_end(name: str) -> None:
    law, of = LAWS[name], case(name)
    end_ms = law.until_ms + (law.days - law.until_day) * DAY_MS
    for kind in KINDS:
        at_ms = of.asked[kind].at_ms
        assert law.until_ms <= at_ms.min()
        assert at_ms.max() + max(t.horizon_ms for t in law.targets) <= end_ms
    assert len(np.unique(of.asked[SCHEDULED].at_ms // DAY_MS % 7)) >= 4
    assert of.table["timestamp"].to_numpy().max() < end_ms
    history = from_table(of.table)
    after = rivals.questions(of, history, AFTER)
    assert (after.at_ms == history.time_ms[after.event] + 1).all(), "the event itself is known"
    for kind in KINDS:
        learn = rivals.to_learn_from(of, history, kind, 0)
        assert learn.closed.any(0).all()
        assert (learn.at_ms + min(t.horizon_ms for t in law.targets)).max() <= of.until_ms
    if of.active_days is not None:
        scheduled = rivals.questions(of, history, SCHEDULED)
        assert (scheduled.at_ms - history.time_ms[scheduled.event]).max() <= of.active_days * DAY_MS


@pytest.mark.parametrize("name", LAWS)
def test_a_seed_gives_one_sample(name: str) -> None:
    one, same, other = (LAWS[name].draw(60, seed) for seed in (1, 1, 2))
    assert one.table.equals(same.table)
    assert not one.table.equals(other.table)
    for kind in KINDS:
        assert one.asked[kind].user_id == same.asked[kind].user_id
        np.testing.assert_array_equal(one.asked[kind].at_ms, same.asked[kind].at_ms)
        np.testing.assert_array_equal(one.asked[kind].exact, same.asked[kind].exact)


def test_the_general_filter_agrees_with_the_demos() -> None:
    law, stream = shop_law(), LAWS["shop"].simulate(300, 3)
    general = markov.Process(law.types, np.ones(1), law.initial, law.d0[None], law.d[None])
    steady = markov.Clock(np.array([0.0, 10_000.0]), np.array([0.0, 10_000.0]))
    user, at_ms = LAWS["shop"].questions(stream)[SCHEDULED]
    found = markov.Filter(general, steady, stream).answers(user, at_ms, shop.LAW.targets)
    columns = (stream.user, stream.time_ms, stream.type, stream.item, stream.category, stream.value)
    wanted = {t.name: (t.types, t.outcome, t.horizon_ms) for t in shop.LAW.targets}
    exact = Filter(law, Shop(*columns, users=[], types=stream.types)).probabilities(user, at_ms - 1, wanted)
    np.testing.assert_allclose(found, np.stack(list(exact.values()), axis=1), rtol=0, atol=1e-6)


def test_groups_that_are_wrong_are_found_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    n = 6000
    p, user, value = rng.uniform(0.05, 0.6, n), np.repeat(np.arange(n // 3), 3), rng.random(n)
    y = rng.random(n) < p
    groups = scores.Groups(user, np.arange(n), {"events": value})
    assert scores.worst_group(y, p, groups) is None
    assert scores.ece(y, p) < scores.ece_bound(p, groups.luck, rng) < 0.04
    worst = scores.worst_group(y, np.where(value > 0.9, p + 0.2, p), groups)
    assert worst is not None
    assert worst["from"] == pytest.approx(0.9, abs=0.02)
    assert worst["gap"] == pytest.approx(0.2, abs=0.05)
    own = p[user * 3]
    assert scores.ece_bound(own, user, rng) > 1.2 * scores.ece_bound(own, groups.luck, rng), "outcomes that go together are fewer"


FIELDS = {
    "law", "target", "kind", "questions", "base_rate", "measures", "best", "constants", "excess", "excess_error", "sampled_excess",
    "closed", "ece_bound", "worst_group", "passes",
}  # fmt: skip


def test_the_battery_runs_and_keeps_what_no_recipe_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rivals, "LEARNT", 3000)
    words = ["--only", "few", "--users", "250", *TINY, "--json", "--keep", str(tmp_path / "kept")]
    assert main([*words, "--picture", str(tmp_path / "picture.png")]) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out.splitlines()[-1])
    assert "lightgbm fitted on" in shown.err
    (found,) = report["laws"]
    assert [(row["target"], row["kind"]) for row in found["rows"]] == [(t, k) for k in KINDS for t in ("purchase", "churn")]
    for row in found["rows"]:
        assert set(row) == FIELDS
        assert set(row["measures"]) == {"constant", "logistic", "lightgbm", "ours", "exact"}
        assert all(set(m) == {"auc", "log_loss", "ece", "expected"} for m in row["measures"].values())
        assert row["measures"]["exact"]["expected"] < row["measures"]["ours"]["expected"]
    assert f"{report['passed']} of 4 rows pass" in shown.out
    assert max(map(len, shown.out.splitlines()[:-1])) <= 140
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert main(words) == 0
    again = capsys.readouterr()
    assert "lightgbm fitted on" not in again.err
    assert json.loads(again.out.splitlines()[-1])["laws"][0]["rows"] == found["rows"]


def test_a_case_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "journey", "--journey", str(tmp_path)]) == 0
    assert "journey is left out" in capsys.readouterr().err
    (tmp_path / "events.csv").write_text("user_id,timestamp,type,category,value\na,1000,basket,d1,2.5\nb,2000,basket,d1,1.0\n")
    day = DAY_MS
    (tmp_path / "queries.csv").write_text(
        f"query,task,user_id,at,horizon\n0,B1,a,5000,{7 * day}\n1,B1,b,5000,{7 * day}\n2,B2,b,5000,{30 * day}\n3,B2,a,5000,{30 * day}\n"
    )
    task = '[task.{}]\nevents = ["basket"]\noutcome = "{}"\nhorizon_days = {}\n[task.{}.baselines]\nLR = {{ log_loss = 0.5 }}\n'
    (tmp_path / "case.toml").write_text(
        "fit_until_ms = 5000\n" + task.format("B1", "occurs", 7, "B1") + task.format("B2", "absent", 30, "B2")
    )
    found = journey.read(tmp_path)
    assert [str(t) for t in found.targets] == ["B1=basket:occurs:7d", "B2=basket:absent:30d"]
    assert found.asked[SCHEDULED].user_id == ["a", "b"]
    assert found.constants == {"B1": {"LR": {"log_loss": 0.5}}, "B2": {"LR": {"log_loss": 0.5}}}


def test_a_setting_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "few", "--set", "magic=1"])
    assert "STREAMSCORE_TRAINER_MAGIC is not a setting" in capsys.readouterr().err


def test_every_law_says_what_it_is_about(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for name, law in LAWS.items():
        assert isinstance(law, Law)
        assert law.name == name
        assert law.about in shown

"""`backtest`, `compare` and `tune`: honest splits, alternatives that know something, and settings that can be used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from trainer_support import NOW, START_MS, events_table, quick_settings, shop_table

from model.hazards import DAY_MS
from model.targets import Target
from trainer import baselines
from trainer.__main__ import main
from trainer.backtest import origins
from trainer.compare import ALTERNATIVES, chosen, compare, split
from trainer.cutoffs import ask, figures, training_moments
from trainer.history import from_table
from trainer.pareto import fitted, log_likelihood
from trainer.settings import TrainerSettings
from trainer.stage import no_progress

TARGETS = (Target.parse("gone=*:absent:5d"), Target.parse("buy=purchase:occurs:7d"))
SMALL = ["--set", "belief_steps=20", "--set", "hidden=8", "--set", "head=8", "--set", "epochs=1"]
ASKED = ["--target", str(TARGETS[0]), "--target", str(TARGETS[1])]
UNTIL_MS = START_MS + 42 * DAY_MS


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare") / "events.parquet"
    pyarrow.parquet.write_table(shop_table(300, 56), path)
    return path


def test_questions_are_answered_by_what_follows() -> None:
    day = DAY_MS
    history = from_table(events_table([("a", "view", day), ("b", "view", 2 * day), ("a", "buy", 5 * day), ("b", "view", 9 * day)]))
    targets = (Target.parse("buy=buy:occurs:2d"), Target.parse("gone=*:absent:3d"))
    found = ask(history, targets, [2 * day, 3 * day, 4 * day], 6 * day)
    rows = [(history.user_ids[u], at // day) for u, at in zip(found.user, found.at_ms, strict=True)]
    assert rows == [("a", 2), ("a", 3), ("b", 3), ("a", 4), ("b", 4)], "an event at the moment itself is not known yet"
    assert found.label[:, 0].tolist() == [False, False, False, True, False], "[at, at + 2 d) ends before an event at its end"
    assert found.label[:, 1].tolist() == [True, False, True, False, True]
    assert found.closed[:, 0].tolist() == [True] * 5
    assert found.closed[:, 1].tolist() == [True, True, True, False, False]


def test_moments_fall_on_every_weekday_and_close_before_until() -> None:
    moments = training_moments(0, 400 * DAY_MS, 30 * DAY_MS)
    assert moments[-1] == 370 * DAY_MS
    assert moments[0] > 0
    for days in (40, 100, 420, 450):  # among them spans of which a sixtieth is a week
        assert len({m // DAY_MS % 7 for m in training_moments(0, (days + 7) * DAY_MS, 7 * DAY_MS)}) == 7
    with pytest.raises(ValueError, match=r"span 5\.0 days, too few to learn about a horizon of 7\.0 days"):
        training_moments(0, 5 * DAY_MS, 7 * DAY_MS)
    rolling = origins(0, 100 * DAY_MS, 30 * DAY_MS, 4, None)
    assert rolling[-1] == 70 * DAY_MS
    assert len({m // DAY_MS % 7 for m in rolling}) == 4
    with pytest.raises(ValueError, match=r"do not fit into 20\.0 days of events"):
        origins(0, 20 * DAY_MS, 7 * DAY_MS, 4, 14 * DAY_MS)


def test_alternatives_learn_nothing_from_until_on() -> None:
    table = shop_table(200, 56)
    times = table["timestamp"].to_numpy()
    changed = table.set_column(table.column_names.index("timestamp"), "timestamp", [np.where(times < UNTIL_MS, times, times + DAY_MS)])
    cases = [split(from_table(t), TARGETS, int(times.min()), UNTIL_MS, int(times.max()) + 1, 0) for t in (table, changed)]
    assert cases[0].learn.at_ms.max() + 7 * DAY_MS <= UNTIL_MS
    for name in ("label", "closed", "event", "user"):
        known = [[c.history.user_ids[u] for u in c.learn.user] if name == "user" else getattr(c.learn, name) for c in cases]
        if name != "event":
            np.testing.assert_array_equal(*known)
    tables = [baselines.features(c.history, c.learn, TARGETS, UNTIL_MS) for c in cases]
    np.testing.assert_array_equal(*tables)
    first = [c.asked.where(c.asked.at_ms == UNTIL_MS) for c in cases]
    np.testing.assert_array_equal(*[baselines.features(c.history, q, TARGETS, UNTIL_MS) for c, q in zip(cases, first, strict=True)])


def test_alternatives_beat_the_constant(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.compare.LANDMARKS", 4000)
    settings = quick_settings(tmp_path, targets=TARGETS, epochs=1)
    found = compare(source, str(UNTIL_MS), "constant,recency,logistic,lightgbm,pareto,mlp,ours", settings, NOW, no_progress)
    constant = found.pop("constant")["targets"]["gone"]
    for name, entry in found.items():
        figure = entry["targets"]["gone"]
        assert figure["questions"] == constant["questions"] > 200
        assert figure["auc"] > 0.7, name
        if name != "ours":  # a pass over so little is not enough for it to be calibrated
            assert figure["log_loss"] < constant["log_loss"] - 0.03, name
    again = compare(source, str(UNTIL_MS), "lightgbm", settings, NOW, no_progress)
    assert again["lightgbm"]["targets"] == found["lightgbm"]["targets"]


@pytest.mark.parametrize("name", ["cnn", "conv_lstm", "rnn", "lstm", "gru"])
def test_sequence_alternatives_answer(source: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.sequences.PASSES", 3)
    history = from_table(pyarrow.parquet.read_table(source))
    case = split(history, TARGETS, START_MS, UNTIL_MS, int(history.time_ms.max()) + 1, 0)
    case.learn = case.learn.where(np.arange(0, len(case.learn), 5))
    assert figures(case.asked, TARGETS, ALTERNATIVES[name][0](case))["gone"]["auc"] > 0.6


def test_pareto_nbd_finds_its_own_parameters() -> None:
    rng = np.random.default_rng(0)
    r, alpha, s, beta = 2.0, 10.0, 0.8, 30.0
    age = rng.uniform(50, 150, 4000)
    alive = rng.exponential(1 / rng.gamma(s, 1 / beta, 4000))
    rate = rng.gamma(r, 1 / alpha, 4000)
    until = np.minimum(age, alive)
    x = rng.poisson(rate * until)
    recency = np.where(x > 0, until * rng.random(4000) ** (1 / np.maximum(x, 1)), 0.0)  # the last of x uniform times
    found = fitted(x.astype(float), recency, age)
    assert found[0] / found[1] == pytest.approx(r / alpha, rel=0.1)
    parameters = np.array([r, alpha, s, beta])
    next_none = np.exp(log_likelihood(parameters, x, recency, age + 20) - log_likelihood(parameters, x, recency, age))
    more = (alive > age) & (rng.exponential(1 / rate) < np.minimum(20, alive - age))
    assert (1 - next_none).mean() == pytest.approx(more.mean(), abs=0.02)
    swapped = log_likelihood(np.array([r, beta, s, alpha]), x, recency, age)
    assert np.isfinite(swapped).all(), "alpha smaller and larger than beta"
    busy = np.array([300.0])
    assert np.isfinite(log_likelihood(parameters, busy, np.array([99.0]), np.array([100.0]))).all()


def test_backtest_reports_each_origin(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backtest", str(source), *ASKED, *SMALL, "--origins", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [set(entry["targets"]) for entry in report] == [{"gone", "buy"}] * 2
    assert report[0]["events"] < report[1]["events"]
    assert report[0]["weekday"] != report[1]["weekday"]
    assert main(["backtest", str(source), *ASKED, "--origins", "50", "--every", "7d"]) == 1
    assert "do not fit into" in capsys.readouterr().err


def test_tune_writes_settings_that_can_be_read(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tuned.toml"
    assert main(["tune", str(source), *ASKED, *SMALL, "--until", str(UNTIL_MS), "--trials", "2", "--out", str(out)]) == 0
    assert "8.0" not in capsys.readouterr().err
    settings = TrainerSettings.read(out, {})
    assert 8 <= settings.hidden <= 128
    assert main(["tune", str(source), "--trials", "0", "--out", str(out)]) == 1
    assert "--trials must be at least 1" in capsys.readouterr().err


def test_what_compare_cannot_do_is_said(source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["compare", str(source), "--only", "magic"]) == 1
    assert "there is no alternative magic; there are: constant, recency" in capsys.readouterr().err
    assert main(["compare", str(source), "--until", str(START_MS + 60 * DAY_MS), "--only", "constant"]) == 1
    assert "the events must go on for a horizon beyond it" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["tune", str(source), "--out", "nowhere.toml"]) == 1
    assert "pip install 'streamscore[tune]'" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"compare needs sklearn: pip install 'streamscore\[compare\]'"):
        chosen("logistic,ours")

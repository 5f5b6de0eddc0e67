"""The report: whole and self-contained, with every measure, and of models and windows that leave little to say."""

import json
import re
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainer_support import NOW, quick_settings, shop_history

from model.registry import Registry
from model.targets import CHURN
from trainer import report, rounds, show
from trainer.challenger import Challenger, train
from trainer.history import History
from trainer.measures import MEASURES
from trainer.metrics import Metrics
from trainer.report import Report
from trainer.settings import TrainerSettings
from trainer.stage import no_progress


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(report, "RESAMPLES", 20)


class _Page(HTMLParser):
    """What a page holds: text, tags, and everything that it would load from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.tags, self.loads = "", [], []  # type: ignore[var-annotated]
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def history() -> History:
    return shop_history(500, days=40)


@pytest.fixture(scope="module")
def fitted(history: History, tmp_path_factory: pytest.TempPathFactory) -> tuple[Challenger, TrainerSettings]:
    torch.set_num_threads(1)
    settings = quick_settings(tmp_path_factory.mktemp("fitted"), epochs=1, targets=(CHURN,))
    split = rounds.split_by_time(history, settings)
    rng = np.random.default_rng(0)
    return train(history, split, None, settings, Metrics(), NOW, rng, no_progress, lambda: False), settings


def about(history: History, challenger: Challenger, settings: TrainerSettings, champion: Any = None) -> Report:
    split = rounds.split_by_time(history, settings)
    return report.about_round(history, history, split, challenger, champion, settings, "rejected", "churn: AUC <is> worse")


def test_each_round_leaves_a_report_beside_its_model(history: History, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = quick_settings(tmp_path, epochs=1, report=True, tensorboard_directory=tmp_path / "board")
    registry = Registry(settings.registry)
    for hour in range(2):
        outcome = rounds.run_round(history, registry, settings, Metrics(), now=NOW + timedelta(hours=hour))
        registry.promote(str(outcome.version), reason="test", by="test")
    folder = tmp_path / "registry" / "versions" / str(outcome.version)
    page = _Page(html := (folder / "report.html").read_text("utf-8"))
    facts = json.loads((folder / "report.json").read_text("utf-8"))

    assert not page.loads
    assert not re.search(r"https?:|@import|url\((?!#)", html)
    assert page.tags.count("svg") == page.tags.count("figure") == 2 * 8 + 2 + 2
    for heading in (
        "What was in the data",
        "purchase: purchase occurs within 4 days",
        "churn: event absent within",
        "Calibration by group",
        "Fitting, drift and",
    ):
        assert heading in page.text
    assert outcome.reason in page.text
    assert "nan" not in page.text.lower()

    assert facts["version"] == outcome.version
    for target in facts["targets"].values():
        assert list(target["measures"]) == ["this model", "champion", "constant hazard", "recency"]
        for own in target["measures"].values():
            assert set(own) == set(MEASURES)
            assert all(f["low"] <= f["high"] for f in own.values())
        assert 0 <= target["score_drift"] < 5
        for kind in ("events", "tenure", "silence"):
            own = [g for g in target["groups"] if g["kind"] == kind]
            assert 5 <= len(own) <= 11
            assert sum(g["moments"] for g in own) == target["moments"]
            assert sum(g["moments"] * g["observed"]["value"] for g in own) == pytest.approx(target["positives"], rel=1e-3)
            assert all(set(g["expected"]) == {"this model", "champion"} for g in own)
        assert target["measures"]["this model"]["auc"]["low"] > target["measures"]["constant hazard"]["auc"]["value"]
    events = facts["data"]
    assert sum(span["events"] for span in events.values()) == len(history)
    assert sum(events["judged on"]["types"].values()) == events["judged on"]["events"]
    alive = facts["survival"]["sets"]["purchase"]["the most active"]
    assert alive == sorted(alive, reverse=True)
    assert 0 <= alive[-1] <= alive[0] <= 1
    assert len(facts["losses"]["validation"]) == len(facts["losses"]["training"]) == 2
    assert not any(user in html for user in history.user_ids if len(user) > 3)

    show.version(registry, str(outcome.version))
    assert f"report: {folder}/report.html" in capsys.readouterr().out
    board = sorted(p.parent.relative_to(tmp_path / "board").as_posix() for p in (tmp_path / "board").rglob("events.*"))
    assert {str(outcome.version), "rounds/this_model", "rounds/champion"} <= set(board)


def test_a_report_that_fails_costs_nothing_else(
    history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = quick_settings(tmp_path, epochs=1, report=True)
    registry = Registry(settings.registry)
    monkeypatch.setattr(report, "to_html", lambda _: 1 / 0)
    outcome = rounds.run_round(history, registry, settings, Metrics(), now=NOW)
    assert outcome.kind in ("promoted", "rejected")
    assert f"there is no whole report of {outcome.version}" in caplog.text
    assert registry.attached(str(outcome.version), "report.html") is None

    off = rounds.run_round(history, registry, quick_settings(tmp_path, epochs=1, report=False), Metrics(), now=NOW)
    assert registry.attached(str(off.version), "report.json") is None


def test_without_a_champion_and_the_same_twice(history: History, fitted: tuple[Challenger, TrainerSettings]) -> None:
    one = about(history, *fitted)
    assert list(one.facts["targets"]["churn"]["measures"]) == ["this model", "constant hazard", "recency"]
    assert one.facts["targets"]["churn"]["score_drift"] is None
    html = report.to_html(one)
    assert "Rejected: churn: AUC &lt;is&gt; worse." in html
    assert about(history, *fitted) == one


def test_a_fit_is_judged_on_its_validation_window_and_says_so(
    history: History, fitted: tuple[Challenger, TrainerSettings], tmp_path: Path
) -> None:
    challenger, settings = fitted
    split = rounds.split_by_time(history, settings)
    about_it = report.about_fit(history, split, challenger, settings)
    facts = about_it.facts
    assert "its figures are favourable" in facts["notes"][0]
    seen = facts["data"]
    assert sum(span["events"] for span in seen.values()) == int((history.time_ms < split.test_ms).sum())
    # nothing at or after the end of validation is looked at
    assert report.about_fit(history.before(split.test_ms), split, challenger, settings).facts == facts
    where = report.write(tmp_path, about_it)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert where == tmp_path / "report.html"


def broken(challenger: Challenger, value: float) -> Challenger:
    """The same with every weight of the head at `value`, and cells that tell nobody apart."""
    torch.manual_seed(0)
    state = {k: v.clone() for k, v in challenger.model.network.state_dict().items()}
    network = type(challenger.model.network)(challenger.model.network.shape)
    network.load_state_dict({k: torch.full_like(v, value) if k.startswith("head") else v for k, v in state.items()})
    network.falls_SX.fill_(1e-3)  # the cells' own forecasts, the same from every state
    network.survives_SX.fill_(1.0)
    network.lasts_RCE.fill_(1.0)
    network.trust_JK.zero_()
    model = type(challenger.model)(network.eval(), challenger.model.manifest, challenger.model.vocabulary, challenger.model.scaling)
    return Challenger(model, challenger.hazard_KB, challenger.fitted)


def test_a_model_of_nan_is_left_out_and_named(history: History, fitted: tuple[Challenger, TrainerSettings]) -> None:
    challenger, settings = fitted
    found = about(history, broken(challenger, float("nan")), settings, champion=challenger.model)
    assert found.facts["targets"]["churn"]["no_probabilities"] == ["this model"]
    assert list(found.facts["targets"]["churn"]["measures"]) == ["champion", "constant hazard", "recency"]
    assert "What this model says of it is not always a probability" in report.to_html(found)
    json.loads(report.to_json(found))


def test_a_model_that_says_the_same_of_everybody(history: History, fitted: tuple[Challenger, TrainerSettings]) -> None:
    challenger, settings = fitted
    found = about(history, broken(challenger, 0.0), settings, champion=challenger.model)
    assert found.facts["targets"]["churn"]["measures"]["this model"]["auc"]["value"] == 0.5
    assert "<svg" in report.to_html(found)
    assert "Off beyond noise: for users silent for" in report.to_html(found)


def test_outcomes_all_alike_leave_no_curve(history: History, fitted: tuple[Challenger, TrainerSettings]) -> None:
    challenger, settings = fitted
    split = rounds.split_by_time(history, settings)
    quiet = history.where((history.time_ms < split.test_ms) | (history.time_ms == history.time_ms.max()))
    found = about(quiet, challenger, settings)
    facts = found.facts["targets"]["churn"]
    assert facts["positives"] == facts["moments"] > 100
    assert facts["measures"]["this model"]["auc"]["value"] is None
    assert facts["measures"]["this model"]["recall"]["value"] <= 1
    assert "All moments came out alike" in report.to_html(found)
    assert len(found.by_target["churn"]) == 1  # how the scores are distributed

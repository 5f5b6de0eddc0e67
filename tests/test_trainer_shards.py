"""Shards: every user in one, the same model as without them, and memory that is bounded by them and not by the log."""

import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from trainer_support import NOW, quick_settings, shop_history, shop_table

from trainer.challenger import Challenger, train
from trainer.evaluate import answers, set_exam
from trainer.history import History, from_table
from trainer.log import FAN_IN, EventLog
from trainer.measures import losses
from trainer.metrics import Metrics
from trainer.parts import Part, kept
from trainer.rounds import split_by_time
from trainer.shards import Shards, in_memory, of_log
from trainer.stage import no_progress


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def logged(folder: Path, users: int, days: float) -> History:
    """The shop's events, written into a log with a file for each day; and as they are without one."""
    table = shop_table(users, days)
    log = EventLog(folder)
    names = ("user_id", "type", "timestamp", "item_id", "category", "value")
    rows = [("events", 0, i, *row, None, None, None) for i, row in enumerate(zip(*(table[n].to_pylist() for n in names), strict=True))]
    for flush in range(FAN_IN):
        end = len(rows) * (flush + 1) // FAN_IN
        log.append(rows[len(rows) * flush // FAN_IN : end], ("events", 0), end)
        log.flush()
    log.compact()
    log.close()
    return from_table(table)


def streams(history: History) -> dict[str, list[int]]:
    return {u: history.time_ms[history.first[i] : history.first[i + 1]].tolist() for i, u in enumerate(history.user_ids)}


def test_every_user_is_in_one_shard_whole(tmp_path: Path) -> None:
    settings = quick_settings(tmp_path, shard_events=700)
    whole = logged(settings.log_directory, 300, 40)
    of_the_log = of_log(settings)
    assert of_the_log
    for shards in (of_the_log, in_memory(whole, 700)):
        parts = [streams(history) for history in shards]
        assert len(parts) == -(-len(whole) // 700) > 2
        assert {u: times for part in parts for u, times in part.items()} == streams(whole)
        assert sum(map(len, parts)) == whole.users
        assert (shards.first_ms, shards.last_ms, shards.events) == (whole.first_ms, whole.last_ms, len(whole))
        few = streams(shards.sample(1500))
        assert 0.2 * len(whole) < sum(map(len, few.values())) < 0.7 * len(whole)
        assert few.items() <= streams(whole).items()
        assert len(shards.limited(2 * 700 + 100)) == 2


def test_a_small_log_is_one_shard(tmp_path: Path) -> None:
    settings = quick_settings(tmp_path)
    whole = logged(settings.log_directory, 100, 20)
    shards = of_log(settings)
    assert shards
    assert len(shards) == 1
    assert shards[0] is shards.sample(len(whole))
    assert streams(shards[0]) == streams(whole)
    assert 0 < len(shards.limited(len(whole) // 2)[0]) <= len(whole) // 2


def test_an_empty_shard_is_no_obstacle(tmp_path: Path) -> None:
    """Few users with many events each: a part of them may be nobody."""
    history = shop_history(12, 60).where(np.ones(12, bool)[shop_history(12, 60).user])
    shards = in_memory(history, len(history) // 11)
    assert min(len(part) for part in shards) == 0
    settings = quick_settings(tmp_path, epochs=1, belief_steps=2)
    assert np.isfinite(fitted(shards, settings).fitted.losses[-1])


def fitted(shards: Shards | History, settings: object) -> Challenger:
    split = split_by_time(shards, settings)
    return train(shards, split, None, settings, Metrics(), NOW, np.random.default_rng(0), no_progress, lambda: False)


def test_shards_give_the_same_model_within_noise(tmp_path: Path) -> None:
    settings = quick_settings(tmp_path, epochs=3, belief_steps=40)
    history = shop_history(1000, 40)  # the cells are fitted on the first shard alone
    one, three = fitted(history, settings), fitted(in_memory(history, len(history) // 3), settings)
    assert three.model.manifest.window == one.model.manifest.window
    assert set(three.model.manifest.vocabulary) == set(one.model.manifest.vocabulary)
    split = split_by_time(history, settings)
    exam = set_exam(history, settings.targets, split.test_ms, split.end_ms, np.random.default_rng(0))
    said = [answers(exam, challenger.model) for challenger in (one, three)]
    for label, ours, theirs in zip(exam.labels, *said, strict=True):
        a, b = (float(losses(label, p).mean()) for p in (ours, theirs))
        assert b == pytest.approx(a, abs=0.03)
        assert b < float(losses(label, np.full(len(label), label.mean())).mean())


def test_a_kept_part_is_what_it_was() -> None:
    part = Part(
        *(torch.arange(n) for n in (3, 5)),
        torch.rand(5),
        torch.arange(5),
        *(torch.arange(4) for _ in range(3)),
        torch.rand(4, 3),
        torch.rand(5, 7),
        torch.ones((5, 2, 3), dtype=torch.uint8),
        torch.zeros((5, 2, 3), dtype=torch.uint8),
        torch.empty(5, 0),  # no belief cell
        torch.rand(5, 1, 6),
    )
    load = kept(part)
    for _ in range(2):
        for field in fields(part):
            was, is_ = getattr(part, field.name), getattr(load(), field.name)
            assert torch.equal(was, is_), field.name
            assert was.dtype == is_.dtype, field.name


def test_a_full_disk_costs_time_and_nothing_else(
    tmp_path: Path, little_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = quick_settings(tmp_path, epochs=2, belief_steps=5)
    history = shop_history(300, 30)
    shards = in_memory(history, len(history) // 3)
    roomy = fitted(shards, settings)
    monkeypatch.setattr(tempfile, "tempdir", str(little_disk))
    tight = fitted(shards, settings)
    assert "so each pass prepares them anew: [Errno 28]" in caplog.text
    assert tight.fitted.losses == roomy.fitted.losses
    assert not list(little_disk.iterdir())


PEAKS = """
import re, sys
from pathlib import Path
sys.path[:0] = ["tests"]
from test_trainer_shards import fitted, of_log, quick_settings, torch

torch.set_num_threads(1)
folder = Path(sys.argv[1])
for name, shard_events in (("n", 1500), ("n", 1500), ("4n", 1500), ("4n", 10**9)):
    settings = quick_settings(folder, log_directory=folder / name, epochs=1, belief_steps=2, shard_events=shard_events, batch_events=256)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    events = fitted(of_log(settings), settings).model.manifest.window.events
    print(events, *re.findall("VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()))
"""


def test_memory_is_bounded_by_the_shard_and_not_by_the_log(tmp_path: Path) -> None:
    """Peak memory of a process that trains on N events, on N again, on 4 N, and on 4 N in one shard."""
    logged(tmp_path / "n", 400, 40)
    logged(tmp_path / "4n", 1600, 40)
    run = [sys.executable, "-c", PEAKS, str(tmp_path)]
    told = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    (few, _), (_, before_kb), (many, sharded_kb), (_, whole_kb) = (map(int, line.split()) for line in told.splitlines())
    assert many > 3.5 * few
    assert whole_kb - before_kb > 3 * (many - few)  # kB an event: the test would see it
    assert sharded_kb - before_kb < (whole_kb - before_kb) / 4

"""`fit` and `predict` on files: what a model may see, what it answers, and what is said to a mistake."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from trainer_support import START_MS, shop_table

from model.hazards import DAY_MS
from trainer.__main__ import main
from trainer.history import from_table
from trainer.inputs import duration_ms, time_ms
from trainer.log import SCHEMA, EventLog
from trainer.queries import last_before

ROOT = Path(__file__).parent.parent
UNTIL_MS = START_MS + 40 * DAY_MS
SMALL = ["--set", "belief_steps=20", "--set", "hidden=8", "--set", "head=8", "--set", "epochs=2"]
UNREPORTED = [*SMALL, "--set", "report=false"]  # a report's pictures take longer than such a fit
TARGETS = ["--target", "buy=purchase:occurs:7d", "--target", "gone=*:absent:5d"]


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return shop_table(150, 50)


@pytest.fixture(scope="module")
def folder(table: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """events.csv, and a model fitted on it."""
    folder = tmp_path_factory.mktemp("offline")
    pyarrow.csv.write_csv(table, folder / "events.csv")
    command = [sys.executable, "-m", "trainer", "fit", "events.csv", "--until", str(UNTIL_MS), *TARGETS, *SMALL, "--out", "model"]
    done = subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("model: buy=purchase:occurs:7d, gone=*:absent:5d; fitted on ")
    assert (folder / "model" / "report.html").exists()
    return folder


def fitted(events: pa.Table, folder: Path, name: str, *more: str) -> bytes:
    """The weights of a fit on `events`."""
    pyarrow.parquet.write_table(events, folder / f"{name}.parquet")
    arguments = [
        "fit",
        str(folder / f"{name}.parquet"),
        "--until",
        str(UNTIL_MS),
        *TARGETS,
        *UNREPORTED,
        "--out",
        str(folder / name),
        *more,
    ]
    assert main(arguments) == 0
    return (folder / name / "weights.safetensors").read_bytes()


def asked(folder: Path, events: pa.Table, queries: list[tuple[object, ...]]) -> list[float]:
    """What the model says, through the command line and its files."""
    pyarrow.parquet.write_table(events, folder / "asked.parquet")
    with open(folder / "queries.csv", "w", newline="") as file:
        csv.writer(file).writerows([("query", "task", "user_id", "at", "horizon"), *queries])
    out = folder / "predictions.csv"
    assert main(["predict", str(folder / "model"), str(folder / "asked.parquet"), str(folder / "queries.csv"), "--out", str(out)]) == 0
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [r["query"] for r in rows] == [str(q[0]) for q in queries]
    return [float(r["probability"]) for r in rows]


def test_what_happens_from_until_on_changes_nothing(table: pa.Table, folder: Path, tmp_path: Path) -> None:
    earlier = table.filter(pa.array(table["timestamp"].to_numpy() < UNTIL_MS))
    exactly = {name: ["never seen" if name == "type" else earlier[name][0].as_py()] for name in earlier.column_names}
    later = pa.table({**exactly, "timestamp": [UNTIL_MS]}, schema=earlier.schema)
    own = fitted(earlier, tmp_path, "earlier")
    assert own == (folder / "model" / "weights.safetensors").read_bytes(), "the same data and seed, in another process"
    assert own == fitted(pa.concat_tables([earlier, later]), tmp_path, "later")
    assert own != fitted(earlier, tmp_path, "other", "--seed", "1")


def test_an_event_counts_strictly_before_the_moment(table: pa.Table, folder: Path) -> None:
    known = table.filter(pa.array(table["timestamp"].to_numpy() < UNTIL_MS))
    user = known["user_id"][0].as_py()
    row = {name: [known[name][0].as_py()] for name in known.column_names}
    query = [(0, "buy", user, UNTIL_MS, 7 * DAY_MS)]
    (without,) = asked(folder, known, query)
    (exactly,) = asked(folder, pa.concat_tables([known, pa.table({**row, "timestamp": [UNTIL_MS]}, schema=known.schema)]), query)
    (just_before,) = asked(folder, pa.concat_tables([known, pa.table({**row, "timestamp": [UNTIL_MS - 1]}, schema=known.schema)]), query)
    assert exactly == without
    assert just_before != without


def test_any_horizon_any_spelling_and_strangers(table: pa.Table, folder: Path) -> None:
    user = table["user_id"][0].as_py()
    spelled = "2025-11-18T08:53:20Z"
    assert time_ms(spelled) == UNTIL_MS
    queries: list[tuple[object, ...]] = [
        (10, "buy", user, UNTIL_MS, 7 * DAY_MS),
        (11, "buy", user, UNTIL_MS, 7 * DAY_MS),
        (12, "buy", user, UNTIL_MS, 200 * DAY_MS),
        (13, "gone", user, UNTIL_MS, DAY_MS),
        (14, "gone", user, UNTIL_MS, 400 * DAY_MS),
        (15, "buy", "a stranger", UNTIL_MS, 7 * DAY_MS),
        (16, "buy", "another", START_MS - 1, 7 * DAY_MS),
        (17, "buy", user, START_MS - 1, 7 * DAY_MS),
    ]
    p = asked(folder, table, queries)
    assert p[0] == p[1] < p[2] <= 1
    assert p[3] > p[4] >= 0
    assert p[5] == p[6] == p[7]
    assert 0 < p[5] < 1
    texts = [(q[0], q[1], q[2], spelled, "7d") for q in queries[:1]]
    assert asked(folder, table, texts) == p[:1]


def test_answers_do_not_depend_on_the_block(table: pa.Table, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    users = table["user_id"].unique().to_pylist()
    queries = [(i, "buy", users[rng.integers(len(users))], int(UNTIL_MS - rng.integers(30 * DAY_MS)), 3 * DAY_MS) for i in range(200)]
    whole = asked(folder, table, queries)
    monkeypatch.setattr("trainer.queries.BLOCK_EVENTS", 500)
    monkeypatch.setattr("trainer.queries.BLOCK_ASKED", 7)
    np.testing.assert_allclose(asked(folder, table, queries), whole, atol=1e-6)


def test_the_last_event_before_a_moment(table: pa.Table) -> None:
    history = from_table(table)
    rng = np.random.default_rng(1)
    user = rng.integers(-1, history.users, 300)
    at_ms = np.where(rng.random(300) < 0.5, rng.choice(history.time_ms, 300), rng.integers(START_MS - DAY_MS, UNTIL_MS, 300))
    for u, at, event in zip(user.tolist(), at_ms.tolist(), last_before(history, user, at_ms).tolist(), strict=True):
        earlier = np.flatnonzero((history.user == u) & (history.time_ms < at))
        assert event == (earlier[-1] if len(earlier) else -1)


def test_a_trainers_log_is_a_source_too(table: pa.Table, folder: Path, tmp_path: Path) -> None:
    known = table.filter(pa.array(table["timestamp"].to_numpy() < UNTIL_MS))
    log = EventLog(tmp_path / "log")
    empty = dict.fromkeys(SCHEMA.names)
    rows = [{**empty, "topic": "events", "partition": 0, "offset": i, **row} for i, row in enumerate(known.to_pylist())]
    log.append([tuple(row[name] for name in SCHEMA.names) for row in rows], ("events", 0), len(rows))
    log.flush()
    log.close()
    assert main(["fit", str(tmp_path / "log"), "--until", str(UNTIL_MS), *TARGETS, *UNREPORTED, "--out", str(tmp_path / "model")]) == 0
    assert (tmp_path / "model" / "weights.safetensors").read_bytes() == (folder / "model" / "weights.safetensors").read_bytes()


def test_a_model_is_replaced_only_by_force(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", str(folder / "events.csv"), *UNREPORTED, "--set", "epochs=1", "--out"]
    assert main([*arguments, str(folder / "model")]) == 1
    assert "exists: give another --out, or --force" in capsys.readouterr().err
    assert main([*arguments, str(folder / "forced")]) == 0
    before = (folder / "forced" / "weights.safetensors").read_bytes()
    assert main([*arguments, str(folder / "forced"), "--force", "--seed", "5"]) == 0
    assert (folder / "forced" / "weights.safetensors").read_bytes() != before
    assert main([*arguments, str(folder), "--force"]) == 1
    assert "holds no model, so it is not replaced" in capsys.readouterr().err
    assert not [p for p in folder.iterdir() if p.name.startswith(".")], "nothing half-made is left"


GOOD = "query,task,user_id,at,horizon\n1,buy,u,1760000000000,86400000\n"
Change = Callable[[str], str]


@pytest.mark.parametrize(
    ("queries", "complaint"),
    [
        (GOOD.replace("horizon", "horizons"), "has no column horizon; queries have: query, task, user_id, at, horizon"),
        (GOOD.replace("buy", "sell"), "ask for task sell; the model's targets are buy=purchase:occurs:7d, gone=*:absent:5d"),
        (GOOD.replace("1760000000000", "noon"), "at: 'noon' is neither epoch milliseconds nor RFC 3339"),
        (GOOD.replace("86400000", "-1"), "horizon: '-1' is no duration: write 7d, 12h, 30m"),
        (GOOD.replace(",u,", ",,"), "query 1 has no user_id"),
        (GOOD + GOOD.splitlines()[1] + "\n", "two queries have one number"),
        (GOOD.splitlines()[0] + "\n", "holds no queries"),
        (GOOD + "1,2\n", "cannot be read"),
    ],
)
def test_a_bad_query_file_is_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], queries: str, complaint: str
) -> None:
    path = tmp_path / "queries.csv"
    path.write_text(queries)
    out = tmp_path / "out.csv"
    assert main(["predict", str(folder / "model"), str(folder / "events.csv"), str(path), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert complaint in error
    assert "Traceback" not in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["--until", "soon"], 1, "'soon' is neither epoch milliseconds nor RFC 3339"),
        (["--until", "1"], 1, "there is no event before --until"),
        (["--target", "buy=bought:occurs:7d"], 1, "before --until no event is of type bought; the types are "),
        (["--target", "buy"], 2, "is no target"),
        (["--set", "hiden=3"], 2, "did you mean STREAMSCORE_TRAINER_HIDDEN?"),
        (["--set", "hidden"], 2, "says no value: write --set NAME=VALUE"),
    ],
)
def test_a_fit_that_cannot_be_is_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, complaint: str
) -> None:
    assert main(["fit", str(folder / "events.csv"), *arguments, "--out", str(tmp_path / "model")]) == status
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_a_source_or_a_model_that_is_none(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(tmp_path), "--out", str(tmp_path / "model")]) == 1
    assert "holds no events: a directory must be the log of a trainer" in capsys.readouterr().err
    (tmp_path / "queries.csv").write_text(GOOD)
    arguments = [str(folder / "events.csv"), str(tmp_path / "queries.csv"), "--out", str(tmp_path / "out.csv")]
    assert main(["predict", str(tmp_path), *arguments]) == 1
    assert "is no model: it has no manifest.json" in capsys.readouterr().err


def test_durations() -> None:
    assert [duration_ms(t) for t in ("7d", "12h", "30m", "10s", "5ms", "86400000")] == [
        7 * DAY_MS,
        DAY_MS // 2,
        1_800_000,
        10_000,
        5,
        DAY_MS,
    ]
    for wrong in ("", "0", "-1d", "1.5d", "week"):
        with pytest.raises(ValueError, match="is no duration"):
            duration_ms(wrong)

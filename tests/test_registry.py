"""One registry, many users: two trainers, people and crashes at once, and still one story of what was current when."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support import publish_model

from model import registry as registry_module
from model.artifact import ArtifactError
from model.registry import GRACE, Outdated, Pointer, Registry
from model.storage import Storage

ROOT = Path(__file__).parent.parent
LATER = datetime.now(UTC) + 3 * GRACE


def version_of(registry: Registry) -> str | None:
    pointer = registry.current()
    return pointer.version if pointer else None


def told(registry: Registry) -> list[tuple[str, str, str | None]]:
    return [(d["version"], d["action"], d["previous"]) for d in registry.decisions()]


def test_a_promotion_that_was_judged_against_another_champion_is_not_made(registry: Registry) -> None:
    for version in ("v1", "v2", "v3"):
        publish_model(registry.location, version, promote=False)
    other = Registry(registry.location)
    registry.promote("v1", reason="first", by="one", expected=None)
    judged_against = registry.current()
    other.promote("v2", reason="by hand", by="somebody", expected=judged_against)
    before = registry.current(), told(registry)
    with pytest.raises(Outdated, match="v2 is current now, and no longer v1: v3 must be judged again"):
        registry.promote("v3", reason="better than v1", by="one", expected=judged_against)
    with pytest.raises(Outdated, match="v2 is current now, and no longer no model"):
        registry.promote("v3", reason="a first model", by="one", expected=None)
    assert (registry.current(), told(registry)) == before
    registry.promote("v3", reason="better than v2, too", by="one", expected=registry.current())
    assert told(registry) == [("v1", "promoted", None), ("v2", "promoted", "v1"), ("v3", "promoted", "v2")]


def test_the_one_who_comes_second_to_a_move_looks_again(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen the same newest move; the other one's is there first."""
    for version in ("v1", "v2", "v3"):
        publish_model(registry.location, version, promote=False)
    other, create = Registry(registry.location), Storage.create
    pending = ["v2", "v3"]

    def late(storage: Storage, name: str, content: bytes) -> None:
        if name.startswith("moves/") and storage is registry.storage and pending:
            other.promote(pending.pop(0), reason="quicker", by="other")
        create(storage, name, content)

    monkeypatch.setattr(Storage, "create", late)
    registry.promote("v1", reason="whatever is current", by="one")
    assert told(registry) == [("v2", "promoted", None), ("v3", "promoted", "v2"), ("v1", "promoted", "v3")]
    pending[:] = ["v2"]
    with pytest.raises(Outdated, match="v2 is current now, and no longer v1"):
        registry.promote("v3", reason="better", by="one", expected=registry.current())
    assert version_of(registry) == "v2"


def test_a_crash_at_any_step_of_a_promotion_is_put_right_by_the_next_who_looks(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("v1", "v2"):
        publish_model(registry.location, version, promote=False)
    registry.promote("v1", reason="first", by="one")

    class Crash(BaseException):
        pass

    def crashing(name: str, after: int) -> Callable[..., Any]:
        real, left = getattr(Storage, name), after

        def step(*arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash
            return real(*arguments)

        return step

    crashes = 0
    for method in ("create", "write"):
        for after in range(4):
            registry.promote("v1", reason="back to the start", by="test")
            with monkeypatch.context() as patch:
                patch.setattr(Storage, method, crashing(method, after))
                try:
                    registry.promote("v2", reason="better", by="one")
                except Crash:
                    crashes += 1
            standing = Registry(registry.location).settle()
            assert standing == registry.current()
            assert standing is not None
            last = registry.decisions()[-1]
            assert last["version"] == standing.version, "a decision is kept exactly when it was carried out"
            assert registry.load(standing).manifest.version == standing.version
            if standing.version == "v2":
                assert registry.rollback(reason="test", by="test") == "v1"
    assert crashes >= 4


def test_a_pointer_written_too_late_is_put_right(registry: Registry) -> None:
    """As by a process that was paused for a while just before it wrote, and died just after."""
    for version in ("v1", "v2"):
        publish_model(registry.location, version)
    newest = registry.current()
    stale = json.dumps({"version": "v1", "manifest_sha256": "0" * 64}).encode()
    registry.storage.write("current", stale)
    assert registry.settle() == newest == registry.current()
    registry.storage.write("current", b"rubbish")
    assert registry.settle() == newest == registry.current()


def test_a_registry_from_before_there_were_moves_goes_on(registry: Registry) -> None:
    publish_model(registry.location, "v1")
    publish_model(registry.location, "v2")
    registry.storage.delete("moves")
    assert version_of(registry) == "v2"
    old = registry.settle()
    assert old is not None
    publish_model(registry.location, "v3", promote=False)
    registry.promote("v3", reason="better", by="one", expected=old)
    assert registry.rollback(reason="worse", by="me") == "v2"
    assert registry.rollback(reason="still", by="me") == "v1"


HAMMER = """
import sys; sys.path[:0] = ["tests"]
import random
from datetime import UTC, datetime, timedelta
from model.registry import Outdated, Registry
from model.artifact import ArtifactError
place, name, seed = Registry(sys.argv[1]), sys.argv[2], int(sys.argv[3])
chance = random.Random(seed)
template = place.load("v1")
print(flush=True)
sys.stdin.readline()
made = outdated = 0
for i in range(25):
    standing = place.settle()
    version = f"{name}-{i}"
    created_at = datetime.now(UTC) - timedelta(hours=2)
    place.publish(template.manifest.model_copy(update={"version": version, "created_at": created_at}), template.network)
    try:
        place.promote(version, reason="better", by=name, expected=standing)
        made += 1
    except Outdated:
        outdated += 1
    except ArtifactError as error:
        assert "has no complete model" in str(error)  # published with a false date, it was pruned before it was promoted
    if chance.random() < 0.2:
        try:
            place.rollback(reason="worse", by=name)
            made += 1
        except ArtifactError:
            pass
    place.prune(2)
    standing = place.current()
    assert place.load(standing).manifest.version == standing.version
print(made, outdated)
"""


def test_two_trainers_hammer_one_registry(tmp_path: Path) -> None:
    """Promotions, rollbacks and pruning, in two processes at once: every move follows from the one before it."""
    registry = Registry(str(tmp_path / "models"))
    publish_model(registry.location, "v1")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HAMMER, registry.location, name, str(seed)],
            **{
                "cwd": ROOT,
                "stdin": subprocess.PIPE,
                "stdout": subprocess.PIPE,
                "text": True,
                "env": {**os.environ, "OMP_NUM_THREADS": "1"},
            },
        )
        for seed, name in enumerate(("one", "two"))
    ]
    for process in processes:
        assert process.stdout
        process.stdout.readline()  # both are up
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    made = outdated = 0
    for process in processes:
        out, _ = process.communicate(timeout=100)
        assert process.returncode == 0
        made, outdated = made + int(out.split()[0]), outdated + int(out.split()[1])
    assert outdated > 0, "they never met"
    moves = [d for d in registry.decisions() if d["action"] != "rejected"]
    assert len(moves) == made + 1
    names = registry.storage.names("moves")
    assert names == [f"{n + 1:010d}.json" for n in range(len(moves))]
    story = [json.loads(registry.storage.read(f"moves/{n}"))["decision"] for n in names]
    assert [d["previous"] for d in story] == [None, *(d["version"] for d in story[:-1])]
    assert version_of(registry) == story[-1]["version"]
    pointer = registry.current()
    assert pointer
    assert registry.load(pointer).manifest.version == pointer.version
    assert not list((tmp_path / "models").rglob("*.tmp"))


def test_a_version_promoted_at_the_moment_it_is_pruned_stays(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("v1", "v2", "v3", "v4"):
        publish_model(registry.location, version)
    other, delete = Registry(registry.location), Storage.delete

    def interrupted(storage: Storage, name: str) -> None:
        if name == "versions/v1/manifest.json":
            monkeypatch.undo()
            other.promote("v1", reason="by hand", by="somebody")
        delete(storage, name)

    monkeypatch.setattr(Storage, "delete", interrupted)
    registry.prune(1, LATER)
    pointer = registry.current()
    assert pointer
    assert pointer.version == registry.load(pointer).manifest.version == "v1"

    # and the other way round: pruned while it is being promoted
    create = Storage.create

    def pruned(storage: Storage, name: str, content: bytes) -> None:
        if name.startswith("moves/"):
            monkeypatch.undo()
            other.storage.delete("versions/v4")
        create(storage, name, content)

    monkeypatch.setattr(Storage, "create", pruned)
    registry.promote("v4", reason="test", by="test")
    pointer = registry.current()
    assert pointer
    assert pointer.version == registry.load(pointer).manifest.version == "v4"


def test_what_is_recent_is_not_pruned(registry: Registry) -> None:
    old = datetime.now(UTC) - timedelta(days=3)
    model = publish_model(registry.location, "v0", promote=False)
    for i, version in enumerate(("a", "b", "c", "d", "e")):
        created = model.manifest.model_copy(update={"version": version, "created_at": old + timedelta(minutes=i)})
        registry.publish(created, model.network)
    for version in ("a", "b", "c", "v0"):
        registry.promote(version, reason="test", by="test")
    assert registry.prune(1) == ["d", "e"]  # old, and never current; a worker may be about to load any of the others
    assert registry.prune(1, LATER) == ["a", "b"]  # v0 is current, c the way back


def test_leftovers_of_crashes_go_after_a_while(registry: Registry) -> None:
    publish_model(registry.location, "v1")
    for name in ("versions/half/weights.safetensors", "versions/v1/weights.safetensors.3f9a.tmp", "current.12.tmp", "moves/1.json.1.tmp"):
        registry.storage.write(name, b"half of it")
    before = {n for folder in ("", "versions", "moves", "versions/v1") for n in registry.storage.names(folder)}
    registry.prune(5)
    assert {n for folder in ("", "versions", "moves", "versions/v1") for n in registry.storage.names(folder)} == before
    registry.prune(5, LATER)
    left = {n for folder in ("", "versions", "moves", "versions/v1") for n in registry.storage.names(folder)}
    assert before - left == {"half", "weights.safetensors.3f9a.tmp", "current.12.tmp", "1.json.1.tmp"}
    assert version_of(registry) == "v1"


def test_moves_and_decisions_are_bounded_and_the_way_back_is_not_lost(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "KEEP_DECISIONS", 5)
    monkeypatch.setattr(registry_module, "KEEP_MOVES", 3)
    for version in ("v1", "v2", "v3", "v4"):
        publish_model(registry.location, version)
    for _ in range(8):
        registry.record("v4", "rejected", reason="worse", by="trainer")
    registry.prune(5)
    assert told(registry) == [("v4", "promoted", "v3"), *[("v4", "rejected", None)] * 5]
    assert len(registry.storage.names("moves")) == 3
    assert registry.rollback(reason="worse", by="me") == "v3"
    assert registry.rollback(reason="still", by="me") == "v2"
    assert len(registry.storage.names("moves")) == 5


def test_a_store_without_conditional_writes_is_noticed(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one's file lands on ours between writing and looking."""
    read = Storage.read
    monkeypatch.setattr(Storage, "read", lambda storage, name: b"theirs" if name == "moves/x" else read(storage, name))
    with pytest.raises(FileExistsError):
        registry.storage.create("moves/x", b"ours")


def test_publishing_one_name_twice_at_once(registry: Registry) -> None:
    model = publish_model(registry.location, "v1", promote=False)
    registry.storage.delete("versions/v1/manifest.json")  # the other one has only written the weights so far
    with pytest.raises(ArtifactError, match="already has a version v1"):
        Registry(registry.location).publish(model.manifest, model.network)
    assert Pointer("v1", "x") != registry.current()

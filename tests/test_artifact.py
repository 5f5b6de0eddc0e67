"""The artifact and the registry: what is published comes back, and whatever is wrong with it is refused with a sentence."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from support import publish_model

from model import artifact, hazards
from model.artifact import ArtifactError, Manifest, Model, encoder_id
from model.belief import levels
from model.features import Scaling
from model.network import Silence, silence_of
from model.registry import Pointer, Registry, new_version
from model.statistics import SLOTS, STATISTICS, readout, update
from model.targets import Target

LATER = datetime.now(UTC) + timedelta(hours=3)


@pytest.fixture
def files(tmp_path: Path) -> tuple[bytes, bytes]:
    """manifest.json and weights.safetensors of a good model."""
    publish_model(tmp_path / "good", "v1")
    folder = tmp_path / "good/versions/v1"
    return (folder / "manifest.json").read_bytes(), (folder / "weights.safetensors").read_bytes()


def answers(model: Model) -> list[float]:
    stats = np.zeros(3, STATISTICS)
    hidden = np.linspace(-1, 1, 3 * model.network.state_size, dtype=np.float32).reshape(3, -1)
    found: list[float] = model.scorer()(hidden, stats, np.array([0, 10**6, 10**12])).ravel().tolist()
    return found


def test_what_is_published_comes_back(registry: Registry) -> None:
    model = publish_model(registry.location, "v1")
    pointer = registry.current()
    assert pointer is not None
    again = registry.load(pointer)
    assert again.manifest == model.manifest
    assert answers(again) == answers(model)
    for name, tensor in model.network.state_dict().items():
        assert again.network.state_dict()[name].equal(tensor)
    assert not again.network.training


def test_a_scorer_answers_as_the_whole_network(files: tuple[bytes, bytes]) -> None:
    """Though it leaves out the slots that the vocabulary does not use."""
    model = artifact.load(*files)
    rng = np.random.default_rng(0)
    stats = np.zeros(50, STATISTICS)
    for n in range(8):
        now_ms = np.full(50, 10**12) + rng.integers(0, 10**8, 50) + n * 10**9
        update(stats, rng.integers(0, model.vocabulary.used, 50), now_ms, rng.random(50, np.float32))
    at_ms = stats["last_ms"] + rng.integers(0, 10**9, 50) * (np.arange(50) % 2)
    hidden = rng.random((50, model.network.state_size), np.float32)
    scorer = model.scorer()
    with torch.inference_mode():
        silence = Silence(torch.from_numpy(levels(at_ms - stats["last_ms"])), torch.from_numpy(model.network.visits.silences(stats, at_ms)))
        logits = model.network.logits(torch.from_numpy(hidden), readout(stats, at_ms), silence)
        tensors = hazards.target_tensors(scorer.targets, model.sets, model.manifest.edges_ms)
        expected = hazards.probabilities(logits, *tensors)
    assert model.vocabulary.used < SLOTS
    np.testing.assert_allclose(scorer(hidden, stats, at_ms), expected, atol=1e-5)


@pytest.mark.parametrize("trust", [0.6, None])
def test_an_artifact_of_before_there_was_a_rhythm_cell_answers_as_it_did(tmp_path: Path, trust: float | None) -> None:
    """It names one trust, or none: the belief's, and its shape knows of no other cell."""
    new = publish_model(tmp_path, "v1", rhythm=0)
    folder = tmp_path / "versions/v1"
    manifest, weights = (folder / "manifest.json").read_bytes(), (folder / "weights.safetensors").read_bytes()

    def before(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["trust_JK"]
        if trust is not None:
            tensors["trust"] = torch.tensor(trust)

    shape = {name: size for name, size in json.loads(manifest)["shape"].items() if name != "rhythm"}
    old = artifact.load(*reweighted(changed(manifest, shape=shape), weights, before))
    assert old.manifest.encoder_id == new.manifest.encoder_id
    stats = np.zeros(20, STATISTICS)
    rng, at_ms = np.random.default_rng(0), np.full(20, 10**12)
    update(stats, rng.integers(0, 5, 20), at_ms - rng.integers(0, 10**9, 20), rng.random(20, np.float32))
    hidden = rng.random((20, new.network.state_size), np.float32)
    silence = silence_of(stats, at_ms, old.network.clock, old.network.visits)
    told = readout(stats, at_ms)
    with torch.inference_mode():
        state, root = torch.from_numpy(hidden).tensor_split([16], dim=1)
        believed = old.network.encoder.belief.after_silence(root, silence.level_N)
        base = torch.log((believed @ old.network.falls_SX) / (believed @ old.network.survives_SX))
        logits = (1.0 if trust is None else trust) * base + old.network.head(torch.cat([state, believed.sqrt(), base / 5, told], 1))
        tensors = hazards.target_tensors(old.scorer().targets, old.sets, old.manifest.edges_ms)
        expected = hazards.probabilities(logits.view(20, len(old.sets), -1), *tensors)
    np.testing.assert_allclose(old.scorer()(hidden, stats, at_ms), expected, atol=1e-5)
    assert np.array_equal(old.scorer()(hidden, stats, at_ms), new.scorer()(hidden, stats, at_ms)) == (trust == 0.6)


def test_a_user_without_an_event_gets_the_answer_of_everybody(files: tuple[bytes, bytes]) -> None:
    loaded = artifact.load(*files)
    sets, bins = loaded.network.shape.sets, loaded.network.shape.bins
    base = [[0.01] * bins] * sets
    model = artifact.load(changed(files[0], base_hazards=base), files[1])
    stats = np.zeros(3, STATISTICS)
    stats["count"][0], stats["last_ms"][0], stats["first_ms"][0] = 1, 10**12, 10**12
    at_ms, hidden = np.full(3, 10**12), np.zeros((3, model.network.state_size), np.float32)
    target = Target.parse("churn=*:absent:30d")
    found = model.scorer([target])(hidden, stats, at_ms)
    left = sum(edge <= target.horizon_ms for edge in model.manifest.edges_ms)
    assert found[1:, 0] == pytest.approx(0.99**left, rel=1e-5)
    assert found[0] == pytest.approx(loaded.scorer([target])(hidden, stats, at_ms)[0], rel=1e-6)


@pytest.mark.parametrize("base", [[[0.1]], [[0.5, 2.0]], [[0.0] * 16] * 2])
def test_base_hazards_that_cannot_be_are_refused(files: tuple[bytes, bytes], base: list[list[float]]) -> None:
    with pytest.raises(ArtifactError, match="base_hazards must be"):
        artifact.load(changed(files[0], base_hazards=base), files[1])


def changed(manifest: bytes, **fields: Any) -> bytes:
    return json.dumps(json.loads(manifest) | fields).encode()


def reweighted(manifest: bytes, weights: bytes, change: Callable[[dict[str, torch.Tensor]], object]) -> tuple[bytes, bytes]:
    """Other weights, with a manifest that vouches for them."""
    tensors = load_tensors(weights)
    change(tensors)
    weights = save_tensors(tensors)
    return changed(manifest, weights_sha256=hashlib.sha256(weights).hexdigest()), weights


def poison(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors["head.0.weight"][0].fill_(value)


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def vouched(manifest: bytes, weights: bytes) -> bytes:
    return changed(manifest, weights_sha256=hashlib.sha256(weights).hexdigest())


Corruption = Callable[[bytes, bytes], tuple[bytes, bytes]]
CORRUPT: dict[str, tuple[Corruption, str]] = {
    "a flipped bit in the weights": (lambda m, w: (m, flipped(w, len(w) - 9)), "does not have the sha256 that its manifest names"),
    "a flipped bit in their header": (lambda m, w: (m, flipped(w, 20)), "does not have the sha256 that its manifest names"),
    "weights cut short": (lambda m, w: (m, w[:-1]), "corrupt or incomplete"),
    "no weights": (lambda m, _: (m, b""), "corrupt or incomplete"),
    "weights cut short and vouched for": (lambda m, w: (vouched(m, w[:-8]), w[:-8]), "weights and manifest do not fit together"),
    "weights that are none": (lambda m, _: (vouched(m, b"\x80\x04pickle"), b"\x80\x04pickle"), "weights and manifest do not fit together"),
    "a missing tensor": (lambda m, w: reweighted(m, w, lambda t: t.pop("head.0.bias")), "weights and manifest do not fit together"),
    "a tensor too many": (
        lambda m, w: reweighted(m, w, lambda t: t.update(more=torch.ones(1))),
        "weights and manifest do not fit together",
    ),
    "NaN": (lambda m, w: reweighted(m, w, poison(math.nan)), "its weights hold NaN or infinity"),
    "infinity": (lambda m, w: reweighted(m, w, poison(-math.inf)), "its weights hold NaN or infinity"),
    "another encoder": (lambda m, w: reweighted(m, w, lambda t: t["encoder.type_embedding.weight"].add_(1)), "encoder_id does not match"),
    "no JSON": (lambda m, w: (m[:-20], w), "manifest.json is not a manifest of schema 2"),
    "an empty manifest": (lambda _, w: (b"", w), "manifest.json is not a manifest of schema 2"),
    "a list": (lambda _, w: (b"[]", w), "manifest.json is not a manifest of schema 2"),
    "a field too many": (lambda m, w: (changed(m, calibration=1), w), "manifest of schema 2: calibration: Extra inputs"),
    "a field of another type": (lambda m, w: (changed(m, edges_ms="x"), w), "manifest of schema 2: edges_ms"),
    "a version that is a path": (lambda m, w: (changed(m, version="../v1"), w), "manifest of schema 2: version"),
    "a later schema": (lambda m, w: (changed(m, schema_version=3), w), "has schema 3; this program reads 2: upgrade or retrain"),
    "an unknown encoder": (lambda m, w: (changed(m, encoder="transformer"), w), "has encoder 'transformer'; this streamscore knows: gru"),
    "another size": (lambda m, w: (changed(m, shape=json.loads(m)["shape"] | {"hidden": 8}), w), "weights and manifest do not fit"),
    "a size of no kind": (lambda m, w: (changed(m, shape=json.loads(m)["shape"] | {"hidden": "x"}), w), "weights and manifest do not fit"),
    "an unknown size": (lambda m, w: (changed(m, shape={"layers": 3}), w), "weights and manifest do not fit together"),
    "a vocabulary too long": (lambda m, w: (changed(m, vocabulary=[str(i) for i in range(SLOTS)]), w), "at most 11 event types, not 12"),
    "another vocabulary": (lambda m, w: (changed(m, vocabulary=["view"]), w), "encoder_id does not match its encoder"),
    "another scaling": (lambda m, w: (changed(m, scaling={"value_centre": 0, "value_spread": 1}), w), "encoder_id does not match"),
    "a scaling by zero": (lambda m, w: (changed(m, scaling={"value_centre": 0, "value_spread": 0}), w), "values cannot be scaled"),
    "a scaling by NaN": (lambda m, w: (changed(m, scaling={"value_centre": math.nan, "value_spread": 1}), w), "values cannot be scaled"),
    "an unknown scaling": (lambda m, w: (changed(m, scaling={"median": 1}), w), "weights and manifest do not fit together"),
    "a shorter grid": (lambda m, w: (changed(m, edges_ms=[1, 2, 3]), w), "edges_ms must be 16 increasing times"),
    "a grid out of order": (lambda m, w: (changed(m, edges_ms=[*range(15, 0, -1), 16]), w), "edges_ms must be 16 increasing times"),
    "targets without heads": (lambda m, w: (changed(m, targets=["x=a:occurs:7d", "y=b:occurs:7d", "z=c:occurs:7d"]), w), "2 heads"),
    "no targets": (lambda m, w: (changed(m, targets=[]), w), "2 heads"),
}


@pytest.mark.parametrize("what", CORRUPT)
def test_what_is_corrupt_is_refused_with_a_sentence(files: tuple[bytes, bytes], what: str) -> None:
    artifact.load(*files)
    corrupt, sentence = CORRUPT[what]
    with pytest.raises(ArtifactError) as error:
        artifact.load(*corrupt(*files))
    assert sentence in str(error.value)


def test_an_encoder_id_changes_with_what_a_hidden_state_depends_on_and_with_nothing_else(tmp_path: Path) -> None:
    model = publish_model(tmp_path, "v1")
    network, types, scaling = model.network, list(model.vocabulary.types), model.scaling
    own = encoder_id(network, types, scaling)
    assert own == model.manifest.encoder_id
    assert encoder_id(network, types[::-1], scaling) != own
    assert encoder_id(network, types, Scaling(scaling.value_centre, scaling.value_spread + 1e-6)) != own
    with torch.no_grad():
        next(network.head.parameters()).add_(1)
        assert encoder_id(network, types, scaling) == own
        next(network.encoder.rnn.parameters())[0, 0] += 1e-3
    assert encoder_id(network, types, scaling) != own


def test_a_model_says_which_targets_it_cannot_answer(tmp_path: Path) -> None:
    model = publish_model(tmp_path, "v1")
    assert model.scorer([Target.parse("soon=purchase:occurs:36h")]).targets[0].name == "soon"
    with pytest.raises(ArtifactError, match=r"model v1: the model has no head for target x \(view\); it has: purchase, \*"):
        model.scorer([Target.parse("x=view:occurs:7d")])
    assert model.scorer([Target.parse("x=purchase:occurs:100d")]).targets[0].name == "x", "beyond the grid, too"


def test_the_pointer_moves_in_one_step(tmp_path: Path) -> None:
    """Whoever looks while it moves sees one version or the other, whole."""
    registry = Registry(str(tmp_path))
    for version in ("v1", "v2"):
        publish_model(tmp_path, version)
    done, seen, trouble = threading.Event(), set[str](), list[BaseException]()

    def look() -> None:
        reader = Registry(str(tmp_path))
        while not done.is_set() or len(seen) < 2:
            try:
                pointer = reader.current()
                assert pointer is not None
                seen.add(reader.load(pointer).manifest.version)
            except BaseException as error:
                trouble.append(error)
                return

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(10):
        registry.promote("v1", reason="test", by="test")
        registry.promote("v2", reason="test", by="test")
    done.set()
    thread.join()
    assert not trouble
    assert seen == {"v1", "v2"}
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_cannot_be_loaded_is_not_promoted(registry: Registry) -> None:
    publish_model(registry.location, "v1")
    publish_model(registry.location, "v2", seed=2)
    registry.promote("v1", reason="test", by="test")
    before = registry.current(), len(registry.decisions())
    registry.storage.write("versions/v2/weights.safetensors", b"half of it")
    for version, sentence in (("v2", "corrupt or incomplete"), ("v3", "has no complete model v3")):
        with pytest.raises(ArtifactError, match=sentence):
            registry.promote(version, reason="test", by="test")
    assert (registry.current(), len(registry.decisions())) == before


def test_a_manifest_that_was_changed_behind_the_pointer_is_refused(registry: Registry) -> None:
    publish_model(registry.location, "v1")
    pointer = registry.current()
    assert pointer is not None
    manifest = registry.storage.read("versions/v1/manifest.json")
    registry.storage.write("versions/v1/manifest.json", changed(manifest, metrics={"auc": 0.99}))
    with pytest.raises(ArtifactError, match=r"manifest\.json does not have the sha256 that `current` names"):
        registry.load(pointer)


@pytest.mark.parametrize(
    "content", [b"", b"v1", b"[]", b"null", b'{"version": "v1"}', b"\xff", b'{"version": "v1", "manifest_sha256": "x", "y": 1}']
)
def test_a_pointer_that_is_none_is_refused(registry: Registry, content: bytes) -> None:
    registry.storage.write("current", content)
    with pytest.raises(ArtifactError, match="current is not a registry pointer: promote a version again"):
        registry.current()


def test_an_empty_registry(registry: Registry) -> None:
    assert (registry.current(), registry.versions(), registry.decisions(), registry.prune(3)) == (None, [], [], [])
    with pytest.raises(ArtifactError, match="knows no version before the first: promote one by name"):
        registry.rollback(reason="test", by="test")


def test_a_version_is_published_once(registry: Registry) -> None:
    model = publish_model(registry.location, "v1")
    with pytest.raises(ArtifactError, match="already has a version v1"):
        registry.publish(model.manifest, model.network)


def version_of(registry: Registry) -> str | None:
    pointer = registry.current()
    return pointer.version if pointer else None


def test_rolling_back_twice_goes_two_versions_back(registry: Registry) -> None:
    for version in ("v1", "v2", "v3"):
        publish_model(registry.location, version)
    assert registry.rollback(reason="worse", by="me") == version_of(registry) == "v2"
    assert registry.rollback(reason="still", by="me") == version_of(registry) == "v1"
    with pytest.raises(ArtifactError, match="knows no version before v1"):
        registry.rollback(reason="test", by="test")
    assert [(d["version"], d["action"], d["previous"]) for d in registry.decisions()] == [
        ("v1", "promoted", None),
        ("v2", "promoted", "v1"),
        ("v3", "promoted", "v2"),
        ("v2", "rolled back", "v3"),
        ("v1", "rolled back", "v2"),
    ]


def test_promoting_again_what_is_current_does_not_hide_the_way_back(registry: Registry) -> None:
    for version in ("v1", "v2"):
        publish_model(registry.location, version)
    registry.promote("v2", reason="again", by="me")
    registry.record("v2", "rejected", reason="test", by="test")
    assert registry.rollback(reason="test", by="test") == "v1"


def test_pruning_keeps_the_newest_the_current_and_the_way_back(registry: Registry) -> None:
    for version in ("v1", "v2", "v3", "v4", "v5"):
        publish_model(registry.location, version)
    registry.promote("v2", reason="test", by="test")  # whose way back is v5, which was current; once it was v1
    assert registry.prune(1) == []  # somebody may be about to load or to promote what is so young
    assert registry.prune(1, LATER) == ["v1", "v3", "v4"]
    assert [m.version for m in registry.versions()] == ["v2", "v5"]
    assert registry.rollback(reason="test", by="test") == "v5"


def test_pruning_after_a_rollback_keeps_the_next_step_back(registry: Registry) -> None:
    for version in ("v1", "v2", "v3", "v4"):
        publish_model(registry.location, version)
    registry.rollback(reason="test", by="test")
    assert registry.prune(1, LATER) == ["v1"]
    assert registry.rollback(reason="test", by="test") == "v2"


def test_what_a_crash_left_half_written_is_no_version_and_no_decision(registry: Registry) -> None:
    publish_model(registry.location, "v1")
    registry.storage.write("versions/v2/weights.safetensors", b"and no manifest")
    registry.storage.write("versions/v3/manifest.json", b"{")
    registry.storage.write("decisions/20261121T203159000000-v2-promoted.json.3f9a.tmp", b'{"at": "2026')
    assert [m.version for m in registry.versions()] == ["v1"]
    assert len(registry.decisions()) == 1


def test_versions_are_listed_oldest_first(registry: Registry) -> None:
    model = publish_model(registry.location, "first")
    for hours, version in ((3, "c"), (1, "a"), (2, "b")):
        registry.publish(
            model.manifest.model_copy(update={"version": version, "created_at": model.manifest.created_at + timedelta(hours=hours)}),
            model.network,
        )
    assert [m.version for m in registry.versions()] == ["first", "a", "b", "c"]


def test_new_versions_sort_by_time_and_do_not_collide() -> None:
    now = datetime(2026, 11, 21, 20, 31, 59, tzinfo=UTC)
    names = {new_version(now) for _ in range(20)}
    assert len(names) > 1
    assert all(name.startswith("20261121-203159-") for name in names)
    for name in names:
        Manifest.__pydantic_validator__.validate_assignment(Manifest.model_construct(), "version", name)
    assert max(names) < new_version(now + timedelta(seconds=1))


def test_a_bare_version_name_is_loaded_without_a_pointer(registry: Registry) -> None:
    publish_model(registry.location, "v1")
    assert registry.load("v1").manifest.version == "v1"
    with pytest.raises(ArtifactError, match="has no complete model v9"):
        registry.load(Pointer("v9", ""))

"""The artifact: one version of the model, as two files that say everything a worker needs.

1. `weights.safetensors`: the tensors. Never pickle: loading a model must not be able to run code.
2. `manifest.json`: schema version, sizes, vocabulary, feature statistics, grid, event sets, targets, metrics, training window, and the
   sha256 of the weights. The registry keeps the sha256 of the manifest beside the pointer (see `model.registry`).

`encoder_id` names everything a hidden state depends on: it changes only when the encoder's weights, its vocabulary or its scaling do.
`lineage` names everything the recurrent statistics depend on: a vocabulary that only grew keeps its lineage, so statistics stay valid.
Two workers with the same artifact and the same input give the same scores.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from model import hazards
from model.features import Scaling, Vocabulary
from model.network import ENCODERS, Network, Shape, silence_of
from model.statistics import readout
from model.targets import Target, event_sets

SCHEMA_VERSION = 2


class ArtifactError(ValueError):
    """An artifact that is corrupt, or that this version of streamscore cannot run. The message says which and what to do."""


class Window(BaseModel):
    """What the weights were fitted on: events in [start_ms, end_ms), but of the judges (`trainer.judges`) none from judges_end_ms on.

    judges_end_ms: None where the judges are no exception.
    """

    start_ms: int
    end_ms: int
    users: int
    events: int
    judges_end_ms: int | None = None


class Manifest(BaseModel):
    """manifest.json."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    version: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    created_at: datetime
    encoder: str = "gru"
    shape: dict[str, Any]
    vocabulary: list[str]
    scaling: dict[str, float]
    edges_ms: list[int]
    targets: list[Target]
    encoder_id: str
    lineage: str
    weights_sha256: str
    window: Window
    base_hazards: list[list[float]] = Field(default_factory=list)  # (K, B) of everybody alike: the answer for a user without an event
    metrics: dict[str, Any] = Field(default_factory=dict)


@dataclass(slots=True)
class Model:
    """An artifact, loaded: what the worker scores with and the trainer starts from."""

    network: Network
    manifest: Manifest
    vocabulary: Vocabulary
    scaling: Scaling

    @property
    def sets(self) -> tuple[tuple[str, ...], ...]:
        return event_sets(tuple(self.manifest.targets))

    def scorer(self, targets: Sequence[Target] | None = None) -> Scorer:
        """Probabilities of `targets` (default: the manifest's). Raises ArtifactError where the model cannot answer one."""
        return Scorer(self, targets or self.manifest.targets)


class Scorer:
    """The head, bound to targets: asked after an event and in a silence alike."""

    def __init__(self, model: Model, targets: Sequence[Target]) -> None:
        self.targets = tuple(targets)
        self._network = model.network
        self._slots = model.vocabulary.used
        self._head = model.network.narrow_head(self._slots)
        try:
            tensors = hazards.target_tensors(targets, model.sets, model.manifest.edges_ms)
        except ValueError as error:
            raise ArtifactError(f"model {model.manifest.version}: {error}") from error
        self._tensors = tuple(t.to(model.network.device) for t in tensors)
        base_KB = model.manifest.base_hazards
        self._base_KB = torch.logit(torch.tensor(base_KB)).to(model.network.device) if base_KB else None

    @torch.inference_mode()
    def __call__(
        self, hidden: torch.Tensor | NDArray[np.float32], stats: NDArray[np.void], at_ms: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """(N, T) probabilities asked at `at_ms` (N,) of users with states `hidden` (N, Z) and `stats` (N,) of dtype STATISTICS.

        A user without an event (all zero bytes) is answered for by the base hazards, those of everybody alike.
        """
        device = self._network.device
        state = torch.from_numpy(hidden) if isinstance(hidden, np.ndarray) else hidden
        silence = silence_of(stats, at_ms, self._network.clock, self._network.visits).to(device)
        logits = self._network.logits(state.to(device), readout(stats, at_ms, device, self._slots), silence, self._head)
        unknown = stats["count"] == 0
        if self._base_KB is not None and unknown.any():
            logits[torch.from_numpy(unknown).to(device)] = self._base_KB
        weights, sets, absent = self._tensors
        out: NDArray[np.float32] = hazards.probabilities(logits, weights, sets, absent).cpu().numpy()
        return out


def encoder_id(network: Network, vocabulary: Sequence[str], scaling: Scaling) -> str:
    """16 hex digits that change exactly when stored hidden states stop being this encoder's."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.encoder.state_dict().items()):
        if name == "belief.pace_W" and bool((tensor == 1).all()):
            continue  # the wall clock: encoders of before there was another keep their name
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    if network.encoder.rhythm is not None:
        digest.update(network.members_KV.cpu().numpy().tobytes())
    digest.update(repr((tuple(vocabulary), asdict(scaling))).encode())
    return digest.hexdigest()[:16]


def dump(manifest: Manifest, network: Network) -> tuple[bytes, bytes]:
    """(manifest.json, weights.safetensors); fills in the manifest's encoder_id and weights_sha256."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}
    weights = save_tensors(tensors)
    filled = manifest.model_copy(
        update={
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
            "encoder_id": encoder_id(network, manifest.vocabulary, Scaling(**manifest.scaling)),
        }
    )
    return filled.model_dump_json(indent=2).encode(), weights


def _fits(manifest: Manifest) -> None:
    """Raises ValueError where parts of a manifest contradict each other."""
    edges, shape, scaling = manifest.edges_ms, Shape(**manifest.shape), Scaling(**manifest.scaling)
    if len(edges) != shape.bins or edges != sorted(set(edges)) or edges[0] <= 0:
        raise ValueError(f"edges_ms must be {shape.bins} increasing times")
    if shape.encoder != manifest.encoder:
        raise ValueError(f"the shape is that of {shape.encoder!r}, the encoder {manifest.encoder!r}")
    if len(event_sets(tuple(manifest.targets))) != shape.sets:
        raise ValueError(f"the targets do not need {shape.sets} heads")
    base = manifest.base_hazards
    if base and not (np.shape(base) == (shape.sets, shape.bins) and np.min(base) > 0 and np.max(base) < 1):
        raise ValueError(f"base_hazards must be {shape.sets} rows of {shape.bins} numbers between 0 and 1")
    if not (math.isfinite(scaling.value_centre) and 0 < scaling.value_spread < math.inf):
        raise ValueError(f"values cannot be scaled by {scaling}")


def load(manifest_json: bytes, weights: bytes, device: str | torch.device = "cpu") -> Model:
    """The model of two files' contents. Raises ArtifactError: not ours, of another schema, corrupt, or with NaN in its weights."""
    try:
        manifest = Manifest.model_validate_json(manifest_json)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"manifest.json is not a manifest of schema {SCHEMA_VERSION}: {where}: {first['msg']}") from None
    if manifest.schema_version != SCHEMA_VERSION:
        raise ArtifactError(
            f"model {manifest.version} has schema {manifest.schema_version}; this program reads {SCHEMA_VERSION}: upgrade or retrain"
        )
    if manifest.encoder not in ENCODERS:
        raise ArtifactError(f"model {manifest.version} has encoder {manifest.encoder!r}; this streamscore knows: {', '.join(ENCODERS)}")
    if hashlib.sha256(weights).hexdigest() != manifest.weights_sha256:
        raise ArtifactError(
            f"model {manifest.version}: weights.safetensors does not have the sha256 that its manifest names: it is corrupt or incomplete"
        )
    try:
        _fits(manifest)
        network = Network(Shape(**manifest.shape))
        network.load_state_dict(load_tensors(weights))
        vocabulary = Vocabulary(manifest.vocabulary)
        scaling = Scaling(**manifest.scaling)
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(f"model {manifest.version}: weights and manifest do not fit together: {error}") from error
    if not all(bool(torch.isfinite(p).all()) for p in network.state_dict().values()):
        raise ArtifactError(f"model {manifest.version}: its weights hold NaN or infinity")
    if encoder_id(network, manifest.vocabulary, scaling) != manifest.encoder_id:
        raise ArtifactError(f"model {manifest.version}: encoder_id does not match its encoder: stored states could not be trusted")
    return Model(network.to(device).eval(), manifest, vocabulary, scaling)

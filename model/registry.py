"""The registry: where the trainer publishes and workers look. A directory, or any fsspec URL (s3://, gs://, memory://).

    ROOT/versions/VERSION/weights.safetensors   1. written first,
    ROOT/versions/VERSION/manifest.json         2. then the manifest, which names the weights' sha256,
    ROOT/versions/VERSION/report.html, .json    what the trainer says of it, for people; nobody waits for them
    ROOT/current                                3. last the pointer: {"version", "manifest_sha256"}, replaced in one step
    ROOT/decisions/TIME-VERSION-ACTION.json     every promotion, rejection and rollback: who, why, with which figures

A reader that sees the pointer therefore sees whole files, and can prove it. Rollback is moving the pointer back.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem

from model import artifact
from model.artifact import ArtifactError, Manifest, Model
from model.network import Network


@dataclass(frozen=True, slots=True)
class Pointer:
    """What `current` says."""

    version: str
    manifest_sha256: str


class Registry:
    """A registry at `location`. Every method may raise OSError where the storage is unreachable."""

    def __init__(self, location: str) -> None:
        self.location = location
        self._fs, root = fsspec.core.url_to_fs(location)
        self._root = root.rstrip("/")

    def current(self) -> Pointer | None:
        """The promoted version, or None as long as there is none. Raises ArtifactError where the pointer is unreadable."""
        try:
            text = self._read("current")
        except FileNotFoundError:
            return None
        try:
            return Pointer(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise ArtifactError(f"{self.location}/current is not a registry pointer: promote a version again") from error

    def load(self, pointer: Pointer | str, device: str | torch.device = "cpu") -> Model:
        """The model of a pointer (verified against it) or of a bare version name. Raises ArtifactError."""
        version = pointer if isinstance(pointer, str) else pointer.version
        try:
            manifest_json = self._read(f"versions/{version}/manifest.json")
            weights = self._read(f"versions/{version}/weights.safetensors")
        except FileNotFoundError as error:
            raise ArtifactError(f"{self.location} has no complete model {version}: {error}") from error
        if isinstance(pointer, Pointer) and hashlib.sha256(manifest_json).hexdigest() != pointer.manifest_sha256:
            raise ArtifactError(
                f"model {version}: manifest.json does not have the sha256 that `current` names: it was changed or is corrupt"
            )
        return artifact.load(manifest_json, weights, device)

    def publish(self, manifest: Manifest, network: Network) -> Manifest:
        """Write a new version, without promoting it. Returns the manifest as written."""
        manifest_json, weights = artifact.dump(manifest, network)
        folder = f"versions/{manifest.version}"
        if self._fs.exists(self._path(f"{folder}/manifest.json")):
            raise ArtifactError(f"{self.location} already has a version {manifest.version}")
        self._write(f"{folder}/weights.safetensors", weights)
        self._write(f"{folder}/manifest.json", manifest_json)
        return Manifest.model_validate_json(manifest_json)

    def attach(self, version: str, name: str, content: bytes) -> str:
        """Put a file beside a published version, such as its report; it goes when the version goes. Returns where it lies."""
        self._write(f"versions/{version}/{name}", content)
        return f"{self.location}/versions/{version}/{name}"

    def attached(self, version: str, name: str) -> str | None:
        """Where a version's file of that name lies, if it has one."""
        found = self._fs.exists(self._path(f"versions/{version}/{name}"))
        return f"{self.location}/versions/{version}/{name}" if found else None

    def promote(self, version: str, *, action: str = "promoted", reason: str, by: str, figures: Mapping[str, Any] | None = None) -> None:
        """Move `current` to `version`, after loading it as a worker would. Raises ArtifactError and moves nothing if that fails."""
        self.load(version)
        previous = self.current()
        digest = hashlib.sha256(self._read(f"versions/{version}/manifest.json")).hexdigest()
        self._write("current", json.dumps({"version": version, "manifest_sha256": digest}).encode())
        self.record(version, action, reason=reason, by=by, figures=figures, previous=previous.version if previous else None)

    def rollback(self, *, reason: str, by: str) -> str:
        """Move `current` back to the version before it. Returns that version. Raises ArtifactError where there is none."""
        now = self.current()
        before = self._before(now)
        if before is None:
            raise ArtifactError(f"{self.location} knows no version before {now.version if now else 'the first'}: promote one by name")
        self.promote(before, action="rolled back", reason=reason, by=by)
        return before

    def record(
        self, version: str, action: str, *, reason: str, by: str, figures: Mapping[str, Any] | None = None, previous: str | None = None
    ) -> None:
        """Keep a decision: who did what to which version, why, and on which figures."""
        at = datetime.now(UTC)
        decision = {"at": at.isoformat(), "version": version, "action": action, "reason": reason, "by": by, "previous": previous}
        name = f"{at:%Y%m%dT%H%M%S%f}-{version}-{action.replace(' ', '-')}.json"
        self._write(f"decisions/{name}", json.dumps({**decision, "figures": dict(figures or {})}, indent=2).encode())

    def decisions(self) -> list[dict[str, Any]]:
        """Every decision, oldest first."""
        return [json.loads(self._fs.cat_file(path)) for path in sorted(self._list("decisions")) if path.endswith(".json")]

    def versions(self) -> list[Manifest]:
        """Manifests of every complete version, oldest first; what cannot be read is left out (`load` says why)."""
        found = []
        for path in self._list("versions"):
            try:
                found.append(Manifest.model_validate_json(self._fs.cat_file(f"{path}/manifest.json")))
            except (OSError, ValueError):
                continue
        return sorted(found, key=lambda m: m.created_at)

    def prune(self, keep: int) -> list[str]:
        """Delete all but the newest `keep` versions; never the current one nor the one that a rollback would return to."""
        now = self.current()
        safe = {now.version if now else None, self._before(now)}
        old = [m.version for m in self.versions()[:-keep] if m.version not in safe]
        for version in old:
            self._fs.rm(self._path(f"versions/{version}"), recursive=True)
        return old

    def _before(self, now: Pointer | None) -> str | None:
        """The version that was current when `now` was promoted. Rollbacks do not count, or a second one would undo the first."""
        for decision in reversed(self.decisions()):
            before = decision.get("previous")
            if now and decision["version"] == now.version and decision["action"] == "promoted" and before not in (None, now.version):
                return str(before)
        return None

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _list(self, folder: str) -> list[str]:
        try:
            return [str(p) for p in self._fs.ls(self._path(folder), detail=False, refresh=True)]
        except FileNotFoundError:
            return []

    def _read(self, name: str) -> bytes:
        self._fs.invalidate_cache()  # object stores are listed through a cache; a pointer must be fresh
        return bytes(self._fs.cat_file(self._path(name)))

    def _write(self, name: str, content: bytes) -> None:
        """Whole or not at all: an object store puts in one step, a directory needs a rename."""
        path = self._path(name)
        self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        if not isinstance(self._fs, LocalFileSystem):
            self._fs.pipe_file(path, content)
            return
        temporary = f"{path}.{secrets.token_hex(4)}.tmp"
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def new_version(now: datetime) -> str:
    """A version name that sorts by time and does not collide: 20261121-203159-3f9a."""
    return f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"

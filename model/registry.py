"""The registry: where trainers publish and workers look. A directory, or any fsspec URL (s3://, gs://, memory://).

    ROOT/versions/VERSION/weights.safetensors   1. written first,
    ROOT/versions/VERSION/manifest.json         2. then the manifest, which names the weights' sha256,
    ROOT/versions/VERSION/report.html, .json    what the trainer says of it, for people; nobody waits for them
    ROOT/moves/NUMBER.json                      3. a promotion or rollback is the next move: {"version", "manifest_sha256", "decision"},
    ROOT/decisions/TIME-VERSION-ACTION.json     4. kept among all promotions, rejections and rollbacks: who, why, with which figures,
    ROOT/current                                5. and last the pointer, {"version", "manifest_sha256"}, replaced in one step

A reader that sees the pointer therefore sees whole files, and can prove it. Rollback is moving the pointer back.

Any number of trainers and people may use one registry at once:
* A move has been made when its file has, and of all who try to make the same move one can (`Storage.create`). So a promotion that was
  judged against a champion (`expected`) is made while that one is current, or raises Outdated.
* `decisions` and `current` follow from the newest move. Whoever dies between them leaves that to the next who promotes, or who settles
  (a trainer does at the start of each round); whoever is slow looks again after writing, and so puts right what it wrote too late.
* Pruning leaves alone what is younger than an hour, or was pointed at within it: somebody may be about to promote or to load it. If a
  version is promoted at the moment at which it is deleted, whoever of the two comes second has it in memory, and puts it back.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain
from types import EllipsisType
from typing import Any

import torch

from model import artifact
from model.artifact import ArtifactError, Manifest, Model
from model.network import Network
from model.storage import Storage

GRACE = timedelta(hours=1)
KEEP_MOVES = 100
KEEP_DECISIONS = 1000


class Outdated(ArtifactError):
    """`current` is no longer what a decision was based on. Nothing was moved; the decision must be made again."""


@dataclass(frozen=True, slots=True)
class Pointer:
    """What `current` says."""

    version: str
    manifest_sha256: str


class Registry:
    """A registry at `location`. Every method may raise OSError where the storage is unreachable."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.storage = Storage(location)

    def current(self) -> Pointer | None:
        """The promoted version, or None as long as there is none. Raises ArtifactError where the pointer is unreadable."""
        try:
            text = self.storage.read("current")
        except FileNotFoundError:
            return None
        try:
            return Pointer(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise ArtifactError(f"{self.location}/current is not a registry pointer: promote a version again") from error

    def settle(self) -> Pointer | None:
        """`current` as the newest move has it, after putting right what a crash in the middle of one left undone."""
        return self._settled()[1]

    def load(self, pointer: Pointer | str, device: str | torch.device = "cpu") -> Model:
        """The model of a pointer (verified against it) or of a bare version name. Raises ArtifactError."""
        version = pointer if isinstance(pointer, str) else pointer.version
        manifest_json, weights = self._files(version)
        if isinstance(pointer, Pointer) and hashlib.sha256(manifest_json).hexdigest() != pointer.manifest_sha256:
            raise ArtifactError(
                f"model {version}: manifest.json does not have the sha256 that `current` names: it was changed or is corrupt"
            )
        return artifact.load(manifest_json, weights, device)

    def publish(self, manifest: Manifest, network: Network) -> Manifest:
        """Write a new version, without promoting it. Returns the manifest as written."""
        manifest_json, weights = artifact.dump(manifest, network)
        folder = f"versions/{manifest.version}"
        try:
            self.storage.create(f"{folder}/weights.safetensors", weights)
            self.storage.create(f"{folder}/manifest.json", manifest_json)
        except FileExistsError:
            raise ArtifactError(f"{self.location} already has a version {manifest.version}") from None
        return Manifest.model_validate_json(manifest_json)

    def attach(self, version: str, name: str, content: bytes) -> str:
        """Put a file beside a published version, such as its report; it goes when the version goes. Returns where it lies."""
        self.storage.write(f"versions/{version}/{name}", content)
        return f"{self.location}/versions/{version}/{name}"

    def attached(self, version: str, name: str) -> str | None:
        """Where a version's file of that name lies, if it has one."""
        found = self.storage.exists(f"versions/{version}/{name}")
        return f"{self.location}/versions/{version}/{name}" if found else None

    def promote(
        self,
        version: str,
        *,
        action: str = "promoted",
        reason: str,
        by: str,
        figures: Mapping[str, Any] | None = None,
        expected: Pointer | EllipsisType | None = ...,
    ) -> None:
        """Move `current` to `version`, after loading it as a worker would. Raises ArtifactError and moves nothing if that fails.

        expected: what `current` must be now (None: nothing); by default it may be anything. Raises Outdated where it is something else.
        """
        manifest_json, weights = self._files(version)
        artifact.load(manifest_json, weights)
        digest = hashlib.sha256(manifest_json).hexdigest()
        while True:
            number, standing = self._settled()
            if expected is not ... and standing != expected:
                said = [p.version if p else "no model" for p in (standing, expected)]
                raise Outdated(f"{said[0]} is current now, and no longer {said[1]}: {version} must be judged again")
            decision = _decision(version, action, reason, by, figures, standing.version if standing else None)
            move = {**asdict(Pointer(version, digest)), "decision": decision}
            with suppress(FileExistsError):  # somebody else made this move: look again
                self.storage.create(f"moves/{number + 1:010d}.json", json.dumps(move).encode())
                break
        with suppress(FileExistsError, FileNotFoundError):  # not there: somebody is deleting its folder, and will see the move
            self._put(version, manifest_json, weights)
        self._settled()

    def rollback(self, *, reason: str, by: str) -> str:
        """Move `current` back to the version before it. Returns that version. Raises ArtifactError where there is none."""
        now = self.settle()
        before = self._before(now)
        if before is None:
            raise ArtifactError(f"{self.location} knows no version before {now.version if now else 'the first'}: promote one by name")
        self.promote(before, action="rolled back", reason=reason, by=by, expected=now)
        return before

    def record(
        self, version: str, action: str, *, reason: str, by: str, figures: Mapping[str, Any] | None = None, previous: str | None = None
    ) -> None:
        """Keep a decision that moves nothing: who did what to which version, why, and on which figures."""
        decision = _decision(version, action, reason, by, figures, previous)
        self.storage.write(_place(decision), json.dumps(decision, indent=2).encode())

    def decisions(self) -> list[dict[str, Any]]:
        """The newest KEEP_DECISIONS decisions or more, oldest first."""
        return [json.loads(text) for text in self.storage.read_all("decisions", ".json")]

    def versions(self) -> list[Manifest]:
        """Manifests of every complete version, oldest first; what cannot be read is left out (`load` says why)."""
        found = []
        for name in self.storage.names("versions"):
            try:
                found.append(Manifest.model_validate_json(self.storage.read(f"versions/{name}/manifest.json")))
            except (OSError, ValueError):
                continue
        return sorted(found, key=lambda m: m.created_at)

    def prune(self, keep: int, now: datetime | None = None) -> list[str]:
        """Delete all but the newest `keep` versions; never the current one, the one that a rollback would return to, or a recent one.

        What crashes left behind, and all but the newest moves and decisions, go too. Returns the versions deleted.
        """
        since = (now or datetime.now(UTC)) - GRACE
        number, standing = self._settled()
        safe = {standing.version if standing else None, self._before(standing)}
        for move in self._moves():
            if datetime.fromisoformat(move["decision"]["at"]) < since:
                break
            safe |= {move["version"], move["decision"]["previous"]}
        old = [m.version for m in self.versions()[:-keep] if m.version not in safe and m.created_at < since]
        for version in old:
            self._delete(version)
        self._sweep(since, number)
        return old

    def _delete(self, version: str) -> None:
        """The manifest first: what remains after a crash is no version."""
        try:
            manifest_json, weights = self._files(version)
        except ArtifactError:
            return  # somebody else is at it
        self.storage.delete(f"versions/{version}/manifest.json")
        self.storage.delete(f"versions/{version}")
        newest = next(self._moves(), None)
        if newest and newest["version"] == version:  # promoted in this very moment
            with suppress(FileExistsError):
                self._put(version, manifest_json, weights)

    def _put(self, version: str, manifest_json: bytes, weights: bytes) -> None:
        """Write a version's files where they are missing. Raises FileExistsError where the manifest is there."""
        with suppress(FileExistsError):
            self.storage.create(f"versions/{version}/weights.safetensors", weights)
        self.storage.create(f"versions/{version}/manifest.json", manifest_json)

    def _sweep(self, since: datetime, number: int) -> None:
        """Delete what crashes left before `since`, and more moves and decisions than are kept. number: of the newest move."""
        names = {folder: self.storage.names(folder) for folder in ("", "moves", "decisions", "versions")}
        left = [[f"{folder}/{n}".lstrip("/")] for folder in ("", "moves", "decisions") for n in names[folder] if n.endswith(".tmp")]
        for version in names["versions"]:
            folder, files = f"versions/{version}", self.storage.names(f"versions/{version}")
            if "manifest.json" in files:
                left += [[f"{folder}/{n}"] for n in files if n.endswith(".tmp")]
            else:
                left.append([folder, *(f"{folder}/{n}" for n in files)])
        for group in left:
            changed = [at for name in group if (at := self.storage.changed_at(name))]
            if changed and max(changed) < since:
                self.storage.delete(group[0])
        newest = next(self._moves(), None)
        for name in [n for n in names["decisions"] if n.endswith(".json")][:-KEEP_DECISIONS]:
            if newest is None or f"decisions/{name}" != _place(newest["decision"]):
                self.storage.delete(f"decisions/{name}")
        for name in names["moves"]:
            if name < f"{number - KEEP_MOVES + 1:010d}":
                self.storage.delete(f"moves/{name}")

    def _settled(self) -> tuple[int, Pointer | None]:
        """(the number of the newest move, where it leaves `current`), with everything written that follows from it."""
        while True:
            number = self._number()
            if not number:
                with suppress(ArtifactError):  # an unreadable pointer is as good as none: the next promotion replaces it
                    return 0, self.current()
                return 0, None
            move = json.loads(self.storage.read(_move(number)))
            pointer, decision = Pointer(move["version"], move["manifest_sha256"]), move["decision"]
            if not self.storage.exists(_place(decision)):
                self.storage.write(_place(decision), json.dumps(decision, indent=2).encode())
            try:
                written = self.current() == pointer
            except ArtifactError:
                written = False
            if not written:
                self.storage.write("current", json.dumps(asdict(pointer)).encode())
            if self._number() == number:
                return number, pointer

    def _number(self) -> int:
        """The newest move's number; 0 where there is none."""
        return max((int(n.removesuffix(".json")) for n in self.storage.names("moves") if n.endswith(".json")), default=0)

    def _moves(self) -> Iterator[dict[str, Any]]:
        """Moves, newest first."""
        for name in reversed(self.storage.names("moves")):
            if name.endswith(".json"):
                with suppress(FileNotFoundError):  # pruned meanwhile
                    yield json.loads(self.storage.read(f"moves/{name}"))

    def _before(self, now: Pointer | None) -> str | None:
        """The version that was current when `now` was promoted. Rollbacks do not count, or a second one would undo the first."""
        older = (d for d in reversed(self.decisions()))  # from before there were moves
        for decision in chain((m["decision"] for m in self._moves()), older) if now else ():
            before = decision.get("previous")
            if now and decision["version"] == now.version and decision["action"] == "promoted" and before not in (None, now.version):
                return str(before)
        return None

    def _files(self, version: str) -> tuple[bytes, bytes]:
        """(manifest.json, weights.safetensors). Raises ArtifactError where one is missing."""
        try:
            return self.storage.read(f"versions/{version}/manifest.json"), self.storage.read(f"versions/{version}/weights.safetensors")
        except FileNotFoundError as error:
            raise ArtifactError(f"{self.location} has no complete model {version}: {error}") from error


def new_version(now: datetime) -> str:
    """A version name that sorts by time and does not collide: 20261121-203159-3f9a."""
    return f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def _move(number: int) -> str:
    return f"moves/{number:010d}.json"


def _decision(version: str, action: str, reason: str, by: str, figures: Mapping[str, Any] | None, previous: str | None) -> dict[str, Any]:
    at = datetime.now(UTC).isoformat()
    return {
        "at": at,
        "version": version,
        "action": action,
        "reason": reason,
        "by": by,
        "previous": previous,
        "figures": dict(figures or {}),
    }


def _place(decision: Mapping[str, Any]) -> str:
    at = datetime.fromisoformat(decision["at"])
    return f"decisions/{at:%Y%m%dT%H%M%S%f}-{decision['version']}-{decision['action'].replace(' ', '-')}.json"

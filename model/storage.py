"""Where a registry keeps its files: a directory, or any fsspec URL, behind the few things that a registry needs of either.

A directory must know hard links. An object store must know conditional writes (fsspec's `mode="create"`: s3fs and gcsfs put them through).
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem


class Storage:
    """Files under `location`, by their path from there. Every method may raise OSError where the storage is unreachable."""

    def __init__(self, location: str) -> None:
        self._fs, root = fsspec.core.url_to_fs(location)
        self._root = root.rstrip("/")
        self._local = isinstance(self._fs, LocalFileSystem)

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        self._fs.invalidate_cache()  # object stores are listed through a cache; a pointer must be fresh
        return bytes(self._fs.cat_file(self._path(name)))

    def read_all(self, folder: str, ending: str) -> list[bytes]:
        """A folder's files whose names end so, in the order of their names; an object store is asked for many at a time."""
        self._fs.invalidate_cache()
        paths = [self._path(f"{folder}/{name}") for name in self.names(folder) if name.endswith(ending)]
        found = self._fs.cat(paths, on_error="omit") if paths else {}  # omitted: deleted meanwhile
        return [bytes(found[path]) for path in sorted(found)]

    def exists(self, name: str) -> bool:
        self._fs.invalidate_cache()
        return bool(self._fs.exists(self._path(name)))

    def write(self, name: str, content: bytes) -> None:
        """Put a file there or in the place of another, whole or not at all: a directory needs a rename for that."""
        path = self._made(name)
        if self._local:
            os.replace(_durable(path, content), path)
        else:
            self._fs.pipe_file(path, content)

    def create(self, name: str, content: bytes) -> None:
        """Put a file where there is none, whole or not at all: of several who try at once, one can. The others get FileExistsError."""
        path = self._made(name)
        if self._local:
            temporary = _durable(path, content)
            try:
                os.link(temporary, path)
            finally:
                os.unlink(temporary)
        else:
            self._fs.pipe_file(path, content, mode="create")
        if self.read(name) != content:  # a store that knows no condition: the last one to write it has it
            raise FileExistsError(name)

    def names(self, folder: str) -> list[str]:
        """What is in a folder, sorted; nothing where there is no such folder."""
        try:
            return sorted(str(path).rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._path(folder), detail=False, refresh=True))
        except FileNotFoundError:
            return []

    def delete(self, name: str) -> None:
        """A file or a folder; that it is gone already is well, too."""
        with suppress(FileNotFoundError):
            self._fs.rm(self._path(name), recursive=True)

    def changed_at(self, name: str) -> datetime | None:
        """When a file was last written; None where it is gone."""
        try:
            at: datetime = self._fs.modified(self._path(name))
        except FileNotFoundError:
            return None
        return at

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _made(self, name: str) -> str:
        """The path of a file, in a folder that is there."""
        path = self._path(name)
        self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        return path


def _durable(path: str, content: bytes) -> Path:
    """A temporary file beside `path`, on the disk for good."""
    temporary = Path(f"{path}.{secrets.token_hex(4)}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return temporary

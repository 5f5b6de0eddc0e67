"""The training material by shards: each prepared once, kept on disk where there are several, and in memory only while it trains.

Preparing a shard takes about as long as a pass over it; reading it back is a copy. What is kept is the columns of a `Part` one after the
other in a file without a name: it is gone with the program, however that ends. Where the disk is full, shards are prepared anew in each
pass.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.foresight import Foresight, nothing
from trainer.material import Material

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Part:
    """What a pass needs of some users: U users, E events, L landmarks, as tensors.

    first (U + 1), event_L, weight_L and observed_L as in `History` and `Landmarks`; the rest as in `StepFeatures` and `Material`.
    believed_LS, base_LJX: as `foresight.Foresight` has them.
    """

    first: torch.Tensor
    event_L: torch.Tensor
    weight_L: torch.Tensor
    observed_L: torch.Tensor
    slot_E: torch.Tensor
    item_E: torch.Tensor
    category_E: torch.Tensor
    numeric_EM: torch.Tensor
    readout_LR: torch.Tensor
    mask_LKB: torch.Tensor
    event_LKB: torch.Tensor
    believed_LS: torch.Tensor
    base_LJX: torch.Tensor

    def __len__(self) -> int:
        return len(self.event_L)


def part_of(material: Material, foresee: Foresight) -> Part:
    history, moments, steps = material.history, material.moments, material.steps
    believed_LS, base_LJX = foresee(material)
    return Part(
        first=torch.from_numpy(history.first),
        event_L=torch.from_numpy(moments.event),
        weight_L=torch.from_numpy(moments.weight),
        observed_L=torch.from_numpy(moments.observed_ms),
        slot_E=torch.from_numpy(steps.slot),
        item_E=torch.from_numpy(steps.item),
        category_E=torch.from_numpy(steps.category),
        numeric_EM=torch.from_numpy(steps.numeric),
        readout_LR=material.readout_LR,
        mask_LKB=material.mask_LKB,
        event_LKB=material.event_LKB,
        believed_LS=believed_LS,
        base_LJX=base_LJX,
    )


class Parts:
    """`count` shards, each of which `make` prepares. first: the first one's material, a sample of all; let go once it is a part."""

    def __init__(self, make: Callable[[int], Material], count: int) -> None:
        self._make, self._count = make, count
        self._loaders: dict[int, Callable[[], Part]] = {}
        self._keeps = True
        self.foresee: Foresight = nothing
        self.first: Material = make(0)

    @classmethod
    def whole(cls, material: Material) -> Parts:
        """All of it in one."""
        return cls(lambda number: material, 1)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Part:
        if loader := self._loaders.get(number):
            return loader()
        if number == 0 and hasattr(self, "first"):
            part = part_of(self.first, self.foresee)
            del self.first
        else:
            part = part_of(self._make(number), self.foresee)
        if self._count == 1:
            self._loaders[number] = lambda: part
        elif self._keeps:
            try:
                self._loaders[number] = kept(part)
            except OSError as error:
                logger.warning("shards cannot be kept in %s, so each pass prepares them anew: %s", tempfile.gettempdir(), str(error))
                self._keeps = False
        return part


def kept(part: Part) -> Callable[[], Part]:
    """What reads the part back from disk. Raises OSError where it cannot be written."""
    load = kept_columns({f.name: getattr(part, f.name) for f in fields(part)})
    return lambda: Part(**load())


def kept_columns(columns: dict[str, torch.Tensor]) -> Callable[[], dict[str, torch.Tensor]]:
    """What reads columns back from disk. Raises OSError where they cannot be written."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as what reads it
    try:
        places = [(name, _write(file, column.numpy())) for name, column in columns.items()]
        file.flush()
    except OSError:
        with suppress(OSError):  # what it still holds has no place, either
            file.close()
        raise
    return lambda: {name: _read(file, *place) for name, place in places}


def _write(file: IO[bytes], column: NDArray[Any]) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Append a column; its type, its shape, and where it begins."""
    begin = file.tell()
    if column.size:
        file.write(np.ascontiguousarray(column).data.cast("B"))
    return column.dtype, column.shape, begin


def _read(file: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...], begin: int) -> torch.Tensor:
    file.seek(begin)
    return torch.from_numpy(np.fromfile(file, dtype, math.prod(shape)).reshape(shape))

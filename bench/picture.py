"""A picture of the battery: for each row our log-loss above the best baseline's, and the share closed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    raise NotImplementedError(path)

"""Targets: what a score speaks of. A name, a set of event types, an outcome and a horizon."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

ANY = "*"
_UNITS_MS = {"m": 60_000, "h": 3_600_000, "d": 86_400_000}
_TEXT = re.compile(r"(?P<name>\w+)=(?P<types>[^:]+):(?P<outcome>occurs|absent):(?P<number>[1-9][0-9]*)(?P<unit>[mhd])", re.ASCII)


class Target(BaseModel):
    """P(an event of `types` occurs, or is absent, within `horizon_ms` of the moment asked). Written `purchase=purchase:occurs:7d`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9_]+$", description="key of the score in the published `scores`")
    types: tuple[str, ...] = Field(min_length=1, description='event types, or ("*",) for any')
    outcome: Literal["occurs", "absent"]
    horizon_ms: int = Field(gt=0)

    def __str__(self) -> str:
        number, unit = next((self.horizon_ms // ms, u) for u, ms in reversed(_UNITS_MS.items()) if self.horizon_ms % ms == 0 or u == "m")
        return f"{self.name}={'+'.join(self.types)}:{self.outcome}:{number}{unit}"

    @field_validator("types")
    @classmethod
    def _sorted(cls, types: tuple[str, ...]) -> tuple[str, ...]:
        return (ANY,) if ANY in types else tuple(sorted(set(types)))

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, data: Any) -> Any:
        return cls.parse(data).model_dump() if isinstance(data, str) else data

    @classmethod
    def parse(cls, text: str) -> Self:
        """`NAME=TYPE[+TYPE...]:occurs|absent:HORIZON`, the horizon as 30m, 12h or 7d. Raises ValueError."""
        match = _TEXT.fullmatch(text.strip())
        types = tuple(t for t in match["types"].split("+") if t) if match else ()
        if not match or not types:
            raise ValueError(f"{text!r} is no target: write NAME=TYPE[+TYPE]:occurs|absent:HORIZON, as in purchase=purchase:occurs:7d")
        horizon_ms = int(match["number"]) * _UNITS_MS[match["unit"]]
        return cls(name=match["name"], types=types, outcome=match["outcome"], horizon_ms=horizon_ms)  # type: ignore[arg-type]


PURCHASE = Target.parse("purchase=purchase:occurs:7d")
CHURN = Target.parse("churn=*:absent:30d")
DEFAULT_TARGETS = (PURCHASE, CHURN)


def event_sets(targets: tuple[Target, ...]) -> tuple[tuple[str, ...], ...]:
    """The distinct sets of event types that the targets need: the model has one head for each, in this order."""
    return tuple(dict.fromkeys(target.types for target in targets))

"""Who is learnt from and who judges: users drawn by a hash of their id, the same in every round whatever has come.

A change of behaviour shows in the newest events first. A refresh has to learn from them, and the gate has to judge on moments that no
model has learnt from. Both are possible of different users: the judges' events are learnt from only as far as the encoder's training went,
all others' up to the newest. Some of these, the stoppers, say when a fitting of the weights has done enough.
"""

from __future__ import annotations

from enum import IntEnum
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from model.artifact import Model, Window
from trainer.history import History
from trainer.settings import TrainerSettings


class Role(IntEnum):
    """What a user is for."""

    judge = 0
    stopper = 1
    learner = 2


def of_role(history: History, settings: TrainerSettings, role: Role) -> History:
    """The history of the users of one role."""
    return history.of_users(roles(history.user_ids, settings) == role)


def held_out(history: History, settings: TrainerSettings) -> tuple[History, History]:
    """The histories of those whom a round learns from, and of the stoppers. Of too few users, each is of all."""
    stops_U = roles(history.user_ids, settings) == Role.stopper
    if stops_U.all() or not stops_U.any():
        return history, history
    return history.of_users(~stops_U), history.of_users(stops_U)


def roles(user_ids: list[str], settings: TrainerSettings) -> NDArray[np.int64]:
    """(U,) the users' roles. A larger share of judges only adds to them."""
    # Not `stable_hash`: a CRC's values with two prefixes go together, and samples of users (`history.sample_users`) are drawn by one.
    digests = b"".join(blake2b(u.encode(), digest_size=4).digest() for u in user_ids)
    draw_U = np.frombuffer(digests, "<u4") / 2.0**32
    bounds = np.cumsum([settings.judge_share, settings.validation_share])
    return np.searchsorted(bounds, draw_U, side="right")


def refreshed(model: Model) -> bool:
    """Whether its heads have learnt from newer events than its encoder, but for the judges'."""
    return model.manifest.window.judges_end_ms is not None


def unseen_from(window: Window) -> int:
    """The moment from which on the model has learnt nothing of the judges."""
    return window.end_ms if window.judges_end_ms is None else window.judges_end_ms

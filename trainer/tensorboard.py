"""TensorBoard event files of a report, for whoever keeps a TensorBoard: one run a version for its losses, one run for figures by round."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any


def write(directory: Path, facts: dict[str, Any]) -> None:
    """Losses by pass in DIRECTORY/VERSION; figures in DIRECTORY/rounds/MODEL, at the second of the fitting. Raises ValueError."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboard_directory is set, but TensorBoard is missing: pip install 'streamscore[tensorboard]'") from error
    created = datetime.fromisoformat(facts["created_at"]).timestamp()
    with SummaryWriter(str(directory / facts["version"])) as losses:
        for name, values in facts["losses"].items():
            for step, value in enumerate(values):
                if value is not None:
                    losses.add_scalar(f"loss/{name}", value, step)
        losses.add_text("verdict", facts["verdict"])
    models = dict.fromkeys(model for target in facts["targets"].values() for model in target["measures"])
    for model in models:
        with SummaryWriter(str(directory / "rounds" / model.replace(" ", "_"))) as rounds:
            for name, target in facts["targets"].items():
                for measure, figure in target["measures"].get(model, {}).items():
                    if figure["value"] is not None:
                        rounds.add_scalar(f"{name}/{measure}", figure["value"], int(created), walltime=created)

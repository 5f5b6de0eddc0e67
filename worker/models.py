"""Which model runs: looks at the registry now and then, loads beside the loop, and hands over between two batches."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.artifact import ArtifactError, Model, Scorer
from model.registry import Pointer, Registry
from model.targets import Target
from worker.metrics import Metrics

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that was verified and can answer the targets."""

    model: Model
    scorer: Scorer


class Models:
    """Follows `current` of a registry. A corrupt or incompatible artifact is refused, and what runs stays."""

    def __init__(self, registry: Registry, targets: Sequence[Target] | None, device: str, metrics: Metrics) -> None:
        self._registry = registry
        self._targets = targets
        self._device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self._metrics = metrics
        self._seen: Pointer | None = None
        self._trouble = ""
        self._next: Loaded | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def check(self) -> None:
        """Look once. A new, good model is what `take` returns next."""
        try:
            pointer = self._registry.current()
            if pointer is None or pointer == self._seen:
                return
            model = self._registry.load(pointer, self._device)
            loaded = Loaded(model, model.scorer(self._targets))
        except ArtifactError as error:
            if self._say(f"refused, the running model stays: {error}"):
                self._metrics.rejected.inc()
        except Exception as error:  # the storage: whatever an fsspec backend raises
            self._metrics.retries.labels("registry").inc()
            self._say(f"the registry {self._registry.location} cannot be read: {error}")
        else:
            self._seen, self._next, self._trouble = pointer, loaded, ""

    def take(self) -> Loaded | None:
        """The model to go over to, once."""
        loaded, self._next = self._next, None
        return loaded

    def watch(self, every_seconds: float) -> None:
        """Look again and again, beside the loop."""

        def look() -> None:
            while not self._stop.wait(every_seconds):
                self.check()

        self._thread = threading.Thread(target=look, name="models", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()

    def _say(self, trouble: str) -> bool:
        """Log a trouble once, not at every look. Returns whether it is news."""
        news, self._trouble = trouble != self._trouble, trouble
        if news:
            log.error(trouble)
        return news

"""What the worker and the trainer say of themselves over HTTP: /metrics and /readyz."""

from __future__ import annotations

import http.client
from dataclasses import dataclass

TIMEOUT_S = 2


@dataclass(frozen=True)
class Endpoint:
    """A program's HTTP port on this machine."""

    port: int

    def metrics(self) -> dict[str, float]:
        """Each metric's value, summed over its labels, and each series' own; nothing while there is no answer."""
        _, text = self._get("/metrics")
        return samples(text)

    def ready(self) -> tuple[bool, str]:
        """Whether the program is ready, and its own sentence about it."""
        status, text = self._get("/readyz")
        return status == 200, text.strip()

    def _get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException):
            return 0, ""
        finally:
            connection.close()


def samples(text: str) -> dict[str, float]:
    """Of Prometheus' text format: `name{labels}` as it stands there, and `name` summed over its labels."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            series, _, value = line.rpartition(" ")
            name = series.partition("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
            if name != series:
                found[series] = float(value)
    return found

"""What may stand on a command line, and what is said where it may not."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime


def epoch_ms(text: str) -> int:
    """Of a number, or of an RFC 3339 date or moment; UTC where it does not say. Raises ValueError."""
    if text.lstrip("-").isdigit():
        return int(text)
    moment = datetime.fromisoformat(text)
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


def moment(text: str) -> int:
    """Epoch milliseconds."""
    try:
        return epoch_ms(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a date, as in 2026-11-21 or 2026-11-21T10:00Z, nor epoch milliseconds"
        ) from None


def speed(text: str) -> float:
    """`max`, or simulated seconds a second."""
    try:
        value = float("inf") if text == "max" else float(text)
    except ValueError:
        value = 0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is neither max nor a positive number of seconds a second")
    return value


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def users(text: str) -> int:
    if not (text.isdigit() and int(text) >= 100):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of users of at least 100")
    return int(text)

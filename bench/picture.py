"""A picture of the battery: for each row, our log-loss above the best baseline's, and how much of what can be known we know."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.scores import EXCESS

GOOD, BAD, GREY = "#2f7d4f", "#b5402f", "#8a8a8a"
MOST_EXCESS = 0.02
"""Where the axis ends; what lies beyond is written at the edge."""
LEAST_CLOSED, MOST_CLOSED = -0.5, 1.05


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Rows from top to bottom as in the table, a band for each law. Green passes, red does not."""
    from matplotlib.figure import Figure

    place = np.arange(len(rows))
    figure = Figure(figsize=(11, 1.6 + 0.23 * len(rows)), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [1.25, 1]})
    colour = [GOOD if row["passes"] else BAD for row in rows]
    _excess(left, rows, place, colour)
    _closed(right, rows, place, colour)
    laws = [row["law"] for row in rows]
    for i, law in enumerate(dict.fromkeys(laws)):
        own = [j for j, name in enumerate(laws) if name == law]
        for axes in (left, right):
            axes.axhspan(own[0] - 0.5, own[-1] + 0.5, color="#f3f3f0" if i % 2 else "white", zorder=0)
    left.set_yticks(place, [f"{r['law']}: {r['target']}, {r['kind']}" for r in rows], fontsize=8)
    left.set_ylim(len(rows) - 0.5, -0.5)
    for axes in (left, right):
        axes.tick_params(length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    passed = sum(row["passes"] for row in rows)
    figure.suptitle(
        f"{passed} of {len(rows)} rows pass (green); the others lose by log-loss or by calibration", fontsize=11, x=0.01, ha="left"
    )
    figure.savefig(path, dpi=130)


def _excess(axes: Any, rows: Sequence[dict[str, Any]], place: Any, colour: Sequence[str]) -> None:
    value = np.array([row["excess"] for row in rows])
    error = np.array([2 * row.get("excess_error", 0.0) for row in rows])
    shown = np.clip(value, -MOST_EXCESS, MOST_EXCESS)
    axes.barh(place, shown, color=colour, height=0.62, alpha=0.85, zorder=2)
    inside = np.abs(value) < MOST_EXCESS
    axes.errorbar(shown[inside], place[inside], xerr=error[inside], fmt="none", ecolor="#333333", elinewidth=0.8, zorder=3)
    for i in np.flatnonzero(~inside):
        axes.text(
            shown[i] * 0.98, i, f"{value[i]:+.3f}", fontsize=7, color="white", va="center", ha="right" if value[i] > 0 else "left", zorder=4
        )
    axes.axvline(EXCESS, color=BAD, linewidth=0.9, linestyle=":", zorder=3)
    axes.axvline(0, color="#333333", linewidth=0.8, zorder=3)
    axes.set_xlim(-MOST_EXCESS * 1.02, MOST_EXCESS * 1.02)
    axes.set_xlabel(
        f"log-loss of ours minus that of the best baseline (nats; 2 standard errors)\nleft is better; dotted: {EXCESS}", fontsize=8
    )


def _closed(axes: Any, rows: Sequence[dict[str, Any]], place: Any, colour: Sequence[str]) -> None:
    share = [(row.get("closed") or {}).get("expected") for row in rows]
    known = np.array([i for i, value in enumerate(share) if value is not None], int)
    value = np.array([share[i] for i in known], float)
    shown = np.clip(value, LEAST_CLOSED, MOST_CLOSED)
    axes.hlines(known, 0, shown, color=GREY, linewidth=1, zorder=2)
    axes.scatter(shown, known, s=26, color=[colour[i] for i in known], zorder=3)
    for i, v, at in zip(known, value, shown, strict=True):
        if v < LEAST_CLOSED:
            axes.text(at + 0.03, i - 0.05, f"{v:.1f}", fontsize=7, va="center", zorder=4)
    for i in sorted(set(place.tolist()) - set(known.tolist())):
        axes.text(0.02, i, "not known, or LightGBM is as good as exact", fontsize=7, color=GREY, va="center", zorder=4)
    axes.axvline(0, color="#333333", linewidth=0.8, zorder=2)
    axes.axvline(1, color=GOOD, linewidth=0.9, linestyle=":", zorder=2)
    axes.set_xlim(LEAST_CLOSED * 1.06, MOST_CLOSED)
    axes.set_xlabel(
        "share closed of the gap between LightGBM (0) and the exact filter (1)\nexpected under the filter's probabilities", fontsize=8
    )

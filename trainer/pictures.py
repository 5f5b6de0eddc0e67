"""Pictures of the report, each as one `<svg>` to put into a page. No text in them is drawn as paths, so it stays small and searchable.

Ink (axes, text) is the page's own text colour, and the background is the page's, so that a picture reads in light and dark alike.
Colours are those of Okabe & Ito, "Color Universal Design" (2008), told apart by the colour-blind; a dash of its own says it once more.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from model.hazards import DAY_MS
from trainer import curves
from trainer.drift import LARGE, SLIGHT
from trainer.groups import Kind, Standing
from trainer.measures import TOP, Booleans, Floats

_INK = "#010203"  # stands for the page's text colour
MODEL, CHAMPION, CONSTANT, RECENCY = "this model", "champion", "constant hazard", "recency"
"""Who is compared. Each has the same colour and dash in every picture."""

_STYLES: tuple[tuple[str, Any], ...] = (
    ("#0a84c6", "-"),
    ("#e69f00", (0, (5, 1.5))),
    ("#009e73", (0, (4, 1.5, 1, 1.5))),
    ("#cc79a7", (0, (1, 1.2))),
    ("#d55e00", (0, (7, 2))),
)
_OF_MODEL = dict(zip((MODEL, CHAMPION, RECENCY, CONSTANT), _STYLES, strict=False))
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",  # text as text
    "svg.hashsalt": "streamscore",  # the same figures, the same bytes
    "text.parse_math": False,  # an event type may hold a dollar
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 2.6,
    **{f"{name}color": _INK for name in ("text.", "axes.edge", "axes.label", "xtick.", "ytick.", "grid.")},
}

Place = Literal["best", "upper left", "lower right"]

_LEAST = 1e-6  # scores nearer to 0 or 1 are drawn here

Said = Mapping[str, Floats]
"""Probabilities (N,) by model."""


def roc(y: Booleans, said: Said) -> str:
    def draw(axes: Axes) -> None:
        axes.plot((0, 1), (0, 1), color=_INK, alpha=0.35, linewidth=1)
        _lines(axes, {name: curves.roc(y, p) for name, p in said.items()})
        _label(axes, "false positive rate", "true positive rate", "lower right")
        _unit(axes)

    return _svg(draw, "ROC")


def precision_recall(y: Booleans, said: Said) -> str:
    def draw(axes: Axes) -> None:
        axes.axhline(float(y.mean()), color=_INK, alpha=0.35, linewidth=1)
        _lines(axes, {name: curves.precision_recall(y, p) for name, p in said.items()})
        _label(axes, "recall", "precision")
        _unit(axes)

    return _svg(draw, "Precision and recall")


def gains(y: Booleans, said: Said) -> str:
    def draw(axes: Axes) -> None:
        axes.plot((0, 1), (0, 1), color=_INK, alpha=0.35, linewidth=1)
        axes.axvline(TOP, color=_INK, alpha=0.35, linewidth=1, linestyle=":")
        _lines(axes, {name: curves.gains(y, p) for name, p in said.items()})
        _label(axes, "share of the moments, highest scores first", "share of the outcomes among them", "lower right")
        _unit(axes)

    return _svg(draw, "Cumulative gains")


def calibration(y: Booleans, said: Said) -> str:
    def draw(axes: Axes) -> None:
        top = 0.0
        for name, p in said.items():
            colour, dash = _OF_MODEL[name]
            predicted, observed, low, high = curves.calibration(y, p)
            top = max(top, float(predicted.max()), float(high.max()))
            bars = np.maximum(np.stack([observed - low, high - observed]), 0)
            axes.errorbar(predicted, observed, bars, color=colour, linestyle=dash, label=name, marker="o", markersize=3, elinewidth=0.8)
        top = min(1.0, 1.05 * top)
        axes.plot((0, top), (0, top), color=_INK, alpha=0.35, linewidth=1)
        axes.set_xlim(-0.02 * top, 1.02 * top)
        axes.set_ylim(-0.02 * top, 1.02 * top)
        _label(axes, "mean prediction of a tenth of the moments", "share that came to pass", "upper left")

    return _svg(draw, "Calibration")


def by_group(kind: Kind, standings: Sequence[Standing]) -> str:
    """What came to pass in each group of a kind, with its interval, and what each model expected."""

    def draw(axes: Axes) -> None:
        place = np.arange(len(standings))
        for name in standings[0].expected:
            colour, dash = _OF_MODEL[name]
            axes.plot([s.expected[name] for s in standings], place, color=colour, linestyle=dash, label=name, marker="o", markersize=3)
        observed = [s.observed for s in standings]
        bars = np.array([[o.value - o.low, o.high - o.value] for o in observed]).clip(0).T
        axes.errorbar(
            [o.value for o in observed],
            place,
            xerr=bars,
            color=_INK,
            linestyle="",
            label="came to pass",
            marker="|",
            markersize=7,
            elinewidth=0.9,
        )
        axes.set_yticks(place, [s.group.range for s in standings])
        axes.set_ylim(len(standings) - 0.4, -0.6)
        axes.set_xlim(0, min(1.0, 1.05 * max(max(s.observed.high, *s.expected.values()) for s in standings)))
        axes.set_xlabel("share that came to pass, and mean prediction")
        axes.legend(loc="lower right", bbox_to_anchor=(1.02, 0.99), ncols=3, borderpad=0, columnspacing=1.2)

    return _svg(draw, f"Calibration by {kind}", left=0.33, top=0.92)


def scores(said: Said) -> str:
    def draw(axes: Axes) -> None:
        clipped = {name: np.clip(p, _LEAST, 1 - _LEAST) for name, p in said.items()}
        logits = {name: np.log10(p / (1 - p)) for name, p in clipped.items()}
        low, high = _span(logits.values())
        edges = np.linspace(low, high, 41)
        for name, logit in logits.items():
            colour, dash = _OF_MODEL[name]
            share = np.histogram(logit, edges)[0] / max(len(logit), 1)
            axes.stairs(100 * share, edges, color=colour, linestyle=dash, linewidth=1.6, label=name)
        steps = (1e-5, 1e-4, 0.001, 0.01, 0.1) if high - low > 2 else (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
        marks = (*steps, 0.5, *(1 - p for p in reversed(steps)))
        ticks = [p for p in marks if low <= np.log10(p / (1 - p)) <= high]
        axes.set_xticks([np.log10(p / (1 - p)) for p in ticks], [np.format_float_positional(p, 6, trim="-") for p in ticks])
        _label(axes, "score (logit scale)", "share of the moments, %")

    return _svg(draw, "Scores")


def losses(by_name: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> str:
    """by_name: (passes done, loss after them). Each above its own lowest: training sees further ahead of a moment, so the levels differ."""

    def draw(axes: Axes) -> None:
        for (name, (passes, values)), (colour, dash) in zip(by_name.items(), _STYLES, strict=False):
            if len(values):
                above, label = np.asarray(values) - min(values), f"{name}, lowest {min(values):.4f}"
                axes.plot(passes, above, color=colour, linestyle=dash, label=label, marker="o", markersize=3)
                if name == "validation":
                    axes.plot(passes[int(np.argmin(values))], 0, "o", markersize=9, markerfacecolor="none", color=colour)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _label(axes, "passes over the training data", "nats a moment above the lowest")

    return _svg(draw, "Losses", left=0.17)


def survival(edges_ms: Sequence[int], by_user: Mapping[str, Floats]) -> str:
    """by_user: (B,) the probability that nothing has happened by each edge."""

    def draw(axes: Axes) -> None:
        days = np.r_[0.0, np.asarray(edges_ms) / DAY_MS]
        for (name, alive), (colour, dash) in zip(by_user.items(), _STYLES, strict=False):
            axes.plot(days, np.r_[1.0, alive], color=colour, linestyle=dash, label=name)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlim(0, days[-1])
        _label(axes, "days from now", "probability that none has come yet")

    return _svg(draw, "Survival")


def drift(by_feature: Mapping[str, float]) -> str:
    def draw(axes: Axes) -> None:
        known = {name: value for name, value in by_feature.items() if np.isfinite(value)}
        names = sorted(known, key=lambda name: known[name])
        colours = [_STYLES[2][0] if known[n] < SLIGHT else _STYLES[1][0] if known[n] < LARGE else _STYLES[4][0] for n in names]
        axes.barh(names, [known[n] for n in names], color=colours, height=0.6)
        for i, name in enumerate(names):
            axes.annotate(f"{known[name]:.3f}", (known[name], i), (3, 0), textcoords="offset points", va="center", color=_INK)
        for limit in (SLIGHT, LARGE):
            axes.axvline(limit, color=_INK, alpha=0.4, linewidth=1, linestyle=":")
        axes.set_xlim(0, 1.15 * max(LARGE * 1.1, *known.values(), 0))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("population stability index")

    return _svg(draw, "Drift of the features", left=0.43)


def _lines(axes: Axes, by_name: Mapping[str, tuple[Floats, ...]]) -> None:
    for name, (x, y) in by_name.items():
        colour, dash = _OF_MODEL[name]
        axes.plot(x, y, color=colour, linestyle=dash, label=name)


def _label(axes: Axes, x: str, y: str, legend: Place = "best") -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(loc=legend)


def _unit(axes: Axes) -> None:
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)


def _span(samples: Iterable[Floats]) -> tuple[float, float]:
    lows, highs = zip(*((float(s.min()), float(s.max())) for s in samples if len(s)), strict=True)
    low, high = min(lows), max(highs)
    return (low, high) if high - low > 0.1 else (low - 0.5, high + 0.5)


def _svg(draw: Callable[[Axes], None], title: str, *, left: float = 0.14, top: float = 0.97) -> str:
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(4.4, 3.3))
        figure.subplots_adjust(left=left, right=0.97, bottom=0.14, top=top)  # matplotlib's own layout draws every picture twice
        draw(figure.add_subplot())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    svg = text[text.index("<svg") :].replace(_INK, "currentColor")
    size = svg[: svg.index(">")]
    kept = " ".join(part for part in size.split(" ") if not part.startswith(("width=", "height=", "xmlns")))
    return f'{kept} role="img" aria-label="{title}"{svg[len(size) :]}'

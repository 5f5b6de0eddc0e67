"""How a board is drawn: one screen that fits 80 x 24 and uses what there is beyond, or a line now and then where there is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from time import monotonic

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from demo.board import Board
from demo.shop import DAY_MS

LINE_S = 5.0
BLOCKS = " ▁▂▃▄▅▆▇█"
DIM, GOOD, WARM, COLD = "grey62", "green", "orange1", "deep_sky_blue1"

Refresh = Callable[[], None]


@contextmanager
def shown(board: Board, console: Console, *, plain: bool) -> Iterator[Refresh]:
    """Gives a function that shows the board as it is now; call it as often as you like."""
    if plain:
        yield lines(board, console)
        return
    with Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live:
        yield lambda: live.update(screen(board), refresh=True)


def lines(board: Board, console: Console) -> Refresh:
    said_at, sentence = 0.0, ""

    def refresh() -> None:
        nonlocal said_at, sentence
        if board.sentence != sentence or monotonic() - said_at >= LINE_S:
            said_at, sentence = monotonic(), board.sentence
            console.print(line(board), markup=False, highlight=False, soft_wrap=True)

    return refresh


def line(board: Board) -> str:
    parts = [f"[{clock(board.elapsed_s)}] {board.sentence}"]
    if board.live is None:
        if board.worker and not board.events:
            parts.append(f"worker: {board.worker}")
        if board.trainer and not board.promotions:
            parts.append(f"trainer: {board.trainer}")
    if board.events:
        parts.append(f"{board.events_per_s:,.0f} events/s, {board.scores_per_s:,.0f} scores/s, lag {board.lag or 0:,}")
    if board.visible:
        parts.append("visible p50 {:.0f} ms, p99 {:.0f} ms".format(*board.visible))
    for name, measure in board.quality.items():
        if measure.published is not None:
            best = "" if measure.attainable is None else f" of {measure.attainable:.3f}"
            parts.append(f"{name} AUC {measure.published:.3f}{best}")
    if board.running:
        parts.append(f"model {board.running}, {board.swaps} swaps")
    if board.reasons:
        parts.append(f"{board.reasons.total()} dead letters")
    return "; ".join(parts)


def screen(board: Board) -> Layout:
    layout = Layout()
    layout.split_column(
        Layout(header(board), size=1), Layout(name="numbers", size=7), Layout(name="news", size=6), Layout(name="users", minimum_size=6)
    )
    layout["numbers"].split_row(Layout(stream(board)), Layout(quality(board)))
    layout["news"].split_row(Layout(models(board)), Layout(dead_letters(board)))
    if board.keen:
        layout["users"].split_row(Layout(keen(board)), Layout(silent(board)))
    else:
        layout["users"].update(plot(board))
    return layout


def header(board: Board) -> RenderableType:
    grid = Table.grid(expand=True, padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, ratio=1)
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    when = Text(board.today, DIM)
    if board.live is not None:
        when.append(f" {bar(board.live, 8).ljust(8, '┄')}", GOOD)
    elapsed = Text(f"{clock(board.elapsed_s)}  Ctrl-C ends", DIM)
    grid.add_row(Text(" streamscore ", "bold black on green"), Text(board.sentence, "bold"), when, elapsed)
    return grid


def stream(board: Board) -> Panel:
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(style=DIM, no_wrap=True)
    grid.add_column(justify="right", no_wrap=True, min_width=6)
    grid.add_column(no_wrap=True, ratio=1)
    if not board.events:
        return panel("stream", Text(f"worker: {board.worker or 'starting'}", DIM))
    p50, p99 = board.visible or (None, None)
    grid.add_row("events/s", Text(f"{board.events_per_s:,.0f}", "bold"), Text(sparkline(board.event_rates, 14), GOOD))
    grid.add_row("scores/s", Text(f"{board.scores_per_s:,.0f}", "bold"), Text(f"{board.silence_scores:,} by silence", DIM))
    grid.add_row("lag", f"{board.lag or 0:,}", Text(f"of {board.events:,} events", DIM))
    grid.add_row("visible p50", milliseconds(p50), Text("since it arrived", DIM))
    grid.add_row("visible p99", milliseconds(p99), Text(sparkline(board.waits, 14), COLD))
    return panel("stream", grid)


def quality(board: Board) -> Panel:
    grid = Table(box=None, expand=True, padding=(0, 0, 0, 1), pad_edge=False, header_style=DIM)
    for name, justify in (("AUC", "left"), ("published", "right"), ("attainable", "right"), ("judged", "right")):
        grid.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name, measure in board.quality.items():
        if measure.published is None:
            days = board.days_to_go.get(name, 0)
            grid.add_row(name, Text("-", DIM), Text("-", DIM), Text(f"in {days:.0f}d" if days else short(measure.count), DIM))
        else:
            best = "unknown" if measure.attainable is None else f"{measure.attainable:.3f}"
            grid.add_row(name, Text(f"{measure.published:.3f}", "bold"), best, Text(short(measure.count), DIM))
    note = Text("judged: live scores, horizon passed", DIM) if board.quality else Text("no live scores yet", DIM)
    return panel("scores against what came true", Group(grid, "", note))


def models(board: Board) -> Panel:
    rows: list[RenderableType] = []
    for promotion in board.promotions[-3:]:
        style = GOOD if promotion.action == "promoted" else DIM
        mark = "▶ " if promotion.version == board.running else "  "
        rows.append(
            Text.assemble((f"{clock(promotion.at_s)} ", DIM), (mark, GOOD), (promotion.version, style), (f" {promotion.action}", style))
        )
    trainer = Text(f"trainer: {board.trainer or 'starting'}", DIM, no_wrap=len(rows) > 2, overflow="ellipsis")
    return panel(f"models, {board.swaps} hot swap{'s' * (board.swaps != 1)}", Group(*rows, trainer))


def dead_letters(board: Board) -> Panel:
    if not board.reasons:
        return panel("dead letters", Text("none", DIM))
    reasons = Table.grid(padding=(0, 1), expand=True)
    cells = [Text.assemble((f"{count:3} ", WARM), reason, no_wrap=True) for reason, count in board.reasons.most_common()]
    for pair in zip_longest(cells[::2], cells[1::2], fillvalue=""):
        reasons.add_row(*pair)
    last = Text(f"last: {board.last_dead_letter}", DIM, no_wrap=True, overflow="ellipsis")
    return panel(f"dead letters, {board.reasons.total()}", Group(reasons, last))


def plot(board: Board) -> Panel:
    """What has happened so far."""
    grid = Table.grid(padding=(0, 1))
    for (since_s, sentence), (until_s, _) in pairwise([*board.scenes, (board.elapsed_s, "")]):
        now = sentence == board.sentence
        grid.add_row(Text("▶" if now else "✓", GOOD), Text(sentence, "bold" if now else DIM), Text(f"{until_s - since_s:.0f} s", DIM))
    return panel("so far", grid)


def keen(board: Board) -> Panel:
    grid = users_table(("user", "last seen", "purchase"))
    for row in board.keen:
        grid.add_row(row.user, ago(row.ago_ms), f"{row.score:.2f}", Bar(row.score, WARM))
    return panel("highest purchase intent now", grid)


def silent(board: Board) -> Panel:
    grid = users_table(("user", "silent", "churn"))
    for row in board.silent:
        grid.add_row(row.user, f"{row.days:.0f} days", f"{row.before:.2f} → {row.now:.2f}", Bar(row.now, COLD))
    return panel("falling silent", grid)


def users_table(names: Sequence[str]) -> Table:
    grid = Table(box=None, expand=True, padding=(0, 0, 0, 1), pad_edge=False, header_style=DIM)
    for name in names[:-1]:
        grid.add_column(name, no_wrap=True)
    grid.add_column(names[-1], no_wrap=True, justify="right")
    grid.add_column("", no_wrap=True, ratio=1)
    return grid


def panel(title: str, content: RenderableType) -> Panel:
    return Panel(content, title=Text(title, "bold white"), title_align="left", border_style="grey35", padding=(0, 1))


@dataclass(frozen=True)
class Bar:
    """As long as there is room."""

    share: float
    style: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(bar(self.share, options.max_width), self.style, no_wrap=True)


def bar(share: float, width: int) -> str:
    halves = max(0, min(width * 2, round(share * width * 2)))
    return "━" * (halves // 2) + "╸" * (halves % 2)


def sparkline(values: Iterable[float], width: int) -> str:
    """The last values, the tallest at full height."""
    last = list(values)[-width:]
    top = max(last, default=0) or 1
    return "".join(BLOCKS[round(value / top * (len(BLOCKS) - 1))] for value in last)


def milliseconds(value: float | None) -> Text:
    return Text("-", DIM) if value is None else Text(f"{value:,.0f} ms", "bold")


def ago(ms: int) -> str:
    days = ms / DAY_MS
    return f"{days * 24:.0f} h ago" if days < 2 else f"{days:.0f} days ago"


def short(count: int) -> str:
    return f"{count:,}" if count < 10_000 else f"{count / 1000:.0f}k"


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"

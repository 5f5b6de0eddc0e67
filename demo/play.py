"""From the command line to a run, and from what came of it to an exit status."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console

from demo.cast import Play
from demo.launch import ProgramEnded
from demo.process import StartFailed
from demo.replay import File, InputError
from demo.run import Stuck, run
from demo.shop import DAY_MS
from demo.stream import Shop, Stream
from demo.summary import Summary
from model.targets import PURCHASE, Target

HISTORY_DAYS, LIVE_DAYS = 85, 65


def play(options: argparse.Namespace) -> int:
    """The exit status. Raises KeyboardInterrupt."""
    console = Console(stderr=options.json, highlight=False)
    try:
        return played(options, console)
    except InputError as error:
        console.print(str(error), style="bold red", markup=False, soft_wrap=True)
        return 2
    except (ProgramEnded, Stuck, StartFailed, RuntimeError) as error:
        console.print(str(error), style="bold red", markup=False, soft_wrap=True)
        return 1


def played(options: argparse.Namespace, console: Console) -> int:
    now_ms = int(time.time() * 1000)
    source = File(options.input, options.until) if options.input else Shop(options.users, options.seed, now_ms, HISTORY_DAYS, LIVE_DAYS)
    stream = source.load()
    purchase = purchase_target(stream, options.purchase, options.input)
    speed = options.speed or stream.live_days * DAY_MS / 1000 / options.seconds
    plain = options.plain or not console.is_terminal or console.encoding.lower() != "utf-8"
    ended: list[Summary] = []

    def tell(summary: Summary) -> None:
        ended.append(summary)
        summary.print(console)
        if options.json:
            print(summary.json(), flush=True)

    run(Play(source, stream, purchase, speed, plain, options.keep), console, tell)
    problems = ended[0].problems(quality_needed=options.input is None)
    for problem in problems:
        console.print(f"not as it should be: {problem}", style="bold red", markup=False)
    return 1 if problems else 0


def purchase_target(stream: Stream, type_name: str | None, path: Path | None) -> Target:
    """Whether an event of the named type occurs within 7 days. Raises InputError where the file has none."""
    chosen, known = type_name or PURCHASE.types[0], stream.history.types
    if chosen not in known:
        raise InputError(f"{path} has no event of type {chosen}; it has {', '.join(known)}: say with --purchase which one is a purchase")
    return PURCHASE.model_copy(update={"types": (chosen,)})

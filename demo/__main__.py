"""Live purchase and churn scores, end to end on this machine: real Kafka and Redis, the real worker and trainer, a simulated shop."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console

from demo.feed import moment, speed_of
from demo.launch import ProgramEnded
from demo.process import StartFailed
from demo.replay import File, InputError
from demo.run import Play, Stuck, run
from demo.shop import DAY_MS
from demo.stream import Shop, Stream
from demo.summary import Summary
from model.targets import PURCHASE, Target

HISTORY_DAYS, LIVE_DAYS = 85, 65

STORY = """
what happens
  Kafka and Redis start (or KAFKA_BOOTSTRAP_SERVERS and REDIS_URL name running ones). The shop writes 85 days of history; the trainer makes
  the first model from it; the worker, which had been waiting for one, catches up at full speed. Then 65 more days pass, one a second:
  watch scores come out milliseconds after events go in, users fall silent, malformed records end in the dead-letter topic, and the worker
  swap to newer models without a pause. At the end everything is read back from Kafka: each event must have been answered exactly once.

examples
  python -m demo                                         about two minutes; Ctrl-C ends it at any time and leaves nothing behind
  python -m demo --keep                                  servers and programs stay up afterwards, to look around with your own tools
  python -m demo --json 2>/dev/null | tail -1            the figures, for a script
  python -m demo --input events.csv --purchase order     your own events, of a file with the columns user_id, type, timestamp
                                                         [, event_id, item_id, category, value, session_id, attributes]
exit status
  0: nothing lost, nothing doubled, a swap seen, both AUCs measured. 1: not so, or something failed. 2: wrong arguments. 130: Ctrl-C
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m demo", description=__doc__, epilog=STORY, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--seconds", type=positive, metavar="N", default=65, help="how long the live part takes (65)")
    top.add_argument("--keep", action="store_true", help="leave servers, worker and trainer up, and print their addresses, until Ctrl-C")
    top.add_argument("--json", action="store_true", help="the figures as the last line of stdout; all else goes to stderr")
    top.add_argument("--plain", action="store_true", help="lines instead of a full screen (so it is where stdout is no terminal)")
    shop = top.add_argument_group("the simulated shop")
    shop.add_argument(
        "--users", type=whole, metavar="N", default=6000, help="users who ever come; about a third are active at any time (6000)"
    )
    shop.add_argument("--seed", type=int, metavar="N", default=0, help="another seed, another course of events (0)")
    file = top.add_argument_group("your own events instead")
    file.add_argument("--input", type=Path, metavar="FILE", help="CSV, JSONL or Parquet; the first 60%% of its time is history")
    file.add_argument("--speed", type=speed_of, metavar="N", help="replay N seconds of the file a second, or max (what takes --seconds)")
    file.add_argument("--purchase", metavar="TYPE", help="the event type that is a purchase (purchase)")
    file.add_argument("--until", type=moment, metavar="DATE", help="leave out what comes later, as in 2026-11-21")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    command = parser()
    options = command.parse_args(arguments)
    if not options.input and (options.speed or options.purchase or options.until):
        command.error("--speed, --purchase and --until go with --input FILE")
    console = Console(stderr=options.json, highlight=False)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    try:
        return play(options, console)
    except KeyboardInterrupt:
        console.print("\nended early; nothing is left behind", style="dim")
        return 130
    except InputError as error:
        console.print(str(error), style="bold red", markup=False, soft_wrap=True)
        return 2
    except (ProgramEnded, Stuck, StartFailed, RuntimeError) as error:
        console.print(str(error), style="bold red", markup=False, soft_wrap=True)
        return 1


def play(options: argparse.Namespace, console: Console) -> int:
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
    """Whether the named type is a purchase, within 7 days. Raises InputError where the file has none."""
    chosen, known = type_name or PURCHASE.types[0], stream.history.types
    if chosen not in known:
        raise InputError(f"{path} has no event of type {chosen}; it has {', '.join(known)}: say with --purchase which one is a purchase")
    return PURCHASE.model_copy(update={"types": (chosen,)})


def interrupted(number: int, frame: FrameType | None) -> None:
    """A signal ends the demo as Ctrl-C does."""
    raise KeyboardInterrupt


def positive(text: str) -> float:
    if not (text.replace(".", "", 1).isdigit() and float(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return float(text)


def whole(text: str) -> int:
    if not (text.isdigit() and int(text) >= 100):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of users of at least 100")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())

"""Live purchase and churn scores, end to end on this machine: real Kafka and Redis, the real worker and trainer, a simulated shop."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from demo.arguments import moment, seconds, speed, users

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
    top.add_argument("--seconds", type=seconds, metavar="N", default=65, help="how long the live part takes (65)")
    top.add_argument("--keep", action="store_true", help="leave servers, worker and trainer up, and print their addresses, until Ctrl-C")
    top.add_argument("--json", action="store_true", help="the figures as the last line of stdout; all else goes to stderr")
    top.add_argument("--plain", action="store_true", help="lines instead of a full screen (so it is where stdout is no terminal)")
    shop = top.add_argument_group("the simulated shop")
    shop.add_argument(
        "--users", type=users, metavar="N", default=2000, help="users who ever come; about a third are active at any time (2000)"
    )
    shop.add_argument("--seed", type=int, metavar="N", default=0, help="another seed, another course of events (0)")
    file = top.add_argument_group("your own events instead")
    file.add_argument("--input", type=Path, metavar="FILE", help="CSV, JSONL or Parquet; the first 60%% of its time is history")
    file.add_argument("--speed", type=speed, metavar="N", help="replay N seconds of the file a second, or max (what takes --seconds)")
    file.add_argument("--purchase", metavar="TYPE", help="the event type that is a purchase (purchase)")
    file.add_argument("--until", type=moment, metavar="DATE", help="leave out what comes later, as in 2026-11-21")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    command = parser()
    options = command.parse_args(arguments)
    if not options.input and (options.speed or options.purchase or options.until):
        command.error("--speed, --purchase and --until go with --input FILE")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    try:
        from demo.play import play  # takes a second, in which Ctrl-C is to be heeded, too

        return play(options)
    except KeyboardInterrupt:
        print("\nended early; nothing is left behind", file=sys.stderr)
        return 130


def interrupted(number: int, frame: FrameType | None) -> None:
    """A signal ends the demo as Ctrl-C does."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

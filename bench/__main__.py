"""python -m bench throughput | gate | drift."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from bench import drift, gate, throughput


def main(arguments: list[str] | None = None) -> int:
    """The program."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["gate"]:
        return gate.main(arguments[1:])
    if arguments[:1] == ["drift"]:
        return drift.main(arguments[1:])
    plan = throughput.Plan()
    parser = argparse.ArgumentParser(
        prog="python -m bench", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=throughput.__doc__
    )
    parser.add_argument("what", choices=["throughput", "gate", "drift"], help="gate, drift: see their own --help")
    parser.add_argument("--events", type=int, default=plan.events, help="of each throughput run (default %(default)s)")
    parser.add_argument("--users", type=int, nargs="+", default=plan.users, help="user counts (default 300 200000)")
    parser.add_argument("--rounds", type=int, default=plan.rounds, help="how often each case is run (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one short round, in a minute and a half")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON on stdout")
    options = parser.parse_args(arguments)
    plan = replace(plan, events=options.events, users=tuple(options.users), rounds=options.rounds)
    return throughput.run(plan.quick() if options.quick else plan, options.json)


if __name__ == "__main__":
    sys.exit(main())

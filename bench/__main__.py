"""python -m bench throughput | quality | training | gate | drift."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from bench import drift, gate, quality, throughput, training
from trainer.settings import TrainerSettings


def main(arguments: list[str] | None = None) -> int:
    """The program."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m bench", description="streamscore's benchmarks")
    commands = parser.add_subparsers(dest="what", required=True, metavar="BENCHMARK")
    raw = argparse.RawDescriptionHelpFormatter
    for name, of, text in (
        ("gate", gate, "sabotaged and better challengers before the trainer's gate"),
        ("drift", drift, "how soon the running service follows when behaviour changes"),
        ("quality", quality, "how good the model is on laws whose best answers are known"),
    ):
        commands.add_parser(name, help=text, add_help=False)
        if arguments[:1] == [name]:
            return of.main(arguments[1:])
    plan = throughput.Plan()
    fast = commands.add_parser(
        "throughput", formatter_class=raw, description=throughput.__doc__, help="events a second and latency of the worker"
    )
    fast.add_argument("--events", type=int, default=plan.events, help="of each throughput run (default %(default)s)")
    fast.add_argument("--users", type=int, nargs="+", default=plan.users, help="user counts (default 300 200000)")
    fast.add_argument("--rounds", type=int, default=plan.rounds, help="how often each case is run (default %(default)s)")
    fast.add_argument("--quick", action="store_true", help="one short round, in a minute and a half")
    fit = commands.add_parser(
        "training", formatter_class=raw, description=training.__doc__, help="events a second of the trainer's fitting"
    )
    fit.add_argument("--events", type=int, default=1_500_000, help="of the simulated shop, about (default %(default)s)")
    fit.add_argument("--seconds", type=float, default=10, help="of CPU time that each plain loop is measured for (default %(default)s)")
    fit.add_argument("--epochs", type=int, help="passes at most (default: the trainer's)")
    fit.add_argument("--threads", type=int, help="torch threads, 0 for all cores (default: the trainer's)")
    fit.add_argument("--seed", type=int, default=0, help="of the shop and the fitting (default %(default)s)")
    for command in (fast, fit):
        command.add_argument("--json", action="store_true", help="end with one line of JSON on stdout")
    options = parser.parse_args(arguments)
    if options.what == "training":
        changes = {name: value for name in ("epochs", "threads") if (value := getattr(options, name)) is not None}
        settings = TrainerSettings(seed=options.seed, round_budget_seconds=3600, **changes)
        return training.run(options.events, options.seconds, settings, options.json)
    plan = replace(plan, events=options.events, users=tuple(options.users), rounds=options.rounds)
    return throughput.run(plan.quick() if options.quick else plan, options.json)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m trainer`: the service, single rounds, and the registry's models by hand."""

from __future__ import annotations

import argparse
import getpass
import json
import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path

from model.logs import configure
from model.settings import SettingsError
from trainer.arguments import parser, settings_of
from trainer.settings import TrainerSettings

OFFLINE = ("fit", "predict", "backtest", "compare", "tune")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 for a failure, 2 for settings or arguments that cannot be."""
    arguments = parser().parse_args(argv)
    try:
        settings = settings_of(arguments)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    configure(settings.log_format, settings.log_level)
    try:
        return run(arguments, settings)
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError) as error:  # ValueError: a user's mistake, with its sentence; ours are assertions
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(arguments: argparse.Namespace, settings: TrainerSettings) -> int:
    if arguments.command == "run":
        from trainer.service import Service

        Service(settings).run()
        return 0
    if arguments.command == "train":
        return train(settings, arguments.input, arguments.promote)
    if arguments.command in OFFLINE:
        return offline(arguments, settings)

    from model.registry import Registry
    from trainer import show

    registry = Registry(settings.registry)
    match arguments.command:
        case "list":
            show.versions(registry)
        case "show":
            show.version(registry, arguments.version)
        case "promote":
            registry.promote(arguments.version, reason=arguments.reason, by=_user())
            print(f"{arguments.version} is the current model")
        case "rollback":
            print(f"{registry.rollback(reason=arguments.reason, by=_user())} is the current model again")
    return 0


def train(settings: TrainerSettings, source: Path | None, promote: bool) -> int:
    """One round. Exit status 0 also where the gate rejected: that is an answer, not a failure."""
    import torch

    from model.memory import keep_freed_memory
    from model.registry import Registry
    from trainer.distributed import joined
    from trainer.history import from_table
    from trainer.inputs import read_events
    from trainer.metrics import Metrics
    from trainer.rounds import run_round
    from trainer.shards import in_memory, of_log
    from trainer.show import fitting
    from trainer.stage import no_progress

    keep_freed_memory()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with joined(settings) as (team, settings):
        if not team.first:
            logging.getLogger().setLevel(logging.WARNING)  # the first one speaks for all
        shards = in_memory(from_table(read_events(source, settings.event_fields)), settings.shard_events) if source else of_log(settings)
        if shards is None:
            raise ValueError(
                f"there are no events in {settings.log_directory}: let `python -m trainer run` collect some, or give --input FILE"
            )
        registry, metrics, now = Registry(settings.registry), Metrics(), datetime.now(UTC)
        with fitting() if team.first else nullcontext(no_progress) as progress:
            outcome = run_round(shards, registry, settings, metrics, now=now, by=_user(), promote=promote, progress=progress, team=team)
    if outcome.kind == "waiting":
        raise ValueError(f"too little data to train on: {outcome.reason} (see min_users, min_events and min_days)")
    if outcome.kind != "helped":
        print(f"{outcome.kind} {outcome.version}: {outcome.reason}")
    return 0


def offline(arguments: argparse.Namespace, settings: TrainerSettings) -> int:
    """The commands that know files only: a result on stdout, progress on stderr."""
    import torch

    from model.memory import keep_freed_memory
    from trainer import offline
    from trainer.show import as_text, fitting

    keep_freed_memory()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    match arguments.command:
        case "fit":
            with fitting() as progress:
                said = offline.fit(arguments.events, arguments.until, arguments.out, arguments.force, settings, datetime.now(UTC), progress)
        case "predict":
            with fitting("predicting") as progress:
                said = offline.answer(arguments.model, arguments.events, arguments.queries, arguments.out, settings, progress)
        case "backtest":
            from trainer import backtest

            with fitting("backtest") as progress:
                report = backtest.backtest(
                    arguments.events, arguments.origins, arguments.every, arguments.until, settings, datetime.now(UTC), progress
                )
            said = json.dumps(report) if arguments.json else as_text(backtest.tabulated(report, settings.targets))
        case "compare":
            from trainer import compare

            with fitting("comparing") as progress:
                found = compare.compare(arguments.events, arguments.until, arguments.only, settings, datetime.now(UTC), progress)
            said = json.dumps(found) if arguments.json else as_text(compare.tabulated(found, settings.targets))
        case "tune":
            from trainer import tune

            with fitting("tuning") as progress:
                said = tune.tune(arguments.events, arguments.until, arguments.trials, arguments.minutes, arguments.out, settings, progress)
    print(said)
    return 0


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return "unknown"


if __name__ == "__main__":
    logging.raiseExceptions = False  # a closed stderr is no reason to fail
    sys.exit(main())

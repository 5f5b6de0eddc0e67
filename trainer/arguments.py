"""The command line of `python -m trainer`: what there is to say, and the settings that it changes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from model.settings import PREFIX, SettingsError
from trainer.settings import TrainerSettings

EXAMPLES = """
examples:
  python -m trainer run                              collect events, hold rounds, promote what is better
  python -m trainer train --input events.csv         one round on the events of a file (CSV, JSONL or Parquet)
  python -m trainer promote 20261121-203159-3f9a --reason "measured better in the shop"

with a file, and without Kafka:
  python -m trainer fit events.csv --until 2017-09-28T09:00:00Z --target buy=basket:occurs:7d --target gone=*:absent:30d --out model
  python -m trainer predict model events.csv queries.csv --out predictions.csv
  python -m trainer backtest events.csv --target buy=basket:occurs:7d --origins 4 --every 16d
  python -m trainer compare events.csv --until 2017-09-28T09:00:00Z --target buy=basket:occurs:7d --only recency,lightgbm,ours
  python -m trainer tune events.csv --until 2017-09-28T09:00:00Z --target buy=basket:occurs:7d --minutes 30 --out tuned.toml
  python -m trainer fit events.csv --config tuned.toml --set epochs=20 --seed 1 --out model
"""
EVENTS_HELP = "events as .csv, .jsonl or .parquet (user_id, type, timestamp; item_id, category, value), or a trainer's log directory"
UNTIL_HELP = "use nothing at or after this time (RFC 3339, or ms since the epoch); default: the end of the data"
TARGET_HELP = "what the model answers, as NAME=TYPE[+TYPE]:occurs|absent:HORIZON, * for any type; may be given several times"


def parser() -> argparse.ArgumentParser:
    config = argparse.ArgumentParser(add_help=False)
    config.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings; environment variables win over it")
    epilog = f"{EXAMPLES}\nsettings (environment variable over TOML file over default):\n{TrainerSettings.describe()}"
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="one setting, over environment and file: hidden=32")
    own.add_argument("--seed", metavar="N", help="of every random choice: the same seed and data give the same model")
    asked = argparse.ArgumentParser(add_help=False)
    asked.add_argument("--target", action="append", default=[], metavar="TARGET", help=TARGET_HELP)

    top = argparse.ArgumentParser(
        prog="python -m trainer", description=__doc__, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=epilog,
            parents=[config, *parents],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    command("run", "follow the event topics and hold rounds, until SIGTERM or Ctrl-C")
    train = command("train", "hold one round, on the log or on a file")
    train.add_argument("--input", type=Path, metavar="FILE", help=f"{EVENTS_HELP}; default: the log")
    train.add_argument(
        "--promote", action=argparse.BooleanOptionalAction, default=True, help="promote what passes the gate; otherwise only publish"
    )
    command("list", "models of the registry, newest last")
    command("show", "one model: window, figures, decisions").add_argument("version", metavar="VERSION")
    promote = command("promote", "make a version the current one, past the gate")
    promote.add_argument("version", metavar="VERSION")
    rollback = command("rollback", "return to the version before the current one")
    for some in (promote, rollback):
        some.add_argument("--reason", default="by hand", help="kept with the decision")

    fit = command("fit", "fit a model on a file, into a folder", own, asked)
    _events(fit, until=True)
    fit.add_argument("--out", type=Path, required=True, metavar="MODEL_DIR", help="folder for manifest.json and weights.safetensors")
    fit.add_argument("--force", action="store_true", help="replace the model that is in MODEL_DIR")
    predict = command("predict", "answer a file of queries with a fitted model", own)
    predict.add_argument("model", type=Path, metavar="MODEL_DIR", help="what `fit` wrote")
    _events(predict, until=False)
    predict.add_argument(
        "queries", type=Path, metavar="QUERIES", help="query,task,user_id,at,horizon: P(target of that name in [at, at + horizon))"
    )
    predict.add_argument("--out", type=Path, required=True, metavar="FILE", help="query,probability, as .csv, .jsonl or .parquet")

    backtest = command("backtest", "fit and score at rolling origins: how good would this have been?", own, asked)
    _events(backtest, until=True)
    backtest.add_argument("--origins", type=int, default=4, metavar="N", help="how many times to fit; default 4")
    backtest.add_argument(
        "--every", metavar="DURATION", help="from one origin to the next (16d); default: over the second half of the data"
    )
    compare = command("compare", "alternatives and this model on one split, in one table (pip install 'streamscore[compare]')", own, asked)
    _events(compare, until=True)
    compare.add_argument(
        "--only", metavar="A,B", help="these alternatives alone: constant, recency, logistic, lightgbm, pareto, mlp, cnn, ..."
    )
    for some in (backtest, compare):
        some.add_argument("--json", action="store_true", help="print figures as JSON")
    tune = command("tune", "search for better settings on inner splits (pip install 'streamscore[tune]')", own, asked)
    _events(tune, until=True)
    tune.add_argument("--trials", type=int, default=20, metavar="N", help="settings to try; default 20")
    tune.add_argument("--minutes", type=float, metavar="N", help="stop after this time, too")
    tune.add_argument("--out", type=Path, required=True, metavar="FILE", help="TOML file for the best settings, as --config takes it")
    return top


def _events(command: argparse.ArgumentParser, *, until: bool) -> None:
    command.add_argument("events", type=Path, metavar="EVENTS", help=EVENTS_HELP)
    if until:
        command.add_argument("--until", metavar="TIME", help=UNTIL_HELP)


def settings_of(arguments: argparse.Namespace) -> TrainerSettings:
    """The settings, with what the command line changes of them. Raises SettingsError."""
    environ = dict(os.environ)
    changes = [*getattr(arguments, "set", ())]
    if getattr(arguments, "seed", None) is not None:
        changes.append(f"seed={arguments.seed}")
    if getattr(arguments, "target", None):
        changes.append(f"targets={','.join(arguments.target)}")
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise SettingsError(f"--set {change} says no value: write --set NAME=VALUE")
        environ[f"{PREFIX}TRAINER_{name.strip().upper()}"] = value
    return TrainerSettings.read(arguments.config, environ)

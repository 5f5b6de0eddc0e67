"""Two real processes that fit one model: a step is that of one process, both end with the same weights, and torchrun drives it all."""

import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from test_trainer_shards import fitted
from trainer_support import NOW, START_MS, quick_settings, shop_history, shop_table

from model.features import Vocabulary
from model.hazards import DAY_MS, DEFAULT_EDGES_MS
from model.network import Network, Shape
from model.registry import Registry
from trainer.batches import Carried, pack
from trainer.challenger import train
from trainer.dataset import choose_vocabulary, fit_scaling, landmarks
from trainer.distributed import ALONE, Team, joined
from trainer.foresight import nothing
from trainer.history import History
from trainer.material import prepare
from trainer.metrics import Metrics
from trainer.parts import part_of
from trainer.rounds import split_by_time
from trainer.settings import TrainerSettings
from trainer.shards import in_memory
from trainer.stage import Run, no_progress
from trainer.standard import standardised
from trainer.units import PartStreams, _step

SETS = (("purchase",), ("*",))
PROCESSES = 2


def ended(work: Callable[[Team, TrainerSettings], Any], settings: TrainerSettings) -> list[int | None]:
    """Exit codes of two processes that do `work` as a team, and leave what it returns in files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(PROCESSES)}
    fork = multiprocessing.get_context("fork")  # torch takes seconds to load

    def run(rank: int) -> None:
        os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
        torch.set_num_threads(1)
        with joined(settings) as (team, own):
            told = work(team, own)
        with open(Path(settings.registry).parent / f"rank{rank}", "wb") as file:
            pickle.dump(told, file)

    processes = [fork.Process(target=run, args=(rank,)) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def together(work: Callable[[Team, TrainerSettings], Any], settings: TrainerSettings) -> list[Any]:
    """What `work` returns in each of two processes."""
    assert ended(work, settings) == [0] * PROCESSES
    return [pickle.loads((Path(settings.registry).parent / f"rank{rank}").read_bytes()) for rank in range(PROCESSES)]


def weights(network: torch.nn.Module) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


def step(team: Team, history: History) -> dict[str, Any]:
    """The weights after one step on the same batch, of which each process has its part."""
    vocabulary, end_ms = Vocabulary(choose_vocabulary(history.types, SETS)), START_MS + 30 * DAY_MS
    moments = landmarks(history, SETS, START_MS, end_ms, np.random.default_rng(0))
    material = prepare(history, moments, vocabulary, fit_scaling(history.value), DEFAULT_EDGES_MS)
    torch.manual_seed(0)
    network = Network(Shape(hidden=8, head=8, dropout=0.0))
    first = np.searchsorted(moments.event, np.arange(len(history) + 1))
    begins, ends = history.first[:-1][:31], history.first[1:][:31]
    batch = pack(begins[team.rank :: team.size], ends[team.rank :: team.size], moments.event, first)
    part, settings = part_of(material, nothing), TrainerSettings(gradient_norm=1e9, device="cpu")
    run = Run(settings, False, np.random.default_rng(0), no_progress, lambda: False, lambda: 0.0, 0.0, team)
    with standardised(network, material.readout_LR):
        streams = PartStreams(part, network, len(history), run)
        streams.batch_weight = part.weight_L.sum() / team.size  # each has its share of the moments
        streams.carried = Carried(np.zeros(len(begins), bool), network.shape.recurrent)  # they are whole streams
        _step(network, part, batch, streams, torch.optim.SGD(network.parameters(), lr=0.1), run)
    return weights(network)


def test_a_step_of_two_is_a_step_of_one(tmp_path: Path) -> None:
    history = shop_history(60, 30)
    alone = step(ALONE, history)
    for of_rank in together(lambda team, _: step(team, history), quick_settings(tmp_path, device="cpu")):
        for name, tensor in of_rank.items():
            np.testing.assert_allclose(tensor, alone[name], atol=1e-5, err_msg=name)


def test_two_processes_end_with_one_model(tmp_path: Path) -> None:
    """On several shards, and on one; as good as that of one process."""
    settings = quick_settings(tmp_path, epochs=2, device="cpu")
    history = shop_history(600, 40)
    split = split_by_time(history, settings)
    one = fitted(history, settings)
    for shards in (in_memory(history, len(history)), in_memory(history, len(history) // 2)):

        def work(team: Team, own: TrainerSettings, shards: Any = shards) -> Any:
            made = train(shards, split, None, own, Metrics(), NOW, np.random.default_rng(0), no_progress, lambda: False, team)
            return weights(made.model.network), made.fitted.losses, made.fitted.train_losses, made.model.manifest.window

        (first, *about), (second, *_) = together(work, settings)
        for name, tensor in first.items():
            np.testing.assert_array_equal(tensor, second[name], err_msg=name)
        losses, train_losses, window = about
        assert window == one.model.manifest.window
        assert train_losses[-1] == pytest.approx(one.fitted.train_losses[-1], rel=0.1)
        assert min(losses) == pytest.approx(min(one.fitted.losses), rel=0.25)  # of some dozens of users who are held out, and not the same


def torchrun(tmp_path: Path, **changes: Any) -> subprocess.Popen[str]:
    pyarrow.parquet.write_table(shop_table(300, 40), tmp_path / "events.parquet")
    settings = {"hidden": 8, "head": 8, "epochs": 2, "belief_steps": 5, "belief_states": 4, "min_users": 100, "min_events": 1000}
    settings |= {"registry": tmp_path / "registry", "gate_max_ece": 0.5, "report": "false", "threads": 1, **changes}
    environ = {f"STREAMSCORE_TRAINER_{name.upper()}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "trainer", "train"]
    return subprocess.Popen(
        [*command, "--input", str(tmp_path / "events.parquet")],
        env={**os.environ, **environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_torchrun_publishes_one_model(tmp_path: Path) -> None:
    running = torchrun(tmp_path)
    out, err = running.communicate()
    assert running.returncode == 0, err
    (version,) = (m.version for m in Registry(str(tmp_path / "registry")).versions())
    assert out.split()[1] == f"{version}:"
    assert len(out.splitlines()) == 1


def test_where_one_process_dies_the_others_end(tmp_path: Path) -> None:
    history = shop_history(200, 30)
    settings = quick_settings(tmp_path, device="cpu", belief_states=0)

    def work(team: Team, own: TrainerSettings) -> None:
        def dies(share: float, words: str) -> None:
            if team.rank == 1 and words == "pass 2":
                os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory is short

        with pytest.raises(RuntimeError, match=r"[Cc]onnection"):
            train(history, split_by_time(history, settings), None, own, Metrics(), NOW, np.random.default_rng(0), dies, lambda: False, team)
        os._exit(3)

    assert ended(work, settings) == [3, -signal.SIGKILL]

"""The training benchmark in a tiny form: both plain loops and ours run, and are told as a line of JSON."""

import json

import pytest

from bench.training import run
from trainer.settings import TrainerSettings


def test_a_tiny_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    settings = TrainerSettings(hidden=8, head=8, belief_states=2, belief_steps=2, epochs=1)
    assert run(3000, 0.2, settings, as_json=True) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["passes"] == 1
    assert 2000 < facts["events"] < 4000
    assert facts["times_plain"] == pytest.approx(facts["ours_events_per_cpu_s"] / facts["plain_events_per_cpu_s"], abs=0.02)
    assert min(facts[f"{name}_events_per_cpu_s"] for name in ("ours", "plain", "chunked")) > 0

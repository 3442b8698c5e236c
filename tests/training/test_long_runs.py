"""Memory stays flat over long training, many explanations and many figures; the demo serves a crowd.

The lengths here fit into the test suite; LONG_RUNS=1 takes those of the benchmarks.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FULL = bool(os.environ.get("LONG_RUNS"))
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory by glibc's rules")
def test_memory_stays_flat(tmp_path):
    lengths = [] if FULL else ["--steps", "200", "--images", "200", "--figures", "20"]
    command = [sys.executable, BENCHMARKS / "memory.py", *lengths, "--output", tmp_path / "result.json"]
    worker = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert worker.returncode == 0, worker.stdout[-3000:] + worker.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["runs"].keys() == {"training steps", "explained images", "saved figures"}
    for name, run in result["runs"].items():
        readings = run["mib_after_each_tenth"]
        assert len(readings) == 10
        # From a fifth of the way on; one lost image or figure each time would take more.
        assert readings[-1] - readings[1] < 4.0, (name, readings)


@pytest.fixture
def demo_load(monkeypatch):
    pytest.importorskip("gradio_client")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("demo_load", BENCHMARKS / "demo_load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")  # gradio's client leaves sockets to the garbage collector
def test_crowded_demos_answer_every_visitors_own_picture(demo_load):
    """Every visitor of a crowded demo gets the answer to its own picture."""
    users = 50 if FULL else 6
    result = demo_load.run(users=users, seconds=60 if FULL else 2, epochs=0.1)
    assert result["different_answers_expected"] == users
    assert result["answers"] >= users
    assert (result["wrong_answers"], result["errors"], result["errors_in_log"]) == (0, [], 0)

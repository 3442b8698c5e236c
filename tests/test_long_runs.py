"""Memory stays flat over long training, many explanations and many figures; the demo serves a crowd.

The default lengths fit into the test suite; LONG_RUNS=1 takes the full ones.
`python tests/test_long_runs.py STEPS IMAGES FIGURES` is the worker: it measures in a process of its own.
"""

import ctypes
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

FULL = bool(os.environ.get("LONG_RUNS"))
LENGTHS = {"training steps": 2000, "explained images": 2000, "saved figures": 200}
MAX_GROWTH = 4.0  # MiB from a fifth of the way to its end: below what one lost image or figure each time would take
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory by glibc's rules")
def test_memory_stays_flat(capsys):
    lengths = [length if FULL else length // 10 for length in LENGTHS.values()]
    worker = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *map(str, lengths)], capture_output=True, text=True, timeout=1800
    )
    assert worker.returncode == 0, worker.stderr[-3000:]
    memory = json.loads(worker.stdout.splitlines()[-1])
    with capsys.disabled():
        if FULL:
            print("\nMiB after each tenth:", memory)
    assert memory.keys() == LENGTHS.keys()
    for name, readings in memory.items():
        assert len(readings) == 10
        assert readings[-1] - readings[1] < MAX_GROWTH, (name, readings)


@pytest.fixture
def demo_load(monkeypatch):
    pytest.importorskip("gradio_client")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("demo_load", BENCHMARKS / "demo_load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")  # gradio's client leaves sockets to the garbage collector
def test_every_visitor_of_a_crowded_demo_gets_the_answer_to_its_own_picture(demo_load):
    users = 50 if FULL else 6
    result = demo_load.run(users=users, seconds=60 if FULL else 2, epochs=0.1)
    assert result["different_answers_expected"] == users
    assert result["answers"] >= users
    assert (result["wrong_answers"], result["errors"], result["errors_in_log"]) == (0, [], 0)


def resident() -> float:
    """MiB of this process that are in use."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free but not given back yet is no leak
    return round(psutil.Process().memory_info().rss / 2**20, 2)


def readings(step: Callable[[int], object], length: int) -> list[float]:
    """Memory after each tenth of so many steps."""
    found = []
    for number in range(length):
        step(number)
        if (number + 1) % (length // 10) == 0:
            found.append(resident())
    return found


def train(steps: int) -> list[float]:
    import torch
    from conftest import make_model
    from transformers import TrainerCallback

    from hf_shapley import ShapleyTrainer, ShapleyTrainingArguments

    found = []

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % (steps // 10) == 0:
                found.append(resident())

    data = [{"pixel_values": torch.randn(3, 16, 24), "labels": torch.tensor(i % 5)} for i in range(40)]
    with tempfile.TemporaryDirectory() as folder:
        args = ShapleyTrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            save_steps=steps // 10,
            save_total_limit=1,
            logging_steps=10,
            dataloader_pin_memory=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        model = make_model("vit", attribution_head="votes+influence")
        ShapleyTrainer(model, args, train_dataset=data, callbacks=[Note()]).train()
    return found


def explain(images: int) -> list[float]:
    import numpy as np
    from conftest import make_model
    from PIL import Image
    from transformers import ViTImageProcessorPil, pipeline

    from hf_shapley import TASK

    processor = ViTImageProcessorPil(size={"height": 16, "width": 24})
    classifier = pipeline(TASK, model=make_model("convnext"), image_processor=processor, device="cpu")
    draw = np.random.default_rng(0)

    def step(number: int) -> None:
        picture = Image.fromarray(draw.integers(0, 256, (200, 300, 3), dtype=np.uint8))
        classifier(picture, overlay=True)
        classifier.model.explain(classifier.preprocess(picture)["pixel_values"], upsample=True)

    return readings(step, images)


def figures(count: int) -> list[float]:
    import torch
    from PIL import Image

    from hf_shapley import attribution_figure

    with tempfile.TemporaryDirectory() as folder:

        def step(number: int) -> None:
            figure = attribution_figure(Image.new("RGB", (300, 200)), torch.randn(2, 4, 6), ["a", "b"])
            figure.savefig(Path(folder) / "figure.png")

        return readings(step, count)


def main(lengths: list[int]) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    runs = zip(LENGTHS, (train, explain, figures), lengths, strict=True)
    print(json.dumps({name: run(length) for name, run, length in runs}))


if __name__ == "__main__":
    main([int(length) for length in sys.argv[1:]])

"""Two processes do what one does: training on the same global batch, and explaining the same data set."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model
from test_explain_dataset import contents, picture_dataset
from test_explain_dataset import run as run_explain
from torch.distributed.fsdp import fully_shard
from transformers import PrinterCallback

from hf_shapley import (
    ShapleyTrainer,
    ShapleyTrainingArguments,
    ShapleyViTForImageClassification,
    coalitions_to_ids,
    sample_coalitions,
)
from hf_shapley.training.digits import EVERYTHING_FLOWS

STEPS = 3
TERMS = ("loss", "loss_classification", "loss_coalition", "loss_shapley", "loss_readout", "grad_norm")
RUNS = [("vit", 1), ("vit", 2), ("convnext", 1)]  # backbone, accumulated batches; 8 images in each global batch
# The oldest torch's sharding waits for events of a stream, which on a CPU has none there.
SHARDED = ["vit", "convnext"] if hasattr(torch.cpu.Stream, "record_event") else []


def images(count: int = 8 * STEPS) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(count, 3, 16, 24, generator=generator)
    labels = torch.randint(0, 5, (count,), generator=generator)
    return [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels, strict=True)]


def train(folder: Path, backbone: str, accumulation: int, processes: int) -> ShapleyTrainer:
    """Three steps of plain gradient descent on eight images each, every step logged."""
    args = ShapleyTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8 // processes // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        logging_steps=1,
        optim="sgd",
        learning_rate=0.1,
        attribution_learning_rate=0.1,
        **EVERYTHING_FLOWS | {"coalition_weight": 0.5, "shapley_weight": 2.0},
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    model = make_model(backbone, head="adapted")
    trainer = ShapleyTrainer(model, args, train_dataset=images())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def attribution_error(folder: Path) -> dict[str, float]:
    """What an evaluation says of it."""
    args = ShapleyTrainingArguments(
        str(folder),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        attribution_error_images=3,
    )
    metrics = ShapleyTrainer(make_model("vit"), args, eval_dataset=images(10)).evaluate()
    return {name: value for name, value in metrics.items() if "attribution_error" in name}


def joint_loss(model) -> torch.Tensor:
    """Something that every output and parameter takes part in."""
    examples = images(4)
    pixel_values, labels = (torch.stack([row[name] for row in examples]) for name in ("pixel_values", "labels"))
    ids = coalitions_to_ids(sample_coalitions(4, 1, num_players=24, generator=torch.Generator().manual_seed(2)))
    output = model(pixel_values, ids, labels, num_coalitions=2, sums_only=True, num_with_gradient=2)
    return output.loss + output.coalition_gains.square().mean() + output.coalition_attributions.square().mean()


def logged(trainer: ShapleyTrainer) -> list[dict[str, float]]:
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{name: entry[name] for name in TERMS if name in entry} for entry in history]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """Folder of what two processes made, started once for all tests."""
    folder = tmp_path_factory.mktemp("two_processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, __file__, str(folder)], env=environment, timeout=300, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("backbone, accumulation", RUNS)
def test_two_processes_learn_what_one_does(backbone, accumulation, two_processes, tmp_path):
    """Two processes train to the losses and weights of one process on the same global batch."""
    single = train(tmp_path, backbone, accumulation=1, processes=1)
    name = f"{backbone}-{accumulation}"
    found = torch.load(two_processes / f"{name}.pt")
    history = json.loads((two_processes / f"{name}.json").read_text())
    for ours, theirs in zip(history, logged(single), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    start = make_model(backbone, head="adapted").state_dict()
    for name, tensor in single.model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=2e-6, rtol=1e-4)
    assert any((tensor - start[name]).abs().max() > 1e-3 for name, tensor in found.items())


def test_two_processes_measure_the_attribution_error_of_one(two_processes, tmp_path):
    """The first images of the whole data set, by one process; both know the number and end alike."""
    expected = attribution_error(tmp_path)
    assert expected["eval_attribution_error"] > 0
    for rank in range(2):
        assert json.loads((two_processes / f"error-{rank}.json").read_text()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("backbone", SHARDED)
def test_sharded_parameters_have_the_gradients_of_whole_ones(backbone, two_processes):
    """Parameters sharded over two processes have the gradients of whole ones."""
    found = torch.load(two_processes / f"sharded-{backbone}.pt")
    model = make_model(backbone, head="adapted").train()
    joint_loss(model).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["memory", "stream"])
def test_two_processes_explain_as_one(kind, two_processes, tmp_path):
    run_explain(tmp_path, picture_dataset())
    assert contents(two_processes / kind) == contents(tmp_path)
    computed = [int((two_processes / f"{kind}-{rank}").read_text()) for rank in range(2)]
    assert sum(computed) == 23
    assert min(computed) >= 7


def work(folder: Path) -> None:
    """What each of the two processes does."""
    rank = int(os.environ["RANK"])
    for backbone, accumulation in RUNS:
        trainer = train(folder / "trainer", backbone, accumulation, processes=2)
        if rank == 0:
            name = f"{backbone}-{accumulation}"
            torch.save(trainer.accelerator.unwrap_model(trainer.model).state_dict(), folder / f"{name}.pt")
            (folder / f"{name}.json").write_text(json.dumps(logged(trainer)))
    (folder / f"error-{rank}.json").write_text(json.dumps(attribution_error(folder / "trainer")))
    data = picture_dataset()
    for kind, dataset in {"memory": data, "stream": data.to_iterable_dataset()}.items():
        result = run_explain(folder / kind, dataset)
        (folder / f"{kind}-{rank}").write_text(str(result.computed_rows))
    for backbone in SHARDED:
        layers = ShapleyViTForImageClassification._no_split_modules if backbone == "vit" else []
        model = make_model(backbone, head="adapted").train()
        for module in model.modules():
            if type(module).__name__ in layers:  # as accelerate does it
                fully_shard(module)
        fully_shard(model)
        joint_loss(model).backward()
        torch.save(
            {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()},
            folder / f"sharded-{backbone}.pt" if rank == 0 else os.devnull,
        )
    torch.distributed.barrier()
    # Freeing sharded parameters on gloo sometimes waits for ever: leave without it.
    os._exit(0)


if __name__ == "__main__":
    work(Path(sys.argv[1]))

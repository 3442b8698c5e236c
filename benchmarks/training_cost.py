"""Cost of a joint training step (full image, one pair of coalitions, Shapley regression) against a plain one.

Both are forward, backward and AdamW step on the same images, timed in turn, each in a process of its own; these are
started several times. The joint step is the trainer's own.

    python benchmarks/training_cost.py --models vit-tiny convnext-tiny --repeats 5 --starts 3
"""

import argparse
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from common import (
    RESULTS,
    STEP,
    VOTES,
    VOTES_AND_INFLUENCE,
    build,
    compare,
    interleave,
    own_processes,
    pool,
    print_table,
    timed_there,
    write_result,
)
from torch.optim import AdamW

from hf_shapley import ShapleyTrainer, ShapleyTrainingArguments
from hf_shapley.training.digits import EVERYTHING_FLOWS

VARIANTS: dict[str, tuple[dict, dict]] = {  # name -> (training arguments, model options)
    "joint": (EVERYTHING_FLOWS, VOTES),
    "joint, quarter learns through v(S)": (EVERYTHING_FLOWS | {"value_gradient_fraction": 0.25}, VOTES),
    "joint, eighth learns through v(S)": (EVERYTHING_FLOWS | {"value_gradient_fraction": 0.125}, VOTES),
    "joint, v(S) detached": (EVERYTHING_FLOWS | {"value_gradient": 0.0}, VOTES),
    "joint, influence head": (EVERYTHING_FLOWS, VOTES_AND_INFLUENCE),
    "recommended": ({}, {}),
    "recommended, frozen": ({}, {}),
    "frozen with adapters": ({}, {"coalition_adapter_size": 64}),
}
GOALS = {"vit": 2.05, "convnext": 2.2}


Precision = Callable[[], AbstractContextManager]  # such as one that gives `torch.autocast`, around the forward


def plain_step(model, inputs: dict, precision: Precision = nullcontext) -> Callable[[], None]:
    """A stock training step."""
    optimizer = AdamW(model.parameters(), fused=True)

    def step() -> None:
        with precision():
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def joint_step(model, inputs: dict, folder: str, precision: Precision = nullcontext, **options) -> Callable[[], None]:
    """The trainer's step."""
    args = ShapleyTrainingArguments(
        folder,
        per_device_train_batch_size=len(inputs["labels"]),
        use_cpu=inputs["labels"].device.type == "cpu",
        **options,
    )
    trainer = ShapleyTrainer(model, args)
    trainer.current_gradient_accumulation_steps = 1
    optimizer = AdamW(model.parameters(), fused=True)

    def step() -> None:
        with precision():
            loss = trainer.compute_loss(model, inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        trainer.state.global_step += 1

    return step


def build_joint(shape: str, name: str, **options) -> tuple[torch.nn.Module, dict]:
    """The model of a variant, in training mode, and its training arguments."""
    args, changed = VARIANTS[name]
    model = build(shape, **changed, **options).train()
    if "frozen" in name:
        model.freeze_classifier()
    return model, args


def prepare(shape: str, name: str, batch_size: int, threads: int, folder: str) -> None:
    """Build the model and the step that this process times."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "pixel_values": torch.randn(batch_size, 3, 224, 224, generator=generator),
        "labels": torch.randint(0, 1000, (batch_size,), generator=generator),
    }
    if name == "plain":
        STEP["step"] = plain_step(build(shape, plain=True).train(), inputs)
        return
    model, args = build_joint(shape, name)
    STEP["step"] = joint_step(model, inputs, folder, **args)


def measure(shape: str, name: str, batch_size: int, repeats: int, starts: int, threads: int) -> dict[str, dict]:
    """Time the plain step and a joint one in turn."""
    times: dict = {}
    for _ in range(starts):
        with tempfile.TemporaryDirectory() as folder, own_processes(["plain", name]) as processes:
            for kind, process in processes.items():
                process.submit(prepare, shape, kind, batch_size, threads, folder).result()
            # A process takes its memory over the first steps.
            pool(times, interleave(processes, repeats=repeats, warmup=4, clock=timed_there))
    return compare(times, "plain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit-tiny", "convnext-tiny"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--starts", type=int, default=3, help="of the processes; each repeats so often")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default=RESULTS / "training_cost.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)  # as in the processes that measure, for the result file to say so
    tables: dict[str, dict] = {}
    for shape in args.models:
        tables[shape] = {}
        for name in args.variants:
            pair = measure(shape, name, args.batch_size, args.repeats, args.starts, args.threads)
            tables[shape].setdefault("plain", pair["plain"])
            tables[shape][name] = pair[name] | {"plain_wall_ms": pair["plain"]["wall_ms"]}
        goal = GOALS[shape.split("-")[0]]
        print_table(
            f"{shape}, batch {args.batch_size}, 224 x 224 (goal of the joint step: at most {goal}x)", tables[shape]
        )
    settings = {
        "batch_size": args.batch_size,
        "image_size": 224,
        "repeats": args.repeats,
        "starts": args.starts,
        "goals": GOALS,
    }
    write_result(args.output, {"settings": settings, "models": tables})


if __name__ == "__main__":
    main()

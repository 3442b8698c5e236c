"""Cost of an explained prediction (logits and every patch's Shapley value for every label) against a plain one.

Stock model and ours, same shape, run in turn without gradients; memory is what a call holds at its worst moment, by
the allocator's own account, weights included. Beside the time stands the ratio of floating point operations, counted.

    python benchmarks/explain_latency.py --models vit-tiny vit-base convnext-tiny --batch-sizes 1 8 --repeats 30
"""

import argparse
from collections.abc import Callable

import torch
from common import RESULTS, build, compare, interleave, operations, peak_memory, print_table, write_result

from hf_shapley import fine_tuning_recipe

HEADS: dict[str, dict] = {
    "votes": {"attribution_head": "votes"},
    "votes+influence": {"attribution_head": "votes+influence"},
}
GOAL = {"time": 1.02, "memory": 1.1}


def forward(model, pixel_values: torch.Tensor, **options) -> Callable[[], object]:
    """A forward pass without gradients."""

    @torch.inference_mode()
    def step() -> object:
        return model(pixel_values, **options)

    return step


def measure(shape: str, batch_size: int, repeats: int, num_labels: int) -> dict:
    """Time, operations and memory of both models."""
    pixel_values = torch.randn(batch_size, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    plain = build(shape, plain=True, num_labels=num_labels).eval()
    steps = {"plain": forward(plain, pixel_values)}
    heads = HEADS | {"fine_tuning_recipe": fine_tuning_recipe(backbone=shape.split("-")[0])[0]}
    for name, options in heads.items():
        model = build(shape, num_labels=num_labels, **options).eval()
        steps[f"explained, {name}"] = forward(model, pixel_values)
    table = compare(interleave(steps, repeats=repeats), "plain")
    weights = sum(parameter.nbytes for parameter in plain.parameters())
    peaks = {name: weights + peak_memory(step) for name, step in steps.items()}
    counted = {name: operations(step) for name, step in steps.items()}
    for name, row in table.items():
        row["operations_ratio"] = round(counted[name] / counted["plain"], 4)
        row |= {"peak_mib": round(peaks[name] / 2**20, 2), "memory_ratio": round(peaks[name] / peaks["plain"], 4)}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit-tiny", "vit-base", "convnext-tiny"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--num-labels", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default=RESULTS / "explain_latency.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tables = {}
    for shape in args.models:
        for batch_size in args.batch_sizes:
            table = measure(shape, batch_size, args.repeats, args.num_labels)
            tables.setdefault(shape, {})[f"batch {batch_size}"] = table
            print_table(
                f"{shape}, batch {batch_size}, {args.num_labels} labels (goal: at most {GOAL['time']}x)", table
            )
            for what in ("operations", "memory"):
                print(f"  {what}", {name: row[f"{what}_ratio"] for name, row in table.items()})
    settings = {"image_size": 224, "num_labels": args.num_labels, "repeats": args.repeats, "goals": GOAL}
    write_result(args.output, {"settings": settings, "models": tables})


if __name__ == "__main__":
    main()

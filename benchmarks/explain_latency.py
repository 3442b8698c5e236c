"""Cost of an explained prediction (logits and every patch's Shapley value for every label) against a plain one.

Stock model and ours, same shape, each in a process of its own, run in turn without gradients; the processes are
started several times. Memory is what a call holds at its worst moment, by the allocator's own account, and its model's
weights. Beside the time stands the ratio of floating point operations, counted.

    python benchmarks/explain_latency.py --models vit-tiny vit-base convnext-tiny --batch-sizes 1 8 --repeats 10
"""

import argparse
from collections.abc import Callable

import torch
from common import (
    RESULTS,
    STEP,
    VOTES,
    VOTES_AND_INFLUENCE,
    build,
    compare,
    interleave,
    operations,
    own_processes,
    peak_memory,
    pool,
    print_table,
    timed_there,
    write_result,
)

HEADS: dict[str, dict] = {"votes": VOTES, "votes+influence": VOTES_AND_INFLUENCE, "recommended": {}}
GOAL = {"time": 1.02, "memory": 1.1}


def forward(model, pixel_values: torch.Tensor, **options) -> Callable[[], object]:
    """A forward pass without gradients."""

    @torch.inference_mode()
    def step() -> object:
        return model(pixel_values, **options)

    return step


def prepare(shape: str, options: dict, batch_size: int, threads: int) -> int:
    """Build the model and keep the forward pass that this process times; gives the bytes of the weights."""
    torch.set_num_threads(threads)
    pixel_values = torch.randn(batch_size, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    model = build(shape, **options).eval()
    STEP["step"] = forward(model, pixel_values)
    return sum(parameter.nbytes for parameter in model.parameters())


def kept(count: Callable[[Callable], int]) -> int:
    """What a function says of the forward pass that this process keeps."""
    return count(STEP["step"])


def measure(shape: str, batch_size: int, repeats: int, starts: int, num_labels: int, threads: int) -> dict:
    """Time, operations and memory of both models."""
    models = {"plain": {"plain": True}} | {f"explained, {name}": options for name, options in HEADS.items()}
    times: dict = {}
    for _ in range(starts):
        with own_processes(models) as processes:
            weights = {
                name: process.submit(
                    prepare, shape, {"num_labels": num_labels, **models[name]}, batch_size, threads
                ).result()
                for name, process in processes.items()
            }
            # A process takes its memory over the first calls.
            pool(times, interleave(processes, repeats=repeats, warmup=4, clock=timed_there))
            peaks, counted = (
                {name: process.submit(kept, count).result() for name, process in processes.items()}
                for count in (peak_memory, operations)
            )
    table = compare(times, "plain")
    for name, row in table.items():
        row["operations_ratio"] = round(counted[name] / counted["plain"], 4)
        peak, plain = (weights[each] + peaks[each] for each in (name, "plain"))
        row |= {"peak_mib": round(peak / 2**20, 2), "memory_ratio": round(peak / plain, 4)}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit-tiny", "vit-base", "convnext-tiny"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--starts", type=int, default=3, help="of the processes; each repeats so often")
    parser.add_argument("--num-labels", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default=RESULTS / "explain_latency.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tables = {}
    for shape in args.models:
        for batch_size in args.batch_sizes:
            table = measure(shape, batch_size, args.repeats, args.starts, args.num_labels, args.threads)
            tables.setdefault(shape, {})[f"batch {batch_size}"] = table
            print_table(
                f"{shape}, batch {batch_size}, {args.num_labels} labels (goal: at most {GOAL['time']}x)", table
            )
            for what in ("operations", "memory"):
                print(f"  {what}", {name: row[f"{what}_ratio"] for name, row in table.items()})
    settings = {
        "image_size": 224,
        "num_labels": args.num_labels,
        "repeats": args.repeats,
        "starts": args.starts,
        "goals": GOAL,
    }
    write_result(args.output, {"settings": settings, "models": tables})


if __name__ == "__main__":
    main()

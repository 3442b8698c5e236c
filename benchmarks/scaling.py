"""Cost against players (16 to 1,024), labels (10 to 10,000) and processes, beside the stock model at the same size.

Processor time per image, one thread; each batch holds about as many players, so that fixed costs weigh alike. All
sizes are timed in turn. Two processes explain a data set with a thread each, on as many idle cores.

    python benchmarks/scaling.py --repeats 7
    python benchmarks/scaling.py --parts processes
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import RESULTS, build, compare, interleave, peak_memory, write_result
from explain_latency import forward
from training_cost import joint_step, plain_step

from hf_shapley import coalitions_to_ids, sample_coalitions

MODELS = ("vit-tiny", "convnext-atto")
GRIDS = (4, 8, 14, 20, 32)  # 16 to 1,024 players
LABELS = (10, 100, 1000, 10_000)
PLAYERS_IN_BATCH = 1024
BASELINES = {  # kind -> what it is a multiple of
    "plain forward": "plain forward",
    "explained forward": "plain forward",
    "best label explained": "plain forward",
    "forward with a pair": "plain forward",
    "plain step": "plain step",
    "joint step": "plain step",
}


def cases(shape: str, grids: tuple[int, ...], labels: tuple[int, ...]) -> list[dict]:
    """Every grid and number of labels, with the image size and the batch that go with it."""
    cell = 16 if shape.startswith("vit") else 32
    return [
        {"players": grid**2, "labels": count, "image_size": cell * grid, "batch": max(1, PLAYERS_IN_BATCH // grid**2)}
        for grid in grids
        for count in labels
    ]


def steps_of(shape: str, case: dict, folder: str) -> dict:
    """What is timed at one size."""
    generator = torch.Generator().manual_seed(0)
    batch, edge = case["batch"], case["image_size"]
    pixel_values = torch.randn(batch, 3, edge, edge, generator=generator)
    inputs = {
        "pixel_values": pixel_values,
        "labels": torch.randint(0, case["labels"], (batch,), generator=generator),
    }
    ids = coalitions_to_ids(sample_coalitions(batch, 1, num_players=case["players"], generator=generator))
    options = {"num_labels": case["labels"], "image_size": edge}
    plain, ours = (build(shape, plain=is_plain, **options).eval() for is_plain in (True, False))

    @torch.inference_mode()
    def pair() -> object:
        return ours(pixel_values, coalition_ids=ids, num_coalitions=2, sums_only=True)

    return {
        "plain forward": forward(plain, pixel_values),
        "explained forward": forward(ours, pixel_values),
        "best label explained": forward(ours, pixel_values, attributed=1),
        "forward with a pair": pair,
        "plain step": plain_step(build(shape, plain=True, **options).train(), inputs),
        "joint step": joint_step(build(shape, **options).train(), inputs, folder),
    }


def sweep(shape: str, sizes: list[dict], repeats: int) -> list[dict]:
    """Time everything at every size in turn: one row per size."""
    with tempfile.TemporaryDirectory() as folder:
        steps = [steps_of(shape, case, folder) for case in sizes]
        times = interleave(
            {f"{kind} {i}": step for i, group in enumerate(steps) for kind, step in group.items()},
            repeats=repeats,
            warmup=1,
        )
    rows = []
    for i, (case, group) in enumerate(zip(sizes, steps, strict=True)):
        row: dict = dict(case)
        for kind, baseline in BASELINES.items():
            entry = compare({name: times[f"{name} {i}"] for name in (kind, baseline)}, baseline)[kind]
            row[kind] = {
                "cpu_ms_per_image": round(entry["cpu_ms"] / case["batch"], 3),
                "cpu_ratio": entry["cpu_ratio"],
                "wall_ratio": entry["wall_ratio"],
                "peak_mib": round(peak_memory(group[kind]) / 2**20, 1),
            }
        rows.append(row)
    return rows


def exponents(rows: list[dict], size: str) -> dict[str, float]:
    """Slope of log cost per image against log size, by least squares; 1 is linear."""

    def slope(kind: str) -> float:
        costs = [row[kind]["cpu_ms_per_image"] for row in rows]
        logs = [[torch.tensor(x).log().item() for x in values] for values in ([row[size] for row in rows], costs)]
        return round(statistics.linear_regression(*logs).slope, 3)

    return {kind: slope(kind) for kind in BASELINES}


def explain_pictures(folder: Path, images: int) -> None:
    """One process of a run over noise; the main one leaves what it took."""
    from datasets import Dataset, Features, Image
    from PIL import Image as PILImage
    from transformers import ViTImageProcessorPil

    from hf_shapley import explain_dataset

    torch.set_num_threads(1)
    noise = torch.randint(0, 256, (64, 224, 224, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pictures = [PILImage.fromarray(pixels.numpy()) for pixels in noise]
    data = Dataset.from_dict({"image": pictures}, features=Features({"image": Image()}))
    data = data.select([i % len(pictures) for i in range(images)])
    model, processor = build("vit-tiny"), ViTImageProcessorPil(size={"height": 224, "width": 224})
    before = time.process_time()
    run = explain_dataset(
        model, data, folder / "rows", image_processor=processor, batch_size=8, shard_size=16, show_progress=False
    )
    record = {"seconds": run.seconds, "cpu_seconds": time.process_time() - before, "rows": run.computed_rows}
    (folder / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(record))


def explain_with(processes: int, images: int, folder: Path) -> tuple[list[dict], dict[str, bytes]]:
    """Run that many processes; what each of them took, and the files they left."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launcher, __file__, "--worker", str(folder), "--images", str(images)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{processes} processes failed:\n{done.stderr[-2000:]}")
    records = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    return records, {path.name: path.read_bytes() for path in (folder / "rows").glob("part-*.parquet")}


def measure_processes(images: int, repeats: int) -> dict:
    """One and two processes in turn: seconds, their ratio, and whether the files are the same.

    The ratio of processor times, one process against the busier of two, is what two idle cores would give.
    """
    found: dict[int, list[list[dict]]] = {1: [], 2: []}
    files = []
    for _ in range(repeats):
        for processes in found:
            with tempfile.TemporaryDirectory() as folder:
                records, written = explain_with(processes, images, Path(folder))
            found[processes].append(records)
            files.append(written)
    seconds = {n: [max(record["seconds"] for record in run) for run in runs] for n, runs in found.items()}
    cpu = {n: [max(record["cpu_seconds"] for record in run) for run in runs] for n, runs in found.items()}
    return {
        "images": images,
        "seconds": {n: [round(s, 2) for s in values] for n, values in seconds.items()},
        "cpu_seconds_of_the_busiest": {n: [round(s, 2) for s in values] for n, values in cpu.items()},
        "speedup": round(statistics.median(a / b for a, b in zip(seconds[1], seconds[2], strict=True)), 3),
        "cpu_speedup": round(statistics.median(a / b for a, b in zip(cpu[1], cpu[2], strict=True)), 3),
        "same_files": all(written == files[0] for written in files) and len(files[0]) == -(-images // 16),
    }


def circumstances() -> dict:
    """Command that measures a part, and the machine's load over 1, 5 and 15 minutes before it."""
    command = shlex.join(["python", "benchmarks/scaling.py", *sys.argv[1:]])
    return {"command": command, "load_average": [round(load, 2) for load in os.getloadavg()]}


def print_rows(shape: str, rows: list[dict], size: str) -> None:
    """Print one line per size."""
    print(f"{shape}: against {size}")
    for row in rows:
        found = [(kind, row[kind]["cpu_ms_per_image"], row[kind]["cpu_ratio"]) for kind in BASELINES]
        print(f"  {row[size]:>6}  " + "  ".join(f"{kind} {cost:.1f} ms ({ratio:.2f}x)" for kind, cost, ratio in found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--parts", nargs="+", default=["players", "labels", "processes"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--images", type=int, default=512, help="of the data set that processes explain")
    parser.add_argument("--process-repeats", type=int, default=3)
    parser.add_argument("--output", default=RESULTS / "scaling.json")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        explain_pictures(args.worker, args.images)
        return
    torch.set_num_threads(1)
    path = Path(args.output)
    # Parts measured at another time stay as they are, each with its own command and load.
    parts = json.loads(path.read_text())["parts"] if path.exists() else {}
    for part, grids, labels in (("players", GRIDS, (1000,)), ("labels", (14,), LABELS)):
        if part in args.parts:
            parts[part] = {**circumstances(), "repeats": args.repeats}
            for shape in args.models:
                rows = sweep(shape, cases(shape, grids, labels), args.repeats)
                print_rows(shape, rows, part)
                parts[part][shape] = {"rows": rows, "exponents": exponents(rows, part)}
                print("  exponents", parts[part][shape]["exponents"])
    if "processes" in args.parts:
        parts["processes"] = {**circumstances(), "repeats": args.process_repeats}
        parts["processes"] |= measure_processes(args.images, args.process_repeats)
        print(parts["processes"])
    settings = {"models": args.models, "players_in_batch": PLAYERS_IN_BATCH, "threads": 1}
    write_result(path, {"settings": settings, "parts": parts})


if __name__ == "__main__":
    main()

"""Training steps and predictions in bfloat16 on a GPU: images per second, share of the chip's peak, memory.

Timed in turn, each in a process of its own (a model's are there at once, memory too): the stock step, joint ones (the
trainer's own), and the explainer's step of FastSHAP (arXiv:2107.07436) and ViT-Shapley (arXiv:2206.05282), which
learns from a second model's values of 32 masked copies of each image. Peak is the chip's dense bfloat16 rate as its
maker states it; what a step computes is counted by torch. Compiling takes minutes a model.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --models vit-test --batch-size 2 --image-size 16 --masks 4 --repeats 1
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import RESULTS, STEP, build, compare, interleave, own_processes, peak_memory, timed_there, write_result
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode
from training_cost import Precision, build_joint, joint_step, plain_step

from hf_shapley import sample_coalitions, shapley_loss

# Dense bfloat16, TFLOP/s; the first name that is part of the device's counts.
PEAKS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
JOINT = {  # name -> variant of training_cost.py
    "joint step": "joint",
    "recommended step": "recommended",
    "recommended step, frozen": "recommended, frozen",
}
MASKED = "step with masked copies"
STEPS = ("plain step", *JOINT, MASKED, "plain forward", "explained forward")


def peak_of(device: str) -> float | None:
    """TFLOP/s of this device, where known."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((peak for chip, peak in PEAKS.items() if chip in name), None)


def masked_images(pixel_values: torch.Tensor, coalitions: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Copies of (B, C, H, W) with the patches outside of coalitions (B, M, N) at 0: (B M, C, H, W)."""
    height, width = pixel_values.shape[-2:]
    maps = coalitions.unflatten(-1, grid).repeat_interleave(height // grid[0], -2)
    maps = maps.repeat_interleave(width // grid[1], -1).unsqueeze(2)  # (B, M, 1, H, W)
    return (pixel_values.unsqueeze(1) * maps).flatten(0, 1)


def masked_copies_step(surrogate, explainer, inputs: dict, masks: int, precision: Precision) -> Callable[[], None]:
    """One step of an explainer that regresses a frozen model's values of masked copies of each image."""
    optimizer = AdamW(explainer.parameters(), fused=True)
    pixel_values = inputs["pixel_values"]
    batch = len(pixel_values)
    grid = explainer.grid_size(*pixel_values.shape[-2:])
    generator = torch.Generator(pixel_values.device).manual_seed(0)

    def step() -> None:
        coalitions = sample_coalitions(batch, masks, num_players=grid[0] * grid[1], generator=generator)
        with torch.no_grad(), precision():
            copies = masked_images(pixel_values, coalitions, grid)
            values = torch.cat([surrogate(part).logits.float() for part in copies.split(4 * batch)])
            empty = surrogate(torch.zeros_like(pixel_values[:1])).logits.float()
        with precision():
            attributions = explainer(pixel_values).attributions
        shapley_loss(attributions, coalitions, values.unflatten(0, (batch, masks)) - empty).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def predict(model, pixel_values: torch.Tensor, precision: Precision) -> Callable[[], object]:
    """A forward without gradients."""

    @torch.no_grad()
    def step() -> object:
        with precision():
            return model(pixel_values)

    return step


def make_step(shape: str, name: str, args: argparse.Namespace, folder: str):
    """The step of this name, and the models that it runs."""
    generator = torch.Generator().manual_seed(0)
    size = (args.batch_size, 3, args.image_size, args.image_size)
    pixel_values = torch.randn(size, generator=generator).to(args.device)
    if args.channels_last:
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (args.batch_size,), generator=generator).to(args.device)
    inputs = {"pixel_values": pixel_values, "labels": labels}
    models: list[torch.nn.Module] = []

    def precision() -> torch.autocast:
        return torch.autocast(args.device, torch.bfloat16)

    def placed(model: torch.nn.Module) -> torch.nn.Module:
        model = model.to(args.device)
        models.append(model.to(memory_format=torch.channels_last) if args.channels_last else model)
        return models[-1]

    def make(*, plain: bool = False, train: bool = True) -> torch.nn.Module:
        return placed(build(shape, plain=plain, image_size=args.image_size).train(train))

    if name == "plain step":
        return plain_step(make(plain=True), inputs, precision), models
    if name == MASKED:
        return masked_copies_step(make(plain=True, train=False), make(), inputs, args.masks, precision), models
    if name.endswith("forward"):
        return predict(make(plain=name.startswith("plain"), train=False), pixel_values, precision), models
    model, options = build_joint(shape, JOINT[name], image_size=args.image_size)
    return joint_step(placed(model), inputs, folder, precision, **options), models


def prepare(shape: str, name: str, mode: str, args: argparse.Namespace, folder: str) -> int:
    """Make the step that this process times.

    Returns:
        The floating-point operations of matrix products, convolutions and attention in a call that is not compiled.
    """
    step, models = make_step(shape, name, args, folder)
    with FlopCounterMode(display=False) as counter:
        step()
    if mode == "compiled":
        for model in models:
            model.compile(fullgraph=True, dynamic=False)  # whole, or an error: never in part
    try:
        for _ in range(args.warmup):
            step()
    except torch._dynamo.exc.TorchDynamoException as error:
        raise RuntimeError(f"{shape}, {name}: {error}") from None  # the original does not pass between processes
    if args.device == "cuda":
        torch.cuda.empty_cache()
    STEP["step"] = step
    return counter.get_total_flops()


def step_memory(device: str) -> int:
    """Bytes that it takes at its worst moment."""
    return peak_memory(STEP["step"], device)


def measure(shape: str, mode: str, args: argparse.Namespace) -> dict[str, dict]:
    """Time, rate and memory of each step of one model; what is compiled is so before anything is timed."""
    with tempfile.TemporaryDirectory() as folder, own_processes(args.steps) as processes:
        begun = {name: process.submit(prepare, shape, name, mode, args, folder) for name, process in processes.items()}
        flops = {name: future.result() for name, future in begun.items()}
        times = interleave(processes, repeats=args.repeats, clock=timed_there)
        memory = {name: process.submit(step_memory, args.device).result() for name, process in processes.items()}
    return {name: row_of(name, times, flops[name], memory[name], args) for name in args.steps}


def baseline_of(name: str) -> str:
    """What stands for ratio 1."""
    return "plain forward" if name.endswith("forward") else "plain step"


def row_of(name: str, times: dict, flops: int, memory: int, args: argparse.Namespace) -> dict[str, float | None]:
    """What the result file says of a step."""
    baseline = baseline_of(name)
    row = compare({key: times[key] for key in (name, baseline)}, baseline)[name]
    rate = flops / row["wall_ms"] / 1e9  # TFLOP/s
    peak = args.peak_tflops or peak_of(args.device)
    return row | {
        "images_per_second": round(1000 * args.batch_size / row["wall_ms"], 1),
        "tflop_per_second": round(rate, 2),
        "share_of_peak": round(rate / peak, 4) if peak else None,
        "peak_memory_gib": round(memory / 2**30, 3),
    }


def print_rows(title: str, table: dict[str, dict]) -> None:
    """Print one line per step."""
    print(title)
    for name, row in table.items():
        share = "" if row["share_of_peak"] is None else f"  {100 * row['share_of_peak']:.1f} % of peak"
        print(
            f"  {name:<32} {row['wall_ms']:>9.1f} ms  {row['wall_ratio']:>6.3f}x"
            f"  {row['images_per_second']:>9.1f} images/s  {row['peak_memory_gib']:>7.3f} GiB{share}"
        )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--models", nargs="+", default=["vit-base", "convnext-tiny", "convnext-base"])
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--steps", nargs="+", default=STEPS, choices=STEPS, help="with those they are compared to")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--masks", type=int, default=32, help="masked copies per image in the other methods' step")
    parser.add_argument("--channels-last", action="store_true", help="models and pixels in that memory format")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3, help="untimed calls of each step")
    parser.add_argument("--peak-tflops", type=float, help="of a chip that is not in the list, or at other clocks")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.json")
    args = parser.parse_args()
    missing = {baseline_of(name) for name in args.steps} - set(args.steps)
    if missing:
        parser.error(f"--steps needs {sorted(missing)} too, which the others are compared to")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device: give `--device cpu`, small models and another `--output` to try the code")
    return args


def main() -> None:
    """Measure one model after another; what is measured is in the file at once."""
    args = parse()
    tables: dict[str, dict] = {shape: {} for shape in args.models}
    settings = {
        name: value for name, value in vars(args).items() if name not in ("output", "models", "modes", "steps")
    }
    peak = args.peak_tflops or peak_of(args.device)
    for shape, mode in itertools.product(args.models, args.modes):
        tables[shape][mode] = table = measure(shape, mode, args)
        print_rows(f"{shape}, {mode}, batch {args.batch_size}, {args.image_size} x {args.image_size}", table)
        write_result(args.output, {"settings": settings, "peak_tflops": peak, "dtype": "bfloat16", "models": tables})


if __name__ == "__main__":
    main()

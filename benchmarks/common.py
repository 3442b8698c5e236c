"""What the benchmarks share: the machine, interleaved timing, peak memory, models and result files."""

import gc
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else the profiler writes its own start and stop to stderr

import torch
from torch import nn

import hf_shapley
from hf_shapley.backbones import FAMILIES

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "numpy")

# A head of each kind, beside the recommended one, which needs no options.
VOTES = {"vote_readout": "patches", "influence_own_layers": 0, "influence_layers": 0}
VOTES_AND_INFLUENCE = VOTES | {"influence_layers": 2, "influence_block": "mlp"}

# Shapes of the published models; weights are random, which changes no timing.
SHAPES: dict[str, dict] = {
    "vit-tiny": dict(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768),
    "vit-small": dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536),
    "vit-base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    "convnext-atto": dict(hidden_sizes=[40, 80, 160, 320], depths=[2, 2, 6, 2]),
    "convnext-tiny": dict(hidden_sizes=[96, 192, 384, 768], depths=[3, 3, 9, 3]),
    "convnext-base": dict(hidden_sizes=[128, 256, 512, 1024], depths=[3, 3, 27, 3]),
    # As the tests': 4 x 6 players on images of 16 x 24 pixels.
    "vit-test": dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=(16, 24),
        patch_size=4,
    ),
    "convnext-test": dict(
        hidden_sizes=[16, 32], depths=[1, 2], num_stages=2, patch_size=2, layer_scale_init_value=1.0
    ),
}


def build(shape: str, *, plain: bool = False, seed: int = 0, **options) -> nn.Module:
    """A random model of a published shape: ours, by default with the recommended head, or with `plain` the stock."""
    torch.manual_seed(seed)
    family = FAMILIES[shape.split("-")[0]]
    config = family.config(**{"num_labels": 1000, **SHAPES[shape], **options})
    return (family.plain_model if plain else family.model)(config)


def machine() -> dict:
    """Processor, cores, threads, memory and load of this machine, allocator settings, and its GPU if there is one."""
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": platform.platform(),
        "allocator": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("MALLOC_") or name in ("LD_PRELOAD", "THP_MEM_ALLOC_ENABLE")
        },
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what it is timed against."""
    found = {name: version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "hf_shapley": hf_shapley.__version__, **found}


def made_by() -> dict:
    """Command, date, machine and versions of a result."""
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(),
    }


def write_result(path: str | Path, result: dict) -> Path:
    """Write a result as JSON, with machine, versions, date and the command that made it; all of it or nothing."""
    path = Path(path)
    record = {**made_by(), **result}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(temporary, path)
    print(f"wrote {path.name}")
    return path


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(step: Callable[[], object]) -> dict[str, float]:
    """Seconds of one call: "wall", and the processor's "cpu", which is nearly blind to other processes."""
    gc.collect()
    synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    synchronize()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


STEP: dict[str, Callable[[], object]] = {}  # of a process that measures, under "step"


@contextmanager
def own_processes(names: Iterable[str]) -> Iterator[dict[str, ProcessPoolExecutor]]:
    """A process for each step, as in use: what one leaves in memory would change another's cost."""
    with ExitStack() as stack:
        context = get_context("spawn")
        yield {name: stack.enter_context(ProcessPoolExecutor(1, mp_context=context)) for name in names}


def time_step() -> dict[str, float]:
    """Seconds of one call of the step that this process keeps."""
    return timed(STEP["step"])


def timed_there(process: ProcessPoolExecutor) -> dict[str, float]:
    """Seconds of one call of the step that another process keeps."""
    return process.submit(time_step).result()


def interleave(
    steps: dict[str, Any], *, repeats: int, warmup: int = 2, clock: Callable[[Any], dict[str, float]] = timed
) -> dict[str, dict[str, list[float]]]:
    """Time several functions in turn, forwards and backwards, so that a change in the machine's load hits all alike.

    Args:
        steps: name -> function of no argument, or what else `clock` takes.
        repeats: timed rounds; each calls every function once.
        warmup: untimed rounds before.
        clock: calls the function and gives its seconds.

    Returns:
        name -> {"wall": seconds of each round, "cpu": processor seconds of each round}.
    """
    names = list(steps)
    times: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in names}
    for round_ in range(-warmup, repeats):
        for name in names if round_ % 2 == 0 else reversed(names):
            for kind, seconds in clock(steps[name]).items():
                if round_ >= 0:
                    times[name][kind].append(seconds)
    return times


def pool(times: dict[str, dict[str, list[float]]], more: dict[str, dict[str, list[float]]]) -> None:
    """Add the rounds of another start of the same processes: where their memory lies, and so their cost, differs."""
    for name, clocks in more.items():
        for clock, seconds in clocks.items():
            times.setdefault(name, {}).setdefault(clock, []).extend(seconds)


def compare(times: dict[str, dict[str, list[float]]], baseline: str) -> dict[str, dict[str, float]]:
    """Medians in milliseconds and, against the baseline, the median over rounds of the ratio within a round.

    Args:
        times: what [`interleave`] gives.
        baseline: name of the function that ratio 1 stands for.

    Returns:
        name -> {"wall_ms", "cpu_ms", "wall_ratio", "cpu_ratio", "wall_ratio_low", "wall_ratio_high" (quartiles)}.
    """
    table = {}
    for name, clocks in times.items():
        row = {}
        for clock, seconds in clocks.items():
            ratios = [mine / theirs for mine, theirs in zip(seconds, times[baseline][clock], strict=True)]
            row[f"{clock}_ms"] = round(1000 * statistics.median(seconds), 3)
            row[f"{clock}_ratio"] = round(statistics.median(ratios), 4)
            if clock == "wall" and len(ratios) > 1:
                low, _, high = statistics.quantiles(ratios, n=4)
                row |= {"wall_ratio_low": round(low, 4), "wall_ratio_high": round(high, 4)}
        table[name] = row
    return table


def print_table(title: str, table: dict[str, dict[str, float]]) -> None:
    """Print one line per timed function."""
    print(title)
    for name, row in table.items():
        print(
            f"  {name:<24} {row['wall_ms']:>10.1f} ms  {row['wall_ratio']:>6.3f}x"
            f"  (processor time {row['cpu_ratio']:.3f}x)"
        )


def peak_memory(step: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that a call holds at its worst moment beyond what was held before, by the allocator's own account."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def operations(step: Callable[[], object]) -> int:
    """Floating point operations of matrix products and convolutions in a forward: what no other process disturbs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Fused attention on a CPU is not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()

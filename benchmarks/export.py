"""Size and latency of exported models (a `torch.export` program, an ONNX file in onnxruntime) beside PyTorch.

All give logits and attribution maps of the same images and are run in turn; the largest difference is kept too.

    python benchmarks/export.py --models vit-tiny convnext-tiny --batch-sizes 1 8 --repeats 15
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import onnxruntime
import torch
from common import RESULTS, build, compare, interleave, print_table, write_result

from hf_shapley import export_onnx, export_program

Explain = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # pixels -> logits, maps


def in_pytorch(model) -> Explain:
    """The model itself."""

    def explain(pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = model(pixel_values)
        return output.logits, output.maps

    return explain


def in_onnxruntime(path: Path, threads: int) -> Explain:
    """The ONNX file in onnxruntime, on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def explain(pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, maps = session.run(None, {"pixel_values": pixel_values.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(maps)

    return explain


def export(model, folder: Path, threads: int) -> tuple[dict[str, Explain], dict[str, float]]:
    """Write both kinds of files, load them again, and say how many MiB each takes; PyTorch's are its weights."""
    program, graph = folder / "model.pt2", folder / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own
        torch.export.save(export_program(model), program)
        export_onnx(model, graph)
    ways = {
        "PyTorch": in_pytorch(model),
        "torch.export": torch.export.load(program).module(),
        "onnxruntime": in_onnxruntime(graph, threads),
    }
    files = {"torch.export": [program], "onnxruntime": graph.parent.glob("model.onnx*")}
    size = {"PyTorch": sum(parameter.nbytes for parameter in model.parameters())}
    size |= {name: sum(path.stat().st_size for path in paths) for name, paths in files.items()}
    return ways, {name: round(bytes_ / 2**20, 2) for name, bytes_ in size.items()}


@torch.inference_mode()
def measure(ways: dict[str, Explain], batch_size: int, repeats: int) -> dict[str, dict[str, float]]:
    """Time all ways in turn, and compare their outputs with PyTorch's."""
    pixel_values = torch.randn(batch_size, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = ways["PyTorch"](pixel_values)
    table = compare(
        interleave({name: lambda way=way: way(pixel_values) for name, way in ways.items()}, repeats=repeats), "PyTorch"
    )
    for name, way in ways.items():
        found = zip(way(pixel_values), expected, strict=True)
        table[name]["largest_difference"] = max((a - b).abs().max().item() for a, b in found)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit-tiny", "convnext-tiny"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default=RESULTS / "export.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tables: dict[str, dict] = {}
    for shape in args.models:
        with tempfile.TemporaryDirectory() as folder:
            ways, sizes = export(build(shape).eval(), Path(folder), args.threads)
            tables[shape] = {"mib": sizes}
            for batch_size in args.batch_sizes:
                tables[shape][f"batch {batch_size}"] = table = measure(ways, batch_size, args.repeats)
                print_table(f"{shape}, batch {batch_size}", table)
            print("  MiB", sizes)
    settings = {"image_size": 224, "num_labels": 1000, "repeats": args.repeats}
    packages = {name: version(name) for name in ("onnx", "onnxruntime", "onnxscript")}
    write_result(args.output, {"settings": settings, "exporters": packages, "models": tables})


if __name__ == "__main__":
    main()

"""Every backbone with Shapley models of its own, at its stock configuration: players, and counted operations.

    python benchmarks/backbones.py

Operations are counted by torch's flop counter: matrix products, convolutions and attention, of a batch of four images
and the recommended head, at random weights. They say nothing of memory traffic or of launching kernels:
`explain_latency.py` and `training_cost.py` time some of these models. The page `docs/backbones.md` is written from the
result file, `--page` alone writes it again.
"""

import argparse
import json
from pathlib import Path

import torch
from common import RESULTS, write_result
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hf_shapley import ShapleyTrainingArguments
from hf_shapley.backbones import FAMILIES, Family

PAGE = Path(__file__).parents[1] / "docs" / "backbones.md"
RESULT = RESULTS / "backbones.json"
IMAGES = 4
HEADER = """# Which backbones?

<!-- Written by `python benchmarks/backbones.py --page`. -->

`AutoShapleyForImageClassification.from_pretrained(checkpoint)` takes any image classifier of transformers.

Those in the table have Shapley models of their own. In their game absent patches are **dropped**: they are no token,
and have no part in any attention, convolution or pooling.

Any other classifier is held as it is by `ShapleyForImageClassification`. There absent patches are **painted** with the
mean colour, and each value of the game is a forward of the stock model.

The figures are of each architecture's stock configuration, with the recommended head. Operations are counted: those of
an explained forward in plain forwards, those of a training step in plain steps.

| Model type | Images | Players | Explained forward | Training step |
|---|---|---|---|---|
"""


class Operations(TorchDispatchMode):
    """Counts as torch's flop counter does, which cannot follow modules into a part without gradient."""

    total = 0

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=output)
        return output


def counted(run) -> int:
    """Operations of a call, its backward pass included."""
    # Fused attention on a CPU is not counted.
    with sdpa_kernel(SDPBackend.MATH), Operations() as counter:
        run()
    return counter.total


def pixels_of(model: nn.Module) -> Tensor:
    """Images at the size that the configuration says, 224 where it says none."""
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(IMAGES, config.num_channels, height, width)


def measure(family: Family) -> dict:
    """Players and ratios of one family."""
    plain, ours = family.plain_model(family.plain_config()), family.model(family.config())
    pixels = pixels_of(ours)
    labels = torch.zeros(IMAGES, dtype=torch.long)
    grid = ours.grid_size(*pixels.shape[-2:])
    ids = torch.zeros(IMAGES, 1, grid[0] * grid[1], dtype=torch.long)
    learning = round(ShapleyTrainingArguments.value_gradient_fraction * IMAGES)

    def plain_step():
        plain.train()(pixels, labels=labels).loss.backward()

    def step():
        options = {"num_coalitions": 2, "sums_only": True, "num_with_gradient": learning}
        output = ours.train()(pixels, coalition_ids=ids, labels=labels, **options)
        errors = output.coalition_gains - output.coalition_attributions
        (output.loss + errors.square().mean() + output.readout_errors.square().mean()).backward()

    with torch.no_grad():
        forwards = [counted(lambda model=model: model.eval()(pixels)) for model in (plain, ours)]
    steps = [counted(run) for run in (plain_step, step)]
    return {
        "image_size": list(pixels.shape[-2:]),
        "grid": list(grid),
        "explained_forward": forwards[1] / forwards[0],
        "training_step": steps[1] / steps[0],
    }


def page(found: dict[str, dict]) -> str:
    """The documentation's page."""
    rows = [
        f"| `{name}` | {' x '.join(map(str, x['image_size']))} | {x['grid'][0]} x {x['grid'][1]} | "
        f"{x['explained_forward']:.2f} | {x['training_step']:.2f} |"
        for name, x in found.items()
    ]
    return HEADER + "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", action="store_true", help="write the page from the result file, count nothing")
    options = parser.parse_args()
    if not options.page:
        write_result(RESULT, {"models": {name: measure(family) for name, family in FAMILIES.items()}})
    PAGE.write_text(page(json.loads(RESULT.read_text())["models"]), encoding="utf-8")


if __name__ == "__main__":
    main()

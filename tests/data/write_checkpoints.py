"""Freeze tiny checkpoints of this version with what they answer: `python tests/data/write_checkpoints.py 0.1.0`.

Later versions must load the folders of all earlier ones and answer the same: add a folder, never change one.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import make_model

SIZES = {
    "vit": dict(hidden_size=8, num_attention_heads=2, intermediate_size=16, image_size=(8, 12)),
    "convnext": dict(hidden_sizes=[4, 8]),
}
OWN = {"influence_own_layers": 1, "influence_layers": 1}
MODELS = {
    "vit-patches": {"head": "votes+influence", "influence_layers": 1, "attribution_gradient": True},
    "vit-pooled": {"head": "recommended"},
    "vit-adapters": {**OWN, "head": "recommended", "coalition_adapter_size": 4},
    "convnext-votes": {"head": "votes"},
    "convnext-pooled": {"head": "recommended", "influence_layers": 1},
    "convnext-own": {**OWN, "head": "recommended", "influence_block": "backbone", "coalition_adapter_size": 4},
}


def main(version: str) -> None:
    for name, options in MODELS.items():
        backbone, labels = name.split("-")[0], {0: "cat", 1: "dog", 2: "bird"}
        model = make_model(backbone, num_labels=3, id2label=labels, label2id={}, **SIZES[backbone], **options)
        folder = Path(__file__).parent / version / name
        model.save_pretrained(folder)
        for path in folder.glob("*.py"):  # the version's code is in its history
            path.unlink()
        generator = torch.Generator().manual_seed(5)
        pixels = torch.randn(2, 3, 8, 12, generator=generator)
        coalitions = torch.rand(2, 4, 6, generator=generator) > 0.5
        with torch.no_grad():
            output = model(pixels)
        expected = {
            "pixel_values": pixels,
            "coalitions": coalitions,
            "logits": output.logits,
            "attributions": output.attributions,
            "base_values": output.base_values,
            "coalition_values": model.coalition_values(pixels, coalitions),
        }
        save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])

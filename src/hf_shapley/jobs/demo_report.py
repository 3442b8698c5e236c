"""What the demo leaves behind: the model with its card, the results, a figure and a page that shows them."""

import base64
import io
import json
from pathlib import Path

from datasets import Dataset
from jinja2 import Environment, PackageLoader
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from ..figures.attribution_figures import attribution_grid
from ..files import whole_file
from ..publishing.model_card import render_model_card, write_model_card


def card_results(results: dict) -> dict:
    """The demo's results in the form that `hf_shapley.publishing.model_card` renders."""
    seeds, images = results["seeds"], results["images"]
    by_seed = {"seeds": seeds} if seeds > 1 else {}
    accuracy = {"group": "Classification", "type": "accuracy", "better": "higher"}
    faithful = {"group": "Faithfulness", "settings": {"images": images, **by_seed}}
    exact = {"group": "Exactness", "better": "lower", "settings": {"images": results["test_images"], **by_seed}}
    settings = {"images": results["test_images"], **by_seed}
    names = ("backbone", "epochs", "per_device_train_batch_size", "learning_rate", "shapley_weight", "train_images")
    versions = ("hf_shapley_version", "torch_version", "transformers_version", "python_version", "cpus", "seconds")
    return {
        "model_name": f"Digits, {results['backbone']}",
        "summary": "A small classifier of tiny pictures of digits, to show and test what hf_shapley does.",
        "game": "the classifier's own, absent patches dropped",
        "license": "apache-2.0",
        "dataset": {"name": "scikit-learn digits", "id": "sklearn-digits", "split": "test"},
        "metrics": [
            {**accuracy, "name": "Accuracy", "value": results["accuracy_joint"], "settings": settings},
            {**accuracy, "name": "Accuracy, plain twin", "value": results["accuracy_plain"], "settings": settings},
            {
                **faithful,
                "type": "shapley_correlation",
                "name": "Correlation with exact Shapley values",
                "value": results["shapley_correlation"],
                "better": "higher",
            },
            {
                **faithful,
                "type": "shapley_error_ratio",
                "name": "Squared error / variance of exact values",
                "value": results["shapley_error_ratio"],
                "better": "lower",
            },
            {**exact, "type": "efficiency_gap", "name": "Efficiency gap", "value": results["efficiency_gap"]},
            {**exact, "type": "leak", "name": "Leak of hidden pixels", "value": results["leak"]},
        ],
        "training": {name: results[name] for name in names},
        "environment": {name.removesuffix("_version"): results[name] for name in versions},
        "limits": ["The pictures are tiny: nothing here says how it does on photographs."],
        "command": results["command"],
    }


def write_report(
    output: Path, model: PreTrainedModel, processor: BaseImageProcessor, test: Dataset, pixels: Tensor, results: dict
) -> None:
    """Write model with processor and card, results, figure and report.

    Args:
        output: folder that receives them.
        model: of the first seed.
        processor: the model's own.
        test: rows of the test split.
        pixels: what the model sees of them, (images, 3, 8, 8).
        results: what was measured.
    """
    model.save_pretrained(output / "model")
    processor.save_pretrained(output / "model")
    write_model_card(
        output / "model" / "README.md", render_model_card(card_results(results), model_id=str(output / "model"))
    )
    with whole_file(output / "results.json") as draft:
        draft.write_text(json.dumps(results, indent=2) + "\n")
    maps = model.explain(pixels[:12])  # (12, 10, 4, 4)
    logits = model(pixels[:12]).logits
    top = logits.topk(2).indices  # (12, 2): predicted label and runner-up
    chosen = maps.gather(1, top[..., None, None].expand(-1, -1, 4, 4))
    figure = attribution_grid(
        test["image"][:12],
        chosen,
        [[f"{label}: {logits[row, label]:.1f}" for label in labels] for row, labels in enumerate(top.tolist())],
        titles=[f"a {label}" for label in test["label"][:12]],
        blocks_per_row=3,
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    with whole_file(output / "attributions.png") as draft:
        draft.write_bytes(picture.getvalue())
    template = Environment(loader=PackageLoader("hf_shapley.publishing"), autoescape=True).get_template(
        "demo_report.html"
    )
    with whole_file(output / "report.html") as draft:
        draft.write_text(template.render(results=results, picture=base64.b64encode(picture.getvalue()).decode()))

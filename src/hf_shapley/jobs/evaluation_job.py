"""Measure how faithful attributions are on a data set: the job behind `hf-shapley evaluate`.

Beside the model's attributions stand two rivals that rank the same patches: leaving out one patch at a time (one
forward pass per patch), and chance. All are judged in the model's game, which the results name. A certificate says how
far the attributions are from the exact Shapley values of that game on these images, and nothing of images unlike them.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel

from ..data.dataset_images import undecoded
from ..data.digits import digits_dataset
from ..faithfulness.axioms import efficiency_gap
from ..faithfulness.certificate import attribution_error_certificate
from ..faithfulness.correlations import faithfulness_correlation, interaction_share
from ..faithfulness.curves import comprehensiveness_sufficiency, insertion_deletion
from ..faithfulness.games import BatchedGame, Link
from ..files import whole_file
from ..models.checks import check_shapley_model
from ..models.images import load_image
from ..models.pipeline_shapley import pixel_values_of, score_function
from ..publishing.evaluation_card import evaluation_entries
from ..terminal import say
from ..training.digits import train_digits_model

MEANINGS = {
    "insertion_auc": "probability as the best patches come, higher is better",
    "deletion_auc": "probability as the best patches go, lower is better",
    "comprehensiveness": "probability lost without the best patches, higher is better",
    "sufficiency": "probability lost with nothing but them, lower is better",
    "faithfulness_correlation": "of attributed and real logit of random coalitions, higher is better",
    "efficiency_gap": "logits by which attributions fail to add up, 0 is exact",
}


# What the curves follow, by how the model's logits become scores.
LINKS: dict[str, Link] = {"softmax": "probability", "sigmoid": "sigmoid", "none": "logit"}


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, BaseImageProcessor, Dataset]:
    """Model, image processor and the rows to measure on."""
    if options.model is None:
        say("No --model: training a small one on digits.", file=sys.stderr)
        model, processor = train_digits_model(epochs=options.epochs)
    else:
        model = AutoModelForImageClassification.from_pretrained(options.model, trust_remote_code=False).eval()
        check_shapley_model(model, repr(options.model))
        processor = AutoImageProcessor.from_pretrained(options.model, trust_remote_code=False)
    if options.dataset is None:
        rows = digits_dataset()[options.split]
    else:
        rows = load_dataset(options.dataset, split=options.split).shuffle(seed=0)
    return model, processor, rows.select(range(min(options.images, len(rows))))


def rivals(game: BatchedGame, own: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Attributions (B, N, K) of three methods: the model's own, leaving out one patch at a time, and chance."""
    images, players, _ = own.shape
    without_one = ~torch.eye(players, dtype=torch.bool).expand(images, -1, -1)
    full = game(torch.ones(images, 1, players, dtype=torch.bool))
    return {
        "model": own,
        "leave one out": full - game(without_one),
        "chance": torch.randn(own.shape, generator=generator),
    }


def measure(
    game: BatchedGame, attributions: Tensor, generator: torch.Generator, link: Link = "probability"
) -> dict[str, float]:
    """Mean over the images of each number in `MEANINGS`; `link` says what curves and erasure follow."""
    curves = insertion_deletion(game, attributions, link=link)
    erasure = comprehensiveness_sufficiency(game, attributions, link=link)
    numbers = {
        "insertion_auc": curves.insertion_auc,
        "deletion_auc": curves.deletion_auc,
        "comprehensiveness": erasure.comprehensiveness,
        "sufficiency": erasure.sufficiency,
        "faithfulness_correlation": faithfulness_correlation(game, attributions, num_samples=200, generator=generator),
        "efficiency_gap": efficiency_gap(game, attributions),
    }
    return {name: numbers[name].mean().item() for name in MEANINGS}


def print_table(table: dict[str, dict[str, float]], link: Link = "probability") -> None:
    """One row per measure, one column per method."""
    followed = "logit" if link == "logit" else "probability"
    say(f"{'':<26}" + "".join(f"{method:>15}" for method in table))
    for name, meaning in MEANINGS.items():
        cells = "".join(f"{numbers[name]:>15.4g}" for numbers in table.values())
        say(f"{name:<26}{cells}   {meaning.replace('probability', followed)}")


def write_json(path: Path, content: dict) -> None:
    """Write an indented JSON file, whole or not at all."""
    with whole_file(path) as draft:
        draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Put the job's options on a parser."""
    parser.add_argument("--model", help="folder or Hub id of a Shapley checkpoint; default: digits, trained now")
    parser.add_argument("--dataset", help="folder or Hub id with pictures; default: digits")
    parser.add_argument("--split", default="test", help="split to measure on")
    parser.add_argument("--image_column", default="image", help="column with the pictures")
    parser.add_argument("--images", type=int, default=32, help="pictures to measure on, at least 2")
    parser.add_argument("--budget", type=int, default=1024, help="coalitions per picture for the certificate")
    parser.add_argument("--seed", type=int, default=0, help="of every draw")
    parser.add_argument("--epochs", type=float, default=16, help="of the digits model")
    parser.add_argument("-o", "--output", type=Path, default=Path("outputs/faithfulness.json"), help="file to write")
    parser.add_argument("--json", action="store_true", help="print the results as JSON in place of the table")


def run(options: argparse.Namespace) -> None:
    """Measure, write the results as JSON, print them."""
    if options.images < 2:
        raise ValueError(f"`--images` must be at least 2, got {options.images}.")
    generator = torch.Generator().manual_seed(options.seed)
    model, processor, rows = load(options)
    if options.image_column not in rows.column_names:
        raise ValueError(f"`--image_column` must be one of {rows.column_names}, got {options.image_column!r}.")
    pictures = [load_image(picture) for picture in undecoded(rows, options.image_column)[options.image_column][:]]
    pixels = pixel_values_of(pictures, processor, model.config)
    link = LINKS[score_function(model.config)]
    own = model.explain(pixels).flatten(2).transpose(1, 2)  # (images, players, labels)

    game = model.game(pixels)
    games = map(model.game, pixels)
    certificate = attribution_error_certificate(games, own, budget=options.budget, generator=generator)
    results = {
        "methods": {name: measure(game, phi, generator, link) for name, phi in rivals(game, own, generator).items()},
        "interaction_share": interaction_share(game, own, num_samples=200, generator=generator).mean().item(),
        "certificate": {name: x for name, x in asdict(certificate).items() if not isinstance(x, Tensor)},
        "link": link,
        "game": model.game_name,
        "settings": {name: str(x) for name, x in vars(options).items() if name not in ("run", "command")},
    }
    results |= evaluation_entries(results, MEANINGS, vars(options), images=len(rows))
    write_json(options.output, results)
    if options.json:
        say(json.dumps(results))
    else:
        print_results(results, len(rows))
        say(f"Wrote {options.output}.")


def print_results(results: dict, images: int) -> None:
    """The table and the certificate, for people."""
    say(f"Game: {results['game']}.\n")
    print_table(results["methods"], results["link"])
    certificate = results["certificate"]
    low, high = certificate["error_ratio_interval"]
    say(
        f"\nSquared distance of the model's attributions to the exact Shapley values of {images} pictures,\n"
        f"over the variance of those: {certificate['error_ratio']:.4f}, 0 is exact; "
        f"{certificate['confidence']:.0%} confidence interval {low:.4f} to {high:.4f}. "
        "It says nothing of images unlike these.\n"
        f"Correlation with the exact values: {certificate['correlation']:.4f}.\n"
        f"Interactions, which no attribution can show: {results['interaction_share']:.1%} of the variance among "
        "coalitions of one size."
    )

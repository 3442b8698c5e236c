"""The `hf-shapley` command: parses, calls the library, prints.

Exit codes: 0 done, 1 the request failed (bad file, model or value), 2 the command line was wrong.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

from .files import whole_file
from .terminal import say
from .version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors that a user can mend are one line on stderr."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command == "train":
        options.rest = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        options.run(options)
    except (ValueError, TypeError, OSError, ImportError, SafetensorError) as error:
        say(f"hf-shapley {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say(f"hf-shapley {options.command}: interrupted", file=sys.stderr)
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    """A parser whose refusals, which quote the command line, are cleaned as all else that is printed."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        say(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hf-shapley", description="Image classifiers that explain themselves with Shapley values.")
    parser.add_argument("--version", action="version", version=f"hf-shapley {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_demo, _add_train, _add_explain, _add_evaluate, _add_push):
        add(commands)
    return parser


def _add_command(commands, name: str, run, summary: str, example: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"Example: {example}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _add_demo(commands) -> None:
    demo = _add_command(
        commands,
        "demo",
        _demo,
        "Train a digit classifier that explains itself and compare it with exact Shapley values.",
        "hf-shapley demo --backbone convnext --seeds 3 --output outputs/convnext",
    )
    demo.add_argument("--backbone", choices=("vit", "convnext"), default="vit", help="architecture to train")
    demo.add_argument("--seeds", type=int, default=1, help="seeds to train; means and each seed's values are reported")
    demo.add_argument("--epochs", type=int, help="passes over the 1,347 training images; 60 (vit) or 100 (convnext)")
    demo.add_argument("--images", type=int, default=32, help="test images to enumerate all coalitions of")
    demo.add_argument("-o", "--output", default="outputs/demo", help="folder for model, results, figure and report")


def _demo(options: argparse.Namespace) -> None:
    from .jobs.demo import DemoSettings, run_demo

    settings = DemoSettings(options.backbone, options.seeds, options.epochs, options.images, options.output)
    with contextlib.redirect_stdout(sys.stderr):  # Trainer prints its logs; stdout is for the results alone.
        results = run_demo(settings)
    say(json.dumps(results, indent=2))
    say(f"Open {Path(options.output) / 'report.html'}", file=sys.stderr)


def _add_train(commands) -> None:
    train = _add_command(
        commands,
        "train",
        _train,
        "Train or fine-tune a Shapley image classifier; with no option, a small one on digits. Takes --model and "
        "--dataset (folders or Hub ids), --output_dir, --image_column, --label_column, --freeze_classifier, and every "
        "option of ShapleyTrainingArguments: --shapley_weight, --learning_rate, --num_train_epochs, --push_to_hub ...",
        "hf-shapley train --model google/vit-base-patch16-224-in21k --dataset ethz/food101 --output_dir food101",
    )
    train.add_argument("--all-options", action="store_true", help="list every option, with its default, and leave")


def _train(options: argparse.Namespace) -> None:
    from .jobs.training_job import main as train

    train([*options.rest, "--help"] if options.all_options else options.rest)


def _add_evaluate(commands) -> None:
    from .jobs.evaluation_job import add_arguments, run

    evaluate = _add_command(
        commands,
        "evaluate",
        run,
        "Measure how faithful a model's attributions are: insertion, deletion, error with a confidence interval ...",
        "hf-shapley evaluate --model outputs/food101 --dataset ethz/food101 --split validation --images 100",
    )
    add_arguments(evaluate)


def _add_explain(commands) -> None:
    explain = _add_command(
        commands,
        "explain",
        _explain,
        "Classify one image and draw which patches speak for and against its labels.",
        "hf-shapley explain cat.jpg --model outputs/demo/model -o cat.png",
    )
    explain.add_argument("image", help="picture file")
    explain.add_argument("--model", required=True, help="folder or Hub id of a Shapley image classifier")
    explain.add_argument("-o", "--output", required=True, help="picture to write (.png, .jpg, .svg or .pdf)")
    explain.add_argument("--top-k", type=int, default=2, help="how many of the likeliest labels to draw")
    explain.add_argument("--label", action="append", help="name or id of a label to draw instead (may be repeated)")
    explain.add_argument(
        "--check",
        type=int,
        nargs="?",
        const=16,
        default=0,
        metavar="N",
        help="say how far each map can be trusted, by N evaluations of the model under missing patches; 16 where no N "
        "is given",
    )
    explain.add_argument(
        "--evaluations",
        type=int,
        default=0,
        metavar="N",
        help="evaluations of the model under missing patches that bring the maps nearer to the exact Shapley values",
    )
    explain.add_argument("--json", action="store_true", help="print labels, logits and attributions as JSON")


def _explain(options: argparse.Namespace) -> None:
    from .figures.attribution_figures import attribution_figure
    from .models.images import load_image
    from .models.overlay import processor_geometry
    from .models.pipeline_shapley import check_evaluations, pixel_values_of, score_function

    if Path(options.output).suffix.lower() not in (".png", ".jpg", ".jpeg", ".svg", ".pdf"):
        raise ValueError(f"`--output` must end in .png, .jpg, .svg or .pdf, got {options.output!r}.")
    asked = {name: check_evaluations(getattr(options, name), f"--{name}") for name in ("check", "evaluations")}
    image = load_image(options.image)
    model, processor = _load(options.model)
    pixels = pixel_values_of(image, processor, model.config)
    num_labels = model.config.num_labels
    if not 1 <= options.top_k <= num_labels:
        raise ValueError(f"`--top-k` must lie in [1, {num_labels}], got {options.top_k}.")
    chosen = [_label(label, model.config.id2label) for label in options.label or ()]
    answer, maps = _answer(model, pixels, chosen or options.top_k, asked)
    # What a regression gives is no probability.
    form = ".3f" if score_function(model.config) == "none" else ".1%"
    titles = [
        f"{row['label']} ({row['score']:{form}})" + (f"\ncheck: {row['check']['verdict']}" if "check" in row else "")
        for row in answer
    ]
    figure = attribution_figure(image, maps, titles, box=processor_geometry(processor, image.size))
    with whole_file(options.output) as draft:
        figure.savefig(draft)
    if options.json:
        say(json.dumps(answer))
    else:
        for row in answer:
            say(_line(row))


def _answer(model, pixels, labels, asked: dict[str, int]) -> tuple[list[dict], Any]:
    """What a model says of one picture, a row for each label asked for, and their maps (labels, h, w)."""
    import torch

    from .models.pipeline_shapley import asked_of_the_game, check_in_words, label_scores

    with torch.no_grad():
        outputs = model(pixels, attributed=labels)
    model._check_answers(outputs)
    logits, ids = outputs.logits[0], outputs.attributed_labels
    maps, errors = asked_of_the_game(model, pixels, outputs.maps, ids, **asked)
    scores = label_scores(logits, model.config)
    answer = [
        {
            "label": model.config.id2label[index],
            "score": scores[index].item(),
            "logit": logits[index].item(),
            "base_value": outputs.base_values[index].item(),
            "attributions": values.tolist(),
        }
        for index, values in zip(ids[0].tolist(), maps[0], strict=True)
    ]
    if errors is not None:
        for row, error in zip(answer, errors[0].tolist(), strict=True):
            row["check"] = check_in_words(error)
    return answer, maps[0]


def _line(row: dict) -> str:
    """A row of the answer as it is printed."""
    label = " ".join(str(row["label"]).split())  # a name of two lines could be taken for two labels
    said = f"{label}: score {row['score']:.4f}, logit {row['logit']:.3f}"
    if "check" in row:
        said += f", check: {row['check']['verdict']} (error {row['check']['error']:.2f})"
    return said


def _label(text: str, id2label):
    """A label as the command line has it: its name, or the id of one whose name is another."""
    return int(text) if text not in id2label.values() and text.isdecimal() else text


def _add_push(commands) -> None:
    push = _add_command(
        commands,
        "push",
        _push,
        "Publish a model with its code, image processor and card on the Hub, in one commit. What the model's own card "
        "says of its training and evaluation stays in it.",
        "hf-shapley push outputs/demo/model me/digits-vit --private",
    )
    push.add_argument("model", help="folder (or Hub id) of a Shapley image classifier")
    push.add_argument("repo_id", help="where to: user/name; created if it does not exist")
    push.add_argument("--results", help="JSON file of results to add to the card, as `hf-shapley evaluate` writes it")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--revision", help="branch; created if it does not exist")
    push.add_argument("--message", default="Upload model", help="title of the commit")


def _push(options: argparse.Namespace) -> None:
    from .publishing.hub import card_of, push_to_hub

    results = _read_results(options.results) if options.results else None
    model, processor = _load(options.model)
    commit = push_to_hub(
        model,
        processor,
        options.repo_id,
        results=results,
        card=card_of(options.model),
        private=options.private or None,
        revision=options.revision,
        commit_message=options.message,
    )
    say(commit.commit_url)


def _read_results(path: str):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # no text, or no JSON
        raise ValueError(f"`--results` must be a JSON file, got {path!r}: {error}.") from error


def _load(name: str):
    """A Shapley image classifier in float32 and its image processor, from a folder or the Hub."""
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from .models.checks import check_shapley_model

    try:
        # Asked for nothing, transformers would offer, on the terminal, to run the repository's code.
        options = {"trust_remote_code": False}
        model = AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32, **options).eval()
        processor = AutoImageProcessor.from_pretrained(name, **options)
    except Exception as error:  # transformers raises many types on damaged files
        raise OSError(f"Cannot load the model {name!r}: {error}") from error
    check_shapley_model(model, repr(name))
    return model, processor


if __name__ == "__main__":
    sys.exit(main())

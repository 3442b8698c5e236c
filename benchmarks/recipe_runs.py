"""All runs of the recipe study: one CSV with a row for each run, and the page of the documentation made from it.

`recipe_study.py` adds its rows by itself. The page is written again by

    python benchmarks/recipe_runs.py
"""

import csv
import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "benchmarks" / "results" / "recipe_study.csv"
PAGE = ROOT / "docs" / "recipe_runs.md"

TEXT = ("backbone", "study", "recipe", "head", "game", "date", "remarks", "command")
CERTIFICATE = ("error", "error_low", "error_high", "correlation", "squared_error", "variance")
FACTS = ("recipe", "head", "game", "accuracy", "interaction_share", "insertion", "deletion", "training_seconds")
FACTS += ("test_images", "date", "remarks", "machine", "versions", "settings")
OPTIONS = ("training", "config", "start", "epochs", "shared_epochs", "head_epochs", "frozen", "augmented")
SHARED = ("pretrain", "epochs", "train_images", "batch_size", "learning_rate", "bf16")  # settings, by all of a study
# Columns that are not text hold JSON: a number, or an object where there are many names.
COLUMNS = ("backbone", "study", "recipe", "seed", "head", "game", "accuracy", "against_plain", *CERTIFICATE)
COLUMNS += (*(f"predicted_{name}" for name in CERTIFICATE), "interaction_share", "insertion", "deletion")
COLUMNS += ("training_seconds", "test_images", "date", "remarks", "command", "options", "settings", "machine")
COLUMNS += ("versions",)


def key(row: dict) -> tuple:
    """What tells a run from all others, in the order of the file: a study's plain runs come first."""
    return row["backbone"], row["study"], row["recipe"] != "plain", row["recipe"], row["seed"]


def make_row(record: dict, study: str) -> dict:
    """A run's row.

    Args:
        record: what `recipe_study.py` found, with settings, machine, versions, date and command.
        study: name of the runs that share data, epochs and schedule, among them the plain run of each seed.
    """
    settings = record["settings"]
    row = {"backbone": settings["backbone"], "study": study, "seed": settings["seed"]}
    row |= {name: record.get(name) for name in FACTS}
    row["options"] = {name: record[name] for name in OPTIONS if name in record}
    row["command"] = re.sub(r"--data \S+", "--data path/to/cifar10", record["command"])
    for prefix, name in (("", "certificate"), ("predicted_", "certificate_of_predicted_label")):
        if found := record.get(name):
            figures = (found["error_ratio"], *found["error_ratio_interval"], found["correlation"])
            figures += (found["mean_squared_error"], found["shapley_variance"])
            row |= {f"{prefix}{column}": figure for column, figure in zip(CERTIFICATE, figures, strict=True)}
    return {column: _six_digits(row.get(column)) for column in COLUMNS}


def _six_digits(value):
    return float(f"{value:.6g}") if isinstance(value, float) else value


def read_runs(path: Path = RUNS) -> list[dict]:
    """All rows, numbers and objects as such, None where a row says nothing; no file is no rows."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {name: None if text == "" else text if name in TEXT else json.loads(text) for name, text in row.items()}
            for row in csv.DictReader(file)
        ]


def has_run(study: str, recipe: str, settings: dict, path: Path = RUNS) -> bool:
    """Whether a run has its row already.

    Raises:
        ValueError: where the study's runs were trained otherwise, so that this one could not be compared with them.
    """
    rows = [row for row in read_runs(path) if (row["backbone"], row["study"]) == (settings["backbone"], study)]
    for name in SHARED:
        theirs = {row["settings"][name] for row in rows} - {settings[name]}
        if theirs:
            raise ValueError(
                f"The runs of study {study!r} have `{name}` {theirs.pop()}, got {settings[name]}: name another study."
            )
    return any((row["recipe"], row["seed"]) == (recipe, settings["seed"]) for row in rows)


def write_runs(rows: list[dict], path: Path = RUNS) -> None:
    """Write all rows in order, each joint run compared with its plain one; the whole file or nothing."""
    plain = {(row["backbone"], row["study"], row["seed"]): row["accuracy"] for row in rows if row["recipe"] == "plain"}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in sorted(rows, key=key):
            control = plain.get((row["backbone"], row["study"], row["seed"]))
            joint = control is not None and row["recipe"] != "plain"
            row = row | {"against_plain": round(row["accuracy"] - control, 6) if joint else None}
            values = ((name, row[name]) for name in COLUMNS)
            writer.writerow(["" if v is None else v if name in TEXT else json.dumps(v) for name, v in values])
    os.replace(temporary, path)


def add_run(row: dict, path: Path = RUNS) -> None:
    """Add a row, or put it in the place of the same run's; other processes may do so at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        write_runs([other for other in read_runs(path) if key(other) != key(row)] + [row], path)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other process is here. A folder can be locked as it is, so no lock file stays behind."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


INTRODUCTION = """# Every run of the recipe study

`python benchmarks/recipe_runs.py` makes this page from `benchmarks/results/recipe_study.csv`. That file also has each
run's options, settings, command, machine and date. What the runs teach is on the page
[Choosing a recipe](recipe.md).

- **Accuracy** is that on all {test_images:,} test images of CIFAR-10, under bfloat16 autocast as in training.
- **Against plain** is the difference, in points, from the plain model of the same start, images, epochs and schedule.
  A frozen classifier shows the rounding of bfloat16 there.
- **Error** is the attributions' squared error over their variance, with a 95 % interval. The
  [certificate](faithfulness.md#certificate) finds it on {images} test images, for all labels together. New runs
  have it for the predicted label alone as well.
- **Insertion - deletion** depends on the game as well as on the attributions. It ranks attributions of one model,
  not models.
- **Head** "as first built" has weights of its own for each label. "Tied" goes through the classifier's.
- **Game** "own" is the classifier's own. "Adapted" is that of the classifier with adapters.
- **"From another start"** means a pre-training of the same seed that came out otherwise. It has a plain run of its
  own. Seed 0's was interrupted after three of its ten epochs, and augmented otherwise from there on. Why seed 1's
  differs is not known.

A recipe's name says what it changes:

- "pooled": the classifier goes on reading what it read. "Influence" without it: the patches vote.
- "own layer", "four own layers": the head has its own copies of the backbone's last layers.
- "values 0.1": that share of the regression's gradient flows through v(S). "Of an eighth": for so many of the images.
- "votes 1": all of the attributions' gradient reaches the votes.
- "four pairs": so many coalitions, each with its complement, for each image and step. The default is one.
- "spread": coalition sizes are drawn more evenly than the Shapley kernel draws them.
- "then the head alone": the head learns on while all else is frozen.
- "fine-tuning": pooled, one own layer, values 0.1. A quarter of the images has no coalitions, and a quarter of the
  others learns through v(S). What follows the name is changed.

Some options of these runs no longer exist. The CSV has their values.
"""


def make_page(rows: list[dict]) -> str:
    """The page: a section for each study, a table row for each run."""
    images, test_images = rows[0]["settings"]["images"], rows[0]["test_images"]
    parts = [INTRODUCTION.format(images=images, test_images=test_images)]
    for (backbone, study), runs in groupby(sorted(rows, key=key), key=lambda row: (row["backbone"], row["study"])):
        runs = list(runs)
        parts += [f"## {'ViT' if backbone == 'vit' else 'ConvNeXt'}, {study}\n", f"{_schedule(runs[0]['settings'])}\n"]
        titles = ["recipe", "seed", "head", "game", "accuracy", "against plain", "error", "correlation"]
        titles += ["error, predicted label", "interaction share", "insertion - deletion"]
        cells = [titles, ["---"] * len(titles), *map(_cells, runs)]
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in cells) + "\n")
    return "\n".join(parts)


def _schedule(settings: dict) -> str:
    """A study's settings in a sentence or two."""
    count = settings["train_images"]
    images = "all training images" if count is None else f"the first {count:,} training images"
    text = f"{settings['epochs']:g} epochs on {images}, at a learning rate of {settings['learning_rate']:g}."
    if not settings["pretrain"]:
        return f"{text} The start is random."
    seen = "all training images" if settings.get("pretrain_on_all") else "the same images"
    return f"{text} The start is a plain model after {settings['pretrain']:g} epochs on {seen}."


def _cells(row: dict) -> list[str]:
    difference = None if row["against_plain"] is None else 100 * row["against_plain"]
    curves = None if row["insertion"] is None else row["insertion"] - row["deletion"]
    return [
        row["recipe"],
        str(row["seed"]),
        row["head"] or "-",
        row["game"] or "-",
        f"{100 * row['accuracy']:.2f} %",
        _figure(difference, "+.2f"),
        _error(row, ""),
        _figure(row["correlation"]),
        _error(row, "predicted_"),
        _figure(row["interaction_share"]),
        _figure(curves),
    ]


def _figure(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def _error(row: dict, prefix: str) -> str:
    found, low, high = (_figure(row[f"{prefix}{name}"]) for name in ("error", "error_low", "error_high"))
    return "-" if found == "-" else f"{found} [{low}, {high}]"


if __name__ == "__main__":
    PAGE.write_text(make_page(read_runs()), encoding="utf-8")

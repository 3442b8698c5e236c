"""The recipe study's runs lie in one CSV, to which processes add at the same time, and from which a page is made."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
spec = importlib.util.spec_from_file_location("recipe_runs", BENCHMARKS / "recipe_runs.py")
recipe_runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe_runs)

SETTINGS = dict(
    backbone="vit", pretrain=10, epochs=8, train_images=None, batch_size=128, learning_rate=5e-4, bf16=True, images=64
)


def record(recipe: str, accuracy: float, seed: int = 0, **found) -> dict:
    settings = {**SETTINGS, "seed": seed}
    command = "python benchmarks/recipe_study.py --data /some/where --bf16"
    return {"recipe": recipe, "accuracy": accuracy, "settings": settings, "command": command, **found}


def test_the_page_is_made_from_the_runs():
    page = recipe_runs.make_page(recipe_runs.read_runs())
    assert recipe_runs.PAGE.read_text(encoding="utf-8") == page, "python benchmarks/recipe_runs.py writes it again"


def test_the_file_is_as_it_would_be_written(tmp_path):
    """Nothing is lost on the way in and out, rows are in order, and each difference is that of two accuracies."""
    recipe_runs.write_runs(recipe_runs.read_runs(), tmp_path / "runs.csv")
    assert (tmp_path / "runs.csv").read_bytes() == recipe_runs.RUNS.read_bytes()


def test_every_run_has_its_plain_one():
    runs = recipe_runs.read_runs()
    groups = {(run["backbone"], run["study"], run["seed"]): [] for run in runs}
    for run in runs:
        groups[run["backbone"], run["study"], run["seed"]].append(run)
        assert run["test_images"] == 10_000
        assert run["command"].startswith("python benchmarks/recipe_study.py ")
        assert (run["error"] is None) == (run["recipe"] == "plain")
    for group in groups.values():
        assert [run["recipe"] for run in group].count("plain") == 1
        assert all(run["settings"][name] == group[0]["settings"][name] for run in group for name in recipe_runs.SHARED)


def test_a_row_holds_what_was_found(tmp_path):
    certificate = dict(error_ratio=1 / 3, error_ratio_interval=[0.3, 0.4], correlation=0.9)
    certificate |= dict(mean_squared_error=2e-7, shapley_variance=6e-7)
    joint = record("own game", 0.68, certificate=certificate, training={"num_pairs": 4}, game="own", head="tied")
    path = tmp_path / "runs.csv"
    for found in (joint, record("plain", 0.7)):  # the difference comes with the plain run, whenever that ends
        recipe_runs.add_run(recipe_runs.make_row(found, "eight epochs"), path)
    plain, row = recipe_runs.read_runs(path)
    assert (plain["recipe"], plain["against_plain"], plain["error"]) == ("plain", None, None)
    assert (row["against_plain"], row["error"], row["error_low"], row["error_high"]) == (-0.02, 0.333333, 0.3, 0.4)
    assert (row["correlation"], row["squared_error"], row["variance"]) == (0.9, 2e-7, 6e-7)
    assert (row["options"], row["settings"]["bf16"]) == ({"training": {"num_pairs": 4}}, True)
    assert row["command"] == "python benchmarks/recipe_study.py --data path/to/cifar10 --bf16"


def test_a_run_repeated_takes_its_rows_place(tmp_path):
    path = tmp_path / "runs.csv"
    for accuracy, seed in ((0.6, 0), (0.61, 1), (0.7, 0)):
        recipe_runs.add_run(recipe_runs.make_row(record("plain", accuracy, seed), "some"), path)
    assert [(row["seed"], row["accuracy"]) for row in recipe_runs.read_runs(path)] == [(0, 0.7), (1, 0.61)]


def test_runs_are_found_by_study_recipe_and_seed(tmp_path):
    """A run is found by study, recipe and seed, and other settings within a study are refused."""
    path = tmp_path / "runs.csv"
    recipe_runs.add_run(recipe_runs.make_row(record("plain", 0.6), "some"), path)
    settings = {**SETTINGS, "seed": 0}
    assert recipe_runs.has_run("some", "plain", settings, path)
    assert not recipe_runs.has_run("some", "own game", settings, path)
    assert not recipe_runs.has_run("some", "plain", {**settings, "seed": 1}, path)
    assert not recipe_runs.has_run("another", "plain", {**settings, "epochs": 4}, path)
    with pytest.raises(ValueError, match="have `epochs` 8, got 4: name another study"):
        recipe_runs.has_run("some", "own game", {**settings, "epochs": 4}, path)


def test_processes_add_rows_at_the_same_time(tmp_path):
    code = f"""
import sys
sys.path[:0] = [{str(BENCHMARKS)!r}, {str(Path(__file__).parent)!r}]
from pathlib import Path
from recipe_runs import add_run, make_row
settings = {{**{SETTINGS!r}, "seed": 0}}
for seed in range(10):
    settings["seed"] = seed
    record = {{"recipe": sys.argv[1], "accuracy": 0.5, "settings": settings, "command": ""}}
    add_run(make_row(record, "some"), Path("runs.csv"))
"""
    names = ("plain", "own game", "frozen")
    workers = [subprocess.Popen([sys.executable, "-c", code, name], cwd=tmp_path) for name in names]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    found = {(row["recipe"], row["seed"]) for row in recipe_runs.read_runs(tmp_path / "runs.csv")}
    assert found == {(name, seed) for name in names for seed in range(10)}
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]

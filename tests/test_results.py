"""README quotes result files: each of its rows, made again from the file, must stand there."""

import json
import re
from pathlib import Path
from statistics import mean, stdev

import pytest

from hf_shapley import ShapleyTrainingArguments, fine_tuning_recipe

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "title"), [("vit", "ViT"), ("convnext", "ConvNeXt")])
def test_the_demos_rows_are_those_of_their_result_files(name, title):
    found = json.loads((RESULTS / f"demo_{name}.json").read_text())
    difference, spread = (100 * found[f"accuracy_difference{part}"] for part in ("", "_standard_deviation"))
    cells = [
        title,
        f"{100 * found['accuracy_joint']:.2f} %",
        f"{100 * found['accuracy_plain']:.2f} %",
        f"{difference:+.2f} ({spread:.2f}) points",
        f"{found['shapley_correlation']:.3f}",
        f"{found['shapley_error_ratio']:.4f}",
        f"{found['efficiency_gap']:.1e}",
        f"{found['leak']:g}",
    ]
    assert "| " + " | ".join(cells) + " |" in README
    assert found["seeds"] == 3 and found["images"] >= 32


def test_the_comparison_with_other_methods_is_that_of_its_result_file():
    found = json.loads((RESULTS / "faithfulness_digits.json").read_text())
    rows = re.findall(r"^\| (?:\*\*)?([^|*]+?)(?:\*\*)? \| (\d+) \| (.+) \|$", README, flags=re.MULTILINE)
    assert len(rows) == 9
    for name, evaluations, numbers in rows:
        method = found["methods"][name]
        columns = ("correlation", "insertion", "deletion", "insertion_minus_deletion")
        assert int(evaluations) == method["evaluations"]
        assert numbers.split(" | ") == [f"{method[column]:.3f}" for column in columns]
    assert f"about {found['equivalent_evaluations_of_kernel_shap']:.0f} evaluations" in README


def test_the_cost_of_a_step_is_that_of_its_result_file():
    found = json.loads((RESULTS / "training_cost.json").read_text())["models"]
    for variant in ("joint", "joint, quarter learns through v(S)"):
        vit, convnext = (found[name][variant]["wall_ratio"] for name in ("vit-tiny", "convnext-tiny"))
        assert re.search(rf"{vit:.2f} (plain steps for ViT-Ti/16 )?and {convnext:.2f}", README)
    text = " ".join(README.split())
    costs = []
    for name in ("training_cost_fine_tuning", "training_cost_fine_tuning_memory_kept"):
        found = json.loads((RESULTS / f"{name}.json").read_text())
        assert bool(found["machine"]["allocator"]) == name.endswith("kept")
        for variant in ("fine_tuning_recipe", "fine_tuning_recipe, frozen"):
            costs += [found["models"][model][variant]["wall_ratio"] for model in ("vit-tiny", "convnext-tiny")]
    assert "a step costs {:.2f} and {:.2f}, of a frozen classifier {:.2f} and {:.2f};".format(*costs[:4]) in text
    assert "{:.2f} and {:.2f}, {:.2f} and {:.2f} where the C library".format(*costs[4:]) in text
    page = " ".join((ROOT / "docs" / "finetune.md").read_text(encoding="utf-8").split())
    assert f"falls from {costs[1]:.2f} to {costs[5]:.2f} plain steps" in page
    found = json.loads((RESULTS / "explain_latency.json").read_text())["models"]
    costs = [
        found[name]["batch 8"]["explained, fine_tuning_recipe"]["wall_ratio"] for name in ("vit-base", "convnext-tiny")
    ]
    assert "takes {:.2f} plain forwards for ViT-B/16 and {:.2f}".format(*costs) in text


def test_the_page_on_reliability_says_what_its_result_files_say():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    kills, memory, crowd, bad = (
        json.loads((RESULTS / f"{name}.json").read_text())
        for name in ("kill_and_resume", "memory", "demo_load", "bad_input")
    )
    configurations = kills["configurations"].values()
    ends, cut_off = (sum(found[name] for found in configurations) for name in ("ends", "cut_off"))
    assert f"| {kills['kills']} kills:" in page
    assert f"{kills['ends_with_equal_weights']} of {ends} ends" in page
    assert f"{cut_off} cut-off checkpoints, none accepted" in page
    assert all(found["good"] and len(found["kills"]) >= 20 for found in configurations)
    steps, images, figures = memory["runs"].values()
    assert f"{steps['count']} training steps, {images['count']} explained images, {figures['count']} saved" in page
    assert "{:+.2f}, {:+.2f} and {:+.2f} MiB".format(*(run["growth_mib"] for run in memory["runs"].values())) in page
    assert f"{crowd['users']} visitors for {crowd['seconds']:.0f} seconds" in page
    assert f"{crowd['answers']} answers, {crowd['wrong_answers']} wrong, {len(crowd['errors'])} errors" in page
    assert f"| {bad['cases']} cases |" in page
    assert bad["failed_tests"] == 0


def test_the_scaling_is_that_of_its_result_file():
    found = json.loads((RESULTS / "scaling.json").read_text())["parts"]
    for shape, name in (("vit-tiny", "ViT-Ti/16"), ("convnext-atto", "ConvNeXt-Atto")):
        exponents = found["players"][shape]["exponents"]
        assert [row["players"] for row in found["players"][shape]["rows"]] == [16, 64, 196, 400, 1024]
        plain, joint = (f"{exponents[kind]:.2f}" for kind in ("plain step", "joint step"))
        assert re.search(rf"{joint} for {name}\s\((the plain one: )?{plain}\)", README)
        assert [row["labels"] for row in found["labels"][shape]["rows"]] == [10, 100, 1000, 10_000]
        assert abs(found["labels"][shape]["exponents"]["joint step"]) < 0.005
    most = [found["labels"][shape]["rows"][-1] for shape in ("vit-tiny", "convnext-atto")]
    best, every = (
        " and ".join(f"{row[kind]['cpu_ratio']:.2f}" for row in most)
        for kind in ("best label explained", "explained forward")
    )
    assert f"To explain the best of 10,000 labels takes these two {best} plain\nforwards" in README
    assert f"to explain all of them {every}." in README
    assert f"{found['processes']['speedup']:.2f} times as fast as one" in README
    assert found["processes"]["same_files"]


def recipe_rows() -> list[str]:
    """One row for each joint run of the recipe study, against the plain run of its folder, backbone and seed."""
    rows = []
    for path in sorted((RESULTS / "recipe_study").rglob("*.json")):
        found = json.loads(path.read_text())
        if found["recipe"] == "plain":
            continue
        backbone, seed = path.name.split("-")[0], found["settings"]["seed"]
        plain = json.loads((path.parent / f"{backbone}-plain-seed{seed}.json").read_text())
        shared = ("epochs", "train_images", "pretrain", "batch_size", "learning_rate", "bf16")
        assert all(plain["settings"][name] == found["settings"][name] for name in shared), path
        assert plain["test_images"] == found["test_images"] == 10_000
        certificate = found["certificate"]
        low, high = certificate["error_ratio_interval"]
        cells = [
            f"{path.parent.name.removeprefix(backbone + '_').replace('_', ' ')}, seed {seed}",
            found["recipe"],
            f"{100 * found['accuracy']:.2f} %",
            f"{100 * (found['accuracy'] - plain['accuracy']):+.2f} points",
            f"{certificate['error_ratio']:.3f} [{low:.3f}, {high:.3f}]",
            f"{certificate['correlation']:.3f}",
            f"{found['interaction_share']:.3f}",
            f"{found['insertion'] - found['deletion']:.3f}",
        ]
        rows.append(
            "| " + " | ".join([f"{'ViT' if backbone == 'vit' else 'ConvNeXt'}, {cells[0]}", *cells[1:]]) + " |"
        )
    return rows


def test_the_recipe_table_is_that_of_its_result_files():
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (?:ViT|ConvNeXt), .+ \|$", page, flags=re.MULTILINE)
    assert table == recipe_rows() and table


def test_the_recipe_page_quotes_its_tables():
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    code_and_tables = r"```.*?```|`[^`\n]+`|^\|.*?$"
    prose = re.sub(code_and_tables, "", page, flags=re.DOTALL | re.MULTILINE)
    tables = " ".join(re.findall(r"^\|.*$", page, flags=re.MULTILINE))
    measured = set(re.findall(r"\d+\.\d{2,}", tables))
    measured |= {f"{float(number):.2f}" for number in measured}
    found = json.loads((RESULTS / "peer_amortized.json").read_text())
    accuracies = [found["peer"]["accuracy_classifier"], found["peer"]["accuracy_surrogate"]]
    accuracies += [point["accuracy"] for point in found["joint"]["curve"]]
    measured |= {f"{100 * accuracy:.2f}" for accuracy in accuracies}
    quoted = re.findall(r"\d+\.\d{2,}", prose)
    assert len(quoted) > 20 and set(quoted) <= measured


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("cifar10", "### From scratch on few images"),
        ("cifar10_fine_tuned", "### A plain ViT, fine-tuned"),
        ("cifar10_frozen", "### A plain ViT, frozen"),
    ],
)
def test_the_comparison_on_cifar10_is_that_of_its_result_file(name, title):
    found = json.loads((RESULTS / f"faithfulness_{name}.json").read_text())
    page = (ROOT / "docs" / "faithfulness.md").read_text(encoding="utf-8")
    section = page[page.index(title) :].partition("\n### ")[0]
    rows = re.findall(r"^\| (.+?) \| (\d+) \| (\S+) \| (.+) \|$", section, flags=re.MULTILINE)
    assert len(rows) == 12
    for name, evaluations, milliseconds, numbers in rows:
        method = found["methods"][name]
        columns = ("correlation", "insertion", "deletion", "insertion_minus_deletion")
        assert int(evaluations) == method["evaluations"]
        assert float(milliseconds) == pytest.approx(method["milliseconds_per_image"], rel=0.05)
        assert numbers.split(" | ") == [f"{method[column]:.3f}" for column in columns]
    assert f"about {found['equivalent_evaluations_of_kernel_shap']:.0f} evaluations" in section
    assert f"{found['noise_of_ground_truth']:.1e} of the variance" in " ".join(section.split())
    assert f"{found['images']} test images" in page
    gain = found["insertion_minus_deletion_gain_over_it"]
    best = found["best_gradient_or_attention_method"]
    assert f"{100 * gain:.0f} % more than {best}" in " ".join(section.split())


def test_the_comparison_with_two_stages_is_that_of_its_result_file():
    found = json.loads((RESULTS / "peer_amortized.json").read_text())
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    rows = []
    for name, kind in (("surrogate and explainer", "peer"), ("joint", "joint")):
        for point in found[kind]["curve"]:
            low, high = point["interval"]
            costs = f"{point['cost']:.0f} | {point['counted_cost']:.0f}"
            error = f"{point['error_ratio']:.3f} [{low:.3f}, {high:.3f}]"
            rows.append(f"| {name} | {point['step']} | {costs} | {error} | {point['correlation']:.3f} |")
    assert "\n".join(rows) in page
    last = found["peer"]["curve"][-1]
    before, after = (point for point in found["joint"]["curve"] if point["step"] in (50, 100))
    assert after["error_ratio"] < last["error_ratio"] < before["error_ratio"]
    for cost, text in (("cost", "times less by processor time"), ("counted_cost", "times less counted")):
        assert f"{last[cost] / after[cost]:.0f} {text}" in " ".join(page.split())
    curve, peer = found["joint"]["curve"], found["peer"]
    for accuracy in (
        min(point["accuracy"] for point in curve),
        curve[-1]["accuracy"],
        peer["accuracy_classifier"],
        peer["accuracy_surrogate"],
    ):
        assert f"{100 * accuracy:.2f} %" in page


def runs_of(folder: Path, recipe: str, backbone: str = "vit") -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.rglob(f"{backbone}-{recipe}-seed*.json"))]


def certified(runs: list[dict]) -> list[str]:
    """Correlation and error, means over seeds as README writes them."""
    return [f"{mean(run['certificate'][name] for run in runs):.3f}" for name in ("correlation", "error_ratio")]


def cifar10_numbers(setting: str, recipe: str, backbone: str = "vit") -> tuple[list[str], list[float]]:
    """Accuracies (plain, joint), correlation and error, means over seeds as README writes them; the differences."""
    folder = RESULTS / "recipe_study" / setting
    joint = runs_of(folder, recipe, backbone)
    controls = [folder / f"{backbone}-plain-seed{run['settings']['seed']}.json" for run in joint]
    plain = [json.loads(path.read_text()) for path in controls]
    texts = [f"{100 * mean(run['accuracy'] for run in runs):.2f} %" for runs in (plain, joint)]
    return texts + certified(joint), [
        100 * (ours["accuracy"] - other["accuracy"]) for ours, other in zip(joint, plain, strict=True)
    ]


def test_the_sentence_on_cifar10_is_that_of_its_result_files():
    sentence = " ".join(README[README.index("On CIFAR-10") : README.index("[Choosing a recipe]")].split())
    from_scratch, differences = cifar10_numbers("vit_5000_images_from_scratch", "influence-votes_1-values_1")
    fine_tuned, others = cifar10_numbers("vit_fine_tuned_8_epochs", "pooled-own_layer-four_pairs-then_the_head_alone")
    name = "plain-then_frozen_with_adapters-four_pairs-then_the_head_alone"
    frozen = runs_of(RESULTS / "recipe_study", name)
    vit, of_vit = cifar10_numbers("vit_fine_tuned_8_epochs", "with_adapters")
    convnext, of_convnext = cifar10_numbers("convnext_fine_tuned_8_epochs", "with_adapters-convolutions", "convnext")
    errors = [vit[-1], convnext[-1]]
    assert re.findall(r"\d+\.\d{2} %|\d\.\d{3}", sentence) == from_scratch + errors + fine_tuned + certified(frozen)
    assert f"{mean(of_vit):+.2f} points for a ViT (mean of {len(of_vit)} seeds)" in sentence
    assert f"{of_convnext[0]:+.2f} for a ConvNeXt (one seed) after 8 epochs" in sentence and len(of_convnext) == 1
    assert sentence.endswith(f"(means of {len(frozen)} seeds).")
    for points in (differences, others):
        assert f"difference {mean(points):.2f} points, standard deviation {stdev(points):.2f}" in sentence
        assert f"means of {len(points)} seeds" in sentence


@pytest.mark.parametrize(
    ("backbone", "name", "least"),
    [
        ("vit", "with_adapters", 3),
        ("convnext", "with_adapters-convolutions", 2),
        ("vit", "plain-then_frozen_with_adapters", 3),
    ],
)
def test_the_recommended_recipe_is_one_that_was_measured(backbone, name, least):
    runs = runs_of(RESULTS / "recipe_study", name, backbone)
    assert len(runs) >= least
    for found in runs:
        assert found["frozen"] == ("frozen" in name)
        model_options, training_options = fine_tuning_recipe(found["settings"]["learning_rate"], backbone)
        if found["frozen"]:  # a classifier that does not learn takes no share of any gradient
            model_options = {key: value for key, value in model_options.items() if not key.endswith("_gradient")}
        assert model_options.items() <= found["config"].items()
        assert training_options.pop("learning_rate") == found["settings"]["learning_rate"]
        assert training_options == {key: value for key, value in found["training"].items() if key != "shapley_weight"}
        assert found["training"]["shapley_weight"] == ShapleyTrainingArguments.shapley_weight


def test_every_result_file_names_the_command_that_made_it():
    for path in RESULTS.rglob("*.json"):
        assert json.loads(path.read_text())["command"].startswith(("hf-shapley ", "python benchmarks/")), path

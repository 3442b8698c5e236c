"""Pages quote result files: each row of a table, made again from the files, must stand there."""

import importlib.util
import json
import re
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

from test_recipe_runs import recipe_runs

from hf_shapley import ShapleyTrainingArguments, ShapleyViTConfig
from hf_shapley.backbones import FAMILIES
from hf_shapley.training.joint_loss import SIZES, JointLossTrainer

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def found_in(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


README, GUIDE = text_of("README.md"), text_of("docs/finetune.md")


FIRST, FIRST_ADAPTED, NOW = "as first built, own", "as first built, with adapters", "now, own"


def digits_rows() -> list[tuple[str, ...]]:
    """Joint training from scratch, of the demos: means over three seeds."""
    demos = [found_in(f"demo_{name}") for name in ("vit", "convnext")]
    assert all(demo["seeds"] == 3 and demo["images"] >= 32 for demo in demos)
    accuracy = (f"{100 * demo['accuracy_joint']:.2f} %, {100 * demo['accuracy_difference']:+.2f}" for demo in demos)
    return [
        ("digits from scratch: accuracy, points", *accuracy, FIRST),
        ("the same: error against exact values", *(f"{demo['shapley_error_ratio']:.4f}" for demo in demos), FIRST),
        (
            "the same: gap of the sum, leak of absent patches",
            *(f"{demo['efficiency_gap']:.1e}, {demo['leak']:g}" for demo in demos),
            FIRST,
        ),
    ]


def cifar10_cells(backbone: str, recipe: str, study: str) -> tuple[str, str]:
    """Difference from plain training and error, each with a star where one seed is all there is."""
    runs = [run for _, run in runs_of(recipe, backbone, study)]
    star = {1: "*", 3: ""}[len(runs)]
    assert {run["head"] for run in runs} == {"tied" if recipe == "own game" else "as first built"}
    assert {run["game"] for run in runs} == {"adapted" if "adapters" in recipe else "own"}
    points = f"{100 * mean(run['against_plain'] for run in runs):+.2f}"
    return points, f"{mean(run['error'] for run in runs):.3f}{star}"


def cifar10_rows_of_readme() -> list[tuple[str, ...]]:
    scratch = ("influence, votes 1, values 1", "5000 images from scratch")
    adapted = {title: recipe for title, _, recipe in CIFAR10}
    vit, convnext = (", ".join(cifar10_cells(name, *scratch)) for name in ("vit", "convnext"))
    return [
        ("CIFAR-10, 5,000 images from scratch: points, error", vit, convnext, FIRST),
        (
            "CIFAR-10, fine-tuned by the defaults: points, error",
            ", ".join(cifar10_cells("vit", "own game", EIGHT)),
            "-",
            NOW,
        ),
        (
            "CIFAR-10, frozen: error",
            cifar10_cells("vit", adapted[FROZEN_VIT], EIGHT)[1],
            cifar10_cells("convnext", adapted[FROZEN_CONVNEXT], EIGHT)[1],
            FIRST_ADAPTED,
        ),
    ]


def cost_rows_of_readme() -> list[tuple[str, ...]]:
    forwards, steps = found_in("explain_latency")["models"], found_in("training_cost_recommended")["models"]
    gpu = [found_in("gpu")["models"][shape]["eager"] for shape in ("vit-base", "convnext-tiny")]
    explained = [
        [forwards[shape]["batch 8"]["explained, fine_tuning_recipe"] for shape in ("vit-base", "convnext-tiny")],
        [table["explained forward"] for table in gpu],
    ]
    of_each = (f"{cpu['wall_ratio']:.2f}, {h200['wall_ratio']:.2f}" for cpu, h200 in zip(*explained, strict=True))
    on_cpu = (f"{steps[shape]['recommended']['wall_ratio']:.2f}" for shape in ("vit-tiny", "convnext-tiny"))
    on_gpu = (f"{table['recommended step']['wall_ratio']:.2f}" for table in gpu)
    return [
        ("forward that explains 1,000 labels, plain forwards: CPU, H200", *of_each, FIRST_ADAPTED),
        ("fine-tuning step, plain steps: CPU", *on_cpu, NOW),
        ("the same: H200", *on_gpu, FIRST_ADAPTED),
    ]


def sanity_rows_of_readme() -> list[tuple[str, ...]]:
    found = found_in("sanity_digits")
    maps = found["randomisation"]["cascade"]["own game, one pass"]["classifier"]
    errors = (found["exchanged"]["own game"][when]["predicted label, error"] for when in ("as trained", "exchanged"))
    methods = found_in("faithfulness_digits")["games"]["dropped"]["methods"]
    frozen_errors = (methods[name]["error"] for name in ("ours, one pass", "ours, refined with 256"))
    ranked = (found["trojan"]["versions"][f"{name}, clean data"]["one_pass"] for name in ("own game", "frozen"))
    tuned, frozen = (f"{100 * share:.1f}" for share in ranked)
    return [
        (
            "digits, 64 players, frozen: error, refined with 256 evaluations",
            "{:.3f}, {:.3f}*".format(*frozen_errors),
            "-",
            NOW,
        ),
        ("digits, classifier randomised: rank correlation of maps", f"{maps:.2f}*", "-", NOW),
        ("digits, classifier exchanged: error before, after", "{:.3f}, {:.3f}*".format(*errors), "-", NOW),
        ("digits, trigger of a trojan at rank 1: tuned, frozen", f"{tuned}, {frozen} %*", "-", NOW),
    ]


def test_readmes_evidence_is_that_of_its_files():
    rows = [*digits_rows(), *cifar10_rows_of_readme(), *cost_rows_of_readme(), *sanity_rows_of_readme()]
    table = "| | ViT | ConvNeXt | head, game |\n|---|---|---|---|\n"
    assert table + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n\n" in README
    missed = sum(not goal["met"] for goal in found_in("sanity_digits")["goals"].values())
    assert f"which miss {({1: 'one'})[missed]} of four goals" in " ".join(README.split())


def cost_rows() -> list[str]:
    """Rows of costs in plain steps and forwards: a ViT's and a ConvNeXt's."""

    def models_of(name: str) -> dict:
        found = found_in(name)
        assert bool(found["machine"].get("allocator")) == name.endswith("kept")
        return found["models"]

    rows = []
    training = ("vit-tiny", "convnext-tiny")
    for name, variant, title in (
        ("training_cost_fine_tuning", "fine_tuning_recipe", "step with adapters"),
        ("training_cost_fine_tuning_memory_kept", "fine_tuning_recipe", "the same, memory kept"),
        ("training_cost_fine_tuning", "fine_tuning_recipe, frozen", "step with adapters, the classifier frozen"),
        ("training_cost_fine_tuning_memory_kept", "fine_tuning_recipe, frozen", "the same, memory kept"),
        ("training_cost", "joint", "step where patches vote: a pair for each image, all learning through v(S)"),
        ("training_cost_memory_kept", "joint", "the same, memory kept"),
        (
            "training_cost",
            "joint, quarter learns through v(S)",
            "step where patches vote, a quarter learning through v(S)",
        ),
        ("training_cost_memory_kept", "joint, quarter learns through v(S)", "the same, memory kept"),
    ):
        models = models_of(name)
        rows.append((title, *(f"{models[shape][variant]['wall_ratio']:.2f}" for shape in training)))
    for name, kind, title in (
        ("explain_latency", "wall_ratio", "forward that explains all of 1,000 labels, batch 8"),
        ("explain_latency_memory_kept", "wall_ratio", "the same, memory kept"),
        ("explain_latency", "memory_ratio", "its memory, weights included"),
    ):
        models = models_of(name)
        explained = (
            models[shape]["batch 8"]["explained, fine_tuning_recipe"] for shape in ("vit-base", "convnext-tiny")
        )
        rows.append((title, *(f"{row[kind]:.2f}" for row in explained)))
    parts = json.loads((RESULTS / "scaling.json").read_text())["parts"]
    for kind, title in (
        ("explained forward", "forward that explains all of 10,000 labels"),
        ("best label explained", "forward that explains the best of 10,000 labels"),
    ):
        most = (parts["labels"][shape]["rows"][-1] for shape in ("vit-tiny", "convnext-atto"))
        rows.append((title, *(f"{row[kind]['cpu_ratio']:.2f}" for row in most)))
    return [f"| {' | '.join(row)} |" for row in rows]


def test_the_cost_table_quotes_its_result_files():
    """The table of costs in README is that of its result files."""
    assert "\n".join(cost_rows()) in GUIDE


def test_explained_forward_costs_quote_their_result_file():
    """What README says of an explained forward is in its result file."""
    models = json.loads((RESULTS / "explain_latency.json").read_text())["models"]
    counted, one = (
        [models[shape][batch]["explained, fine_tuning_recipe"][kind] for shape in ("vit-base", "convnext-tiny")]
        for batch, kind in (("batch 8", "operations_ratio"), ("batch 1", "wall_ratio"))
    )
    small = models["vit-tiny"]["batch 1"]["explained, fine_tuning_recipe"]["wall_ratio"]
    page = " ".join(GUIDE.split())
    assert "a forward that explains 1,000 labels is {:.3f} and {:.3f} plain ones".format(*counted) in page
    assert len({f"{ratio:.2f}" for ratio in one}) == 1
    assert f"One image at a time it takes {one[0]:.2f} (both), with ViT-Ti/16 {small:.2f}" in page


def test_the_gpu_table_quotes_its_result_file():
    """The table of a GPU in README, and the text beside it, is that of its result file."""
    models = json.loads((RESULTS / "gpu.json").read_text())["models"]
    tables = [models[shape]["eager"] for shape in ("vit-base", "convnext-tiny")]
    rows = {
        "step where patches vote, all learning through v(S)": "joint step",
        "step with adapters": "recommended step",
        "the same, the classifier frozen": "recommended step, frozen",
        "step of an explainer that learns from 32 masked copies of each image": "step with masked copies",
        "forward that explains all of 1,000 labels": "explained forward",
    }
    for title, name in rows.items():
        cells = [title, *(f"{table[name]['wall_ratio']:.2f}" for table in tables)]
        assert f"| {' | '.join(cells)} |" in GUIDE
    page = " ".join(GUIDE.split())

    def both(text: str, name: str, key: str, scale: float = 1.0, *, relative: bool = False) -> str:
        return text.format(
            *(table[name][key] * scale / (table["plain step"][key] if relative else 1) for table in tables)
        )

    assert (
        both(
            "The step with adapters uses {:.1f} and {:.1f} % of the chip's peak",
            "recommended step",
            "share_of_peak",
            100,
        )
        in page
    )
    assert both("the plain step {:.1f} and {:.1f} %", "plain step", "share_of_peak", 100) in page
    memory = "It takes {:.2f} and {:.2f} times the plain step's memory"
    assert both(memory, "recommended step", "peak_memory_gib", relative=True) in page
    memory = "that where patches vote {:.2f} and {:.2f} times"
    assert both(memory, "joint step", "peak_memory_gib", relative=True) in page


def test_gpu_compiling_and_batches_quote_result_files():
    """What compiling and large batches do on a GPU is in result files."""

    def step(name: str, mode: str, kind: str) -> dict[str, float]:
        return json.loads((RESULTS / f"{name}.json").read_text())["models"]["vit-base"][mode][kind]

    eager, compiled = (
        [step(name, mode, kind) for kind in ("plain step", "recommended step")]
        for name, mode in (("gpu", "eager"), ("gpu_compiled", "compiled"))
    )
    page = " ".join(GUIDE.split())
    recommended = f"{compiled[1]['wall_ms']:.1f} ms instead of {eager[1]['wall_ms']:.1f}"
    assert f"ViT-B/16's step takes {recommended}" in page
    assert f"the plain one {compiled[0]['wall_ms']:.1f} instead of {eager[0]['wall_ms']:.1f}" in page
    assert f"{compiled[1]['wall_ratio']:.2f} compiled plain steps" in page
    assert f"or {compiled[1]['wall_ms'] / eager[0]['wall_ms']:.2f} of those that are faster uncompiled" in page
    large, frozen = (
        step("gpu_batch_512", "eager", kind)["wall_ratio"] for kind in ("recommended step", "recommended step, frozen")
    )
    assert f"it is {large:.2f} plain steps uncompiled, and {frozen:.2f} with the classifier frozen" in page


def test_kept_memory_savings_quote_their_result_files():
    """The page on fine-tuning says what keeping memory saves, as its result files do."""

    def both(shape: str, name: str, variant: str) -> list[float]:
        rows = (
            json.loads((RESULTS / f"{name}{kept}.json").read_text())["models"][shape][variant]
            for kept in ("", "_memory_kept")
        )
        return [row["wall_ms"] for row in rows]

    def seconds(name: str, variant: str) -> str:
        return " and ".join(f"{wall / 1000:.2f}" for wall in both("convnext-tiny", name, variant))

    def milliseconds(variant: str) -> str:
        return " and ".join(f"{wall:,.0f}" for wall in both("vit-tiny", "training_cost", variant))

    page = " ".join(GUIDE.split())
    assert f"a plain step took {seconds('training_cost', 'plain')} s" in page
    assert f"one with adapters {seconds('training_cost_fine_tuning', 'fine_tuning_recipe')} s" in page
    assert f"one where patches vote {seconds('training_cost', 'joint')} s" in page
    assert f"ViT-Ti/16 gains less: a plain step took {milliseconds('plain')} ms" in page
    assert f"one where patches vote {milliseconds('joint')}." in page


def test_the_reliability_page_quotes_its_result_files():
    """The page on reliability says what its result files say."""
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
    cases = json.loads((RESULTS / "model_tester.json").read_text())["cases"].values()
    counts = ("passed", "skipped", "expected_failures")
    passed, skipped, expected = (sum(case[name] for case in cases) for name in counts)
    reasons = {pattern for case in cases for pattern in case["assumptions"]}
    assert f"| {passed} passed, {skipped} do not apply; {expected} rest on {len(reasons)} assumptions" in page
    assert not any(case["unexpected_failures"] or case["passed_unexpectedly"] for case in cases)


def test_the_scaling_is_that_of_its_result_file():
    found = json.loads((RESULTS / "scaling.json").read_text())["parts"]
    for shape, name in (("vit-tiny", "ViT-Ti/16"), ("convnext-atto", "ConvNeXt-Atto")):
        exponents = found["players"][shape]["exponents"]
        assert [row["players"] for row in found["players"][shape]["rows"]] == [16, 64, 196, 400, 1024]
        plain, joint = (f"{exponents[kind]:.2f}" for kind in ("plain step", "joint step"))
        assert re.search(rf"{joint} for {name} \((the plain one: )?{plain}\)", " ".join(GUIDE.split()))
        assert [row["labels"] for row in found["labels"][shape]["rows"]] == [10, 100, 1000, 10_000]
        assert abs(found["labels"][shape]["exponents"]["joint step"]) < 0.005
    assert f"{found['processes']['speedup']:.2f} times as fast as one" in GUIDE
    assert found["processes"]["same_files"]


def test_the_recipe_page_quotes_its_tables():
    page, runs = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("recipe.md", "recipe_runs.md"))
    code_and_tables = r"```.*?```|`[^`\n]+`|^\|.*?$"
    prose = re.sub(code_and_tables, "", page, flags=re.DOTALL | re.MULTILINE)
    tables = " ".join(re.findall(r"^\|.*$", page + runs, flags=re.MULTILINE))
    measured = set(re.findall(r"\d+\.\d{2,}", tables))
    measured |= {f"{float(number):.2f}" for number in measured}
    found = json.loads((RESULTS / "peer_amortized.json").read_text())
    accuracies = [found["peer"]["accuracy_classifier"], found["peer"]["accuracy_surrogate"]]
    accuracies += [point["accuracy"] for point in found["joint"]["curve"]]
    measured |= {f"{100 * accuracy:.2f}" for accuracy in accuracies}
    quoted = re.findall(r"\d+\.\d{2,}", prose)
    assert len(quoted) > 20 and set(quoted) <= measured


ADAPTED_MODELS = ("_fine_tuned", "_frozen", "_convnext")
FOUR_MODELS = [
    json.loads((RESULTS / f"faithfulness_cifar10{name}.json").read_text()) for name in ("", *ADAPTED_MODELS)
]


def rows_of_four_models() -> list[str]:
    """Correlation, and insertion - deletion, of each method on four models, and how far permutations must go."""

    def cell(found, name):
        method = found["methods"].get(name)
        return f"{method['correlation']:.3f}, {method['insertion_minus_deletion']:.3f}" if method else "-"

    names = ("ours, one pass", "permutations 256", "occlusion", "Grad-CAM", "integrated gradients")
    names += ("gradient x input", "attention rollout", "random")
    evaluations = {name: str(FOUR_MODELS[0]["methods"][name]["evaluations"]) for name in names}
    rows = [[name, evaluations[name], *(cell(found, name) for found in FOUR_MODELS)] for name in names]
    return [f"| {' | '.join(row)} |" for row in rows]


def permutations_as_near(found: dict) -> str:
    """Between which numbers of evaluations permutations come as near to the truth as our one pass."""
    errors = {name: method["error_ratio"] for name, method in found["methods"].items()}
    budgets = [int(name.split()[1]) for name in errors if name.startswith("permutations")]
    enough = min(budget for budget in budgets if errors[f"permutations {budget}"] <= errors["ours, one pass"])
    return "at most 256" if enough == 256 else f"{enough // 2} to {enough}"


def test_the_cifar10_comparison_is_its_result_files():
    page = (ROOT / "docs" / "faithfulness.md").read_text(encoding="utf-8")
    assert "\n".join(rows_of_four_models()) in page
    assert f"| {' | '.join(['permutations as near as ours', '', *map(permutations_as_near, FOUR_MODELS)])} |" in page
    noise = max(found["noise_of_ground_truth"] for found in FOUR_MODELS)
    text = " ".join(page.split())
    assert f"{FOUR_MODELS[0]['images']} test images" in text and f"the truth is known up to {noise:.4f}" in text


def figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def faithfulness_tables(found: dict) -> list[list[str]]:
    """Methods in the own game, methods in the painted games, samplers by evaluations, and equivalent evaluations."""
    own, painted = found["games"]["dropped"]["methods"], [found["games"][name] for name in ("black", "blurred")]
    columns = ("error", "correlation", "insertion", "deletion", "insertion_minus_deletion")
    tables = [[[name, x["evaluations"], *(figure(x[column]) for column in columns)] for name, x in own.items()]]
    columns = ("error", "correlation", "insertion_minus_deletion")
    tables.append(
        [
            [name, x["evaluations"], *(figure(game["methods"][name][c]) for game in painted for c in columns)]
            for name, x in painted[0]["methods"].items()
        ]
    )
    curves, equivalents = found["error_by_evaluations"], found["equivalent_evaluations"]
    budgets = list(curves["ours, refined"])
    tables.append([[name, *(figure(curve.get(budget)) for budget in budgets)] for name, curve in curves.items()])

    def amount(value):
        least, most = min(map(int, budgets)), max(map(int, budgets))
        return f"more than {most}" if value is None else f"at most {least}" if value == least else f"{value:.0f}"

    tables.append([[name, *(amount(x[name]) for x in equivalents.values())] for name in equivalents["ours, one pass"]])
    return [[f"| {' | '.join(map(str, row))} |" for row in table] for table in tables]


def test_the_digits_comparison_is_its_result_files():
    found = json.loads((RESULTS / "faithfulness_digits.json").read_text())
    page = (ROOT / "docs" / "faithfulness.md").read_text(encoding="utf-8")
    for table in faithfulness_tables(found):
        assert "\n".join(table) in page
    section = " ".join(page[page.index("## Against other methods, on digits") : page.index("## On CIFAR-10")].split())
    noises = [game["noise_of_the_truth"] for game in found["games"].values()]
    assert "up to {:.4f} (dropped), {:.4f} (black) and {:.4f} (blurred)".format(*noises) in section
    shares = [game["interaction_share"]["by the truth"] for game in found["games"].values()]
    assert "{:.2f} (dropped), {:.2f} (black) and {:.2f} (blurred)".format(*shares) in section
    by = found["games"]["dropped"]["interaction_share"]
    assert (
        f"{by['by the one pass']:.2f} by the one pass" in section and f"{by['by the refined']:.2f} by the" in section
    )
    for name in ("constant", "ours, one pass"):
        pooled = found["all_labels"][name]["pooled"]
        assert f"{pooled['error']:.3f} and {pooled['correlation']:.3f}" in section


def test_controls_fail_every_figure_of_faithfulness():
    """A constant and an inverted map must lose to the truth in every game, or a figure says nothing."""
    found = json.loads((RESULTS / "faithfulness_digits.json").read_text())
    for game in found["games"].values():
        methods = game["methods"]
        for control in ("constant", "inverted"):
            assert methods[control]["error"] > 0.99
            assert (methods[control]["correlation"] or 0) <= 0
            gained, best = (methods[name]["insertion_minus_deletion"] for name in (control, "truth"))
            assert gained < best


def test_the_two_stage_comparison_quotes_its_result_file():
    """The comparison with two stages is that of its result file."""
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


def rows_of_peers_on_digits(found: dict) -> tuple[list[str], list[str]]:
    """Each recipe's curve in its own game, and what it comes to at the end in both games."""
    curves, ends = [], []
    keys = ("error_ratio", "correlation", "interaction_share")
    for name in (name for name, run in found.items() if isinstance(run, dict) and "curve" in run):
        for point in found[name]["curve"]:
            low, high = point["interval"]
            error = f"{point['error_ratio']:.3f} [{low:.3f}, {high:.3f}]"
            accuracy = f"{100 * point['accuracy']:.1f} %" if "accuracy" in point else "-"
            curves.append(
                f"| {name} | {point['counted_cost']:.0f} | {error} | {point['correlation']:.3f} | {accuracy} |"
            )
        end = found[name]["at_the_end"]
        own = found[name]["own_game"]
        (other,) = set(end) - {own}
        cells = [name, own, *(f"{end[game][key]:.3f}" for game in (own, other) for key in keys)]
        ends.append(f"| {' | '.join(cells)} |")
    return curves, ends


def test_the_viashap_comparison_is_its_result_files():
    found = json.loads((RESULTS / "peer_amortized_digits.json").read_text())
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    for rows in rows_of_peers_on_digits(found):
        assert len(rows) >= 3 and "\n".join(rows) in page
    text = " ".join(page.split())
    assert f"{found['settings']['counted cost in plain steps of 64 images']:,} plain steps" in text
    assert f"left as they are, its maps have an error of {found['ViaSHAP']['as_it_is']['error_ratio']:.3f}" in text


def runs_of(recipe: str, backbone: str, studies: str = "") -> list[tuple[dict, dict]]:
    """A recipe's runs in the studies whose names begin so, each with the plain run of its study and seed."""
    runs = [run for run in recipe_runs.read_runs() if run["backbone"] == backbone and run["study"].startswith(studies)]
    plain = {(run["study"], run["seed"]): run for run in runs if run["recipe"] == "plain"}
    return [(plain[run["study"], run["seed"]], run) for run in runs if run["recipe"] == recipe]


EIGHT = "fine tuned 8 epochs"
FROZEN_VIT = "ViT, frozen, four such pairs, 12 more epochs"
FROZEN_CONVNEXT = "ConvNeXt, frozen, larger head, more pairs, all of spread sizes, 24 more epochs"
CIFAR10 = (
    ("ViT, from scratch on 5,000 images", "5000 images from scratch", "influence, votes 1, values 1"),
    ("ViT, with adapters, 8 epochs", EIGHT, "with adapters, spread sizes"),
    (
        "ViT, 4 epochs of the head alone after these",
        EIGHT,
        "with adapters, spread sizes, then the head alone, four pairs",
    ),
    (
        "ViT, 8 epochs of it without augmentation, after one of these",
        EIGHT,
        "with adapters, spread sizes, then the head alone, four pairs, 8 epochs without augmentation",
    ),
    (
        "ViT, four pairs of the kernel's coalition sizes, then 4 epochs of the head alone",
        EIGHT,
        "with adapters, four pairs, then the head alone",
    ),
    ("ViT, frozen, 8 more epochs", EIGHT, "plain, then frozen with adapters, spread sizes"),
    (
        FROZEN_VIT,
        EIGHT,
        "plain, then frozen with adapters, four pairs, then the head alone",
    ),
    (
        "ConvNeXt, with adapters, 8 epochs",
        EIGHT,
        "with adapters, convolutions, spread sizes",
    ),
    (
        "ConvNeXt, 4 epochs of the head alone after these",
        EIGHT,
        "with adapters, convolutions, spread sizes, then the head alone, four pairs",
    ),
    (
        FROZEN_CONVNEXT,
        EIGHT,
        "plain, then frozen with adapters, four own layers, four spread pairs, then sixty-four for 10 epochs, "
        "sixteen without augmentation for 6",
    ),
)


def cifar10_rows() -> list[str]:
    """The recipe page's rows on CIFAR-10, means over seeds."""
    rows = []
    for title, study, recipe in CIFAR10:
        runs = runs_of(recipe, title.split(",")[0].lower(), study)
        plain, joint = ([100 * run["accuracy"] for run in kind] for kind in zip(*runs, strict=True))
        differences = [ours - other for ours, other in zip(joint, plain, strict=True)]
        spread = f" (sd {stdev(differences):.2f})" if len(runs) > 1 else ""
        cells = [
            title,
            str(len(runs)),
            f"{mean(plain):.2f} %",
            f"{mean(joint):.2f} %",
            f"{mean(differences):+.2f}{spread}",
            *(f"{mean(run[name] for _, run in runs):.3f}" for name in ("correlation", "error")),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def test_the_cifar10_table_quotes_its_result_files():
    """The table on CIFAR-10 in README is that of its result files."""
    assert "\n".join(cifar10_rows()) in text_of("docs/recipe.md")


def test_spread_size_savings_quote_their_result_file():
    """What spread sizes save is that of the result file."""
    models = json.loads((RESULTS / "coalition_sizes.json").read_text())["models"]
    ratios = [found["ratio"] for model in models.values() for found in model.values()]
    text = (ROOT / "docs" / "faithfulness.md").read_text()
    assert f"with {min(ratios):.2f} to {max(ratios):.2f} times fewer evaluations" in text


def test_the_refinement_table_quotes_its_result_file():
    """The table of refinement is that of its result file."""
    found = json.loads((RESULTS / "refinement.json").read_text())
    budgets = [str(budget) for budget in found["settings"]["budgets"]]
    text = (ROOT / "docs" / "faithfulness.md").read_text()
    assert f"| {' | '.join(['method', *(f'{int(budget):,}' for budget in budgets)])} |" in text
    for name, errors in found["error_over_variance"].items():
        if name != "one pass":
            cells = [f"{errors[budget]:.3f}" if budget in errors else "-" for budget in budgets]
            assert f"| {' | '.join([name, *cells])} |" in text
    assert f"of which one pass has {found['error_over_variance']['one pass']['0']:.3f}" in " ".join(text.split())


def sanity_rows(found: dict) -> list[str]:
    """The table of sanity checks: a row of cells each, of joint training, the own game and a frozen classifier."""
    recipes = ("joint", "own game", "frozen")
    versions = ("joint", "own game, clean data", "frozen, clean data", "frozen, trojaned data")
    goals = {name: goal["goal"] for name, goal in found["goals"].items()}

    def row(title, values, goal="-"):
        return f"| {' | '.join([title, *values, '-'] if len(values) == 3 else [title, *values])} | {goal} |"

    def correlations(kind, part):
        return [f"{found['randomisation'][kind][f'{recipe}, one pass'][part]:.2f}" for recipe in recipes]

    def errors(when):
        return [f"{found['exchanged'][recipe][when]['predicted label, error']:.3f}" for recipe in recipes]

    def trojan(name, digits=1):
        return [f"{100 * found['trojan']['versions'][version][name]:.{digits}f} %" for version in versions]

    def checks(kind):
        return [f"{found['trojan']['versions'][version][kind]['mean_check']:.2f}" for version in versions]

    labels = found["random_labels"]
    constant = [found["constant_players"][recipe] for recipe in recipes]
    twice = [found["players_twice"][recipe] for recipe in recipes]
    at_most, exchanged, one_pass, refined = goals.values()
    return [
        row(
            "classifier randomised: rank correlation of old and new maps",
            correlations("cascade", "classifier"),
            at_most,
        ),
        row("everything randomised, down to the embeddings", correlations("cascade", "embeddings")),
        row("the last layer alone randomised", correlations("alone", "layer 4")),
        row(
            "trained on random labels: rank correlation with the map of true ones",
            [f"{labels['joint, one pass']:.2f}", "-", f"{labels['frozen, one pass']:.2f}"],
        ),
        row("error / variance, as trained", errors("as trained")),
        row("classifier exchanged, nothing learned again: error / variance", errors("exchanged"), exchanged),
        row(
            "share of all-black patches in the map (in exact values)",
            [f"{part['one_pass']:.2f} ({part['exact']:.2f})" for part in constant],
        ),
        row("left half shown twice: error / variance", [f"{part['error']:.2f}" for part in twice]),
        row("trigger at rank 1, one pass", trojan("one_pass"), f"{one_pass}, own game"),
        row("trigger at rank 1, refined with 256 evaluations", trojan("refined"), f"{refined}, own game"),
        row("trigger at rank 1, leave one out", trojan("leave_one_out")),
        row("check with 16 evaluations, clean images", checks("clean")),
        row("check with 16 evaluations, triggered images", checks("triggered")),
    ]


def test_the_sanity_checks_quote_their_result_file():
    """The sanity checks are those of their result file."""
    found = json.loads((RESULTS / "sanity_digits.json").read_text())
    text = " ".join((ROOT / "docs" / "faithfulness.md").read_text().split())
    assert " ".join(" ".join(sanity_rows(found)).split()) in text
    missed = sum(not goal["met"] for goal in found["goals"].values())
    assert f"They miss {missed} of {len(found['goals'])} goals" in text
    others = found["randomisation"]["cascade"]
    for name in ("gradient x input", "integrated gradients", "attention rollout", "occlusion", "KernelSHAP 256"):
        assert f"{name} {others[name]['classifier']:.2f}" in text


def test_every_result_file_names_its_command():
    """Every result file names the command that made it."""
    for path in RESULTS.rglob("*.json"):
        assert json.loads(path.read_text())["command"].startswith(("hf-shapley ", "python benchmarks/")), path


def test_the_defaults_are_the_own_game_runs():
    """That a page says what they give is that run's; other options of it are gone, or say the same."""
    ((_, found),) = runs_of("own game", "vit", EIGHT)
    rate, options = found["settings"]["learning_rate"], found["options"]
    assert "own game" in " ".join(text_of("docs/recipe.md").split())
    training, config = dict(options["training"]), dict(options["config"])
    assert training.pop("attribution_learning_rate") == 8 * rate
    assert training.pop("coalition_sizes") == SIZES
    assert training.pop("even_weight") == training["value_gradient"]
    args = ShapleyTrainingArguments()
    trainer = SimpleNamespace(args=args, is_frozen=False, model=SimpleNamespace(config=ShapleyViTConfig()))
    for name, value in training.items():
        chosen = getattr(JointLossTrainer, name, None)
        assert value == (chosen.fget(trainer) if isinstance(chosen, property) else getattr(args, name)), name
    assert config.pop("attribution_head") == "votes+influence"
    assert bool(config.pop("influence_gradient")) == ShapleyViTConfig().attribution_gradient
    assert config == {name: getattr(ShapleyViTConfig(), name) for name in config}


def test_the_page_of_backbones_is_its_result_files(monkeypatch):
    """It is what the benchmark would write, and has every backbone of the table."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("backbones_benchmark", ROOT / "benchmarks" / "backbones.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    models = found_in("backbones")["models"]
    assert text_of("docs/backbones.md") == benchmark.page(models) and list(models) == list(FAMILIES)

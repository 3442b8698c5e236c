import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import VIT, make_model
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextImageProcessorPil,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    pipeline,
)

from hf_shapley import (
    ShapleyViTConfig,
    ShapleyViTForImageClassification,
    digits_dataset,
    insertion_deletion,
    render_model_card,
)
from hf_shapley.cli import main


@pytest.fixture
def checkpoint(tmp_path):
    """A small model with its processor on disk."""
    make_model("vit", id2label={i: f"kind {i}" for i in range(5)}).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 16, "width": 24}).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.linear_gradient("L").resize((60, 40)).save(path)
    return str(path)


def picture_width(path) -> int:
    with Image.open(path) as image:
        return image.width


def test_explain_draws_and_prints_the_models_answer(checkpoint, picture, tmp_path, capsys):
    """The command `explain` writes a picture and prints what the model said of it, which adds up."""
    output = tmp_path / "new" / "out.png"
    assert main(["explain", picture, "--model", checkpoint, "-o", str(output), "--top-k", "3", "--json"]) == 0
    assert picture_width(output) > 100
    answer = json.loads(capsys.readouterr().out)
    model = AutoModelForImageClassification.from_pretrained(checkpoint)
    pixels = ViTImageProcessorPil.from_pretrained(checkpoint)(Image.open(picture).convert("RGB"), return_tensors="pt")
    with torch.no_grad():
        logits = model(**pixels).logits[0]
    assert [row["label"] for row in answer] == [f"kind {i}" for i in logits.topk(3).indices.tolist()]
    for row in answer:
        total = sum(sum(line) for line in row["attributions"])
        assert row["base_value"] + total == pytest.approx(row["logit"], abs=1e-4)


def test_explain_draws_the_labels_asked_for(checkpoint, picture, tmp_path, capsys):
    output = str(tmp_path / "out.png")
    assert main(["explain", picture, "--model", checkpoint, "-o", output, "--label", "kind 4", "--json"]) == 0
    assert [row["label"] for row in json.loads(capsys.readouterr().out)] == ["kind 4"]


def test_explain_says_how_far_maps_can_be_trusted(checkpoint, picture, tmp_path, capsys):
    """With the pipeline's numbers, in the printed line, the JSON and the figure."""
    output = tmp_path / "out.svg"
    command = ["explain", picture, "--model", checkpoint, "-o", str(output), "--top-k", "1", "--check"]
    assert main([*command, "--evaluations", "32"]) == 0
    printed = capsys.readouterr().out
    assert main([*command, "16", "--evaluations", "32", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    answer = pipeline("shapley-image-classification", model=checkpoint, device="cpu")
    expected = answer(picture, top_k=1, check=16, evaluations=32)[0]
    assert row["check"] == {
        "error": pytest.approx(expected["check"]["error"]),
        "verdict": expected["check"]["verdict"],
    }
    torch.testing.assert_close(torch.tensor(row["attributions"]), torch.tensor(expected["attributions"]))
    assert f"check: {row['check']['verdict']} (error {row['check']['error']:.2f})" in printed
    assert f"check: {row['check']['verdict']}" in output.read_text()


HOSTILE = "cat\x1b[2J\x9b31m\n\u732b: score 1.0000"


@pytest.fixture
def hostile_checkpoint(checkpoint):
    """The same model with a name that would clear the screen, and forge a second answer."""
    path = Path(checkpoint) / "config.json"
    names = {str(i): HOSTILE if i == 0 else f"kind {i}" for i in range(5)}
    path.write_text(json.dumps({**json.loads(path.read_text()), "id2label": names, "label2id": None}))
    return checkpoint


def test_names_cannot_give_orders_to_the_terminal(hostile_checkpoint, picture, tmp_path, capsys):
    """Neither a label's nor an argument's: what is printed has one line per answer, and no control character."""
    output = str(tmp_path / "out.png")
    assert main(["explain", picture, "--model", hostile_checkpoint, "-o", output, "--label", HOSTILE]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("cat\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}31m \u732b: score")
    for arguments in (
        ["explain", f"{HOSTILE}.png", "--model", "m", "-o", f"{HOSTILE}.png"],
        ["push", "a", "b", HOSTILE],
    ):
        with contextlib.suppress(SystemExit):
            assert main(arguments) == 1
        shown = capsys.readouterr().err
        assert "cat" in shown
        assert shown.replace("\n", "").isprintable()


def test_a_console_of_few_letters_gets_escapes(hostile_checkpoint, picture, tmp_path, monkeypatch):
    """On a console of code page 1252 a Chinese name ended the command in an error, after the picture was written."""
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    arguments = [
        "explain",
        picture,
        "--model",
        hostile_checkpoint,
        "-o",
        str(tmp_path / "out.png"),
        "--label",
        HOSTILE,
    ]
    assert main(arguments) == 0
    console.seek(0)
    assert "\\u732b: score" in console.read()


@pytest.mark.parametrize("options", [{"num_labels": 1}, {"problem_type": "regression"}, {}], ids=str)
@pytest.mark.parametrize("multi_label", [False, True])
def test_explain_gives_the_stock_pipelines_scores(options, multi_label, picture, tmp_path, capsys):
    if multi_label:
        options = {"problem_type": "multi_label_classification", **options}
    folder = str(tmp_path / "model")
    make_model("vit", **options).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 24}).save_pretrained(folder)
    assert main(["explain", picture, "--model", folder, "-o", str(tmp_path / "x.png"), "--top-k", "1", "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    # transformers 5.23 does this by itself, its predecessors do not.
    function = {"function_to_apply": "none"} if options.get("problem_type") == "regression" else {}
    (expected,) = pipeline("image-classification", model=folder, device="cpu")(picture, top_k=1, **function)
    assert answer["label"] == expected["label"]
    assert answer["score"] == pytest.approx(expected["score"], abs=1e-4)


def test_explain_takes_names_before_ids(checkpoint, picture, tmp_path, capsys):
    """`--label 3` is the label of that name if there is one, else the label of that id."""
    arguments = ["explain", picture, "-o", str(tmp_path / "out.png"), "--json"]
    assert main([*arguments, "--model", checkpoint, "--label", "3", "--label", "kind 0"]) == 0
    assert [row["label"] for row in json.loads(capsys.readouterr().out)] == ["kind 3", "kind 0"]
    model = make_model("vit", id2label={i: str(9 - i) for i in range(5)})
    model.save_pretrained(checkpoint)
    assert main([*arguments, "--model", checkpoint, "--label", "9", "--label", "2"]) == 0
    found = {row["label"]: row["logit"] for row in json.loads(capsys.readouterr().out)}
    pixels = ViTImageProcessorPil.from_pretrained(checkpoint)(Image.open(picture).convert("RGB"), return_tensors="pt")
    logits = model(**pixels).logits[0]
    assert found == pytest.approx({"9": logits[0].item(), "7": logits[2].item()}, abs=1e-5)
    assert main([*arguments, "--model", checkpoint, "--label", "12"]) == 1
    assert "an id, an integer below 5, got 12" in capsys.readouterr().err


def test_explain_gives_grey_models_grey_levels(picture, tmp_path, capsys):
    """The command `explain` gives a model of grey images the grey levels of a picture."""
    folder = str(tmp_path / "model")
    model = make_model("vit", num_channels=1)
    model.save_pretrained(folder)
    grey = ViTImageProcessorPil(size={"height": 16, "width": 24}, image_mean=[0.5], image_std=[0.5])
    grey.save_pretrained(folder)
    output = str(tmp_path / "out.png")
    assert main(["explain", picture, "--model", folder, "-o", output, "--top-k", "1", "--json"]) == 0
    logits = model(**grey(Image.open(picture), return_tensors="pt")).logits[0]
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer["logit"] == pytest.approx(logits.max().item(), abs=1e-5)


def test_explain_refuses_what_would_be_enlarged_beyond_measure(tmp_path, capsys):
    make_model("convnext").save_pretrained(tmp_path / "model")
    ConvNextImageProcessorPil(size={"shortest_edge": 224}).save_pretrained(tmp_path / "model")
    Image.new("1", (1, 20_000)).save(tmp_path / "long.png")
    output = str(tmp_path / "out.png")
    assert main(["explain", str(tmp_path / "long.png"), "--model", str(tmp_path / "model"), "-o", output]) == 1
    assert "enlarge it to 256 x 5120000" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, link", [({"num_labels": 1}, "sigmoid"), ({"problem_type": "regression"}, "logit"), ({}, "probability")]
)
def test_evaluate_follows_the_scores_of_the_model(options, link, tmp_path, capsys):
    folder = str(tmp_path / "model")
    make_model("vit", **options).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 24}).save_pretrained(folder)
    arguments = ["evaluate", "--model", folder, "--images", "2", "--budget", "64", "-o", str(tmp_path / "out.json")]
    assert main([*arguments, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["link"] == link
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    images = [row["image"].convert("RGB") for row in digits_dataset()["test"].select(range(2))]
    pixels = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
    own = model.explain(pixels).flatten(2).transpose(1, 2)
    curves = insertion_deletion(lambda x: model.coalition_values(pixels, x), own, link=link)
    assert results["methods"]["model"]["insertion_auc"] == pytest.approx(curves.insertion_auc.mean().item(), abs=1e-4)


def test_evaluate_says_whose_game_was_played(tmp_path, capsys):
    """In its text and in its JSON, and so on the card; and that the certificate is about images like these."""
    folder, out = str(tmp_path / "model"), tmp_path / "out.json"
    make_model("vit", head="adapted").save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 24}).save_pretrained(folder)
    assert main(["evaluate", "--model", folder, "--images", "2", "--budget", "64", "-o", str(out)]) == 0
    printed, game = capsys.readouterr().out, "the classifier with adapters for masked images, absent patches dropped"
    assert printed.startswith(f"Game: {game}.") and "nothing of images unlike these" in printed
    assert json.loads(out.read_text())["game"] == game
    assert f"Whose game it is: {game}." in render_model_card(json.loads(out.read_text()), model_id="user/model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "no_such.png"}, "no_such.png"),
        ({"image": "text.png"}, "text.png"),
        ({"image": "empty.png"}, "empty.png': it is empty (0 bytes)"),
        ({"output": "out.txt"}, "must end in"),
        ({"extra": ["--label", "dog"]}, "Unknown labels"),
        ({"extra": ["--top-k", "9"]}, "--top-k"),
        ({"extra": ["--check", "1"]}, "`--check` must be 0 or a number of evaluations"),
        ({"model": "plain"}, "does not explain itself"),
        ({"model": "nowhere/at-all"}, "nowhere/at-all"),
    ],
)
def test_a_bad_request_writes_nothing_but_a_message(checkpoint, picture, tmp_path, capsys, change, message):
    """A bad request to `explain` ends in a clear message and exit code 1, and nothing is written."""
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    ViTForImageClassification(
        ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
    ).save_pretrained(tmp_path / "plain")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "plain")
    image = str(tmp_path / change["image"]) if "image" in change else picture
    model = str(tmp_path / "plain") if change.get("model") == "plain" else change.get("model", checkpoint)
    output = tmp_path / "out" / change.get("output", "out.png")
    code = main(["explain", image, "--model", model, "-o", str(output), *change.get("extra", [])])
    assert code == 1
    assert message in capsys.readouterr().err
    assert not output.exists() and not list(output.parent.glob("*"))


def test_explain_says_that_attributions_were_not_trained(picture, tmp_path, capsys, caplog):
    folder = str(tmp_path / "model")
    ShapleyViTForImageClassification(ShapleyViTConfig(**VIT, head="votes+influence")).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 24}).save_pretrained(folder)
    assert main(["explain", picture, "--model", folder, "-o", str(tmp_path / "out.png"), "--json"]) == 0
    assert "The attributions of this model have not been trained." in caplog.text
    assert len(json.loads(capsys.readouterr().out)) == 2  # which the warning leaves alone


def test_the_demo_writes_model_results_figure_and_report(tmp_path, capsys):
    """The demo ends with a model, its results, a figure and a report, and keeps no training folder."""
    output = tmp_path / "demo"
    assert main(["demo", "--backbone", "convnext", "--epochs", "1", "--images", "2", "-o", str(output)]) == 0
    results = json.loads((output / "results.json").read_text())
    assert results["leak"] == 0 and results["efficiency_gap"] < 1e-5
    assert 0 < results["accuracy_joint"] < 1 and results["shapley_error_ratio"] > 0
    assert all(not isinstance(value, dict) for value in results.values())
    assert json.loads(capsys.readouterr().out) == results
    model = AutoModelForImageClassification.from_pretrained(output / "model")
    assert model.config.label2id["7"] == 7
    assert f"Whose game it is: {model.game_name}." in (output / "model" / "README.md").read_text(encoding="utf-8")
    assert picture_width(output / "attributions.png") > 500
    report = (output / "report.html").read_text()
    assert "data:image/png;base64," in report and f"{results['shapley_correlation']:.4f}" in report
    assert not (output / "training").exists()


@pytest.mark.parametrize("option", [["--seeds", "0"], ["--images", "451"], ["--epochs", "0"]])
def test_impossible_demos_are_refused_before_writing_anything(tmp_path, option, capsys):
    """A demo that cannot be is refused by the name of its option, before anything is written."""
    assert main(["demo", "-o", str(tmp_path / "demo"), *option]) == 1
    assert option[0].strip("-") in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("given", "rate"),
    [([], "0.01"), (["--dataset", "pets"], "5e-05"), (["--dataset", "pets", "--seed", "3"], "5e-05")],
)
def test_all_options_are_listed_with_their_defaults(given, rate, capsys):
    """The defaults are those of a run with what is given beside `--all-options`: digits' own, or the Trainer's."""
    with pytest.raises(SystemExit) as left:
        main(["train", *given, "--all-options"])
    text = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0
    assert f"default: {rate})" in text.split(" --learning_rate LEARNING_RATE ")[-1].split(" --lr_scheduler_type ")[0]
    assert (
        "other defaults hold, which suit a small model of digits: output_dir outputs/digits, learning_rate 0.01"
        in text
    )


def test_train_then_evaluate_on_digits(tmp_path, capsys):
    model = str(tmp_path / "model")
    options = ["--max_train_samples", "64", "--max_eval_samples", "32", "--num_train_epochs", "1", "--use_cpu"]
    options += ["--disable_tqdm", "True", "--report_to", "none", "--output_dir", model]
    assert main(["train", *options]) == 0
    capsys.readouterr()
    out = tmp_path / "faithfulness.json"
    assert main(["evaluate", "--model", model, "--images", "2", "--budget", "64", "-o", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert printed["game"] == "the classifier's own, absent patches dropped"
    assert printed["methods"]["model"]["efficiency_gap"] < 1e-5
    assert printed["command"].startswith("hf-shapley evaluate --model model --split test --images 2")
    assert str(tmp_path) not in render_model_card(printed, model_id="user/model")
    assert main(["evaluate", "--model", model, "--images", "1"]) == 1
    assert "--images" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_data_sets_damaged_picture_is_named(checkpoint, tmp_path, capsys, command):
    """The commands `train` and `evaluate` name a damaged picture of a data set, and write no results."""
    for index in range(4):
        path = tmp_path / "pictures" / "train" / f"kind {index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 16)).save(path)
    path.write_bytes(path.read_bytes()[:40])
    options = {
        "train": ["--ignore_mismatched_sizes", "--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--use_cpu"],
        "evaluate": ["--split", "train", "--images", "4", "-o", str(tmp_path / "out.json")],
    }
    dataset = ["--dataset", str(tmp_path / "pictures"), "--model", checkpoint]
    assert main([command, *dataset, *options[command]]) == 1
    error = capsys.readouterr().err
    assert f"hf-shapley {command}: " in error
    assert "Cannot read" in error
    assert "3.png" in error
    assert not (tmp_path / "out.json").exists()


def test_unknown_options_are_a_wrong_command_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["explain", "a.png", "--model", "m", "-o", "b.png", "--no-such-option"])
    assert stopped.value.code == 2
    assert "--no-such-option" in capsys.readouterr().err


def test_the_command_is_installed_and_teaches():
    command = [sys.executable, "-m", "hf_shapley.cli"]
    help_text = subprocess.run([*command, "explain", "--help"], capture_output=True, text=True, check=True).stdout
    assert "Example: hf-shapley explain" in help_text
    assert subprocess.run([*command, "nothing"], capture_output=True, text=True).returncode == 2

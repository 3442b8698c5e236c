import json
import subprocess
import sys

import pytest
import torch
from conftest import VIT, make_model
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from hf_shapley import ShapleyViTConfig, ShapleyViTForImageClassification
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


def test_explain_writes_a_picture_and_prints_what_the_model_said(checkpoint, picture, tmp_path, capsys):
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "no_such.png"}, "no_such.png"),
        ({"image": "text.png"}, "text.png"),
        ({"image": "empty.png"}, "empty.png': it is empty (0 bytes)"),
        ({"output": "out.txt"}, "must end in"),
        ({"extra": ["--label", "dog"]}, "Unknown labels"),
        ({"extra": ["--top-k", "9"]}, "--top-k"),
        ({"model": "plain"}, "does not explain itself"),
        ({"model": "nowhere/at-all"}, "nowhere/at-all"),
    ],
)
def test_a_bad_request_is_one_clear_line_and_nothing_written(checkpoint, picture, tmp_path, capsys, change, message):
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
    ShapleyViTForImageClassification(ShapleyViTConfig(**VIT, attribution_head="votes+influence")).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 24}).save_pretrained(folder)
    assert main(["explain", picture, "--model", folder, "-o", str(tmp_path / "out.png"), "--json"]) == 0
    assert "The attributions of this model have not been trained." in caplog.text
    assert len(json.loads(capsys.readouterr().out)) == 2  # which the warning leaves alone


def test_the_demo_ends_with_a_model_results_figure_and_report(tmp_path, capsys):
    output = tmp_path / "demo"
    assert main(["demo", "--backbone", "convnext", "--epochs", "1", "--images", "2", "-o", str(output)]) == 0
    results = json.loads((output / "results.json").read_text())
    assert results["leak"] == 0 and results["efficiency_gap"] < 1e-5
    assert 0 < results["accuracy_joint"] < 1 and results["shapley_error_ratio"] > 0
    assert all(not isinstance(value, dict) for value in results.values())
    assert json.loads(capsys.readouterr().out) == results
    model = AutoModelForImageClassification.from_pretrained(output / "model")
    assert model.config.label2id["7"] == 7
    assert picture_width(output / "attributions.png") > 500
    report = (output / "report.html").read_text()
    assert "data:image/png;base64," in report and f"{results['shapley_correlation']:.4f}" in report
    assert not (output / "training").exists()


@pytest.mark.parametrize("option", [["--seeds", "0"], ["--images", "451"], ["--epochs", "0"]])
def test_a_demo_that_cannot_be_is_refused_before_anything_is_written(tmp_path, option, capsys):
    assert main(["demo", "-o", str(tmp_path / "demo"), *option]) == 1
    assert option[0].strip("-") in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


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
    assert printed["methods"]["model"]["efficiency_gap"] < 1e-5
    assert main(["evaluate", "--model", model, "--images", "1"]) == 1
    assert "--images" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_damaged_picture_of_a_data_set_is_named(checkpoint, tmp_path, capsys, command):
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
    assert f"hf-shapley {command}: Cannot read" in error
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

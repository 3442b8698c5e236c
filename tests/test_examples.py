"""Every example runs as it stands, in a process of its own, and says what the library says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextConfig,
    ViTConfig,
    ViTForImageClassification,
)

from hf_shapley import (
    ShapleyViTForImageClassification,
    digits_dataset,
    fine_tuning_recipe,
    load_explanations,
    refinement_recipe,
    train_digits_model,
)
from hf_shapley.jobs import training_job

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL_TRAINING = ["--max_train_samples", "64", "--max_eval_samples", "32", "--num_train_epochs", "1"]
SMALL_TRAINING += ["--per_device_train_batch_size", "32", "--disable_tqdm", "True", "--report_to", "none", "--use_cpu"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A digits model and its image processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for part in train_digits_model(epochs=1):
        part.save_pretrained(folder)
    return folder


def run(script: str, *arguments: str | Path, folder: Path) -> str:
    """What an example prints when it runs in `folder`."""
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_training_from_scratch_writes_a_model_that_predicts_what_the_example_says(tmp_path):
    arguments = [*SMALL_TRAINING, "--do_train", "--do_eval", "--do_predict", "--output_dir", "model"]
    run("run_shapley_image_classification.py", *arguments, folder=tmp_path)
    folder = tmp_path / "model"
    metrics = json.loads((folder / "all_results.json").read_text())
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    rows = digits_dataset()["test"].shuffle(seed=42).select(range(32))
    right = np.mean([row["label"] == str(label) for row, label in zip(predictions, rows["label"][:], strict=True)])
    assert metrics["eval_accuracy"] == metrics["predict_accuracy"] == right

    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(folder)(rows["image"][:], return_tensors="pt")["pixel_values"]
    logits = model(pixels).logits
    assert [model.config.id2label[label] for label in logits.argmax(-1).tolist()] == [x["label"] for x in predictions]
    scores = torch.tensor([row["score"] for row in predictions])
    torch.testing.assert_close(logits.softmax(-1).amax(-1).detach(), scores, atol=1e-5, rtol=0)
    assert "digits" in (folder / "README.md").read_text()


def test_a_folder_of_pictures_trains_a_plain_checkpoint_and_goes_on_where_it_stopped(tmp_path):
    for index in range(24):
        path = tmp_path / "pictures" / "train" / ("cat", "dog")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), (10 * index, 99, 200)).save(path)
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    plain = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=2, **shape))
    plain.save_pretrained(tmp_path / "plain")
    training_job.load_model(training_job.ModelArguments(), ["a", "b"])[1].save_pretrained(tmp_path / "plain")
    arguments = [*SMALL_TRAINING, "--model", str(tmp_path / "plain"), "--dataset", str(tmp_path / "pictures")]
    arguments += ["--attribution_head", "votes+influence", "--vote_readout", "pooled", "--influence_own_layers", "1"]
    arguments += ["--influence_gradient", "0.1", "--horizontal_flip", "--random_crop", "0.5"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--save_steps", "1", "--held_out", "0.25"]
    arguments += ["--per_device_train_batch_size", "9"]
    training_job.main(arguments)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.model_type == "shapley-vit"
    assert model.config.label2id == {"cat": 0, "dog": 1}
    assert (model.config.attribution_head, model.config.vote_readout) == ("votes+influence", "pooled")
    assert (model.config.influence_own_layers, model.config.influence_gradient) == (1, 0.1)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2  # 18 pictures of 24, 9 at a time
    training_job.main([*arguments, "--num_train_epochs", "2", "--resume_from_checkpoint", "last"])
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 4


def test_text_labels_and_other_column_names_become_class_labels(tmp_path):
    rows = digits_dataset()
    rows = rows.map(lambda row: {"kind": "even" if row["label"] % 2 == 0 else "odd"}).remove_columns("label")
    rows.rename_column("image", "picture").save_to_disk(tmp_path / "rows")
    options = {"image_column": "picture", "label_column": "kind", "max_eval_samples": 10}
    splits = training_job.load_splits(training_job.DataArguments(str(tmp_path / "rows"), **options), seed=0)
    assert splits["train"].features["label"].names == ["even", "odd"]
    assert (splits["train"].num_rows, splits["eval"].num_rows) == (1347, 10)
    assert splits["train"]["label"][:] == [kind == "odd" for kind in rows["train"]["kind"][:]]
    with pytest.raises(ValueError, match="label_column.*kind"):
        training_job.load_splits(training_job.DataArguments(str(tmp_path / "rows"), image_column="picture"), 0)


def test_one_json_file_may_hold_all_options(tmp_path):
    options = {"backbone": "vit", "output_dir": str(tmp_path), "learning_rate": 0.5, "max_eval_samples": 3}
    (tmp_path / "options.json").write_text(json.dumps(options))
    model_args, data_args, args = training_job.parse_arguments([str(tmp_path / "options.json")])
    assert (model_args.backbone, data_args.max_eval_samples, args.learning_rate) == ("vit", 3, 0.5)
    assert args.do_train
    assert args.do_eval


def test_a_plain_checkpoint_starts_from_the_recipe_for_it(checkpoint, tmp_path):
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    plain = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **shape))
    plain.save_pretrained(tmp_path / "plain")
    training_job.load_model(training_job.ModelArguments(), ["a", "b"])[1].save_pretrained(tmp_path / "plain")
    arguments = ["--model", str(tmp_path / "plain"), "--learning_rate", "2e-3", "--output_dir", str(tmp_path)]
    model_options, training_options = fine_tuning_recipe(2e-3)
    model_args, _, args = training_job.parse_arguments(arguments)
    assert {name: getattr(args, name) for name in training_options} == training_options
    model, _ = training_job.load_model(model_args, ["a", "b"])
    assert {name: getattr(model.config, name) for name in model_options} == model_options
    assert model.classifier.weight.requires_grad
    for game, parts in (("own", {"attribution_head"}), ("adapted", {"attribution_head", "coalition_adapters"})):
        model_options, training_options = fine_tuning_recipe(2e-3, game=game)
        training_options = training_options if game == "adapted" else refinement_recipe(2e-3)
        frozen, _, args = training_job.parse_arguments([*arguments, "--freeze_classifier", "--game", game])
        assert {name: getattr(args, name) for name in training_options} == training_options
        model, _ = training_job.load_model(frozen, ["a", "b"])
        assert {name: getattr(model.config, name) for name in model_options} == model_options
        learning = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert learning == parts
        assert all(parameter.requires_grad for parameter in model.attribution_head.parameters())
    for name in ("freeze_classifier", "freeze_adapters"):
        with pytest.raises(ValueError, match=rf"{name}.*checkpoint with `--model`"):
            training_job.ModelArguments(**{name: True})
        with pytest.raises(ValueError, match=rf"{name}.*ignore_mismatched_sizes"):
            training_job.ModelArguments("plain", **{name: True}, ignore_mismatched_sizes=True)

    assert training_job.parse_arguments([*arguments, "--value_gradient", "0.5"])[2].value_gradient == 0.5
    (tmp_path / "all.json").write_text(json.dumps({"model": str(tmp_path / "plain"), "output_dir": str(tmp_path)}))
    assert training_job.parse_arguments([str(tmp_path / "all.json")])[2].value_gradient == 0.1
    for others in ([*arguments, "--attribution_head", "votes"], ["--model", str(checkpoint), "--output_dir", "out"]):
        model_args, _, args = training_job.parse_arguments(others)
        assert (model_args.vote_readout, args.value_gradient) == (None, 1.0)
    ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2).save_pretrained(tmp_path / "convnext")
    options = vars(training_job.parse_arguments(["--model", str(tmp_path / "convnext"), *arguments[2:]])[0])
    assert fine_tuning_recipe(backbone="convnext")[0].items() <= options.items()
    with pytest.raises(ValueError, match=r"learning_rate.*above 0"):
        fine_tuning_recipe(0)
    with pytest.raises(ValueError, match=r"backbone.*'vit', 'convnext'.*'swin'"):
        fine_tuning_recipe(backbone="swin")


def test_the_influence_head_may_learn_on_alone(tmp_path):
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    processor = training_job.load_model(training_job.ModelArguments(), ["a", "b"])[1]
    plain = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **shape))
    plain.save_pretrained(tmp_path / "plain")
    options, _ = fine_tuning_recipe(game="adapted")
    ShapleyViTForImageClassification.from_pretrained(tmp_path / "plain", **options).save_pretrained(tmp_path / "ours")
    for start, adapters in (("plain", 0), ("ours", 1)):
        processor.save_pretrained(tmp_path / start)
        arguments = ["--model", str(tmp_path / start), "--freeze_adapters", "--output_dir", str(tmp_path)]
        model_args, _, args = training_job.parse_arguments([*arguments, "--learning_rate", "2e-3"])
        assert {name: getattr(args, name) for name in refinement_recipe(2e-3)} == refinement_recipe(2e-3)
        assert args.shapley_warmup == 0
        model, _ = training_job.load_model(model_args, ["a", "b"])
        assert (len(model.coalition_adapters), model.config.influence_own_layers) == (adapters, 1)
        learning = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert learning == {"attribution_head"}


def test_explaining_an_image_prints_what_adds_up_and_draws_it(tmp_path):
    text = run("explain_image.py", "--epochs", "1", "--top_k", "2", "-o", "out/picture.png", folder=tmp_path)
    lines = re.findall(r"^(\d) .*% +(\S+) +(\S+) +(\S+)$", text, flags=re.MULTILINE)
    assert len(lines) == 2
    for _, base_value, patches, logit in lines:
        assert float(base_value) + float(patches) == pytest.approx(float(logit), abs=0.016)  # three rounded numbers
    with Image.open(tmp_path / "out" / "picture.png") as picture:
        assert picture.width == 2 * 224 + 8


def test_explaining_a_data_set_counts_every_row_and_goes_on(checkpoint, tmp_path):
    arguments = ["--model", checkpoint, "--streaming", "-o", "out"]
    text = run("explain_dataset.py", *arguments, folder=tmp_path)
    assert "450 rows in out, 450 of them from this call." in text
    predicted = load_explanations(tmp_path / "out")["predicted_label"][:]
    counts = dict(re.findall(r"^(\d) +(\d+) +[\d.]+%", text, flags=re.MULTILINE))
    assert counts == {label: str(predicted.count(label)) for label in set(predicted)}
    assert (tmp_path / "out" / "mean_attributions.png").is_file()


def test_faithfulness_is_measured_for_the_model_and_its_rivals(checkpoint, tmp_path):
    arguments = ["--model", checkpoint, "--images", "4", "--budget", "2000", "-o", "out.json"]
    text = run("evaluate_faithfulness.py", *arguments, folder=tmp_path)
    results = json.loads((tmp_path / "out.json").read_text())
    methods = results["methods"]
    assert list(methods) == ["model", "leave one out", "chance"]
    assert methods["model"]["efficiency_gap"] < 1e-5 < methods["chance"]["efficiency_gap"]
    # After a single epoch already, removal follows the attributions and not chance.
    for rival in ("model", "leave one out"):
        assert methods[rival]["faithfulness_correlation"] > methods["chance"]["faithfulness_correlation"] + 0.3
    assert f"{results['certificate']['error_ratio']:.4f}" in text
    assert results["certificate"]["images"] == 4


@pytest.mark.parametrize("frozen", [False, True])
def test_fine_tuning_a_plain_checkpoint_compares_three_models(frozen, tmp_path):
    arguments = ["--plain_epochs", "1", "--epochs", "1", "--certified_images", "3", "-o", "out"]
    if frozen:
        arguments.append("--freeze_classifier")
    text = run("finetune_from_plain_checkpoint.py", *arguments, folder=tmp_path)
    rows = dict(re.findall(r"^(\w[\w -]+?) {2,}([\d.]+) +[-\d.]+$", text, flags=re.MULTILINE))
    last = "explained while frozen" if frozen else "fine-tuned jointly"
    assert list(rows) == ["plain checkpoint", "loaded as Shapley model", last]
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "plain").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out" / "plain")
    test = digits_dataset()["test"]
    with torch.no_grad():
        logits = plain(processor(test["image"][:], return_tensors="pt")["pixel_values"]).logits
    expected = (logits.argmax(-1) == torch.tensor(test["label"][:])).float().mean().item()
    assert float(rows["plain checkpoint"]) == pytest.approx(expected, abs=1e-4)
    assert rows["loaded as Shapley model"] == rows["plain checkpoint"]  # its predictions are kept
    assert (rows[last] == rows["plain checkpoint"]) == frozen
    tuned = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "shapley")
    assert tuned.config.model_type == "shapley-vit" and tuned.config.vote_readout == "pooled"


def test_no_example_is_left_out():
    scripts = {path.name for path in EXAMPLES.rglob("*.py")}
    tests = "".join(path.read_text() for path in (Path(__file__), Path(__file__).with_name("test_gradio_demo.py")))
    assert {name for name in scripts if name not in tests} == set()

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
    ViTConfig,
    ViTForImageClassification,
)

from hf_shapley import (
    ShapleyTrainer,
    digits_dataset,
    load_explanations,
    train_digits_model,
)
from hf_shapley.data.splits import DataArguments, load_splits
from hf_shapley.jobs import training_job
from hf_shapley.jobs.starting_model import ModelArguments, load_model
from hf_shapley.jobs.training_arguments import parse_arguments

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


def test_models_trained_from_scratch_predict_what_was_written(tmp_path):
    """Training from scratch writes a model that predicts what the example says."""
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


def test_training_on_a_folder_resumes_where_it_stopped(tmp_path):
    """A folder of pictures trains a plain checkpoint, and training goes on where it stopped."""
    for index in range(24):
        path = tmp_path / "pictures" / "train" / ("cat", "dog")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), (10 * index, 99, 200)).save(path)
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    plain = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=2, **shape))
    plain.save_pretrained(tmp_path / "plain")
    load_model(ModelArguments(), ["a", "b"])[1].save_pretrained(tmp_path / "plain")
    arguments = [*SMALL_TRAINING, "--model", str(tmp_path / "plain"), "--dataset", str(tmp_path / "pictures")]
    arguments += ["--influence_layers", "1", "--influence_own_layers", "0"]
    arguments += ["--attribution_gradient", "True", "--horizontal_flip", "--random_crop", "0.5"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--save_steps", "1", "--held_out", "0.25"]
    arguments += ["--per_device_train_batch_size", "9"]
    training_job.main(arguments)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.model_type == "shapley-vit"
    assert model.config.label2id == {"cat": 0, "dog": 1}
    head = ("vote_readout", "influence_layers", "influence_own_layers", "attribution_gradient")
    assert [getattr(model.config, name) for name in head] == ["pooled", 1, 0, True]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2  # 18 pictures of 24, 9 at a time
    training_job.main([*arguments, "--num_train_epochs", "2", "--resume_from_checkpoint", "last"])
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 4


def test_text_in_any_column_becomes_class_labels(tmp_path):
    """Text labels in a column of another name become class labels; without that name they are refused."""
    rows = digits_dataset()
    rows = rows.map(lambda row: {"kind": "even" if row["label"] % 2 == 0 else "odd"}).remove_columns("label")
    rows.rename_column("image", "picture").save_to_disk(tmp_path / "rows")
    options = {"image_column": "picture", "label_column": "kind", "max_eval_samples": 10}
    splits = load_splits(DataArguments(str(tmp_path / "rows"), **options), seed=0)
    assert splits["train"].features["label"].names == ["even", "odd"]
    assert (splits["train"].num_rows, splits["eval"].num_rows) == (1347, 10)
    assert splits["train"]["label"][:] == [kind == "odd" for kind in rows["train"]["kind"][:]]
    with pytest.raises(ValueError, match="label_column.*kind"):
        load_splits(DataArguments(str(tmp_path / "rows"), image_column="picture"), 0)


def test_one_json_file_may_hold_all_options(tmp_path):
    options = {"backbone": "vit", "output_dir": str(tmp_path), "learning_rate": 0.5, "max_eval_samples": 3}
    (tmp_path / "options.json").write_text(json.dumps(options))
    model_args, data_args, args = parse_arguments([str(tmp_path / "options.json")])
    assert (model_args.backbone, data_args.max_eval_samples, args.learning_rate) == ("vit", 3, 0.5)
    assert args.do_train
    assert args.do_eval


@pytest.fixture
def plain(tmp_path):
    """Arguments of a training that starts from a plain checkpoint."""
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **shape)).save_pretrained(tmp_path / "plain")
    load_model(ModelArguments(), ["a", "b"])[1].save_pretrained(tmp_path / "plain")
    return ["--model", str(tmp_path / "plain"), "--learning_rate", "2e-3", "--output_dir", str(tmp_path)]


def learning(model):
    """Parts of a model that learn."""
    return {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ([], {"vit", "classifier", "attribution_head"}),
        (["--freeze_classifier"], {"attribution_head"}),
        (["--freeze_classifier", "--coalition_adapter_size", "4"], {"attribution_head", "coalition_adapters"}),
        (["--freeze_adapters", "--coalition_adapter_size", "4"], {"attribution_head"}),
    ],
)
def test_options_choose_what_of_a_checkpoint_learns(plain, options, parts):
    """Options say which parts of a plain checkpoint learn, and the other defaults follow from them."""
    model_args, _, args = parse_arguments([*plain, *options])
    model, _ = load_model(model_args, ["a", "b"])
    assert learning(model) == parts and model.config.influence_own_layers == 1
    trainer = ShapleyTrainer(model, args)
    assert trainer.attribution_learning_rate == 8 * 2e-3
    frozen = "vit" not in parts
    assert (trainer.num_pairs, trainer.shapley_warmup) == ((4, 0) if frozen else (1, 0.3))
    assert trainer.value_gradient == (0.03 if "--coalition_adapter_size" in options else 0.1)


def test_digits_from_scratch_have_defaults_of_their_own(plain, tmp_path):
    """A file of options counts as the command line does; what is given goes before the defaults."""
    model_args, _, args = parse_arguments(["--use_cpu"])
    assert (model_args.vote_readout, args.value_gradient, args.num_train_epochs) == ("patches", 1.0, 16)
    (tmp_path / "all.json").write_text(json.dumps({"model": plain[1], "output_dir": str(tmp_path)}))
    for argv in (plain, [str(tmp_path / "all.json")]):
        model_args, _, args = parse_arguments(argv)
        assert (model_args.vote_readout, args.value_gradient, args.num_train_epochs) == (None, None, 3)
    assert parse_arguments([*plain, "--value_gradient", "0.5"])[2].value_gradient == 0.5


@pytest.mark.parametrize("name", ["freeze_classifier", "freeze_adapters"])
def test_freezing_needs_a_classifier_to_keep(name):
    with pytest.raises(ValueError, match=rf"{name}.*checkpoint with `--model`"):
        ModelArguments(**{name: True})
    with pytest.raises(ValueError, match=rf"{name}.*ignore_mismatched_sizes"):
        ModelArguments("plain", **{name: True}, ignore_mismatched_sizes=True)


def test_an_explained_image_is_drawn_and_adds_up(tmp_path):
    """Explaining an image prints a base value and patches that add up to the logit, and draws the maps."""
    text = run("explain_image.py", "--epochs", "1", "--top_k", "2", "-o", "out/picture.png", folder=tmp_path)
    lines = re.findall(r"^(\d) .*% +(\S+) +(\S+) +(\S+)$", text, flags=re.MULTILINE)
    assert len(lines) == 2
    for _, base_value, patches, logit in lines:
        assert float(base_value) + float(patches) == pytest.approx(float(logit), abs=0.016)  # three rounded numbers
    with Image.open(tmp_path / "out" / "picture.png") as picture:
        assert picture.width == 2 * 224 + 8


def test_an_explained_data_set_counts_every_row(checkpoint, tmp_path):
    """Explaining a data set counts every row by its predicted label and draws the mean attributions."""
    arguments = ["--model", checkpoint, "--streaming", "-o", "out"]
    text = run("explain_dataset.py", *arguments, folder=tmp_path)
    assert "450 rows in out, 450 of them from this call." in text
    predicted = load_explanations(tmp_path / "out")["predicted_label"][:]
    counts = dict(re.findall(r"^(\d) +(\d+) +[\d.]+%", text, flags=re.MULTILINE))
    assert counts == {label: str(predicted.count(label)) for label in set(predicted)}
    assert (tmp_path / "out" / "mean_attributions.png").is_file()


def test_faithfulness_is_measured_beside_rival_methods(checkpoint, tmp_path):
    """Faithfulness is measured for the model and its rivals, and the model is better than chance."""
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

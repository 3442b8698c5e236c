"""Labels keep their meaning between a data set's splits, a checkpoint and the rows that are trained on."""

import json
import math

import pytest
import torch
from conftest import make_model
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, load_dataset
from PIL import Image as PILImage
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from hf_shapley import (
    ShapleyConvNextForImageClassification,
    ShapleyTrainer,
    ShapleyTrainingArguments,
    add_attributions,
)
from hf_shapley.data.dataset_images import undecoded
from hf_shapley.data.labels import check_labels_of_checkpoint
from hf_shapley.data.splits import DataArguments, load_splits
from hf_shapley.data.transforms import with_transforms
from hf_shapley.jobs import training_job
from hf_shapley.jobs.starting_model import ModelArguments, load_model

NAMES = ["cat", "dog", "cow", "ant", "bee"]


def picture(shade: int) -> PILImage.Image:
    return PILImage.new("RGB", (24, 16), (shade % 256, 99, 200))


def rows(labels: list, feature=None) -> Dataset:
    """As many pictures as labels, the shade of a picture being its number."""
    pictures = [picture(place) for place in range(len(labels))]
    dataset = Dataset.from_dict({"image": pictures}, features=Features({"image": Image()}))
    return dataset.add_column("label", labels, feature=feature)


def classes(labels: list[str], names: list[str] = NAMES) -> Dataset:
    """Pictures of classes, numbered in the order of `names`."""
    return rows([names.index(label) for label in labels], ClassLabel(names=names))


def split_of(tmp_path, options: dict | None = None, **splits: Dataset) -> DatasetDict:
    """What the training job makes of a data set with these splits."""
    DatasetDict(splits).save_to_disk(tmp_path / "rows")
    arguments = DataArguments(str(tmp_path / "rows"), **options or {})
    return load_splits(arguments, seed=0)


def names_of(split: Dataset) -> list[str]:
    return [split.features["label"].names[label] for label in split["label"][:]]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (list(range(12)), [str(label) for label in range(12)]),
        ([100, 7, 3, 7], ["3", "7", "100"]),
        ([5, -2, 0, -1], ["-2", "-1", "0", "5"]),
        ([10.0, 0.5, 2.0], ["0.5", "2.0", "10.0"]),
        ([True, False, True], ["False", "True"]),
        (["b", "a", "c"], ["a", "b", "c"]),
    ],
)
def test_each_row_keeps_the_name_of_its_label(labels, names, tmp_path):
    """Whatever the column's type: the name is the value's text, and ids follow the values' own order."""
    train = split_of(tmp_path, train=rows(labels), test=rows(labels[:1]))["train"]
    assert train.features["label"].names == names
    assert names_of(train) == [str(label) for label in labels]


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        (["a", None, "b"], None, "Row 1 of the split 'train' has no label"),
        ([0.0, 1.0, math.nan], None, "Row 2 of the split 'train' has no label"),
        ([0, -1, 1], ClassLabel(names=NAMES), "Row 1 of the split 'train' has no label"),
        ([0, None, 1], ClassLabel(names=NAMES), "Row 1 of the split 'train' has no label"),
        ([[0], [1, 2]], None, "'label' must be one text, number or class per row"),
        ([[0], [1, 2]], List(ClassLabel(names=NAMES)), "'label' must be one text, number or class per row"),
        ([{"id": 1}, {"id": 2}], None, "'label' must be one text, number or class per row"),
    ],
)
def test_rows_without_one_label_are_refused(labels, feature, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        split_of(tmp_path, train=rows(labels, feature), test=rows(labels, feature))


def test_splits_are_joined_by_names_not_numbers(tmp_path):
    """A split that numbers the same classes in another order, or has some of them only, is evaluated by names."""
    told = ["dog", "bee", "cat", "dog"]
    for place, other in enumerate((NAMES[::-1], ["bee", "cat", "dog"])):
        splits = split_of(tmp_path / str(place), train=classes(NAMES), validation=classes(told, other))
        assert splits["eval"].features["label"].names == NAMES
        assert names_of(splits["eval"]) == told
    with pytest.raises(ValueError, match=r"Row 1 of the split 'validation' has the label 'fox'.*cat"):
        split_of(tmp_path, train=classes(NAMES), validation=classes(["cat", "fox"], ["cat", "fox"]))


def save_checkpoint(folder, id2label: dict[int, str] | None, **options):
    """A small model and its processor in a folder."""
    names = {} if id2label is None else {"id2label": id2label, "label2id": {v: k for k, v in id2label.items()}}
    model = make_model("convnext", **names, **options)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 24}).save_pretrained(folder)
    return model


def load(folder, names: list[str] = NAMES, **options):
    return load_model(ModelArguments(str(folder), **options), names)[0]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_checkpoints_labels_are_found_by_name(frozen, tmp_path):
    """A data set that numbers the checkpoint's classes in another order is trained and evaluated by their names."""
    head = {"head": "votes+influence"}
    saved = save_checkpoint(tmp_path / "model", dict(enumerate(NAMES[::-1])), **head)
    told = ["dog", "bee", "cat", "ant"]
    splits = split_of(tmp_path, train=classes(told), test=classes(told))
    options = ModelArguments(str(tmp_path / "model"), freeze_classifier=frozen)
    model, processor = load_model(options, NAMES)
    assert model.config.id2label == dict(enumerate(NAMES[::-1]))
    assert torch.equal(model.classifier.weight, saved.classifier.weight)
    seen = with_transforms(splits, model, processor, DataArguments())
    for split in ("train", "eval", "predict"):
        assert [model.config.id2label[seen[split][row]["labels"]] for row in range(4)] == told


def test_labels_never_named_are_taken_by_number(tmp_path):
    """Labels that a checkpoint never named are taken by their number."""
    save_checkpoint(tmp_path / "model", None)
    assert load(tmp_path / "model").config.id2label == dict(enumerate(NAMES))


@pytest.mark.parametrize("known", [["fox", "dog", "cow", "ant", "bee"], NAMES[:2], None])
def test_a_classifier_of_other_labels_is_refused(known, tmp_path):
    """Names or numbers of labels differ: the message has both, and a new classifier is made only where asked for."""
    id2label = {0: "LABEL_0", 1: "LABEL_1"} if known is None else dict(enumerate(known))
    saved = save_checkpoint(tmp_path / "model", id2label, num_labels=len(id2label))
    with pytest.raises(ValueError, match=rf"has {len(id2label)} labels, .*data set 5, .*ignore_mismatched_sizes"):
        load(tmp_path / "model")
    model = load(tmp_path / "model", ignore_mismatched_sizes=True)
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.classifier.weight.shape[0] == 5
    assert not model.classifier.bias.any()
    assert saved.classifier.bias.any()
    backbone = "convnext.embeddings.patch_embeddings.weight"
    assert torch.equal(model.state_dict()[backbone], saved.state_dict()[backbone])


def test_a_checkpoint_without_classifier_gets_a_new_one(tmp_path):
    """As of pretraining: its label names mean nothing. There is nothing to freeze, which is refused."""
    config = ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    assert load(tmp_path).config.id2label == dict(enumerate(NAMES))
    with pytest.raises(ValueError, match="no classifier to keep"):
        load(tmp_path, freeze_classifier=True)


def test_added_attributions_are_of_the_named_class():
    """`label_column` of a `ClassLabel` explains the model's label of that name, whatever its number."""
    model = make_model("convnext", id2label=dict(enumerate(NAMES[::-1])))
    processor = ViTImageProcessorPil(size={"height": 16, "width": 24})
    told = ["dog", "bee", "cat"]
    explained = add_attributions(classes(told), model, processor, label_column="label")
    assert [explained.features["attributions_label"].names[x] for x in explained["attributions_label"][:]] == told
    with pytest.raises(ValueError, match=r"\['fox'\].*rename"):
        add_attributions(classes(["fox"], ["cat", "fox"]), model, processor, label_column="label")
    with pytest.raises(ValueError, match="Unknown labels"):
        add_attributions(rows([-1], ClassLabel(names=NAMES)), model, processor, label_column="label")


ARGUMENTS = ["--num_train_epochs", "1", "--use_cpu", "--disable_tqdm", "True", "--report_to", "none"]


@pytest.mark.parametrize("labels", [[-1, -1, -1], [0, -1, None], None])
def test_rows_without_labels_are_predicted(labels, tmp_path):
    """A split whose labels are secret: every row has its prediction, and nothing is said of accuracy."""
    save_checkpoint(tmp_path / "model", dict(enumerate(NAMES)))
    secret = rows([0, 0, 0] if labels is None else labels, ClassLabel(names=NAMES))
    secret = secret.remove_columns("label") if labels is None else secret
    DatasetDict(train=classes(NAMES * 2), test=secret).save_to_disk(tmp_path / "rows")
    arguments = ["--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "rows"), *ARGUMENTS]
    arguments += ["--output_dir", str(tmp_path / "out"), "--do_predict", "--predict_split", "test"]
    training_job.main(arguments)
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    model = ShapleyConvNextForImageClassification.from_pretrained(tmp_path / "model")
    processor = ViTImageProcessorPil.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        best = model.eval()(**processor([picture(place) for place in range(3)], return_tensors="pt")).logits.argmax(-1)
    assert [json.loads(line)["label"] for line in lines] == [NAMES[label] for label in best]
    assert "predict_accuracy" not in json.loads((tmp_path / "out" / "predict_results.json").read_text())


def test_a_split_of_secret_labels_is_not_evaluated(tmp_path):
    """Where `test` has no labels a part of training's is held out; asked for by name, it is refused."""
    secret = rows([-1] * 3, ClassLabel(names=NAMES))
    splits = split_of(tmp_path, train=classes(NAMES * 4), test=secret)
    assert (splits["train"].num_rows, splits["eval"].num_rows) == (17, 3)
    assert "label" in splits["eval"].column_names
    with pytest.raises(ValueError, match="Row 0 of the split 'test' has no label"):
        split_of(tmp_path / "again", {"eval_split": "test"}, train=classes(NAMES * 4), test=secret)
    arguments = DataArguments(str(tmp_path / "again" / "rows"), eval_split="test")
    splits = load_splits(arguments, seed=0, evaluates=False)
    assert splits["predict"].column_names == ["image", "row"]


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    """Its row in the split that it comes from and its path, though rows are shuffled and held out."""
    save_checkpoint(tmp_path / "model", dict(enumerate(NAMES)))
    for place in range(10):
        path = tmp_path / "pictures" / "train" / NAMES[place % 5] / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(place).save(path)
    path.write_bytes(path.read_bytes()[:60])
    arguments = ["--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "pictures"), *ARGUMENTS, "--do_eval"]
    with pytest.raises(
        ValueError, match=r"Row (\d+) of the split 'train' holds no readable image: .*9\.png"
    ) as caught:
        training_job.main([*arguments, "--held_out", "0.9", "--output_dir", str(tmp_path / "out")])
    row = int(str(caught.value).split()[1])
    train = undecoded(load_dataset(str(tmp_path / "pictures"), split="train"), "image")
    assert train[row]["image"]["path"] == str(path)


def test_the_trainer_names_an_unreadable_picture(tmp_path):
    """Of a data set that decodes its pictures itself too; an error of the caller's own stays what it is."""
    stored = []
    for place in range(4):
        picture(place).save(tmp_path / "picture.png")
        stored.append({"bytes": (tmp_path / "picture.png").read_bytes(), "path": f"{place}.png"})
    stored[2]["bytes"] = stored[2]["bytes"][:60]
    data = Dataset.from_dict({"image": stored}, features=Features({"image": Image()}))
    args = ShapleyTrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    args.remove_unused_columns = False

    def train(transform, rows=data):
        ShapleyTrainer(make_model("convnext"), args, train_dataset=rows.with_transform(transform)).train()

    def transform(batch: dict) -> dict:
        shades = [float(image.getpixel((0, 0))[0]) for image in batch["image"]]
        return {"pixel_values": [torch.full((3, 16, 24), shade) for shade in shades], "labels": [0] * len(shades)}

    with pytest.raises(ValueError, match=r"Row 2 holds no readable image in 'image': .*2\.png"):
        train(transform)
    with pytest.raises(KeyError, match="picture"):
        train(lambda batch: batch["picture"], data.select([0, 1, 3]))


def test_a_table_of_another_name_is_pointed_out(tmp_path):
    """Labels in a table that `datasets` does not read beside pictures: the message says how it would."""
    picture(0).save(tmp_path / "0.png")
    picture(1).save(tmp_path / "1.png")
    (tmp_path / "labels.csv").write_text("file_name,label\n0.png,cat\n1.png,dog\n")
    with pytest.raises(ValueError, match=r"--label_column.*labels\.csv' was not read.*metadata\.csv"):
        load_splits(DataArguments(str(tmp_path)), seed=0)


def test_going_on_with_other_labels_is_refused(tmp_path):
    """A checkpoint of the run whose label ids mean something else than the model's now."""
    save_checkpoint(tmp_path / "checkpoint-1", dict(enumerate(NAMES)))
    for part in ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (tmp_path / "checkpoint-1" / part).touch()
    args = ShapleyTrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = ShapleyTrainer(make_model("convnext", id2label=dict(enumerate(NAMES[::-1]))), args)
    with pytest.raises(ValueError, match=r"labels of .*checkpoint-1' are \['cat'.*those of the model \['bee'"):
        trainer.train(resume_from_checkpoint=True)


def test_labels_of_a_checkpoint_are_compared_in_order(tmp_path):
    """Eleven labels and more, which a configuration may list as text, are still those of the model."""
    names = {label: f"kind {label}" for label in range(12)}
    (tmp_path / "config.json").write_text(
        json.dumps({"id2label": dict(sorted((str(k), v) for k, v in names.items()))})
    )
    check_labels_of_checkpoint(tmp_path, names)
    with pytest.raises(ValueError, match="kind 0"):
        check_labels_of_checkpoint(tmp_path, {**names, 11: "another"})

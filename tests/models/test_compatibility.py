"""Checkpoints of every earlier version load and answer as they did, and the stated version bounds are those tested."""

import configparser
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ViTForImageClassification

from hf_shapley import ShapleyConvNextForImageClassification, ShapleyViTForImageClassification

ROOT = Path(__file__).parents[2]
FROZEN = sorted(path.parent for path in (ROOT / "tests" / "data").glob("*/*/config.json"))


@pytest.mark.parametrize("folder", FROZEN, ids=lambda folder: f"{folder.parent.name} {folder.name}")
def test_a_frozen_checkpoint_answers_as_it_did(folder):
    expected = load_file(folder / "expected.safetensors")
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert isinstance(model, ShapleyViTForImageClassification | ShapleyConvNextForImageClassification)
    with torch.no_grad():
        output = model(expected["pixel_values"])
    for name in ("logits", "attributions", "base_values"):
        torch.testing.assert_close(output[name], expected[name], atol=1e-5, rtol=1e-4)
    values = model.coalition_values(expected["pixel_values"], expected["coalitions"])
    torch.testing.assert_close(values, expected["coalition_values"], atol=1e-5, rtol=1e-4)
    assert model.config.label2id == {"cat": 0, "dog": 1, "bird": 2}


def test_both_backbones_and_heads_are_frozen():
    heads = {"vit": ["patches", "pooled", "adapters"], "convnext": ["votes", "pooled", "own"]}
    wanted = {f"{backbone}-{head}" for backbone in heads for head in heads[backbone]}
    assert wanted <= {folder.name for folder in FROZEN}
    assert sum(path.stat().st_size for folder in FROZEN for path in folder.iterdir()) < 25_000 * len(FROZEN)


@pytest.mark.parametrize("folder", FROZEN, ids=lambda folder: f"{folder.parent.name} {folder.name}")
def test_a_frozen_checkpoint_survives_being_saved_again(folder, tmp_path):
    cls = type(AutoModelForImageClassification.from_pretrained(folder))
    cls.from_pretrained(folder).save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    untied = before.pop("attribution_head.influence.weight", None)
    if untied is not None:
        tied = after["classifier.weight"] @ after.pop("attribution_head.correction.weight")
        torch.testing.assert_close(tied, untied, atol=1e-5, rtol=1e-4)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_plain_checkpoints_named_by_transformers_4_load(tmp_path):
    """Most ViT checkpoints on the Hub have weights named before transformers 5 renamed them."""
    model = make_model("vit")
    with torch.no_grad():
        expected = model(torch.ones(1, 3, 16, 24)).logits
    renames = [
        (r"vit\.layers\.(\d+)\.attention\.([qkv])_proj", r"vit.encoder.layer.\1.attention.attention.\2_proj"),
        (r"attention\.attention\.q_proj", "attention.attention.query"),
        (r"attention\.attention\.k_proj", "attention.attention.key"),
        (r"attention\.attention\.v_proj", "attention.attention.value"),
        (r"vit\.layers\.(\d+)\.attention\.o_proj", r"vit.encoder.layer.\1.attention.output.dense"),
        (r"vit\.layers\.(\d+)\.mlp\.fc1", r"vit.encoder.layer.\1.intermediate.dense"),
        (r"vit\.layers\.(\d+)\.mlp\.fc2", r"vit.encoder.layer.\1.output.dense"),
        (r"vit\.layers\.", "vit.encoder.layer."),
    ]
    weights = {}
    for name, tensor in model.state_dict().items():
        for new, old in renames:
            name = re.sub(new, old, name)
        weights[name] = tensor.clone()
    assert "vit.encoder.layer.1.attention.attention.query.weight" in weights
    config = json.loads(model.config.to_json_string())
    config = {key: config[key] for key in config if key not in ("auto_map", "custom_pipelines")}
    config |= {"model_type": "vit", "architectures": [ViTForImageClassification.__name__]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = ShapleyViTForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(torch.ones(1, 3, 16, 24)).logits, expected)


def test_oldest_tested_versions_are_the_packages_bounds():
    """The oldest versions that are tested are the lower bounds of what the package requires."""
    package = configparser.ConfigParser()
    package.read(ROOT / "setup.cfg")
    required = package["options"]["install_requires"].split()
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\d.]+).*", line).groups() for line in required)
    text = (ROOT / "constraints-oldest.txt").read_text()
    oldest = dict(re.findall(r"(?m)^([\w-]+)==([\d.]+)$", text))
    assert bounds.keys() <= oldest.keys()
    for name, bound in bounds.items():
        assert (oldest[name] + ".").startswith(bound + "."), name


def test_the_documented_matrix_is_what_the_constraints_say():
    rows = dict(re.findall(r"(?m)^\| (oldest|newest) \|.*?\| (.+) \|$", (ROOT / "CONTRIBUTING.md").read_text()))
    packages = ["torch", "transformers", "accelerate", "datasets", "numpy"]
    for name, path in {"oldest": "constraints-oldest.txt", "newest": "constraints.txt"}.items():
        pinned = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)$", (ROOT / path).read_text()))
        assert rows[name].split(" | ") == [pinned[package] for package in packages]

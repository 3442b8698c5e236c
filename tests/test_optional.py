"""What is not installed is not needed, or is named together with the extra that brings it."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model
from PIL import Image
from transformers import ViTImageProcessorPil, pipeline

from hf_shapley import TASK, as_shapiq_game, attribution_figure, captum_forward, export_onnx, to_shap_explanation
from hf_shapley.cli import main

DEMO = Path(__file__).parents[1] / "examples" / "gradio_demo" / "app.py"
OPTIONAL = ["captum", "gradio", "matplotlib", "onnx", "onnxruntime", "onnxscript", "shap", "shapiq"]


@pytest.fixture(autouse=True)
def _nothing_optional(monkeypatch):
    """As if none of the extras were installed."""
    for name in {name for name in sys.modules if name.split(".")[0] in OPTIONAL} | set(OPTIONAL):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def model():
    return make_model("vit")


@pytest.fixture
def checkpoint(model, tmp_path) -> str:
    for part in (model, ViTImageProcessorPil(size={"height": 16, "width": 24})):
        part.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_classifying_explaining_and_overlays_need_no_extra(checkpoint):
    for task in (TASK, "image-classification"):
        answers = pipeline(task, model=checkpoint, device="cpu")(Image.new("RGB", (60, 40)), top_k=2)
        assert len(answers) == 2
    (answer,) = pipeline(TASK, model=checkpoint, device="cpu")(Image.new("RGB", (60, 40)), top_k=1, overlay=True)
    assert answer["overlay"].size == (60, 40)


def test_the_games_of_shapiq_and_captum_need_neither(model, pixel_values):
    assert as_shapiq_game(model, pixel_values[:1], 0).n_players == 24
    forward, presence, _ = captum_forward(model, pixel_values)
    torch.testing.assert_close(forward(presence, pixel_values), model(pixel_values).logits)


@pytest.mark.parametrize(
    "use, extra",
    [
        (lambda model, folder: attribution_figure(Image.new("RGB", (6, 4)), torch.zeros(1, 2, 3), ["a"]), "plot"),
        (lambda model, folder: to_shap_explanation(torch.zeros(1, 1, 2, 3), torch.zeros(1)), "interop"),
        (lambda model, folder: export_onnx(model, folder / "model.onnx"), "onnx"),
    ],
    ids=["figure", "shap", "onnx"],
)
def test_missing_extras_are_named_in_the_refusal(use, extra, model, tmp_path):
    """What a missing extra brings is refused with the extra's name, and nothing is written."""
    with pytest.raises(ImportError, match=rf"pip install hf_shapley\[{extra}\]"):
        use(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_drawing_commands_name_the_extra_at_once(checkpoint, tmp_path, capsys):
    """The commands that draw name the missing extra before they work for long, and write nothing."""
    Image.new("RGB", (60, 40)).save(tmp_path / "picture.png")
    out = tmp_path / "out"
    explain = ["explain", str(tmp_path / "picture.png"), "--model", checkpoint, "-o", str(out / "picture.png")]
    for arguments in (explain, ["demo", "-o", str(out)]):
        assert main(arguments) == 1
        assert "pip install hf_shapley[plot]" in capsys.readouterr().err
    assert not out.exists()


def test_the_page_names_its_extra():
    spec = importlib.util.spec_from_file_location("page_without_gradio", DEMO)
    with pytest.raises(ImportError, match=r"pip install hf_shapley\[demo\]"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))

"""Exported models give what the models give."""

import json

import pytest
import torch
from conftest import make_model

from hf_shapley.publishing.export import export_onnx, export_program

SIZE = (16, 24)


def expected_outputs(model, pixel_values):
    output = model(pixel_values)
    return output.logits, output.attributions.transpose(1, 2).unflatten(-1, (4, 6))


def batch(size: int) -> torch.Tensor:
    return torch.randn(size, 3, *SIZE, generator=torch.Generator().manual_seed(size))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch 2.11's own
@pytest.mark.parametrize("block", ["mlp", "convolution", "backbone"])
def test_saved_programs_answer_alike_at_any_batch_size(backbone, block, tmp_path):
    """A saved program takes any batch size and gives the same as the model."""
    model = make_model(backbone, head="votes+influence", influence_block=block).train()
    torch.export.save(export_program(model, image_size=SIZE), tmp_path / "model.pt2")
    assert model.training
    program = torch.export.load(tmp_path / "model.pt2").module()
    model.eval()
    for size in (1, 2, 5):
        pixel_values = batch(size)
        for found, expected in zip(program(pixel_values), expected_outputs(model, pixel_values), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the exporter's own
def test_onnx_files_answer_alike_at_any_batch_size(backbone, tmp_path):
    """An ONNX file takes any batch size, gives the same as the model and holds what it takes to read it."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = make_model(backbone, head="adapted")
    path = export_onnx(model, tmp_path / "folder" / "model.onnx", image_size=SIZE)
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(path)
    assert [output.name for output in session.get_outputs()] == ["logits", "attributions"]
    metadata = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    assert (metadata["grid"], metadata["image_size"]) == ([4, 6], [16, 24])
    assert metadata["labels"] == [f"LABEL_{i}" for i in range(5)]
    base_values = torch.tensor(metadata["base_values"])
    for size in (1, 2, 5):
        pixel_values = batch(size)
        found = [torch.from_numpy(x) for x in session.run(None, {"pixel_values": pixel_values.numpy()})]
        for array, expected in zip(found, expected_outputs(model, pixel_values), strict=True):
            torch.testing.assert_close(array, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[1].sum((2, 3)), found[0] - base_values, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_an_onnx_file_that_runs(dtype, tmp_path):
    """Such a model's file computes in float32 with the model's weights, and leaves the model as it is."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = make_model("vit", head="recommended").to(dtype)
    session = onnxruntime.InferenceSession(export_onnx(model, tmp_path / "model.onnx", image_size=SIZE))
    assert next(model.parameters()).dtype == dtype
    found = session.run(None, {"pixel_values": batch(2).numpy()})
    for array, expected in zip(found, expected_outputs(model.float(), batch(2)), strict=True):
        torch.testing.assert_close(torch.from_numpy(array), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_failed_export_leaves_the_file_there_was(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    path = tmp_path / "model.onnx"
    path.write_bytes(b"earlier")

    def fail(self, destination, **options):
        destination.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        export_onnx(make_model("convnext"), path, image_size=SIZE)
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_bad_input_is_refused(tmp_path, monkeypatch):
    model = make_model("vit")
    with pytest.raises(TypeError, match="Shapley image classifier"):
        export_program(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="Images must be of"):
        export_program(model, image_size=32)
    with pytest.raises(ValueError, match="multiples of the player size"):
        export_program(make_model("convnext"), image_size=(15, 24))
    with pytest.raises(ValueError, match="image_size"):
        export_program(model, image_size=(16, 24, 3))
    with pytest.raises(ValueError, match="onnx"):
        export_onnx(model, tmp_path / "model.pt")
    monkeypatch.setattr(
        "hf_shapley.publishing.export.find_spec", lambda name: None if name == "onnxscript" else object()
    )
    with pytest.raises(ImportError, match=r"onnxscript: pip install hf_shapley\[onnx\]"):
        export_onnx(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []

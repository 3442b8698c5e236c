"""Neither an error nor a full disk leaves half of a file, and what was there before stays as it was."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import make_model
from datasets import Dataset
from PIL import Image
from safetensors import SafetensorError
from transformers import ViTImageProcessorPil

from hf_shapley import (
    ShapleyViTForImageClassification,
    explain_dataset,
    last_complete_checkpoint,
    load_explanations,
    push_to_hub,
    render_model_card,
    write_model_card,
)
from hf_shapley.cli import main
from hf_shapley.evaluation_job import write_json
from hf_shapley.files import whole_file

PROCESSOR = ViTImageProcessorPil(size={"height": 16, "width": 24})
NO_ROOM = "File too large"
"""What the system says where a file reaches the limit; on a full disk it would be "No space left on device"."""


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: writes fail in the middle, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "model"
    make_model("vit").save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return folder


# ---- one file


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with whole_file(path) as draft:
        draft.write_text("half")
        assert draft.suffix == ".txt"
        assert not path.exists()
    assert content(tmp_path) == {"new/file.txt": b"half"}


def test_an_error_leaves_the_older_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("older")

    def write_half():
        with whole_file(path) as draft:
            draft.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert content(tmp_path) == {"file.txt": b"older"}


# ---- a full disk


CARD = render_model_card({"model_name": "older"}, model_id="tester/older")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_model_card(path, CARD.replace("older", "newer")),
        lambda path: write_json(path, {"numbers": list(range(1000))}),
    ],
    ids=["card", "results"],
)
def test_cards_and_results_stay_as_they_were_on_a_full_disk(write, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(CARD)
    with room(1000), pytest.raises(OSError, match=NO_ROOM):
        write(path)
    assert content(tmp_path) == {"README.md": CARD.encode()}


def test_weights_are_whole_or_the_older_ones_on_a_full_disk(checkpoint, tmp_path):
    newer = make_model("vit", seed=1)
    with room(50_000):
        for folder in (checkpoint, tmp_path / "new"):
            with pytest.raises(SafetensorError, match=NO_ROOM):
                newer.save_pretrained(folder)
    older = ShapleyViTForImageClassification.from_pretrained(checkpoint)
    torch.testing.assert_close(older.state_dict(), make_model("vit").state_dict(), rtol=0, atol=0)
    assert not [name for name in content(tmp_path / "new") if "safetensors" in name]
    with pytest.raises(OSError, match=r"model\.safetensors"):
        ShapleyViTForImageClassification.from_pretrained(tmp_path / "new")


def test_a_push_from_a_full_disk_ends_before_the_hub_hears_of_it():
    with room(50_000), pytest.raises(SafetensorError, match=NO_ROOM):
        push_to_hub(make_model("vit"), PROCESSOR, "tester/model")  # which is offline, and would say so


def test_a_picture_is_whole_or_not_there_on_a_full_disk(checkpoint, tmp_path, capsys):
    picture, output = tmp_path / "picture.png", tmp_path / "out" / "explained.png"
    Image.linear_gradient("L").save(picture)
    arguments = ["explain", str(picture), "--model", str(checkpoint), "-o", str(output)]
    with room(1000):
        assert main(arguments) == 1
    assert NO_ROOM in capsys.readouterr().err
    assert content(output.parent) == {}
    assert main(arguments) == 0
    older = content(output.parent)
    with room(1000):
        assert main([*arguments, "--top-k", "3"]) == 1
    assert content(output.parent) == older


def test_explanations_of_a_data_set_go_on_after_a_full_disk(tmp_path):
    rows = Dataset.from_dict({"image": [Image.new("RGB", (24, 16), (25 * i, 0, 0)) for i in range(10)]})
    model, output = make_model("vit"), tmp_path / "explanations"
    options = {"image_processor": PROCESSOR, "shard_size": 4, "batch_size": 2, "show_progress": False}
    with room(3000), pytest.raises(OSError, match=NO_ROOM):
        explain_dataset(model, rows, output, **options)
    assert set(content(output)) == {"manifest.json"}
    assert explain_dataset(model, rows, output, **options).computed_rows == 10
    assert load_explanations(output)["row"][:] == list(range(10))


@pytest.mark.parametrize("size", [50_000, 500_000], ids=["weights", "optimizer"])
def test_training_ends_in_a_message_and_without_half_a_checkpoint_on_a_full_disk(size, tmp_path, capsys):
    output = tmp_path / "run"
    options = ["--max_train_samples", "32", "--max_eval_samples", "8", "--num_train_epochs", "1", "--use_cpu"]
    options += ["--disable_tqdm", "True", "--report_to", "none", "--save_steps", "1", "--output_dir", str(output)]
    with room(size):
        assert main(["train", *options]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-shapley train: Cannot write the checkpoint")
    assert error.endswith("is the disk full?")
    assert last_complete_checkpoint(output) is None

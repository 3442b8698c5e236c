"""Neither an error nor a full disk leaves half of a file, and what was there before stays as it was."""

import json
import os
import resource
import stat
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
from hf_shapley.files import whole_file
from hf_shapley.jobs.evaluation_job import write_json

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


def test_an_error_leaves_only_the_older_file(tmp_path):
    """An error while a file is written leaves the older file and nothing else."""
    path = tmp_path / "file.txt"
    path.write_text("older")

    def write_half():
        with whole_file(path) as draft:
            draft.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert content(tmp_path) == {"file.txt": b"older"}


def test_a_link_stays_and_its_target_is_written(tmp_path):
    """A link is somebody's way of saying where the file belongs: also one whose target is yet to come."""
    (tmp_path / "store").mkdir()
    for name in ("older", "missing"):
        link, target = tmp_path / f"{name}.png", tmp_path / "store" / name
        link.symlink_to(target)
        if name == "older":
            target.write_text(name)
        with whole_file(link) as draft:
            draft.write_text("new")
            assert draft.suffix == ".png"
        assert link.is_symlink()
        assert target.read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "missing",
        "missing.png",
        "older",
        "older.png",
        "store",
    ]


def test_a_pipe_is_written_to_and_stays(tmp_path):
    """What is no regular file takes the content in; replaced, a device would be lost for everybody."""
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_json(pipe, {"answer": 42})
        assert json.loads(os.read(reader, 1000)) == {"answer": 42}
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_device_is_written_to_and_stays(tmp_path, monkeypatch):
    """A stand-in for `-o /dev/null`, which as root would be replaced by a file."""
    device = tmp_path / "null"
    device.symlink_to(os.devnull)
    monkeypatch.setattr(os, "replace", lambda *paths: pytest.fail(f"replaced {paths[1]}"))
    write_json(device, {"answer": 42})
    assert device.is_symlink()
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


@pytest.mark.parametrize("name", ["n" * 246 + ".png", "n." + "p" * 248], ids=["stem", "suffix"])
def test_every_legal_file_name_can_be_written(tmp_path, name):
    with whole_file(tmp_path / name) as draft:
        draft.write_text("whole")
    assert content(tmp_path) == {name: b"whole"}


def test_a_folder_is_refused_before_the_work(tmp_path):
    with pytest.raises(IsADirectoryError, match="Give the name of a file"), whole_file(tmp_path):
        pytest.fail("too late")


def test_a_card_goes_into_a_pipe_without_waiting(tmp_path):
    """Nobody wrote a card into a device or a pipe: there is nothing to read before the new one goes there."""
    pipe = tmp_path / "card.md"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert write_model_card(pipe, CARD)
        assert os.read(reader, 100_000).decode() == CARD
    finally:
        os.close(reader)


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
def test_a_full_disk_leaves_cards_and_results_alone(write, tmp_path):
    """Cards and results stay as they were on a full disk."""
    path = tmp_path / "README.md"
    path.write_text(CARD)
    with room(1000), pytest.raises(OSError, match=NO_ROOM):
        write(path)
    assert content(tmp_path) == {"README.md": CARD.encode()}


def test_a_full_disk_leaves_no_half_weights(checkpoint, tmp_path):
    """Weights on a full disk are the older ones or not there, and never half of the new ones."""
    newer = make_model("vit", seed=1)
    with room(64_000):
        for folder in (checkpoint, tmp_path / "new"):
            with pytest.raises(SafetensorError, match=NO_ROOM):
                newer.save_pretrained(folder)
    older = ShapleyViTForImageClassification.from_pretrained(checkpoint)
    torch.testing.assert_close(older.state_dict(), make_model("vit").state_dict(), rtol=0, atol=0)
    assert not [name for name in content(tmp_path / "new") if "safetensors" in name]
    with pytest.raises(OSError, match=r"model\.safetensors"):
        ShapleyViTForImageClassification.from_pretrained(tmp_path / "new")


def test_a_full_disk_ends_pushes_before_any_upload():
    """A push from a full disk ends before the Hub hears of it."""
    with room(64_000), pytest.raises(SafetensorError, match=NO_ROOM):
        push_to_hub(make_model("vit"), PROCESSOR, "tester/model")  # which is offline, and would say so


def test_a_full_disk_leaves_no_half_picture(checkpoint, tmp_path, capsys):
    """A picture on a full disk is the older one or not there, and never half of the new one."""
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


def test_explanations_go_on_after_a_full_disk(tmp_path):
    """Explanations of a data set go on after a full disk, and lack no row."""
    rows = Dataset.from_dict({"image": [Image.new("RGB", (24, 16), (25 * i, 0, 0)) for i in range(10)]})
    model, output = make_model("vit"), tmp_path / "explanations"
    options = {"image_processor": PROCESSOR, "shard_size": 4, "batch_size": 2, "show_progress": False}
    with room(3000), pytest.raises(OSError, match=NO_ROOM):
        explain_dataset(model, rows, output, **options)
    assert set(content(output)) == {"manifest.json"}
    assert explain_dataset(model, rows, output, **options).computed_rows == 10
    assert load_explanations(output)["row"][:] == list(range(10))


@pytest.mark.parametrize("size", [64_000, 500_000], ids=["weights", "optimizer"])
def test_a_full_disk_leaves_no_half_checkpoint(size, tmp_path, capsys):
    """Training on a full disk ends in a message, and leaves no half checkpoint that counts as complete."""
    output = tmp_path / "run"
    options = ["--max_train_samples", "32", "--max_eval_samples", "8", "--num_train_epochs", "1", "--use_cpu"]
    options += ["--disable_tqdm", "True", "--report_to", "none", "--save_steps", "1", "--output_dir", str(output)]
    with room(size):
        assert main(["train", *options]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-shapley train: Cannot write the checkpoint")
    assert error.endswith("is the disk full?")
    assert last_complete_checkpoint(output) is None

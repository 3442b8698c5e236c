"""A killed and resumed run ends with the weights of one that nobody disturbed; no half-written checkpoint counts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model
from transformers import PrinterCallback

from hf_shapley import ShapleyTrainer, ShapleyTrainingArguments
from hf_shapley.training.checkpoints import (
    complete_checkpoint,
    discard_surplus_checkpoints,
    last_complete_checkpoint,
    marked_incomplete,
)

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill_and_resume.py"
CONFIGURATIONS = [
    "vit, 1 batches a step, 1 processes",
    "convnext, 2 batches a step, 1 processes",
    "vit, 2 batches a step, 2 processes",
    "convnext, 1 batches a step, 2 processes",
]


def test_twenty_kills_leave_no_trace_in_the_weights(tmp_path):
    """RESUME_KILLS=20 makes them eighty."""
    kills = int(os.environ.get("RESUME_KILLS", 5))
    command = [sys.executable, SCRIPT, "--kills", str(kills), "--output", tmp_path / "result.json", "--configurations"]
    worker = subprocess.run([*command, *CONFIGURATIONS], capture_output=True, text=True, timeout=240 * kills)
    assert worker.returncode == 0, worker.stdout[-3000:] + worker.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["kills"] == 4 * kills
    assert result["ends_with_equal_weights"] >= 4
    assert result["ends_with_other_weights"] == 0
    for found in result["configurations"].values():
        assert (found["accepted"], found["wrong_models"], found["lost"]) == (0, 0, 0)
    assert sum(found["cut_off"] for found in result["configurations"].values()) >= kills


def complete(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"):
        (folder / name).touch()
    return folder


def test_resuming_takes_the_newest_complete_checkpoint(tmp_path):
    """The newest complete checkpoint is taken, and a cut-off one is refused."""
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match="no complete checkpoint .* train without it"):
        complete_checkpoint(True, tmp_path)
    older, newer = complete(tmp_path / "checkpoint-9"), complete(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-11-copy").mkdir()
    assert complete_checkpoint(True, tmp_path) == str(newer)
    with pytest.raises(RuntimeError, match="disk full"), marked_incomplete(newer):
        raise RuntimeError("disk full")
    assert complete_checkpoint(True, tmp_path) == str(older)
    with pytest.raises(ValueError, match=r"lacks the end of its writing: .* Resume from '.*checkpoint-9'"):
        complete_checkpoint(f"{newer}/", tmp_path)
    with marked_incomplete(newer):  # written again, to its end
        pass
    assert complete_checkpoint(newer, tmp_path) == str(newer)


@pytest.mark.parametrize("lost", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_lost_a_part_is_refused(lost, tmp_path):
    folder = complete(tmp_path / "checkpoint-3")
    (folder / lost).unlink()
    with pytest.raises(ValueError, match=f"lacks {lost.split('.')[0]}.*Train without it"):
        complete_checkpoint(folder, tmp_path)


def test_the_oldest_surplus_checkpoints_go_first(tmp_path):
    """Surplus checkpoints go oldest first, cut-off ones go at once, and the best stays."""
    folders = [complete(tmp_path / f"checkpoint-{step}") for step in (2, 10, 9)]
    cut_off = complete(tmp_path / "checkpoint-11")
    for age, folder in enumerate([*folders, cut_off]):
        os.utime(folder, (age, age))
    (tmp_path / "checkpoint-11.incomplete").touch()
    (tmp_path / "checkpoint-1-copy").mkdir()
    discard_surplus_checkpoints(tmp_path, None)
    assert all(folder.is_dir() for folder in [*folders, cut_off])
    discard_surplus_checkpoints(tmp_path, 3)
    assert all(folder.is_dir() for folder in folders)
    assert not cut_off.exists()
    discard_surplus_checkpoints(tmp_path, 1, best=str(folders[0]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1-copy", "checkpoint-2", "checkpoint-9"]


def make_trainer(folder: Path, steps: int) -> ShapleyTrainer:
    options = dict(save_steps=1, save_total_limit=1, per_device_train_batch_size=2, dataloader_pin_memory=False)
    args = ShapleyTrainingArguments(
        str(folder), max_steps=steps, use_cpu=True, report_to=[], disable_tqdm=True, **options
    )
    data = [{"pixel_values": torch.ones(3, 16, 24), "labels": torch.tensor(0)}] * 4
    trainer = ShapleyTrainer(make_model("vit"), args, train_dataset=data)
    trainer.remove_callback(PrinterCallback)
    return trainer


def test_dying_while_deleting_keeps_the_new_checkpoint(tmp_path, monkeypatch):
    """A run that dies while it deletes the old checkpoint keeps the new one."""

    def die_halfway(folder, *args, **kwargs):
        if Path(folder).is_dir():
            (Path(folder) / "model.safetensors").unlink()
            raise KeyboardInterrupt

    trainer = make_trainer(tmp_path, steps=2)
    monkeypatch.setattr("shutil.rmtree", die_halfway)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=r"lacks the end of its writing: .* Resume from '.*checkpoint-2'"):
        complete_checkpoint(tmp_path / "checkpoint-1", tmp_path)
    assert trainer.args.save_total_limit == 1


def test_the_checkpoint_limit_is_kept_and_noted(tmp_path):
    """The limit of checkpoints is kept, and noted as it was given."""
    make_trainer(tmp_path, steps=3).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    noted = torch.load(tmp_path / "checkpoint-3" / "training_args.bin", weights_only=False)
    assert noted.save_total_limit == 1


def test_leftovers_of_killed_runs_are_not_mixed_in(tmp_path):
    """What a killed run left of a checkpoint is not mixed with the new one."""
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1.incomplete").touch()
    (tmp_path / "checkpoint-1" / "rng_state_1.pth").touch()
    make_trainer(tmp_path, steps=1).train()
    assert not (tmp_path / "checkpoint-1" / "rng_state_1.pth").exists()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")

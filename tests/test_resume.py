"""A run that is killed and resumed ends with the weights of a run that was not, and no half-written checkpoint counts.

`python tests/test_resume.py FOLDER ROUNDS` is the worker: it imports torch once and forks every run from there.
"""

import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from contextlib import closing
from pathlib import Path

import pytest

STEPS = 12
# Kills in a round, and options.
RUNS = {
    "vit": (7, {"backbone": "vit"}),
    "convnext, accumulated": (7, {"backbone": "convnext", "accumulation": 2}),
    "vit, accumulated, 2 processes": (3, {"backbone": "vit", "accumulation": 2, "processes": 2}),
    "convnext, 2 processes": (3, {"backbone": "convnext", "processes": 2}),
}


def test_twenty_kills_leave_no_trace_in_the_weights(tmp_path):
    """RESUME_ROUNDS=10 makes them two hundred."""
    rounds = int(os.environ.get("RESUME_ROUNDS", 1))
    worker = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(tmp_path), str(rounds)],
        capture_output=True,
        text=True,
        timeout=600 * rounds,
    )
    assert worker.returncode == 0, worker.stdout[-3000:] + worker.stderr[-3000:]
    found = [line.split() for line in worker.stdout.splitlines() if line.endswith(" equal")]
    assert sum(int(kills) for kills, *_ in found) == 20 * rounds, worker.stdout
    assert sum(int(half_written) for _, half_written, *_ in found) >= 5 * rounds, worker.stdout


def complete(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"):
        (folder / name).touch()
    return folder


def test_the_newest_complete_checkpoint_is_taken_and_a_cut_off_one_refused(tmp_path):
    from hf_shapley.checkpoints import complete_checkpoint, last_complete_checkpoint, marked_incomplete

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
    from hf_shapley.checkpoints import complete_checkpoint

    folder = complete(tmp_path / "checkpoint-3")
    (folder / lost).unlink()
    with pytest.raises(ValueError, match=f"lacks {lost.split('.')[0]}.*Train without it"):
        complete_checkpoint(folder, tmp_path)


def make_trainer(folder: Path, backbone: str, accumulation: int = 1, processes: int = 1):
    """A trainer in which everything that a resumed run could get wrong matters: dropout, order, momentum, schedule."""
    import torch
    from conftest import make_model
    from transformers import PrinterCallback

    from hf_shapley import ShapleyTrainer, ShapleyTrainingArguments

    dropout = {"hidden_dropout_prob": 0.1} if backbone == "vit" else {"drop_path_rate": 0.2}
    model = make_model(backbone, attribution_head="votes+influence", **dropout)
    generator = torch.Generator().manual_seed(3)
    data = [
        {"pixel_values": torch.randn(3, 16, 24, generator=generator), "labels": torch.tensor(i % 5)} for i in range(22)
    ]
    args = ShapleyTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2 if processes == 2 else 4,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        save_steps=3,
        logging_steps=1,
        learning_rate=0.01,
        shapley_warmup=0.5,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
        use_cpu=True,
        save_total_limit=2,
    )
    trainer = ShapleyTrainer(model, args, train_dataset=data)
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(folder: Path, options: dict, kill_at: tuple[str, int] | None) -> None:
    """One process of one run, from the newest complete checkpoint; dies by `kill_at` (what, how much)."""
    import torch

    from hf_shapley.checkpoints import last_complete_checkpoint

    trainer = make_trainer(folder, **options)
    if kill_at and trainer.args.process_index == trainer.args.world_size - 1:
        what, amount = kill_at
        if what == "file":
            # The first file longer than this ends the process in the middle of its writing.
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (amount, amount))
        else:
            countdown = iter(range(amount))
            name = {"batch": "compute_loss", "optimizer": "_save_optimizer_and_scheduler", "rng": "_save_rng_state"}[
                what
            ]
            original = getattr(trainer, name)

            def deadly(*args, **kwargs):
                if next(countdown, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            setattr(trainer, name, deadly)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    if trainer.is_world_process_zero():
        torch.save(trainer.model.state_dict(), folder / "end.pt")
    trainer.end()


def fork(folder: Path, options: dict, kill_at: tuple[str, int] | None = None) -> bool:
    """Run all processes of one run; as a launcher does, kill the others when one dies. True = it came to its end."""
    processes = options.get("processes", 1)
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            if processes > 1:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                )  # fmt: skip
            status = 1
            try:
                train(folder, options, kill_at)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    alive, ended_well = set(children), True
    while alive:
        child, status = os.wait()
        alive.discard(child)
        if status:
            ended_well = False
            for other in alive:
                os.kill(other, signal.SIGKILL)
            if os.WIFEXITED(status) and kill_at is None:
                raise RuntimeError(f"A run that nobody killed failed in {folder}.")
    return ended_well


def killed_again_and_again(folder: Path, options: dict, kills: int, seed: int) -> tuple[int, int]:
    """A run killed `kills` times: kills that struck, and those of them that left a half-written checkpoint."""
    draw = random.Random(seed)
    struck = half_written = 0
    while struck < kills:
        what = draw.choice(["batch", "batch", "file", "optimizer", "rng"])
        # Bytes for a file: from inside the configuration to inside the optimizer's state.
        amount = draw.choice([500, 40_000, 150_000, 250_000]) if what == "file" else draw.randrange(3)
        ended = fork(folder, options, (what, amount))
        if ended:  # nothing was left to die in: start anew
            shutil.rmtree(folder)
            continue
        struck += 1
        half_written += any(folder.glob("*.incomplete"))
    return struck, half_written


def main(root: Path, rounds: int) -> None:
    import torch
    import torch._dynamo  # what the first optimizer would import in every run

    sys.path.insert(0, str(Path(__file__).parent))
    import accelerate.optimizer  # noqa: F401
    import conftest  # noqa: F401
    import transformers.trainer_seq2seq  # noqa: F401

    for seed, (name, (kills, options)) in enumerate(RUNS.items()):
        whole, cut = root / f"whole-{seed}", root / f"cut-{seed}"
        assert fork(whole, options)
        struck, half_written = killed_again_and_again(cut, options, kills * rounds, seed)
        assert fork(cut, options)
        expected, found = torch.load(whole / "end.pt"), torch.load(cut / "end.pt")
        same = expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
        print(struck, half_written, name, "equal" if same else "DIFFERENT", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

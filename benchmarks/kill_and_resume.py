"""Training killed at random points and resumed: does it end with the weights of a run that nobody disturbed?

Each run is killed and resumed again and again, until it ends and its weights are compared bit by bit. Kills strike at
a random moment, before a random batch, in the middle of writing a file, between the files of a checkpoint, and while
an old checkpoint is deleted; of two processes one dies, and the other as its launcher would kill it. A checkpoint
that was cut off must be refused by the trainer, and either not load as a model or hold the right weights; one that
was whole must stay until there is a newer one.

    python benchmarks/kill_and_resume.py --kills 20
"""

import argparse
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import accelerate.optimizer  # noqa: F401  what every run would import anew
import torch
import torch._dynamo
import transformers.trainer_seq2seq  # noqa: F401
from common import RESULTS, build, write_result
from transformers import PrinterCallback
from transformers.utils import logging

from hf_shapley import ShapleyTrainer, ShapleyTrainingArguments
from hf_shapley.training import checkpoints

STEPS, SAVE_STEPS = 12, 3
CONFIGURATIONS = {
    f"{backbone}, {accumulation} batches a step, {processes} processes": dict(
        backbone=backbone, accumulation=accumulation, processes=processes
    )
    for backbone in ("vit", "convnext")
    for accumulation in (1, 2)
    for processes in (1, 2)
}
# In whose call a process dies: "batch" before any of the run's batches, the others while a checkpoint is written.
METHODS = {"batch": "compute_loss", "optimizer": "_save_optimizer_and_scheduler", "random state": "_save_rng_state"}
FILE_SIZES = (500, 40_000, 150_000, 250_000)  # bytes: from inside the configuration to inside the optimizer's state
DEATHS = (-signal.SIGKILL, -signal.SIGXFSZ)


class Kill(NamedTuple):
    """`how` the process `rank` dies; `amount` = seconds, calls, bytes or files before that."""

    how: str
    amount: float
    rank: int

    @classmethod
    def draw(cls, source: random.Random, options: dict, seconds: float) -> "Kill":
        how = source.choice(["moment", "moment", "batch", "file", "optimizer", "random state", "deletion"])
        amounts = {
            "moment": lambda: round(source.uniform(0.1, 1) * seconds, 3),
            "batch": lambda: source.randrange(STEPS * options["accumulation"]),
            "file": lambda: source.choice(FILE_SIZES),
            "deletion": lambda: source.randrange(1, 5),
        }
        # Only the first process deletes.
        rank = 0 if how == "deletion" else source.randrange(options["processes"])
        return cls(how, amounts.get(how, lambda: source.randrange(3))(), rank)


def make_trainer(folder: Path, backbone: str, accumulation: int, processes: int, **options) -> ShapleyTrainer:
    """A trainer in which everything that a resumed run could get wrong matters: dropout, order, momentum, schedule."""
    dropout = {"hidden_dropout_prob": 0.1} if backbone == "vit" else {"drop_path_rate": 0.2}
    model = build(f"{backbone}-test", num_labels=5, **dropout)
    generator = torch.Generator().manual_seed(3)
    data = [
        {"pixel_values": torch.randn(3, 16, 24, generator=generator), "labels": torch.tensor(i % 5)} for i in range(22)
    ]
    args = ShapleyTrainingArguments(
        str(folder),
        per_device_train_batch_size=4 // processes,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        save_steps=SAVE_STEPS,
        logging_steps=1,
        learning_rate=0.01,
        shapley_warmup=0.5,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
        use_cpu=True,
        **options,
    )
    trainer = ShapleyTrainer(model, args, train_dataset=data)
    trainer.remove_callback(PrinterCallback)
    return trainer


def die(*args, **kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(trainer: ShapleyTrainer, kill: Kill) -> None:
    """Make this process die as it is said to."""
    if kill.how == "file":
        # The first file longer than this ends the process in the middle of its writing.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (kill.amount, kill.amount))
    elif kill.how == "deletion":

        def delete_some(folder, **kwargs):
            for path in sorted(Path(folder).iterdir())[-kill.amount :]:
                path.unlink()
            die()

        checkpoints.shutil = type("", (), {"rmtree": staticmethod(delete_some)})
    elif kill.how in METHODS:
        calls = iter(range(int(kill.amount)))
        original = getattr(trainer, METHODS[kill.how])

        def deadly(*args, **kwargs):
            if next(calls, None) is None:
                die()
            return original(*args, **kwargs)

        setattr(trainer, METHODS[kill.how], deadly)


def train(folder: Path, options: dict, kill: Kill | None, limit: int | None) -> ShapleyTrainer:
    """One process of one run, from the newest complete checkpoint."""
    trainer = make_trainer(folder, **options, save_total_limit=limit)
    if kill and trainer.args.process_index == kill.rank:
        arm(trainer, kill)
    trainer.train(resume_from_checkpoint=checkpoints.last_complete_checkpoint(folder))
    if trainer.is_world_process_zero():
        torch.save(trainer.model.state_dict(), folder / "end.pt")
    trainer.end()
    return trainer


def fork(folder: Path, options: dict, kill: Kill | None = None, limit: int | None = None) -> bool:
    """All processes of one run; as a launcher does, kill the others when one dies. True = it came to its end."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(options["processes"]):
        child = os.fork()
        if child == 0:
            run_child(rank, port, folder, options, kill, limit)
        children.append(child)
    if kill and kill.how == "moment":
        victim, deadline = children[kill.rank], time.monotonic() + kill.amount
        while time.monotonic() < deadline and not os.waitid(os.P_PID, victim, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.002)
        os.kill(victim, signal.SIGKILL)  # not yet waited for, so the number is still its own
    statuses: dict[int, int] = {}
    while len(statuses) < len(children):
        child, status = os.wait()
        statuses[child] = os.waitstatus_to_exitcode(status)
        for other in set(children) - statuses.keys() if status else ():
            os.kill(other, signal.SIGKILL)
    codes = [statuses[child] for child in children]
    if any(codes) and (kill is None or codes[kill.rank] not in DEATHS):
        raise RuntimeError(f"A run failed by itself in {folder} with exit codes {codes}; {kill}")
    return not any(codes)


def run_child(rank: int, port: int, folder: Path, options: dict, kill: Kill | None, limit: int | None) -> None:
    """What a forked process does; it does not return."""
    if options["processes"] > 1:
        world = str(options["processes"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        # Ended with its trainer alive: to free it is to free the process group, which can wait for ever for the GIL.
        kept = train(folder, options, kill, limit)  # noqa: F841
        os._exit(0)
    except BaseException:
        if kill is None or kill.rank == rank:  # a survivor has lost its peer
            traceback.print_exc()
        os._exit(1)


@dataclass
class Outcome:
    """What was seen of one configuration.

    Args:
        kills: one line each.
        unequal_ends: ends of disturbed runs whose weights are not those of the undisturbed one.
        ends: ends of disturbed runs.
        cut_off: checkpoints that were cut off while written or deleted.
        accepted: those of them that the trainer would have gone on from.
        wrong_models: those of them that load as a model with wrong weights.
        lost: kills after which the newest complete checkpoint was older than before.
    """

    kills: list[str] = field(default_factory=list)
    ends: int = 0
    unequal_ends: int = 0
    cut_off: int = 0
    accepted: int = 0
    wrong_models: int = 0
    lost: int = 0

    @property
    def is_good(self) -> bool:
        return not (self.unequal_ends or self.accepted or self.wrong_models or self.lost)


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def inspect_cut_off(folder: Path, whole: Path, outcome: Outcome) -> list[str]:
    """Names of the checkpoints that were cut off, each tried as a user might."""
    names = []
    for mark in sorted(folder.glob("*.incomplete")):
        checkpoint = folder / mark.stem
        if not checkpoint.is_dir():
            continue
        names.append(checkpoint.name)
        try:
            checkpoints.complete_checkpoint(checkpoint, folder)
            outcome.accepted += 1
        except ValueError:
            pass
        cls = type(build(f"{whole.name}-test"))
        try:
            model = cls.from_pretrained(checkpoint)
        except (OSError, ValueError):
            continue
        outcome.wrong_models += not equal(
            model.state_dict(), cls.from_pretrained(whole / checkpoint.name).state_dict()
        )
    outcome.cut_off += len(names)
    return names


def disturb(root: Path, options: dict, kills: int, seed: int) -> Outcome:
    """Kill a run so many times; it starts anew where it has come to its end."""
    whole, folder = root / options["backbone"], root / "disturbed"
    start = time.monotonic()
    assert fork(whole, options)
    seconds = time.monotonic() - start
    expected = torch.load(whole / "end.pt")
    source, outcome = random.Random(seed), Outcome()

    def end() -> None:
        outcome.ends += 1
        outcome.unequal_ends += not equal(torch.load(folder / "end.pt"), expected)
        shutil.rmtree(folder)

    while len(outcome.kills) < kills:
        before = newest(folder)
        kill = Kill.draw(source, options, seconds)
        if fork(folder, options, kill, limit=source.choice([1, 2])):
            end()
            continue
        cut_off = inspect_cut_off(folder, whole, outcome)
        outcome.lost += newest(folder) < before
        outcome.kills.append(
            f"{kill.how} {kill.amount}, process {kill.rank}: newest complete checkpoint at step {newest(folder)}, "
            f"cut off: {', '.join(cut_off) or 'none'}"
        )
    assert fork(folder, options, limit=1)
    end()
    return outcome


def newest(folder: Path) -> int:
    """Step of the newest complete checkpoint, 0 if there is none."""
    found = checkpoints.last_complete_checkpoint(folder)
    return int(found.rpartition("-")[2]) if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="for each configuration")
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--output", default=RESULTS / "kill_and_resume.json")
    args = parser.parse_args()
    logging.disable_progress_bar()
    found = {}
    for seed, name in enumerate(args.configurations):
        with tempfile.TemporaryDirectory() as root:
            outcome = disturb(Path(root), CONFIGURATIONS[name], args.kills, seed)
        found[name] = {"good": outcome.is_good, **vars(outcome)}
        print(name, {key: value for key, value in found[name].items() if key != "kills"}, flush=True)
    write_result(
        args.output,
        {
            "steps": STEPS,
            "save_steps": SAVE_STEPS,
            "kills": sum(len(one["kills"]) for one in found.values()),
            "ends_with_equal_weights": sum(one["ends"] - one["unequal_ends"] for one in found.values()),
            "ends_with_other_weights": sum(one["unequal_ends"] for one in found.values()),
            "configurations": found,
        },
    )
    if not all(one["good"] for one in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' and torch's own
        main()

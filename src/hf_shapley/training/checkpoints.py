"""Checkpoints of interrupted runs: which are whole, and which is the newest of those."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

# What `Trainer` needs to go on as if nothing had happened; it starts anew, silently, whatever it does not find.
PARTS = ("trainer_state.json", "optimizer*", "scheduler.pt", "rng_state*.pth")

# Where torch is when `torch.save` fails to write; its message says no more.
TORCH_WRITER = "inline_container"


def _mark(checkpoint: str | os.PathLike) -> Path:
    # Beside the folder, where no upload takes it along.
    return Path(f"{os.path.normpath(checkpoint)}.incomplete")


@contextmanager
def marked_incomplete(checkpoint: str | os.PathLike) -> Iterator[None]:
    """Mark a checkpoint as incomplete until the block has ended well: a killed process leaves the mark.

    Raises:
        OSError: a file could not be written, in the place of what safetensors and torch say then.
    """
    mark = _mark(checkpoint)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and TORCH_WRITER not in str(error):
            raise
        raise OSError(f"Cannot write the checkpoint {str(checkpoint)!r} ({error}): is the disk full?") from error
    mark.unlink(missing_ok=True)


def discard_surplus_checkpoints(output_dir: str | os.PathLike, limit: int | None, best: str | None = None) -> None:
    """Delete a run's oldest checkpoints, those cut off before those that are whole.

    Args:
        output_dir: the run's folder.
        limit: how many to keep at most; None or 0 = all.
        best: path of the best one, which is kept, as the newest one is.
    """
    if not limit or limit < 0:
        return
    folders = sorted(_checkpoints(output_dir), key=lambda path: (not _missing_parts(path), path.stat().st_mtime_ns))
    kept = {*folders[-1:], *([Path(best)] if best else [])}
    surplus = len(folders) - max(limit, len(kept.intersection(folders)))
    for folder in [path for path in folders if path not in kept][: max(0, surplus)]:
        with marked_incomplete(folder):  # a process killed on the way leaves none that looks whole
            shutil.rmtree(folder)


def complete_checkpoint(chosen: str | os.PathLike | Literal[True], output_dir: str | os.PathLike) -> str:
    """The checkpoint to go on from.

    Args:
        chosen: path of a checkpoint; True = the newest complete one of the run.
        output_dir: the run's folder.

    Returns:
        Path of a checkpoint that was written to its end.

    Raises:
        ValueError: there is none, or the chosen one was cut off while it was written or deleted.
    """
    newest = last_complete_checkpoint(output_dir)
    if chosen is True:
        if newest is None:
            raise ValueError(
                f"`resume_from_checkpoint`: no complete checkpoint in {str(output_dir)!r}: train without it."
            )
        return newest
    if missing := _missing_parts(chosen):
        raise ValueError(
            f"`resume_from_checkpoint`: {str(chosen)!r} lacks {', '.join(missing)}: it was cut off while it was "
            "written or deleted, or saved with `save_only_model`. "
            + (f"Resume from {newest!r}." if newest else "Train without it.")
        )
    return os.fspath(chosen)


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """Newest checkpoint in a run's folder from which training can go on, passing over those cut off while written.

    Args:
        output_dir: the run's `output_dir`; it need not exist.

    Returns:
        Path of `checkpoint-N`, or None where there is none.
    """
    complete = [path for path in _checkpoints(output_dir) if not _missing_parts(path)]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def _checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Folders of a run's checkpoints, whole or not."""
    found = Path(output_dir).glob("checkpoint-*")
    return [path for path in found if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]


def _missing_parts(checkpoint: str | os.PathLike) -> list[str]:
    """What keeps training from going on from a checkpoint's folder; empty when nothing does."""
    missing = [part for part in PARTS if not any(Path(checkpoint).glob(part))]
    return [*missing, "the end of its writing"] if _mark(checkpoint).exists() else missing

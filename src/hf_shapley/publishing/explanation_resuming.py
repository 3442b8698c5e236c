"""Where a call of `explain_dataset` goes on, and whether all is there in the end: files held against the data set."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from transformers import PreTrainedModel

from ..data.dataset_images import fetched, fingerprint
from ..files import DRAFT
from .explanation_files import MANIFEST, PART, check_part, opened, read_manifest, write_manifest
from .explanation_rows import Reading


def open_folder(folder: Path, settings: dict[str, Any], model: PreTrainedModel) -> None:
    """Start a manifest, or check that the one there is of the same run; remove what a killed run left half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(folder)
    if manifest:
        differ = sorted(name for name, value in settings.items() if manifest["settings"].get(name) != value)
        if differ:
            raise ValueError(
                f"{str(folder)!r} holds a run with other {', '.join(differ)}: go on with what it was started with, "
                "or choose another `output_dir`."
            )
    elif any(folder.glob("part-*.parquet")):
        raise ValueError(f"{str(folder)!r} holds parquet files without {MANIFEST}: choose another `output_dir`.")
    else:
        labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
        base_values = model.base_values.tolist()
        write_manifest(folder, {"complete": False, "settings": settings, "labels": labels, "base_values": base_values})
    for temporary in folder.glob(".part-*"):
        temporary.unlink()
    for draft in folder.glob(f"{DRAFT}*"):
        shutil.rmtree(draft)


class Finished:
    """The files that were complete when a call began, and what they were computed from."""

    def __init__(self, folder: Path, is_mine: Callable[[int], bool], shard_size: int, reading: Reading):
        self.folder, self.shard_size, self.reading = folder, shard_size, reading
        parts = {int(path.stem.removeprefix("part-")): path for path in folder.glob("part-*.parquet")}
        self.shards = {shard for shard in parts if is_mine(shard)}
        for shard in sorted(self.shards):
            check_part(parts[shard])

    def check_and_drop(self, batches: Iterator[tuple[int, dict[str, list]]]) -> Iterator[tuple[int, dict[str, list]]]:
        """Only the batches that are still to be computed; the others must be of the images they were computed from."""
        shard, known = None, {}
        for start, columns in batches:
            if start // self.shard_size not in self.shards:
                yield start, columns
                continue
            if start // self.shard_size != shard:
                shard = start // self.shard_size
                known = self._fingerprints(shard)
            for row, image in enumerate(columns[self.reading.source.column], start):
                if not self._is_the_same(row, image, known):
                    raise ValueError(
                        f"Row {row} of the data set has another image than when it was explained: give the rows that "
                        f"{str(self.folder)!r} was started with, in the same order, or choose another `output_dir`."
                    )

    def _fingerprints(self, shard: int) -> dict[int, str]:
        """Fingerprint of each row of a file that was not left out."""
        with opened(self.folder / PART.format(shard)) as file:
            table = pq.read_table(file)
        return {row["row"]: row["image_sha256"] for row in table.select(table.column_names[:2]).to_pylist()}

    def _is_the_same(self, row: int, image: Any, known: dict[int, str]) -> bool:
        if row not in known:  # it was left out, and still has to be one that cannot be read
            return not self.reading.read(row, [image])[0]
        try:
            return fingerprint(fetched(image)) == known[row]
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"Row {row} holds no readable image any more: {error}") from error


def complete_folder(folder: Path, num_rows: int, shard_size: int, skip_unreadable: bool) -> None:
    """Check that every row is in its file, once, or was left out, and say so in the manifest."""
    if num_rows == 0:
        raise ValueError("`dataset` must have at least one row, got 0: the stream ended at once.")
    expected = {PART.format(first // shard_size): first for first in range(0, num_rows, shard_size)}
    found = {path.name for path in folder.glob("part-*.parquet")}
    if found != set(expected):
        wrong = sorted(found ^ set(expected))
        raise OSError(f"{str(folder)!r} must hold {len(expected)} parquet files, missing or in excess: {wrong[:5]}.")
    skipped: list[int] = []
    for name, first in expected.items():
        with opened(folder / name) as file:
            rows = pq.read_table(file, columns=["row"])["row"].to_numpy()
        wanted = np.arange(first, min(first + shard_size, num_rows))
        left_out = np.setdiff1d(wanted, rows)
        if not np.array_equal(rows, np.setdiff1d(wanted, left_out)) or (len(left_out) and not skip_unreadable):
            raise OSError(f"{name} does not hold the rows from {first} on: delete it and call again.")
        skipped += left_out.tolist()
    if len(skipped) == num_rows:
        raise ValueError(f"`dataset` must have at least one readable image, got none in {num_rows} rows.")
    complete = {"complete": True, "num_rows": num_rows, "skipped_rows": skipped}
    write_manifest(folder, {**read_manifest(folder), **complete})

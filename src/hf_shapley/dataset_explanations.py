"""Explain a whole data set: each row's prediction and attributions as parquet files, over processes and interruptions.

Rows are grouped by number alone: file k holds rows k * shard_size ... (k + 1) * shard_size - 1, computed in batches
that start with the file. So neither the number of processes nor an interruption changes what a row is computed with.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from datasets import Dataset, Image, IterableDataset, load_dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .attribution_head import _evaluating
from .checks import check_count, describe
from .files import whole_file
from .images import load_image

MANIFEST = "manifest.json"
PART = "part-{:05d}.parquet"


@dataclass(frozen=True)
class ExplanationRun:
    """What a call of `explain_dataset` did.

    Args:
        output_dir: folder of the parquet files.
        num_rows: rows in the folder, all of the data set's.
        computed_rows: rows that this process computed in this call; the others were there, or are another process's.
        seconds: time this took, start to end.
    """

    output_dir: Path
    num_rows: int
    computed_rows: int
    seconds: float

    @property
    def rows_per_second(self) -> float:
        """Rate of this process."""
        return self.computed_rows / self.seconds


def explain_dataset(
    model: PreTrainedModel,
    dataset: Dataset | IterableDataset,
    output_dir: str | os.PathLike,
    *,
    image_processor: Any,
    image_column: str = "image",
    labels: str | int | Sequence[int | str] = "predicted",
    batch_size: int = 32,
    shard_size: int = 1024,
    accelerator: Accelerator | None = None,
    show_progress: bool = True,
) -> ExplanationRun:
    """Write every row's prediction and attributions to parquet files, in constant memory.

    Columns: `row` (int64, number in the data set), `predicted_label` (text), `score` (float32, its probability),
    `logits` (float32, labels), `label_ids` (int32, L) and `attributions` (float32, L x h x w, in logits: what each
    patch adds to the logit of each of `label_ids`). `manifest.json` has `base_values`, label names and settings.

    Call it again after an interruption, however hard, and it goes on behind the last complete file; the rows are those
    of an uninterrupted run, bit by bit if `batch_size` is the same. Under `torchrun` or `accelerate launch` processes
    share the files out. A stream is read whole by every process, but only what a process needs is decoded.

    Args:
        model: a Shapley image classifier; moved to the accelerator's device.
        dataset: in memory, on disk or streaming; the same rows in the same order in every process and call.
        output_dir: folder to write, new or of an interrupted run.
        image_processor: makes pixel values from images; the model's own.
        image_column: column of images: Pillow, encoded bytes, or paths.
        labels: which labels to attribute: "predicted" (the best), "all", k (the k best), or names and ids.
        batch_size: images in one forward.
        shard_size: rows in one file: what an interruption loses at most, per process.
        accelerator: processes, device and precision; None makes one.
        show_progress: show a bar with the rate of the main process.

    Returns:
        `ExplanationRun`; only after every row was found in its file.

    Raises:
        TypeError: `model` or `dataset` is no such thing.
        ValueError: an option or label is unknown, an image cannot be read, or the folder holds another run.
        OSError: after the run a file is missing or incomplete.
    """
    check_count(batch_size, "batch_size")
    check_count(shard_size, "shard_size")
    _check_inputs(model, dataset, image_column)
    source = _Source(dataset, image_column)
    accelerator = accelerator or Accelerator()
    folder, started = Path(output_dir), time.perf_counter()
    attributed = _attributed_labels(model, labels)
    if accelerator.is_main_process:
        settings = {
            "model": _digest(model),
            "image_processor": json.loads(image_processor.to_json_string()),
            "mixed_precision": accelerator.mixed_precision,
            "image_column": image_column,
            "labels": labels if isinstance(labels, str | int) else list(labels),
            "shard_size": shard_size,
            "num_rows": source.num_rows or None,  # of a stream it is not known yet
        }
        _open_folder(folder, settings, model)
    accelerator.wait_for_everyone()  # no file is written before the main process has looked at the folder

    def is_wanted(shard: int) -> bool:
        mine = shard % accelerator.num_processes == accelerator.process_index
        return mine and not (folder / PART.format(shard)).exists()

    total = source.count(shard_size, is_wanted)
    hidden = not (show_progress and accelerator.is_main_process)
    batches = source.batches(batch_size, shard_size, is_wanted)
    prepared = ((start, _pixel_values(image_processor, images, start)) for start, images in batches)
    with tqdm(total=total, unit=" images", desc="explaining", disable=hidden) as bar:
        computed = _write_rows(model, prepared, _Writer(folder, shard_size), accelerator, attributed, bar)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _complete(folder, source.num_rows or 0, shard_size)
    accelerator.wait_for_everyone()
    return ExplanationRun(folder, source.num_rows or 0, computed, time.perf_counter() - started)


def load_explanations(output_dir: str | os.PathLike, *, streaming: bool = False) -> Dataset | IterableDataset:
    """Read what `explain_dataset` wrote, row by row in the order of the data set.

    Raises:
        ValueError: the folder holds no complete run.
    """
    manifest = _read_manifest(Path(output_dir))
    if not manifest or not manifest["complete"]:
        raise ValueError(f"{str(output_dir)!r} holds no complete run: call `explain_dataset` on it (again).")
    parts = sorted(str(path) for path in Path(output_dir).glob(PART.format(0).replace("00000", "*")))
    return load_dataset("parquet", data_files=parts, split="train", streaming=streaming)


class _Source:
    """Rows of a data set, by number."""

    def __init__(self, dataset: Dataset | IterableDataset, column: str):
        self.column = column
        self.is_stream = isinstance(dataset, IterableDataset)
        self.num_rows = 0 if self.is_stream else len(dataset)  # a stream's is known when it has been read
        self.dataset = dataset
        if self.is_stream:
            self.dataset = dataset.decode(False) if dataset.features else dataset
        elif dataset.format["type"] != "custom":  # a transform of the user's may need other columns too
            self.dataset = dataset.with_format(None).select_columns([column])

    def count(self, shard_size: int, wanted: Callable[[int], bool]) -> int | None:
        """Rows in the wanted shards; None where only reading tells."""
        if self.is_stream:
            return None
        shards = filter(wanted, range(-(-self.num_rows // shard_size)))
        return sum(min(shard_size, self.num_rows - shard * shard_size) for shard in shards)

    def batches(
        self, batch_size: int, shard_size: int, wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, list[Any]]]:
        """Number of the first row, and images, of each batch of the wanted shards; none reaches over a shard's end."""
        if self.is_stream:
            yield from self._stream(batch_size, shard_size, wanted)
            return
        num_rows = len(self.dataset)
        for first in range(0, num_rows, shard_size):
            if wanted(first // shard_size):
                end = min(first + shard_size, num_rows)
                for start in range(first, end, batch_size):
                    yield start, self.dataset[start : min(start + batch_size, end)][self.column]

    def _stream(
        self, batch_size: int, shard_size: int, wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, list[Any]]]:
        rows, number, is_wanted = [], 0, False
        for row in self.dataset:
            if number % shard_size == 0:
                is_wanted = wanted(number // shard_size)
            number += 1
            if is_wanted:
                rows.append(row[self.column])
                if len(rows) == batch_size or number % shard_size == 0:
                    yield number - len(rows), rows
                    rows = []
        if rows:
            yield number - len(rows), rows
        self.num_rows = number


class _Writer:
    """Writes batches of rows to their shard, under another name until the shard is whole."""

    def __init__(self, folder: Path, shard_size: int):
        self.folder, self.shard_size = folder, shard_size
        self.shard: int | None = None

    def __enter__(self) -> "_Writer":
        return self

    def write(self, start: int, table: pa.Table) -> None:
        """Append rows; `start` is the number of the first."""
        if self.shard is None:
            self.shard = start // self.shard_size
            self.temporary = self.folder / f".{PART.format(self.shard)}.{os.getpid()}"
            self.file = self.temporary.open("wb")
            self.parquet = pq.ParquetWriter(self.file, table.schema, compression="zstd")
        elif table.schema != self.parquet.schema:
            raise ValueError(f"Rows from {start} on have another grid of patches: use a processor with a fixed size.")
        self.parquet.write_table(table)
        if (start + table.num_rows) % self.shard_size == 0:
            self._finish()

    def _finish(self) -> None:
        self.parquet.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temporary, self.folder / PART.format(self.shard))
        self.shard = None

    def __exit__(self, kind: type | None, *_: Any) -> None:
        try:
            if kind is None and self.shard is not None:
                self._finish()  # the last shard may be short
        finally:
            if self.shard is not None:
                self._discard()

    def _discard(self) -> None:
        for part in (self.parquet, self.file):
            with suppress(OSError, ValueError):  # closing fails too where the disk is full
                part.close()
        self.temporary.unlink(missing_ok=True)


def _write_rows(
    model: PreTrainedModel,
    batches: Iterator[tuple[int, Tensor]],
    writer: _Writer,
    accelerator: Accelerator,
    attributed: int | Tensor | None,
    bar: tqdm,
) -> int:
    """Explain and write batches of (number of the first row, pixel values); return how many rows they had."""
    computed = 0
    model.to(accelerator.device)
    with _evaluating(model), writer:
        for start, pixel_values in _ahead(batches):
            with accelerator.autocast():
                table = _explain(model, pixel_values.to(accelerator.device), start, attributed)
            writer.write(start, table)
            computed += table.num_rows
            bar.update(table.num_rows)
    return computed


@torch.inference_mode()
def _explain(model: PreTrainedModel, pixel_values: Tensor, start: int, attributed: int | Tensor | None) -> pa.Table:
    """One forward -> the rows from `start` on."""
    output = model(pixel_values, attributed=attributed)
    model._check_answers(output)
    logits = output.logits
    multi_label = model.config.problem_type == "multi_label_classification"
    scores, predicted = (logits.sigmoid() if multi_label else logits.softmax(-1)).max(dim=-1)
    label_ids = torch.arange(logits.shape[1]).expand_as(logits) if attributed is None else output.attributed_labels
    maps = output.attributions.transpose(1, 2).unflatten(-1, model.grid_size(*pixel_values.shape[-2:]))  # (B, L, h, w)
    return pa.table(
        {
            "row": _nested(torch.arange(start, start + len(logits))),
            "predicted_label": [model.config.id2label[i] for i in predicted.tolist()],
            "score": _nested(scores),
            "logits": _nested(logits),
            "label_ids": _nested(label_ids.int()),
            "attributions": _nested(maps),
        }
    )


def _nested(tensor: Tensor) -> pa.Array:
    """(B, ...) -> arrow array of B lists of fixed sizes."""
    array = pa.array(tensor.cpu().contiguous().flatten().numpy())
    for size in reversed(tensor.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, the next one made in a thread while one is worked on."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = pool.submit(next, items, None)
            yield item


def _pixel_values(image_processor: Any, images: list[Any], start: int) -> Tensor:
    """Images -> (B, C, H, W); a message about one that cannot be read names its row."""
    pictures = []
    for row, image in enumerate(images, start):
        try:
            # A data set hands out what it did not decode as a dict.
            pictures.append(load_image(Image().decode_example(image) if isinstance(image, dict) else image))
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"Row {row} holds no readable image: {error}") from error
    return image_processor(images=pictures, return_tensors="pt")["pixel_values"]


def _attributed_labels(model: PreTrainedModel, labels: Any) -> int | Tensor | None:
    """What to ask a forward for: how many of the best labels, ids (L) of given ones, or None for all."""
    if isinstance(labels, str):
        if labels not in ("predicted", "all"):
            raise ValueError(f'`labels` must be "predicted", "all", a count, or a list of labels, got {labels!r}.')
        return 1 if labels == "predicted" else None
    if not isinstance(labels, int):
        return model._label_ids(labels, 1)[0]
    num_labels = model.config.num_labels
    if not 1 <= labels <= num_labels:
        raise ValueError(f"`labels` must be at least 1 and at most the model's {num_labels} labels, got {labels}.")
    return labels


def _check_inputs(model: Any, dataset: Any, column: str) -> None:
    if not hasattr(model, "coalition_values"):
        raise TypeError(f"`model` must be a Shapley image classifier, got {type(model).__name__}.")
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"`dataset` must be a datasets.Dataset or IterableDataset, got {describe(dataset)}: choose a split."
        )
    columns = dataset.column_names
    if columns is not None and column not in columns:
        raise ValueError(f"`image_column` must be one of the data set's columns {columns}, got {column!r}.")
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError("`dataset` must have at least one row, got 0.")


def _digest(model: PreTrainedModel) -> str:
    """Fingerprint of all weights, so that a run does not go on with another model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _open_folder(folder: Path, settings: dict[str, Any], model: PreTrainedModel) -> None:
    """Start a manifest, or check that the one there is of the same run; remove what a killed run left half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = _read_manifest(folder)
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
        _write_manifest(
            folder, {"complete": False, "settings": settings, "labels": labels, "base_values": base_values}
        )
    for temporary in folder.glob(".part-*"):
        temporary.unlink()


def _complete(folder: Path, num_rows: int, shard_size: int) -> None:
    """Check that every row is in its file, once, and say so in the manifest."""
    if num_rows == 0:
        raise ValueError("`dataset` must have at least one row, got 0: the stream ended at once.")
    expected = {PART.format(first // shard_size): first for first in range(0, num_rows, shard_size)}
    found = {path.name for path in folder.glob("part-*.parquet")}
    if found != set(expected):
        wrong = sorted(found ^ set(expected))
        raise OSError(f"{str(folder)!r} must hold {len(expected)} parquet files, missing or in excess: {wrong[:5]}.")
    for name, first in expected.items():
        rows = pq.read_table(folder / name, columns=["row"])["row"].to_numpy()
        if not np.array_equal(rows, np.arange(first, min(first + shard_size, num_rows))):
            raise OSError(f"{name} does not hold the rows from {first} on: delete it and call again.")
    _write_manifest(folder, {**_read_manifest(folder), "complete": True, "num_rows": num_rows})


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    with whole_file(folder / MANIFEST) as draft:
        draft.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

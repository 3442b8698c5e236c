"""Explain a whole data set: each row's prediction and attributions as parquet files, over processes and interruptions.

Rows are grouped by number alone: file k holds rows k * shard_size ... (k + 1) * shard_size - 1, computed in batches
that start with the file. So neither the number of processes nor an interruption changes what a row is computed with.
Each row carries a fingerprint of its image and each file has its checksum beside it, in the form of `sha256sum`.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..models.checks import check_count, check_shapley_model, describe
from ..models.evaluation_mode import evaluating
from ..models.pipeline_shapley import label_scores
from .explanation_files import Writer, read_manifest
from .explanation_resuming import Finished, complete_folder, open_folder
from .explanation_rows import Batch, Reading, Source


@dataclass(frozen=True)
class ExplanationRun:
    """What a call of `explain_dataset` did.

    Args:
        output_dir: folder of the parquet files.
        num_rows: rows of the data set: each is in the folder, or left out.
        computed_rows: rows that this process computed in this call; the others were there, or are another process's.
        seconds: time this took, start to end.
        skipped_rows: rows that were left out, by this call or earlier ones; `manifest.json` has their numbers.
    """

    output_dir: Path
    num_rows: int
    computed_rows: int
    seconds: float
    skipped_rows: int = 0

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
    skip_unreadable: bool = False,
    accelerator: Accelerator | None = None,
    show_progress: bool = True,
) -> ExplanationRun:
    """Write every row's prediction and attributions to parquet files, in constant memory.

    Columns: `row` (int64, number in the data set), `image_sha256` (text, of the image as it is stored),
    `predicted_label` (text), `score` (float32, as the pipeline gives it), `logits` (float32, labels), `label_ids`
    (int32, L) and `attributions` (float32, L x h x w, in logits: what each patch adds to the logit of each of
    `label_ids`). `manifest.json` has `base_values`, label names and settings.

    Call it again after an interruption, however hard, and it goes on behind the last complete file; the rows are those
    of an uninterrupted run, bit by bit if `batch_size` is the same. What is there already is held against the data
    set, image by image, and a file that was damaged is found. Under `torchrun` or `accelerate launch` processes share
    the files out. A stream is read whole by every process, but only what a process needs is decoded.

    Args:
        model: a Shapley image classifier; moved to the accelerator's device.
        dataset: in memory, on disk or streaming; the same rows in the same order in every process and call.
        output_dir: folder to write, new or of an interrupted run.
        image_processor: makes pixel values from images; the model's own.
        image_column: column of images: Pillow, encoded bytes, or paths.
        labels: which labels to attribute: "predicted" (the best), "all", k (the k best), or names and ids.
        batch_size: images in one forward.
        shard_size: rows in one file: what an interruption loses at most, per process.
        skip_unreadable: leave out rows whose image cannot be read, and count them; False stops at the first.
        accelerator: processes, device and precision; None makes one.
        show_progress: show a bar with the rate of the main process.

    Returns:
        `ExplanationRun`; only after every row was found in its file.

    Raises:
        TypeError: `model` or `dataset` is no such thing.
        ValueError: an option or label is unknown, an image cannot be read, or the folder holds another run, or rows of
            other images than the data set has now.
        OSError: a file is missing, incomplete or damaged.
    """
    check_count(batch_size, "batch_size")
    check_count(shard_size, "shard_size")
    _check_inputs(model, dataset, image_column)
    source = Source(dataset, image_column)
    accelerator = accelerator or Accelerator()
    folder, started = Path(output_dir), time.perf_counter()
    attributed = _attributed_labels(model, labels)
    if accelerator.is_main_process:
        settings = {
            "model": _digest(model),
            "image_processor": json.loads(image_processor.to_json_string()),
            "mixed_precision": accelerator.mixed_precision,
            "image_column": image_column,
            "labels": attributed[0].tolist() if isinstance(attributed, Tensor) else attributed,
            "shard_size": int(shard_size),
            "num_rows": source.num_rows or None,  # of a stream it is not known yet
        }
        open_folder(folder, settings, model)
    accelerator.wait_for_everyone()  # no file is written before the main process has looked at the folder
    is_mine = partial(_is_mine, processes=accelerator.num_processes, process=accelerator.process_index)
    reading = Reading(source, image_processor, model.config, skip_unreadable)
    finished = Finished(folder, is_mine, shard_size, reading)
    total = source.count(shard_size, lambda shard: is_mine(shard) and shard not in finished.shards)
    hidden = not (show_progress and accelerator.is_main_process)
    batches = finished.check_and_drop(source.batches(batch_size, shard_size, is_mine))
    prepared = (reading.prepare(start, rows) for start, rows in batches)
    with tqdm(total=total, unit=" images", desc="explaining", disable=hidden) as bar:
        computed = _write_rows(model, prepared, Writer(folder, shard_size), accelerator, attributed, bar)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        complete_folder(folder, source.num_rows or 0, shard_size, skip_unreadable)
    accelerator.wait_for_everyone()
    skipped = len(read_manifest(folder)["skipped_rows"])
    return ExplanationRun(folder, source.num_rows or 0, computed, time.perf_counter() - started, skipped)


def _is_mine(shard: int, *, processes: int, process: int) -> bool:
    return shard % processes == process


def _write_rows(
    model: PreTrainedModel,
    batches: Iterator[Batch],
    writer: Writer,
    accelerator: Accelerator,
    attributed: int | Tensor | None,
    bar: tqdm,
) -> int:
    """Explain and write batches; return how many rows they had."""
    computed = 0
    model.to(accelerator.device)
    with evaluating(model), writer:
        for batch in _ahead(batches):
            table = None
            if batch.pixel_values is not None:
                with accelerator.autocast():
                    table = _explain(model, batch, batch.pixel_values.to(accelerator.device), attributed)
            writer.write(batch, table)
            computed += len(batch.rows)
            bar.update(batch.end - batch.start)
    return computed


@torch.inference_mode()
def _explain(model: PreTrainedModel, batch: Batch, pixel_values: Tensor, attributed: int | Tensor | None) -> pa.Table:
    """One forward -> the rows of a batch."""
    output = model(pixel_values, attributed=attributed)
    model._check_answers(output)
    logits = output.logits
    predicted = logits.argmax(dim=-1)
    scores = label_scores(logits, model.config).gather(1, predicted.unsqueeze(1)).squeeze(1)
    label_ids = torch.arange(logits.shape[1]).expand_as(logits) if attributed is None else output.attributed_labels
    return pa.table(
        {
            "row": pa.array(batch.rows, pa.int64()),
            "image_sha256": batch.fingerprints,
            "predicted_label": [model.config.id2label[i] for i in predicted.tolist()],
            "score": _nested(scores),
            "logits": _nested(logits),
            "label_ids": _nested(label_ids.int()),
            "attributions": _nested(output.maps),
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


def _attributed_labels(model: PreTrainedModel, labels: Any) -> int | Tensor | None:
    """What to ask a forward for: how many of the best labels, ids (L) of given ones, or None for all."""
    if isinstance(labels, str):
        if labels not in ("predicted", "all"):
            raise ValueError(f'`labels` must be "predicted", "all", a count, or a list of labels, got {labels!r}.')
        return 1 if labels == "predicted" else None
    if not isinstance(labels, int | np.integer):
        return model._label_ids(labels, 1)[0]
    num_labels = model.config.num_labels
    if not 1 <= labels <= num_labels:
        raise ValueError(f"`labels` must be at least 1 and at most the model's {num_labels} labels, got {labels}.")
    return int(labels)


def _check_inputs(model: Any, dataset: Any, column: str) -> None:
    check_shapley_model(model)
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

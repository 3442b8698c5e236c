"""Explain a whole data set: each row's prediction and attributions as parquet files, over processes and interruptions.

Rows are grouped by number alone: file k holds rows k * shard_size ... (k + 1) * shard_size - 1, computed in batches
that start with the file. So neither the number of processes nor an interruption changes what a row is computed with.
Each row carries a fingerprint of its image and each file has its checksum beside it, in the form of `sha256sum`.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, IterableDataset
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.dataset_images import fetched, file_sha256, fingerprint, read_pictures, stored_mode, undecoded
from ..files import DRAFT, whole_file
from ..models.checks import check_count, check_shapley_model, describe
from ..models.images import load_image
from ..models.modeling_shapley import _evaluating
from ..models.pipeline_shapley import label_scores, pixel_values_of

MANIFEST = "manifest.json"
PART = "part-{:05d}.parquet"
CHECKSUM = ".sha256"
ROW_SCHEMA = pa.schema({"row": pa.int64()})  # of a file whose rows were all left out


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
            "labels": attributed[0].tolist() if isinstance(attributed, Tensor) else attributed,
            "shard_size": int(shard_size),
            "num_rows": source.num_rows or None,  # of a stream it is not known yet
        }
        _open_folder(folder, settings, model)
    accelerator.wait_for_everyone()  # no file is written before the main process has looked at the folder
    is_mine = partial(_is_mine, processes=accelerator.num_processes, process=accelerator.process_index)
    reading = _Reading(source, image_processor, model.config, skip_unreadable)
    finished = _Finished(folder, is_mine, shard_size, reading)
    total = source.count(shard_size, lambda shard: is_mine(shard) and shard not in finished.shards)
    hidden = not (show_progress and accelerator.is_main_process)
    batches = finished.check_and_drop(source.batches(batch_size, shard_size, is_mine))
    prepared = (reading.prepare(start, rows) for start, rows in batches)
    with tqdm(total=total, unit=" images", desc="explaining", disable=hidden) as bar:
        computed = _write_rows(model, prepared, _Writer(folder, shard_size), accelerator, attributed, bar)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _complete(folder, source.num_rows or 0, shard_size, skip_unreadable)
    accelerator.wait_for_everyone()
    skipped = len(_read_manifest(folder)["skipped_rows"])
    return ExplanationRun(folder, source.num_rows or 0, computed, time.perf_counter() - started, skipped)


def load_explanations(output_dir: str | os.PathLike, *, streaming: bool = False) -> Dataset | IterableDataset:
    """Read what `explain_dataset` wrote, row by row in the order of the data set.

    Raises:
        ValueError: the folder holds no complete run.
        OSError: a file is missing or damaged; of a stream, when the file is reached.
    """
    folder = Path(output_dir)
    manifest = _read_manifest(folder)
    if not manifest or not manifest["complete"]:
        raise ValueError(f"{str(output_dir)!r} holds no complete run: call `explain_dataset` on it (again).")
    # `datasets` takes names of files for patterns, which a folder called "run[1]" or "a::b" is not.
    count = -(-manifest["num_rows"] // manifest["settings"]["shard_size"])
    parts = [(str(path), _recorded_checksum(path)) for path in map(folder.joinpath, map(PART.format, range(count)))]
    options = {"features": _features(Path(path) for path, _ in parts), "gen_kwargs": {"parts": parts}}
    if streaming:
        return IterableDataset.from_generator(_rows, **options)
    for path, _ in parts:
        _check_part(Path(path))
    return Dataset.from_generator(_rows, **options)


def _rows(parts: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Rows of parquet files, given with their checksums, by which `datasets` knows whether it has them already."""
    for path, _ in parts:
        _check_part(Path(path))
        with _opened(Path(path)) as file:
            for batch in pq.ParquetFile(file).iter_batches(256):
                yield from batch.to_pylist()


def _features(parts: Iterable[Path]) -> Features:
    """Columns of the first file that has more than row numbers."""
    for path in parts:
        _check_part(path)
        with _opened(path) as file:
            schema = pq.read_schema(file)
        if schema != ROW_SCHEMA:
            break
    return Features.from_arrow_schema(schema)


def _opened(path: Path) -> Any:
    """A file open for reading, by pyarrow's own interface: a path could be taken for a URL."""
    return pa.OSFile(str(path))


def _recorded_checksum(path: Path) -> str:
    """SHA-256 that was written down when the file was."""
    beside = path.with_suffix(CHECKSUM)
    if not beside.is_file():
        raise OSError(
            f"{str(path)!r} has no {beside.name} beside it: it is not of this run, delete it and call again."
        )
    return beside.read_text(encoding="ascii", errors="replace").partition(" ")[0]


def _check_part(path: Path) -> None:
    """Refuse a file that is not, byte for byte, what was written."""
    if file_sha256(path) != _recorded_checksum(path):
        raise OSError(
            f"{str(path)!r} is damaged: its {path.stat().st_size} bytes are not those that were written. Delete it "
            "and call `explain_dataset` again."
        )


def _is_mine(shard: int, *, processes: int, process: int) -> bool:
    return shard % processes == process


class _Source:
    """Rows of a data set, by number; images as they are stored."""

    def __init__(self, dataset: Dataset | IterableDataset, column: str):
        self.column = column
        self.is_stream = isinstance(dataset, IterableDataset)
        self.num_rows = 0 if self.is_stream else len(dataset)  # a stream's is known when it has been read
        self.mode = stored_mode(dataset, column)
        self.transform: Callable[[dict], dict] | None = None
        if self.is_stream:
            self.dataset = dataset.decode(False) if dataset.features else dataset
            return
        columns = [column]
        if dataset.format["type"] == "custom":  # a transform of the user's may need other columns too
            self.transform = dataset.format["format_kwargs"]["transform"]
            columns = dataset.format["columns"]
        self.dataset = undecoded(dataset.with_format(None).select_columns(columns), column)

    def count(self, shard_size: int, wanted: Callable[[int], bool]) -> int | None:
        """Rows in the wanted shards; None where only reading tells."""
        if self.is_stream:
            return None
        shards = filter(wanted, range(-(-self.num_rows // shard_size)))
        return sum(min(shard_size, self.num_rows - shard * shard_size) for shard in shards)

    def batches(
        self, batch_size: int, shard_size: int, wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, dict[str, list]]]:
        """Number of the first row, and columns, of each batch of the wanted shards; none goes beyond a shard's end."""
        if self.is_stream:
            yield from self._stream(batch_size, shard_size, wanted)
            return
        num_rows = len(self.dataset)
        for first in range(0, num_rows, shard_size):
            if wanted(first // shard_size):
                end = min(first + shard_size, num_rows)
                for start in range(first, end, batch_size):
                    yield start, self.dataset[start : min(start + batch_size, end)]

    def _stream(
        self, batch_size: int, shard_size: int, wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, dict[str, list]]]:
        rows, number, is_wanted = [], 0, False
        for row in self._in_order():
            if number % shard_size == 0:
                is_wanted = wanted(number // shard_size)
            number += 1
            if is_wanted:
                rows.append(row[self.column])
                if len(rows) == batch_size or number % shard_size == 0:
                    yield number - len(rows), {self.column: rows}
                    rows = []
        if rows:
            yield number - len(rows), {self.column: rows}
        self.num_rows = number

    def _in_order(self) -> Iterator[dict[str, Any]]:
        """The rows of the stream; where an earlier step of it fails on a picture, the message says how far it came."""
        number = 0
        try:
            for row in self.dataset:
                yield row
                number += 1
        except (SyntaxError, Image.UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise ValueError(f"The stream ends at row {number}, as it cannot decode a picture: {error}") from error


class _Batch(NamedTuple):
    """Rows of one forward: all from `start` up to `end`, of which `rows` could be read.

    `pixel_values` is (rows, C, H, W), or None where there are no rows.
    """

    start: int
    end: int
    rows: list[int]
    fingerprints: list[str]
    pixel_values: Tensor | None


class _Reading:
    """From rows of a data set to what the model sees."""

    def __init__(self, source: _Source, image_processor: Any, config: Any, skip_unreadable: bool):
        self.source, self.image_processor, self.config = source, image_processor, config
        self.skip_unreadable = skip_unreadable

    def read(self, start: int, images: list[Any]) -> tuple[list[int], list[Image.Image]]:
        """Images of the rows from `start` on -> positions of those that can be read, and as many pictures."""
        rows, options = range(start, start + len(images)), {"skip_unreadable": self.skip_unreadable}
        return read_pictures(images, rows, self.image_processor, mode=self.source.mode, **options)

    def prepare(self, start: int, columns: dict[str, list]) -> _Batch:
        """Columns of the rows from `start` on -> a batch."""
        column, transform = self.source.column, self.source.transform
        images = [self._with_bytes(image) for image in columns[column]]
        positions, pictures = self.read(start, images)
        fingerprints = [fingerprint(images[position]) for position in positions]
        if transform is not None and positions:
            kept = {name: [values[position] for position in positions] for name, values in columns.items()}
            pictures = [load_image(picture) for picture in transform({**kept, column: pictures})[column]]
        pixel_values = pixel_values_of(pictures, self.image_processor, self.config) if positions else None
        rows = [start + position for position in positions]
        return _Batch(start, start + len(images), rows, fingerprints, pixel_values)

    def _with_bytes(self, image: Any) -> Any:
        """The image, fetched once where its path is remote; what cannot be fetched is left to `read` to name."""
        try:
            return fetched(image)
        except OSError:
            return image


class _Finished:
    """The files that were complete when a call began, and what they were computed from."""

    def __init__(self, folder: Path, is_mine: Callable[[int], bool], shard_size: int, reading: _Reading):
        self.folder, self.shard_size, self.reading = folder, shard_size, reading
        parts = {int(path.stem.removeprefix("part-")): path for path in folder.glob("part-*.parquet")}
        self.shards = {shard for shard in parts if is_mine(shard)}
        for shard in sorted(self.shards):
            _check_part(parts[shard])

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
        with _opened(self.folder / PART.format(shard)) as file:
            table = pq.read_table(file)
        return {row["row"]: row["image_sha256"] for row in table.select(table.column_names[:2]).to_pylist()}

    def _is_the_same(self, row: int, image: Any, known: dict[int, str]) -> bool:
        if row not in known:  # it was left out, and still has to be one that cannot be read
            return not self.reading.read(row, [image])[0]
        try:
            return fingerprint(fetched(image)) == known[row]
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"Row {row} holds no readable image any more: {error}") from error


class _Writer:
    """Writes batches of rows to their shard, under another name until the shard is whole."""

    def __init__(self, folder: Path, shard_size: int):
        self.folder, self.shard_size = folder, shard_size
        self.shard: int | None = None

    def __enter__(self) -> "_Writer":
        return self

    def write(self, batch: _Batch, table: pa.Table | None) -> None:
        """Append a batch's rows; None where all of them were left out."""
        if self.shard is None:
            self.shard = batch.start // self.shard_size
            self.temporary = self.folder / f".{PART.format(self.shard)}.{os.getpid()}"
            self.file = self.temporary.open("wb")
            self.parquet: pq.ParquetWriter | None = None
        if table is not None:
            self._append(table, batch.start)
        if batch.end % self.shard_size == 0:
            self._finish()

    def _append(self, table: pa.Table, start: int) -> None:
        if self.parquet is None:
            self.parquet = pq.ParquetWriter(self.file, table.schema, compression="zstd")
        elif table.schema != self.parquet.schema:
            raise ValueError(f"Rows from {start} on have another grid of patches: use a processor with a fixed size.")
        self.parquet.write_table(table)

    def _finish(self) -> None:
        if self.parquet is None:
            self.parquet = pq.ParquetWriter(self.file, ROW_SCHEMA)
        self.parquet.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        path = self.folder / PART.format(self.shard)
        # The checksum comes first: without its file it says nothing, but a file without it could be anyone's.
        with whole_file(path.with_suffix(CHECKSUM)) as draft:
            draft.write_text(f"{file_sha256(self.temporary)}  {path.name}\n", encoding="ascii")
        os.replace(self.temporary, path)
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
                if part is not None:
                    part.close()
        self.temporary.unlink(missing_ok=True)


def _write_rows(
    model: PreTrainedModel,
    batches: Iterator[_Batch],
    writer: _Writer,
    accelerator: Accelerator,
    attributed: int | Tensor | None,
    bar: tqdm,
) -> int:
    """Explain and write batches; return how many rows they had."""
    computed = 0
    model.to(accelerator.device)
    with _evaluating(model), writer:
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
def _explain(model: PreTrainedModel, batch: _Batch, pixel_values: Tensor, attributed: int | Tensor | None) -> pa.Table:
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
    for draft in folder.glob(f"{DRAFT}*"):
        shutil.rmtree(draft)


def _complete(folder: Path, num_rows: int, shard_size: int, skip_unreadable: bool) -> None:
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
        with _opened(folder / name) as file:
            rows = pq.read_table(file, columns=["row"])["row"].to_numpy()
        wanted = np.arange(first, min(first + shard_size, num_rows))
        left_out = np.setdiff1d(wanted, rows)
        if not np.array_equal(rows, np.setdiff1d(wanted, left_out)) or (len(left_out) and not skip_unreadable):
            raise OSError(f"{name} does not hold the rows from {first} on: delete it and call again.")
        skipped += left_out.tolist()
    if len(skipped) == num_rows:
        raise ValueError(f"`dataset` must have at least one readable image, got none in {num_rows} rows.")
    complete = {"complete": True, "num_rows": num_rows, "skipped_rows": skipped}
    _write_manifest(folder, {**_read_manifest(folder), **complete})


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    with whole_file(folder / MANIFEST) as draft:
        draft.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

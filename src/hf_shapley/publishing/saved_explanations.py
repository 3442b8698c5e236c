"""Read an explained data set back, as a `datasets` data set."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset

from .explanation_files import PART, ROW_SCHEMA, check_part, opened, read_manifest, recorded_checksum


def load_explanations(output_dir: str | os.PathLike, *, streaming: bool = False) -> Dataset | IterableDataset:
    """Read what `explain_dataset` wrote, row by row in the order of the data set.

    Raises:
        ValueError: the folder holds no complete run.
        OSError: a file is missing or damaged; of a stream, when the file is reached.
    """
    folder = Path(output_dir)
    manifest = read_manifest(folder)
    if not manifest or not manifest["complete"]:
        raise ValueError(f"{str(output_dir)!r} holds no complete run: call `explain_dataset` on it (again).")
    # `datasets` takes names of files for patterns, which a folder called "run[1]" or "a::b" is not.
    count = -(-manifest["num_rows"] // manifest["settings"]["shard_size"])
    parts = [(str(path), recorded_checksum(path)) for path in map(folder.joinpath, map(PART.format, range(count)))]
    options = {"features": _features(Path(path) for path, _ in parts), "gen_kwargs": {"parts": parts}}
    if streaming:
        return IterableDataset.from_generator(_rows, **options)
    for path, _ in parts:
        check_part(Path(path))
    return Dataset.from_generator(_rows, **options)


def _rows(parts: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Rows of parquet files, given with their checksums, by which `datasets` knows whether it has them already."""
    for path, _ in parts:
        check_part(Path(path))
        with opened(Path(path)) as file:
            for batch in pq.ParquetFile(file).iter_batches(256):
                yield from batch.to_pylist()


def _features(parts: Iterable[Path]) -> Features:
    """Columns of the first file that has more than row numbers."""
    for path in parts:
        check_part(path)
        with opened(path) as file:
            schema = pq.read_schema(file)
        if schema != ROW_SCHEMA:
            break
    return Features.from_arrow_schema(schema)

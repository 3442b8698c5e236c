"""The folder of an explained data set: parquet files, a checksum beside each, and a manifest.

A file is there under its name only when it is whole, and its checksum, in the form of `sha256sum`, is there before it.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..data.dataset_images import file_sha256
from ..files import whole_file
from .explanation_rows import Batch

MANIFEST = "manifest.json"
PART = "part-{:05d}.parquet"
CHECKSUM = ".sha256"
ROW_SCHEMA = pa.schema({"row": pa.int64()})  # of a file whose rows were all left out


def opened(path: Path) -> Any:
    """A file open for reading, by pyarrow's own interface: a path could be taken for a URL."""
    return pa.OSFile(str(path))


def recorded_checksum(path: Path) -> str:
    """SHA-256 that was written down when the file was."""
    beside = path.with_suffix(CHECKSUM)
    if not beside.is_file():
        raise OSError(
            f"{str(path)!r} has no {beside.name} beside it: it is not of this run, delete it and call again."
        )
    return beside.read_text(encoding="ascii", errors="replace").partition(" ")[0]


def check_part(path: Path) -> None:
    """Refuse a file that is not, byte for byte, what was written."""
    if file_sha256(path) != recorded_checksum(path):
        raise OSError(
            f"{str(path)!r} is damaged: its {path.stat().st_size} bytes are not those that were written. Delete it "
            "and call `explain_dataset` again."
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    with whole_file(folder / MANIFEST) as draft:
        draft.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


class Writer:
    """Writes batches of rows to their shard, under another name until the shard is whole."""

    def __init__(self, folder: Path, shard_size: int):
        self.folder, self.shard_size = folder, shard_size
        self.shard: int | None = None

    def __enter__(self) -> "Writer":
        return self

    def write(self, batch: Batch, table: pa.Table | None) -> None:
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

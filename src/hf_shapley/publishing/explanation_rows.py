"""From rows of a data set to what the model sees: batches of pictures, none beyond the file that its rows go to."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset
from PIL import Image
from torch import Tensor

from ..data.dataset_images import fetched, fingerprint, read_pictures, stored_mode, undecoded
from ..models.images import load_image
from ..models.pipeline_shapley import pixel_values_of


class Source:
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


class Batch(NamedTuple):
    """Rows of one forward: all from `start` up to `end`, of which `rows` could be read.

    `pixel_values` is (rows, C, H, W), or None where there are no rows.
    """

    start: int
    end: int
    rows: list[int]
    fingerprints: list[str]
    pixel_values: Tensor | None


class Reading:
    """From rows of a data set to what the model sees."""

    def __init__(self, source: Source, image_processor: Any, config: Any, skip_unreadable: bool):
        self.source, self.image_processor, self.config = source, image_processor, config
        self.skip_unreadable = skip_unreadable

    def read(self, start: int, images: list[Any]) -> tuple[list[int], list[Image.Image]]:
        """Images of the rows from `start` on -> positions of those that can be read, and as many pictures."""
        rows, options = range(start, start + len(images)), {"skip_unreadable": self.skip_unreadable}
        return read_pictures(images, rows, self.image_processor, mode=self.source.mode, **options)

    def prepare(self, start: int, columns: dict[str, list]) -> Batch:
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
        return Batch(start, start + len(images), rows, fingerprints, pixel_values)

    def _with_bytes(self, image: Any) -> Any:
        """The image, fetched once where its path is remote; what cannot be fetched is left to `read` to name."""
        try:
            return fetched(image)
        except OSError:
            return image

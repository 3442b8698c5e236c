"""Pictures of a data set: stored as they came, read by `load_image` alone, named by row where they cannot be read."""

import hashlib
import logging
import os
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, Image, IterableDataset
from datasets.utils.file_utils import xopen
from PIL import Image as PILImage

from ..models.images import load_image, to_rgb
from ..models.overlay import check_enlargement

logger = logging.getLogger(__name__)


def undecoded(dataset: Dataset | IterableDataset, column: str) -> Dataset | IterableDataset:
    """The same rows with pictures as bytes or paths: `datasets` would open formats that `load_image` refuses.

    Rows of `with_transform` are left as they are: a transform of the user's expects pictures.
    """
    feature = (dataset.features or {}).get(column)
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        return dataset
    return dataset.cast_column(column, Image(decode=False)) if isinstance(feature, Image) else dataset


def stored_mode(dataset: Dataset | IterableDataset, column: str) -> str | None:
    """The Pillow mode that the data set wants its pictures in, if it names one."""
    return getattr((dataset.features or {}).get(column), "mode", None)


def read_picture(
    image: Any,
    row: int | None,
    *,
    split: str | None = None,
    column: str | None = None,
    image_processor: Any = None,
) -> PILImage.Image:
    """Read the image of a row, upright and RGB; a message about one that cannot be read says whose it is.

    Args:
        image: what `load_image` reads, or a dict whose path is remote, as streams have them.
        row: its number in the data set, None where that is not known.
        split: which one the row is of, if there are several.
        column: which one the image is in, if there are several.
        image_processor: what will see it: a picture that it would enlarge beyond measure counts as unreadable.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        picture = load_image(fetched(image))
        check_enlargement(image_processor, picture.size)
    except (OSError, TypeError, ValueError) as error:
        path = image.get("path") if isinstance(image, dict) else None
        whose = ("A row" if row is None else f"Row {row}") + (f" of the split {split!r}" if split else "")
        place = (f" in {column!r}" if column else "") + (f" at {path!r}" if path and path not in str(error) else "")
        raise ValueError(f"{whose} holds no readable image{place}: {error}") from error
    return picture


def read_pictures(
    images: Sequence[Any],
    rows: Sequence[int],
    image_processor: Any,
    *,
    mode: str | None = None,
    skip_unreadable: bool = False,
) -> tuple[list[int], list[PILImage.Image]]:
    """Read the images of some rows, upright and RGB.

    Args:
        images: what `load_image` reads, or dicts whose path is remote, as streams have them.
        rows: their numbers in the data set, for messages.
        image_processor: what will see them: pictures that it would enlarge beyond measure count as unreadable.
        mode: Pillow mode to bring them to first.
        skip_unreadable: leave unreadable ones out, with a warning in the log.

    Returns:
        Positions in `images` of those that were read, and as many pictures.

    Raises:
        ValueError: one cannot be read.
    """
    positions, pictures = [], []
    for position, (row, image) in enumerate(zip(rows, images, strict=True)):
        try:
            picture = read_picture(image, row, image_processor=image_processor)
        except ValueError as error:
            if not skip_unreadable:
                raise
            logger.warning("%s It is left out.", error)
            continue
        positions.append(position)
        pictures.append(to_rgb(picture.convert(mode)) if mode else picture)
    return positions, pictures


def fetched(image: Any) -> Any:
    """What lies at a remote path, as bytes beside it; anything else as it is."""
    path = image.get("path") if isinstance(image, dict) and image.get("bytes") is None else None
    if not isinstance(path, str) or "://" not in path:
        return image
    try:
        with xopen(path, "rb") as stream:
            return {"bytes": stream.read(), "path": path}
    except Exception as error:  # of whatever library fetches from there
        raise OSError(f"Cannot fetch {path!r}: {error}") from error


def fingerprint(image: Any) -> str:
    """SHA-256 of an image, in hexadecimal: of its file or encoded bytes, else of its size and RGB pixels."""
    if isinstance(image, dict):
        image = image["path"] if image.get("bytes") is None else image["bytes"]
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    if isinstance(image, str | os.PathLike):
        return file_sha256(image)
    picture = load_image(image)
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal, as the command `sha256sum` gives it."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

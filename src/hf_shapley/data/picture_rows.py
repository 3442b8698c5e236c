"""Rows of a data set as a data loader reads them: a picture that cannot be read is named by its row and path."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset, Image

from .dataset_images import read_picture


class PictureRows(torch.utils.data.Dataset):
    """The same rows; where reading some fails, the error names the first whose picture is to blame.

    Args:
        rows: with pictures that the data set decodes.
        columns: where those are.
    """

    def __init__(self, rows: Dataset, columns: Sequence[str]):
        self.rows, self.columns = rows, columns

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        """Rows by number, as a data loader asks for a batch of them."""
        try:
            return self.rows.__getitems__(numbers)
        except Exception as error:  # Pillow's parsers raise many types on corrupt files, and transforms any
            self._refuse_unreadable(numbers, error)
            raise

    def _refuse_unreadable(self, numbers: list[int], cause: Exception) -> None:
        stored = self.rows.with_format(None)
        for column in self.columns:
            stored = stored.cast_column(column, Image(decode=False))
        for number in numbers:
            for column in self.columns:
                try:
                    read_picture(stored[number][column], number, column=column)
                except ValueError as unreadable:
                    raise unreadable from cause


def named_pictures(rows: Dataset) -> Dataset | PictureRows:
    """Rows whose unreadable pictures are named, where there are any that the data set decodes."""
    columns = [name for name, feature in rows.features.items() if isinstance(feature, Image) and feature.decode]
    return PictureRows(rows, columns) if columns else rows

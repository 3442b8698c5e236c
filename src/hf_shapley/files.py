"""Files that are whole or not there: neither a crash nor a full disk leaves half of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Give a path beside `path` to write to; what lies there replaces `path` once the block has ended well.

    Args:
        path: the file wanted, with any suffix; missing folders are made.

    Yields:
        A hidden path with the same suffix. It is gone afterwards, whatever happens, and an older `path` is left as it
        was if the block fails.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
